// Optimizer steps whose states are 8-bit codes with one absmax per 256 elements: rule x dtype.
//
// A warp owns a quantization block: 8 elements per lane, their absmax one warp reduction away, no
// barrier. While it works on one block, the next one is on its way to shared memory:
//
//   slot 0:  copy b0 | wait, step b0, store | copy b2 ...        | wait, step b2 ...
//   slot 1:          | copy b1 ...          | wait, step b1, ... | copy b3 ...
//
// Every lane reads what it copied itself, so that waiting for its own copies is enough. A tile is a
// warp's run of blocks; tiles that are not whole, or not aligned, are done element by element.
// SPDX-License-Identifier: MIT
#include "bitsandbytes/philox.h"
#include "gpu/device/code8.cuh"
#include "gpu/device/scalar.cuh"
#include "gpu/optimizer/list.cuh"

namespace bnb::gpu {
namespace {

// Threads of a block, fewer where shared memory is small. Two blocks share a multiprocessor, and
// with it its registers: a lane holds kLaneElements of every state, and none may be spilled.
constexpr int block_threads(int states) { return states < 3 ? 384 : 256; }
constexpr int kResident = 2;
constexpr int kLaneElements = kOptimizerBlock / kWarp;
constexpr int kTileBlocks = 4;
constexpr int64_t kTile = int64_t{kTileBlocks} * kOptimizerBlock;
constexpr int kSlots = 2;
static_assert(kTileBlocks % kSlots == 0);  // a tile leaves the slots as it found them

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

  // Starts copying block j of a tile.
  __device__ __forceinline__ static void fetch(const Pointers& from, int j, char* slot,
                                               float (&scale)[kStates]) {
    const int skip = j * kOptimizerBlock;
#pragma unroll
    for (int v = 0; v < kPacks; ++v) {
      start_copy<16>(values(slot, 0, v), from.grad + skip + v * kStride);
      start_copy<16>(values(slot, 1, v), from.param + skip + v * kStride);
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        start_copy<kPack>(codes(slot, k, v), from.state[k] + skip + v * kStride);
      }
    }
#pragma unroll
    for (int k = 0; k < kStates; ++k) scale[k] = from.absmax[k][j];
  }
};

// Code, tables and constants of a launch, in shared memory.
template <class R>
struct Shared {
  Code8<true> codes[state_tensors(R::kStates)];
  EncodeTables<true> tables;
  Step<R> step;  // what all tensors share
  Step<R> steps[block_threads(R::kStates) /
                kWarp];  // of the tensor that a warp is at: reading constants from here
                         // leaves registers to the elements

  __device__ __forceinline__ const Code8<true>& code(int k) const {
    return codes[tensor_of_state(R::kStates, k)];
  }
};

// Which random bits round the parameters of a tensor.
struct Rounding {
  uint64_t seed;
  uint32_t tensor;
  int64_t step;
};

// The step of block j of a tile, from its slot, with the dynamic maps. Returns false, having stored
// nothing, when new states are so large or so small that their codes must be searched.
template <class R, class T, bool kStochastic, class MakeRounding>
__device__ __forceinline__ bool step_full_block(const typename Lane<R, T>::Pointers& to, int j,
                                                char* slot, const float (&scale)[R::kStates],
                                                const Shared<R>& shared, const Step<R>& step,
                                                const MakeRounding& make_rounding, int64_t block) {
  using L = Lane<R, T>;
  constexpr int kPack = L::kPack;
  float states[R::kStates][kLaneElements];
  float largest[R::kStates] = {};
  typename L::Values param[L::kPacks];
#pragma unroll
  for (int v = 0; v < L::kPacks; ++v) {
    const auto grad = load_aligned<typename L::Values>(L::values(slot, 0, v));
    param[v] = load_aligned<typename L::Values>(L::values(slot, 1, v));
    typename L::Codes old[R::kStates];
#pragma unroll
    for (int k = 0; k < R::kStates; ++k) {
      old[k] = load_aligned<typename L::Codes>(L::codes(slot, k, v));
    }
    float updated[kPack];
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      Scalar s[R::kStates];
#pragma unroll
      for (int k = 0; k < R::kStates; ++k) {
        s[k] = Scalar(__fmul_rn(shared.code(k).level(old[k].words, i), scale[k]));
      }
      const Scalar gradient(__fmul_rn(grad.get(i), step.gnorm_scale));
      updated[i] = step.advance(gradient, Scalar(param[v].get(i)), s).v;
#pragma unroll
      for (int k = 0; k < R::kStates; ++k) {
        states[k][v * kPack + i] = s[k].v;
        largest[k] = absmax_step(largest[k], s[k].v);
      }
    }
    if constexpr (kStochastic) {
      const Rounding rounding = make_rounding();
      const int64_t group = block * kWarp + static_cast<int>(threadIdx.x) % kWarp;
      param[v].set(updated, rounding_words(rounding.seed, group, rounding.tensor, rounding.step));
    } else {
      param[v].set(updated);
    }
  }
  // Gradients that are not finite show in the states.
  uint32_t most[R::kStates];
  bool usual = true;
