// Every CPU kernel on every instruction set: the same bits as the baseline, for ragged sizes and
// for any cut of the work, and not a byte written beside its outputs.
// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/code/dynamic8.h"
#include "cpu/dispatch.h"

namespace bnb::cpu {
namespace {

// An array between two guards, unaligned for vectors; checks the guards when it goes.
template <class T>
class Guarded {
 public:
  explicit Guarded(size_t n) : bytes_(2 * kGuard + n * sizeof(T), kPattern), n_(n) {}
  explicit Guarded(const std::vector<T>& values) : Guarded(values.size()) {
    if (n_ > 0) std::memcpy(bytes_.data() + kGuard, values.data(), n_ * sizeof(T));
  }
  ~Guarded() {
    for (size_t i = 0; i < kGuard; ++i) {
      EXPECT_EQ(bytes_[i], kPattern) << "written " << kGuard - i << " bytes before the array";
      EXPECT_EQ(bytes_[bytes_.size() - 1 - i], kPattern)
          << "written " << kGuard - i << " bytes behind the array";
    }
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data() { return reinterpret_cast<T*>(bytes_.data() + kGuard); }
  std::vector<uint8_t> bytes() const {
    return {bytes_.begin() + kGuard, bytes_.end() - static_cast<ptrdiff_t>(kGuard)};
  }

 private:
  static constexpr size_t kGuard = 72;  // a multiple of every element, but of no vector
  static constexpr uint8_t kPattern = 0xa5;
  std::vector<uint8_t> bytes_;
  size_t n_;
};

using Bytes = std::vector<uint8_t>;

template <class T>
constexpr DType kDTypeOf = std::is_same_v<T, float>  ? DType::kFloat32
                           : std::is_same_v<T, Half> ? DType::kFloat16
                                                     : DType::kBFloat16;

// Numbers over many magnitudes, with some special ones when `special` is set.
template <class T>
std::vector<T> numbers(size_t n, uint32_t seed, bool special = false) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<T> values(n);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float specials[] = {nan, kInfinity, -kInfinity, 0.0f, -0.0f, 1e-40f, -3e38f};
  for (size_t i = 0; i < n; ++i) {
    float x = normal(random) * std::exp2(std::round(4 * normal(random)));
    if (special && random() % 61 == 0) x = specials[random() % std::size(specials)];
    values[i] = from_float<T>(x);
  }
  return values;
}

template <class T>
std::vector<T> integers(size_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<T> values(n);
  for (T& value : values) value = static_cast<T>(random());
  return values;
}

constexpr CodeTable kSigned = SignedDynamic8::make_levels();
constexpr CodeTable kUnsigned = UnsignedDynamic8::make_levels();

CodeTable linear_levels() {
  CodeTable t{};
  for (int i = 0; i < kCodeLevels; ++i) t[i] = static_cast<float>(i) / 127.5f - 1.0f;
  return t;
}

class Kernel : public testing::Test {
 protected:
  void TearDown() override { set_isa(before_); }

  // Runs body(kernels) on each instruction set and compares what it returns.
  template <class Body>
  void expect_same_on_all(const std::string& what, const Body& body) {
    ASSERT_TRUE(set_isa("baseline"));
    const std::vector<Bytes> expected = body(kernels());
    for (const std::string& isa : available_isas()) {
      ASSERT_TRUE(set_isa(isa));
      const std::vector<Bytes> actual = body(kernels());
      ASSERT_EQ(actual.size(), expected.size());
      for (size_t i = 0; i < expected.size(); ++i) {
        EXPECT_TRUE(actual[i] == expected[i]) << what << ", output " << i << " on " << isa;
      }
    }
  }

