// Products of groups of rows with a 4-bit weight for each group: which kernel makes them.
// SPDX-License-Identifier: MIT
#include <type_traits>

#include "bitsandbytes/kernels/grouped_gemm_4bit.h"
#include "gpu/gemm/mma_grouped.cuh"
#include "gpu/gemm/simt_grouped.cuh"
#include "gpu/gemm/wgmma_grouped.h"

namespace bnb::gpu {

namespace {

// Rows per group, on average, up to which products of single warps beat those of warpgroups.
constexpr int64_t kFewRows = 4;
// And up to which they beat dequantizing weights.
constexpr int64_t kWarpRows = 48;

// Whether torch's grouped product takes the matrices (plain/grouped_gemm_4bit.py).
bool library_takes(DType dtype, const Weight4bit& w) {
  constexpr int64_t kSixteenBytes = 8;
  return kTensorProducts && has_tensor_products() && dtype == DType::kBFloat16 &&
         w.n % kSixteenBytes == 0 && w.k % kSixteenBytes == 0;
}

bool takes_warpgroups(const GroupedGemm4bit& args) {
  return args.groups.rows > kFewRows * args.groups.count && wgmma_grouped_gemm_4bit_serves(args);
}

}  // namespace

bool grouped_gemm_4bit_is_fast(const GroupedGemm4bit& args) {
  return args.groups.rows <= kWarpRows * args.groups.count || takes_warpgroups(args) ||
         !library_takes(args.dtype, args.weight);
}

int64_t grouped_gemm_4bit_workspace_bytes(const GroupedGemm4bit& args) {
  return takes_warpgroups(args) ? wgmma_grouped_gemm_4bit_workspace_bytes(args) : 0;
}

bool grouped_gemm_4bit_dgrad_is_fast(const GroupedGemm4bitDgrad& args) {
  return !library_takes(args.dtype, args.weight);
}

void grouped_gemm_4bit(const GroupedGemm4bit& args, void* workspace, Stream stream) {
  if (takes_warpgroups(args)) return wgmma_grouped_gemm_4bit(args, workspace, stream);
  by_type(args.dtype, args.weight.scales.nested(), [&]<class T, bool kNested>() {
    if constexpr (kTensorProducts && !std::is_same_v<T, float>) {
      if (takes_grouped_mma(args)) return mma_grouped_gemm_4bit<T, kNested>(args, stream);
    }
    simt_grouped_gemm_4bit<T, kNested>(args, stream);
  });
}

void grouped_gemm_4bit_dgrad(const GroupedGemm4bitDgrad& args, Stream stream) {
  by_type(args.dtype, args.weight.scales.nested(),
          [&]<class T, bool kNested>() { simt_grouped_gemm_4bit_dgrad<T, kNested>(args, stream); });
}

}  // namespace bnb::gpu
