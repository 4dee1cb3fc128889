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
#define cudaMemsetAsync hipMemsetAsync

// Kernel parameters that are read in place; AMD passes them through memory anyway.
#define BNB_GRID_CONSTANT
// AMD bounds the size of all kernel arguments together.
#define BNB_KERNEL_ARGUMENT_BYTES 3840

#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define BNB_GRID_CONSTANT __grid_constant__
// CUDA 12.1 and later take 32764 bytes from compute capability 7.0 on.
#define BNB_KERNEL_ARGUMENT_BYTES 32000

#endif

#include <cstdint>

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

__device__ __forceinline__ int dot4(int a, int b, int acc) {
  for (int shift = 0; shift < 32; shift += 8) {
    acc += static_cast<int>(static_cast<int8_t>(a >> shift)) *
           static_cast<int>(static_cast<int8_t>(b >> shift));
  }
  return acc;
}

__device__ __forceinline__ bool block_all(bool condition) {
  return __syncthreads_and(condition) != 0;
}

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

__device__ __forceinline__ int dot4(int a, int b, int acc) { return __dp4a(a, b, acc); }

__device__ __forceinline__ bool block_all(bool condition) {
  return __syncthreads_and(condition) != 0;
}

#endif

}  // namespace bnb::gpu