#pragma unroll
  for (int k = 0; k < R::kStates; ++k) {
    most[k] = warp_max(magnitude_bits(largest[k]));
    usual = usual && (most[k] == 0 || has_quick_reciprocal(most[k]));
  }
  if (!usual) return false;

  const int skip = j * kOptimizerBlock;
#pragma unroll
  for (int v = 0; v < L::kPacks; ++v) store_aligned(to.param + skip + v * L::kStride, param[v]);
#pragma unroll
  for (int k = 0; k < R::kStates; ++k) {
    const float absmax = bits_float(most[k]);
    if (threadIdx.x % kWarp == 0) to.absmax[k][j] = absmax;
    uint32_t words[kLaneElements / 4] = {};
    if (most[k] != 0) {
      const bool is_signed = tensor_of_state(R::kStates, k) == 0;
      Code8<true>::encode_dynamic(is_signed, shared.tables, states[k], quick_reciprocal(absmax),
                                  words);
    }
#pragma unroll
    for (int v = 0; v < L::kPacks; ++v) {
      typename L::Codes codes;
#pragma unroll
      for (int w = 0; w < kPack / 4; ++w) codes.words[w] = words[v * (kPack / 4) + w];
      store_aligned(to.state[k] + skip + v * L::kStride, codes);
    }
  }
  return true;
}

// The step of any block: incomplete, misaligned, with gradients that are not finite or with zeros
// to skip. Element by element.
template <class R, class T, bool kStochastic>
__device__ BNB_NOINLINE void step_any_block(const OptimizerTensor& tensor, const Shared<R>& shared,
                                            const Step<R>& step, const Rounding& rounding,
                                            int64_t block) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t begin = block * kOptimizerBlock + lane * kLaneElements;
  const int64_t left = tensor.n - begin;
  const int count = static_cast<int>(left < kLaneElements ? (left > 0 ? left : 0) : kLaneElements);
  T* const param = static_cast<T*>(tensor.param) + begin;
  const T* const grad = static_cast<const T*>(tensor.grad) + begin;
  PhiloxWords random{};
  if constexpr (kStochastic) {
    random = rounding_words(rounding.seed, begin / kRoundingGroup, rounding.tensor, rounding.step);
  }

  uint8_t* state[R::kStates];
  float* absmax[R::kStates];
  float scale[R::kStates];
#pragma unroll
  for (int k = 0; k < R::kStates; ++k) {
    state[k] = static_cast<uint8_t*>(state_pointer(tensor, R::kStates, k, 1)) + begin;
    absmax[k] = absmax_pointer(tensor, R::kStates, k) + block;
    scale[k] = *absmax[k];
  }
  float states[R::kStates][kLaneElements] = {};
  bool idle = true;  // every element is skipped
