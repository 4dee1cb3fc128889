// LLM.int8() as torch ops, for any backend.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/kernels/int8.h"
#include "ops/torch_api.h"

namespace bnb::ops {

// A tensor seen as a matrix: all leading dimensions are rows.
struct Matrix {
  int64_t rows;
  int64_t cols;
};

inline Matrix as_matrix(const char* op, const char* argument, const Tensor& t) {
  require(t.dim() >= 1, op, ": ", argument, " must have at least one dimension, got a scalar");
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return {rows, t.size(t.dim() - 1)};
}

template <class Backend>
std::tuple<Tensor, Tensor, std::optional<Tensor>> int8_vectorwise_quant(const Tensor& a,
                                                                        double threshold) {
  constexpr const char* op = "int8_vectorwise_quant";
  const DType dtype = check_float(op, "A", a);
  const Matrix matrix = as_matrix(op, "A", a);
  require(threshold >= 0.0, op, ": threshold must be zero or positive, got ", threshold);
  const bool find_outliers = threshold > 0.0;
  Tensor out = new_empty(a, shape_of(a), ScalarType::Char);
  Tensor row_stats = new_empty(a, {matrix.rows}, ScalarType::Float);
  std::optional<Tensor> outliers;
  if (find_outliers) outliers = torch::stable::new_zeros(a, {matrix.cols}, ScalarType::Byte);
  if (a.numel() > 0) {
    const typename Backend::Scope scope(a);
    const Tensor source = in_order(a);
    Backend::int8_vectorwise_quant({dtype, source.const_data_ptr(), out.mutable_data_ptr<int8_t>(),
                                    row_stats.mutable_data_ptr<float>(),
                                    find_outliers ? outliers->mutable_data_ptr<uint8_t>() : nullptr,
                                    matrix.rows, matrix.cols, static_cast<float>(threshold)},
                                   scope);
  } else {
    torch::stable::zero_(row_stats);
  }
  if (!find_outliers) return {out, row_stats, std::nullopt};
  // The op promises the indices, whose number only the data knows.
  std::array<StableIValue, 1> stack{torch::stable::detail::from(*outliers)};
  call_torch("aten::nonzero", "", stack.data());
  const Tensor indices = torch::stable::detail::to<Tensor>(stack[0]);
  return {out, row_stats, torch::stable::view(indices, {indices.size(0)})};
}

inline void check_int8_matmul(const char* op, const Tensor& a, const Tensor& b) {
  check_dtype(op, "A", a, ScalarType::Char);
  check_dtype(op, "B", b, ScalarType::Char);
  require(a.dim() >= 1, op, ": A must have at least one dimension, got a scalar");
  require(b.dim() == 2, op, ": B must have 2 dimensions [N, K], got shape ", ShapeOf{b});
  require(a.size(a.dim() - 1) == b.size(1), op,
          ": A and B must agree in their last dimension, got A ", ShapeOf{a}, " and B ",
          ShapeOf{b});
  check_same_device(op, "B", b, "A", a);
}

inline Shape matmul_shape(const Tensor& a, const Tensor& b) {
  Shape shape = shape_of(a);
  shape.back() = b.size(0);
  return shape;
}

template <class Backend>
void int8_matmul_into(const Tensor& a, const Tensor& b, Tensor& out) {
  if (out.numel() == 0) return;
  if (b.size(1) == 0) {
    torch::stable::zero_(out);
    return;
  }
  const typename Backend::Scope scope(a);
  const int64_t m = as_matrix("int8_linear_matmul", "A", a).rows;
  const Tensor left = in_order(a);
  const Tensor right = in_order(b);
  if (Backend::library_int8_matmul(left, right, out, m)) return;
  Backend::int8_linear_matmul({left.const_data_ptr<int8_t>(), right.const_data_ptr<int8_t>(),
                               out.mutable_data_ptr<int32_t>(), m, b.size(0), b.size(1)},
                              scope);
}

template <class Backend>
Tensor int8_linear_matmul(const Tensor& a, const Tensor& b) {
  constexpr const char* op = "int8_linear_matmul";
  check_int8_matmul(op, a, b);
  Tensor out = new_empty(a, matmul_shape(a, b), ScalarType::Int);
  int8_matmul_into<Backend>(a, b, out);
  return out;
}

template <class Backend>
void int8_linear_matmul_out(const Tensor& a, const Tensor& b, Tensor out) {
  constexpr const char* op = "int8_linear_matmul";
  check_int8_matmul(op, a, b);
  check_dtype(op, "out", out, ScalarType::Int);
  require(shape_of(out) == matmul_shape(a, b), op, ": out must have shape (*A.shape[:-1], ",
          b.size(0), "), got ", ShapeOf{out});
  check_contiguous(op, "out", out);
  check_same_device(op, "out", out, "A", a);
  int8_matmul_into<Backend>(a, b, out);
}

// Checks of what both dequantizing ops share: statistics and bias for a [rows, cols] product.
inline void check_dequant_scales(const char* op, const Tensor& a, const Tensor& row_stats,
                                 int64_t rows, const Tensor& col_stats, int64_t cols,
                                 const std::optional<Tensor>& bias) {
  check_dtype(op, "row_stats", row_stats, ScalarType::Float);
  check_numel(op, "row_stats", row_stats, rows);
  check_same_device(op, "row_stats", row_stats, "A", a);
  check_dtype(op, "col_stats", col_stats, ScalarType::Float);
  check_numel(op, "col_stats", col_stats, cols);
  check_same_device(op, "col_stats", col_stats, "A", a);
  if (bias.has_value()) {
    check_float(op, "bias", *bias);
    check_numel(op, "bias", *bias, cols);
    check_same_device(op, "bias", *bias, "A", a);
  }
}

template <class Backend>
Tensor int8_mm_dequant(const Tensor& a, const Tensor& row_stats, const Tensor& col_stats,
                       std::optional<ScalarType> dtype, const std::optional<Tensor>& bias) {
  constexpr const char* op = "int8_mm_dequant";
  check_dtype(op, "A", a, ScalarType::Int);
  const Matrix matrix = as_matrix(op, "A", a);
  const ScalarType out_type = dtype.value_or(ScalarType::Half);
  const DType element = check_float(op, "dtype", out_type);
  check_dequant_scales(op, a, row_stats, matrix.rows, col_stats, matrix.cols, bias);
  Tensor out = new_empty(a, shape_of(a), out_type);
  if (a.numel() == 0) return out;
  const typename Backend::Scope scope(a);
  const Tensor source = in_order(a);
  const Tensor rows = in_order(row_stats);
  const Tensor cols = in_order(col_stats);
  const std::optional<Tensor> shift =
      bias.has_value() ? std::optional<Tensor>(in_order(*bias)) : std::nullopt;
  Backend::int8_mm_dequant(
      {element, shift.has_value() ? *float_dtype(shift->scalar_type()) : DType::kFloat32,
       source.const_data_ptr<int32_t>(), rows.const_data_ptr<float>(), cols.const_data_ptr<float>(),
       shift.has_value() ? shift->const_data_ptr() : nullptr, out.mutable_data_ptr(), matrix.rows,
       matrix.cols},
      scope);
  return out;
}

template <class Backend>
Tensor int8_scaled_mm(const Tensor& a, const Tensor& b, const Tensor& row_stats,
                      const Tensor& col_stats, const std::optional<Tensor>& bias,
                      std::optional<ScalarType> dtype) {
  constexpr const char* op = "int8_scaled_mm";
  check_int8_matmul(op, a, b);
  check_float(op, "dtype", dtype.value_or(ScalarType::Half));
  check_dequant_scales(op, a, row_stats, as_matrix(op, "A", a).rows, col_stats, b.size(0), bias);
  const Tensor product = int8_linear_matmul<Backend>(a, b);
  return int8_mm_dequant<Backend>(product, row_stats, col_stats, dtype, bias);
}

}  // namespace bnb::ops
