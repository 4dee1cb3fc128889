// Percentile clipping of gradients as a torch op, for any backend.
// SPDX-License-Identifier: MIT
#pragma once

#include <span>
#include <vector>

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/kernels/optimizer.h"
#include "bitsandbytes/optim/clipping.h"
#include "ops/layout.h"
#include "ops/optimizer.h"
#include "ops/torch_api.h"

namespace bnb::ops {

// The histories of the norms of gradients that are like `tensors`.
inline void check_histories(const char* op, const Tensors& gnorm_vec, const Tensors& tensors) {
  check_length(op, "gnorm_vec", gnorm_vec, tensors.size());
  for (size_t i = 0; i < gnorm_vec.size(); ++i) {
    const Tensor& history = gnorm_vec[i];
    require(history.scalar_type() == ScalarType::Float && history.numel() == kNormHistory &&
                history.is_contiguous() && history.device() == tensors[i].device(),
            op, ": gnorm_vec[", i, "] must be a contiguous float32 tensor of ", kNormHistory,
            " elements on the device of its gradient, got ", history.scalar_type(), " of shape ",
            ShapeOf{history});
    require(has_memory(history), op, ": gnorm_vec[", i, "] must have memory, got an empty storage");
  }
}

// Records the norms, and returns them with clip values and factors: [3, tensors].
template <class Backend>
Tensor run_percentile_clipping(PercentileClipping& args, std::span<const GradientTensor> tensors,
                               const Tensor& like, const typename Backend::Scope& scope) {
  const Tensor out = new_empty(like, {3, static_cast<int64_t>(tensors.size())}, ScalarType::Float);
  args.out = out.mutable_data_ptr<float>();
  const Tensor partials = new_empty(like, {preview_tiles(tensors)}, ScalarType::Float);
  Backend::percentile_clipping(args, tensors, partials.mutable_data_ptr<float>(), scope);
  return out;
}

template <class Backend>
Tensor percentile_clipping_step(const Tensors& grads, const Tensors& gnorm_vec, const Tensor& step,
                                int64_t percentile) {
  constexpr const char* op = "percentile_clipping_step";
  require(!grads.empty(), op, ": grads must hold at least one tensor");
  require(percentile >= 0 && percentile < kNoPercentile, op, ": percentile must lie in [0, ",
          kNoPercentile, "), got ", percentile);
  const Tensor& first = grads[0];
  PercentileClipping args{};
  args.dtype = check_float(op, "grads", first);
  args.percentile = static_cast<int>(percentile);
  check_dtype(op, "step", step, ScalarType::Long);
  check_numel(op, "step", step, 1);
  check_same_device(op, "step", step, "grads", first);
  args.step = step.const_data_ptr<int64_t>();
  for (size_t i = 0; i < grads.size(); ++i) {
    require(grads[i].scalar_type() == first.scalar_type() && grads[i].device() == first.device(),
            op, ": grads[", i, "] must have dtype and device of grads[0] (", first.scalar_type(),
            ", ", DeviceOf{first}, "), got ", grads[i].scalar_type(), ", ", DeviceOf{grads[i]});
    require(has_memory(grads[i]), op, ": grads[", i, "] must have memory, got an empty storage");
  }
  check_histories(op, gnorm_vec, grads);
  const typename Backend::Scope scope(first);
  std::vector<Tensor> dense;  // gradients, in an order without gaps: a norm takes any
  std::vector<GradientTensor> tensors(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    dense.push_back(is_dense(grads[i]) ? grads[i] : in_order(grads[i]));
    tensors[i] = {dense.back().const_data_ptr(), gnorm_vec[i].mutable_data_ptr<float>(),
                  grads[i].numel()};
  }
  const Tensor tickets = new_tickets(first, tensors.size());
  args.tickets = tickets_in(tickets);
  return run_percentile_clipping<Backend>(args, tensors, first, scope);
}

}  // namespace bnb::ops
