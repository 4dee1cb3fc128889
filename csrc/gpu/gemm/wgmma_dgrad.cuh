// The kernel of backward products on Hopper: of wgmma_dgrad.cu and of int8/dgrad.cu.
// SPDX-License-Identifier: MIT
//
// out[i, k] = sum over j of grad[i, j] w[j, k]. Rows i are tokens, columns k features, and j, a row
// of the weight, is a term. As the tensor cores see it, out^T [features, tokens] = w^T grad^T: w^T
// is A, from registers, and grad^T is B, from shared memory, as it lies. A block of threads makes
// tiles of kFeatures x kTokens; kGroups warpgroups multiply, 64 features each, one copies:
//
//     codes [64 terms, kFeatures] -- copy engine --> [slots] --> registers --> weights --> A --+
//     scales ----------------------- two warps ----> [slots] ---------------------+            v
//     grads [kTokens, 64 terms] ---- copy engine --> [slots] --------------------------> B: sums
//
// Which feature a row of A means is free. Rows g and g + 8, which a lane holds, are neighbours: the
// codes that a transposing read gives to a lane are those of two neighbouring features in each of
// two rows of the weight, which is half of what the lane holds of A.
//
// Tiles are cut as wgmma_plan.cuh says, with terms in the place of k there. What becomes of sums
// stands in wgmma_dgrad_sums.cuh.
#pragma once

#include "gpu/gemm/wgmma_dgrad_sums.cuh"

namespace bnb::gpu {
namespace {

#if BNB_HOPPER

template <class T, class S>
struct Dgrad {
  static constexpr int kTokens = S::kTokens;
  static constexpr int kSteps = kTerms / 16;  // of a slot; so many products are under way
  using Sums = typename DgradSums<T, S>::Sums;
  using Decoder = typename S::Codes::template Decoder<S::kTableAt>;

  const DgradTask<typename S::Codes>& task;
  const DgradSums<T, S> sums;

  __device__ __forceinline__ static uint32_t grads(int slot) {
    return static_cast<uint32_t>(S::kGradsAt + slot * S::kGradBytes);
  }
  __device__ __forceinline__ static uint32_t codes(int slot) {
    return static_cast<uint32_t>(S::kCodesAt + slot * S::kCodeBytes);
  }
  // Columns of kTerms, in the order in which lanes need them.
  __device__ __forceinline__ static uint32_t scales(int slot) {
    return static_cast<uint32_t>(S::kScalesAt + slot * S::kScaleBytes);
  }
  __device__ __forceinline__ static BarrierAt full(int slot) {
    return {static_cast<uint32_t>(S::kBarriersAt + slot * S::kBarrierBytes)};
  }
  __device__ __forceinline__ static BarrierAt empty(int slot) {
    return {static_cast<uint32_t>(S::kBarriersAt + slot * S::kBarrierBytes + 8)};
  }

  // ---- Copies ----------------------------------------------------------------------------------

  // The stages of a block, one after the other. Used by a thread.
  class Copier {
   public:
    __device__ __forceinline__ Copier(const DgradTask<typename S::Codes>& task,
                                      const TensorMap& grad_map, const TensorMap& code_map)
        : grad_map_(grad_map), code_map_(code_map), walk_(task) {}

    // Goes on to the next stage, if there is one.
    __device__ __forceinline__ bool next() {
      phase_ ^= 1;
      if (++stage_ < walk_.end()) return true;
      if (!walk_.next()) return false;
      stage_ = walk_.begin();
      return true;
    }
    __device__ __forceinline__ void copy() const {
      const int column = walk_.feature / S::kFeatures * (S::kCodeRow / 2);
#pragma unroll
      for (int slot = 0; slot < S::kSlots; ++slot) {
        const int term = (stage_ * S::kSlots + slot) * kTerms;
        empty(slot).wait(phase_);
        full(slot).arrive_and_expect(S::kGradBytes + S::kCodeBytes);
        tensor_copy(codes(slot), code_map_, column, term, full(slot));
        tensor_copy(grads(slot), grad_map_, term, walk_.token, full(slot));
      }
    }

   private:
    const TensorMap& grad_map_;
    const TensorMap& code_map_;
    Walk<S> walk_;
    int stage_ = 0;
    uint32_t phase_ = 0;  // of empty slots
  };

