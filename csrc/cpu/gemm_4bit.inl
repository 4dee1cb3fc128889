// Products with a 4-bit weight on the CPU.
// SPDX-License-Identifier: MIT
//
// out[i, j] = sum over k of a[i, k] w[j, k]: dot products along k, in which a byte of codes gives
// two neighbouring weights. The lookup of a group of codes returns the weights at its even places
// in one vector and those at its odd places in another; so that nothing has to be woven together,
// the other operand is *staged* once: converted, with each group in the same order, and the rows of
// a tile side by side.
//
//     for a panel of kGemmPanel rows of w                 one thread
//       for a chunk of k                                  the panel's weights stay in L2
//         for a tile of rows of a                         these stay in L1
//           for kDotCols rows of w in the panel           sums stay in registers
//
// The first tile looks the weights up, multiplies them, and leaves them in the panel for the
// others: lookups run on other units of the processor than multiplications. With few rows of a, a
// weight thus goes from its code to the sum without touching memory.
//
// Every sum is made in the same order whatever the cut of the work, so results do not depend on the
// number of threads.
#pragma once

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/kernels/gemm_4bit.h"
#include "cpu/quantize_4bit.inl"
#include "cpu/types.inl"

namespace bnb::cpu::BNB_ISA {
namespace {

constexpr int kDotCols = 4;  // rows of w that a tile multiplies
// Bytes of a row along k in a chunk. Where a vector is one number, chunks are short, so that few
// products follow each other in a sum.
constexpr int64_t kChunkBytes = kWidth == 1 ? 512 : 4096;
constexpr int64_t kRowBlock = 256;  // rows of a whose sums are kept at a time

// Products of floats. T is what weights are rounded to.
template <class T>
struct FloatOperand {
  using Element = float;
  using Vector = Float;
  static constexpr int kVector = kWidth;
  static constexpr int kTileHeight = kWidth == 16 ? 6 : 2;
  static constexpr int kLookupHeight = kWidth == 16 ? 4 : 2;

  struct Table {
    Float parts[kCode4Levels / kWidth];
  };
  static BNB_HD Table make_table(const float* levels, float scale) {
    Table table;
    for (int i = 0; i < kCode4Levels / kWidth; ++i) {
      table.parts[i] = round_to(load(levels + i * kWidth) * Float(scale), T{});
    }
    return table;
  }
  static BNB_HD void lookup(const Table& table, const uint8_t* bytes, Vector& even, Vector& odd) {
    lookup_pairs(table.parts, bytes, even, odd);
  }
  static BNB_HD Vector load_vector(const Element* p) { return load(p); }
  static BNB_HD void store_vector(Element* p, Vector x) { store(p, x); }
  static BNB_HD Float add_products(Float sum, Vector a, Vector b) {
    return multiply_add(a, b, sum);
  }
  static BNB_HD Element element(T x) { return to_float(x); }

