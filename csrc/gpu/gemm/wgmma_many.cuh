// The warpgroup kernel of 4-bit products for many tokens.
// SPDX-License-Identifier: MIT
//
// As wgmma.cu says. Products run one after the other into one set of sums; meanwhile weights are
// looked up, scaled in float and rounded. Codes come 128 bytes of a row at a time, since the copy
// engine takes as long for shorter rows, tokens in smaller stages. Each lane reads the scales of
// two rows for one block of 64 in four from memory, a stage ahead, and passes them to three others.
//
// Tokens may be in groups that have a weight each (GroupedTokens): these follow one another as one
// higher matrix, and a kernel that orders the tokens finds out which tiles there are.
#pragma once

#include "gpu/device/launch_number.h"
#include "gpu/device/scales.cuh"
#include "gpu/device/tensor_copy.cuh"
#include "gpu/gemm/wgmma_sums.cuh"
#include "gpu/gemm/wgmma_table.cuh"

namespace bnb::gpu {
namespace {

template <int tokens, int token_blocks, int token_slots, int together>
struct ManyShape {
  static constexpr int kTokens = tokens;      // of a tile
  static constexpr int kGroups = 2;           // warpgroups that multiply
  static constexpr int kTogether = together;  // products whose weights are scaled at a time
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kWarps = 4 * kGroups;  // that multiply
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kMultiplyRegisters = 224;
  static constexpr int kCopyRegisters = 56;

  static constexpr int kBlocks = 4;  // of 64 k in a stage of codes
  static constexpr int kTokenBlocks = token_blocks;
  static constexpr int kTokenSlots = token_slots;
  static constexpr int kCodeSlots = 2;
  static constexpr int kTokenBytes = kTokenBlocks * tokens * 128;  // of a slot
  static constexpr int kCodeBytes = kRows * 128;
  static constexpr int kTokenStage = kBlocks * tokens * 128;  // as WgmmaPlan counts

  // Shared memory by address.
  static constexpr int kTokensAt = kSharedStart;
  static constexpr int kCodesAt = kTokensAt + kTokenSlots * kTokenBytes;
  static constexpr int kTableAt = kCodesAt + kCodeSlots * kCodeBytes;
  static constexpr int kNestedAt = kTableAt + kPairTableBytes;  // table of nested scales
  static constexpr int kEnd = kNestedAt + 1024;
  static constexpr int kMostShared = 228 * 1024;
  static_assert(kEnd <= kMostShared && kCodesAt % 1024 == 0);
  BNB_HD static constexpr int piece(int i) { return pair_table_piece(kTableAt, i); }
  // The first pieces are scratch, four for each warp.
  static constexpr int kBarrierPiece = 4 * kWarps;
  BNB_HD static constexpr uint32_t scratch(uint32_t warp, uint32_t token) {
    return kTableAt + 128 + 256 * (4 * warp + token / 4) + token % 4 * 32;
  }
};

#if BNB_HOPPER

// Sixteen bytes of 64 k of a row, in the order of the products.
__device__ __forceinline__ uint4 ordered_chunk(const uint32_t* __restrict__ a,  // [., k / 2] pairs
                                               int64_t row, int64_t k, int64_t block, int chunk) {
  const uint32_t* pairs = a + (row * k + 64 * block) / 2 + chunk;
  return make_uint4(pairs[0], pairs[8], pairs[16], pairs[24]);
}

template <int kSlots, int kAt>
struct ManyRing : RingPlace<kSlots> {
  // What the slot holds is there; all who read it have done so.
  __device__ __forceinline__ BarrierAt full() const {
    return {static_cast<uint32_t>(kAt + 16 * this->slot)};
  }
  __device__ __forceinline__ BarrierAt empty() const {
    return {static_cast<uint32_t>(kAt + 16 * this->slot + 8)};
  }
  __device__ __forceinline__ void wait_full() const { full().wait(this->phase); }
  __device__ __forceinline__ void wait_empty() const { empty().wait(this->phase ^ 1u); }
  __device__ __forceinline__ static void init(int readers) {
    ManyRing ring;
    for (int i = 0; i < kSlots; ++i) {
      ring.full().init(1);
      ring.empty().init(readers);
      ring.advance();
    }
  }
};
template <class Shape>
using TokenRing = ManyRing<Shape::kTokenSlots, Shape::piece(Shape::kBarrierPiece)>;
template <class Shape>
using CodeRing = ManyRing<Shape::kCodeSlots, Shape::piece(Shape::kBarrierPiece + 1)>;

// Stages of codes, one after the other. Called by a thread.
template <class Shape, class Tokens>
class ManyCodeCopier {
 public:
  // n: rows of a weight.
  __device__ __forceinline__ ManyCodeCopier(const WgmmaPlan& plan, const Tokens& tokens, int64_t n,
                                            const TensorMap& map)
      : plan_(plan), tokens_(tokens), n_(n), map_(map), walk_(plan, wgmma_walker()) {
    next_tile();
  }

