// Plans of optimizer steps, for any backend.
//
// Handing a list of tensors to an op costs about 0.3 us per tensor, and checking it as much again:
// a step over thousands of small parameters takes longer to start than to run. A plan is a list
// that was checked once and is held here; a step by a plan only makes sure that everything still
// lies where it did.
// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstdio>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bitsandbytes/kernels/step_plan.h"
#include "ops/optimizer.h"
#include "ops/percentile_clipping.h"

namespace bnb::ops {

template <class Backend>
class StepPlan {
 public:
  // `gnorm_vec`: histories for percentile clipping, or none. `held`: every tensor of the states,
  // their levels, and the histories.
  StepPlan(const OptimizerStep& args, StateFormat format, std::vector<OptimizerTensor> tensors,
           const Tensors& gnorm_vec, const Tensors& held)
      : args_(args), format_(format), tensors_(std::move(tensors)) {
    for (size_t i = 0; i < gnorm_vec.size(); ++i) {
      gradients_.push_back({nullptr, gnorm_vec[i].mutable_data_ptr<float>(), tensors_[i].n});
    }
    for (const Tensor& t : held) held_.push_back({t, address(t), bytes(t)});
  }

  // Takes the step, or returns false, having written nothing.
  bool take(const PlannedStep& in) {
    const std::lock_guard lock(mutex_);
    if (in.dtype != args_.dtype || in.count != static_cast<int64_t>(tensors_.size())) return false;
    const bool clips = in.percentile < kNoPercentile;
    if (clips && gradients_.empty()) return false;
    // Tensors of the states may have been given other memory by whoever kept them.
    for (const Held& held : held_) {
      if (address(held.tensor) != held.address || bytes(held.tensor) != held.bytes) return false;
    }
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const PlannedTensor& now = in.tensors[i];
      if (now.param != tensors_[i].param || now.n != tensors_[i].n) return false;
      tensors_[i].grad = now.grad;
      if (clips) gradients_[i].grad = now.grad;
    }
    OptimizerStep args = args_;
    args.step = in.step;
    args.lr = in.lr;
    args.hyper = in.hyper;
    args.stochastic_rounding = in.stochastic_rounding;
    args.seed = in.seed;
    args.gnorm_scales = in.gnorm_scales;
    args.max_unorm = in.max_unorm;
    args.unorm = in.unorm;
    args.update_scales = in.update_scales;
    const Tensor& like = held_[0].tensor;
    const typename Backend::Scope scope(like);
    std::optional<Tensor> norms;  // lives until the step is launched
    if (clips) {
      PercentileClipping clipping{in.dtype, in.step, in.percentile, nullptr};
      norms = run_percentile_clipping<Backend>(clipping, gradients_, like, scope);
      args.gnorm_scales = clipping.out + 2 * in.count;
    }
    const auto kept = run_preview<Backend>(args, format_, tensors_, like, scope);
    if (format_ == StateFormat::kFloat32) {
      Backend::optimizer_step_32bit(args, tensors_, scope);
    } else {
      Backend::optimizer_step_8bit_blockwise(args, tensors_, scope);
    }
    return true;
  }

 private:
  // A tensor with the memory that the plan was checked with.
  struct Held {
    Tensor tensor;
    const void* address = nullptr;
    int64_t bytes = 0;
  };

  static const void* address(const Tensor& t) { return t.mutable_data_ptr(); }
  static int64_t bytes(const Tensor& t) {
    int64_t size = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &size));
    return size;
  }

  const OptimizerStep args_;  // what all steps have in common
  const StateFormat format_;
  std::vector<OptimizerTensor> tensors_;
  std::vector<GradientTensor> gradients_;  // none without histories
  std::vector<Held> held_;
  std::mutex mutex_;
};

// The plans of a library, by number. A number that no plan has is harmless.
template <class Backend>
class StepPlans {
 public:
  using Plan = std::shared_ptr<StepPlan<Backend>>;

