// The product with a 4-bit weight for few rows of activations, on tensor cores.
// SPDX-License-Identifier: MIT
//
// out^T = w a^T: the rows of the weight are those of the tensor core's tiles, so that few rows of
// activations waste little. The codes are read once, into a ring in shared memory (mma_units.cuh),
// and decoded into the registers from which they are multiplied. What bounds the kernel is reading
// them, next to it the shared memory through which they and their levels go.
//
// A sum over k may be made in any order. So each lane takes 16 neighbouring k of every block of 64,
// which are 8 bytes of a row of codes and 32 of a row of activations:
//
//     lane 4 g + t, step s, rows g and g + 8:    k = 16 t + 4 s + {0, 1} and 16 t + 4 s + {2, 3}
//
// in place of the tile's k = 2 t + {0, 1} and 2 t + 8 + {0, 1}. After the 4 steps of a block its
// sums are multiplied by the scales of its rows and added up in float. Levels are multiplied by
// level_multiple() before they are rounded to 16 bits, and the whole sum is divided by it.
//
// The warps of a block of threads form teams. A team makes an item, 16 rows of the weight, of which
// each warp takes one or two units, 256 k. They are the same k in every item, so up to 8 rows of
// activations stay in registers as the lanes need them. Where the warps' units are not all of k,
// the team makes all its items for this chunk of k, then for the next. More rows of activations are
// read again for every item, whose units a team then shares in any number.
//
// In the end of an item its sums are added across the team, in order, by four of its warps while
// the others are at the next item.
#pragma once

#include <algorithm>

#include "gpu/gemm/levels.cuh"
#include "gpu/gemm/mma_units.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {

inline constexpr int kMmaThreads = kMmaWarps * kWarp;
inline constexpr int kMmaCols = 8;   // rows of activations in a tile
inline constexpr int kMmaTurns = 2;  // units of a warp whose activations it keeps in registers

// Shared memory begins with lines of 256 bytes: the entry of the table of pairs for a byte of
// codes, and a line of sums. So the place of an entry is the byte in the second byte of a word,
// which one instruction puts there. Behind them are slots for units, and sums of chunks.
inline constexpr int kMmaLineBytes = 256;
inline constexpr int kMmaLines = 256;
inline constexpr int kMmaTableBytes = kMmaLines * kMmaLineBytes;
inline constexpr int kMmaEntryBytes = 4 * kWarp;

// Sums of a lane in a tile take a line each.
inline constexpr int kMmaSums = 4;
inline constexpr int kMmaWarpSumBytes = kMmaSums * kMmaLineBytes;
inline constexpr int kMmaBufferBytes = kMmaWarps * kMmaWarpSumBytes;
inline constexpr int kMmaBuffers = kMmaTableBytes / kMmaBufferBytes;

