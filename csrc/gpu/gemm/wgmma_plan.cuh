// How the warpgroup kernel of 4-bit products divides its work and its memory.
// SPDX-License-Identifier: MIT
//
// A tile of the product is some rows of the weight by some rows of a (tokens). A cluster takes
// `kCluster` tiles of the same tokens that lie side by side. Tiles that fill all clusters evenly are
// taken whole. What remains is a line of stages (pieces of k), of which every cluster takes an equal
// part, whatever tiles it cuts (stream-K, Osama et al. 2023, arXiv:2301.03598):
//
//     tiles     | whole: 0 1 2 ... | split:    a    |    b    |    c    |
//     clusters  | 0 1 2 ... 0 1 2  |  0   |  1   |  2   |  3   |  4   | 5
//
// A warp that has part of a split tile stores its sums; the one that comes last adds up all parts,
// in the order of k, so that results do not depend on who that is.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bitsandbytes/blocks.h"
#include "gpu/runtime/runtime.cuh"

namespace bnb::gpu {

// What a kernel is compiled for.
template <int tokens, int groups, int blocks, int stages, int cluster, bool scale_sums>
struct WgmmaShape {
  static constexpr int kTokens = tokens;   // of a tile
  static constexpr int kGroups = groups;   // warpgroups that multiply, 64 rows of the weight each
  static constexpr int kBlocks = blocks;   // of 64 k in a stage
  static constexpr int kStages = stages;   // on their way at a time
  static constexpr int kCluster = cluster; // blocks of threads that share their tokens
  // Scales are applied to sums over 64 k in float; otherwise to the weights.
  static constexpr bool kScaleSums = scale_sums;

  static constexpr int kRows = 64 * kGroups;
  static constexpr int kWarps = 4 * kGroups;  // that multiply
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kSums = kTokens / 2;  // of a thread

  // Shared memory, in bytes.
  static constexpr int kTokenBlock = kTokens * 128;  // 64 k of all tokens
  static constexpr int kTokenStage = kBlocks * kTokenBlock;
  static constexpr int kCodeRow = kBlocks * 32;
  static constexpr int kCodeStage = kRows * kCodeRow;
  static constexpr int kScaleStage = kBlocks * kRows * 4;
  static constexpr int kScratchRow = 48;  // of 16 rows of the weight for one token, padded
  static constexpr int kScratch = 16 * kScratchRow;
  static constexpr int kTableAt = kStages * kTokenStage;
  static constexpr int kCodesAt = kTableAt + 256 * kWarp * 4;
  static constexpr int kScalesAt = kCodesAt + kStages * kCodeStage;
  static constexpr int kScratchAt = kScalesAt + kStages * kScaleStage;
  static constexpr int kShared = kScratchAt + kWarps * kScratch + 1024;  // to align the start
};

struct WgmmaPlan {
  int clusters;
  int token_tiles;
  int stages;  // of a tile
  int whole;   // tiles of clusters that are not split
  int split;   // and those that are
  // Places in the workspace, in bytes. Tokens begin at 0.
  int64_t sums_at;
  int64_t arrivals_at;
  int64_t bytes;
  int arrivals;

  template <class Shape>
  static WgmmaPlan make(int64_t m, int64_t n, int64_t k, int multiprocessors) {
    WgmmaPlan plan{};
    plan.token_tiles = static_cast<int>(ceil_div(m, Shape::kTokens));
    plan.stages = static_cast<int>(ceil_div(k, 64 * Shape::kBlocks));
    const int tiles =
        static_cast<int>(ceil_div(n, Shape::kRows * Shape::kCluster)) * plan.token_tiles;
    plan.clusters = multiprocessors / Shape::kCluster;
    plan.whole = tiles / plan.clusters * plan.clusters;
    plan.split = tiles - plan.whole;
    if (plan.whole == 0) plan.clusters = std::min(plan.clusters, plan.split * plan.stages);
    plan.arrivals = plan.split * Shape::kCluster * Shape::kWarps;
    plan.sums_at = int64_t{plan.token_tiles} * plan.stages * Shape::kTokenStage;
    const int64_t parts = plan.split == 0 ? 0 : 2 * plan.clusters * Shape::kCluster;
    plan.arrivals_at = plan.sums_at + parts * Shape::kRows * Shape::kTokens * 4;
    plan.bytes = plan.arrivals_at + plan.arrivals * 4;
    return plan;
  }

  // The first stage on the line of split tiles that a cluster takes.
  BNB_HD int first_of(int cluster) const {
    return static_cast<int>(int64_t{cluster} * split * stages / clusters);
  }
  // The cluster that takes a stage: the last of which the first stage is not beyond.
  BNB_HD int cluster_of(int stage) const {
    return static_cast<int>(((stage + int64_t{1}) * clusters - 1) / (int64_t{split} * stages));
  }
};

// What one cluster does, step by step: a tile, and the stages of it.
class WgmmaWalk {
 public:
  BNB_HD WgmmaWalk(const WgmmaPlan& plan, int cluster)
      : plan_(plan),
        next_whole_(cluster),
        at_(plan.first_of(cluster)),
        end_(plan.first_of(cluster + 1)) {}

  BNB_HD bool next() {
    if (next_whole_ < plan_.whole) {
      tile = next_whole_;
      next_whole_ += plan_.clusters;
      begin = 0;
      end = plan_.stages;
      return true;
    }
    if (at_ >= end_) return false;
    const int split = at_ / plan_.stages;
    tile = plan_.whole + split;
    begin = at_ - split * plan_.stages;
    end = begin + (end_ - at_ < plan_.stages - begin ? end_ - at_ : plan_.stages - begin);
    at_ += end - begin;
    return true;
  }

  // Stages of all steps together.
  BNB_HD int all_stages(int cluster) const {
    const int wholes =
        cluster < plan_.whole ? (plan_.whole - cluster - 1) / plan_.clusters + 1 : 0;
    return wholes * plan_.stages + plan_.first_of(cluster + 1) - plan_.first_of(cluster);
  }

  int tile = 0;
  int begin = 0;
  int end = 0;

 private:
  const WgmmaPlan& plan_;
  int next_whole_;
  int at_;
  int end_;
};

}  // namespace bnb::gpu
