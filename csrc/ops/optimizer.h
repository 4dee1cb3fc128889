// Optimizer steps over lists of tensors as torch ops, for any backend.
// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstring>
#include <string>

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/code/code.h"
#include "bitsandbytes/kernels/optimizer.h"
#include "ops/torch_api.h"

namespace bnb::ops {

using Tensors = std::vector<Tensor>;

inline Rule find_rule(const char* op, const std::string& name) {
  std::string known;
  for (int i = 0; i < kRuleCount; ++i) {
    if (name == kRules[i].name) return static_cast<Rule>(i);
    known += (i > 0 ? ", " : "") + std::string(kRules[i].name);
  }
  fail(op, ": rule must be one of {", known, "}, got '", name, "'");
}

// True when the elements of `t` lie in memory in the order of `reference`'s.
inline bool same_layout(const Tensor& t, const Tensor& reference) {
  if (t.is_contiguous() && reference.is_contiguous()) return true;
  const auto a = t.strides();
  const auto b = reference.strides();
  if (a.size() != b.size() || t.numel() != reference.numel()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i] && reference.size(static_cast<int64_t>(i)) > 1) return false;
  }
  return true;
}

// One tensor of one list, checked against its parameter.
inline void check_member(const char* op, const char* list, size_t i, const Tensor& t,
                         const Tensor& param, ScalarType dtype) {
  require(t.scalar_type() == dtype, op, ": ", list, "[", i, "] must have dtype ", dtype, ", got ",
          t.scalar_type());
  require(t.device() == param.device(), op, ": ", list, "[", i,
          "] must be on the device of its parameter (", DeviceOf{param}, "), got ", DeviceOf{t});
  require(t.numel() == param.numel(), op, ": ", list, "[", i, "] must have ", param.numel(),
          " elements, got ", t.numel());
  require(same_layout(t, param), op, ": ", list, "[", i,
          "] must have the strides of its parameter; both must fill their memory");
}

inline void check_length(const char* op, const char* list, const Tensors& tensors,
                         size_t expected) {
  require(tensors.size() == expected, op, ": ", list, " must hold ", expected, " tensors, got ",
          tensors.size());
}

struct StepInput {
  const std::string& rule;
  const Tensors& params;
  const Tensors& grads;
  std::array<const Tensors*, 2> states;
  const Tensor& step;
  const std::optional<Tensor>& lr_tensor;
  Hyper hyper;
};

// Everything that the two precisions share. Returns the pointers of the tensors that hold elements.
inline std::vector<OptimizerTensor> check_step(const char* op, const StepInput& in,
                                               ScalarType state_type, OptimizerStep& args) {
  args.rule = find_rule(op, in.rule);
  args.hyper = in.hyper;
  const size_t count = in.params.size();
  const int states = kRules[static_cast<int>(args.rule)].states;
  require(count > 0, op, ": params must hold at least one tensor");
  check_length(op, "grads", in.grads, count);
  check_length(op, "state1", *in.states[0], count);
  check_length(op, "state2", *in.states[1], states == 2 ? count : 0);

  const Tensor& first = in.params[0];
  const ScalarType type = first.scalar_type();
  args.dtype = check_float(op, "params", first);
  check_dtype(op, "step", in.step, ScalarType::Long);
  check_numel(op, "step", in.step, 1);
  check_same_device(op, "step", in.step, "params", first);
  args.step = in.step.const_data_ptr<int64_t>();
  args.lr = nullptr;
  if (in.lr_tensor.has_value()) {
    check_dtype(op, "lr_tensor", *in.lr_tensor, ScalarType::Float);
    check_numel(op, "lr_tensor", *in.lr_tensor, 1);
    check_same_device(op, "lr_tensor", *in.lr_tensor, "params", first);
    args.lr = in.lr_tensor->const_data_ptr<float>();
  }

  std::vector<OptimizerTensor> tensors(count);
  for (size_t i = 0; i < count; ++i) {
    const Tensor& param = in.params[i];
    require(param.scalar_type() == type && param.device() == first.device(), op, ": params[", i,
            "] must have dtype and device of params[0] (", type, ", ", DeviceOf{first}, "), got ",
            param.scalar_type(), ", ", DeviceOf{param});
    check_member(op, "grads", i, in.grads[i], param, type);
    OptimizerTensor& t = tensors[i];
    t = {};
    t.n = param.numel();
    t.param = param.mutable_data_ptr();
    t.grad = in.grads[i].const_data_ptr();
    for (int k = 0; k < states; ++k) {
      const Tensor& state = (*in.states[k])[i];
      check_member(op, k == 0 ? "state1" : "state2", i, state, param, state_type);
      t.state[k] = state.mutable_data_ptr();
    }
  }
  return tensors;
}

