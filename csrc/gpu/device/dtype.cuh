// Dtypes known at run time, in kernels and for launches.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/kernels/common.h"
#include "gpu/device/vector_io.cuh"

namespace bnb::gpu {

__device__ __forceinline__ float read_as_float(DType dtype, const void* p, int64_t i) {
  switch (dtype) {
    case DType::kFloat16:
      return widen(static_cast<const Half*>(p)[i]);
    case DType::kBFloat16:
      return widen(static_cast<const BFloat16*>(p)[i]);
    default:
      return static_cast<const float*>(p)[i];
  }
}

__device__ __forceinline__ float bias_at(const void* bias, DType dtype, int64_t col) {
  return bias != nullptr ? read_as_float(dtype, bias, col) : 0.0f;
}

// Returns body.template operator()<T>() with the type of the elements.
template <class Body>
auto by_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat16:
      return body.template operator()<Half>();
    case DType::kBFloat16:
      return body.template operator()<BFloat16>();
    default:
      return body.template operator()<float>();
  }
}

}  // namespace bnb::gpu
