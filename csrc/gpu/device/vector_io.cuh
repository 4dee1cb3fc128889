// Loads and stores of a few consecutive elements per thread, as float, in 16-byte accesses where
// the pointer allows.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/numeric.h"
#include "gpu/runtime/runtime.cuh"

namespace bnb::gpu {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(BFloat16 x) { return to_float(x); }
__device__ __forceinline__ float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
__device__ __forceinline__ T narrow(float x) {
  return from_float<T>(x);
}
template <>
__device__ __forceinline__ Half narrow<Half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// kCount elements that move in one access.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};

// Elements of T in a 16-byte access.
template <class T>
inline constexpr int kPackSize = 16 / static_cast<int>(sizeof(T));

// Reads kCount elements at `p`, zeros from `valid` on. `aligned`: p lies on a multiple of the
// pack's size, the same for the whole block of threads.
template <class T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* p, int64_t valid, bool aligned) {
  Pack<T, kCount> pack;
  if (aligned && valid >= kCount) {
    pack = *reinterpret_cast<const Pack<T, kCount>*>(p);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack.values[i] = i < valid ? p[i] : T{};
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

__host__ __device__ __forceinline__ bool is_aligned(const void* p, int bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace bnb::gpu