 private:
  const std::string before_ = kernels().isa;
};

template <class T>
class FloatKernel : public Kernel {};
using Floats = testing::Types<float, Half, BFloat16>;
TYPED_TEST_SUITE(FloatKernel, Floats);

constexpr int64_t kSizes[] = {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 255, 256, 257, 1000};
constexpr int64_t kBlockSizes[] = {1, 3, 16, 64, 100, 256, 4096};

// ---- Blockwise quantization ---------------------------------------------------------------------

TYPED_TEST(FloatKernel, QuantizeBlockwise) {
  using T = TypeParam;
  const CodeTable linear = linear_levels();
  for (const CodeTable* levels : {&kSigned, &kUnsigned, &linear}) {
    const Code code = prepare_code(levels->values);
    for (const int64_t n : kSizes) {
      for (const int64_t block : kBlockSizes) {
        for (const bool special : {false, true}) {
          Guarded<T> a(numbers<T>(n, 7, special));
          const int64_t blocks = ceil_div(n, block);
          this->expect_same_on_all("n " + std::to_string(n), [&](const Kernels& k) {
            Guarded<uint8_t> out(n);
            Guarded<float> absmax(blocks);
            const QuantizeBlockwise args{kDTypeOf<T>,   a.data(), levels->values, out.data(),
                                         absmax.data(), n,        block};
            const int64_t middle = blocks / 2;
            k.quantize_blockwise(args, code, 0, middle);
            k.quantize_blockwise(args, code, middle, blocks);
            return std::vector<Bytes>{out.bytes(), absmax.bytes()};
          });
        }
      }
    }
  }
}

TYPED_TEST(FloatKernel, QuantizeBlockwiseFollowsTheDefinition) {
  using T = TypeParam;
  constexpr int64_t n = 1000;
  constexpr int64_t block = 100;
  const std::vector<T> values = numbers<T>(n, 3, true);
  const Code code = prepare_code(kSigned.values);
  const ThresholdTable thresholds = make_thresholds(kSigned);
  const auto threshold = [&](int k) { return thresholds[k]; };
  std::vector<uint8_t> expected(n);
  std::vector<float> scales(n / block, 0.0f);
  for (int64_t i = 0; i < n; ++i) {
    scales[i / block] = absmax_of(scales[i / block], to_float(values[i]));
  }
  for (int64_t i = 0; i < n; ++i) {
    const float inverse = 1.0f / scales[i / block];
    const float x = to_float(values[i]) * inverse;
    expected[i] = is_nan(x) ? 0 : static_cast<uint8_t>(search_code(threshold, x));
  }
  for (const std::string& isa : available_isas()) {
    ASSERT_TRUE(set_isa(isa));
    std::vector<uint8_t> out(n);
    std::vector<float> absmax(n / block);
    kernels().quantize_blockwise(
        {kDTypeOf<T>, values.data(), kSigned.values, out.data(), absmax.data(), n, block}, code, 0,
        n / block);
    for (int64_t i = 0; i < n; ++i) ASSERT_EQ(out[i], expected[i]) << isa << " " << i;
    for (int64_t b = 0; b < n / block; ++b) {
      ASSERT_TRUE(absmax[b] == scales[b] || (is_nan(absmax[b]) && is_nan(scales[b]))) << isa;
    }
  }
}

TYPED_TEST(FloatKernel, DequantizeBlockwise) {
  using T = TypeParam;
  for (const int64_t n : kSizes) {
    for (const int64_t block : kBlockSizes) {
      Guarded<uint8_t> a(integers<uint8_t>(n, 5));
      Guarded<float> absmax(numbers<float>(ceil_div(n, block), 6));
      this->expect_same_on_all("n " + std::to_string(n), [&](const Kernels& k) {
        Guarded<T> out(n);
        const DequantizeBlockwise args{kDTypeOf<T>, a.data(), absmax.data(), kSigned.values,
                                       out.data(),  n,        block};
        const Code code = prepare_code(kSigned.values);
        const int64_t middle = n / 3;  // inside a block
        k.dequantize_blockwise(args, code, 0, middle);
        k.dequantize_blockwise(args, code, middle, n);
        return std::vector<Bytes>{out.bytes()};
      });
    }
  }
}

// ---- LLM.int8() ---------------------------------------------------------------------------------

TYPED_TEST(FloatKernel, Int8VectorwiseQuant) {
  using T = TypeParam;
  constexpr int64_t rows = 3;
  for (const int64_t cols : kSizes) {
    for (const float threshold : {0.0f, 4.0f}) {
      Guarded<T> a(numbers<T>(rows * cols, 8, true));
      this->expect_same_on_all("cols " + std::to_string(cols), [&](const Kernels& k) {
        Guarded<int8_t> out(rows * cols);
        Guarded<float> row_stats(rows);
        Guarded<uint8_t> outlier_cols(std::vector<uint8_t>(cols, 0));
        const Int8VectorwiseQuant args{kDTypeOf<T>,
                                       a.data(),
                                       out.data(),
                                       row_stats.data(),
                                       threshold > 0 ? outlier_cols.data() : nullptr,
                                       rows,
                                       cols,
                                       threshold};
        k.int8_row_stats(args, 0, 1);
        k.int8_row_stats(args, 1, rows);
        k.int8_quantize_rows(args, 0, 2);
        k.int8_quantize_rows(args, 2, rows);
        return std::vector<Bytes>{out.bytes(), row_stats.bytes(), outlier_cols.bytes()};
      });
    }
  }
}

TEST_F(Kernel, Int8LinearMatmul) {
  for (const int64_t m : {1, 3, 4, 5, 9}) {
    for (const int64_t n : {1, 2, 3, 6}) {
      for (const int64_t k_size : {0, 1, 15, 16, 31, 32, 33, 63, 64, 65, 127, 200}) {
        Guarded<int8_t> a(integers<int8_t>(m * k_size, 9));
        Guarded<int8_t> b(integers<int8_t>(n * k_size, 10));
        expect_same_on_all("k " + std::to_string(k_size), [&](const Kernels& k) {
          Guarded<int32_t> out(m * n);
          const Int8Matmul args{a.data(), b.data(), out.data(), m, n, k_size};
          k.int8_linear_matmul(args, 0, n / 2);
          k.int8_linear_matmul(args, n / 2, n);
          return std::vector<Bytes>{out.bytes()};
        });
      }
    }
  }
}

TEST_F(Kernel, Int8LinearMatmulIsExact) {
  constexpr int64_t m = 5;
  constexpr int64_t n = 3;
  constexpr int64_t k_size = 133;
  std::vector<int8_t> a = integers<int8_t>(m * k_size, 11);
  std::vector<int8_t> b = integers<int8_t>(n * k_size, 12);
  for (int64_t t = 0; t < k_size; ++t) a[t] = b[t] = -128;  // the largest products there are
  for (const std::string& isa : available_isas()) {
    ASSERT_TRUE(set_isa(isa));
    std::vector<int32_t> out(m * n);
    kernels().int8_linear_matmul({a.data(), b.data(), out.data(), m, n, k_size}, 0, n);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        int32_t sum = 0;
        for (int64_t t = 0; t < k_size; ++t) sum += a[i * k_size + t] * b[j * k_size + t];
        ASSERT_EQ(out[i * n + j], sum) << isa;
      }
    }
  }
}

