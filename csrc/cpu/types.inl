// From element types known at run time to templates.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/kernels/common.h"
#include "bitsandbytes/numeric.h"

namespace bnb::cpu::BNB_ISA {
namespace {

template <class T>
struct Type {
  using type = T;
};

template <class Body>
void by_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat16:
      return body(Type<Half>{});
    case DType::kBFloat16:
      return body(Type<BFloat16>{});
    default:
      return body(Type<float>{});
  }
}

}  // namespace
}  // namespace bnb::cpu::BNB_ISA
