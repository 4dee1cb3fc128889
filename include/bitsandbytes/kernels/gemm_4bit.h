// Products with a 4-bit weight: arguments.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "bitsandbytes/code/registry4.h"
#include "bitsandbytes/config.h"
#include "bitsandbytes/kernels/common.h"
#include "bitsandbytes/kernels/quantize.h"

namespace bnb {

// A matrix [n, k] of 4-bit codes, packed as quantize_4bit packs them. Its blocks run over the
// flattened matrix, so a block may end in another row than it begins in. It may be some rows of a
// higher one: then codes and scales are those of the whole, and `first_row` is not 0.
struct Weight4bit {
  const uint8_t* codes;  // [ceil(n k / 2)]
  Scales scales;         // of ceil(n k / block_size) blocks
  Code4 code;            // names the levels; kCount: they have no name
  const float* levels;   // [16] by code; a GPU reads them where they have no name
  int64_t n;
  int64_t k;
  int64_t block_size;  // a power of two from 32 to 4096
  int64_t first_row = 0;

  // Where a row begins among the elements that `codes` holds.
  BNB_HD int64_t begin_of(int64_t row) const { return (first_row + row) * k; }
};

// out = a w^T + bias, where w is level * scale: rounded to dtype on a CPU, closer to the product on
// a GPU. Sums are made in float and rounded once.
struct Gemm4bit {
  DType dtype;
  const void* a;  // [m, k] of dtype
  Weight4bit weight;
  const void* bias;  // [n] of dtype, or null
  void* out;         // [m, n] of dtype
  int64_t m;
};

// out = grad w, for the backward pass; rounding as above, or of w to dtype.
struct Gemm4bitDgrad {
  DType dtype;
  const void* grad;  // [m, n] of dtype
  Weight4bit weight;
  void* out;  // [m, k] of dtype
  int64_t m;
};

namespace gpu {

// The products of a GPU, with whole matrices (first_row 0). `workspace` has the bytes that
// *_workspace_bytes() names, and holds nothing before or after.
// *_is_fast(): whether the product beats that of the vendor's library on a dequantized weight.
bool gemm_4bit_is_fast(const Gemm4bit& args);
int64_t gemm_4bit_workspace_bytes(const Gemm4bit& args);
void gemm_4bit(const Gemm4bit& args, void* workspace, Stream stream);

bool gemm_4bit_dgrad_is_fast(const Gemm4bitDgrad& args);
int64_t gemm_4bit_dgrad_workspace_bytes(const Gemm4bitDgrad& args);
void gemm_4bit_dgrad(const Gemm4bitDgrad& args, void* workspace, Stream stream);

}  // namespace gpu
}  // namespace bnb
