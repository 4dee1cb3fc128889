// The layouts that the DLPack standard prescribes. https://dmlc.github.io/dlpack/latest/c_api.html
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

namespace bnb::dlpack {

struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t dtype_code;
  uint8_t dtype_bits;
  uint16_t dtype_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

// What a capsule named "dltensor" points to.
struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

// What the capsule `__dlpack_c_exchange_api__` of a class of tensors points to, from DLPack 1.3 on.
struct ExchangeApi {
  uint32_t major;
  uint32_t minor;
  ExchangeApi* previous;  // the same of an older major version, or null
  void* unused[3];        // functions for tensors that change owners
  // Describes a tensor without owning it. Returns 0, or -1 with a Python exception. May be null.
  int (*describe)(void* py_object, Tensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

constexpr char kTensorCapsule[] = "dltensor";
constexpr char kExchangeApiCapsule[] = "dlpack_exchange_api";
constexpr uint32_t kExchangeApiMajor = 1;

enum DType : uint8_t { kInteger = 0, kUnsignedInteger = 1, kFloat = 2, kBFloat = 4 };

}  // namespace bnb::dlpack
