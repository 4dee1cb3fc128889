// Sums of backward products on their way from registers to the result.
// SPDX-License-Identifier: MIT
//
// A warpgroup that has part of a split tile leaves its sums in the workspace; the one that comes
// last adds all of them in order. Where all blocks have equal parts of tiles, those of a tile
// exchange sums, and each makes the results of some of its tokens.
#pragma once

#include "gpu/device/vector_io.cuh"
#include "gpu/gemm/wgmma_dgrad_shape.cuh"

#if BNB_HOPPER

namespace bnb::gpu {
namespace {

template <class T, class S>
struct DgradSums {
  static constexpr int kTokens = S::kTokens;
  static constexpr int kSums = kTokens / 2;  // of a thread
  using Sums = float[kSums];
  using Decoder = typename S::Codes::template Decoder<S::kTableAt>;

  const DgradTask<typename S::Codes>& task;
  char* dynamic;  // shared memory from kSharedStart on

  // Exchanges sums with the other blocks that have a part of the tile, each of which gets those of
  // its share of the tokens: the first ones of d then. Warps exchange with their like.
  template <int kCount>
  __device__ __forceinline__ void exchange(Sums& d, int part) const {
    constexpr int kShare = kSums / kCount;
    constexpr int kUnits = kShare / 4;  // of four sums
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    // Of what block `from` has for block `to`.
    const auto index = [&](int from, int to) {
      const int block = static_cast<int>(blockIdx.x) + from - part;
      return (int64_t{block} * kCount + to) * S::kWarps + warp;
    };
    auto* const sums = reinterpret_cast<float4*>(task.sums) + lane;
#pragma unroll
    for (int to = 0; to < kCount; ++to) {
      if (to == part) continue;
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        const int j = to * kShare + 4 * i;
        __stcg(sums + (index(part, to) * kUnits + i) * kWarp,
               float4{d[j], d[j + 1], d[j + 2], d[j + 3]});
      }
    }
    __syncwarp();
    if (lane < kCount && lane != part) {
      set_flag(task.arrivals + index(part, lane), task.launch);
      unsigned long long* const flag = task.arrivals + index(lane, part);
      wait_for_flag(flag, task.launch);
      *flag = 0;  // a launch may be replayed
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
#pragma unroll
      for (int own = 1; own < kCount; ++own) {
        if (own == part) d[i] = d[own * kShare + i];
      }
    }
#pragma unroll 1
    for (int from = 0; from < kCount; ++from) {
      if (from == part) continue;
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        const float4 x = __ldcg(sums + (index(from, part) * kUnits + i) * kWarp);
        d[4 * i] = __fadd_rn(d[4 * i], x.x);
        d[4 * i + 1] = __fadd_rn(d[4 * i + 1], x.y);
        d[4 * i + 2] = __fadd_rn(d[4 * i + 2], x.z);
        d[4 * i + 3] = __fadd_rn(d[4 * i + 3], x.w);
      }
    }
  }

