// LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339): row-wise int8 quantization and products.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "bitsandbytes/kernels/common.h"

namespace bnb {

inline constexpr float kInt8Max = 127.0f;
// One product of two codes is worth row_stat * col_stat / 127^2.
inline constexpr float kInt8Product = 1.0f / (127.0f * 127.0f);

struct Int8VectorwiseQuant {
  DType dtype;
  const void* a;          // [rows, cols] of dtype
  int8_t* out;            // [rows, cols]
  float* row_stats;       // [rows]
  uint8_t* outlier_mask;  // [cols], 1 where the column holds an outlier, else 0; null when
                          // threshold is 0
  int32_t* outliers;      // [1 + cols], the same columns as a list: their number, then the columns
                          // ascending; the rest is not written. May be null
  int64_t rows;
  int64_t cols;
  float threshold;  // |a| >= threshold > 0 is an outlier; 0: no outliers
};

struct Int8Matmul {
  const int8_t* a;  // [m, k]
  const int8_t* b;  // [n, k]
  int32_t* out;     // [m, n] = a b^T
  int64_t m;
  int64_t n;
  int64_t k;
};

struct Int8MmDequant {
  DType dtype;
  DType bias_dtype;
  const int32_t* a;        // [rows, cols]
  const float* row_stats;  // [rows]
  const float* col_stats;  // [cols]
  const void* bias;        // [cols] of bias_dtype, or null
  void* out;               // [rows, cols] of dtype
  int64_t rows;
  int64_t cols;
};

// The linear layer: out = a b^T * row_stats * col_stats / 127^2 + bias, with a[:, outliers] zero,
// plus values[:, outliers] (b * col_stats / 127)[:, outliers]^T in floating point.
struct Int8ScaledMatmul {
  DType dtype;
  DType bias_dtype;
  const int8_t* a;          // [m, k]
  const int8_t* b;          // [n, k]
  const float* row_stats;   // [m]
  const float* col_stats;   // [n]
  const void* bias;         // [n] of bias_dtype, or null
  const void* values;       // [m, k] of dtype, what `a` stands for; null without outliers
  const int32_t* outliers;  // [1 + k], the list of the columns; null without outliers
  void* out;                // [m, n] of dtype
  int64_t m;
  int64_t n;
  int64_t k;
};

namespace gpu {

// row_stats[i] = max |a[i, :]| without outliers; out = round(a * (127 / row_stats)), zero in every
// column that holds an outlier.
void int8_vectorwise_quant(const Int8VectorwiseQuant& args, Stream stream);

// Exact 32-bit integer product.
void int8_linear_matmul(const Int8Matmul& args, Stream stream);

// The layer in one kernel; whether that is faster, on the current device, than another library's
// integer product [m, n] and the second half of the layer; and that half.
void int8_scaled_matmul(const Int8ScaledMatmul& args, Stream stream);
bool int8_scaled_matmul_is_fast(const Int8ScaledMatmul& args);
void int8_scale_product(const Int8ScaledMatmul& args, const int32_t* product, Stream stream);

// out = a * row_stats * col_stats / 127^2 + bias, rounded once to dtype.
void int8_mm_dequant(const Int8MmDequant& args, Stream stream);

}  // namespace gpu
}  // namespace bnb
