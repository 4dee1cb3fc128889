// Quantiles of a tensor as a torch op, for any backend.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/kernels/quantiles.h"
#include "ops/torch_api.h"

namespace bnb::ops {

template <class Backend>
Tensor estimate_quantiles(const Tensor& a, double offset) {
  constexpr const char* op = "estimate_quantiles";
  const DType dtype = check_float(op, "A", a);
  require(a.numel() > 0, op, ": A must have at least one element, got shape ", ShapeOf{a});
  require(offset >= 0.0 && offset <= 0.5, op, ": offset must be 0 to 0.5, got ", offset);
  const typename Backend::Scope scope(a);
  const Tensor source = in_order(a);
  Tensor out = new_empty(a, {kQuantiles}, ScalarType::Float);
  const Tensor workspace =
      new_empty(a, {Backend::quantile_workspace_bytes(dtype)}, ScalarType::Byte);
  Backend::estimate_quantiles(
      {dtype, source.const_data_ptr(), out.mutable_data_ptr<float>(), a.numel(), offset},
      workspace.mutable_data_ptr(), scope);
  return out;
}

}  // namespace bnb::ops
