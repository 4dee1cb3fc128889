// The backward product with a 4-bit weight on Hopper's tensor cores, for 16-bit dtypes.
// SPDX-License-Identifier: MIT
//
// out[i, k] = sum over j of grad[i, j] w[j, k]. Rows i are tokens, columns k features, and j, a row
// of the weight, is a term. As the tensor cores see it, out^T [features, tokens] = w^T grad^T: the
// weight is the operand in registers, so that it is decoded where it is needed, and grad the one in
// shared memory.
//
// A block of threads makes a tile of 128 features x kTokens tokens:
//
//     warps 0-3, 4-7   warpgroups of 64 features each: decode their part of a stage, 64 terms, while
//                      the tensor cores are busy with the stage before
//     warp 8           starts the copies of codes [64 terms, 64 bytes] and grads [kTokens, 64 terms]
//                      into a ring of stages
//     warps 9, 10      bring the scales of 32 terms of a stage each
//
// kFan neighbouring blocks of a cluster make tiles of the same tokens, and each copies its part of
// the grads to all of them. Where there are few tiles, `splits` groups of blocks share the terms of
// a tile: each leaves its sums in the shared memories of the cluster, where they are added in order.
//
// Decoding. A byte holds two neighbouring features of a term; a register of the operand, two
// neighbouring terms of a feature. A transposing load gives lane 4 g + t bytes 2 g and 2 g + 1 of
// terms 2 t and 2 t + 1, of which even warps use the first and odd warps the second. A table has the
// levels of both features of a byte, as floats and in 16 copies, so that the lanes of half a warp
// find theirs in different banks. Level * scale is rounded once: the weights are those that
// dequantize_4bit gives.
#include "gpu/gemm/wgmma_dgrad.h"

#include "bitsandbytes/blocks.h"
#include "gpu/runtime/runtime.cuh"

#include <algorithm>
#include <array>
#include <atomic>

#include "gpu/device/scales.cuh"
#include "gpu/device/tensor_copy.cuh"
#include "gpu/device/vector_io.cuh"
#include "gpu/device/wgmma.cuh"
#include "gpu/gemm/levels.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {
namespace {

constexpr int kFeatures = 128;  // of a tile
constexpr int kTerms = 64;      // of a stage
constexpr int kGroup = 128;     // threads of a warpgroup
constexpr int kMakers = 2 * kGroup;
constexpr int kThreads = kMakers + kGroup;
constexpr int kMakerWarps = kMakers / kWarp;
constexpr int kScaleWarps = 2;
constexpr int kTableCopies = 16;
constexpr int kTableBytes = 256 * kTableCopies * int{sizeof(float2)};
constexpr int kCodeRow = kFeatures / 2;
constexpr int kCodeBytes = kTerms * kCodeRow;
constexpr int kLargestCluster = 8;

template <int kTokens>
struct Stage {
  static constexpr int kGradBytes = kTokens * kSwizzleRow;
  static constexpr int kScales = kGradBytes + kCodeBytes;  // place: float [4][kTerms]
  static constexpr int kBytes = kScales + 4 * kTerms * int{sizeof(float)};
};

struct Barriers {
  TransactionBarrier full;   // codes, grads and scales are there
  TransactionBarrier empty;  // all who read them have done so
};

// Shared memory: table, code of the scales, ring, barriers.
template <int kTokens>
struct Shared {
  static constexpr int kMostBytes = 227 * 1024;
  static constexpr int kRing = kTableBytes + kCodeLevels * int{sizeof(float)};
  static constexpr int kStages =
      (kMostBytes - kRing) / (Stage<kTokens>::kBytes + int{sizeof(Barriers)});
  static constexpr int kBarriers = kRing + kStages * Stage<kTokens>::kBytes;
  static constexpr int kBytes = kBarriers + kStages * int{sizeof(Barriers)};
  static_assert(kRing % 1024 == 0 && Stage<kTokens>::kBytes % 1024 == 0);
};

struct DgradTask {
  Scales scales;
  Levels4 levels;
  void* out;  // [m, k]
  int64_t m;
  int64_t n;
  int64_t k;
  int log2_block;
  int splits;
  int feature_tiles;  // of a cluster: kFan tiles wide
  int token_tiles;
};

#if BNB_HOPPER

template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return to_bfloat16_pair(low, high);
  } else {
    uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
  }
}

