// LLM.int8() as torch ops, for any backend.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <limits>

#include "bitsandbytes/kernels/int8.h"
#include "ops/product.h"

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

// Where the rows of a tensor go as codes. With a threshold, there is a mask of the outlier columns,
// and may be a list of them.
struct QuantizedRows {
  int8_t* codes;
  float* stats;
  uint8_t* outlier_mask;
  int32_t* outliers;
  void* outlier_terms = nullptr;
};

inline uint8_t* mask_pointer(const std::optional<Tensor>& mask) {
  return mask.has_value() ? static_cast<uint8_t*>(mask->mutable_data_ptr()) : nullptr;
}

inline bool check_threshold(const char* op, double threshold) {
  require(threshold >= 0.0, op, ": threshold must be zero or positive, got ", threshold);
  return threshold > 0.0;
}

// `a`: checked, with its elements in order, of which there are some.
template <class Backend>
void quantize_rows(const Tensor& a, const Matrix& matrix, DType dtype, double threshold,
                   const QuantizedRows& rows, const typename Backend::Scope& scope) {
  Backend::int8_vectorwise_quant(
      {dtype, a.const_data_ptr(), rows.codes, rows.stats, rows.outlier_mask, rows.outliers,
       matrix.rows, matrix.cols, static_cast<float>(threshold), rows.outlier_terms},
      scope);
}

template <class Backend>
std::tuple<Tensor, Tensor, std::optional<Tensor>> int8_vectorwise_quant(const Tensor& a,
                                                                        double threshold) {
  constexpr const char* op = "int8_vectorwise_quant";
  const DType dtype = check_float(op, "A", a);
  const Matrix matrix = as_matrix(op, "A", a);
  const bool find_outliers = check_threshold(op, threshold);
  const Tensor codes = new_empty(a, shape_of(a), ScalarType::Char);
  const Tensor stats = new_empty(a, {matrix.rows}, ScalarType::Float);
  std::optional<Tensor> mask;
  if (find_outliers) mask = new_empty(a, {matrix.cols}, ScalarType::Bool);
  if (a.numel() > 0) {
    quantize_rows<Backend>(
        in_order(a), matrix, dtype, threshold,
        {static_cast<int8_t*>(codes.mutable_data_ptr()),
         static_cast<float*>(stats.mutable_data_ptr()), mask_pointer(mask), nullptr},
        typename Backend::Scope(a));
  } else {
    fill_zeros(stats);
    if (find_outliers) fill_zeros(*mask);
  }
  if (!find_outliers) return {codes, stats, std::nullopt};
  // The op promises the indices, whose number only the data knows.
  std::array<StableIValue, 1> stack{torch::stable::detail::from(*mask)};
  call_torch("aten::nonzero", "", stack.data());
  const Tensor indices = torch::stable::detail::to<Tensor>(stack[0]);
  return {codes, stats, torch::stable::view(indices, {indices.size(0)})};
}

// Rows of codes as numbers, for example a part of the columns of a weight: such views are not
// copied before.
template <class Backend>
Tensor int8_vectorwise_dequant_dtype(const Tensor& a, const Tensor& stats, ScalarType out_type) {
  constexpr const char* op = "int8_vectorwise_dequant";
  check_dtype(op, "A", a, ScalarType::Char);
  const Matrix matrix = as_matrix(op, "A", a);
  check_dtype(op, "stats", stats, ScalarType::Float);
  check_same_device(op, "stats", stats, "A", a);
  check_numel(op, "stats", stats, matrix.rows);
  const DType dtype = check_float(op, "dtype", out_type);
  const Tensor out = new_empty(a, shape_of(a), out_type);
  if (a.numel() == 0) return out;
  const typename Backend::Scope scope(a);
  const bool rows_apart = a.dim() == 2 && a.stride(1) == 1 && a.stride(0) >= matrix.cols;
  const Tensor codes = rows_apart ? a : in_order(a);
  const Tensor rows = in_order(stats);
  Backend::int8_vectorwise_dequant(
      {dtype, codes.const_data_ptr<int8_t>(), rows_apart ? a.stride(0) : matrix.cols,
       rows.const_data_ptr<float>(), out.mutable_data_ptr(), matrix.rows, matrix.cols},
      scope);
  return out;
}

