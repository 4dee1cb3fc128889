// 8-bit blockwise quantization as torch ops, for any backend: check, allocate, scope, launch.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/code/code.h"
#include "bitsandbytes/kernels/quantize.h"
#include "ops/torch_api.h"

namespace bnb::ops {

inline void check_block_size(const char* op, int64_t block_size) {
  require(block_size > 0, op, ": blocksize must be positive, got ", block_size);
}

inline void check_code(const char* op, const Tensor& code, const Tensor& a) {
  check_dtype(op, "code", code, ScalarType::Float);
  check_numel(op, "code", code, kCodeLevels);
  check_same_device(op, "code", code, "A", a);
}

template <class Backend>
void quantize_into(const Tensor& a, const Tensor& code, int64_t block_size, const Tensor& out,
                   const Tensor& absmax, DType dtype) {
  if (a.numel() == 0) return;
  const typename Backend::Scope scope(a);
  const Tensor source = in_order(a);
  const Tensor levels = in_order(code);
  Backend::quantize_blockwise(
      {dtype, source.const_data_ptr(), levels.const_data_ptr<float>(),
       out.mutable_data_ptr<uint8_t>(), absmax.mutable_data_ptr<float>(), a.numel(), block_size},
      scope);
}

template <class Backend>
DType check_quantize(const char* op, const Tensor& a, const Tensor& code, int64_t block_size) {
  const DType dtype = check_float(op, "A", a);
  check_block_size(op, block_size);
  Backend::check_quantize_block_size(op, block_size);
  check_code(op, code, a);
  return dtype;
}

template <class Backend>
std::tuple<Tensor, Tensor> quantize_blockwise(const Tensor& a, const Tensor& code,
                                              int64_t block_size) {
  constexpr const char* op = "quantize_blockwise";
  const DType dtype = check_quantize<Backend>(op, a, code, block_size);
  Tensor out = new_empty(a, shape_of(a), ScalarType::Byte);
  Tensor absmax = new_empty(a, {ceil_div(a.numel(), block_size)}, ScalarType::Float);
  quantize_into<Backend>(a, code, block_size, out, absmax, dtype);
  return {out, absmax};
}

template <class Backend>
void quantize_blockwise_out(const Tensor& a, const Tensor& code, int64_t block_size, Tensor out,
                            Tensor absmax) {
  constexpr const char* op = "quantize_blockwise";
  const DType dtype = check_quantize<Backend>(op, a, code, block_size);
  check_dtype(op, "out", out, ScalarType::Byte);
  check_numel(op, "out", out, a.numel());
  check_contiguous(op, "out", out);
  check_same_device(op, "out", out, "A", a);
  check_dtype(op, "absmax", absmax, ScalarType::Float);
  check_numel(op, "absmax", absmax, ceil_div(a.numel(), block_size));
  check_contiguous(op, "absmax", absmax);
  check_same_device(op, "absmax", absmax, "A", a);
  quantize_into<Backend>(a, code, block_size, out, absmax, dtype);
}

inline DType check_dequantize(const Tensor& a, const Tensor& absmax, const Tensor& code,
                              int64_t block_size, ScalarType dtype) {
  constexpr const char* op = "dequantize_blockwise";
  check_dtype(op, "A", a, ScalarType::Byte);
  check_block_size(op, block_size);
  check_dtype(op, "absmax", absmax, ScalarType::Float);
  check_numel(op, "absmax", absmax, ceil_div(a.numel(), block_size));
  check_same_device(op, "absmax", absmax, "A", a);
  check_code(op, code, a);
  return check_float(op, "dtype", dtype);
}

template <class Backend>
void dequantize_into(const Tensor& a, const Tensor& absmax, const Tensor& code, int64_t block_size,
                     const Tensor& out, DType dtype) {
  if (a.numel() == 0) return;
  const typename Backend::Scope scope(a);
  const Tensor codes = in_order(a);
  const Tensor scales = in_order(absmax);
  const Tensor levels = in_order(code);
  Backend::dequantize_blockwise(
      {dtype, codes.const_data_ptr<uint8_t>(), scales.const_data_ptr<float>(),
       levels.const_data_ptr<float>(), out.mutable_data_ptr(), a.numel(), block_size},
      scope);
}

template <class Backend>
Tensor dequantize_blockwise(const Tensor& a, const Tensor& absmax, const Tensor& code,
                            int64_t block_size, ScalarType dtype) {
  const DType element = check_dequantize(a, absmax, code, block_size, dtype);
  Tensor out = new_empty(a, shape_of(a), dtype);
  dequantize_into<Backend>(a, absmax, code, block_size, out, element);
  return out;
}

template <class Backend>
void dequantize_blockwise_out(const Tensor& a, const Tensor& absmax, const Tensor& code,
                              int64_t block_size, ScalarType dtype, Tensor out) {
  constexpr const char* op = "dequantize_blockwise";
  const DType element = check_dequantize(a, absmax, code, block_size, dtype);
  check_dtype(op, "out", out, dtype);
  check_numel(op, "out", out, a.numel());
  check_contiguous(op, "out", out);
  check_same_device(op, "out", out, "A", a);
  dequantize_into<Backend>(a, absmax, code, block_size, out, element);
}

}  // namespace bnb::ops
