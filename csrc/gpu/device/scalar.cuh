// The scalar on which update rules run on a GPU: a float whose arithmetic is spelled in intrinsics,
// so that no compiler flag decides how it rounds.
// SPDX-License-Identifier: MIT
#pragma once

#include "gpu/runtime/runtime.cuh"

namespace bnb::gpu {

// Functions are hidden friends: they are found for Scalars and hide nothing else of their names.
struct Scalar {
  float v;
  Scalar() = default;
  __device__ __forceinline__ explicit Scalar(float x) : v(x) {}

  friend __device__ __forceinline__ Scalar operator+(Scalar a, Scalar b) {
    return Scalar(__fadd_rn(a.v, b.v));
  }
  friend __device__ __forceinline__ Scalar operator*(Scalar a, Scalar b) {
    return Scalar(__fmul_rn(a.v, b.v));
  }
  friend __device__ __forceinline__ Scalar fma(Scalar a, Scalar b, Scalar c) {
    return Scalar(__fmaf_rn(a.v, b.v, c.v));
  }
  friend __device__ __forceinline__ Scalar max(Scalar a, Scalar b) {
    return Scalar(fmaxf(a.v, b.v));
  }
  // -1, 0 or 1; 0 for NaN.
  friend __device__ __forceinline__ Scalar sign(Scalar a) {
    return Scalar(static_cast<float>(a.v > 0.0f) - static_cast<float>(a.v < 0.0f));
  }
  // One special-function instruction each, within 2 units in the last place.
  friend __device__ __forceinline__ Scalar fast_divide(Scalar a, Scalar b) {
    return Scalar(__fmul_rn(a.v, approximate_reciprocal(b.v)));
  }
  friend __device__ __forceinline__ Scalar fast_sqrt(Scalar a) {
    return Scalar(approximate_sqrt(a.v));
  }
};

}  // namespace bnb::gpu
