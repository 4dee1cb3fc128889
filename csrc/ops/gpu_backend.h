// The ops on a GPU, or on what takes its place: kernels of csrc/gpu on the stream of a scope.
// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include "ops/registration.h"

namespace bnb::ops {

// `ScopeOf`: makes the device of a tensor current for the length of one op, and names its stream.
template <class ScopeOf>
struct GpuBackend {
  using Scope = ScopeOf;

  static void check_quantize_block_size(const char* op, int64_t block_size) {
    const bool power_of_two = (block_size & (block_size - 1)) == 0;
    require(power_of_two && block_size >= kLeastBlock && block_size <= kLargestBlock, op,
            ": blocksize must be one of {32, 64, 128, 256, 512, 1024, 2048, 4096} on this device, "
            "got ",
            block_size);
  }

  static void quantize_blockwise(const QuantizeBlockwise& args, const Scope& scope) {
    gpu::quantize_blockwise(args, scope.stream());
  }
  static void dequantize_blockwise(const DequantizeBlockwise& args, const Scope& scope) {
    gpu::dequantize_blockwise(args, scope.stream());
  }
  static void quantize_4bit(const Quantize4bit& args, const Scope& scope) {
    gpu::quantize_4bit(args, scope.stream());
  }
  static void dequantize_4bit(const Dequantize4bit& args, const Scope& scope) {
    gpu::dequantize_4bit(args, scope.stream());
  }
  // Products that the vendor's library makes faster are left to plain PyTorch.
  static constexpr bool kPlainProducts = true;
  static bool is_fast(const Gemm4bit& args) { return gpu::gemm_4bit_is_fast(args); }
  static bool is_fast(const Gemm4bitDgrad& args) { return gpu::gemm_4bit_dgrad_is_fast(args); }

  // Kernels know the levels by the name of the code.
  static const float* levels(Code4) { return nullptr; }
  static int64_t workspace_bytes(const Gemm4bit& args) {
    return gpu::gemm_4bit_workspace_bytes(args);
  }
  static void gemm_4bit(const Gemm4bit& args, void* workspace, const Scope& scope) {
    gpu::gemm_4bit(args, workspace, scope.stream());
  }
  static int64_t workspace_bytes(const Gemm4bitDgrad& args) {
    return gpu::gemm_4bit_dgrad_workspace_bytes(args);
  }
  static void gemm_4bit_dgrad(const Gemm4bitDgrad& args, void* workspace, const Scope& scope) {
    gpu::gemm_4bit_dgrad(args, workspace, scope.stream());
  }
  static bool is_fast(const GroupedGemm4bit& args) { return gpu::grouped_gemm_4bit_is_fast(args); }
  static bool is_fast(const GroupedGemm4bitDgrad& args) {
    return gpu::grouped_gemm_4bit_dgrad_is_fast(args);
  }
  // Only the device knows where groups end.
  static void check_groups(const char*, const Groups&) {}
  static int64_t workspace_bytes(const GroupedGemm4bit& args) {
    return gpu::grouped_gemm_4bit_workspace_bytes(args);
  }
  static void grouped_gemm_4bit(const GroupedGemm4bit& args, void* workspace, const Scope& scope) {
    gpu::grouped_gemm_4bit(args, workspace, scope.stream());
  }
  static int64_t workspace_bytes(const GroupedGemm4bitDgrad&) { return 0; }
  static void grouped_gemm_4bit_dgrad(const GroupedGemm4bitDgrad& args, void*, const Scope& scope) {
    gpu::grouped_gemm_4bit_dgrad(args, scope.stream());
  }
  static int64_t quantile_workspace_bytes(DType dtype) {
    return gpu::quantile_workspace_bytes(dtype);
  }
  static void estimate_quantiles(const EstimateQuantiles& args, void* workspace,
                                 const Scope& scope) {
    gpu::estimate_quantiles(args, workspace, scope.stream());
  }
  static void int8_vectorwise_quant(const Int8VectorwiseQuant& args, const Scope& scope) {
    gpu::int8_vectorwise_quant(args, scope.stream());
  }
  static void int8_vectorwise_dequant(const Int8VectorwiseDequant& args, const Scope& scope) {
    gpu::int8_vectorwise_dequant(args, scope.stream());
  }

