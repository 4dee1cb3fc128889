// An 8-bit code in shared memory: levels, thresholds and encode buckets, filled once per block of
// threads from the table that the caller gave.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/code/dynamic8.h"
#include "gpu/runtime/runtime.cuh"

namespace bnb::gpu {

namespace {  // one copy per translation unit: device symbols are not linked across files

__device__ const constexpr CodeTable kSignedLevels = SignedDynamic8::make_levels();
__device__ const constexpr CodeTable kUnsignedLevels = UnsignedDynamic8::make_levels();
__device__ const constexpr auto kSignedBuckets = SignedDynamic8::make_buckets();
__device__ const constexpr auto kUnsignedBuckets = UnsignedDynamic8::make_buckets();

}  // namespace

enum class CodeKind : int { kSignedDynamic8, kUnsignedDynamic8, kTable };

// Bits of |x| that order like |x|, with NaN above everything: a maximum over them is an absmax in
// which NaN wins.
__device__ __forceinline__ uint32_t magnitude_bits(float x) { return float_bits(x) & 0x7fffffffu; }

__device__ __forceinline__ float absmax_from_bits(uint32_t bits) {
  return bits > 0x7f800000u ? bits_float(0x7fc00000u) : bits_float(bits);
}

template <class Layout>
struct Code8Storage {
  float levels[kCodeLevels];
  float thresholds[kCodeLevels];  // 255 used
  uint32_t buckets[Layout::kBuckets];
  CodeKind kind;
};

// `Layout` bounds the buckets: the unsigned map needs more of them than the signed one, so storage
// for either must be of UnsignedDynamic8::Layout.
template <class Layout>
struct Code8 {
  static constexpr bool kHoldsUnsigned = Layout::kBuckets >= UnsignedDynamic8::Layout::kBuckets;

  // Called by all threads of the block, which must be synchronised before the code is used.
  __device__ static void fill(Code8Storage<Layout>& s,
                              const float* levels) {  // [256]
    bool is_signed = true;
    bool is_unsigned = true;
    for (int i = threadIdx.x; i < kCodeLevels; i += blockDim.x) {
      const float level = levels[i];
      s.levels[i] = level;
      if (i + 1 < kCodeLevels) s.thresholds[i] = code_threshold(level, levels[i + 1], i);
      is_signed = is_signed && float_bits(level) == float_bits(kSignedLevels[i]);
      is_unsigned = is_unsigned && float_bits(level) == float_bits(kUnsignedLevels[i]);
    }
    is_signed = block_all(is_signed);
    is_unsigned = block_all(is_unsigned);
    if (is_signed) {
      copy(s.buckets, kSignedBuckets.values, SignedDynamic8::Layout::kBuckets);
    } else if (kHoldsUnsigned && is_unsigned) {
      copy(s.buckets, kUnsignedBuckets.values, UnsignedDynamic8::Layout::kBuckets);
    }
    if (threadIdx.x == 0) {
      s.kind = is_signed                       ? CodeKind::kSignedDynamic8
               : kHoldsUnsigned && is_unsigned ? CodeKind::kUnsignedDynamic8
                                               : CodeKind::kTable;
    }
  }

  // Codes of kCount elements of one quantization block. `kKeepSign`: a negative value never
  // becomes zero.
  template <bool kKeepSign, int kCount>
  __device__ static void encode(const Code8Storage<Layout>& s, const float (&x)[kCount],
                                float absmax, uint8_t (&codes)[kCount]) {
    const float inverse = __frcp_rn(absmax);
    if (s.kind == CodeKind::kTable || !is_regular_block(absmax, inverse)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) codes[i] = search<kKeepSign>(s, __fmul_rn(x[i], inverse));
    } else if (s.kind == CodeKind::kSignedDynamic8) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float scaled = __fmul_rn(x[i], inverse);
        codes[i] =
            static_cast<uint8_t>(kKeepSign ? SignedDynamic8::encode_keeping_sign(s.buckets, scaled)
                                           : SignedDynamic8::encode(s.buckets, scaled));
      }
    } else if (kHoldsUnsigned) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        codes[i] =
            static_cast<uint8_t>(UnsignedDynamic8::encode(s.buckets, __fmul_rn(x[i], inverse)));
      }
    }
  }

 private:
  __device__ static void copy(uint32_t* to, const uint32_t* from, int count) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
  }

  template <bool kKeepSign>
  __device__ static uint8_t search(const Code8Storage<Layout>& s, float x) {
    int code = search_code(s.thresholds, x);
    if (kKeepSign && sign_bit(x) && code > 0 && !sign_bit(s.levels[code])) --code;
    return static_cast<uint8_t>(code);
  }
};

}  // namespace bnb::gpu
