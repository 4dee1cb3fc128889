// What every 4-bit code has: sixteen levels, and thresholds that its encode counts.
// SPDX-License-Identifier: MIT
//
// A format is one struct with
//
//     kName         its name in the ops
//     kThresholds   15, or 7 where the sign is a bit of the code
//     kSignBit      thresholds are of |s|, and codes of numbers below zero have bit 3 set
//     make_levels()       [16] by code
//     make_thresholds()   [kThresholds] ascending
//     from_rank(r)  the code, but for its sign, of what exceeds r thresholds
//
// Encode counts the thresholds that s exceeds: strictly, as the public CUDA kernels do, so an s on
// a threshold takes the lower code. NaN exceeds nothing and is not below zero: code from_rank(0).
#pragma once

#include <cstdint>

#include "bitsandbytes/code/code.h"
#include "bitsandbytes/config.h"
#include "bitsandbytes/numeric.h"

namespace bnb {

inline constexpr int kCode4Levels = 16;
inline constexpr int kCode4Sign = 8;

using Code4Table = Table<float, kCode4Levels>;

// The definition of encode; s is an element times its block's 1 / absmax.
template <class Code>
BNB_HD constexpr int encode4(float s) {
  constexpr auto thresholds = Code::make_thresholds();
  const float key = Code::kSignBit ? magnitude(s) : s;
  int rank = 0;
  for (int k = 0; k < Code::kThresholds; ++k) rank += key > thresholds[k] ? 1 : 0;
  return Code::from_rank(rank) + (Code::kSignBit && s < 0.0f ? kCode4Sign : 0);
}

// The same thresholds as a search tree: from node i the way goes to 2 i, or to 2 i + 1 where s
// exceeds node[i]. It begins at 1; the node that is reached, less kThresholds + 1, is the rank.
template <class Code>
constexpr Code4Table make_search_tree() {
  constexpr auto thresholds = Code::make_thresholds();
  Code4Table nodes{};
  for (int first = 1; first <= Code::kThresholds; first *= 2) {
    const int gap = (Code::kThresholds + 1) / first;  // between the nodes of this depth
    for (int i = 0; i < first; ++i) nodes[first + i] = thresholds[i * gap + gap / 2 - 1];
  }
  return nodes;
}

// The same decision by one access to a table, for processors without tables in registers. Numbers
// from -1 to 1 (0 to 1 with a sign bit) fall into 32 equal buckets, so narrow that each holds at
// most one threshold: the rank is that of the bucket's lower end, and one more beyond the
// threshold. 32 words lie in 32 banks of shared memory, so lookups do not conflict.
//
// The bucket is taken from the sum s * kScale + kShift as a float, whose unit in the last place is
// one: its bits end in a whole number, of which bits 2 to 6 are the bucket, an offset in bytes. 63
// instead of 64 steps to either side keep 1 and what rounds above it inside the last bucket.
template <class Code>
struct Buckets4 {
  static constexpr int kCount = 32;
  static constexpr float kScale = Code::kSignBit ? 126.0f : 63.0f;
  static constexpr float kShift = 0x1.8p23f + (Code::kSignBit ? 1.0f : 64.0f);
  static constexpr uint32_t kOffsetMask = 4 * (kCount - 1);

  float threshold[kCount];  // infinity where a bucket holds none
  uint32_t rank[kCount];    // at the bucket's lower end

  // The number of thresholds that `key`, s or |s|, exceeds; finite, at most 1 and rounding. The
  // difference is never rounded to zero, so its sign tells whether key exceeds the threshold.
  BNB_HD uint32_t rank_of(float key) const {
    const uint32_t bucket = (float_bits(__builtin_fmaf(key, kScale, kShift)) & kOffsetMask) / 4;
    return rank[bucket] + (float_bits(threshold[bucket] - key) >> 31);
  }
};

template <class Code>
constexpr Buckets4<Code> make_buckets4() {
  using Buckets = Buckets4<Code>;
  constexpr auto thresholds = Code::make_thresholds();
  Buckets buckets{};
  int rank = 0;
  for (int b = 0; b < Buckets::kCount; ++b) {
    buckets.rank[b] = static_cast<uint32_t>(rank);
    buckets.threshold[b] = kInfinity;
    // In double the sum is exact; bucket b ends where it rounds to 4 (b + 1).
    const double end = 4.0 * (b + 1) - 0.5;
    const double shift = static_cast<double>(Buckets::kShift) - 0x1.8p23;
    while (rank < Code::kThresholds &&
           double{thresholds[rank]} * double{Buckets::kScale} + shift < end) {
      buckets.threshold[b] = thresholds[rank];
      ++rank;
    }
  }
  return buckets;
}

// True when no bucket holds two thresholds, which one comparison could not tell apart.
template <class Code>
constexpr bool buckets4_hold_one_threshold() {
  constexpr Buckets4<Code> buckets = make_buckets4<Code>();
  for (int b = 0; b < Buckets4<Code>::kCount; ++b) {
    const int next =
        b + 1 < Buckets4<Code>::kCount ? static_cast<int>(buckets.rank[b + 1]) : Code::kThresholds;
    if (next - static_cast<int>(buckets.rank[b]) > 1) return false;
  }
  return true;
}

}  // namespace bnb
