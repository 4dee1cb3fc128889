// Encode of an 8-bit code with any levels: by buckets (code/buckets8.h) where the levels allow, and
// by search.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/code/buckets8.h"
#include "gpu/device/tile.cuh"
#include "gpu/device/vector_io.cuh"
#include "gpu/runtime/runtime.cuh"

namespace bnb::gpu {

// Whether buckets serve a code.
enum class Buckets8 : int {
  kNone,       // no: it is searched
  kPlain,      // yes
  kZeroApart,  // yes, but all numbers below zero have other codes than zero, and so -0 must not
               // look like one of them
};

// An 8-bit code in shared memory. Its codes are numbers of levels in ascending order until
// restore(), which gives them those that the caller knows.
struct Encode8 {
  using Layout = Thresholds8::Layout;
  static constexpr int kBuckets = Thresholds8::kBuckets;

  float bounded_levels[kCodeLevels + 2];  // ascending, between two numbers beyond all others
  float thresholds[kCodeThresholds];
  uint8_t codes[kCodeLevels];  // of the levels, where that is not their number
  bool reordered;
  Buckets8 kind;
  uint32_t entries[2 * kBuckets];

  __device__ __forceinline__ float* levels() { return bounded_levels + 1; }  // [256]
  __device__ __forceinline__ const float* levels() const { return bounded_levels + 1; }

  // Called by all threads of the block, which must be synchronised before the code is used.
  __device__ void fill(const float* table) {  // [256]
    static_assert(kTileThreads == kCodeLevels);
    const int mine = static_cast<int>(threadIdx.x);
    levels()[mine] = table[mine];
    __syncthreads();
    const bool in_order = block_all(mine == 0 || !level_before(levels()[mine], levels()[mine - 1]));
    if (!in_order) sort();
    if (mine < kCodeThresholds) {
      thresholds[mine] = code_threshold(levels()[mine], levels()[mine + 1], mine);
    }
    if (mine == 0) {
      reordered = !in_order;
      levels()[-1] = -kFloatMax;
      levels()[kCodeLevels] = kFloatMax;
    }
    __syncthreads();
    fill_buckets();
  }

  // Packs the codes of the elements of one quantization block into `words`.
  template <class T, int kCount>
  __device__ __forceinline__ void encode(const Words<T, kCount>& x, float absmax,
                                         uint32_t (&words)[kCount / 4]) const {
    const float inverse = __frcp_rn(absmax);
    if (absmax == 0.0f) {
      // Every 0 / 0 is NaN. Common enough to be quick: rows of an embedding without gradients.
#pragma unroll
      for (uint32_t& word : words) word = 0;
    } else if (kind == Buckets8::kNone || !is_regular_block(absmax, inverse)) {
      encode_by_search(x, inverse, words);
    } else if (kind == Buckets8::kPlain) {
      encode_regular<false>(x, inverse, words);
    } else {
      encode_regular<true>(x, inverse, words);
    }
  }

  // The same for any block and any code.
  template <class T, int kCount>
  __device__ __forceinline__ void encode_by_search(const Words<T, kCount>& x, float inverse,
                                                   uint32_t (&words)[kCount / 4]) const {
    // Unrolled although rare: a run-time index would move the elements to local memory.
#pragma unroll
    for (int w = 0; w < kCount / 4; ++w) {
      words[w] = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        words[w] |= search(__fmul_rn(x.get(4 * w + j), inverse)) << (8 * j);
      }
    }
  }

