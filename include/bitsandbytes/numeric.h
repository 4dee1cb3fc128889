// 16-bit floating-point storage types and their exact conversions, without torch or CUDA headers.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <limits>

#include "bitsandbytes/config.h"

namespace bnb {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kSmallestNormal = std::numeric_limits<float>::min();
inline constexpr float kFloatMax = std::numeric_limits<float>::max();

BNB_HD constexpr uint32_t float_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
BNB_HD constexpr float bits_float(uint32_t x) { return __builtin_bit_cast(float, x); }

BNB_HD constexpr bool sign_bit(float x) { return (float_bits(x) >> 31) != 0; }
BNB_HD constexpr bool is_nan(float x) { return (float_bits(x) & 0x7fffffffu) > 0x7f800000u; }
BNB_HD constexpr bool is_finite(float x) { return (float_bits(x) & 0x7f800000u) != 0x7f800000u; }
BNB_HD constexpr float magnitude(float x) { return bits_float(float_bits(x) & 0x7fffffffu); }

// The next float above x, which is not infinity; NaN stays NaN whatever its payload. Used to build
// decision thresholds, never on a hot path.
BNB_HD constexpr float next_up(float x) {
  if (is_nan(x)) return x;
  const uint32_t bits = float_bits(x);
  if (bits == 0x80000000u || bits == 0) return bits_float(1);
  return bits_float(sign_bit(x) ? bits - 1 : bits + 1);
}

// Magnitudes compare as unsigned integers, with NaN above infinity: a maximum over these bits is an
// absmax in which NaN wins, whatever its payload.
BNB_HD constexpr uint32_t magnitude_bits(float x) { return float_bits(x) & 0x7fffffffu; }
BNB_HD constexpr float absmax_from_bits(uint32_t bits) {
  return bits > 0x7f800000u ? bits_float(0x7fc00000u) : bits_float(bits);
}

// max(a, |x|) in which NaN wins: a block that holds NaN must not look healthy.
BNB_HD constexpr float absmax_of(float a, float x) {
  const float m = magnitude(x);
  return (m > a || is_nan(m)) ? m : a;
}

BNB_HD constexpr float to_float(float x) { return x; }

BNB_HD constexpr float to_float(BFloat16 x) {
  return bits_float(static_cast<uint32_t>(x.bits) << 16);
}

BNB_HD constexpr float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // Scaling by 2^112 moves half's exponent bias to float's, subnormals included, without rounding.
  return bits_float(sign | float_bits(bits_float(rest << 13) * 0x1p112f));
}

template <class T>
BNB_HD constexpr T from_float(float x);

template <>
BNB_HD constexpr float from_float<float>(float x) {
  return x;
}

template <>
BNB_HD constexpr BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = float_bits(x);
  if (is_nan(x)) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// Stochastic rounding: up with the probability of the part that is cut off, which `random`, 16
// uniform bits, decides. Infinities and NaN as from_float.
BNB_HD constexpr BFloat16 from_float_stochastic(float x, uint32_t random) {
  if (is_nan(x)) return from_float<BFloat16>(x);
  return {static_cast<uint16_t>((float_bits(x) + random) >> 16)};
}

template <>
BNB_HD constexpr Half from_float<Half>(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (rest < 0x38800000u) {
    // Subnormal half: adding 0.5 aligns the last kept bit with float's last bit, which rounds once.
    const float shifted = bits_float(rest) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_bits(shifted) - float_bits(0.5f)))};
  }
  const uint32_t odd = (rest >> 13) & 1u;
  return {static_cast<uint16_t>(sign | ((rest + 0xc8000fffu + odd) >> 13))};
}

}  // namespace bnb
