// The kernel of wgmma_dgrad.cu.
// SPDX-License-Identifier: MIT
//
// out[i, k] = sum over j of grad[i, j] w[j, k]. Rows i are tokens, columns k features, and j, a row
// of the weight, is a term. As the tensor cores see it, out^T [features, tokens] = w^T grad^T, both
// operands from shared memory. A block of threads makes tiles of kFeatures x kTokens:
//
//     codes [64 terms, 128 features] --> kDecoders warpgroups --> weights --+
//                                                                           v
//     grads [kTokens, 64 terms] ------------> kGroups warpgroups that multiply 64 features each
//
// Codes come through a ring of stages, 64 terms each, for each warpgroup that decodes; weights and
// grads through another one for all. So nobody who multiplies waits for a weight to be decoded, and
// a weight is decoded once for all the tokens of a tile. The copy engine brings codes and grads.
//
// Tiles are cut as wgmma_plan.cuh says, with terms in the place of k there. A warpgroup that has
// part of a split tile leaves its sums in the workspace; the one that comes last adds all of them
// in order. Where all blocks have equal parts of tiles, those of a tile exchange sums, and each
// makes the results of some of its tokens: two of large tiles are a cluster and do so through
// shared memory, more of them, or of small tiles, through the workspace.
#pragma once

#include "gpu/device/vector_io.cuh"
#include "gpu/gemm/wgmma_dgrad_shape.cuh"

namespace bnb::gpu {
namespace {

#if BNB_HOPPER

template <class T, class S>
struct Dgrad {
  static constexpr int kTokens = S::kTokens;
  static constexpr int kStages = S::kStages;
  static constexpr int kSums = kTokens / 2;  // of a thread
  // An instruction makes the products of at most 128 tokens: one for 256 would need more registers
  // than the launch gives.
  static constexpr int kParts = kTokens == 256 && S::kDecoders > 1 ? 2 : 1;
  using Sums = float[kParts][kSums / kParts];
  using Place = RingPlace<kStages>;

  const DgradTask<typename S::Codes>& task;
  char* shared;

  __device__ __forceinline__ uint32_t stage(int slot) const {
    return shared_address(shared) + slot * S::kStageBytes;
  }
  __device__ __forceinline__ RingBarriers& barriers(int slot) const {
    return reinterpret_cast<RingBarriers*>(shared + S::kBarriers)[slot];
  }
  // Of all warpgroups that decode, one after the other.
  __device__ __forceinline__ uint32_t codes(int slot) const {
    return shared_address(shared) + S::kCodes + slot * S::kCodeBytes;
  }
  __device__ __forceinline__ RingBarriers& code_barriers(int slot) const {
    return reinterpret_cast<RingBarriers*>(shared + S::kCodeBarriers)[slot];
  }

  // ---- Weights -------------------------------------------------------------------------------

  // Starts the copy of codes of a stage.
  __device__ __forceinline__ void copy_codes(const TensorMap& map, const Turns<S>& turns,
                                             int slot) const {
    const BarrierAt full = code_barriers(slot).full.at();
    full.arrive_and_expect(S::kCodeBytes);
    tensor_copy(codes(slot), map, turns.feature / S::kFeatures * (S::kCodeRow / 2),
                turns.stage * kTerms, full);
  }

