// The layer of LLM.int8() by Hopper's warpgroup products.
// SPDX-License-Identifier: MIT
//
// out[i, j] = row_stats[i] * col_stats[j] / 127^2 * sum over k of a[i, k] b[j, k], exact in 32-bit
// integers, plus bias and the products of outlier columns. Rows i are tokens, columns j features, k
// a term. As the tensor cores see it, out^T [features, tokens] = b a^T: the weight is the operand
// of 64 rows, the tokens are the columns, of which there may be as few as 16.
//
// A block of threads makes tiles of kFeatures x kTokens. Stages of 128 terms go through a ring:
//
//     warpgroups      multiply 64 features each, scale the sums and store them
//     one warp        starts the copies of weights [kFeatures, 128] and tokens [kTokens, 128]
//     other warps     in large tiles, make stages of outlier columns, 64 to each
//
// For many tokens, tiles are large, blocks stay for several, and two neighbours in a cluster, which
// make tiles of the same tokens, copy half of those each to both. For few tokens, tiles are small,
// several blocks share a multiprocessor, and the blocks of a cluster share the terms of a tile;
// they add their sums, which are exact, through each other's shared memory.
//
// Outlier columns are products of 16-bit numbers. Weights are codes, which 16 bits hold exactly,
// and the values are those of the input (a float is split in three bfloat16), so products are exact
// and added in float. In large tiles they are further stages, added to the sums of the codes, which
// have become floats by then; where terms are shared, each block has sums of its own for the
// columns among its terms.
#include "gpu/int8/wgmma.h"
#include "gpu/runtime/runtime.cuh"

#if BNB_BULK_COPIES

#include <algorithm>
#include <array>

#include "bitsandbytes/blocks.h"
#include "gpu/device/dtype.cuh"
#include "gpu/device/tensor_copy.cuh"
#include "gpu/device/wgmma.cuh"
#include "gpu/int8/wgmma_outliers.cuh"
#include "gpu/int8/wgmma_results.cuh"
#include "gpu/int8/wgmma_tile.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {
namespace {

#if BNB_HOPPER

template <class T, class Shape>
struct Int8Product {
  using Tile = Int8Tile<T, Shape>;
  using Results = Int8Results<T, Shape>;
  using Place = typename Tile::Place;
  static constexpr int kTokens = Shape::kTokens;
  static constexpr int kSums = Shape::kSums;

  const Tile& tile;

  // ---- Copies --------------------------------------------------------------------------------

  // What precedes the end of the kernel before this one: the weights of the first stages, if they
  // are older than that.
  __device__ __forceinline__ void copy(const Int8Maps& maps) const {
    int early = tile.task.weights_are_older ? Shape::kStages : 0;
    int slabs = 0;  // stages of outlier columns
    bool waited = false;
    Place place;
    tile.for_each_tile([&](const Int8Job& job) {
      const auto copy_weights = [&](int slot, int stage) {
        TransactionBarrier& full = tile.barriers[slot].full;
        full.arrive_and_expect(Shape::kStageBytes);
        tensor_copy(shared_address(tile.stage(slot)), maps.weights, stage * (kInt8Terms / 2),
                    job.feature, full);
      };
      early = min(early, job.last_stage - job.first_stage);
      if (!waited) {
        for (int i = 0; i < early; ++i) copy_weights(i, job.first_stage + i);
        wait_for_previous_kernel();
        if constexpr (!Shape::kSplits) slabs = tile.slab_count(tile.outlier_count());
        waited = true;
      }
      for (int s = job.first_stage; s < job.last_stage; ++s) {
        if (early > 0) {
          --early;
        } else {
          tile.barriers[place.slot].empty.wait(place.phase ^ 1);
          copy_weights(place.slot, s);
        }
        tile.copy_tokens(place.slot, maps.tokens, s, job.token);
        place.advance();
      }
      for (int s = 0; s < slabs; ++s) {
        // Only who starts all copies knows which use of the place it waits for.
        tile.barriers[place.slot].empty.wait(place.phase ^ 1);
        tile.granted[place.slot].arrive();
        place.advance();
      }
    });
  }