  // For sums over rows of the weight: rows to a product, how their groups are woven, and the
  // column of a group that a place in it then holds.
  static constexpr int kDepth = 1;
  static BNB_HD void weave(const Element* const (&rows)[kDepth], Element* out) {
    store_vector(out, load_vector(rows[0]));
    store_vector(out + kVector, load_vector(rows[0] + kVector));
  }
  static constexpr int column_of(int place) {
    return place < kVector ? 2 * place : 2 * (place - kVector) + 1;
  }
  static BNB_HD Vector broadcast(const Element* p) { return Float(*p); }
};

// What multiplies numbers of type T: the products of the instruction set, or those of floats.
template <class T, class Native = typename NativeOperand<T>::type>
struct OperandOf {
  using type = Native;
};
template <class T>
struct OperandOf<T, void> {
  using type = FloatOperand<T>;
};

template <class Op>
constexpr int64_t kGroup = 2 * Op::kVector;  // elements that one lookup gives
template <class Op>
constexpr int64_t kChunk = kChunkBytes / int64_t{sizeof(typename Op::Element)};

template <class Op>
constexpr int64_t staged_length(int64_t k) {
  return ceil_div(k, kGroup<Op>) * kGroup<Op>;
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

// Puts `count` elements into groups: those at even places, then those at odd places. Zeros fill up
// the last group. Vectors lie `stride` vectors apart.
template <class Op, class T>
void stage(const T* from, int64_t count, typename Op::Element* to, int64_t stride) {
  constexpr int64_t vector = Op::kVector;
  for (int64_t i = 0; i < count; i += kGroup<Op>) {
    typename Op::Element* even = to + i * stride;
    typename Op::Element* odd = even + vector * stride;
    if (i + kGroup<Op> <= count) {
      for (int64_t j = 0; j < vector; ++j) {
        even[j] = Op::element(from[i + 2 * j]);
        odd[j] = Op::element(from[i + 2 * j + 1]);
      }
    } else {
      for (int64_t j = 0; j < vector; ++j) {
        const int64_t at = i + 2 * j;
        even[j] = at < count ? Op::element(from[at]) : typename Op::Element{};
        odd[j] = at + 1 < count ? Op::element(from[at + 1]) : typename Op::Element{};
      }
    }
  }
}

template <class Op, class T>
void stage_rows(const Gemm4bit& args, void* staged, int64_t first_row, int64_t last_row) {
  const int64_t k = args.weight.k;
  for (int64_t row = first_row; row < last_row; ++row) {
    const Tile tile = tile_of<Op>(row, args.m);
    auto* to = static_cast<typename Op::Element*>(staged) + tile.first * staged_length<Op>(k);
    stage<Op>(static_cast<const T*>(args.a) + row * k, k, to + (row - tile.first) * Op::kVector,
              tile.height);
  }
}

// ---- Tiles --------------------------------------------------------------------------------------

// kDotCols rows of a weight whose groups begin where bytes do and whose blocks begin together.
struct CodeRows {
  const uint8_t* codes[kDotCols];  // at the beginning of the chunk
  const float* scales[kDotCols];   // of the block in which the chunk begins
  const float* levels;
  int64_t block_size;
  int64_t phase;  // elements of that block before the chunk
  int64_t ahead;  // bytes from a row's codes to those that the next tile needs
};

template <int kRows>
BNB_HD void add_sums(const Float (&sums)[kRows][kDotCols], float* out) {
#pragma GCC unroll 8  // a loop would index the sums, which would then have to lie in memory
  for (int i = 0; i < kRows; ++i) {
    float added[kDotCols];
    reduce_add4(sums[i], added);
    for (int j = 0; j < kDotCols; ++j) out[i * kGemmPanel + j] += added[j];
  }
}

// Adds to sums [kRows, kDotCols] the products over a chunk of codes. With kKeep the weights are
// left in `panel` as well, in the order in which multiply_tile reads them. kSplit: a group lies in
// two blocks.
template <class Op, int kRows, bool kKeep, bool kSplit>
[[gnu::noinline]] void lookup_tile(const CodeRows& w, int64_t count, const typename Op::Element* a,
                                   typename Op::Element* panel, float* out) {
  using Vector = typename Op::Vector;
  constexpr int64_t vector = Op::kVector;
  Float sums[kRows][kDotCols];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kDotCols; ++j) sums[i][j] = Float(0.0f);
  }
  int64_t block = 0;
  int64_t block_end = kSplit ? kGroup<Op> : w.block_size - w.phase;
  int64_t k = 0;
  while (k < count) {
    typename Op::Table tables[kDotCols];
    for (int j = 0; j < kDotCols; ++j) {
      if constexpr (kSplit) {
        tables[j] = Op::make_table(w.levels, w.scales[j][block], w.scales[j][block + 1]);
      } else {
        tables[j] = Op::make_table(w.levels, w.scales[j][block]);
      }
    }
    const int64_t end = block_end < count ? block_end : count;
    do {
      // Two columns at a time share what is read of `a`.
      for (int j = 0; j < kDotCols; j += 2) {
        Vector even[2], odd[2];
        for (int c = 0; c < 2; ++c) {
          const uint8_t* codes = w.codes[j + c] + k / 2;
          __builtin_prefetch(codes + w.ahead);
          if constexpr (kSplit) {
            Op::lookup_halves(tables[j + c], codes, even[c], odd[c]);
          } else {
            Op::lookup(tables[j + c], codes, even[c], odd[c]);
          }
          if constexpr (kKeep) {
            Op::store_vector(panel + k * kDotCols + (j + c) * vector, even[c]);
            Op::store_vector(panel + k * kDotCols + (kDotCols + j + c) * vector, odd[c]);
          }
        }
        for (int i = 0; i < kRows; ++i) {
          const Vector first = Op::load_vector(a + k * kRows + i * vector);
          const Vector second = Op::load_vector(a + (k + vector) * kRows + i * vector);
          for (int c = 0; c < 2; ++c) {
            sums[i][j + c] = Op::add_products(sums[i][j + c], first, even[c]);
            sums[i][j + c] = Op::add_products(sums[i][j + c], second, odd[c]);
          }
        }
      }
      k += kGroup<Op>;
    } while (k < end);
    block_end += kSplit ? kGroup<Op> : w.block_size;
    block += kSplit ? 2 : 1;
  }
  add_sums(sums, out);
}

// The same from weights in the panel.
template <class Op, int kRows>
[[gnu::noinline]] void multiply_tile(const typename Op::Element* panel, int64_t count,
                                     const typename Op::Element* a, float* out) {
  constexpr int64_t vector = Op::kVector;
  Float sums[kRows][kDotCols];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kDotCols; ++j) sums[i][j] = Float(0.0f);
  }
  for (int64_t k = 0; k < count; k += vector) {
    typename Op::Vector w[kDotCols];
    for (int j = 0; j < kDotCols; ++j) w[j] = Op::load_vector(panel + k * kDotCols + j * vector);
    for (int i = 0; i < kRows; ++i) {
      const typename Op::Vector row = Op::load_vector(a + k * kRows + i * vector);
      for (int j = 0; j < kDotCols; ++j) sums[i][j] = Op::add_products(sums[i][j], row, w[j]);
    }
  }
  add_sums(sums, out);
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

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

