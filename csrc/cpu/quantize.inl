// Blockwise quantization on the CPU.
// SPDX-License-Identifier: MIT
#pragma once

#include "cpu/vectors.inl"

namespace bnb::cpu::BNB_ISA {
namespace {

// Codes of x * inverse by search over the thresholds of any ascending table, for every float.
template <class T>
void encode_by_search(const ThresholdTable& thresholds, const T* a, uint8_t* out, int64_t n,
                      float inverse) {
  const Float scale(inverse);
  for_each_vector(0, n, [&](int64_t i, int64_t count) {
    const Float x = load_some(a + i, count) * scale;
    Int code = broadcast_int(0);
    for (int step = kCodeLevels / 2; step > 0; step /= 2) {
      const Float threshold = gather(thresholds.values, code + broadcast_int(step - 1));
      code = select(greater_equal(x, threshold), code + broadcast_int(step), code);
    }
    store_codes_some(out + i, code, count);
  });
}

// Moves codes of the nearest levels to the levels on the other side, by chance.
template <class T>
void round_codes(const QuantizeBlockwise& args, const Code& code, int64_t begin, int64_t n,
                 float inverse) {
  const T* a = static_cast<const T*>(args.a) + begin;
  uint8_t* out = args.out + begin;
  const auto level = [&code](int k) { return code.levels[k]; };
  int64_t r = (begin + args.rand_offset) % args.rand_size;
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<uint8_t>(
        round_stochastic(level, out[i], to_float(a[i]) * inverse, args.rand[r]));
    if (++r == args.rand_size) r = 0;
  }
}

template <class T>
void quantize_blocks(const QuantizeBlockwise& args, const Code& code, int64_t first_block,
                     int64_t last_block) {
  const T* a = static_cast<const T*>(args.a);
  const bool search = code.kind == CodeKind::kTable;
  ThresholdTable thresholds;
  if (search) {
    for (int k = 0; k < kCodeThresholds; ++k) {
      thresholds[k] = code_threshold(code.levels[k], code.levels[k + 1], k);
    }
  }
  for (int64_t b = first_block; b < last_block; ++b) {
    const int64_t begin = b * args.block_size;
    const int64_t rest = args.n - begin;
    const int64_t n = rest < args.block_size ? rest : args.block_size;
    float most = 1.0f;
    if (args.absmax != nullptr) args.absmax[b] = most = absmax(a + begin, n);
    const float inverse = 1.0f / most;
    if (search && most != 0.0f) {
      encode_by_search(thresholds, a + begin, args.out + begin, n, inverse);
    } else {
      encode_block<false>(code, a + begin, args.out + begin, n, most);
    }
    if (args.rand != nullptr) round_codes<T>(args, code, begin, n, inverse);
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
