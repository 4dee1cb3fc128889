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

inline constexpr int kBucketEntries = SignedDynamic8::kEntries > UnsignedDynamic8::kEntries
                                          ? SignedDynamic8::kEntries
                                          : UnsignedDynamic8::kEntries;

// One code in shared memory. `kKeepSign`: a negative value never becomes zero (optimizer states).
template <bool kKeepSign>
struct Code8 {
  float levels[kCodeLevels];
  uint32_t buckets[kBucketEntries];
  CodeKind kind;

  // Called by all threads of the block, which must be synchronised before the code is used.
  __device__ void fill(const float* table) {  // [256]
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
    if (is_signed) {
      copy((kKeepSign ? kSignKeepingBuckets : kSignedBuckets).values, SignedDynamic8::kEntries);
    } else if (is_unsigned) {
      copy(kUnsignedBuckets.values, UnsignedDynamic8::kEntries);
    }
    if (threadIdx.x == 0) {
      kind = is_signed     ? CodeKind::kSignedDynamic8
             : is_unsigned ? CodeKind::kUnsignedDynamic8
                           : CodeKind::kTable;
    }
  }

  // Level of code i of those packed in `words`.
  __device__ __forceinline__ float level(const uint32_t* words, int i) const {
    // The byte's offset into the table, taken out of the word in two instructions.
    const int shift = 8 * (i % 4) - 2;
    const uint32_t word = words[i / 4];
    const uint32_t offset = (shift < 0 ? word << 2 : word >> shift) & 0x3fcu;
    return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(levels) + offset);
  }

  // Packs the codes of kCount elements of one quantization block into `words`.
  template <int kCount>
  __device__ __forceinline__ void encode(const float (&x)[kCount], float absmax,
                                         uint32_t (&words)[kCount / 4]) const {
    const float inverse = __frcp_rn(absmax);
    uint32_t shifted[kCount];  // codes in bits 16 to 23
    if (kind == CodeKind::kTable || !is_regular_block(absmax, inverse)) {
      // Unrolled although rare: a run-time index would move the elements to local memory.
#pragma unroll
      for (int i = 0; i < kCount; ++i) shifted[i] = search(__fmul_rn(x[i], inverse)) << 16;
    } else if (kind == CodeKind::kSignedDynamic8) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        shifted[i] = SignedDynamic8::encode_shifted(buckets, __fmul_rn(x[i], inverse));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        shifted[i] = UnsignedDynamic8::encode_shifted(buckets, __fmul_rn(x[i], inverse));
      }
    }
#pragma unroll
    for (int w = 0; w < kCount / 4; ++w) {
      const uint32_t low = byte_permute(shifted[4 * w], shifted[4 * w + 1], 0x0062);
      const uint32_t high = byte_permute(shifted[4 * w + 2], shifted[4 * w + 3], 0x0062);
      words[w] = byte_permute(low, high, 0x5410);
    }
  }

 private:
  __device__ void copy(const uint32_t* from, int count) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) buckets[i] = from[i];
  }

  __device__ __forceinline__ uint32_t search(float x) const {
    int code =
        search_code([this](int k) { return code_threshold(levels[k], levels[k + 1], k); }, x);
    if (kKeepSign && sign_bit(x) && code > 0 && !sign_bit(levels[code])) --code;
    return static_cast<uint32_t>(code);
  }
};

}  // namespace bnb::gpu