#pragma unroll
  for (int e = 0; e < kLaneElements; ++e) {
    if (e >= count) break;
    const float gradient = __fmul_rn(widen(grad[e]), step.gnorm_scale);
    Scalar s[R::kStates];
#pragma unroll
    for (int k = 0; k < R::kStates; ++k) {
      states[k][e] = __fmul_rn(shared.code(k).levels[state[k][e]], scale[k]);
      s[k] = Scalar(states[k][e]);
    }
    const float updated = step.advance(Scalar(gradient), Scalar(widen(param[e])), s).v;
    if (step.skip_zeros && gradient == 0.0f) continue;
    idle = false;
    // A gradient that is not finite has no use: its element loses the state and keeps the
    // parameter.
    const bool useful = is_finite(gradient);
    if (useful) {
      if constexpr (kStochastic) {
        param[e] = from_float_stochastic(updated, rounding_bits(random, e));
      } else {
        param[e] = narrow<T>(updated);
      }
    }
#pragma unroll
    for (int k = 0; k < R::kStates; ++k) states[k][e] = useful ? finite_state(s[k].v) : 0.0f;
  }
  // Codes that mean the same numbers again would still lose a little each time.
  if (warp_all(idle)) return;
#pragma unroll
  for (int k = 0; k < R::kStates; ++k) {
    uint32_t most = 0;
#pragma unroll
    for (int e = 0; e < kLaneElements; ++e) most = max(most, magnitude_bits(states[k][e]));
    const float largest = bits_float(warp_max(most));
    if (lane == 0) *absmax[k] = largest;
    uint32_t words[kLaneElements / 4];
    shared.code(k).encode(shared.tables, states[k], largest, words);
#pragma unroll
    for (int e = 0; e < kLaneElements; ++e) {
      if (e < count) state[k][e] = static_cast<uint8_t>(words[e / 4] >> (8 * (e % 4)));
    }
  }
}

// A warp's place in the list.
struct Place {
  uint32_t tile;
  int entry;
  uint32_t block;  // first one of the tile
  bool valid;
  bool full;  // whole blocks that allow packs
};

__device__ __forceinline__ Place place_of(const StepList& list, const Entries<StepList>& entries,
                                          uint32_t tile, bool allow_full) {
  Place place{tile, 0, 0, tile < list.header.tiles, false};
  if (!place.valid) return place;
  place.entry = entries.find(tile);
  const auto& found = entries[place.entry];
  place.block = (tile - found.first_tile) * kTileBlocks;
  place.full = allow_full && found.packs != 0 &&
               (int64_t{place.block} + kTileBlocks) * kOptimizerBlock <= found.tensor.n;
  return place;
}

