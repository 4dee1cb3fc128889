// Outlier columns of the layer on Hopper's tensor cores, as stages of 16-bit numbers.
// SPDX-License-Identifier: MIT
#pragma once

#include "gpu/int8/wgmma_tile.cuh"

#if BNB_HOPPER

namespace bnb::gpu {

// Part 0, 1 or 2 of a number that is their sum, eight significant bits each.
__device__ __forceinline__ BFloat16 part_of(float x, int part) {
  const auto leading = [](float y) { return bits_float(float_bits(y) & 0xffff0000u); };
  if (!(fabsf(x) <= kFloatMax)) return part == 0 ? narrow<BFloat16>(x) : BFloat16{0};
  for (int i = 0; i < part; ++i) x = __fsub_rn(x, leading(x));
  return {static_cast<uint16_t>(float_bits(x) >> 16)};
}

// The warps beside the one that starts the copies.
template <class T, class Shape>
struct Int8OutlierGatherer {
  using Tile = Int8Tile<T, Shape>;
  using Slab = typename Tile::Slab;
  using SlabPack = typename Tile::SlabPack;

  const Tile& tile;

  // Gathers outlier columns of the weights and of the tokens, with zeros for the other terms of a
  // stage. The first of them are read while the tensor cores are busy with the tile, and wait in
  // shared memory for their place in the ring.
  __device__ __forceinline__ void run(int thread) const {
    constexpr int kGatherers = Shape::kCopiers - kWarp;
    constexpr int kHeld = Shape::kHeldPacks;
    const int outliers = tile.outlier_count();
    if (outliers == 0) return;
    const int slabs = tile.slab_count(outliers);
    SlabPack* const held = reinterpret_cast<SlabPack*>(tile.shared + Shape::kHeldAt);
    typename Tile::Place place;
    tile.for_each_tile([&](const Int8Job& job) {
      place.advance(job.last_stage - job.first_stage);
      if (job.split > 0) return;
      for (int i = 0; i < slabs * tile.rounds(slabs); ++i) {
        const int first = i % slabs * Tile::kSlabColumns;
        const int columns = min(Tile::kSlabColumns, outliers - first);
#pragma unroll 1
        for (int pack = 0; pack < kHeld; ++pack) {
          const SlabColumns at = columns_of(first, columns, pack);
#pragma unroll 2
          for (int line = thread; line < Shape::kLines; line += kGatherers) {
            held[line * kHeld + pack] = read_slab(job, line, at, pack);
          }
        }
        __syncwarp();
        named_barrier(Tile::kCopyBarrier, Shape::kCopiers);  // the place is free
        char* const to = tile.stage(place.slot);
#pragma unroll 1
        for (int pack = 0; pack < Tile::kSlabTerms / 8; ++pack) {
          const SlabColumns at = columns_of(first, columns, pack);
#pragma unroll 1
          for (int line = thread; line < Shape::kLines; line += kGatherers) {
            store_aligned(to + swizzled(line, pack), pack < kHeld ? held[line * kHeld + pack]
                                                                  : read_slab(job, line, at, pack));
          }
        }
        fence_shared_for_async();
        __syncwarp();
        named_barrier(Tile::kCopyBarrier, Shape::kCopiers);  // the columns are there
        place.advance();
      }
    });
  }

  // The columns of eight terms, of which `present` are there; the others are like the last.
  struct SlabColumns {
    int present;
    int at[8];
  };
  __device__ __forceinline__ SlabColumns columns_of(int first, int columns, int pack) const {
    SlabColumns result{};
    result.present = min(columns * Tile::kParts - 8 * pack, 8);
    if (result.present <= 0) return result;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int column = min((8 * pack + e) / Tile::kParts, columns - 1);
      result.at[e] = tile.task.args.outliers[1 + first + column];
    }
    return result;
  }

  // Eight terms of a line: of a feature, or, after all features, of a token. Lines beyond the last
  // of the matrix are like the last: nobody sees their results.
  __device__ __forceinline__ SlabPack read_slab(const Int8Job& job, int line,
                                                const SlabColumns& columns, int pack) const {
    const Int8ScaledMatmul& args = tile.task.args;
    Slab terms[8] = {};
    if (columns.present > 0) {
      if (line < Shape::kFeatures) {
        const int64_t row = min(int64_t{job.feature} + line, args.n - 1);
        int8_t codes[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) codes[e] = args.b[row * args.k + columns.at[e]];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (e < columns.present) terms[e] = narrow<Slab>(static_cast<float>(codes[e]));
        }
      } else {
        const int64_t row = min(int64_t{job.token} + line - Shape::kFeatures, args.m - 1);
        T values[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          values[e] = static_cast<const T*>(args.values)[row * args.k + columns.at[e]];
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (e >= columns.present) continue;
          if constexpr (Tile::kParts == 1) {
            terms[e] = values[e];
          } else {
            terms[e] = part_of(values[e], (8 * pack + e) % Tile::kParts);
          }
        }
      }
    }
    return SlabPack(terms);
  }
};

}  // namespace bnb::gpu

#endif  // BNB_HOPPER