// ---- Panels -------------------------------------------------------------------------------------

template <class Op>
struct Panel {
  alignas(64) float sums[kRowBlock * kGemmPanel];
  float scales[kDotCols][kChunk<Op> / kLeastBlock + 1];
  alignas(64) typename Op::Element weights[kGemmPanel * kChunk<Op>];
};

// True where no group of codes and no row lies in parts of two blocks.
template <class Op>
bool is_aligned(const Weight4bit& w) {
  return w.k % (w.block_size > kGroup<Op> ? w.block_size : kGroup<Op>) == 0;
}

// The scales of `count` blocks, as numbers.
inline const float* scales_from(const Scales& scales, int64_t first, int64_t count, float* space) {
  if (!scales.nested()) return scales.absmax + first;
  for (int64_t i = 0; i < count; ++i) space[i] = scale_of(scales, first + i);
  return space;
}

// Elements [begin, begin + count) of the flattened weight, in groups from `begin` on; zeros fill up
// the last group. At most kChunk of them.
template <class Op, class T>
void unpack(const Weight4bit& w, int64_t begin, int64_t count, typename Op::Element* out) {
  constexpr int64_t vector = Op::kVector;
  if (begin % kGroup<Op> == 0 && count % kGroup<Op> == 0 && w.block_size >= kGroup<Op>) {
    int64_t i = 0;
    while (i < count) {
      const int64_t block = (begin + i) / w.block_size;
      const auto table = Op::make_table(w.levels, scale_of(w.scales, block));
      const int64_t block_end = (block + 1) * w.block_size - begin;
      const int64_t stop = block_end < count ? block_end : count;
      for (; i < stop; i += kGroup<Op>) {
        typename Op::Vector even, odd;
        Op::lookup(table, w.codes + (begin + i) / 2, even, odd);
        Op::store_vector(out + i, even);
        Op::store_vector(out + i + vector, odd);
      }
    }
    return;
  }
  T values[kChunk<Op> + 1];
  const int64_t even = begin - begin % 2;
  dequantize_range_4bit(w.levels, w.codes, w.scales, w.block_size, even, begin + count, values);
  stage<Op>(values + (begin - even), count, out, 1);
}

