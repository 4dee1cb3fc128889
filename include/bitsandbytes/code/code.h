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

// The order of levels: ascending, NaN last. A table that is not in this order is sorted before it
// is searched, equal levels in the order of their codes.
BNB_HD constexpr bool level_before(float a, float b) { return a < b || (!is_nan(a) && is_nan(b)); }

// Stochastic rounding of x, whose nearest level is that of code c: the level on the other side of x
// with a probability that grows with the way from the nearest one, so that the mean is x. Beyond
// the ends of the table there is only one side. `r` is uniform in [0, 1); `level(k)` gives the k-th
// of 256, ascending.
template <class Level>
BNB_HD constexpr int round_stochastic(Level level, int c, float x, float r) {
  const float nearest = level(c);
  if (x > nearest && c < kCodeLevels - 1) {
    const float upper = level(c + 1);
    if (r >= (upper - x) / (upper - nearest)) return c + 1;
  } else if (x < nearest && c > 0) {
    const float lower = level(c - 1);
    if (r >= (x - lower) / (nearest - lower)) return c - 1;
  }
  return c;
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
