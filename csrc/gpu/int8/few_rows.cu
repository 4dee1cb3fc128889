// LLM.int8(): quantization of few rows in one kernel, outlier columns included.
// SPDX-License-Identifier: MIT
//
// The blocks of a cluster share the columns: each has some neighbouring ones of all rows. So a
// block knows on its own which of its columns hold outliers, and what it has to tell the others is
// the largest magnitude of every row and how many outlier columns there are. It writes that into
// the shared memory of each, so that they wait for each other once.
#include "gpu/int8/few_rows.h"
#include "gpu/runtime/runtime.cuh"

#if BNB_BULK_COPIES

#include "bitsandbytes/blocks.h"
#include "gpu/device/dtype.cuh"
#include "gpu/device/tensor_copy.cuh"
#include "gpu/int8/rows.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {
namespace {

constexpr int kCluster = 8;  // blocks
constexpr int kThreads = 512;
constexpr int kMostRows = 32;
constexpr int kWordColumns = 32;    // of a word of marks
constexpr int kMostColumns = 8192;  // of a block

// Columns of a block, a multiple of those of a word.
constexpr int64_t columns_of_block(int64_t cols) {
  return ceil_div(cols, int64_t{kCluster} * kWordColumns) * kWordColumns;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize_few_rows_kernel(const T* __restrict__ a,             // [rows, cols]
                             int8_t* __restrict__ out,            // [rows, cols]
                             float* __restrict__ row_stats,       // [rows]
                             uint8_t* __restrict__ outlier_mask,  // [cols]
                             int32_t* __restrict__ outliers,      // [1 + cols] or null
                             int rows, int cols, int share, float threshold) {
#if BNB_HOPPER
  constexpr int kPack = kPackSize<T>;
  constexpr int kHeld = 8;
  constexpr int kWarps = kThreads / kWarp;
  using Row = Words<T, kPack>;
  __shared__ uint32_t marks[kMostColumns / kWordColumns];
  __shared__ uint32_t row_most[kMostRows];
  __shared__ float stats[kMostRows];
  __shared__ uint32_t all_most[kCluster][kMostRows];  // of every block
  __shared__ uint32_t all_marked[kCluster];
  static_assert(kCluster * kMostRows <= kThreads);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  const int rank = cluster_rank();
  const int first_col = min(rank * share, cols);
  const int width = min(share, cols - first_col);
  const int words = static_cast<int>(ceil_div(width, kWordColumns));
  for (int i = thread; i < words; i += kThreads) marks[i] = 0;
  if (thread < rows) row_most[thread] = 0;
  if (thread < kCluster) all_marked[thread] = 0;
  cluster_arrive();
  wait_for_previous_kernel();
  __syncthreads();

  // Each warp has every kWarps-th row, kWarp packs of it at a time.
  const int packs = width / kPack;
  const int steps = static_cast<int>(ceil_div(packs, kWarp));
  const int items = steps * static_cast<int>(ceil_div(max(rows - warp, 0), kWarps));
  struct Place {
    int row;
    int pack;
  };
  const Place begin{warp, lane};
  const auto advance = [&](Place& at) {
    at.pack += kWarp;
    if (at.pack < steps * kWarp) return;
    at.pack = lane;
    at.row += kWarps;
  };
  const auto load = [&](const Place& at) {
    Row none{};
    if (at.pack >= packs) return none;
    return load_aligned<Row>(a + int64_t{at.row} * cols + first_col + at.pack * kPack);
  };
  const auto look = [&](const Place& at, const Row& row) {
    uint32_t bits = 0;
    const uint32_t most =
        warp_max(largest_below<T>(row, threshold, [&](int i) { bits |= 1u << i; }));
    const int col = at.pack * kPack;
    if (bits != 0) atomicOr(&marks[col / kWordColumns], bits << col % kWordColumns);
    if (lane == 0) atomicMax(&row_most[at.row], most);
  };
  Row held[kHeld];
  Place at = begin;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (i < items) held[i] = load(at);
    advance(at);
  }
  const Place rest = at;
  at = begin;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (i < items) look(at, held[i]);
    advance(at);
  }
  // What the next kernel reads ahead would be in the way of these loads.
  let_next_kernel_start();
  for (int i = kHeld; i < items; ++i) {
    look(at, load(at));
    advance(at);
  }
  __syncthreads();
  cluster_wait();  // all blocks are there
  if (thread % kMostRows < rows && thread < kCluster * kMostRows) {
    const uint32_t* const to = &all_most[rank][thread % kMostRows];
    store_word_in_cluster(address_in_block(shared_address(to), thread / kMostRows),
                          row_most[thread % kMostRows]);
  }
  for (int i = thread; i < words; i += kThreads) {
    if (marks[i] == 0) continue;
    for (int b = 0; b < kCluster; ++b) {
      add_in_cluster(address_in_block(shared_address(&all_marked[rank]), b), bits_set(marks[i]));
    }
  }
  cluster_barrier();

