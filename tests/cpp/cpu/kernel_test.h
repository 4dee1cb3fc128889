// What the tests of CPU kernels share: guarded arrays, numbers, and runs on every instruction set.
// SPDX-License-Identifier: MIT
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "bitsandbytes/code/dynamic8.h"
#include "bitsandbytes/numeric.h"
#include "cpu/dispatch.h"

namespace bnb::cpu {

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
inline constexpr DType kDTypeOf = std::is_same_v<T, float>  ? DType::kFloat32
                                  : std::is_same_v<T, Half> ? DType::kFloat16
                                                            : DType::kBFloat16;

// Numbers over many magnitudes, finite in T, with some special ones when `special` is set.
template <class T>
std::vector<T> numbers(size_t n, uint32_t seed, bool special = false) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<T> values(n);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float specials[] = {nan, kInfinity, -kInfinity, 0.0f, -0.0f, 1e-40f, -3e38f};
  for (size_t i = 0; i < n; ++i) {
    float x = normal(random) * std::exp2(std::round(4 * normal(random)));
    x = std::min(std::max(x, -6e4f), 6e4f);
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

inline constexpr CodeTable kSigned = SignedDynamic8::make_levels();
inline constexpr CodeTable kUnsigned = UnsignedDynamic8::make_levels();

inline CodeTable linear_levels() {
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

inline constexpr int64_t kSizes[] = {1,  2,  7,  8,  9,   15,  16,  17,  31,
                                     33, 63, 64, 65, 255, 256, 257, 1000};

}  // namespace bnb::cpu
