// A GPU made of fibers, so that kernels can be tested on a machine without one: the part of CUDA's
// language and runtime that this project uses, for a C++ compiler.
//
// Blocks of threads run one after the other, each thread as a fiber of its own; a fiber runs until
// it waits for others. Slow, and good for finding what is wrong: a barrier or warp operation that
// only some threads reach is an error, asynchronous copies are made as late as allowed, and shared
// memory starts out as NaN.
// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace bnb::gpu::emulated {

struct Place {
  dim3 thread;  // in its block
  dim3 block;   // in the grid
  dim3 block_size;
  dim3 grid_size;
};

// Of the fiber that runs.
extern Place place;

// Runs one kernel, and counts it (bnb_emulated_launches()); throws std::logic_error if its threads
// wait for each other for ever.
void run(const std::function<void()>& thread, dim3 grid, dim3 block, int shared_bytes);

// Shared memory of the block beyond the static one.
char* dynamic_shared();

// Waits for all threads of the block; whether the condition held for all.
bool block_all(bool condition);

// Waits for all lanes of the warp, 32 consecutive threads, that have not ended; `values` [32 *
// size] receives what each gave.
void exchange(const void* value, size_t size, void* values);

// Asynchronous copies of the fiber that runs.
void start_copy(void* to, const void* from, size_t bytes);
void close_copy_group();
void wait_copies(int open);

template <class T>
struct Lanes {
  T values[32];
  explicit Lanes(const T& own) { exchange(&own, sizeof(T), values); }
};

// One barrier of some fibers, whose halves are apart.
struct SplitBarrier {
  int arrivals;
  int arrived;
  uint32_t phase;

  void init(int count) {
    arrivals = count;
    arrived = 0;
    phase = 0;
  }
  void arrive();
  void wait(uint32_t parity);
};

inline int lane() { return static_cast<int>(place.thread.x % 32); }

}  // namespace bnb::gpu::emulated

#define threadIdx (::bnb::gpu::emulated::place.thread)
#define blockIdx (::bnb::gpu::emulated::place.block)
#define blockDim (::bnb::gpu::emulated::place.block_size)
#define gridDim (::bnb::gpu::emulated::place.grid_size)

inline void __syncthreads() { bnb::gpu::emulated::block_all(true); }
inline void __threadfence() {}  // blocks of threads run one after the other

// ---- Arithmetic
// ----------------------------------------------------------------------------------

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline int __float2int_rn(float a) {
  return std::isnan(a) ? 0 : static_cast<int>(std::nearbyint(a));
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }

template <class T>
T atomicAdd(T* p, T value) {
  return std::exchange(*p, static_cast<T>(*p + value));
}

inline uint32_t atomicCAS(uint32_t* p, uint32_t expected, uint32_t value) {
  const uint32_t before = *p;
  if (before == expected) *p = value;
  return before;
}

// ---- Runtime
// -------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
};
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  // Few multiprocessors: every loop over tiles takes several turns.
  *value = attribute == cudaDevAttrMultiProcessorCount ? 1 : 100 * 1024;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->sharedSizeBytes = 0;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* start, int value, size_t bytes, cudaStream_t) {
  std::memset(start, value, bytes);
  return cudaSuccess;
}
