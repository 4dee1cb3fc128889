// How the kernel of wgmma_dgrad.cuh divides its memory and its work.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/blocks.h"
#include "gpu/device/tensor_copy.cuh"
#include "gpu/device/wgmma.cuh"
#include "gpu/gemm/wgmma_plan.cuh"
#include "gpu/gemm/wgmma_table.cuh"

namespace bnb::gpu {
namespace {

constexpr int kTerms = 64;       // of a slot
constexpr int kRowBytes = 128;   // 64 grads of a token, or results
constexpr int kGroup = 128;      // threads of a warpgroup
constexpr int kGroupWidth = 64;  // features of a warpgroup that multiplies

// Scales of a row of codes: one for every `width` features, or with 0 for all of them.
BNB_HD constexpr int scale_columns(int features, int width) {
  return width > 0 ? features / width : 1;
}

// Codes: how the weight is stored, see Codes4.
template <class Codes_, int kTokens_>
struct Shape {
  using Codes = Codes_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kGroups = 2;
  static constexpr int kFeatures = kGroups * kGroupWidth;
  static constexpr int kWarps = kGroups * kGroup / kWarp;  // that multiply
  static constexpr int kThreads = (kGroups + 1) * kGroup;
  // The more slots, the more scales are on their way.
  static constexpr int kMultiplyRegisters = kTokens > 64 ? 224 : 200;
  static constexpr int kCopyRegisters = kTokens > 64 ? 56 : 104;
  static constexpr int kScaleWarps = kTerms / kWarp;  // that bring scales

  // Of a slot: grads, codes, scales.
  static constexpr int kGradBytes = kTokens * kRowBytes;
  static constexpr int kCodeRow = kGroups * Codes::kCodeBytes;
  static constexpr int kCodeBytes = kTerms * kCodeRow;
  static constexpr int kScaleColumn = kTerms * int{sizeof(float)};
  static constexpr int kScaleBytes = scale_columns(kFeatures, Codes::kLeastWidth) * kScaleColumn;
  static constexpr int kBarrierBytes = 16;
  static constexpr int kSlotBytes = kGradBytes + kCodeBytes + kScaleBytes;
  static constexpr Swizzle kCodeSwizzle = kCodeRow == 128 ? Swizzle::k128 : Swizzle::k64;

  // Shared memory by address: rings, results on their way out, what decodes, barriers, flags.
  static constexpr int kOutTokens = kTokens < 128 ? 16 : 32;  // of a copy of results
  static constexpr int kOutBytes = kOutTokens * kRowBytes;    // of a warpgroup
  static constexpr int kMostShared = 228 * 1024;
  static constexpr int kOtherBytes =
      kSharedStart + kGroups * kOutBytes + Codes::kTableBytes + Codes::kNestedBytes + 64;
  static constexpr int kMostSlots = (kMostShared - kOtherBytes) / (kSlotBytes + kBarrierBytes);
  static constexpr int kSlots = kMostSlots < 8 ? 4 : 8;
  static constexpr int kGradsAt = kSharedStart;
  static constexpr int kCodesAt = kGradsAt + kSlots * kGradBytes;
  static constexpr int kOutAt = kCodesAt + kSlots * kCodeBytes;
  static constexpr int kTableAt = kOutAt + kGroups * kOutBytes;
  static constexpr int kScalesAt = kTableAt + Codes::kTableBytes;
  static constexpr int kNestedAt = kScalesAt + kSlots * kScaleBytes;
  static constexpr int kBarriersAt = kNestedAt + Codes::kNestedBytes;
  static constexpr int kFlagsAt = kBarriersAt + kSlots * kBarrierBytes;
  static constexpr int kEnd = kFlagsAt + 64;
  static_assert(kGradBytes % 1024 == 0 && kCodeBytes % 1024 == 0 && kEnd <= kMostShared);

  // For WgmmaPlan: rows are features, k is terms. A stage fills all slots, so that code knows which
  // one is in hand.
  static constexpr int kRows = kFeatures;
  static constexpr int kBlocks = kSlots;
  static constexpr int kTokenStage = 0;

  // How many blocks may exchange sums.
  static constexpr int kMostParts = kTokens / kOutTokens;
};

// What the kernel does.
template <class Codes>
struct DgradTask {
  Codes codes;
  int64_t m;
  int64_t n;
  int64_t k;
  int feature_tiles;
  WgmmaPlan plan;
  float* sums;  // of parts of tiles
  // [split tile][kGroups], or where sums are exchanged [block][parts][kWarps].
  unsigned long long* arrivals;
  unsigned long long launch;  // a number of its own, times 256
  // Parts of every tile, if all blocks have one and exchange sums; otherwise 0.
  int parts;
};

#if BNB_HOPPER

static_assert(kRowBytes == kSwizzleRow);

// What a block of threads does, tile by tile.
template <class S>
class Walk {
 public:
  __device__ __forceinline__ explicit Walk(const DgradTask<typename S::Codes>& task)
      : walk_(task.plan, static_cast<int>(blockIdx.x)), feature_tiles_(task.feature_tiles) {}

  __device__ __forceinline__ bool next() {
    if (!walk_.next()) return false;
    feature = walk_.tile % feature_tiles_ * S::kFeatures;
    token = walk_.tile / feature_tiles_ * S::kTokens;
    return true;
  }
  __device__ __forceinline__ int tile() const { return walk_.tile; }
  // The stages of the tile that are this block's.
  __device__ __forceinline__ int begin() const { return walk_.begin; }
  __device__ __forceinline__ int end() const { return walk_.end; }

  int feature = 0;  // the first of the tile
  int token = 0;

 private:
  WgmmaWalk walk_;
  int feature_tiles_;
};

#endif  // BNB_HOPPER

}  // namespace
}  // namespace bnb::gpu
