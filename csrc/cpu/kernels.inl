// Every CPU kernel, compiled once per instruction set: the including file defines BNB_ISA and
// includes the vector interface of that name (simd/). No header with inline functions of the
// standard library may be included here: a copy compiled for AVX-512 could become the one that the
// linker keeps for all.
// SPDX-License-Identifier: MIT

#include <cstdint>

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/code/dynamic8.h"
#include "bitsandbytes/optim/step.h"
#include "cpu/isa/isa.h"
#include "cpu/tables.h"

namespace bnb::cpu::BNB_ISA {
namespace {

constexpr int64_t kLanes = kWidth;

// ---- Partial vectors: the last, incomplete one of a run ----------------------------------------

template <class T>
BNB_HD Float load_first(const T* p, int64_t count) {
  T lanes[kWidth] = {};
  __builtin_memcpy(lanes, p, static_cast<size_t>(count) * sizeof(T));
  return load(lanes);
}

template <class T>
BNB_HD void store_first(T* p, Float x, int64_t count) {
  T lanes[kWidth];
  store(lanes, x);
  __builtin_memcpy(p, lanes, static_cast<size_t>(count) * sizeof(T));
}

BNB_HD void store_codes_first(uint8_t* p, Int x, int64_t count) {
  uint8_t lanes[kWidth];
  store_codes(lanes, x);
  __builtin_memcpy(p, lanes, static_cast<size_t>(count));
}

// Calls body(offset, lanes) for every vector of [first, last); only the last may be incomplete.
template <class Body>
BNB_HD void for_each_vector(int64_t first, int64_t last, Body body) {
  int64_t i = first;
  for (; i + kLanes <= last; i += kLanes) body(i, kLanes);
  if (i < last) body(i, last - i);
}

template <class T>
BNB_HD Float load_some(const T* p, int64_t count) {
  return count == kLanes ? load(p) : load_first(p, count);
}
template <class T>
BNB_HD void store_some(T* p, Float x, int64_t count) {
  count == kLanes ? store(p, x) : store_first(p, x, count);
}
BNB_HD void store_codes_some(uint8_t* p, Int x, int64_t count) {
  count == kLanes ? store_codes(p, x) : store_codes_first(p, x, count);
}

BNB_HD bool all_of_first(Mask m, int64_t count) {
  float lanes[kWidth];
  store(lanes, select(m, Float(1.0f), Float(0.0f)));
  for (int64_t i = 0; i < count; ++i) {
    if (lanes[i] == 0.0f) return false;
  }
  return true;
}

// ---- Absolute maximum --------------------------------------------------------------------------

BNB_HD Int magnitude_bits(Float x) { return bits(x) & broadcast_int(0x7fffffff); }

BNB_HD float reduce_absmax(Int most) {
  return absmax_from_bits(static_cast<uint32_t>(reduce_max(most)));
}

template <class T>
BNB_HD float absmax(const T* a, int64_t n) {
  Int most = broadcast_int(0);
  for_each_vector(0, n, [&](int64_t i, int64_t count) {
    most = max(most, magnitude_bits(load_some(a + i, count)));
  });
  return reduce_absmax(most);
}

// ---- Encode of the dynamic maps (code/dynamic8.h on vectors)
// -------------------------------------

// The dynamic maps as the loops below see them: by one access to the bucket table, or by decades.
struct SignedMap {
  const uint32_t* buckets;
  bool keep_sign;

  explicit SignedMap(bool keep)
      : buckets((keep ? kSignKeepingBuckets : kSignedBuckets).values), keep_sign(keep) {}

  BNB_HD Int by_buckets(Float x) const {
    using Layout = SignedDynamic8::Layout;
    const Int above = magnitude_bits(x) - broadcast_int(Layout::kOrigin);
    const Int u = max(above, broadcast_int(0)) ^ shift_right_signed<31>(bits(x));
    const Int entry =
        gather(buckets + SignedDynamic8::kCenter, shift_right_signed<Layout::kShift>(u));
    return shift_right<Layout::kShift>(entry + u);
  }

