// Optimizer steps over lists of tensors as torch ops, for any backend.
// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/code/code.h"
#include "bitsandbytes/kernels/optimizer.h"
#include "ops/layout.h"
#include "ops/torch_api.h"

namespace bnb::ops {

using Tensors = std::vector<Tensor>;

inline Rule find_rule(const char* op, const std::string& name) {
  std::string known;
  for (int i = 0; i < kRuleCount; ++i) {
    if (name == kRules[i].name) return static_cast<Rule>(i);
    known += (i > 0 ? ", " : "") + std::string(kRules[i].name);
  }
  for (const RuleAlias& alias : kRuleAliases) {
    if (name == alias.name) return alias.rule;
    known += std::string(", ") + alias.name;
  }
  fail(op, ": rule must be one of {", known, "}, got '", name, "'");
}

// One tensor of one list, checked against its parameter, of which it holds `rows` copies.
inline void check_member(const char* op, const char* list, size_t i, const Tensor& t,
                         const Tensor& param, ScalarType dtype, int rows = 1) {
  require(t.scalar_type() == dtype, op, ": ", list, "[", i, "] must have dtype ", dtype, ", got ",
          t.scalar_type());
  require(t.device() == param.device(), op, ": ", list, "[", i,
          "] must be on the device of its parameter (", DeviceOf{param}, "), got ", DeviceOf{t});
  require(t.numel() == rows * param.numel(), op, ": ", list, "[", i, "] must have ",
          rows * param.numel(), " elements, got ", t.numel());
  require(has_memory(t), op, ": ", list, "[", i, "] must have memory, got an empty storage");
}

inline void check_length(const char* op, const char* list, const Tensors& tensors,
                         size_t expected) {
  require(tensors.size() == expected, op, ": ", list, " must hold ", expected, " tensors, got ",
          tensors.size());
}

inline const Tensor* pointer_to(const std::optional<Tensor>& t) {
  return t.has_value() ? &*t : nullptr;
}

// What previews and steps take besides their lists, as the schemas order it.
#define BNB_HYPER_OPTIONS                                                             \
  const Tensor &step, const std::optional<Tensor>&lr_tensor, double lr, double beta1, \
      double beta2, double beta3, double alpha, double eps, double weight_decay,      \
      double gnorm_scale, bool skip_zeros, double t_alpha, double t_beta3
#define BNB_HYPER_INPUT                                                                          \
  step, pointer_to(lr_tensor), Hyper {                                                           \
    lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale, skip_zeros, t_alpha, t_beta3 \
  }
#define BNB_PREVIEW_OPTIONS BNB_HYPER_OPTIONS, const std::optional<Tensor>& gnorm_scales
#define BNB_PREVIEW_INPUT BNB_HYPER_INPUT, pointer_to(gnorm_scales)
#define BNB_STEP_OPTIONS                                                           \
  BNB_HYPER_OPTIONS, double max_unorm, std::optional<int64_t> rounding_seed,       \
      const std::optional<Tensor>&gnorm_scales, const std::optional<Tensor>&unorm, \
      const std::optional<Tensor>&update_scales
#define BNB_STEP_INPUT                                                                    \
  BNB_HYPER_INPUT, pointer_to(gnorm_scales), max_unorm, rounding_seed, pointer_to(unorm), \
      pointer_to(update_scales)

struct StepInput {
  const std::string& rule;
  const Tensors& params;
  const Tensors& grads;
  std::array<const Tensors*, 2> states;
  const Tensor& step;
  const Tensor* lr_tensor;
  Hyper hyper;
  const Tensor* gnorm_scales;
  // A preview needs none of these.
  double max_unorm = 0.0;
  std::optional<int64_t> rounding_seed = std::nullopt;
  const Tensor* unorm = nullptr;
  const Tensor* update_scales = nullptr;
};

// One float per parameter of the list, or null.
inline void check_per_parameter(const char* op, const char* argument, const Tensor& t,
                                const Tensors& params) {
  check_dtype(op, argument, t, ScalarType::Float);
  check_numel(op, argument, t, static_cast<int64_t>(params.size()));
  check_contiguous(op, argument, t);
  check_same_device(op, argument, t, "params", params[0]);
}

// The tensors of one step as the kernels take them. States lie in memory in some dense order, which
// decides what a quantization block is; parameters and gradients that lie otherwise are copied into
// that order, and parameters back when the step is done.
class StepTensors {
 public:
  StepTensors(const char* op, const StepInput& in, ScalarType state_type, OptimizerStep& args)
      : in_(in) {
    args.rule = find_rule(op, in.rule);
    args.hyper = in.hyper;
    const size_t count = in.params.size();
    states_ = kRules[static_cast<int>(args.rule)].states;
    require(count > 0, op, ": params must hold at least one tensor");
    check_length(op, "grads", in.grads, count);
    check_length(op, "state1", *in.states[0], count);
    check_length(op, "state2", *in.states[1], state_tensors(states_) == 2 ? count : 0);

    const Tensor& first = in.params[0];
    const ScalarType type = first.scalar_type();
    args.dtype = check_float(op, "params", first);
    check_dtype(op, "step", in.step, ScalarType::Long);
    check_numel(op, "step", in.step, 1);
    check_same_device(op, "step", in.step, "params", first);
    args.step = in.step.const_data_ptr<int64_t>();
    if (in.lr_tensor != nullptr) {
      const Tensor& lr = *in.lr_tensor;
      const ScalarType lr_type = lr.scalar_type();
      require(lr_type == ScalarType::Float || lr_type == ScalarType::Double, op,
              ": lr_tensor must have dtype ", ScalarType::Float, " or ", ScalarType::Double,
              ", got ", lr_type);
      check_numel(op, "lr_tensor", lr, 1);
      check_same_device(op, "lr_tensor", lr, "params", first);
      if (lr_type == ScalarType::Double) {
        args.lr = lr.const_data_ptr<double>();
      } else {
        args.lr = lr.const_data_ptr<float>();
      }
    }
    for (size_t i = 0; i < count; ++i) {
      const Tensor& param = in.params[i];
      require(param.scalar_type() == type && param.device() == first.device(), op, ": params[", i,
              "] must have dtype and device of params[0] (", type, ", ", DeviceOf{first}, "), got ",
              param.scalar_type(), ", ", DeviceOf{param});
      require(has_memory(param), op, ": params[", i, "] must have memory, got an empty storage");
      check_member(op, "grads", i, in.grads[i], param, type);
      for (int k = 0; k < state_tensors(states_); ++k) {
        const char* list = k == 0 ? "state1" : "state2";
        const Tensor& state = (*in.states[k])[i];
        const int rows = state_rows(states_, k);
        check_member(op, list, i, state, param, state_type, rows);
        if (states_ == 3) {
          require(state.is_contiguous(), op, ": ", list, "[", i, "] must be contiguous, got ",
                  ShapeOf{state}, " with other strides");
        } else {
          require(k == 0 ? is_dense(state) : same_layout(state, (*in.states[0])[i]), op, ": ", list,
                  "[", i, "] must ", k == 0 ? "fill its memory" : "have the strides of state1",
                  ", got ", ShapeOf{state}, " with other strides");
        }
      }
      require(!is_expanded(param), op, ": params[", i,
              "] must have memory for each element, got an expanded tensor of shape ",
              ShapeOf{param});
      check_order(op, "params", i, param);
      check_order(op, "grads", i, in.grads[i]);
    }
    require(in.max_unorm >= 0.0, op, ": max_unorm must be zero or positive, got ", in.max_unorm);
    require(in.max_unorm == 0.0 || in.update_scales == nullptr, op,
            ": max_unorm must be 0 where update_scales keep to a bound, got ", in.max_unorm);
    args.max_unorm = static_cast<float>(in.max_unorm);
    if (in.gnorm_scales != nullptr) {
      check_per_parameter(op, "gnorm_scales", *in.gnorm_scales, in.params);
      args.gnorm_scales = in.gnorm_scales->const_data_ptr<float>();
    }
    if (in.unorm != nullptr) {
      check_per_parameter(op, "unorm", *in.unorm, in.params);
      args.unorm = in.unorm->mutable_data_ptr<float>();
    }
    if (in.update_scales != nullptr) {
      check_per_parameter(op, "update_scales", *in.update_scales, in.params);
      args.update_scales = in.update_scales->const_data_ptr<float>();
    }
    args.stochastic_rounding = in.rounding_seed.has_value();
    args.seed = static_cast<uint64_t>(in.rounding_seed.value_or(0));
  }