  // Called by kScaleWarps warps, each thread for a term.
  template <class BlockScales>
  __device__ __forceinline__ void bring_scales(const BlockScales& scale_of, int term) const {
    constexpr int kColumns = scale_columns(S::kFeatures, BlockScales::kWidth);
    using Stored = typename BlockScales::Stored;
    const auto load = [&](const Walk<S>& walk, int stage, int slot, Stored(&to)[kColumns]) {
      // Beyond the last term that one, which meets grads of zeros; beyond the last feature that
      // one, whose sums are not stored.
      const int64_t row = min(int64_t{stage * S::kSlots + slot} * kTerms + term, task.n - 1);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const int64_t feature = walk.feature + i * BlockScales::kWidth;
        to[i] = scale_of.load(row, min(feature, task.k - 1));
      }
    };
    // Lane 4 g + t needs terms 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of every 16.
    const auto to = static_cast<uint32_t>(term / 16 * 64 + term % 8 / 2 * 16 + term % 16 / 8 * 8 +
                                          term % 2 * 4);
    Walk<S> walk(task);
    uint32_t phase = 0;
    if (!walk.next()) return;
    Stored ahead[S::kSlots][kColumns];
#pragma unroll
    for (int slot = 0; slot < S::kSlots; ++slot) load(walk, walk.begin(), slot, ahead[slot]);
    for (bool more = true; more;) {
      const int end = walk.end();
      for (int stage = walk.begin(); stage < end; ++stage) {
        int coming = stage + 1;
        if (coming == end) {
          more = walk.next();
          coming = walk.begin();
        }
#pragma unroll
        for (int slot = 0; slot < S::kSlots; ++slot) {
          empty(slot).wait(phase ^ 1);
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            store_shared(scales(slot) + j * S::kScaleColumn + to,
                         float_bits(scale_of.value(ahead[slot][j])));
          }
          __syncwarp();
          if (term % kWarp == 0) full(slot).arrive();
          if (more) load(walk, coming, slot, ahead[slot]);
        }
        phase ^= 1;
      }
    }
  }

  // ---- Products --------------------------------------------------------------------------------

  // Called by every warp that multiplies, once it has read the slot.
  __device__ __forceinline__ static void release(int slot) {
    if (threadIdx.x % kWarp == 0) empty(slot).arrive();
  }

  // Of 16 terms: what a table has of the features of terms 2 t, 2 t + 1, 2 t + 8, 2 t + 9, and the
  // scales of these.
  struct Looked {
    typename Decoder::Pair pairs[4];
    float scales[4];
  };

  // What a warp reads of a slot.
  struct Reader {
    Decoder decoder;
    const uint32_t codes_at;
    const uint32_t scales_at;
    uint32_t phase = 0;
    uint32_t codes[2 * kSteps];  // of two rows each

    __device__ __forceinline__ Reader(const DgradTask<typename S::Codes>& task, uint32_t warp,
                                      uint32_t lane)
        : decoder(warp % 4, lane),
          codes_at(at_of(warp, lane)),
          scales_at(
              task.codes.column_of(warp / 4 * kGroupWidth + Decoder::feature_of(warp % 4, 0)) *
                  S::kScaleColumn +
              lane % 4 * 16) {}

    // The place of a row's codes: lane l names row l of 32.
    __device__ __forceinline__ static uint32_t at_of(uint32_t warp, uint32_t lane) {
      const uint32_t chunk = warp / 4 * (S::Codes::kCodeBytes / 16) + Decoder::chunk_of(warp % 4);
      const uint32_t swap = S::kCodeRow == 128 ? lane % 8 : lane / 2 % 4;
      return lane * S::kCodeRow + ((chunk ^ swap) << 4);
    }