  // Warpgroups take turns of stages. A thread decodes one term of 64 features. Codes are copied
  // kCodeStages turns before they are decoded; scales are read two before.
  template <class Decoder>
  __device__ __forceinline__ void decode(const Decoder& decoder, int thread,
                                         const TensorMap& grad_map,
                                         const TensorMap& code_map) const {
    constexpr int kChunks = S::Codes::kCodeBytes / 16;
    constexpr bool kNarrow = S::Codes::kSwizzle == Swizzle::k64;
    const int turn = thread / kGroup;
    const int column = thread % kGroup / kTerms;
    const int term = thread % kTerms;
    const bool copies = thread % kGroup == 0;
    const int first_slot = turn * S::kCodeStages;
    const uint32_t weight_row = S::kGradBytes + column * S::kGroupBytes + term * kRowBytes;

    Turns<S> now(task, turn);
    Turns<S> scaled = now;
    Turns<S> coded = now;
    if (copies) {
      for (int i = 0; i < S::kCodeStages - 1 && coded.next(); ++i) {
        copy_codes(code_map, coded, first_slot + i);
      }
    }
    const auto feature_of = [&](const Turns<S>& turns) {
      return turns.feature + column * kGroupWidth;
    };
    const auto there = [&](const Turns<S>& turns) {
      return int64_t{turns.stage} * kTerms + term < task.n && feature_of(turns) < task.k;
    };
    typename Decoder::Ahead ahead[2];
    const auto load = [&](typename Decoder::Ahead& to) {
      if (scaled.next() && there(scaled)) {
        decoder.load(int64_t{scaled.stage} * kTerms + term, feature_of(scaled), to);
      }
    };
    load(ahead[0]);
    load(ahead[1]);

    Place place;
    place.advance(turn);
    RingPlace<S::kCodeStages> from;
    RingPlace<S::kCodeStages> before;  // where the stage before the present one lay
    before.slot = S::kCodeStages - 1;
    before.phase = 1;
    const auto make = [&](typename Decoder::Ahead& scales) {
      if (!now.next()) return false;
      const BarrierAt full = barriers(place.slot).full.at();
      barriers(place.slot).empty.wait(place.phase ^ 1);
      if (copies) {
        full.arrive_and_expect(S::kGradBytes);
        tensor_copy(stage(place.slot), grad_map, now.stage * kTerms, now.token, full);
        if (coded.next()) {
          code_barriers(first_slot + before.slot).empty.wait(before.phase);
          copy_codes(code_map, coded, first_slot + before.slot);
        }
      }
      __syncwarp();
      code_barriers(first_slot + from.slot).full.wait(from.phase);
      uint4 words[kChunks];
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int chunk = (column * kChunks + c) ^ (kNarrow ? term / 2 % 4 : term % 8);
        words[c] = load_shared4(codes(first_slot + from.slot) + term * S::kCodeRow + chunk * 16);
      }
      __syncwarp();
      if (thread % kWarp == 0) code_barriers(first_slot + from.slot).empty.arrive();
      const uint32_t to = stage(place.slot) + weight_row;
      decoder.decode(words, scales, there(now), [&](int chunk, uint4 x) {
        store_shared4(to + ((chunk ^ (term % 8)) << 4), x);
      });
      load(scales);
      fence_shared_for_async();
      __syncwarp();
      if (thread % kWarp == 0) full.arrive();
      place.advance(S::kDecoders);
      from.advance();
      before.advance();
      return true;
    };
    while (make(ahead[0]) && make(ahead[1])) {
    }
  }

  // ---- Sums ----------------------------------------------------------------------------------

  template <class AnySums>
  __device__ __forceinline__ static auto& at(AnySums& d, int i) {
    return d[i / (kSums / kParts)][i % (kSums / kParts)];
  }

  // Called by every warp that multiplies, once it has read the stage.
  __device__ __forceinline__ void release(int slot) const {
    if (threadIdx.x % kWarp == 0) barriers(slot).empty.arrive();
  }

