// The list of ops that every native backend implements. Schemas: python/bitsandbytes/_ops.py.
// SPDX-License-Identifier: MIT
#pragma once

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
  m.impl("quantize_blockwise", TORCH_BOX(&quantize_blockwise<Backend>));
  m.impl("quantize_blockwise.out", TORCH_BOX(&quantize_blockwise_out<Backend>));
  m.impl("dequantize_blockwise", TORCH_BOX(&dequantize_blockwise<Backend>));
  m.impl("dequantize_blockwise.out", TORCH_BOX(&dequantize_blockwise_out<Backend>));
  m.impl("dequantize_blockwise_nested", TORCH_BOX(&dequantize_blockwise_nested<Backend>));
  m.impl("dequantize_blockwise_nested.out", TORCH_BOX(&dequantize_blockwise_nested_out<Backend>));
  m.impl("quantize_4bit", TORCH_BOX(&quantize_4bit<Backend>));
  m.impl("quantize_4bit.out", TORCH_BOX(&quantize_4bit_out<Backend>));
  m.impl("dequantize_4bit", TORCH_BOX(&dequantize_4bit<Backend>));
  m.impl("dequantize_4bit.out", TORCH_BOX(&dequantize_4bit_out<Backend>));
  m.impl("dequantize_4bit_nested", TORCH_BOX(&dequantize_4bit_nested<Backend>));
  m.impl("dequantize_4bit_nested.out", TORCH_BOX(&dequantize_4bit_nested_out<Backend>));
  m.impl("quantize_blockwise_stochastic", TORCH_BOX(&quantize_blockwise_stochastic<Backend>));
  m.impl("quantize_no_absmax", TORCH_BOX(&quantize_no_absmax<Backend>));
  m.impl("gemm_4bit", TORCH_BOX(&gemm_4bit<Backend>));
  m.impl("gemm_4bit_dgrad", TORCH_BOX(&gemm_4bit_dgrad<Backend>));
  m.impl("gemv_4bit", TORCH_BOX(&gemv_4bit<Backend>));
  m.impl("gemv_4bit.out", TORCH_BOX(&gemv_4bit_out<Backend>));
  m.impl("grouped_gemm_4bit", TORCH_BOX(&grouped_gemm_4bit<Backend>));
  m.impl("grouped_gemm_4bit_dgrad", TORCH_BOX(&grouped_gemm_4bit_dgrad<Backend>));
  m.impl("estimate_quantiles", TORCH_BOX(&estimate_quantiles<Backend>));
  m.impl("int8_vectorwise_quant", TORCH_BOX(&int8_vectorwise_quant<Backend>));
  m.impl("int8_linear_matmul", TORCH_BOX(&int8_linear_matmul<Backend>));
  m.impl("int8_linear_matmul.out", TORCH_BOX(&int8_linear_matmul_out<Backend>));
  m.impl("int8_mm_dequant", TORCH_BOX(&int8_mm_dequant<Backend>));
  m.impl("int8_linear", TORCH_BOX(&int8_linear<Backend>));
  m.impl("int8_scaled_mm", TORCH_BOX(&int8_scaled_mm<Backend>));
  m.impl("optimizer_preview_32bit", TORCH_BOX(&optimizer_preview_32bit<Backend>));
  m.impl("optimizer_preview_8bit_blockwise", TORCH_BOX(&optimizer_preview_8bit_blockwise<Backend>));
  m.impl("optimizer_preview_8bit", TORCH_BOX(&optimizer_preview_8bit<Backend>));
  m.impl("optimizer_step_32bit", TORCH_BOX(&optimizer_step_32bit<Backend>));
  m.impl("optimizer_step_8bit_blockwise", TORCH_BOX(&optimizer_step_8bit_blockwise<Backend>));
  m.impl("optimizer_step_8bit", TORCH_BOX(&optimizer_step_8bit<Backend>));
  m.impl("_optimizer_plan", TORCH_BOX(&optimizer_plan<Backend>));
  m.impl("percentile_clipping_step", TORCH_BOX(&percentile_clipping_step<Backend>));
}

}  // namespace bnb::ops
