// Philox4x32-10, the counter-based random generator of Salmon et al. 2011 ("Parallel random
// numbers: as easy as 1, 2, 3"): the same numbers on every device, for any order of evaluation.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "bitsandbytes/config.h"

namespace bnb {

struct PhiloxWords {
  uint32_t words[4];
};

BNB_HD constexpr PhiloxWords philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                    uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xd2511f53u} * c0;
    const uint64_t b = uint64_t{0xcd9e8d57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return {{c0, c1, c2, c3}};
}

// Consecutive elements that share one call of the generator for rounding, 16 bits each: element e
// of a group takes the lower half of word e / 2 if e is even, else the upper half.
inline constexpr int kRoundingGroup = 8;

// The random words that round group `group` of tensor `tensor` of a list in step number `step`.
BNB_HD constexpr PhiloxWords rounding_words(uint64_t seed, int64_t group, uint32_t tensor,
                                            int64_t step) {
  return philox(static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), tensor,
                static_cast<uint32_t>(step), seed);
}

BNB_HD constexpr uint32_t rounding_bits(const PhiloxWords& words, int element) {
  const uint32_t word = words.words[element / 2];
  return element % 2 == 0 ? word & 0xffffu : word >> 16;
}

}  // namespace bnb
