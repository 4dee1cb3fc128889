// Steps and previews of the optimizers on every instruction set: the same bits as the baseline, for
// ragged sizes and for any cut of the work, and what the baseline's bits mean.
// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/optim/step.h"
#include "bitsandbytes/philox.h"
#include "cpu/bounds.h"
#include "cpu/kernel_test.h"

namespace bnb::cpu {
namespace {

TYPED_TEST_SUITE(FloatKernel, Floats);

constexpr StateFormat kFormats[] = {StateFormat::kFloat32, StateFormat::kBlockwise8bit,
                                    StateFormat::kTensor8bit};
const CodeTable kLinear = linear_levels();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

Hyper hyper_of(bool skip_zeros) {
  return {.lr = 1e-2,
          .beta1 = 0.9,
          .beta2 = 0.999,
          .beta3 = 0.9999,
          .alpha = 5,
          .eps = 1e-8,
          .weight_decay = 0.1,
          .gnorm_scale = 0.5,
          .skip_zeros = skip_zeros,
          .t_alpha = 0,
          .t_beta3 = 10};
}

std::vector<float> magnitudes(std::vector<float> values) {
  for (float& value : values) value = magnitude(value);
  return values;
}

const RuleInfo& info(Rule rule) { return kRules[static_cast<int>(rule)]; }

bool defined(Rule rule, StateFormat format) {
  return format != StateFormat::kTensor8bit || info(rule).states <= 2;
}

// One tensor with gradient and states, and the arguments of its step.
template <class T>
class Problem {
 public:
  Problem(Rule rule, StateFormat format, int64_t n, bool special, const CodeTable& first = kSigned)
      : format_(format),
        n_(n),
        grad(numbers<T>(n, 17, special)),
        param(numbers<T>(n, 18)),
        codes{prepare_code(first.values), prepare_code(kUnsigned.values)} {
    args.rule = rule;
    args.dtype = kDTypeOf<T>;
    args.step = &step;
    args.hyper = hyper_of(false);
    tensor = {param.data(), grad.data(), {}, {}, n};
    const int states = info(rule).states;
    for (int k = 0; k < state_tensors(states); ++k) {
      const int64_t rows = state_rows(states, k);
      const uint32_t seed = 19 + 3 * k;
      if (format == StateFormat::kFloat32) {
        auto values = numbers<float>(rows * n, seed);
        const bool root = k == 1 || rule == Rule::kRMSprop || rule == Rule::kAdagrad;
        floats[k] = std::make_unique<Guarded<float>>(root ? magnitudes(values) : values);
        tensor.state[k] = floats[k]->data();
        continue;
      }
      args.qmap[k] = codes[k].levels;
      bytes[k] = std::make_unique<Guarded<uint8_t>>(integers<uint8_t>(rows * n, seed));
      tensor.state[k] = bytes[k]->data();
      if (format == StateFormat::kBlockwise8bit) {
        const int64_t blocks = rows * ceil_div(n, kOptimizerBlock);
        floats[k] = std::make_unique<Guarded<float>>(magnitudes(numbers<float>(blocks, seed + 1)));
        tensor.absmax[k] = floats[k]->data();
      } else {
        args.max[k] = &max[k];
        args.new_max[k] = &new_max[k];
      }
    }
  }

  void preview(const Kernels& k, int64_t index = 0) {
    const int64_t tiles = ceil_div(n_, kPreviewTile);
    partials.assign(tiles * kPreviewNumbers, kNan);
    k.optimizer_preview(args, format_, tensor, index, codes, tiles / 2, tiles, partials.data());
    k.optimizer_preview(args, format_, tensor, index, codes, 0, tiles / 2, partials.data());
    finish_preview(args, {&tensor, 1}, partials.data());
  }

  void advance(const Kernels& k, int64_t index = 0) {
    const int64_t blocks = ceil_div(n_, kOptimizerBlock);
    k.optimizer_step(args, format_, tensor, index, codes, 0, blocks / 2);
    k.optimizer_step(args, format_, tensor, index, codes, blocks / 2, blocks);
  }

