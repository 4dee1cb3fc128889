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
#include <random>

#include "gpu/device/scales.cuh"
#include "gpu/device/tensor_copy.cuh"
#include "gpu/device/vector_io.cuh"
#include "gpu/device/wgmma.cuh"
#include "gpu/gemm/levels.cuh"
#include "gpu/runtime/check.h"

#ifndef DECODE
#define DECODE 64
#endif
namespace bnb::gpu {
namespace {

constexpr int kFeatures = 128;  // of a tile
constexpr int kTerms = 64;      // of a stage
constexpr int kGroup = 128;     // threads of a warpgroup
constexpr int kMakers = 2 * kGroup;
constexpr int kThreads = kMakers + kGroup;
constexpr int kMakerWarps = kMakers / kWarp;
constexpr int kScaleWarps = 3;
constexpr int kTableCopies = 16;
constexpr int kTableBytes = 256 * kTableCopies * int{sizeof(float2)};
constexpr int kCodeRow = kFeatures / 2;
constexpr int kCodeBytes = kTerms * kCodeRow;
constexpr int kLargestCluster = 8;

// The scales of a stage, in the order in which lanes read them: lane 4 g + t takes those of terms
// 8 i + 2 t and 8 i + 2 t + 1. The four places lie in different banks.
constexpr int kScalePitch = 2 * kTerms / 8 + 4;
constexpr int kScaleColumn = 4 * kScalePitch;
constexpr int kScaleBytes = 4 * kScaleColumn * int{sizeof(float)};
__device__ __forceinline__ int scale_place(int term) {
  return term / 2 % 4 * kScalePitch + term / 8 * 2 + term % 2;
}

template <int kTokens>
struct Stage {
  static constexpr int kGradBytes = kTokens * kSwizzleRow;
  static constexpr int kBytes = kGradBytes + kCodeBytes;
};

struct Barriers {
  TransactionBarrier full;   // codes, grads and scales are there
  TransactionBarrier empty;  // all who read them have done so
};

// Shared memory: table, code of the scales, ring, scales, barriers.
template <int kTokens>
struct Shared {
  static constexpr int kMostBytes = 227 * 1024;
  static constexpr int kRing = kTableBytes + kCodeLevels * int{sizeof(float)};
  static constexpr int kStages =
      (kMostBytes - kRing - 16) / (Stage<kTokens>::kBytes + kScaleBytes + int{sizeof(Barriers)});
  static constexpr int kScales = kRing + kStages * Stage<kTokens>::kBytes;
  static constexpr int kBarriers = kScales + kStages * kScaleBytes;
  static constexpr int kFlag = kBarriers + kStages * int{sizeof(Barriers)};
  static constexpr int kBytes = kFlag + 16;
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
  int splits;         // of the terms of a tile
  int feature_tiles;  // of a cluster: kFan tiles wide
  int token_tiles;
  // With several splits:
  float* sums;                   // [tile][split][kTokens / 8][kMakers][4]
  unsigned long long* arrivals;  // [tile]
  unsigned long long launch;     // a number of its own, times 256
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
  // `count` is at most kStages.
  __device__ __forceinline__ void advance(int count = 1) {
    slot += count;
    if (slot >= kStages) {
      slot -= kStages;
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
  int tile;
  int split;
};

template <int kTokens, int kFan>
struct Dgrad {
  using Layout = Shared<kTokens>;
  static constexpr int kStages = Layout::kStages;

  const DgradTask& task;
  char* shared;
  int fan;  // rank in the cluster

  __device__ __forceinline__ char* stage(int slot) const {
    return shared + Layout::kRing + slot * Stage<kTokens>::kBytes;
  }
  __device__ __forceinline__ float* scales(int slot) const {
    return reinterpret_cast<float*>(shared + Layout::kScales + slot * kScaleBytes);
  }
  __device__ __forceinline__ Barriers& barriers(int slot) const {
    return reinterpret_cast<Barriers*>(shared + Layout::kBarriers)[slot];
  }
  __device__ __forceinline__ void wait_empty(Place<kStages> place) const {
    barriers(place.slot).empty.wait(place.phase ^ 1);
  }

  // Calls make(Job) for every part of a tile that is this block's.
  template <class Do>
  __device__ __forceinline__ void for_each_tile(Do&& make) const {
    const int clusters = static_cast<int>(gridDim.x) / kFan;
    const int parts = task.feature_tiles * task.token_tiles * task.splits;
    const int pairs = static_cast<int>(ceil_div(task.n, 2 * kTerms));
    for (int part = static_cast<int>(blockIdx.x) / kFan; part < parts; part += clusters) {
      const int tile = part / task.splits;
      const int split = part % task.splits;
      const int column = tile % task.feature_tiles;
      make(Job{(int64_t{column} * kFan + fan) * kFeatures,
               int64_t{tile / task.feature_tiles} * kTokens,
               static_cast<int>(int64_t{pairs} * split / task.splits) * 2,
               static_cast<int>(int64_t{pairs} * (split + 1) / task.splits) * 2, tile * kFan + fan,
               split});
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
                                   full, static_cast<uint16_t>((1 << kFan) - 1));
          } else {
            tensor_copy(to, grad_map, s * kTerms, token, full);
          }
          place.advance();
        }
      }
    });
  }

  // ---- Scales --------------------------------------------------------------------------------

  // Warps take turns of kBatch stages, so that one waits for memory while the others store. A lane
  // has two terms of a stage.
  template <bool kNested, int kColumns>
  __device__ __forceinline__ void bring_scales(int warp, const float* shared_code) const {
    constexpr int kBatch = (kNested ? 4 : 8) / kColumns;
    constexpr int kWidth = kFeatures / kColumns;
    using Reader = ScaleReader<kNested>;
    const Reader scale_of(task.scales, shared_code);
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    // The same for every lane: kTerms * k is a multiple of every block size.
    const int64_t blocks_of_stage = kTerms * task.k >> task.log2_block;
    Place<kStages> place;
    for_each_tile([&](const Job& job) {
      const int64_t first_term = int64_t{job.first_stage} * kTerms + lane;
      const int columns = static_cast<int>(min(task.k - job.feature, int64_t{kFeatures})) / kWidth;
      const int64_t terms = task.n - first_term;  // of this lane, counted from its first
      // Of the first stage: the first block, and how far from it the others are.
      const int64_t block = (first_term * task.k + job.feature) >> task.log2_block;
      int from_first[2][kColumns];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int64_t element = (first_term + half * kWarp) * task.k + job.feature + c * kWidth;
          from_first[half][c] = static_cast<int>((element >> task.log2_block) - block);
        }
      }
      const auto there = [&](int s, int half, int c) {
        return s * kTerms + half * kWarp < terms && c < columns;
      };
      const int stages = job.last_stage - job.first_stage;
      int turn = 0;
      for (int first = 0; first < stages; first += kBatch, turn = turn == kScaleWarps - 1 ? 0 : turn + 1) {
        const int count = min(kBatch, stages - first);
        if (turn != warp) {
          place.advance(count);
          continue;
        }
        typename Reader::Stored stored[kBatch][2][kColumns];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
              if (i < count && there(first + i, half, c)) {
                stored[i][half][c] = scale_of.load(block + (first + i) * blocks_of_stage + from_first[half][c]);
              }
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (i >= count) break;
          wait_empty(place);
          float* const to = scales(place.slot);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
              to[c * kScaleColumn + scale_place(lane + half * kWarp)] =
                  there(first + i, half, c) ? scale_of.value(stored[i][half][c]) : 0.0f;
            }
          }
          __syncwarp();
          if (lane == 0) barriers(place.slot).full.arrive();
          place.advance(1);
        }
      }
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
  __device__ __forceinline__ void decode(int slot, const Position& at,
                                         uint32_t (&a)[kTerms / 16][4]) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const uint32_t codes = shared_address(stage(slot)) + Stage<kTokens>::kGradBytes +
                           lane * kCodeRow +
                           ((at.chunk ^ (lane / 2 % 4)) << 4);
    const int column = task.log2_block == 5 ? at.chunk : at.chunk / 2;
    const float* const scale_row = scales(slot) + column * kScaleColumn + at.t * kScalePitch;
    // Rotations that take the code of the first and of the second term to bits 7 to 14.
    const int first = at.odd ? 31 : 7;
    const int second = at.odd ? 15 : 23;
