// Optimizer steps whose states are 8-bit codes with one absmax per 256 elements: rule x dtype.
//
// A warp owns a quantization block: 8 elements per lane, their absmax one warp reduction away, no
// barrier. While it works on one block, the next one is on its way to shared memory:
//
//   slot 0:  copy b0 | wait, step b0, store | copy b2 ...        | wait, step b2 ...
//   slot 1:          | copy b1 ...          | wait, step b1, ... | copy b3 ...
//
// A tile is a warp's run of blocks; tiles that are not whole, or not aligned, are done element by
// element. There are two kernels: one for any device, and one that takes most of the shared memory
// of a Hopper multiprocessor for tables (state_codes.cuh) and leaves copies to its copy engine
// (block_slots.cuh).
// SPDX-License-Identifier: MIT
#include "bitsandbytes/philox.h"
#include "gpu/device/scalar.cuh"
#include "gpu/optimizer/block_slots.cuh"
#include "gpu/optimizer/list.cuh"
#include "gpu/optimizer/state_codes.cuh"

namespace bnb::gpu {
namespace {

constexpr int kTileBlocks = 4;
constexpr int64_t kTile = int64_t{kTileBlocks} * kOptimizerBlock;
static_assert(kTileBlocks % kSlots == 0);  // a tile leaves the slots as it found them

// Tables and constants of a launch, in shared memory. `Codes`: SmallTables or LaneTables; `Copies`:
// LaneCopies or BulkCopies.
template <class R, class Codes, class Copies>
struct alignas(kCacheLine) Shared {  // so that dynamic shared memory begins at a line
  typename Codes::Tables tables;
  Step<R> step;                            // what all tensors share
  Step<R> steps[Codes::kThreads / kWarp];  // of the tensor that a warp is at
  typename Copies::Barriers barriers[Codes::kThreads / kWarp];
};

// Which random bits round the parameters of a tensor.
struct Rounding {
  uint64_t seed;
  uint32_t tensor;
  int64_t step;
};

// The step of block j of a tile, from its slot, with the dynamic maps. Returns false, having stored
// nothing, when new states are so large or so small that their codes must be searched.
template <class R, class T, bool kStochastic, class Codes, class MakeRounding>
__device__ __forceinline__ bool step_full_block(const typename Lane<R, T>::Pointers& to, int j,
                                                char* slot, const float (&scale)[R::kStates],
                                                const Codes& codes, const Step<R>& step,
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
        s[k] = Scalar(__fmul_rn(codes.level(k, old[k].words, i), scale[k]));
      }
      const Scalar gradient(__fmul_rn(grad.get(i), step.gnorm_scale));
      updated[i] = step.advance(gradient, Scalar(param[v].get(i)), s).v;
#pragma unroll
      for (int k = 0; k < R::kStates; ++k) {
        states[k][v * kPack + i] = s[k].v;
        Codes::grow(k, largest[k], s[k].v);
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
    most[k] = warp_max(Codes::counted_bits(k, largest[k]));
    usual = usual && Codes::is_usual(most[k]);
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
    if (most[k] != 0) codes.encode(k, states[k], absmax, words);
#pragma unroll
    for (int v = 0; v < L::kPacks; ++v) {
      typename L::Codes packed;
#pragma unroll
      for (int w = 0; w < kPack / 4; ++w) packed.words[w] = words[v * (kPack / 4) + w];
      store_aligned(to.state[k] + skip + v * L::kStride, packed);
    }
  }
  return true;
}

// The step of any block: incomplete, misaligned, with gradients that are not finite or with zeros
// to skip. Element by element.
template <class R, class T, bool kStochastic, class Codes>
__device__ BNB_NOINLINE void step_any_block(const OptimizerTensor& tensor, const Codes codes,
                                            const typename Codes::Tables& tables,
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
      states[k][e] =
          __fmul_rn(tables.codes[tensor_of_state(R::kStates, k)].levels[state[k][e]], scale[k]);
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
    codes.encode_any(k, states[k], largest, words);
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

// The tiles of a list, by all warps of all blocks. `copies`: of this warp.
template <class R, class T, bool kStochastic, class Codes, class Copies>
__device__ __forceinline__ void step_tiles(const StepList& list, const Entries<StepList>& entries,
                                           Shared<R, Codes, Copies>& shared, const Codes& codes,
                                           Copies copies) {
  using Pointers = typename Lane<R, T>::Pointers;
  const OptimizerStep& args = list.header.args;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const uint32_t stride = gridDim.x * warps;
  bool allow_full = !shared.step.skip_zeros;
#pragma unroll
  for (int k = 0; k < state_tensors(R::kStates); ++k) {
    allow_full =
        allow_full && shared.tables.codes[k].kind ==
                          (k == 0 ? CodeKind::kSignedDynamic8 : CodeKind::kUnsignedDynamic8);
  }
  float scale[kSlots][R::kStates];
  const auto fetch = [&](const Pointers& from, int j, int slot) {
    copies.start(from, j, slot);
#pragma unroll
    for (int k = 0; k < R::kStates; ++k) scale[slot][k] = from.absmax[k][j];
  };
  const auto fetch_first = [&](const Place& place, int slot) {
    if (place.full) fetch(Pointers(entries[place.entry].tensor, place.block), 0, slot);
    copies.close();
  };
  Place place = place_of(list, entries, blockIdx.x * warps + warp, allow_full);
  fetch_first(place, 0);
  Step<R>& step = shared.steps[warp];
  step = shared.step;  // every lane writes the same
  sync_warp();
  while (place.valid) {
    const OptimizerTensor& tensor = entries[place.entry].tensor;
    if (has_factors(args)) {
      sync_warp();  // all have read the step of the tensor before
      step = step_of_tensor(shared.step, list, place.entry);
      sync_warp();
    }
    const auto rounding = [&] {
      return Rounding{args.seed, static_cast<uint32_t>(list.header.tensors_before + place.entry),
                      *args.step + 1};
    };
    Place next;
    const auto fetch_next = [&](int slot) {
      next = place_of(list, entries, place.tile + stride, allow_full);
      fetch_first(next, slot);
    };
    if (place.full) {
      const Pointers pointers(tensor, place.block);
      typename Codes::template Constants<Step<R>> constants = step;
#pragma unroll
      for (int j = 0; j < kTileBlocks; ++j) {
        const int slot = j % kSlots;
        const int other = (j + 1) % kSlots;
        if (j + 1 < kTileBlocks) {
          fetch(pointers, j + 1, other);
          copies.close();
        } else {
          fetch_next(other);
        }
        copies.wait(slot);
        if (!step_full_block<R, T, kStochastic>(pointers, j, copies.slot(slot), scale[slot], codes,
                                                constants, rounding, place.block + j)) {
          step_any_block<R, T, kStochastic>(tensor, codes, shared.tables, step, rounding(),
                                            place.block + j);
        }
      }
    } else {
      fetch_next(0);
      const int64_t blocks = ceil_div(tensor.n, kOptimizerBlock);
      for (int j = 0; j < kTileBlocks && place.block + j < blocks; ++j) {
        step_any_block<R, T, kStochastic>(tensor, codes, shared.tables, step, rounding(),
                                          place.block + j);
      }
    }
    place = next;
  }
  leave_step(list);
}

template <class R, class T, bool kStochastic>
__global__ void BNB_LAUNCH_BOUNDS(SmallTables<R>::kThreads, SmallTables<R>::kResident)
    optimizer_step_8bit_blockwise_kernel(const BNB_GRID_CONSTANT StepList list) {
  using L = Lane<R, T>;
  using Codes = SmallTables<R>;
  using Copies = LaneCopies<L>;
  BNB_DYNAMIC_SHARED(storage);  // slots of every warp, entries of the list
  __shared__ Shared<R, Codes, Copies> shared;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const Entries<StepList> entries(list, storage + warps * L::kWarpBytes);
  shared.tables.fill(list.header.args);
  make_step<R>(list.header.args, &shared.step);
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  char* const slots = storage + warp * L::kWarpBytes;
  step_tiles<R, T, kStochastic>(list, entries, shared, Codes(shared.tables),
                                Copies(slots, shared.barriers[warp]));
}

// Shared memory in front of the levels of LaneTables: buckets, and entries of the list.
constexpr int kEntriesAt = LaneLayout::kUnsignedBytes;
constexpr int kBeforeLevels =
    kEntriesAt + StepList::kMost * static_cast<int>(sizeof(StepList::Entry));
// With static shared memory in front of it: levels_at_most() counts on that.
static_assert(kBeforeLevels % kSecondByte == 0 || kBeforeLevels <= kSecondByte - 8 * 1024);

template <class R, class T, bool kStochastic>
__global__ void BNB_LAUNCH_BOUNDS(LaneTables<R>::kThreads, LaneTables<R>::kResident)
    optimizer_step_8bit_blockwise_lanes_kernel(
        [[maybe_unused]] const BNB_GRID_CONSTANT StepList list) {
#if BNB_LANE_TABLES
  using L = Lane<R, T>;
  using Codes = LaneTables<R>;
#if BNB_HOPPER
  using Copies = BulkCopies<L>;
#else
  using Copies = LaneCopies<L>;
#endif
  BNB_DYNAMIC_SHARED(storage);
  __shared__ Shared<R, Codes, Copies> shared;
  const Entries<StepList> entries(list, storage + kEntriesAt);
  shared.tables.fill(list.header.args);
  make_step<R>(list.header.args, &shared.step);
  __syncthreads();
  char* const before = storage + kBeforeLevels;
  char* const levels = before + gap_to_second_byte(shared_pointer(before));
  const Codes codes(shared.tables, storage, levels);
  codes.fill(storage, levels);
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  char* const slots = levels + LaneLayout::room(L::kWarpBytes, warp);
  step_tiles<R, T, kStochastic>(list, entries, shared, codes, Copies(slots, shared.barriers[warp]));
#endif
}

using Kernel = void (*)(const StepList);

struct Chosen {
  Kernel kernel;
  int states;
  int state_alignment;  // of what is copied, in bytes
  int warp_bytes;       // of shared memory
  int threads;
  int resident;
  bool lanes;
};

// Whether packs of a tensor lie where the chosen kernel can copy them at once.
bool is_packed(const OptimizerTensor& t, const Chosen& chosen) {
  bool aligned = is_aligned(t.param, 16) && is_aligned(t.grad, 16);
  for (int k = 0; k < chosen.states; ++k) {
    aligned = aligned && is_aligned(state_pointer(t, chosen.states, k, 1), chosen.state_alignment);
  }
  return aligned;
}

// Whether seven of eight elements lie in whole tiles. The others are done element by element, for
// which the kernel for any device is quicker. Nobody asks where there is no other kernel.
[[maybe_unused]] bool are_mostly_whole(std::span<const OptimizerTensor> tensors,
                                       const Chosen& chosen) {
  int64_t whole = 0;
  int64_t all = 0;
  for (const OptimizerTensor& t : tensors) {
    all += t.n;
    if (is_packed(t, chosen)) whole += t.n / kTile * kTile;
  }
  return whole >= all - all / 8;
}

template <class R, class T>
Chosen choose(bool stochastic, std::span<const OptimizerTensor> tensors) {
  using L = Lane<R, T>;
  const auto describe = [&]<class Codes>(Kernel kernel, int state_alignment, bool lanes) {
    return Chosen{kernel,           R::kStates, state_alignment, L::kWarpBytes, Codes::kThreads,
                  Codes::kResident, lanes};
  };
  // With one state, or wider elements, memory bounds the step anyway.
  if constexpr (kLaneTables && R::kStates > 1 && sizeof(T) == 2) {
    Kernel kernel = optimizer_step_8bit_blockwise_lanes_kernel<R, T, false>;
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (stochastic) kernel = optimizer_step_8bit_blockwise_lanes_kernel<R, T, true>;
    }
    const Chosen chosen = describe.template operator()<LaneTables<R>>(kernel, 16, true);
    if (has_lane_tables(reinterpret_cast<const void*>(kernel)) &&
        are_mostly_whole(tensors, chosen)) {
      return chosen;
    }
  }
  Kernel kernel = optimizer_step_8bit_blockwise_kernel<R, T, false>;
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (stochastic) kernel = optimizer_step_8bit_blockwise_kernel<R, T, true>;
  }
  return describe.template operator()<SmallTables<R>>(kernel, L::kPack, false);
}