// Looks up the weights of a chunk for the first tile of rows, with its products.
template <class Op, int kRows, bool kKeep>
void lookup_chunk(const Weight4bit& w, int64_t first_col, int64_t cols, int64_t first,
                  int64_t count, const typename Op::Element* a, Panel<Op>& panel) {
  constexpr bool kMaySplit = kGroup<Op> > kLeastBlock;
  for (int64_t j = 0; j < cols; j += kDotCols) {
    CodeRows codes{{}, {}, w.levels, w.block_size, first % w.block_size, kDotCols * w.k / 2};
    for (int i = 0; i < kDotCols; ++i) {
      const int64_t col = first_col + (j + i < cols ? j + i : cols - 1);
      const int64_t begin = col * w.k + first;
      codes.codes[i] = w.codes + begin / 2;
      codes.scales[i] = scales_from(w.scales, begin / w.block_size,
                                    ceil_div(codes.phase + count, w.block_size), panel.scales[i]);
    }
    typename Op::Element* weights = panel.weights + j * count;
    if (kMaySplit && w.block_size < kGroup<Op>) {
      lookup_tile<Op, kRows, kKeep, kMaySplit>(codes, count, a, weights, panel.sums + j);
    } else {
      lookup_tile<Op, kRows, kKeep, false>(codes, count, a, weights, panel.sums + j);
    }
  }
}

// Leaves the weights of a chunk in the panel, wherever codes and blocks begin.
template <class Op, class T>
void unpack_chunk(const Weight4bit& w, int64_t first_col, int64_t cols, int64_t first,
                  int64_t count, Panel<Op>& panel) {
  const int64_t length = staged_length<Op>(count);
  for (int64_t j = 0; j < cols; ++j) {
    alignas(64) typename Op::Element unpacked[kChunk<Op>];
    unpack<Op, T>(w, (first_col + j) * w.k + first, count, unpacked);
    const int64_t lane = j % kDotCols;
    typename Op::Element* to = panel.weights + (j - lane) * length + lane * Op::kVector;
    for (int64_t k = 0; k < length; k += Op::kVector) {
      Op::store_vector(to + k * kDotCols, Op::load_vector(unpacked + k));
    }
  }
}

// `rows` rows of a, a block that `a` holds staged.
template <class Op, class T>
void multiply_block(const Gemm4bit& args, int64_t first_col, int64_t cols,
                    const typename Op::Element* a, int64_t rows, Panel<Op>& panel) {
  const Weight4bit& w = args.weight;
  const int64_t stride = staged_length<Op>(w.k);
  const bool aligned = is_aligned<Op>(w);
  __builtin_memset(panel.sums, 0, static_cast<size_t>(rows * kGemmPanel) * sizeof(float));
  for (int64_t first = 0; first < w.k; first += kChunk<Op>) {
    const int64_t count = w.k - first < kChunk<Op> ? w.k - first : kChunk<Op>;
    const int64_t length = staged_length<Op>(count);
    int64_t row = 0;
    if (aligned) {
      row = tile_of<Op>(0, rows).height;
      by_rows<Op::kLookupHeight>(row, [&](auto constant) {
        constexpr int kRows = decltype(constant)::value;
        if (row < rows) {
          lookup_chunk<Op, kRows, true>(w, first_col, cols, first, count, a + first * kRows, panel);
        } else {
          lookup_chunk<Op, kRows, false>(w, first_col, cols, first, count, a + first * kRows,
                                         panel);
        }
      });
    } else {
      unpack_chunk<Op, T>(w, first_col, cols, first, count, panel);
    }
    while (row < rows) {
      const Tile tile = tile_of<Op>(row, rows);
      by_rows<Op::kTileHeight>(tile.height, [&](auto constant) {
        constexpr int kRows = decltype(constant)::value;
        for (int64_t j = 0; j < cols; j += kDotCols) {
          multiply_tile<Op, kRows>(panel.weights + j * length, length,
                                   a + row * stride + first * kRows,
                                   panel.sums + row * kGemmPanel + j);
        }
      });
      row += tile.height;
    }
  }
}

