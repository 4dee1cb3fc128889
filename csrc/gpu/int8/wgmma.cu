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
//     other warps     gather the outlier columns, 64 to a stage, as 16-bit numbers
//
// For many tokens, tiles are large, blocks stay for several, and two neighbours in a cluster, which
// make tiles of the same tokens, copy half of those each to both. For few tokens, tiles are small,
// several blocks share a multiprocessor, and the blocks of a cluster share the terms of a tile;
// they add their sums, which are exact, through each other's shared memory.
//
// Outlier columns. Weights are codes, which 16 bits hold exactly, and the values are those of the
// input (a float is split in three bfloat16), so products are exact and added in float. With large
// tiles there are registers for the second sums of 64 tokens only, so stages of outlier columns are
// multiplied 64 tokens at a time; where they fill more than one, they are gathered anew for each.
#include "bitsandbytes/blocks.h"
#include "gpu/int8/wgmma.h"
#include "gpu/runtime/runtime.cuh"

#if BNB_BULK_COPIES

#include <algorithm>

#include "gpu/device/tensor_copy.cuh"
#include "gpu/device/vector_io.cuh"
#include "gpu/device/wgmma.cuh"
#include "gpu/int8/dtype.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {
namespace {

constexpr int kTerms = 128;  // of a stage, bytes
constexpr int kGroup = 128;  // threads of a warpgroup

template <int tokens, int groups, int copy_warps, int stages, int resident, bool splits>
struct Int8Shape {
  static constexpr int kTokens = tokens;  // of a tile
  static constexpr int kGroups = groups;  // warpgroups that multiply
  static constexpr int kCopyWarps = copy_warps;
  static constexpr int kStages = stages;      // on their way at a time
  static constexpr int kResident = resident;  // blocks on a multiprocessor
  // Blocks of a cluster share the terms of a tile; otherwise they share tokens.
  static constexpr bool kSplits = splits;

  static constexpr int kFan = splits ? 1 : 2;  // blocks that copy tokens for each other
  static constexpr int kFeatures = 64 * kGroups;
  static constexpr int kMakers = kGroup * kGroups;
  static constexpr int kCopiers = kWarp * kCopyWarps;
  static constexpr int kThreads = kMakers + kCopiers;
  static constexpr int kSums = kTokens / 2;  // of a thread

  // Shared memory, in bytes.
  static constexpr int kWeightBytes = kFeatures * kTerms;
  static constexpr int kTokenBytes = kTokens * kTerms;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes;
  static constexpr int kStaging = splits ? 0 : 8192;  // of a warpgroup, for results
  static constexpr int kScales = splits ? 0 : kTokens * int{sizeof(float)};  // likewise
  static constexpr int kStagingAt = kStages * kStageBytes;
  static constexpr int kScalesAt = kStagingAt + kGroups * kStaging;
  static constexpr int kLines = kFeatures + kTokens;  // of a stage
  static constexpr int kHeldPacks = 2;                // of outlier columns of a line, 16 bytes each
  static constexpr int kHeldAt = kScalesAt + kGroups * kScales;
  static constexpr int kShared = kHeldAt + kLines * kHeldPacks * 16 + 1024;  // to align the start
  // Sums, as integers and as floats, take the place of the ring.
  static_assert(!splits || 2 * 4 * kFeatures * kTokens <= kStagingAt);
  static_assert(kTokenBytes / kFan % 1024 == 0);
};

struct Int8Task {
  Int8ScaledMatmul args;
  int feature_tiles;  // of a cluster
  int token_tiles;
  int splits;
  bool aligned;  // results can be stored 16 bytes at a time
};

#if BNB_HOPPER

struct RingBarriers {
  TransactionBarrier full;   // weights and tokens are there
  TransactionBarrier empty;  // all who read them have done so
};

// A place in the ring, and how often it has been there.
template <int kStages>
struct RingPlace {
  int slot = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kStages) {
      slot = 0;
      phase ^= 1;
    }
  }
  __device__ __forceinline__ void advance(int count) {
    slot += count;
    phase ^= static_cast<uint32_t>(slot / kStages) & 1u;
    slot %= kStages;
  }
};

