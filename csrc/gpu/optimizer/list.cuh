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
#include "gpu/device/dtype.cuh"
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
    int tensors;  // of the call
    int count;    // of this launch

    // Whether this is the last launch of the call.
    __host__ __device__ __forceinline__ bool is_last() const {
      return tensors_before + count == tensors;
    }
  };
  static constexpr int kAlignment = 16;  // of the entries
  static constexpr int kOthers = 16;     // bytes for arguments that kernels take besides
  static constexpr int kMost =
      (BNB_KERNEL_ARGUMENT_BYTES - static_cast<int>(sizeof(Header)) - kAlignment - kOthers) /
      static_cast<int>(sizeof(Entry));

  Header header;
  alignas(kAlignment) Entry entries[kMost];
};

using StepList = List<OptimizerTensor, OptimizerStep>;

// The entries of a list in shared memory. Kernel arguments are constant memory, whose cache is far
// smaller than a list, and which serves one address at a time.
template <class L>
class Entries {
 public:
  using Entry = typename L::Entry;

  // `storage`: shared memory for all entries of the list. Called by all threads of the block, which
  // must be synchronised before entries are used.
  __device__ __forceinline__ Entries(const L& list, void* storage)
      : entries_(static_cast<const Entry*>(storage)), header_(list.header) {
    struct alignas(16) Chunk {
      uint32_t words[4];
    };
    static_assert(sizeof(Entry) % sizeof(Chunk) == 0 && offsetof(L, entries) % sizeof(Chunk) == 0);
    // Through a pointer whose origin is hidden: the threads read different addresses, and the
    // instruction for kernel arguments would take them one by one.
    const auto* from = reinterpret_cast<const Chunk*>(hide_origin(list.entries));
    auto* to = static_cast<Chunk*>(storage);
    const int chunks = header_.count * static_cast<int>(sizeof(Entry) / sizeof(Chunk));
    for (int i = static_cast<int>(threadIdx.x); i < chunks; i += blockDim.x) to[i] = from[i];
  }

  __device__ __forceinline__ const Entry& operator[](int e) const { return entries_[e]; }

  // First tile behind entry `e`.
  __device__ __forceinline__ uint32_t end_tile(int e) const {
    return e + 1 < header_.count ? entries_[e + 1].first_tile : header_.tiles;
  }

  // The entry that holds a tile: the last one that starts at or before it. Called by whole warps,
  // whose lanes look at one entry each.
  __device__ __forceinline__ int find(uint32_t tile) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    int low = 0;
    for (int step = first_step(); step > 0; step /= kWarp) {
      const int e = low + lane * step;
      const uint32_t before = warp_ballot(e < header_.count && entries_[e].first_tile <= tile);
      low += (bits_set(before) - 1) * step;
    }
    return low;
  }

 private:
  // Of a search in steps of 32: 1 for up to 32 entries, 32 for up to 1024.
  __device__ __forceinline__ int first_step() const {
    static_assert(L::kMost <= kWarp * kWarp);
    return header_.count > kWarp ? kWarp : 1;
  }

  const Entry* entries_;
  const typename L::Header& header_;
};

// Shared memory that the entries of a list take.
template <class L>
__host__ __device__ __forceinline__ int entry_bytes(const L& list) {
  return list.header.count * static_cast<int>(sizeof(typename L::Entry));
}

// The number of tensors that a kernel takes at once if it keeps their entries in shared memory and
// `resident` of its blocks shall fit a multiprocessor.
template <class L>
int entries_for(const void* kernel, int resident) {
  constexpr int kAnyThreads = kWarp;
  const SharedNeeds needs{kAnyThreads, 0, static_cast<int>(sizeof(typename L::Entry)), L::kMost};
  return shape_for(kernel, kAnyThreads, resident, needs).entries;
}

// Calls launch(list) with at most `most` tensors at a time. `packs(tensor)`: what goes to
// Entry::packs. `least_tiles`: those of an empty tensor.
template <class L, class T, class Args, class Packs, class Launch>
void for_each_launch(const Args& args, std::span<const T> tensors, int64_t tile,
                     int64_t least_tiles, int most, Packs packs, Launch launch) {
  static_assert(sizeof(L) + L::kOthers <= BNB_KERNEL_ARGUMENT_BYTES);
  L list;
  list.header = {args, 0, 0, 0, static_cast<int>(tensors.size()), 0};
  const auto flush = [&] {
    if (list.header.count == 0) return;
    launch(list);
    list.header.tiles_before += list.header.tiles;
    list.header.tensors_before += list.header.count;
    list.header.tiles = 0;
    list.header.count = 0;
  };
  for (const T& tensor : tensors) {
    if (list.header.count == most) flush();
    list.entries[list.header.count++] = {tensor, list.header.tiles, packs(tensor) ? 1u : 0u};
    list.header.tiles += static_cast<uint32_t>(std::max(least_tiles, ceil_div(tensor.n, tile)));
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

// Counts `part` of `whole` pieces of work as done, by one thread, which has done them, or a barrier
// after them. Whether they were the last; then the thread sees what was written for any of them,
// and the ticket is zero again.
__device__ __forceinline__ bool completes(uint32_t* ticket, uint32_t part, uint32_t whole) {
  if (part == whole) return true;  // no other block is involved
  __threadfence();
  if (atomicAdd(ticket, part) + part != whole) return false;
  *ticket = 0;
  __threadfence();
  return true;
}

// What a step leaves for the next one, written by the last of its blocks. Called at the end by all
// threads.
__device__ __forceinline__ void leave_step(const StepList& list) {
  const OptimizerStep& args = list.header.args;
  if (args.counter == nullptr || !list.header.is_last()) return;
  __syncthreads();
  if (!block_all(threadIdx.x != 0 || completes(args.tickets, 1, gridDim.x))) return;
  for (int k = 0; k < 2; ++k) {
    if (args.kept_max[k] == nullptr) continue;
    for (int i = static_cast<int>(threadIdx.x); i < list.header.tensors; i += blockDim.x) {
      args.kept_max[k][i] = args.new_max[k][i];
    }
  }
  if (threadIdx.x == 0) *args.counter += 1;
}

// Blocks of threads that take a step together: as many as `useful`, and one where there is nothing
// to do but to leave something.
inline int step_blocks(const StepList& list, int64_t useful) {
  const bool leaves = list.header.args.counter != nullptr && list.header.is_last();
  return static_cast<int>(std::max<int64_t>(useful, leaves ? 1 : 0));
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

// Picks what serves a rule with parameters of a dtype: make<R, T>() for them.
template <class Chosen, class Make>
Chosen choose_by_types(Rule rule, DType dtype, Make make) {
  switch (rule) {
#define BNB_CASE(rule) \
  case Rule::k##rule:  \
    return by_dtype(dtype, [&]<class T>() { return make.template operator()<rule, T>(); });
    BNB_OPTIMIZERS(BNB_CASE)
#undef BNB_CASE
    case Rule::kCount:
      break;
  }
  return {};
}

}  // namespace bnb::gpu