  int before = 0;
  int total = 0;
#pragma unroll
  for (int b = 0; b < kCluster; ++b) {
    const int count = static_cast<int>(all_marked[b]);
    before += b < rank ? count : 0;
    total += count;
  }
  if (thread < rows) {
    uint32_t most = 0;
#pragma unroll
    for (int b = 0; b < kCluster; ++b) most = max(most, all_most[b][thread]);
    stats[thread] = absmax_from_bits(most);
    if (rank == 0) row_stats[thread] = stats[thread];
  }
  __syncthreads();
  const auto store = [&](const Place& at, const Row& row) {
    if (at.pack >= packs) return;
    Words<uint8_t, kPack> codes = RowScale(stats[at.row]).codes(row);
    const int col = at.pack * kPack;
    const uint32_t outlier = marks[col / kWordColumns] >> col % kWordColumns & ((1u << kPack) - 1);
    if (outlier != 0) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        if ((outlier >> i & 1u) != 0) codes.words[i / 4] &= ~(0xffu << i % 4 * 8);
      }
    }
    store_aligned(out + int64_t{at.row} * cols + first_col + col, codes);
  };
  at = begin;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (i < items) store(at, held[i]);
    advance(at);
  }
  at = rest;
  for (int i = kHeld; i < items; ++i) {
    store(at, load(at));
    advance(at);
  }

  for (int col = thread; col < width; col += kThreads) {
    outlier_mask[first_col + col] = marks[col / kWordColumns] >> col % kWordColumns & 1u;
  }
  if (outliers != nullptr) {
    if (rank == 0 && thread == 0) outliers[0] = total;
    for (int i = thread; i < words; i += kThreads) {
      if (marks[i] == 0) continue;
      int place = 1 + before;
      for (int j = 0; j < i; ++j) place += bits_set(marks[j]);
      for (int bit = 0; bit < kWordColumns; ++bit) {
        if ((marks[i] >> bit & 1u) == 0) continue;
        outliers[place++] = first_col + i * kWordColumns + bit;
      }
    }
  }
#endif
}

template <class T>
void quantize(const Int8VectorwiseQuant& args, Stream stream) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {kCluster, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kCluster);
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = attributes;
  config.numAttrs = 2;
  BNB_GPU_CHECK(cudaLaunchKernelEx(
      &config, quantize_few_rows_kernel<T>, static_cast<const T*>(args.a), args.out, args.row_stats,
      args.outlier_mask, args.outliers, static_cast<int>(args.rows), static_cast<int>(args.cols),
      static_cast<int>(columns_of_block(args.cols)), args.threshold));
}

bool has_kernels() {
  if (!is_hopper()) return false;
  static const bool built =
      is_built(reinterpret_cast<const void*>(&quantize_few_rows_kernel<BFloat16>));
  return built;
}

}  // namespace

bool cluster_quantizes(const Int8VectorwiseQuant& args) {
  // Without outlier columns the rows have nothing to tell each other.
  return args.outlier_mask != nullptr && args.rows <= kMostRows && args.cols % 16 == 0 &&
         columns_of_block(args.cols) <= kMostColumns && is_aligned(args.a, 16) &&
         is_aligned(args.out, 16) && has_kernels();
}

void quantize_few_rows(const Int8VectorwiseQuant& args, Stream stream) {
  by_dtype(args.dtype, [&]<class T>() { quantize<T>(args, stream); });
}

}  // namespace bnb::gpu

#else

namespace bnb::gpu {

bool cluster_quantizes(const Int8VectorwiseQuant&) { return false; }
void quantize_few_rows(const Int8VectorwiseQuant&, Stream) {}

}  // namespace bnb::gpu

#endif  // BNB_BULK_COPIES
