// What multiplies in the product with a 4-bit weight for few rows of activations: tensor cores, fed
// from registers. For mma.cuh.
// SPDX-License-Identifier: MIT
//
// out^T = w a^T: the rows of the weight are those of the tensor core's tiles, so that few rows of
// activations waste little. The codes are decoded into the registers from which they are
// multiplied.
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
// each warp takes one or two units, 256 k. They are the same k in every item, so the activations
// stay in registers as the lanes need them. Where the warps' units are not all of k, the team makes
// all its items for this chunk of k, then for the next. Sums of items are added across the team, in
// order.
#pragma once

#include <algorithm>

#include "bitsandbytes/blocks.h"
#include "gpu/gemm/levels.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {

inline constexpr int kMmaBlock = 64;  // k that share a scale
inline constexpr int kMmaBlocks = 4;  // of a unit
inline constexpr int kMmaUnit = kMmaBlock * kMmaBlocks;
inline constexpr int kMmaRows = 16;  // of the weight, in a unit
inline constexpr int kMmaCols = 8;   // rows of activations in a tile

inline constexpr int kMmaRowBytes = kMmaUnit / 2;  // of codes
inline constexpr int kMmaBlockBytes = kMmaBlock / 2;
inline constexpr int kMmaCodeBytes = kMmaRows * kMmaRowBytes;
inline constexpr int kMmaScaleBytes = kMmaRows * kMmaBlocks * 4;  // float [16][4]

// Shared memory begins with lines of 256 bytes: the entry of the table of pairs for a byte of
// codes, and a line of sums. So the place of an entry is the byte in the second byte of a word,
// which one instruction puts there.
inline constexpr int kMmaLineBytes = 256;
inline constexpr int kMmaLines = 256;
inline constexpr int kMmaTableBytes = kMmaLines * kMmaLineBytes;
inline constexpr int kMmaEntryBytes = 4 * kWarp;

// Sums of a lane in a tile take a line each.
inline constexpr int kMmaSums = 4;

struct MmaShape {
  int log2_block;  // elements of a quantization block
  int log2_team;   // warps that share an item
  int turns;       // units of a warp in an item
  int chunks;      // of k, each made for all items before the next
};

