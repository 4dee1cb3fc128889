// Bounds on whole tensors: of an update relative to its parameter, of a gradient relative to past
// gradients.
// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>

#include "bitsandbytes/config.h"

namespace bnb {

// Factor on an update that keeps |update| <= max_unorm |parameter| (You et al. 2017,
// arXiv:1708.03888; 2019, arXiv:1904.00962), from the sums of squares of both. A parameter that is
// all zeros bounds nothing: it would stay so for ever.
BNB_HD float bounded_update_scale(double param_squares, double update_squares, double max_unorm) {
  const double bound = max_unorm * std::sqrt(param_squares);
  const double norm = std::sqrt(update_squares);
  return bound > 0.0 && norm > bound ? static_cast<float>(bound / norm) : 1.0f;
}

// Length of the history of gradient norms.
inline constexpr int kNormHistory = 100;

// The percentile above which no gradient is: nothing is clipped.
inline constexpr int kNoPercentile = 100;

// Factor on a gradient whose norm is larger than `clip`, a percentile of its history.
BNB_HD float percentile_scale(float norm, float clip) { return norm > clip ? clip / norm : 1.0f; }

}  // namespace bnb
