// What some GPUs have instructions for, spelled out for the others.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/config.h"
#include "bitsandbytes/numeric.h"

namespace bnb::gpu {

BNB_HD uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = (static_cast<uint64_t>(b) << 32) | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t from = (selector >> (4 * i)) & 7u;
    result |= static_cast<uint32_t>((bytes >> (8 * from)) & 0xffu) << (8 * i);
  }
  return result;
}

BNB_HD uint32_t byte_signs(uint32_t a, uint32_t b, uint32_t selector) {
  return (byte_permute(a, b, selector) >> 7 & 0x01010101u) * 0xffu;
}

using SharedPointer = const char*;
inline constexpr int kSecondByte = 16;

BNB_HD SharedPointer shared_pointer(const void* p) { return static_cast<const char*>(p); }
BNB_HD int gap_to_second_byte(SharedPointer) { return 0; }
BNB_HD SharedPointer with_second_byte(SharedPointer p, uint32_t word, int i) {
  return p + (((word >> (8 * i)) & 0xffu) << 8);
}
BNB_HD uint32_t shared_word(SharedPointer p) { return *reinterpret_cast<const uint32_t*>(p); }

BNB_HD int dot4(int a, int b, int acc) {
  for (int shift = 0; shift < 32; shift += 8) {
    acc += static_cast<int>(static_cast<int8_t>(a >> shift)) *
           static_cast<int>(static_cast<int8_t>(b >> shift));
  }
  return acc;
}

template <class T>
BNB_HD uint32_t max_magnitudes(uint32_t most, uint32_t pair) {
  return max_halves(most & 0x7fff7fffu, pair & 0x7fff7fffu);
}

BNB_HD float absmax_step(float most, float x) { return absmax_of(most, x); }

BNB_HD uint16_t to_bfloat16_bits(float x) { return from_float<BFloat16>(x).bits; }

BNB_HD uint32_t to_bfloat16_pair(float low, float high) {
  return to_bfloat16_bits(low) | (static_cast<uint32_t>(to_bfloat16_bits(high)) << 16);
}

BNB_HD void prefetch_to_cache(const void*) {}

// Kernels start one after the other.
BNB_HD void let_next_kernel_start() {}
BNB_HD void wait_for_previous_kernel() {}

}  // namespace bnb::gpu
