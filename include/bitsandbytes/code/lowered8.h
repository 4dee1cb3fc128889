// A third way to encode the dynamic maps, with the fewest instructions per element, for processors
// whose memory has room for tables: 24 KB.
//
// The caller lowers the exponent of x by kLowered, which costs nothing where x is multiplied by a
// scale anyway. All that encodes as zero is then among the smallest floats, so that buckets
// (dynamic8.h) are counted from bits zero on, without a clamp. The sign bit is the uppermost bit of
// the bucket's number: negative values have a table of their own.
//
//     unsigned:  code = (entry[bits >> 16] + bits) >> 16
//     signed:    code = (entry[bits >> 17] + (bits << 7)) >> 24, inverted for negative values
//
// Between the entries of positive and those of negative values lies room for kSignBit of them.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "bitsandbytes/code/dynamic8.h"

namespace bnb {

inline constexpr int kLowered = 103;
inline constexpr float kLoweringFactor = 0x1p-103f;

// Whether absmax, a positive float of these bits, allows x / absmax to be lowered: both its
// reciprocal and the lowered one are normal numbers.
BNB_HD constexpr bool can_be_lowered(uint32_t absmax_bits) {
  return absmax_bits - 0x02000000u < 0x49000000u;
}

namespace detail {

// Buckets of lowered magnitudes: one per value of the leading bits, up to the one at 1.
template <int kLowBits>
struct LoweredLayout {
  static constexpr int kShift = kLowBits;
  static constexpr int32_t kWidth = 1 << kShift;
  // Of the float that lowering turns into bits zero, if it were not for subnormal numbers. These
  // are below every threshold.
  static constexpr int32_t kOrigin = kLowered << 23;
  static constexpr int kBuckets = ((127 - kLowered) << (23 - kShift)) + 1;
};

}  // namespace detail

struct LoweredSigned8 {
  using Layout = detail::LoweredLayout<17>;
  static constexpr int kEntries = Layout::kBuckets;  // of each sign
  static constexpr int kSignBit = 1 << (31 - Layout::kShift);
  using Buckets = Table<uint32_t, kEntries>;

  // `negative`: of negative values, which never become zero (optimizer states): their codes are
  // bitwise complements of these.
  static constexpr Buckets make_buckets(bool negative) {
    const ThresholdTable thresholds = make_thresholds(SignedDynamic8::make_levels());
    Buckets table{};
    detail::for_each_bucket<Layout>(
        thresholds.values + SignedDynamic8::kZero, 128, [&](int b, detail::Bucket bucket) {
          const int last = bucket.offset != 0 ? bucket.code + 1 : bucket.code;
          table[b] = detail::entry<Layout>(code_of(bucket.code, negative), code_of(last, negative),
                                           b * Layout::kWidth, bucket.offset)
                     << kToTop;
        });
    return table;
  }

  // Bits 24 to 31: the code of the float with these bits, or its complement.
  BNB_HD static uint32_t encode_shifted(uint32_t entry, uint32_t bits) {
    return entry + (bits << kToTop);
  }

 private:
  static constexpr int kToTop = 24 - Layout::kShift;

  // Of magnitude level i. There is no level -1.
  static constexpr int code_of(int i, bool negative) {
    if (!negative) return SignedDynamic8::kZero + i;
    return 128 + (i < 1 ? 1 : i > 127 ? 127 : i);
  }
};

// For values that are not negative.
struct LoweredUnsigned8 {
  using Layout = detail::LoweredLayout<16>;
  static constexpr int kEntries = Layout::kBuckets;
  using Buckets = Table<uint32_t, kEntries>;

  static constexpr Buckets make_buckets() {
    const ThresholdTable thresholds = make_thresholds(UnsignedDynamic8::make_levels());
    Buckets table{};
    detail::for_each_bucket<Layout>(
        thresholds.values, kCodeThresholds, [&](int b, detail::Bucket bucket) {
          const int last = bucket.offset != 0 ? bucket.code + 1 : bucket.code;
          table[b] = detail::entry<Layout>(bucket.code, last, b * Layout::kWidth, bucket.offset);
        });
    return table;
  }

  // Bits 16 to 23: the code of the float with these bits.
  BNB_HD static uint32_t encode_shifted(uint32_t entry, uint32_t bits) { return entry + bits; }
};

static_assert(detail::buckets_hold_one_threshold<LoweredSigned8::Layout>(
    make_thresholds(SignedDynamic8::make_levels()).values + SignedDynamic8::kZero, 128));
static_assert(detail::buckets_hold_one_threshold<LoweredUnsigned8::Layout>(
    make_thresholds(UnsignedDynamic8::make_levels()).values, kCodeThresholds));
// Lowering leaves the bits of every threshold but for the exponent.
static_assert(make_thresholds(SignedDynamic8::make_levels())[SignedDynamic8::kZero] > 0x1p-23f &&
              make_thresholds(UnsignedDynamic8::make_levels())[0] > 0x1p-23f);

}  // namespace bnb
