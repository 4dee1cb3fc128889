// Whole tiles of the blockwise quantization kernels: every lane has a run of consecutive elements,
// and while a warp works on those of one tile, the next ones are on their way to shared memory.
//
// A run is so long that most quantization blocks lie in a few lanes, and that its codes are stored
// in whole 16-byte packs. Lanes fetch neighbouring packs, as memory likes it, and then read those
// of their run, of which each has P:
//
//     row 0: [lane 0 pack 0] ... [lane 0 pack P - 1][lane 1 pack 0] ...      8 packs, 128 bytes
//     row 1: ...
//
// Rows are as wide as the banks of shared memory. Pack c of row r lies at c ^ (r mod P), so that
// eight lanes that read the same pack of their runs find them in different banks.
// SPDX-License-Identifier: MIT
#pragma once

#include "gpu/device/tile.cuh"
#include "gpu/device/vector_io.cuh"
#include "gpu/runtime/runtime.cuh"

namespace bnb::gpu {

// Slots lie behind a kernel's static shared memory, whose size should be a multiple of this, so
// that no row is in two lines.
inline constexpr int kRunRow = 128;

// A tile of runs, one for each thread of a block.
template <class T, int kRun>
struct RunTile {
  static constexpr int kElements = kTileThreads * kRun;
  static constexpr int kPack = kPackSize<T>;
  static constexpr int kPacks = kRun / kPack;  // of a run
  static constexpr int kWarpBytes = kWarp * kPacks * 16;
  static constexpr int kSlots = 2;  // in shared memory
  static constexpr int kBytes = kSlots * kTileWarps * kWarpBytes;
  static_assert(kPacks == 2 || kPacks == 4 || kPacks == 8);
  static_assert(kElements >= kLargestBlock);

  // Shared memory beside the slots. Two buffers: the next tile may be written while slower warps
  // still read this one.
  struct Exchange {
    uint32_t warp_most[2][kTileWarps];
  };
};

// The absmax of a lane's quantization block, from that of its run. `lanes`: of the block, a power
// of two. Called by all threads of the block. `warp_most` [warps]: scratch.
__device__ __forceinline__ uint32_t reduce_runs(uint32_t most, int lanes, uint32_t* warp_most) {
  if (lanes < kWarp) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      most = max(most, shuffle_xor(most, distance));
    }
    return most;
  }
  most = warp_max(most);
  if (lanes == kWarp) return most;
  const int warps = lanes / kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (lane == 0) warp_most[warp] = most;
  __syncthreads();
  return warp_max(warp_most[(warp & ~(warps - 1)) + (lane & (warps - 1))]);
}

// For each run of the first `tiles` tiles of `a`, which lies on 16 bytes: stores the absmax of its
// quantization block, of at least kRun elements, and calls body(run, bits of the absmax, index of
// its first element). `slots` [RunTile::kBytes], `exchange`: shared memory. Called by all threads.
template <int kRun, class T, class Body>
__device__ __forceinline__ void for_each_run(const T* __restrict__ a,
                                             float* __restrict__ absmax,  // [blocks]
                                             int64_t tiles, int log2_block, char* slots,
                                             typename RunTile<T, kRun>::Exchange& exchange,
                                             const Body& body) {
  using Tile = RunTile<T, kRun>;
  constexpr int kPack = Tile::kPack;
  constexpr int kPacks = Tile::kPacks;
  using Run = Words<T, kRun>;
  using Pack16 = Words<T, kPack>;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  // Lane i fetches packs i, 32 + i ... of the warp's: four rows further down each time.
  const int row = lane / 8;
  const int fetched = row * 128 + ((lane % 8) ^ (row % kPacks)) * 16;
  const int first_pack = lane * kPacks;
  const int taken = first_pack / 8 * 128 + ((first_pack % 8) ^ (first_pack / 8 % kPacks)) * 16;
  const int64_t step = int64_t{gridDim.x} * Tile::kElements;
  int turns = static_cast<int>((tiles - blockIdx.x + gridDim.x - 1) / gridDim.x);
  if (blockIdx.x >= tiles) return;

  int to_fetch = turns;
  const T* next =
      a + int64_t{blockIdx.x} * Tile::kElements + (thread / kWarp) * (kWarp * kRun) + lane * kPack;
  const auto fetch = [&](char* slot) {
    if (to_fetch > 0) {
#pragma unroll
      for (int v = 0; v < kPacks; ++v) {
        // With eight packs a run, every other row is four columns off.
        const int place = kPacks == 8 && v % 2 == 1 ? fetched ^ 64 : fetched;
        start_copy<16>(slot + place + v * 512, next + v * (kWarp * kPack));
      }
    }
    close_copy_group();
    --to_fetch;
    next += step;
  };

  const int lanes = (1 << log2_block) / kRun;
  const bool first_of_block = (thread & (lanes - 1)) == 0;
  int64_t i = int64_t{blockIdx.x} * Tile::kElements + thread * kRun;
  float* own_absmax = absmax + (i >> log2_block);
  char* slot = slots + (thread / kWarp) * (Tile::kSlots * Tile::kWarpBytes);
  char* other_slot = slot + Tile::kWarpBytes;
  int buffer = 0;
  fetch(slot);
  for (; turns > 0; --turns) {
    sync_warp();  // the other slot is free
    fetch(other_slot);
    wait_copies<1>();
    sync_warp();
    Run run;
#pragma unroll
    for (int v = 0; v < kPacks; ++v) {
      const Pack16 pack = load_aligned<Pack16>(slot + (taken ^ (v * 16)));
#pragma unroll
      for (int w = 0; w < Pack16::kWords; ++w) run.words[v * Pack16::kWords + w] = pack.words[w];
    }
    const uint32_t most = reduce_runs(largest_magnitude(run), lanes, exchange.warp_most[buffer]);
    if (first_of_block) *own_absmax = absmax_from_bits(most);
    body(run, most, i);
    i += step;
    own_absmax += step >> log2_block;
    char* const done = slot;
    slot = other_slot;
    other_slot = done;
    buffer ^= 1;
  }
}

}  // namespace bnb::gpu
