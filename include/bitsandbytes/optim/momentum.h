// SGD with momentum (Sutskever et al. 2013, "On the importance of initialization and momentum").
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/config.h"
#include "bitsandbytes/optim/optimizer.h"

namespace bnb {

// m <- g in the first step, else beta1 m + g
// p <- p - lr m
struct Momentum {
  static constexpr const char* kName = "momentum";
  static constexpr int kStates = 1;
  static constexpr WeightDecay kWeightDecay = WeightDecay::kL2;

  struct Constants {
    float beta1;  // 0 in the first step
    float step_size;
  };

  BNB_HD static Constants constants(const Hyper& h, double step) {
    return {step > 1.0 ? static_cast<float>(h.beta1) : 0.0f, static_cast<float>(h.lr)};
  }

  template <class F>
  BNB_HD static F update(F grad, F /*param*/, F (&s)[1], const Constants& c) {
    s[0] = fma(s[0], F(c.beta1), grad);
    return s[0];
  }
};

}  // namespace bnb
