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
  // `gnorm_vec`: histories for percentile clipping, or none. Then every tensor that kernels see in
  // all steps: `watched`, at least one, which others may give other memory, and `own`, which nobody
  // else has.
  StepPlan(const OptimizerStep& args, StateFormat format, std::vector<OptimizerTensor> tensors,
           const Tensors& gnorm_vec, const Tensors& watched, Tensors own)
      : args_(args), format_(format), tensors_(std::move(tensors)), own_(std::move(own)) {
    for (size_t i = 0; i < gnorm_vec.size(); ++i) {
      gradients_.push_back({nullptr, gnorm_vec[i].mutable_data_ptr<float>(), tensors_[i].n});
    }
    for (const Tensor& t : watched) watched_.push_back({t, address(t), bytes(t)});
  }

  // Takes the step, or returns false, having written nothing.
  bool take(const PlannedStep& in) {
    const std::lock_guard lock(mutex_);
    if (in.dtype != args_.dtype || in.count != static_cast<int64_t>(tensors_.size())) return false;
    const bool clips = in.percentile < kNoPercentile;
    if (clips && gradients_.empty()) return false;
    // Tensors of the states may have been given other memory by whoever kept them.
    for (const Watched& w : watched_) {
      if (address(w.tensor) != w.address || bytes(w.tensor) != w.bytes) return false;
    }
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const PlannedTensor& now = in.tensors[i];
      if (now.param != tensors_[i].param || now.n != tensors_[i].n) return false;
      tensors_[i].grad = now.grad;
      if (clips) gradients_[i].grad = now.grad;
    }
    OptimizerStep args = args_;
    args.step = args.counter = in.step;
    args.lr = in.lr;
    args.hyper = in.hyper;
    args.stochastic_rounding = in.stochastic_rounding;
    args.seed = in.seed;
    args.gnorm_scales = in.gnorm_scales;
    args.max_unorm = in.max_unorm;
    args.unorm = in.unorm;
    args.update_scales = in.update_scales;
    const Tensor& like = watched_[0].tensor;
    const typename Backend::Scope scope(like);
    std::optional<Tensor> norms;  // lives until the step is launched
    if (clips) {
      PercentileClipping clipping{in.dtype, in.step, in.percentile, nullptr, args.tickets};
      norms = run_percentile_clipping<Backend>(clipping, gradients_, like, scope);
      args.gnorm_scales = clipping.out + 2 * in.count;
    }
    const auto kept = run_preview<Backend>(args, format_, tensors_, like, scope);
    switch (format_) {
      case StateFormat::kFloat32:
        Backend::optimizer_step_32bit(args, tensors_, scope);
        break;
      case StateFormat::kBlockwise8bit:
        Backend::optimizer_step_8bit_blockwise(args, tensors_, scope);
        break;
      case StateFormat::kTensor8bit:
        Backend::optimizer_step_8bit(args, tensors_, scope);
        break;
    }
    return true;
  }

 private:
  // A tensor with the memory that the plan was checked with.
  struct Watched {
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
  std::vector<Watched> watched_;
  const Tensors own_;
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
// do not lie in memory in the order of their states, so that each step must copy them. States are
// codes where there are levels, with one scale per tensor where `max1` is given. `watched`: whether
// anybody but the caller has states or histories, and may give them other memory.
template <class Backend>
int64_t optimizer_plan(const std::string& rule, const Tensors& params, const Tensors& state1,
                       const Tensors& state2, const Tensors& absmax1, const Tensors& absmax2,
                       const std::optional<Tensor>& qmap1, const std::optional<Tensor>& qmap2,
                       const std::optional<Tensor>& max1, const std::optional<Tensor>& max2,
                       const std::optional<Tensor>& new_max1, const std::optional<Tensor>& new_max2,
                       const Tensor& step, const Tensor& tickets, const Tensors& gnorm_vec,
                       bool watched) {
  constexpr const char* op = "_optimizer_plan";
  const bool codes = qmap1.has_value();
  StateFormat format = StateFormat::kFloat32;
  if (codes) format = max1.has_value() ? StateFormat::kTensor8bit : StateFormat::kBlockwise8bit;
  OptimizerStep args{};
  const StepInput input{rule, params, params, {&state1, &state2}, step, nullptr, Hyper{}, nullptr};
  StepTensors tensors(op, input, codes ? ScalarType::Byte : ScalarType::Float, args);
  if (!tensors.in_order()) return 0;
  std::vector<OptimizerTensor>& pointers = tensors.collect();
  if (!gnorm_vec.empty()) check_histories(op, gnorm_vec, params);
  check_dtype(op, "tickets", tickets, ScalarType::Int);
  check_numel(op, "tickets", tickets, 1 + static_cast<int64_t>(params.size()));
  check_contiguous(op, "tickets", tickets);
  check_same_device(op, "tickets", tickets, "params", params[0]);
  args.tickets = tickets_in(tickets);
  std::vector<const Tensors*> lists = {&state1, &state2, &gnorm_vec};
  const std::array<const Tensor*, 2> qmap = {pointer_to(qmap1), pointer_to(qmap2)};
  if (format == StateFormat::kBlockwise8bit) {
    check_qmaps(op, qmap, state_tensors(tensors.states()), params[0], args);
    const BlockScales scales(op, absmax1, absmax2, tensors.states(), params);
    scales.add_to(pointers);
    lists.insert(lists.end(), {&absmax1, &absmax2});
  } else if (format == StateFormat::kTensor8bit) {
    check_tensor_scales(op, rule, tensors.states(), {pointer_to(max1), pointer_to(max2)}, qmap,
                        params, args);
    check_new_tensor_scales(op, rule, tensors.states(),
                            {pointer_to(new_max1), pointer_to(new_max2)}, params, args);
    args.kept_max[0] = max1->mutable_data_ptr<float>();
    if (tensors.states() == 2) args.kept_max[1] = max2->mutable_data_ptr<float>();
  }
  Tensors shared = {tickets};
  for (const auto* t : {&qmap1, &qmap2, &max1, &max2, &new_max1, &new_max2}) {
    if (t->has_value()) shared.push_back(**t);
  }
  Tensors own;
  for (size_t i = 0; i < params.size(); ++i) {
    for (const Tensors* list : lists) {
      if (!list->empty()) (watched ? shared : own).push_back((*list)[i]);
    }
  }
  auto plan = std::make_shared<StepPlan<Backend>>(args, format, pointers, gnorm_vec, shared,
                                                  std::move(own));
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
