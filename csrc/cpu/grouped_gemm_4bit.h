// Products of groups of rows with a 4-bit weight for each group, as whole calls on the CPU.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/cpu.h"
#include "bitsandbytes/kernels/grouped_gemm_4bit.h"

namespace bnb::cpu {

// `workspace` has the bytes that *_workspace_bytes() names, on a multiple of 64, and holds nothing
// before or after.
int64_t grouped_gemm_4bit_workspace_bytes(const GroupedGemm4bit& args, const Threads& threads);
void grouped_gemm_4bit(const GroupedGemm4bit& args, void* workspace, const Threads& threads);

int64_t grouped_gemm_4bit_dgrad_workspace_bytes(const GroupedGemm4bitDgrad& args,
                                                const Threads& threads);
void grouped_gemm_4bit_dgrad(const GroupedGemm4bitDgrad& args, void* workspace,
                             const Threads& threads);

}  // namespace bnb::cpu