  // Adds what others have of the tile to the warpgroup's sums, or leaves the sums to them; whether
  // it was the last.
  __device__ __forceinline__ bool add_parts(const Walk<S>& walk, Sums& d) const {
    const WgmmaPlan& plan = task.plan;
    if (walk.begin() == 0 && walk.end() == plan.stages) return true;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int split = walk.tile() - plan.whole;
    const int first_stage = split * plan.stages;
    const int first = plan.block_of(first_stage);
    const int count = plan.block_of(first_stage + plan.stages - 1) - first + 1;
    const int own = static_cast<int>(blockIdx.x) - first;
    // A block has at most two parts: of the tile where it begins, and of the one where it ends.
    constexpr int64_t kPart = S::kFeatures * kTokens / 4;
    auto* const parts = reinterpret_cast<float4*>(task.sums) + warp * (kSums * 8) +
                        static_cast<int>(threadIdx.x) % kWarp;
    const auto part = [&](int i) {
      return parts + (2 * (first + i) + (i == 0 && plan.first_of(first) < first_stage)) * kPart;
    };
    float4* const to = part(own);
#pragma unroll
    for (int i = 0; i < kSums / 4; ++i) {
      __stcg(to + i * kWarp, float4{d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]});
    }
    if (!comes_last(split, count)) return false;
    const auto add = [&](const float4* from) {
#pragma unroll
      for (int i = 0; i < kSums / 4; ++i) {
        const float4 x = __ldcg(from + i * kWarp);
        d[4 * i] = __fadd_rn(d[4 * i], x.x);
        d[4 * i + 1] = __fadd_rn(d[4 * i + 1], x.y);
        d[4 * i + 2] = __fadd_rn(d[4 * i + 2], x.z);
        d[4 * i + 3] = __fadd_rn(d[4 * i + 3], x.w);
      }
    };
    if (count == 2) {  // the order does not matter
      add(part(1 - own));
      return true;
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) d[i] = 0.0f;
    for (int i = 0; i < count; ++i) add(part(i));
    return true;
  }

  // Whether all other parts have arrived; what they stored before is visible then. A counter holds
  // the launch that it counts for, so that it need not be set before.
  __device__ __forceinline__ bool comes_last(int split, int count) const {
    const int group = static_cast<int>(threadIdx.x) / kGroup;
    int& last = reinterpret_cast<int*>(dynamic + S::kFlagsAt - kSharedStart)[group];
    __threadfence();
    named_barrier(1 + group, kGroup);
    if (threadIdx.x % kGroup == 0) {
      unsigned long long* const counter = task.arrivals + split * S::kGroups + group;
      unsigned long long seen = *counter;
      for (;;) {
        const unsigned long long before = (seen & ~0xffull) == task.launch ? seen & 0xffull : 0;
        const bool all = before + 1 == static_cast<unsigned>(count);
        const unsigned long long found =
            atomicCAS(counter, seen, all ? 0 : task.launch | (before + 1));
        last = all;
        if (found == seen) break;
        seen = found;
      }
      __threadfence();
    }
    named_barrier(1 + group, kGroup);
    const bool result = last != 0;
    named_barrier(1 + group, kGroup);
    return result;
  }

  // Rounds the sums of the first `count` tokens and sends them out, kOutTokens at a time. Sums
  // begin with those of `first_feature` and `first_token`.
  __device__ __forceinline__ void store(int first_feature, int first_token, int count,
                                        const Sums& d, const TensorMap& out_map) const {
    const int group = static_cast<int>(threadIdx.x) / kGroup;
    const int warp = static_cast<int>(threadIdx.x) % kGroup / kWarp;
    const uint32_t lane = threadIdx.x % kWarp;
    const int feature = first_feature + group * kGroupWidth;
    const auto out = static_cast<uint32_t>(S::kOutAt + group * S::kOutBytes);
    // A lane has two neighbouring features of tokens 2 t and 2 t + 1 of every eight.
    const uint32_t first_of_two = Decoder::feature_of(static_cast<uint32_t>(warp), lane / 4);
    uint32_t to[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      to[i] = out + swizzled(lane % 4 * 2 + i, first_of_two / 8) + first_of_two % 8 * 2;
    }
#pragma unroll
    for (int first = 0; first < kTokens; first += S::kOutTokens) {
      const int token = first_token + first;
      if (first >= count || token >= task.m) break;
      if (threadIdx.x % kGroup == 0) wait_for_stores<0>();
      named_barrier(1 + group, kGroup);
#pragma unroll
      for (int i = 0; i < S::kOutTokens / 8; ++i) {
        const float* const x = d + first / 2 + 4 * i;
        store_shared(to[0] + i * 8 * kRowBytes, pack_pair<T>(x[0], x[2]));
        store_shared(to[1] + i * 8 * kRowBytes, pack_pair<T>(x[1], x[3]));
      }
      fence_shared_for_async();
      named_barrier(1 + group, kGroup);
      if (threadIdx.x % kGroup == 0 && feature < task.k) {
        tensor_store(out_map, feature, token, out);
        end_stores();
      }
    }
  }
};

}  // namespace
}  // namespace bnb::gpu

#endif  // BNB_HOPPER
