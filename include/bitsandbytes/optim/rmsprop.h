// RMSprop (Tieleman & Hinton 2012, "Neural networks for machine learning", lecture 6.5).
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/config.h"
#include "bitsandbytes/numeric.h"
#include "bitsandbytes/optim/optimizer.h"

namespace bnb {

// v <- beta1 v + (1 - beta1) g^2
// p <- p - lr g / (sqrt(v) + eps)
struct RMSprop {
  static constexpr const char* kName = "rmsprop";
  static constexpr int kStates = 1;
  static constexpr WeightDecay kWeightDecay = WeightDecay::kL2;

  struct Constants {
    float beta1;
    float one_minus_beta1;
    float eps;
    float step_size;
  };

  BNB_HD static Constants constants(const Hyper& h, double /*step*/) {
    const float beta1 = static_cast<float>(h.beta1);
    return {beta1, 1.0f - beta1, static_cast<float>(h.eps), static_cast<float>(h.lr)};
  }

  template <class F>
  BNB_HD static F update(F grad, F /*param*/, F (&s)[1], const Constants& c) {
    s[0] = fma(s[0], F(c.beta1), grad * grad * F(c.one_minus_beta1));
    return fast_divide(grad, fast_sqrt(max(s[0], F(kSmallestNormal))) + F(c.eps));
  }
};

}  // namespace bnb