  __device__ __forceinline__ void copy() {
    if (!more_) return;
    ring_.wait_empty();
    ring_.full().arrive_and_expect(Shape::kCodeBytes);
    tensor_copy(Shape::kCodesAt + ring_.slot * Shape::kCodeBytes, map_, stage_ * 64, row_,
                ring_.full());
    ring_.advance();
    if (++stage_ == walk_.end) next_tile();
  }

 private:
  __device__ __forceinline__ void next_tile() {
    more_ = walk_.next();
    if (!more_) return;
    stage_ = walk_.begin;
    const WgmmaTile tile = tokens_.template tile<Shape>(plan_, walk_.tile);
    row_ = static_cast<int>(tile.tokens.group * n_ + tile.row);
  }

  const WgmmaPlan& plan_;
  const Tokens tokens_;
  int64_t n_;
  const TensorMap& map_;
  WgmmaWalk walk_;
  bool more_;
  int stage_ = 0;
  int row_ = 0;
  CodeRing<Shape> ring_;
};

// What the copying thread does after it has filled the slots of codes.
template <class Shape, class Tokens>
__device__ __forceinline__ void many_copies(const WgmmaPlan& plan, const Tokens& tokens,
                                            ManyCodeCopier<Shape, Tokens>& codes,
                                            const char* ordered) {
  WgmmaWalk walk(plan, wgmma_walker());
  TokenRing<Shape> ring;
  bool first = true;
  while (walk.next()) {
    const TokenTile tile = tokens.template tile<Shape>(plan, walk.tile).tokens;
    uint32_t bytes = Shape::kTokenBytes;
    if constexpr (Tokens::kGrouped) {
      static_assert(Shape::kTokenBlocks == 1);
      bytes = Shape::kTokenBytes / 4 * tile.template quarters<Shape>();
    }
    const char* from = ordered + tile.place * plan.stages * (Shape::kTokenStage / Shape::kTokens) +
                       int64_t{walk.begin} * (Shape::kBlocks / Shape::kTokenBlocks) * bytes;
    for (int stage = walk.begin; stage < walk.end; ++stage) {
#pragma unroll
      for (int i = 0; i < Shape::kBlocks / Shape::kTokenBlocks; ++i) {
        ring.wait_empty();
        ring.full().arrive_and_expect(bytes);
        bulk_copy(Shape::kTokensAt + ring.slot * Shape::kTokenBytes, from, bytes, ring.full());
        ring.advance();
        from += bytes;
      }
      if (!first) codes.copy();
      first = false;
    }
  }
}

// The scales of a lane's rows, a stage ahead.
template <class Shape, class Tokens, bool kNested>
class ManyScales {
  using Reader = ScaleReader<kNested>;

 public:
  // row: the first of the lane's.
  __device__ __forceinline__ ManyScales(const Gemm4bit& args, const Tokens& tokens,
                                        const WgmmaPlan& plan, int log2_blocks, const float* nested,
                                        uint32_t row, uint32_t lane)
      : plan_(plan),
        tokens_(tokens),
        reader_(args.weight.scales, nested),
        n_(args.weight.n),
        columns_(static_cast<int>(args.weight.k / 64)),
        log2_blocks_(log2_blocks),
        row_(static_cast<int>(row)),
        block_(static_cast<int>(lane % 4)),
        walk_(plan, wgmma_walker()) {
    if (walk_.next()) begin();
  }

  // Gives those of rows `row` and `row` + 8 of a stage, and asks for the next.
  __device__ __forceinline__ void take(float (&scales)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) scales[i] = reader_.value(stored_[i]);
    if (++stage_ < walk_.end) return load();
    if (walk_.next()) begin();
  }

