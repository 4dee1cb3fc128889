// What the warpgroup kernel of 4-bit products for few tokens copies to shared memory, and when it
// is there. SPDX-License-Identifier: MIT
//
// Codes and tokens come in stages of four blocks of 64 k, by the copy engine. Scales come for eight
// blocks, by some warps: a copy for so few bytes of a row as a stage needs would cost more than
// that of the codes, and those that are codes themselves need an instruction or two each.
#pragma once

#include "gpu/device/scales.cuh"
#include "gpu/device/tensor_copy.cuh"
#include "gpu/device/wgmma.cuh"
#include "gpu/gemm/wgmma_sums.cuh"
#include "gpu/gemm/wgmma_table.cuh"

namespace bnb::gpu {

// What a kernel is compiled for. ordered: whether another kernel orders the tokens.
template <int tokens, int groups, int stages, bool ordered>
struct WgmmaShape {
  static constexpr int kTokens = tokens;  // of a tile
  static constexpr int kGroups = groups;  // warpgroups that multiply
  static constexpr int kBlocks = 4;       // of 64 k in a stage
  static constexpr int kStages = stages;  // on their way at a time

  static constexpr int kRows = 64 * kGroups;
  static constexpr int kWarps = 4 * kGroups;  // that multiply
  static constexpr int kThreads = 128 * (kGroups + 1);
  // Registers of a thread: those that copy give some of theirs to those that multiply.
  static constexpr int kMultiplyRegisters = kGroups == 4 ? 112 : 208;
  static constexpr int kCopyRegisters = kGroups == 4 ? 32 : 88;
  static constexpr bool kOrdered = ordered;

  // Shared memory by address. Pieces between those of the table hold scales, four rows each, and
  // barriers.
  static constexpr int kTokenBlock = kTokens * 128;  // 64 k of all tokens
  static constexpr int kTokenBytes = kBlocks * kTokenBlock;
  static constexpr int kTokenStage = kOrdered ? kTokenBytes : 0;  // in the workspace
  static constexpr int kCodeStage = kRows * kBlocks * 32;
  static constexpr int kTableAt = kSharedStart + kStages * kTokenBytes;
  static constexpr int kCodesAt = kTableAt + kPairTableBytes;
  static constexpr int kNestedAt = kCodesAt + kStages * kCodeStage;  // table of nested scales
  static constexpr int kScratchAt = kNestedAt + 1024;
  static constexpr int kEnd = kScratchAt + kWarps * 512;
  BNB_HD static constexpr uint32_t scratch(uint32_t warp, uint32_t token) {
    return kScratchAt + 512 * warp + 32 * token;
  }
  // Scales of eight blocks come together, which is what memory moves at least.
  static constexpr int kScaleBlocks = 8;
  static constexpr int kScaleStages = kScaleBlocks / kBlocks;
  static constexpr int kScaleSlots = 3;
  static constexpr int kScalePieces = kRows / 4;  // of a slot
  static constexpr int kBarrierPiece = kScaleSlots * kScalePieces;
  static constexpr int kMostShared = 228 * 1024;  // of a multiprocessor, and of a block
  static_assert(kBarrierPiece + 1 < 256 && kStages <= 8 && kScaleSlots <= 8 && kEnd <= kMostShared);
  BNB_HD static constexpr int piece(int i) { return pair_table_piece(kTableAt, i); }
};

#if BNB_HOPPER

// A place in the ring of stages.
template <class Shape>
struct WgmmaSlot {
  uint32_t number = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++number == Shape::kStages) {
      number = 0;
      parity ^= 1u;
    }
  }
  // Codes and tokens are there.
  __device__ __forceinline__ BarrierAt full() const {
    return {Shape::piece(Shape::kBarrierPiece) + 8 * number};
  }
  // All who read them have done so.
  __device__ __forceinline__ BarrierAt empty() const {
    return {Shape::piece(Shape::kBarrierPiece) + 64 + 8 * number};
  }
  __device__ __forceinline__ uint32_t tokens() const {
    return kSharedStart + number * Shape::kTokenBytes;
  }
  __device__ __forceinline__ uint32_t codes() const {
    return Shape::kCodesAt + number * Shape::kCodeStage;
  }
};

// A place in the ring of scales, which holds those of eight blocks.
template <class Shape>
struct WgmmaScaleSlot {
  uint32_t number = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++number == Shape::kScaleSlots) {
      number = 0;
      parity ^= 1u;
    }
  }
  __device__ __forceinline__ BarrierAt full() const {
    return {Shape::piece(Shape::kBarrierPiece + 1) + 8 * number};
  }
  __device__ __forceinline__ BarrierAt empty() const {
    return {Shape::piece(Shape::kBarrierPiece + 1) + 64 + 8 * number};
  }
  // A row takes 32 bytes. In every second group of four rows, halves of 16 bytes change places, so
  // that eight rows read different banks.
  __device__ __forceinline__ uint32_t place(uint32_t row, uint32_t byte) const {
    return Shape::piece(0) + (number * Shape::kScalePieces + row / 4) * 256 + row % 4 * 32 +
           (byte ^ (row / 4 % 2) << 4);
  }
};

// Threads that bring scales.
inline constexpr int kScaleThreads = 96;

// Codes and tokens of the stages of a walk. Called by a thread.
template <class Shape>
class WgmmaCopier {
 public:
  __device__ __forceinline__ WgmmaCopier(const WgmmaPlan& plan, const TensorMap& codes,
                                         const TensorMap& tokens, const char* ordered)
      : plan_(plan),
        codes_(codes),
        tokens_(tokens),
        ordered_(ordered),
        walk_(plan, wgmma_walker()) {}

