// Quantization and int8 kernels on every instruction set: the same bits as the baseline, for ragged
// sizes and for any cut of the work, and not a byte written beside its outputs.
// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "bitsandbytes/blocks.h"
#include "cpu/kernel_test.h"
#include "cpu/quantize.h"

namespace bnb::cpu {
namespace {

TYPED_TEST_SUITE(FloatKernel, Floats);

constexpr int64_t kBlockSizes[] = {1, 3, 16, 64, 100, 256, 4096};

// ---- Blockwise quantization ---------------------------------------------------------------------

TYPED_TEST(FloatKernel, QuantizeBlockwise) {
  using T = TypeParam;
  const CodeTable linear = linear_levels();
  for (const CodeTable* levels : {&kSigned, &kUnsigned, &linear}) {
    const Code code = prepare_code(levels->values);
    SearchedCode searched;
    prepare_search(levels->values, true, true, searched);
    ASSERT_TRUE(searched.buckets);
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
            k.quantize_blockwise(args, code, searched, 0, middle);
            k.quantize_blockwise(args, code, searched, middle, blocks);
            return std::vector<Bytes>{out.bytes(), absmax.bytes()};
          });
        }
      }
    }
  }
}

// Levels between -1 and 1, closer together near zero; `offset` moves all but the ends.
CodeTable curved_levels(float offset) {
  CodeTable t{};
  for (int k = 0; k < kCodeLevels; ++k) {
    const float x = static_cast<float>(2 * k - (kCodeLevels - 1)) / (kCodeLevels - 1);
    t[k] = x * std::fabs(x) + (k > 0 && k < kCodeLevels - 1 ? offset : 0.0f);
  }
  return t;
}

TYPED_TEST(FloatKernel, QuantizeBlockwiseFollowsTheDefinition) {
  using T = TypeParam;
  constexpr int64_t n = 1000;
  constexpr int64_t block = 100;
  std::vector<T> values = numbers<T>(n / 2, 3, true);
  for (const T x : numbers<T>(n / 2, 4)) values.push_back(x);  // blocks of finite numbers
  const float small[] = {0.0f, -0.0f, 1e-6f, -1e-6f, 1e-8f, -1e-8f, 1e-20f, -1e-20f, 1e-44f};
  for (size_t i = 0; i < values.size(); i += 5) {
    values[i] = from_float<T>(small[i / 5 % std::size(small)]);
  }
  CodeTable short_table = linear_levels();
  std::fill(short_table.values + 100, short_table.values + kCodeLevels,
            std::numeric_limits<float>::quiet_NaN());
  CodeTable crowded = linear_levels();  // two thresholds in a bucket
  crowded[200] = crowded[199] + 1e-4f;
  crowded[201] = crowded[199] + 2e-4f;
  CodeTable padded = linear_levels();  // zero many times
  std::fill(padded.values + 100, padded.values + 156, 0.0f);
  CodeTable tiny = curved_levels(0.0f);  // levels next to zero
  tiny[127] = -1e-20f;
  tiny[128] = 1e-44f;
  tiny[129] = 1e-30f;
  struct Case {
    CodeTable levels;
    bool buckets;
  };
  const Case cases[] = {{kSigned, true},
                        {kUnsigned, true},
                        {linear_levels(), true},
                        {curved_levels(0.0f), true},
                        {curved_levels(1e-4f), true},
                        {short_table, true},
                        {padded, true},
                        {tiny, true},
                        {crowded, false}};
  for (const Case& c : cases) {
    for (const auto& [buckets, scaled] : {std::pair{false, true}, {true, true}, {true, false}}) {
      Code code = prepare_code(c.levels.values);
      code.kind = buckets ? CodeKind::kTable : code.kind;
      SearchedCode searched;
      prepare_search(c.levels.values, buckets, scaled, searched);
      ASSERT_EQ(searched.buckets, c.buckets && buckets);
      const ThresholdTable thresholds = make_thresholds(c.levels);
      const auto threshold = [&](int k) { return thresholds[k]; };
      std::vector<uint8_t> expected(n);
      std::vector<float> scales(n / block, 0.0f);
      for (int64_t i = 0; i < n; ++i) {
        scales[i / block] = absmax_of(scales[i / block], to_float(values[i]));
      }
      for (int64_t i = 0; i < n; ++i) {
        const float inverse = scaled ? 1.0f / scales[i / block] : 1.0f;
        const float x = to_float(values[i]) * inverse;
        expected[i] = is_nan(x) ? 0 : static_cast<uint8_t>(search_code(threshold, x));
      }
      for (const std::string& isa : available_isas()) {
        ASSERT_TRUE(set_isa(isa));
        std::vector<uint8_t> out(n);
        std::vector<float> absmax(n / block);
        kernels().quantize_blockwise({kDTypeOf<T>, values.data(), c.levels.values, out.data(),
                                      scaled ? absmax.data() : nullptr, n, block},
                                     code, searched, 0, n / block);
        for (int64_t i = 0; i < n; ++i) ASSERT_EQ(out[i], expected[i]) << isa << " " << i;
        for (int64_t b = 0; scaled && b < n / block; ++b) {
          ASSERT_TRUE(absmax[b] == scales[b] || (is_nan(absmax[b]) && is_nan(scales[b]))) << isa;
        }
      }
    }
  }
}

