// The kernel of wgmma_dgrad.cu.
// SPDX-License-Identifier: MIT
//
// out[i, k] = sum over j of grad[i, j] w[j, k]. Rows i are tokens, columns k features, and j, a row
// of the weight, is a term. As the tensor cores see it, out^T [features, tokens] = w^T grad^T: the
// weight is the operand in registers, so that it is decoded where it is needed, and grad the one in
// shared memory.
//
// A block of threads makes tiles of kFeatures x kTokens. Its warpgroups are
//
//     kGroups that multiply   64 features each: they decode their part of a stage, 64 terms, while
//                             the tensor cores are busy with the stage before
//     one that brings         a warp starts the copies of codes [64 terms, kFeatures / 2 bytes] and
//                             grads [kTokens, 64 terms] into a ring of stages; three bring the
//                             scales
//
// kFan neighbouring blocks of a cluster make tiles of the same tokens, and each copies its part of
// the grads to all of them. Where there are few tiles, several blocks share the terms of a tile:
// each leaves its sums in the workspace, and the last adds all of them in order.
//
// Decoding. A byte holds two neighbouring features of a term; a register of the operand, two
// neighbouring terms of a feature. A transposing load gives lane 4 g + t bytes 2 g and 2 g + 1 of
// terms 2 t and 2 t + 1, of which even warps use the first and odd warps the second. A table has
// the levels of both features of a byte, as floats and in 16 copies, so that the lanes of half a
// warp find theirs in different banks. Level * scale is rounded once: the weights are those that
// dequantize_4bit gives.
#pragma once

#include <type_traits>

#include "bitsandbytes/blocks.h"
#include "gpu/device/scales.cuh"
#include "gpu/device/tensor_copy.cuh"
#include "gpu/device/vector_io.cuh"
#include "gpu/device/wgmma.cuh"
#include "gpu/gemm/levels.cuh"

namespace bnb::gpu {
namespace {

constexpr int kTerms = 64;            // of a stage
constexpr int kGradRow = 2 * kTerms;  // bytes
constexpr int kGroup = 128;           // threads of a warpgroup
constexpr int kGroupWidth = 64;       // features of a warpgroup
constexpr int kScaleWarps = 3;
constexpr int kTableCopies = 16;
constexpr int kBarrierBytes = 16;  // of a stage

// The scales of a stage, in the order in which lanes read them: lane 4 g + t takes those of terms
// 8 i + 2 t and 8 i + 2 t + 1. The four places lie in different banks.
constexpr int kScalePitch = 2 * kTerms / 8 + 4;
constexpr int kScaleColumn = 4 * kScalePitch;
__device__ __forceinline__ int scale_place(int term) {
  return term / 2 % 4 * kScalePitch + term / 8 * 2 + term % 2;
}

// Tiles of kGroups * 64 features x kTokens tokens, made by clusters of kFan blocks.
template <int kTokens_, int kFan_, int kGroups>
struct Shape {
  static constexpr int kTokens = kTokens_;
  static constexpr int kFan = kFan_;
  static constexpr int kFeatures = kGroups * kGroupWidth;
  static constexpr int kMakers = kGroups * kGroup;
  static constexpr int kMakerWarps = kMakers / kWarp;
  static constexpr int kThreads = kMakers + kGroup;
  // The registers that the launch gives, moved to those who need them.
  static constexpr int kMakerRegisters = kGroups == 2 ? 208 : 104;
  static constexpr int kOtherRegisters = kGroups == 2 ? 88 : 64;

  // A stage.
  static constexpr int kGradBytes = kTokens * kGradRow;
  static constexpr int kCodeRow = kFeatures / 2;
  static constexpr Swizzle kCodeSwizzle = kCodeRow == 64 ? Swizzle::k64 : Swizzle::k128;
  static constexpr int kCodeBytes = kTerms * kCodeRow;
  static constexpr int kStageBytes = kGradBytes + kCodeBytes;
  static constexpr int kScaleBytes = kFeatures / kLeastBlock * kScaleColumn * int{sizeof(float)};