  // After all checks have passed: copies what lies in another order, collects the pointers.
  std::vector<OptimizerTensor>& collect() {
    tensors_.resize(in_.params.size());
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const Tensor& layout = layout_of(i);
      OptimizerTensor& t = tensors_[i];
      t = {};
      t.n = in_.params[i].numel();
      t.param = ordered(in_.params[i], layout, true).mutable_data_ptr();
      t.grad = ordered(in_.grads[i], layout, false).const_data_ptr();
      for (int k = 0; k < state_tensors(states_); ++k) {
        t.state[k] = (*in_.states[k])[i].mutable_data_ptr();
      }
    }
    return tensors_;
  }

  void copy_back() {
    for (auto& [param, copy] : copied_params_) torch::stable::copy_(param, copy);
  }

  int states() const { return states_; }

  // Whether no parameter must be copied.
  bool in_order() const {
    for (size_t i = 0; i < in_.params.size(); ++i) {
      if (!same_layout(in_.params[i], layout_of(i))) return false;
    }
    return true;
  }

 private:
  // What does not lie in the order of the state is copied into it, for which it must have its
  // shape.
  void check_order(const char* op, const char* list, size_t i, const Tensor& t) const {
    const Tensor& layout = layout_of(i);
    require(same_layout(t, layout) || same_shape(t, layout), op, ": ", list, "[", i,
            "] must have the shape of its state ", ShapeOf{layout},
            " or be contiguous like it, got ", ShapeOf{t});
  }

