// The backward product with a 4-bit weight on Hopper's tensor cores: which tiles, and the launch.
// SPDX-License-Identifier: MIT
#include "gpu/gemm/wgmma_dgrad.h"
#include "gpu/runtime/runtime.cuh"

#if BNB_BULK_COPIES

#include "gpu/device/launch_number.h"
#include "gpu/gemm/codes4.cuh"
#include "gpu/gemm/wgmma_dgrad.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {
namespace {

// How a product is cut. Its rows are features there, and its k is terms.
template <class S>
WgmmaPlan plan_of(const Gemm4bitDgrad& args) {
  return WgmmaPlan::make<S>(args.m, args.weight.k, args.weight.n, multiprocessors());
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
int64_t workspace_bytes(const WgmmaPlan& plan) {
  const int parts = parts_of<S>(plan);
  if (plan.split == 0 || (S::kPairs && parts > 0)) return 0;
  const int64_t arrivals =
      parts > 0 ? int64_t{plan.blocks} * parts * S::kWarps : int64_t{plan.split} * S::kGroups;
  return arrivals_at<S>(plan) + arrivals * int64_t{sizeof(uint64_t)};
}

template <class T, class S>
void launch_dgrad(const Gemm4bitDgrad& args, void* workspace, Stream stream) {
  constexpr auto kernel = wgmma_dgrad_kernel<T, S>;
  constexpr int64_t kBytes = sizeof(T);
  const Weight4bit& w = args.weight;
  const WgmmaPlan plan = plan_of<S>(args);
  const TensorMap grad_map = tensor_map(args.grad, args.m, w.n * kBytes, S::kTokens, Swizzle::k128);
  const TensorMap code_map = tensor_map(w.codes, w.n, w.k / 2, kTerms, S::Codes::kSwizzle);
  const TensorMap out_map =
      tensor_map(args.out, args.m, w.k * kBytes, S::kOutTokens, Swizzle::k128);
  char* const arrivals = static_cast<char*>(workspace) + arrivals_at<S>(plan);
  const DgradTask<Codes4> task{Codes4(w),
                               args.m,
                               w.n,
                               w.k,
                               static_cast<int>(ceil_div(w.k, S::kFeatures)),
                               plan,
                               static_cast<float*>(workspace),
                               reinterpret_cast<unsigned long long*>(arrivals),
                               next_launch_number(),
                               parts_of<S>(plan)};
  allow_shared(reinterpret_cast<const void*>(kernel), S::kBytes);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {S::kPairs && task.parts == 2 ? 2u : 1u, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(S::kThreads);
  config.dynamicSmemBytes = S::kBytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = &attribute;
  config.numAttrs = 1;
  BNB_GPU_CHECK(cudaLaunchKernelEx(&config, kernel, grad_map, code_map, out_map, task));
}

// Calls visit<T, Shape>() for tiles of many tokens. What it takes to share results costs registers,
// so only those who share a tile among more than two have it.
template <class T, int kTokens, int kDecoders, class Visitor>
decltype(auto) with_large_shape(const Gemm4bitDgrad& args, Visitor&& visit) {
  using Shared = Shape<Codes4, kTokens, kDecoders, 3, true>;
  if (parts_of<Shared>(plan_of<Shared>(args)) > 2) return visit.template operator()<T, Shared>();
  return visit.template operator()<T, Shape<Codes4, kTokens, kDecoders, 3, false>>();
}

// Calls visit<T, Shape>(). The fewer the tokens, the more warps decode.
template <class T, class Visitor>
decltype(auto) with_shape(const Gemm4bitDgrad& args, Visitor&& visit) {
  const int64_t m = args.m;
  //                                                   tokens decoders
  if (m <= 16) return visit.template operator()<T, Shape<Codes4, 16, 3, 4, true>>();
  if (m <= 32) return visit.template operator()<T, Shape<Codes4, 32, 3, 4, true>>();
  if (m <= 64) return visit.template operator()<T, Shape<Codes4, 64, 3, 4, true>>();
  if (m <= 128) return with_large_shape<T, 128, 3>(args, visit);
  return with_large_shape<T, 256, 2>(args, visit);
}

template <class Visitor>
decltype(auto) with_type_and_shape(const Gemm4bitDgrad& args, Visitor&& visit) {
  return args.dtype == DType::kBFloat16 ? with_shape<BFloat16>(args, visit)
                                        : with_shape<Half>(args, visit);
}

// Tells by its shared memory whether this target has the kernels: others have empty ones.
__global__ void dgrad_marker_kernel(int* out) {
#if BNB_HOPPER
  __shared__ int marker[kWarp];
  marker[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = marker[kWarp - 1 - threadIdx.x];
#endif
}

bool has_kernels() {
  if (!is_hopper()) return false;
  static const bool built = is_built(reinterpret_cast<const void*>(&dgrad_marker_kernel));
  return built;
}

}  // namespace

bool wgmma_gemm_4bit_dgrad_serves(const Gemm4bitDgrad& args) {
  // Sizes that the copy engine's coordinates hold, and tiles and stages that the plan counts.
  constexpr int64_t kMost = int64_t{1} << 30;
  const Weight4bit& w = args.weight;
  return args.dtype != DType::kFloat32 && args.m > 0 && w.n > 0 && w.k > 0 && args.m < kMost &&
         w.n <= kLongest && w.k < kMost &&
         ceil_div(args.m, 256) * ceil_div(w.k, 256) < kMost / 64 && w.n % 8 == 0 && w.k % 64 == 0 &&
         is_aligned(args.grad, 16) && is_aligned(w.codes, 16) && is_aligned(args.out, 16) &&
         has_kernels();
}

int64_t wgmma_gemm_4bit_dgrad_workspace_bytes(const Gemm4bitDgrad& args) {
  return with_type_and_shape(
      args, [&]<class T, class S>() { return workspace_bytes<S>(plan_of<S>(args)); });
}

void wgmma_gemm_4bit_dgrad(const Gemm4bitDgrad& args, void* workspace, Stream stream) {
  with_type_and_shape(args,
                      [&]<class T, class S>() { launch_dgrad<T, S>(args, workspace, stream); });
}

}  // namespace bnb::gpu

#else

namespace bnb::gpu {

bool wgmma_gemm_4bit_dgrad_serves(const Gemm4bitDgrad&) { return false; }
int64_t wgmma_gemm_4bit_dgrad_workspace_bytes(const Gemm4bitDgrad&) { return 0; }
void wgmma_gemm_4bit_dgrad(const Gemm4bitDgrad&, void*, Stream) {}

}  // namespace bnb::gpu

#endif  // BNB_BULK_COPIES
