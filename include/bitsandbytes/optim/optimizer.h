// What an optimizer is: one struct with its update rule on registers. Drivers (CPU loop, GPU
// kernel) own loads and stores, gradient scale, weight decay, skipped elements and the precision of
// the states; a rule knows none of that.
// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "bitsandbytes/config.h"
#include "bitsandbytes/numeric.h"

namespace bnb {

// Hyperparameters of one call, as the caller gave them. Double, because 1 - beta^step cancels.
struct Hyper {
  double lr;
  double beta1;
  double beta2;
  double beta3;
  double alpha;
  double eps;
  double weight_decay;
  double gnorm_scale;  // factor on every gradient
  bool skip_zeros;     // elements whose gradient is zero keep state and parameter
  double t_alpha;      // steps until alpha is reached; 0: from the first on
  double t_beta3;      // steps until beta3 is reached; 0: from the first on
};

// A learning rate in memory of the device, which replaces Hyper::lr; or none.
class LearningRate {
 public:
  BNB_HD LearningRate(std::nullptr_t = nullptr) : value_(nullptr), wide_(false) {}
  BNB_HD LearningRate(const float* value) : value_(value), wide_(false) {}
  BNB_HD LearningRate(const double* value) : value_(value), wide_(true) {}

  BNB_HD double value_or(double lr) const {
    if (value_ == nullptr) return lr;
    return wide_ ? *static_cast<const double*>(value_) : *static_cast<const float*>(value_);
  }

 private:
  const void* value_;
  bool wide_;
};

enum class WeightDecay {
  kL2,               // added to the gradient
  kDecoupledBefore,  // parameter shrinks before its update
  kDecoupledAfter,   // parameter shrinks after its update
};

// A rule offers:
//   kName            the name in ops and Python
//   kStates          number of states per element, 1 to 3. Three states lie in two tensors: the
//                    first holds two of them, as rows [2, n]
//   kWeightDecay     where weight decay enters
//   Constants        what update() needs, computed once per call from Hyper and step;
//                    it holds `step_size`, the factor on the direction
//   constants(h, step)
//   update(grad, param, states, constants)
//                    advances the states and returns the direction d of the step
//                    param <- param - step_size * d
// update() is a template on its scalar: float on a GPU, a SIMD vector on a CPU. It spells every
// fused multiply-add, so that states come out with the same bits on every device. Only what enters
// a parameter but no state may use fast_divide() and fast_sqrt(): correctly rounded on a CPU, off
// by at most two units in the last place on a GPU, where their arguments must not be subnormal.

// What becomes of a state that is not finite after its update: an overflow stays the largest float,
// NaN is forgotten. Otherwise one element would spoil the scale of its whole quantization block.
BNB_HD constexpr float finite_state(float s) {
  if (is_nan(s)) return 0.0f;
  return s > kFloatMax ? kFloatMax : (s < -kFloatMax ? -kFloatMax : s);
}

// Bias correction 1 - beta^step.
BNB_HD double bias_correction(double beta, double step) { return 1.0 - std::pow(beta, step); }

}  // namespace bnb