  static const detail::DecadeTables& decades() { return kSignedDecades; }
  static BNB_HD Int usable_bits(Float x) { return magnitude_bits(x); }

  // Code from the index of the level among the positive ones.
  BNB_HD Int from_index(Int index, Float x) const {
    const Int least = max(index, broadcast_int(keep_sign ? 1 : 0));
    const Int negative =
        broadcast_int(SignedDynamic8::kZero) - min(least, broadcast_int(SignedDynamic8::kZero));
    return select(is_negative(x), negative, index + broadcast_int(SignedDynamic8::kZero));
  }
};

struct UnsignedMap {
  BNB_HD Int by_buckets(Float x) const {
    using Layout = UnsignedDynamic8::Layout;
    const Int u = max(bits(x), broadcast_int(Layout::kOrigin));
    const Int bucket = shift_right<Layout::kShift>(u) - broadcast_int(UnsignedDynamic8::kFirst);
    return shift_right<Layout::kShift>(gather(kUnsignedBuckets.values, bucket) + u);
  }

  static const detail::DecadeTables& decades() { return kUnsignedDecades; }
  static BNB_HD Int usable_bits(Float x) { return bits(x); }
  BNB_HD Int from_index(Int index, Float) const { return index; }
};

// Codes of finite x, |x| <= 1 (and rounding).
template <class Map>
BNB_HD Int encode(const Map& map, Float x) {
  if constexpr (kHasRegisterTables) {
    const detail::DecadeTables& t = Map::decades();
    // Negative floats are negative integers: an unsigned map takes them for zero.
    const Int b =
        max(Map::usable_bits(x), broadcast_int(static_cast<int32_t>(detail::kLeastExponent << 23)));
    const Float m = from_bits(b);
    const Int exponent = shift_right<23>(b);
    const Mask next = greater_equal(m, lookup32(t.next_region, exponent));
    const Int start = lookup32(t.region, exponent);
    const Int region = select(next, start + broadcast_int(1), start);
    const Float position = min(fma(m, lookup16(t.scale, region), lookup16(t.offset, region)),
                               lookup16(t.most, region));
    if (any(less(fraction(position), Float(detail::kUndecided)))) [[unlikely]] {
      return map.by_buckets(x);
    }
    return map.from_index(truncate_to_int(position), x);
  } else {
    return map.by_buckets(x);
  }
}

// Codes of a whole block whose absmax is known. `kKeepSign`: a negative value never becomes zero.
template <bool kKeepSign, class T>
BNB_HD void encode_block(const Code& code, const T* a, uint8_t* out, int64_t n, float absmax) {
  if (absmax == 0.0f) {
    // Every 0 / 0 is NaN. Common enough to be quick: rows of an embedding without gradients.
    __builtin_memset(out, 0, static_cast<size_t>(n));
    return;
  }
  const float inverse = 1.0f / absmax;
  if (code.kind == CodeKind::kTable || !is_regular_block(absmax, inverse)) {
    const auto threshold = [&code](int k) {
      return code_threshold(code.levels[k], code.levels[k + 1], k);
    };
    for (int64_t i = 0; i < n; ++i) {
      const float x = to_float(a[i]) * inverse;
      int c = search_code(threshold, x);
      if (kKeepSign && sign_bit(x) && c > 0 && !sign_bit(code.levels[c])) --c;
      out[i] = static_cast<uint8_t>(c);
    }
    return;
  }
  const Float scale(inverse);
  const auto encode_all = [&](const auto& map) {
    for_each_vector(0, n, [&](int64_t i, int64_t count) {
      store_codes_some(out + i, encode(map, load_some(a + i, count) * scale), count);
    });
  };
  code.kind == CodeKind::kSignedDynamic8 ? encode_all(SignedMap(kKeepSign))
                                         : encode_all(UnsignedMap());
}

// Levels of n codes.
BNB_HD void decode(const Code& code, const uint8_t* codes, float* out,  // [n]
                   int64_t n) {
  int64_t i = 0;
  for (; i + kDecodeRun <= n; i += kDecodeRun) decode_run(code, codes + i, out + i);
  for (; i < n; ++i) out[i] = code.levels[codes[i]];
}

// ---- Blockwise quantization --------------------------------------------------------------------

template <class T>
void quantize_blocks(const QuantizeBlockwise& args, const Code& code, int64_t first_block,
                     int64_t last_block) {
  const T* a = static_cast<const T*>(args.a);
  for (int64_t b = first_block; b < last_block; ++b) {
    const int64_t begin = b * args.block_size;
    const int64_t rest = args.n - begin;
    const int64_t n = rest < args.block_size ? rest : args.block_size;
    const float most = absmax(a + begin, n);
    args.absmax[b] = most;
    encode_block<false>(code, a + begin, args.out + begin, n, most);
  }
}

template <class T>
void dequantize_range(const DequantizeBlockwise& args, const Code& code, int64_t first,
                      int64_t last) {
  constexpr int64_t kRun = 512;  // levels between the lookup and the multiplication
  T* out = static_cast<T*>(args.out);
  alignas(64) float levels[kRun];
  int64_t i = first;
  while (i < last) {
    const int64_t block = i / args.block_size;
    const int64_t block_end = (block + 1) * args.block_size;
    const int64_t end = block_end < last ? block_end : last;
    const Float scale(args.absmax[block]);
    for (; i < end; i += kRun) {
      const int64_t n = end - i < kRun ? end - i : kRun;
      decode(code, args.a + i, levels, n);
      for_each_vector(0, n, [&](int64_t j, int64_t count) {
        store_some(out + i + j, load_some(levels + j, count) * scale, count);
      });
    }
    i = end;
  }
}

// ---- LLM.int8() --------------------------------------------------------------------------------

template <class T>
void row_stats(const Int8VectorwiseQuant& args, int64_t first_row, int64_t last_row) {
  const float threshold = args.threshold > 0.0f ? args.threshold : kInfinity;
  for (int64_t r = first_row; r < last_row; ++r) {
    const T* row = static_cast<const T*>(args.a) + r * args.cols;
    Int most = broadcast_int(0);
    for_each_vector(0, args.cols, [&](int64_t i, int64_t count) {
      const Float x = load_some(row + i, count);
      Int m = magnitude_bits(x);
      if (args.outlier_mask != nullptr) {
        const Mask outlier = greater_equal(from_bits(m), Float(threshold));
        if (any(outlier)) {
          float lanes[kWidth];
          store(lanes, from_bits(m));
          for (int64_t j = 0; j < count; ++j) {
            // Rows write concurrently, all the same value.
            if (lanes[j] >= threshold) {
              __atomic_store_n(args.outlier_mask + i + j, uint8_t{1}, __ATOMIC_RELAXED);
            }
          }
          m = select(outlier, broadcast_int(0), m);
        }
      }
      most = max(most, m);
    });
    args.row_stats[r] = reduce_absmax(most);
  }
}

template <class T>
void quantize_rows(const Int8VectorwiseQuant& args, int64_t first_row, int64_t last_row) {
  for (int64_t r = first_row; r < last_row; ++r) {
    const T* row = static_cast<const T*>(args.a) + r * args.cols;
    uint8_t* out = reinterpret_cast<uint8_t*>(args.out) + r * args.cols;
    const float stat = args.row_stats[r];
    // A row of zeros, or one whose statistic says that it is not finite, has codes of zero.
    const float inverse = kInt8Max / stat;
    const bool regular = stat > 0.0f && inverse > 0.0f && inverse <= kFloatMax;
    if (!regular) {
      __builtin_memset(out, 0, static_cast<size_t>(args.cols));
      continue;
    }
    const Float scale(inverse);
    const Float limit(kInt8Max);
    for_each_vector(0, args.cols, [&](int64_t i, int64_t count) {
      // Outliers are clamped here; their columns are zeroed below.
      const Float x = load_some(row + i, count) * scale;
      store_codes_some(out + i, round_to_int(min(max(x, Float(-kInt8Max)), limit)), count);
    });
    if (args.outlier_mask != nullptr) {
      for (int64_t i = 0; i < args.cols; ++i) {
        if (args.outlier_mask[i] != 0) out[i] = 0;
      }
    }
  }
}

// A tile of kTileRows x kTileCols dot products, so that a loaded vector serves several of them.
constexpr int kTileRows = 4;
constexpr int kTileCols = 2;

template <int kRows, int kCols>
BNB_HD void dot_tile(const Int8Matmul& args, int64_t row, int64_t col) {
  Dot acc[kRows][kCols];
  int64_t k = 0;
  for (; k + kDotWidth <= args.k; k += kDotWidth) {
    Bytes b[kCols];
    for (int j = 0; j < kCols; ++j) b[j] = load_bytes(args.b + (col + j) * args.k + k);
    for (int i = 0; i < kRows; ++i) {
      const Bytes a = load_bytes(args.a + (row + i) * args.k + k);
      for (int j = 0; j < kCols; ++j) acc[i][j] = multiply_add(acc[i][j], a, b[j]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kCols; ++j) {
      int32_t sum = reduce_add(acc[i][j]);
      for (int64_t t = k; t < args.k; ++t) {
        sum += int32_t{args.a[(row + i) * args.k + t]} * args.b[(col + j) * args.k + t];
      }
      args.out[(row + i) * args.n + col + j] = sum;
    }
  }
}

template <int kCols>
BNB_HD void dot_columns(const Int8Matmul& args, int64_t col) {
  int64_t row = 0;
  for (; row + kTileRows <= args.m; row += kTileRows) dot_tile<kTileRows, kCols>(args, row, col);
  for (; row < args.m; ++row) dot_tile<1, kCols>(args, row, col);
}

void int8_linear_matmul(const Int8Matmul& args, int64_t first_col, int64_t last_col) {
  int64_t col = first_col;
  for (; col + kTileCols <= last_col; col += kTileCols) dot_columns<kTileCols>(args, col);
  for (; col < last_col; ++col) dot_columns<1>(args, col);
}

BNB_HD Float load_as_float(DType dtype, const void* p, int64_t i, int64_t count) {
  switch (dtype) {
    case DType::kFloat16:
      return load_some(static_cast<const Half*>(p) + i, count);
    case DType::kBFloat16:
      return load_some(static_cast<const BFloat16*>(p) + i, count);
    default:
      return load_some(static_cast<const float*>(p) + i, count);
  }
}

BNB_HD Float load_int_as_float(const int32_t* p, int64_t count) {
  if (count == kLanes) return int_to_float(load_ints(p));
  int32_t lanes[kWidth] = {};
  __builtin_memcpy(lanes, p, static_cast<size_t>(count) * sizeof(int32_t));
  return int_to_float(load_ints(lanes));
}

template <class T>
void mm_dequant_rows(const Int8MmDequant& args, int64_t first_row, int64_t last_row) {
  for (int64_t r = first_row; r < last_row; ++r) {
    const int32_t* row = args.a + r * args.cols;
    T* out = static_cast<T*>(args.out) + r * args.cols;
    const Float row_scale(args.row_stats[r] * kInt8Product);
    for_each_vector(0, args.cols, [&](int64_t i, int64_t count) {
      const Float scale = load_some(args.col_stats + i, count) * row_scale;
      const Float product = load_int_as_float(row + i, count);
      const Float bias =
          args.bias != nullptr ? load_as_float(args.bias_dtype, args.bias, i, count) : Float(0.0f);
      store_some(out + i, fma(product, scale, bias), count);
    });
  }
}

// ---- Optimizers --------------------------------------------------------------------------------

template <class R, class T>
void step_32bit(const OptimizerStep& args, const OptimizerTensor& tensor, int64_t first,
                int64_t last) {
  const Step<R> step = Step<R>::make(args.hyper, *args.step + 1, args.lr);
  T* param = static_cast<T*>(tensor.param);
  const T* grad = static_cast<const T*>(tensor.grad);
  float* state[2] = {static_cast<float*>(tensor.state[0]), static_cast<float*>(tensor.state[1])};
  for_each_vector(first, last, [&](int64_t i, int64_t count) {
    const Float g = load_some(grad + i, count) * Float(step.gnorm_scale);
    const Float p = load_some(param + i, count);
    Float s[R::kStates];
    Float old[R::kStates];
    for (int k = 0; k < R::kStates; ++k) old[k] = s[k] = load_some(state[k] + i, count);
    Float updated = step.advance(g, p, s);
    if (step.skip_zeros) {
      const Mask skip = equal(g, Float(0.0f));
      updated = select(skip, p, updated);
      for (int k = 0; k < R::kStates; ++k) s[k] = select(skip, old[k], s[k]);
    }
    for (int k = 0; k < R::kStates; ++k) store_some(state[k] + i, s[k], count);
    store_some(param + i, updated, count);
  });
}

template <class R, class T>
void step_8bit_blockwise(const OptimizerStep& args, const OptimizerTensor& tensor,
                         const Code (&codes)[2], int64_t first_block, int64_t last_block) {
  const Step<R> step = Step<R>::make(args.hyper, *args.step + 1, args.lr);
  T* const param = static_cast<T*>(tensor.param);
  const T* const grad = static_cast<const T*>(tensor.grad);
  uint8_t* const state[2] = {static_cast<uint8_t*>(tensor.state[0]),
                             static_cast<uint8_t*>(tensor.state[1])};
  alignas(64) float buffer[R::kStates][kOptimizerBlock];  // old levels, then new states
  for (int64_t b = first_block; b < last_block; ++b) {
    const int64_t begin = b * kOptimizerBlock;
    const int64_t rest = tensor.n - begin;
    const int64_t n = rest < kOptimizerBlock ? rest : kOptimizerBlock;
    Int most[R::kStates];
    Float scale[R::kStates];
    for (int k = 0; k < R::kStates; ++k) {
      most[k] = broadcast_int(0);
      scale[k] = Float(tensor.absmax[k][b]);
      decode(codes[k], state[k] + begin, buffer[k], n);
    }
    bool idle = step.skip_zeros;  // every element is skipped
    for_each_vector(0, n, [&](int64_t i, int64_t count) {
      const Float g = load_some(grad + begin + i, count) * Float(step.gnorm_scale);
      const Float p = load_some(param + begin + i, count);
      Float s[R::kStates];
      Float old[R::kStates];
      for (int k = 0; k < R::kStates; ++k) {
        old[k] = s[k] = load_some(buffer[k] + i, count) * scale[k];
      }
      Float updated = step.advance(g, p, s);
      // A gradient that is not finite has no use: its element loses the state and keeps the
      // parameter.
      const Mask finite = less(magnitude_bits(g), broadcast_int(0x7f800000));
      updated = select(finite, updated, p);
      for (int k = 0; k < R::kStates; ++k) s[k] = select(finite, s[k], Float(0.0f));
      if (step.skip_zeros) {
        const Mask skip = equal(g, Float(0.0f));
        idle = idle && all_of_first(skip, count);
        updated = select(skip, p, updated);
        for (int k = 0; k < R::kStates; ++k) s[k] = select(skip, old[k], s[k]);
      }
      store_some(param + begin + i, updated, count);
      for (int k = 0; k < R::kStates; ++k) {
        store_some(buffer[k] + i, s[k], count);
        // Lanes past the end hold the update of zeros: zeros, which no maximum notices.
        most[k] = max(most[k], magnitude_bits(s[k]));
      }
    });
    // Codes that mean the same numbers again would still lose a little each time.
    if (idle) continue;
    for (int k = 0; k < R::kStates; ++k) {
      float absmax = reduce_absmax(most[k]);
      if (!is_finite(absmax)) {
        absmax = 0.0f;
        for (int64_t i = 0; i < n; ++i) {
          buffer[k][i] = finite_state(buffer[k][i]);
          absmax = absmax_of(absmax, buffer[k][i]);
        }
      }
      tensor.absmax[k][b] = absmax;
      encode_block<true>(codes[k], buffer[k], state[k] + begin, n, absmax);
    }
  }
}

// ---- Run-time types to templates ---------------------------------------------------------------

#define BNB_BY_DTYPE(dtype, function, ...)    \
  switch (dtype) {                            \
    case DType::kFloat16:                     \
      return function<Half>(__VA_ARGS__);     \
    case DType::kBFloat16:                    \
      return function<BFloat16>(__VA_ARGS__); \
    default:                                  \
      return function<float>(__VA_ARGS__);    \
  }

void quantize_blockwise(const QuantizeBlockwise& args, const Code& code, int64_t first_block,
                        int64_t last_block) {
  BNB_BY_DTYPE(args.dtype, quantize_blocks, args, code, first_block, last_block)
}

void dequantize_blockwise(const DequantizeBlockwise& args, const Code& code, int64_t first,
                          int64_t last) {
  BNB_BY_DTYPE(args.dtype, dequantize_range, args, code, first, last)
}

void int8_row_stats(const Int8VectorwiseQuant& args, int64_t first_row, int64_t last_row) {
  BNB_BY_DTYPE(args.dtype, row_stats, args, first_row, last_row)
}

void int8_quantize_rows(const Int8VectorwiseQuant& args, int64_t first_row, int64_t last_row) {
  BNB_BY_DTYPE(args.dtype, quantize_rows, args, first_row, last_row)
}

void int8_mm_dequant(const Int8MmDequant& args, int64_t first_row, int64_t last_row) {
  BNB_BY_DTYPE(args.dtype, mm_dequant_rows, args, first_row, last_row)
}

template <class R>
void rule_32bit(const OptimizerStep& args, const OptimizerTensor& tensor, int64_t first,
                int64_t last) {
  switch (args.dtype) {
    case DType::kFloat16:
      return step_32bit<R, Half>(args, tensor, first, last);
    case DType::kBFloat16:
      return step_32bit<R, BFloat16>(args, tensor, first, last);
    default:
      return step_32bit<R, float>(args, tensor, first, last);
  }
}

template <class R>
void rule_8bit_blockwise(const OptimizerStep& args, const OptimizerTensor& tensor,
                         const Code (&codes)[2], int64_t first_block, int64_t last_block) {
  switch (args.dtype) {
    case DType::kFloat16:
      return step_8bit_blockwise<R, Half>(args, tensor, codes, first_block, last_block);
    case DType::kBFloat16:
      return step_8bit_blockwise<R, BFloat16>(args, tensor, codes, first_block, last_block);
    default:
      return step_8bit_blockwise<R, float>(args, tensor, codes, first_block, last_block);
  }
}

void optimizer_step_32bit(const OptimizerStep& args, const OptimizerTensor& tensor, int64_t first,
                          int64_t last) {
  switch (args.rule) {
#define BNB_CASE(rule) \
  case Rule::k##rule:  \
    return rule_32bit<rule>(args, tensor, first, last);
    BNB_OPTIMIZERS(BNB_CASE)
#undef BNB_CASE
    case Rule::kCount:
      return;
  }
}

void optimizer_step_8bit_blockwise(const OptimizerStep& args, const OptimizerTensor& tensor,
                                   const Code (&codes)[2], int64_t first_block,
                                   int64_t last_block) {
  switch (args.rule) {
#define BNB_CASE(rule) \
  case Rule::k##rule:  \
    return rule_8bit_blockwise<rule>(args, tensor, codes, first_block, last_block);
    BNB_OPTIMIZERS(BNB_CASE)
#undef BNB_CASE
    case Rule::kCount:
      return;
  }
}

#undef BNB_BY_DTYPE

#define BNB_QUOTE_(x) #x
#define BNB_QUOTE(x) BNB_QUOTE_(x)

constexpr Kernels kTable = {
    BNB_QUOTE(BNB_ISA), quantize_blockwise,   dequantize_blockwise,
    int8_row_stats,     int8_quantize_rows,   int8_linear_matmul,
    int8_mm_dequant,    optimizer_step_32bit, optimizer_step_8bit_blockwise,
};

#undef BNB_QUOTE
#undef BNB_QUOTE_

}  // namespace

const Kernels* kernel_table() { return &kTable; }

}  // namespace bnb::cpu::BNB_ISA
