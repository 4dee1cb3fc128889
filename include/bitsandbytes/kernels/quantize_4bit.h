// 4-bit blockwise quantization: arguments, and the launchers for the GPU.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "bitsandbytes/code/registry4.h"
#include "bitsandbytes/kernels/common.h"
#include "bitsandbytes/kernels/quantize.h"

namespace bnb {

// Two codes share a byte: that of element 2 j lies in the upper half of byte j, that of element
// 2 j + 1 in the lower one. A missing last element counts as 0.
struct Quantize4bit {
  DType dtype;
  Code4 code;
  const void* a;  // [n] of dtype
  uint8_t* out;   // [ceil(n / 2)]
  float* absmax;  // [ceil(n / block_size)]
  int64_t n;
  int64_t block_size;  // a power of two from 32 to 4096
};

struct Dequantize4bit {
  DType dtype;
  Code4 code;
  const uint8_t* a;  // [ceil(n / 2)]
  Scales scales;     // of ceil(n / block_size) blocks
  void* out;         // [n] of dtype
  int64_t n;
  int64_t block_size;  // a power of two from 32 to 4096
};

namespace gpu {

// absmax[b] = max |a| over block b; the code of element i is encode(a[i] * (1 / absmax[b])).
void quantize_4bit(const Quantize4bit& args, Stream stream);

// out[i] = level(code i) * scale(i / block_size), rounded once to dtype.
void dequantize_4bit(const Dequantize4bit& args, Stream stream);

}  // namespace gpu
}  // namespace bnb
