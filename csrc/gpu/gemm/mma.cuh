// The product with a 4-bit weight for few rows of activations, on tensor cores.
// SPDX-License-Identifier: MIT
//
// out^T = w a^T: the rows of the weight are those of the tensor core's tiles, so that few rows of
// activations waste little. The codes are read once, straight into the registers from which they
// are multiplied; nothing is unpacked in memory. What bounds the kernel is reading them.
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
// A unit is 4 blocks of 16 rows: 128 bytes of each. Rows often lie a multiple of 128 bytes apart,
// and 8 of them read at once would meet in the same banks of the first-level cache: so row g reads
// its blocks in the order 0 ^ g, 1 ^ g, 2 ^ g, 3 ^ g (of g its last two bits), and puts them in
// order when they are there.
//
// The warps of a block of threads form teams. A team makes an item, 16 rows of the weight: warp w
// of W takes units w, w + W, ..., and has asked for the next two when it multiplies one. These are
// the same k in every item, so its activations stay in shared memory as its lanes need them. In the
// end sums are added across the team, in order.
#pragma once

#include <algorithm>

#include "bitsandbytes/blocks.h"
#include "gpu/device/scales.cuh"
#include "gpu/gemm/levels.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {

inline constexpr int kMmaWarps = 16;
inline constexpr int kMmaThreads = kMmaWarps * kWarp;
inline constexpr int kMmaBlock = 64;  // k that share a scale
inline constexpr int kMmaBlocks = 4;  // of a unit
inline constexpr int kMmaUnit = kMmaBlock * kMmaBlocks;
inline constexpr int kMmaRows = 16;  // of the weight, in an item
inline constexpr int kMmaCols = 8;   // rows of activations in a tile

// What a lane holds of a unit: codes and scales of its two rows.
template <bool kNested>
struct MmaUnit {
  uint2 codes[2][kMmaBlocks];
  float scales[2][kMmaBlocks];  // with kNested those of the scales' codes
  uint32_t scale_codes[2];      // with kNested: of each block a byte
  bool there;
};

// Shared memory begins with lines of 256 bytes: the entry of the table of pairs for a byte of
// codes, and a line of sums. So the place of an entry is the byte in the second byte of a word,
// which one instruction puts there.
inline constexpr int kMmaLineWords = 64;
inline constexpr int kMmaLines = 256;
inline constexpr int kMmaTableBytes = 4 * kMmaLines * kMmaLineWords;

// Rows of activations in shared memory lie so far apart that reading 8 of them at once, 64 bytes of
// each, is spread over all banks.
inline constexpr int kMmaPadding = 16;  // bytes

struct MmaShape {
  int log2_block;
  int team_warps;
  int turns;  // units of a warp in an item
};

