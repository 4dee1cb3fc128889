// The 4-bit codes: published levels and thresholds, and both fast encodes against the definition.
// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "bitsandbytes/code/registry4.h"

namespace bnb {
namespace {

// Code of s by the search tree, walked as the vector kernels walk it.
template <class Code>
int encode_by_tree(float s) {
  constexpr Code4Table nodes = make_search_tree<Code>();
  const float key = Code::kSignBit ? magnitude(s) : s;
  int node = 1;
  while (node <= Code::kThresholds) node = 2 * node + (key > nodes[node] ? 1 : 0);
  const int code = Code::from_rank(node - Code::kThresholds - 1);
  return code + (Code::kSignBit && s < 0.0f ? kCode4Sign : 0);
}

template <class Code>
int encode_by_buckets(float s) {
  constexpr Buckets4<Code> buckets = make_buckets4<Code>();
  const float key = Code::kSignBit ? magnitude(s) : s;
  const int code = static_cast<int>(Code::from_rank(buckets.rank_of(key)));
  return code + (Code::kSignBit && s < 0.0f ? kCode4Sign : 0);
}

template <class Code>
class Code4Test : public testing::Test {};

using Codes = testing::Types<Nf4, Fp4>;
TYPED_TEST_SUITE(Code4Test, Codes);

// x * (1 / absmax) may exceed 1 by rounding.
constexpr float kLargest = 1.0f + 4 * std::numeric_limits<float>::epsilon();

template <class Code>
void check(float s) {
  ASSERT_EQ(encode_by_tree<Code>(s), encode4<Code>(s)) << s;
  ASSERT_EQ(encode_by_buckets<Code>(s), encode4<Code>(s)) << s;
}

float moved(float x, int steps) {
  for (; steps > 0; --steps) x = std::nextafter(x, kInfinity);
  for (; steps < 0; ++steps) x = std::nextafter(x, -kInfinity);
  return x;
}

TYPED_TEST(Code4Test, ThresholdsAscendBetweenTheLevelsOfTheirCodes) {
  using Code = TypeParam;
  constexpr auto thresholds = Code::make_thresholds();
  constexpr Code4Table levels = Code::make_levels();
  for (int k = 0; k < Code::kThresholds; ++k) {
    EXPECT_LT(levels[Code::from_rank(k)], thresholds[k]) << k;
    EXPECT_LT(thresholds[k], levels[Code::from_rank(k + 1)]) << k;
  }
}

TYPED_TEST(Code4Test, ThresholdTakesTheLowerCode) {
  using Code = TypeParam;
  constexpr auto thresholds = Code::make_thresholds();
  for (int k = 0; k < Code::kThresholds; ++k) {
    EXPECT_EQ(encode4<Code>(thresholds[k]), Code::from_rank(k));
    EXPECT_EQ(encode4<Code>(moved(thresholds[k], 1)), Code::from_rank(k + 1));
  }
}

TYPED_TEST(Code4Test, FastEncodesEqualTheDefinitionAroundEveryThreshold) {
  constexpr auto thresholds = TypeParam::make_thresholds();
  for (int k = 0; k < TypeParam::kThresholds; ++k) {
    for (int steps = -100; steps <= 100; ++steps) {
      check<TypeParam>(moved(thresholds[k], steps));
      check<TypeParam>(-moved(thresholds[k], steps));
    }
  }
}

TYPED_TEST(Code4Test, FastEncodesEqualTheDefinitionOverAllMagnitudes) {
  const uint32_t last = float_bits(kLargest);
  for (uint32_t bits = 0; bits <= last; bits += 127) {  // a prime stride
    check<TypeParam>(bits_float(bits));
    check<TypeParam>(bits_float(bits | 0x80000000u));
    if (this->HasFatalFailure()) return;
  }
  for (uint32_t bits = last - 16; bits <= last; ++bits) {
    check<TypeParam>(bits_float(bits));
    check<TypeParam>(bits_float(bits | 0x80000000u));
  }
}

TYPED_TEST(Code4Test, EveryLevelEncodesAsItself) {
  constexpr Code4Table levels = TypeParam::make_levels();
  for (int i = 0; i < kCode4Levels; ++i) {
    const bool negative_zero = float_bits(levels[i]) == 0x80000000u;
    EXPECT_EQ(encode4<TypeParam>(levels[i]), negative_zero ? 0 : i);
  }
}

TYPED_TEST(Code4Test, NanCountsNoThreshold) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(encode4<TypeParam>(nan), 0);
  EXPECT_EQ(encode4<TypeParam>(-nan), 0);
}

TEST(Nf4Test, ThresholdsArePublishedOnes) {
  // Sums of two floats, some of them halfway between floats: doubles hold them exactly.
  constexpr double kPublished[] = {
      -0.8480964004993439,  -0.6106329262256622,  -0.4599952697753906,   -0.33967943489551544,
      -0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767,
      0.1202552504837513,   0.2035212516784668,   0.2920137718319893,    0.3893125355243683,
      0.5016634166240692,   0.6427869200706482,   0.8614784181118011};
  constexpr auto thresholds = Nf4::make_thresholds();
  for (int k = 0; k < Nf4::kThresholds; ++k) {
    EXPECT_EQ(thresholds[k], static_cast<float>(kPublished[k])) << k;
  }
}

TEST(Nf4Test, SpecialNumbers) {
  EXPECT_EQ(encode4<Nf4>(0.0f), 7);
  EXPECT_EQ(encode4<Nf4>(-0.0f), 7);
  EXPECT_EQ(encode4<Nf4>(kInfinity), 15);
  EXPECT_EQ(encode4<Nf4>(-kInfinity), 0);
}

TEST(Fp4Test, LevelsArePublishedOnes) {
  constexpr float kPublished[] = {0.0f,
                                  0.0052083334885537624f,
                                  0.6666666865348816f,
                                  1.0f,
                                  0.3333333432674408f,
                                  0.5f,
                                  0.1666666716337204f,
                                  0.25f};
  constexpr Code4Table levels = Fp4::make_levels();
  for (int i = 0; i < kCode4Sign; ++i) {
    EXPECT_EQ(float_bits(levels[i]), float_bits(kPublished[i])) << i;
    EXPECT_EQ(float_bits(levels[i + kCode4Sign]), float_bits(-kPublished[i])) << i;
  }
}

TEST(Fp4Test, SpecialNumbers) {
  EXPECT_EQ(encode4<Fp4>(0.0f), 0);
  EXPECT_EQ(encode4<Fp4>(-0.0f), 0);
  EXPECT_EQ(encode4<Fp4>(1e-30f), 0);
  EXPECT_EQ(encode4<Fp4>(-1e-30f), 8);
  EXPECT_EQ(encode4<Fp4>(kInfinity), 3);
  EXPECT_EQ(encode4<Fp4>(-kInfinity), 11);
}

TEST(Fp4Test, RanksOfAWholeWordAreTakenAtOnce) {
  uint32_t ranks = 0;
  uint32_t codes = 0;
  for (int rank = 0; rank < 8; ++rank) {
    ranks = ranks << 4 | static_cast<uint32_t>(rank);
    codes = codes << 4 | static_cast<uint32_t>(Fp4::from_rank(rank));
  }
  EXPECT_EQ(Fp4::from_rank(ranks), codes);
}

TEST(Codes4, AreFoundByTheirNames) {
  EXPECT_STREQ(kCodes4[static_cast<int>(Code4::kNf4)].name, "nf4");
  EXPECT_STREQ(kCodes4[static_cast<int>(Code4::kFp4)].name, "fp4");
  EXPECT_EQ(kCodes4[static_cast<int>(Code4::kNf4)].levels[1], Nf4::make_levels()[1]);
}

}  // namespace
}  // namespace bnb
