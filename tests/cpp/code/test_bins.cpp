// Encode by bins: right or undecided, never wrong, and seldom undecided.
// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "bitsandbytes/code/bins.h"
#include "bitsandbytes/code/dynamic8.h"

namespace bnb {
namespace {

constexpr BinTables kSigned = SignedDynamic8::make_bins();
constexpr BinTables kUnsigned = UnsignedDynamic8::make_bins();
constexpr ThresholdTable kSignedThresholds = make_thresholds(SignedDynamic8::make_levels());
constexpr ThresholdTable kUnsignedThresholds = make_thresholds(UnsignedDynamic8::make_levels());

struct Map {
  const BinTables& bins;
  const ThresholdTable& thresholds;
  int first;  // threshold above zero
};
constexpr Map kMaps[] = {{kSigned, kSignedThresholds, SignedDynamic8::kZero},
                         {kUnsigned, kUnsignedThresholds, 0}};

int search(const Map& map, float x) {
  return search_code([&](int k) { return map.thresholds[k]; }, x);
}

// Element `a` of a block whose absmax has this reciprocal.
int by_bins(const Map& map, float a, float inverse) {
  return encode_by_bins(map.bins, a * (inverse * map.bins.unit));
}

TEST(Bins, AreRightOrUndecidedAroundEveryThreshold) {
  std::mt19937 random(0);
  std::uniform_real_distribution<float> exponent(-30, 30);
  for (const Map& map : kMaps) {
    for (int round = 0; round < 50; ++round) {
      const float inverse = 1.0f / (round == 0 ? 1.0f : std::exp2(exponent(random)));
      int decided = 0;
      for (int k = map.first; k < kCodeThresholds; ++k) {
        const float middle = map.thresholds[k] / inverse;
        for (int offset = -300; offset <= 300; ++offset) {
          const float a = bits_float(float_bits(middle) + static_cast<uint32_t>(offset));
          const int code = by_bins(map, a, inverse);
          if (code < 0) continue;
          ++decided;
          ASSERT_EQ(code, search(map, a * inverse)) << a << " " << inverse;
        }
      }
      EXPECT_GT(decided, (kCodeThresholds - map.first) * 100);  // near thresholds, too
    }
  }
}

TEST(Bins, AreRightOrUndecidedOverAllMagnitudes) {
  for (const Map& map : kMaps) {
    int undecided = 0;
    int total = 0;
    // A prime stride: every pattern of low bits occurs.
    for (uint32_t bits = 0; bits <= float_bits(1.0f) + 1; bits += 1021) {
      const float x = bits_float(bits);
      const int code = by_bins(map, x, 1.0f);
      ++total;
      if (code < 0) {
        ++undecided;
      } else {
        ASSERT_EQ(code, search(map, x)) << x;
      }
    }
    EXPECT_LT(undecided, total / 5000);
  }
}

TEST(Bins, KnowTheEnds) {
  for (const Map& map : kMaps) {
    EXPECT_EQ(by_bins(map, 0.0f, 1.0f), map.first);
    EXPECT_EQ(by_bins(map, 1e-45f, 1.0f), map.first);
    EXPECT_EQ(by_bins(map, 1.0f, 1.0f), 255);
    EXPECT_EQ(by_bins(map, 1.0f + 0x1p-23f, 1.0f), 255);  // as rounding may give
  }
}

// The reciprocal of a tiny absmax may be as large as float allows, so that the unit takes it
// beyond.
TEST(Bins, AreUndecidedWhereTheScaleOverflows) {
  for (const Map& map : kMaps) {
    for (const float a : {0.0f, 1e-45f, 1e-39f}) EXPECT_EQ(by_bins(map, a, kFloatMax), -1);
  }
}

}  // namespace
}  // namespace bnb