template <class Backend>
Tensor int8_vectorwise_dequant(const Tensor& a, const Tensor& stats) {
  return int8_vectorwise_dequant_dtype<Backend>(a, stats, ScalarType::Float);
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

// Whether torch's binding of a vendor's library multiplies these shapes.
inline bool library_takes_int8(int64_t m, int64_t n, int64_t k) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  return m > 16 && m <= kMost && n <= kMost && k <= kMost && n % 8 == 0 && k % 8 == 0;
}

template <class Backend>
void int8_matmul_into(const Tensor& a, const Tensor& b, Tensor& out) {
  if (out.numel() == 0) return;
  if (b.size(1) == 0) {
    fill_zeros(out);
    return;
  }
  const int64_t m = as_matrix("int8_linear_matmul", "A", a).rows;
  const Tensor left = in_order(a);
  const Tensor right = in_order(b);
  const typename Backend::Scope scope(a);
  if constexpr (Backend::kInt8Library) {
    if (library_takes_int8(m, b.size(0), b.size(1))) {
      Backend::library_int8_matmul(left, right, out, m, scope);
      return;
    }
  }
  const Int8Matmul args{left.const_data_ptr<int8_t>(),
                        right.const_data_ptr<int8_t>(),
                        out.mutable_data_ptr<int32_t>(),
                        m,
                        b.size(0),
                        b.size(1)};
  run_product<Backend, Int8Matmul>(a, args, &Backend::int8_linear_matmul, scope);
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

// The rows of the left operand as codes, with what outliers need.
struct Int8Operand {
  Tensor codes;  // int8; what lies behind those of the rows is something else
  const float* stats;
  const void* values = nullptr;
  const int32_t* outliers = nullptr;
  const void* outlier_terms = nullptr;
  bool follows_quantization = false;
};

// Rows of codes times a weight of codes; `out` [..., n].
template <class Backend>
void int8_scaled_into(const Int8Operand& a, const Tensor& b, const Tensor& col_stats,
                      const std::optional<Tensor>& bias, DType dtype, const Tensor& out,
                      const typename Backend::Scope& scope) {
  if (out.numel() == 0) return;
  const Tensor right = in_order(b);
  const Tensor cols = in_order(col_stats);
  const std::optional<Tensor> shift =
      bias.has_value() ? std::optional<Tensor>(in_order(*bias)) : std::nullopt;
  const int64_t n = b.size(0);
  const Int8ScaledMatmul args{
      dtype,
      shift.has_value() ? *float_dtype(shift->scalar_type()) : DType::kFloat32,
      static_cast<const int8_t*>(a.codes.const_data_ptr()),
      static_cast<const int8_t*>(right.const_data_ptr()),
      a.stats,
      static_cast<const float*>(cols.const_data_ptr()),
      shift.has_value() ? shift->const_data_ptr() : nullptr,
      a.values,
      a.outliers,
      out.mutable_data_ptr(),
      out.numel() / n,
      n,
      b.size(1),
      a.outlier_terms,
      a.follows_quantization};
  if constexpr (Backend::kInt8Library) {
    if (!Backend::int8_scaled_matmul_is_fast(args) && library_takes_int8(args.m, args.n, args.k)) {
      const Tensor product = new_empty(out, {args.m, args.n}, ScalarType::Int);
      Tensor codes = a.codes;
      const int64_t count = args.m * args.k;
      if (codes.numel() > count) codes = torch::stable::narrow(codes, 0, 0, count);
      Backend::library_int8_matmul(codes, right, product, args.m, scope);
      Backend::int8_scale_product(args, product.const_data_ptr<int32_t>(), scope);
      return;
    }
  }
  run_product<Backend, Int8ScaledMatmul>(out, args, &Backend::int8_scaled_matmul, scope);
}

template <class Backend>
Tensor int8_scaled_mm(const Tensor& a, const Tensor& b, const Tensor& row_stats,
                      const Tensor& col_stats, const std::optional<Tensor>& bias,
                      std::optional<ScalarType> dtype) {
  constexpr const char* op = "int8_scaled_mm";
  check_int8_matmul(op, a, b);
  const ScalarType out_type = dtype.value_or(ScalarType::Half);
  const DType element = check_float(op, "dtype", out_type);
  check_dequant_scales(op, a, row_stats, as_matrix(op, "A", a).rows, col_stats, b.size(0), bias);
  const Tensor out = new_empty(a, matmul_shape(a, b), out_type);
  const Tensor codes = in_order(a);
  const Tensor stats = in_order(row_stats);
  int8_scaled_into<Backend>({codes, static_cast<const float*>(stats.const_data_ptr())}, b,
                            col_stats, bias, element, out, typename Backend::Scope(a));
  return out;
}

// Checks the weight [N, K] of a layer, and its statistics. `dim`: that of the weight which is as
// long as a row of `other`.
inline void check_layer_weight(const char* op, const Tensor& cb, const Tensor& scb,
                               const char* other_name, const Tensor& other, int64_t dim) {
  const int64_t length = other.size(other.dim() - 1);
  check_dtype(op, "CB", cb, ScalarType::Char);
  require(cb.dim() == 2 && cb.size(dim) == length, op, ": CB must be [", dim == 0 ? "" : "N, ",
          length, dim == 0 ? ", K" : "", "] for ", other_name, " of shape ", ShapeOf{other},
          ", got ", ShapeOf{cb});
  check_same_device(op, "CB", cb, other_name, other);
  check_dtype(op, "SCB", scb, ScalarType::Float);
  check_numel(op, "SCB", scb, cb.size(0));
  check_same_device(op, "SCB", scb, other_name, other);
}

// The layer: quantizes the rows of `a` and multiplies, outlier columns in floating point. Returns
// the mask of those columns beside the result.
template <class Backend>
std::tuple<Tensor, std::optional<Tensor>> int8_linear(const Tensor& a, const Tensor& cb,
                                                      const Tensor& scb,
                                                      const std::optional<Tensor>& bias,
                                                      double threshold) {
  constexpr const char* op = "int8_linear";
  const DType dtype = check_float(op, "A", a);
  const Matrix matrix = as_matrix(op, "A", a);
  check_layer_weight(op, cb, scb, "A", a, 1);
  if (bias.has_value()) {
    check_float(op, "bias", *bias);
    check_numel(op, "bias", *bias, cb.size(0));
    check_same_device(op, "bias", *bias, "A", a);
  }
  const bool find_outliers = check_threshold(op, threshold);
  // What may take a copy comes first: the product follows the quantization at once.
  const Tensor values = in_order(a);
  const Tensor weight = in_order(cb);
  const Tensor weight_stats = in_order(scb);
  const std::optional<Tensor> shift =
      bias.has_value() ? std::optional<Tensor>(in_order(*bias)) : std::nullopt;
  const Tensor out = new_empty(a, matmul_shape(a, cb), a.scalar_type());
  std::optional<Tensor> mask;
  if (find_outliers) mask = new_empty(a, {matrix.cols}, ScalarType::Bool);

  Pieces pieces;
  const int64_t codes_at = pieces.add(a.numel());
  const int64_t stats_at = pieces.add(matrix.rows * int64_t{sizeof(float)});
  const int64_t outliers_at =
      find_outliers ? pieces.add((1 + matrix.cols) * int64_t{sizeof(int32_t)}) : 0;
  const int64_t terms_bytes =
      find_outliers ? Backend::int8_outlier_terms_bytes(matrix.rows, cb.size(0), matrix.cols) : 0;
  const int64_t terms_at = terms_bytes > 0 ? pieces.add(terms_bytes) : 0;
  const Tensor memory = new_empty(a, {pieces.bytes()}, ScalarType::Char);
  auto* const start = static_cast<int8_t*>(memory.mutable_data_ptr());
  const QuantizedRows rows{
      start + codes_at, reinterpret_cast<float*>(start + stats_at), mask_pointer(mask),
      find_outliers ? reinterpret_cast<int32_t*>(start + outliers_at) : nullptr,
      terms_bytes > 0 ? start + terms_at : nullptr};
  const typename Backend::Scope scope(a);
  Int8Operand operand{memory, rows.stats};
  if (a.numel() == 0) {
    fill_zeros(memory);
    if (find_outliers) fill_zeros(*mask);
  } else {
    quantize_rows<Backend>(values, matrix, dtype, threshold, rows, scope);
    if (find_outliers) {
      operand = {memory, rows.stats, values.const_data_ptr(), rows.outliers, rows.outlier_terms};
    }
    operand.follows_quantization = true;
  }
  int8_scaled_into<Backend>(operand, weight, weight_stats, shift, dtype, out, scope);
  return {out, mask};
}

// The weight that the backward of the layer has in memory at a time: so many bytes, unless a
// product with less than so many results would keep a GPU less busy.
inline constexpr int64_t kWeightPartBytes = int64_t{1} << 26;
inline constexpr int64_t kPartResults = int64_t{1} << 23;

// Columns [n, .] of a weight [n, k] that take part at a time in products of `rows` rows.
inline int64_t part_columns(int64_t rows, int64_t n, int64_t k, int64_t itemsize) {
  constexpr int64_t kAligned = 64;  // columns, for the vendor's library
  const int64_t most =
      std::max({kWeightPartBytes / (n * itemsize), kPartResults / rows, int64_t{1}});
  if (most >= k) return k;
  return ceil_div(ceil_div(k, ceil_div(k, most)), kAligned) * kAligned;
}

// The gradient of the layer's activations: `grad` times the weight, in the dtype of `grad`. All of
// the weight takes more memory than its codes do, so for many rows it is made a part at a time.
template <class Backend>
Tensor int8_linear_dgrad(const Tensor& grad, const Tensor& cb, const Tensor& scb) {
  constexpr const char* op = "int8_linear_dgrad";
  const DType dtype = check_float(op, "grad", grad);
  const Matrix matrix = as_matrix(op, "grad", grad);
  check_layer_weight(op, cb, scb, "grad", grad, 0);
  const int64_t n = matrix.cols;
  const int64_t k = cb.size(1);
  Shape shape = shape_of(grad);
  shape.back() = k;
  const Tensor out = new_empty(grad, shape, grad.scalar_type());
  if (out.numel() == 0) return out;
  if (n == 0) {
    fill_zeros(out);
    return out;
  }
  const Tensor source = in_order(grad);
  const Tensor codes = in_order(cb);
  const Tensor stats = in_order(scb);
  const typename Backend::Scope scope(grad);
  if constexpr (Backend::kInt8Dgrad) {
    const Int8LinearDgrad args{dtype,
                               source.const_data_ptr(),
                               static_cast<const int8_t*>(codes.const_data_ptr()),
                               static_cast<const float*>(stats.const_data_ptr()),
                               out.mutable_data_ptr(),
                               matrix.rows,
                               n,
                               k};
    if (Backend::is_fast(args)) {
      run_product<Backend, Int8LinearDgrad>(grad, args, &Backend::int8_linear_dgrad, scope);
      return out;
    }
  }
  const NoGrad no_grad;
  const int64_t columns = part_columns(matrix.rows, n, k, grad.element_size());
  const Tensor left = as_matrix_of(source, matrix.rows, n, n);
  const Tensor weight = new_empty(grad, {n, columns}, grad.scalar_type());
  for (int64_t first = 0; first < k; first += columns) {
    const int64_t width = std::min(columns, k - first);
    Backend::int8_vectorwise_dequant(
        {dtype, static_cast<const int8_t*>(codes.const_data_ptr()) + first, k,
         static_cast<const float*>(stats.const_data_ptr()), weight.mutable_data_ptr(), n, width},
        scope);
    call_product("aten::mm", left, as_matrix_of(weight, n, width, width),
                 as_matrix_of(out, matrix.rows, width, k, first));
  }
  return out;
}

}  // namespace bnb::ops
