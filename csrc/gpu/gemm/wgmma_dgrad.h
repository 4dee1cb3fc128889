// The backward product with a 4-bit weight on Hopper's tensor cores.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "bitsandbytes/kernels/gemm_4bit.h"

namespace bnb::gpu {

// Whether the current device and these arguments are ones that the kernel takes: compute capability
// 9.0 in a build for sm_90a, 16-bit dtype, n a multiple of 8 and k of 64, grad, codes and out
// aligned to 16 bytes.
bool wgmma_gemm_4bit_dgrad_serves(const Gemm4bitDgrad& args);

int64_t wgmma_gemm_4bit_dgrad_workspace_bytes(const Gemm4bitDgrad& args);

void wgmma_gemm_4bit_dgrad(const Gemm4bitDgrad& args, void* workspace, Stream stream);

}  // namespace bnb::gpu
