// The backward product with a 4-bit weight on Hopper's tensor cores.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/kernels/gemm_4bit.h"

namespace bnb::gpu {

// Whether the kernel below takes this product, on the current device.
bool wgmma_gemm_4bit_dgrad_serves(const Gemm4bitDgrad& args);

int64_t wgmma_gemm_4bit_dgrad_workspace_bytes(const Gemm4bitDgrad& args);
void wgmma_gemm_4bit_dgrad(const Gemm4bitDgrad& args, void* workspace, Stream stream);

}  // namespace bnb::gpu
