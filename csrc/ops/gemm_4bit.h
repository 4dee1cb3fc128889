// Products with a 4-bit weight as torch ops, for any backend.
// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include "bitsandbytes/kernels/gemm_4bit.h"
#include "ops/product.h"
#include "ops/quantize_4bit.h"

namespace bnb::ops {

// Scales that share a scale of their own: fixed by the schemas, which do not name it.
inline constexpr int64_t kNestedBlock = 256;

// The tensors of a weight [n, k], or with `grouped` of `count` such weights, checked, with their
// elements in order.
class WeightTensors {
 public:
  // `like` (the argument `name`) is the other operand of the product.
  WeightTensors(const char* op, const char* name, const Tensor& like, const Tensor& codes,
                const Shape& shape, int64_t block_size, bool grouped = false)
      : op_(op), like_(like), codes_(codes), block_size_(block_size) {
    bool fits = shape.size() == (grouped ? 3 : 2);
    for (const int64_t size : shape) fits = fits && size >= 0;
    require(fits, op, ": shapeB must be ", grouped ? "three sizes [E, N, K]" : "two sizes [N, K]",
            ", got ", static_cast<int64_t>(shape.size()), " sizes or a negative one");
    count = grouped ? shape[0] : 1;
    n = shape[shape.size() - 2];
    k = shape.back();
    check_block_size_4bit(op, block_size);
    check_same_device(op, "B", codes, name, like);
    check_packed_numel(op, "B", codes, count * n * k, block_size);
    codes_ = in_order(codes);
  }

  void set_scales(const Tensor& absmax) {
    scales_ = ScaleTensors(op_, like_, blocks(), absmax).in_order();
  }
  void set_scales(const Tensor& absmax, const std::optional<Tensor>& codes,
                  const std::optional<Tensor>& code, const std::optional<Tensor>& offset) {
    if (!codes.has_value()) return set_scales(absmax);
    require(code.has_value(), op_, ": absmax_code must be given with absmax_8bit, got None");
    require(offset.has_value(), op_, ": absmax_offset must be given with absmax_8bit, got None");
    // Old checkpoints hold the offset in other dtypes.
    const Tensor number = offset->scalar_type() == ScalarType::Float
                              ? *offset
                              : torch::stable::to(*offset, ScalarType::Float);
    scales_ =
        ScaleTensors(op_, like_, blocks(), *codes, *code, absmax, number, kNestedBlock).in_order();
  }

  // The first weight. Levels: those of `code`, or of a table that has no name (Code4::kCount).
  Weight4bit pointers(Code4 code, const float* levels) const {
    return {static_cast<const uint8_t*>(codes_.const_data_ptr()),
            scales_->pointers(),
            code,
            levels,
            n,
            k,
            block_size_};
  }

  int64_t count;
  int64_t n;
  int64_t k;

 private:
  int64_t blocks() const { return ceil_div(count * n * k, block_size_); }

  const char* op_;
  const Tensor& like_;
  Tensor codes_;
  std::optional<ScaleTensors> scales_;
  int64_t block_size_;
};

// Checks the operand that is not the weight; returns its number of rows.
inline int64_t check_operand(const char* op, const char* name, const Tensor& a, int64_t terms) {
  require(a.dim() >= 1, op, ": ", name, " must have at least one dimension, got a scalar");
  const int64_t last = a.size(a.dim() - 1);
  require(last == terms, op, ": ", name, " must be [..., ", terms, "], got ", ShapeOf{a});
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < a.dim(); ++i) rows *= a.size(i);
  return rows;
}

inline Shape product_shape(const Tensor& a, int64_t columns) {
  Shape shape = shape_of(a);
  shape.back() = columns;
  return shape;
}

// Whether plain PyTorch makes a product of so many rows faster than the backend: by the vendor's
// library.
template <class Backend, class Arguments>
bool plain_is_faster(const Arguments& args, int64_t rows) {
  if constexpr (Backend::kPlainProducts) {
    return rows > 0 && !Backend::is_fast(args);
  } else {
    return false;
  }
}

template <class Backend>
void gemm_4bit_into(const Tensor& a, int64_t rows, const Weight4bit& weight,
                    const std::optional<Tensor>& bias, DType dtype, const Tensor& out,
                    const typename Backend::Scope& scope) {
  if (rows == 0 || weight.n == 0) return;
  const Tensor source = in_order(a);
  const std::optional<Tensor> shift =
      bias.has_value() ? std::optional<Tensor>(in_order(*bias)) : std::nullopt;
  const Gemm4bit args{dtype,
                      source.const_data_ptr(),
                      weight,
                      shift.has_value() ? shift->const_data_ptr() : nullptr,
                      out.mutable_data_ptr(),
                      rows};
  run_product<Backend, Gemm4bit>(a, args, &Backend::gemm_4bit, scope);
}

