// The rule of Adam on a scalar of its own, and the driver's order of operations around a rule.
// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>
#include <iterator>
#include <limits>
#include <string>

#include "bitsandbytes/optim/adam.h"
#include "bitsandbytes/optim/registry.h"
#include "bitsandbytes/optim/step.h"
#include "optim/real.h"

namespace bnb {
namespace {

constexpr Hyper kHyper = {.lr = 1e-2,
                          .beta1 = 0.9,
                          .beta2 = 0.999,
                          .beta3 = 0,
                          .alpha = 0,
                          .eps = 1e-8,
                          .weight_decay = 0.1,
                          .gnorm_scale = 1,
                          .skip_zeros = false,
                          .t_alpha = 0,
                          .t_beta3 = 0};

// Each of the six constants is rounded to float once, and so is its product: 8 * 2^-24.
constexpr double kTolerance = 8 * 0x1p-24;

TEST(AdamTest, FollowsThePaper) {
  double m = 0;
  double v = 0;
  double p = 0.5;
  Real states[2] = {Real(0), Real(0)};
  Real param(p);
  const double beta1 = static_cast<float>(kHyper.beta1);
  const double beta2 = static_cast<float>(kHyper.beta2);
  for (int t = 1; t <= 50; ++t) {
    const double g = std::sin(t) * std::exp2(t % 7 - 3);
    m = beta1 * m + (1 - beta1) * g;
    v = beta2 * v + (1 - beta2) * g * g;
    const double m_hat = m / (1 - std::pow(kHyper.beta1, t));
    const double v_hat = v / (1 - std::pow(kHyper.beta2, t));
    const double update = kHyper.lr * m_hat / (std::sqrt(v_hat) + kHyper.eps);

    const Adam::Constants c = Adam::constants(kHyper, t);
    const Real direction = Adam::update(Real(g), param, states, c);
    EXPECT_NEAR(states[0].v, m, std::abs(m) * 1e-12) << t;
    EXPECT_NEAR(states[1].v, v, std::abs(v) * 1e-12) << t;
    EXPECT_NEAR(c.step_size * direction.v, update, std::abs(update) * kTolerance) << t;
  }
}

TEST(AdamTest, EpsilonIsAddedToTheCorrectedRoot) {
  Hyper h = kHyper;
  h.eps = 10;  // dominates the denominator
  const Adam::Constants c = Adam::constants(h, 1);
  Real states[2] = {Real(0), Real(0)};
  const Real direction = Adam::update(Real(1.0), Real(0), states, c);
  // At step 1 the corrected moments are g and g^2, but for the rounding of beta2: 1 - beta2 is off
  // by 2^-25 / 1e-3, its root by half of that, and eps outweighs the root by ten.
  EXPECT_NEAR(c.step_size * direction.v, h.lr / 11, h.lr / 11 * 4e-6);
}

TEST(AdamTest, LateStepsNeedNoCorrection) {
  const Adam::Constants c = Adam::constants(kHyper, 1e6);
  EXPECT_FLOAT_EQ(c.step_size, 1e-2f);
  EXPECT_FLOAT_EQ(c.eps, 1e-8f);
}

TEST(AdamTest, ElementWithoutAnyGradientStaysWithoutEpsilon) {
  Hyper h = kHyper;
  h.eps = 0;
  Real states[2] = {Real(0), Real(0)};
  EXPECT_EQ(Adam::update(Real(0), Real(1), states, Adam::constants(h, 1)).v, 0);
}

TEST(StepTest, DecoupledDecayComesAfterTheUpdate) {
  const Step<Adam> step = Step<Adam>::make(kHyper, 1, nullptr);
  Hyper without = kHyper;
  without.weight_decay = 0;
  const Step<Adam> plain = Step<Adam>::make(without, 1, nullptr);
  Real a[2] = {Real(0), Real(0)};
  Real b[2] = {Real(0), Real(0)};
  const Real decayed = step.advance(Real(3.0), Real(2.0), a);
  const Real updated = plain.advance(Real(3.0), Real(2.0), b);
  EXPECT_NEAR(decayed.v, updated.v * (1 - 1e-2 * 0.1), std::abs(updated.v) * 0x1p-24);
  EXPECT_NE(decayed.v, updated.v);
  EXPECT_EQ(a[0].v, b[0].v);
  EXPECT_EQ(a[1].v, b[1].v);
}

TEST(StepTest, LearningRateOnTheDeviceReplacesTheGivenOne) {
  const float lr = 0.25f;
  Hyper h = kHyper;
  h.lr = 0;
  const Step<Adam> step = Step<Adam>::make(h, 1000000, &lr);
  EXPECT_FLOAT_EQ(step.constants.step_size, 0.25f);
  EXPECT_FLOAT_EQ(step.weight_decay, 1.0f - 0.25f * 0.1f);
}

TEST(StepTest, LearningRateOnTheDeviceMayBeDouble) {
  const double lr = 0.1;  // not a float
  Hyper h = kHyper;
  h.lr = lr;
  const Step<Adam> given = Step<Adam>::make(h, 3, nullptr);
  h.lr = 0;
  const Step<Adam> read = Step<Adam>::make(h, 3, &lr);
  EXPECT_EQ(read.constants.step_size, given.constants.step_size);
  EXPECT_EQ(read.weight_decay, given.weight_decay);
  EXPECT_EQ(LearningRate(&lr).value_or(0.0), lr);
}

// A rule that shows what the driver hands it.
template <WeightDecay kWhen>
struct Echo {
  static constexpr const char* kName = "echo";
  static constexpr int kStates = 1;
  static constexpr WeightDecay kWeightDecay = kWhen;
  struct Constants {
    float step_size;
  };
  static Constants constants(const Hyper& h, double) { return {static_cast<float>(h.lr)}; }
  template <class F>
  static F update(F grad, F param, F (&s)[1], const Constants&) {
    s[0] = grad;
    return param;
  }
};

TEST(StepTest, OrderOfWeightDecay) {
  Hyper h = kHyper;
  h.lr = 0.5;
  h.weight_decay = 0.25;
  Real s[1] = {Real(0)};
  const auto l2 = Step<Echo<WeightDecay::kL2>>::make(h, 1, nullptr);
  EXPECT_EQ(l2.advance(Real(1.0), Real(8.0), s).v, 8 - 0.5 * 8);
  EXPECT_EQ(s[0].v, 1 + 0.25 * 8);
  const auto before = Step<Echo<WeightDecay::kDecoupledBefore>>::make(h, 1, nullptr);
  EXPECT_EQ(before.advance(Real(1.0), Real(8.0), s).v, 7 - 0.5 * 7);
  EXPECT_EQ(s[0].v, 1);
  const auto after = Step<Echo<WeightDecay::kDecoupledAfter>>::make(h, 1, nullptr);
  EXPECT_EQ(after.advance(Real(1.0), Real(8.0), s).v, (8 - 0.5 * 8) * (1 - 0.125));
  EXPECT_EQ(s[0].v, 1);
}

TEST(StepTest, FactorsOfATensorScaleGradientAndUpdate) {
  const auto step = Step<Echo<WeightDecay::kL2>>::make(kHyper, 1, nullptr).scaled(0.5f, 0.25f);
  EXPECT_EQ(step.gnorm_scale, 0.5f);
  EXPECT_EQ(step.constants.step_size, 1e-2f * 0.25f);
  EXPECT_EQ(step.weight_decay, 0.1f);
}

TEST(StepTest, PreviewIsTheUpdateOverTheLearningRate) {
  Real s[1] = {Real(0)};
  const auto l2 = Step<Echo<WeightDecay::kL2>>::make_preview(kHyper, 1);
  EXPECT_EQ(l2.preview(Real(1.0), Real(8.0), s).v, 8);
  EXPECT_EQ(s[0].v, 1 + static_cast<double>(0.1f) * 8);
  const auto before = Step<Echo<WeightDecay::kDecoupledBefore>>::make_preview(kHyper, 1);
  EXPECT_EQ(before.preview(Real(1.0), Real(8.0), s).v, 8);
  EXPECT_EQ(s[0].v, 1);

  Hyper h = kHyper;
  h.weight_decay = 0;
  Real a[2] = {Real(0.5), Real(0.25)};
  Real b[2] = {Real(0.5), Real(0.25)};
  const double update = Step<Adam>::make_preview(h, 7).preview(Real(3.0), Real(2.0), a).v;
  const double moved = 2 - Step<Adam>::make(h, 7, nullptr).advance(Real(3.0), Real(2.0), b).v;
  EXPECT_NEAR(moved, h.lr * update, std::abs(moved) * kTolerance);
  EXPECT_EQ(a[0].v, b[0].v);
  EXPECT_EQ(a[1].v, b[1].v);
}

TEST(FiniteState, OverflowStaysAndNanIsForgotten) {
  EXPECT_EQ(finite_state(1.5f), 1.5f);
  EXPECT_EQ(finite_state(-kFloatMax), -kFloatMax);
  EXPECT_EQ(finite_state(kInfinity), kFloatMax);
  EXPECT_EQ(finite_state(-kInfinity), -kFloatMax);
  EXPECT_EQ(finite_state(std::numeric_limits<float>::quiet_NaN()), 0.0f);
}

TEST(Registry, ListsEveryRule) {
  ASSERT_EQ(static_cast<int>(std::size(kRules)), kRuleCount);
  EXPECT_EQ(std::string(kRules[static_cast<int>(Rule::kAdam)].name), "adam");
  EXPECT_EQ(kRules[static_cast<int>(Rule::kAdam)].states, 2);
}

TEST(Registry, ThreeStatesShareTwoTensors) {
  EXPECT_EQ(kRules[static_cast<int>(Rule::kAdEMAMix)].states, 3);
  EXPECT_EQ(state_tensors(3), 2);
  EXPECT_EQ(state_rows(3, 0), 2);
  EXPECT_EQ(state_rows(3, 1), 1);
  const int tensor[] = {0, 0, 1};
  const int row[] = {0, 1, 0};
  for (int k = 0; k < 3; ++k) {
    EXPECT_EQ(tensor_of_state(3, k), tensor[k]);
    EXPECT_EQ(row_of_state(3, k), row[k]);
  }
  for (int k = 0; k < 2; ++k) {
    EXPECT_EQ(tensor_of_state(2, k), k);
    EXPECT_EQ(row_of_state(2, k), 0);
    EXPECT_EQ(state_rows(2, k), 1);
  }
  EXPECT_EQ(state_tensors(1), 1);
}

TEST(BiasCorrection, IsComputedInDouble) {
  EXPECT_NEAR(bias_correction(0.999, 1), 1e-3, 1e-15);
  EXPECT_EQ(bias_correction(0.0, 1), 1.0);
  EXPECT_EQ(bias_correction(0.9, 0), 0.0);
}

}  // namespace
}  // namespace bnb
