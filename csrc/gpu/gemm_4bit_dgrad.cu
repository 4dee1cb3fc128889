// The backward product with a 4-bit weight: which kernel makes it.
// SPDX-License-Identifier: MIT
#include "bitsandbytes/kernels/gemm_4bit.h"
#include "gpu/gemm/simt.cuh"
#include "gpu/gemm/wgmma_dgrad.h"

namespace bnb::gpu {

namespace {

// Up to this many rows of grad the portable kernel reads the weight once.
constexpr int64_t kFewRows = 8;

}  // namespace

bool gemm_4bit_dgrad_is_fast(const Gemm4bitDgrad& args) {
  return args.m <= kFewRows || wgmma_gemm_4bit_dgrad_serves(args);
}

int64_t gemm_4bit_dgrad_workspace_bytes(const Gemm4bitDgrad& args) {
  return wgmma_gemm_4bit_dgrad_serves(args) ? wgmma_gemm_4bit_dgrad_workspace_bytes(args) : 0;
}

void gemm_4bit_dgrad(const Gemm4bitDgrad& args, void* workspace, Stream stream) {
  if (wgmma_gemm_4bit_dgrad_serves(args)) return wgmma_gemm_4bit_dgrad(args, workspace, stream);
  by_type(args.dtype, args.weight.scales.nested(),
          [&]<class T, bool kNested>() { simt_gemm_4bit_dgrad<T, kNested>(args, stream); });
}

}  // namespace bnb::gpu
