// How the kernel of wgmma_dgrad.cuh divides its memory and its work.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/blocks.h"
#include "gpu/device/tensor_copy.cuh"
#include "gpu/device/wgmma.cuh"
#include "gpu/gemm/wgmma_plan.cuh"

namespace bnb::gpu {
namespace {

constexpr int kTerms = 64;       // of a stage
constexpr int kRowBytes = 128;   // 64 grads of a token, or weights of a term
constexpr int kGroup = 128;      // threads of a warpgroup
constexpr int kGroupWidth = 64;  // features of a warpgroup that multiplies

// Codes: how the weight is stored, see Codes4.
template <class Codes_, int kTokens_, int kDecoders_, int kCodeStages_, bool kShares_>
struct Shape {
  using Codes = Codes_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kDecoders = kDecoders_;
  static constexpr int kCodeStages = kCodeStages_;
  // Blocks that have parts of a tile exchange sums through the workspace.
  static constexpr bool kShares = kShares_;
  static constexpr int kGroups = 2;
  static constexpr int kFeatures = kGroups * kGroupWidth;
  static constexpr int kWarps = kGroups * kGroup / kWarp;  // that multiply
  static constexpr int kThreads = (kGroups + kDecoders) * kGroup;
  // Where sums take many registers, those who decode give some of theirs.
  static constexpr bool kMovesRegisters = kTokens >= 128;
  static constexpr int kPairRegisters = kShares ? 176 : 168;  // of those beside two who decode
  static constexpr int kMultiplyRegisters =
      kTokens == 256 ? (kDecoders == 2 ? kPairRegisters : 200) : 120;
  static constexpr int kDecodeRegisters =
      kTokens == 256 ? (kDecoders == 2 ? 256 - kPairRegisters : 104) : 80;

  // For WgmmaPlan: rows are features, k is terms.
  static constexpr int kRows = kFeatures;
  static constexpr int kBlocks = 1;
  static constexpr int kTokenStage = 0;

  // Shared memory: rings, results on their way out, what decoders share, barriers, flags.
  static constexpr int kGradBytes = kTokens * kRowBytes;  // of a stage
  static constexpr int kGroupBytes = kTerms * kRowBytes;  // and weights of a warpgroup
  static constexpr int kStageBytes = kGradBytes + kGroups * kGroupBytes;
  static constexpr int kCodeRow = kGroups * Codes::kCodeBytes;
  static constexpr int kCodeBytes = kTerms * kCodeRow;
  static constexpr int kOutTokens = kTokens < 128 ? 16 : 32;  // of a copy of results
  static constexpr int kOutBytes = kOutTokens * kRowBytes;    // of a warpgroup
  static constexpr int kBarrierBytes = 16;                    // of a stage in either ring
  // Two blocks that have a tile may exchange sums within a cluster.
  static constexpr bool kPairs = !kShares && kTokens >= 128;
  // How many blocks may exchange sums.
  static constexpr int kMostParts = kShares ? kTokens / kOutTokens : kPairs ? 2 : 1;
  static constexpr int kMostBytes = 227 * 1024;
  static constexpr int kOtherBytes = kDecoders * kCodeStages * (kCodeBytes + kBarrierBytes) +
                                     kGroups * kOutBytes + Codes::kSharedBytes + 16;
  static constexpr int kStages = (kMostBytes - kOtherBytes) / (kStageBytes + kBarrierBytes);
  static constexpr int kCodes = kStages * kStageBytes;
  static constexpr int kOut = kCodes + kDecoders * kCodeStages * kCodeBytes;
  static constexpr int kDecoding = kOut + kGroups * kOutBytes;
  static constexpr int kBarriers = kDecoding + Codes::kSharedBytes;
  static constexpr int kCodeBarriers = kBarriers + kStages * kBarrierBytes;
  static constexpr int kFlags = kCodeBarriers + kDecoders * kCodeStages * kBarrierBytes;
  static constexpr int kBytes = kFlags + 16;
  static_assert(kStageBytes % 1024 == 0 && kCodeBytes % 1024 == 0 && kDecoders <= kStages);
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

// The stages that a warpgroup decodes, of all that the block of threads has.
template <class S>
class Turns : public Walk<S> {
 public:
  __device__ __forceinline__ Turns(const DgradTask<typename S::Codes>& task, int turn)
      : Walk<S>(task), stage(turn - S::kDecoders) {}

  __device__ __forceinline__ bool next() {
    stage += S::kDecoders;
    while (stage >= this->end()) {
      const int over = stage - this->end();
      if (!Walk<S>::next()) return false;
      stage = this->begin() + over;
    }
    return true;
  }

  int stage;
};

#endif  // BNB_HOPPER

}  // namespace
}  // namespace bnb::gpu