  // Never destroyed: at the end of a process torch may be gone before its tensors are.
  static StepPlans& instance() {
    static auto* const plans = new StepPlans;
    return *plans;
  }

  int64_t add(Plan plan) {
    const std::lock_guard lock(mutex_);
    plans_.emplace(++last_, std::move(plan));
    return last_;
  }

  Plan find(int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto found = plans_.find(number);
    return found == plans_.end() ? nullptr : found->second;
  }

  void drop(int64_t number) {
    Plan dropped;  // outlives the lock, and frees its tensors then
    const std::lock_guard lock(mutex_);
    const auto found = plans_.find(number);
    if (found == plans_.end()) return;
    dropped = std::move(found->second);
    plans_.erase(found);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, Plan> plans_;
  int64_t last_ = 0;
};

// Makes a plan of what stays the same from step to step, and returns its number; 0 where parameters
// do not lie in memory in the order of their states, so that each step must copy them.
template <class Backend>
int64_t optimizer_plan(const std::string& rule, const Tensors& params, const Tensors& state1,
                       const Tensors& state2, const Tensors& absmax1, const Tensors& absmax2,
                       const std::optional<Tensor>& qmap1, const std::optional<Tensor>& qmap2,
                       const Tensor& step, const Tensors& gnorm_vec) {
  constexpr const char* op = "_optimizer_plan";
  const bool blockwise = qmap1.has_value();
  OptimizerStep args{};
  const StepInput input{rule, params, params, {&state1, &state2}, step, nullptr, Hyper{}, nullptr};
  StepTensors tensors(op, input, blockwise ? ScalarType::Byte : ScalarType::Float, args);
  if (!tensors.in_order()) return 0;
  std::vector<OptimizerTensor>& pointers = tensors.collect();
  if (!gnorm_vec.empty()) check_histories(op, gnorm_vec, params);
  std::vector<const Tensors*> lists = {&state1, &state2, &gnorm_vec};
  Tensors held;
  if (blockwise) {
    const std::array<const Tensor*, 2> qmap = {&*qmap1, pointer_to(qmap2)};
    check_qmaps(op, qmap, state_tensors(tensors.states()), params[0], args);
    const BlockScales scales(op, absmax1, absmax2, tensors.states(), params);
    scales.add_to(pointers);
    lists.insert(lists.end(), {&absmax1, &absmax2});
    held.push_back(*qmap1);
    if (qmap2.has_value()) held.push_back(*qmap2);
  }
  for (size_t i = 0; i < params.size(); ++i) {
    for (const Tensors* list : lists) {
      if (!list->empty()) held.push_back((*list)[i]);
    }
  }
  const auto format = blockwise ? StateFormat::kBlockwise8bit : StateFormat::kFloat32;
  auto plan = std::make_shared<StepPlan<Backend>>(args, format, pointers, gnorm_vec, held);
  return StepPlans<Backend>::instance().add(std::move(plan));
}

template <class Backend>
PlanOutcome take_planned_step(const PlannedStep& step, char* message, size_t size) noexcept {
  try {
    const auto plan = StepPlans<Backend>::instance().find(step.plan);
    return plan != nullptr && plan->take(step) ? PlanOutcome::kTaken : PlanOutcome::kStale;
  } catch (const std::exception& error) {
    std::snprintf(message, size, "%s", error.what());
    return PlanOutcome::kFailed;
  }
}

}  // namespace bnb::ops

// Exports what `bitsandbytes/kernels/step_plan.h` names from a library with one backend.
#define BNB_EXPORT_STEP_PLANS(...)                                                  \
  extern "C" [[gnu::visibility("default")]] bnb::PlanOutcome bnb_take_planned_step( \
      const bnb::PlannedStep* step, char* message, size_t size) {                   \
    return bnb::ops::take_planned_step<__VA_ARGS__>(*step, message, size);          \
  }                                                                                 \
  extern "C" [[gnu::visibility("default")]] void bnb_drop_step_plan(int64_t plan) { \
    bnb::ops::StepPlans<__VA_ARGS__>::instance().drop(plan);                        \
  }