// A place in the ring, and how often it has been there.
template <int kStages>
struct Place {
  int slot = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kStages) {
      slot = 0;
      phase ^= 1;
    }
  }
};

// What a block does for one tile. Stages come in pairs; the last may lie beyond the last term.
struct Job {
  int64_t feature;
  int64_t token;
  int first_stage;
  int last_stage;
};

template <int kTokens, int kFan>
struct Dgrad {
  using Layout = Shared<kTokens>;
  static constexpr int kStages = Layout::kStages;

  const DgradTask& task;
  char* shared;
  int fan;    // rank among the blocks of the same tokens and terms
  int split;  // rank among the blocks of the same tile

  __device__ __forceinline__ char* stage(int slot) const {
    return shared + Layout::kRing + slot * Stage<kTokens>::kBytes;
  }
  __device__ __forceinline__ Barriers& barriers(int slot) const {
    return reinterpret_cast<Barriers*>(shared + Layout::kBarriers)[slot];
  }
  __device__ __forceinline__ void wait_empty(Place<kStages> place) const {
    barriers(place.slot).empty.wait(place.phase ^ 1);
  }

  // Calls do(Job) for every tile of this block's cluster, then after_tile().
  template <class Do>
  __device__ __forceinline__ void for_each_tile(Do&& make) const {
    const int blocks = kFan * task.splits;
    const int clusters = static_cast<int>(gridDim.x) / blocks;
    const int tiles = task.feature_tiles * task.token_tiles;
    const int pairs = static_cast<int>(ceil_div(task.n, 2 * kTerms));
    for (int tile = static_cast<int>(blockIdx.x) / blocks; tile < tiles; tile += clusters) {
      const int column = tile % task.feature_tiles;
      make(Job{(int64_t{column} * kFan + fan) * kFeatures,
               int64_t{tile / task.feature_tiles} * kTokens,
               static_cast<int>(int64_t{pairs} * split / task.splits) * 2,
               static_cast<int>(int64_t{pairs} * (split + 1) / task.splits) * 2});
    }
  }

  // ---- Copies --------------------------------------------------------------------------------

  __device__ __forceinline__ void copy(const TensorMap& grad_map, const TensorMap& code_map) const {
    constexpr int kPart = kTokens / kFan;
    Place<kStages> place;
    for_each_tile([&](const Job& job) {
      if (threadIdx.x % kWarp == 0) {
        for (int s = job.first_stage; s < job.last_stage; ++s) {
          wait_empty(place);
          TransactionBarrier& full = barriers(place.slot).full;
          const uint32_t to = shared_address(stage(place.slot));
          full.arrive_and_expect(Stage<kTokens>::kGradBytes + kCodeBytes);
          tensor_copy(to + Stage<kTokens>::kGradBytes, code_map, static_cast<int>(job.feature / 4),
                      s * kTerms, full);
          const int token = static_cast<int>(job.token) + fan * kPart;
          if constexpr (kFan > 1) {
            tensor_copy_to_cluster(to + fan * kPart * kSwizzleRow, grad_map, s * kTerms, token,
                                   full,
                                   static_cast<uint16_t>(((1 << kFan) - 1) << (split * kFan)));
          } else {
            tensor_copy(to, grad_map, s * kTerms, token, full);
          }
          place.advance();
        }
      }
      __syncwarp();
      if (task.splits > 1) wait_for_sums();
    });
  }

  // ---- Scales --------------------------------------------------------------------------------

