// Levels of 4-bit codes as kernels take them, and tables that decode two codes at a time.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/kernels/gemm_4bit.h"
#include "gpu/device/vector_io.cuh"
#include "gpu/runtime/runtime.cuh"

namespace bnb::gpu {

// A kernel's argument: levels that the host knows come with the launch.
struct Levels4 {
  float values[kCode4Levels];
  const float* table;  // [16] in the device's memory, in place of `values`; or null

  explicit Levels4(const Weight4bit& weight)
      : values{}, table(weight.code == Code4::kCount ? weight.levels : nullptr) {
    if (weight.code == Code4::kCount) return;
    const Code4Table& levels = kCodes4[static_cast<int>(weight.code)].levels;
    for (int i = 0; i < kCode4Levels; ++i) values[i] = levels[i];
  }
  __device__ __forceinline__ float operator[](int code) const {
    return table != nullptr ? table[code] : values[code];
  }
};

// 16 bits do not hold every level, but they hold multiples of the levels better or worse. Where
// scales are applied to sums, which are then divided by the multiple, it is one's own choice: the
// one whose rounding errors are smallest, of those from 1 to 2 that 16 bits hold. Their root mean
// square relative to that of the levels, times 1000:
//
//                            nf4, bfloat16   nf4, float16   fp4
//     this multiple          0.71            0.065          0
//     the levels themselves  1.06            0.156          1.08, 0.135
//     dequantized weights    1.64            0.204          1.63, 0.204
template <class T>
constexpr float level_multiple(Code4 code) {
  switch (code) {
    case Code4::kNf4:
      return std::is_same_v<T, Half> ? 1.3662109375f : 1.1171875f;
    case Code4::kFp4:
      return 1.5f;  // twelfths become eighths
    default:
      return 1.0f;
  }
}

// The two weights of a byte of codes, the first in the lower half of a word.
template <class T>
__device__ __forceinline__ uint32_t pair_of_levels(const Levels4& levels, int byte,
                                                   float multiple) {
  const T first = narrow<T>(__fmul_rn(levels[byte >> 4], multiple));
  const T second = narrow<T>(__fmul_rn(levels[byte & 15], multiple));
  return first.bits | (static_cast<uint32_t>(second.bits) << 16);
}

}  // namespace bnb::gpu
