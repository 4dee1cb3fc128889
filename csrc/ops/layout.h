// The order in which the elements of a tensor lie in memory.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "ops/torch_api.h"

namespace bnb::ops {

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

// True when elements of `t` are one element in memory, as after an expansion.
inline bool is_expanded(const Tensor& t) {
  if (t.is_contiguous()) return false;
  const auto strides = t.strides();
  for (size_t i = 0; i < strides.size(); ++i) {
    if (strides[i] == 0 && t.size(static_cast<int64_t>(i)) > 1) return true;
  }
  return false;
}

inline bool same_shape(const Tensor& t, const Tensor& other) {
  const auto a = t.sizes();
  const auto b = other.sizes();
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
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

}  // namespace bnb::ops
