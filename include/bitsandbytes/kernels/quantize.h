// 8-bit blockwise quantization: arguments, and the launchers for GPU and CPU.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "bitsandbytes/kernels/common.h"

namespace bnb {

// The scales of quantization blocks: numbers, or 8-bit codes of numbers (double quantization,
// Dettmers et al. 2023, arXiv:2305.14314, section 3).
struct Scales {
  const float* absmax;  // [blocks]; of codes: [ceil(blocks / block_size)]

  // Null where absmax holds the scales themselves. Otherwise scale b is
  // code[codes[b]] * absmax[b / block_size] + offset, with both operations rounded.
  const uint8_t* codes = nullptr;  // [blocks]
  const float* code = nullptr;     // [256]
  const float* offset = nullptr;   // [1]
  int64_t block_size = 1;

  Scales(const float* numbers) : absmax(numbers) {}  // implicit: numbers are the usual case
  Scales(const float* absmax_of_codes, const uint8_t* scale_codes, const float* levels,
         const float* mean, int64_t codes_per_absmax)
      : absmax(absmax_of_codes),
        codes(scale_codes),
        code(levels),
        offset(mean),
        block_size(codes_per_absmax) {}
  bool nested() const { return codes != nullptr; }
};

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
  const uint8_t* a;   // [n]
  Scales scales;      // of ceil(n / block_size) blocks
  const float* code;  // [256]
  void* out;          // [n] of dtype
  int64_t n;
  int64_t block_size;  // any
};

namespace gpu {

// absmax[b] = max |a| over block b; out[i] = nearest code to a[i] * (1 / absmax[b]), or one of the
// two beside it.
void quantize_blockwise(const QuantizeBlockwise& args, Stream stream);

// out[i] = code[a[i]] * scale(i / block_size), rounded once to dtype.
void dequantize_blockwise(const DequantizeBlockwise& args, Stream stream);

}  // namespace gpu
}  // namespace bnb
