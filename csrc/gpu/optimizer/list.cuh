// How a list of tensors reaches an optimizer kernel.
//
// The list travels as a kernel argument: no copy to the device, and a captured graph keeps it. Its
// elements are cut into tiles, each within one tensor; blocks of threads, or warps, take tiles in
// turn.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/kernels/optimizer.h"
#include "bitsandbytes/optim/step.h"
#include "gpu/device/vector_io.cuh"
#include "gpu/runtime/check.h"
#include "gpu/runtime/runtime.cuh"

namespace bnb::gpu {

// `T`: what the kernel knows of a tensor; it has the member n. `Args`: the call's arguments.
template <class T, class Args>
struct List {
  struct Entry {
    T tensor;
    uint32_t first_tile;  // of this launch
    uint32_t packs;       // 1 if pointers allow accesses of 16 bytes
  };
  struct Header {
    Args args;
    int64_t tiles_before;  // in earlier launches of the call
    uint32_t tiles;
    int tensors_before;
    int count;
  };
  static constexpr int kOthers = 16;  // bytes for arguments that kernels take besides
  static constexpr int kMost =
      (BNB_KERNEL_ARGUMENT_BYTES - static_cast<int>(sizeof(Header)) - kOthers) /
      static_cast<int>(sizeof(Entry));

  Header header;
  Entry entries[kMost];

  // The entry that holds a tile: the last one that starts at or before it.
  __device__ __forceinline__ int find_entry(uint32_t tile) const {
    int low = 0;
    int high = header.count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (entries[middle].first_tile <= tile) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // First tile behind entry `e`.
  __device__ __forceinline__ uint32_t end_tile(int e) const {
    return e + 1 < header.count ? entries[e + 1].first_tile : header.tiles;
  }
};

using StepList = List<OptimizerTensor, OptimizerStep>;

// Calls launch(list) with as many tensors at a time as kernel arguments hold.
// `packs(tensor)`: what goes to Entry::packs.
template <class L, class T, class Args, class Packs, class Launch>
void for_each_launch(const Args& args, std::span<const T> tensors, int64_t tile, Packs packs,
                     Launch launch) {
  L list;
  list.header = {args, 0, 0, 0, 0};
  const auto flush = [&] {
    if (list.header.count == 0) return;
    launch(list);
    list.header.tiles_before += list.header.tiles;
    list.header.tensors_before += list.header.count;
    list.header.tiles = 0;
    list.header.count = 0;
  };
  for (const T& tensor : tensors) {
    if (list.header.count == L::kMost) flush();
    list.entries[list.header.count++] = {tensor, list.header.tiles, packs(tensor) ? 1u : 0u};
    list.header.tiles += static_cast<uint32_t>(ceil_div(tensor.n, tile));
  }
  flush();
}

// Where state k of a tensor lies; `size`: bytes of one element.
__host__ __device__ __forceinline__ void* state_pointer(const OptimizerTensor& t, int states, int k,
                                                        int size) {
  char* p = static_cast<char*>(t.state[tensor_of_state(states, k)]);
  return p + row_of_state(states, k) * t.n * size;
}

__host__ __device__ __forceinline__ float* absmax_pointer(const OptimizerTensor& t, int states,
                                                          int k) {
  float* p = t.absmax[tensor_of_state(states, k)];
  return p + row_of_state(states, k) * ceil_div(t.n, kOptimizerBlock);
}

// The step common to all tensors, computed by one thread of the block. Callers synchronise.
template <class R>
__device__ __forceinline__ void make_step(const OptimizerStep& args, Step<R>* shared) {
  if (threadIdx.x == 0) *shared = Step<R>::make(args.hyper, *args.step + 1, args.lr);
}

// Whether tensors have factors of their own on gradient or update.
__device__ __forceinline__ bool has_factors(const OptimizerStep& args) {
  return args.gnorm_scales != nullptr || args.update_scales != nullptr;
}

// The step with the factors of one tensor.
template <class R>
__device__ __forceinline__ Step<R> step_of_tensor(const Step<R>& step, const StepList& list,
                                                  int entry) {
  const OptimizerStep& args = list.header.args;
  const int i = list.header.tensors_before + entry;
  return step.scaled(args.gnorm_scales != nullptr ? args.gnorm_scales[i] : 1.0f,
                     args.update_scales != nullptr ? args.update_scales[i] : 1.0f);
}

// Picks what serves a rule: make<R>() for it.
template <class Chosen, class Make>
Chosen choose_by_rule(Rule rule, Make make) {
  switch (rule) {
#define BNB_CASE(rule) \
  case Rule::k##rule:  \
    return make.template operator()<rule>();
    BNB_OPTIMIZERS(BNB_CASE)
#undef BNB_CASE
    case Rule::kCount:
      break;
  }
  return {};
}

}  // namespace bnb::gpu
