// The GPU's ops on tensors in main memory, with kernels on a GPU made of fibers: for tests of GPU
// code on machines without one. SPDX-License-Identifier: MIT
#include "ops/gpu_backend.h"

namespace bnb::ops {
namespace {

struct EmulatedScope {
  explicit EmulatedScope(const Tensor&) {}
  gpu::Stream stream() const { return {}; }
};

struct Emulated : GpuBackend<EmulatedScope> {
  // Enough rows for every kernel to be tested, and more for plain PyTorch.
  static constexpr int64_t kMostRows = 256;
  static bool is_fast(const Gemm4bit& args) { return args.m <= kMostRows; }
  static bool is_fast(const Gemm4bitDgrad& args) { return args.m <= kMostRows; }
  static bool is_fast(const GroupedGemm4bit&) { return true; }
  static bool is_fast(const GroupedGemm4bitDgrad&) { return true; }
  static constexpr bool kInt8Dgrad = false;  // made by Hopper alone

  // There is no vendor: its part is played by the kernel for all shapes.
  static void library_int8_matmul(const Tensor& a, const Tensor& b, const Tensor& out, int64_t m,
                                  const EmulatedScope& scope) {
    gpu::int8_linear_matmul({a.const_data_ptr<int8_t>(), b.const_data_ptr<int8_t>(),
                             out.mutable_data_ptr<int32_t>(), m, b.size(0), b.size(1)},
                            scope.stream());
  }
};

}  // namespace
}  // namespace bnb::ops

STABLE_TORCH_LIBRARY_IMPL(bitsandbytes, CPU, m) { bnb::ops::register_ops<bnb::ops::Emulated>(m); }

BNB_EXPORT_STEP_PLANS(bnb::ops::Emulated)
