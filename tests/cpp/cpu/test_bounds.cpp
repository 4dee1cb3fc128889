// From the partial results of tiles to what holds for whole tensors.
// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "bitsandbytes/optim/clipping.h"
#include "cpu/bounds.h"

namespace bnb::cpu {
namespace {

OptimizerTensor tensor_of(int64_t n) { return {nullptr, nullptr, {}, {}, n}; }

TEST(FinishPreview, AddsTheTilesOfEachTensor) {
  const std::vector<OptimizerTensor> tensors = {tensor_of(2 * kPreviewTile + 1), tensor_of(0),
                                                tensor_of(5)};
  ASSERT_EQ(preview_tiles(tensors), 5);  // room for the empty one
  const std::vector<float> partials = {1, 8, 0, 0, 1, 2, 8, 0, 0, 1, 1, 0, 0, 0, 1, 9, 1, 0, 0, 1};
  std::vector<float> params(3, -1.0f);
  std::vector<float> unorm(3, -1.0f);
  std::vector<float> scales(3, -1.0f);
  OptimizerStep args{};
  args.max_unorm = 0.5f;
  args.param_squares = params.data();
  args.unorm = unorm.data();
  args.new_update_scales = scales.data();
  finish_preview(args, tensors, partials.data());
  EXPECT_EQ(params, (std::vector<float>{4, 0, 9}));
  EXPECT_EQ(unorm, (std::vector<float>{16, 0, 1}));
  EXPECT_EQ(scales, (std::vector<float>{0.25f, 1, 1}));  // 0.5 * 2 / 4
}

TEST(FinishPreview, SumsInDouble) {
  const std::vector<OptimizerTensor> tensors = {tensor_of(1001 * kPreviewTile)};
  std::vector<float> partials(1001 * kPreviewNumbers, 0.0f);
  partials[1] = 0x1p24f;
  for (int tile = 1; tile <= 1000; ++tile) partials[tile * kPreviewNumbers + 1] = 1.0f;
  float unorm = 0;
  OptimizerStep args{};
  args.unorm = &unorm;
  finish_preview(args, tensors, partials.data());
  EXPECT_EQ(unorm, 0x1p24f + 1000.0f);
}

TEST(FinishPreview, TakesTheLargestState) {
  const std::vector<OptimizerTensor> tensors = {tensor_of(2 * kPreviewTile), tensor_of(1),
                                                tensor_of(1), tensor_of(0)};
  // The second tensor skips all of its elements and keeps its scale.
  const std::vector<float> partials = {0, 0, 3, 0.5f, 1, 0, 0, 2, 4, 1,
                                       0, 0, 0, 0,    0, 0, 0, 0, 0, 1};
  const std::vector<float> max1 = {7, 8, 9, 10};
  const std::vector<float> max2 = {17, 18, 19, 20};
  std::vector<float> new1(4, -1.0f);
  std::vector<float> new2(4, -1.0f);
  OptimizerStep args{};
  args.max[0] = max1.data();
  args.max[1] = max2.data();
  args.new_max[0] = new1.data();
  args.new_max[1] = new2.data();
  finish_preview(args, tensors, partials.data());
  EXPECT_EQ(new1, (std::vector<float>{3, 8, 0, 10}));
  EXPECT_EQ(new2, (std::vector<float>{4, 18, 0, 20}));
}

TEST(LeaveStep, CountsAndKeepsNewScales) {
  int64_t steps = 41;
  std::vector<float> max = {1, 2, 3};
  std::vector<float> new_max = {4, 5, 6};
  OptimizerStep args{};
  args.new_max[0] = new_max.data();
  leave_step(args, 3);
  args.step = args.counter = &steps;
  leave_step(args, 3);
  EXPECT_EQ(steps, 42);
  EXPECT_EQ(max, (std::vector<float>{1, 2, 3}));
  args.max[0] = args.kept_max[0] = max.data();
  leave_step(args, 3);
  EXPECT_EQ(steps, 43);
  EXPECT_EQ(max, new_max);
}

class Clipping : public testing::Test {
 protected:
  // Norm, clip value and factor after step number `number` with a gradient of this square.
  std::vector<float> record(int64_t number, float square, int percentile) {
    const int64_t step = number - 1;
    std::vector<float> out(3, -1.0f);
    const std::vector<GradientTensor> tensors = {{nullptr, history.data(), 1}};
    finish_percentile_clipping({DType::kFloat32, &step, percentile, out.data(), nullptr}, tensors,
                               &square);
    return out;
  }

