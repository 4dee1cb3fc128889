// Outlier columns of the layer on Hopper's tensor cores, as stages of 16-bit terms.
// SPDX-License-Identifier: MIT
#pragma once

#include "gpu/int8/wgmma_tile.cuh"

#if BNB_HOPPER

namespace bnb::gpu {

// The warps beside the one that starts the copies. Stages of outlier columns are theirs: they
// gather the codes of the weights and, unless those of the first stage have been packed before, the
// values of the tokens.
template <class T, class Shape>
struct Int8OutlierGatherer {
  using Tile = Int8Tile<T, Shape>;
  using Terms = typename Tile::Terms;
  using SlabPack = typename Tile::SlabPack;
  static constexpr int kGatherers = Shape::kCopiers - kWarp;
  static constexpr int kFeatures = Shape::kFeatures;

  const Tile& tile;
  const TensorMap& packed_tokens;

  __device__ __forceinline__ void run(int thread) const {
    const Int8ScaledMatmul& args = tile.task.args;
    int* const columns = reinterpret_cast<int*>(tile.shared + Shape::kColumnsAt);
    wait_for_previous_kernel();
    if (args.outliers == nullptr) return;
    // The number and the first columns are read at once.
    const int outliers = args.outliers[0];
    const auto list = [&](int first) {
      for (int i = thread; i < Terms::kColumns; i += kGatherers) {
        if (first + i < args.k) columns[i] = args.outliers[1 + first + i];
      }
      __syncwarp();
      named_barrier(Tile::kCopyBarrier, kGatherers);
    };
    list(0);
    int listed = 0;
    typename Tile::Place place;
    uint32_t grants = 0;  // parities, by stage
    tile.for_each_tile([&](const Int8Job& job) {
      place.advance(job.last_stage - job.first_stage);
      if (job.split > 0) return;
      for (int first = 0; first < outliers; first += Terms::kColumns) {
        if (listed != first) list(first);
        listed = first;
        const int count = min(Terms::kColumns, outliers - first);
        const bool packed = first == 0 && tile.task.packed_tokens;
        // The codes are read while the tensor cores are busy with the tile.
        if constexpr (!Shape::kSplits) hold_codes(job, columns, count, thread);
        tile.granted[place.slot].wait(grants >> place.slot & 1u);
        grants ^= 1u << place.slot;
        __syncwarp();
        fill(job, tile.stage(place.slot), columns, count, packed, thread);
        fence_shared_for_async();
        __syncwarp();
        named_barrier(Tile::kCopyBarrier, kGatherers);
        if (thread == 0) {
          TransactionBarrier& full = tile.barriers[place.slot].full;
          if (packed) {
            full.arrive_and_expect(Shape::kTokenBytes);
            tile.copy_tokens(place.slot, packed_tokens, 0, job.token);
          } else {
            full.arrive();
          }
        }
        place.advance();
      }
    });
  }

  __device__ __forceinline__ uint32_t* held() const {  // [features, 64 columns] of codes
    return reinterpret_cast<uint32_t*>(tile.shared + Shape::kHeldAt);
  }

  __device__ __forceinline__ int8_t code_at(const Int8Job& job, int line, int column) const {
    // Lines beyond the last of the matrix are like the last: nobody sees their results.
    const int64_t row = min(int64_t{job.feature} + line, tile.task.args.n - 1);
    return tile.task.args.b[row * tile.task.args.k + column];
  }

  __device__ __forceinline__ void hold_codes(const Int8Job& job, const int* columns, int count,
                                             int thread) const {
    const int words = (count + 3) / 4;
#pragma unroll 4
    for (int i = thread; i < words * kFeatures; i += kGatherers) {
      const int line = i % kFeatures;
      const int word = i / kFeatures;
      uint32_t codes = 0;
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const int column = columns[min(4 * word + b, count - 1)];
        codes |= static_cast<uint32_t>(static_cast<uint8_t>(code_at(job, line, column))) << 8 * b;
      }
      held()[word * kFeatures + line] = codes;
    }
    __syncwarp();
    named_barrier(Tile::kCopyBarrier, kGatherers);
  }

  // Terms of the weights and, unless they are packed, of the tokens, with zeros up to a multiple of
  // 16 terms.
  __device__ __forceinline__ void fill(const Int8Job& job, char* stage, const int* columns,
                                       int count, bool packed, int thread) const {
    const int lines = packed ? kFeatures : Shape::kLines;
    const int packs = 2 * Terms::steps(count);
    constexpr int kAhead = Shape::kSplits ? 3 : 1;
#pragma unroll kAhead
    for (int i = thread; i < packs * lines; i += kGatherers) {
      const int line = i % lines;
      const int pack = i / lines;
      store_aligned(stage + swizzled(line, pack),
                    line < kFeatures ? code_terms(job, line, columns, count, pack)
                                     : value_terms(job, line - kFeatures, columns, count, pack));
    }
  }

  __device__ __forceinline__ SlabPack code_terms(const Int8Job& job, int line, const int* columns,
                                                 int count, int pack) const {
    int8_t codes[8];
    if (8 * pack >= count * Terms::kParts) return SlabPack({});
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int place = min((8 * pack + e) / Terms::kParts, count - 1);
      if constexpr (Shape::kSplits) {
        codes[e] = code_at(job, line, columns[place]);
      } else {
        codes[e] =
            reinterpret_cast<const int8_t*>(held())[4 * (place / 4 * kFeatures + line) + place % 4];
      }
    }
    typename Terms::Term terms[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const bool there = 8 * pack + e < count * Terms::kParts;
      terms[e] = there ? Terms::of_code(codes[e]) : typename Terms::Term{};
    }
    return SlabPack(terms);
  }

  __device__ __forceinline__ SlabPack value_terms(const Int8Job& job, int line, const int* columns,
                                                  int count, int pack) const {
    const Int8ScaledMatmul& args = tile.task.args;
    const int64_t row = min(int64_t{job.token} + line, args.m - 1);
    T values[8];
    if (8 * pack >= count * Terms::kParts) return SlabPack({});
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int place = min((8 * pack + e) / Terms::kParts, count - 1);
      values[e] = static_cast<const T*>(args.values)[row * args.k + columns[place]];
    }
    typename Terms::Term terms[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const bool there = 8 * pack + e < count * Terms::kParts;
      terms[e] = there ? Terms::of_value(values[e], (8 * pack + e) % Terms::kParts)
                       : typename Terms::Term{};
    }
    return SlabPack(terms);
  }
};

}  // namespace bnb::gpu

#endif  // BNB_HOPPER