 private:
  __device__ __forceinline__ void begin() {
    stage_ = walk_.begin;
    // Beyond the last row that one, whose products are not stored.
    const WgmmaTile tile = tokens_.template tile<Shape>(plan_, walk_.tile);
    const int last = static_cast<int>(min(int64_t{Shape::kRows}, n_ - tile.row)) - 1;
    first_ = (tile.tokens.group * n_ + tile.row) * columns_;
#pragma unroll
    for (int i = 0; i < 2; ++i) at_[i] = min(row_ + 8 * i, last) * columns_;
    load();
  }
  __device__ __forceinline__ void load() {
    // Beyond the last column that one, which meets tokens of zeros.
    const int column = min(Shape::kBlocks * stage_ + block_, columns_ - 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      stored_[i] = reader_.load((first_ + (at_[i] + column)) >> log2_blocks_);
    }
  }

  const WgmmaPlan& plan_;
  const Tokens tokens_;
  Reader reader_;
  int64_t n_;
  int columns_;
  int log2_blocks_;
  int row_;
  int block_;
  WgmmaWalk walk_;
  int stage_ = 0;
  int64_t first_ = 0;  // block of scales of the tile
  int at_[2];
  typename Reader::Stored stored_[2];
};

// Level: how the table holds levels.
template <class T, class Shape, class Tokens, class Level, bool kNested>
struct ManyMultiplier {
  static constexpr int kTogether = Shape::kTogether;
  static constexpr int kSteps = 4 / kTogether;  // of 64 k; so many are under way or prepared
  using Out = WgmmaSums<T, Shape>;

  const Out out;
  const Tokens& of_tiles;
  ManyScales<Shape, Tokens, kNested> scales;
  float unit;  // 1 / multiple of the levels
  uint32_t lane;

  typename Out::Sums sums;
  uint32_t weights[kSteps][kTogether][4];
  TokenRing<Shape> tokens;
  CodeRing<Shape> coded;

  __device__ __forceinline__ static uint32_t row_of(uint32_t warp, uint32_t lane) {
    return 16 * warp + wgmma_row_of(lane / 4);
  }

  __device__ __forceinline__ static uint32_t scaled(uint32_t pair, float scale) {
    const float2 levels = widen_pair<Level>(pair);
    return pack_pair<T>(__fmul_rn(levels.x, scale), __fmul_rn(levels.y, scale));
  }

  __device__ __forceinline__ void read_codes(int block, uint2 (&to)[2]) const {
    read_pair_codes(Shape::kCodesAt + coded.slot * Shape::kCodeBytes, row_of(out.warp, lane), block,
                    lane, to);
  }
  __device__ __forceinline__ void look_up(const uint2 (&codes)[2], int step,
                                          uint32_t (&pairs)[kTogether][4]) const {
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      look_up_product<Shape::kTableAt>(codes, step * kTogether + i, lane, pairs[i]);
    }
  }
  // The slot before the present one has been read.
  __device__ __forceinline__ void release() const {
    TokenRing<Shape> before;
    before.slot = tokens.slot == 0 ? Shape::kTokenSlots - 1 : tokens.slot - 1;
    if (lane == 0) before.empty().arrive();
  }

  __device__ __forceinline__ void run() {
    WgmmaWalk walk(out.plan, wgmma_walker());
    bool more = walk.next();
    if (!more) return;
    uint2 codes[2];
    uint32_t pairs[kTogether][4];
    coded.wait_full();
    read_codes(0, codes);
    look_up(codes, 0, pairs);
    while (more) {
      const int tile = walk.tile;
      const int begin = walk.begin;
      const int end = walk.end;
      more = walk.next();
      const WgmmaTile place = of_tiles.template tile<Shape>(out.plan, tile);
      const int quarters = Tokens::kGrouped ? place.tokens.template quarters<Shape>() : 4;
      for (int stage = begin; stage < end; ++stage) {
        multiply(quarters, stage == begin, more || stage + 1 < end, codes, pairs);
      }
      wgmma_wait<0>();
      wgmma_hold(sums);
      release();
      finish(place, tile, begin, end);
    }
  }

