// Bounds on whole tensors.
// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "bitsandbytes/optim/clipping.h"

namespace bnb {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

TEST(BoundedUpdateScale, ReachesTheBoundAndNoFurther) {
  EXPECT_EQ(bounded_update_scale(4.0, 1.0, 0.5), 1.0f);     // norms 2 and 1: on the bound
  EXPECT_EQ(bounded_update_scale(4.0, 0.25, 0.5), 1.0f);    // never enlarges
  EXPECT_EQ(bounded_update_scale(4.0, 16.0, 0.5), 0.25f);   // 0.5 * 2 / 4
  EXPECT_EQ(bounded_update_scale(4.0, 16.0, 0.02), 0.01f);  // rounded once
}

TEST(BoundedUpdateScale, AParameterOfZerosIsNotBounded) {
  EXPECT_EQ(bounded_update_scale(0.0, 16.0, 1.0), 1.0f);
}

TEST(BoundedUpdateScale, SumsThatAreNotFinite) {
  EXPECT_EQ(bounded_update_scale(4.0, kInf, 1.0), 0.0f);
  EXPECT_EQ(bounded_update_scale(kInf, 4.0, 1.0), 1.0f);
  EXPECT_EQ(bounded_update_scale(4.0, std::nan(""), 1.0), 1.0f);
  EXPECT_EQ(bounded_update_scale(std::nan(""), 4.0, 1.0), 1.0f);
}

TEST(PercentileScale, ClipsToThePercentile) {
  EXPECT_EQ(percentile_scale(2.0f, 1.0f), 0.5f);
  EXPECT_EQ(percentile_scale(1.0f, 1.0f), 1.0f);
  EXPECT_EQ(percentile_scale(0.5f, 1.0f), 1.0f);
  EXPECT_EQ(percentile_scale(0.0f, 0.0f), 1.0f);
}

}  // namespace
}  // namespace bnb
