// What a block of threads of the layer on Hopper's tensor cores makes, and where it keeps it.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/kernels/int8.h"
#include "gpu/device/tensor_copy.cuh"
#include "gpu/device/vector_io.cuh"
#include "gpu/device/wgmma.cuh"
#include "gpu/int8/outlier_terms.cuh"

namespace bnb::gpu {

constexpr int kInt8Terms = 128;  // of a stage, bytes
constexpr int kWarpgroup = 128;  // threads of a warpgroup

template <int tokens, int groups, int copy_warps, int stages, int resident, bool splits>
struct Int8Shape {
  static constexpr int kTokens = tokens;  // of a tile
  static constexpr int kGroups = groups;  // warpgroups that multiply
  static constexpr int kCopyWarps = copy_warps;
  static constexpr int kStages = stages;      // on their way at a time
  static constexpr int kResident = resident;  // blocks on a multiprocessor
  // Blocks of a cluster share the terms of a tile; otherwise they share tokens.
  static constexpr bool kSplits = splits;
  // There are no registers for outlier columns beside the sums of many tokens.
  static constexpr bool kOutliers = !splits || tokens <= 64;

  static constexpr int kFan = splits ? 1 : 2;  // blocks that copy tokens for each other
  static constexpr int kFeatures = 64 * kGroups;
  static constexpr int kMakers = kWarpgroup * kGroups;
  static constexpr int kCopiers = kWarp * kCopyWarps;
  static constexpr int kThreads = kMakers + kCopiers;
  static constexpr int kSums = kTokens / 2;  // of a thread

  // Shared memory, in bytes.
  static constexpr int kWeightBytes = kFeatures * kInt8Terms;
  static constexpr int kTokenBytes = kTokens * kInt8Terms;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes;
  static constexpr int kStaging = splits ? 0 : 8192;  // of a warpgroup, for results
  static constexpr int kScales = splits ? 0 : kTokens * int{sizeof(float)};  // likewise
  static constexpr int kStagingAt = kStages * kStageBytes;
  static constexpr int kScalesAt = kStagingAt + kGroups * kStaging;
  static constexpr int kLines = kFeatures + kTokens;                // of a stage
  static constexpr int kColumnsAt = kScalesAt + kGroups * kScales;  // 64 outlier columns
  static constexpr int kHeldAt = kColumnsAt + 66 * int{sizeof(int)};
  static constexpr int kHeld = kOutliers ? kFeatures * 64 : 0;  // their codes
  static constexpr int kShared = kHeldAt + kHeld + 1024;        // to align the start
  // Sums, as integers and as floats, take the place of the ring.
  static_assert(!splits || 2 * 4 * kFeatures * kTokens <= kStagingAt);
  static_assert(kTokenBytes / kFan % 1024 == 0);
};

struct Int8Task {
  Int8ScaledMatmul args;
  int feature_tiles;  // of a cluster
  int token_tiles;
  int splits;
  bool packed_tokens;      // those of the first stage of outlier columns
  bool aligned;            // results can be stored 16 bytes at a time
  bool weights_are_older;  // than the kernel before this one
  bool watches;            // for outlier columns in stages that pass
};

// Where copies come from.
struct Int8Maps {
  TensorMap tokens;
  TensorMap weights;
  TensorMap packed_tokens;  // if there are such
};

#if BNB_HOPPER

// What a block does for one tile.
struct Int8Job {
  int feature;
  int token;
  int first_stage;
  int last_stage;
  int split;
};

// A thread's place: of its warpgroup's 64 features, 16 warp + g and + 8; of every 8 tokens, 2 t
// and 2 t + 1.
struct Int8Position {
  int group;
  int thread;  // of the group
  int warp;
  int g;
  int t;
  __device__ __forceinline__ explicit Int8Position(int maker)
      : group(maker / kWarpgroup),
        thread(maker % kWarpgroup),
        warp(thread / kWarp),
        g(thread % kWarp / 4),
        t(thread % 4) {}
};

// What the roles of a block have in common.
template <class T, class Shape>
struct Int8Tile {
  using Place = RingPlace<Shape::kStages>;
  using Terms = OutlierTerms<T>;
  static_assert(Terms::kSlab * 2 == kInt8Terms);
  static constexpr int kTokens = Shape::kTokens;
  static constexpr int kSums = Shape::kSums;
  // Eight terms of a stage of outlier columns.
  struct alignas(16) SlabPack {
    uint32_t words[4];
    SlabPack() = default;
    __device__ __forceinline__ explicit SlabPack(const typename Terms::Term (&terms)[8]) {
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
  TransactionBarrier* granted;  // by stage: it is free for outlier columns
  int rank;                     // in the cluster

  __device__ __forceinline__ char* stage(int slot) const {
    return shared + slot * Shape::kStageBytes;
  }
  __device__ __forceinline__ int outlier_count() const {
    return task.args.outliers != nullptr ? task.args.outliers[0] : 0;
  }

  // Starts the copy of a stage's tokens, for the whole cluster if that makes the same.
  __device__ __forceinline__ void copy_tokens(int slot, const TensorMap& map, int stage_of_map,
                                              int token) const {
    constexpr int kPart = kTokens / Shape::kFan;
    TransactionBarrier& full = barriers[slot].full;
    const uint32_t to = shared_address(stage(slot)) + Shape::kWeightBytes;
    const int term = stage_of_map * (kInt8Terms / 2);
    if constexpr (Shape::kFan > 1) {
      tensor_copy_to_cluster(to + rank * kPart * kInt8Terms, map, term, token + rank * kPart, full,
                             static_cast<uint16_t>((1 << Shape::kFan) - 1));
    } else {
      tensor_copy(to, map, term, token, full);
    }
  }

  // Stages of outlier columns.
  __device__ __forceinline__ static int slab_count(int outliers) {
    return static_cast<int>(ceil_div(outliers, Terms::kColumns));
  }
  // Calls make(Int8Job) for every tile, or part of one, that is this block's.
  template <class Make>
  __device__ __forceinline__ void for_each_tile(Make&& make) const {
    const int stages = static_cast<int>(ceil_div(task.args.k, kInt8Terms));
    if constexpr (Shape::kSplits) {
      const int tile = static_cast<int>(blockIdx.x) / task.splits;
      make(Int8Job{tile % task.feature_tiles * Shape::kFeatures,
                   tile / task.feature_tiles * kTokens,
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
        make(Int8Job{((first + in_band % width) * Shape::kFan + rank) * Shape::kFeatures,
                     in_band / width * kTokens, 0, stages, 0});
      }
    }
  }
};

#endif  // BNB_HOPPER

}  // namespace bnb::gpu
