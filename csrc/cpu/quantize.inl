// Blockwise quantization on the CPU.
// SPDX-License-Identifier: MIT
#pragma once

#include "cpu/vectors.inl"

namespace bnb::cpu::BNB_ISA {
namespace {

template <class T>
void quantize_blocks(const QuantizeBlockwise& args, const Code& code, int64_t first_block,
                     int64_t last_block) {
  const T* a = static_cast<const T*>(args.a);
  for (int64_t b = first_block; b < last_block; ++b) {
    const int64_t begin = b * args.block_size;
    const int64_t rest = args.n - begin;
    const int64_t n = rest < args.block_size ? rest : args.block_size;
    const float most = absmax(a + begin, n);
    args.absmax[b] = most;
    encode_block<false>(code, a + begin, args.out + begin, n, most);
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
      for_each_vector(0, n, [&](int64_t j, int64_t count) {
        store_some(out + i + j, load_some(levels + j, count) * scale, count);
      });
    }
    i = end;
  }
}

}  // namespace
}  // namespace bnb::cpu::BNB_ISA
