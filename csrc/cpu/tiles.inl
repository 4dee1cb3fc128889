// Products of matrices by tiles whose sums stay in registers: what products with 4-bit weights and
// with int8 weights share.
// SPDX-License-Identifier: MIT
//
// An operand `Op` says what numbers are multiplied: Element, Vector of kVector elements, Sum of
// products of vectors, Result of its lanes; kTileHeight and kLookupHeight, the most rows of a tile.
#pragma once

#include "bitsandbytes/blocks.h"
#include "cpu/vectors.inl"

namespace bnb::cpu::BNB_ISA {
namespace {

constexpr int kDotCols = 4;         // rows of the weight that a tile multiplies
constexpr int64_t kRowBlock = 256;  // rows of the other operand whose sums are kept at a time

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls body with the constants 0 to kCount - 1.
template <int kCount, class Body>
BNB_HD void for_each_constant(const Body& body) {
  if constexpr (kCount > 0) {
    for_each_constant<kCount - 1>(body);
    body(Constant<kCount - 1>{});
  }
}

// Calls body with a constant in place of rows, 1 to kMost.
template <int kMost, class Body>
BNB_HD void by_rows(int64_t rows, const Body& body) {
  if constexpr (kMost == 1) {
    body(Constant<1>{});
  } else {
    if (rows == kMost) return body(Constant<kMost>{});
    by_rows<kMost - 1>(rows, body);
  }
}

// Rows are cut into blocks, and those into tiles: the first one, whose products are made while the
// weights are looked up, and others of nearly equal height.
struct Tile {
  int64_t first;
  int64_t height;
};

template <class Op>
BNB_HD Tile tile_of(int64_t row, int64_t rows) {
  const int64_t block = row / kRowBlock * kRowBlock;
  const int64_t in_block = rows - block < kRowBlock ? rows - block : kRowBlock;
  if (in_block <= Op::kLookupHeight) return {block, in_block};
  const int64_t begin = block + Op::kLookupHeight;
  if (row < begin) return {block, Op::kLookupHeight};
  const int64_t others = in_block - Op::kLookupHeight;
  const int64_t tiles = ceil_div(others, int64_t{Op::kTileHeight});
  const int64_t least = others / tiles;
  const int64_t taller = others % tiles * (least + 1);  // rows of tiles with a row more
  const int64_t i = row - begin;
  if (i < taller) return {begin + i / (least + 1) * (least + 1), least + 1};
  return {begin + taller + (i - taller) / least * least, least};
}

// Adds the lanes of sums to out [kRows, kGemmPanel].
template <int kRows, class Sum, class Result>
BNB_HD void add_sums(const Sum (&sums)[kRows][kDotCols], Result* out) {
#pragma GCC unroll 8  // a loop would index the sums, which would then have to lie in memory
  for (int i = 0; i < kRows; ++i) {
    Result added[kDotCols];
    reduce_add4(sums[i], added);
    for (int j = 0; j < kDotCols; ++j) out[i * kGemmPanel + j] += added[j];
  }
}

// Adds to sums [kRows, kDotCols] the products over `count` weights of a panel.
template <class Op, int kRows>
[[gnu::noinline]] void multiply_tile(const typename Op::Element* panel, int64_t count,
                                     const typename Op::Element* a, typename Op::Result* out) {
  constexpr int64_t vector = Op::kVector;
  typename Op::Sum sums[kRows][kDotCols];
  // Loops would index the sums, which would then have to lie in memory.
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kDotCols; ++j) sums[i][j] = typename Op::Sum{};
  }
  for (int64_t k = 0; k < count; k += vector) {
    typename Op::Vector w[kDotCols];
#pragma GCC unroll 8
    for (int j = 0; j < kDotCols; ++j) w[j] = Op::load_vector(panel + k * kDotCols + j * vector);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const typename Op::Vector row = Op::load_vector(a + k * kRows + i * vector);
#pragma GCC unroll 8
      for (int j = 0; j < kDotCols; ++j) sums[i][j] = Op::add_products(sums[i][j], row, w[j]);
    }
  }
  add_sums(sums, out);
}

// The same for rows [row, rows) of a block and all columns of a panel, tile by tile. `first`: of
// the staged elements, of which a row has `stride`, that the panel's `count` weights multiply.
template <class Op>
void multiply_tiles(const typename Op::Element* panel, int64_t count, int64_t cols,
                    const typename Op::Element* a, int64_t stride, int64_t first, int64_t row,
                    int64_t rows, typename Op::Result* sums) {
  while (row < rows) {
    const Tile tile = tile_of<Op>(row, rows);
    by_rows<Op::kTileHeight>(tile.height, [&](auto constant) {
      constexpr int kRows = decltype(constant)::value;
      for (int64_t j = 0; j < cols; j += kDotCols) {
        multiply_tile<Op, kRows>(panel + j * count, count, a + row * stride + first * kRows,
                                 sums + row * kGemmPanel + j);
      }
    });
    row += tile.height;
  }
}

}  // namespace
}  // namespace bnb::cpu::BNB_ISA
