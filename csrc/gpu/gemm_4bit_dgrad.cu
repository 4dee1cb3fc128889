// The backward product with a 4-bit weight: which kernel makes it.
// SPDX-License-Identifier: MIT
#include "bitsandbytes/kernels/gemm_4bit.h"
#include "gpu/gemm/simt.cuh"

namespace bnb::gpu {

int64_t gemm_4bit_dgrad_workspace_bytes(const Gemm4bitDgrad&) { return 0; }

void gemm_4bit_dgrad(const Gemm4bitDgrad& args, void*, Stream stream) {
  by_type(args.dtype, args.weight.scales.nested(),
          [&]<class T, bool kNested>() { simt_gemm_4bit_dgrad<T, kNested>(args, stream); });
}

}  // namespace bnb::gpu
