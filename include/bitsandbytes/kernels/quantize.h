// 8-bit blockwise quantization: arguments, and the launchers for GPU and CPU.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "bitsandbytes/kernels/common.h"

namespace bnb {

struct QuantizeBlockwise {
  DType dtype;
  const void* a;      // [n] of dtype
  const float* code;  // [256], ascending
  uint8_t* out;       // [n]
  float* absmax;      // [ceil(n / block_size)]
  int64_t n;
  int64_t block_size;  // GPU: a power of two from 32 to 4096; CPU: any
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

// absmax[b] = max |a| over block b; out[i] = nearest code to a[i] * (1 / absmax[b]).
void quantize_blockwise(const QuantizeBlockwise& args, Stream stream);

// out[i] = code[a[i]] * absmax[i / block_size], rounded once to dtype.
void dequantize_blockwise(const DequantizeBlockwise& args, Stream stream);

}  // namespace gpu
}  // namespace bnb
