// Products of int8 matrices on the CPU.
// SPDX-License-Identifier: MIT
//
// out = a b^T in 32-bit integers, exact, and the linear layer that they are part of. Both operands
// lie along k already. The work is cut as for 4-bit weights (gemm_4bit.inl): `a` is staged once,
// the rows of a tile side by side; a thread goes through panels of kGemmPanel rows of b, and the
// first tile of rows of a leaves the panel's part of a chunk side by side for the others.
//
// Some processors only multiply signed by unsigned bytes. There kDotOffset is added to b, and a sum
// has kDotOffset times the sum of its row of a too much. Those sums are staged as well.
#pragma once

#include "bitsandbytes/kernels/int8.h"
#include "cpu/int8.inl"
#include "cpu/tiles.inl"
#include "cpu/types.inl"

namespace bnb::cpu::BNB_ISA {
namespace {

struct ByteOperand {
  using Element = int8_t;
  using Vector = Bytes;
  using Sum = Dot;
  using Result = uint32_t;  // sums wrap
  static constexpr int kVector = kDotWidth;
  static constexpr int kTileHeight = kWidth == 16 ? 6 : 2;
  static constexpr int kLookupHeight = kTileHeight;

  static BNB_HD Vector load_vector(const int8_t* p) { return load_bytes(p); }
  static BNB_HD Dot add_products(Dot sum, Vector a, Vector b) { return multiply_add(sum, a, b); }
};

constexpr int64_t kByteChunk = 4096;  // bytes of a row along k in a chunk

constexpr int64_t staged_bytes(int64_t k) { return ceil_div(k, int64_t{kDotWidth}) * kDotWidth; }

// The last bytes of a row, and zeros.
BNB_HD void copy_padded(const int8_t* from, int64_t count, int8_t* to) {
  __builtin_memset(to, 0, kDotWidth);
  __builtin_memcpy(to, from, static_cast<size_t>(count));
}

// Behind the staged rows: what their sums have too much, [m].
BNB_HD uint32_t* excess_of(void* staged, int64_t m, int64_t k) {
  return reinterpret_cast<uint32_t*>(static_cast<int8_t*>(staged) + m * staged_bytes(k));
}

void int8_matmul_stage(const int8_t* a, int64_t m, int64_t k, void* staged, int64_t first_row,
                       int64_t last_row) {
  uint32_t* excess = excess_of(staged, m, k);
  for (int64_t row = first_row; row < last_row; ++row) {
    const Tile tile = tile_of<ByteOperand>(row, m);
    int8_t* to = static_cast<int8_t*>(staged) + tile.first * staged_bytes(k) +
                 (row - tile.first) * kDotWidth;
    Dot sum;
    for (int64_t i = 0; i < k; i += kDotWidth) {
      int8_t* const vector = to + i * tile.height;
      if (i + kDotWidth <= k) {
        store_bytes(vector, load_bytes(a + row * k + i));
      } else {
        copy_padded(a + row * k + i, k - i, vector);
      }
      sum = add_bytes(sum, load_bytes(vector));
    }
    excess[row] = reduce_add(sum) * kDotOffset;
  }
}

constexpr int64_t kOutlierBatch = 64;  // outlier columns whose weights are kept at a time

struct BytePanel {
  alignas(64) uint32_t sums[kRowBlock * kGemmPanel];
  alignas(64) float corrections[kRowBlock * kGemmPanel];  // products of outlier columns
  alignas(64) float outlier_weights[kOutlierBatch * kGemmPanel];
  alignas(64) int8_t weights[kGemmPanel * kByteChunk];
};

ProductSpace int8_matmul_space(int64_t m, int64_t k) {
  const int64_t panel =
      m > ByteOperand::kLookupHeight ? sizeof(BytePanel) : __builtin_offsetof(BytePanel, weights);
  return {m * (staged_bytes(k) + int64_t{sizeof(uint32_t)}), panel};
}

// Adds to sums [kRows, kDotCols] the products over a chunk of rows of b. With kKeep the chunk is
// left in `panel` as well, in the order in which multiply_tile reads it.
template <int kRows, bool kKeep>
[[gnu::noinline]] void multiply_rows(const int8_t* const (&b)[kDotCols], int64_t count,
                                     int64_t ahead, const int8_t* a, int8_t* panel, uint32_t* out) {
  Dot sums[kRows][kDotCols];
  const auto multiply = [&](int64_t k, const auto& load_b) __attribute__((always_inline)) {
    Bytes w[kDotCols];
#pragma GCC unroll 8  // a loop would index the sums, which would then have to lie in memory
    for (int j = 0; j < kDotCols; ++j) {
      w[j] = add_dot_offset(load_b(j));
      if constexpr (kKeep) store_bytes(panel + k * kDotCols + j * kDotWidth, w[j]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Bytes row = load_bytes(a + k * kRows + i * kDotWidth);
#pragma GCC unroll 8
      for (int j = 0; j < kDotCols; ++j) sums[i][j] = multiply_add(sums[i][j], row, w[j]);
    }
  };
  int64_t k = 0;
  for (; k + kDotWidth <= count; k += kDotWidth) {
    multiply(k, [&](int j) {
      __builtin_prefetch(b[j] + k + ahead);
      return load_bytes(b[j] + k);
    });
  }
  if (k < count) {
    int8_t part[kDotCols][kDotWidth];
    for (int j = 0; j < kDotCols; ++j) copy_padded(b[j] + k, count - k, part[j]);
    multiply(k, [&](int j) { return load_bytes(part[j]); });
  }
  add_sums(sums, out);
}

// `rows` rows of a, a block that `a` holds staged, times `cols` rows of b.
BNB_HD void multiply_bytes(const int8_t* b, int64_t k, int64_t cols, const int8_t* a, int64_t rows,
                           BytePanel& panel) {
  __builtin_memset(panel.sums, 0, static_cast<size_t>(rows * kGemmPanel) * sizeof(uint32_t));
  for (int64_t first = 0; first < k; first += kByteChunk) {
    const int64_t count = k - first < kByteChunk ? k - first : kByteChunk;
    const int64_t height = tile_of<ByteOperand>(0, rows).height;
    by_rows<ByteOperand::kLookupHeight>(height, [&](auto constant) {
      constexpr int kRows = decltype(constant)::value;
      for (int64_t j = 0; j < cols; j += kDotCols) {
        const int8_t* from[kDotCols];
        for (int i = 0; i < kDotCols; ++i) {
          from[i] = b + (j + i < cols ? j + i : cols - 1) * k + first;
        }
        int8_t* weights = panel.weights + j * staged_bytes(count);
        if (height < rows) {
          multiply_rows<kRows, true>(from, count, kDotCols * k, a + first * kRows, weights,
                                     panel.sums + j);
        } else {
          multiply_rows<kRows, false>(from, count, kDotCols * k, a + first * kRows, weights,
                                      panel.sums + j);
        }
      }
    });
    multiply_tiles<ByteOperand>(panel.weights, staged_bytes(count), cols, a, staged_bytes(k), first,
                                height, rows, panel.sums);
  }
}

// Calls finish(first row, rows, first column, columns) when the sums of a block stand in the panel.
template <class Finish>
BNB_HD void multiply_panels(const int8_t* b, int64_t m, int64_t n, int64_t k, const void* staged,
                            BytePanel& panel, int64_t first_panel, int64_t last_panel,
                            const Finish& finish) {
  const int8_t* a = static_cast<const int8_t*>(staged);
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const int64_t first_col = p * kGemmPanel;
    const int64_t cols = n - first_col < kGemmPanel ? n - first_col : kGemmPanel;
    for (int64_t row = 0; row < m; row += kRowBlock) {
      const int64_t rows = m - row < kRowBlock ? m - row : kRowBlock;
      multiply_bytes(b + first_col * k, k, cols, a + row * staged_bytes(k), rows, panel);
      const uint32_t* excess = excess_of(const_cast<void*>(staged), m, k) + row;
      for (int64_t i = 0; kDotOffset != 0 && i < rows; ++i) {
        for (int64_t j = 0; j < kGemmPanel; ++j) panel.sums[i * kGemmPanel + j] -= excess[i];
      }
      finish(row, rows, first_col, cols);
    }
  }
}

void int8_linear_matmul(const Int8Matmul& args, const void* staged, void* panel,
                        int64_t first_panel, int64_t last_panel) {
  BytePanel& p = *static_cast<BytePanel*>(panel);
  multiply_panels(args.b, args.m, args.n, args.k, staged, p, first_panel, last_panel,
                  [&](int64_t row, int64_t rows, int64_t col, int64_t cols) {
                    for (int64_t i = 0; i < rows; ++i) {
                      __builtin_memcpy(args.out + (row + i) * args.n + col, p.sums + i * kGemmPanel,
                                       static_cast<size_t>(cols) * sizeof(int32_t));
                    }
                  });
}

// Puts the products of outlier columns into the panel, without the scale of the weight.
template <class T>
void multiply_outliers(const Int8ScaledMatmul& args, int64_t first_row, int64_t rows,
                       int64_t first_col, int64_t cols, BytePanel& panel) {
  const int64_t count = args.outliers[0];
  const int32_t* columns = args.outliers + 1;
  __builtin_memset(panel.corrections, 0, static_cast<size_t>(rows * kGemmPanel) * sizeof(float));
  for (int64_t first = 0; first < count; first += kOutlierBatch) {
    const int64_t batch = count - first < kOutlierBatch ? count - first : kOutlierBatch;
    for (int64_t o = 0; o < batch; ++o) {
      float* weights = panel.outlier_weights + o * kGemmPanel;
      const int8_t* from = args.b + first_col * args.k + columns[first + o];
      for (int64_t j = 0; j < kGemmPanel; ++j) {
        weights[j] = j < cols ? static_cast<float>(from[j * args.k]) : 0.0f;
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      const T* values = static_cast<const T*>(args.values) + (first_row + i) * args.k;
      float* out = panel.corrections + i * kGemmPanel;
      for (int64_t o = 0; o < batch; ++o) {
        const Float value(to_float(values[columns[first + o]]));
        for (int64_t j = 0; j < kGemmPanel; j += kLanes) {
          const Float weight = load(panel.outlier_weights + o * kGemmPanel + j);
          store(out + j, fma(value, weight, load(out + j)));
        }
      }
    }
  }
}

template <class T>
void scale_sums(const Int8ScaledMatmul& args, bool corrected, int64_t first_row, int64_t rows,
                int64_t first_col, int64_t cols, const BytePanel& panel) {
  for (int64_t i = 0; i < rows; ++i) {
    const int32_t* sums = reinterpret_cast<const int32_t*>(panel.sums) + i * kGemmPanel;
    const float* corrections = panel.corrections + i * kGemmPanel;
    T* out = static_cast<T*>(args.out) + (first_row + i) * args.n + first_col;
    const Float row_scale(args.row_stats[first_row + i] * kInt8Product);
    for_each_vector(0, cols, [&](int64_t j, int64_t lanes) {
      const Float col_stats = load_some(args.col_stats + first_col + j, lanes);
      Float result = args.bias != nullptr
                         ? load_as_float(args.bias_dtype, args.bias, first_col + j, lanes)
                         : Float(0.0f);
      if (corrected) {
        result = fma(load(corrections + j), col_stats * Float(1.0f / kInt8Max), result);
      }
      result = fma(int_to_float(load_ints(sums + j)), col_stats * row_scale, result);
      store_some(out + j, result, lanes);
    });
  }
}

void int8_scaled_matmul(const Int8ScaledMatmul& args, const void* staged, void* panel,
                        int64_t first_panel, int64_t last_panel) {
  BytePanel& p = *static_cast<BytePanel*>(panel);
  const bool corrected = args.outliers != nullptr && args.outliers[0] > 0;
  multiply_panels(args.b, args.m, args.n, args.k, staged, p, first_panel, last_panel,
                  [&](int64_t row, int64_t rows, int64_t col, int64_t cols) {
                    by_dtype(args.dtype, [&](auto type) {
                      using T = typename decltype(type)::type;
                      if (corrected) multiply_outliers<T>(args, row, rows, col, cols, p);
                      scale_sums<T>(args, corrected, row, rows, col, cols, p);
                    });
                  });
}

}  // namespace
}  // namespace bnb::cpu::BNB_ISA
