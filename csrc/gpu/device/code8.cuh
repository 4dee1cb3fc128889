// An 8-bit code in shared memory: levels and encode buckets, filled once per block of
// threads from the table that the caller gave.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/code/dynamic8.h"
#include "gpu/runtime/runtime.cuh"

namespace bnb::gpu {

namespace {  // one copy per translation unit: device symbols are not linked across files

__device__ const constexpr CodeTable kSignedLevels = SignedDynamic8::make_levels();
__device__ const constexpr CodeTable kUnsignedLevels = UnsignedDynamic8::make_levels();
__device__ const constexpr auto kSignedBuckets = SignedDynamic8::make_buckets(false);
__device__ const constexpr auto kSignKeepingBuckets = SignedDynamic8::make_buckets(true);
__device__ const constexpr auto kUnsignedBuckets = UnsignedDynamic8::make_buckets();

}  // namespace

// By all threads of the block.
__device__ inline void copy_table(uint32_t* to, const uint32_t* from, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
}

// The encode buckets of the dynamic maps in shared memory. `kKeepSign`: a negative value never
// becomes zero (optimizer states).
template <bool kKeepSign>
struct EncodeTables {
  uint32_t signed_buckets[SignedDynamic8::kEntries];
  uint32_t unsigned_buckets[UnsignedDynamic8::kEntries];

  // Called by all threads of the block.
  __device__ void fill(CodeKind kind) {
    if (kind == CodeKind::kSignedDynamic8) {
      const auto& from = kKeepSign ? kSignKeepingBuckets : kSignedBuckets;
      copy_table(signed_buckets, from.values, SignedDynamic8::kEntries);
    } else if (kind == CodeKind::kUnsignedDynamic8) {
      copy_table(unsigned_buckets, kUnsignedBuckets.values, UnsignedDynamic8::kEntries);
    }
  }
};

// Level of code i of those packed in `words`.
__device__ __forceinline__ float level_of(const float* levels,  // [256]
                                          const uint32_t* words, int i) {
  // The byte's offset into the table, taken out of the word in two instructions.
  const int shift = 8 * (i % 4) - 2;
  const uint32_t word = words[i / 4];
  const uint32_t offset = (shift < 0 ? word << 2 : word >> shift) & 0x3fcu;
  return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(levels) + offset);
}

// One code in shared memory. `Tables`: EncodeTables, or what stands for them where others encode.
template <bool kKeepSign, class Tables = EncodeTables<kKeepSign>>
struct Code8 {
  float levels[kCodeLevels];
  CodeKind kind;

  // Reads the table and recognises it; fills what its encode needs. Called by all threads of the
  // block, which must be synchronised before the code is used.
  __device__ void fill(const float* table,  // [256]
                       Tables& tables) {
    bool is_signed = true;
    bool is_unsigned = true;
    for (int i = threadIdx.x; i < kCodeLevels; i += blockDim.x) {
      const float level = table[i];
      levels[i] = level;
      is_signed = is_signed && float_bits(level) == float_bits(kSignedLevels[i]);
      is_unsigned = is_unsigned && float_bits(level) == float_bits(kUnsignedLevels[i]);
    }
    is_signed = block_all(is_signed);
    is_unsigned = block_all(is_unsigned);
    const CodeKind found = is_signed     ? CodeKind::kSignedDynamic8
                           : is_unsigned ? CodeKind::kUnsignedDynamic8
                                         : CodeKind::kTable;
    tables.fill(found);
    if (threadIdx.x == 0) kind = found;
  }

  // Level of code i of those packed in `words`.
  __device__ __forceinline__ float level(const uint32_t* words, int i) const {
    return level_of(levels, words, i);
  }

  // Packs the codes of kCount elements of one quantization block into `words`.
  template <int kCount>
  __device__ __forceinline__ void encode(const Tables& tables, const float (&x)[kCount],
                                         float absmax, uint32_t (&words)[kCount / 4]) const {
    if (absmax == 0.0f) {
      // Every 0 / 0 is NaN. Common enough to be quick: rows of an embedding without gradients.
#pragma unroll
      for (int w = 0; w < kCount / 4; ++w) words[w] = 0;
      return;
    }
    const float inverse = __frcp_rn(absmax);
    if (kind == CodeKind::kTable || !is_regular_block(absmax, inverse)) {
      encode_by_search(x, inverse, words);
    } else if (kind == CodeKind::kSignedDynamic8) {
      encode_dynamic(true, tables, x, inverse, words);
    } else {
      encode_dynamic(false, tables, x, inverse, words);
    }
  }

  // The same for any table and block.
  template <int kCount>
  __device__ __forceinline__ void encode_by_search(const float (&x)[kCount], float inverse,
                                                   uint32_t (&words)[kCount / 4]) const {
    uint32_t shifted[kCount];
    // Unrolled although rare: a run-time index would move the elements to local memory.
#pragma unroll
    for (int i = 0; i < kCount; ++i) shifted[i] = search(__fmul_rn(x[i], inverse)) << 16;
    pack(shifted, words);
  }

  // The same where the code is known to be a dynamic map, and which, and the block regular.
  template <int kCount>
  __device__ __forceinline__ static void encode_dynamic(bool is_signed, const Tables& tables,
                                                        const float (&x)[kCount], float inverse,
                                                        uint32_t (&words)[kCount / 4]) {
    uint32_t shifted[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float scaled = __fmul_rn(x[i], inverse);
      if (is_signed) {
        shifted[i] = SignedDynamic8::encode_shifted(tables.signed_buckets, scaled);
      } else {
        shifted[i] = UnsignedDynamic8::encode_shifted(tables.unsigned_buckets, scaled);
      }
    }
    pack(shifted, words);
  }

 private:
  // Codes in bits 16 to 23 to bytes.
  template <int kCount>
  __device__ __forceinline__ static void pack(const uint32_t (&shifted)[kCount],
                                              uint32_t (&words)[kCount / 4]) {
#pragma unroll
    for (int w = 0; w < kCount / 4; ++w) {
      const uint32_t low = byte_permute(shifted[4 * w], shifted[4 * w + 1], 0x0062);
      const uint32_t high = byte_permute(shifted[4 * w + 2], shifted[4 * w + 3], 0x0062);
      words[w] = byte_permute(low, high, 0x5410);
    }
  }

  __device__ __forceinline__ uint32_t search(float x) const {
    int code =
        search_code([this](int k) { return code_threshold(levels[k], levels[k + 1], k); }, x);
    if (kKeepSign && sign_bit(x) && code > 0 && !sign_bit(levels[code])) --code;
    return static_cast<uint32_t>(code);
  }
};

}  // namespace bnb::gpu