  // Shared memory: table, code of the scales, ring, scales, barriers, a flag.
  static constexpr int kMostBytes = 227 * 1024;
  static constexpr int kTableBytes = 256 * kTableCopies * int{sizeof(float2)};
  static constexpr int kRing = kTableBytes + kCodeLevels * int{sizeof(float)};
  static constexpr int kStages =
      (kMostBytes - kRing - 16) / (kStageBytes + kScaleBytes + kBarrierBytes);
  static constexpr int kScales = kRing + kStages * kStageBytes;
  static constexpr int kBarriers = kScales + kStages * kScaleBytes;
  static constexpr int kFlag = kBarriers + kStages * kBarrierBytes;
  static constexpr int kBytes = kFlag + 16;
  static_assert(kRing % 1024 == 0 && kStageBytes % 1024 == 0);
};

// What the kernel does.
struct DgradTask {
  Scales scales;
  Levels4 levels;
  void* out;  // [m, k]
  int64_t m;
  int64_t n;
  int64_t k;
  int log2_block;
  bool paired;        // scales of blocks b and b + 1 may be read together, where b is even
  int splits;         // of the terms of a tile
  int feature_tiles;  // of a cluster: kFan tiles wide
  int token_tiles;
  // With several splits:
  float* sums;                   // [tile][split][kTokens / 8][kMakers][4]
  unsigned long long* arrivals;  // [tile]
  unsigned long long launch;     // a number of its own, times 256
};

#if BNB_HOPPER

static_assert(sizeof(RingBarriers) == kBarrierBytes && kGradRow == kSwizzleRow);

// A tile, or a split of its terms. Stages come in pairs; the last may lie beyond the last term.
struct Job {
  int64_t feature;  // the first
  int64_t token;    // the first
  int first_stage;
  int last_stage;
  int tile;
  int split;
};

template <class S>
struct Dgrad {
  static constexpr int kTokens = S::kTokens;
  static constexpr int kFan = S::kFan;
  static constexpr int kFeatures = S::kFeatures;
  static constexpr int kStages = S::kStages;

  const DgradTask& task;
  char* shared;
  int fan;  // rank in the cluster

  __device__ __forceinline__ char* stage(int slot) const {
    return shared + S::kRing + slot * S::kStageBytes;
  }
  __device__ __forceinline__ float* scales(int slot) const {
    return reinterpret_cast<float*>(shared + S::kScales + slot * S::kScaleBytes);
  }
  __device__ __forceinline__ RingBarriers& barriers(int slot) const {
    return reinterpret_cast<RingBarriers*>(shared + S::kBarriers)[slot];
  }
  __device__ __forceinline__ void wait_empty(RingPlace<kStages> place) const {
    barriers(place.slot).empty.wait(place.phase ^ 1);
  }