  // The parameter's order is that of a one-row state; two rows are always in row-major order.
  const Tensor& layout_of(size_t i) const { return (*in_.states[states_ == 3 ? 1 : 0])[i]; }

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

  const StepInput& in_;
  int states_ = 1;
  std::vector<OptimizerTensor> tensors_;
  std::vector<std::pair<Tensor, Tensor>> copied_params_;
  std::vector<Tensor> copied_grads_;
};

// OptimizerStep::tickets for a list of so many tensors.
inline Tensor new_tickets(const Tensor& like, size_t tensors) {
  return torch::stable::new_zeros(like, {1 + static_cast<int64_t>(tensors)}, ScalarType::Int);
}

inline uint32_t* tickets_in(const Tensor& t) {
  return static_cast<uint32_t*>(t.mutable_data_ptr());
}

// Runs the preview where the step needs it. The returned tensors hold what it found; they must live
// until the step is launched.
template <class Backend>
std::vector<Tensor> run_preview(OptimizerStep& args, StateFormat format,
                                std::span<const OptimizerTensor> tensors, const Tensor& like,
                                const typename Backend::Scope& scope) {
  std::vector<Tensor> kept;
  const bool bounded = args.max_unorm > 0.0f;
  if (!bounded && args.unorm == nullptr && format != StateFormat::kTensor8bit) return kept;
  if (args.tickets == nullptr) {
    kept.push_back(new_tickets(like, tensors.size()));
    args.tickets = tickets_in(kept.back());
  }
  if (bounded) {
    kept.push_back(new_empty(like, {static_cast<int64_t>(tensors.size())}, ScalarType::Float));
    args.new_update_scales = kept.back().mutable_data_ptr<float>();
  }
  kept.push_back(new_empty(like, {preview_tiles(tensors), kPreviewNumbers}, ScalarType::Float));
  Backend::optimizer_preview(args, format, tensors, kept.back().mutable_data_ptr<float>(), scope);
  if (bounded) args.update_scales = args.new_update_scales;
  return kept;
}

// Runs the preview for its sums of squares alone: those of parameters and updates, [2, tensors].
template <class Backend>
Tensor preview_squares(OptimizerStep& args, StateFormat format,
                       std::span<const OptimizerTensor> tensors, const Tensor& like,
                       const typename Backend::Scope& scope) {
  const auto count = static_cast<int64_t>(tensors.size());
  const Tensor squares = new_empty(like, {2, count}, ScalarType::Float);
  args.param_squares = squares.mutable_data_ptr<float>();
  args.unorm = args.param_squares + count;
  run_preview<Backend>(args, format, tensors, like, scope);
  return squares;
}

// The levels of the states.
inline void check_qmaps(const char* op, const std::array<const Tensor*, 2>& qmap, int count,
                        const Tensor& param, OptimizerStep& args) {
  for (int k = 0; k < count; ++k) {
    const char* name = k == 0 ? "qmap1" : "qmap2";
    require(qmap[k] != nullptr, op, ": ", name, " must be given for rule '",
            kRules[static_cast<int>(args.rule)].name, "'");
    check_dtype(op, name, *qmap[k], ScalarType::Float);
    check_numel(op, name, *qmap[k], kCodeLevels);
    check_contiguous(op, name, *qmap[k]);
    check_same_device(op, name, *qmap[k], "params", param);
    args.qmap[k] = qmap[k]->const_data_ptr<float>();
  }
}

