// Scales of quantization blocks as kernels read them: numbers, or 8-bit codes of numbers.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/code/code.h"
#include "bitsandbytes/kernels/quantize.h"
#include "gpu/device/vector_io.cuh"
#include "gpu/runtime/runtime.cuh"

namespace bnb::gpu {

template <bool kNested>
class ScaleReader {
 public:
  // Called by all threads of the block, which must be synchronised before scales are read.
  __device__ __forceinline__ ScaleReader(const Scales& scales,
                                         float (&shared_code)[kNested ? kCodeLevels : 1])
      : ScaleReader(scales, static_cast<const float*>(shared_code)) {
    if constexpr (kNested) fill_code(scales, shared_code);
  }
  // For a code that fill_code() put into shared memory.
  __device__ __forceinline__ ScaleReader(const Scales& scales, const float* shared_code)
      : scales_(scales), code_(shared_code) {
    if constexpr (kNested) {
      offset_ = *scales.offset;
      shift_ = log2_of(scales.block_size);
    }
  }

  // Called by all threads of the block.
  __device__ __forceinline__ static void fill_code(const Scales& scales,
                                                   float* shared_code) {  // [kCodeLevels]
    for (int i = threadIdx.x; i < kCodeLevels; i += blockDim.x) shared_code[i] = scales.code[i];
  }

  // What memory holds of a scale, for those who ask for it long before they need it.
  struct Stored {
    float absmax;
    uint8_t code;
  };

  __device__ __forceinline__ Stored load(int64_t block) const {
    if constexpr (kNested) {
      return {absmax_of_code(block), scales_.codes[block]};
    } else {
      return {scales_.absmax[block], 0};
    }
  }

  __device__ __forceinline__ float value(Stored stored) const {
    if constexpr (kNested) {
      return __fadd_rn(__fmul_rn(code_[stored.code], stored.absmax), offset_);
    } else {
      return stored.absmax;
    }
  }

  // Nested scales of blocks b to b + 3, where b is a multiple of four, that have one absmax.
  struct StoredFour {
    float absmax;
    uint32_t codes;
  };
  __device__ __forceinline__ StoredFour load_four(int64_t block) const {
    return {absmax_of_code(block), *reinterpret_cast<const uint32_t*>(scales_.codes + block)};
  }
  __device__ __forceinline__ float value(StoredFour stored, int i) const {
    return value(Stored{stored.absmax, static_cast<uint8_t>(stored.codes >> (8 * i))});
  }

  __device__ __forceinline__ float operator()(int64_t block) const { return value(load(block)); }

 private:
  __device__ __forceinline__ float absmax_of_code(int64_t block) const {
    return scales_.absmax[shift_ >= 0 ? block >> shift_ : block / scales_.block_size];
  }

  const Scales& scales_;
  const float* code_;
  float offset_ = 0.0f;
  int shift_ = -1;  // logarithm of the codes' block size
};

}  // namespace bnb::gpu
