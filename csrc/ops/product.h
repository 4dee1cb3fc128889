// What products of matrices have in common as ops.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/blocks.h"
#include "ops/torch_api.h"

namespace bnb::ops {

// Places in one piece of memory: to allocate one takes about as long as to start a kernel.
class Pieces {
 public:
  // Returns the byte where a place of so many begins.
  int64_t add(int64_t bytes) {
    const int64_t begin = bytes_;
    bytes_ += ceil_div(bytes, kAlignment) * kAlignment;
    return begin;
  }
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kAlignment = 256;
  int64_t bytes_ = 0;
};

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
