// Scales of quantization blocks as kernels read them: numbers, or 8-bit codes of numbers.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/code/code.h"
#include "bitsandbytes/kernels/quantize.h"
#include "gpu/runtime/runtime.cuh"

namespace bnb::gpu {

template <bool kNested>
class ScaleReader {
 public:
  // Called by all threads of the block, which must be synchronised before scales are read.
  __device__ __forceinline__ ScaleReader(const Scales& scales,
                                         float (&shared_code)[kNested ? kCodeLevels : 1])
      : scales_(scales), code_(shared_code) {
    if constexpr (kNested) {
      for (int i = threadIdx.x; i < kCodeLevels; i += blockDim.x) shared_code[i] = scales.code[i];
      offset_ = *scales.offset;
      shift_ = log2_of(scales.block_size);
    }
  }

  __device__ __forceinline__ float operator()(int64_t block) const {
    if constexpr (kNested) {
      const int64_t second = shift_ >= 0 ? block >> shift_ : block / scales_.block_size;
      const float level = code_[scales_.codes[block]];
      return __fadd_rn(__fmul_rn(level, scales_.absmax[second]), offset_);
    } else {
      return scales_.absmax[block];
    }
  }

 private:
  const Scales& scales_;
  const float* code_;
  float offset_ = 0.0f;
  int shift_ = -1;  // logarithm of the codes' block size
};

}  // namespace bnb::gpu