TYPED_TEST(FloatKernel, Int8MmDequant) {
  using T = TypeParam;
  constexpr int64_t rows = 3;
  for (const int64_t cols : kSizes) {
    Guarded<int32_t> a(integers<int32_t>(rows * cols, 13));
    Guarded<float> row_stats(numbers<float>(rows, 14));
    Guarded<float> col_stats(numbers<float>(cols, 15));
    Guarded<BFloat16> bias(numbers<BFloat16>(cols, 16));
    for (const bool with_bias : {false, true}) {
      this->expect_same_on_all("cols " + std::to_string(cols), [&](const Kernels& k) {
        Guarded<T> out(rows * cols);
        const Int8MmDequant args{kDTypeOf<T>,
                                 DType::kBFloat16,
                                 a.data(),
                                 row_stats.data(),
                                 col_stats.data(),
                                 with_bias ? bias.data() : nullptr,
                                 out.data(),
                                 rows,
                                 cols};
        k.int8_mm_dequant(args, 0, 1);
        k.int8_mm_dequant(args, 1, rows);
        return std::vector<Bytes>{out.bytes()};
      });
    }
  }
}

// ---- Optimizers ---------------------------------------------------------------------------------

Hyper hyper_of(bool skip_zeros) {
  return {.lr = 1e-2,
          .beta1 = 0.9,
          .beta2 = 0.999,
          .beta3 = 0,
          .alpha = 0,
          .eps = 1e-8,
          .weight_decay = 0.1,
          .gnorm_scale = 0.5,
          .skip_zeros = skip_zeros};
}

std::vector<float> magnitudes(std::vector<float> values) {
  for (float& value : values) value = magnitude(value);
  return values;
}

TYPED_TEST(FloatKernel, OptimizerStep32bit) {
  using T = TypeParam;
  const int64_t step = 3;
  for (const int64_t n : kSizes) {
    for (const bool skip_zeros : {false, true}) {
      Guarded<T> grad(numbers<T>(n, 17, true));
      this->expect_same_on_all("n " + std::to_string(n), [&](const Kernels& k) {
        Guarded<T> param(numbers<T>(n, 18));
        Guarded<float> m(numbers<float>(n, 19));
        Guarded<float> v(magnitudes(numbers<float>(n, 20)));
        const OptimizerStep args{Rule::kAdam, kDTypeOf<T>, {nullptr, nullptr},
                                 &step,       nullptr,     hyper_of(skip_zeros)};
        const OptimizerTensor tensor{
            param.data(), grad.data(), {m.data(), v.data()}, {nullptr, nullptr}, n};
        k.optimizer_step_32bit(args, tensor, 0, n / 2);
        k.optimizer_step_32bit(args, tensor, n / 2, n);
        return std::vector<Bytes>{param.bytes(), m.bytes(), v.bytes()};
      });
    }
  }
}

