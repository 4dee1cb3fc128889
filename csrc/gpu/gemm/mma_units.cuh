// What a product with a 4-bit weight for few rows of activations works on: its units, and their way
// into shared memory. For mma.cuh; mma_multiplier.cuh says what they are for.
// SPDX-License-Identifier: MIT
//
// A unit is 4 blocks of 64 k of 16 rows of the weight: 128 bytes of each, and their scales. A warp
// has two slots for units in shared memory: it multiplies one while the other is on its way. Those
// of 16 warps are enough to keep memory busy; with more, copies hold up other accesses.
//
// Of codes, 8 lanes copy a row's 128 bytes. Later lane 4 g + t reads 8 bytes of rows g and g + 8 of
// each block. For these to lie in different banks, row g has its blocks in the order 0 ^ g, 1 ^ g,
// 2 ^ g, 3 ^ g (of g its last two bits).
#pragma once

#include "gpu/device/scales.cuh"
#include "gpu/gemm/mma_multiplier.cuh"

namespace bnb::gpu {

inline constexpr int kMmaWarps = 16;  // of a block of threads, at most
inline constexpr int kMmaSlots = 2;   // of a warp, for units

inline constexpr int kMmaPrefetchBytes = 64;  // apart

inline constexpr int kMmaScalesAt = kMmaCodeBytes;  // behind the codes
inline constexpr int kMmaSlotBytes = kMmaScalesAt + kMmaScaleBytes;

// A warp's place in the work. In chunk c its units of an item are the `turns` from
// (c 2^log2_team + of_team) turns on.
struct MmaPlace {
  int lane;
  int warp;
  int teams;       // of the block of threads
  int team;        // of them
  int of_team;     // which of its warps
  int first_item;  // of the block of threads: one for each team
  int stride;      // between items of a team
  int n;           // of the weight
  int k;
  int items;
  int units;  // of an item

  __device__ __forceinline__ MmaPlace(const Weight4bit& weight, const MmaShape& shape)
      : lane(static_cast<int>(threadIdx.x % kWarp)),
        warp(static_cast<int>(threadIdx.x / kWarp)),
        teams(static_cast<int>(blockDim.x / kWarp) >> shape.log2_team),
        team(warp >> shape.log2_team),
        of_team(warp & ((1 << shape.log2_team) - 1)),
        first_item(static_cast<int>(blockIdx.x) * teams),
        stride(static_cast<int>(gridDim.x) * teams),
        n(static_cast<int>(weight.n)),
        k(static_cast<int>(weight.k)),
        items((n + kMmaRows - 1) / kMmaRows),
        units((k + kMmaUnit - 1) / kMmaUnit) {}

  // Asks for the codes of the warp's first item to come into the cache that all multiprocessors
  // share.
  __device__ __forceinline__ void prefetch(const Weight4bit& weight, const MmaShape& shape) const {
    const int item = first_item + team;
    if (item >= items) return;
    const uint8_t* const row = weight.codes + (int64_t{first_row(item)} + lane / 2) * (k / 2);
    for (int turn = 0; turn < shape.turns; ++turn) {
      const int at = (of_team * shape.turns + turn) * kMmaRowBytes + lane % 2 * kMmaPrefetchBytes;
      if (at < k / 2) prefetch_to_cache(row + at);
    }
  }

  // The last item begins earlier where it would end behind the weight.
  __device__ __forceinline__ int first_row(int item) const {
    return min(item * kMmaRows, n - kMmaRows);
  }
};

// Fills a warp's slots. kQuads: the scales of a unit's blocks are neighbours, at a multiple of
// four.
template <bool kNested, bool kQuads>
class MmaCopier {
 public:
  // Slots lie from `slots` on in the shared memory `memory`. Nested scales: scale_levels [256] must
  // be there before take().
  __device__ __forceinline__ MmaCopier(const Weight4bit& weight, const MmaShape& shape,
                                       const MmaPlace& place, char* memory, int slots,
                                       const float* scale_levels)
      : weight_(weight),
        shape_(shape),
        place_(place),
        memory_(memory),
        scale_of_(weight.scales, scale_levels),
        log2_nested_(kNested ? log2_of(weight.scales.block_size) : 0),
        slot_(static_cast<uint32_t>(slots + place.warp * (kMmaSlots * kMmaSlotBytes))),
        both_slots_(hide_origin(2 * slot_ + kMmaSlotBytes)),
        to_(hide_origin(
            static_cast<uint32_t>(place.lane / kRowLanes * kMmaRowBytes +
                                  (byte_of_row() ^ (place.lane / kRowLanes * kMmaBlockBytes))))),
        item_(place.first_item + place.team),
        unit_(place.of_team * shape.turns) {
    aim();
  }

  // Asks for the first unit.
  __device__ __forceinline__ void start() { ask(slot_); }

  // Waits for the unit asked for, asks for the next, and returns the slot that has the former.
  // Where an item has no such unit the slot holds anything.
  __device__ __forceinline__ uint32_t take() {
    const uint32_t slot = slot_;
    slot_ = both_slots_ - slot;
    wait_copies<0>();
    if constexpr (!kCopied) store_scales(slot);
    sync_warp();
    ask(slot_);
    return slot;
  }

