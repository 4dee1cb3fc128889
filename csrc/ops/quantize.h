// 8-bit blockwise quantization as torch ops, for any backend: check, allocate, scope, launch.
// SPDX-License-Identifier: MIT
#pragma once

#include <limits>

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
  require(code.numel() >= 1 && code.numel() <= kCodeLevels, op, ": code must have 1 to ",
          kCodeLevels, " elements, got ", code.numel(), " (shape ", ShapeOf{code}, ")");
  check_same_device(op, "code", code, "A", a);
}

// The 256 levels that kernels read. A shorter table ends in NaN, which no number is near to, and
// which codes beyond the table decode as.
inline Tensor levels_of(const Tensor& code) {
  const int64_t count = code.numel();
  if (count == kCodeLevels) return in_order(code);
  Tensor levels = new_empty(code, {kCodeLevels}, ScalarType::Float);
  torch::stable::fill_(levels, std::numeric_limits<double>::quiet_NaN());
  Tensor front = torch::stable::narrow(levels, 0, 0, count);
  torch::stable::copy_(front, torch::stable::reshape(code, {count}));
  return levels;
}

// `absmax` may be nothing, and so may `rand`; see QuantizeBlockwise.
template <class Backend>
void quantize_into(const Tensor& a, const Tensor& code, int64_t block_size, const Tensor& out,
                   const Tensor* absmax, DType dtype, const Tensor* rand = nullptr,
                   int64_t rand_offset = 0) {
  if (a.numel() == 0) return;
  const typename Backend::Scope scope(a);
  const Tensor source = in_order(a);
  const Tensor levels = levels_of(code);
  QuantizeBlockwise args{dtype,
                         source.const_data_ptr(),
                         levels.const_data_ptr<float>(),
                         out.mutable_data_ptr<uint8_t>(),
                         absmax != nullptr ? absmax->mutable_data_ptr<float>() : nullptr,
                         a.numel(),
                         block_size};
  if (rand == nullptr) return Backend::quantize_blockwise(args, scope);
  const Tensor numbers = in_order(*rand);
  args.rand = numbers.const_data_ptr<float>();
  args.rand_size = numbers.numel();
  args.rand_offset = rand_offset;
  Backend::quantize_blockwise(args, scope);
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
  quantize_into<Backend>(a, code, block_size, out, &absmax, dtype);
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
  quantize_into<Backend>(a, code, block_size, out, &absmax, dtype);
}

template <class Backend>
std::tuple<Tensor, Tensor> quantize_blockwise_stochastic(const Tensor& a, const Tensor& code,
                                                         int64_t block_size, const Tensor& rand,
                                                         int64_t offset) {
  constexpr const char* op = "quantize_blockwise_stochastic";
  const DType dtype = check_quantize<Backend>(op, a, code, block_size);
  check_dtype(op, "rand", rand, ScalarType::Float);
  require(rand.numel() >= 1, op, ": rand must have at least one element, got none");
  check_same_device(op, "rand", rand, "A", a);
  require(offset >= 0 && offset < rand.numel(), op, ": offset must be 0 to ", rand.numel() - 1,
          " for a rand of ", rand.numel(), " elements, got ", offset);
  Tensor out = new_empty(a, shape_of(a), ScalarType::Byte);
  Tensor absmax = new_empty(a, {ceil_div(a.numel(), block_size)}, ScalarType::Float);
  quantize_into<Backend>(a, code, block_size, out, &absmax, dtype, &rand, offset);
  return {out, absmax};
}

template <class Backend>
Tensor quantize_no_absmax(const Tensor& a, const Tensor& code) {
  constexpr const char* op = "quantize_no_absmax";
  constexpr int64_t kPiece = 4096;  // of the work, whose blocks have no other meaning here
  const DType dtype = check_float(op, "A", a);
  check_code(op, code, a);
  Tensor out = new_empty(a, shape_of(a), ScalarType::Byte);
  quantize_into<Backend>(a, code, kPiece, out, nullptr, dtype);
  return out;
}

// The scales of a dequantization: numbers, or 8-bit codes with what decodes them.
class ScaleTensors {
 public:
  ScaleTensors(const char* op, const Tensor& a, int64_t blocks, const Tensor& absmax)
      : absmax_(absmax) {
    check(op, "absmax", absmax, ScalarType::Float, blocks, a);
  }
  ScaleTensors(const char* op, const Tensor& a, int64_t blocks, const Tensor& absmax_8bit,
               const Tensor& absmax_code, const Tensor& absmax, const Tensor& absmax_offset,
               int64_t nested_block_size)
      : absmax_(absmax),
        nested_({absmax_8bit, absmax_code, absmax_offset}),
        block_size_(nested_block_size) {
    require(nested_block_size > 0, op, ": nested_blocksize must be positive, got ",
            nested_block_size);
    check(op, "absmax_8bit", absmax_8bit, ScalarType::Byte, blocks, a);
    check(op, "absmax_code", absmax_code, ScalarType::Float, kCodeLevels, a);
    check(op, "absmax", absmax, ScalarType::Float, ceil_div(blocks, nested_block_size), a);
    check(op, "absmax_offset", absmax_offset, ScalarType::Float, 1, a);
  }

