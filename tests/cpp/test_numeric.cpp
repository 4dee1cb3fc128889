// Conversions of 16-bit formats, proven over all their values and rounding boundaries.
// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "bitsandbytes/numeric.h"

namespace bnb {
namespace {

// What the bits of a small float mean: sign, `kExponent` exponent bits, `kMantissa` mantissa bits.
template <class T>
struct Format;

template <>
struct Format<Half> {
  static constexpr int kExponent = 5;
  static constexpr int kMantissa = 10;
};

template <>
struct Format<BFloat16> {
  static constexpr int kExponent = 8;
  static constexpr int kMantissa = 7;
};

template <class T>
struct Expected : Format<T> {
  static constexpr int kExponent = Format<T>::kExponent;
  static constexpr int kMantissa = Format<T>::kMantissa;
  static constexpr uint16_t kInfinityBits = ((1u << kExponent) - 1) << kMantissa;

  // Value of non-negative bits; the bits of infinity give the number that would come next.
  static double magnitude(uint16_t bits) {
    const int bias = (1 << (kExponent - 1)) - 1;
    const int exponent = bits >> kMantissa;
    const int mantissa = bits & ((1 << kMantissa) - 1);
    if (exponent == 0) return std::ldexp(mantissa, 1 - bias - kMantissa);
    return std::ldexp(mantissa + (1 << kMantissa), exponent - bias - kMantissa);
  }
};

template <class T>
class Small : public testing::Test {};
using SmallFormats = testing::Types<Half, BFloat16>;
TYPED_TEST_SUITE(Small, SmallFormats);

TYPED_TEST(Small, EveryValueWidens) {
  using E = Expected<TypeParam>;
  for (uint32_t bits = 0; bits < 0x8000u; ++bits) {
    const float positive = to_float(TypeParam{static_cast<uint16_t>(bits)});
    const float negative = to_float(TypeParam{static_cast<uint16_t>(bits | 0x8000u)});
    if (bits > E::kInfinityBits) {
      ASSERT_TRUE(std::isnan(positive)) << bits;
      ASSERT_TRUE(std::isnan(negative)) << bits;
    } else {
      const double value = bits == E::kInfinityBits ? HUGE_VAL : E::magnitude(bits);
      ASSERT_EQ(static_cast<double>(positive), value) << bits;
      ASSERT_EQ(static_cast<double>(negative), -value) << bits;
    }
    ASSERT_FALSE(std::signbit(positive)) << bits;
    ASSERT_TRUE(std::signbit(negative)) << bits;
  }
}

TYPED_TEST(Small, EveryValueSurvivesTheRoundTrip) {
  using E = Expected<TypeParam>;
  for (uint32_t bits = 0; bits <= 0xffffu; ++bits) {
    const TypeParam there{static_cast<uint16_t>(bits)};
    const TypeParam back = from_float<TypeParam>(to_float(there));
    if ((bits & 0x7fffu) > E::kInfinityBits) {
      ASSERT_GT(back.bits & 0x7fffu, E::kInfinityBits) << bits;  // still NaN
      ASSERT_EQ(back.bits & 0x8000u, bits & 0x8000u) << bits;
    } else {
      ASSERT_EQ(back.bits, bits);
    }
  }
}

// Between two neighbours of the format, rounding changes at their midpoint and nowhere else. The
// midpoint itself is a float and takes the even neighbour.
TYPED_TEST(Small, EveryBoundaryRoundsToNearestEven) {
  using E = Expected<TypeParam>;
  for (uint32_t low = 0; low < E::kInfinityBits; ++low) {
    const uint32_t high = low + 1;
    const double exact = (E::magnitude(low) + E::magnitude(high)) / 2;
    const float middle = static_cast<float>(exact);
    if (std::isinf(middle)) continue;  // beyond the largest float: nothing rounds up to it
    ASSERT_EQ(static_cast<double>(middle), exact) << low;
    for (const uint32_t sign : {0u, 0x8000u}) {
      const float side = sign != 0 ? -1.0f : 1.0f;
      const uint32_t even = (low & 1u) == 0 ? low : high;
      ASSERT_EQ(from_float<TypeParam>(side * middle).bits, sign | even) << low;
      ASSERT_EQ(from_float<TypeParam>(side * std::nextafter(middle, 0.0f)).bits, sign | low);
      ASSERT_EQ(from_float<TypeParam>(side * std::nextafter(middle, HUGE_VALF)).bits, sign | high);
    }
  }
}

TYPED_TEST(Small, RoundingIsMonotonicOverAllFloats) {
  uint32_t before = 0;
  // A prime stride: every pattern of low bits occurs.
  for (uint32_t bits = 0; bits <= 0x7f800000u; bits += 251) {
    const uint32_t now = from_float<TypeParam>(bits_float(bits)).bits;
    ASSERT_LE(before, now) << bits;
    ASSERT_EQ(from_float<TypeParam>(bits_float(bits | 0x80000000u)).bits, now | 0x8000u) << bits;
    before = now;
  }
  EXPECT_EQ(from_float<TypeParam>(kInfinity).bits, Expected<TypeParam>::kInfinityBits);
  EXPECT_EQ(from_float<TypeParam>(kFloatMax).bits, Expected<TypeParam>::kInfinityBits);
}

TYPED_TEST(Small, NanStaysNan) {
  for (const uint32_t payload : {1u, 0x1fffu, 0x3fffffu, 0x400000u, 0x7fffffu}) {
    for (const uint32_t sign : {0u, 0x80000000u}) {
      const TypeParam x = from_float<TypeParam>(bits_float(sign | 0x7f800000u | payload));
      EXPECT_TRUE(std::isnan(to_float(x))) << payload;
      EXPECT_EQ(x.bits >> 15, sign >> 31) << payload;
    }
  }
}

// Of the 65536 random numbers as many round up as there are parts cut off: unbiased, exactly.
TEST(Stochastic, RoundsUpAsOftenAsThePartThatIsCutOff) {
  for (const uint32_t bits : {0x3f800001u, 0x3f808000u, 0x3fffffffu, 0xc0490fdbu, 0x00000001u,
                              0x007f8001u, 0x7f7f1234u, 0x80008000u}) {
    const float x = bits_float(bits);
    uint32_t up = 0;
    for (uint32_t random = 0; random <= 0xffffu; ++random) {
      const uint32_t rounded = from_float_stochastic(x, random).bits;
      ASSERT_TRUE(rounded == bits >> 16 || rounded == (bits >> 16) + 1);
      up += rounded - (bits >> 16);
    }
    EXPECT_EQ(up, bits & 0xffffu);
  }
}

TEST(Stochastic, LeavesWhatNeedsNoRounding) {
  for (uint32_t bits = 0; bits <= 0xffffu; ++bits) {
    const float x = to_float(BFloat16{static_cast<uint16_t>(bits)});
    for (const uint32_t random : {0u, 0x7fffu, 0xffffu}) {
      const uint16_t expected =
          is_nan(x) ? from_float<BFloat16>(x).bits : static_cast<uint16_t>(bits);
      ASSERT_EQ(from_float_stochastic(x, random).bits, expected) << bits;
    }
  }
}

TEST(Stochastic, NanStaysNan) {
  for (const uint32_t bits : {0x7f800001u, 0x7fffffffu, 0xff800001u, 0xffffffffu}) {
    for (const uint32_t random : {0u, 0xffffu}) {
      const BFloat16 x = from_float_stochastic(bits_float(bits), random);
      EXPECT_TRUE(is_nan(to_float(x)));
      EXPECT_EQ(x.bits >> 15, bits >> 31);
    }
  }
}

TEST(Float, PassesThrough) {
  for (const uint32_t bits : {0u, 0x80000000u, 1u, 0x3f800001u, 0x7f800000u, 0x7fc00001u}) {
    EXPECT_EQ(float_bits(from_float<float>(bits_float(bits))), bits);
    EXPECT_EQ(float_bits(to_float(bits_float(bits))), bits);
  }
}

const float kNan = std::numeric_limits<float>::quiet_NaN();

TEST(Float, Predicates) {
  EXPECT_TRUE(is_nan(kNan) && is_nan(-kNan));
  EXPECT_FALSE(is_nan(kInfinity) || is_nan(kFloatMax) || is_nan(0.0f));
  EXPECT_TRUE(is_finite(0.0f) && is_finite(-kFloatMax) && is_finite(bits_float(1)));
  EXPECT_FALSE(is_finite(kInfinity) || is_finite(-kInfinity) || is_finite(kNan));
  EXPECT_TRUE(sign_bit(-0.0f) && sign_bit(-kNan) && sign_bit(-1.0f));
  EXPECT_FALSE(sign_bit(0.0f) || sign_bit(1.0f));
  EXPECT_EQ(magnitude(-2.5f), 2.5f);
  EXPECT_EQ(float_bits(magnitude(-0.0f)), 0u);
}

TEST(Float, NextUpIsTheNextFloat) {
  for (const float x : {0.0f, -0.0f, 1.0f, -1.0f, 0.1f, -0.1f, 1e-45f, -1e-45f, 1.17549435e-38f,
                        -1.17549435e-38f, 3e38f, -3e38f}) {
    EXPECT_EQ(next_up(x), std::nextafter(x, kInfinity)) << x;
  }
  // GPUs make NaN with all bits set, which another one would carry into a zero.
  for (const uint32_t nan : {0x7fffffffu, 0x7fc00000u, 0xffffffffu, 0x7f800001u, 0xff800001u}) {
    EXPECT_TRUE(is_nan(next_up(bits_float(nan)))) << nan;
  }
}

TEST(Float, NanWinsAbsmax) {
  EXPECT_EQ(absmax_of(1.0f, -2.0f), 2.0f);
  EXPECT_EQ(absmax_of(3.0f, -2.0f), 3.0f);
  EXPECT_EQ(absmax_of(3.0f, -kInfinity), kInfinity);
  EXPECT_TRUE(is_nan(absmax_of(3.0f, kNan)));
  EXPECT_TRUE(is_nan(absmax_of(kNan, 3.0f)));
  EXPECT_TRUE(is_nan(absmax_of(kInfinity, -kNan)));
  EXPECT_TRUE(is_nan(absmax_of(kNan, kInfinity)));
}

}  // namespace
}  // namespace bnb