  // The next stage to the next slot, when that is free. Whether there was one.
  __device__ __forceinline__ bool copy() {
    if (!next()) return false;
    slot_.empty().wait(slot_.parity ^ 1u);
    slot_.full().arrive_and_expect(Shape::kCodeStage + Shape::kTokenBytes);
    tensor_copy(slot_.codes(), codes_, column(), row(), slot_.full());
    const int tile = walk_.tile % plan_.token_tiles;
    if constexpr (Shape::kOrdered) {
      bulk_copy(slot_.tokens(),
                ordered_ + (int64_t{tile} * plan_.stages + stage_) * Shape::kTokenBytes,
                Shape::kTokenBytes, slot_.full());
    } else {
#pragma unroll
      for (int i = 0; i < Shape::kBlocks; ++i) {
        tensor_copy(slot_.tokens() + i * Shape::kTokenBlock, tokens_,
                    64 * (stage_ * Shape::kBlocks + i), tile * Shape::kTokens, slot_.full());
      }
    }
    slot_.advance();
    return true;
  }
  // Its codes to the cache that all multiprocessors share.
  __device__ __forceinline__ bool prefetch() {
    if (!next()) return false;
    prefetch_tile(codes_, column(), row());
    return true;
  }

 private:
  __device__ __forceinline__ bool next() {
    if (++stage_ < walk_.end) return true;
    if (!walk_.next()) return false;
    stage_ = walk_.begin;
    return true;
  }
  __device__ __forceinline__ int column() const { return stage_ * (Shape::kBlocks * 32 / 2); }
  __device__ __forceinline__ int row() const {
    return walk_.tile / plan_.token_tiles * Shape::kRows;
  }

  const WgmmaPlan& plan_;
  const TensorMap& codes_;
  const TensorMap& tokens_;
  const char* ordered_;
  WgmmaWalk walk_;
  int stage_ = 0;
  WgmmaSlot<Shape> slot_;
};

template <class Shape>
__device__ __forceinline__ void init_barriers() {
  WgmmaSlot<Shape> slot;
  for (int i = 0; i < Shape::kStages; ++i) {
    slot.full().init(1);
    slot.empty().init(Shape::kWarps);
    slot.advance();
  }
  WgmmaScaleSlot<Shape> scales;
  for (int i = 0; i < Shape::kScaleSlots; ++i) {
    scales.full().init(kScaleThreads);
    scales.empty().init(Shape::kWarps);
    scales.advance();
  }
  fence_barrier_init();
}

// Brings scales, eight blocks of all rows at a time, each thread those of four blocks of a row.
// `fours`: four blocks of 64 lie side by side, on a multiple of what they take, and under nested
// scales they have one absmax.
template <class Shape, bool kNested>
__device__ __forceinline__ void bring_scales(const Gemm4bit& args, const WgmmaPlan& plan,
                                             const ScaleReader<kNested>& scale_of, int log2_blocks,
                                             bool fours, int thread) {
  constexpr int kTogether = 3;  // that a thread reads at a time
  constexpr int kStep = kScaleThreads / 2;
  const int columns = static_cast<int>(args.weight.k / 64);
  const int begin = thread % 2 * 4;
  WgmmaWalk walk(plan, wgmma_walker());
  WgmmaScaleSlot<Shape> slot;
  while (walk.next()) {
    // Beyond the last row that one, whose products are not stored. Beyond the last column that
    // one, which meets tokens of zeros.
    const int64_t first_row = int64_t{walk.tile / plan.token_tiles} * Shape::kRows;
    const int last_row =
        static_cast<int>(min(int64_t{Shape::kRows}, args.weight.n - first_row)) - 1;
    const int64_t first = first_row * columns;
    const int last = (walk.end - 1) / Shape::kScaleStages;
    for (int part = walk.begin / Shape::kScaleStages; part <= last; ++part) {
      const int column = min(Shape::kScaleBlocks * part + begin, columns - 4);
      const auto four_of = [&](int row) { return first + (min(row, last_row) * columns + column); };
      const auto block_of = [&](int row, int i) {
        const int column = min(Shape::kScaleBlocks * part + begin + i, columns - 1);
        return (first + (min(row, last_row) * columns + column)) >> log2_blocks;
      };
      slot.empty().wait(slot.parity ^ 1u);
#pragma unroll 1
      for (int row = thread / 2; row < Shape::kRows; row += kTogether * kStep) {
        if constexpr (kNested) {
          if (fours) {
            typename ScaleReader<true>::StoredFour stored[kTogether];
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
              stored[i] = scale_of.load_four(four_of(row + i * kStep));
            }
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
              if (row + i * kStep >= Shape::kRows) break;
              const auto bits = [&](int j) { return float_bits(scale_of.value(stored[i], j)); };
              store_shared4(slot.place(row + i * kStep, 4 * begin),
                            make_uint4(bits(0), bits(1), bits(2), bits(3)));
            }
            continue;
          }
        }
        for (int i = 0; i < kTogether && row + i * kStep < Shape::kRows; ++i) {
          const uint32_t to = slot.place(row + i * kStep, 4 * begin);
          if constexpr (kNested) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              store_shared(to + 4 * j, float_bits(scale_of(block_of(row + i * kStep, j))));
            }
          } else if (fours) {
            start_copy_at<16>(to, args.weight.scales.absmax + four_of(row + i * kStep));
          } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              start_copy_at<4>(to + 4 * j,
                               args.weight.scales.absmax + block_of(row + i * kStep, j));
            }
          }
        }
      }
      if constexpr (kNested) {
        slot.full().arrive();
      } else {
        slot.full().arrive_after_copies();
      }
      slot.advance();
    }
  }
}

#endif  // BNB_HOPPER

}  // namespace bnb::gpu
