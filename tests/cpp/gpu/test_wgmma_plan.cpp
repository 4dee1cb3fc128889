// How the warpgroup kernel of 4-bit products divides its work.
// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>
#include <vector>

#include "gpu/gemm/wgmma_plan.cuh"
#include "gpu/gemm/wgmma_tokens.cuh"

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

void check_plan(const WgmmaPlan& plan, int multiprocessors) {
  ASSERT_LE(plan.blocks, multiprocessors);
  std::map<int, std::multiset<int>> stages_of;  // by tile
  std::map<int, std::set<int>> blocks_of;       // by split tile
  std::set<int> parts;  // blocks with part of a tile whose beginning another one has
  std::set<int> waits;  // blocks that have the beginning of such a tile
  for (int block = 0; block < plan.blocks; ++block) {
    WgmmaWalk walk(plan, block);
    while (walk.next()) {
      ASSERT_LT(walk.begin, walk.end);
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

template <class Shape>
void check_plan(int64_t m, int64_t n, int64_t k, int multiprocessors) {
  SCOPED_TRACE(testing::Message() << m << " x " << n << " x " << k << " on " << multiprocessors);
  check_plan(WgmmaPlan::make<Shape>(m, n, k, multiprocessors), multiprocessors);
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

TEST(WgmmaPlan, TakesEveryStageOfTilesThatADeviceCounts) {
  using Tile = Shape<256, 128, 4>;
  for (const int64_t k : {64, 1024, 4096}) {
    for (const int tiles : {0, 1, 5, 40}) {
      SCOPED_TRACE(testing::Message() << tiles << " tiles of " << k);
      auto plan = WgmmaPlan::make_for_most<Tile>(40, 9000, k, 132);
      const int64_t bytes = plan.bytes;
      plan.token_tiles = tiles;
      plan.divide(12 * tiles);
      check_plan(plan, 132);
      ASSERT_GE(bytes, plan.flags_at + int64_t{plan.splitters} * (Tile::kRows / 16) * 8);
    }
  }
}

TEST(GroupedTokens, PlacesDoNotOverlap) {
  using Tile = Shape<128, 128, 4>;
  std::mt19937 random(0);
  for (int round = 0; round < 200; ++round) {
    std::vector<int32_t> ends;
    for (int i = 0; i < 40; ++i) {
      const int before = ends.empty() ? 0 : ends.back();
      ends.push_back(before + static_cast<int>(random() % (i % 3 == 0 ? 1 : 400)));
    }
    const Groups groups{ends.data(), false, static_cast<int64_t>(ends.size()), ends.back() + 5};
    int64_t free = 0;
    for (int64_t i = 0; i < groups.count; ++i) {
      const int64_t begin = groups.begin(i);
      const int64_t place = GroupedTokens::place_of<Tile>(begin, i);
      ASSERT_GE(place, free);
      ASSERT_EQ(place % (Tile::kTokens / 4), 0);
      free = place;
      for (int64_t row = begin; row < groups.end(i); row += Tile::kTokens) {
        free += TokenTile{row, groups.end(i), i, place}.quarters<Tile>() * (Tile::kTokens / 4);
      }
    }
    ASSERT_LE(free, GroupedTokens::ordered_rows<Tile>(groups));
  }
}

TEST(WgmmaPlan, SharesTilesAmongBlocksThatHaveOneEach) {
  const auto plan = [](int64_t n, int64_t k, int splitting) {
    return WgmmaPlan::make<Shape<128, 128, 4>>(128, n, k, 132, splitting);
  };
  EXPECT_EQ(plan(4096, 4096, 0).parts(), 4);
  EXPECT_EQ(plan(8192, 4096, 0).parts(), 2);
  EXPECT_EQ(plan(128, 2048, 0).parts(), 8);
  // By splitting 112 tiles a block saves 2.4 stages of 16, and 4.8 of 32.
  EXPECT_EQ(plan(14336, 4096, 0).parts(), 0);
  EXPECT_EQ(plan(14336, 4096, 3).split, 0);
  EXPECT_EQ(plan(14336, 8192, 3).split, 112);
}

}  // namespace
}  // namespace bnb::gpu