  // Stages `begin` to `end` of a tile have been summed up.
  __device__ __forceinline__ void finish(const WgmmaTile& place, int tile, int begin, int end) {
    const auto unit = static_cast<int>(out.warp);
    if constexpr (!Tokens::kGrouped) {
      const int parts = out.plan.parts();
      if (parts == 2) return share<2>(place, unit);
      if (parts == 4) return share<4>(place, unit);
      if constexpr (Shape::kTokens % 128 == 0) {
        if (parts == 8) return share<8>(place, unit);
      }
    }
    if (begin > 0) {
      out.leave_part(unit, sums);
      out.tell(unit);
    } else {
      if (end < out.plan.stages) out.add_parts(tile, unit, sums);
      out.store(place, unit, sums, 1.0f);
    }
  }
  // One of kParts blocks that have parts of the tile.
  template <int kParts>
  __device__ __forceinline__ void share(const WgmmaTile& place, int unit) {
    constexpr int kTokens = Shape::kTokens / kParts;
    out.template exchange<kParts>(unit, sums);
    out.template store<kTokens / 2>(place, unit, sums, 1.0f, wgmma_walker() % kParts * kTokens);
  }

  // Products with some quarters of the tokens, a group of their own from fence to commit: between
  // paths that meet within a group the compiler waits for every product.
  template <int kQuarters>
  __device__ __forceinline__ void run_products(const uint32_t (&a)[kTogether][4], uint64_t b,
                                               int step, bool accumulate) {
    constexpr int kWidth = kQuarters * Shape::kTokens / 4;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      Wgmma<T, kWidth>::run(reinterpret_cast<float (&)[kWidth / 2]>(sums), a[i],
                            advance_k(b, step * kTogether + i), accumulate || i > 0);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void run_products_of(int quarters, const uint32_t (&a)[kTogether][4],
                                                  uint64_t b, int step, bool accumulate) {
    if constexpr (Tokens::kGrouped) {
      if (quarters == 1) return run_products<1>(a, b, step, accumulate);
      if (quarters == 2) return run_products<2>(a, b, step, accumulate);
      if (quarters == 3) return run_products<3>(a, b, step, accumulate);
    }
    run_products<4>(a, b, step, accumulate);
  }

  // 256 k. `pairs` are those of the first step; the next stage's will be, if there is one.
  __device__ __forceinline__ void multiply(int quarters, bool first, bool more, uint2 (&codes)[2],
                                           uint32_t (&pairs)[kTogether][4]) {
    float own[2];  // scales of block lane % 4
    scales.take(own);
#pragma unroll
    for (int i = 0; i < 2; ++i) own[i] = __fmul_rn(own[i], unit);
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block) {
      float scale[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scale[i] = __shfl_sync(~0u, own[i], static_cast<int>(lane / 4 * 4) + block);
      }
      uint2 next[2];
      if (block + 1 < Shape::kBlocks) read_codes(block + 1, next);
      if (block % Shape::kTokenBlocks == 0) tokens.wait_full();
      const uint64_t b = swizzled_descriptor(Shape::kTokensAt + tokens.slot * Shape::kTokenBytes +
                                             block % Shape::kTokenBlocks * (Shape::kTokens * 128));
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t (&a)[kTogether][4] = weights[step];
        wgmma_wait<kSteps - 1>();
        if (step == kSteps - 1 && block % Shape::kTokenBlocks == 0 && !(first && block == 0)) {
          release();
        }
#pragma unroll
        for (int i = 0; i < 4 * kTogether; ++i) {
          a[i / 4][i % 4] = scaled(pairs[i / 4][i % 4], scale[i % 2]);
        }
        if (step + 1 < kSteps) {
          look_up(codes, step + 1, pairs);
        } else if (block + 1 < Shape::kBlocks) {
          look_up(next, 0, pairs);
        }
        run_products_of(quarters, a, b, step, !first || block > 0 || step > 0);
      }
      if ((block + 1) % Shape::kTokenBlocks == 0) tokens.advance();
      if (block + 1 < Shape::kBlocks) {
        codes[0] = next[0];
        codes[1] = next[1];
      }
      if (block + 2 == Shape::kBlocks) {  // the codes of the last block have been read
        __syncwarp();
        if (lane == 0) coded.empty().arrive();
      }
    }
    coded.advance();
    if (!more) return;
    coded.wait_full();
    read_codes(0, codes);
    look_up(codes, 0, pairs);
  }
};

#endif  // BNB_HOPPER

