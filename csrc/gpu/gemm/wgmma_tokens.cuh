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

// All meet the same weight.
struct AllTokens {
  static constexpr bool kGrouped = false;

  int64_t m;

  BNB_HD const WgmmaPlan& plan(const WgmmaPlan& made) const { return made; }
  template <class Shape>
  BNB_HD TokenTile tile(int i) const {
    const int64_t first = int64_t{i} * Shape::kTokens;
    return {first, m, 0, first};
  }
};

// What a kernel finds out about groups for the next one.
struct GroupedWork {
  WgmmaPlan plan;
  TokenTile tiles[1];  // of the plan

  static int64_t bytes(int64_t most_tiles) {
    return static_cast<int64_t>(sizeof(GroupedWork) + (most_tiles - 1) * sizeof(TokenTile));
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
  template <class Shape>
  BNB_HD TokenTile tile(int i) const {
    return work->tiles[i];
  }
};

}  // namespace bnb::gpu
