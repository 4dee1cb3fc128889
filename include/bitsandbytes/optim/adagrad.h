// Adagrad (Duchi, Hazan & Singer 2011, JMLR 12).
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/config.h"
#include "bitsandbytes/numeric.h"
#include "bitsandbytes/optim/optimizer.h"

namespace bnb {

// v <- v + g^2
// p <- p - lr g / (sqrt(v) + eps)
struct Adagrad {
  static constexpr const char* kName = "adagrad";
  static constexpr int kStates = 1;
  static constexpr WeightDecay kWeightDecay = WeightDecay::kL2;

  struct Constants {
    float eps;
    float step_size;
  };

  BNB_HD static Constants constants(const Hyper& h, double /*step*/) {
    return {static_cast<float>(h.eps), static_cast<float>(h.lr)};
  }

  template <class F>
  BNB_HD static F update(F grad, F /*param*/, F (&s)[1], const Constants& c) {
    s[0] = fma(grad, grad, s[0]);
    return fast_divide(grad, fast_sqrt(max(s[0], F(kSmallestNormal))) + F(c.eps));
  }
};

}  // namespace bnb
