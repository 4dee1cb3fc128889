// Products of groups of rows with a 4-bit weight for each group, by Hopper's warpgroup products:
// for many rows in a group. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "bitsandbytes/kernels/grouped_gemm_4bit.h"

namespace bnb::gpu {

// Whether the kernel takes the arguments on the current device: as wgmma_gemm_4bit_serves().
bool wgmma_grouped_gemm_4bit_serves(const GroupedGemm4bit& args);

int64_t wgmma_grouped_gemm_4bit_workspace_bytes(const GroupedGemm4bit& args);

void wgmma_grouped_gemm_4bit(const GroupedGemm4bit& args, void* workspace, Stream stream);

}  // namespace bnb::gpu
