// How the warpgroup kernel of 4-bit products divides its work.
// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <vector>

#include "gpu/gemm/wgmma_plan.cuh"

namespace bnb::gpu {
namespace {

// What a plan asks of the shape of tiles.
template <int tokens, int rows, int blocks>
struct Shape {
  static constexpr int kTokens = tokens;
  static constexpr int kRows = rows;
  static constexpr int kBlocks = blocks;
  static constexpr int kTokenStage = blocks * tokens * 128;
};

template <class Shape>
void check_plan(int64_t m, int64_t n, int64_t k, int multiprocessors) {
  SCOPED_TRACE(testing::Message() << m << " x " << n << " x " << k << " on " << multiprocessors);
  const auto plan = WgmmaPlan::make<Shape>(m, n, k, multiprocessors);
  ASSERT_LE(plan.blocks, multiprocessors);
  std::map<int, std::multiset<int>> stages_of;  // by tile
  std::map<int, std::set<int>> blocks_of;       // by split tile
  std::set<int> parts;  // blocks with part of a tile whose beginning another one has
  std::set<int> waits;  // blocks that have the beginning of such a tile
  for (int block = 0; block < plan.blocks; ++block) {
    WgmmaWalk walk(plan, block);
    int stages = 0;
    while (walk.next()) {
      ASSERT_LT(walk.begin, walk.end);
      stages += walk.end - walk.begin;
      for (int stage = walk.begin; stage < walk.end; ++stage) stages_of[walk.tile].insert(stage);
      // Others wait for what begins within a tile, which is done before what a block waits for.
      if (walk.begin > 0) {
        ASSERT_EQ(waits.count(block), 0u);
        ASSERT_TRUE(parts.insert(block).second);
      }
      if (walk.end - walk.begin < plan.stages) {
        if (walk.begin == 0) waits.insert(block);
        blocks_of[walk.tile].insert(block);
      }
    }
    ASSERT_EQ(walk.all_stages(block), stages);
  }
  // Every stage of every tile is taken once.
  ASSERT_EQ(static_cast<int>(stages_of.size()), plan.whole + plan.split);
  for (const auto& [tile, stages] : stages_of) {
    ASSERT_EQ(static_cast<int>(stages.size()), plan.stages);
    ASSERT_EQ(std::set<int>(stages.begin(), stages.end()).size(), stages.size());
  }
  // The blocks that share a tile are those that are waited for.
  for (const auto& [tile, blocks] : blocks_of) {
    const int first_stage = (tile - plan.whole) * plan.stages;
    const int first = plan.block_of(first_stage);
    const int last = plan.block_of(first_stage + plan.stages - 1);
    ASSERT_EQ(*blocks.begin(), first);
    ASSERT_EQ(waits.count(first), 1u);
    ASSERT_EQ(*blocks.rbegin(), last);
    ASSERT_EQ(static_cast<int>(blocks.size()), last - first + 1);
  }
}

TEST(WgmmaPlan, TakesEveryStageOnce) {
  for (const int multiprocessors : {132, 114, 7}) {
    for (const int64_t n : {1, 520, 4096, 14336}) {
      for (const int64_t k : {64, 192, 1024}) {
        for (const int64_t m : {9, 300, 2048}) {
          check_plan<Shape<16, 256, 4>>(m, n, k, multiprocessors);
          check_plan<Shape<64, 128, 4>>(m, n, k, multiprocessors);
          check_plan<Shape<256, 128, 1>>(m, n, k, multiprocessors);
        }
      }
    }
  }
}

}  // namespace
}  // namespace bnb::gpu