  __device__ __forceinline__ void multiply(const TensorMap& out_map) const {
    const int group = static_cast<int>(threadIdx.x) / kGroup;
    Walk<S> walk(task);
    Place place;
    while (walk.next()) {
      Sums d;
#pragma unroll
      for (int i = 0; i < kSums; ++i) at(d, i) = 0.0f;
      int before = -1;
      for (int s = walk.begin(); s < walk.end(); ++s) {
        const uint32_t from = stage(place.slot);
        const uint64_t grads = swizzled_descriptor(from);
        const uint64_t weights = swizzled_descriptor(from + S::kGradBytes + group * S::kGroupBytes);
        barriers(place.slot).full.wait(place.phase);
        wgmma_fence();
#pragma unroll
        for (int p = 0; p < kTerms / 16; ++p) {
#pragma unroll
          for (int i = 0; i < kParts; ++i) {
            WgmmaSharedTransposed<T, kTokens / kParts>::run(
                d[i], advance_rows_of_k(weights, p),
                advance_k(grads + i * (kTokens / kParts * kRowBytes >> 4), p), true);
          }
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (before >= 0) release(before);
        before = place.slot;
        place.advance();
      }
      wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < kParts; ++i) wgmma_hold(d[i]);
      release(before);
      if (S::kPairs && task.parts == 2) {
        const int rank = static_cast<int>(blockIdx.x) % 2;
        rank == 0 ? add_partner<0>(d) : add_partner<1>(d);
        store(walk.feature, walk.token, d, out_map, rank * (kTokens / 2), kTokens / 2);
      } else if (S::kShares && task.parts > 1) {
        const int part = static_cast<int>(blockIdx.x) % task.parts;
        const auto share = [&]<int kCount>() {
          if constexpr (kCount <= S::kMostParts) {
            constexpr int kShare = kTokens / kCount;
            exchange<kCount>(d, part);
            store(walk.feature, walk.token + part * kShare, d, out_map, 0, kShare);
          }
        };
        if (task.parts == 2) {
          share.template operator()<2>();
        } else if (task.parts == 4) {
          share.template operator()<4>();
        } else {
          share.template operator()<8>();
        }
      } else if (add_parts(walk, d)) {
        store(walk.feature, walk.token, d, out_map, 0, kTokens);
      }
      __syncwarp();
    }
    // What is on its way out must have left shared memory.
    if (threadIdx.x % kGroup == 0) wait_for_stores<0>();
  }

  // Exchanges sums with the other block of the cluster, which has the other part of the tile: each
  // gets those of half of the tokens. They pass through the ring, which is no longer needed.
  template <int kRank>
  __device__ __forceinline__ void add_partner(Sums& d) const {
    constexpr int kUnits = kSums / 8;  // of four sums
    static_assert(kSums / 2 * 4 * S::kGroups * kGroup <= S::kCodes);
    const uint32_t here = shared_address(shared) + threadIdx.x * 16;
    const uint32_t there = address_in_block(here, 1 - kRank);
    constexpr int kPitch = S::kGroups * kGroup * 16;
    cluster_barrier();  // the other's ring is free
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int j = 4 * ((1 - kRank) * kUnits + i);
      const float x[4] = {at(d, j), at(d, j + 1), at(d, j + 2), at(d, j + 3)};
      store_in_cluster(there + i * kPitch, x);
    }
    cluster_barrier();
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int j = 4 * (kRank * kUnits + i);
      const uint4 x = load_shared4(here + i * kPitch);
      at(d, j) = __fadd_rn(at(d, j), bits_float(x.x));
      at(d, j + 1) = __fadd_rn(at(d, j + 1), bits_float(x.y));
      at(d, j + 2) = __fadd_rn(at(d, j + 2), bits_float(x.z));
      at(d, j + 3) = __fadd_rn(at(d, j + 3), bits_float(x.w));
    }
  }

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
               float4{at(d, j), at(d, j + 1), at(d, j + 2), at(d, j + 3)});
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
        if (own == part) at(d, i) = at(d, own * kShare + i);
      }
    }