    // Codes, once they are there.
    __device__ __forceinline__ void read(int slot, uint32_t parity) {
      full(slot).wait(parity);
#pragma unroll
      for (int i = 0; i < kSteps / 2; ++i) {
        uint32_t words[4];
        load_transposed(Dgrad::codes(slot) + codes_at + i * 32 * S::kCodeRow, words);
#pragma unroll
        for (int j = 0; j < 4; ++j) codes[4 * i + j] = words[j];
      }
    }
    __device__ __forceinline__ void look_up(int slot, int step, Looked& to) const {
      const uint4 x = load_shared4(Dgrad::scales(slot) + scales_at + step * 64);
      to.scales[0] = bits_float(x.x);
      to.scales[1] = bits_float(x.y);
      to.scales[2] = bits_float(x.z);
      to.scales[3] = bits_float(x.w);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to.pairs[i] = decoder.look_up(codes[2 * step + i / 2], i % 2);
      }
    }
  };

  __device__ __forceinline__ static void make_weights(const Looked& looked, uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 first = Decoder::widen(looked.pairs[2 * i], 0);
      const float2 second = Decoder::widen(looked.pairs[2 * i + 1], 1);
      a[2 * i] = pack_pair<T>(__fmul_rn(first.x, looked.scales[2 * i]),
                              __fmul_rn(second.x, looked.scales[2 * i + 1]));
      a[2 * i + 1] = pack_pair<T>(__fmul_rn(first.y, looked.scales[2 * i]),
                                  __fmul_rn(second.y, looked.scales[2 * i + 1]));
    }
  }

  __device__ __forceinline__ void multiply(const TensorMap& out_map) const {
    const uint32_t warp = threadIdx.x / kWarp;
    Walk<S> walk(task);
    Reader reader(task, warp, threadIdx.x % kWarp);
    uint32_t weights[kSteps][4];
    Looked looked;
    Sums d;
    bool more = walk.next();
    if (!more) return;
    reader.read(0, 0);
    reader.look_up(0, 0, looked);
    while (more) {
      const Walk<S> now = walk;
      more = walk.next();
      for (int s = now.begin(); s < now.end(); ++s) {
        const bool first = s == now.begin();
        const bool last = !more && s + 1 == now.end();
#pragma unroll
        for (int slot = 0; slot < S::kSlots; ++slot) {
          const uint64_t b = swizzled_descriptor(grads(slot));
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            wgmma_wait<kSteps - 1>();
            if (step == kSteps - 1 && (slot > 0 || !first)) {
              release((slot + S::kSlots - 1) % S::kSlots);
            }
            make_weights(looked, weights[step]);
            if (step + 1 < kSteps) reader.look_up(slot, step + 1, looked);
            wgmma_fence();
            Wgmma<T, kTokens>::run(d, weights[step], advance_k(b, step),
                                   !first || slot > 0 || step > 0);
            wgmma_commit();
          }
          if (slot + 1 < S::kSlots) {
            reader.read(slot + 1, reader.phase);
            reader.look_up(slot + 1, 0, looked);
          }
        }
        // After the last stage its codes are read again, for nothing.
        if (!last) reader.phase ^= 1;
        reader.read(0, reader.phase);
        reader.look_up(0, 0, looked);
      }
      wgmma_wait<0>();
      wgmma_hold(d);
      release(S::kSlots - 1);
      if (task.parts > 1) {
        const int part = static_cast<int>(blockIdx.x) % task.parts;
        const auto share = [&]<int kCount>() {
          if constexpr (kCount <= S::kMostParts) {
            constexpr int kShare = kTokens / kCount;
            sums.template exchange<kCount>(d, part);
            sums.store(now.feature, now.token + part * kShare, kShare, d, out_map);
          }
        };
        if (task.parts == 2) {
          share.template operator()<2>();
        } else if (task.parts == 4) {
          share.template operator()<4>();
        } else {
          share.template operator()<8>();
        }
      } else if (sums.add_parts(now, d)) {
        sums.store(now.feature, now.token, kTokens, d, out_map);
      }
      __syncwarp();
    }
    // What is on its way out must have left shared memory.
    if (threadIdx.x % kGroup == 0) wait_for_stores<0>();
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
  BNB_DYNAMIC_SHARED(dynamic);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  using Kernel = Dgrad<T, S>;
  const Kernel dgrad{task, {task, dynamic}};
  const int helper = thread - S::kWarps * kWarp;
  const bool copies = helper == S::kScaleWarps * kWarp;
  if (copies) {
    prefetch_map(grad_map);
    prefetch_map(code_map);
    prefetch_map(out_map);
    // has_wgmma_kernels() has looked.
    if (shared_address(dynamic) != kSharedStart) __trap();
    for (int slot = 0; slot < S::kSlots; ++slot) {
      Kernel::full(slot).init(1 + S::kScaleWarps);
      Kernel::empty(slot).init(S::kWarps);
    }
    fence_barrier_init();
    typename Kernel::Copier first(task, grad_map, code_map);
    if (first.next()) first.copy();
  }
  auto* const nested = reinterpret_cast<float*>(dynamic + S::kNestedAt - kSharedStart);
  task.codes.template fill<S::kTableAt>(nested);
  __syncthreads();

  if (warp < S::kWarps) {
    take_registers<S::kMultiplyRegisters>();
    dgrad.multiply(out_map);
  } else {
    give_registers<S::kCopyRegisters>();
    if (helper < S::kScaleWarps * kWarp) {
      task.codes.with_scales(nested,
                             [&](const auto& scale_of) { dgrad.bring_scales(scale_of, helper); });
    } else if (copies) {
      typename Kernel::Copier copier(task, grad_map, code_map);
      copier.next();  // has been copied
      while (copier.next()) copier.copy();
    }
  }
#endif
}

}  // namespace
}  // namespace bnb::gpu
