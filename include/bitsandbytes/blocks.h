// Arithmetic of quantization blocks: consecutive elements of the flattened tensor.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "bitsandbytes/config.h"

namespace bnb {

// Block size of 8-bit optimizer states; fixed by the checkpoint format.
inline constexpr int kOptimizerBlock = 256;

// Blocks of 4-bit codes, and of every kernel on a GPU, have powers of two of elements.
inline constexpr int kLeastBlock = 32;
inline constexpr int kLargestBlock = 4096;

BNB_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The logarithm of a power of two, -1 for any other number.
BNB_HD constexpr int log2_of(int64_t x) {
  if (x <= 0 || (x & (x - 1)) != 0) return -1;
  int log2 = 0;
  while (x >> log2 != 1) ++log2;
  return log2;
}

}  // namespace bnb
