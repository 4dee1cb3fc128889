// The backward pass of a product with a 4-bit weight on the CPU.
// SPDX-License-Identifier: MIT
//
// out[i, k] = sum over j of grad[i, j] w[j, k]: sums of rows of w, so lanes are columns. A thread
// has a panel of kDgradPanel columns. It looks up the panel's part of some rows, which stay in L1
// or L2, and adds their products to the sums of all rows of grad, a tile at a time. Columns lie in
// the order in which lookups give them until the sums are complete. The weight is never there as a
// whole.
#pragma once

#include "cpu/gemm_4bit.inl"

namespace bnb::cpu::BNB_ISA {
namespace {

constexpr int kTileVectors = 4;  // of columns
constexpr int64_t kTileColumns = kTileVectors * kWidth;
// Rows of the weight whose part in a tile of columns fits into L1.
template <class Op>
constexpr int64_t kDgradRows =
    32768 / (kWidth == 1 ? kDgradPanel : kTileColumns) / int64_t{sizeof(typename Op::Element)};

template <class Op>
struct DgradPanel {
  alignas(64) typename Op::Element weights[kDgradRows<Op> * kDgradPanel];
  alignas(64) float sums[kRowBlock * kDgradPanel];
};

template <class Op>
constexpr int64_t staged_grads(int64_t n) {
  return ceil_div(n, Op::kDepth) * Op::kDepth;
}

template <class Op, class T>
void stage_grads(const Gemm4bitDgrad& args, void* staged, int64_t first_row, int64_t last_row) {
  const int64_t n = args.weight.n;
  const int64_t length = staged_grads<Op>(n);
  for (int64_t row = first_row; row < last_row; ++row) {
    const T* from = static_cast<const T*>(args.grad) + row * n;
    const Tile tile = tile_of<Op>(row, args.m);
    auto* to = static_cast<typename Op::Element*>(staged) + tile.first * length +
               (row - tile.first) * Op::kDepth;
    for (int64_t j = 0; j < length; ++j) {
      const int64_t place = j / Op::kDepth * Op::kDepth * tile.height + j % Op::kDepth;
      to[place] = j < n ? Op::element(from[j]) : typename Op::Element{};
    }
  }
}

BNB_HD void prefetch_weights(const Weight4bit& w, int64_t i) {
  const int64_t block = i >> log2_of_block(w);
  __builtin_prefetch(w.codes + i / 2);
  if (w.scales.nested()) {
    __builtin_prefetch(w.scales.codes + block);
  } else {
    __builtin_prefetch(w.scales.absmax + block);
  }
}

// Leaves columns [first_col, first_col + cols) of rows [first_row, last_row) of the weight in the
// panel, woven, tile of columns by tile of columns; zeros where a product takes more rows than
// there are.
template <class Op, class T>
void unpack_panel(const Weight4bit& w, int64_t first_row, int64_t last_row, int64_t first_col,
                  int64_t cols, typename Op::Element* weights) {
  // Rows lie so far apart that the processor does not see which memory comes next.
  constexpr int64_t kAhead = 16;
  alignas(64) typename Op::Element unpacked[Op::kDepth][kDgradPanel];
  for (int64_t row = first_row; row < last_row; row += Op::kDepth) {
    const typename Op::Element* rows[Op::kDepth];
    for (int d = 0; d < Op::kDepth; ++d) {
      if (row + d < last_row) {
        prefetch_weights(w, w.begin_of(row + d + kAhead) + first_col);
        unpack<Op, T>(w, w.begin_of(row + d) + first_col, cols, unpacked[d]);
      } else {
        __builtin_memset(unpacked[d], 0, sizeof(unpacked[d]));
      }
    }
    for (int64_t i = 0; i < staged_length<Op>(cols); i += Op::kVector) {
      for (int d = 0; d < Op::kDepth; ++d) rows[d] = unpacked[d] + i;
      const int64_t in_tile = i % kTileColumns;
      Op::weave(rows, weights + (i - in_tile) * kDgradRows<Op> + (row - first_row) * kTileColumns +
                          in_tile * Op::kDepth);
    }
  }
}

// Adds to sums [kRows, kTileVectors * kWidth] the products over `count` rows of the panel.
template <class Op, int kRows>
[[gnu::noinline]] void outer_tile(const typename Op::Element* weights, int64_t count,
                                  const typename Op::Element* grads, float* out) {
  Float sums[kRows][kTileVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kTileVectors; ++v) sums[i][v] = load(out + i * kDgradPanel + v * kWidth);
  }
  for (int64_t j = 0; j < count; j += Op::kDepth) {
    typename Op::Vector w[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) {
      w[v] = Op::load_vector(weights + j * kTileColumns + v * Op::kVector);
    }
    for (int i = 0; i < kRows; ++i) {
      const typename Op::Vector grad = Op::broadcast(grads + j * kRows + i * Op::kDepth);
      for (int v = 0; v < kTileVectors; ++v) sums[i][v] = Op::add_products(sums[i][v], grad, w[v]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kTileVectors; ++v) store(out + i * kDgradPanel + v * kWidth, sums[i][v]);
  }
}

template <class Op, class T>
void finish_grads(const Gemm4bitDgrad& args, int64_t first_row, int64_t rows, int64_t first_col,
                  int64_t cols, const float* sums) {
  for (int64_t i = 0; i < rows; ++i) {
    T* out = static_cast<T*>(args.out) + (first_row + i) * args.weight.k + first_col;
    float ordered[kDgradPanel];
    for (int64_t k = 0; k < kDgradPanel; k += kGroup<Op>) {
      for (int place = 0; place < kGroup<Op>; ++place) {
        ordered[k + Op::woven_place_of(place)] = sums[i * kDgradPanel + k + place];
      }
    }
    for_each_vector(0, cols, [&](int64_t k, int64_t count) {
      store_some(out + k, load_some(ordered + k, count), count);
    });
  }
}

template <class Op, class T>
void dgrad_panels(const Gemm4bitDgrad& args, const void* staged, DgradPanel<Op>& panel,
                  int64_t first_panel, int64_t last_panel) {
  const Weight4bit& w = args.weight;
  const int64_t stride = staged_grads<Op>(w.n);
  const auto* grads = static_cast<const typename Op::Element*>(staged);
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const int64_t first_col = p * kDgradPanel;
    const int64_t cols = w.k - first_col < kDgradPanel ? w.k - first_col : kDgradPanel;
    // What lies beyond the last column is multiplied as well.
    if (cols < kDgradPanel) __builtin_memset(panel.weights, 0, sizeof(panel.weights));
    for (int64_t row = 0; row < args.m; row += kRowBlock) {
      const int64_t rows = args.m - row < kRowBlock ? args.m - row : kRowBlock;
      __builtin_memset(panel.sums, 0, static_cast<size_t>(rows * kDgradPanel) * sizeof(float));
      for (int64_t j = 0; j < w.n; j += kDgradRows<Op>) {
        const int64_t end = w.n - j < kDgradRows<Op> ? w.n : j + kDgradRows<Op>;
        unpack_panel<Op, T>(w, j, end, first_col, cols, panel.weights);
        for (int64_t k = 0; k < staged_length<Op>(cols); k += kTileColumns) {
          for (int64_t i = 0; i < rows;) {
            const Tile tile = tile_of<Op>(i, rows);
            by_rows<Op::kTileHeight>(tile.height, [&](auto constant) {
              constexpr int kRows = decltype(constant)::value;
              outer_tile<Op, kRows>(panel.weights + k * kDgradRows<Op>, end - j,
                                    grads + (row + i) * stride + j * kRows,
                                    panel.sums + i * kDgradPanel + k);
            });
            i += tile.height;
          }
        }
      }
      finish_grads<Op, T>(args, row, rows, first_col, cols, panel.sums);
    }
  }
}

ProductSpace gemm_4bit_dgrad_space(const Gemm4bitDgrad& args) {
  ProductSpace space{};
  by_operand(args.dtype, [&](auto, auto operand) {
    using Op = typename decltype(operand)::type;
    space.staged = args.m * staged_grads<Op>(args.weight.n) * int64_t{sizeof(typename Op::Element)};
    space.panel = sizeof(DgradPanel<Op>);
  });
  return space;
}

void gemm_4bit_dgrad_stage(const Gemm4bitDgrad& args, void* staged, int64_t first_row,
                           int64_t last_row) {
  by_operand(args.dtype, [&](auto type, auto operand) {
    stage_grads<typename decltype(operand)::type, typename decltype(type)::type>(
        args, staged, first_row, last_row);
  });
}

void gemm_4bit_dgrad(const Gemm4bitDgrad& args, const void* staged, void* panel,
                     int64_t first_panel, int64_t last_panel) {
  by_operand(args.dtype, [&](auto type, auto operand) {
    using Op = typename decltype(operand)::type;
    dgrad_panels<Op, typename decltype(type)::type>(
        args, staged, *static_cast<DgradPanel<Op>*>(panel), first_panel, last_panel);
  });
}

}  // namespace
}  // namespace bnb::cpu::BNB_ISA