// kQuads: the scales of a unit's blocks are neighbours, at a multiple of four.
template <class T, int kColTiles, bool kNested, bool kQuads>
__global__ void __launch_bounds__(kMmaThreads, 1)
    gemm_4bit_mma_kernel(BNB_GRID_CONSTANT const Gemm4bit args,
                         BNB_GRID_CONSTANT const Levels4 levels, float multiple,
                         BNB_GRID_CONSTANT const MmaShape shape) {
  constexpr bool kKept = kColTiles == 1;  // activations stay in registers
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
  if constexpr (kNested) {
    for (int i = thread; i < kCodeLevels; i += threads) {
      scale_levels[i] = args.weight.scales.code[i];
    }
  }

  // Where this lane's rows of activations begin; null where there is none.
  const char* a[kColTiles];
#pragma unroll
  for (int c = 0; c < kColTiles; ++c) {
    const int64_t col = first_col + c * kMmaCols + group;
    a[c] = col < args.m ? static_cast<const char*>(args.a) + col * place.k * 2 + in_group * 32
                        : nullptr;
  }
  // Half of what a lane takes of a block that begins at `at`.
  const auto load_half = [&](int c, int at, int half) {
    return a[c] != nullptr && at < place.k
               ? *reinterpret_cast<const uint4*>(a[c] + int64_t{at} * 2 + half * 16)
               : uint4{0, 0, 0, 0};
  };
  uint4 kept[kKept ? kMmaTurns : 1][kMmaBlocks][2];
  const auto keep_activations = [&](int first_unit) {
#pragma unroll
    for (int turn = 0; turn < kMmaTurns; ++turn) {
#pragma unroll
      for (int b = 0; b < kMmaBlocks; ++b) {
        const int at = (first_unit + turn) * kMmaUnit + b * kMmaBlock;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          kept[turn][b][half] = load_half(0, turn < shape.turns ? at : place.k, half);
        }
      }
    }
  };
  if constexpr (kKept) keep_activations(place.of_team * shape.turns);

  MmaCopier<kNested, kQuads> copier(args.weight, shape, place, memory, kMmaTableBytes,
                                    scale_levels);
  copier.start();

  // Two weights in a word, the first in the lower half, for every byte of codes; a copy for every
  // lane, whose words lie in a bank of their own, so that lookups never conflict.
  for (int i = thread; i < kMmaLines * (kMmaEntryBytes / 16); i += threads) {
    const int byte = i / (kMmaEntryBytes / 16);
    const uint32_t pair = pair_of_levels<T>(levels, byte, multiple);
    *reinterpret_cast<uint4*>(memory + byte * kMmaLineBytes + i % (kMmaEntryBytes / 16) * 16) =
        uint4{pair, pair, pair, pair};
  }
  __syncthreads();

  // The weights of byte `i` of a word of codes.
  const uint32_t own_copy = hide_origin(static_cast<uint32_t>(lane * 4));
  const auto lookup = [&](uint32_t word, int i) {
    const uint32_t at = byte_permute(word, own_copy, 0x5504u | (static_cast<uint32_t>(i) << 4));
    return *reinterpret_cast<const uint32_t*>(memory + at);
  };

  float sums[kColTiles][kMmaSums] = {};
  const uint32_t codes_at = hide_origin(static_cast<uint32_t>(
      group * kMmaRowBytes + group % kMmaBlocks * kMmaBlockBytes + in_group * 8));
  const uint32_t scales_at =
      hide_origin(static_cast<uint32_t>(kMmaScalesAt + group * (4 * kMmaBlocks)));
  const auto multiply = [&](uint32_t slot, int unit, int turn) {
    using Quad = Pack<float, kMmaBlocks>;
    const auto* const quads = reinterpret_cast<const Quad*>(memory + slot + scales_at);
    const Quad scales[2] = {quads[0], quads[8]};
#pragma unroll
    for (int b = 0; b < kMmaBlocks; ++b) {
      const char* const at = memory + ((slot + codes_at) ^ (b * kMmaBlockBytes));
      const uint2 codes[2] = {*reinterpret_cast<const uint2*>(at),
                              *reinterpret_cast<const uint2*>(at + 8 * kMmaRowBytes)};
      uint4 x[kColTiles][2];
#pragma unroll
      for (int c = 0; c < kColTiles; ++c) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          x[c][half] =
              kKept ? kept[turn][b][half] : load_half(c, unit * kMmaUnit + b * kMmaBlock, half);
        }
      }
      float products[kColTiles][kMmaSums] = {};
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const uint32_t g0 = s < 2 ? codes[0].x : codes[0].y;
        const uint32_t g8 = s < 2 ? codes[1].x : codes[1].y;
        const int byte = s % 2 * 2;
        const uint32_t w[4] = {lookup(g0, byte), lookup(g8, byte), lookup(g0, byte + 1),
                               lookup(g8, byte + 1)};
#pragma unroll
        for (int c = 0; c < kColTiles; ++c) {
          const uint4 words = x[c][s / 2];
          multiply_add_16x8x16<T>(products[c], w, s % 2 == 0 ? words.x : words.z,
                                  s % 2 == 0 ? words.y : words.w);
        }
      }
