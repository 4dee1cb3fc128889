// Products of groups of rows with a 4-bit weight for each group, as torch ops, for any backend.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/kernels/grouped_gemm_4bit.h"
#include "ops/gemm_4bit.h"

namespace bnb::ops {

// Where groups of rows end: checked, and in order.
class GroupTensor {
 public:
  GroupTensor(const char* op, const char* name, const Tensor& like, const Tensor& offs,
              int64_t count)
      : offs_(offs), rows_(like.size(0)), count_(count) {
    const ScalarType type = offs.scalar_type();
    require(type == ScalarType::Int || type == ScalarType::Long, op,
            ": offs must be int32 or int64, got ", type);
    require(offs.dim() == 1 && offs.numel() == count, op, ": offs must be of shape [", count,
            "], got ", ShapeOf{offs});
    check_same_device(op, "offs", offs, name, like);
    offs_ = in_order(offs);
  }

  Groups pointers() const {
    return {offs_.const_data_ptr(), offs_.scalar_type() == ScalarType::Long, count_, rows_};
  }

 private:
  Tensor offs_;
  int64_t rows_;
  int64_t count_;
};

inline void check_rows(const char* op, const char* name, const Tensor& a) {
  require(a.dim() == 2, op, ": ", name, " must be 2-D, got shape ", ShapeOf{a});
}

template <class Backend>
Tensor grouped_gemm_4bit(const Tensor& a, const Tensor& b, const Tensor& offs, const Shape& shape,
                         const Tensor& absmax, int64_t block_size, const std::string& quant_type,
                         const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& absmax_8bit,
                         const std::optional<Tensor>& absmax_code,
                         const std::optional<Tensor>& absmax_offset) {
  constexpr const char* op = "grouped_gemm_4bit";
  const DType dtype = check_float(op, "A", a);
  check_rows(op, "A", a);
  WeightTensors weight(op, "A", a, b, shape, block_size, true);
  check_operand(op, "A", a, weight.k);
  const Code4 code = find_code4(op, quant_type);
  weight.set_scales(absmax, absmax_8bit, absmax_code, absmax_offset);
  const GroupTensor groups(op, "A", a, offs, weight.count);
  std::optional<Tensor> shift;
  if (bias.has_value()) {
    check_dtype(op, "bias", *bias, a.scalar_type());
    check_same_device(op, "bias", *bias, "A", a);
    require(shape_of(*bias) == Shape{weight.count, weight.n}, op, ": bias must be of shape [",
            weight.count, ", ", weight.n, "], got ", ShapeOf{*bias});
    shift = in_order(*bias);
  }
  Backend::check_groups(op, groups.pointers());
  const Tensor source = in_order(a);
  GroupedGemm4bit args{dtype,
                       source.const_data_ptr(),
                       weight.pointers(code, Backend::levels(code)),
                       shift.has_value() ? shift->const_data_ptr() : nullptr,
                       nullptr,
                       groups.pointers()};
  const typename Backend::Scope scope(a);
  if (plain_is_faster<Backend>(args, args.groups.rows)) {
    return call_op("bitsandbytes::_grouped_gemm_4bit_plain", a, b, offs, shape, absmax, block_size,
                   quant_type, bias, absmax_8bit, absmax_code, absmax_offset);
  }
  Tensor out = new_empty(a, product_shape(a, weight.n), a.scalar_type());
  if (out.numel() == 0) return out;
  args.out = out.mutable_data_ptr();
  run_product<Backend, GroupedGemm4bit>(a, args, &Backend::grouped_gemm_4bit, scope);
  return out;
}

template <class Backend>
Tensor grouped_gemm_4bit_dgrad(const Tensor& grad, const Tensor& b, const Tensor& offs,
                               const Shape& shape, const Tensor& absmax, int64_t block_size,
                               const std::string& quant_type,
                               const std::optional<Tensor>& absmax_8bit,
                               const std::optional<Tensor>& absmax_code,
                               const std::optional<Tensor>& absmax_offset) {
  constexpr const char* op = "grouped_gemm_4bit_dgrad";
  const DType dtype = check_float(op, "grad", grad);
  check_rows(op, "grad", grad);
  WeightTensors weight(op, "grad", grad, b, shape, block_size, true);
  check_operand(op, "grad", grad, weight.n);
  const Code4 code = find_code4(op, quant_type);
  weight.set_scales(absmax, absmax_8bit, absmax_code, absmax_offset);
  const GroupTensor groups(op, "grad", grad, offs, weight.count);
  Backend::check_groups(op, groups.pointers());
  const Tensor source = in_order(grad);
  GroupedGemm4bitDgrad args{dtype, source.const_data_ptr(),
                            weight.pointers(code, Backend::levels(code)), nullptr,
                            groups.pointers()};
  const typename Backend::Scope scope(grad);
  if (plain_is_faster<Backend>(args, args.groups.rows)) {
    return call_op("bitsandbytes::_grouped_gemm_4bit_dgrad_plain", grad, b, offs, shape, absmax,
                   block_size, quant_type, absmax_8bit, absmax_code, absmax_offset);
  }
  Tensor out = new_empty(grad, product_shape(grad, weight.k), grad.scalar_type());
  if (out.numel() == 0) return out;
  args.out = out.mutable_data_ptr();
  run_product<Backend, GroupedGemm4bitDgrad>(grad, args, &Backend::grouped_gemm_4bit_dgrad, scope);
  return out;
}

}  // namespace bnb::ops