TYPED_TEST(FloatKernel, OptimizerStep8bitBlockwise) {
  using T = TypeParam;
  const int64_t step = 3;
  const float lr = 2e-3f;
  const CodeTable linear = linear_levels();
  for (const CodeTable* first : {&kSigned, &linear}) {
    const Code codes[2] = {prepare_code(first->values), prepare_code(kUnsigned.values)};
    for (const int64_t n : kSizes) {
      for (const bool skip_zeros : {false, true}) {
        const int64_t blocks = ceil_div(n, kOptimizerBlock);
        Guarded<T> grad(numbers<T>(n, 21, true));
        this->expect_same_on_all("n " + std::to_string(n), [&](const Kernels& k) {
          Guarded<T> param(numbers<T>(n, 22));
          Guarded<uint8_t> m(integers<uint8_t>(n, 23));
          Guarded<uint8_t> v(integers<uint8_t>(n, 24));
          Guarded<float> m_max(magnitudes(numbers<float>(blocks, 25)));
          Guarded<float> v_max(magnitudes(numbers<float>(blocks, 26)));
          const OptimizerStep args{Rule::kAdam, kDTypeOf<T>, {first->values, kUnsigned.values},
                                   &step,       &lr,         hyper_of(skip_zeros)};
          const OptimizerTensor tensor{
              param.data(), grad.data(), {m.data(), v.data()}, {m_max.data(), v_max.data()}, n};
          k.optimizer_step_8bit_blockwise(args, tensor, codes, 0, blocks / 2);
          k.optimizer_step_8bit_blockwise(args, tensor, codes, blocks / 2, blocks);
          return std::vector<Bytes>{param.bytes(), m.bytes(), v.bytes(), m_max.bytes(),
                                    v_max.bytes()};
        });
      }
    }
  }
}

TEST_F(Kernel, OptimizerStep8bitKeepsTheRestOfABlockFromABadGradient) {
  constexpr int64_t n = 300;
  const int64_t step = 0;  // steps taken before this one
  const Code codes[2] = {prepare_code(kSigned.values), prepare_code(kUnsigned.values)};
  for (const std::string& isa : available_isas()) {
    ASSERT_TRUE(set_isa(isa));
    for (const float bad : {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN()}) {
      std::vector<float> grad(n, 1.0f);
      grad[5] = grad[299] = bad;
      std::vector<float> param(n, 3.0f);
      std::vector<uint8_t> m(n, 200), v(n, 200);
      std::vector<float> m_max(2, 1.0f), v_max(2, 1.0f);
      const OptimizerStep args{Rule::kAdam, DType::kFloat32, {kSigned.values, kUnsigned.values},
                               &step,       nullptr,         hyper_of(false)};
      const OptimizerTensor tensor{
          param.data(), grad.data(), {m.data(), v.data()}, {m_max.data(), v_max.data()}, n};
      kernels().optimizer_step_8bit_blockwise(args, tensor, codes, 0, 2);
      for (int64_t i = 0; i < n; ++i) {
        const bool hit = i == 5 || i == 299;
        EXPECT_EQ(param[i] == 3.0f, hit) << isa << " " << i;
        EXPECT_EQ(m[i], hit ? 127 : 255) << isa << " " << i;
        EXPECT_EQ(v[i], hit ? 0 : 255) << isa << " " << i;
      }
      for (const float x : {m_max[0], m_max[1], v_max[0], v_max[1]}) EXPECT_TRUE(is_finite(x));
    }
  }
}

TEST_F(Kernel, OptimizerStep8bitStatesThatOverflowStayFinite) {
  constexpr int64_t n = 20;
  const int64_t step = 0;  // steps taken before this one
  const Code codes[2] = {prepare_code(kSigned.values), prepare_code(kUnsigned.values)};
  for (const std::string& isa : available_isas()) {
    ASSERT_TRUE(set_isa(isa));
    std::vector<float> grad(n, 1e30f);  // its square is beyond float
    std::vector<float> param(n, 3.0f);
    std::vector<uint8_t> m(n, 0), v(n, 0);
    std::vector<float> m_max(1, 0.0f), v_max(1, 0.0f);
    Hyper hyper = hyper_of(false);
    hyper.gnorm_scale = 1;
    const OptimizerStep args{Rule::kAdam, DType::kFloat32, {kSigned.values, kUnsigned.values},
                             &step,       nullptr,         hyper};
    const OptimizerTensor tensor{
        param.data(), grad.data(), {m.data(), v.data()}, {m_max.data(), v_max.data()}, n};
    kernels().optimizer_step_8bit_blockwise(args, tensor, codes, 0, 1);
    EXPECT_EQ(v_max[0], kFloatMax) << isa;
    EXPECT_TRUE(is_finite(m_max[0])) << isa;
    for (int64_t i = 0; i < n; ++i) {
      EXPECT_EQ(v[i], 255) << isa;
      EXPECT_EQ(m[i], 255) << isa;
      EXPECT_TRUE(is_finite(param[i])) << isa;
    }
  }
}

}  // namespace
}  // namespace bnb::cpu
