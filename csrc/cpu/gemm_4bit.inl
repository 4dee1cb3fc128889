// Products with a 4-bit weight on the CPU.
// SPDX-License-Identifier: MIT
//
// out[i, j] = sum over k of a[i, k] w[j, k]: dot products along k. A word of codes holds
// neighbouring weights, but lookups give them to different vectors: a *group* of weights comes in
// the order of those vectors. So that nothing has to be woven together, the other operand is
// *staged* once: converted, with each group in the same order, and the rows of a tile side by side.
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

#include "bitsandbytes/kernels/gemm_4bit.h"
#include "cpu/quantize_4bit.inl"
#include "cpu/tiles.inl"
#include "cpu/types.inl"

namespace bnb::cpu::BNB_ISA {
namespace {

// Bytes of a row along k in a chunk. Where a vector is one number, chunks are short, so that few
// products follow each other in a sum.
constexpr int64_t kChunkBytes = kWidth == 1 ? 512 : 4096;

// Products of floats. T is what weights are rounded to.
template <class T>
struct FloatOperand {
  using Element = float;
  using Vector = Float;
  using Sum = Float;
  using Result = float;
  static constexpr int kVector = kWidth;
  static constexpr int kParts = 2;  // vectors of a group
  static constexpr int kTileHeight = kWidth == 16 ? 6 : 2;
  static constexpr int kLookupHeight = kWidth == 16 ? 4 : 2;

  // Where in its group an element of a vector belongs.
  static constexpr int place_of(int part, int lane) { return 2 * lane + part; }

  // A table serves a span of kSpan elements, of which kAlign share a scale.
  static constexpr int kSpan = kLeastBlock;
  static constexpr int kAlign = kLeastBlock;
  template <bool kSmallBlocks>
  struct Table {
    Float parts[kCode4Levels / kWidth];

    template <class ScaleAt>
    BNB_HD Table(const float* levels, const ScaleAt& scale_at) {
      const Float scale(scale_at(0));
      for (int i = 0; i < kCode4Levels / kWidth; ++i) {
        parts[i] = round_to(load(levels + i * kWidth) * scale, T{});
      }
    }
    template <int kPart>
    BNB_HD Vector lookup(Int codes) const {
      return lookup_code(parts, shift_right<kPart == 0 ? 4 : 0>(codes));
    }
  };

  static BNB_HD Int load_group(const uint8_t* codes) { return load_codes(codes); }

  static BNB_HD Vector load_vector(const Element* p) { return load(p); }
  static BNB_HD void store_vector(Element* p, Vector x) { store(p, x); }
  static BNB_HD Float add_products(Float sum, Vector a, Vector b) {
    return multiply_add(a, b, sum);
  }
  static BNB_HD Element element(T x) { return to_float(x); }