  // ---- Products ------------------------------------------------------------------------------

  // Called once per warp.
  __device__ __forceinline__ void release(int slot) const {
    if (threadIdx.x % kWarp == 0) {
      if constexpr (Shape::kFan > 1) {
#pragma unroll
        for (int f = 0; f < Shape::kFan; ++f) tile.barriers[slot].empty.arrive_at(f);
      } else {
        tile.barriers[slot].empty.arrive();
      }
    }
  }

  // `visit`: looks at each stage as it passes.
  template <class Visit>
  __device__ __forceinline__ void multiply(const Int8Job& job, const Int8Position& at, Place& place,
                                           int (&d)[kSums], const Visit& visit) const {
    int before = 0;
    for (int s = job.first_stage; s < job.last_stage; ++s) {
      tile.barriers[place.slot].full.wait(place.phase);
      const uint32_t from = shared_address(tile.stage(place.slot));
      const uint64_t weights = swizzled_descriptor(from + at.group * 64 * kInt8Terms);
      const uint64_t tokens = swizzled_descriptor(from + Shape::kWeightBytes);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kInt8Terms / 32; ++i) {
        WgmmaInt8<kTokens>::run(d, weights + 2 * i, tokens + 2 * i, i > 0 || s > job.first_stage);
      }
      wgmma_commit();
      visit(s, place.slot);
      wgmma_wait<1>();
      if (s > job.first_stage) release(before);
      before = place.slot;
      place.advance();
    }
    wgmma_wait<0>();
    wgmma_hold(d);
    release(before);
  }

  // Adds the products of the outlier columns to d, the bits of floats.
  __device__ __forceinline__ void multiply_outliers(int outliers, const Int8Position& at,
                                                    Place& place, int (&d)[kSums]) const {
    for (int first = 0; first < outliers; first += Tile::Terms::kColumns) {
      tile.barriers[place.slot].full.wait(place.phase);
      const uint32_t from = shared_address(tile.stage(place.slot));
      const uint64_t weights = swizzled_descriptor(from + at.group * 64 * kInt8Terms);
      const uint64_t tokens = swizzled_descriptor(from + Shape::kWeightBytes);
      const int steps = Tile::Terms::steps(outliers - first);
      for (int i = 0; i < steps; ++i) {
        wgmma_fence();
        WgmmaShared<typename Tile::Terms::Term, kTokens>::run(d, advance_k(weights, i),
                                                              advance_k(tokens, i), true);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(d);
      }
      release(place.slot);
      place.advance();
    }
  }

  __device__ __forceinline__ void make(int maker) const {
    const Int8Position at(maker);
    const Int8ScaledMatmul& args = tile.task.args;
    wait_for_previous_kernel();
    const int outliers = tile.outlier_count();
    const Results results{tile};
    Place place;
    tile.for_each_tile([&](const Int8Job& job) {
      int d[kSums];
      if constexpr (Shape::kSplits) {
        const typename Results::Share share = results.share(job, maker);
        if constexpr (Shape::kOutliers) {
          Int8OutlierProducts<T, Shape> products{tile, job, at, maker};
          products.find();
          typename Int8OutlierProducts<T, Shape>::Values values;
          if (products.count > 0) products.load(0, values);
          auto collector = products.collector(0);
          multiply(job, at, place, d,
                   [&](int stage, int slot) { products.collect(stage, slot, collector); });
          named_barrier(Tile::kGroupBarrier, Shape::kMakers);  // the stages are no longer read
          results.keep(at, d, 0);
          if (outliers > 0) {
            float added[kSums];
            products.add_all(values, added);
            results.keep(at, added, Results::kAddedAt);
          }
        } else {
          multiply(job, at, place, d, [](int, int) {});
          named_barrier(Tile::kGroupBarrier, Shape::kMakers);
          results.keep(at, d, 0);
        }
        results.exchange(job, share, outliers > 0);
      } else {
        // Read long before they are needed.
        constexpr int kOwn = ceil_div(kTokens, kWarpgroup);
        float own_scales[kOwn];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const int token = job.token + at.thread + i * kWarpgroup;
          own_scales[i] = token < args.m ? args.row_stats[token] : 0.0f;
        }
        float features[2];
        float biases[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int feature = job.feature + 64 * at.group + 16 * at.warp + at.g + 8 * h;
          features[h] = feature < args.n ? args.col_stats[feature] : 0.0f;
          biases[h] = feature < args.n ? bias_at(args.bias, args.bias_dtype, feature) : 0.0f;
        }
        multiply(job, at, place, d, [](int, int) {});
        float* const scales =
            reinterpret_cast<float*>(tile.shared + Shape::kScalesAt + at.group * Shape::kScales);
        const float unit = outliers > 0 ? 1.0f / kInt8Max : kInt8Product;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          scales[at.thread + i * kWarpgroup] = __fmul_rn(own_scales[i], unit);
        }
        named_barrier(Tile::kGroupBarrier + at.group, kWarpgroup);
        const typename Results::Finish finish{
            scales, {features[0], features[1]}, {biases[0], biases[1]}};
        if (outliers == 0) {
          results.template store<false>(job, at, finish, d);
        } else {
          results.scale_tokens(at, finish, d);
          multiply_outliers(outliers, at, place, d);
          results.template store<true>(job, at, finish, d);
        }
      }
    });
  }
};