// How the `warps` of a block share the work, of which one takes up to `most_turns` units of a
// chunk: as takes the least time, counted in units of a warp. Fewer that share an item add up their
// sums less often, more share the rows more evenly among multiprocessors.
inline MmaShape mma_shape(const Weight4bit& w, int warps, int most_turns) {
  constexpr double kItem = 0.3;  // to add up the sums of an item
  const int64_t items = ceil_div(w.n, kMmaRows);
  const int64_t units = ceil_div(w.k, kMmaUnit);
  const int64_t sms = multiprocessors();
  MmaShape best{log2_of(w.block_size), 0, 0, 0};
  double least = 0.0;
  for (int team = warps; team >= 2; team /= 2) {
    const int64_t rounds = ceil_div(items, warps / team * sms);
    const int64_t all_turns = ceil_div(units, int64_t{team});
    for (int64_t turns = 1; turns <= std::min<int64_t>(all_turns, most_turns); ++turns) {
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

// Two weights in a word, the first in the lower half, for every byte of codes; a copy for every
// lane, whose words lie in a bank of their own, so that lookups never conflict. Called by `threads`
// threads.
template <class T>
__device__ __forceinline__ void fill_mma_table(char* memory, const Levels4& levels, float multiple,
                                               int thread, int threads) {
  constexpr int kWide = kMmaEntryBytes / 16;
  for (int i = thread; i < kMmaLines * kWide; i += threads) {
    const uint32_t pair = pair_of_levels<T>(levels, i / kWide, multiple);
    *reinterpret_cast<uint4*>(memory + i / kWide * kMmaLineBytes + i % kWide * 16) =
        uint4{pair, pair, pair, pair};
  }
}

// A warp's activations and sums: kColTiles tiles of them, of kTurns units.
template <class T, int kColTiles, int kTurns>
class MmaMultiplier {
 public:
  static constexpr int kLines = kColTiles * kMmaSums;  // of a warp's sums
  static constexpr int kWarpBytes = kLines * kMmaLineBytes;

  // `memory`: shared memory from its table on. `first_col`: of the tiles, a row of activations.
  __device__ __forceinline__ MmaMultiplier(const Gemm4bit& args, char* memory, int lane,
                                           int64_t first_col)
      : k_(static_cast<int>(args.weight.k)),
        memory_(memory),
        own_copy_(hide_origin(static_cast<uint32_t>(lane * 4))) {
#pragma unroll
    for (int c = 0; c < kColTiles; ++c) {
      const int64_t col = first_col + c * kMmaCols + lane / 4;
      a_[c] =
          col < args.m ? static_cast<const char*>(args.a) + col * k_ * 2 + lane % 4 * 32 : nullptr;
    }
  }

  // Reads the activations of `turns` units; zeros where k or the rows end.
  __device__ __forceinline__ void keep(int first_unit, int turns) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
#pragma unroll
      for (int b = 0; b < kMmaBlocks; ++b) {
        const int at = (first_unit + turn) * kMmaUnit + b * kMmaBlock;
#pragma unroll
        for (int c = 0; c < kColTiles; ++c) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            kept_[turn][b][c][half] =
                a_[c] != nullptr && turn < turns && at < k_
                    ? *reinterpret_cast<const uint4*>(a_[c] + int64_t{at} * 2 + half * 16)
                    : uint4{0, 0, 0, 0};
          }
        }
      }
    }
  }

  // Multiplies a unit. `codes`: where in shared memory the lane has its 8 bytes of the first block
  // and the first of its rows; those of block b lie at codes ^ 32 b, those of the other row eight
  // rows on. `scales`: where it has the four scales of the first row, and eight rows on the others.
  __device__ __forceinline__ void multiply(uint32_t codes, uint32_t scales, int turn) {
    using Quad = Pack<float, kMmaBlocks>;
    const auto* const quads = reinterpret_cast<const Quad*>(memory_ + scales);
    const Quad scale[2] = {quads[0], quads[8]};
#pragma unroll
    for (int b = 0; b < kMmaBlocks; ++b) {
      const char* const at = memory_ + (codes ^ (b * kMmaBlockBytes));
      const uint2 words[2] = {*reinterpret_cast<const uint2*>(at),
                              *reinterpret_cast<const uint2*>(at + 8 * kMmaRowBytes)};
      float products[kColTiles][kMmaSums] = {};
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const uint32_t g0 = s < 2 ? words[0].x : words[0].y;
        const uint32_t g8 = s < 2 ? words[1].x : words[1].y;
        const int byte = s % 2 * 2;
        const uint32_t w[4] = {look_up(g0, byte), look_up(g8, byte), look_up(g0, byte + 1),
                               look_up(g8, byte + 1)};
#pragma unroll
        for (int c = 0; c < kColTiles; ++c) {
          const uint4 x = kept_[turn][b][c][s / 2];
          multiply_add_16x8x16<T>(products[c], w, s % 2 == 0 ? x.x : x.z, s % 2 == 0 ? x.y : x.w);
        }
      }
#pragma unroll
      for (int c = 0; c < kColTiles; ++c) {
#pragma unroll
        for (int i = 0; i < kMmaSums; ++i) {
          sums_[c][i] = __fmaf_rn(products[c][i], scale[i / 2].values[b], sums_[c][i]);
        }
      }
    }
  }

  // Leaves the sums to those who add them up: in lines of which the lane's words begin at `lines`.
  __device__ __forceinline__ void leave(char* lines) {
#pragma unroll
    for (int c = 0; c < kColTiles; ++c) {
#pragma unroll
      for (int i = 0; i < kMmaSums; ++i) {
        *reinterpret_cast<float*>(lines + (c * kMmaSums + i) * kMmaLineBytes) = sums_[c][i];
        sums_[c][i] = 0.0f;
      }
    }
  }

 private:
  // The weights of byte `i` of a word of codes.
  __device__ __forceinline__ uint32_t look_up(uint32_t word, int i) const {
    const uint32_t at = byte_permute(word, own_copy_, 0x5504u | (static_cast<uint32_t>(i) << 4));
    return *reinterpret_cast<const uint32_t*>(memory_ + at);
  }

  const int k_;
  char* const memory_;
  const uint32_t own_copy_;
  const char* a_[kColTiles];  // where this lane's rows of activations begin; null where none is
  uint4 kept_[kTurns][kMmaBlocks][kColTiles][2];
  float sums_[kColTiles][kMmaSums] = {};
};

}  // namespace bnb::gpu
