// The only door to LibTorch: names of its stable interface, argument checks, allocation.
// SPDX-License-Identifier: MIT
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <concepts>
#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bitsandbytes/kernels/common.h"

namespace bnb::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

// ---- Errors: one sentence that names op, argument, what was expected and what came
// -----------------

// Text is only put together when it is needed: checks run in every call. Plain string building,
// because locales of iostreams do not survive two copies of the C++ library in one process.

inline void append(std::string& text, const char* part) { text += part; }
inline void append(std::string& text, const std::string& part) { text += part; }

template <std::integral T>
void append(std::string& text, T part) {
  text += std::to_string(part);
}

inline void append(std::string& text, double part) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%g", part);
  text += digits;
}

inline void append(std::string& text, ScalarType part) {
  text += torch::headeronly::toString(part);
}

// What a message says of a tensor.
struct ShapeOf {
  const Tensor& tensor;
};
struct DeviceOf {
  const Tensor& tensor;
};
struct DtypeOf {
  const Tensor& tensor;
};

// False when the memory of `t` was taken away, as FSDP does with parameters that it has gathered.
inline bool has_memory(const Tensor& t) {
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  return bytes > 0 || t.numel() == 0;
}

inline void append(std::string& text, const Shape& part) {
  text += '[';
  for (size_t i = 0; i < part.size(); ++i) {
    if (i > 0) text += ", ";
    append(text, part[i]);
  }
  text += ']';
}

inline void append(std::string& text, ShapeOf part) {
  const auto sizes = part.tensor.sizes();
  append(text, Shape(sizes.begin(), sizes.end()));
}

inline void append(std::string& text, DtypeOf part) { append(text, part.tensor.scalar_type()); }

inline void append(std::string& text, DeviceOf part) {
  const auto type = part.tensor.device().type();
  if (type == torch::headeronly::DeviceType::CPU) {
    text += "cpu";
    return;
  }
  if (type == torch::headeronly::DeviceType::CUDA) {
    text += "cuda:";
  } else {
    text += "device type ";
    append(text, static_cast<int>(type));
    text += ':';
  }
  append(text, static_cast<int>(part.tensor.get_device_index()));
}

template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const Parts&... parts) {
  std::string sentence;
  (append(sentence, parts), ...);
  throw std::runtime_error(sentence);
}

template <class... Parts>
void require(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]] {
    fail(parts...);
  }
}

// A dtype as LibTorch numbers it.
inline int32_t number_of(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

// Where a tensor is, as LibTorch numbers it.
struct Place {
  explicit Place(const Tensor& t) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &index));
  }
  bool operator==(const Place&) const = default;

  int32_t type = 0;
  int32_t index = 0;
};

// Numbers are compared because Tensor::scalar_type() tries one dtype after the other.
inline bool has_dtype(const Tensor& t, ScalarType expected) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype == number_of(expected);
}

inline void check_dtype(const char* op, const char* argument, const Tensor& t,
                        ScalarType expected) {
  require(has_dtype(t, expected), op, ": ", argument, " must have dtype ", expected, ", got ",
          DtypeOf{t});
}

inline void check_same_device(const char* op, const char* argument, const Tensor& t,
                              const char* reference_name, const Tensor& reference) {
  require(Place(t) == Place(reference), op, ": ", argument, " must be on the device of ",
          reference_name, " (", DeviceOf{reference}, "), got ", DeviceOf{t});
}

inline void check_numel(const char* op, const char* argument, const Tensor& t, int64_t expected) {
  require(t.numel() == expected, op, ": ", argument, " must have ", expected, " elements, got ",
          t.numel(), " (shape ", ShapeOf{t}, ")");
}

// For outputs: written through their pointer, so they cannot be copied first.
inline void check_contiguous(const char* op, const char* argument, const Tensor& t) {
  require(t.is_contiguous(), op, ": ", argument, " must be contiguous, got shape ", ShapeOf{t},
          " with other strides");
}

// ---- Element types
// -------------------------------------------------------------------------------

inline std::optional<DType> float_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      return std::nullopt;
  }
}

inline DType check_float(const char* op, const char* argument, ScalarType type) {
  const std::optional<DType> dtype = float_dtype(type);
  require(dtype.has_value(), op, ": ", argument, " must be float32, float16 or bfloat16, got ",
          type);
  return *dtype;
}

inline DType check_float(const char* op, const char* argument, const Tensor& t) {
  return check_float(op, argument, t.scalar_type());
}

// ---- Allocation
// ----------------------------------------------------------------------------------

inline Shape shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Shape(sizes.begin(), sizes.end());
}

// Asks LibTorch's allocation itself: torch::stable::new_empty() looks for an op by its name, which
// takes longer than all that is left of an allocation.
inline Tensor new_empty(const Tensor& like, const Shape& shape, ScalarType dtype) {
  const Place place(like);
  Shape strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(shape[i], 1);
  }
  AtenTensorHandle handle = nullptr;
  const AOTITorchError status =
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                               number_of(dtype), place.type, place.index, &handle);
  require(status == AOTI_TORCH_SUCCESS, "bitsandbytes: ", DeviceOf{like},
          " gives no memory for a tensor of shape ", shape, " and dtype ", dtype);
  return Tensor(handle);
}

inline void fill_zeros(const Tensor& t) { TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(t.get())); }

inline Tensor new_zeros(const Tensor& like, const Shape& shape, ScalarType dtype) {
  const Tensor t = new_empty(like, shape, dtype);
  fill_zeros(t);
  return t;
}

// Calls an op of torch by name; `stack` holds its arguments and then its results.
inline void call_torch(const char* name, const char* overload, StableIValue* stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION));
}

// Calls an op that returns a tensor.
template <class... Arguments>
Tensor call_op(const char* name, const Arguments&... arguments) {
  StableIValue stack[] = {torch::stable::detail::from(arguments)...};
  call_torch(name, "", stack);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Calls an op that writes its product into `out`.
inline void call_product(const char* name, const Tensor& a, const Tensor& b, const Tensor& out) {
  StableIValue stack[] = {torch::stable::detail::from(a), torch::stable::detail::from(b),
                          torch::stable::detail::from(out)};
  call_torch(name, "out", stack);
  torch::stable::detail::to<Tensor>(stack[0]);  // takes back the reference that the call returned
}

// The elements of `t`, from one of them on, as a matrix whose rows lie `stride` apart. LibTorch's
// own functions for views are looked up by name.
inline Tensor as_matrix_of(const Tensor& t, int64_t rows, int64_t columns, int64_t stride,
                           int64_t first = 0) {
  const int64_t sizes[] = {rows, columns};
  const int64_t strides[] = {stride, 1};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, first, &handle));
  return Tensor(handle);
}

// Until it goes, nothing is recorded for gradients.
class NoGrad {
 public:
  NoGrad() : enabled_(aoti_torch_grad_mode_is_enabled()) {
    aoti_torch_grad_mode_set_enabled(false);
  }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(enabled_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool enabled_;
};

#if defined(USE_CUDA)
// The raw current stream of a CUDA or ROCm device.
inline void* current_gpu_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}
#endif

// The tensor itself when its elements already lie in order, else a copy that does.
inline Tensor in_order(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

}  // namespace bnb::ops
