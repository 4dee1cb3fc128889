// Loads and stores of a few consecutive elements per thread, as float, in 16-byte accesses where
// the pointer allows.
// SPDX-License-Identifier: MIT
#pragma once

#include <type_traits>

#include "bitsandbytes/numeric.h"
#include "bitsandbytes/philox.h"
#include "gpu/runtime/runtime.cuh"

namespace bnb::gpu {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(BFloat16 x) { return to_float(x); }
__device__ __forceinline__ float widen(Half x) { return half_to_float(x.bits); }

template <class T>
__device__ __forceinline__ T narrow(float x) {
  return from_float<T>(x);
}
template <>
__device__ __forceinline__ BFloat16 narrow<BFloat16>(float x) {
  return {to_bfloat16_bits(x)};
}
template <>
__device__ __forceinline__ Half narrow<Half>(float x) {
  return {float_to_half(x)};
}

// kCount elements that move in one access.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};

// Elements of T in a 16-byte access.
template <class T>
inline constexpr int kPackSize = 16 / static_cast<int>(sizeof(T));

// Reads kCount elements at `p`, `missing` from `valid` on. `aligned`: p lies on a multiple of the
// pack's size, the same for the whole block of threads.
template <class T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* p, int64_t valid, bool aligned,
                                                     T missing = T{}) {
  Pack<T, kCount> pack;
  if (aligned && valid >= kCount) {
    pack = *reinterpret_cast<const Pack<T, kCount>*>(p);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack.values[i] = i < valid ? p[i] : missing;
  }
  return pack;
}

template <class T, int kCount>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, kCount>& pack, int64_t valid,
                                           bool aligned) {
  if (aligned && valid >= kCount) {
    *reinterpret_cast<Pack<T, kCount>*>(p) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < valid) p[i] = pack.values[i];
    }
  }
}

// kCount elements of T as they lie in 32-bit words. Aligned, so that reading or writing one through
// a pointer is a single access.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Words {
  static constexpr int kWords = kCount * static_cast<int>(sizeof(T)) / 4;
  static constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  static_assert(kPerWord * kWords == kCount);
  uint32_t words[kWords];

  __device__ __forceinline__ uint8_t byte(int i) const {
    return static_cast<uint8_t>(words[i / 4] >> (8 * (i % 4)));
  }

  __device__ __forceinline__ float get(int i) const {
    const uint32_t word = words[i / kPerWord];
    if constexpr (kPerWord == 1) {
      return bits_float(word);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      return bits_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
    } else {
      return widen(Half{static_cast<uint16_t>(i % 2 == 0 ? word & 0xffffu : word >> 16)});
    }
  }

  __device__ __forceinline__ void set(const float (&x)[kCount]) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (kPerWord == 1) {
        words[w] = float_bits(x[w]);
      } else if constexpr (std::is_same_v<T, BFloat16>) {
        words[w] = to_bfloat16_pair(x[2 * w], x[2 * w + 1]);
      } else {
        words[w] = narrow<Half>(x[2 * w]).bits |
                   (static_cast<uint32_t>(narrow<Half>(x[2 * w + 1]).bits) << 16);
      }
    }
  }

  // Rounds stochastically. For eight bfloat16, which share one call of the generator.
  __device__ __forceinline__ void set(const float (&x)[kCount], const PhiloxWords& random) {
    static_assert(std::is_same_v<T, BFloat16> && kCount == kRoundingGroup);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const uint32_t low = from_float_stochastic(x[2 * w], rounding_bits(random, 2 * w)).bits;
      const uint32_t high =
          from_float_stochastic(x[2 * w + 1], rounding_bits(random, 2 * w + 1)).bits;
      words[w] = low | (high << 16);
    }
  }
};

// Elements kPart i to kPart i + kPart - 1.
template <int kPart, class T, int kCount>
__device__ __forceinline__ Words<T, kPart> part(const Words<T, kCount>& whole, int i) {
  Words<T, kPart> result;
#pragma unroll
  for (int w = 0; w < result.kWords; ++w) result.words[w] = whole.words[i * result.kWords + w];
  return result;
}

// Reads elements one by one, zeros from `valid` on.
template <class T, int kCount>
__device__ __forceinline__ Words<T, kCount> load_words(const T* p, int64_t valid) {
  float x[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = i < valid ? widen(p[i]) : 0.0f;
  Words<T, kCount> words;
  words.set(x);
  return words;
}

// Magnitude bits of the float with the largest magnitude; NaN wins.
template <class T, int kCount>
__device__ __forceinline__ uint32_t largest_magnitude(const Words<T, kCount>& words) {
  constexpr int kWords = Words<T, kCount>::kWords;
  static_assert(kWords % 2 == 0);
  if constexpr (Words<T, kCount>::kPerWord == 2) {
    // Two chains, so that one need not wait for every step of the other.
    uint32_t pair = words.words[0];
    uint32_t other = words.words[1];
#pragma unroll
    for (int w = 2; w < kWords; w += 2) {
      pair = max_magnitudes<T>(pair, words.words[w]);
      other = max_magnitudes<T>(other, words.words[w + 1]);
    }
    pair = max_magnitudes<T>(pair, other);
    const uint32_t bits = max(pair & 0x7fffu, pair >> 16 & 0x7fffu);
    return magnitude_bits(widen(T{static_cast<uint16_t>(bits)}));
  } else {
    float largest = 0.0f;
    float other = 0.0f;
#pragma unroll
    for (int j = 0; j < kCount; j += 2) {
      largest = absmax_step(largest, words.get(j));
      other = absmax_step(other, words.get(j + 1));
    }
    return magnitude_bits(absmax_step(largest, other));
  }
}

// Reads a whole Words at an aligned pointer.
template <class W, class T>
__device__ __forceinline__ W load_aligned(const T* p) {
  return *reinterpret_cast<const W*>(p);
}

template <class W, class T>
__device__ __forceinline__ void store_aligned(T* p, const W& words) {
  *reinterpret_cast<W*>(p) = words;
}

__host__ __device__ __forceinline__ bool is_aligned(const void* p, int bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace bnb::gpu
