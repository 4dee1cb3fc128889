// The layer of LLM.int8() on Hopper's tensor cores.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/kernels/int8.h"

namespace bnb::gpu {

// Whether the kernel below takes this product, on the current device.
bool wgmma_int8_serves(const Int8ScaledMatmul& args);

// Of outlier columns that have been gathered before: where tokens are few, a block gathers its own.
int64_t wgmma_int8_outlier_terms_bytes(const Int8ScaledMatmul& args);

void wgmma_int8(const Int8ScaledMatmul& args, Stream stream);

}  // namespace bnb::gpu