  // A lane has one term of every stage, and asks for its scales kAhead stages before.
  template <bool kNested, int kColumns>
  __device__ __forceinline__ void bring_scales(int warp, const float* shared_code) const {
    constexpr int kAhead = 8 / kColumns;
    constexpr int kWidth = kFeatures / kColumns;
    using Reader = ScaleReader<kNested>;
    const Reader scale_of(task.scales, shared_code);
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int in_stage = warp * kWarp + lane;
    // The same for every lane: kTerms * k is a multiple of every block size.
    const int64_t blocks_of_stage = kTerms * task.k >> task.log2_block;
    Place<kStages> place;
    for_each_tile([&](const Job& job) {
      const int64_t first_term = int64_t{job.first_stage} * kTerms + in_stage;
      int64_t block[kColumns];  // to load next
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        block[c] = (first_term * task.k + job.feature + c * kWidth) >> task.log2_block;
      }
      const int columns = static_cast<int>(min(task.k - job.feature, int64_t{kFeatures})) / kWidth;
      // Stages, counted from the first, in which this lane has a term.
      const int terms = static_cast<int>(max(task.n - first_term + kTerms - 1, int64_t{0}) / kTerms);
      const int stages = job.last_stage - job.first_stage;
      typename Reader::Stored stored[kAhead][kColumns];
      const auto load = [&](int s, typename Reader::Stored(&to)[kColumns]) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (s < stages && s < terms && c < columns) to[c] = scale_of.load(block[c]);
          block[c] += blocks_of_stage;
        }
      };
#pragma unroll
      for (int i = 0; i < kAhead; ++i) load(i, stored[i]);
      for (int first = 0; first < stages; first += kAhead) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int s = first + i;
          if (s >= stages) break;
          wait_empty(place);
          auto* const to = reinterpret_cast<float*>(stage(place.slot) + Stage<kTokens>::kScales);
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            to[c * kTerms + in_stage] =
                s < terms && c < columns ? scale_of.value(stored[i][c]) : 0.0f;
          }
          __syncwarp();
          if (lane == 0) barriers(place.slot).full.arrive();
          place.advance();
          load(s + kAhead, stored[i]);
        }
      }
      if (task.splits > 1) wait_for_sums();
    });
  }

  __device__ __forceinline__ void bring_scales(int warp) const {
    const auto* const code = reinterpret_cast<const float*>(shared + kTableBytes);
    if (task.scales.codes != nullptr) {
      task.log2_block == 5 ? bring_scales<true, 4>(warp, code) : bring_scales<true, 2>(warp, code);
    } else {
      task.log2_block == 5 ? bring_scales<false, 4>(warp, code)
                           : bring_scales<false, 2>(warp, code);
    }
  }

  // ---- Sums ----------------------------------------------------------------------------------

  // Of a thread among those that multiply.
  struct Position {
    int chunk;   // of 16 bytes, 32 features, in a row of codes
    int odd;     // which byte of two
    int g;
    int t;
    __device__ __forceinline__ Position() {
      const int warp = static_cast<int>(threadIdx.x) / kWarp;
      chunk = warp / 2;
      odd = warp % 2;
      g = static_cast<int>(threadIdx.x) % kWarp / 4;
      t = static_cast<int>(threadIdx.x) % 4;
    }
    // In the tile; the next feature is the thread's as well.
    __device__ __forceinline__ int feature() const { return 32 * chunk + 4 * g + 2 * odd; }
  };

  template <class T>
  __device__ __forceinline__ void decode(const char* stage, const Position& at,
                                         uint32_t (&a)[kTerms / 16][4]) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const uint32_t codes = shared_address(stage) + Stage<kTokens>::kGradBytes + lane * kCodeRow +
                           ((at.chunk ^ (lane / 2 % 4)) << 4);
    const int column = task.log2_block == 5 ? at.chunk : at.chunk / 2;
    const auto* const scales =
        reinterpret_cast<const float*>(stage + Stage<kTokens>::kScales) + column * kTerms + 2 * at.t;
    // Rotations that take the code of the first and of the second term to bits 7 to 14.
    const int first = at.odd ? 31 : 7;
    const int second = at.odd ? 15 : 23;
    const uint32_t copy = static_cast<uint32_t>(lane % kTableCopies * int{sizeof(float2)});
    const auto levels_of = [&](uint32_t word, int rotation) {
      const uint32_t place = (__funnelshift_l(word, word, rotation) & 0x7f80u) | copy;
      return *reinterpret_cast<const float2*>(shared + place);
    };
