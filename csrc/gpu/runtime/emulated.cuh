// CUDA's names for a GPU made of fibers (emulated.h). Included by runtime.cuh.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "gpu/runtime/emulated.h"
#include "gpu/runtime/portable.cuh"

#define BNB_GRID_CONSTANT
#define BNB_LAUNCH_BOUNDS(threads, blocks)
#define BNB_NOINLINE __attribute__((noinline))
#define BNB_DYNAMIC_SHARED(name) char* const name = ::bnb::gpu::emulated::dynamic_shared()
#define BNB_BULK_COPIES 0
#define BNB_HOPPER 0
#define BNB_LANE_TABLES 1
// Few tensors a launch, so that lists take several.
#define BNB_KERNEL_ARGUMENT_BYTES 1024

namespace bnb::gpu {

inline constexpr int kWarp = 32;
inline constexpr bool kLaneTables = true;

template <class T>
T shuffle_xor(T value, int lane_mask) {
  return emulated::Lanes<T>(value).values[emulated::lane() ^ lane_mask];
}

inline uint32_t warp_max(uint32_t value) {
  const emulated::Lanes<uint32_t> lanes(value);
  return *std::max_element(lanes.values, lanes.values + kWarp);
}

inline uint32_t warp_ballot(bool condition) {
  const emulated::Lanes<bool> lanes(condition);
  uint32_t bits = 0;
  for (int i = 0; i < kWarp; ++i) bits |= static_cast<uint32_t>(lanes.values[i]) << i;
  return bits;
}

inline void sync_warp() { warp_ballot(true); }

inline bool warp_all(bool condition) { return warp_ballot(!condition) == 0; }

using SplitBarrier = emulated::SplitBarrier;

inline bool block_all(bool condition) { return emulated::block_all(condition); }

inline int bits_set(uint32_t x) { return __builtin_popcount(x); }

template <class T>
T hide_origin(T x) {
  return x;
}

inline float approximate_reciprocal(float x) { return 1.0f / x; }
inline float approximate_sqrt(float x) { return std::sqrt(x); }

template <int kBytes>
void start_copy(void* shared, const void* global) {
  emulated::start_copy(shared, global, kBytes);
}
inline void close_copy_group() { emulated::close_copy_group(); }
template <int kOpen>
void wait_copies() {
  emulated::wait_copies(kOpen);
}

inline constexpr bool kTensorProducts = true;

inline bool has_tensor_products() { return true; }

template <class T>
void multiply_add_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct A {
    uint32_t words[4];
  };
  struct B {
    uint32_t words[2];
  };
  const emulated::Lanes<A> left({a[0], a[1], a[2], a[3]});
  const emulated::Lanes<B> right({b0, b1});
  const auto half = [](uint32_t word, int i) {
    return to_float(T{static_cast<uint16_t>(i == 0 ? word & 0xffffu : word >> 16)});
  };
  const int group = emulated::lane() / 4;
  const int place = emulated::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int upper = i / 2;  // rows 8 to 15
    for (int word = 0; word < 8; ++word) {
      const uint32_t x = left.values[group * 4 + word % 4].words[upper + word / 4 * 2];
      const uint32_t y = right.values[(place * 2 + i % 2) * 4 + word % 4].words[word / 4];
      c[i] += half(x, 0) * half(y, 0) + half(x, 1) * half(y, 1);
    }
  }
}

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};

inline float half_to_float(uint16_t bits) { return to_float(Half{bits}); }
inline uint16_t float_to_half(float x) { return from_float<Half>(x).bits; }

template <class... Parameters, class... Arguments>
void start_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
                  cudaStream_t, const Arguments&... arguments) {
  emulated::run([&] { kernel(arguments...); }, grid, block, shared_bytes);
}
template <class... Parameters, class... Arguments>
void start_kernel_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
                        cudaStream_t stream, const Arguments&... arguments) {
  start_kernel(kernel, grid, block, shared_bytes, stream, arguments...);
}

using std::max;
using std::min;

}  // namespace bnb::gpu
