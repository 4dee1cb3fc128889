// Functions on tensors as kernels: LibTorch's stack holds their arguments and then their results.
// SPDX-License-Identifier: MIT
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "ops/torch_api.h"

namespace bnb::ops {

// Takes an argument over from the stack.
template <class T>
T take(StableIValue value) {
  return torch::stable::detail::to<T>(value);
}
// LibTorch's own conversion (2.10 to 2.13) leaks a string in every call.
template <>
inline std::string take<std::string>(StableIValue value) {
  const auto handle = torch::stable::detail::to<StringHandle>(value);
  size_t length = 0;
  const char* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

// Leaves results on the stack.
template <class... Results>
void put(StableIValue* stack, const std::tuple<Results...>& results) {
  [&]<size_t... i>(std::index_sequence<i...>) {
    ((stack[i] = torch::stable::detail::from<Results>(std::get<i>(results))), ...);
  }(std::index_sequence_for<Results...>{});
}
template <class Result>
void put(StableIValue* stack, const Result& result) {
  stack[0] = torch::stable::detail::from<Result>(result);
}

// Torch lets None through where an op takes a tensor, and tensors without memory.
template <class T>
void check_given(const T& value, size_t position) {
  if constexpr (std::is_same_v<T, std::optional<Tensor>>) {
    if (value.has_value()) check_given(*value, position);
  } else if constexpr (std::is_same_v<T, Tensor>) {
    const bool given = value.defined();
    require(given && has_memory(value), "an op of bitsandbytes must be given a tensor as argument ",
            static_cast<int64_t>(position), ", got ", given ? "an empty storage" : "None");
  }
}

template <auto function>
struct Boxed;

template <class Result, class... Parameters, Result (*function)(Parameters...)>
struct Boxed<function> {
  static void call(StableIValue* stack, uint64_t arguments, uint64_t) {
    require(arguments == sizeof...(Parameters), "an op of bitsandbytes must take ",
            sizeof...(Parameters), " arguments, got ", arguments, " by its schema");
    const auto values = [&]<size_t... i>(std::index_sequence<i...>) {
      return std::tuple<std::remove_cvref_t<Parameters>...>{
          take<std::remove_cvref_t<Parameters>>(stack[i])...};
    }(std::index_sequence_for<Parameters...>{});
    [&]<size_t... i>(std::index_sequence<i...>) {
      (check_given(std::get<i>(values), i + 1), ...);
    }(std::index_sequence_for<Parameters...>{});
    if constexpr (std::is_void_v<Result>) {
      std::apply(function, values);
    } else {
      put(stack, std::apply(function, values));
    }
  }
};

// The kernel that calls `function`.
template <auto function>
inline constexpr auto boxed = &Boxed<function>::call;

}  // namespace bnb::ops
