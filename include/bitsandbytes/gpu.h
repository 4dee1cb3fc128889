// The functions of the library for C++ programs, on CUDA and ROCm devices. cpu.h has them for CPUs,
// with the same arguments; docs/cpp.md explains both.
//
//   quantize_blockwise     dequantize_blockwise     kernels/quantize.h
//   quantize_4bit          dequantize_4bit          kernels/quantize_4bit.h
//   estimate_quantiles                              kernels/quantiles.h
//
// They start kernels on `stream`, of the current device, and return at once; a capturing stream
// captures them. Each checks sizes, and pointers for null and alignment, and throws
// std::invalid_argument before it starts anything, std::runtime_error where the GPU's runtime
// refuses. What a pointer cannot tell is up to the caller: it leads to memory that the device
// reaches, of as many elements as its comment says, which stays until the stream has passed the
// call, and of which nothing that is written lies where another argument is.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/kernels/common.h"
#include "bitsandbytes/kernels/quantiles.h"
#include "bitsandbytes/kernels/quantize.h"
#include "bitsandbytes/kernels/quantize_4bit.h"
