// The product with a 4-bit weight by Hopper's warpgroup products: for more than a few rows of a.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "bitsandbytes/kernels/gemm_4bit.h"

namespace bnb::gpu {

// Whether the build has kernels of sm_90a, and the current device runs them where shared memory
// begins at the address that they count on.
bool has_wgmma_kernels();

// Whether the current device and these arguments are ones that the kernel takes: compute capability
// 9.0 in a build for sm_90a, 16-bit dtype, k a multiple of 64, blocks of at least 64, aligned
// codes.
bool wgmma_gemm_4bit_serves(const Gemm4bit& args);

int64_t wgmma_gemm_4bit_workspace_bytes(const Gemm4bit& args);

void wgmma_gemm_4bit(const Gemm4bit& args, void* workspace, Stream stream);

}  // namespace bnb::gpu
