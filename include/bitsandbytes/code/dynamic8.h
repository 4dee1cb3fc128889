// The dynamic 8-bit maps (Dettmers 2015, arXiv:1511.04561; Dettmers et al. 2022, arXiv:2110.02861):
// levels, thresholds, and an exact encode by one table lookup.
//
// The levels are seven decades of equally spaced midpoints. Encode looks at the upper half of the
// bits u of |x|, which names a bucket so narrow that it holds at most one threshold. The bucket's
// entry is chosen so that adding u to it gives the code in bits 16 to 23, with a carry into it
// exactly when u has reached the threshold:
//
//     code(x) = (entry[u >> 16] + u) >> 16
//
// For negative x the bits are inverted first, which makes them ascend with x again, and the buckets
// of negative values lie in front of the others. One access to shared memory or cache, no search,
// no comparison, no branch on the sign. u counts from the lowest bucket in use.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "bitsandbytes/code/bins.h"
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

// Buckets for magnitudes in [2^-kLowExponent, 2), one per value of the leading seven mantissa bits,
// and one in front for everything smaller.
template <int kLowestExponent>
struct BucketLayout {
  static constexpr int kShift = 16;
  static constexpr int32_t kWidth = 1 << kShift;
  static constexpr int kMantissa = 23 - kShift;
  static constexpr int kLowExponent = kLowestExponent;  // 2^-kLowExponent < every threshold
  // Bits of the first float of the front bucket. Magnitudes below it are raised to it: they all
  // encode as zero.
  static constexpr int32_t kOrigin = (((127 - kLowExponent) << kMantissa) - 1) * kWidth;
  static constexpr int kBuckets = (kLowExponent << kMantissa) + 2;  // and one at 1
};

// One bucket's contents: the number of thresholds at or below its first value, and the distance of
// the one threshold inside it, if any, from that value.
struct Bucket {
  int code;
  int32_t offset;  // 0: none
};

// Walks over the buckets of a layout in ascending order, calling fill(bucket index, Bucket).
// `thresholds` are of |x|, ascending.
template <class Layout, class Fill>
constexpr void for_each_bucket(const float* thresholds,  // [count]
                               int count, Fill fill) {
  int code = 0;
  for (int b = 0; b < Layout::kBuckets; ++b) {
    const int32_t first = Layout::kOrigin + b * Layout::kWidth;
    while (code < count && static_cast<int32_t>(float_bits(thresholds[code])) <= first) ++code;
    Bucket bucket{code, 0};
    if (code < count) {
      const int32_t offset = static_cast<int32_t>(float_bits(thresholds[code])) - first;
      if (offset < Layout::kWidth) bucket.offset = offset;
    }
    fill(b, bucket);
  }
}

// True when no bucket holds two thresholds, which one addition could not tell apart.
template <class Layout>
constexpr bool buckets_hold_one_threshold(const float* thresholds, int count) {
  bool fine = true;
  for_each_bucket<Layout>(thresholds, count, [&](int b, Bucket bucket) {
    if (bucket.offset == 0 || bucket.code + 1 >= count) return;
    const int32_t last = Layout::kOrigin + (b + 1) * Layout::kWidth - 1;
    fine = fine && static_cast<int32_t>(float_bits(thresholds[bucket.code + 1])) > last;
  });
  return fine;
}

// Entry of a bucket whose values u lie in [first, first + kWidth): they get `low`, and from
// `threshold` values into the bucket on `high`, which is `low` or `low` + 1.
template <class Layout>
BNB_HD constexpr uint32_t entry(int low, int high, int32_t first, int32_t threshold) {
  const int32_t carry = high > low ? Layout::kWidth - threshold : 0;
  return static_cast<uint32_t>(low * Layout::kWidth + carry - first);
}

}  // namespace detail

// Signed map: 127 negative levels, zero, 128 positive ones. Mirror-symmetric but for +1, which has
// no negative twin.
struct SignedDynamic8 {
  using Layout = detail::BucketLayout<22>;
  static constexpr int kZero = 127;
  // Buckets of negative values lie before kCenter in descending order of |x|.
  static constexpr int kCenter = Layout::kBuckets;
  static constexpr int kEntries = 2 * Layout::kBuckets;
  using Buckets = Table<uint32_t, kEntries>;

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

