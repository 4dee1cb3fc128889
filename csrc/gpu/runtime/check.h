// Turns errors of the GPU runtime into exceptions with call, place and text.
// SPDX-License-Identifier: MIT
#pragma once

#include <stdexcept>
#include <string>

#include "gpu/runtime/runtime.cuh"

namespace bnb::gpu {

inline void check(cudaError_t status, const char* what, const char* file, int line) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(status) + " (" +
                           file + ":" + std::to_string(line) + ")");
}

}  // namespace bnb::gpu

#define BNB_GPU_CHECK(call) ::bnb::gpu::check((call), #call, __FILE__, __LINE__)
// After a launch: a wrong configuration is only known here.
#define BNB_LAUNCH_CHECK(kernel) \
  ::bnb::gpu::check(cudaGetLastError(), "launch of " kernel, __FILE__, __LINE__)

namespace bnb::gpu {

// Multiprocessors of the current device; the runtime keeps its attributes at hand.
inline int multiprocessors() {
  int device = 0;
  int count = 0;
  BNB_GPU_CHECK(cudaGetDevice(&device));
  BNB_GPU_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Shared memory that a block of threads may have on the current device, if its kernel asks for it.
inline int most_shared_bytes() {
  int device = 0;
  int bytes = 0;
  BNB_GPU_CHECK(cudaGetDevice(&device));
  BNB_GPU_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

struct LaunchShape {
  int threads;
  int shared_bytes;  // dynamic
};

// The largest block of at most `most_threads` whose shared memory the current device has, where
// every group of `group` threads takes `group_bytes` of it. Lets the kernel have that much.
inline LaunchShape shape_for(const void* kernel, int most_threads, int group, int group_bytes) {
  cudaFuncAttributes attributes{};
  BNB_GPU_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  const int limit = most_shared_bytes() - static_cast<int>(attributes.sharedSizeBytes);
  int threads = most_threads;
  while (threads > group && threads / group * group_bytes > limit) threads /= 2;
  const LaunchShape shape{threads, threads / group * group_bytes};
  BNB_GPU_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     shape.shared_bytes));
  return shape;
}

}  // namespace bnb::gpu
