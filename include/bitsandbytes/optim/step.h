// What surrounds an update rule, the same for every precision and device: gradient scale, weight
// decay, learning rate, and which elements stand still.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/config.h"
#include "bitsandbytes/numeric.h"
#include "bitsandbytes/optim/optimizer.h"

namespace bnb {

// Everything a step needs besides the tensors, computed once per call.
template <class R>
struct Step {
  typename R::Constants constants;
  float gnorm_scale;
  float
      weight_decay;  // L2: factor on the parameter; decoupled: 1 - lr * weight_decay, so 1 for none
  bool skip_zeros;

  // `step`: number of this step, from 1. `lr` replaces hyper.lr where there is one.
  BNB_HD static Step make(Hyper hyper, int64_t step, LearningRate lr) {
    hyper.lr = lr.value_or(hyper.lr);
    Step s;
    s.constants = R::constants(hyper, static_cast<double>(step));
    s.gnorm_scale = static_cast<float>(hyper.gnorm_scale);
    s.weight_decay = static_cast<float>(R::kWeightDecay == WeightDecay::kL2
                                            ? hyper.weight_decay
                                            : 1.0 - hyper.lr * hyper.weight_decay);
    s.skip_zeros = hyper.skip_zeros;
    return s;
  }

  // The step of one tensor, with factors of its own on gradient and update.
  BNB_HD Step scaled(float grad_factor, float update_factor) const {
    Step s = *this;
    s.gnorm_scale *= grad_factor;
    s.constants.step_size *= update_factor;
    return s;
  }

  // For preview(): the learning rate is one.
  BNB_HD static Step make_preview(Hyper hyper, int64_t step) {
    hyper.lr = 1.0;
    return make(hyper, step, nullptr);
  }

  // Advances the states by one scaled gradient; returns the update of the parameter over the
  // learning rate, without decoupled weight decay. For steps of make_preview().
  template <class F>
  BNB_HD F preview(F grad, F param, F (&states)[R::kStates]) const {
    if (R::kWeightDecay == WeightDecay::kL2 && weight_decay != 0.0f) {
      grad = fma(F(weight_decay), param, grad);
    }
    return F(constants.step_size) * R::update(grad, param, states, constants);
  }

  // Advances the states by one scaled gradient; returns the new parameter.
  template <class F>
  BNB_HD F advance(F grad, F param, F (&states)[R::kStates]) const {
    if (R::kWeightDecay == WeightDecay::kL2 && weight_decay != 0.0f) {
      grad = fma(F(weight_decay), param, grad);
    }
    if (R::kWeightDecay == WeightDecay::kDecoupledBefore) param = param * F(weight_decay);
    const F direction = R::update(grad, param, states, constants);
    param = fma(F(-constants.step_size), direction, param);
    if (R::kWeightDecay == WeightDecay::kDecoupledAfter) param = param * F(weight_decay);
    return param;
  }
};

}  // namespace bnb
