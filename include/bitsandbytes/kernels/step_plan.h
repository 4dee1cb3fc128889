// Optimizer steps by a plan: what passes between the Python module, which reads tensors of Python,
// and a library of ops, which holds the plans (csrc/ops/step_plan.h).
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>

#include "bitsandbytes/kernels/common.h"
#include "bitsandbytes/optim/clipping.h"
#include "bitsandbytes/optim/optimizer.h"

namespace bnb {

// Where a parameter and its gradient lie now; both have n elements.
struct PlannedTensor {
  void* param;
  const void* grad;
  int64_t n;
};

// One step. Whoever calls has seen to it that all pointers are those of living tensors of `dtype`
// on the plan's device, gradients in the layout of their parameters.
struct PlannedStep {
  int64_t plan;
  DType dtype;
  const PlannedTensor* tensors;  // [count]
  int64_t count;
  int64_t* step;    // steps taken before this one; goes up by one
  LearningRate lr;  // or none: hyper.lr
  Hyper hyper;
  bool stochastic_rounding;
  uint64_t seed;
  // Bounds on whole tensors, as OptimizerStep has them; `percentile` asks for percentile clipping,
  // and excludes gnorm_scales, where it is less than kNoPercentile.
  int percentile;
  const float* gnorm_scales;   // [count] or null
  float max_unorm;             // 0: none, and excludes update_scales otherwise
  float* unorm;                // [count] or null
  const float* update_scales;  // [count] or null
};

enum class PlanOutcome : int {
  kTaken,
  kStale,   // the plan was made for other memory, or without histories; nothing was written
  kFailed,  // `message` says why
};

// The functions that a library of ops exports for this, with their names. They throw nothing.
using TakePlannedStep = PlanOutcome (*)(const PlannedStep* step, char* message, size_t size);
using DropStepPlan = void (*)(int64_t plan);
inline constexpr const char* kTakePlannedStep = "bnb_take_planned_step";
inline constexpr const char* kDropStepPlan = "bnb_drop_step_plan";

}  // namespace bnb
