// 8-bit blockwise quantization: arguments, and the launchers for GPU and CPU.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "bitsandbytes/kernels/common.h"

namespace bnb {

struct QuantizeBlockwise {
  DType dtype;
  const void* a;      // [n] of dtype
  const float* code;  // [256]; NaN is a level that no element takes
  uint8_t* out;       // [n]
  float* absmax;      // [ceil(n / block_size)], or null: elements are encoded as they are
  int64_t n;
  int64_t block_size;  // GPU: a power of two from 32 to 4096; CPU: any
  // Stochastic rounding: element i takes random number (i + rand_offset) mod rand_size.
  const float* rand = nullptr;  // [rand_size], uniform in [0, 1); null: to the nearest
  int64_t rand_size = 0;
  int64_t rand_offset = 0;  // 0 to rand_size - 1
};

struct DequantizeBlockwise {
  DType dtype;
  const uint8_t* a;     // [n]
  const float* absmax;  // [ceil(n / block_size)]
  const float* code;    // [256]
  void* out;            // [n] of dtype
  int64_t n;
  int64_t block_size;  // any
};

namespace gpu {

// absmax[b] = max |a| over block b; out[i] = nearest code to a[i] * (1 / absmax[b]), or one of the
// two beside it.
void quantize_blockwise(const QuantizeBlockwise& args, Stream stream);

// out[i] = code[a[i]] * absmax[i / block_size], rounded once to dtype.
void dequantize_blockwise(const DequantizeBlockwise& args, Stream stream);

}  // namespace gpu
}  // namespace bnb
