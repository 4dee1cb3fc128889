// Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2).
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/config.h"
#include "bitsandbytes/optim/optimizer.h"

namespace bnb {

// p <- p (1 - lr wd)
// p <- p - lr sign(beta1 m + (1 - beta1) g), with sign(0) = 0
// m <- beta2 m + (1 - beta2) g
struct Lion {
  static constexpr const char* kName = "lion";
  static constexpr int kStates = 1;
  static constexpr WeightDecay kWeightDecay = WeightDecay::kDecoupledBefore;

  struct Constants {
    float beta1;
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    float step_size;
  };

  BNB_HD static Constants constants(const Hyper& h, double /*step*/) {
    const float beta1 = static_cast<float>(h.beta1);
    const float beta2 = static_cast<float>(h.beta2);
    return {beta1, 1.0f - beta1, beta2, 1.0f - beta2, static_cast<float>(h.lr)};
  }

  template <class F>
  BNB_HD static F update(F grad, F /*param*/, F (&s)[1], const Constants& c) {
    const F direction = sign(fma(s[0], F(c.beta1), grad * F(c.one_minus_beta1)));
    s[0] = fma(s[0], F(c.beta2), grad * F(c.one_minus_beta2));
    return direction;
  }
};

}  // namespace bnb
