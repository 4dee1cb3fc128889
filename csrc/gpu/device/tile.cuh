// What the blockwise quantization kernels share: a tile of elements in registers, and the largest
// magnitude of every quantization block in it.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/blocks.h"
#include "gpu/device/vector_io.cuh"
#include "gpu/runtime/runtime.cuh"

namespace bnb::gpu {

inline constexpr int kTileThreads = 256;
inline constexpr int kTileWarps = kTileThreads / kWarp;
inline constexpr int kTileElements = kLargestBlock;  // a tile holds whole quantization blocks

// A tile is kSlices slices; in a slice each thread holds one 16-byte pack, threads in order:
//
//     slice 0: [thread 0 pack][thread 1 pack] ... [thread 255 pack]
//     slice 1: ...
//
// A quantization block is then a run of lanes, of warps, or of whole slices, and its maximum is
// reduced by shuffles, through shared memory, or over both.
template <class T>
struct Tile {
  static constexpr int kPack = kPackSize<T>;
  static constexpr int kSlice = kTileThreads * kPack;
  static constexpr int kSlices = kTileElements / kSlice;

  // Two buffers: the next tile may be written while slower warps still read this one.
  struct Exchange {
    uint32_t warp_most[2][kSlices][kTileWarps];
  };

  float x[kSlices][kPack];
  uint32_t most[kSlices];  // bits of the largest magnitude in the pack's quantization block

  // The first element of this thread in slice 0 of a tile.
  __device__ __forceinline__ static int64_t base_of(int64_t tile) {
    return tile * kTileElements + static_cast<int64_t>(threadIdx.x) * kPack;
  }

  // Elements from n on count as 0. `aligned`: a lies on 16 bytes.
  __device__ __forceinline__ void load(const T* __restrict__ a,  // [n]
                                       int64_t n, int64_t tile, bool aligned) {
    const int64_t base = base_of(tile);
    Words<T, kPack> words[kSlices];
    if (aligned && (tile + 1) * kTileElements <= n) {
#pragma unroll
      for (int v = 0; v < kSlices; ++v) {
        words[v] = load_aligned<Words<T, kPack>>(a + base + v * kSlice);
      }
    } else {
#pragma unroll
      for (int v = 0; v < kSlices; ++v) {
        const int64_t i = base + v * kSlice;
        words[v] = load_words<T, kPack>(a + i, n - i);
      }
    }
#pragma unroll
    for (int v = 0; v < kSlices; ++v) {
      float largest = 0.0f;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        x[v][j] = words[v].get(j);
        largest = absmax_step(largest, x[v][j]);
      }
      most[v] = magnitude_bits(largest);
    }
  }

  // Makes `most` that of whole quantization blocks. Called by all threads; `buffer` is 0 at first
  // and kept between tiles.
  __device__ __forceinline__ void reduce(int block_size, Exchange& exchange, int& buffer) {
    if (block_size < kWarp * kPack) {
#pragma unroll
      for (int v = 0; v < kSlices; ++v) {
        for (int lanes = block_size / kPack / 2; lanes > 0; lanes /= 2) {
          most[v] = max(most[v], shuffle_xor(most[v], lanes));
        }
      }
      return;
    }
#pragma unroll
    for (int v = 0; v < kSlices; ++v) most[v] = warp_max(most[v]);
    if (block_size == kWarp * kPack) return;
    const int slices = max(block_size / kSlice, 1);
    if (slices > 1) {
#pragma unroll
      for (int v = 1; v < kSlices; ++v) {
        if (v % slices != 0) most[v] = max(most[v], most[v - 1]);
      }
    }
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (lane == 0) {
#pragma unroll
      for (int v = 0; v < kSlices; ++v) exchange.warp_most[buffer][v][warp] = most[v];
    }
    __syncthreads();
    // Each lane reads one of the block's warps; the last of the block's slices holds the most.
    const int warps = min(block_size / (kWarp * kPack), kTileWarps);
    const int source = (warp & ~(warps - 1)) + (lane & (warps - 1));
#pragma unroll
    for (int v = 0; v < kSlices; ++v) {
      most[v] = warp_max(exchange.warp_most[buffer][v | (slices - 1)][source]);
    }
    buffer ^= 1;
  }
};

}  // namespace bnb::gpu
