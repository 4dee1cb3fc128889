// Outlier columns as 16-bit terms, which tensor cores multiply exactly.
// SPDX-License-Identifier: MIT
//
// Terms come in slabs of 64, which are a stage of the product. A weight is its code. A float is the
// sum of three bfloat16, so that it takes three terms, and its weight as often.
#pragma once

#include <type_traits>

#include "gpu/device/vector_io.cuh"

namespace bnb::gpu {

template <class T>
struct OutlierTerms {
  using Term = std::conditional_t<std::is_same_v<T, float>, BFloat16, T>;
  static constexpr int kParts = std::is_same_v<T, float> ? 3 : 1;  // of a column
  static constexpr int kSlab = 64;                                 // terms
  static constexpr int kColumns = kSlab / kParts;                  // of a slab
  static constexpr int kStep = 16;  // terms that are multiplied at a time

  // Steps of the slab that begins with these columns, of which it may not hold all.
  __device__ __forceinline__ static int steps(int columns) {
    return (min(columns, kColumns) * kParts + kStep - 1) / kStep;
  }

  __device__ __forceinline__ static Term of_code(int8_t code) {
    return narrow<Term>(static_cast<float>(code));
  }

  // Part 0, 1 or 2 of a number that is their sum, eight significant bits each.
  __device__ __forceinline__ static Term of_value(T value, int part) {
    if constexpr (kParts == 1) {
      return value;
    } else {
      const auto leading = [](float y) { return bits_float(float_bits(y) & 0xffff0000u); };
      float x = value;
      if (!(fabsf(x) <= kFloatMax)) return part == 0 ? narrow<Term>(x) : Term{0};
      for (int i = 0; i < part; ++i) x = __fsub_rn(x, leading(x));
      return {static_cast<uint16_t>(float_bits(x) >> 16)};
    }
  }
};

}  // namespace bnb::gpu
