// Tiles of rows of groups, which only the device can count.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/kernels/grouped_gemm_4bit.h"
#include "gpu/runtime/runtime.cuh"

namespace bnb::gpu {

inline constexpr int64_t kMostGroups = 512;  // that are counted

// Counts the tiles of `rows` rows before each group, and behind the last. For all threads of a
// block.
__device__ __forceinline__ void count_group_tiles(const Groups& groups, int rows,
                                                  int (&before)[kMostGroups + 1]) {
  __shared__ int tiles[kMostGroups];
  const int count = static_cast<int>(groups.count);
  const int threads = static_cast<int>(blockDim.x);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += threads) {
    const int64_t size = groups.end(i) - groups.begin(i);
    tiles[i] = size > 0 ? static_cast<int>(ceil_div(size, rows)) : 0;
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i <= count; i += threads) {
    int sum = 0;
#pragma unroll 8
    for (int j = 0; j < i; ++j) sum += tiles[j];
    before[i] = sum;
  }
  __syncthreads();
}

// The group of a tile.
__device__ __forceinline__ int group_of_tile(const Groups& groups,
                                             const int (&before)[kMostGroups + 1], int tile) {
  int low = 0;
  for (int high = static_cast<int>(groups.count); high - low > 1;) {
    const int middle = (low + high) / 2;
    (before[middle] <= tile ? low : high) = middle;
  }
  return low;
}

}  // namespace bnb::gpu
