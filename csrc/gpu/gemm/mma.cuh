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
// The warps of a block of threads form teams. A team makes an item, some rows of the weight: warp w
// of W takes the steps of 128 k number w, w + W, ..., and has asked for the next step's codes and
// scales before it multiplies this one's. In the end sums are added across the team, in order.
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
inline constexpr int kMmaBlocks = 2;  // of a step
inline constexpr int kMmaStep = kMmaBlock * kMmaBlocks;
inline constexpr int kMmaTileRows = 16;  // of the weight
inline constexpr int kMmaTileCols = 8;   // rows of activations

// What a lane holds of a step: codes and scales of two rows of each tile.
template <int kTiles, bool kNested>
struct MmaStep {
  uint2 codes[kTiles][2][kMmaBlocks];
  float scales[kTiles][2][kMmaBlocks];  // with kNested those of the scales' codes
  uint32_t scale_codes[kNested ? kTiles : 1][2][kMmaBlocks];
  bool there;
};

// Shared memory is lines of 256 bytes: the entry of the table of pairs for a byte of codes, and a
// line of sums. So the place of an entry is the byte in the second byte of a word, which one
// instruction puts there.
inline constexpr int kMmaLineWords = 64;
inline constexpr int kMmaLines = 256;
inline constexpr int kMmaSharedBytes = 4 * kMmaLines * kMmaLineWords;

// kPairs: the scales of a step's two blocks are neighbours, at an even place.
template <class T, int kTiles, int kColTiles, bool kNested, bool kPairs>
__global__ void __launch_bounds__(kMmaThreads, 1)
    gemm_4bit_mma_kernel(BNB_GRID_CONSTANT const Gemm4bit args,
                         BNB_GRID_CONSTANT const Levels4 levels, float multiple, int log2_block,
                         int team_warps) {
  constexpr int kItemRows = kTiles * kMmaTileRows;
  constexpr int kRows = 2 * kTiles;                // of a lane, 8 rows apart
  constexpr int kSums = kTiles * kColTiles * 4;    // of a lane
  constexpr int kSumLines = kMmaWarps * kSums;     // of an item of every team
  constexpr int kBuffers = kMmaLines / kSumLines;  // two: then one barrier an item is enough
  static_assert(kBuffers >= 1);
  using Step = MmaStep<kTiles, kNested>;
  BNB_DYNAMIC_SHARED(memory);
  __shared__ float scale_levels[kNested ? kCodeLevels : 1];
  uint32_t* const table = reinterpret_cast<uint32_t*>(memory);
  float* const shared_sums = reinterpret_cast<float*>(table + kMmaLineWords / 2);

  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  const int group = lane / 4;
  const int place = lane % 4;
  const int warp = thread / kWarp;
  const int teams = kMmaWarps / team_warps;
  const int team = warp / team_warps;
  const int of_team = warp % team_warps;

  const int64_t n = args.weight.n;
  const int64_t k = args.weight.k;
  const int64_t items = ceil_div(n, kItemRows);
  const int steps = static_cast<int>(ceil_div(k, kMmaStep));
  const int turns = static_cast<int>(ceil_div(steps, team_warps));  // of every warp in an item
  const int64_t stride = int64_t{gridDim.x} * teams;                // between items of a team
  const Scales& scales = args.weight.scales;
  const int log2_nested = kNested ? log2_of(scales.block_size) : 0;
  const int64_t first_col = int64_t{blockIdx.y} * (kColTiles * kMmaTileCols);

  // The last item begins earlier where it would end behind the weight.
  const auto first_row = [&](int64_t item) {
    const int64_t row = item * kItemRows;
    return row < n - kItemRows ? row : n - kItemRows;
  };

  // What this warp reads next: its step, and the first element of the lane's first row there.
  int64_t next_item = int64_t{blockIdx.x} * teams + team;
  int next_step = of_team;
  int64_t next_begin = (first_row(next_item) + group) * k + int64_t{of_team} * kMmaStep;
  const auto load = [&](Step& to) {
    to.there = next_item < items && next_step < steps;
    if (to.there) {
      const uint8_t* const codes = args.weight.codes + next_begin / 2 + place * 8;
      const bool whole = kPairs || next_step * int64_t{kMmaStep} + kMmaBlock < k;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int b = 0; b < kMmaBlocks; ++b) {
          // Behind the end of a row is nothing, or what a scale of zero takes out of the sum.
          const uint8_t* const at = codes + r * (4 * k) + b * (kMmaBlock / 2);
          to.codes[r / 2][r % 2][b] =
              b == 0 || whole ? load_once(reinterpret_cast<const uint2*>(at)) : uint2{0, 0};
        }
      }
      if constexpr (kPairs) {
        const int64_t block = next_begin / kMmaBlock;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int64_t at = block + r * (k / 8);
          if constexpr (kNested) {
            const uint32_t pair = *reinterpret_cast<const uint16_t*>(scales.codes + at);
            to.scale_codes[r / 2][r % 2][0] = pair & 0xffu;
            to.scale_codes[r / 2][r % 2][1] = pair >> 8;
            to.scales[r / 2][r % 2][0] = scales.absmax[at >> log2_nested];
          } else {
            const auto pair = *reinterpret_cast<const Pack<float, 2>*>(scales.absmax + at);
            to.scales[r / 2][r % 2][0] = pair.values[0];
            to.scales[r / 2][r % 2][1] = pair.values[1];
          }
        }
      } else {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int b = 0; b < kMmaBlocks; ++b) {
            const int64_t block =
                (next_begin + r * 8 * k + (whole ? b * kMmaBlock : 0)) >> log2_block;
            if constexpr (kNested) {
              to.scale_codes[r / 2][r % 2][b] = scales.codes[block];
              to.scales[r / 2][r % 2][b] = scales.absmax[block >> log2_nested];
            } else {
              to.scales[r / 2][r % 2][b] = scales.absmax[block];
            }
          }
        }
      }
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int b = 0; b < kMmaBlocks; ++b) {
          to.codes[r / 2][r % 2][b] = uint2{0, 0};
          to.scales[r / 2][r % 2][b] = 0.0f;
          if constexpr (kNested) to.scale_codes[r / 2][r % 2][b] = 0;
        }
      }
    }
    next_step += team_warps;
    next_begin += int64_t{team_warps} * kMmaStep;
    if (next_step >= turns * team_warps) {
      next_step = of_team;
      next_item += stride;
      next_begin = (first_row(next_item) + group) * k + int64_t{of_team} * kMmaStep;
    }
  };
  Step even;
  Step odd;
  load(even);

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
  __syncthreads();

  // The weights of byte `i` of a word of codes.
  const auto lookup = [&](uint32_t word, int i) {
    const uint32_t at = byte_permute(word, static_cast<uint32_t>(lane * 4),
                                     0x5504u | (static_cast<uint32_t>(i) << 4));
    return *reinterpret_cast<const uint32_t*>(memory + at);
  };

  // Where this lane's rows of activations begin. Of rows that are not there it reads another one:
  // they make columns of their own, which nobody stores.
  const T* a[kColTiles];