// Tables that are searched, with and without scale, to the nearest level and stochastically.
TYPED_TEST(FloatKernel, QuantizeBlockwiseOptions) {
  using T = TypeParam;
  CodeTable shuffled = kSigned;
  std::mt19937 random(17);
  std::shuffle(shuffled.values, shuffled.values + kCodeLevels, random);
  CodeTable shorter = linear_levels();
  std::fill(shorter.values + 100, shorter.values + kCodeLevels,
            std::numeric_limits<float>::quiet_NaN());
  Guarded<float> rand([&] {
    std::vector<float> values(100);
    for (float& value : values) value = std::uniform_real_distribution<float>()(random);
    return values;
  }());
  const CodeTable* const tables[] = {&kSigned, &kUnsigned, &shuffled, &shorter};
  for (const CodeTable* levels : tables) {
    for (const int64_t n : kSizes) {
      for (const bool scaled : {false, true}) {
        for (const bool stochastic : {false, true}) {
          constexpr int64_t block = 100;
          const int64_t blocks = ceil_div(n, block);
          Guarded<T> a(numbers<T>(n, 7, true));
          this->expect_same_on_all("n " + std::to_string(n), [&](const Kernels&) {
            Guarded<uint8_t> out(n);
            Guarded<float> absmax(scaled ? blocks : 0);
            QuantizeBlockwise args{
                kDTypeOf<T>, a.data(), levels->values, out.data(), scaled ? absmax.data() : nullptr,
                n,           block};
            if (stochastic) {
              args.rand = rand.data();
              args.rand_size = 100;
              args.rand_offset = 99;
            }
            const Quantizer quantizer(args);
            quantizer.run(0, blocks / 2);
            quantizer.run(blocks / 2, blocks);
            if (levels == &shorter) {
              for (const uint8_t code : out.bytes()) EXPECT_LT(code, 100);
            }
            return std::vector<Bytes>{out.bytes(), absmax.bytes()};
          });
        }
      }
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
                                       nullptr,
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

// Runs a product as callers do: rows staged in two parts, then the panels in two parts.
template <class Arguments>
void run_int8(const Kernels& k, const Arguments& args,
              void (*multiply)(const Arguments&, const void*, void*, int64_t, int64_t)) {
  const ProductSpace space = k.int8_matmul_space(args.m, args.k);
  Guarded<uint8_t> staged(space.staged + 63);
  Guarded<uint8_t> panel(space.panel + 63);
  const auto aligned = [](uint8_t* p) {
    return p + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64;
  };
  uint8_t* const to = aligned(staged.data());
  k.int8_matmul_stage(args.a, args.m, args.k, to, 0, args.m / 2);
  k.int8_matmul_stage(args.a, args.m, args.k, to, args.m / 2, args.m);
  const int64_t panels = ceil_div(args.n, kGemmPanel);
  multiply(args, to, aligned(panel.data()), 0, panels / 2);
  multiply(args, to, aligned(panel.data()), panels / 2, panels);
}

struct ProductShape {
  int64_t m;
  int64_t n;
  int64_t k;
};

// Rows of one tile, of several, of several blocks; columns of a part of a panel and of several;
// vectors and chunks along k, whole and not.
constexpr ProductShape kProducts[] = {
    {1, 1, 0},    {1, 3, 1},    {2, 64, 15},   {3, 65, 16},   {5, 2, 63},   {6, 6, 64},
    {7, 130, 65}, {13, 5, 127}, {20, 67, 200}, {300, 66, 33}, {2, 3, 4097}, {9, 5, 8200},
};

TEST_F(Kernel, Int8LinearMatmul) {
  for (const auto& [m, n, k_size] : kProducts) {
    std::vector<int8_t> left = integers<int8_t>(m * k_size, 9);
    std::vector<int8_t> right = integers<int8_t>(n * k_size, 10);
    for (int64_t t = 0; t < k_size; ++t) left[t] = right[t] = -128;  // the largest products
    Guarded<int8_t> a(left);
    Guarded<int8_t> b(right);
    for (const std::string& isa : available_isas()) {
      ASSERT_TRUE(set_isa(isa));
      Guarded<int32_t> out(m * n);
      const Int8Matmul args{a.data(), b.data(), out.data(), m, n, k_size};
      run_int8(kernels(), args, kernels().int8_linear_matmul);
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          int32_t sum = 0;
          for (int64_t t = 0; t < k_size; ++t) sum += left[i * k_size + t] * right[j * k_size + t];
          ASSERT_EQ(out.data()[i * n + j], sum) << isa << ' ' << m << ' ' << n << ' ' << k_size;
        }
      }
    }
  }
}

TYPED_TEST(FloatKernel, Int8ScaledMatmul) {
  using T = TypeParam;
  for (const auto& [m, n, k_size] : kProducts) {
    Guarded<int8_t> a(integers<int8_t>(m * k_size, 17));
    Guarded<int8_t> b(integers<int8_t>(n * k_size, 18));
    Guarded<float> row_stats(numbers<float>(m, 19));
    Guarded<float> col_stats(numbers<float>(n, 20));
    Guarded<Half> bias(numbers<Half>(n, 21));
    Guarded<T> values(numbers<T>(m * k_size, 22));
    // No outlier column, one, and more than are multiplied at a time.
    for (const int64_t outliers : {int64_t{0}, int64_t{1}, int64_t{150}}) {
      std::vector<int32_t> columns(1 + k_size);
      for (int64_t i = 0; i < k_size && i < outliers; ++i) {
        columns[1 + i] = static_cast<int32_t>(k_size - std::min(outliers, k_size) + i);
        columns[0] = static_cast<int32_t>(i + 1);
      }
      Guarded<int32_t> list(columns);
      this->expect_same_on_all("k " + std::to_string(k_size), [&](const Kernels& k) {
        Guarded<T> out(m * n);
        const Int8ScaledMatmul args{kDTypeOf<T>,
                                    DType::kFloat16,
                                    a.data(),
                                    b.data(),
                                    row_stats.data(),
                                    col_stats.data(),
                                    outliers == 1 ? nullptr : bias.data(),
                                    outliers > 0 ? values.data() : nullptr,
                                    outliers > 0 ? list.data() : nullptr,
                                    out.data(),
                                    m,
                                    n,
                                    k_size};
        run_int8(k, args, k.int8_scaled_matmul);
        return std::vector<Bytes>{out.bytes()};
      });
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

}  // namespace
}  // namespace bnb::cpu
