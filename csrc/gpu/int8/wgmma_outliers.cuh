// Outlier columns of the layer on Hopper's tensor cores, as stages of 16-bit terms.
// SPDX-License-Identifier: MIT
#pragma once

#include "gpu/int8/wgmma_tile.cuh"

#if BNB_HOPPER

namespace bnb::gpu {

// ---- Large tiles -------------------------------------------------------------------------------

// The warps beside the one that starts the copies. Stages of outlier columns are theirs: they
// gather the codes of the weights and, unless those of the first stage have been packed before, the
// values of the tokens. A column lies in as many places of memory as there are features: where the
// weight is larger than the cache, the first of these warps takes the codes of the first columns
// from the stages that pass. Otherwise that would only keep the stages longer.
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
      if (listed != 0) list(0);
      listed = 0;
      if (tile.task.watches && thread < kWarp) {
        watch(job, columns, min(Terms::kColumns, outliers), thread, place);
      } else {
        place.advance(job.last_stage - job.first_stage);
      }
      if (tile.task.watches) named_barrier(Tile::kCopyBarrier, kGatherers);
      for (int first = 0; first < outliers; first += Terms::kColumns) {
        if (listed != first) list(first);
        listed = first;
        const int count = min(Terms::kColumns, outliers - first);
        const bool packed = first == 0 && tile.task.packed_tokens;
        // The codes are read while the tensor cores are busy with the tile.
        if (first > 0 || !tile.task.watches) hold_codes(job, columns, count, thread);
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
          if (tile.task.watches) release(place.slot);
        }
        place.advance();
      }
    });
  }

  // One warp: holds the codes of listed columns.
  __device__ __forceinline__ void watch(const Int8Job& job, const int* columns, int count, int lane,
                                        typename Tile::Place& place) const {
    int next = 0;
    for (int s = job.first_stage; s < job.last_stage; ++s) {
      tile.barriers[place.slot].full.wait(place.phase);
      for (; next < count && columns[next] < (s + 1) * kInt8Terms; ++next) {
        const int term = columns[next] % kInt8Terms;
        for (int line = lane; line < kFeatures; line += kWarp) {
          reinterpret_cast<char*>(held())[4 * (next / 4 * kFeatures + line) + next % 4] =
              tile.stage(place.slot)[swizzled(line, term / 16) + term % 16];
        }
      }
      __syncwarp();
      if (lane == 0) release(place.slot);
      place.advance();
    }
  }

  __device__ __forceinline__ void release(int slot) const {
#pragma unroll
    for (int f = 0; f < Shape::kFan; ++f) tile.barriers[slot].empty.arrive_at(f);
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
    for (int i = thread; i < packs * lines; i += kGatherers) {
      const int line = i % lines;
      const int pack = i / lines;
      store_aligned(stage + swizzled(line, pack),
                    line < kFeatures ? code_terms(line, count, pack)
                                     : value_terms(job, line - kFeatures, columns, count, pack));
    }
  }

  __device__ __forceinline__ SlabPack code_terms(int line, int count, int pack) const {
    int8_t codes[8];
    if (8 * pack >= count * Terms::kParts) return SlabPack({});
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int place = min((8 * pack + e) / Terms::kParts, count - 1);
      codes[e] =
          reinterpret_cast<const int8_t*>(held())[4 * (place / 4 * kFeatures + line) + place % 4];
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

// ---- Tiles whose terms are shared --------------------------------------------------------------

// The warps that multiply have so few sums that they multiply outlier columns themselves, with
// operands in registers. Codes of the weights they take from the stages that pass: a column lies in
// as many places of memory as there are features, and to read it once more, from there, would take
// longer than a stage does. Values are read before the first stage has come.
template <class T, class Shape>
struct Int8OutlierProducts {
  using Tile = Int8Tile<T, Shape>;
  using Terms = typename Tile::Terms;
  using Term = typename Terms::Term;
  static constexpr int kFeatures = Shape::kFeatures;
  static constexpr int kGroups = Shape::kTokens / 8;
  static constexpr int kOwn = 4;           // terms of a thread in a step: 2 t, + 1, + 8 and + 9
  static constexpr int kHeldColumns = 64;  // more are read from memory
  static_assert(kFeatures <= Shape::kMakers && kHeldColumns <= Shape::kMakers);

  const Tile& tile;
  const Int8Job& job;
  const Int8Position& at;
  int maker;
  int first = 0;  // of the list, in this block's range of terms
  int count = 0;

  __device__ __forceinline__ int* columns() const {
    return reinterpret_cast<int*>(tile.shared + Shape::kColumnsAt);
  }
  __device__ __forceinline__ int8_t* held() const {  // [column][feature]
    return reinterpret_cast<int8_t*>(tile.shared + Shape::kHeldAt);
  }
  __device__ __forceinline__ int terms() const { return count * Terms::kParts; }

  // Finds the outlier columns of this block's range.
  __device__ __forceinline__ void find() {
    const Int8ScaledMatmul& args = tile.task.args;
    if (args.outliers == nullptr) return;
    // Not for the number of columns to be read first: there is room for as many as there are.
    const int own = args.outliers[1 + min(int64_t{maker}, args.k - 1)];
    const int outliers = args.outliers[0];
    if (tile.task.splits == 1) {
      count = outliers;
      if (maker < min(count, kHeldColumns)) columns()[maker] = own;
      named_barrier(Tile::kGroupBarrier, Shape::kMakers);
      return;
    }
    int* const bounds = columns() + kHeldColumns;
    const auto each = [&](const auto& visit) {
      for (int i = maker; i < outliers; i += Shape::kMakers) {
        visit(i, i == maker ? own : args.outliers[1 + i]);
      }
    };
    if (maker < 2) bounds[maker] = 0;
    named_barrier(Tile::kGroupBarrier, Shape::kMakers);
    each([&](int, int column) {
      if (column < job.first_stage * kInt8Terms) atomicAdd(&bounds[0], 1);
      if (column < job.last_stage * kInt8Terms) atomicAdd(&bounds[1], 1);
    });
    named_barrier(Tile::kGroupBarrier, Shape::kMakers);
    first = bounds[0];
    count = bounds[1] - first;
    each([&](int i, int column) {
      const int place = i - first;
      if (place >= 0 && place < min(count, kHeldColumns)) columns()[place] = column;
    });
    named_barrier(Tile::kGroupBarrier, Shape::kMakers);
  }

  __device__ __forceinline__ int column(int place) const {
    if (place < kHeldColumns) return columns()[place];
    return tile.task.args.outliers[1 + first + place];
  }

  // What holds codes of the stages to come.
  struct Collector {
    int next;    // column
    int column;  // its number
  };

  __device__ __forceinline__ Collector collector(int next) const {
    return {next, next < min(count, kHeldColumns) ? columns()[next] : 0x7fffffff};
  }

  // Takes the codes of a stage that is in place `slot`; called by all threads.
  __device__ __forceinline__ void collect(int stage, int slot, Collector& at_column) const {
    while (at_column.column < (stage + 1) * kInt8Terms) {
      const int term = at_column.column % kInt8Terms;
      if (maker < kFeatures) {
        held()[at_column.next * kFeatures + maker] = reinterpret_cast<const int8_t*>(
            tile.stage(slot))[swizzled(maker, term / 16) + term % 16];
      }
      __syncwarp();  // all have read when one lets the stage go
      at_column = collector(at_column.next + 1);
    }
  }

  __device__ __forceinline__ int term(int step, int e) const {
    return step + 2 * at.t + e % 2 + e / 2 * 8;
  }

  // Of 16 terms, and of tokens g, 8 + g ...
  using Values = T[kGroups][kOwn];
  __device__ __forceinline__ void load(int step, Values& values) const {
    const Int8ScaledMatmul& args = tile.task.args;
    // Or the compiler would keep the addresses of one step for the next, over the whole product.
    const int line = static_cast<int>(hide_origin(static_cast<uint32_t>(at.g)));
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
      const bool there = term(step, e) < terms();
      const int64_t col = there ? column(term(step, e) / Terms::kParts) : 0;
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        const int64_t row = min(int64_t{job.token} + 8 * j + line, args.m - 1);
        values[j][e] = there ? static_cast<const T*>(args.values)[row * args.k + col] : T{};
      }
    }
  }

  __device__ __forceinline__ uint32_t code(int step, int h, int e) const {
    if (term(step, e) >= terms()) return 0;
    const int place = term(step, e) / Terms::kParts;
    const int line = 64 * at.group + 16 * at.warp + at.g + 8 * h;
    if (place < kHeldColumns) return Terms::of_code(held()[place * kFeatures + line]).bits;
    const Int8ScaledMatmul& args = tile.task.args;
    const int64_t row = min(int64_t{job.feature} + line, args.n - 1);
    return Terms::of_code(args.b[row * args.k + column(place)]).bits;
  }

  // Adds the products of 16 terms to `sums`.
  __device__ __forceinline__ void add(int step, const Values& values,
                                      float (&sums)[Shape::kSums]) const {
    uint32_t codes[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      codes[i] = code(step, i % 2, i / 2 * 2) | code(step, i % 2, i / 2 * 2 + 1) << 16;
    }
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      uint32_t pairs[2];
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const auto bits = [&](int e) {
          return uint32_t{Terms::of_value(values[j][e], term(step, e) % Terms::kParts).bits};
        };
        pairs[p] = bits(2 * p) | bits(2 * p + 1) << 16;
      }
      float d[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) d[i] = sums[4 * j + i];
      multiply_add_16x8x16<Term>(d, codes, pairs[0], pairs[1]);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[4 * j + i] = d[i];
    }
  }

  // The products of all columns, where `values` are those of the first step.
  __device__ __forceinline__ void add_all(Values& values, float (&sums)[Shape::kSums]) const {
#pragma unroll
    for (float& sum : sums) sum = 0.0f;
    for (int step = 0; step < terms(); step += Terms::kStep) {
      if (step > 0) load(step, values);
      add(step, values, sums);
    }
  }
};

}  // namespace bnb::gpu

#endif  // BNB_HOPPER
