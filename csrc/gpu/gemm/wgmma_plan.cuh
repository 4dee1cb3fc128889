// How the warpgroup kernel of 4-bit products divides its work and its memory.
// SPDX-License-Identifier: MIT
//
// A tile of the product is some rows of the weight by some rows of a (tokens). Tiles that fill all
// blocks of threads evenly are taken whole. What remains is a line of stages (pieces of k), of
// which every block takes an equal part, whatever tiles it cuts (stream-K, Osama et al. 2023,
// arXiv:2301.03598):
//
//     tiles     | whole: 0 1 2 ... | split:    a    |    b    |    c    |
//     blocks    | 0 1 2 ... 0 1 2  |  0   |  1   |  2   |  3   |  4   | 5
//
// Warps that have part of a split tile but not its beginning store their sums, which is the first
// thing that their block does. The warp that has the beginning, the last thing that its block does,
// adds them to its own in the order of k. Where every block has one part and no more, kernels may
// let those of a tile exchange sums instead, so that each makes some of the results.
#pragma once

#include <cstdint>

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/config.h"

namespace bnb::gpu {

// Products of its numbers fit 32 bits as long as k does not exceed kLongest.
inline constexpr int64_t kLongest = 1 << 22;
inline constexpr int64_t kMostRows = 1 << 30;

struct WgmmaPlan {
  int blocks;  // of threads
  int token_tiles;
  int stages;     // of a tile
  int whole;      // tiles that are not split
  int split;      // and those that are
  int splitters;  // blocks of threads that have parts of those: the first ones, a stage at least
  // Places in the workspace, in bytes. Tokens begin at 0.
  int64_t sums_at;
  int64_t flags_at;
  int64_t bytes;

  // splitting: the stages in the time that it takes to pass on sums.
  template <class Shape>
  static WgmmaPlan make(int64_t m, int64_t n, int64_t k, int multiprocessors, int splitting = 0) {
    WgmmaPlan plan{};
    plan.token_tiles = static_cast<int>(ceil_div(m, Shape::kTokens));
    plan.stages = static_cast<int>(ceil_div(k, 64 * Shape::kBlocks));
    const int tiles = static_cast<int>(ceil_div(n, Shape::kRows)) * plan.token_tiles;
    plan.blocks = multiprocessors;
    // If nearly all multiprocessors suffice for equal parts of tiles, or what the others would save
    // is lost by splitting, no block has two tiles.
    const int even = multiprocessors / tiles * tiles;
    const int64_t all_stages = int64_t{tiles} * plan.stages;
    if (even >= multiprocessors * 15 / 16 ||
        all_stages * (multiprocessors - even) <= int64_t{splitting} * even * multiprocessors) {
      plan.blocks = even;
    }
    plan.divide(tiles);
    if (plan.whole == 0) plan.blocks = plan.splitters;
    plan.lay_out<Shape>(int64_t{plan.token_tiles} * Shape::kTokens);
    return plan;
  }

  // For at most so many tiles of tokens, and ordered rows: a device that knows how many tiles there
  // are has to set `token_tiles` and to call divide().
  template <class Shape>
  static WgmmaPlan make_for_most(int64_t token_tiles, int64_t rows, int64_t k,
                                 int multiprocessors) {
    WgmmaPlan plan{};
    plan.token_tiles = static_cast<int>(token_tiles);
    plan.stages = static_cast<int>(ceil_div(k, 64 * Shape::kBlocks));
    plan.blocks = multiprocessors;
    plan.splitters = multiprocessors;
    plan.lay_out<Shape>(rows);
    return plan;
  }

  BNB_HD void divide(int tiles) {
    whole = tiles / blocks * blocks;
    split = tiles - whole;
    splitters = split * stages < blocks ? split * stages : blocks;
  }

  // rows: of tokens, in the order of the products.
  template <class Shape>
  void lay_out(int64_t rows) {
    sums_at = rows * stages * (Shape::kTokenStage / Shape::kTokens);
    flags_at = sums_at + int64_t{splitters} * Shape::kRows * Shape::kTokens * 4;
    const int flags = parts() > 1 ? parts() : 1;  // of a unit
    bytes = flags_at + int64_t{splitters} * (Shape::kRows / 16) * flags * 8;
  }

  // Of every tile, if all blocks have a part of one and no more; otherwise 0.
  BNB_HD int parts() const {
    const bool even = whole == 0 && split > 0 && splitters == blocks && blocks % split == 0;
    return even ? blocks / split : 0;
  }

  // The first stage on the line of split tiles that a block of threads takes.
  BNB_HD int first_of(int block) const {
    if (block >= splitters) return split * stages;
    return static_cast<int>(static_cast<uint32_t>(block * split * stages) /
                            static_cast<uint32_t>(splitters));
  }
  // The block that takes a stage: the last of which the first stage is not beyond.
  BNB_HD int block_of(int stage) const {
    return static_cast<int>(static_cast<uint32_t>((stage + 1) * splitters - 1) /
                            static_cast<uint32_t>(split * stages));
  }
};

// What one block of threads does, step by step: a tile, and the stages of it.
class WgmmaWalk {
 public:
  BNB_HD WgmmaWalk(const WgmmaPlan& plan, int block)
      : plan_(plan),
        next_whole_(block),
        at_(plan.first_of(block)),
        end_(plan.first_of(block + 1)) {}

  BNB_HD bool next() {
    if (next_whole_ < plan_.whole) {
      tile = next_whole_;
      next_whole_ += plan_.blocks;
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