#pragma unroll
      for (int c = 0; c < kColTiles; ++c) {
#pragma unroll
        for (int i = 0; i < kMmaSums; ++i) {
          sums[c][i] = __fmaf_rn(products[c][i], scales[i / 2].values[b], sums[c][i]);
        }
      }
    }
  };

  // The sums of a tile, by every warp of a team.
  struct Tile {
    int number;  // of the item among those of the team
    int chunk;
    int col_tile;
  };
  const float inverse = __frcp_rn(multiple);
  char* const sums_of_lane = memory + kMmaEntryBytes + lane * 4;
  float* const totals = reinterpret_cast<float*>(memory + kMmaTableBytes +
                                                 threads / kWarp * (kMmaSlots * kMmaSlotBytes));
  // Adds them up in the order of the warps, and stores the results.
  const auto add_up = [&](const Tile& tile, uint32_t buffer) {
    const int item = place.first_item + place.team + tile.number * place.stride;
    if (item >= place.items) return;
    // Four warps, the same in every chunk, and others for the next item.
    for (int i = (place.of_team - tile.number * kMmaSums) & (team_warps - 1); i < kMmaSums;
         i += team_warps) {
      const char* const from = sums_of_lane + buffer * kMmaBufferBytes +
                               place.team * team_warps * kMmaWarpSumBytes + i * kMmaLineBytes;
      float sum = 0.0f;
#pragma unroll 4
      for (int w = 0; w < team_warps; ++w) {
        sum = __fadd_rn(sum, *reinterpret_cast<const float*>(from + w * kMmaWarpSumBytes));
      }
      float* const total =
          totals + ((tile.number * place.teams + place.team) * kMmaSums + i) * kWarp + lane;
      if (tile.chunk > 0) sum = __fadd_rn(*total, sum);
      if (tile.chunk + 1 < shape.chunks) {
        *total = sum;
        continue;
      }
      const int row = place.first_row(item) + i / 2 * 8 + group;
      const int64_t col = first_col + tile.col_tile * kMmaCols + in_group * 2 + i % 2;
      if (row >= item * kMmaRows && col < args.m) {
        const float bias =
            args.bias != nullptr ? widen(static_cast<const T*>(args.bias)[row]) : 0.0f;
        static_cast<T*>(args.out)[col * place.n + row] = narrow<T>(__fmaf_rn(sum, inverse, bias));
      }
    }
  };
  // Leaves this warp's sums to those who add them up, and adds up those of the tile before, which
  // are likely to be there: no warp waits for the others of its team, unless it is a tile ahead of
  // one of them. Who leaves sums of tile p has seen all arrive at p - 2, before which they have
  // added up p - 4: so the buffers are four.
  static_assert(kMmaBuffers == 4);
  Tile before{};
  uint32_t tiles = 0;  // so far
  const auto finish = [&](int number, int chunk) {
#pragma unroll
    for (int c = 0; c < kColTiles; ++c) {
      char* const to =
          sums_of_lane + tiles % kMmaBuffers * kMmaBufferBytes + place.warp * kMmaWarpSumBytes;
#pragma unroll
      for (int i = 0; i < kMmaSums; ++i) {
        *reinterpret_cast<float*>(to + i * kMmaLineBytes) = sums[c][i];
        sums[c][i] = 0.0f;
      }
      if (tiles > 0) arrivals[place.team].wait((tiles - 1) & 1u);
      sync_warp();
      if (lane == 0) arrivals[place.team].arrive();
      if (tiles > 0) add_up(before, (tiles - 1) % kMmaBuffers);
      before = {number, chunk, c};
      ++tiles;
    }
  };

  for (int chunk = 0; chunk < shape.chunks; ++chunk) {
    const int first_unit = (chunk * team_warps + place.of_team) * shape.turns;
    if constexpr (kKept) {
      if (chunk > 0) keep_activations(first_unit);
    }
    const auto advance = [&](int turn) {
      const uint32_t slot = copier.take();
      if (first_unit + turn < place.units) multiply(slot, first_unit + turn, turn);
    };
    for (int number = 0; place.first_item + number * place.stride < place.items; ++number) {
      if constexpr (kKept) {
#pragma unroll
        for (int turn = 0; turn < kMmaTurns; ++turn) {
          if (turn < shape.turns) advance(turn);
        }
      } else {
        for (int turn = 0; turn < shape.turns; ++turn) advance(turn);
      }
      finish(number, chunk);
    }
  }
  arrivals[place.team].wait((tiles - 1) & 1u);
  add_up(before, (tiles - 1) % kMmaBuffers);
}