  // The same with every tensor's elements in order; it keeps the copies.
  ScaleTensors in_order() const {
    ScaleTensors ordered = *this;
    ordered.absmax_ = ops::in_order(absmax_);
    for (Tensor& t : ordered.nested_) t = ops::in_order(t);
    return ordered;
  }

  Scales pointers() const {
    const auto* absmax = static_cast<const float*>(absmax_.const_data_ptr());
    if (nested_.empty()) return absmax;
    return {absmax, static_cast<const uint8_t*>(nested_[0].const_data_ptr()),
            static_cast<const float*>(nested_[1].const_data_ptr()),
            static_cast<const float*>(nested_[2].const_data_ptr()), block_size_};
  }

 private:
  static void check(const char* op, const char* argument, const Tensor& t, ScalarType dtype,
                    int64_t count, const Tensor& a) {
    check_dtype(op, argument, t, dtype);
    check_numel(op, argument, t, count);
    check_same_device(op, argument, t, "A", a);
  }

  Tensor absmax_;
  std::vector<Tensor> nested_;  // absmax_8bit, absmax_code, absmax_offset
  int64_t block_size_ = 1;
};

inline DType check_dequantize(const char* op, const Tensor& a, const Tensor& code,
                              int64_t block_size, ScalarType dtype) {
  check_dtype(op, "A", a, ScalarType::Byte);
  check_block_size(op, block_size);
  check_code(op, code, a);
  return check_float(op, "dtype", dtype);
}

inline void check_dequantize_out(const char* op, const Tensor& a, ScalarType dtype,
                                 const Tensor& out) {
  check_dtype(op, "out", out, dtype);
  check_numel(op, "out", out, a.numel());
  check_contiguous(op, "out", out);
  check_same_device(op, "out", out, "A", a);
}

template <class Backend>
void dequantize_into(const Tensor& a, const ScaleTensors& scales, const Tensor& code,
                     int64_t block_size, const Tensor& out, DType dtype) {
  if (a.numel() == 0) return;
  const typename Backend::Scope scope(a);
  const Tensor codes = in_order(a);
  const ScaleTensors ordered = scales.in_order();
  const Tensor levels = levels_of(code);
  Backend::dequantize_blockwise(
      {dtype, codes.const_data_ptr<uint8_t>(), ordered.pointers(), levels.const_data_ptr<float>(),
       out.mutable_data_ptr(), a.numel(), block_size},
      scope);
}

template <class Backend>
Tensor dequantize_blockwise(const Tensor& a, const Tensor& absmax, const Tensor& code,
                            int64_t block_size, ScalarType dtype) {
  constexpr const char* op = "dequantize_blockwise";
  const DType element = check_dequantize(op, a, code, block_size, dtype);
  const ScaleTensors scales(op, a, ceil_div(a.numel(), block_size), absmax);
  Tensor out = new_empty(a, shape_of(a), dtype);
  dequantize_into<Backend>(a, scales, code, block_size, out, element);
  return out;
}

template <class Backend>
void dequantize_blockwise_out(const Tensor& a, const Tensor& absmax, const Tensor& code,
                              int64_t block_size, ScalarType dtype, Tensor out) {
  constexpr const char* op = "dequantize_blockwise";
  const DType element = check_dequantize(op, a, code, block_size, dtype);
  const ScaleTensors scales(op, a, ceil_div(a.numel(), block_size), absmax);
  check_dequantize_out(op, a, dtype, out);
  dequantize_into<Backend>(a, scales, code, block_size, out, element);
}

template <class Backend>
Tensor dequantize_blockwise_nested(const Tensor& a, const Tensor& absmax_8bit,
                                   const Tensor& absmax_code, const Tensor& absmax,
                                   const Tensor& absmax_offset, const Tensor& code,
                                   int64_t block_size, int64_t nested_block_size,
                                   ScalarType dtype) {
  constexpr const char* op = "dequantize_blockwise_nested";
  const DType element = check_dequantize(op, a, code, block_size, dtype);
  const ScaleTensors scales(op, a, ceil_div(a.numel(), block_size), absmax_8bit, absmax_code,
                            absmax, absmax_offset, nested_block_size);
  Tensor out = new_empty(a, shape_of(a), dtype);
  dequantize_into<Backend>(a, scales, code, block_size, out, element);
  return out;
}

template <class Backend>
void dequantize_blockwise_nested_out(const Tensor& a, const Tensor& absmax_8bit,
                                     const Tensor& absmax_code, const Tensor& absmax,
                                     const Tensor& absmax_offset, const Tensor& code,
                                     int64_t block_size, int64_t nested_block_size,
                                     ScalarType dtype, Tensor out) {
  constexpr const char* op = "dequantize_blockwise_nested";
  const DType element = check_dequantize(op, a, code, block_size, dtype);
  const ScaleTensors scales(op, a, ceil_div(a.numel(), block_size), absmax_8bit, absmax_code,
                            absmax, absmax_offset, nested_block_size);
  check_dequantize_out(op, a, dtype, out);
  dequantize_into<Backend>(a, scales, code, block_size, out, element);
}

}  // namespace bnb::ops
