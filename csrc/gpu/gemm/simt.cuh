// Products with a 4-bit weight without tensor cores: any shape, dtype and block size, on any GPU.
// SPDX-License-Identifier: MIT
//
// Weights are level * scale in float.
#pragma once

#include <algorithm>

#include "bitsandbytes/blocks.h"
#include "gpu/device/dtype.cuh"
#include "gpu/device/scales.cuh"
#include "gpu/device/vector_io.cuh"
#include "gpu/gemm/levels.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {

// Elements that a thread reads at a time: a word of codes.
inline constexpr int kSimtSpan = 8;

// `aligned`: p lies on 16 bytes, the same for the whole block of threads. Zeros from `valid` on.
template <class T>
__device__ __forceinline__ void read_span(const T* p, int64_t valid, bool aligned,
                                          float (&x)[kSimtSpan]) {
  constexpr int kPack = kPackSize<T>;
#pragma unroll
  for (int i = 0; i < kSimtSpan; i += kPack) {
    const Pack<T, kPack> pack = load_pack<T, kPack>(p + i, valid - i, aligned);
#pragma unroll
    for (int j = 0; j < kPack; ++j) x[i + j] = widen(pack.values[j]);
  }
}

// The weight as floats.
template <bool kNested>
struct SimtWeight {
  const uint8_t* codes;
  const float* levels;  // [16] in shared memory: as many banks, so lookups do not conflict
  const ScaleReader<kNested>& scale_of;
  int log2_block;

  // Elements from `first` of the flattened matrix on, zeros from `valid` on. `aligned`: their codes
  // are a word.
  __device__ __forceinline__ void read(int64_t first, int64_t valid, bool aligned,
                                       float (&w)[kSimtSpan]) const {
    if (aligned && valid >= kSimtSpan) {
      const uint32_t word = *reinterpret_cast<const uint32_t*>(codes + first / 2);
      const float scale = scale_of(first >> log2_block);
#pragma unroll
      for (int i = 0; i < kSimtSpan; ++i) {
        w[i] = __fmul_rn(levels[(word >> (4 * (i ^ 1))) & 15u], scale);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSimtSpan; ++i) {
        w[i] = 0.0f;
        if (i < valid) {
          const uint32_t byte = codes[(first + i) / 2];
          const uint32_t code = (first + i) % 2 == 0 ? byte >> 4 : byte & 15u;
          w[i] = __fmul_rn(levels[code], scale_of((first + i) >> log2_block));
        }
      }
    }
  }
};

// ---- Few rows
// ------------------------------------------------------------------------------------

inline constexpr int kSimtWarps = 4;

// out[i, col] = sum over k of a[i, k] w[col, k] + bias[col], for rows i from `row` on: a warp, with
// lanes along k.
template <class T, int kRows, bool kNested>
__device__ __forceinline__ void multiply_rows(const Gemm4bit& args,
                                              const SimtWeight<kNested>& weight, int64_t row,
                                              int64_t col, bool aligned) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t k = args.weight.k;
  const int64_t n = args.weight.n;
  const T* const a = static_cast<const T*>(args.a);
  const int64_t begin = args.weight.begin_of(col);
  float sums[kRows] = {};
#pragma unroll 4
  for (int64_t i = lane * kSimtSpan; i < k; i += kWarp * kSimtSpan) {
    float w[kSimtSpan];
    weight.read(begin + i, k - i, aligned, w);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r < args.m) {
        float x[kSimtSpan];
        read_span(a + (row + r) * k + i, k - i, aligned, x);
#pragma unroll
        for (int j = 0; j < kSimtSpan; ++j) sums[r] = __fmaf_rn(x[j], w[j], sums[r]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    for (int other = kWarp / 2; other > 0; other /= 2) {
      sums[r] = __fadd_rn(sums[r], shuffle_xor(sums[r], other));
    }
    if (lane == 0 && row + r < args.m) {
      const float bias = args.bias != nullptr ? widen(static_cast<const T*>(args.bias)[col]) : 0.0f;
      static_cast<T*>(args.out)[(row + r) * n + col] = narrow<T>(__fadd_rn(sums[r], bias));
    }
  }
}

// A warp per row of w and kRows rows of a.
template <class T, int kRows, bool kNested>
__global__ void __launch_bounds__(kSimtWarps* kWarp)
    gemm_4bit_rows_kernel(BNB_GRID_CONSTANT const Gemm4bit args,
                          BNB_GRID_CONSTANT const Levels4 levels, int log2_block, bool aligned) {
  __shared__ float shared_levels[kCode4Levels];
  __shared__ float shared_code[kNested ? kCodeLevels : 1];
  const ScaleReader<kNested> scale_of(args.weight.scales, shared_code);
  if (threadIdx.x < kCode4Levels) shared_levels[threadIdx.x] = levels[threadIdx.x];
  __syncthreads();

  const SimtWeight<kNested> weight{args.weight.codes, shared_levels, scale_of, log2_block};
  const int64_t col = int64_t{blockIdx.x} * kSimtWarps + threadIdx.x / kWarp;
  if (col >= args.weight.n) return;
  for (int64_t row = int64_t{blockIdx.y} * kRows; row < args.m; row += int64_t{gridDim.y} * kRows) {
    multiply_rows<T, kRows>(args, weight, row, col, aligned);
  }
}

