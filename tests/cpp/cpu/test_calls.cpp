// Whole calls: what is refused, and that results do not depend on the threads.
// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/cpu.h"
#include "bitsandbytes/kernels/check.h"
#include "cpu/kernel_test.h"

namespace bnb::cpu {
namespace {

template <class Body>
std::string refusal(const Body& body) {
  try {
    body();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "accepted";
}

// ---- Threads ------------------------------------------------------------------------------------

TEST(Threads, CoverEveryIndexOnce) {
  for (const int count : {1, 2, 3, 7}) {
    const Threads threads(count);
    EXPECT_EQ(threads.count(), count);
    for (const int64_t n : {0, 1, 2, 5, 64, 1000}) {
      for (const int64_t grain : {1, 3, 64, 2000}) {
        std::vector<std::atomic<int>> visits(static_cast<size_t>(n));
        std::atomic<int> ranges{0};
        threads.parallel_for(n, grain, [&](int64_t first, int64_t last) {
          ++ranges;
          for (int64_t i = first; i < last; ++i) ++visits[static_cast<size_t>(i)];
        });
        for (const auto& visit : visits) EXPECT_EQ(visit, 1);
        EXPECT_LE(ranges, count);
        EXPECT_LE((ranges - 1) * grain, n) << "a range is smaller than the grain";
      }
    }
  }
}

TEST(Threads, RefuseNone) {
  EXPECT_EQ(refusal([] { Threads(0); }), "Threads: count must be above 0, got 0");
  EXPECT_EQ(refusal([] { Threads(2, nullptr); }),
            "Threads: parallel_for must be a function, got 0");
}

// ---- Results do not depend on threads -----------------------------------------------------------

constexpr int64_t kN = 185'037;  // work for several threads
constexpr int64_t kBlock = 64;

// One index after the other, from the last to the first, by the threads of a program.
const Threads kBackwards(5, [](int64_t count, int64_t grain, const Threads::Body& body) {
  for (int64_t last = count; last > 0; last -= grain)
    body(std::max<int64_t>(last - grain, 0), last);
});

template <class Body>
void expect_same_for_all_threads(const Body& body) {
  const std::vector<Bytes> expected = body(Threads());
  EXPECT_TRUE(body(Threads(3)) == expected);
  EXPECT_TRUE(body(kBackwards) == expected);
}

TEST(Calls, QuantizeBlockwise) {
  const std::vector<float> a = numbers<float>(kN, 1);
  expect_same_for_all_threads([&](const Threads& threads) {
    Guarded<uint8_t> codes(kN);
    Guarded<float> absmax(ceil_div(kN, kBlock));
    Guarded<Half> y(kN);
    quantize_blockwise({.dtype = DType::kFloat32,
                        .a = a.data(),
                        .code = signed_dynamic_map(),
                        .out = codes.data(),
                        .absmax = absmax.data(),
                        .n = kN,
                        .block_size = kBlock},
                       threads);
    dequantize_blockwise({.dtype = DType::kFloat16,
                          .a = codes.data(),
                          .scales = absmax.data(),
                          .code = signed_dynamic_map(),
                          .out = y.data(),
                          .n = kN,
                          .block_size = kBlock},
                         threads);
    for (int64_t i = 0; i < kN; ++i) {
      EXPECT_NEAR(to_float(y.data()[i]), a[i], 0.01f * absmax.data()[i / kBlock]);
    }
    return std::vector<Bytes>{codes.bytes(), absmax.bytes(), y.bytes()};
  });
}

TEST(Calls, Quantize4bit) {
  const std::vector<BFloat16> a = numbers<BFloat16>(kN, 2);
  expect_same_for_all_threads([&](const Threads& threads) {
    Guarded<uint8_t> codes(ceil_div(kN, 2));
    Guarded<float> absmax(ceil_div(kN, kBlock));
    Guarded<float> y(kN);
    quantize_4bit({.dtype = DType::kBFloat16,
                   .code = Code4::kNf4,
                   .a = a.data(),
                   .out = codes.data(),
                   .absmax = absmax.data(),
                   .n = kN,
                   .block_size = kBlock},
                  threads);
    dequantize_4bit({.dtype = DType::kFloat32,
                     .code = Code4::kNf4,
                     .a = codes.data(),
                     .scales = absmax.data(),
                     .out = y.data(),
                     .n = kN,
                     .block_size = kBlock},
                    threads);
    for (int64_t i = 0; i < kN; ++i) {
      EXPECT_NEAR(y.data()[i], to_float(a[i]), 0.16f * absmax.data()[i / kBlock]);
    }
    return std::vector<Bytes>{codes.bytes(), absmax.bytes(), y.bytes()};
  });
}

TEST(Calls, EstimateQuantiles) {
  std::vector<float> a(kN);
  for (int64_t i = 0; i < kN; ++i) a[i] = static_cast<float>((i * 7919) % kN);  // 0 ... n - 1
  expect_same_for_all_threads([&](const Threads& threads) {
    Guarded<float> out(kQuantiles);
    estimate_quantiles({DType::kFloat32, a.data(), out.data(), kN, 0.0}, threads);
    EXPECT_EQ(out.data()[0], 0.0f);
    EXPECT_EQ(out.data()[kQuantiles - 1], static_cast<float>(kN - 1));
    return std::vector<Bytes>{out.bytes()};
  });
}

TEST(Calls, OfNothing) {
  constexpr DType kFloat = DType::kFloat32;
  const float* const map = signed_dynamic_map();
  quantize_blockwise({kFloat, nullptr, map, nullptr, nullptr, 0, 64});
  dequantize_blockwise({kFloat, nullptr, nullptr, map, nullptr, 0, 64});
  quantize_4bit({kFloat, Code4::kNf4, nullptr, nullptr, nullptr, 0, 64});
  dequantize_4bit({kFloat, Code4::kNf4, nullptr, nullptr, nullptr, 0, 64});
}

// ---- What is refused ----------------------------------------------------------------------------

constexpr int64_t kFew = 64;

// Arguments that are right, and places for what they lead to.
struct Right {
  std::vector<float> a = std::vector<float>(kFew, 1.0f);
  std::vector<uint8_t> bytes = std::vector<uint8_t>(kFew);
  std::vector<float> numbers = std::vector<float>(kCodeLevels);
  const float* map = signed_dynamic_map();

  QuantizeBlockwise quantize{DType::kFloat32, a.data(), map, bytes.data(),
                             numbers.data(),  kFew,     64};
  DequantizeBlockwise dequantize{DType::kFloat32, bytes.data(), a.data(), map,
                                 numbers.data(),  kFew,         64};
  Quantize4bit quantize4{DType::kFloat32, Code4::kFp4, a.data(), bytes.data(),
                         numbers.data(),  kFew,        64};
  Dequantize4bit dequantize4{
      DType::kFloat32, Code4::kFp4, bytes.data(), a.data(), numbers.data(), kFew, 64};
  EstimateQuantiles quantiles{DType::kFloat32, a.data(), numbers.data(), kFew, 0.1};
};

// Changes one member of `arguments` of Right, and expects the sentence.
#define EXPECT_REFUSED(function, arguments, change, sentence) \
  {                                                           \
    Right right;                                              \
    EXPECT_NO_THROW(function(right.arguments));               \
    auto& args = right.arguments;                             \
    change;                                                   \
    EXPECT_EQ(refusal([&] { function(args); }), sentence);    \
  }

TEST(Refused, QuantizeBlockwise) {
  EXPECT_REFUSED(quantize_blockwise, quantize, args.n = -1,
                 "quantize_blockwise: n must be 0 or more, got -1");
  EXPECT_REFUSED(quantize_blockwise, quantize, args.block_size = 0,
                 "quantize_blockwise: block_size must be above 0, got 0");
  EXPECT_REFUSED(quantize_blockwise, quantize, args.dtype = DType::kCount,
                 "quantize_blockwise: dtype must be kFloat32, kFloat16 or kBFloat16, got 3");
  EXPECT_REFUSED(quantize_blockwise, quantize, args.a = nullptr,
                 "quantize_blockwise: a must be a pointer to its elements, got null");
  EXPECT_REFUSED(quantize_blockwise, quantize, args.code = nullptr,
                 "quantize_blockwise: code must be a pointer to its elements, got null");
  EXPECT_REFUSED(quantize_blockwise, quantize, args.out = nullptr,
                 "quantize_blockwise: out must be a pointer to its elements, got null");
  EXPECT_REFUSED(quantize_blockwise, quantize, args.a = right.bytes.data() + 2,
                 "quantize_blockwise: a must be at a multiple of 4 bytes, got an address 2 bytes "
                 "behind one");
  EXPECT_REFUSED(quantize_blockwise, quantize, args.rand = right.map,
                 "quantize_blockwise: rand_size must be above 0, got 0");
  EXPECT_REFUSED(quantize_blockwise, quantize,
                 (args.rand = right.map, args.rand_size = 5, args.rand_offset = 5),
                 "quantize_blockwise: rand_offset must be 0 to rand_size - 1, got 5");
}

TEST(Refused, BlockSizesThatGpusLack) {
  Right right;
  for (const int64_t block_size : {0, 1, 16, 48, 100, 8192}) {
    right.quantize.block_size = block_size;
    EXPECT_EQ(refusal([&] { check_arguments(right.quantize, BlockSizes::kPowersOfTwo); }),
              "quantize_blockwise: block_size must be a power of two from 32 to 4096, got " +
                  std::to_string(block_size));
    if (block_size > 0) {
      EXPECT_NO_THROW(check_arguments(right.quantize, BlockSizes::kAny));
    }
  }
}

TEST(Refused, DequantizeBlockwise) {
  EXPECT_REFUSED(dequantize_blockwise, dequantize, args.block_size = -64,
                 "dequantize_blockwise: block_size must be above 0, got -64");
  EXPECT_REFUSED(dequantize_blockwise, dequantize, args.scales = nullptr,
                 "dequantize_blockwise: scales.absmax must be a pointer to its elements, got null");
  EXPECT_REFUSED(dequantize_blockwise, dequantize, args.scales.codes = right.bytes.data(),
                 "dequantize_blockwise: scales.code must be a pointer to its elements, got null");
  EXPECT_REFUSED(dequantize_blockwise, dequantize,
                 (args.scales = {right.map, right.bytes.data(), right.map, nullptr, 256}),
                 "dequantize_blockwise: scales.offset must be a pointer to its elements, got null");
  EXPECT_REFUSED(dequantize_blockwise, dequantize,
                 (args.scales = {right.map, right.bytes.data(), right.map, right.map, 0}),
                 "dequantize_blockwise: scales.block_size must be above 0, got 0");
}

TEST(Refused, FourBits) {
  EXPECT_REFUSED(quantize_4bit, quantize4, args.block_size = 96,
                 "quantize_4bit: block_size must be a power of two from 32 to 4096, got 96");
  EXPECT_REFUSED(quantize_4bit, quantize4, args.code = Code4::kCount,
                 "quantize_4bit: code must be one of Code4, got 2");
  EXPECT_REFUSED(quantize_4bit, quantize4, args.absmax = nullptr,
                 "quantize_4bit: absmax must be a pointer to its elements, got null");
  EXPECT_REFUSED(dequantize_4bit, dequantize4, args.block_size = 8192,
                 "dequantize_4bit: block_size must be a power of two from 32 to 4096, got 8192");
  EXPECT_REFUSED(dequantize_4bit, dequantize4, args.n = -2,
                 "dequantize_4bit: n must be 0 or more, got -2");
}

TEST(Refused, EstimateQuantiles) {
  EXPECT_REFUSED(estimate_quantiles, quantiles, args.n = 0,
                 "estimate_quantiles: n must be above 0, got 0");
  EXPECT_REFUSED(estimate_quantiles, quantiles, args.offset = 0.75,
                 "estimate_quantiles: offset must be 0 to 0.5, got 0.750000");
  EXPECT_REFUSED(estimate_quantiles, quantiles,
                 args.offset = std::numeric_limits<double>::quiet_NaN(),
                 "estimate_quantiles: offset must be 0 to 0.5, got nan");
}

}  // namespace
}  // namespace bnb::cpu
