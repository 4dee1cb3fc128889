// The dynamic 8-bit maps (Dettmers 2015, arXiv:1511.04561; Dettmers et al. 2022, arXiv:2110.02861):
// levels, thresholds, and an exact encode by one table lookup.
//
// The levels are seven decades of equally spaced midpoints. Encode looks at the leading bits of
// |x|: its sign-free bits shifted right by kShift name a bucket so narrow that it holds at most one
// threshold. The bucket's entry is (codes below the bucket) << kShift plus the distance from the
// threshold to the bucket's end, so adding the remaining bits of |x| carries into the code exactly
// when |x| has reached the threshold:
//
//     code(|x|) = (entry[bits >> kShift] + (bits & kRest)) >> kShift
//
// One shared-memory or cache access, no search, no comparison.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "bitsandbytes/code/code.h"
#include "bitsandbytes/config.h"
#include "bitsandbytes/numeric.h"

namespace bnb {

namespace detail {

inline constexpr int kDecades = 7;

// Boundary k of m equal cells of [0.1, 1], in float32 as torch.linspace computes it with FMA: from
// the lower end in the first half, from the upper end in the second, each with one rounding. The
// products are exact in double (24 + 7 bits), so the conversion is that one rounding.
constexpr float cell_boundary(int k, int m) {
  const float low = 0.1f;
  const float step = (1.0f - low) / static_cast<float>(m);
  if (k < (m + 1) / 2) return static_cast<float>(static_cast<double>(low) + double{step} * k);
  return static_cast<float>(1.0 - double{step} * (m - k));
}

// Level i of the positive half, ascending; level 0 is zero, the last one is 1.
template <int kCells0>  // cells of the lowest decade: 1 for the signed map, 2 for the unsigned one
constexpr float positive_level(int i) {
  constexpr float kPowers[kDecades] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
  if (i == 0) return 0.0f;
  int index = i - 1;
  for (int decade = 0; decade < kDecades; ++decade) {
    const int cells = kCells0 << decade;
    if (index < cells) {
      const float low = cell_boundary(index, cells);
      const float high = cell_boundary(index + 1, cells);
      return (low + high) / 2.0f * kPowers[decade];
    }
    index -= cells;
  }
  return 1.0f;
}

// Encode buckets for magnitudes in [2^-kLowExponent, 2): one bucket per value of the leading
// kMantissa mantissa bits, and one in front for everything smaller.
template <int kMantissaBits, int kLowestExponent>
struct BucketLayout {
  static constexpr int kMantissa = kMantissaBits;
  static constexpr int kShift = 23 - kMantissa;
  static constexpr uint32_t kRest = (1u << kShift) - 1;
  static constexpr int kLowExponent = kLowestExponent;  // 2^-kLowExponent < every threshold
  static constexpr uint32_t kOrigin = ((127u - kLowExponent) << kMantissa) - 1;
  static constexpr int kBuckets = (kLowExponent << kMantissa) + 2;  // and one at 1
  // The largest float of the front bucket: |x| is raised to it so that no bucket index is negative.
  // It lies below the first threshold, hence still encodes as zero.
  static constexpr float kFloor = bits_float(((kOrigin + 1) << kShift) - 1);
};

template <class Layout>
using BucketTable = Table<uint32_t, Layout::kBuckets>;

template <class Layout>
constexpr BucketTable<Layout> make_buckets(const float* thresholds,  // [count], of |x|, ascending
                                           int count) {
  BucketTable<Layout> table{};
  int code = 0;  // thresholds at or below the bucket's first value
  for (int b = 0; b < Layout::kBuckets; ++b) {
    const uint32_t first = (Layout::kOrigin + static_cast<uint32_t>(b)) << Layout::kShift;
    while (code < count && float_bits(thresholds[code]) <= first) ++code;
    uint32_t entry = static_cast<uint32_t>(code) << Layout::kShift;
    if (code < count) {
      const uint32_t offset = float_bits(thresholds[code]) - first;
      if (offset <= Layout::kRest) {
        entry += Layout::kRest + 1 - offset;
        // Two thresholds in one bucket would need a second comparison: the layout is too coarse.
        if (code + 1 < count && float_bits(thresholds[code + 1]) - first <= Layout::kRest) {
          entry = 0xffffffffu;
        }
      }
    }
    table[b] = entry;
  }
  return table;
}

}  // namespace detail

// Signed map: 127 negative levels, zero, 128 positive ones. Mirror-symmetric but for +1, which has
// no negative twin.
struct SignedDynamic8 {
  using Layout = detail::BucketLayout<6, 22>;
  static constexpr bool kSigned = true;
  static constexpr int kZero = 127;

  static constexpr CodeTable make_levels() {
    CodeTable t{};
    for (int i = 0; i < 128; ++i) {
      const float level = detail::positive_level<1>(i);
      t[kZero + i] = level;
      if (i > 0) t[kZero - i] = -level;
    }
    t[255] = 1.0f;
    return t;
  }

  // Tie parity mirrors with the levels: the index 127 - i is even exactly when 127 + i is, so the
  // thresholds of |x| serve both signs.
  static constexpr auto make_buckets() {
    const ThresholdTable thresholds = make_thresholds(make_levels());
    return detail::make_buckets<Layout>(thresholds.values + kZero, 128);
  }

  // Code of a finite x with |x| <= 1 (and rounding).
  BNB_HD static int encode(const uint32_t* buckets,  // [Layout::kBuckets]
                           float x) {
    const int i = bucket_code<Layout>(buckets, x);
    const int negative = kZero - i;
    return sign_bit(x) ? (negative > 0 ? negative : 0) : kZero + i;
  }

  // As encode, but a value with a negative sign never becomes zero: it takes the smallest negative
  // level. 8-bit optimizer states are stored so (the sign of a momentum survives).
  BNB_HD static int encode_keeping_sign(const uint32_t* buckets, float x) {
    const int code = encode(buckets, x);
    return code - ((sign_bit(x) && code == kZero) ? 1 : 0);
  }

  template <class L>
  BNB_HD static int bucket_code(const uint32_t* buckets, float x) {
    const float m = magnitude(x);
    const uint32_t bits = float_bits(m > L::kFloor ? m : L::kFloor);
    return static_cast<int>((buckets[(bits >> L::kShift) - L::kOrigin] + (bits & L::kRest)) >>
                            L::kShift);
  }
};

// Unsigned map: zero and 255 positive levels.
struct UnsignedDynamic8 {
  using Layout = detail::BucketLayout<7, 23>;
  static constexpr bool kSigned = false;
  static constexpr int kZero = 0;

  static constexpr CodeTable make_levels() {
    CodeTable t{};
    for (int i = 0; i < 256; ++i) t[i] = detail::positive_level<2>(i);
    return t;
  }

  static constexpr auto make_buckets() {
    const ThresholdTable thresholds = make_thresholds(make_levels());
    return detail::make_buckets<Layout>(thresholds.values, kCodeThresholds);
  }

  // Code of a finite x <= 1 (and rounding); negative values take code 0.
  BNB_HD static int encode(const uint32_t* buckets, float x) {
    return sign_bit(x) ? 0 : SignedDynamic8::bucket_code<Layout>(buckets, x);
  }

  BNB_HD static int encode_keeping_sign(const uint32_t* buckets, float x) {
    return encode(buckets, x);
  }
};

}  // namespace bnb