#if DECODE == 32
    const uint32_t copy = static_cast<uint32_t>(lane * 4);
    const auto levels_of = [&](uint32_t word, int rotation) {
      const uint32_t place = (__funnelshift_l(word, word, rotation) & 0x7f80u) | copy;
      return __half22float2(*reinterpret_cast<const __half2*>(shared + place));
    };
#elif DECODE == 1
    const uint32_t copy = static_cast<uint32_t>(lane * 4);
    const auto levels_of = [&](uint32_t word, int rotation) {
      const uint32_t place = (__funnelshift_l(word, word, rotation) & 0x7f80u) | copy;
      return float2{__uint_as_float(place), __uint_as_float(place+1)};
    };
#else
    const uint32_t copy = static_cast<uint32_t>(lane % kTableCopies * int{sizeof(float2)});
    const auto levels_of = [&](uint32_t word, int rotation) {
      const uint32_t place = (__funnelshift_l(word, word, rotation) & 0x7f80u) | copy;
      return *reinterpret_cast<const float2*>(shared + place);
    };
#endif
#if DECODE == 0
#pragma unroll
    for (int i = 0; i < 4; ++i) for (int j = 0; j < 4; ++j) a[i][j] = codes + i * 4 + j;
    return;
#endif
#pragma unroll
    for (int half = 0; half < kTerms / 32; ++half) {
      uint32_t words[4];
      load_transposed(codes + half * 32 * kCodeRow, words);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 two = *reinterpret_cast<const float4*>(scale_row + 8 * half + i / 2 * 4);
        const float2 scale = i % 2 == 0 ? float2{two.x, two.y} : float2{two.z, two.w};
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
        for (int f = 0; f < kFan; ++f) barriers(slot).empty.arrive_at(f);
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
      decode<T>(place.slot, at, even);
      int before = place.slot;
      for (int s = job.first_stage; s < job.last_stage; s += 2) {
        const int slot = place.slot;
        multiply<T>(d, even, stage(slot), s > job.first_stage);
        wgmma_wait<1>();
        if (s > job.first_stage) release(before);
        place.advance();
        barriers(place.slot).full.wait(place.phase);
        decode<T>(place.slot, at, odd);
        before = place.slot;
        multiply<T>(d, odd, stage(before), true);
        wgmma_wait<1>();
        release(slot);
        place.advance();
        if (s + 2 < job.last_stage) {
          barriers(place.slot).full.wait(place.phase);
          decode<T>(place.slot, at, even);
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

  // Leaves the sums in the workspace; whoever comes last adds those of all splits, in order.
  template <class T>
  __device__ __forceinline__ void add_splits(const Job& job, const Position& at,
                                             const float (&d)[kTokens / 2]) const {
    constexpr int kUnits = kTokens / 8;
    auto* const sums = reinterpret_cast<float4*>(task.sums) +
                       int64_t{job.tile} * task.splits * kUnits * kMakers + threadIdx.x;
#pragma unroll
    for (int j = 0; j < kUnits; ++j) {
      __stcg(&sums[(job.split * kUnits + j) * kMakers],
             float4{d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]});
    }
    if (!comes_last(task.arrivals[job.tile])) return;
#pragma unroll
    for (int j = 0; j < kUnits; ++j) {
      float total[4] = {};
      for (int s = 0; s < task.splits; ++s) {
        float4 x{d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]};
        if (s != job.split) x = __ldcg(&sums[(s * kUnits + j) * kMakers]);
        total[0] = __fadd_rn(total[0], x.x);
        total[1] = __fadd_rn(total[1], x.y);
        total[2] = __fadd_rn(total[2], x.z);
        total[3] = __fadd_rn(total[3], x.w);
      }
      store<T>(job, at, j, total);
    }
  }

  // Whether all other splits have arrived; what they stored before is visible then. A counter holds
  // the launch that it counts for, so that it need not be set before.
  __device__ __forceinline__ bool comes_last(unsigned long long& counter) const {
    bool& last = *reinterpret_cast<bool*>(shared + Layout::kFlag);
    __threadfence();
    named_barrier(1, kMakers);
    if (threadIdx.x == 0) {
      unsigned long long seen = counter;
      for (;;) {
        const unsigned long long before = (seen & ~0xffull) == task.launch ? seen & 0xffull : 0;
        const bool all = before + 1 == static_cast<unsigned>(task.splits);
        const unsigned long long found =
            atomicCAS(&counter, seen, all ? 0 : task.launch | (before + 1));
        last = all;
        if (found == seen) break;
        seen = found;
      }
      __threadfence();
    }
    named_barrier(1, kMakers);
    const bool result = last;
    named_barrier(1, kMakers);
    return result;
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
  const Dgrad<kTokens, kFan> dgrad{task, dgrad_shared, static_cast<int>(blockIdx.x) % kFan};

  for (int i = static_cast<int>(threadIdx.x); i < 256 * kTableCopies; i += kThreads) {
    const int byte = i / kTableCopies;
#if DECODE == 32
    reinterpret_cast<__half2*>(dgrad_shared)[2 * i] = reinterpret_cast<__half2*>(dgrad_shared)[2 * i + 1] = __floats2half2_rn(task.levels[byte >> 4], task.levels[byte & 15]);
    if (0)
#endif
    reinterpret_cast<float2*>(dgrad_shared)[i] = {task.levels[byte >> 4], task.levels[byte & 15]};
  }
  if (task.scales.codes != nullptr) {
    ScaleReader<true>::fill_code(task.scales, reinterpret_cast<float*>(dgrad_shared + kTableBytes));
  }
  if (threadIdx.x == 0) {
    prefetch_map(grad_map);
    prefetch_map(code_map);
    for (int slot = 0; slot < Shared<kTokens>::kStages; ++slot) {
      dgrad.barriers(slot).full.init(1 + 1);
      dgrad.barriers(slot).empty.init(kMakerWarps * kFan);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (kFan > 1) cluster_barrier();

  if (warp >= kMakerWarps) {
    give_registers<72>();
    if (warp == kMakerWarps) {
      dgrad.copy(grad_map, code_map);
    } else {
      dgrad.bring_scales(warp - kMakerWarps - 1);
    }
    __syncwarp();
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

// How a product is cut.
struct Cut {
  int splits;
  int clusters;
  int feature_tiles;  // of a cluster
  int token_tiles;
};

int dgrad_force_splits = 0;  // EXPERIMENT

// The split of a tile's terms that ends first, by an estimate in clock cycles.
template <class T, int kTokens, int kFan>
Cut choose_cut(const Gemm4bitDgrad& args) {
  constexpr int kPairCycles = std::max(8 * kTokens, 600);
  constexpr int kTileCycles = 2500 + 4 * kTokens;
  constexpr int kSplitCycles = 2000 + 24 * kTokens;
  constexpr int kMostSplits = 32;
  constexpr auto kernel = wgmma_dgrad_kernel<T, kTokens, kFan>;
  const int64_t features = ceil_div(args.weight.k, kFeatures * kFan);
  const int64_t tokens = ceil_div(args.m, kTokens);
  const int64_t tiles = features * tokens;
  const int64_t pairs = ceil_div(args.weight.n, 2 * kTerms);
  allow_shared(reinterpret_cast<const void*>(kernel), Shared<kTokens>::kBytes);
  const int clusters = kFan == 1 ? multiprocessors()
                                 : resident_clusters(kernel, kFan, Shared<kTokens>::kBytes);
  int best = 1;
  int64_t least = INT64_MAX;
  for (int splits = 1; splits <= std::min<int64_t>(kMostSplits, pairs); ++splits) {
    if (splits > 1 && tiles * splits > 2 * clusters) break;
    const int64_t cycles =
        ceil_div(tiles * splits, clusters) *
        (ceil_div(pairs, splits) * kPairCycles + kTileCycles + (splits > 1 ? kSplitCycles : 0));
    if (cycles < least) {
      least = cycles;
      best = splits;
    }
  }
  if (dgrad_force_splits) best = dgrad_force_splits;
  return {best, static_cast<int>(std::min<int64_t>(tiles * best, clusters)),
          static_cast<int>(features), static_cast<int>(tokens)};
}

template <int kTokens, int kFan>
int64_t sums_bytes(const Cut& cut) {
  return int64_t{cut.feature_tiles} * kFan * cut.token_tiles * cut.splits * kFeatures * kTokens *
         int64_t{sizeof(float)};
}

// For a counter of arrivals to tell launches apart.
inline unsigned long long next_launch() {
  static std::atomic<unsigned long long> launches{std::random_device{}() +
                                                  (uint64_t{std::random_device{}()} << 32)};
  return ++launches << 8;
}

template <class T, int kTokens, int kFan>
void run(const Gemm4bitDgrad& args, void* workspace, Stream stream) {
  constexpr auto kernel = wgmma_dgrad_kernel<T, kTokens, kFan>;
  constexpr int kBytes = Shared<kTokens>::kBytes;
  const Weight4bit& w = args.weight;
  const Cut cut = choose_cut<T, kTokens, kFan>(args);
  const TensorMap grad_map =
      tensor_map(args.grad, args.m, 2 * w.n, kTokens / kFan, Swizzle::k128);
  const TensorMap code_map = tensor_map(w.codes, w.n, w.k / 2, kTerms, Swizzle::k64);
  auto* const sums = static_cast<float*>(workspace);
  auto* const arrivals = reinterpret_cast<unsigned long long*>(static_cast<char*>(workspace) +
                                                               sums_bytes<kTokens, kFan>(cut));
  const DgradTask task{w.scales,
                       Levels4(w),
                       args.out,
                       args.m,
                       w.n,
                       w.k,
                       log2_of(w.block_size),
                       cut.splits,
                       cut.feature_tiles,
                       cut.token_tiles,
                       sums,
                       arrivals,
                       next_launch()};
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kFan, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(cut.clusters * kFan));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = &attribute;
  config.numAttrs = 1;
  BNB_GPU_CHECK(cudaLaunchKernelEx(&config, kernel, grad_map, code_map, task));
}

template <class T>
void run(const Gemm4bitDgrad& args, void* workspace, Stream stream) {
  if (args.m <= 16) return run<T, 16, 1>(args, workspace, stream);
  if (args.m <= 32) return run<T, 32, 1>(args, workspace, stream);
  if (args.m <= 64) return run<T, 64, 1>(args, workspace, stream);
  if (args.m <= 128) return run<T, 128, 2>(args, workspace, stream);
  return run<T, 256, 2>(args, workspace, stream);
}

}  // namespace

bool wgmma_gemm_4bit_dgrad_serves(const Gemm4bitDgrad&) { return true; }

void wgmma_gemm_4bit_dgrad(const Gemm4bitDgrad& args, void* workspace, Stream stream) {
  if (args.dtype == DType::kBFloat16) return run<BFloat16>(args, workspace, stream);
  return run<Half>(args, workspace, stream);
}

}  // namespace bnb::gpu
