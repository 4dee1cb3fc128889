// What holds for whole tensors, from the partial results of their tiles: bounds on updates, absmax
// of states, factors on gradients; and what a step leaves for the next one.
// SPDX-License-Identifier: MIT
#pragma once

#include <span>

#include "bitsandbytes/kernels/optimizer.h"

namespace bnb::cpu {

// Writes args.param_squares, args.unorm, args.new_update_scales and args.new_max, where they are
// given.
void finish_preview(const OptimizerStep& args, std::span<const OptimizerTensor> tensors,
                    const float* partials);  // [tiles of the list, kPreviewNumbers]

// What a step leaves for the next one, where args asks for it.
void leave_step(const OptimizerStep& args, size_t tensors);

// Writes args.out and the histories.
void finish_percentile_clipping(const PercentileClipping& args,
                                std::span<const GradientTensor> tensors,
                                const float* partials);  // [tiles of the list]

}  // namespace bnb::cpu
