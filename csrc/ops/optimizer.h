// Optimizer steps over lists of tensors as torch ops, for any backend.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <utility>
#include <vector>

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

// True when the elements of `t` fill their stretch of memory without gaps or overlaps.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  const Shape sizes = shape_of(t);
  const auto strides = t.strides();
  std::vector<size_t> order;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] != 1) order.push_back(i);
  }
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (const size_t i : order) {
    if (strides[i] != expected) return false;
    expected *= sizes[i];
  }
  return true;
}

// True when the elements of `t` lie in memory in the order of the dense `reference`'s.
inline bool same_layout(const Tensor& t, const Tensor& reference) {
  if (t.is_contiguous() && reference.is_contiguous()) return true;
  const auto a = t.strides();
  const auto b = reference.strides();
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    const auto dim = static_cast<int64_t>(i);
    if (t.size(dim) != reference.size(dim)) return false;
    if (a[i] != b[i] && t.size(dim) > 1) return false;
  }
  return true;
}

// A copy of `t` whose elements lie in the order of `reference`'s.
inline Tensor copy_in_layout(const Tensor& t, const Tensor& reference) {
  std::array<StableIValue, 6> stack{
      torch::stable::detail::from(reference),
      torch::stable::detail::from(std::optional<ScalarType>(t.scalar_type())),
      torch::stable::detail::from(std::nullopt),
      torch::stable::detail::from(std::nullopt),
      torch::stable::detail::from(std::nullopt),
      torch::stable::detail::from(std::nullopt)};
  call_torch("aten::empty_like", "", stack.data());
  Tensor copy = torch::stable::detail::to<Tensor>(stack[0]);
  return torch::stable::copy_(copy, t);
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

// The tensors of one step as the kernels take them. States lie in memory in some dense order, which
// decides what a quantization block is; parameters and gradients that lie otherwise are copied into
// that order, and parameters back when the step is done.
class StepTensors {
 public:
  StepTensors(const char* op, const StepInput& in, ScalarType state_type, OptimizerStep& args) {
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
    for (size_t i = 0; i < count; ++i) {
      const Tensor& param = in.params[i];
      require(param.scalar_type() == type && param.device() == first.device(), op, ": params[", i,
              "] must have dtype and device of params[0] (", type, ", ", DeviceOf{first}, "), got ",
              param.scalar_type(), ", ", DeviceOf{param});
      check_member(op, "grads", i, in.grads[i], param, type);
      for (int k = 0; k < states; ++k) {
        const char* list = k == 0 ? "state1" : "state2";
        const Tensor& state = (*in.states[k])[i];
        check_member(op, list, i, state, param, state_type);
        require(k == 0 ? is_dense(state) : same_layout(state, (*in.states[0])[i]), op, ": ", list,
                "[", i, "] must ", k == 0 ? "fill its memory" : "have the strides of state1",
                ", got ", ShapeOf{state}, " with other strides");
      }
    }
  }

  // After all checks have passed: copies what lies in another order, collects the pointers.
  std::vector<OptimizerTensor>& collect(const StepInput& in, int states) {
    tensors_.resize(in.params.size());
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const Tensor& layout = (*in.states[0])[i];
      OptimizerTensor& t = tensors_[i];
      t = {};
      t.n = in.params[i].numel();
      t.param = ordered(in.params[i], layout, true).mutable_data_ptr();
      t.grad = ordered(in.grads[i], layout, false).const_data_ptr();
      for (int k = 0; k < states; ++k) t.state[k] = (*in.states[k])[i].mutable_data_ptr();
    }
    return tensors_;
  }

  void copy_back() {
    for (auto& [param, copy] : copied_params_) torch::stable::copy_(param, copy);
  }

 private:
  Tensor ordered(const Tensor& t, const Tensor& layout, bool written) {
    if (same_layout(t, layout)) return t;
    Tensor copy = copy_in_layout(t, layout);
    if (written) {
      copied_params_.emplace_back(t, copy);
    } else {
      copied_grads_.push_back(copy);
    }
    return copy;
  }

  std::vector<OptimizerTensor> tensors_;
  std::vector<std::pair<Tensor, Tensor>> copied_params_;
  std::vector<Tensor> copied_grads_;
};

template <class Backend>
void optimizer_step_32bit(const std::string& rule, const Tensors& params, const Tensors& grads,
                          const Tensors& state1, const Tensors& state2, const Tensor& step,
                          const std::optional<Tensor>& lr_tensor, double lr, double beta1,
                          double beta2, double beta3, double alpha, double eps, double weight_decay,
                          double gnorm_scale, bool skip_zeros) {
  constexpr const char* op = "optimizer_step_32bit";
  OptimizerStep args{};
  const Hyper hyper{lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale, skip_zeros};
  const StepInput input{rule, params, grads, {&state1, &state2}, step, lr_tensor, hyper};
  StepTensors tensors(op, input, ScalarType::Float, args);
  const typename Backend::Scope scope(params[0]);
  const int states = kRules[static_cast<int>(args.rule)].states;
  Backend::optimizer_step_32bit(args, tensors.collect(input, states), scope);
  tensors.copy_back();
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
  const StepInput input{rule, params, grads, {&state1, &state2}, step, lr_tensor, hyper};
  StepTensors tensors(op, input, ScalarType::Byte, args);

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
      const int64_t blocks = ceil_div(params[i].numel(), kOptimizerBlock);
      require(t.scalar_type() == ScalarType::Float && t.numel() == blocks && t.is_contiguous() &&
                  t.device() == params[i].device(),
              op, ": ", list, "[", i, "] must be a contiguous float32 tensor of ", blocks,
              " elements (one per ", kOptimizerBlock, ") on the device of its parameter, got ",
              t.scalar_type(), " of shape ", ShapeOf{t});
    }
  }
  const typename Backend::Scope scope(params[0]);
  std::vector<OptimizerTensor>& pointers = tensors.collect(input, states);
  for (int k = 0; k < states; ++k) {
    for (size_t i = 0; i < params.size(); ++i) {
      pointers[i].absmax[k] = (*absmax[k])[i].template mutable_data_ptr<float>();
    }
  }
  Backend::optimizer_step_8bit_blockwise(args, pointers, scope);
  tensors.copy_back();
}

}  // namespace bnb::ops
