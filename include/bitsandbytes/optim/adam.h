// Adam and AdamW (Kingma & Ba 2014, arXiv:1412.6980; Loshchilov & Hutter 2017, arXiv:1711.05101).
// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>

#include "bitsandbytes/config.h"
#include "bitsandbytes/numeric.h"
#include "bitsandbytes/optim/optimizer.h"

namespace bnb {

// m <- beta1 m + (1 - beta1) g
// v <- beta2 v + (1 - beta2) g^2
// p <- p - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
//
// Both corrections are folded into two constants: with c1 = 1 - beta1^t and c2 = sqrt(1 - beta2^t)
// the direction is m / (sqrt(v) + eps c2) and the step size lr c2 / c1. v counts as no less than
// the smallest normal float, so that eps = 0 leaves elements alone that never had a gradient.
struct Adam {
  static constexpr const char* kName = "adam";
  static constexpr int kStates = 2;
  static constexpr WeightDecay kWeightDecay = WeightDecay::kDecoupledAfter;

  struct Constants {
    float beta1;
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    float eps;
    float step_size;
  };

  BNB_HD static Constants constants(const Hyper& h, double step) {
    const double c1 = bias_correction(h.beta1, step);
    const double c2 = std::sqrt(bias_correction(h.beta2, step));
    const float beta1 = static_cast<float>(h.beta1);
    const float beta2 = static_cast<float>(h.beta2);
    return {beta1,
            1.0f - beta1,
            beta2,
            1.0f - beta2,
            static_cast<float>(h.eps * c2),
            static_cast<float>(h.lr * c2 / c1)};
  }

  template <class F>
  BNB_HD static F update(F grad, F /*param*/, F (&s)[2], const Constants& c) {
    s[0] = fma(s[0], F(c.beta1), grad * F(c.one_minus_beta1));
    s[1] = fma(s[1], F(c.beta2), grad * grad * F(c.one_minus_beta2));
    return fast_divide(s[0], fast_sqrt(max(s[1], F(kSmallestNormal))) + F(c.eps));
  }
};

}  // namespace bnb