template <class T>
void finish_rows(const Gemm4bit& args, int64_t first_row, int64_t rows, int64_t first_col,
                 int64_t cols, const float* sums) {
  const T* bias = static_cast<const T*>(args.bias);
  for (int64_t i = 0; i < rows; ++i) {
    T* out = static_cast<T*>(args.out) + (first_row + i) * args.weight.n + first_col;
    for_each_vector(0, cols, [&](int64_t j, int64_t count) {
      Float sum = load_some(sums + i * kGemmPanel + j, count);
      if (bias != nullptr) sum = sum + load_some(bias + first_col + j, count);
      store_some(out + j, sum, count);
    });
  }
}

template <class Op, class T>
void gemm_panels(const Gemm4bit& args, const void* staged, Panel<Op>& panel, int64_t first_panel,
                 int64_t last_panel) {
  const Weight4bit& w = args.weight;
  const auto* a = static_cast<const typename Op::Element*>(staged);
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const int64_t first_col = p * kGemmPanel;
    const int64_t cols = w.n - first_col < kGemmPanel ? w.n - first_col : kGemmPanel;
    for (int64_t row = 0; row < args.m; row += kRowBlock) {
      const int64_t rows = args.m - row < kRowBlock ? args.m - row : kRowBlock;
      multiply_block<Op, T>(args, first_col, cols, a + row * staged_length<Op>(w.k), rows, panel);
      finish_rows<T>(args, row, rows, first_col, cols, panel.sums);
    }
  }
}

// ---- Entries of the table of kernels -----------------------------------------------------------

// Calls body(type of the elements, operand).
template <class Body>
void by_operand(DType dtype, const Body& body) {
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    body(type, Type<typename OperandOf<T>::type>{});
  });
}

ProductSpace gemm_4bit_space(const Gemm4bit& args) {
  ProductSpace space{};
  by_operand(args.dtype, [&](auto, auto operand) {
    using Op = typename decltype(operand)::type;
    space.staged =
        args.m * staged_length<Op>(args.weight.k) * int64_t{sizeof(typename Op::Element)};
    const bool keeps = args.m > Op::kLookupHeight || !is_aligned<Op>(args.weight);
    space.panel = keeps ? sizeof(Panel<Op>) : __builtin_offsetof(Panel<Op>, weights);
  });
  return space;
}

void gemm_4bit_stage(const Gemm4bit& args, void* staged, int64_t first_row, int64_t last_row) {
  by_operand(args.dtype, [&](auto type, auto operand) {
    stage_rows<typename decltype(operand)::type, typename decltype(type)::type>(
        args, staged, first_row, last_row);
  });
}

void gemm_4bit(const Gemm4bit& args, const void* staged, void* panel, int64_t first_panel,
               int64_t last_panel) {
  by_operand(args.dtype, [&](auto type, auto operand) {
    using Op = typename decltype(operand)::type;
    gemm_panels<Op, typename decltype(type)::type>(args, staged, *static_cast<Panel<Op>*>(panel),
                                                   first_panel, last_panel);
  });
}

}  // namespace
}  // namespace bnb::cpu::BNB_ISA