#endif  // BNB_HOPPER

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kResident)
    wgmma_int8_kernel(BNB_GRID_CONSTANT const Int8Maps maps,
                      BNB_GRID_CONSTANT const Int8Task task) {
#if BNB_HOPPER
  extern __shared__ char dynamic_shared[];
  __shared__ RingBarriers barriers[Shape::kStages];
  __shared__ TransactionBarrier granted[Shape::kStages];
  const int thread = static_cast<int>(threadIdx.x);
  char* const shared = dynamic_shared + (-shared_address(dynamic_shared) & 1023u);
  const Int8Tile<T, Shape> tile{task, shared, barriers, granted, cluster_rank()};
  const Int8Product<T, Shape> product{tile};
  if (thread == 0) {
    prefetch_map(maps.weights);
    prefetch_map(maps.tokens);
    for (RingBarriers& place : barriers) {
      place.full.init(1);
      // Warps that multiply, and the one that watches for outlier columns.
      const int readers = Shape::kMakers / kWarp + (task.watches ? 1 : 0);
      place.empty.init(readers * Shape::kFan);
    }
    for (TransactionBarrier& place : granted) place.init(1);
    fence_barrier_init();
  }
  __syncthreads();
  if (Shape::kFan > 1) cluster_barrier();
  let_next_kernel_start();
  if (thread >= Shape::kMakers) {
    if constexpr (!Shape::kSplits) give_registers<72>();
    if (thread >= Shape::kMakers + kWarp) {
      if constexpr (!Shape::kSplits) {
        Int8OutlierGatherer<T, Shape>{tile, maps.packed_tokens}.run(thread - Shape::kMakers -
                                                                    kWarp);
      }
    } else if (thread == Shape::kMakers) {
      product.copy(maps);
    }
    __syncwarp();
    if (Shape::kSplits) cluster_barrier();  // the one of exchange()
  } else {
    if constexpr (!Shape::kSplits) take_registers<216>();
    product.make(thread);
  }
  // Others may still arrive at this block's barriers, or read its sums.
  cluster_stay();
#endif
}

// ---- On the host -------------------------------------------------------------------------------

using Tokens16 = Int8Shape<16, 1, 1, 5, 4, true>;
using Tokens32 = Int8Shape<32, 1, 1, 4, 4, true>;
using Tokens64 = Int8Shape<64, 1, 1, 4, 3, true>;
// Where tiles are so few that memory is not busy, stages are many, and most tiles larger.
using FewTiles16 = Int8Shape<16, 1, 1, 7, 2, true>;
using FewTiles32 = Int8Shape<32, 2, 1, 8, 1, true>;
using FewTiles64 = Int8Shape<64, 2, 1, 8, 1, true>;
using FewTiles128 = Int8Shape<128, 2, 1, 6, 1, true>;
using Tokens128 = Int8Shape<128, 2, 4, 6, 1, false>;
using Tokens256 = Int8Shape<256, 2, 4, 4, 1, false>;

