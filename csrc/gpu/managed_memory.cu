// Managed memory: what is allocated, its prefetch, and its end.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bitsandbytes/kernels/managed_memory.h"
#include "gpu/runtime/check.h"

namespace bnb::gpu {
namespace {

struct Allocation {
  int64_t bytes;
  int device;
};

struct Table {
  std::mutex mutex;
  std::unordered_map<uintptr_t, Allocation> live;
  // Released, but freeing was not possible yet.
  std::vector<std::pair<uintptr_t, Allocation>> released;
};

// Never destroyed: tensors may outlive the static objects of this library.
Table& table() {
  static Table* const instance = new Table;
  return *instance;
}

// Makes a device current for a scope.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    BNB_GPU_CHECK(cudaGetDevice(&before_));
    if (before_ == device) return;
    BNB_GPU_CHECK(cudaSetDevice(device));
    changed_ = true;
  }
  ~DeviceScope() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Lets this thread allocate and free while any thread captures a graph, without spoiling it.
class RelaxedCapture {
 public:
  RelaxedCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

int attribute(decltype(cudaDevAttrManagedMemory) which, int device) {
  int value = 0;
  BNB_GPU_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// cudaFree waits for the kernels of the current device, which PyTorch's allocator relies on as
// well.
bool free_one(uintptr_t start, int device) {
  const DeviceScope current(device);
  const bool done = cudaFree(reinterpret_cast<void*>(start)) == cudaSuccess;
  if (!done) (void)cudaGetLastError();
  return done;
}

void free_released() noexcept {
  std::vector<std::pair<uintptr_t, Allocation>> waiting;
  {
    const std::lock_guard lock(table().mutex);
    waiting.swap(table().released);
  }
  if (waiting.empty()) return;
  try {
    const RelaxedCapture relaxed;
    std::erase_if(waiting,
                  [](const auto& entry) { return free_one(entry.first, entry.second.device); });
    const std::lock_guard lock(table().mutex);
    table().released.insert(table().released.end(), waiting.begin(), waiting.end());
  } catch (...) {
    // The process is ending, or the device is lost: the driver takes everything back.
  }
}

}  // namespace

int dlpack_device_type() { return kDlpackDeviceType; }

ManagedSupport managed_support(int device) {
  return {attribute(cudaDevAttrManagedMemory, device) != 0,
          attribute(cudaDevAttrConcurrentManagedAccess, device) != 0};
}

void* allocate_managed(int64_t bytes, int device) {
  free_released();
  const DeviceScope current(device);
  void* start = nullptr;
  const int64_t size = std::max<int64_t>(bytes, 1);
  const cudaError_t status = cudaMallocManaged(&start, static_cast<size_t>(size));
  if (status == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    return nullptr;
  }
  BNB_GPU_CHECK(status);
  const std::lock_guard lock(table().mutex);
  table().live.emplace(reinterpret_cast<uintptr_t>(start), Allocation{size, device});
  return start;
}

void free_managed(void* start) noexcept {
  {
    const std::lock_guard lock(table().mutex);
    const auto entry = table().live.find(reinterpret_cast<uintptr_t>(start));
    if (entry == table().live.end()) return;
    table().released.push_back(*entry);
    table().live.erase(entry);
  }
  free_released();
}

bool is_managed(const void* start) {
  const std::lock_guard lock(table().mutex);
  return table().live.contains(reinterpret_cast<uintptr_t>(start));
}

int64_t managed_bytes(int device) {
  const std::lock_guard lock(table().mutex);
  int64_t sum = 0;
  const auto add = [&](const auto& entry) {
    if (entry.second.device == device) sum += entry.second.bytes;
  };
  std::for_each(table().live.begin(), table().live.end(), add);
  std::for_each(table().released.begin(), table().released.end(), add);
  return sum;
}

void prefetch_managed(std::span<const uintptr_t> starts, Destination destination, Stream stream) {
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(handle, &capture) != cudaSuccess) {
    (void)cudaGetLastError();  // the default stream, while another stream captures
    return;
  }
  if (capture != cudaStreamCaptureStatusNone) return;
  // Held to the end, so that nothing of the list is freed before its prefetch is in the stream.
  const std::lock_guard lock(table().mutex);
  for (const uintptr_t start : starts) {
    const auto entry = table().live.find(start);
    if (entry == table().live.end()) continue;
    const auto [bytes, device] = entry->second;
    if (!managed_support(device).prefetch) continue;
    const auto* memory = reinterpret_cast<const void*>(start);
    BNB_GPU_CHECK(destination == Destination::kDevice
                      ? prefetch_to_device(memory, static_cast<size_t>(bytes), device, handle)
                      : prefetch_to_host(memory, static_cast<size_t>(bytes), handle));
  }
}

}  // namespace bnb::gpu
