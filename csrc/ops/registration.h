// The list of ops that every native backend implements. Schemas: python/bitsandbytes/_ops.py.
// SPDX-License-Identifier: MIT
#pragma once

#include "ops/boxed.h"
#include "ops/gemm_4bit.h"
#include "ops/grouped_gemm_4bit.h"
#include "ops/int8.h"
#include "ops/optimizer.h"
#include "ops/percentile_clipping.h"
#include "ops/quantiles.h"
#include "ops/quantize.h"
#include "ops/quantize_4bit.h"
#include "ops/step_plan.h"

namespace bnb::ops {

template <class Backend, class Library>
void register_ops(Library& m) {
  m.impl("quantize_blockwise", boxed<&quantize_blockwise<Backend>>);
  m.impl("quantize_blockwise.out", boxed<&quantize_blockwise_out<Backend>>);
  m.impl("dequantize_blockwise", boxed<&dequantize_blockwise<Backend>>);
  m.impl("dequantize_blockwise.out", boxed<&dequantize_blockwise_out<Backend>>);
  m.impl("dequantize_blockwise_nested", boxed<&dequantize_blockwise_nested<Backend>>);
  m.impl("dequantize_blockwise_nested.out", boxed<&dequantize_blockwise_nested_out<Backend>>);
  m.impl("quantize_4bit", boxed<&quantize_4bit<Backend>>);
  m.impl("quantize_4bit.out", boxed<&quantize_4bit_out<Backend>>);
  m.impl("dequantize_4bit", boxed<&dequantize_4bit<Backend>>);
  m.impl("dequantize_4bit.out", boxed<&dequantize_4bit_out<Backend>>);
  m.impl("dequantize_4bit_nested", boxed<&dequantize_4bit_nested<Backend>>);
  m.impl("dequantize_4bit_nested.out", boxed<&dequantize_4bit_nested_out<Backend>>);
  m.impl("quantize_blockwise_stochastic", boxed<&quantize_blockwise_stochastic<Backend>>);
  m.impl("quantize_no_absmax", boxed<&quantize_no_absmax<Backend>>);
  m.impl("gemm_4bit", boxed<&gemm_4bit<Backend>>);
  m.impl("gemm_4bit_dgrad", boxed<&gemm_4bit_dgrad<Backend>>);
  m.impl("gemv_4bit", boxed<&gemv_4bit<Backend>>);
  m.impl("gemv_4bit.out", boxed<&gemv_4bit_out<Backend>>);
  m.impl("grouped_gemm_4bit", boxed<&grouped_gemm_4bit<Backend>>);
  m.impl("grouped_gemm_4bit_dgrad", boxed<&grouped_gemm_4bit_dgrad<Backend>>);
  m.impl("estimate_quantiles", boxed<&estimate_quantiles<Backend>>);
  m.impl("int8_vectorwise_quant", boxed<&int8_vectorwise_quant<Backend>>);
  m.impl("int8_vectorwise_dequant", boxed<&int8_vectorwise_dequant<Backend>>);
  m.impl("int8_vectorwise_dequant.dtype", boxed<&int8_vectorwise_dequant_dtype<Backend>>);
  m.impl("int8_linear_matmul", boxed<&int8_linear_matmul<Backend>>);
  m.impl("int8_linear_matmul.out", boxed<&int8_linear_matmul_out<Backend>>);
  m.impl("int8_mm_dequant", boxed<&int8_mm_dequant<Backend>>);
  m.impl("int8_linear", boxed<&int8_linear<Backend>>);
  m.impl("int8_linear_dgrad", boxed<&int8_linear_dgrad<Backend>>);
  m.impl("int8_scaled_mm", boxed<&int8_scaled_mm<Backend>>);
  m.impl("optimizer_preview_32bit", boxed<&optimizer_preview_32bit<Backend>>);
  m.impl("optimizer_preview_8bit_blockwise", boxed<&optimizer_preview_8bit_blockwise<Backend>>);
  m.impl("optimizer_preview_8bit", boxed<&optimizer_preview_8bit<Backend>>);
  m.impl("optimizer_step_32bit", boxed<&optimizer_step_32bit<Backend>>);
  m.impl("optimizer_step_8bit_blockwise", boxed<&optimizer_step_8bit_blockwise<Backend>>);
  m.impl("optimizer_step_8bit", boxed<&optimizer_step_8bit<Backend>>);
  m.impl("_optimizer_plan", boxed<&optimizer_plan<Backend>>);
  m.impl("percentile_clipping_step", boxed<&percentile_clipping_step<Backend>>);
}

}  // namespace bnb::ops
