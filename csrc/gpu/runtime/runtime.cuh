// The GPU vendor's runtime under CUDA's names. The only file with conditions on the vendor.
// SPDX-License-Identifier: MIT
#pragma once

#if defined(__HIP__) || defined(__HIP_PLATFORM_AMD__)

#include <hip/hip_fp16.h>
#include <hip/hip_runtime.h>

#define cudaError_t hipError_t
#define cudaSuccess hipSuccess
#define cudaGetErrorString hipGetErrorString
#define cudaGetLastError hipGetLastError
#define cudaStream_t hipStream_t
#define cudaGetDevice hipGetDevice
#define cudaDeviceGetAttribute hipDeviceGetAttribute
#define cudaDevAttrMultiProcessorCount hipDeviceAttributeMultiprocessorCount
#define cudaDevAttrMaxSharedMemoryPerBlockOptin hipDeviceAttributeMaxSharedMemoryPerBlock
#define cudaFuncAttributes hipFuncAttributes
#define cudaFuncAttributeMaxDynamicSharedMemorySize hipFuncAttributeMaxDynamicSharedMemorySize
#define cudaFuncGetAttributes hipFuncGetAttributes
#define cudaFuncSetAttribute hipFuncSetAttribute
#define cudaDevAttrManagedMemory hipDeviceAttributeManagedMemory
#define cudaDevAttrConcurrentManagedAccess hipDeviceAttributeConcurrentManagedAccess
#define cudaSetDevice hipSetDevice
#define cudaErrorMemoryAllocation hipErrorOutOfMemory
#define cudaFree hipFree
#define cudaMallocManaged hipMallocManaged
#define cudaMemsetAsync hipMemsetAsync
#define cudaStreamCaptureMode hipStreamCaptureMode
#define cudaStreamCaptureModeRelaxed hipStreamCaptureModeRelaxed
#define cudaStreamCaptureStatus hipStreamCaptureStatus
#define cudaStreamCaptureStatusNone hipStreamCaptureStatusNone
#define cudaStreamIsCapturing hipStreamIsCapturing
#define cudaThreadExchangeStreamCaptureMode hipThreadExchangeStreamCaptureMode

// Kernel parameters that are read in place; AMD passes them through memory anyway.
#define BNB_GRID_CONSTANT
// AMD reads the second number as waves per execution unit; its compiler chooses better alone.
#define BNB_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads)
// AMD bounds the size of all kernel arguments together.
#define BNB_KERNEL_ARGUMENT_BYTES 3840

namespace bnb::gpu {

// What DLPack calls this vendor's devices.
inline constexpr int kDlpackDeviceType = 10;

inline cudaError_t prefetch_to_device(const void* start, size_t bytes, int device,
                                      cudaStream_t stream) {
  return hipMemPrefetchAsync(start, bytes, device, stream);
}

inline cudaError_t prefetch_to_host(const void* start, size_t bytes, cudaStream_t stream) {
  return hipMemPrefetchAsync(start, bytes, hipCpuDeviceId, stream);
}

}  // namespace bnb::gpu

#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define BNB_GRID_CONSTANT __grid_constant__
// Threads of a block, and blocks that shall fit a multiprocessor.
#define BNB_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
// What CUDA 12.1 and later take from compute capability 7.0 on.
#define BNB_KERNEL_ARGUMENT_BYTES 32764

namespace bnb::gpu {

inline constexpr int kDlpackDeviceType = 2;

#if CUDART_VERSION >= 13000

inline cudaError_t prefetch_to_device(const void* start, size_t bytes, int device,
                                      cudaStream_t stream) {
  return cudaMemPrefetchAsync(start, bytes, {cudaMemLocationTypeDevice, device}, 0, stream);
}

inline cudaError_t prefetch_to_host(const void* start, size_t bytes, cudaStream_t stream) {
  return cudaMemPrefetchAsync(start, bytes, {cudaMemLocationTypeHost, 0}, 0, stream);
}

#else

inline cudaError_t prefetch_to_device(const void* start, size_t bytes, int device,
                                      cudaStream_t stream) {
  return cudaMemPrefetchAsync(start, bytes, device, stream);
}

inline cudaError_t prefetch_to_host(const void* start, size_t bytes, cudaStream_t stream) {
  return cudaMemPrefetchAsync(start, bytes, cudaCpuDeviceId, stream);
}

#endif

}  // namespace bnb::gpu

#endif

#include <cstdint>

#include "bitsandbytes/numeric.h"

namespace bnb::gpu {

// Lanes that execute together. Everything here works on groups of 32 lanes: a warp on NVIDIA and on
// AMD's RDNA, half of a wavefront on CDNA.
inline constexpr int kWarp = 32;

#if defined(__HIP__) || defined(__HIP_PLATFORM_AMD__)

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor(value, lane_mask, kWarp);
}