// Columns of tiles when there are more rows of activations than one holds.
inline constexpr int kMmaManyCols = 4;

// Whether this kernel takes the arguments, on a device that has the instructions.
inline bool takes_mma(const Gemm4bit& args) {
  constexpr int64_t kMostGridRows = 65535;  // of a grid's second dimension
  constexpr int64_t kMost = int64_t{1} << 30;
  const Weight4bit& w = args.weight;
  const Scales& s = w.scales;
  return args.dtype != DType::kFloat32 && args.m <= kMostGridRows * kMmaManyCols * kMmaCols &&
         w.n >= kMmaRows && w.n <= kMost && w.k % kMmaBlock == 0 && w.k > 0 && w.k <= kMost &&
         w.block_size >= kMmaBlock && is_aligned(w.codes, 16) && is_aligned(args.a, 16) &&
         (!s.nested() || log2_of(s.block_size) >= 0);
}

// How the `warps` of a block share the work: as takes the least time, counted in units of a warp.
// Fewer that share an item add up their sums less often, more share the rows more evenly among
// multiprocessors. `kept`: whether warps keep their activations, and take few units of a chunk.
inline MmaShape mma_shape(const Weight4bit& w, int warps, bool kept) {
  constexpr double kItem = 0.3;  // to add up the sums of an item
  const int64_t items = ceil_div(w.n, kMmaRows);
  const int64_t units = ceil_div(w.k, kMmaUnit);
  const int64_t sms = multiprocessors();
  MmaShape best{log2_of(w.block_size), 0, 0, 0};
  double least = 0.0;
  for (int team = warps; team >= 2; team /= 2) {
    const int64_t rounds = ceil_div(items, warps / team * sms);
    const int64_t all_turns = ceil_div(units, int64_t{team});
    const int64_t most_turns = kept ? std::min<int64_t>(all_turns, kMmaTurns) : all_turns;
    for (int64_t turns = kept ? 1 : most_turns; turns <= most_turns; ++turns) {
      const int64_t chunks = ceil_div(all_turns, turns);
      const double time =
          static_cast<double>(rounds * chunks) * (static_cast<double>(turns) + kItem);
      if (best.turns != 0 && time >= least) continue;
      best.log2_team = log2_of(team);
      best.turns = static_cast<int>(turns);
      best.chunks = static_cast<int>(chunks);
      least = time;
    }
  }
  return best;
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
  const MmaShape shape = mma_shape(w, warps, kColTiles == 1);
  const int teams = warps >> shape.log2_team;
  const int64_t rounds = ceil_div(w.n, kMmaRows * teams);
  int64_t blocks = std::min<int64_t>(rounds, multiprocessors());
  int bytes = kMmaTableBytes + warps * kWarpBytes;
  if (shape.chunks > 1) {
    // Sums of all items of a block of threads stay there from chunk to chunk.
    constexpr int kMostTotals = 32 * 1024;
    const int round_bytes = teams * kMmaSums * kWarp * 4;
    const int most = std::min(kMostTotals, room - warps * kWarpBytes) / round_bytes;
    blocks = std::max(blocks, ceil_div(rounds, int64_t{most}));
    bytes += static_cast<int>(ceil_div(rounds, blocks)) * round_bytes;
  }
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(ceil_div(args.m, kColTiles * kMmaCols)));
  allow_shared(reinterpret_cast<const void*>(kernel), bytes);
  launch("gemm_4bit_mma_kernel", kernel, grid, warps * kWarp, bytes, stream, args, Levels4(w),
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
  if (args.m > kMmaCols) return launch_mma<T, kMmaManyCols, kNested>(args, stream);
  launch_mma<T, 1, kNested>(args, stream);
}

}  // namespace bnb::gpu
