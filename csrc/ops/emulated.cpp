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
  static bool library_int8_matmul(const Tensor&, const Tensor&, const Tensor&, int64_t) {
    return false;
  }
};

}  // namespace
}  // namespace bnb::ops

STABLE_TORCH_LIBRARY_IMPL(bitsandbytes, CPU, m) { bnb::ops::register_ops<bnb::ops::Emulated>(m); }

BNB_EXPORT_STEP_PLANS(bnb::ops::Emulated)