// kQuads: the scales of a unit's blocks are neighbours, at a multiple of four.
// kStaged: there is room for the activations in shared memory.
template <class T, int kColTiles, bool kNested, bool kQuads, bool kStaged>
__global__ void __launch_bounds__(kMmaThreads, 1)
    gemm_4bit_mma_kernel(BNB_GRID_CONSTANT const Gemm4bit args,
                         BNB_GRID_CONSTANT const Levels4 levels, float multiple, MmaShape shape) {
  constexpr int kSums = kColTiles * 4;             // of a lane
  constexpr int kSumLines = kMmaWarps * kSums;     // of an item of every team
  constexpr int kBuffers = kMmaLines / kSumLines;  // two or more: one barrier an item is enough
  static_assert(kBuffers >= 1);
  using Unit = MmaUnit<kNested>;
  BNB_DYNAMIC_SHARED(memory);
  __shared__ float scale_levels[kNested ? kCodeLevels : 1];
  uint32_t* const table = reinterpret_cast<uint32_t*>(memory);
  float* const shared_sums = reinterpret_cast<float*>(table + kMmaLineWords / 2);

  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  const int group = lane / 4;
  const int place = lane % 4;
  const int warp = thread / kWarp;
  const int team_warps = shape.team_warps;
  const int teams = kMmaWarps / team_warps;
  const int team = warp / team_warps;
  const int of_team = warp % team_warps;

  const int64_t n = args.weight.n;
  const int64_t k = args.weight.k;
  const int items = static_cast<int>(ceil_div(n, kMmaRows));
  const int units = static_cast<int>(ceil_div(k, kMmaUnit));
  const int stride = static_cast<int>(gridDim.x) * teams;  // between items of a team
  const Scales& scales = args.weight.scales;
  const int log2_nested = kNested ? log2_of(scales.block_size) : 0;
  const int64_t first_col = int64_t{blockIdx.y} * (kColTiles * kMmaCols);

  // The last item begins earlier where it would end behind the weight.
  const auto first_row = [&](int item) {
    const int64_t row = int64_t{item} * kMmaRows;
    return row < n - kMmaRows ? row : n - kMmaRows;
  };

  // What this warp reads next: its unit, and the first element of the lane's first row there.
  int next_item = static_cast<int>(blockIdx.x) * teams + team;
  int next_unit = of_team;
  int64_t next_begin = (first_row(next_item) + group) * k + of_team * kMmaUnit;
  const int own_block = group % kMmaBlocks;
  const int own_byte = place * 8 + own_block * (kMmaBlock / 2);
  const int to_first = ((own_block ^ 1) - own_block) * (kMmaBlock / 2);
  const int to_second = ((own_block ^ 2) - own_block) * (kMmaBlock / 2);
  const auto load = [&](Unit& to) {
    to.there = next_item < items && next_unit < units;
    if (to.there) {
      const int64_t left = k - next_unit * int64_t{kMmaUnit};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint8_t* const low = args.weight.codes + (next_begin / 2 + own_byte) + r * (4 * k);
        const uint8_t* const high = low + to_second;
        const uint8_t* const from[kMmaBlocks] = {low, low + to_first, high, high + to_first};
#pragma unroll
        for (int b = 0; b < kMmaBlocks; ++b) {
          // Behind the end of a row is nothing, or what a scale of zero takes out of the sum.
          const bool inside = kQuads || (b ^ own_block) * kMmaBlock < left;
          to.codes[r][b] =
              inside ? load_once(reinterpret_cast<const uint2*>(from[b])) : uint2{0, 0};
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if constexpr (kQuads) {
          const int64_t at = next_begin / kMmaBlock + r * (k / (kMmaBlock / 8));
          if constexpr (kNested) {
            to.scale_codes[r] = *reinterpret_cast<const uint32_t*>(scales.codes + at);
            to.scales[r][0] = scales.absmax[at >> log2_nested];
          } else {
            const auto quad = *reinterpret_cast<const Pack<float, kMmaBlocks>*>(scales.absmax + at);
#pragma unroll
            for (int b = 0; b < kMmaBlocks; ++b) to.scales[r][b] = quad.values[b];
          }
        } else {
          const int64_t begin = next_begin + r * 8 * k;
          if constexpr (kNested) to.scale_codes[r] = 0;
#pragma unroll
          for (int b = 0; b < kMmaBlocks; ++b) {
            to.scales[r][b] = 0.0f;
            if (b * kMmaBlock >= left) continue;
            const int64_t at = (begin + b * kMmaBlock) >> shape.log2_block;
            if constexpr (kNested) {
              to.scale_codes[r] |= uint32_t{scales.codes[at]} << (8 * b);
              to.scales[r][b] = scales.absmax[at >> log2_nested];
            } else {
              to.scales[r][b] = scales.absmax[at];
            }
          }
        }
      }
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        to.scale_codes[r] = 0;
#pragma unroll
        for (int b = 0; b < kMmaBlocks; ++b) {
          to.codes[r][b] = uint2{0, 0};
          to.scales[r][b] = 0.0f;
        }
      }
    }
    next_unit += team_warps;
    next_begin += team_warps * kMmaUnit;
    if (next_unit >= shape.turns * team_warps) {
      next_item += stride;
      next_unit = of_team;
      next_begin = (first_row(next_item) + group) * k + of_team * kMmaUnit;
    }
  };
  // The same with its blocks in order. Whoever takes it waits for it: only then is there room to
  // ask for another.
  const auto take = [&](const Unit& from) {
    Unit to = from;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Bit by bit of the row's number.
      uint2 half[kMmaBlocks];
#pragma unroll
      for (int b = 0; b < kMmaBlocks; ++b) {
        half[b] = (group & 1) != 0 ? from.codes[r][b ^ 1] : from.codes[r][b];
      }
#pragma unroll
      for (int b = 0; b < kMmaBlocks; ++b) {
        to.codes[r][b] = (group & 2) != 0 ? half[b ^ 2] : half[b];
      }
    }
    return to;
  };
  Unit asked;
  load(asked);

  const int64_t row_bytes = k * 2 + kMmaPadding;  // of activations in shared memory
  if constexpr (kStaged) {
    const int64_t cols =
        args.m - first_col < kColTiles * kMmaCols ? args.m - first_col : kColTiles * kMmaCols;
    const char* const from = static_cast<const char*>(args.a) + first_col * k * 2;
    char* const to = memory + kMmaTableBytes;
    for (int64_t col = 0; col < cols; ++col) {
      for (int64_t i = thread * 16; i < k * 2; i += kMmaThreads * 16) {
        start_copy<16>(to + col * row_bytes + i, from + col * k * 2 + i);
      }
    }
    close_copy_group();
  }

  // Two weights in a word, the first in the lower half, for every byte of codes; a copy for every
  // lane, whose words lie in a bank of their own, so that lookups never conflict.
  for (int i = thread; i < kMmaLines * kWarp; i += kMmaThreads) {
    table[i / kWarp * kMmaLineWords + i % kWarp] = pair_of_levels<T>(levels, i / kWarp, multiple);
  }
  float offset = 0.0f;
  if constexpr (kNested) {
    if (thread < kCodeLevels) scale_levels[thread] = scales.code[thread];
    offset = *scales.offset;
  }
  if constexpr (kStaged) wait_copies<0>();
  __syncthreads();

  // The weights of byte `i` of a word of codes.
  const auto lookup = [&](uint32_t word, int i) {
    const uint32_t at = byte_permute(word, static_cast<uint32_t>(lane * 4),
                                     0x5504u | (static_cast<uint32_t>(i) << 4));
    return *reinterpret_cast<const uint32_t*>(memory + at);
  };

  // Where this lane's rows of activations begin. Of rows that are not there it reads another one:
  // they make columns of their own, which nobody stores.
  const char* a[kColTiles];
