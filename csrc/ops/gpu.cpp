// The ops on CUDA and ROCm devices: kernels of csrc/gpu on the current stream.
// SPDX-License-Identifier: MIT
#include "ops/gpu_backend.h"

namespace bnb::ops {
namespace {

// Makes the tensor's device current and names its current stream, for the length of one op.
class GpuScope {
 public:
  explicit GpuScope(const Tensor& t) : guard_(t.get_device_index()) {
    stream_.handle = current_gpu_stream(t.get_device_index());
  }
  gpu::Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  gpu::Stream stream_{};
};

}  // namespace
}  // namespace bnb::ops

STABLE_TORCH_LIBRARY_IMPL(bitsandbytes, CUDA, m) {
  bnb::ops::register_ops<bnb::ops::GpuBackend<bnb::ops::GpuScope>>(m);
}

BNB_EXPORT_STEP_PLANS(bnb::ops::GpuBackend<bnb::ops::GpuScope>)
