// CUDA's names for HIP: AMD GPUs. Included by runtime.cuh.
// SPDX-License-Identifier: MIT
#pragma once

#include <hip/hip_fp16.h>
#include <hip/hip_runtime.h>

#include <cstdint>

#include "gpu/runtime/portable.cuh"

#define cudaError_t hipError_t
#define cudaSuccess hipSuccess
#define cudaGetErrorString hipGetErrorString
#define cudaGetLastError hipGetLastError
#define cudaStream_t hipStream_t
#define cudaGetDevice hipGetDevice
#define cudaDeviceGetAttribute hipDeviceGetAttribute
#define cudaDevAttrMultiProcessorCount hipDeviceAttributeMultiprocessorCount
#define cudaDevAttrMaxSharedMemoryPerBlockOptin hipDeviceAttributeMaxSharedMemoryPerBlock
#define cudaDevAttrMaxSharedMemoryPerMultiprocessor \
  hipDeviceAttributeMaxSharedMemoryPerMultiprocessor
#define cudaFuncAttributes hipFuncAttributes
#define cudaFuncAttributeMaxDynamicSharedMemorySize hipFuncAttributeMaxDynamicSharedMemorySize
#define cudaFuncAttributePreferredSharedMemoryCarveout hipFuncAttributePreferredSharedMemoryCarveout
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
#define BNB_NOINLINE __noinline__
#define BNB_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#define BNB_BULK_COPIES 0
#define BNB_HOPPER 0
#define BNB_LANE_TABLES 0

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

// A wavefront, or half of one: groups of 32 lanes.
inline constexpr int kWarp = 32;
inline constexpr bool kLaneTables = false;

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

// One bit per lane for which the condition holds.
__device__ __forceinline__ uint32_t warp_ballot(bool condition) {
  const uint64_t lanes = __ballot(condition);
  return static_cast<uint32_t>(__lane_id() < kWarp ? lanes : lanes >> kWarp);
}

__device__ __forceinline__ int bits_set(uint32_t x) { return __popc(x); }

template <class T>
__device__ __forceinline__ T hide_origin(T x) {
  return x;
}

__device__ __forceinline__ float approximate_reciprocal(float x) {
  return __builtin_amdgcn_rcpf(x);
}

__device__ __forceinline__ float approximate_sqrt(float x) { return __builtin_amdgcn_sqrtf(x); }

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

__device__ __forceinline__ bool block_all(bool condition) {
  return __syncthreads_and(condition) != 0;
}

// What these would serve is not compiled.
inline constexpr bool kTensorProducts = false;
inline bool has_tensor_products() { return false; }
template <class T>
__device__ void multiply_add_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                     uint32_t b1);
__device__ void sync_warp();
struct SplitBarrier {
  __device__ void init(int arrivals);
  __device__ void arrive();
  __device__ void wait(uint32_t parity);
};

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ uint16_t float_to_half(float x) {
  return __half_as_ushort(__float2half_rn(x));
}

template <class... Parameters, class... Arguments>
void start_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
                  cudaStream_t stream, const Arguments&... arguments) {
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
}
template <class... Parameters, class... Arguments>
void start_kernel_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
                        cudaStream_t stream, const Arguments&... arguments) {
  start_kernel(kernel, grid, block, shared_bytes, stream, arguments...);
}

}  // namespace bnb::gpu