#pragma unroll
  for (int c = 0; c < kColTiles; ++c) {
    const int64_t own = first_col + c * kMmaCols + group;
    const int64_t col = own < args.m ? own : args.m - 1;
    a[c] = kStaged ? memory + kMmaTableBytes + (col - first_col) * row_bytes + place * 32
                   : static_cast<const char*>(args.a) + col * k * 2 + place * 32;
  }

  float sums[kColTiles][4] = {};
  // A warp without a unit does so too, with scales of zero: then the compiler knows that all lanes
  // come here together, and addresses the table with one register for all of them.
  const auto multiply = [&](const Unit& now, int unit) {
    const int first = unit < units ? unit * kMmaUnit : 0;
    const int64_t left = k - first;
#pragma unroll
    for (int b = 0; b < kMmaBlocks; ++b) {
      const bool inside = kQuads || b * kMmaBlock < left;
      uint4 x[kColTiles][2];
#pragma unroll
      for (int c = 0; c < kColTiles; ++c) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const char* const at = a[c] + (first + b * kMmaBlock) * 2 + v * 16;
          x[c][v] = inside ? *reinterpret_cast<const uint4*>(at) : uint4{0, 0, 0, 0};
        }
      }
      float products[kColTiles][4] = {};
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const uint32_t g0 = s < 2 ? now.codes[0][b].x : now.codes[0][b].y;
        const uint32_t g8 = s < 2 ? now.codes[1][b].x : now.codes[1][b].y;
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
      for (int r = 0; r < 2; ++r) {
        float scale = now.scales[r][kNested && kQuads ? 0 : b];
        if constexpr (kNested) {
          const float level = scale_levels[(now.scale_codes[r] >> (8 * b)) & 0xffu];
          const bool counts = now.there && inside;
          scale = counts ? __fadd_rn(__fmul_rn(level, scale), offset) : 0.0f;
        }
#pragma unroll
        for (int c = 0; c < kColTiles; ++c) {
#pragma unroll
          for (int i = 2 * r; i < 2 * r + 2; ++i) {
            sums[c][i] = __fmaf_rn(products[c][i], scale, sums[c][i]);
          }
        }
      }
    }
  };

  const float inverse = __frcp_rn(multiple);
  int buffer = 0;
  // Adds the sums of a team's warps, in their order, and stores the results.
  const auto finish = [&](int item) {
    const auto line_of = [&](int w, int i) {
      return shared_sums + ((buffer * kMmaWarps + w) * kSums + i) * kMmaLineWords + lane;
    };
    if (kBuffers == 1) sync_threads_of(team, team_warps * kWarp);
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      *line_of(warp, i) = sums[i / 4][i % 4];
      sums[i / 4][i % 4] = 0.0f;
    }
    sync_threads_of(team, team_warps * kWarp);
    if (item < items) {
      for (int i = of_team; i < kSums; i += team_warps) {
        float sum = 0.0f;
        for (int w = 0; w < team_warps; ++w) {
          sum = __fadd_rn(sum, *line_of(team * team_warps + w, i));
        }
        const int64_t row = first_row(item) + i % 4 / 2 * 8 + group;
        const int64_t col = first_col + i / 4 * kMmaCols + place * 2 + i % 2;
        if (row >= int64_t{item} * kMmaRows && col < args.m) {
          const float bias =
              args.bias != nullptr ? widen(static_cast<const T*>(args.bias)[row]) : 0.0f;
          static_cast<T*>(args.out)[col * n + row] = narrow<T>(__fmaf_rn(sum, inverse, bias));
        }
      }
    }
    buffer = (buffer + 1) % kBuffers;
  };

  int first_item = static_cast<int>(blockIdx.x) * teams;  // of the block of threads
  int turn = 0;
  // Makes a unit that has been asked for; whether there is another.
  const auto advance = [&](const Unit& now) {
    multiply(now, turn * team_warps + of_team);
    if (++turn < shape.turns) return true;
    turn = 0;
    finish(first_item + team);
    first_item += stride;
    return first_item < items;
  };
  while (true) {
    const Unit now = take(asked);
    load(asked);
    if (!advance(now)) break;
  }
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
         w.block_size >= kMmaBlock && is_aligned(w.codes, 8) && is_aligned(args.a, 16) &&
         (!s.nested() || log2_of(s.block_size) >= 0);
}

