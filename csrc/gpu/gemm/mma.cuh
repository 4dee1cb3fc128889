// The product with a 4-bit weight for few rows of activations, on tensor cores.
// SPDX-License-Identifier: MIT
//
// What mma_multiplier.cuh multiplies comes through a ring in shared memory (mma_units.cuh): codes
// are read once. Sums of items are added up by some warps of the team while the others are at the
// next items.
#pragma once

#include <algorithm>

#include "gpu/gemm/mma_multiplier.cuh"
#include "gpu/gemm/mma_units.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {

inline constexpr int kMmaThreads = kMmaWarps * kWarp;

// Units of a warp whose activations it keeps in registers, which hold two tiles of one unit.
template <int kColTiles>
constexpr int kMmaTurns = 2 / kColTiles;

// Items whose sums are added up together: there is room for those of two tiles, twice.
template <int kColTiles>
constexpr int kMmaGroup = 2 / kColTiles;

// kQuads: the scales of a unit's blocks are neighbours, at a multiple of four.
template <class T, int kColTiles, bool kNested, bool kQuads>
__global__ void __launch_bounds__(kMmaThreads, 1)
    gemm_4bit_mma_kernel(BNB_GRID_CONSTANT const Gemm4bit args,
                         BNB_GRID_CONSTANT const Levels4 levels, float multiple,
                         BNB_GRID_CONSTANT const MmaShape shape) {
  using Multiplier = MmaMultiplier<T, kColTiles, kMmaTurns<kColTiles>>;
  constexpr int kLines = Multiplier::kLines;
  constexpr int kWarpBytes = Multiplier::kWarpBytes;
  constexpr int kItemBytes = kMmaWarps * kWarpBytes;
  static_assert(2 * kMmaGroup<kColTiles> * kItemBytes <= kMmaTableBytes);
  BNB_DYNAMIC_SHARED(memory);
  __shared__ SplitBarrier arrivals[kMmaWarps / 2];  // of the teams
  __shared__ float scale_levels[kNested ? kCodeLevels : 1];

  const MmaPlace place(args.weight, shape);
  const int threads = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = place.lane;
  const int group = lane / 4;
  const int in_group = lane % 4;
  const int team_warps = 1 << shape.log2_team;
  const int64_t first_col = int64_t{blockIdx.y} * (kColTiles * kMmaCols);

  if (place.of_team == 0 && lane == 0) arrivals[place.team].init(team_warps);
  // Until the kernel before this one has ended, nothing is read that it may have written.
  place.prefetch(args.weight, shape);
  if (levels.table == nullptr) fill_mma_table<T>(memory, levels, multiple, thread, threads);
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (levels.table != nullptr) fill_mma_table<T>(memory, levels, multiple, thread, threads);
  MmaCopier<kNested, kQuads> copier(args.weight, shape, place, memory, kMmaTableBytes,
                                    scale_levels);
  if constexpr (kNested) {
    for (int i = thread; i < kCodeLevels; i += threads) {
      start_copy<4>(&scale_levels[i], args.weight.scales.code + i);
    }
    close_copy_group();
  }
  // Activations first: every product needs them.
  Multiplier multiplier(args, memory, lane, first_col);
  multiplier.keep(place.of_team * shape.turns, shape.turns);
  copier.start();
  if constexpr (kNested) wait_copies<1>();
  __syncthreads();

  const uint32_t codes_at = hide_origin(static_cast<uint32_t>(
      group * kMmaRowBytes + group % kMmaBlocks * kMmaBlockBytes + in_group * 8));
  const uint32_t scales_at =
      hide_origin(static_cast<uint32_t>(kMmaScalesAt + group * (4 * kMmaBlocks)));

  // Items of a team whose sums, by each of its warps, are added up together.
  struct Group {
    int number;  // of the first item among those of the team
    int size;
    int chunk;
  };
  const float inverse = __frcp_rn(multiple);
  char* const lines_of_lane = memory + kMmaEntryBytes + lane * 4;
  const auto buffer_of = [&](uint32_t group, int index) {
    return lines_of_lane + (group % 2 * kMmaGroup<kColTiles> + index) * kItemBytes;
  };
  float* const totals = reinterpret_cast<float*>(memory + kMmaTableBytes +
                                                 threads / kWarp * (kMmaSlots * kMmaSlotBytes));
  // Adds them up in the order of the warps, and stores the results.
  const auto add_up = [&](const Group& group, uint32_t number_of_group) {
    // Some warps, and others for the next group.
    const int first = static_cast<int>(number_of_group) * (kMmaGroup<kColTiles> * kLines);
    for (int task = (place.of_team - first) & (team_warps - 1); task < group.size * kLines;
         task += team_warps) {
      const int index = task / kLines;
      const int line = task % kLines;
      const int number = group.number + index;
      const int item = place.first_item + place.team + number * place.stride;
      if (item >= place.items) continue;
      const char* const from = buffer_of(number_of_group, index) +
                               place.team * team_warps * kWarpBytes + line * kMmaLineBytes;
      float sum = 0.0f;
#pragma unroll 4
      for (int w = 0; w < team_warps; ++w) {
        sum = __fadd_rn(sum, *reinterpret_cast<const float*>(from + w * kWarpBytes));
      }
      float* const total =
          totals + ((number * place.teams + place.team) * kLines + line) * kWarp + lane;
      if (group.chunk > 0) sum = __fadd_rn(*total, sum);
      if (group.chunk + 1 < shape.chunks) {
        *total = sum;
        continue;
      }
      const int row = place.first_row(item) + line % kMmaSums / 2 * 8 + lane / 4;
      const int64_t col = first_col + line / kMmaSums * kMmaCols + lane % 4 * 2 + line % 2;
      if (row >= item * kMmaRows && col < args.m) {
        const float bias =
            args.bias != nullptr ? widen(static_cast<const T*>(args.bias)[row]) : 0.0f;
        static_cast<T*>(args.out)[col * place.n + row] = narrow<T>(__fmaf_rn(sum, inverse, bias));
      }
    }
  };
  // Leaves this warp's sums to those who add them up, and adds up those of the group before, which
  // are likely to be there: no warp waits for the others of its team, unless it is an item ahead of
  // one of them. Who leaves sums of group p has seen all arrive at p - 1, before which they have
  // added up p - 2: so there is room for two.
  Group before{};
  Group present{};
  uint32_t groups = 0;  // that are full
  const auto finish = [&](int number, int chunk, bool last) {
    const bool first = present.size == 0;
    if (first && groups > 0) arrivals[place.team].wait((groups - 1) & 1u);
    multiplier.leave(buffer_of(groups, present.size) + place.warp * kWarpBytes);
    if (first && groups > 0) add_up(before, groups - 1);
    if (first) present = {number, 0, chunk};
    if (++present.size < kMmaGroup<kColTiles> && !last) return;
    sync_warp();
    if (lane == 0) arrivals[place.team].arrive();
    before = present;
    present.size = 0;
    ++groups;
  };

  for (int chunk = 0; chunk < shape.chunks; ++chunk) {
    const int first_unit = (chunk * team_warps + place.of_team) * shape.turns;
    if (chunk > 0) multiplier.keep(first_unit, shape.turns);
    for (int number = 0; place.first_item + number * place.stride < place.items; ++number) {
#pragma unroll
      for (int turn = 0; turn < kMmaTurns<kColTiles>; ++turn) {
        if (turn >= shape.turns) continue;
        const uint32_t slot = copier.take();
        if (first_unit + turn < place.units) {
          multiplier.multiply(slot + codes_at, slot + scales_at, turn);
        }
      }
      finish(number, chunk, place.first_item + (number + 1) * place.stride >= place.items);
    }
  }
  arrivals[place.team].wait((groups - 1) & 1u);
  add_up(before, groups - 1);
}

