// 4-bit quantization kernels on every instruction set: the same bits as the baseline and as the
// definition, for ragged sizes and any cut of the work, and not a byte written beside the outputs.
// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bitsandbytes/blocks.h"
#include "cpu/kernel_test.h"

namespace bnb::cpu {
namespace {

TYPED_TEST_SUITE(FloatKernel, Floats);

constexpr int64_t kBlockSizes[] = {32, 64, 256, 4096};
constexpr Code4 kAllCodes[] = {Code4::kNf4, Code4::kFp4};

TYPED_TEST(FloatKernel, Quantize4bit) {
  using T = TypeParam;
  for (const Code4 code : kAllCodes) {
    for (const int64_t n : kSizes) {
      for (const int64_t block : kBlockSizes) {
        for (const bool special : {false, true}) {
          Guarded<T> a(numbers<T>(n, 7, special));
          const int64_t blocks = ceil_div(n, block);
          this->expect_same_on_all("n " + std::to_string(n), [&](const Kernels& k) {
            Guarded<uint8_t> out(ceil_div(n, 2));
            Guarded<float> absmax(blocks);
            const Quantize4bit args{kDTypeOf<T>,   code, a.data(), out.data(),
                                    absmax.data(), n,    block};
            const int64_t middle = blocks / 2;
            k.quantize_4bit(args, 0, middle);
            k.quantize_4bit(args, middle, blocks);
            return std::vector<Bytes>{out.bytes(), absmax.bytes()};
          });
        }
      }
    }
  }
}

// [ceil(n / 2)] bytes by the definition.
template <class Code, class T>
std::vector<uint8_t> expected_codes(const std::vector<T>& a, const std::vector<float>& absmax,
                                    int64_t block) {
  std::vector<uint8_t> packed((a.size() + 1) / 2);
  for (size_t i = 0; i < 2 * packed.size(); ++i) {
    const float x = i < a.size() ? to_float(a[i]) : 0.0f;
    const int code = encode4<Code>(x * (1.0f / absmax[i / static_cast<size_t>(block)]));
    packed[i / 2] = static_cast<uint8_t>(packed[i / 2] | code << (i % 2 == 0 ? 4 : 0));
  }
  return packed;
}

TYPED_TEST(FloatKernel, Quantize4bitFollowsTheDefinition) {
  using T = TypeParam;
  constexpr int64_t n = 1001;
  constexpr int64_t block = 32;
  std::vector<T> values = numbers<T>(n, 3, true);
  for (int64_t i = 0; i < block; ++i) values[2 * block + i] = from_float<T>(0.0f);
  const int64_t blocks = ceil_div(n, block);
  std::vector<float> scales(blocks, 0.0f);
  for (int64_t i = 0; i < n; ++i) {
    scales[i / block] = absmax_of(scales[i / block], to_float(values[i]));
  }
  const std::vector<uint8_t> nf4 = expected_codes<Nf4>(values, scales, block);
  const std::vector<uint8_t> fp4 = expected_codes<Fp4>(values, scales, block);
  for (const std::string& isa : available_isas()) {
    ASSERT_TRUE(set_isa(isa));
    for (const Code4 code : kAllCodes) {
      std::vector<uint8_t> out(nf4.size());
      std::vector<float> absmax(blocks);
      kernels().quantize_4bit(
          {kDTypeOf<T>, code, values.data(), out.data(), absmax.data(), n, block}, 0, blocks);
      EXPECT_EQ(out, code == Code4::kNf4 ? nf4 : fp4) << isa;
      for (int64_t b = 0; b < blocks; ++b) {
        ASSERT_TRUE(absmax[b] == scales[b] || (is_nan(absmax[b]) && is_nan(scales[b]))) << isa;
      }
    }
  }
}

TYPED_TEST(FloatKernel, Dequantize4bit) {
  using T = TypeParam;
  for (const Code4 code : kAllCodes) {
    for (const int64_t n : kSizes) {
      for (const int64_t block : kBlockSizes) {
        const int64_t blocks = ceil_div(n, block);
        Guarded<uint8_t> a(integers<uint8_t>(ceil_div(n, 2), 5));
        Guarded<float> absmax(numbers<float>(blocks, 6));
        this->expect_same_on_all("n " + std::to_string(n), [&](const Kernels& k) {
          Guarded<T> out(n);
          const Dequantize4bit args{kDTypeOf<T>, code, a.data(), absmax.data(),
                                    out.data(),  n,    block};
          const int64_t middle = blocks / 3;
          k.dequantize_4bit(args, 0, middle);
          k.dequantize_4bit(args, middle, blocks);
          return std::vector<Bytes>{out.bytes()};
        });
      }
    }
  }
}

TYPED_TEST(FloatKernel, Dequantize4bitFollowsTheDefinition) {
  using T = TypeParam;
  constexpr int64_t n = 517;
  constexpr int64_t block = 64;
  const std::vector<uint8_t> a = integers<uint8_t>(ceil_div(n, 2), 4);
  const std::vector<float> absmax = numbers<float>(ceil_div(n, block), 5);
  for (const std::string& isa : available_isas()) {
    ASSERT_TRUE(set_isa(isa));
    for (const Code4 code : kAllCodes) {
      std::vector<T> out(n);
      kernels().dequantize_4bit({kDTypeOf<T>, code, a.data(), absmax.data(), out.data(), n, block},
                                0, ceil_div(n, block));
      for (int64_t i = 0; i < n; ++i) {
        const int nibble = i % 2 == 0 ? a[i / 2] >> 4 : a[i / 2] & 15;
        const float level = kCodes4[static_cast<int>(code)].levels[nibble];
        const T expected = from_float<T>(level * absmax[i / block]);
        ASSERT_EQ(float_bits(to_float(out[i])), float_bits(to_float(expected))) << isa << " " << i;
      }
    }
  }
}

// What dequantization with quantized scales must equal: that with the scales themselves.
TYPED_TEST(FloatKernel, NestedScales) {
  using T = TypeParam;
  constexpr int64_t n = 1000;
  constexpr int64_t block = 32;
  constexpr int64_t nested_block = 5;
  constexpr int64_t blocks = (n + block - 1) / block;
  const std::vector<uint8_t> a = integers<uint8_t>(n, 5);
  const std::vector<uint8_t> codes = integers<uint8_t>(blocks, 6);
  const std::vector<float> second = numbers<float>(ceil_div(blocks, nested_block), 7);
  const float offset = 0.3f;
  std::vector<float> absmax(blocks);
  for (int64_t b = 0; b < blocks; ++b) {
    absmax[b] = kSigned[codes[b]] * second[b / nested_block] + offset;
  }
  const Scales nested{second.data(), codes.data(), kSigned.values, &offset, nested_block};
  const Code code = prepare_code(kUnsigned.values);
  for (const std::string& isa : available_isas()) {
    ASSERT_TRUE(set_isa(isa));
    const auto decode8 = [&](const Scales& scales) {
      Guarded<T> out(n);
      kernels().dequantize_blockwise(
          {kDTypeOf<T>, a.data(), scales, kUnsigned.values, out.data(), n, block}, code, 0, n);
      return out.bytes();
    };
    const auto decode4 = [&](const Scales& scales) {
      Guarded<T> out(n);
      kernels().dequantize_4bit({kDTypeOf<T>, Code4::kNf4, a.data(), scales, out.data(), n, block},
                                0, blocks);
      return out.bytes();
    };
    EXPECT_EQ(decode8(nested), decode8(absmax.data())) << isa;
    EXPECT_EQ(decode4(nested), decode4(absmax.data())) << isa;
  }
}

}  // namespace
}  // namespace bnb::cpu