#pragma unroll 1
    for (int from = 0; from < kCount; ++from) {
      if (from == part) continue;
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        const float4 x = __ldcg(sums + (index(from, part) * kUnits + i) * kWarp);
        at(d, 4 * i) = __fadd_rn(at(d, 4 * i), x.x);
        at(d, 4 * i + 1) = __fadd_rn(at(d, 4 * i + 1), x.y);
        at(d, 4 * i + 2) = __fadd_rn(at(d, 4 * i + 2), x.z);
        at(d, 4 * i + 3) = __fadd_rn(at(d, 4 * i + 3), x.w);
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
      __stcg(to + i * kWarp,
             float4{at(d, 4 * i), at(d, 4 * i + 1), at(d, 4 * i + 2), at(d, 4 * i + 3)});
    }
    if (!comes_last(split, count)) return false;
    const auto add = [&](const float4* from) {
#pragma unroll
      for (int i = 0; i < kSums / 4; ++i) {
        const float4 x = __ldcg(from + i * kWarp);
        at(d, 4 * i) = __fadd_rn(at(d, 4 * i), x.x);
        at(d, 4 * i + 1) = __fadd_rn(at(d, 4 * i + 1), x.y);
        at(d, 4 * i + 2) = __fadd_rn(at(d, 4 * i + 2), x.z);
        at(d, 4 * i + 3) = __fadd_rn(at(d, 4 * i + 3), x.w);
      }
    };
    if (count == 2) {  // the order does not matter
      add(part(1 - own));
      return true;
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) at(d, i) = 0.0f;
    for (int i = 0; i < count; ++i) add(part(i));
    return true;
  }

  // Whether all other parts have arrived; what they stored before is visible then. A counter holds
  // the launch that it counts for, so that it need not be set before.
  __device__ __forceinline__ bool comes_last(int split, int count) const {
    const int group = static_cast<int>(threadIdx.x) / kGroup;
    int& last = reinterpret_cast<int*>(shared + S::kFlags)[group];
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

  // Rounds the sums of `count` tokens from `begin` on and sends them out, kOutTokens at a time.
  // Sums begin with those of `first_feature` and `first_token`.
  __device__ __forceinline__ void store(int first_feature, int first_token, const Sums& d,
                                        const TensorMap& out_map, int begin, int count) const {
    const int group = static_cast<int>(threadIdx.x) / kGroup;
    const int warp = static_cast<int>(threadIdx.x) % kGroup / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int feature = first_feature + group * kGroupWidth;
    const uint32_t out = shared_address(shared) + S::kOut + group * S::kOutBytes;
    const int row = lane / 16 * 8 + lane % 8;
    const int chunk = 2 * warp + lane / 8 % 2;
    const uint32_t to = out + swizzled(row, chunk);
#pragma unroll
    for (int first = 0; first < kTokens; first += S::kOutTokens) {
      const int token = first_token + first;
      if (token >= task.m) break;
      if (first < begin || first >= begin + count) continue;
      if (threadIdx.x % kGroup == 0) wait_for_stores<0>();
      named_barrier(1 + group, kGroup);
#pragma unroll
      for (int i = 0; i < S::kOutTokens / 16; ++i) {
        const auto x = [&](int j) { return at(d, first / 2 + 8 * i + j); };
        const uint32_t words[4] = {pack_pair<T>(x(0), x(1)), pack_pair<T>(x(2), x(3)),
                                   pack_pair<T>(x(4), x(5)), pack_pair<T>(x(6), x(7))};
        store_transposed(to + i * 16 * kRowBytes, words);
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

#endif  // BNB_HOPPER

template <class T, class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    wgmma_dgrad_kernel(BNB_GRID_CONSTANT const TensorMap grad_map,
                       BNB_GRID_CONSTANT const TensorMap code_map,
                       BNB_GRID_CONSTANT const TensorMap out_map,
                       BNB_GRID_CONSTANT const DgradTask<typename S::Codes> task) {
#if BNB_HOPPER
  extern __shared__ __align__(1024) char dgrad_shared[];
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const Dgrad<T, S> dgrad{task, dgrad_shared};
  char* const decoding = dgrad_shared + S::kDecoding;
  task.codes.fill(decoding);
  if (thread == 0) {
    prefetch_map(grad_map);
    prefetch_map(code_map);
    prefetch_map(out_map);
    for (int slot = 0; slot < S::kStages; ++slot) {
      dgrad.barriers(slot).full.init(1 + kGroup / kWarp);
      dgrad.barriers(slot).empty.init(S::kWarps);
    }
    for (int slot = 0; slot < S::kDecoders * S::kCodeStages; ++slot) {
      dgrad.code_barriers(slot).full.init(1);
      dgrad.code_barriers(slot).empty.init(kGroup / kWarp);
    }
    fence_barrier_init();
  }
  __syncthreads();

  if (warp < S::kWarps) {
    if constexpr (S::kMovesRegisters) take_registers<S::kMultiplyRegisters>();
    dgrad.multiply(out_map);
  } else {
    if constexpr (S::kMovesRegisters) give_registers<S::kDecodeRegisters>();
    task.codes.template with_decoder<T>(decoding, [&](const auto& decoder) {
      dgrad.decode(decoder, thread - S::kWarps * kWarp, grad_map, code_map);
    });
  }
#endif
}

}  // namespace
}  // namespace bnb::gpu