template <class Backend>
Tensor gemm_4bit(const Tensor& a, const Tensor& b, const Shape& shape, const Tensor& absmax,
                 int64_t block_size, const std::string& quant_type,
                 const std::optional<Tensor>& bias, const std::optional<Tensor>& absmax_8bit,
                 const std::optional<Tensor>& absmax_code,
                 const std::optional<Tensor>& absmax_offset) {
  constexpr const char* op = "gemm_4bit";
  const DType dtype = check_float(op, "A", a);
  WeightTensors weight(op, "A", a, b, shape, block_size);
  const int64_t rows = check_operand(op, "A", a, weight.k);
  const Code4 code = find_code4(op, quant_type);
  weight.set_scales(absmax, absmax_8bit, absmax_code, absmax_offset);
  if (bias.has_value()) {
    check_dtype(op, "bias", *bias, a.scalar_type());
    check_same_device(op, "bias", *bias, "A", a);
    require(bias->dim() == 1, op, ": bias must have one dimension, got shape ", ShapeOf{*bias});
    check_numel(op, "bias", *bias, weight.n);
  }
  const Weight4bit pointers = weight.pointers(code, Backend::levels(code));
  const typename Backend::Scope scope(a);
  if (plain_is_faster<Backend>(
          Gemm4bit{dtype, a.const_data_ptr(), pointers, nullptr, nullptr, rows}, rows)) {
    return call_op("bitsandbytes::_gemm_4bit_plain", a, b, shape, absmax, block_size, quant_type,
                   bias, absmax_8bit, absmax_code, absmax_offset);
  }
  Tensor out = new_empty(a, product_shape(a, weight.n), a.scalar_type());
  gemm_4bit_into<Backend>(a, rows, pointers, bias, dtype, out, scope);
  return out;
}

template <class Backend>
Tensor gemm_4bit_dgrad(const Tensor& grad, const Tensor& b, const Shape& shape,
                       const Tensor& absmax, int64_t block_size, const std::string& quant_type,
                       const std::optional<Tensor>& absmax_8bit,
                       const std::optional<Tensor>& absmax_code,
                       const std::optional<Tensor>& absmax_offset) {
  constexpr const char* op = "gemm_4bit_dgrad";
  const DType dtype = check_float(op, "grad", grad);
  WeightTensors weight(op, "grad", grad, b, shape, block_size);
  const int64_t rows = check_operand(op, "grad", grad, weight.n);
  const Code4 code = find_code4(op, quant_type);
  weight.set_scales(absmax, absmax_8bit, absmax_code, absmax_offset);
  const Weight4bit pointers = weight.pointers(code, Backend::levels(code));
  const typename Backend::Scope scope(grad);
  if (plain_is_faster<Backend>(Gemm4bitDgrad{dtype, grad.const_data_ptr(), pointers, nullptr, rows},
                               rows)) {
    return call_op("bitsandbytes::_gemm_4bit_dgrad_plain", grad, b, shape, absmax, block_size,
                   quant_type, absmax_8bit, absmax_code, absmax_offset);
  }
  Tensor out = new_empty(grad, product_shape(grad, weight.k), grad.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor source = in_order(grad);
  const Gemm4bitDgrad args{dtype, source.const_data_ptr(), pointers, out.mutable_data_ptr(), rows};
  run_product<Backend, Gemm4bitDgrad>(grad, args, &Backend::gemm_4bit_dgrad, scope);
  return out;
}

template <class Backend>
void gemv_4bit_out(const Tensor& a, const Tensor& b, const Shape& shape, const Tensor& absmax,
                   const Tensor& code, int64_t block_size, Tensor out) {
  constexpr const char* op = "gemv_4bit";
  const DType dtype = check_float(op, "A", a);
  WeightTensors weight(op, "A", a, b, shape, block_size);
  const int64_t rows = check_operand(op, "A", a, weight.k);
  weight.set_scales(absmax);
  check_dtype(op, "code", code, ScalarType::Float);
  check_numel(op, "code", code, kCode4Levels);
  check_same_device(op, "code", code, "A", a);
  check_dtype(op, "out", out, a.scalar_type());
  require(shape_of(out) == product_shape(a, weight.n), op, ": out must have shape (*A.shape[:-1], ",
          weight.n, "), got ", ShapeOf{out});
  check_contiguous(op, "out", out);
  check_same_device(op, "out", out, "A", a);
  const Tensor levels = in_order(code);
  gemm_4bit_into<Backend>(a, rows, weight.pointers(Code4::kCount, levels.const_data_ptr<float>()),
                          std::nullopt, dtype, out, typename Backend::Scope(a));
}

template <class Backend>
Tensor gemv_4bit(const Tensor& a, const Tensor& b, const Shape& shape, const Tensor& absmax,
                 const Tensor& code, int64_t block_size) {
  require(a.dim() >= 1, "gemv_4bit: A must have at least one dimension, got a scalar");
  Tensor out = new_empty(a, product_shape(a, shape.size() == 2 && shape[0] >= 0 ? shape[0] : 0),
                         a.scalar_type());
  gemv_4bit_out<Backend>(a, b, shape, absmax, code, block_size, out);
  return out;
}

}  // namespace bnb::ops
