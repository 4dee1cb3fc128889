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
  float threshold;                // |a| >= threshold > 0 is an outlier; 0: no outliers
  void* outlier_terms = nullptr;  // [rows, 64], of 16 bits: the first outlier columns as the
                                  // product takes them; null if it does not ask for them
};

struct Int8VectorwiseDequant {
  DType dtype;
  const int8_t* a;  // [rows, cols], rows of which begin `stride` apart
  int64_t stride;
  const float* stats;  // [rows]
  void* out;           // [rows, cols] of dtype
  int64_t rows;
  int64_t cols;
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
  const void* outlier_terms = nullptr;  // of Int8VectorwiseQuant, if asked for there
  // Whether the kernels before this one in its stream are those that made `a`, and nothing that
  // this one reads beside what they wrote.
  bool follows_quantization = false;
};

// The gradient of the layer's input: out = grad (codes * stats / 127), with the weight rounded to
// dtype.
struct Int8LinearDgrad {
  DType dtype;
  const void* grad;     // [m, n] of dtype
  const int8_t* codes;  // [n, k]
  const float* stats;   // [n]
  void* out;            // [m, k] of dtype
  int64_t m;
  int64_t n;
  int64_t k;
};

namespace gpu {

// row_stats[i] = max |a[i, :]| without outliers; out = round(a * (127 / row_stats)), zero in every
// column that holds an outlier.
void int8_vectorwise_quant(const Int8VectorwiseQuant& args, Stream stream);

// out = a * stats * f32(1 / 127), both products rounded, then the result to dtype.
void int8_vectorwise_dequant(const Int8VectorwiseDequant& args, Stream stream);

// What outlier_terms take, if a product asks for them, else 0.
int64_t int8_outlier_terms_bytes(int64_t m, int64_t n, int64_t k);

// Exact 32-bit integer product.
void int8_linear_matmul(const Int8Matmul& args, Stream stream);

// The layer in one kernel; whether that is faster, on the current device, than another library's
// integer product [m, n] and the second half of the layer; and that half.
void int8_scaled_matmul(const Int8ScaledMatmul& args, Stream stream);
bool int8_scaled_matmul_is_fast(const Int8ScaledMatmul& args);
void int8_scale_product(const Int8ScaledMatmul& args, const int32_t* product, Stream stream);

// out = a * row_stats * col_stats / 127^2 + bias, rounded once to dtype.
void int8_mm_dequant(const Int8MmDequant& args, Stream stream);

// Whether there is a kernel for these arguments on the current device; the memory that it works in;
// and that kernel.
bool int8_linear_dgrad_is_fast(const Int8LinearDgrad& args);
int64_t int8_linear_dgrad_workspace_bytes(const Int8LinearDgrad& args);
void int8_linear_dgrad(const Int8LinearDgrad& args, void* workspace, Stream stream);

}  // namespace gpu
}  // namespace bnb
