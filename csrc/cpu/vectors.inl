// What the CPU kernels share: incomplete vectors, absolute maximum, 8-bit codes.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "bitsandbytes/code/dynamic8.h"
#include "cpu/dispatch.h"
#include "cpu/tables.h"

namespace bnb::cpu::BNB_ISA {
namespace {

constexpr int64_t kLanes = kWidth;

// ---- Partial vectors: the last, incomplete one of a run ----------------------------------------

template <class T>
BNB_HD Float load_first(const T* p, int64_t count) {
  T lanes[kWidth] = {};
  __builtin_memcpy(lanes, p, static_cast<size_t>(count) * sizeof(T));
  return load(lanes);
}

template <class T>
BNB_HD void store_first(T* p, Float x, int64_t count) {
  T lanes[kWidth];
  store(lanes, x);
  __builtin_memcpy(p, lanes, static_cast<size_t>(count) * sizeof(T));
}

BNB_HD void store_codes_first(uint8_t* p, Int x, int64_t count) {
  uint8_t lanes[kWidth];
  store_codes(lanes, x);
  __builtin_memcpy(p, lanes, static_cast<size_t>(count));
}

BNB_HD Int load_codes_first(const uint8_t* p, int64_t count) {
  uint8_t lanes[kWidth] = {};
  __builtin_memcpy(lanes, p, static_cast<size_t>(count));
  return load_codes(lanes);
}

// Calls body(offset, lanes) for every vector of [first, last); only the last may be incomplete.
template <class Body>
BNB_HD void for_each_vector(int64_t first, int64_t last, Body body) {
  int64_t i = first;
  for (; i + kLanes <= last; i += kLanes) body(i, kLanes);
  if (i < last) body(i, last - i);
}

template <class T>
BNB_HD Float load_some(const T* p, int64_t count) {
  return count == kLanes ? load(p) : load_first(p, count);
}
template <class T>
BNB_HD void store_some(T* p, Float x, int64_t count) {
  count == kLanes ? store(p, x) : store_first(p, x, count);
}
BNB_HD Int load_codes_some(const uint8_t* p, int64_t count) {
  return count == kLanes ? load_codes(p) : load_codes_first(p, count);
}
BNB_HD void store_codes_some(uint8_t* p, Int x, int64_t count) {
  count == kLanes ? store_codes(p, x) : store_codes_first(p, x, count);
}

// ---- Absolute maximum --------------------------------------------------------------------------

BNB_HD Int magnitude_bits(Float x) { return bits(x) & broadcast_int(0x7fffffff); }

BNB_HD float reduce_absmax(Int most) {
  return absmax_from_bits(static_cast<uint32_t>(reduce_max(most)));
}

template <class T>
BNB_HD float absmax(const T* a, int64_t n) {
  Int most = broadcast_int(0);
  for_each_vector(0, n, [&](int64_t i, int64_t count) {
    most = max(most, magnitude_bits(load_some(a + i, count)));
  });
  return reduce_absmax(most);
}

// ---- Codes: encode of the dynamic maps (code/dynamic8.h) on vectors, decode ---------------------

// The dynamic maps as the loops below see them: by one access to the bucket table, or by bins.
struct SignedMap {
  const uint32_t* buckets;
  bool keep_sign;

  explicit SignedMap(bool keep)
      : buckets((keep ? kSignKeepingBuckets : kSignedBuckets).values), keep_sign(keep) {}

  BNB_HD Int by_buckets(Float x) const {
    using Layout = SignedDynamic8::Layout;
    const Int above = magnitude_bits(x) - broadcast_int(Layout::kOrigin);
    const Int u = max(above, broadcast_int(0)) ^ shift_right_signed<31>(bits(x));
    const Int entry =
        gather(buckets + SignedDynamic8::kCenter, shift_right_signed<Layout::kShift>(u));
    return shift_right<Layout::kShift>(entry + u);
  }

  BNB_HD int one_by_buckets(float x) const { return SignedDynamic8::encode(buckets, x); }

  template <class T>
  BNB_HD uint64_t run_by_bins(const T* a, float inverse, uint8_t* out) const {
    return encode_run<true>(kSignedBins, a, Float(inverse * kSignedBins.unit),
                            SignedDynamic8::kZero - (keep_sign ? 1 : 0), out);
  }
};

struct UnsignedMap {
  BNB_HD Int by_buckets(Float x) const {
    using Layout = UnsignedDynamic8::Layout;
    const Int u = max(bits(x), broadcast_int(Layout::kOrigin));
    const Int bucket = shift_right<Layout::kShift>(u) - broadcast_int(UnsignedDynamic8::kFirst);
    return shift_right<Layout::kShift>(gather(kUnsignedBuckets.values, bucket) + u);
  }

  BNB_HD int one_by_buckets(float x) const {
    return UnsignedDynamic8::encode(kUnsignedBuckets.values, x);
  }

  template <class T>
  BNB_HD uint64_t run_by_bins(const T* a, float inverse, uint8_t* out) const {
    return encode_run<false>(kUnsignedBins, a, Float(inverse * kUnsignedBins.unit), 0, out);
  }
};

// Codes of a whole block whose absmax is known. `kKeepSign`: a negative value never becomes zero.
template <bool kKeepSign, class T>
BNB_HD void encode_block(const Code& code, const T* a, uint8_t* out, int64_t n, float absmax) {
  if (absmax == 0.0f) {
    // Every 0 / 0 is NaN. Common enough to be quick: rows of an embedding without gradients.
    __builtin_memset(out, 0, static_cast<size_t>(n));
    return;
  }
  const float inverse = 1.0f / absmax;
  if (code.kind == CodeKind::kTable || !is_regular_block(absmax, inverse)) {
    const auto threshold = [&code](int k) {
      return code_threshold(code.levels[k], code.levels[k + 1], k);
    };
    for (int64_t i = 0; i < n; ++i) {
      const float x = to_float(a[i]) * inverse;
      int c = search_code(threshold, x);
      if (kKeepSign && sign_bit(x) && c > 0 && !sign_bit(code.levels[c])) --c;
      out[i] = static_cast<uint8_t>(c);
    }
    return;
  }
  const Float scale(inverse);
  const auto encode_all = [&](const auto& map) {
    int64_t i = 0;
    if constexpr (kEncodeRun > 0) {
      for (; i + kEncodeRun <= n; i += kEncodeRun) {
        uint64_t undecided = map.run_by_bins(a + i, inverse, out + i);
        for (; undecided != 0; undecided &= undecided - 1) [[unlikely]] {
          const int64_t j = i + __builtin_ctzll(undecided);
          out[j] = static_cast<uint8_t>(map.one_by_buckets(to_float(a[j]) * inverse));
        }
      }
    }
    for_each_vector(i, n, [&](int64_t j, int64_t count) {
      store_codes_some(out + j, map.by_buckets(load_some(a + j, count) * scale), count);
    });
  };
  code.kind == CodeKind::kSignedDynamic8 ? encode_all(SignedMap(kKeepSign))
                                         : encode_all(UnsignedMap());
}

// Levels of n codes.
BNB_HD void decode(const Code& code, const uint8_t* codes, float* out,  // [n]
                   int64_t n) {
  int64_t i = 0;
  for (; i + kDecodeRun <= n; i += kDecodeRun) decode_run(code, codes + i, out + i);
  for (; i < n; ++i) out[i] = code.levels[codes[i]];
}

}  // namespace
}  // namespace bnb::cpu::BNB_ISA