// A launch in clusters of blocks.
template <class Shape>
struct ClusterLaunch {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};

  ClusterLaunch(int clusters, int blocks) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = dim3(static_cast<unsigned>(clusters * blocks));
    config.blockDim = dim3(Shape::kThreads);
    config.dynamicSmemBytes = Shape::kShared;
    config.attrs = attributes;
    config.numAttrs = 2;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
};

template <class T, class Shape>
void start(const Int8Task& task, int clusters, int blocks, Stream stream) {
  constexpr auto kernel = wgmma_int8_kernel<T, Shape>;
  const Int8ScaledMatmul& args = task.args;
  const auto map_of = [](const void* matrix, int64_t rows, int64_t row_bytes, int tile_rows) {
    return tensor_map(matrix, rows, row_bytes, tile_rows, Swizzle::k128);
  };
  constexpr int kTokenRows = Shape::kTokens / Shape::kFan;
  Int8Maps maps;
  maps.tokens = map_of(args.a, args.m, args.k, kTokenRows);
  maps.weights = map_of(args.b, args.n, args.k, Shape::kFeatures);
  if (task.packed_tokens) {
    maps.packed_tokens = map_of(args.outlier_terms, args.m, kInt8Terms, kTokenRows);
  }
  allow_shared(reinterpret_cast<const void*>(kernel), Shape::kShared);
  ClusterLaunch<Shape> launch(clusters, blocks);
  launch.config.stream = static_cast<cudaStream_t>(stream.handle);
  BNB_GPU_CHECK(cudaLaunchKernelEx(&launch.config, kernel, maps, task));
}

constexpr int kMostSplits = 4;

// Clusters of so many blocks that run at a time. They are fewer than multiprocessors have room for:
// a cluster lies in a part of the processor, of which some are left over.
template <class Shape>
int clusters_at_a_time(int blocks) {
  static const std::array<int, kMostSplits> counts = [] {
    constexpr auto kernel = wgmma_int8_kernel<BFloat16, Shape>;
    allow_shared(reinterpret_cast<const void*>(kernel), Shape::kShared);
    std::array<int, kMostSplits> clusters{};
    for (int i = 0; i < kMostSplits; ++i) {
      const ClusterLaunch<Shape> launch(1, i + 1);
      BNB_GPU_CHECK(cudaOccupancyMaxActiveClusters(&clusters[i], kernel, &launch.config));
    }
    return clusters;
  }();
  return counts[blocks - 1];
}

// Whether the weight is larger than the cache of the processor.
bool exceeds_cache(const Int8ScaledMatmul& args) {
  int device = 0;
  int bytes = 0;
  BNB_GPU_CHECK(cudaGetDevice(&device));
  BNB_GPU_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device));
  return args.n * args.k > bytes;
}

template <class T, class Shape>
void run(const Int8ScaledMatmul& args, Stream stream) {
  Int8Task task{args,
                static_cast<int>(ceil_div(args.n, Shape::kFeatures * Shape::kFan)),
                static_cast<int>(ceil_div(args.m, Shape::kTokens)),
                1,
                !Shape::kSplits && args.outlier_terms != nullptr,
                args.n % kPackSize<T> == 0 && is_aligned(args.out, 16),
                args.follows_quantization,
                !Shape::kSplits && args.outliers != nullptr && exceeds_cache(args)};
  const int tiles = task.feature_tiles * task.token_tiles;
  if constexpr (Shape::kSplits) {
    constexpr int kLeastStages = 2;  // of a part
    const int stages = static_cast<int>(ceil_div(args.k, kInt8Terms));
    task.splits = Shape::kResident == 1 ? 2 : kMostSplits;  // blocks of their own have much to do
    while (task.splits > 1 && (stages < kLeastStages * task.splits ||
                               tiles > clusters_at_a_time<Shape>(task.splits))) {
      --task.splits;
    }
    start<T, Shape>(task, tiles, task.splits, stream);
  } else {
    const int clusters = std::min(tiles, multiprocessors() / Shape::kFan);
    start<T, Shape>(task, clusters, Shape::kFan, stream);
  }
}