#pragma unroll
    for (int half = 0; half < kTerms / 32; ++half) {
      uint32_t words[4];
      load_transposed(codes + half * 32 * kCodeRow, words);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 scale = *reinterpret_cast<const float2*>(scales + 32 * half + 8 * i);
        const float2 x = levels_of(words[i], first);
        const float2 y = levels_of(words[i], second);
        uint32_t(&to)[4] = a[2 * half + i / 2];
        to[i % 2 * 2] = pack_pair<T>(__fmul_rn(x.x, scale.x), __fmul_rn(y.x, scale.y));
        to[i % 2 * 2 + 1] = pack_pair<T>(__fmul_rn(x.y, scale.x), __fmul_rn(y.y, scale.y));
      }
    }
  }

  template <class T>
  __device__ __forceinline__ void multiply(float (&d)[kTokens / 2],
                                           const uint32_t (&a)[kTerms / 16][4], const char* stage,
                                           bool accumulate) const {
    const uint64_t grads = swizzled_descriptor(shared_address(stage));
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < kTerms / 16; ++s) {
      Wgmma<T, kTokens>::run(d, a[s], advance_k(grads, s), accumulate || s > 0);
    }
    wgmma_commit();
  }

  // Called once per warp.
  __device__ __forceinline__ void release(int slot) const {
    if (threadIdx.x % kWarp == 0) {
      if constexpr (kFan > 1) {
#pragma unroll
        for (int f = 0; f < kFan; ++f) barriers(slot).empty.arrive_at(split * kFan + f);
      } else {
        barriers(slot).empty.arrive();
      }
    }
  }

  // Four sums: of features f, f + 1 and tokens i, i + 1, the tokens varying faster.
  template <class T>
  __device__ __forceinline__ void store(const Job& job, const Position& at, int unit,
                                        const float (&x)[4]) const {
    const int64_t feature = job.feature + at.feature();
    const int64_t token = job.token + 8 * unit + 2 * at.t;
    if (feature >= task.k) return;
    T* const to = static_cast<T*>(task.out) + token * task.k + feature;
    if (token < task.m) *reinterpret_cast<uint32_t*>(to) = pack_pair<T>(x[0], x[2]);
    if (token + 1 < task.m) *reinterpret_cast<uint32_t*>(to + task.k) = pack_pair<T>(x[1], x[3]);
  }

  template <class T>
  __device__ __forceinline__ void make() const {
    const Position at;
    Place<kStages> place;
    for_each_tile([&](const Job& job) {
      float d[kTokens / 2];
      uint32_t even[kTerms / 16][4];
      uint32_t odd[kTerms / 16][4];
      barriers(place.slot).full.wait(place.phase);
      decode<T>(stage(place.slot), at, even);
      int before = place.slot;
      for (int s = job.first_stage; s < job.last_stage; s += 2) {
        const int slot = place.slot;
        multiply<T>(d, even, stage(slot), s > job.first_stage);
        wgmma_wait<1>();
        if (s > job.first_stage) release(before);
        place.advance();
        barriers(place.slot).full.wait(place.phase);
        decode<T>(stage(place.slot), at, odd);
        before = place.slot;
        multiply<T>(d, odd, stage(before), true);
        wgmma_wait<1>();
        release(slot);
        place.advance();
        if (s + 2 < job.last_stage) {
          barriers(place.slot).full.wait(place.phase);
          decode<T>(stage(place.slot), at, even);
        }
      }
      wgmma_wait<0>();
      wgmma_hold(d);
      release(before);
      if (task.splits == 1) {
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
          store<T>(job, at, j, {d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]});
        }
      } else {
        add_splits<T>(job, at, d);
      }
    });
  }

  // The three barriers of add_splits(), for the other warps.
  __device__ __forceinline__ void wait_for_sums() const {
    cluster_barrier();
    cluster_barrier();
    cluster_barrier();
  }

  // Split r adds the sums of all splits for its part of the tokens.
  template <class T>
  __device__ __forceinline__ void add_splits(const Job& job, const Position& at,
                                             const float (&d)[kTokens / 2]) const {
    constexpr int kUnits = kTokens / 8;
    constexpr int kUnitBytes = kMakers * 16;
    const int shift = log2_of(kUnits / task.splits > 1 ? kUnits / task.splits : 1);
    const int part = 1 << shift;  // units of a split
    const uint32_t own = shared_address(stage(0)) + threadIdx.x * 16;
    cluster_barrier();  // nobody reads its ring any more
#pragma unroll
    for (int j = 0; j < kUnits; ++j) {
      const int place = (split << shift) + (j & (part - 1));
      store_in_cluster(address_in_block(own + place * kUnitBytes, (j >> shift) * kFan + fan),
                       {d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]});
    }
    cluster_barrier();
    for (int u = 0; u < part && split * part + u < kUnits; ++u) {
      float sums[4] = {};
      for (int s = 0; s < task.splits; ++s) {
        const float4 x = *reinterpret_cast<const float4*>(stage(0) + threadIdx.x * 16 +
                                                          ((s << shift) + u) * kUnitBytes);
        sums[0] = __fadd_rn(sums[0], x.x);
        sums[1] = __fadd_rn(sums[1], x.y);
        sums[2] = __fadd_rn(sums[2], x.z);
        sums[3] = __fadd_rn(sums[3], x.w);
      }
      store<T>(job, at, split * part + u, sums);
    }
    fence_shared_for_async();
    cluster_barrier();  // the ring may be filled again
  }
};

