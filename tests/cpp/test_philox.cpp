// The counter-based generator: known answers, and the bits that stochastic rounding takes.
// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cstdint>
#include <set>

#include "bitsandbytes/philox.h"

namespace bnb {
namespace {

struct Known {
  uint32_t counter[4];
  uint64_t key;
  uint32_t words[4];
};

// The vectors that Salmon et al. publish with their library Random123 (kat_vectors, philox4x32 10).
constexpr Known kKnown[] = {
    {{0, 0, 0, 0}, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
     0xffffffffffffffff,
     {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
     0x299f31d0a4093822,
     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
};

TEST(Philox, GivesTheKnownAnswers) {
  for (const Known& known : kKnown) {
    const auto& c = known.counter;
    const PhiloxWords actual = philox(c[0], c[1], c[2], c[3], known.key);
    for (int i = 0; i < 4; ++i) EXPECT_EQ(actual.words[i], known.words[i]);
  }
}

TEST(Philox, IsKnownToTheCompiler) { static_assert(philox(0, 0, 0, 0, 0).words[0] == 0x6627e8d5); }

TEST(RoundingWords, CountGroupTensorAndStep) {
  const int64_t group = 0x123456789;
  const PhiloxWords expected = philox(0x23456789, 1, 7, 42, 99);
  const PhiloxWords actual = rounding_words(99, group, 7, 42);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(actual.words[i], expected.words[i]);
}

TEST(RoundingWords, DifferWithEveryArgument) {
  std::set<uint32_t> first;
  for (const uint64_t seed : {0ull, 1ull, 1ull << 32}) {
    for (const int64_t group : {int64_t{0}, int64_t{1}, int64_t{1} << 32}) {
      for (const uint32_t tensor : {0u, 1u}) {
        for (const int64_t step : {1, 2}) {
          first.insert(rounding_words(seed, group, tensor, step).words[0]);
        }
      }
    }
  }
  EXPECT_EQ(first.size(), 3u * 3u * 2u * 2u);
}

TEST(RoundingBits, TakeEveryHalfOfEveryWordOnce) {
  const PhiloxWords words = {{0x00020001, 0x00040003, 0x00060005, 0x00080007}};
  for (int element = 0; element < kRoundingGroup; ++element) {
    EXPECT_EQ(rounding_bits(words, element), static_cast<uint32_t>(element + 1));
  }
}

}  // namespace
}  // namespace bnb