template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return to_bfloat16_pair(low, high);
  } else {
    uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
  }
}

// Part 0, 1 or 2 of a number that is their sum, eight significant bits each.
__device__ __forceinline__ BFloat16 part_of(float x, int part) {
  const auto leading = [](float y) { return bits_float(float_bits(y) & 0xffff0000u); };
  if (!(fabsf(x) <= kFloatMax)) return part == 0 ? narrow<BFloat16>(x) : BFloat16{0};
  for (int i = 0; i < part; ++i) x = __fsub_rn(x, leading(x));
  return {static_cast<uint16_t>(float_bits(x) >> 16)};
}

struct EightWords {
  uint32_t words[8];
};

// From any block of the cluster.
__device__ __forceinline__ EightWords load_eight(uint32_t address) {
  const uint4 x = load_in_cluster(address);
  const uint4 y = load_in_cluster(address + 16);
  return {{x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w}};
}

// What a block does for one tile.
struct Job {
  int feature;
  int token;
  int first_stage;
  int last_stage;
  int split;
};

template <class T, class Shape>
struct Int8Product {
  using Place = RingPlace<Shape::kStages>;
  using Slab = std::conditional_t<std::is_same_v<T, float>, BFloat16, T>;
  static constexpr int kParts = std::is_same_v<T, float> ? 3 : 1;  // of a value of an outlier
  static constexpr int kSlabTerms = kTerms / 2;                    // of a stage of outlier columns
  static constexpr int kSlabColumns = kSlabTerms / kParts;
  static constexpr int kTokens = Shape::kTokens;
  static constexpr int kSums = Shape::kSums;
  static constexpr int kChunk = std::min(kTokens, 64);  // tokens that are finished at a time
  // Eight terms of a stage of outlier columns.
  struct alignas(16) SlabPack {
    uint32_t words[4];
    SlabPack() = default;
    __device__ __forceinline__ explicit SlabPack(const Slab (&terms)[8]) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        words[w] = terms[2 * w].bits | static_cast<uint32_t>(terms[2 * w + 1].bits) << 16;
      }
    }
  };
  // Barriers of the warps that copy, and of each warpgroup.
  static constexpr int kCopyBarrier = 1;
  static constexpr int kGroupBarrier = 2;

  const Int8Task& task;
  char* shared;
  RingBarriers* barriers;
  int rank;  // in the cluster

  __device__ __forceinline__ char* stage(int slot) const {
    return shared + slot * Shape::kStageBytes;
  }
  __device__ __forceinline__ int outlier_count() const {
    return task.args.outliers != nullptr ? task.args.outliers[0] : 0;
  }

  // Stages of outlier columns, and how often they are gathered for a tile.
  __device__ __forceinline__ static int slab_count(int outliers) {
    return static_cast<int>(ceil_div(outliers, kSlabColumns));
  }
  __device__ __forceinline__ static int rounds(int slabs) {
    return slabs > 1 ? kTokens / kChunk : 1;
  }

  // Calls make(Job) for every tile, or part of one, that is this block's.
  template <class Make>
  __device__ __forceinline__ void for_each_tile(Make&& make) const {
    const int stages = static_cast<int>(ceil_div(task.args.k, kTerms));
    if constexpr (Shape::kSplits) {
      const int tile = static_cast<int>(blockIdx.x) / task.splits;
      make(Job{tile % task.feature_tiles * Shape::kFeatures, tile / task.feature_tiles * kTokens,
               static_cast<int>(int64_t{stages} * rank / task.splits),
               static_cast<int>(int64_t{stages} * (rank + 1) / task.splits), rank});
    } else {
      // Tiles that are made at a time form a block of the result, so that they share operands.
      constexpr int kBand = 8;
      const int clusters = static_cast<int>(gridDim.x) / Shape::kFan;
      const int tiles = task.feature_tiles * task.token_tiles;
      for (int i = static_cast<int>(blockIdx.x) / Shape::kFan; i < tiles; i += clusters) {
        const int first = i / (kBand * task.token_tiles) * kBand;
        const int width = min(task.feature_tiles - first, kBand);
        const int in_band = i - first * task.token_tiles;
        make(Job{((first + in_band % width) * Shape::kFan + rank) * Shape::kFeatures,
                 in_band / width * kTokens, 0, stages, 0});
      }
    }
  }

  // ---- Copies --------------------------------------------------------------------------------

  __device__ __forceinline__ void copy(const TensorMap& token_map, const TensorMap& weight_map,
                                       int thread) const {
    constexpr int kPart = kTokens / Shape::kFan;
    const int outliers = outlier_count();
    Place place;
    for_each_tile([&](const Job& job) {
      if (thread == 0) {
        Place at = place;
        for (int s = job.first_stage; s < job.last_stage; ++s) {
          barriers[at.slot].empty.wait(at.phase ^ 1);
          TransactionBarrier& full = barriers[at.slot].full;
          const uint32_t to = shared_address(stage(at.slot));
          full.arrive_and_expect(Shape::kStageBytes);
          tensor_copy(to, weight_map, s * (kTerms / 2), job.feature, full);
          if constexpr (Shape::kFan > 1) {
            tensor_copy_to_cluster(to + Shape::kWeightBytes + rank * kPart * kTerms, token_map,
                                   s * (kTerms / 2), job.token + rank * kPart, full,
                                   static_cast<uint16_t>((1 << Shape::kFan) - 1));
          } else {
            tensor_copy(to + Shape::kWeightBytes, token_map, s * (kTerms / 2), job.token, full);
          }
          at.advance();
        }
      }
      place.advance(job.last_stage - job.first_stage);
      __syncwarp();
      const int slabs = job.split == 0 ? slab_count(outliers) : 0;
      for (int i = 0; i < slabs * rounds(slabs); ++i) {
        barriers[place.slot].empty.wait(place.phase ^ 1);
        __syncwarp();
        named_barrier(kCopyBarrier, Shape::kCopiers);  // the place is free
        named_barrier(kCopyBarrier, Shape::kCopiers);  // the columns are there
        if (thread == 0) barriers[place.slot].full.arrive();
        place.advance();
      }
    });
  }

  // Gathers outlier columns of the weights and of the tokens, with zeros for the other terms of a
  // stage. The first of them are read while the tensor cores are busy with the tile, and wait in
  // shared memory for their place in the ring.
  __device__ __forceinline__ void gather(int thread) const {
    constexpr int kGatherers = Shape::kCopiers - kWarp;
    constexpr int kHeld = Shape::kHeldPacks;
    const int outliers = outlier_count();
    if (outliers == 0) return;
    const int slabs = slab_count(outliers);
    SlabPack* const held = reinterpret_cast<SlabPack*>(shared + Shape::kHeldAt);
    Place place;
    for_each_tile([&](const Job& job) {
      place.advance(job.last_stage - job.first_stage);
      if (job.split > 0) return;
      for (int i = 0; i < slabs * rounds(slabs); ++i) {
        const int first = i % slabs * kSlabColumns;
        const int columns = min(kSlabColumns, outliers - first);
#pragma unroll 1
        for (int pack = 0; pack < kHeld; ++pack) {
          const SlabColumns at = columns_of(first, columns, pack);
#pragma unroll 2
          for (int line = thread; line < Shape::kLines; line += kGatherers) {
            held[line * kHeld + pack] = read_slab(job, line, at, pack);
          }
        }
        __syncwarp();
        named_barrier(kCopyBarrier, Shape::kCopiers);  // the place is free
        char* const to = stage(place.slot);
#pragma unroll 1
        for (int pack = 0; pack < kSlabTerms / 8; ++pack) {
          const SlabColumns at = columns_of(first, columns, pack);
#pragma unroll 1
          for (int line = thread; line < Shape::kLines; line += kGatherers) {
            store_aligned(to + swizzled(line, pack), pack < kHeld ? held[line * kHeld + pack]
                                                                  : read_slab(job, line, at, pack));
          }
        }
        fence_shared_for_async();
        __syncwarp();
        named_barrier(kCopyBarrier, Shape::kCopiers);  // the columns are there
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
    result.present = min(columns * kParts - 8 * pack, 8);
    if (result.present <= 0) return result;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int column = min((8 * pack + e) / kParts, columns - 1);
      result.at[e] = task.args.outliers[1 + first + column];
    }
    return result;
  }

  // Eight terms of a line: of a feature, or, after all features, of a token. Lines beyond the last
  // of the matrix are like the last: nobody sees their results.
  __device__ __forceinline__ SlabPack read_slab(const Job& job, int line,
                                                const SlabColumns& columns, int pack) const {
    const Int8ScaledMatmul& args = task.args;
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
          if constexpr (kParts == 1) {
            terms[e] = values[e];
          } else {
            terms[e] = part_of(values[e], (8 * pack + e) % kParts);
          }
        }
      }
    }
    return SlabPack(terms);
  }

  // ---- Products ------------------------------------------------------------------------------

  // A thread's place: of its warpgroup's 64 features, 16 warp + g and + 8; of every 8 tokens, 2 t
  // and 2 t + 1.
  struct Position {
    int group;
    int thread;  // of the group
    int warp;
    int g;
    int t;
    __device__ __forceinline__ explicit Position(int maker)
        : group(maker / kGroup),
          thread(maker % kGroup),
          warp(thread / kWarp),
          g(thread % kWarp / 4),
          t(thread % 4) {}
  };

  // Called once per warp.
  __device__ __forceinline__ void release(int slot) const {
    if (threadIdx.x % kWarp == 0) {
      if constexpr (Shape::kFan > 1) {
#pragma unroll
        for (int f = 0; f < Shape::kFan; ++f) barriers[slot].empty.arrive_at(f);
      } else {
        barriers[slot].empty.arrive();
      }
    }
  }

  __device__ __forceinline__ void multiply(const Job& job, const Position& at, Place& place,
                                           int (&d)[kSums]) const {
    int before = 0;
    for (int s = job.first_stage; s < job.last_stage; ++s) {
      barriers[place.slot].full.wait(place.phase);
      const uint32_t from = shared_address(stage(place.slot));
      const uint64_t weights = swizzled_descriptor(from + at.group * 64 * kTerms);
      const uint64_t tokens = swizzled_descriptor(from + Shape::kWeightBytes);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kTerms / 32; ++i) {
        WgmmaInt8<kTokens>::run(d, weights + 2 * i, tokens + 2 * i, i > 0 || s > job.first_stage);
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (s > job.first_stage) release(before);
      before = place.slot;
      place.advance();
    }
    wgmma_wait<0>();
    wgmma_hold(d);
    release(before);
  }

  // The products of the outlier columns for the tokens of a chunk. Whether their stages come anew
  // for each chunk, and whether this is the first or the last, decides about waiting and releasing.
  __device__ __forceinline__ void multiply_outliers(int slabs, int chunk, const Position& at,
                                                    Place& place, float (&d)[kChunk / 2]) const {
    const bool last = slabs > 1 || chunk == kTokens / kChunk - 1;
    for (int s = 0; s < slabs; ++s) {
      barriers[place.slot].full.wait(place.phase);
      const uint32_t from = shared_address(stage(place.slot));
      const uint64_t weights = swizzled_descriptor(from + at.group * 64 * kTerms);
      const uint64_t tokens =
          swizzled_descriptor(from + Shape::kWeightBytes + chunk * kChunk * kTerms);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kSlabTerms / 16; ++i) {
        WgmmaShared<Slab, kChunk>::run(d, weights + 2 * i, tokens + 2 * i, i > 0 || s > 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_hold(d);
      if (last) {
        release(place.slot);
        place.advance();
      }
    }
  }

  __device__ __forceinline__ void make(int maker) const {
    const Position at(maker);
    const Int8ScaledMatmul& args = task.args;
    const int outliers = outlier_count();
    Place place;
    for_each_tile([&](const Job& job) {
      int d[kSums];
      if constexpr (Shape::kSplits) {
        multiply(job, at, place, d);
        float added[kSums];
        if (job.split == 0) multiply_outliers(slab_count(outliers), 0, at, place, added);
        exchange(job, at, d, added, outliers > 0);
      } else {
        // Read long before they are needed.
        constexpr int kOwn = ceil_div(kTokens, kGroup);
        float own_scales[kOwn];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const int token = job.token + at.thread + i * kGroup;
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
        multiply(job, at, place, d);
        float* const scales =
            reinterpret_cast<float*>(shared + Shape::kScalesAt + at.group * Shape::kScales);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          scales[at.thread + i * kGroup] = __fmul_rn(own_scales[i], kInt8Product);
        }
        named_barrier(kGroupBarrier + at.group, kGroup);
        const Finish finish{scales, {features[0], features[1]}, {biases[0], biases[1]}};
        if (outliers == 0) {
          store<false>(job, at, finish, d, 0, place);
        } else {
          store<true>(job, at, finish, d, slab_count(outliers), place);
        }
      }
    });
  }

  // ---- Results of large tiles ----------------------------------------------------------------

  // What turns a thread's sums into results.
  struct Finish {
    const float* scales;  // of tokens, in shared memory
    float features[2];    // scales of the thread's two features
    float biases[2];
  };

  // Some tokens at a time lie in shared memory as [token][64 features], from where whole rows go
  // out.
  template <bool kOutliers>
  __device__ __forceinline__ void store(const Job& job, const Position& at, const Finish& finish,
                                        const int (&sums)[kSums], int slabs, Place& place) const {
    constexpr int kWidth = 64 * int{sizeof(T)};  // bytes
    constexpr int kRows = Shape::kStaging / kWidth;
    static_assert(kChunk % kRows == 0);
#pragma unroll
    for (int chunk = 0; chunk < kTokens / kChunk; ++chunk) {
      float added[kChunk / 2];
      if constexpr (kOutliers) multiply_outliers(slabs, chunk, at, place, added);
#pragma unroll
      for (int row = 0; row < kChunk; row += kRows) {
        if (chunk + row > 0) named_barrier(kGroupBarrier + at.group, kGroup);
        stage_rows<kRows>(at, [&](int unit, int e) {
          const int j = row / 8 + unit;
          const int token = chunk * kChunk + 8 * j + 2 * at.t;
          const float2 scale = *reinterpret_cast<const float2*>(finish.scales + token);
          const float feature = finish.features[e / 2];
          float result = finish.biases[e / 2];
          if constexpr (kOutliers) {
            result = __fmaf_rn(added[4 * j + e], __fmul_rn(feature, 1.0f / kInt8Max), result);
          }
          return __fmaf_rn(__int2float_rn(sums[chunk * (kChunk / 2) + 4 * j + e]),
                           __fmul_rn(feature, e % 2 == 0 ? scale.x : scale.y), result);
        });
        named_barrier(kGroupBarrier + at.group, kGroup);
        store_rows<kRows>(job, at, chunk * kChunk + row);
      }
    }
    // The chunk's place, and the scales, are free only when all have read them.
    named_barrier(kGroupBarrier + at.group, kGroup);
  }

  __device__ __forceinline__ char* staging(const Position& at) const {
    return shared + Shape::kStagingAt + at.group * Shape::kStaging;
  }

  // Brings value(u, e), of tokens 8 u + 2 t + e % 2 and feature g + 8 (e / 2), to shared memory.
  template <int kRows, class Value>
  __device__ __forceinline__ void stage_rows(const Position& at, const Value& value) const {
    if constexpr (sizeof(T) == 2) {
      const int matrix = static_cast<int>(threadIdx.x) % kWarp / 8;
#pragma unroll
      for (int u = 0; u < kRows / 8; u += 2) {
        const uint32_t words[4] = {pack_pair<T>(value(u, 0), value(u, 1)),
                                   pack_pair<T>(value(u, 2), value(u, 3)),
                                   pack_pair<T>(value(u + 1, 0), value(u + 1, 1)),
                                   pack_pair<T>(value(u + 1, 2), value(u + 1, 3))};
        const int row = 8 * (u + matrix / 2) + static_cast<int>(threadIdx.x) % 8;
        store_transposed(shared_address(staging(at)) + swizzled(row, 2 * at.warp + matrix % 2),
                         words);
      }
    } else {
      float* const to = reinterpret_cast<float*>(staging(at));
#pragma unroll
      for (int u = 0; u < kRows / 8; ++u) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = 8 * u + 2 * at.t + e % 2;
          to[row * 64 + spread(row, 16 * at.warp + at.g + e / 2 * 8)] = value(u, e);
        }
      }
    }
  }

  __device__ __forceinline__ static const char* staged(const char* staging, int row, int pack) {
    if constexpr (sizeof(T) == 2) {
      return staging + swizzled(row, pack);
    } else {
      return staging + 4 * (row * 64 + spread(row, pack * kPackSize<T>));
    }
  }

  template <int kRows>
  __device__ __forceinline__ void store_rows(const Job& job, const Position& at, int first) const {
    constexpr int kPack = kPackSize<T>;
    constexpr int kPacks = 64 / kPack;  // of a token
#pragma unroll
    for (int i = 0; i < kRows * kPacks / kGroup; ++i) {
      const int place = i * kGroup + at.thread;
      const int row = place / kPacks;
      const int pack = place % kPacks;
      const int64_t token = job.token + first + row;
      const int64_t feature = job.feature + 64 * at.group + pack * kPack;
      if (token >= task.args.m || feature >= task.args.n) continue;
      store_pack(static_cast<T*>(task.args.out) + token * task.args.n + feature,
                 *reinterpret_cast<const Pack<T, kPack>*>(staged(staging(at), row, pack)),
                 task.args.n - feature, task.aligned);
    }
  }

  // Where a 32-bit number of a token lies among those of 64 features: tokens 2 t, t = 0 to 3, in
  // different banks; eight features stay together.
  __device__ __forceinline__ static int spread(int token, int feature) {
    return feature ^ ((token / 2 & 3) << 3);
  }

  // ---- Results of tiles whose terms are shared -----------------------------------------------

  // Sums, and those of the outlier columns, of the first block, go to shared memory; then every
  // block adds those of all for its share of the results.
  __device__ __forceinline__ void exchange(const Job& job, const Position& at,
                                           const int (&d)[kSums], const float (&added)[kSums],
                                           bool outliers) const {
    static_assert(Shape::kGroups == 1);
    const Int8ScaledMatmul& args = task.args;
    constexpr int kAddedAt = kTokens * Shape::kFeatures;
    int* const sums = reinterpret_cast<int*>(shared);
    named_barrier(kGroupBarrier, kGroup);  // the ring is no longer read
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int token = i / 4 * 8 + 2 * at.t + i % 2;
      const int place = token * 64 + spread(token, 16 * at.warp + at.g + i % 4 / 2 * 8);
      sums[place] = d[i];
      if (outliers && job.split == 0) reinterpret_cast<float*>(sums)[kAddedAt + place] = added[i];
    }
    cluster_barrier();
    const uint32_t here = shared_address(shared);
    for (int unit = rank * kGroup + at.thread; unit < kTokens * 8; unit += task.splits * kGroup) {
      const int row = unit / 8;
      const int64_t token = job.token + row;
      const int64_t feature = job.feature + unit % 8 * 8;
      if (token >= args.m || feature >= args.n) continue;
      const uint32_t place = here + 4 * (row * 64 + spread(row, unit % 8 * 8));
      // Read while the sums are on their way.
      const float row_scale = __fmul_rn(args.row_stats[token], kInt8Product);
      float stats[8];
      float results[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const bool there = feature + i < args.n;
        stats[i] = there ? args.col_stats[feature + i] : 0.0f;
        results[i] = there ? bias_at(args.bias, args.bias_dtype, feature + i) : 0.0f;
      }
      uint32_t totals[8] = {};
#pragma unroll 4
      for (int s = 0; s < task.splits; ++s) {
        const EightWords part = load_eight(address_in_block(place, s));
#pragma unroll
        for (int i = 0; i < 8; ++i) totals[i] += part.words[i];
      }
      if (outliers) {
        const EightWords products = load_eight(address_in_block(place + 4 * kAddedAt, 0));
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          results[i] = __fmaf_rn(bits_float(products.words[i]),
                                 __fmul_rn(stats[i], 1.0f / kInt8Max), results[i]);
        }
      }
      Pack<T, kPackSize<T>> packs[8 / kPackSize<T>];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        packs[i / kPackSize<T>].values[i % kPackSize<T>] =
            narrow<T>(__fmaf_rn(__int2float_rn(static_cast<int>(totals[i])),
                                __fmul_rn(stats[i], row_scale), results[i]));
      }