// ---- Many rows
// -----------------------------------------------------------------------------------

// Of the tiles below: rows of a, columns of the result, and terms of their sums that are in shared
// memory at a time.
inline constexpr int kSimtTileRows = 64;
inline constexpr int kSimtTileCols = 128;
inline constexpr int kSimtTileTerms = 32;
inline constexpr int kSimtThreads = 256;

// A product whose sums run along the weight's k (forward) or n (backward).
struct SimtProduct {
  const void* a;     // [m, terms]
  const void* bias;  // [cols] or null
  void* out;         // [m, cols]
  Weight4bit weight;
  int64_t m;
  int64_t cols;
  int64_t terms;
};

BNB_HD SimtProduct simt_product(const Gemm4bit& args) {
  const Weight4bit& w = args.weight;
  return {args.a, args.bias, args.out, w, args.m, w.n, w.k};
}
BNB_HD SimtProduct simt_product(const Gemm4bitDgrad& args) {
  const Weight4bit& w = args.weight;
  return {args.grad, nullptr, args.out, w, args.m, w.k, w.n};
}

// Operands of a tile in shared memory.
struct SimtTile {
  float a[kSimtTileTerms][kSimtTileRows];
  float w[kSimtTileTerms][kSimtTileCols];
};

// out = a w^T + bias, or a w with kBackward: a tile of 64 x 128 by a block of threads, of which
// each makes 4 x 8: columns 4 x to 4 x + 3 and the same 64 columns further, so that reads of
// neighbouring threads do not conflict.
template <class T, bool kBackward, bool kNested>
__device__ __forceinline__ void multiply_tile(const SimtProduct& args,
                                              const SimtWeight<kNested>& weight, int64_t first_row,
                                              int64_t first_col, bool aligned_weight,
                                              bool aligned_a, SimtTile& tile) {
  constexpr int kRows = 4;
  constexpr int kHalf = 4;
  const int thread = static_cast<int>(threadIdx.x);
  const int x = thread % 16;
  const int y = thread / 16;
  const int64_t k = args.weight.k;
  const T* const a = static_cast<const T*>(args.a);

  const auto stage_a = [&](int64_t first) {
    const int row = thread % kSimtTileRows;
    const int term = thread / kSimtTileRows * kSimtSpan;
    float span[kSimtSpan];
    const bool there = first_row + row < args.m;
    read_span(a + (first_row + row) * args.terms + first + term,
              there ? args.terms - first - term : 0, aligned_a, span);
#pragma unroll
    for (int i = 0; i < kSimtSpan; ++i) tile.a[term + i][row] = span[i];
  };
  // Neighbouring threads have neighbouring columns, and what each reads are neighbouring k.
  const auto stage_w = [&](int64_t first) {
    constexpr int kSpans = kSimtTileTerms * kSimtTileCols / kSimtThreads / kSimtSpan;
#pragma unroll
    for (int s = 0; s < kSpans; ++s) {
      float span[kSimtSpan];
      if constexpr (kBackward) {
        const int term = thread / 8;
        const int col = thread % 8 * kSimtSpan + s * 8 * kSimtSpan;
        const bool there = first + term < args.terms;
        weight.read(args.weight.begin_of(first + term) + first_col + col,
                    there ? k - first_col - col : 0, aligned_weight, span);
#pragma unroll
        for (int i = 0; i < kSimtSpan; ++i) tile.w[term][col + i] = span[i];
      } else {
        const int col = thread % kSimtTileCols;
        const int term = (thread / kSimtTileCols * kSpans + s) * kSimtSpan;
        const bool there = first_col + col < args.cols;
        weight.read(args.weight.begin_of(first_col + col) + first + term,
                    there ? k - first - term : 0, aligned_weight, span);
#pragma unroll
        for (int i = 0; i < kSimtSpan; ++i) tile.w[term + i][col] = span[i];
      }
    }
  };

  float sums[kRows][2 * kHalf] = {};
  for (int64_t first = 0; first < args.terms; first += kSimtTileTerms) {
    __syncthreads();
    stage_a(first);
    stage_w(first);
    __syncthreads();
#pragma unroll 8
    for (int t = 0; t < kSimtTileTerms; ++t) {
      const auto left = *reinterpret_cast<const Pack<float, kRows>*>(&tile.a[t][y * kRows]);
      const auto low = *reinterpret_cast<const Pack<float, kHalf>*>(&tile.w[t][x * kHalf]);
      const auto high =
          *reinterpret_cast<const Pack<float, kHalf>*>(&tile.w[t][kSimtTileCols / 2 + x * kHalf]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kHalf; ++j) {
          sums[i][j] = __fmaf_rn(left.values[i], low.values[j], sums[i][j]);
          sums[i][kHalf + j] = __fmaf_rn(left.values[i], high.values[j], sums[i][kHalf + j]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < 2 * kHalf; ++j) {
      const int64_t at = first_row + y * kRows + i;
      const int64_t col = first_col + j / kHalf * (kSimtTileCols / 2) + x * kHalf + j % kHalf;
      if (at < args.m && col < args.cols) {
        const float bias =
            args.bias != nullptr ? widen(static_cast<const T*>(args.bias)[col]) : 0.0f;
        static_cast<T*>(args.out)[at * args.cols + col] = narrow<T>(__fadd_rn(sums[i][j], bias));
      }
    }
  }
}

template <class T, bool kNested, bool kBackward>
__global__ void __launch_bounds__(kSimtThreads)
    gemm_4bit_tile_kernel(BNB_GRID_CONSTANT const SimtProduct args,
                          BNB_GRID_CONSTANT const Levels4 levels, int log2_block,
                          bool aligned_weight, bool aligned_a) {
  __shared__ float shared_levels[kCode4Levels];
  __shared__ float shared_code[kNested ? kCodeLevels : 1];
  alignas(16) __shared__ SimtTile tile;
  const ScaleReader<kNested> scale_of(args.weight.scales, shared_code);
  if (threadIdx.x < kCode4Levels) shared_levels[threadIdx.x] = levels[threadIdx.x];

  const SimtWeight<kNested> weight{args.weight.codes, shared_levels, scale_of, log2_block};
  const int64_t col = int64_t{blockIdx.x} * kSimtTileCols;
  for (int64_t row = int64_t{blockIdx.y} * kSimtTileRows; row < args.m;
       row += int64_t{gridDim.y} * kSimtTileRows) {
    multiply_tile<T, kBackward>(args, weight, row, col, aligned_weight, aligned_a, tile);
  }
}

// ---- Launches
// ------------------------------------------------------------------------------------

inline constexpr int64_t kMostGridRows = 65535;  // of a grid's second dimension

// Whether every row of the weight begins with a word of codes.
inline bool has_word_rows(const Weight4bit& weight) {
  return weight.k % kSimtSpan == 0 && is_aligned(weight.codes, 4);
}

// Rows of `a` for which a warp per row of the weight does less than a tile.
inline constexpr int64_t kMostSimtRows = 8;

template <class T, int kRows, bool kNested>
void launch_rows(const Gemm4bit& args, Stream stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(args.weight.n, kSimtWarps)),
                  static_cast<unsigned>(ceil_div(args.m, kRows)));
  launch("gemm_4bit_rows_kernel", gemm_4bit_rows_kernel<T, kRows, kNested>, grid,
         kSimtWarps * kWarp, 0, stream, args, Levels4(args.weight), log2_of(args.weight.block_size),
         has_word_rows(args.weight) && is_aligned(args.a, 16));
}

