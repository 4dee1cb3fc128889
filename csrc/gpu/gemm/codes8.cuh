// A weight of int8 codes with a scale for every row on its way to the registers from which the
// tensor cores multiply.
// SPDX-License-Identifier: MIT
//
// As codes4.cuh, for the kernel of wgmma_dgrad.cuh: the pair of bytes that a lane has of a row is
// its two neighbouring features.
#pragma once

#include "bitsandbytes/kernels/int8.h"
#include "gpu/device/wgmma.cuh"

namespace bnb::gpu {

#if BNB_HOPPER

class RowScales {
 public:
  static constexpr int kWidth = 0;  // all features have the scale of their row
  using Stored = float;

  __device__ __forceinline__ explicit RowScales(const float* stats) : stats_(stats) {}

  __device__ __forceinline__ Stored load(int64_t row, int64_t) const { return stats_[row]; }
  __device__ __forceinline__ float value(Stored stored) const {
    return __fmul_rn(stored, 1.0f / kInt8Max);
  }

 private:
  const float* stats_;
};

template <int>
class Decoder8 {
 public:
  using Pair = uint32_t;  // of two rows

  __device__ __forceinline__ Decoder8(uint32_t, uint32_t) {}

  __device__ __forceinline__ static uint32_t chunk_of(uint32_t warp) { return warp; }
  __device__ __forceinline__ static uint32_t feature_of(uint32_t warp, uint32_t g) {
    return warp * 16 + 2 * g;
  }

  // Codes plus 128.
  __device__ __forceinline__ static Pair look_up(uint32_t word, int) { return word ^ 0x80808080u; }
  // As the last bits of floats from 2^23 on.
  __device__ __forceinline__ static float2 widen(Pair word, int row) {
    constexpr float kFirst = 8388608.0f;
    const uint32_t bits = float_bits(kFirst);
    const auto code = [&](uint32_t selector) {
      return __fadd_rn(bits_float(__byte_perm(word, bits, selector)), -kFirst - 128.0f);
    };
    return row == 0 ? float2{code(0x7440), code(0x7441)} : float2{code(0x7442), code(0x7443)};
  }
};

#endif  // BNB_HOPPER

// A weight of int8 codes as a kernel's argument.
struct Codes8 {
  static constexpr int kCodeBytes = 64;  // of 64 elements
  static constexpr int kLeastWidth = 0;
  static constexpr int kTableBytes = 0;
  static constexpr int kNestedBytes = 0;

  const float* stats;

#if BNB_HOPPER
  template <int kTableAt>
  using Decoder = Decoder8<kTableAt>;

  template <int kTableAt>
  __device__ __forceinline__ void fill(float*) const {}

  __device__ __forceinline__ uint32_t column_of(uint32_t) const { return 0; }

  template <class Visitor>
  __device__ __forceinline__ void with_scales(const float*, Visitor&& visit) const {
    visit(RowScales(stats));
  }
#endif
};

}  // namespace bnb::gpu