template <class Shape>
void run(const Int8ScaledMatmul& args, Stream stream) {
  by_dtype(args.dtype, [&]<class T>() { run<T, Shape>(args, stream); });
}

// Whether tiles of 128 tokens end before those of 256: they fill the multiprocessors better, but
// take more copies.
bool prefers_small_tiles(const Int8ScaledMatmul& args) {
  const int64_t clusters = multiprocessors() / 2;
  const int64_t features = ceil_div(args.n, 256);
  const int64_t small = ceil_div(features * ceil_div(args.m, 128), clusters);
  const int64_t large = ceil_div(features * ceil_div(args.m, 256), clusters);
  return small * 58 < large * 100;
}

// Whether `splits` blocks can share each of these tiles.
template <class Shape>
bool can_split(const Int8ScaledMatmul& args, int splits) {
  const int64_t tiles =
      ceil_div(args.n, int64_t{Shape::kFeatures}) * ceil_div(args.m, int64_t{Shape::kTokens});
  return tiles <= clusters_at_a_time<Shape>(splits);
}

// Whether tiles are so few that these are the better ones: two blocks can share each, and there are
// too many features for all blocks of smaller tiles to have a multiprocessor of their own.
template <class Shape>
bool has_few_tiles(const Int8ScaledMatmul& args) {
  const int64_t smaller = ceil_div(args.n, int64_t{64});
  return can_split<Shape>(args, 2) &&
         (Shape::kTokens > 64 || smaller * kMostSplits > multiprocessors());
}

bool has_kernels() {
  if (!is_hopper()) return false;
  static const bool built =
      is_built(reinterpret_cast<const void*>(&wgmma_int8_kernel<BFloat16, Tokens16>));
  return built;
}

}  // namespace

bool wgmma_int8_serves(const Int8ScaledMatmul& args) {
  constexpr int64_t kMost = int64_t{1} << 30;
  return args.m > 0 && args.n > 0 && args.k > 0 && args.m < kMost && args.n < kMost &&
         args.k < kMost && args.k % 16 == 0 && is_aligned(args.a, 16) && is_aligned(args.b, 16) &&
         ceil_div(args.n, 64) * ceil_div(args.m, 64) < kMost && has_kernels();
}

int64_t wgmma_int8_outlier_terms_bytes(const Int8ScaledMatmul& args) {
  return args.m > Tokens64::kTokens ? args.m * kInt8Terms : 0;
}

void wgmma_int8(const Int8ScaledMatmul& args, Stream stream) {
  if (args.m <= 16) {
    return can_split<FewTiles16>(args, 3) ? run<FewTiles16>(args, stream)
                                          : run<Tokens16>(args, stream);
  }
  if (args.m <= 32) {
    return has_few_tiles<FewTiles32>(args) ? run<FewTiles32>(args, stream)
                                           : run<Tokens32>(args, stream);
  }
  if (args.m <= 64) {
    return has_few_tiles<FewTiles64>(args) ? run<FewTiles64>(args, stream)
                                           : run<Tokens64>(args, stream);
  }
  if (args.outliers == nullptr && has_few_tiles<FewTiles128>(args)) {
    return run<FewTiles128>(args, stream);
  }
  if (prefers_small_tiles(args)) return run<Tokens128>(args, stream);
  return run<Tokens256>(args, stream);
}

}  // namespace bnb::gpu

#else

namespace bnb::gpu {

bool wgmma_int8_serves(const Int8ScaledMatmul&) { return false; }
int64_t wgmma_int8_outlier_terms_bytes(const Int8ScaledMatmul&) { return 0; }
void wgmma_int8(const Int8ScaledMatmul&, Stream) {}

}  // namespace bnb::gpu

#endif  // BNB_BULK_COPIES
