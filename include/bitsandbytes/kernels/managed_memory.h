// Memory that moves between a GPU and the host by pages (CUDA and HIP: managed memory).
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <span>

#include "bitsandbytes/kernels/common.h"

namespace bnb::gpu {

// What a device offers.
struct ManagedSupport {
  bool memory;    // managed memory can be allocated
  bool prefetch;  // pages move on demand, can be prefetched, and may exceed the device's memory
};

// What DLPack calls the devices that this file was compiled for.
int dlpack_device_type();

ManagedSupport managed_support(int device);

// Returns memory for use by `device`, or a null pointer if there is none. Pages get their place
// when they are first written. The contents are undefined.
void* allocate_managed(int64_t bytes,  // 0: a place of its own all the same
                       int device);

// Frees what allocate_managed returned, after everything that the device was told before. What
// cannot be freed now, since some thread captures a graph, is freed with the next allocation or
// release.
void free_managed(void* start) noexcept;

// Whether `start` is what allocate_managed returned and is not freed.
bool is_managed(const void* start);

// Bytes that are allocated for `device`.
int64_t managed_bytes(int device);

enum class Destination { kDevice, kHost };

// Moves whole allocations to the device that they were allocated for, or to the host, in the order
// of `stream`. A hint: nothing happens to addresses that are not the start of an allocation, on
// devices without prefetch, and while the stream captures a graph, which cannot hold a prefetch.
void prefetch_managed(std::span<const uintptr_t> starts, Destination destination, Stream stream);

}  // namespace bnb::gpu
