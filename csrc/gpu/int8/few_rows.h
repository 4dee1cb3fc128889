// Quantization of few rows by a cluster of blocks of Hopper.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/kernels/int8.h"

namespace bnb::gpu {

// Whether the kernel below takes these rows, on the current device.
bool cluster_quantizes(const Int8VectorwiseQuant& args);

void quantize_few_rows(const Int8VectorwiseQuant& args, Stream stream);

}  // namespace bnb::gpu
