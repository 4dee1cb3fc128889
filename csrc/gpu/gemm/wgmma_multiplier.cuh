// The warps that multiply in the warpgroup kernel of 4-bit products for few tokens.
// SPDX-License-Identifier: MIT
#pragma once

#include "gpu/gemm/wgmma_copies.cuh"

#if BNB_HOPPER

namespace bnb::gpu {

template <class T, class Shape>
struct WgmmaMultiplier {
  using Out = WgmmaSums<T, Shape>;
  static constexpr int kSums = Out::kSums;

  const Out out;
  float unit;  // 1 / multiple of the levels
  uint32_t lane;
  bool told = true;  // the block that waits for a part

  // Two sets of weights of 64 k: one is decoded while the other is multiplied.
  uint32_t a[2][4][4];                         // [set][product][fragment]
  uint32_t codes[2][Shape::kOrdered ? 2 : 8];  // of 64 k of two rows, eight apart
  float scale[2][2];       // of the same for two blocks: of what is multiplied ...
  float next_scale[2][2];  // ... and of what is decoded
  typename Out::Sums sums;
  WgmmaSlot<Shape> slot;             // of what is multiplied ...
  WgmmaSlot<Shape> coded;            // ... and of what is decoded
  WgmmaScaleSlot<Shape> scale_slot;  // with the scales of that

  __device__ __forceinline__ uint32_t row() const { return 16 * out.warp + wgmma_row_of(lane / 4); }

  // The stage that comes after one, and that one's place.
  struct Next {
    bool any;         // there is one
    int stage;        // its place in k
    bool new_scales;  // its scales lie in another slot
  };

  // Scales of two blocks of a stage.
  __device__ __forceinline__ void read_scales(int stage, int block, float (&scales)[2][2]) const {
    const uint32_t byte = (stage % Shape::kScaleStages * Shape::kBlocks + block) * 4;
    const uint32_t from = scale_slot.place(row(), byte);
    constexpr int kEightRows = 2 * 256;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint2 numbers = load_shared2(from + i * kEightRows);
      scales[0][i] = bits_float(numbers.x);
      scales[1][i] = bits_float(numbers.y);
    }
  }
  __device__ __forceinline__ void wait_for_scales() const {
    scale_slot.full().wait(scale_slot.parity);
  }
  __device__ __forceinline__ void leave_scales() {
    if (lane == 0) scale_slot.empty().arrive();
    scale_slot.advance();
  }

  // Waits for a stage.
  __device__ __forceinline__ void enter() const { coded.full().wait(coded.parity); }
  // Waits for the next one, and for its scales.
  __device__ __forceinline__ void enter(const Next& next) {
    if (next.new_scales) {
      leave_scales();
      wait_for_scales();
    }
    enter();
  }

  // Codes of 64 k of the stage that was entered. Where tokens are not ordered, four lanes read the
  // same, and use a byte of each word.
  __device__ __forceinline__ void read_codes(int block) {
    if constexpr (Shape::kOrdered) {
      uint2 words[2];
      read_pair_codes(coded.codes(), row(), block, lane, words);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        codes[i][0] = words[i].x;
        codes[i][1] = words[i].y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t chunk = static_cast<uint32_t>(2 * block + i / 2) ^ row() % 8;
        const uint4 x = load_shared4(coded.codes() + (row() + i % 2 * 8) * 128 + chunk * 16);
        uint32_t* to = codes[i % 2] + i / 2 * 4;
        to[0] = x.x;
        to[1] = x.y;
        to[2] = x.z;
        to[3] = x.w;
      }
    }
    if (block == Shape::kBlocks - 1) coded.advance();
  }
  __device__ __forceinline__ void look_up(int set) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int product = i / 4;
      const int eight = 2 * product + i % 4 / 2;  // of k; their byte or their word
      const uint32_t word = codes[i % 2][Shape::kOrdered ? eight / 4 : eight];
      const uint32_t byte = Shape::kOrdered ? static_cast<uint32_t>(eight % 4) : lane % 4;
      a[set][product][i % 4] = look_up_pair<Shape::kTableAt>(word, byte, lane);
    }
  }

  // 64 k, whose weights are decoded. Meanwhile the next are, and the codes of those after them are
  // read.
  template <int kBlock>
  __device__ __forceinline__ void step(int stage, const Next& next) {
    constexpr int kFrom = kBlock % 2;
    constexpr int kTo = (kBlock + 1) % 2;
    constexpr int kLeft = Shape::kBlocks - 1 - kBlock;  // blocks of this stage
    const float own[2] = {scale[kBlock % 2][0], scale[kBlock % 2][1]};
    typename Out::Sums part;
    const uint64_t tokens = swizzled_descriptor(slot.tokens() + kBlock * Shape::kTokenBlock);
    wgmma_fence();
#pragma unroll
    for (int product = 0; product < 4; ++product) {
      Wgmma<T, Shape::kTokens>::run(part, a[kFrom][product], advance_k(tokens, product),
                                    product > 0);
    }
    wgmma_commit();
    if (kLeft > 0 || next.any) look_up(kTo);
    if (kLeft > 1 || next.any) {
      if (kLeft == 1) enter(next);
      if (kLeft > 1 && kBlock % 2 == 0) read_scales(stage, kBlock + 2, next_scale);
      if (kLeft == 1) read_scales(next.stage, 0, next_scale);
      read_codes((kBlock + 2) % Shape::kBlocks);
    }
    wgmma_wait<0>();
    wgmma_hold(part);
    if (kLeft == 0) {
      if (lane == 0) slot.empty().arrive();
      slot.advance();
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = __fmaf_rn(part[i], own[i / 2 % 2], sums[i]);
    if constexpr (kBlock % 2 == 1) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scale[i / 2][i % 2] = next_scale[i / 2][i % 2];
    }
  }

  // The first weights of all, and the codes after them.
  __device__ __forceinline__ void begin(int stage) {
    wait_for_scales();
    enter();
    read_scales(stage, 0, scale);
    read_codes(0);
    look_up(0);
    read_codes(1);
  }

  __device__ __forceinline__ void run() {
    WgmmaWalk walk(out.plan, wgmma_walker());
    bool more = walk.next();
    if (!more) return;
    begin(walk.begin);
    const int unit_of_tile = static_cast<int>(out.warp);
    // Others are told of a part a stage after it was left, when that no longer takes time.
    const auto tell = [&] {
      if (!told) out.tell(unit_of_tile);
      told = true;
    };
    while (more) {
      const int tile = walk.tile;
      const int first = walk.begin;
      const int end = walk.end;
      more = walk.next();
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
      for (int stage = first; stage < end; ++stage) {
        const bool last = stage + 1 == end;
        const Next next{more || !last, last ? walk.begin : stage + 1,
                        last || (stage + 1) % Shape::kScaleStages == 0};
        step<0>(stage, next);
        step<1>(stage, next);
        step<2>(stage, next);
        step<3>(stage, next);
        tell();
      }
      if (first > 0) {
        out.leave_part(unit_of_tile, sums);
        told = false;
      } else {
        if (end < out.plan.stages) out.add_parts(tile, unit_of_tile, sums);
        out.store(tile, unit_of_tile, sums, unit);
      }
    }
    tell();
  }
};

}  // namespace bnb::gpu

#endif  // BNB_HOPPER
