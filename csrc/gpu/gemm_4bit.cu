// The product with a 4-bit weight: which kernel makes it.
// SPDX-License-Identifier: MIT
#include "bitsandbytes/kernels/gemm_4bit.h"
#include "gpu/gemm/mma.cuh"
#include "gpu/gemm/simt.cuh"
#include "gpu/gemm/wgmma.cuh"

namespace bnb::gpu {

namespace {

// Up to this many rows of a, products of single warps are faster than those of warpgroups.
constexpr int64_t kFewRows = 8;
// Up to so many, products of single warps are faster than dequantizing the weight.
constexpr int64_t kWarpRows = 32;
// For weights of so many elements at most, which take little time, warps begin and end sooner than
// warpgroups up to more rows, unless k has many chunks, whose sums are added up one by one.
constexpr int64_t kSmallWeight = int64_t{1} << 27;
constexpr int64_t kMostChunks = 3;
constexpr int64_t kFewRowsOfSmall = 2 * kMmaCols;

bool takes_warps(const Gemm4bit& args) { return takes_mma(args) && has_tensor_products(); }

bool takes_warpgroups(const Gemm4bit& args) {
  const Weight4bit& w = args.weight;
  const bool small =
      w.n * w.k <= kSmallWeight && ceil_div(w.k, kMmaWarps * kMmaUnit) <= kMostChunks;
  if (args.m <= kFewRows || (small && args.m <= kFewRowsOfSmall && takes_warps(args))) return false;
  return wgmma_gemm_4bit_serves(args);
}

}  // namespace

bool gemm_4bit_is_fast(const Gemm4bit& args) {
  return args.m <= kFewRows || (args.m <= kWarpRows && takes_warps(args)) || takes_warpgroups(args);
}

int64_t gemm_4bit_workspace_bytes(const Gemm4bit& args) {
  return takes_warpgroups(args) ? wgmma_gemm_4bit_workspace_bytes(args) : 0;
}

void gemm_4bit(const Gemm4bit& args, void* workspace, Stream stream) {
  if (takes_warpgroups(args)) return wgmma_gemm_4bit(args, workspace, stream);
  by_type(args.dtype, args.weight.scales.nested(), [&]<class T, bool kNested>() {
    if constexpr (kTensorProducts && !std::is_same_v<T, float>) {
      if (takes_warps(args)) return mma_gemm_4bit<T, kNested>(args, stream);
    }
    simt_gemm_4bit<T, kNested>(args, stream);
  });
}

}  // namespace bnb::gpu