template <class R, class T, bool kStochastic>
__global__ void BNB_LAUNCH_BOUNDS(block_threads(R::kStates), kResident)
    optimizer_step_8bit_blockwise_kernel(const BNB_GRID_CONSTANT StepList list) {
  using L = Lane<R, T>;
  BNB_DYNAMIC_SHARED(storage);  // entries of the list, slots of every warp
  __shared__ Shared<R> shared;
  const OptimizerStep& args = list.header.args;
  const Entries<StepList> entries(list, storage);
#pragma unroll
  for (int k = 0; k < state_tensors(R::kStates); ++k) {
    shared.codes[k].fill(args.qmap[k], shared.tables);
  }
  make_step<R>(args, &shared.step);
  __syncthreads();

  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  char* const own = storage + entry_bytes(list) + warp * kSlots * L::kSlotBytes;
  const uint32_t stride = gridDim.x * warps;
  bool allow_full = !shared.step.skip_zeros;
#pragma unroll
  for (int k = 0; k < state_tensors(R::kStates); ++k) {
    allow_full = allow_full && shared.codes[k].kind == (k == 0 ? CodeKind::kSignedDynamic8
                                                               : CodeKind::kUnsignedDynamic8);
  }
  const uint32_t first = blockIdx.x * warps + warp;
  Place place = place_of(list, entries, first, allow_full);
  float scale[kSlots][R::kStates];
  if (place.full) {
    L::fetch(typename L::Pointers(entries[place.entry].tensor, place.block), 0, own, scale[0]);
  }
  close_copy_group();
  Step<R>& step = shared.steps[warp];
  step = shared.step;  // every lane writes the same
  while (place.valid) {
    const OptimizerTensor& tensor = entries[place.entry].tensor;
    if (has_factors(args)) step = step_of_tensor(shared.step, list, place.entry);
    const auto rounding = [&] {
      return Rounding{args.seed, static_cast<uint32_t>(list.header.tensors_before + place.entry),
                      *args.step + 1};
    };
    Place next;
    const auto fetch_next = [&](int slot) {
      next = place_of(list, entries, place.tile + stride, allow_full);
      if (next.full) {
        L::fetch(typename L::Pointers(entries[next.entry].tensor, next.block), 0,
                 own + slot * L::kSlotBytes, scale[slot]);
      }
      close_copy_group();
    };
    if (place.full) {
      const typename L::Pointers pointers(tensor, place.block);
#pragma unroll
      for (int j = 0; j < kTileBlocks; ++j) {
        const int slot = j % kSlots;
        const int other = (j + 1) % kSlots;
        if (j + 1 < kTileBlocks) {
          L::fetch(pointers, j + 1, own + other * L::kSlotBytes, scale[other]);
          close_copy_group();
        } else {
          fetch_next(other);
        }
        wait_copies<1>();
        if (!step_full_block<R, T, kStochastic>(pointers, j, own + slot * L::kSlotBytes,
                                                scale[slot], shared, step, rounding,
                                                place.block + j)) {
          step_any_block<R, T, kStochastic>(tensor, shared, step, rounding(), place.block + j);
        }
      }
    } else {
      fetch_next(0);
      const int64_t blocks = ceil_div(tensor.n, kOptimizerBlock);
      for (int j = 0; j < kTileBlocks && place.block + j < blocks; ++j) {
        step_any_block<R, T, kStochastic>(tensor, shared, step, rounding(), place.block + j);
      }
    }
    place = next;
  }
  leave_step(list);
}

using Kernel = void (*)(const StepList);

struct Chosen {
  Kernel kernel;
  int states;
  int pack;        // elements of a pack
  int warp_bytes;  // of shared memory
};

template <class R, class T>
Chosen choose(bool stochastic) {
  using L = Lane<R, T>;
  Chosen chosen{optimizer_step_8bit_blockwise_kernel<R, T, false>, R::kStates, L::kPack,
                kSlots * L::kSlotBytes};
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (stochastic) chosen.kernel = optimizer_step_8bit_blockwise_kernel<R, T, true>;
  }
  return chosen;
}

}  // namespace

void optimizer_step_8bit_blockwise(const OptimizerStep& args,
                                   std::span<const OptimizerTensor> tensors, Stream stream) {
  const Chosen chosen = choose_by_types<Chosen>(args.rule, args.dtype, [&]<class R, class T>() {
    return choose<R, T>(args.stochastic_rounding);
  });
  const int threads = block_threads(chosen.states);
  const SharedNeeds needs{kWarp, chosen.warp_bytes, static_cast<int>(sizeof(StepList::Entry)),
                          StepList::kMost};
  const LaunchShape shape =
      shape_for(reinterpret_cast<const void*>(chosen.kernel), threads, kResident, needs);
  const int64_t most_blocks = int64_t{multiprocessors()} * kResident * threads / shape.threads;
  const auto packs = [&](const OptimizerTensor& t) {
    bool aligned = is_aligned(t.param, 16) && is_aligned(t.grad, 16);
    for (int k = 0; k < chosen.states; ++k) {
      aligned = aligned && is_aligned(state_pointer(t, chosen.states, k, 1), chosen.pack);
    }
    return aligned;
  };
  for_each_launch<StepList>(
      args, tensors, kTile, 0, shape.entries, packs, [&](const StepList& list) {
        const int64_t warps = shape.threads / kWarp;
        const int blocks =
            step_blocks(list, std::min(most_blocks, ceil_div(int64_t{list.header.tiles}, warps)));
        if (blocks == 0) return;
        launch("optimizer_step_8bit_blockwise", chosen.kernel, blocks, shape.threads,
               shape.group_bytes + entry_bytes(list), stream, list);
      });
}

}  // namespace bnb::gpu
