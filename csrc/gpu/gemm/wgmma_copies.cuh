// What the warpgroup kernel of 4-bit products copies to shared memory, and when it is there.
// SPDX-License-Identifier: MIT
//
// Codes and tokens come in stages of one to four blocks of 64 k, by the copy engine. Scales come
// for eight blocks, by some warps: a copy for so few bytes of a row as a stage needs would cost
// more than that of the codes, and those that are codes themselves need an instruction or two each.
#pragma once

#include "gpu/device/scales.cuh"
#include "gpu/device/tensor_copy.cuh"
#include "gpu/device/wgmma.cuh"
#include "gpu/gemm/wgmma_plan.cuh"

#if BNB_HOPPER

namespace bnb::gpu {

// Which block of threads of the plan, or cluster of them, this is, and which block of the cluster.
// Who starts first comes last in the plan: blocks wait for what later ones of the plan have done.
template <class Shape>
__device__ __forceinline__ int walker() {
  return static_cast<int>(gridDim.x - 1 - blockIdx.x) / Shape::kFan;
}
template <class Shape>
__device__ __forceinline__ int rank_of_block() {
  return Shape::kFan == 1 ? 0 : cluster_rank();
}

// What is to be added to addresses of Shape: those of a cluster's blocks differ in the upper bits.
template <class Shape>
__device__ __forceinline__ uint32_t shared_base() {
  BNB_DYNAMIC_SHARED(dynamic);
  return Shape::kFan == 1 ? 0 : shared_address(dynamic) - Shape::kStart;
}

// A place in the ring of stages.
template <class Shape>
struct WgmmaSlot {
  uint32_t base = shared_base<Shape>();
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
    return {base + Shape::piece(Shape::kBarrierPiece) + 8 * number};
  }
  // All who read them have done so.
  __device__ __forceinline__ BarrierAt empty() const {
    return {base + Shape::piece(Shape::kBarrierPiece) + 64 + 8 * number};
  }
  __device__ __forceinline__ uint32_t tokens() const {
    return base + Shape::kStart + number * Shape::kTokenStage;
  }
  __device__ __forceinline__ uint32_t codes() const {
    return base + Shape::kCodesAt + number * Shape::kCodeStage;
  }
};

// A place in the ring of scales, which holds those of eight blocks.
template <class Shape>
struct WgmmaScaleSlot {
  uint32_t base = shared_base<Shape>();
  uint32_t number = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++number == Shape::kScaleSlots) {
      number = 0;
      parity ^= 1u;
    }
  }
  __device__ __forceinline__ BarrierAt full() const {
    return {base + Shape::piece(Shape::kBarrierPiece + 1) + 8 * number};
  }
  __device__ __forceinline__ BarrierAt empty() const {
    return {base + Shape::piece(Shape::kBarrierPiece + 1) + 64 + 8 * number};
  }
  // A row takes 32 bytes. In every second group of four rows, halves of 16 bytes change places, so
  // that eight rows read different banks.
  __device__ __forceinline__ uint32_t place(uint32_t row, uint32_t byte) const {
    return base + Shape::piece(0) + (number * Shape::kScalePieces + row / 4) * 256 + row % 4 * 32 +
           (byte ^ (row / 4 % 2) << 4);
  }
};

// Tokens of the stages of a walk, one after the other, to slots that are free. Called by a thread.
template <class Shape>
class WgmmaTokenCopier {
 public:
  __device__ __forceinline__ WgmmaTokenCopier(const WgmmaPlan& plan, const char* ordered,
                                              const TensorMap& map)
      : plan_(plan), ordered_(ordered), map_(map), walk_(plan, walker<Shape>()) {}

  __device__ __forceinline__ void copy() {
    if (stage_ == walk_.end) {
      walk_.next();
      stage_ = walk_.begin;
    }
    const int64_t at = int64_t{walk_.tile % plan_.token_tiles} * plan_.stages + stage_;
    if constexpr (Shape::kFan == 1) {
      bulk_copy(slot_.tokens(), ordered_ + at * Shape::kTokenStage, Shape::kTokenStage,
                slot_.full());
    } else {
      const int part = Shape::kTokenPartRows * cluster_rank();
      tensor_copy_to_cluster(slot_.tokens() + part * 128, map_, 0,
                             static_cast<int>(at * (Shape::kTokenStage / 128)) + part, slot_.full(),
                             (1u << Shape::kFan) - 1u);
    }
    ++stage_;
    slot_.advance();
  }

 private:
  const WgmmaPlan& plan_;
  const char* ordered_;
  const TensorMap& map_;
  WgmmaWalk walk_;
  int stage_ = 0;
  WgmmaSlot<Shape> slot_;
};

// Threads that bring scales.
inline constexpr int kScaleThreads = 96;

// Codes of the stages of a walk. Called by a thread.
template <class Shape>
class WgmmaCodeCopier {
 public:
  __device__ __forceinline__ WgmmaCodeCopier(const WgmmaPlan& plan, const TensorMap& map)
      : plan_(plan), map_(map), walk_(plan, walker<Shape>()) {}

  // To the next slot, which is free.
  __device__ __forceinline__ void copy() {
    if (stage_ == walk_.end) {
      walk_.next();
      stage_ = walk_.begin;
    }
    const int row =
        walk_.tile / plan_.token_tiles * Shape::kTileRows + rank_of_block<Shape>() * Shape::kRows;
    slot_.full().arrive_and_expect(Shape::kCodeStage + Shape::kTokenStage);
    tensor_copy(slot_.codes(), map_, stage_ * (Shape::kBlocks * 32 / 2), row, slot_.full());
    ++stage_;
    slot_.advance();
  }
  __device__ __forceinline__ void wait() const { slot_.empty().wait(slot_.parity ^ 1u); }

 private:
  const WgmmaPlan& plan_;
  const TensorMap& map_;
  WgmmaWalk walk_;
  int stage_ = 0;
  WgmmaSlot<Shape> slot_;
};

template <class Shape>
__device__ __forceinline__ void init_barriers() {
  WgmmaSlot<Shape> slot;
  for (int i = 0; i < Shape::kStages; ++i) {
    slot.full().init(1);
    slot.empty().init(Shape::kWarps * Shape::kFan);
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
  WgmmaWalk walk(plan, walker<Shape>());
  WgmmaScaleSlot<Shape> slot;
  while (walk.next()) {
    // Beyond the last row that one, whose products are not stored. Beyond the last column that
    // one, which meets tokens of zeros.
    const int64_t first_row = int64_t{walk.tile / plan.token_tiles} * Shape::kTileRows +
                              rank_of_block<Shape>() * Shape::kRows;
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

}  // namespace bnb::gpu

#endif  // BNB_HOPPER
