// Which rows of a ("tokens") are in the tiles of the warpgroup kernels of 4-bit products.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/kernels/grouped_gemm_4bit.h"
#include "gpu/gemm/wgmma_plan.cuh"

namespace bnb::gpu {

struct TokenTile {
  int64_t first;  // row
  int64_t end;    // of the rows that are there
  int64_t group;  // whose weight they meet
  int64_t place;  // of the first row among ordered ones

  // Quarters of a tile that have rows.
  template <class Shape>
  BNB_HD int quarters() const {
    const int64_t rows = end - first < Shape::kTokens ? end - first : int64_t{Shape::kTokens};
    return static_cast<int>(ceil_div(4 * rows, int64_t{Shape::kTokens}));
  }
};

// What a tile of the product is made of.
struct WgmmaTile {
  TokenTile tokens;
  int64_t row;  // the first of the weight
};

// All meet the same weight.
struct AllTokens {
  static constexpr bool kGrouped = false;

  int64_t m;

  BNB_HD const WgmmaPlan& plan(const WgmmaPlan& made) const { return made; }
  template <class Shape>
  BNB_HD WgmmaTile tile(const WgmmaPlan& plan, int i) const {
    const int64_t token = int64_t{i % plan.token_tiles} * Shape::kTokens;
    return {{token, m, 0, token}, int64_t{i / plan.token_tiles} * Shape::kRows};
  }
};

// What a kernel finds out about groups for the next one.
struct GroupedWork {
  struct Tile {
    TokenTile tokens;
    // Of its group: where they begin among all, and how many there are.
    int first;
    int count;
  };

  WgmmaPlan plan;
  int row_tiles;  // of a weight
  Tile tiles[1];  // of tokens

  static int64_t bytes(int64_t most_tiles) {
    return static_cast<int64_t>(sizeof(GroupedWork) + (most_tiles - 1) * sizeof(Tile));
  }
};

// Each group has a weight of its own, and tiles of its own. Of those that are not full, quarters
// without rows are left out.
struct GroupedTokens {
  static constexpr bool kGrouped = true;

  const GroupedWork* work;

  // Ordered rows of a group lie behind those of the groups before it, whole quarters of tiles. No
  // group needs to know how many those are: so many rows at most are lost to each.
  template <class Shape>
  BNB_HD static int64_t place_of(int64_t first_row, int64_t group) {
    constexpr int64_t kQuarter = Shape::kTokens / 4;
    return (first_row + group * (kQuarter - 1)) / kQuarter * kQuarter;
  }
  // Room for all.
  template <class Shape>
  static int64_t ordered_rows(const Groups& groups) {
    return place_of<Shape>(groups.rows, groups.count) + Shape::kTokens / 4;
  }

  BNB_HD const WgmmaPlan& plan(const WgmmaPlan&) const { return work->plan; }
  // Those of a group follow one another, so that its tokens and its weight stay in the cache.
  template <class Shape>
  BNB_HD WgmmaTile tile(const WgmmaPlan&, int i) const {
    const GroupedWork::Tile& any = work->tiles[i / work->row_tiles];  // of the same group
    const int own = i - any.first * work->row_tiles;
    return {work->tiles[any.first + own % any.count].tokens,
            int64_t{own / any.count} * Shape::kRows};
  }
};

}  // namespace bnb::gpu
