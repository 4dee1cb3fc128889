// Blockwise quantization on the CPU.
// SPDX-License-Identifier: MIT
#pragma once

#include "cpu/vectors.inl"

namespace bnb::cpu::BNB_ISA {
namespace {

// Codes by search over the thresholds of any ascending table, for every float.
BNB_HD Int by_search(const SearchedCode& code, Float x) {
  Int c = broadcast_int(0);
  for (int step = kCodeLevels / 2; step > 0; step /= 2) {
    const Float threshold = gather(code.thresholds, c + broadcast_int(step - 1));
    c = select(greater_equal(x, threshold), c + broadcast_int(step), c);
  }
  return c;
}

// The same by buckets, for |x| up to 1, and rounding.
BNB_HD Int by_buckets(const SearchedCode& code, Float x) {
  using Layout = Thresholds8::Layout;
  const Int below_zero = shift_right_signed<31>(bits(x));
  const Int above = magnitude_bits(x) - broadcast_int(Layout::kOrigin);
  const Int u = max(above, broadcast_int(0));
  const Int bucket = shift_right<Layout::kShift>(u) ^ below_zero;
  const Int entry = gather(code.entries + Thresholds8::kBuckets, bucket);
  const Int c = shift_right<Layout::kShift>(entry + u) ^ below_zero;
  if (!code.front_apart) return c;
  const Mask front = less(above, broadcast_int(1));
  return any(front) ? select(front, by_search(code, x), c) : c;
}

// Codes of x * inverse.
template <class T>
void encode_searched(const SearchedCode& code, const T* a, uint8_t* out, int64_t n, float absmax) {
  const float inverse = 1.0f / absmax;
  const Float scale(inverse);
  const auto encode_all = [&](auto encode) {
    for_each_vector(0, n, [&](int64_t i, int64_t count) {
      store_codes_some(out + i, encode(code, load_some(a + i, count) * scale), count);
    });
  };
  if (code.buckets && !code.bounded) {
    // NaN becomes -1 and takes code 0, too.
    encode_all([](const SearchedCode& c, Float x) {
      return by_buckets(c, min(max(x, Float(-1.0f)), Float(1.0f)));
    });
  } else if (code.buckets && is_regular_block(absmax, inverse)) {
    encode_all([](const SearchedCode& c, Float x) { return by_buckets(c, x); });
  } else {
    encode_all([](const SearchedCode& c, Float x) { return by_search(c, x); });
  }
}

// Moves codes of the nearest levels to the levels on the other side, by chance: round_stochastic()
// of code.h. Beyond an end of the table the level on the other side is the nearest one again.
template <class T>
void round_codes(const QuantizeBlockwise& args, const Code& code, int64_t begin, int64_t n,
                 float inverse) {
  const T* a = static_cast<const T*>(args.a) + begin;
  uint8_t* out = args.out + begin;
  const Float scale(inverse);
  const Int one = broadcast_int(1);
  int64_t r = (begin + args.rand_offset) % args.rand_size;
  for (int64_t i = 0; i < n;) {
    const int64_t run = n - i < args.rand_size - r ? n - i : args.rand_size - r;
    for_each_vector(0, run, [&](int64_t j, int64_t count) {
      const Float x = load_some(a + i + j, count) * scale;
      const Int c = load_codes_some(out + i + j, count);
      const Float nearest = gather(code.levels, c);
      const Int above = min(c + one, broadcast_int(kCodeLevels - 1));
      const Int below = select(less(x, nearest), max(c - one, broadcast_int(0)), c);
      const Int other = select(less(nearest, x), above, below);
      const Float level = gather(code.levels, other);
      const Float chance = (level - x) / (level - nearest);
      const Mask moves = greater_equal(load_some(args.rand + r + j, count), chance);
      store_codes_some(out + i + j, select(moves, other, c), count);
    });
    i += run;
    r = r + run == args.rand_size ? 0 : r + run;
  }
}

template <class T>
void quantize_blocks(const QuantizeBlockwise& args, const Code& code, const SearchedCode& searched,
                     int64_t first_block, int64_t last_block) {
  const T* a = static_cast<const T*>(args.a);
  const bool search = code.kind == CodeKind::kTable;
  for (int64_t b = first_block; b < last_block; ++b) {
    const int64_t begin = b * args.block_size;
    const int64_t rest = args.n - begin;
    const int64_t n = rest < args.block_size ? rest : args.block_size;
    float most = 1.0f;
    if (args.absmax != nullptr) args.absmax[b] = most = absmax(a + begin, n);
    if (search && most != 0.0f) {
      encode_searched(searched, a + begin, args.out + begin, n, most);
    } else {
      encode_block<false>(code, a + begin, args.out + begin, n, most);
    }
    if (args.rand != nullptr) round_codes<T>(args, code, begin, n, 1.0f / most);
  }
}

BNB_HD float scale_of(const Scales& scales, int64_t block) {
  if (!scales.nested()) return scales.absmax[block];
  const float level = scales.code[scales.codes[block]];
  return level * scales.absmax[block / scales.block_size] + *scales.offset;
}

template <class T>
void dequantize_range(const DequantizeBlockwise& args, const Code& code, int64_t first,
                      int64_t last) {
  constexpr int64_t kRun = 512;  // levels between the lookup and the multiplication
  // Multiplied in a round: processors foresee the end of a loop of few rounds.
  constexpr int64_t kTogether = 4 * kLanes;
  T* out = static_cast<T*>(args.out);
  alignas(64) float levels[kRun];
  int64_t i = first;
  while (i < last) {
    const int64_t block = i / args.block_size;
    const int64_t block_end = (block + 1) * args.block_size;
    const int64_t end = block_end < last ? block_end : last;
    const Float scale(scale_of(args.scales, block));
    for (; i < end; i += kRun) {
      const int64_t n = end - i < kRun ? end - i : kRun;
      decode(code, args.a + i, levels, n);
      const auto multiply = [&](int64_t j, int64_t count) {
        store_some(out + i + j, load_some(levels + j, count) * scale, count);
      };
      int64_t j = 0;
      for (; j + kTogether <= n; j += kTogether) {
        for (int64_t k = 0; k < kTogether; k += kLanes) multiply(j + k, kLanes);
      }
      for_each_vector(j, n, multiply);
    }
    i = end;
  }
}

}  // namespace
}  // namespace bnb::cpu::BNB_ISA