  // For sums over rows of the weight: how many make one product, how their parts are woven, and
  // where in its group a woven element belongs.
  static constexpr int kDepth = 1;
  static BNB_HD void weave(const Element* const (&rows)[kDepth], Element* out) {
    store_vector(out, load_vector(rows[0]));
  }
  static constexpr int woven_place_of(int i) { return place_of(i / kVector, i % kVector); }
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
constexpr int64_t kGroup = Op::kParts * Op::kVector;  // elements that one lookup gives
template <class Op>
constexpr int64_t kChunk = kChunkBytes / int64_t{sizeof(typename Op::Element)};

template <class Op>
constexpr int64_t staged_length(int64_t k) {
  return ceil_div(k, kGroup<Op>) * kGroup<Op>;
}

// Puts `count` elements into the order of groups; zeros fill up the last one. Vectors lie `stride`
// vectors apart.
template <class Op, class T>
void stage(const T* from, int64_t count, typename Op::Element* to, int64_t stride) {
  for (int64_t i = 0; i < count; i += kGroup<Op>) {
    for (int part = 0; part < Op::kParts; ++part) {
      typename Op::Element* vector = to + (i + part * Op::kVector) * stride;
      if (i + kGroup<Op> <= count) {
        for (int lane = 0; lane < Op::kVector; ++lane) {
          vector[lane] = Op::element(from[i + Op::place_of(part, lane)]);
        }
      } else {
        for (int lane = 0; lane < Op::kVector; ++lane) {
          const int64_t at = i + Op::place_of(part, lane);
          vector[lane] = at < count ? Op::element(from[at]) : typename Op::Element{};
        }
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

// kDotCols rows of a weight, each beginning where no scale serves elements on both sides.
struct CodeRows {
  const uint8_t* codes[kDotCols];  // at the beginning of the chunk
  const float* scales[kDotCols];   // of the block in which the chunk begins
  int64_t phase[kDotCols];         // elements of that block before the chunk
  const float* levels;
  int log2_block;
  int64_t ahead;  // bytes from a row's codes to those that the next tile needs
};

// Adds to sums [kRows, kDotCols] the products over a chunk of codes. With kKeep the weights are
// left in `panel` as well, in the order in which multiply_tile reads them.
template <class Op, int kRows, bool kKeep, bool kSmallBlocks>
[[gnu::noinline]] void lookup_tile(const CodeRows& w, int64_t count, const typename Op::Element* a,
                                   typename Op::Element* panel, float* out) {
  using Vector = typename Op::Vector;
  constexpr int64_t vector = Op::kVector;
  constexpr int kPair = 2;  // columns that share what is read of `a`
  Float sums[kRows][kDotCols];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kDotCols; ++j) sums[i][j] = Float(0.0f);
  }
  using Table = typename Op::template Table<kSmallBlocks>;
  // All of it must be inlined and unrolled: a loop over columns would index the sums, which would
  // then have to lie in memory.
  const auto multiply_span = [&](int64_t k, const auto& codes_of,
                                 const auto& scale_at) __attribute__((always_inline)) {
    for_each_constant<kDotCols / kPair>([&](auto pair) __attribute__((always_inline)) {
      constexpr int j = decltype(pair)::value * kPair;
      const Table tables[kPair] = {{w.levels, [&](int64_t i) { return scale_at(j, i); }},
                                   {w.levels, [&](int64_t i) { return scale_at(j + 1, i); }}};
      const uint8_t* const codes[kPair] = {codes_of(j), codes_of(j + 1)};
      for (int64_t g = 0; g < Op::kSpan; g += kGroup<Op>) {
        const auto first = Op::load_group(codes[0] + g / 2);
        const auto second = Op::load_group(codes[1] + g / 2);
        for_each_constant<Op::kParts>([&](auto part) __attribute__((always_inline)) {
          constexpr int p = decltype(part)::value;
          const Vector weights[kPair] = {tables[0].template lookup<p>(first),
                                         tables[1].template lookup<p>(second)};
          if constexpr (kKeep) {
            typename Op::Element* to = panel + (k + g + p * vector) * kDotCols + j * vector;
            for (int c = 0; c < kPair; ++c) Op::store_vector(to + c * vector, weights[c]);
          }
          for_each_constant<kRows>([&](auto row) __attribute__((always_inline)) {
            constexpr int i = decltype(row)::value;
            const Vector x = Op::load_vector(a + (k + g + p * vector) * kRows + i * vector);
            sums[i][j] = Op::add_products(sums[i][j], x, weights[0]);
            sums[i][j + 1] = Op::add_products(sums[i][j + 1], x, weights[1]);
          });
        });
      }
    });
  };
  const auto scale_of_block = [&](int j, int64_t i) {
    return w.scales[j][(w.phase[j] + i) >> w.log2_block];
  };
  const int64_t whole = count - count % Op::kSpan;
  for (int64_t k = 0; k < whole; k += Op::kSpan) {
    multiply_span(
        k,
        [&](int j) {
          const uint8_t* codes = w.codes[j] + k / 2;
          __builtin_prefetch(codes + w.ahead);
          return codes;
        },
        [&](int j, int64_t i) { return scale_of_block(j, k + i); });
  }
  if constexpr (Op::kSpan > Op::kAlign) {
    if (whole < count) {
      // A part of a span: nothing is read behind it, and the weights of its rest are zero.
      uint8_t part[kDotCols][Op::kSpan / 2] = {};
      for (int j = 0; j < kDotCols; ++j) {
        __builtin_memcpy(part[j], w.codes[j] + whole / 2, static_cast<size_t>(count - whole) / 2);
      }
      multiply_span(
          whole, [&](int j) { return part[j]; },
          [&](int j, int64_t i) {
            return whole + i < count ? scale_of_block(j, whole + i) : 0.0f;
          });
    }
  }
  add_sums(sums, out);
}

// ---- Panels -------------------------------------------------------------------------------------

template <class Op>
struct Panel {
  alignas(64) float sums[kRowBlock * kGemmPanel];
  float scales[kDotCols][kChunk<Op> / kLeastBlock + 1];
  alignas(64) typename Op::Element weights[kGemmPanel * kChunk<Op>];
};

BNB_HD int log2_of_block(const Weight4bit& w) {
  return __builtin_ctzll(static_cast<uint64_t>(w.block_size));
}

// True where every row of the weight begins where scales and lookups may begin.
template <class Op>
bool is_aligned(const Weight4bit& w) {
  return w.k % Op::kAlign == 0;
}

// The scales of `count` blocks, as numbers.
inline const float* scales_from(const Scales& scales, int64_t first, int64_t count, float* space) {
  if (!scales.nested()) return scales.absmax + first;
  int64_t i = 0;
  while (i < count) {
    const int64_t outer = (first + i) / scales.block_size;
    const int64_t outer_end = (outer + 1) * scales.block_size - first;
    const int64_t end = outer_end < count ? outer_end : count;
    const Float absmax(scales.absmax[outer]);
    const Float offset(*scales.offset);
    for (; i + kLanes <= end; i += kLanes) {
      const Float level = gather(scales.code, load_codes(scales.codes + first + i));
      store(space + i, level * absmax + offset);
    }
    for (; i < end; ++i) space[i] = scale_of(scales, first + i);
  }
  return space;
}

template <class Op, bool kSmallBlocks>
void unpack_aligned(const Weight4bit& w, int64_t begin, int64_t count, typename Op::Element* out) {
  const int log2_block = log2_of_block(w);
  for (int64_t i = 0; i < count; i += Op::kSpan) {
    const auto scale_at = [&](int64_t at) {
      const bool there = Op::kSpan == Op::kAlign || i + at < count;
      return there ? scale_of(w.scales, (begin + i + at) >> log2_block) : 0.0f;
    };
    const typename Op::template Table<kSmallBlocks> table(w.levels, scale_at);
    const uint8_t* codes = w.codes + (begin + i) / 2;
    uint8_t part[Op::kSpan / 2] = {};
    if (Op::kSpan > Op::kAlign && count - i < Op::kSpan) {
      __builtin_memcpy(part, codes, static_cast<size_t>(count - i) / 2);
      codes = part;
    }
    for (int64_t g = 0; g < Op::kSpan; g += kGroup<Op>) {
      const auto group = Op::load_group(codes + g / 2);
      for_each_constant<Op::kParts>([&](auto part) {
        constexpr int p = decltype(part)::value;
        Op::store_vector(out + i + g + p * Op::kVector, table.template lookup<p>(group));
      });
    }
  }
}

// Elements [begin, begin + count) of the flattened weight, in groups from `begin` on; zeros fill up
// the last group. At most kChunk of them.
template <class Op, class T>
void unpack(const Weight4bit& w, int64_t begin, int64_t count, typename Op::Element* out) {
  if (begin % Op::kAlign == 0 && count % Op::kAlign == 0) {
    return w.block_size < Op::kAlign ? unpack_aligned<Op, true>(w, begin, count, out)
                                     : unpack_aligned<Op, false>(w, begin, count, out);
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
  for (int64_t j = 0; j < cols; j += kDotCols) {
    CodeRows codes{};
    codes.levels = w.levels;
    codes.log2_block = log2_of_block(w);
    codes.ahead = kDotCols * w.k / 2;
    for (int i = 0; i < kDotCols; ++i) {
      const int64_t col = first_col + (j + i < cols ? j + i : cols - 1);
      const int64_t begin = w.begin_of(col) + first;
      codes.codes[i] = w.codes + begin / 2;
      codes.phase[i] = begin % w.block_size;
      codes.scales[i] =
          scales_from(w.scales, begin / w.block_size,
                      ceil_div(codes.phase[i] + count, w.block_size), panel.scales[i]);
    }
    typename Op::Element* weights = panel.weights + j * staged_length<Op>(count);
    if (w.block_size < Op::kAlign) {
      lookup_tile<Op, kRows, kKeep, true>(codes, count, a, weights, panel.sums + j);
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
    unpack<Op, T>(w, w.begin_of(first_col + j) + first, count, unpacked);
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
    multiply_tiles<Op>(panel.weights, length, cols, a, stride, first, row, rows, panel.sums);
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