#endif  // BNB_HOPPER

template <class T, int kTokens, int kFan>
__global__ void __launch_bounds__(kThreads, 1)
    wgmma_dgrad_kernel(BNB_GRID_CONSTANT const TensorMap grad_map,
                       BNB_GRID_CONSTANT const TensorMap code_map,
                       BNB_GRID_CONSTANT const DgradTask task) {
#if BNB_HOPPER
  extern __shared__ __align__(1024) char dgrad_shared[];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int rank = cluster_rank();
  const Dgrad<kTokens, kFan> dgrad{task, dgrad_shared, rank % kFan, rank / kFan};

  for (int i = static_cast<int>(threadIdx.x); i < 256 * kTableCopies; i += kThreads) {
    const int byte = i / kTableCopies;
    reinterpret_cast<float2*>(dgrad_shared)[i] = {task.levels[byte >> 4], task.levels[byte & 15]};
  }
  if (task.scales.codes != nullptr) {
    ScaleReader<true>::fill_code(task.scales, reinterpret_cast<float*>(dgrad_shared + kTableBytes));
  }
  if (threadIdx.x == 0) {
    prefetch_map(grad_map);
    prefetch_map(code_map);
    for (int slot = 0; slot < Shared<kTokens>::kStages; ++slot) {
      dgrad.barriers(slot).full.init(1 + kScaleWarps);
      dgrad.barriers(slot).empty.init(kMakerWarps * kFan);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (kFan * task.splits > 1) cluster_barrier();

  if (warp >= kMakerWarps) {
    give_registers<72>();
    if (warp == kMakerWarps) {
      dgrad.copy(grad_map, code_map);
    } else if (warp <= kMakerWarps + kScaleWarps) {
      dgrad.bring_scales(warp - kMakerWarps - 1);
    } else if (task.splits > 1) {
      dgrad.for_each_tile([&](const Job&) { dgrad.wait_for_sums(); });
    }
  } else {
    take_registers<216>();
    dgrad.template make<T>();
  }
  // Others may still arrive at this block's barriers.
  if (kFan > 1) cluster_barrier();
#endif
}

// Clusters of so many blocks that are resident together.
template <class Kernel>
int resident_clusters(Kernel* kernel, int blocks, int shared_bytes) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  BNB_GPU_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
  return clusters;
}

struct Split {
  int splits;
  int clusters;
};

// The split of a tile's terms that ends first, by an estimate in clock cycles.
template <class T, int kTokens, int kFan>
Split choose_split(int64_t tiles, int64_t pairs) {
  constexpr int kPairCycles = std::max(8 * kTokens, 600);
  constexpr int kTileCycles = 3000 + 16 * kTokens;
  constexpr int kSplitCycles = 3000 + 16 * kTokens;
  Split best{1, 1};
  int64_t least = INT64_MAX;
  for (int splits = 1; splits * kFan <= kLargestCluster && splits <= pairs; splits *= 2) {
    const int clusters = resident_clusters(wgmma_dgrad_kernel<T, kTokens, kFan>, splits * kFan,
                                           Shared<kTokens>::kBytes);
    if (clusters == 0) continue;
    const int64_t cycles =
        ceil_div(tiles, clusters) * (ceil_div(pairs, splits) * kPairCycles + kTileCycles +
                                     (splits > 1 ? kSplitCycles : 0));
    if (cycles < least) {
      least = cycles;
      best = {splits, static_cast<int>(std::min<int64_t>(tiles, clusters))};
    }
  }
  return best;
}

int dgrad_force_splits = 0;  // EXPERIMENT

template <class T, int kTokens, int kFan>
void run(const Gemm4bitDgrad& args, Stream stream) {
  constexpr auto kernel = wgmma_dgrad_kernel<T, kTokens, kFan>;
  constexpr int kBytes = Shared<kTokens>::kBytes;
  const Weight4bit& w = args.weight;
  allow_shared(reinterpret_cast<const void*>(kernel), kBytes);
  const int64_t feature_tiles = ceil_div(w.k, kFeatures * kFan);
  const int64_t token_tiles = ceil_div(args.m, kTokens);
  Split split = choose_split<T, kTokens, kFan>(feature_tiles * token_tiles,
                                                     ceil_div(w.n, 2 * kTerms));
  if (dgrad_force_splits) {
    split.splits = dgrad_force_splits;
    split.clusters = std::min<int>(feature_tiles * token_tiles, resident_clusters(kernel, split.splits * kFan, kBytes));
  }
  const TensorMap grad_map =
      tensor_map(args.grad, args.m, 2 * w.n, kTokens / kFan, Swizzle::k128);
  const TensorMap code_map = tensor_map(w.codes, w.n, w.k / 2, kTerms, Swizzle::k64);
  const DgradTask task{w.scales,
                       Levels4(w),
                       args.out,
                       args.m,
                       w.n,
                       w.k,
                       log2_of(w.block_size),
                       split.splits,
                       static_cast<int>(feature_tiles),
                       static_cast<int>(token_tiles)};
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(kFan * split.splits), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(split.clusters * kFan * split.splits));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = &attribute;
  config.numAttrs = 1;
  BNB_GPU_CHECK(cudaLaunchKernelEx(&config, kernel, grad_map, code_map, task));
}

template <class T>
void run(const Gemm4bitDgrad& args, Stream stream) {
  if (args.m <= 16) return run<T, 16, 1>(args, stream);
  if (args.m <= 32) return run<T, 32, 1>(args, stream);
  if (args.m <= 64) return run<T, 64, 1>(args, stream);
  if (args.m <= 128) return run<T, 128, 2>(args, stream);
  return run<T, 256, 2>(args, stream);
}

}  // namespace

bool wgmma_gemm_4bit_dgrad_serves(const Gemm4bitDgrad&) { return true; }

void wgmma_gemm_4bit_dgrad(const Gemm4bitDgrad& args, Stream stream) {
  if (args.dtype == DType::kBFloat16) return run<BFloat16>(args, stream);
  return run<Half>(args, stream);
}

}  // namespace bnb::gpu