  std::vector<Bytes> written() {
    std::vector<Bytes> all = {param.bytes()};
    for (int k = 0; k < 2; ++k) {
      if (bytes[k]) all.push_back(bytes[k]->bytes());
      if (floats[k]) all.push_back(floats[k]->bytes());
    }
    for (float& x : partials) x = is_nan(x) ? kNan : x;  // of any payload
    const auto* first = reinterpret_cast<const uint8_t*>(partials.data());
    all.emplace_back(first, first + partials.size() * sizeof(float));
    return all;
  }

 private:
  const StateFormat format_;
  const int64_t n_;

 public:
  Guarded<T> grad;
  Guarded<T> param;
  Code codes[2];
  std::unique_ptr<Guarded<uint8_t>> bytes[2];  // codes of the states
  std::unique_ptr<Guarded<float>> floats[2];   // states, or absmax of blocks
  float max[2] = {2.5f, 0.75f};
  float new_max[2] = {kNan, kNan};
  std::vector<float> partials;
  int64_t step = 3;
  OptimizerStep args{};
  OptimizerTensor tensor{};
};

std::string name_of(Rule rule, StateFormat format, int64_t n) {
  return std::string(info(rule).name) + ", format " + std::to_string(static_cast<int>(format)) +
         ", n " + std::to_string(n);
}

TYPED_TEST(FloatKernel, EveryStep) {
  using T = TypeParam;
  for (int r = 0; r < kRuleCount; ++r) {
    const Rule rule = static_cast<Rule>(r);
    for (const StateFormat format : kFormats) {
      if (!defined(rule, format)) continue;
      for (const int64_t n : kSizes) {
        for (const bool skip_zeros : {false, true}) {
          this->expect_same_on_all(name_of(rule, format, n), [&](const Kernels& k) {
            Problem<T> problem(rule, format, n, true);
            problem.args.hyper = hyper_of(skip_zeros);
            if (format == StateFormat::kTensor8bit) problem.preview(k);
            problem.advance(k);
            return problem.written();
          });
        }
      }
    }
  }
}

TYPED_TEST(FloatKernel, EveryOptionOfAStep) {
  using T = TypeParam;
  const float lr = 2e-3f;
  const std::vector<float> gnorm_scales = {kNan, 0.75f};
  for (const StateFormat format : kFormats) {
    for (const int64_t n : {33, 300, 20000}) {
      this->expect_same_on_all(name_of(Rule::kAdam, format, n), [&](const Kernels& k) {
        Problem<T> problem(Rule::kAdam, format, n, false, kLinear);
        std::vector<float> unorm(2, kNan);
        std::vector<float> update_scales(2, kNan);
        problem.args.lr = &lr;
        problem.args.gnorm_scales = gnorm_scales.data();
        problem.args.max_unorm = 1e-3f;
        problem.args.unorm = unorm.data() + 1;
        problem.args.new_update_scales = update_scales.data() + 1;
        problem.args.stochastic_rounding = true;
        problem.args.seed = 123456789012345;
        problem.preview(k, 1);
        EXPECT_LT(update_scales[1], 1.0f);
        // The step finds the number of its tensor, the preview here that of a list of one.
        problem.args.update_scales = update_scales.data();
        if (format == StateFormat::kTensor8bit) {
          problem.args.max[0] -= 1;
          problem.args.max[1] -= 1;
          problem.args.new_max[0] -= 1;
          problem.args.new_max[1] -= 1;
        }
        problem.advance(k, 1);
        return problem.written();
      });
    }
  }
}

// A rule's three states lie in two tensors; each is decoded and encoded by its own scales.
TEST_F(Kernel, ThreeStatesInEightBits) {
  constexpr int64_t n = 300;
  constexpr int64_t blocks = 2;
  using R = AdEMAMix;
  for (const std::string& isa : available_isas()) {
    ASSERT_TRUE(set_isa(isa));
    Problem<float> problem(Rule::kAdEMAMix, StateFormat::kBlockwise8bit, n, false);
    const std::vector<float> grad(problem.grad.data(), problem.grad.data() + n);
    const std::vector<float> param(problem.param.data(), problem.param.data() + n);
    const uint8_t* codes[] = {problem.bytes[0]->data(), problem.bytes[0]->data() + n,
                              problem.bytes[1]->data()};
    const float* absmax[] = {problem.floats[0]->data(), problem.floats[0]->data() + blocks,
                             problem.floats[1]->data()};
    const CodeTable* maps[] = {&kSigned, &kSigned, &kUnsigned};
    const Step<R> step = Step<R>::make(problem.args.hyper, problem.step + 1, nullptr);
    std::array<std::vector<float>, 3> states;
    for (int k = 0; k < 3; ++k) {
      for (int64_t i = 0; i < n; ++i) {
        const float old = (*maps[k])[codes[k][i]] * absmax[k][i / kOptimizerBlock];
        const float g = grad[i] * step.gnorm_scale;
        const auto& c = step.constants;
        if (k == 0) states[k].push_back(std::fma(old, c.beta1, g * c.one_minus_beta1));
        if (k == 1) states[k].push_back(std::fma(old, c.beta3, g * c.one_minus_beta3));
        if (k == 2) states[k].push_back(std::fma(old, c.beta2, g * g * c.one_minus_beta2));
      }
    }
    problem.advance(kernels());
    for (int k = 0; k < 3; ++k) {
      const ThresholdTable thresholds = make_thresholds(*maps[k]);
      for (int64_t b = 0; b < blocks; ++b) {
        float most = 0;
        const int64_t end = std::min(n, (b + 1) * kOptimizerBlock);
        for (int64_t i = b * kOptimizerBlock; i < end; ++i) most = absmax_of(most, states[k][i]);
        EXPECT_EQ(absmax[k][b], most) << isa << " state " << k << " block " << b;
        for (int64_t i = b * kOptimizerBlock; i < end; ++i) {
          const float x = states[k][i] * (1.0f / most);
          int code = search_code([&](int t) { return thresholds[t]; }, x);
          if (k < 2 && sign_bit(x) && !sign_bit((*maps[k])[code])) --code;
          ASSERT_EQ(codes[k][i], code) << isa << " state " << k << " element " << i;
        }
      }
    }
  }
}

TEST_F(Kernel, StochasticRoundingTakesTheBitsOfItsElement) {
  constexpr int64_t n = 1003;
  constexpr int64_t index = 5;
  for (const std::string& isa : available_isas()) {
    ASSERT_TRUE(set_isa(isa));
    for (const StateFormat format : {StateFormat::kFloat32, StateFormat::kBlockwise8bit}) {
      // The same step in float gives the parameters before they are rounded.
      Problem<float> exact(Rule::kAdam, format, n, false);
      Problem<BFloat16> rounded(Rule::kAdam, format, n, false);
      for (int64_t i = 0; i < n; ++i) {
        exact.param.data()[i] = to_float(rounded.param.data()[i]);
        exact.grad.data()[i] = to_float(rounded.grad.data()[i]);
      }
      rounded.grad.data()[7] = {0x7f80};
      exact.grad.data()[7] = kInfinity;
      rounded.args.stochastic_rounding = exact.args.stochastic_rounding = true;
      rounded.args.seed = exact.args.seed = 0x123456789abcdef0;
      exact.advance(kernels(), index);
      rounded.advance(kernels(), index);
      for (int64_t i = 0; i < n; ++i) {
        const PhiloxWords words =
            rounding_words(0x123456789abcdef0, i / kRoundingGroup, index, rounded.step + 1);
        const uint32_t random = rounding_bits(words, static_cast<int>(i % kRoundingGroup));
        const BFloat16 expected = from_float_stochastic(exact.param.data()[i], random);
        ASSERT_EQ(rounded.param.data()[i].bits, expected.bits) << isa << " " << i;
      }
    }
  }
}

// ---- Elements that stand still, and gradients of no use
// ------------------------------------------

TEST_F(Kernel, CodesKeepTheRestOfABlockFromABadGradient) {
  constexpr int64_t n = 300;
  for (const std::string& isa : available_isas()) {
    ASSERT_TRUE(set_isa(isa));
    for (const StateFormat format : {StateFormat::kBlockwise8bit, StateFormat::kTensor8bit}) {
      for (const float bad : {kInfinity, -kInfinity, kNan}) {
        Problem<float> problem(Rule::kAdam, format, n, false);
        problem.step = 0;
        std::fill_n(problem.grad.data(), n, 1.0f);
        problem.grad.data()[5] = problem.grad.data()[299] = bad;
        std::fill_n(problem.param.data(), n, 3.0f);
        for (int k = 0; k < 2; ++k) {
          std::fill_n(problem.bytes[k]->data(), n, uint8_t{200});
          if (format == StateFormat::kBlockwise8bit) {
            std::fill_n(problem.floats[k]->data(), 2, 1.0f);
          }
        }
        float unorm = 0;
        problem.args.unorm = &unorm;
        problem.preview(kernels());
        EXPECT_TRUE(is_finite(unorm)) << isa;
        problem.advance(kernels());
        for (int64_t i = 0; i < n; ++i) {
          const bool hit = i == 5 || i == 299;
          EXPECT_EQ(problem.param.data()[i] == 3.0f, hit) << isa << " " << i;
          EXPECT_EQ(problem.bytes[0]->data()[i], hit ? 127 : 255) << isa << " " << i;
          EXPECT_EQ(problem.bytes[1]->data()[i], hit ? 0 : 255) << isa << " " << i;
        }
        for (int k = 0; k < 2; ++k) {
          const float* scales =
              format == StateFormat::kTensor8bit ? problem.new_max : problem.floats[k]->data();
          for (int i = 0; i < 2; ++i) EXPECT_TRUE(is_finite(scales[i])) << isa;
        }
      }
    }
  }
}

TEST_F(Kernel, CodesOfStatesThatOverflowStayFinite) {
  constexpr int64_t n = 20;
  for (const std::string& isa : available_isas()) {
    ASSERT_TRUE(set_isa(isa));
    for (const StateFormat format : {StateFormat::kBlockwise8bit, StateFormat::kTensor8bit}) {
      Problem<float> problem(Rule::kAdam, format, n, false);
      problem.step = 0;
      problem.max[0] = problem.max[1] = 0.0f;
      std::fill_n(problem.grad.data(), n, 1e30f);  // its square is beyond float
      std::fill_n(problem.param.data(), n, 3.0f);
      for (int k = 0; k < 2; ++k) {
        if (format == StateFormat::kBlockwise8bit) problem.floats[k]->data()[0] = 0.0f;
      }
      problem.args.hyper.gnorm_scale = 1;
      problem.preview(kernels());
      problem.advance(kernels());
      const bool blockwise = format == StateFormat::kBlockwise8bit;
      EXPECT_EQ(blockwise ? problem.floats[1]->data()[0] : problem.new_max[1], kFloatMax) << isa;
      EXPECT_TRUE(is_finite(blockwise ? problem.floats[0]->data()[0] : problem.new_max[0])) << isa;
      for (int64_t i = 0; i < n; ++i) {
        EXPECT_EQ(problem.bytes[0]->data()[i], 255) << isa;
        EXPECT_EQ(problem.bytes[1]->data()[i], 255) << isa;
        EXPECT_TRUE(is_finite(problem.param.data()[i])) << isa;
      }
    }
  }
}

TYPED_TEST(FloatKernel, IdleTensorKeepsEverything) {
  using T = TypeParam;
  for (const std::string& isa : available_isas()) {
    ASSERT_TRUE(set_isa(isa));
    for (const StateFormat format : kFormats) {
      Problem<T> problem(Rule::kAdam, format, 9000, false);
      std::fill_n(problem.grad.data(), 9000, from_float<T>(0.0f));
      problem.args.hyper.skip_zeros = true;
      const std::vector<Bytes> before = problem.written();
      if (format == StateFormat::kTensor8bit) {
        problem.preview(kernels());
        EXPECT_EQ(problem.new_max[0], problem.max[0]) << isa;
        EXPECT_EQ(problem.new_max[1], problem.max[1]) << isa;
        problem.partials.clear();
      }
      problem.advance(kernels());
      EXPECT_TRUE(problem.written() == before) << isa << " " << static_cast<int>(format);
    }
  }
}

// ---- Previews -----------------------------------------------------------------------------------

TYPED_TEST(FloatKernel, EveryPreview) {
  using T = TypeParam;
  for (int r = 0; r < kRuleCount; ++r) {
    const Rule rule = static_cast<Rule>(r);
    for (const StateFormat format : kFormats) {
      if (!defined(rule, format)) continue;
      for (const int64_t n : {1, 17, 255, 257, 8192, 20001}) {
        for (const bool special : {false, true}) {
          this->expect_same_on_all(name_of(rule, format, n), [&](const Kernels& k) {
            Problem<T> problem(rule, format, n, special);
            problem.args.hyper = hyper_of(special);
            const std::vector<Bytes> before = problem.written();
            problem.preview(k);
            std::vector<Bytes> all = problem.written();
            const Bytes partials = all.back();
            all.back().clear();
            EXPECT_TRUE(all == before) << "a preview wrote";
            return std::vector<Bytes>{partials};
          });
        }
      }
    }
  }
}

// A preview foretells the step: its sum of squares is that of the change over the learning rate.
TYPED_TEST(FloatKernel, PreviewForetellsTheStep) {
  using T = TypeParam;
  constexpr int64_t n = 9000;
  for (int r = 0; r < kRuleCount; ++r) {
    const Rule rule = static_cast<Rule>(r);
    for (const StateFormat format : kFormats) {
      if (!defined(rule, format)) continue;
      // In float, whatever T: the change of a parameter of few digits shows little of the update.
      Problem<float> problem(rule, format, n, false);
      for (int64_t i = 0; i < n; ++i) {
        problem.grad.data()[i] = to_float(from_float<T>(problem.grad.data()[i]));
        problem.param.data()[i] *= 0.01f;
      }
      const bool l2 = rule != Rule::kAdam && rule != Rule::kLion && rule != Rule::kAdEMAMix;
      if (!l2) problem.args.hyper.weight_decay = 0;  // which is no part of the update
      problem.args.hyper.lr = 16;
      float unorm = 0;
      problem.args.unorm = &unorm;
      problem.preview(kernels());
      const std::vector<float> before(problem.param.data(), problem.param.data() + n);
      problem.advance(kernels());
      double squares = 0;
      double rounding = 0;  // of the parameters, relative to the norm of the change
      for (int64_t i = 0; i < n; ++i) {
        const double change = double{before[i]} - problem.param.data()[i];
        squares += change * change / (16.0 * 16.0);
        const double u = 0x1p-24 * std::abs(problem.param.data()[i]) / 16.0;
        rounding += u * u;
      }
      const double norm = std::sqrt(squares);
      // 16 products and sums in float per block, and a few more roundings of the update itself.
      EXPECT_NEAR(std::sqrt(unorm), norm, norm * 32 * 0x1p-24 + std::sqrt(rounding))
          << info(rule).name << " " << static_cast<int>(format);
      EXPECT_GT(unorm, 0.0f);
    }
  }
}

TYPED_TEST(FloatKernel, GradientSquares) {
  using T = TypeParam;
  for (const int64_t n : {1, 17, 255, 8191, 8192, 8193, 40000}) {
    Guarded<T> grad(numbers<T>(n, 30));
    const GradientTensor tensor{grad.data(), nullptr, n};
    const int64_t tiles = ceil_div(n, kPreviewTile);
    this->expect_same_on_all("n " + std::to_string(n), [&](const Kernels& k) {
      Guarded<float> partials(tiles);
      k.gradient_squares(kDTypeOf<T>, tensor, tiles / 2, tiles, partials.data());
      k.gradient_squares(kDTypeOf<T>, tensor, 0, tiles / 2, partials.data());
      for (int64_t tile = 0; tile < tiles; ++tile) {
        double sum = 0;
        const int64_t end = std::min(n, (tile + 1) * kPreviewTile);
        for (int64_t i = tile * kPreviewTile; i < end; ++i) {
          const double g = to_float(grad.data()[i]);
          sum += g * g;
        }
        // 16 multiply-adds in float per block, one rounding of the total.
        EXPECT_NEAR(partials.data()[tile], sum, sum * 17 * 0x1p-24) << k.isa;
      }
      return std::vector<Bytes>{partials.bytes()};
    });
  }
}

}  // namespace
}  // namespace bnb::cpu
