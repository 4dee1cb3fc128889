// Buckets for any 8-bit code, made at run time: one table access instead of a search.
//
// They are those of the dynamic maps (dynamic8.h): the upper half of the bits of |s| names one so
// narrow that it mostly holds at most one threshold, and its entry is chosen so that adding the
// bits gives the code, with a carry into it exactly when they have reached the threshold. Those of
// negative numbers lie in front of the others, and give the code's complement, which grows with |s|
// too. Codes of which a bucket holds two thresholds have to be searched.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "bitsandbytes/code/code.h"
#include "bitsandbytes/code/dynamic8.h"
#include "bitsandbytes/config.h"
#include "bitsandbytes/numeric.h"

namespace bnb {

// The thresholds of a code, and what buckets are filled with. |s| is at most 1, and rounding.
struct Thresholds8 {
  using Layout = detail::BucketLayout<24>;
  static constexpr int kBuckets = Layout::kBuckets;  // of either sign
  static constexpr uint32_t kOrigin = static_cast<uint32_t>(Layout::kOrigin);

  const float* values;  // [kCodeThresholds], ascending

  BNB_HD float operator()(int k) const { return values[k]; }
  BNB_HD int search(float s) const { return search_code(*this, s); }
  // Front buckets take all numbers up to kOrigin for that number. Where a threshold lies there,
  // they serve larger numbers only.
  BNB_HD bool is_front(int k) const { return magnitude_bits(values[k]) <= kOrigin; }
  BNB_HD bool is_zero(int k) const { return magnitude_bits(values[k]) == 0; }
  // Code = number of thresholds <= s needs them to ascend.
  BNB_HD bool ascends(int k) const {
    return k + 1 == kCodeThresholds || values[k] < values[k + 1] || is_nan(values[k + 1]);
  }

  // Fills buckets [bucket, end) of both signs, and says whether each holds one threshold at most.
  BNB_HD bool fill(int bucket, int end, uint32_t* entries) const {  // [2 * kBuckets]
    const uint32_t start = kOrigin + static_cast<uint32_t>(bucket) * Layout::kWidth;
    int above = search(bits_float(start));
    int below = search(-bits_float(start));
    bool fine = true;
    for (; bucket < end; ++bucket) {
      const uint32_t first = kOrigin + static_cast<uint32_t>(bucket) * Layout::kWidth;
      const uint32_t next = first + Layout::kWidth;
      const int32_t u = bucket * Layout::kWidth;
      // Above zero `above` thresholds are <= s at the bucket's start, and one more from the next
      // threshold on; below zero `below` are, and one less.
      const bool rises = bits_above(above) < next;
      const bool falls = bits_below(below - 1) < next;
      fine = fine && !(rises && bits_above(above + 1) < next) &&
             !(falls && bits_below(below - 2) < next);
      entries[kBuckets + bucket] = entry(above, rises, u, bits_above(above) - first);
      entries[kBuckets - 1 - bucket] =
          entry(kCodeLevels - 1 - below, falls, u, bits_below(below - 1) - first);
      above += static_cast<int>(rises);
      below -= static_cast<int>(falls);
      // Thresholds at the next bucket's first number.
      above += static_cast<int>(bits_above(above) == next);
      below -= static_cast<int>(bits_below(below - 1) == next);
    }
    return fine;
  }

 private:
  BNB_HD static uint32_t entry(int code, bool crosses, int32_t u, uint32_t threshold) {
    return detail::entry<Layout>(code, code + static_cast<int>(crosses), u,
                                 static_cast<int32_t>(threshold));
  }
  // Bits of threshold k, which is above zero, or more than any bucket's where there is none.
  BNB_HD uint32_t bits_above(int k) const {
    return k < kCodeThresholds ? float_bits(values[k]) : 0xffffffffu;
  }
  // The least magnitude, as bits, for which -|s| is below threshold k, which is below zero.
  BNB_HD uint32_t bits_below(int k) const {
    return k >= 0 ? magnitude_bits(values[k]) + 1 : 0xffffffffu;
  }
};

}  // namespace bnb
