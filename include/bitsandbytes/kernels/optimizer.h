// One optimizer step over a list of tensors: arguments, and the GPU launchers.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <span>

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/kernels/common.h"
#include "bitsandbytes/optim/registry.h"

namespace bnb {

// One parameter with its gradient and states; all of the same n elements.
struct OptimizerTensor {
  void* param;       // [n] of dtype
  const void* grad;  // [n] of dtype
  void* state[2];    // [n], float or 8-bit codes; state[1] null for one-state rules
  float* absmax[2];  // [ceil(n / 256)], null for 32-bit states
  int64_t n;
};

struct OptimizerStep {
  Rule rule;
  DType dtype;           // of parameters and gradients
  const float* qmap[2];  // [256] each: levels of the 8-bit states; null for 32-bit states
  const int64_t* step;   // steps taken before this one; on the device of the tensors
  const float* lr;       // learning rate on the device of the tensors, or null: hyper.lr
  Hyper hyper;
};

namespace gpu {

// States in float.
void optimizer_step_32bit(const OptimizerStep& args, std::span<const OptimizerTensor> tensors,
                          Stream stream);

// States as 8-bit codes with one absmax per 256 elements.
void optimizer_step_8bit_blockwise(const OptimizerStep& args,
                                   std::span<const OptimizerTensor> tensors, Stream stream);

}  // namespace gpu
}  // namespace bnb
