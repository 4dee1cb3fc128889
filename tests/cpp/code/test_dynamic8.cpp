// The dynamic maps: published levels, and the fast encode against the search that defines it.
// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "bitsandbytes/code/dynamic8.h"
#include "bitsandbytes/code/lowered8.h"

namespace bnb {
namespace {

constexpr CodeTable kSigned = SignedDynamic8::make_levels();
constexpr CodeTable kUnsigned = UnsignedDynamic8::make_levels();
constexpr ThresholdTable kSignedThresholds = make_thresholds(kSigned);
constexpr ThresholdTable kUnsignedThresholds = make_thresholds(kUnsigned);
constexpr auto kSignedBuckets = SignedDynamic8::make_buckets(false);
constexpr auto kSignKeepingBuckets = SignedDynamic8::make_buckets(true);
constexpr auto kUnsignedBuckets = UnsignedDynamic8::make_buckets();

// Code by definition, and its variant that never turns a negative value into zero.
int expected_signed(float x) {
  return search_code([](int k) { return kSignedThresholds[k]; }, x);
}
int expected_keeping_sign(float x) {
  const int code = expected_signed(x);
  return code - (sign_bit(x) && code == SignedDynamic8::kZero ? 1 : 0);
}
int expected_unsigned(float x) {
  return search_code([](int k) { return kUnsignedThresholds[k]; }, x);
}

void check_signed(float x) {
  ASSERT_EQ(SignedDynamic8::encode(kSignedBuckets.values, x), expected_signed(x)) << x;
  ASSERT_EQ(SignedDynamic8::encode(kSignKeepingBuckets.values, x), expected_keeping_sign(x)) << x;
}
void check_unsigned(float x) {
  ASSERT_EQ(UnsignedDynamic8::encode(kUnsignedBuckets.values, x), expected_unsigned(x)) << x;
}

// Float `steps` places above x, counted through zero.
float moved(float x, int steps) {
  for (; steps > 0; --steps) x = std::nextafter(x, kInfinity);
  for (; steps < 0; ++steps) x = std::nextafter(x, -kInfinity);
  return x;
}

struct KnownLevel {
  int index;
  uint32_t bits;
};

// Entries of the published tables.
constexpr KnownLevel kKnownSigned[] = {
    {128, 0x3513a3b7}, {135, 0x3923d70b}, {142, 0x3a7765ff}, {149, 0x3b989374}, {156, 0x3c0ccccd},
    {163, 0x3cb9999a}, {170, 0x3d2d70a3}, {177, 0x3d7e147b}, {184, 0x3da75c2a}, {191, 0x3ddb3334},
    {198, 0x3e526666}, {205, 0x3e9b999a}, {212, 0x3ece0000}, {219, 0x3f003333}, {226, 0x3f196666},
    {233, 0x3f32999a}, {240, 0x3f4bcccd}, {247, 0x3f650000}, {254, 0x3f7e3333}, {255, 0x3f800000},
};
constexpr KnownLevel kKnownUnsigned[] = {
    {1, 0x34ae7baa},   {12, 0x3896bb99},  {23, 0x3a178d50},  {34, 0x3b020c4a},  {45, 0x3ba66666},
    {56, 0x3c05e354},  {67, 0x3c85c28f},  {78, 0x3d023d70},  {89, 0x3d41999a},  {100, 0x3d807ae2},
    {111, 0x3da028f6}, {122, 0x3dbfd70b}, {133, 0x3e153334}, {144, 0x3e646666}, {155, 0x3e99cccc},
    {166, 0x3ec16666}, {177, 0x3ee90000}, {188, 0x3f084ccc}, {199, 0x3f1c199a}, {210, 0x3f2fe666},
    {221, 0x3f43b334}, {232, 0x3f578000}, {243, 0x3f6b4ccc}, {254, 0x3f7f199a}, {255, 0x3f800000},
};

TEST(SignedDynamic8Test, LevelsArePublishedOnes) {
  for (const KnownLevel& known : kKnownSigned) {
    EXPECT_EQ(float_bits(kSigned[known.index]), known.bits) << known.index;
  }
  EXPECT_EQ(float_bits(kSigned[127]), 0u);
  for (int i = 1; i <= 127; ++i) EXPECT_EQ(kSigned[127 - i], -kSigned[127 + i]) << i;
  for (int i = 1; i < kCodeLevels; ++i) EXPECT_LT(kSigned[i - 1], kSigned[i]) << i;
}

TEST(UnsignedDynamic8Test, LevelsArePublishedOnes) {
  for (const KnownLevel& known : kKnownUnsigned) {
    EXPECT_EQ(float_bits(kUnsigned[known.index]), known.bits) << known.index;
  }
  EXPECT_EQ(float_bits(kUnsigned[0]), 0u);
  for (int i = 1; i < kCodeLevels; ++i) EXPECT_LT(kUnsigned[i - 1], kUnsigned[i]) << i;
}

TEST(SignedDynamic8Test, EncodeEqualsSearchAroundEveryThreshold) {
  for (int k = 0; k < kCodeThresholds; ++k) {
    for (int steps = -3; steps <= 3; ++steps) check_signed(moved(kSignedThresholds[k], steps));
  }
}

TEST(UnsignedDynamic8Test, EncodeEqualsSearchAroundEveryThreshold) {
  for (int k = 0; k < kCodeThresholds; ++k) {
    for (int steps = -3; steps <= 3; ++steps) check_unsigned(moved(kUnsignedThresholds[k], steps));
  }
}

TEST(SignedDynamic8Test, EveryLevelEncodesAsItself) {
  for (int i = 0; i < kCodeLevels; ++i) {
    EXPECT_EQ(SignedDynamic8::encode(kSignedBuckets.values, kSigned[i]), i);
  }
}

TEST(UnsignedDynamic8Test, EveryLevelEncodesAsItself) {
  for (int i = 0; i < kCodeLevels; ++i) {
    EXPECT_EQ(UnsignedDynamic8::encode(kUnsignedBuckets.values, kUnsigned[i]), i);
  }
}

// x * (1 / absmax) may exceed 1 by rounding.
constexpr float kLargest = 1.0f + 4 * std::numeric_limits<float>::epsilon();

TEST(SignedDynamic8Test, EncodeEqualsSearchOverAllMagnitudes) {
  const uint32_t last = float_bits(kLargest);
  for (uint32_t bits = 0; bits <= last; bits += 127) {  // a prime stride
    check_signed(bits_float(bits));
    check_signed(bits_float(bits | 0x80000000u));
    if (HasFatalFailure()) return;
  }
  for (uint32_t bits = last - 16; bits <= last; ++bits) {
    check_signed(bits_float(bits));
    check_signed(bits_float(bits | 0x80000000u));
  }
}

TEST(UnsignedDynamic8Test, EncodeEqualsSearchOverAllMagnitudes) {
  const uint32_t last = float_bits(kLargest);
  for (uint32_t bits = 0; bits <= last; bits += 127) {
    check_unsigned(bits_float(bits));
    if (HasFatalFailure()) return;
  }
  for (uint32_t bits = last - 16; bits <= last; ++bits) check_unsigned(bits_float(bits));
}

TEST(UnsignedDynamic8Test, NegativeValuesAreCodeZero) {
  for (const float x : {-0.0f, -1e-45f, -1e-7f, -0.5f, -1.0f}) check_unsigned(x);
}

TEST(SignedDynamic8Test, SignSurvives) {
  EXPECT_EQ(SignedDynamic8::encode(kSignKeepingBuckets.values, -1e-30f), 126);
  EXPECT_EQ(SignedDynamic8::encode(kSignKeepingBuckets.values, -0.0f), 126);
  EXPECT_EQ(SignedDynamic8::encode(kSignKeepingBuckets.values, 1e-30f), 127);
  EXPECT_EQ(SignedDynamic8::encode(kSignKeepingBuckets.values, 0.0f), 127);
  EXPECT_EQ(SignedDynamic8::encode(kSignedBuckets.values, -1e-30f), 127);
}

// ---- Lowered exponents --------------------------------------------------------------------------

constexpr auto kLoweredPositive = LoweredSigned8::make_buckets(false);
constexpr auto kLoweredNegative = LoweredSigned8::make_buckets(true);
constexpr auto kLoweredUnsigned = LoweredUnsigned8::make_buckets();

int encode_lowered_signed(float x) {
  const uint32_t bits = float_bits(x * kLoweringFactor);
  const uint32_t bucket = bits >> LoweredSigned8::Layout::kShift;
  const bool negative = bucket >= LoweredSigned8::kSignBit;
  const uint32_t entry =
      negative ? kLoweredNegative[bucket - LoweredSigned8::kSignBit] : kLoweredPositive[bucket];
  return static_cast<int>((LoweredSigned8::encode_shifted(entry, bits) >> 24) ^
                          (negative ? 0xffu : 0u));
}

int encode_lowered_unsigned(float x) {
  const uint32_t bits = float_bits(x * kLoweringFactor);
  const uint32_t entry = kLoweredUnsigned[bits >> LoweredUnsigned8::Layout::kShift];
  return static_cast<int>((LoweredUnsigned8::encode_shifted(entry, bits) >> 16) & 0xff);
}

void check_lowered(float magnitude) {
  ASSERT_EQ(encode_lowered_signed(magnitude), expected_keeping_sign(magnitude)) << magnitude;
  ASSERT_EQ(encode_lowered_signed(-magnitude), expected_keeping_sign(-magnitude)) << magnitude;
  ASSERT_EQ(encode_lowered_unsigned(magnitude), expected_unsigned(magnitude)) << magnitude;
}

TEST(Lowered8Test, EncodeEqualsSearchAroundEveryThreshold) {
  for (int k = 0; k < kCodeThresholds; ++k) {
    for (int steps = -3; steps <= 3; ++steps) {
      check_lowered(std::fabs(moved(kSignedThresholds[k], steps)));
      check_lowered(moved(kUnsignedThresholds[k], steps));
    }
  }
}

TEST(Lowered8Test, EncodeEqualsSearchOverAllMagnitudes) {
  const uint32_t last = float_bits(kLargest);
  for (uint32_t bits = 0; bits <= last; bits += 127) {  // a prime stride
    check_lowered(bits_float(bits));
    if (HasFatalFailure()) return;
  }
  for (uint32_t bits = last - 16; bits <= last; ++bits) check_lowered(bits_float(bits));
}

TEST(Lowered8Test, ScalesWhoseReciprocalsAreNormal) {
  for (const float scale : {0x1p-123f, 1e-9f, 1.0f, 8e6f}) {
    EXPECT_TRUE(can_be_lowered(float_bits(scale)));
    EXPECT_TRUE(std::isnormal(1.0f / scale * kLoweringFactor));
  }
  for (const float scale : {0.0f, 1e-45f, 1e-38f, 0x1p23f, 1e30f, kInfinity}) {
    EXPECT_FALSE(can_be_lowered(float_bits(scale))) << scale;
  }
}

// ---- The definition itself ----------------------------------------------------------------------

TEST(SearchCode, CountsThresholdsAtOrBelow) {
  for (int k = 0; k < kCodeThresholds; ++k) {
    const float t = kSignedThresholds[k];
    EXPECT_EQ(expected_signed(t), k + 1);
    EXPECT_EQ(expected_signed(moved(t, -1)), k);
  }
  EXPECT_EQ(expected_signed(-kInfinity), 0);
  EXPECT_EQ(expected_signed(kInfinity), 255);
}

TEST(SearchCode, NanIsCodeZero) {
  volatile float zero = 0.0f;
  volatile float infinity = kInfinity;
  const float nans[] = {std::numeric_limits<float>::quiet_NaN(),
                        -std::numeric_limits<float>::quiet_NaN(), zero * infinity,
                        infinity - infinity};
  for (const float x : nans) EXPECT_EQ(expected_signed(x), 0);
}

TEST(CodeThreshold, MidpointTakesTheEvenCode) {
  EXPECT_EQ(code_threshold(1.0f, 3.0f, 1), 2.0f);           // 2 is even: the midpoint goes up
  EXPECT_EQ(code_threshold(1.0f, 3.0f, 2), next_up(2.0f));  // 2 is even: the midpoint stays
}

TEST(RegularBlock, NeedsAFiniteScale) {
  EXPECT_TRUE(is_regular_block(1.0f, 1.0f));
  EXPECT_TRUE(is_regular_block(kFloatMax, 1.0f / kFloatMax));
  EXPECT_FALSE(is_regular_block(0.0f, kInfinity));
  EXPECT_FALSE(is_regular_block(1e-39f, kInfinity));
  EXPECT_FALSE(is_regular_block(kInfinity, 0.0f));
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_FALSE(is_regular_block(nan, nan));
}

}  // namespace
}  // namespace bnb