  // Calls make(Job) for every job of this block.
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
    RingPlace<kStages> place;
    for_each_tile([&](const Job& job) {
      if (threadIdx.x % kWarp == 0) {
        for (int s = job.first_stage; s < job.last_stage; ++s) {
          wait_empty(place);
          TransactionBarrier& full = barriers(place.slot).full;
          const uint32_t to = shared_address(stage(place.slot));
          full.arrive_and_expect(S::kGradBytes + S::kCodeBytes);
          tensor_copy(to + S::kGradBytes, code_map, static_cast<int>(job.feature / 4), s * kTerms,
                      full);
          const int token = static_cast<int>(job.token) + fan * kPart;
          if constexpr (kFan > 1) {
            tensor_copy_to_cluster(to + fan * kPart * kGradRow, grad_map, s * kTerms, token, full,
                                   static_cast<uint16_t>((1 << kFan) - 1));
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
  // has two terms of a stage, and of each the scales of kColumns times kWidth features.
  template <bool kNested, int kWidth>
  __device__ __forceinline__ void bring_scales(int warp, const float* shared_code) const {
    constexpr int kColumns = kFeatures / kWidth;
    constexpr int kBatch = (kNested ? 4 : 8) / kColumns > 1 ? (kNested ? 4 : 8) / kColumns : 1;
    using Reader = ScaleReader<kNested>;
    const Reader scale_of(task.scales, shared_code);
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int64_t elements_of_half = kWarp * task.k;
    const int64_t elements_of_stage = kTerms * task.k;
    RingPlace<kStages> place;
    for_each_tile([&](const Job& job) {
      const int64_t first_term = int64_t{job.first_stage} * kTerms + lane;
      const int columns = static_cast<int>(min(task.k - job.feature, int64_t{kFeatures})) / kWidth;
      const int64_t terms = task.n - first_term;  // of this lane, counted from its first
      const int64_t element = first_term * task.k + job.feature;
      const auto there = [&](int s, int half, int c) {
        return s * kTerms + half * kWarp < terms && c < columns;
      };
      const int stages = job.last_stage - job.first_stage;
      typename Reader::Stored stored[kBatch][2][kColumns];
      const auto load = [&](int first) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int64_t of_stage = element + (first + i) * elements_of_stage;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int64_t of_lane = of_stage + half * elements_of_half;
#pragma unroll
            for (int c = 0; c < kColumns; c += 2) {
              if (first + i >= stages) continue;
              const int64_t block = (of_lane + c * kWidth) >> task.log2_block;
              if (kWidth == 64 && task.paired) {
                if (there(first + i, half, c)) {
                  scale_of.load_pair(block, stored[i][half][c], stored[i][half][c + 1]);
                }
              } else {
                if (there(first + i, half, c)) stored[i][half][c] = scale_of.load(block);
                if (there(first + i, half, c + 1)) {
                  stored[i][half][c + 1] =
                      scale_of.load((of_lane + (c + 1) * kWidth) >> task.log2_block);
                }
              }
            }
          }
        }
      };
      load(warp * kBatch);
      int s = 0;
      // Whoever waits for a stage takes part in it: nobody is then a turn of the ring ahead or
      // behind, where parities would mislead.
      const auto pass = [&](int to) {
        for (; s < to; ++s, place.advance()) {
          wait_empty(place);
          if (lane == 0) barriers(place.slot).full.arrive();
        }
      };
      for (int first = warp * kBatch; first < stages; first += kScaleWarps * kBatch) {
        pass(first);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (s == stages) break;
          wait_empty(place);
          float* const to = scales(place.slot);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
              to[c * kScaleColumn + scale_place(lane + half * kWarp)] =
                  there(s, half, c) ? scale_of.value(stored[i][half][c]) : 0.0f;
            }
          }
          __syncwarp();
          if (lane == 0) barriers(place.slot).full.arrive();
          ++s;
          place.advance();
        }
        load(first + kScaleWarps * kBatch);
      }
      pass(stages);
    });
  }

  __device__ __forceinline__ void bring_scales(int warp) const {
    const auto* const code = reinterpret_cast<const float*>(shared + S::kTableBytes);
    if (task.scales.codes != nullptr) {
      task.log2_block == 5 ? bring_scales<true, 32>(warp, code)
                           : bring_scales<true, 64>(warp, code);
    } else {
      task.log2_block == 5 ? bring_scales<false, 32>(warp, code)
                           : bring_scales<false, 64>(warp, code);
    }
  }

  // ---- Sums ----------------------------------------------------------------------------------

  // Of a thread among those that multiply.
  struct Position {
    int chunk;  // of 16 bytes, 32 features, in a row of codes
    int odd;    // which byte of two
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

