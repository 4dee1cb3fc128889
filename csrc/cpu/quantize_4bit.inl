// 4-bit blockwise quantization on the CPU.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/kernels/quantize_4bit.h"
#include "cpu/quantize.inl"

namespace bnb::cpu::BNB_ISA {
namespace {

template <class Code>
struct Code4Tables {
  Code4Table levels = Code::make_levels();
  Code4Table tree = make_search_tree<Code>();
  int32_t from_rank[8] = {};  // read where the sign is a bit of the code

  constexpr Code4Tables() {
    for (int rank = 0; rank < 8; ++rank) from_rank[rank] = Code::from_rank(rank);
  }
};

template <class Code>
constexpr Code4Tables<Code> kCode4{};

template <class Code>
BNB_HD Int encode(Float s) {
  const Code4Tables<Code>& t = kCode4<Code>;
  const Float key = Code::kSignBit ? from_bits(magnitude_bits(s)) : s;
  const Int one = broadcast_int(1);
  Int node = one;
  for (int first = 1; first <= Code::kThresholds; first *= 2) {
    // Nodes 1 to 7 are looked up among the first eight, the others among the last eight.
    const Float threshold = lookup8(t.tree.values + (first == 8 ? 8 : 0), node);
    const Int twice = node + node;
    node = select(less(threshold, key), twice + one, twice);
  }
  if constexpr (Code::kSignBit) {
    const Int code = lookup8(t.from_rank, node);
    return select(less(s, Float(0.0f)), code + broadcast_int(kCode4Sign), code);
  } else {
    return node - broadcast_int(Code::kThresholds + 1);
  }
}

template <class Code, class T>
void quantize_blocks_4bit(const Quantize4bit& args, int64_t first_block, int64_t last_block) {
  const T* a = static_cast<const T*>(args.a);
  uint8_t codes[kLargestBlock];
  for (int64_t b = first_block; b < last_block; ++b) {
    const int64_t begin = b * args.block_size;
    const int64_t rest = args.n - begin;
    const int64_t n = rest < args.block_size ? rest : args.block_size;
    const float most = absmax(a + begin, n);
    args.absmax[b] = most;
    const float inverse = 1.0f / most;
    const Float scale(inverse);
    for_each_vector(0, n, [&](int64_t i, int64_t count) {
      store_codes_some(codes + i, encode<Code>(load_some(a + begin + i, count) * scale), count);
    });
    if (n % 2 != 0) codes[n] = static_cast<uint8_t>(encode4<Code>(0.0f * inverse));

    uint8_t* out = args.out + begin / 2;
    int64_t i = 0;
    for (; i + kNibbleRun <= n; i += kNibbleRun) pack_nibbles(codes + i, out + i / 2);
    for (; i < n; i += 2) out[i / 2] = static_cast<uint8_t>(codes[i] << 4 | codes[i + 1]);
  }
}

// Elements [begin, end) of a packed tensor, `begin` even, to out[0 ...]. The sixteen results that a
// block can have are computed first, then looked up.
template <class T>
void dequantize_range_4bit(const float* levels, const uint8_t* codes, const Scales& scales,
                           int64_t block_size, int64_t begin, int64_t end, T* out) {
  int64_t i = begin;
  while (i < end) {
    const int64_t b = i / block_size;
    alignas(64) T results[kCode4Levels];
    const Float scale(scale_of(scales, b));
    for (int j = 0; j < kCode4Levels; j += kWidth) store(results + j, load(levels + j) * scale);
    const int64_t block_end = (b + 1) * block_size;
    const int64_t stop = block_end < end ? block_end : end;
    for (; i + kNibbleRun <= stop; i += kNibbleRun) {
      lookup_nibbles(results, codes + i / 2, out + (i - begin));
    }
    for (; i < stop; ++i) {
      const uint8_t byte = codes[i / 2];
      out[i - begin] = results[i % 2 == 0 ? byte >> 4 : byte & 15];
    }
  }
}

template <class Code, class T>
void dequantize_blocks_4bit(const Dequantize4bit& args, int64_t first_block, int64_t last_block) {
  const int64_t begin = first_block * args.block_size;
  const int64_t blocks_end = last_block * args.block_size;
  dequantize_range_4bit(kCode4<Code>.levels.values, args.a, args.scales, args.block_size, begin,
                        blocks_end < args.n ? blocks_end : args.n,
                        static_cast<T*>(args.out) + begin);
}

}  // namespace
}  // namespace bnb::cpu::BNB_ISA
