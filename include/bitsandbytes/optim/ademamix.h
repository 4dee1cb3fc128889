// AdEMAMix (Pagliardini, Ablin & Grangier 2024, arXiv:2409.03137, algorithm 1).
// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>

#include "bitsandbytes/config.h"
#include "bitsandbytes/numeric.h"
#include "bitsandbytes/optim/optimizer.h"

namespace bnb {

// m1 <- beta1 m1 + (1 - beta1) g
// m2 <- beta3 m2 + (1 - beta3) g
// v  <- beta2 v + (1 - beta2) g^2
// p  <- p - lr (m1 / (1 - beta1^t) + alpha m2) / (sqrt(v / (1 - beta2^t)) + eps)
//
// With c1 = 1 - beta1^t and c2 = sqrt(1 - beta2^t) the direction is
// (m1 / c1 + alpha m2) / (sqrt(v) + eps c2) and the step size lr c2. beta3 and alpha grow from
// beta1 and 0 over the first t_beta3 and t_alpha steps (section 3 of the paper).
struct AdEMAMix {
  static constexpr const char* kName = "ademamix";
  static constexpr int kStates = 3;  // m1, m2, v
  static constexpr WeightDecay kWeightDecay = WeightDecay::kDecoupledAfter;

  struct Constants {
    float beta1;
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    float beta3;
    float one_minus_beta3;
    float alpha;
    float inverse_c1;
    float eps;
    float step_size;
  };

  BNB_HD static double alpha_at(const Hyper& h, double step) {
    if (!(h.t_alpha > 0.0) || step >= h.t_alpha) return h.alpha;
    return h.alpha * step / h.t_alpha;
  }

  // Linear in the half-life of the average.
  BNB_HD static double beta3_at(const Hyper& h, double step) {
    if (!(h.t_beta3 > 0.0) || step >= h.t_beta3) return h.beta3;
    const double s = step / h.t_beta3;
    const double log1 = std::log(h.beta1);
    const double log3 = std::log(h.beta3);
    const double beta3 = std::exp(log1 * log3 / ((1.0 - s) * log3 + s * log1));
    return beta3 < h.beta3 ? beta3 : h.beta3;
  }

  BNB_HD static Constants constants(const Hyper& h, double step) {
    const double c1 = bias_correction(h.beta1, step);
    const double c2 = std::sqrt(bias_correction(h.beta2, step));
    const float beta1 = static_cast<float>(h.beta1);
    const float beta2 = static_cast<float>(h.beta2);
    const float beta3 = static_cast<float>(beta3_at(h, step));
    return {beta1,
            1.0f - beta1,
            beta2,
            1.0f - beta2,
            beta3,
            1.0f - beta3,
            static_cast<float>(alpha_at(h, step)),
            static_cast<float>(1.0 / c1),
            static_cast<float>(h.eps * c2),
            static_cast<float>(h.lr * c2)};
  }

  template <class F>
  BNB_HD static F update(F grad, F /*param*/, F (&s)[3], const Constants& c) {
    s[0] = fma(s[0], F(c.beta1), grad * F(c.one_minus_beta1));
    s[1] = fma(s[1], F(c.beta3), grad * F(c.one_minus_beta3));
    s[2] = fma(s[2], F(c.beta2), grad * grad * F(c.one_minus_beta2));
    const F mixed = fma(s[1], F(c.alpha), s[0] * F(c.inverse_c1));
    return fast_divide(mixed, fast_sqrt(max(s[2], F(kSmallestNormal))) + F(c.eps));
  }
};

}  // namespace bnb