// Warps that share an item: the number that takes the least time, counted in units of a warp. Fewer
// add up their sums less often, more share the rows more evenly among multiprocessors.
inline int mma_team(int64_t n, int64_t units) {
  constexpr double kItem = 0.5;  // to add up the sums of an item
  const int64_t items = ceil_div(n, kMmaRows);
  const int64_t sms = multiprocessors();
  int best = kMmaWarps;
  double least = 0.0;
  for (int warps = kMmaWarps; warps >= 2; warps /= 2) {
    const int64_t rounds = ceil_div(items, kMmaWarps / warps * sms);
    const double time = static_cast<double>(rounds) *
                        (static_cast<double>(ceil_div(units, int64_t{warps})) + kItem);
    if (warps == kMmaWarps || time < least) {
      best = warps;
      least = time;
    }
  }
  return best;
}

template <int kColTiles>
int64_t mma_staged_bytes(const Gemm4bit& args) {
  return std::min<int64_t>(args.m, kColTiles * kMmaCols) * (args.weight.k * 2 + kMmaPadding);
}

template <class T, int kColTiles, bool kNested, bool kQuads, bool kStaged>
void launch_mma(const Gemm4bit& args, Stream stream) {
  const auto kernel = gemm_4bit_mma_kernel<T, kColTiles, kNested, kQuads, kStaged>;
  const Weight4bit& w = args.weight;
  const int64_t units = ceil_div(w.k, kMmaUnit);
  MmaShape shape{log2_of(w.block_size), mma_team(w.n, units), 0};
  shape.turns = static_cast<int>(ceil_div(units, shape.team_warps));
  const int64_t rounds = ceil_div(w.n, kMmaRows * (kMmaWarps / shape.team_warps));
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(rounds, multiprocessors())),
                  static_cast<unsigned>(ceil_div(args.m, kColTiles * kMmaCols)));
  const int bytes =
      kMmaTableBytes + static_cast<int>(kStaged ? mma_staged_bytes<kColTiles>(args) : 0);
  allow_shared(reinterpret_cast<const void*>(kernel), bytes);
  launch("gemm_4bit_mma_kernel", kernel, grid, kMmaThreads, bytes, stream, args, Levels4(w),
         level_multiple<T>(w.code), shape);
}

template <class T, int kColTiles, bool kNested, bool kQuads>
void launch_mma(const Gemm4bit& args, Stream stream) {
  constexpr int kStatic = kNested ? 4 * kCodeLevels : 0;
  const int64_t room = most_shared_bytes() - kStatic - kMmaTableBytes;
  // More rows would rarely find it.
  if constexpr (kColTiles == 1) {
    if (mma_staged_bytes<kColTiles>(args) <= room) {
      return launch_mma<T, kColTiles, kNested, kQuads, true>(args, stream);
    }
  }
  launch_mma<T, kColTiles, kNested, kQuads, false>(args, stream);
}

template <class T, int kColTiles, bool kNested>
void launch_mma(const Gemm4bit& args, Stream stream) {
  const Weight4bit& w = args.weight;
  const Scales& s = w.scales;
  const bool aligned = s.nested() ? is_aligned(s.codes, kMmaBlocks) && s.block_size >= kMmaBlocks
                                  : is_aligned(s.absmax, 4 * kMmaBlocks);
  w.block_size == kMmaBlock&& w.k % kMmaUnit == 0 && aligned
      ? launch_mma<T, kColTiles, kNested, true>(args, stream)
      : launch_mma<T, kColTiles, kNested, false>(args, stream);
}

template <class T, bool kNested>
void mma_gemm_4bit(const Gemm4bit& args, Stream stream) {
  if (args.m > kMmaCols) return launch_mma<T, kMmaManyCols, kNested>(args, stream);
  launch_mma<T, 1, kNested>(args, stream);
}

}  // namespace bnb::gpu
