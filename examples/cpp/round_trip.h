// What both examples share: numbers to quantize, and how far off they come back.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

inline constexpr int64_t kNumbers = 1 << 20;
inline constexpr int64_t kBlock = 64;  // numbers that share a scale
inline constexpr int64_t kBlocks = kNumbers / kBlock;

inline std::vector<float> normal_numbers() {
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  std::vector<float> x(kNumbers);
  for (float& value : x) value = normal(random);
  return x;
}

// Prints the error of y, relative to x; whether it is below `bound`.
inline bool report(const char* format, const std::vector<float>& x, const std::vector<float>& y,
                   double bound) {
  double error = 0.0;
  double size = 0.0;
  for (size_t i = 0; i < x.size(); ++i) {
    error += (x[i] - y[i]) * (x[i] - y[i]);
    size += x[i] * x[i];
  }
  const double relative = std::sqrt(error / size);
  std::printf("%-22s root mean square error %.2f %%\n", format, 100.0 * relative);
  return relative < bound;
}
