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

// Multiprocessors of the current device. Read once per device; the runtime caches attributes.
inline int multiprocessors() {
  int device = 0;
  int count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice", __FILE__, __LINE__);
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute", __FILE__, __LINE__);
  return count;
}

}  // namespace bnb::gpu

#define BNB_GPU_CHECK(call) ::bnb::gpu::check((call), #call, __FILE__, __LINE__)
// After a launch: a wrong configuration is only known here.
#define BNB_LAUNCH_CHECK(kernel) \
  ::bnb::gpu::check(cudaGetLastError(), "launch of " kernel, __FILE__, __LINE__)
