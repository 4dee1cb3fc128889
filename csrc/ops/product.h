// What products of matrices have in common as ops.
// SPDX-License-Identifier: MIT
#pragma once

#include "ops/torch_api.h"

namespace bnb::ops {

// Runs a kernel with the memory that it asks for, on the device of `like`.
template <class Backend, class Arguments>
void run_product(const Tensor& like, const Arguments& args,
                 void (*kernel)(const Arguments&, void*, const typename Backend::Scope&),
                 const typename Backend::Scope& scope) {
  const int64_t bytes = Backend::workspace_bytes(args);
  if (bytes == 0) return kernel(args, nullptr, scope);
  const Tensor workspace = new_empty(like, {bytes}, ScalarType::Byte);
  kernel(args, workspace.mutable_data_ptr(), scope);
}

}  // namespace bnb::ops