// What a launch of the chosen kernel takes. Lets the kernel have that much shared memory.
LaunchShape shape_of(const Chosen& chosen) {
  const auto* kernel = reinterpret_cast<const void*>(chosen.kernel);
  if (!chosen.lanes) {
    const SharedNeeds needs{kWarp, chosen.warp_bytes, static_cast<int>(sizeof(StepList::Entry)),
                            StepList::kMost};
    return shape_for(kernel, chosen.threads, chosen.resident, needs);
  }
  const int bytes = LaneLayout::levels_at_most(kBeforeLevels) +
                    LaneLayout::bytes(chosen.warp_bytes, chosen.threads / kWarp);
  allow_shared(kernel, bytes);
  return {chosen.threads, bytes, StepList::kMost};
}

}  // namespace

void optimizer_step_8bit_blockwise(const OptimizerStep& args,
                                   std::span<const OptimizerTensor> tensors, Stream stream) {
  const Chosen chosen = choose_by_types<Chosen>(args.rule, args.dtype, [&]<class R, class T>() {
    return choose<R, T>(args.stochastic_rounding, tensors);
  });
  const LaunchShape shape = shape_of(chosen);
  const int64_t most_blocks =
      int64_t{multiprocessors()} * chosen.resident * chosen.threads / shape.threads;
  const auto packs = [&](const OptimizerTensor& t) { return is_packed(t, chosen); };
  for_each_launch<StepList>(
      args, tensors, kTile, 0, shape.entries, packs, [&](const StepList& list) {
        const int64_t warps = shape.threads / kWarp;
        const int blocks =
            step_blocks(list, std::min(most_blocks, ceil_div(int64_t{list.header.tiles}, warps)));
        if (blocks == 0) return;
        const int bytes = shape.group_bytes + (chosen.lanes ? 0 : entry_bytes(list));
        launch("optimizer_step_8bit_blockwise", chosen.kernel, blocks, shape.threads, bytes, stream,
               list);
      });
}

}  // namespace bnb::gpu