  // The same where the block is regular, and the code has buckets, and of which kind is known.
  template <bool kZeroApart, class T, int kCount>
  __device__ __forceinline__ void encode_regular(const Words<T, kCount>& x, float inverse,
                                                 uint32_t (&words)[kCount / 4]) const {
#pragma unroll
    for (int w = 0; w < kCount / 4; ++w) {
      uint32_t shifted[4];  // codes in bits 16 to 23
      Words<float, 4> s;    // of which only signs are wanted
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float element = x.get(4 * w + j);
        float size = __fmul_rn(magnitude(element), inverse);
        s.words[j] = float_bits(element);
        if constexpr (kZeroApart) {
          // Adding zero makes 0 of -0 and changes nothing else.
          s.words[j] = float_bits(__fadd_rn(__fmul_rn(element, inverse), 0.0f));
          size = magnitude(bits_float(s.words[j]));
        }
        const int32_t below_zero = static_cast<int32_t>(s.words[j]) >> 31;
        const int32_t above = static_cast<int32_t>(float_bits(size)) - Layout::kOrigin;
        const int32_t u = above > 0 ? above : 0;
        // The bucket's offset into the table, in bytes: its number inverted below zero.
        const int32_t offset = ((u >> (Layout::kShift - 2)) ^ below_zero) & ~3;
        shifted[j] = *reinterpret_cast<const uint32_t*>(
                         reinterpret_cast<const char*>(entries + kBuckets) + offset) +
                     static_cast<uint32_t>(u);
      }
      const uint32_t low = byte_permute(shifted[0], shifted[1], 0x0062);
      const uint32_t high = byte_permute(shifted[2], shifted[3], 0x0062);
      words[w] = byte_permute(low, high, 0x5410) ^ (kZeroApart ? signs_of(s, 0) : signs_of(x, w));
    }
  }

  template <class W>
  __device__ __forceinline__ void restore(W& packed) const {
#pragma unroll
    for (uint32_t& word : packed.words) {
      word = codes[word & 0xffu] | codes[(word >> 8) & 0xffu] << 8 |
             codes[(word >> 16) & 0xffu] << 16 | static_cast<uint32_t>(codes[word >> 24]) << 24;
    }
  }

 private:
  __device__ __forceinline__ uint32_t search(float s) const {
    return static_cast<uint32_t>(Thresholds8{thresholds}.search(s));
  }

  // 0xff for each of elements 4 w to 4 w + 3 whose sign bit is set.
  template <class T, int kCount>
  __device__ __forceinline__ static uint32_t signs_of(const Words<T, kCount>& x, int w) {
    if constexpr (Words<T, kCount>::kPerWord == 2) {
      return byte_signs(x.words[2 * w], x.words[2 * w + 1], 0x7531);
    } else {
      const uint32_t low = byte_signs(x.words[4 * w], x.words[4 * w + 1], 0x0073);
      const uint32_t high = byte_signs(x.words[4 * w + 2], x.words[4 * w + 3], 0x0073);
      return byte_permute(low, high, 0x5410);
    }
  }

  // Called by all threads of the block; whoever wants the levels must wait for the next barrier.
  __device__ void sort() {
    const int mine = static_cast<int>(threadIdx.x);
    const float level = levels()[mine];
    int rank = 0;
    for (int i = 0; i < kCodeLevels; ++i) {
      const bool before = level_before(levels()[i], level);
      const bool after = level_before(level, levels()[i]);
      rank += static_cast<int>(before || (!after && i < mine));
    }
    __syncthreads();
    levels()[rank] = level;
    codes[rank] = static_cast<uint8_t>(mine);
    __syncthreads();
  }

  // Called by all threads of the block, each of which fills a run of neighbouring buckets.
  __device__ void fill_buckets() {
    constexpr int kRun = static_cast<int>(ceil_div(kBuckets, kTileThreads));
    const Thresholds8 all{thresholds};
    const int mine = static_cast<int>(threadIdx.x);
    const bool is_zero = mine < kCodeThresholds && all.is_zero(mine);
    const bool suits =
        mine >= kCodeThresholds || ((is_zero || !all.is_front(mine)) && all.ascends(mine));
    const int first = mine * kRun;
    const bool fine = all.fill(first, min(first + kRun, kBuckets), entries) && suits;
    const bool all_fine = block_all(fine);
    const bool zero_apart = !block_all(!is_zero);
    if (mine == 0) {
      kind = !all_fine ? Buckets8::kNone : zero_apart ? Buckets8::kZeroApart : Buckets8::kPlain;
    }
  }
};

}  // namespace bnb::gpu
