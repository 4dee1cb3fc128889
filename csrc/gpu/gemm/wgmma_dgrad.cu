// The backward product with a 4-bit weight on Hopper's tensor cores: which tiles, and the launch.
// SPDX-License-Identifier: MIT
#include "gpu/gemm/wgmma_dgrad.h"
#include "gpu/runtime/runtime.cuh"

#if BNB_BULK_COPIES

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>
#include <random>

#include "gpu/gemm/wgmma_dgrad.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {
namespace {

// Clusters of the kernel that are resident together on the current device. Looked up once, since
// the runtime takes long to say it.
template <class T, class S>
int resident_clusters() {
  if (S::kFan == 1) return multiprocessors();
  constexpr int kDevices = 64;
  static std::array<std::atomic<int>, kDevices> known{};
  int device = 0;
  BNB_GPU_CHECK(cudaGetDevice(&device));
  if (device < kDevices && known[device] != 0) return known[device];
  constexpr auto kernel = wgmma_dgrad_kernel<T, S>;
  allow_shared(reinterpret_cast<const void*>(kernel), S::kBytes);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {S::kFan, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(S::kFan);
  config.blockDim = dim3(S::kThreads);
  config.dynamicSmemBytes = S::kBytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  BNB_GPU_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
  clusters = std::max(clusters, 1);
  if (device < kDevices) known[device] = clusters;
  return clusters;
}

// How a product is cut.
struct Cut {
  int splits;         // of the terms of a tile
  int feature_tiles;  // of a cluster
  int token_tiles;
  int clusters;

  int64_t jobs() const { return int64_t{feature_tiles} * token_tiles * splits; }
};

// With the split of terms that ends first, by an estimate in clock cycles.
template <class T, class S>
Cut choose_cut(const Gemm4bitDgrad& args) {
  constexpr int kPairCycles = std::max(8 * S::kTokens * S::kFeatures / 128, 600);
  constexpr int kTileCycles = 2500 + 4 * S::kTokens;
  constexpr int kSplitCycles = 2000 + 24 * S::kTokens;
  constexpr int64_t kMostSplits = 32;
  const int clusters = resident_clusters<T, S>();
  const int64_t pairs = ceil_div(args.weight.n, 2 * kTerms);
  Cut cut{1, static_cast<int>(ceil_div(args.weight.k, S::kFeatures * S::kFan)),
          static_cast<int>(ceil_div(args.m, S::kTokens)), clusters};
  const int64_t tiles = cut.jobs();
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int splits = 1; splits <= std::min(kMostSplits, pairs); ++splits) {
    // More would take more workspace and no less time.
    if (splits > 1 && tiles * splits > 2 * clusters) break;
    const int64_t cycles =
        ceil_div(tiles * splits, clusters) *
        (ceil_div(pairs, splits) * kPairCycles + kTileCycles + (splits > 1 ? kSplitCycles : 0));
    if (cycles < least) {
      least = cycles;
      cut.splits = splits;
    }
  }
  cut.clusters = static_cast<int>(std::min<int64_t>(cut.jobs(), clusters));
  return cut;
}

// Of the workspace: sums, then a counter for each tile. Nothing with a single split.
template <class S>
int64_t sums_bytes(const Cut& cut) {
  if (cut.splits == 1) return 0;
  return cut.jobs() * S::kFan * S::kFeatures * S::kTokens * int64_t{sizeof(float)};
}
template <class S>
int64_t arrivals_bytes(const Cut& cut) {
  if (cut.splits == 1) return 0;
  return cut.jobs() / cut.splits * S::kFan * int64_t{sizeof(unsigned long long)};
}

// A number that the counters of other launches do not hold, nor, but for a chance of 2^-56, memory
// that has been something else.
unsigned long long next_launch() {
  static std::atomic<unsigned long long> launches = [] {
    std::random_device random;
    return (static_cast<unsigned long long>(random()) << 32) | random();
  }();
  return ++launches << 8;
}

template <class T, class S>
void launch_dgrad(const Gemm4bitDgrad& args, void* workspace, Stream stream) {
  constexpr auto kernel = wgmma_dgrad_kernel<T, S>;
  const Weight4bit& w = args.weight;
  const Cut cut = choose_cut<T, S>(args);
  const TensorMap grad_map =
      tensor_map(args.grad, args.m, w.n * int64_t{sizeof(T)}, S::kTokens / S::kFan, Swizzle::k128);
  const TensorMap code_map = tensor_map(w.codes, w.n, w.k / 2, kTerms, S::kCodeSwizzle);
  const bool nested = w.scales.nested();
  const bool paired = w.block_size == kGroupWidth && w.k % (2 * kGroupWidth) == 0 &&
                      (nested ? is_aligned(w.scales.codes, 2) && w.scales.block_size % 2 == 0
                              : is_aligned(w.scales.absmax, 8));
  const DgradTask task{
      w.scales,
      Levels4(w),
      args.out,
      args.m,
      w.n,
      w.k,
      log2_of(w.block_size),
      paired,
      cut.splits,
      cut.feature_tiles,
      cut.token_tiles,
      static_cast<float*>(workspace),
      reinterpret_cast<unsigned long long*>(static_cast<char*>(workspace) + sums_bytes<S>(cut)),
      next_launch()};
  allow_shared(reinterpret_cast<const void*>(kernel), S::kBytes);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {S::kFan, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(cut.clusters * S::kFan));
  config.blockDim = dim3(S::kThreads);
  config.dynamicSmemBytes = S::kBytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = &attribute;
  config.numAttrs = 1;
  BNB_GPU_CHECK(cudaLaunchKernelEx(&config, kernel, grad_map, code_map, task));
}

// Calls visit<T, Shape>(). Few tokens take more features, so that codes come in longer pieces.
template <class T, class Visitor>
decltype(auto) with_shape(int64_t m, Visitor&& visit) {
  //                                                   tokens fan groups
  if (m <= 16) return visit.template operator()<T, Shape<16, 1, 4>>();
  if (m <= 32) return visit.template operator()<T, Shape<32, 1, 4>>();
  if (m <= 64) return visit.template operator()<T, Shape<64, 1, 4>>();
  if (m <= 128) return visit.template operator()<T, Shape<128, 2, 2>>();
  return visit.template operator()<T, Shape<256, 2, 2>>();
}

template <class Visitor>
decltype(auto) with_shape(const Gemm4bitDgrad& args, Visitor&& visit) {
  return args.dtype == DType::kBFloat16 ? with_shape<BFloat16>(args.m, visit)
                                        : with_shape<Half>(args.m, visit);
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
  // Sizes that the copy engine's coordinates hold, and jobs that the kernel counts.
  constexpr int64_t kMost = int64_t{1} << 30;
  const Weight4bit& w = args.weight;
  return args.dtype != DType::kFloat32 && args.m > 0 && w.n > 0 && w.k > 0 && args.m < kMost &&
         w.n < kMost && w.k < kMost && ceil_div(args.m, 256) * ceil_div(w.k, 256) < kMost / 64 &&
         w.n % 8 == 0 && w.k % 64 == 0 && is_aligned(args.grad, 16) && is_aligned(w.codes, 16) &&
         is_aligned(args.out, 4) && has_kernels();
}

int64_t wgmma_gemm_4bit_dgrad_workspace_bytes(const Gemm4bitDgrad& args) {
  return with_shape(args, [&]<class T, class S>() {
    const Cut cut = choose_cut<T, S>(args);
    return sums_bytes<S>(cut) + arrivals_bytes<S>(cut);
  });
}

void wgmma_gemm_4bit_dgrad(const Gemm4bitDgrad& args, void* workspace, Stream stream) {
  with_shape(args, [&]<class T, class S>() { launch_dgrad<T, S>(args, workspace, stream); });
}

}  // namespace bnb::gpu

#else

namespace bnb::gpu {

bool wgmma_gemm_4bit_dgrad_serves(const Gemm4bitDgrad&) { return false; }
int64_t wgmma_gemm_4bit_dgrad_workspace_bytes(const Gemm4bitDgrad&) { return 0; }
void wgmma_gemm_4bit_dgrad(const Gemm4bitDgrad&, void*, Stream) {}

}  // namespace bnb::gpu

#endif  // BNB_BULK_COPIES