  // `keep_sign`: a value with a negative sign never becomes zero but takes the smallest negative
  // level. 8-bit optimizer states are stored so: the sign of a momentum survives.
  static constexpr Buckets make_buckets(bool keep_sign) {
    const ThresholdTable thresholds = make_thresholds(make_levels());
    // Tie parity mirrors with the levels: 127 - i is even exactly when 127 + i is, so the
    // thresholds of |x| serve both signs.
    const float* magnitudes = thresholds.values + kZero;
    Buckets table{};
    detail::for_each_bucket<Layout>(magnitudes, 128, [&](int b, detail::Bucket bucket) {
      const int first = bucket.code;
      const int last = bucket.offset != 0 ? first + 1 : first;
      const int32_t up = b * Layout::kWidth;
      table[kCenter + b] = detail::entry<Layout>(kZero + first, kZero + last, up, bucket.offset);
      // Inverted bits reach the other side of the threshold kWidth - offset values in.
      const int32_t down = -up - Layout::kWidth;
      table[kCenter - 1 - b] =
          detail::entry<Layout>(negative_code(last, keep_sign), negative_code(first, keep_sign),
                                down, Layout::kWidth - bucket.offset);
    });
    return table;
  }

  static constexpr BinTables make_bins() {
    const ThresholdTable thresholds = make_thresholds(make_levels());
    return make_bin_tables(thresholds.values + kZero, 128, kZero);
  }

  // The code of a finite x with |x| <= 1 (and rounding) in bits 16 to 23.
  BNB_HD static uint32_t encode_shifted(const uint32_t* buckets,  // [kEntries]
                                        float x) {
    const int32_t bits = static_cast<int32_t>(float_bits(x));
    const int32_t above = (bits & 0x7fffffff) - Layout::kOrigin;
    const int32_t u = (above > 0 ? above : 0) ^ (bits >> 31);
    return buckets[kCenter + (u >> Layout::kShift)] + static_cast<uint32_t>(u);
  }

  BNB_HD static int encode(const uint32_t* buckets, float x) {
    return static_cast<int>((encode_shifted(buckets, x) >> Layout::kShift) & 0xff);
  }

 private:
  // Code of a negative value whose magnitude has level i.
  static constexpr int negative_code(int i, bool keep_sign) {
    if (keep_sign && i == 0) i = 1;
    return i < kZero ? kZero - i : 0;
  }
};

// Unsigned map: zero and 255 positive levels.
struct UnsignedDynamic8 {
  using Layout = detail::BucketLayout<23>;
  static constexpr int kEntries = Layout::kBuckets;
  using Buckets = Table<uint32_t, kEntries>;

  static constexpr CodeTable make_levels() {
    CodeTable t{};
    for (int i = 0; i < 256; ++i) t[i] = detail::positive_level<2>(i);
    return t;
  }

  static constexpr Buckets make_buckets() {
    const ThresholdTable thresholds = make_thresholds(make_levels());
    Buckets table{};
    detail::for_each_bucket<Layout>(
        thresholds.values, kCodeThresholds, [&](int b, detail::Bucket bucket) {
          const int last = bucket.offset != 0 ? bucket.code + 1 : bucket.code;
          table[b] = detail::entry<Layout>(bucket.code, last, Layout::kOrigin + b * Layout::kWidth,
                                           bucket.offset);
        });
    return table;
  }

  static constexpr BinTables make_bins() {
    const ThresholdTable thresholds = make_thresholds(make_levels());
    return make_bin_tables(thresholds.values, kCodeThresholds, 0);
  }

  // The code of a finite x <= 1 (and rounding) in bits 16 to 23. Negative values, smaller than the
  // origin as integers too, take code 0.
  BNB_HD static uint32_t encode_shifted(const uint32_t* buckets,  // [kEntries]
                                        float x) {
    const int32_t bits = static_cast<int32_t>(float_bits(x));
    const int32_t u = bits > Layout::kOrigin ? bits : Layout::kOrigin;
    return buckets[(u >> Layout::kShift) - kFirst] + static_cast<uint32_t>(u);
  }

  BNB_HD static int encode(const uint32_t* buckets, float x) {
    return static_cast<int>((encode_shifted(buckets, x) >> Layout::kShift) & 0xff);
  }

  // u of the front bucket, shifted: what to subtract from a shifted u to get an index.
  static constexpr int32_t kFirst = Layout::kOrigin >> Layout::kShift;
};

static_assert(SignedDynamic8::make_bins().valid && UnsignedDynamic8::make_bins().valid);
// Where the sign is known, the table is enough.
static_assert(SignedDynamic8::make_bins().count <= BinTables::kBins);
static_assert(detail::buckets_hold_one_threshold<SignedDynamic8::Layout>(
    make_thresholds(SignedDynamic8::make_levels()).values + SignedDynamic8::kZero, 128));
static_assert(detail::buckets_hold_one_threshold<UnsignedDynamic8::Layout>(
    make_thresholds(UnsignedDynamic8::make_levels()).values, kCodeThresholds));

}  // namespace bnb
