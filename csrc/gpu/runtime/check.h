// Turns errors of the GPU runtime into exceptions with call, place and text.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "bitsandbytes/kernels/common.h"
#include "gpu/runtime/runtime.cuh"

namespace bnb::gpu {

inline void check(cudaError_t status, const char* what, const char* file, int line) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(status) + " (" +
                           file + ":" + std::to_string(line) + ")");
}

}  // namespace bnb::gpu

#define BNB_GPU_CHECK(call) ::bnb::gpu::check((call), #call, __FILE__, __LINE__)

namespace bnb::gpu {

inline void check_launch(const char* name) {
  if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess) {
    throw std::runtime_error(std::string("launch of ") + name +
                             " failed: " + cudaGetErrorString(status));
  }
}

// Starts a kernel; only then is it known whether its configuration is one that the device can run.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            int shared_bytes, Stream stream, const Arguments&... arguments) {
  start_kernel(kernel, grid, block, shared_bytes, static_cast<cudaStream_t>(stream.handle),
               arguments...);
  check_launch(name);
}

// The same for a kernel that calls wait_for_previous_kernel() before it touches what others do.
template <class... Parameters, class... Arguments>
void launch_early(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                  int shared_bytes, Stream stream, const Arguments&... arguments) {
  start_kernel_early(kernel, grid, block, shared_bytes, static_cast<cudaStream_t>(stream.handle),
                     arguments...);
  check_launch(name);
}

// Multiprocessors of the current device; the runtime keeps its attributes at hand.
inline int multiprocessors() {
  int device = 0;
  int count = 0;
  BNB_GPU_CHECK(cudaGetDevice(&device));
  BNB_GPU_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Blocks of threads for kernels that walk over `tiles` tiles: no more than are in flight together.
// Eight on a multiprocessor are enough to cover the latency of memory.
inline int resident_grid(int64_t tiles, int64_t on_multiprocessor = 8) {
  return static_cast<int>(std::min(tiles, multiprocessors() * on_multiprocessor));
}

// Shared memory that a block of threads may have on the current device, if its kernel asks for it.
inline int most_shared_bytes() {
  int device = 0;
  int bytes = 0;
  BNB_GPU_CHECK(cudaGetDevice(&device));
  BNB_GPU_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

// Lets a kernel have so much shared memory beside its static part.
inline void allow_shared(const void* kernel, int bytes) {
  BNB_GPU_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// Takes what shared memory the first-level cache has as well, for one more block of threads.
inline void prefer_shared(const void* kernel) {
  constexpr int kAllPercent = 100;
  BNB_GPU_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, kAllPercent));
}

// Lets a kernel have so much shared memory beside its static part, and takes it from the cache, if
// there is as much; returns whether there is.
inline bool take_shared(const void* kernel, int bytes) {
  cudaFuncAttributes attributes{};
  BNB_GPU_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  if (bytes > most_shared_bytes() - static_cast<int>(attributes.sharedSizeBytes)) return false;
  allow_shared(kernel, bytes);
  prefer_shared(kernel);
  return true;
}

// What a kernel takes of shared memory beside its static part.
struct SharedNeeds {
  int group;        // threads ...
  int group_bytes;  // ... that take this much together
  int entry_bytes;  // of each of some entries ...
  int entries;      // ... of which there are at most this many
};

struct LaunchShape {
  int threads;
  int group_bytes;  // of all groups together
  int entries;      // that find room
};

// The largest block of at most `most_threads` for which the current device has the shared memory,
// with so many entries that `resident` such blocks fit a multiprocessor. Lets the kernel have it.
inline LaunchShape shape_for(const void* kernel, int most_threads, int resident,
                             const SharedNeeds& needs) {
  constexpr int kReserved = 1024;  // of every block, by the system
  constexpr int kFewEntries = 32;
  int device = 0;
  int of_multiprocessor = 0;
  cudaFuncAttributes attributes{};
  BNB_GPU_CHECK(cudaGetDevice(&device));
  BNB_GPU_CHECK(cudaDeviceGetAttribute(&of_multiprocessor,
                                       cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  BNB_GPU_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  const int limit = most_shared_bytes() - static_cast<int>(attributes.sharedSizeBytes);
  const int share =
      of_multiprocessor / resident - kReserved - static_cast<int>(attributes.sharedSizeBytes);
  const int few = std::min(kFewEntries, needs.entries);
  LaunchShape shape{most_threads, 0, few};
  const auto bytes = [&] { return shape.group_bytes + shape.entries * needs.entry_bytes; };
  for (;; shape.threads /= 2) {
    shape.group_bytes = shape.threads / needs.group * needs.group_bytes;
    if (bytes() <= limit || shape.threads <= needs.group) break;
  }
  // Fewer entries rather than fewer blocks, but for devices on which even a few are too many.
  const int room = (share > bytes() ? std::min(share, limit) : limit) - shape.group_bytes;
  shape.entries = std::clamp(room / needs.entry_bytes, few, needs.entries);
  allow_shared(kernel, bytes());
  return shape;
}

}  // namespace bnb::gpu
