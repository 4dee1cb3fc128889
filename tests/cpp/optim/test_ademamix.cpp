// The rule of AdEMAMix and its schedules.
// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>

#include "bitsandbytes/optim/adam.h"
#include "bitsandbytes/optim/ademamix.h"
#include "optim/real.h"

namespace bnb {
namespace {

constexpr Hyper kHyper = {.lr = 1e-2,
                          .beta1 = 0.9,
                          .beta2 = 0.999,
                          .beta3 = 0.9999,
                          .alpha = 5,
                          .eps = 1e-8,
                          .weight_decay = 0.1,
                          .gnorm_scale = 1,
                          .skip_zeros = false,
                          .t_alpha = 0,
                          .t_beta3 = 0};

// Eight constants are rounded to float once, and so are two products: 12 * 2^-24.
constexpr double kTolerance = 12 * 0x1p-24;

TEST(AdEMAMixTest, FollowsThePaper) {
  double m1 = 0;
  double m2 = 0;
  double v = 0;
  Real states[3] = {Real(0), Real(0), Real(0)};
  const double beta1 = static_cast<float>(kHyper.beta1);
  const double beta2 = static_cast<float>(kHyper.beta2);
  const double beta3 = static_cast<float>(kHyper.beta3);
  for (int t = 1; t <= 50; ++t) {
    const double g = 0.5 + 0.1 * std::sin(t);  // of one sign: nothing cancels
    m1 = beta1 * m1 + (1 - beta1) * g;
    m2 = beta3 * m2 + (1 - beta3) * g;
    v = beta2 * v + (1 - beta2) * g * g;
    const double m_hat = m1 / (1 - std::pow(kHyper.beta1, t));
    const double v_hat = v / (1 - std::pow(kHyper.beta2, t));
    const double update = kHyper.lr * (m_hat + kHyper.alpha * m2) / (std::sqrt(v_hat) + kHyper.eps);

    const AdEMAMix::Constants c = AdEMAMix::constants(kHyper, t);
    const Real direction = AdEMAMix::update(Real(g), Real(0.5), states, c);
    EXPECT_NEAR(states[0].v, m1, std::abs(m1) * 1e-12) << t;
    EXPECT_NEAR(states[1].v, m2, std::abs(m2) * 1e-12) << t;
    EXPECT_NEAR(states[2].v, v, std::abs(v) * 1e-12) << t;
    EXPECT_NEAR(c.step_size * direction.v, update, std::abs(update) * kTolerance) << t;
  }
}

TEST(AdEMAMixTest, WithoutTheSlowAverageItIsAdam) {
  Hyper h = kHyper;
  h.alpha = 0;
  Real a[2] = {Real(0.1), Real(0.2)};
  Real b[3] = {Real(0.1), Real(0.7), Real(0.2)};
  const Adam::Constants adam = Adam::constants(h, 5);
  const AdEMAMix::Constants mixed = AdEMAMix::constants(h, 5);
  const double expected = adam.step_size * Adam::update(Real(0.3), Real(1), a, adam).v;
  const double actual = mixed.step_size * AdEMAMix::update(Real(0.3), Real(1), b, mixed).v;
  EXPECT_NEAR(actual, expected, std::abs(expected) * kTolerance);
  EXPECT_EQ(a[0].v, b[0].v);
  EXPECT_EQ(a[1].v, b[2].v);
}

TEST(AdEMAMixTest, ElementWithoutAnyGradientStaysWithoutEpsilon) {
  Hyper h = kHyper;
  h.eps = 0;
  Real states[3] = {Real(0), Real(0), Real(0)};
  EXPECT_EQ(AdEMAMix::update(Real(0), Real(1), states, AdEMAMix::constants(h, 1)).v, 0);
}

TEST(AdEMAMixSchedule, AlphaGrowsLinearly) {
  Hyper h = kHyper;
  EXPECT_EQ(AdEMAMix::alpha_at(h, 1), 5);
  h.t_alpha = 100;
  EXPECT_DOUBLE_EQ(AdEMAMix::alpha_at(h, 1), 0.05);
  EXPECT_DOUBLE_EQ(AdEMAMix::alpha_at(h, 50), 2.5);
  EXPECT_EQ(AdEMAMix::alpha_at(h, 100), 5);
  EXPECT_EQ(AdEMAMix::alpha_at(h, 1000), 5);
}

// Section 3 of the paper: the half-life ln(0.5) / ln(beta) grows linearly.
TEST(AdEMAMixSchedule, HalfLifeOfTheSlowAverageGrowsLinearly) {
  Hyper h = kHyper;
  EXPECT_EQ(AdEMAMix::beta3_at(h, 1), 0.9999);
  h.t_beta3 = 200;
  const auto half_life = [](double beta) { return std::log(0.5) / std::log(beta); };
  const double first = half_life(h.beta1);
  const double last = half_life(h.beta3);
  for (const double step : {1.0, 50.0, 100.0, 199.0}) {
    const double expected = first + (last - first) * step / h.t_beta3;
    EXPECT_NEAR(half_life(AdEMAMix::beta3_at(h, step)), expected, expected * 1e-9);
  }
  EXPECT_EQ(AdEMAMix::beta3_at(h, 200), 0.9999);
  EXPECT_EQ(AdEMAMix::beta3_at(h, 1e6), 0.9999);
}

}  // namespace
}  // namespace bnb