template <class T, bool kNested, bool kBackward>
void launch_tiles(const SimtProduct& args, Stream stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(args.cols, kSimtTileCols)),
                  static_cast<unsigned>(std::min(ceil_div(args.m, kSimtTileRows), kMostGridRows)));
  launch("gemm_4bit_tile_kernel", gemm_4bit_tile_kernel<T, kNested, kBackward>, grid, kSimtThreads,
         0, stream, args, Levels4(args.weight), log2_of(args.weight.block_size),
         has_word_rows(args.weight), args.terms % kSimtSpan == 0 && is_aligned(args.a, 16));
}

template <class T, bool kNested>
void simt_gemm_4bit(const Gemm4bit& args, Stream stream) {
  if (args.m == 1) return launch_rows<T, 1, kNested>(args, stream);
  if (args.m <= kMostSimtRows) return launch_rows<T, 4, kNested>(args, stream);
  launch_tiles<T, kNested, false>(simt_product(args), stream);
}

template <class T, bool kNested>
void simt_gemm_4bit_dgrad(const Gemm4bitDgrad& args, Stream stream) {
  launch_tiles<T, kNested, true>(simt_product(args), stream);
}

// Calls body.template operator()<T, kNested>() with what the arguments say.
template <class Body>
void by_type(DType dtype, bool nested, const Body& body) {
  by_dtype(dtype, [&]<class T>() {
    nested ? body.template operator()<T, true>() : body.template operator()<T, false>();
  });
}

}  // namespace bnb::gpu