template <class Backend>
Tensor optimizer_preview_32bit(const std::string& rule, const Tensors& params, const Tensors& grads,
                               const Tensors& state1, const Tensors& state2, BNB_PREVIEW_OPTIONS) {
  constexpr const char* op = "optimizer_preview_32bit";
  OptimizerStep args{};
  const StepInput input{rule, params, grads, {&state1, &state2}, BNB_PREVIEW_INPUT};
  StepTensors tensors(op, input, ScalarType::Float, args);
  const typename Backend::Scope scope(params[0]);
  return preview_squares<Backend>(args, StateFormat::kFloat32, tensors.collect(), params[0], scope);
}

template <class Backend>
void optimizer_step_32bit(const std::string& rule, const Tensors& params, const Tensors& grads,
                          const Tensors& state1, const Tensors& state2, BNB_STEP_OPTIONS) {
  constexpr const char* op = "optimizer_step_32bit";
  OptimizerStep args{};
  const StepInput input{rule, params, grads, {&state1, &state2}, BNB_STEP_INPUT};
  StepTensors tensors(op, input, ScalarType::Float, args);
  const typename Backend::Scope scope(params[0]);
  const std::vector<OptimizerTensor>& pointers = tensors.collect();
  const auto kept = run_preview<Backend>(args, StateFormat::kFloat32, pointers, params[0], scope);
  Backend::optimizer_step_32bit(args, pointers, scope);
  tensors.copy_back();
}

// The scales of blockwise states.
class BlockScales {
 public:
  BlockScales(const char* op, const Tensors& absmax1, const Tensors& absmax2, int states,
              const Tensors& params)
      : absmax_{&absmax1, &absmax2}, count_(state_tensors(states)) {
    for (int k = 0; k < count_; ++k) {
      const char* list = k == 0 ? "absmax1" : "absmax2";
      check_length(op, list, *absmax_[k], params.size());
      for (size_t i = 0; i < params.size(); ++i) {
        const Tensor& t = (*absmax_[k])[i];
        const int64_t blocks = state_rows(states, k) * ceil_div(params[i].numel(), kOptimizerBlock);
        require(t.scalar_type() == ScalarType::Float && t.numel() == blocks && t.is_contiguous() &&
                    t.device() == params[i].device(),
                op, ": ", list, "[", i, "] must be a contiguous float32 tensor of ", blocks,
                " elements (one per ", kOptimizerBlock, ") on the device of its parameter, got ",
                t.scalar_type(), " of shape ", ShapeOf{t});
        require(has_memory(t), op, ": ", list, "[", i, "] must have memory, got an empty storage");
      }
    }
  }

  std::vector<OptimizerTensor>& add_to(std::vector<OptimizerTensor>& tensors) const {
    for (int k = 0; k < count_; ++k) {
      for (size_t i = 0; i < tensors.size(); ++i) {
        tensors[i].absmax[k] = (*absmax_[k])[i].mutable_data_ptr<float>();
      }
    }
    return tensors;
  }

 private:
  std::array<const Tensors*, 2> absmax_;
  int count_;
};

template <class Backend>
Tensor optimizer_preview_8bit_blockwise(const std::string& rule, const Tensors& params,
                                        const Tensors& grads, const Tensors& state1,
                                        const Tensors& state2, const Tensors& absmax1,
                                        const Tensors& absmax2, const Tensor& qmap1,
                                        const std::optional<Tensor>& qmap2, BNB_PREVIEW_OPTIONS) {
  constexpr const char* op = "optimizer_preview_8bit_blockwise";
  OptimizerStep args{};
  const StepInput input{rule, params, grads, {&state1, &state2}, BNB_PREVIEW_INPUT};
  StepTensors tensors(op, input, ScalarType::Byte, args);
  check_qmaps(op, {&qmap1, pointer_to(qmap2)}, state_tensors(tensors.states()), params[0], args);
  const BlockScales scales(op, absmax1, absmax2, tensors.states(), params);
  const typename Backend::Scope scope(params[0]);
  return preview_squares<Backend>(args, StateFormat::kBlockwise8bit,
                                  scales.add_to(tensors.collect()), params[0], scope);
}

template <class Backend>
void optimizer_step_8bit_blockwise(const std::string& rule, const Tensors& params,
                                   const Tensors& grads, const Tensors& state1,
                                   const Tensors& state2, const Tensors& absmax1,
                                   const Tensors& absmax2, const Tensor& qmap1,
                                   const std::optional<Tensor>& qmap2, BNB_STEP_OPTIONS) {
  constexpr const char* op = "optimizer_step_8bit_blockwise";
  OptimizerStep args{};
  const StepInput input{rule, params, grads, {&state1, &state2}, BNB_STEP_INPUT};
  StepTensors tensors(op, input, ScalarType::Byte, args);
  check_qmaps(op, {&qmap1, pointer_to(qmap2)}, state_tensors(tensors.states()), params[0], args);
  const BlockScales scales(op, absmax1, absmax2, tensors.states(), params);
  const typename Backend::Scope scope(params[0]);
  const std::vector<OptimizerTensor>& pointers = scales.add_to(tensors.collect());
  const auto kept =
      run_preview<Backend>(args, StateFormat::kBlockwise8bit, pointers, params[0], scope);
  Backend::optimizer_step_8bit_blockwise(args, pointers, scope);
  tensors.copy_back();
}