#pragma unroll
  for (int c = 0; c < kColTiles; ++c) {
    const int64_t col = first_col + c * kMmaTileCols + group;
    a[c] = static_cast<const T*>(args.a) + (col < args.m ? col : args.m - 1) * k + place * 16;
  }

  float sums[kTiles][kColTiles][4] = {};
  // Every warp of a block does so at any time, so that the compiler sees all lanes together: a step
  // that is not there has scales of zero.
  const auto multiply = [&](const Step& now, int step) {
    const int64_t first = step < steps ? int64_t{step} * kMmaStep : 0;
    const bool whole = kPairs || first + kMmaBlock < k;
#pragma unroll
    for (int b = 0; b < kMmaBlocks; ++b) {
      uint4 x[kColTiles][2];
#pragma unroll
      for (int c = 0; c < kColTiles; ++c) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const T* const at = a[c] + first + b * kMmaBlock + v * 8;
          x[c][v] = b == 0 || whole ? *reinterpret_cast<const uint4*>(at) : uint4{0, 0, 0, 0};
        }
      }
#pragma unroll
      for (int r = 0; r < kTiles; ++r) {
        float products[kColTiles][4] = {};
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          const uint2 upper = now.codes[r][0][b];
          const uint2 lower = now.codes[r][1][b];
          const uint32_t g0 = s < 2 ? upper.x : upper.y;
          const uint32_t g8 = s < 2 ? lower.x : lower.y;
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
        for (int half = 0; half < 2; ++half) {
          float scale = now.scales[r][half][kNested && kPairs ? 0 : b];
          if constexpr (kNested) {
            const float level = scale_levels[now.scale_codes[r][half][b]];
            scale = now.there ? __fadd_rn(__fmul_rn(level, scale), offset) : 0.0f;
          }
          if (b > 0 && !whole) scale = 0.0f;
#pragma unroll
          for (int c = 0; c < kColTiles; ++c) {
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
              sums[r][c][i] = __fmaf_rn(products[c][i], scale, sums[r][c][i]);
            }
          }
        }
      }
    }
  };

  const float inverse = __frcp_rn(multiple);
  int buffer = 0;
  // Adds the sums of a team's warps, in their order, and stores the results.
  const auto finish = [&](int64_t item) {
    const auto line_of = [&](int w, int i) {
      return shared_sums + ((buffer * kMmaWarps + w) * kSums + i) * kMmaLineWords + lane;
    };
    if (kBuffers == 1) __syncthreads();
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      float& sum = sums[i / (4 * kColTiles)][i / 4 % kColTiles][i % 4];
      *line_of(warp, i) = sum;
      sum = 0.0f;
    }
    __syncthreads();
    if (item < items) {
      for (int i = of_team; i < kSums; i += team_warps) {
        float sum = 0.0f;
        for (int w = 0; w < team_warps; ++w) {
          sum = __fadd_rn(sum, *line_of(team * team_warps + w, i));
        }
        const int64_t row =
            first_row(item) + i / (4 * kColTiles) * kMmaTileRows + i % 4 / 2 * 8 + group;
        const int64_t col = first_col + i / 4 % kColTiles * kMmaTileCols + place * 2 + i % 2;
        if (row >= item * kItemRows && col < args.m) {
          const float bias =
              args.bias != nullptr ? widen(static_cast<const T*>(args.bias)[row]) : 0.0f;
          static_cast<T*>(args.out)[col * n + row] = narrow<T>(__fmaf_rn(sum, inverse, bias));
        }
      }
    }
    buffer = (buffer + 1) % kBuffers;
  };

  int64_t first_item = int64_t{blockIdx.x} * teams;  // of the block of threads
  int turn = 0;
  // Makes a step that has been asked for; whether there is another.
  const auto advance = [&](const Step& now) {
    multiply(now, turn * team_warps + of_team);
    if (++turn < turns) return true;
    turn = 0;
    finish(first_item + team);
    first_item += stride;
    return first_item < items;
  };
  // Two buffers by name: copying one would wait for what it has asked for.
  while (true) {
    load(odd);
    if (!advance(even)) break;
    load(even);
    if (!advance(odd)) break;
  }
}