template <class Backend>
void optimizer_step_32bit(const std::string& rule, const Tensors& params, const Tensors& grads,
                          const Tensors& state1, const Tensors& state2, const Tensor& step,
                          const std::optional<Tensor>& lr_tensor, double lr, double beta1,
                          double beta2, double beta3, double alpha, double eps, double weight_decay,
                          double gnorm_scale, bool skip_zeros) {
  constexpr const char* op = "optimizer_step_32bit";
  OptimizerStep args{};
  const Hyper hyper{lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale, skip_zeros};
  const std::vector<OptimizerTensor> tensors =
      check_step(op, {rule, params, grads, {&state1, &state2}, step, lr_tensor, hyper},
                 ScalarType::Float, args);
  const typename Backend::Scope scope(params[0]);
  Backend::optimizer_step_32bit(args, tensors, scope);
}

template <class Backend>
void optimizer_step_8bit_blockwise(const std::string& rule, const Tensors& params,
                                   const Tensors& grads, const Tensors& state1,
                                   const Tensors& state2, const Tensors& absmax1,
                                   const Tensors& absmax2, const Tensor& qmap1,
                                   const std::optional<Tensor>& qmap2, const Tensor& step,
                                   const std::optional<Tensor>& lr_tensor, double lr, double beta1,
                                   double beta2, double beta3, double alpha, double eps,
                                   double weight_decay, double gnorm_scale, bool skip_zeros) {
  constexpr const char* op = "optimizer_step_8bit_blockwise";
  OptimizerStep args{};
  const Hyper hyper{lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale, skip_zeros};
  std::vector<OptimizerTensor> tensors =
      check_step(op, {rule, params, grads, {&state1, &state2}, step, lr_tensor, hyper},
                 ScalarType::Byte, args);

  const int states = kRules[static_cast<int>(args.rule)].states;
  const std::array<const Tensors*, 2> absmax = {&absmax1, &absmax2};
  const std::array<const Tensor*, 2> qmap = {&qmap1, qmap2.has_value() ? &*qmap2 : nullptr};
  for (int k = 0; k < states; ++k) {
    const char* qmap_name = k == 0 ? "qmap1" : "qmap2";
    require(qmap[k] != nullptr, op, ": ", qmap_name, " must be given for rule '", rule, "'");
    check_dtype(op, qmap_name, *qmap[k], ScalarType::Float);
    check_numel(op, qmap_name, *qmap[k], kCodeLevels);
    check_contiguous(op, qmap_name, *qmap[k]);
    check_same_device(op, qmap_name, *qmap[k], "params", params[0]);
    args.qmap[k] = qmap[k]->const_data_ptr<float>();
    const char* list = k == 0 ? "absmax1" : "absmax2";
    check_length(op, list, *absmax[k], params.size());
    for (size_t i = 0; i < params.size(); ++i) {
      const Tensor& t = (*absmax[k])[i];
      const int64_t blocks = ceil_div(tensors[i].n, kOptimizerBlock);
      require(t.scalar_type() == ScalarType::Float && t.numel() == blocks && t.is_contiguous() &&
                  t.device() == params[i].device(),
              op, ": ", list, "[", i, "] must be a contiguous float32 tensor of ", blocks,
              " elements (one per ", kOptimizerBlock, ") on the device of its parameter, got ",
              t.scalar_type(), " of shape ", ShapeOf{t});
      tensors[i].absmax[k] = t.mutable_data_ptr<float>();
    }
  }
  const typename Backend::Scope scope(params[0]);
  Backend::optimizer_step_8bit_blockwise(args, tensors, scope);
}

}  // namespace bnb::ops
