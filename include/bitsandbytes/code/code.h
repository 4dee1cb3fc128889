// What every 8-bit code has: levels, decision thresholds, and the search that defines its encode.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "bitsandbytes/config.h"
#include "bitsandbytes/numeric.h"

namespace bnb {

inline constexpr int kCodeLevels = 256;
inline constexpr int kCodeThresholds = kCodeLevels - 1;

template <class T, int N>
struct Table {
  T values[N];
  BNB_HD constexpr const T& operator[](int i) const { return values[i]; }
  BNB_HD constexpr T& operator[](int i) { return values[i]; }
};

using CodeTable = Table<float, kCodeLevels>;
using ThresholdTable = Table<float, kCodeThresholds>;

// How a table of levels is encoded: the dynamic maps have a one-lookup encode, any other table is
// searched.
enum class CodeKind : int { kSignedDynamic8, kUnsignedDynamic8, kTable };

// Threshold k separates codes k and k + 1: code = number of thresholds <= x. It is the float32
// midpoint of the two levels; an x exactly on the midpoint takes the even code, so where k is even
// the threshold lies one float above.
BNB_HD constexpr float code_threshold(float lower, float upper, int k) {
  const float midpoint = (lower + upper) * 0.5f;
  return (k & 1) != 0 ? midpoint : next_up(midpoint);
}

constexpr ThresholdTable make_thresholds(const CodeTable& levels) {
  ThresholdTable t{};
  for (int k = 0; k < kCodeThresholds; ++k) t[k] = code_threshold(levels[k], levels[k + 1], k);
  return t;
}

// Number of thresholds <= x by halving steps: the definition of encode for a code given as a
// table. `threshold(k)` gives the k-th of 255, ascending. NaN compares false everywhere and takes
// code 0.
template <class Threshold>
BNB_HD constexpr int search_code(Threshold threshold, float x) {
  int code = 0;
  for (int step = kCodeLevels / 2; step > 0; step /= 2) {
    if (x >= threshold(code + step - 1)) code += step;
  }
  return code;
}

// Elements are normalized as x * (1 / absmax): one correctly rounded reciprocal for the block, one
// multiplication for the element. In a block of zeros, and for the infinite elements of a block,
// the product is NaN and takes code 0.

// Fast encoders assume a finite x / absmax; this is the block's test for it. The reciprocal of a
// subnormal absmax may overflow, so both are looked at.
BNB_HD constexpr bool is_regular_block(float absmax, float inverse) {
  return absmax > 0.0f && absmax <= kFloatMax && inverse <= kFloatMax;
}

}  // namespace bnb