__device__ __forceinline__ uint32_t warp_max(uint32_t value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const uint32_t other = shuffle_xor(value, offset);
    value = other > value ? other : value;
  }
  return value;
}

__device__ __forceinline__ bool warp_all(bool condition) {
  return warp_max(condition ? 0u : 1u) == 0u;
}

__device__ __forceinline__ uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = (static_cast<uint64_t>(b) << 32) | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t from = (selector >> (4 * i)) & 7u;
    result |= static_cast<uint32_t>((bytes >> (8 * from)) & 0xffu) << (8 * i);
  }
  return result;
}

__device__ __forceinline__ int dot4(int a, int b, int acc) {
  for (int shift = 0; shift < 32; shift += 8) {
    acc += static_cast<int>(static_cast<int8_t>(a >> shift)) *
           static_cast<int>(static_cast<int8_t>(b >> shift));
  }
  return acc;
}

__device__ __forceinline__ float approximate_reciprocal(float x) {
  return __builtin_amdgcn_rcpf(x);
}

__device__ __forceinline__ float approximate_sqrt(float x) { return __builtin_amdgcn_sqrtf(x); }

__device__ __forceinline__ float absmax_step(float most, float x) { return absmax_of(most, x); }

__device__ __forceinline__ uint16_t to_bfloat16_bits(float x) {
  return from_float<BFloat16>(x).bits;
}

__device__ __forceinline__ uint32_t to_bfloat16_pair(float low, float high) {
  return to_bfloat16_bits(low) | (static_cast<uint32_t>(to_bfloat16_bits(high)) << 16);
}

// Copies to shared memory that need not be complete before wait_copies(); here they are.
template <int kBytes>
__device__ __forceinline__ void start_copy(void* shared, const void* global) {
  struct alignas(kBytes) Bytes {
    unsigned char bytes[kBytes];
  };
  *static_cast<Bytes*>(shared) = *static_cast<const Bytes*>(global);
}
__device__ __forceinline__ void close_copy_group() {}
template <int kOpen>
__device__ __forceinline__ void wait_copies() {}

#else

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask, kWarp);
}

__device__ __forceinline__ uint32_t warp_max(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, value);
#else
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const uint32_t other = shuffle_xor(value, offset);
    value = other > value ? other : value;
  }
  return value;
#endif
}

__device__ __forceinline__ bool warp_all(bool condition) {
  return __all_sync(0xffffffffu, condition) != 0;
}

__device__ __forceinline__ uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

__device__ __forceinline__ int dot4(int a, int b, int acc) { return __dp4a(a, b, acc); }

__device__ __forceinline__ float approximate_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float approximate_sqrt(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// max(most, |x|) in which NaN wins.
__device__ __forceinline__ float absmax_step(float most, float x) {
#if __CUDA_ARCH__ >= 800
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(most), "f"(fabsf(x)));
  return y;
#else
  return absmax_of(most, x);
#endif
}

__device__ __forceinline__ uint16_t to_bfloat16_bits(float x) {
#if __CUDA_ARCH__ >= 800
  uint16_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
#else
  return from_float<BFloat16>(x).bits;
#endif
}

__device__ __forceinline__ uint32_t to_bfloat16_pair(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
#else
  return to_bfloat16_bits(low) | (static_cast<uint32_t>(to_bfloat16_bits(high)) << 16);
#endif
}

// Copies to shared memory that run while the thread goes on: start_copy() adds to the open group,
// close_copy_group() closes it, wait_copies<n>() waits for all closed groups but the last n. Only
// what the same thread copied is then sure to be there.
template <int kBytes>
__device__ __forceinline__ void start_copy(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes)
                 : "memory");
  }
#else
  struct alignas(kBytes) Bytes {
    unsigned char bytes[kBytes];
  };
  *static_cast<Bytes*>(shared) = *static_cast<const Bytes*>(global);
#endif
}

__device__ __forceinline__ void close_copy_group() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int kOpen>
__device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
#endif
}

#endif

// Whether quick_reciprocal() serves a positive float of these bits: neither it nor its reciprocal
// is near the ends of the range.
__device__ __forceinline__ bool has_quick_reciprocal(uint32_t bits) {
  return bits - 0x02000000u < 0x7a000000u;
}

// The correctly rounded reciprocal: one Newton step from an approximation within one unit in the
// last place, its error taken with a fused multiply-add (Markstein 1990).
__device__ __forceinline__ float quick_reciprocal(float x) {
  const float y = approximate_reciprocal(x);
  return __fmaf_rn(y, __fmaf_rn(-x, y, 1.0f), y);
}

__device__ __forceinline__ bool block_all(bool condition) {
  return __syncthreads_and(condition) != 0;
}

}  // namespace bnb::gpu
