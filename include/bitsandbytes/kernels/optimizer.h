// One optimizer step over a list of tensors: arguments, and the GPU launchers.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
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
  void* state[2];    // [n], float or 8-bit codes; state[1] null for one-state rules. Rules with
                     // three states: state[0] is [2, n]
  float* absmax[2];  // [ceil(n / 256)] or [2, ceil(n / 256)]; null unless states are blockwise
  int64_t n;
};

// What the states are stored as.
enum class StateFormat {
  kFloat32,
  kBlockwise8bit,  // codes, one absmax per 256 elements
  kTensor8bit,     // codes, one absmax per tensor
};

// Arguments of one step. Pointers are on the device of the tensors; those described as
// [tensors] hold one number per entry of the list.
struct OptimizerStep {
  Rule rule;
  DType dtype;           // of parameters and gradients
  const float* qmap[2];  // [256] each: levels of the 8-bit states; null for 32-bit states
  const int64_t* step;   // steps taken before this one
  LearningRate lr;       // or none: hyper.lr
  Hyper hyper;
  const float* gnorm_scales;   // [tensors]: further factors on the gradients, or null
  const float* update_scales;  // [tensors]: factors on the updates, or null
  const float* max[2];         // [tensors]: absmax of the states; null unless kTensor8bit
  float* new_max[2];           // [tensors]: absmax after this step, written by the preview
  bool stochastic_rounding;    // of bfloat16 parameters
  uint64_t seed;               // of that rounding
  // The preview: a pass that writes no state and no parameter, and finds what the step needs to
  // know of a whole tensor beforehand. Null pointers where it is not needed.
  float max_unorm;           // bound on |update| / |parameter|; 0: none
  float* param_squares;      // [tensors]: sum of squares of the parameter, or null
  float* unorm;              // [tensors]: that of the update before it is bounded, or null
  float* new_update_scales;  // [tensors]: factors that keep to the bound; null without one
  uint32_t* tickets;         // as PercentileClipping has them
  // What the step leaves for the next one, once nothing reads it any more. Null pointers where that
  // is up to the caller.
  int64_t* counter;    // = step: goes up by one
  float* kept_max[2];  // [tensors] = max: receives new_max
};

// Elements behind one partial sum of the preview and of gradient norms, on every device.
inline constexpr int64_t kPreviewTile = 8192;
// Numbers of one partial result: sums of squares of the parameter and of the update, absmax of two
// new states, and 1 if an element is not skipped, else 0.
inline constexpr int kPreviewNumbers = 5;

// Room for the partial results of a list: an empty tensor may have one, too.
template <class Tensors>
int64_t preview_tiles(const Tensors& tensors) {
  int64_t tiles = 0;
  for (const auto& t : tensors) tiles += std::max<int64_t>(1, ceil_div(t.n, kPreviewTile));
  return tiles;
}

// A gradient whose norm is recorded.
struct GradientTensor {
  const void* grad;  // [n] of dtype
  float* gnorm_vec;  // [100]: squares of the norms of the last hundred steps
  int64_t n;
};

// Adaptive gradient clipping by a percentile of past norms (bitsandbytes 0.49 and older).
struct PercentileClipping {
  DType dtype;
  const int64_t* step;  // steps taken before this one
  int percentile;       // 0 to 99
  float* out;           // [3, tensors]: gradient norms, clip values, factors on the gradients
  uint32_t* tickets;    // [1 + tensors]: zeros, before the call and after it. Blocks of threads of
                        // a GPU count here what they have done of a tensor, and of all
};

namespace gpu {

// States in float.
void optimizer_step_32bit(const OptimizerStep& args, std::span<const OptimizerTensor> tensors,
                          Stream stream);

// States as 8-bit codes with one absmax per 256 elements.
void optimizer_step_8bit_blockwise(const OptimizerStep& args,
                                   std::span<const OptimizerTensor> tensors, Stream stream);

// States as 8-bit codes with one absmax per tensor; the preview must have run.
void optimizer_step_8bit(const OptimizerStep& args, std::span<const OptimizerTensor> tensors,
                         Stream stream);

// The preview of a step; `partials` is scratch of kPreviewNumbers floats per tile (preview_tiles).
void optimizer_preview(const OptimizerStep& args, StateFormat format,
                       std::span<const OptimizerTensor> tensors, float* partials, Stream stream);

// Records the norm of each gradient; `partials` is scratch of one float per tile (preview_tiles).
void percentile_clipping(const PercentileClipping& args, std::span<const GradientTensor> tensors,
                         float* partials, Stream stream);

}  // namespace gpu
}  // namespace bnb