  // out = a b^T through torch's binding of the vendor's library, where that takes the shape.
  static constexpr bool kInt8Library = true;
  static void library_int8_matmul(const Tensor& a, const Tensor& b, const Tensor& out, int64_t m,
                                  const Scope&) {
    std::array<StableIValue, 3> stack{
        torch::stable::detail::from(torch::stable::view(a, {m, b.size(1)})),
        torch::stable::detail::from(torch::stable::transpose(b, 0, 1)),
        torch::stable::detail::from(torch::stable::view(out, {m, b.size(0)}))};
    call_torch("aten::_int_mm", "out", stack.data());
    torch::stable::detail::to<Tensor>(stack[0]);  // takes back the reference that the call returned
  }
  static bool int8_scaled_matmul_is_fast(const Int8ScaledMatmul& args) {
    return gpu::int8_scaled_matmul_is_fast(args);
  }
  static void int8_scale_product(const Int8ScaledMatmul& args, const int32_t* product,
                                 const Scope& scope) {
    gpu::int8_scale_product(args, product, scope.stream());
  }

  static int64_t workspace_bytes(const Int8Matmul&) { return 0; }
  static void int8_linear_matmul(const Int8Matmul& args, void*, const Scope& scope) {
    gpu::int8_linear_matmul(args, scope.stream());
  }
  static int64_t int8_outlier_terms_bytes(int64_t m, int64_t n, int64_t k) {
    return gpu::int8_outlier_terms_bytes(m, n, k);
  }
  static int64_t workspace_bytes(const Int8ScaledMatmul&) { return 0; }
  static void int8_scaled_matmul(const Int8ScaledMatmul& args, void*, const Scope& scope) {
    gpu::int8_scaled_matmul(args, scope.stream());
  }
  static constexpr bool kInt8Dgrad = true;
  static bool is_fast(const Int8LinearDgrad& args) { return gpu::int8_linear_dgrad_is_fast(args); }
  static int64_t workspace_bytes(const Int8LinearDgrad& args) {
    return gpu::int8_linear_dgrad_workspace_bytes(args);
  }
  static void int8_linear_dgrad(const Int8LinearDgrad& args, void* workspace, const Scope& scope) {
    gpu::int8_linear_dgrad(args, workspace, scope.stream());
  }
  static void int8_mm_dequant(const Int8MmDequant& args, const Scope& scope) {
    gpu::int8_mm_dequant(args, scope.stream());
  }
  static void optimizer_step_32bit(const OptimizerStep& args,
                                   std::span<const OptimizerTensor> tensors, const Scope& scope) {
    gpu::optimizer_step_32bit(args, tensors, scope.stream());
  }
  static void optimizer_step_8bit_blockwise(const OptimizerStep& args,
                                            std::span<const OptimizerTensor> tensors,
                                            const Scope& scope) {
    gpu::optimizer_step_8bit_blockwise(args, tensors, scope.stream());
  }
  static void optimizer_step_8bit(const OptimizerStep& args,
                                  std::span<const OptimizerTensor> tensors, const Scope& scope) {
    gpu::optimizer_step_8bit(args, tensors, scope.stream());
  }
  static void optimizer_preview(const OptimizerStep& args, StateFormat format,
                                std::span<const OptimizerTensor> tensors, float* partials,
                                const Scope& scope) {
    gpu::optimizer_preview(args, format, tensors, partials, scope.stream());
  }
  static void percentile_clipping(const PercentileClipping& args,
                                  std::span<const GradientTensor> tensors, float* partials,
                                  const Scope& scope) {
    gpu::percentile_clipping(args, tensors, partials, scope.stream());
  }
};

}  // namespace bnb::ops