  std::vector<float> history = std::vector<float>(kNormHistory, 0.0f);
};

TEST_F(Clipping, FirstStepFillsTheHistoryLaterOnesTakeTheirSlot) {
  EXPECT_EQ(record(1, 4, 5), (std::vector<float>{2, 2, 1}));
  EXPECT_EQ(history, std::vector<float>(kNormHistory, 4.0f));
  record(2, 9, 5);
  record(100, 16, 5);
  record(201, 25, 5);
  std::vector<float> expected(kNormHistory, 4.0f);
  expected[2] = 9;
  expected[0] = 16;
  expected[1] = 25;
  EXPECT_EQ(history, expected);
}

TEST_F(Clipping, ClipsToThePercentileOfTheHistory) {
  record(1, 1, 5);
  for (int i = 0; i < kNormHistory; ++i) {
    history[i] = static_cast<float>((kNormHistory - i) * (kNormHistory - i));
  }
  // Sorted: 1, 4, 9 ... The slot of step 100 held the largest one.
  const std::vector<float> out = record(100, 144, 5);
  EXPECT_EQ(out[0], 12);
  EXPECT_EQ(out[1], 6);
  EXPECT_EQ(out[2], 0.5f);
  EXPECT_EQ(record(100, 144, 99)[1], 99);
  EXPECT_EQ(record(100, 144, 99)[2], 1);
}

TEST_F(Clipping, NormIsItsOwnEntry) {
  // Neither the sum nor its root is a float: both sides must be rounded alike.
  for (int i = 1; i < 100; ++i) {
    const std::vector<float> out = record(1, static_cast<float>(i) / 3.0f, 50);
    EXPECT_EQ(out[0], out[1]);
    EXPECT_EQ(out[2], 1.0f);
  }
}

TEST_F(Clipping, NormThatIsNotFiniteIsNotRecorded) {
  record(1, 4, 5);
  const std::vector<float> before = history;
  for (const float bad : {kInfinity, std::numeric_limits<float>::quiet_NaN()}) {
    const std::vector<float> out = record(2, bad, 5);
    EXPECT_FALSE(is_finite(out[0]));
    EXPECT_EQ(out[1], 2);
    EXPECT_EQ(out[2], 1);
    EXPECT_EQ(history, before);
  }
}

TEST_F(Clipping, FirstFiniteNormFillsTheHistory) {
  EXPECT_EQ(record(1, kInfinity, 5)[2], 1);
  EXPECT_EQ(record(2, 9, 5), (std::vector<float>{3, 3, 1}));
  EXPECT_EQ(history, std::vector<float>(kNormHistory, 9.0f));
}

TEST_F(Clipping, EachTensorHasItsOwnTilesAndHistory) {
  std::vector<float> other(kNormHistory, 0.0f);
  const int64_t step = 0;
  const std::vector<GradientTensor> tensors = {{nullptr, history.data(), kPreviewTile + 1},
                                               {nullptr, other.data(), 0},
                                               {nullptr, other.data(), 3}};
  const std::vector<float> partials = {9, 16, 4};
  std::vector<float> out(9, -1.0f);
  finish_percentile_clipping({DType::kFloat32, &step, 5, out.data(), nullptr}, tensors,
                             partials.data());
  EXPECT_EQ(out, (std::vector<float>{5, 0, 2, 5, 0, 2, 1, 1, 1}));
}

}  // namespace
}  // namespace bnb::cpu
