// The product with a 4-bit weight: which kernel makes it.
// SPDX-License-Identifier: MIT
#include "bitsandbytes/kernels/gemm_4bit.h"
#include "gpu/gemm/mma.cuh"
#include "gpu/gemm/simt.cuh"

namespace bnb::gpu {

int64_t gemm_4bit_workspace_bytes(const Gemm4bit&) { return 0; }

void gemm_4bit(const Gemm4bit& args, void*, Stream stream) {
  const bool tensor_cores = takes_mma(args) && has_tensor_products();
  by_type(args.dtype, args.weight.scales.nested(), [&]<class T, bool kNested>() {
    if constexpr (!std::is_same_v<T, float>) {
      if (tensor_cores) return mma_gemm_4bit<T, kNested>(args, stream);
    }
    simt_gemm_4bit<T, kNested>(args, stream);
  });
}

}  // namespace bnb::gpu
