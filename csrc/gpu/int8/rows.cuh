// What kernels that quantize rows have in common.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/kernels/int8.h"
#include "gpu/device/vector_io.cuh"

namespace bnb::gpu {

// Bits of the largest magnitude of a pack that is no outlier; calls mark(i) for every outlier.
template <class T, class Mark>
__device__ __forceinline__ uint32_t largest_below(const Words<T, kPackSize<T>>& words,
                                                  float threshold, const Mark& mark) {
  uint32_t most = largest_magnitude(words);
  // Also where a NaN may hide an outlier.
  if (bits_float(most) < threshold) return most;
  most = 0;
#pragma unroll
  for (int i = 0; i < kPackSize<T>; ++i) {
    const uint32_t m = magnitude_bits(words.get(i));
    if (bits_float(m) >= threshold) {
      mark(i);
    } else {
      most = max(most, m);
    }
  }
  return most;
}

// A row's statistic makes its codes.
struct RowScale {
  float inverse;
  // A row of zeros, or one whose statistic says that it is not finite, has codes of zero.
  bool regular;

  __device__ __forceinline__ explicit RowScale(float stat) {
    inverse = __fdiv_rn(kInt8Max, stat);
    regular = stat > 0.0f && inverse > 0.0f && inverse <= kFloatMax;
  }

  // The code of x, which is no more than the statistic, in the lowest byte. Adding a number whose
  // last place is 1 rounds to even, and leaves an integer in two's complement.
  __device__ __forceinline__ uint32_t code(float x) const {
    constexpr float kRound = 0x1.8p23f;
    return float_bits(__fadd_rn(__fmul_rn(x, inverse), kRound));
  }

  template <class T, int kPack>
  __device__ __forceinline__ Words<uint8_t, kPack> codes(const Words<T, kPack>& words) const {
    Words<uint8_t, kPack> codes;
#pragma unroll
    for (int w = 0; w < codes.kWords; ++w) {
      const uint32_t low = byte_permute(code(words.get(4 * w)), code(words.get(4 * w + 1)), 0x0040);
      const uint32_t high =
          byte_permute(code(words.get(4 * w + 2)), code(words.get(4 * w + 3)), 0x0040);
      codes.words[w] = regular ? byte_permute(low, high, 0x5410) : 0;
    }
    return codes;
  }
};

}  // namespace bnb::gpu