// Checks what a preview with one scale per tensor takes besides its lists.
inline void check_tensor_scales(const char* op, const std::string& rule, int states,
                                const std::array<const Tensor*, 2>& max,
                                const std::array<const Tensor*, 2>& qmap, const Tensors& params,
                                OptimizerStep& args) {
  require(states <= 2, op, ": rule must have one or two states, got '", rule, "'");
  check_qmaps(op, qmap, states, params[0], args);
  for (int k = 0; k < states; ++k) {
    const char* name = k == 0 ? "max1" : "max2";
    require(max[k] != nullptr, op, ": ", name, " must be given for rule '", rule, "'");
    check_per_parameter(op, name, *max[k], params);
    args.max[k] = max[k]->const_data_ptr<float>();
  }
}

// Checks what a step with one scale per tensor takes beyond a preview.
inline void check_new_tensor_scales(const char* op, const std::string& rule, int states,
                                    const std::array<const Tensor*, 2>& new_max,
                                    const Tensors& params, OptimizerStep& args) {
  for (int k = 0; k < states; ++k) {
    const char* name = k == 0 ? "new_max1" : "new_max2";
    require(new_max[k] != nullptr, op, ": ", name, " must be given for rule '", rule, "'");
    check_per_parameter(op, name, *new_max[k], params);
    args.new_max[k] = new_max[k]->mutable_data_ptr<float>();
    require(args.max[k] != args.new_max[k], op, ": ", name, " must not share memory with max",
            k + 1);
  }
}

template <class Backend>
Tensor optimizer_preview_8bit(const std::string& rule, const Tensors& params, const Tensors& grads,
                              const Tensors& state1, const Tensors& state2, const Tensor& max1,
                              const std::optional<Tensor>& max2, const Tensor& qmap1,
                              const std::optional<Tensor>& qmap2, BNB_PREVIEW_OPTIONS) {
  constexpr const char* op = "optimizer_preview_8bit";
  OptimizerStep args{};
  const StepInput input{rule, params, grads, {&state1, &state2}, BNB_PREVIEW_INPUT};
  StepTensors tensors(op, input, ScalarType::Byte, args);
  check_tensor_scales(op, rule, tensors.states(), {&max1, pointer_to(max2)},
                      {&qmap1, pointer_to(qmap2)}, params, args);
  const typename Backend::Scope scope(params[0]);
  return preview_squares<Backend>(args, StateFormat::kTensor8bit, tensors.collect(), params[0],
                                  scope);
}

template <class Backend>
void optimizer_step_8bit(const std::string& rule, const Tensors& params, const Tensors& grads,
                         const Tensors& state1, const Tensors& state2, const Tensor& max1,
                         const std::optional<Tensor>& max2, const Tensor& new_max1,
                         const std::optional<Tensor>& new_max2, const Tensor& qmap1,
                         const std::optional<Tensor>& qmap2, BNB_STEP_OPTIONS) {
  constexpr const char* op = "optimizer_step_8bit";
  OptimizerStep args{};
  const StepInput input{rule, params, grads, {&state1, &state2}, BNB_STEP_INPUT};
  StepTensors tensors(op, input, ScalarType::Byte, args);
  check_tensor_scales(op, rule, tensors.states(), {&max1, pointer_to(max2)},
                      {&qmap1, pointer_to(qmap2)}, params, args);
  check_new_tensor_scales(op, rule, tensors.states(), {&new_max1, pointer_to(new_max2)}, params,
                          args);
  const typename Backend::Scope scope(params[0]);
  const std::vector<OptimizerTensor>& pointers = tensors.collect();
  const auto kept =
      run_preview<Backend>(args, StateFormat::kTensor8bit, pointers, params[0], scope);
  Backend::optimizer_step_8bit(args, pointers, scope);
  tensors.copy_back();
}

#undef BNB_HYPER_OPTIONS
#undef BNB_HYPER_INPUT
#undef BNB_PREVIEW_OPTIONS
#undef BNB_PREVIEW_INPUT
#undef BNB_STEP_OPTIONS
#undef BNB_STEP_INPUT

}  // namespace bnb::ops
