// Blocks of parameters, gradients and states on their way to the warps of a blockwise step: slots
// of shared memory, and two ways to fill them. SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/blocks.h"
#include "gpu/device/vector_io.cuh"
#include "gpu/optimizer/list.cuh"
#if BNB_BULK_COPIES
#include "gpu/device/tensor_copy.cuh"
#endif

namespace bnb::gpu {

inline constexpr int kLaneElements = kOptimizerBlock / kWarp;
inline constexpr int kSlots = 2;  // of a warp

// One quantization block of rule R with parameters of T, as one lane sees it: kPacks times kPack
// consecutive elements.
template <class R, class T>
struct Lane {
  static constexpr int kStates = R::kStates;
  static constexpr int kPack = kPackSize<T>;
  static constexpr int kPacks = kLaneElements / kPack;
  static constexpr int kStride = kWarp * kPack;  // elements between a lane's packs
  using Values = Words<T, kPack>;
  using Codes = Words<uint8_t, kPack>;

  // A slot of shared memory: gradients, parameters, codes of each state.
  static constexpr int kValueBytes = kOptimizerBlock * static_cast<int>(sizeof(T));
  static constexpr int kSlotBytes = 2 * kValueBytes + kStates * kOptimizerBlock;
  static constexpr int kWarpBytes = kSlots * kSlotBytes;
  static_assert(kSlotBytes % kCacheLine == 0);

  // Pointers to the lane's elements of the first block of a tile.
  struct Pointers {
    const T* grad;
    T* param;
    uint8_t* state[kStates];
    float* absmax[kStates];

    __device__ __forceinline__ Pointers(const OptimizerTensor& t, int64_t block) {
      const int64_t at = block * kOptimizerBlock + static_cast<int>(threadIdx.x) % kWarp * kPack;
      grad = static_cast<const T*>(t.grad) + at;
      param = static_cast<T*>(t.param) + at;
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        state[k] = static_cast<uint8_t*>(state_pointer(t, kStates, k, 1)) + at;
        absmax[k] = absmax_pointer(t, kStates, k) + block;
      }
    }
  };

  // A lane's part of a slot.
  __device__ __forceinline__ static char* values(char* slot, int which, int pack) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    return slot + which * kValueBytes + (pack * kStride + lane * kPack) * sizeof(T);
  }
  __device__ __forceinline__ static char* codes(char* slot, int k, int pack) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    return slot + 2 * kValueBytes + k * kOptimizerBlock + pack * kStride + lane * kPack;
  }
};

// The slots of a warp, whose lanes copy what they will read, so that waiting for their own copies
// is enough.
template <class L>
class LaneCopies {
 public:
  struct Barriers {};  // in shared memory

  // `slots`: shared memory of L::kWarpBytes.
  __device__ __forceinline__ LaneCopies(char* slots, Barriers&) : slots_(slots) {}

  __device__ __forceinline__ char* slot(int i) const { return slots_ + i * L::kSlotBytes; }

  // Starts copying block j of a tile to a slot.
  __device__ __forceinline__ void start(const typename L::Pointers& from, int j, int i) const {
    const int skip = j * kOptimizerBlock;
#pragma unroll
    for (int v = 0; v < L::kPacks; ++v) {
      start_copy<16>(L::values(slot(i), 0, v), from.grad + skip + v * L::kStride);
      start_copy<16>(L::values(slot(i), 1, v), from.param + skip + v * L::kStride);
#pragma unroll
      for (int k = 0; k < L::kStates; ++k) {
        start_copy<L::kPack>(L::codes(slot(i), k, v), from.state[k] + skip + v * L::kStride);
      }
    }
  }

  // After start(), and where it was left out.
  __device__ __forceinline__ void close() const { close_copy_group(); }

  // Waits for slot i, the last but one for which close() was called.
  __device__ __forceinline__ void wait(int) { wait_copies<1>(); }

 private:
  char* slots_;
};

#if BNB_HOPPER

// The same, filled by the copy engine: lanes' copies would take as many turns of shared memory as
// reading the slots does.
template <class L>
class BulkCopies {
 public:
  struct Barriers {
    TransactionBarrier full[kSlots];
  };

  __device__ __forceinline__ BulkCopies(char* slots, Barriers& barriers)
      : slots_(slots), full_(barriers.full[0].at().address) {
    if (is_first()) {
#pragma unroll
      for (int i = 0; i < kSlots; ++i) full(i).init(1);
      fence_barrier_init();
    }
    sync_warp();
  }

  __device__ __forceinline__ char* slot(int i) const { return slots_ + i * L::kSlotBytes; }

  __device__ __forceinline__ void start(const typename L::Pointers& from, int j, int i) const {
    sync_warp();  // all have read what was in the slot
    if (!is_first()) return;
    const int skip = j * kOptimizerBlock;
    const uint32_t to = shared_address(slot(i));
    full(i).arrive_and_expect(L::kSlotBytes);
    bulk_copy(to, from.grad + skip, L::kValueBytes, full(i));
    bulk_copy(to + L::kValueBytes, from.param + skip, L::kValueBytes, full(i));
#pragma unroll
    for (int k = 0; k < L::kStates; ++k) {
      bulk_copy(to + 2 * L::kValueBytes + k * kOptimizerBlock, from.state[k] + skip,
                kOptimizerBlock, full(i));
    }
  }

  __device__ __forceinline__ void close() const {}

  __device__ __forceinline__ void wait(int i) {
    full(i).wait((parities_ >> i) & 1u);
    parities_ ^= 1u << i;
  }

 private:
  // The lane at which the warp's elements begin.
  __device__ __forceinline__ static bool is_first() { return threadIdx.x % kWarp == 0; }
  __device__ __forceinline__ BarrierAt full(int i) const {
    return {full_ + i * static_cast<uint32_t>(sizeof(TransactionBarrier))};
  }

  char* slots_;
  uint32_t full_;  // address of the barriers
  uint32_t parities_ = 0;
};

#endif  // BNB_HOPPER

}  // namespace bnb::gpu