 private:
  static constexpr int kRowLanes = kMmaRowBytes / 16;  // that copy a row
  static constexpr int kRowsAtOnce = kWarp / kRowLanes;
  // Other scales come by registers: copies of the few bytes that nested ones are take longer.
  static constexpr bool kCopied = kQuads && !kNested;

  // Starts the copies of the next unit, if there is one. What of its scales comes to registers,
  // store_scales() puts into the slot, before the next call.
  __device__ __forceinline__ void ask(uint32_t slot) {
    if (item_ < place_.items && unit_ < place_.units) {
      const int left = place_.k - unit_ * kMmaUnit;
#pragma unroll
      for (int i = 0; i < kMmaRows / kRowsAtOnce; ++i) {
        // Behind the end of a row activations are zero, and with them what codes may be there.
        if (kQuads || byte_of_row() * 2 < left) {
          start_copy<16>(memory_ + slot + to_ + i * (kRowsAtOnce * kMmaRowBytes),
                         codes_ + int64_t{i * (kRowsAtOnce / 2)} * place_.k);
        }
      }
      ask_for_scales(slot, left);
    }
    close_copy_group();
    codes_ += kMmaRowBytes;
    scale_ += kQuads ? kMmaBlocks : kMmaUnit;
    ++unit_;
    if (++turn_ == shape_.turns) {
      turn_ = 0;
      unit_ -= shape_.turns;
      item_ += place_.stride;
      if (item_ - place_.team >= place_.items) {
        item_ = place_.first_item + place_.team;
        unit_ += shape_.turns << shape_.log2_team;
      }
      aim();
    }
  }

  // Of each lane two: those of row lane / 2 for blocks 2 (lane % 2) + {0, 1}.
  __device__ __forceinline__ void store_scales(uint32_t slot) {
    auto& both =
        *reinterpret_cast<Pack<float, 2>*>(memory_ + slot + kMmaScalesAt + place_.lane * 8);
    if constexpr (kQuads) {
      both = {scale_of_.value(pair_, 0), scale_of_.value(pair_, 1)};
    } else {
      both = {scale_of_.value(stored_[0]), scale_of_.value(stored_[1])};
    }
  }

  __device__ __forceinline__ int byte_of_row() const { return place_.lane % kRowLanes * 16; }

  // Finds where the lane's part of an item begins.
  __device__ __forceinline__ void aim() {
    const auto row = static_cast<uint32_t>(place_.first_row(item_));
    const auto k = static_cast<uint32_t>(place_.k);
    const auto lane = static_cast<uint32_t>(place_.lane);
    codes_ = weight_.codes + uint64_t{row + lane / kRowLanes} * (k / 2) +
             (unit_ * kMmaRowBytes + byte_of_row());
    const uint32_t own = row + (kCopied ? lane % kMmaRows : lane / 2);
    const int block = kCopied ? 0 : place_.lane % 2 * 2;
    scale_ =
        kQuads
            ? static_cast<int64_t>(uint64_t{own} * (k / kMmaBlock)) + (unit_ * kMmaBlocks + block)
            : static_cast<int64_t>(uint64_t{own} * k) + (unit_ * kMmaUnit + block * kMmaBlock);
  }

  __device__ __forceinline__ void ask_for_scales([[maybe_unused]] uint32_t slot,
                                                 [[maybe_unused]] int left) {
    if constexpr (kCopied) {
      if (place_.lane < kMmaRows) {
        start_copy<16>(memory_ + slot + kMmaScalesAt + place_.lane * 16,
                       weight_.scales.absmax + scale_);
      }
    } else if constexpr (kQuads) {
      // As they are: whoever takes the codes apart waits for them.
      const Scales& scales = weight_.scales;
      pair_ = {scales.absmax[scale_ >> log2_nested_],
               *reinterpret_cast<const uint16_t*>(scales.codes + scale_)};
    } else {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        // For a block behind the row's end: that of the unit's first one, which is there.
        const int block = place_.lane % 2 * 2;
        const int from = (block + j) * kMmaBlock < left ? j : -block;
        stored_[j] = scale_of_.load((scale_ + from * kMmaBlock) >> shape_.log2_block);
      }
    }
  }

  const Weight4bit& weight_;
  const MmaShape& shape_;
  const MmaPlace& place_;
  char* const memory_;
  const ScaleReader<kNested> scale_of_;
  const int log2_nested_;
  uint32_t slot_;              // of the unit asked for
  const uint32_t both_slots_;  // added up
  const uint32_t to_;          // where in a slot the lane's codes go
  // What is asked for next.
  int item_;
  int unit_;
  int turn_ = 0;
  const uint8_t* codes_ = nullptr;  // 16 bytes of the lane's own, of every fourth row
  int64_t scale_ = 0;               // the lane's first scale; without kQuads, the element it is of
  // Scales on their way: nested ones of quads, which have one absmax, and those without quads.
  typename ScaleReader<kNested>::StoredFour pair_ = {};
  typename ScaleReader<kNested>::Stored stored_[2] = {};
};

}  // namespace bnb::gpu
