// The launch of the kernel of wgmma_dgrad.cuh, for any format of weights.
// SPDX-License-Identifier: MIT
#pragma once

#include "gpu/device/launch_number.h"
#include "gpu/gemm/wgmma.cuh"
#include "gpu/gemm/wgmma_dgrad.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {
namespace {

struct DgradOperands {
  const void* grad;   // [m, n]
  const void* codes;  // [n, k]
  void* out;          // [m, k]
  int64_t m;
  int64_t n;
  int64_t k;
};

// How a product is cut. Its rows are features there, and its k is terms.
template <class S>
WgmmaPlan plan_of(const DgradOperands& args) {
  return WgmmaPlan::make<S>(args.m, args.k, args.n, multiprocessors());
}

// DgradTask::parts.
template <class S>
int parts_of(const WgmmaPlan& plan) {
  if (plan.whole > 0 || plan.splitters != plan.blocks) return 0;
  for (const int parts : {2, 4, 8}) {
    if (parts <= S::kMostParts && plan.blocks == parts * plan.split) return parts;
  }
  return 0;
}

// The workspace holds sums of parts of tiles, and then counters or flags. A block that exchanges
// sums has one part, others two at most.
template <class S>
int64_t arrivals_at(const WgmmaPlan& plan) {
  constexpr int64_t kTile = int64_t{S::kFeatures} * S::kTokens * int64_t{sizeof(float)};
  return plan.splitters * (parts_of<S>(plan) > 0 ? kTile : 2 * kTile);
}

// Nothing without split tiles.
template <class S>
int64_t dgrad_workspace_bytes(const DgradOperands& args) {
  const WgmmaPlan plan = plan_of<S>(args);
  const int parts = parts_of<S>(plan);
  if (plan.split == 0) return 0;
  const int64_t arrivals =
      parts > 0 ? int64_t{plan.blocks} * parts * S::kWarps : int64_t{plan.split} * S::kGroups;
  return arrivals_at<S>(plan) + arrivals * int64_t{sizeof(uint64_t)};
}

template <class T, class S>
void launch_dgrad(const DgradOperands& args, const typename S::Codes& codes, void* workspace,
                  Stream stream) {
  constexpr auto kernel = wgmma_dgrad_kernel<T, S>;
  constexpr int64_t kBytes = sizeof(T);
  const WgmmaPlan plan = plan_of<S>(args);
  const TensorMap grad_map =
      tensor_map(args.grad, args.m, args.n * kBytes, S::kTokens, Swizzle::k128);
  const TensorMap code_map =
      tensor_map(args.codes, args.n, args.k * S::Codes::kCodeBytes / 64, kTerms, S::kCodeSwizzle);
  const TensorMap out_map =
      tensor_map(args.out, args.m, args.k * kBytes, S::kOutTokens, Swizzle::k128);
  char* const arrivals = static_cast<char*>(workspace) + arrivals_at<S>(plan);
  const DgradTask<typename S::Codes> task{codes,
                                          args.m,
                                          args.n,
                                          args.k,
                                          static_cast<int>(ceil_div(args.k, S::kFeatures)),
                                          plan,
                                          static_cast<float*>(workspace),
                                          reinterpret_cast<unsigned long long*>(arrivals),
                                          next_launch_number(),
                                          parts_of<S>(plan)};
  constexpr int kShared = S::kEnd - kSharedStart;
  allow_shared(reinterpret_cast<const void*>(kernel), kShared);
  kernel<<<static_cast<unsigned>(plan.blocks), S::kThreads, kShared,
           static_cast<cudaStream_t>(stream.handle)>>>(grad_map, code_map, out_map, task);
  BNB_GPU_CHECK(cudaGetLastError());
}

// Whether the kernel takes such a product. `kColumns`: what k must be a multiple of.
template <int kColumns>
bool dgrad_takes(DType dtype, const DgradOperands& args) {
  // Sizes that the copy engine's coordinates hold, and tiles and stages that the plan counts.
  constexpr int64_t kMost = int64_t{1} << 30;
  return dtype != DType::kFloat32 && args.m > 0 && args.n > 0 && args.k > 0 && args.m < kMost &&
         args.n <= kLongest && args.k < kMost &&
         ceil_div(args.m, 256) * ceil_div(args.k, 256) < kMost / 64 && args.n % 8 == 0 &&
         args.k % kColumns == 0 && is_aligned(args.grad, 16) && is_aligned(args.codes, 16) &&
         is_aligned(args.out, 16) && has_wgmma_kernels();
}

}  // namespace
}  // namespace bnb::gpu
