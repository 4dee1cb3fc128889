// Order keys of every 16-bit number, and quantiles by counting against sorting, for any cut of the
// work. SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "cpu/kernel_test.h"
#include "cpu/quantiles.h"

namespace bnb::cpu {
namespace {

uint32_t bits_of(float x) { return float_bits(x); }
uint32_t bits_of(Half x) { return x.bits; }
uint32_t bits_of(BFloat16 x) { return x.bits; }

template <class T>
class Quantiles : public testing::Test {};
TYPED_TEST_SUITE(Quantiles, Floats);

template <class T>
void expect_order_and_return() {
  std::vector<uint32_t> keys;
  for (uint32_t bits = 0; bits < 1u << 16; ++bits) {
    const float x = to_float(T{static_cast<uint16_t>(bits)});
    const uint32_t key = OrderKey<T>::of_bits(bits);
    const float back = OrderKey<T>::to_number(key);
    if (is_nan(x)) {
      EXPECT_EQ(key, 0xffffu);
      EXPECT_EQ(float_bits(back), 0x7fc00000u);
    } else {
      EXPECT_EQ(float_bits(back), float_bits(x));
      keys.push_back(key);
    }
  }
  std::sort(keys.begin(), keys.end());
  for (size_t i = 1; i < keys.size(); ++i) {
    const float low = OrderKey<T>::to_number(keys[i - 1]);
    const float high = OrderKey<T>::to_number(keys[i]);
    EXPECT_TRUE(low < high || (low == 0 && sign_bit(low) && high == 0 && !sign_bit(high)));
  }
}

TEST(OrderKeys, FollowTheNumbers) {
  expect_order_and_return<Half>();
  expect_order_and_return<BFloat16>();
  const float ascending[] = {-kInfinity, -kFloatMax, -1.0f, -1e-45f,   -0.0f,
                             0.0f,       1e-45f,     1.0f,  kFloatMax, kInfinity};
  for (size_t i = 1; i < std::size(ascending); ++i) {
    const uint32_t low = OrderKey<float>::of_bits(float_bits(ascending[i - 1]));
    const uint32_t high = OrderKey<float>::of_bits(float_bits(ascending[i]));
    EXPECT_LT(low, high);
    EXPECT_LT(high, OrderKey<float>::of_bits(0xffc00001u));
    EXPECT_EQ(float_bits(OrderKey<float>::to_number(high)), float_bits(ascending[i]));
  }
}

TEST(QuantileRanks, RoundHalvesUpAndStayInside) {
  const QuantileRanks all = quantile_ranks(256, 0.0);
  for (int k = 0; k < kQuantiles; ++k) EXPECT_EQ(all.values[k], static_cast<uint64_t>(k));
  EXPECT_EQ(quantile_ranks(2, 0.5).values[7], 1u);  // 0.5
  EXPECT_EQ(quantile_ranks(1, 0.3).values[255], 0u);
  const int64_t n = (int64_t{1} << 40) + 1;
  EXPECT_EQ(quantile_ranks(n, 0.0).values[255], static_cast<uint64_t>(n - 1));
  EXPECT_EQ(quantile_ranks(n, 0.25).values[0], static_cast<uint64_t>(n / 4));
}

TYPED_TEST(Quantiles, AreElementsInAscendingOrder) {
  using T = TypeParam;
  for (const int64_t n : {1, 2, 255, 1000, 20011}) {
    Guarded<T> a(numbers<T>(n, 5, true));
    std::vector<uint32_t> keys(n);
    std::transform(a.data(), a.data() + n, keys.begin(),
                   [](T x) { return OrderKey<T>::of_bits(bits_of(x)); });
    std::sort(keys.begin(), keys.end());
    for (const int64_t pieces : {1, 3}) {
      Guarded<float> out(kQuantiles);
      QuantileSearch search({kDTypeOf<T>, a.data(), out.data(), n, 0.01}, pieces);
      for (int pass = 0; pass < search.passes(); ++pass) {
        for (int64_t piece = 0; piece < search.pieces(); ++piece) search.count(pass, piece);
        search.locate(pass);
      }
      const QuantileRanks ranks = quantile_ranks(n, 0.01);
      for (int k = 0; k < kQuantiles; ++k) {
        const float expected = OrderKey<T>::to_number(keys[ranks.values[k]]);
        ASSERT_EQ(float_bits(out.data()[k]), float_bits(expected)) << n << " " << k;
      }
    }
  }
}

}  // namespace
}  // namespace bnb::cpu