#pragma unroll
      for (int p = 0; p < 8 / kPackSize<T>; ++p) {
        const int64_t from = feature + p * kPackSize<T>;
        store_pack(static_cast<T*>(args.out) + token * args.n + from, packs[p], args.n - from,
                   task.aligned);
      }
    }
  }
};

#endif  // BNB_HOPPER

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kResident)
    wgmma_int8_kernel(BNB_GRID_CONSTANT const TensorMap token_map,
                      BNB_GRID_CONSTANT const TensorMap weight_map,
                      BNB_GRID_CONSTANT const Int8Task task) {
#if BNB_HOPPER
  extern __shared__ char dynamic_shared[];
  __shared__ RingBarriers barriers[Shape::kStages];
  const int thread = static_cast<int>(threadIdx.x);
  char* const shared = dynamic_shared + (-shared_address(dynamic_shared) & 1023u);
  const Int8Product<T, Shape> product{task, shared, barriers, cluster_rank()};
  if (thread == 0) {
    prefetch_map(token_map);
    prefetch_map(weight_map);
    for (RingBarriers& place : barriers) {
      place.full.init(1);
      place.empty.init(Shape::kMakers / kWarp * Shape::kFan);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (Shape::kFan > 1) cluster_barrier();
  wait_for_previous_kernel();
  if (thread >= Shape::kMakers) {
    if constexpr (!Shape::kSplits) give_registers<72>();
    if (thread < Shape::kMakers + kWarp) {
      product.copy(token_map, weight_map, thread - Shape::kMakers);
    } else {
      product.gather(thread - Shape::kMakers - kWarp);
    }
    __syncwarp();
    if (Shape::kSplits) cluster_barrier();  // the one of exchange()
  } else {
    if constexpr (!Shape::kSplits) take_registers<216>();
    product.make(thread);
  }
  // Others may still arrive at this block's barriers, or read its sums.
  cluster_barrier();
#endif
}

// ---- On the host -------------------------------------------------------------------------------

using Tokens16 = Int8Shape<16, 1, 2, 5, 4, true>;
using Tokens32 = Int8Shape<32, 1, 2, 4, 4, true>;
using Tokens64 = Int8Shape<64, 1, 2, 4, 3, true>;
using Tokens128 = Int8Shape<128, 2, 4, 6, 1, false>;
using Tokens256 = Int8Shape<256, 2, 4, 4, 1, false>;

template <class T, class Shape>
void start(const Int8Task& task, int blocks, int cluster, Stream stream) {
  constexpr auto kernel = wgmma_int8_kernel<T, Shape>;
  const Int8ScaledMatmul& args = task.args;
  const TensorMap token_map =
      tensor_map(args.a, args.m, args.k, Shape::kTokens / Shape::kFan, Swizzle::k128);
  const TensorMap weight_map = tensor_map(args.b, args.n, args.k, Shape::kFeatures, Swizzle::k128);
  allow_shared(reinterpret_cast<const void*>(kernel), Shape::kShared);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(Shape::kThreads);
  config.dynamicSmemBytes = Shape::kShared;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = attributes;
  config.numAttrs = 2;
  BNB_GPU_CHECK(cudaLaunchKernelEx(&config, kernel, token_map, weight_map, task));
}

template <class T, class Shape>
void run(const Int8ScaledMatmul& args, Stream stream) {
  Int8Task task{args, static_cast<int>(ceil_div(args.n, Shape::kFeatures * Shape::kFan)),
                static_cast<int>(ceil_div(args.m, Shape::kTokens)), 1,
                args.n % kPackSize<T> == 0 && is_aligned(args.out, 16)};
  const int tiles = task.feature_tiles * task.token_tiles;
  if constexpr (Shape::kSplits) {
    constexpr int kMostSplits = 8;
    constexpr int kLeastStages = 2;  // of a part
    const int stages = static_cast<int>(ceil_div(args.k, kTerms));
    while (task.splits < kMostSplits && stages >= 2 * kLeastStages * task.splits &&
           2 * tiles * task.splits <= Shape::kResident * multiprocessors()) {
      task.splits *= 2;
    }
    start<T, Shape>(task, tiles * task.splits, task.splits, stream);
  } else {
    const int clusters = std::min(tiles, multiprocessors() / Shape::kFan);
    start<T, Shape>(task, clusters * Shape::kFan, Shape::kFan, stream);
  }
}

template <class Shape>
void run(const Int8ScaledMatmul& args, Stream stream) {
  by_dtype(args.dtype, [&]<class T>(T*) { run<T, Shape>(args, stream); });
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

bool has_kernels() {
  int device = 0;
  int major = 0;
  int minor = 0;
  BNB_GPU_CHECK(cudaGetDevice(&device));
  BNB_GPU_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  BNB_GPU_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (major != 9 || minor != 0) return false;
  // For other targets than sm_90a kernels are empty, and have no shared memory.
  static const bool built = [] {
    cudaFuncAttributes attributes{};
    const cudaError_t status = cudaFuncGetAttributes(
        &attributes, reinterpret_cast<const void*>(&wgmma_int8_kernel<BFloat16, Tokens16>));
    cudaGetLastError();
    return status == cudaSuccess && attributes.sharedSizeBytes > 0;
  }();
  return built;
}

}  // namespace

bool wgmma_int8_serves(const Int8ScaledMatmul& args) {
  constexpr int64_t kMost = int64_t{1} << 30;
  return args.m > 0 && args.n > 0 && args.k > 0 && args.m < kMost && args.n < kMost &&
         args.k < kMost && args.k % 16 == 0 && is_aligned(args.a, 16) && is_aligned(args.b, 16) &&
         ceil_div(args.n, 64) * ceil_div(args.m, 64) < kMost && has_kernels();
}

void wgmma_int8(const Int8ScaledMatmul& args, Stream stream) {
  if (args.m <= 16) return run<Tokens16>(args, stream);
  if (args.m <= 32) return run<Tokens32>(args, stream);
  if (args.m <= 64) return run<Tokens64>(args, stream);
  if (prefers_small_tiles(args)) return run<Tokens128>(args, stream);
  return run<Tokens256>(args, stream);
}

}  // namespace bnb::gpu

#else

namespace bnb::gpu {

bool wgmma_int8_serves(const Int8ScaledMatmul&) { return false; }
void wgmma_int8(const Int8ScaledMatmul&, Stream) {}

}  // namespace bnb::gpu

#endif  // BNB_BULK_COPIES
