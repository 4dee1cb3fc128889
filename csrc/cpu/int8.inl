// LLM.int8() on the CPU: quantization of rows, and values of products.
// SPDX-License-Identifier: MIT
#pragma once

#include "cpu/vectors.inl"

namespace bnb::cpu::BNB_ISA {
namespace {

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

template <class T>
void dequantize_rows(const Int8VectorwiseDequant& args, int64_t first_row, int64_t last_row) {
  const Int sign = broadcast_int(0x80);
  for (int64_t r = first_row; r < last_row; ++r) {
    const uint8_t* row = reinterpret_cast<const uint8_t*>(args.a) + r * args.stride;
    T* out = static_cast<T*>(args.out) + r * args.cols;
    const Float stat(args.stats[r]);
    for_each_vector(0, args.cols, [&](int64_t i, int64_t count) {
      const Float code = int_to_float((load_codes_some(row + i, count) ^ sign) - sign);
      store_some(out + i, code * stat * Float(1.0f / kInt8Max), count);
    });
  }
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

}  // namespace
}  // namespace bnb::cpu::BNB_ISA