  // The weights of a stage, as far as the thread holds them.
  template <class T>
  __device__ __forceinline__ void decode(int slot, const Position& at,
                                         uint32_t (&a)[kTerms / 16][4]) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const uint32_t codes =
        shared_address(stage(slot)) + S::kGradBytes + lane * S::kCodeRow +
        ((at.chunk ^ (S::kCodeSwizzle == Swizzle::k64 ? lane / 2 % 4 : lane % 8)) << 4);
    const int column = task.log2_block == 5 ? at.chunk : at.chunk / 2;
    const float* const scale_row = scales(slot) + column * kScaleColumn + at.t * kScalePitch;
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
      load_transposed(codes + half * 32 * S::kCodeRow, words);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 two = *reinterpret_cast<const float4*>(scale_row + 8 * half + i / 2 * 4);
        const float2 scale = i % 2 == 0 ? float2{two.x, two.y} : float2{two.z, two.w};
        const float2 x = levels_of(words[i], first);
        const float2 y = levels_of(words[i], second);
        uint32_t (&to)[4] = a[2 * half + i / 2];
        to[i % 2 * 2] = pack_pair<T>(__fmul_rn(x.x, scale.x), __fmul_rn(y.x, scale.y));
        to[i % 2 * 2 + 1] = pack_pair<T>(__fmul_rn(x.y, scale.x), __fmul_rn(y.y, scale.y));
      }
    }
  }

  // Starts the products of a stage.
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

  // Called by every warp that multiplies, once it has read the stage.
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

  // Rounds and stores four sums: of features f, f + 1 and tokens i, i + 1, tokens varying faster.
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

  // While the tensor cores are busy with one stage, the next is decoded into other registers.
  template <class T>
  __device__ __forceinline__ void make() const {
    const Position at;
    RingPlace<kStages> place;
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
                       int64_t{job.tile} * task.splits * kUnits * S::kMakers + threadIdx.x;
#pragma unroll
    for (int j = 0; j < kUnits; ++j) {
      __stcg(&sums[(job.split * kUnits + j) * S::kMakers],
             float4{d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]});
    }
    if (!comes_last(task.arrivals[job.tile])) return;
#pragma unroll
    for (int j = 0; j < kUnits; ++j) {
      float total[4] = {};
      for (int s = 0; s < task.splits; ++s) {
        float4 x{d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]};
        if (s != job.split) x = __ldcg(&sums[(s * kUnits + j) * S::kMakers]);
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
    bool& last = *reinterpret_cast<bool*>(shared + S::kFlag);
    __threadfence();
    named_barrier(1, S::kMakers);
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
    named_barrier(1, S::kMakers);
    const bool result = last;
    named_barrier(1, S::kMakers);
    return result;
  }
};

#endif  // BNB_HOPPER

template <class T, class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    wgmma_dgrad_kernel(BNB_GRID_CONSTANT const TensorMap grad_map,
                       BNB_GRID_CONSTANT const TensorMap code_map,
                       BNB_GRID_CONSTANT const DgradTask task) {
#if BNB_HOPPER
  extern __shared__ __align__(1024) char dgrad_shared[];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const Dgrad<S> dgrad{task, dgrad_shared, static_cast<int>(blockIdx.x) % S::kFan};

  for (int i = static_cast<int>(threadIdx.x); i < 256 * kTableCopies; i += S::kThreads) {
    const int byte = i / kTableCopies;
    reinterpret_cast<float2*>(dgrad_shared)[i] = {task.levels[byte >> 4], task.levels[byte & 15]};
  }
  if (task.scales.codes != nullptr) {
    ScaleReader<true>::fill_code(task.scales,
                                 reinterpret_cast<float*>(dgrad_shared + S::kTableBytes));
  }
  if (threadIdx.x == 0) {
    prefetch_map(grad_map);
    prefetch_map(code_map);
    for (int slot = 0; slot < S::kStages; ++slot) {
      dgrad.barriers(slot).full.init(1 + kScaleWarps);
      dgrad.barriers(slot).empty.init(S::kMakerWarps * S::kFan);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (S::kFan > 1) cluster_barrier();

  if (warp >= S::kMakerWarps) {
    give_registers<S::kOtherRegisters>();
    if (warp == S::kMakerWarps) {
      dgrad.copy(grad_map, code_map);
    } else {
      dgrad.bring_scales(warp - S::kMakerWarps - 1);
    }
    __syncwarp();
  } else {
    take_registers<S::kMakerRegisters>();
    dgrad.template make<T>();
  }
  // Others may still arrive at this block's barriers.
  if (S::kFan > 1) cluster_barrier();
#endif
}

}  // namespace
}  // namespace bnb::gpu