// Whether this kernel takes the arguments, on a device that has the instructions.
inline bool takes_mma(const Gemm4bit& args) {
  constexpr int64_t kMostRows = 65535;  // of a grid's second dimension
  constexpr int64_t kMost = int64_t{1} << 30;
  const Weight4bit& w = args.weight;
  const Scales& s = w.scales;
  return args.dtype != DType::kFloat32 && args.m <= kMostRows * kMmaCols && w.n >= kMmaRows &&
         w.n <= kMost && w.k % kMmaBlock == 0 && w.k > 0 && w.k <= kMost &&
         w.block_size >= kMmaBlock && is_aligned(w.codes, 16) && is_aligned(args.a, 16) &&
         (!s.nested() || log2_of(s.block_size) >= 0);
}

template <class T, int kColTiles, bool kNested, bool kQuads>
void launch_mma(const Gemm4bit& args, Stream stream) {
  const auto kernel = gemm_4bit_mma_kernel<T, kColTiles, kNested, kQuads>;
  const Weight4bit& w = args.weight;
  constexpr int kStatic = (kNested ? 4 * kCodeLevels : 0) + 8 * kMmaWarps / 2;
  constexpr int kWarpBytes = kMmaSlots * kMmaSlotBytes;
  const int room = most_shared_bytes() - kStatic - kMmaTableBytes;
  int warps = kMmaWarps;
  while (warps * kWarpBytes > room) warps /= 2;
  const MmaShape shape = mma_shape(w, warps, kMmaTurns<kColTiles>);
  const int slots = warps * kWarpBytes;
  const int teams = warps >> shape.log2_team;
  const int64_t rounds = ceil_div(w.n, kMmaRows * teams);
  int64_t blocks = std::min<int64_t>(rounds, multiprocessors());
  int bytes = kMmaTableBytes + slots;
  if (shape.chunks > 1) {
    // Sums of all items of a block of threads stay there from chunk to chunk.
    constexpr int kMostTotals = 32 * 1024;
    const int round_bytes = teams * kColTiles * kMmaSums * kWarp * 4;
    const int most = std::min(kMostTotals, room - slots) / round_bytes;
    blocks = std::max(blocks, ceil_div(rounds, int64_t{most}));
    bytes += static_cast<int>(ceil_div(rounds, blocks)) * round_bytes;
  }
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(ceil_div(args.m, kColTiles * kMmaCols)));
  allow_shared(reinterpret_cast<const void*>(kernel), bytes);
  launch_early("gemm_4bit_mma_kernel", kernel, grid, warps * kWarp, bytes, stream, args, Levels4(w),
               level_multiple<T>(w.code), shape);
}

template <class T, int kColTiles, bool kNested>
void launch_mma(const Gemm4bit& args, Stream stream) {
  const Weight4bit& w = args.weight;
  const Scales& s = w.scales;
  const bool aligned = s.nested() ? is_aligned(s.codes, kMmaBlocks) && s.block_size >= kMmaBlocks
                                  : is_aligned(s.absmax, 4 * kMmaBlocks);
  const bool quads = aligned && w.block_size == kMmaBlock && w.k % kMmaUnit == 0;
  quads ? launch_mma<T, kColTiles, kNested, true>(args, stream)
        : launch_mma<T, kColTiles, kNested, false>(args, stream);
}

template <class T, bool kNested>
void mma_gemm_4bit(const Gemm4bit& args, Stream stream) {
  args.m <= kMmaCols ? launch_mma<T, 1, kNested>(args, stream)
                     : launch_mma<T, 2, kNested>(args, stream);
}

}  // namespace bnb::gpu
