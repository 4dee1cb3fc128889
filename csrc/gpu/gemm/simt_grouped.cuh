// Products of groups of rows with a 4-bit weight for each group, without tensor cores: any shape,
// dtype and block size, on any GPU.
// SPDX-License-Identifier: MIT
//
// The host does not know where groups end. Cut into tiles of R rows, group g has ceil(m / R), and
// its first is number b / R + g, where b rows lie before the group. No two groups claim the same
// number, and all are below rows / R + groups + 1, rows of no group being the last one: so
// many blocks of threads are started, and each finds its group by looking at all ends at once.
#pragma once

#include "bitsandbytes/kernels/grouped_gemm_4bit.h"
#include "gpu/gemm/simt.cuh"

namespace bnb::gpu {

// Rows of a tile, of one group.
struct GroupTile {
  int64_t group;  // Groups::count for rows of none
  int64_t row;    // the first, counted from the beginning of the group
};

inline int64_t most_group_tiles(const Groups& groups, int64_t tile_rows) {
  return groups.rows / tile_rows + groups.count + 1;
}

// Called by all lanes of a warp. The row may lie behind the end of the group: then there is nothing
// to do.
__device__ __forceinline__ GroupTile find_group_tile(const Groups& groups, int tile_rows,
                                                     int64_t number) {
  const auto first_of = [&](int64_t group) { return groups.begin(group) / tile_rows + group; };
  int64_t before = 0;  // groups whose tiles begin at `number` or before it, and rows of none
  for (int64_t i = 0; i <= groups.count; i += kWarp) {
    const int64_t group = i + threadIdx.x % kWarp;
    before += bits_set(warp_ballot(group <= groups.count && first_of(group) <= number));
  }
  const int64_t group = before - 1;
  const int64_t tile = number - first_of(group);
  return {group, tile >= 0 ? tile * tile_rows : groups.rows};  // negative where ends do not ascend
}

// Writes zeros to rows of no group, from `row` on: a block of threads per tile of columns.
template <class T>
__device__ __forceinline__ void clear_tile(const Groups& groups, void* out, int64_t row,
                                           int tile_rows, int64_t cols, int64_t first_col,
                                           int tile_cols) {
  const int64_t begin = groups.begin(groups.count) + row;
  for (int i = static_cast<int>(threadIdx.x); i < tile_rows * tile_cols;
       i += static_cast<int>(blockDim.x)) {
    const int64_t at = begin + i / tile_cols;
    const int64_t col = first_col + i % tile_cols;
    if (at < groups.rows && col < cols) static_cast<T*>(out)[at * cols + col] = narrow<T>(0.0f);
  }
}

// As gemm_4bit_rows_kernel for each group.
template <class T, int kRows, bool kNested>
__global__ void __launch_bounds__(kSimtWarps* kWarp)
    grouped_gemm_4bit_rows_kernel(BNB_GRID_CONSTANT const GroupedGemm4bit args,
                                  BNB_GRID_CONSTANT const Levels4 levels, int log2_block,
                                  bool aligned, int64_t tiles) {
  __shared__ float shared_levels[kCode4Levels];
  __shared__ float shared_code[kNested ? kCodeLevels : 1];
  const ScaleReader<kNested> scale_of(args.weight.scales, shared_code);
  if (threadIdx.x < kCode4Levels) shared_levels[threadIdx.x] = levels[threadIdx.x];
  __syncthreads();

  const SimtWeight<kNested> weight{args.weight.codes, shared_levels, scale_of, log2_block};
  const int64_t first_col = int64_t{blockIdx.x} * kSimtWarps;
  const int64_t col = first_col + threadIdx.x / kWarp;
  const int64_t n = args.weight.n;
  for (int64_t number = blockIdx.y; number < tiles; number += gridDim.y) {
    const GroupTile tile = find_group_tile(args.groups, kRows, number);
    if (tile.group == args.groups.count) {
      clear_tile<T>(args.groups, args.out, tile.row, kRows, n, first_col, kSimtWarps);
    } else {
      const Gemm4bit product = product_of(args, tile.group);
      if (tile.row < product.m && col < n) {
        multiply_rows<T, kRows>(product, weight, tile.row, col, aligned);
      }
    }
  }
}

// As gemm_4bit_tile_kernel for each group. `Arguments`: of the forward or of the backward product.
template <class T, bool kNested, bool kBackward, class Arguments>
__global__ void __launch_bounds__(kSimtThreads)
    grouped_gemm_4bit_tile_kernel(BNB_GRID_CONSTANT const Arguments args,
                                  BNB_GRID_CONSTANT const Levels4 levels, int log2_block,
                                  bool aligned_weight, bool aligned_a, int64_t tiles) {
  __shared__ float shared_levels[kCode4Levels];
  __shared__ float shared_code[kNested ? kCodeLevels : 1];
  alignas(16) __shared__ SimtTile shared_tile;
  const ScaleReader<kNested> scale_of(args.weight.scales, shared_code);
  if (threadIdx.x < kCode4Levels) shared_levels[threadIdx.x] = levels[threadIdx.x];

  const SimtWeight<kNested> weight{args.weight.codes, shared_levels, scale_of, log2_block};
  const int64_t col = int64_t{blockIdx.x} * kSimtTileCols;
  for (int64_t number = blockIdx.y; number < tiles; number += gridDim.y) {
    const GroupTile tile = find_group_tile(args.groups, kSimtTileRows, number);
    if (tile.group == args.groups.count) {
      const int64_t cols = kBackward ? args.weight.k : args.weight.n;
      clear_tile<T>(args.groups, args.out, tile.row, kSimtTileRows, cols, col, kSimtTileCols);
    } else {
      const SimtProduct product = simt_product(product_of(args, tile.group));
      if (tile.row < product.m) {
        multiply_tile<T, kBackward>(product, weight, tile.row, col, aligned_weight, aligned_a,
                                    shared_tile);
      }
    }
  }
}

inline unsigned grid_rows(int64_t tiles) {
  return static_cast<unsigned>(std::min(tiles, kMostGridRows));
}

template <class T, bool kNested>
void launch_grouped_rows(const GroupedGemm4bit& args, Stream stream) {
  constexpr int kRows = 4;
  const int64_t tiles = most_group_tiles(args.groups, kRows);
  const dim3 grid(static_cast<unsigned>(ceil_div(args.weight.n, kSimtWarps)), grid_rows(tiles));
  launch("grouped_gemm_4bit_rows_kernel", grouped_gemm_4bit_rows_kernel<T, kRows, kNested>, grid,
         kSimtWarps * kWarp, 0, stream, args, Levels4(args.weight), log2_of(args.weight.block_size),
         has_word_rows(args.weight) && is_aligned(args.a, 16), tiles);
}

template <class T, bool kNested, bool kBackward, class Arguments>
void launch_grouped_tiles(const Arguments& args, const void* a, Stream stream) {
  const Weight4bit& w = args.weight;
  const int64_t cols = kBackward ? w.k : w.n;
  const int64_t terms = kBackward ? w.n : w.k;
  const int64_t tiles = most_group_tiles(args.groups, kSimtTileRows);
  const dim3 grid(static_cast<unsigned>(ceil_div(cols, kSimtTileCols)), grid_rows(tiles));
  launch("grouped_gemm_4bit_tile_kernel",
         grouped_gemm_4bit_tile_kernel<T, kNested, kBackward, Arguments>, grid, kSimtThreads, 0,
         stream, args, Levels4(w), log2_of(w.block_size), has_word_rows(w),
         terms % kSimtSpan == 0 && is_aligned(a, 16), tiles);
}

template <class T, bool kNested>
void simt_grouped_gemm_4bit(const GroupedGemm4bit& args, Stream stream) {
  // The number of rows that a group has on average, as far as the host knows.
  if (args.groups.rows <= kMostSimtRows * args.groups.count) {
    return launch_grouped_rows<T, kNested>(args, stream);
  }
  launch_grouped_tiles<T, kNested, false>(args, args.a, stream);
}

template <class T, bool kNested>
void simt_grouped_gemm_4bit_dgrad(const GroupedGemm4bitDgrad& args, Stream stream) {
  launch_grouped_tiles<T, kNested, true>(args, args.grad, stream);
}

}  // namespace bnb::gpu