// Whether this kernel takes the arguments, on a device that has the instructions.
inline bool takes_mma(const Gemm4bit& args) {
  const Weight4bit& w = args.weight;
  const Scales& s = w.scales;
  return args.dtype != DType::kFloat32 && w.k % kMmaBlock == 0 && w.k > 0 &&
         w.block_size >= kMmaBlock && is_aligned(w.codes, 8) && is_aligned(args.a, 16) &&
         w.n >= 2 * kMmaTileRows && (!s.nested() || log2_of(s.block_size) >= 1);
}

template <class T, int kTiles, int kColTiles, bool kNested, bool kPairs>
void launch_mma(const Gemm4bit& args, int64_t cols, Stream stream) {
  const auto kernel = gemm_4bit_mma_kernel<T, kTiles, kColTiles, kNested, kPairs>;
  const int64_t steps = ceil_div(args.weight.k, kMmaStep);
  int team_warps = kMmaWarps;
  while (team_warps / 2 >= steps) team_warps /= 2;
  const int64_t rounds =
      ceil_div(args.weight.n, int64_t{kTiles} * kMmaTileRows * (kMmaWarps / team_warps));
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(rounds, multiprocessors())),
                  static_cast<unsigned>(cols));
  allow_shared(reinterpret_cast<const void*>(kernel), kMmaSharedBytes);
  launch("gemm_4bit_mma_kernel", kernel, grid, kMmaThreads, kMmaSharedBytes, stream, args,
         Levels4(args.weight), level_multiple<T>(args.weight.code), log2_of(args.weight.block_size),
         team_warps);
}

template <class T, int kTiles, int kColTiles, bool kNested>
void launch_mma(const Gemm4bit& args, Stream stream) {
  const Weight4bit& w = args.weight;
  const int64_t cols = ceil_div(args.m, kColTiles * kMmaTileCols);
  const bool aligned =
      w.scales.nested() ? is_aligned(w.scales.codes, 2) : is_aligned(w.scales.absmax, 8);
  if (w.block_size == kMmaBlock && w.k % kMmaStep == 0 && aligned) {
    return launch_mma<T, kTiles, kColTiles, kNested, true>(args, cols, stream);
  }
  launch_mma<T, kTiles, kColTiles, kNested, false>(args, cols, stream);
}

template <class T, bool kNested>
void mma_gemm_4bit(const Gemm4bit& args, Stream stream) {
  if (args.m > kMmaTileCols) return launch_mma<T, 1, 4, kNested>(args, stream);
  // Items of one or two tiles: the height at which the busiest multiprocessor has least to do, and
  // the greater of two that are as good, because it reads activations less often.
  const int64_t rows = args.weight.n;
  const int64_t sms = multiprocessors();
  const int64_t low = ceil_div(ceil_div(rows, kMmaTileRows), sms);
  const int64_t high = ceil_div(ceil_div(rows, 2 * kMmaTileRows), sms) * 2;
  if (high <= low) return launch_mma<T, 2, 1, kNested>(args, stream);
  launch_mma<T, 1, 1, kNested>(args, stream);
}

}  // namespace bnb::gpu