// made: the plan, unless the device completes it.
template <class T, class Shape, class Tokens, class Level, bool kNested>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    wgmma_gemm_4bit_many_kernel(BNB_GRID_CONSTANT const Gemm4bit args,
                                BNB_GRID_CONSTANT const Tokens tokens,
                                BNB_GRID_CONSTANT const Levels4 levels,
                                BNB_GRID_CONSTANT const TensorMap codes,
                                BNB_GRID_CONSTANT const WgmmaPlan made, char* workspace,
                                unsigned long long number, float multiple, int log2_block) {
#if BNB_HOPPER
  BNB_DYNAMIC_SHARED(dynamic);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  let_next_kernel_start();
  if constexpr (Tokens::kGrouped) wait_for_previous_kernel();
  const WgmmaPlan& plan = tokens.plan(made);
  ManyCodeCopier<Shape, Tokens> code_copier(plan, tokens, args.weight.n, codes);
  const bool copies = thread == Shape::kWarps * kWarp;
  if (copies) {
    prefetch_map(codes);
    // has_wgmma_kernels() has looked.
    if (shared_address(dynamic) != kSharedStart) __trap();
    TokenRing<Shape>::init(Shape::kWarps);
    CodeRing<Shape>::init(Shape::kWarps);
    fence_barrier_init();
    // The first codes need not wait for the kernel that orders the tokens.
    for (int i = 0; i < Shape::kCodeSlots; ++i) code_copier.copy();
  }
  auto* const nested = reinterpret_cast<float*>(dynamic + Shape::kNestedAt - kSharedStart);
  if constexpr (kNested) ScaleReader<true>::fill_code(args.weight.scales, nested);
  if (warp < Shape::kWarps) {
    fill_pair_table<Level>(Shape::kTableAt, levels, multiple, thread, Shape::kWarps * kWarp);
  }
  __syncthreads();
  if (warp < Shape::kWarps) {
    take_registers<Shape::kMultiplyRegisters>();
    using Multiplier = ManyMultiplier<T, Shape, Tokens, Level, kNested>;
    const auto lane = static_cast<uint32_t>(thread % kWarp);
    const uint32_t row = Multiplier::row_of(static_cast<uint32_t>(warp), lane);
    Multiplier multiplier{{args, plan, workspace, number, static_cast<uint32_t>(warp), lane},
                          tokens,
                          {args, tokens, plan, log2_block - 6, nested, row, lane},
                          1.0f / multiple,
                          lane};
    multiplier.run();
  } else {
    give_registers<Shape::kCopyRegisters>();
    if (copies) {
      if constexpr (!Tokens::kGrouped) wait_for_previous_kernel();
      many_copies<Shape>(plan, tokens, code_copier, workspace);
    }
  }
#endif
}

// Codes of so many rows, weights one after the other.
template <class Shape>
TensorMap code_map(const Weight4bit& weight, int64_t rows) {
  return tensor_map(weight.codes, rows, weight.k / 2, Shape::kRows, 128, Swizzle::k128,
                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
}

// rows: of all weights.
template <class T, class Shape, class Tokens>
void launch_many(const Gemm4bit& args, const Tokens& tokens, int64_t rows, const WgmmaPlan& plan,
                 char* workspace, Stream stream) {
  const Weight4bit& weight = args.weight;
  const auto launch = [&]<class Level, bool kNested>() {
    constexpr int kShared = Shape::kEnd - kSharedStart;
    const auto kernel = &wgmma_gemm_4bit_many_kernel<T, Shape, Tokens, Level, kNested>;
    allow_shared(reinterpret_cast<const void*>(kernel), kShared);
    launch_early("wgmma_gemm_4bit_many_kernel", kernel, static_cast<unsigned>(plan.blocks),
                 Shape::kThreads, kShared, stream, args, tokens, Levels4(weight),
                 code_map<Shape>(weight, rows), plan, workspace, next_launch_number(),
                 level_multiple<Level>(weight.code), log2_of(weight.block_size));
  };
  const auto launch_for = [&]<class Level>() {
    if (weight.scales.nested()) return launch.template operator()<Level, true>();
    launch.template operator()<Level, false>();
  };
  if constexpr (std::is_same_v<T, Half>) {
    if (weight.code != Code4::kCount) return launch_for.template operator()<IntegerLevel>();
  }
  launch_for.template operator()<Half>();
}

}  // namespace
}  // namespace bnb::gpu
