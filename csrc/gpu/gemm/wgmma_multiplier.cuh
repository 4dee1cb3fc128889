// The warps that multiply in the warpgroup kernel of 4-bit products.
// SPDX-License-Identifier: MIT
#pragma once

#include "gpu/device/vector_io.cuh"
#include "gpu/gemm/levels.cuh"
#include "gpu/gemm/wgmma_copies.cuh"

#if BNB_HOPPER

namespace bnb::gpu {

// The row of eight that lane 4 g + t of a fragment holds: one for which lanes that read together
// find codes in different banks, as the swizzle leaves them.
template <class Shape>
__device__ __forceinline__ constexpr uint32_t wgmma_row_of(uint32_t g) {
  return Shape::kBlocks == 4   ? (g & 3u) << 1 | g >> 2
         : Shape::kBlocks == 2 ? (g & 1u) | (g & 2u) << 1 | (g & 4u) >> 1
                               : g;
}
// Eight 16-bit elements in the order of g become elements in the order of rows.
template <class Shape>
__device__ __forceinline__ uint4 wgmma_in_row_order(uint4 x) {
  if constexpr (Shape::kBlocks == 4) {
    return make_uint4(__byte_perm(x.x, x.z, 0x5410), __byte_perm(x.x, x.z, 0x7632),
                      __byte_perm(x.y, x.w, 0x5410), __byte_perm(x.y, x.w, 0x7632));
  } else {
    return Shape::kBlocks == 2 ? make_uint4(x.x, x.z, x.y, x.w) : x;
  }
}

template <class T, class Shape>
struct WgmmaMultiplier {
  // Where weights are scaled, the table holds levels as float16, which is more exact than bfloat16.
  using TableType = std::conditional_t<Shape::kScaleSums, T, Half>;
  static constexpr int kSums = Shape::kSums;

  const Gemm4bit& args;
  const WgmmaPlan& plan;
  char* workspace;
  unsigned long long number;  // of the launch
  float unit;                 // 1 / multiple of the levels
  uint32_t warp;
  uint32_t lane;
  int rank = rank_of_block<Shape>();
  uint32_t base = shared_base<Shape>();
  bool told = true;  // the block that waits for a part

  // Sets of weights of 64 k: where registers suffice, one is decoded while the other is multiplied.
  static constexpr int kSets =
      Shape::kScaleSums && (Shape::kTokens <= 32 || Shape::kGroups <= 3) ? 2 : 1;

  static constexpr int kHigh = Shape::kHigh;
  static_assert(kHigh == 1 || !Shape::kScaleSums);

  uint32_t a[kSets][4][4];        // [product][fragment]
  uint2 codes[kSets * kHigh][2];  // of two rows, eight apart
  float scale[kHigh][2][2];       // of the same for two blocks: of what is multiplied ...
  float next_scale[2][2];         // ... and of what is decoded
  float sums[kHigh][kSums];
  WgmmaSlot<Shape> slot;             // of what is multiplied ...
  WgmmaSlot<Shape> coded;            // ... and of what is decoded
  WgmmaScaleSlot<Shape> scale_slot;  // with the scales of that

  // The table's entry for a byte lies at 256 times the byte, the lane's copy at 4 times the lane.
  __device__ __forceinline__ uint32_t look_up(uint32_t word, int byte) const {
    const uint32_t at =
        __byte_perm(word, base | 4 * lane, 0x7604u | static_cast<uint32_t>(byte) << 4);
    uint32_t pair;
    asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(pair) : "r"(at), "n"(Shape::kTableAt));
    return pair;
  }

  __device__ __forceinline__ static uint32_t scaled(uint32_t pair, float scale) {
    const float low = half_to_float(static_cast<uint16_t>(pair & 0xffffu));
    const float high = half_to_float(static_cast<uint16_t>(pair >> 16));
    return pack_pair<T>(__fmul_rn(low, scale), __fmul_rn(high, scale));
  }

  // The first of sixteen rows that the warp has of the block of threads' rows.
  __device__ __forceinline__ uint32_t first_row(int high) const {
    return warp / 4 * (64 * kHigh) + 64 * high + warp % 4 * 16;
  }
  __device__ __forceinline__ uint32_t row(int high = 0) const {
    return first_row(high) + wgmma_row_of<Shape>(lane / 4);
  }

  // The stage that comes after one, and that one's place.
  struct Next {
    bool any;         // there is one
    int stage;        // its place in k
    bool new_scales;  // its scales lie in another slot
  };

  // Scales of two blocks of a stage, or of its one.
  __device__ __forceinline__ void read_scales(int stage, int block, float (&scales)[2][2],
                                              int high = 0) const {
    const uint32_t byte = (stage % Shape::kScaleStages * Shape::kBlocks + block) * 4;
    const uint32_t from = scale_slot.place(row(high), byte);
    constexpr int kEightRows = 2 * 256;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (Shape::kBlocks > 1) {
        const uint2 numbers = load_shared2(from + i * kEightRows);
        scales[0][i] = bits_float(numbers.x);
        scales[1][i] = bits_float(numbers.y);
      } else {
        scales[0][i] = bits_float(load_shared(from + i * kEightRows));
      }
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

  // Codes of 64 k of the stage that was entered.
  __device__ __forceinline__ void read_codes(int block, uint2 (&to)[2], int high = 0) {
    constexpr int kPitch = 32 * Shape::kBlocks;
    const uint32_t of_row = row(high);
    const uint32_t swizzle = Shape::kBlocks == 4   ? of_row % 8 << 4
                             : Shape::kBlocks == 2 ? of_row / 2 % 4 << 4
                                                   : 0;
    const uint32_t place = of_row * kPitch + (lane % 4 * 8 ^ swizzle);
    const uint32_t from = coded.codes() + (place ^ static_cast<uint32_t>(block) << 5);
    to[0] = load_shared2(from);
    to[1] = load_shared2(from + 8 * kPitch);
    if (block == Shape::kBlocks - 1 && high == kHigh - 1) coded.advance();
  }

  // The weights of a product.
  __device__ __forceinline__ void look_up(const uint2 (&from)[2], int product,
                                          uint32_t (&pairs)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint2 words = from[i % 2];
      const int byte = 2 * product + i / 2;
      pairs[i] = look_up(byte < 4 ? words.x : words.y, byte % 4);
    }
  }

  // The warp has done with a stage: all who copy to it know.
  __device__ __forceinline__ void release(const WgmmaSlot<Shape>& stage) {
    if constexpr (Shape::kFan == 1) {
      if (lane == 0) stage.empty().arrive();
    } else {
      if (lane < Shape::kFan) stage.empty().arrive_at(static_cast<int>(lane));
    }
  }

  __device__ __forceinline__ uint64_t tokens_of(int block) const {
    return swizzled_descriptor(slot.tokens() + block * Shape::kTokenBlock);
  }

  // 64 k, whose weights are decoded. Meanwhile the next are: to the other set, while the codes of
  // those after them are read, or to the place of those whose products have ended.
  template <int kBlock>
  __device__ __forceinline__ void step_scaling_sums(int stage, const Next& next) {
    constexpr int kFrom = kBlock % kSets;
    constexpr int kTo = (kBlock + 1) % kSets;
    constexpr int kLeft = Shape::kBlocks - 1 - kBlock;  // blocks of this stage
    const bool more = kLeft > 0 || next.any;
    const float own[2] = {scale[0][kBlock % 2][0], scale[0][kBlock % 2][1]};
    float part[kSums];
    const uint64_t tokens = tokens_of(kBlock);
    wgmma_fence();
#pragma unroll
    for (int product = 0; product < 4; ++product) {
      Wgmma<T, Shape::kTokens>::run(part, a[kFrom][product], advance_k(tokens, product),
                                    product > 0);
      if (kSets == 1 || product == 3) wgmma_commit();
    }
    if constexpr (kSets == 2) {
      if (more) {
#pragma unroll
        for (int product = 0; product < 4; ++product) look_up(codes[kTo], product, a[kTo][product]);
      }
      if (kLeft > 1 || next.any) {
        if (kLeft == 1) enter(next);
        if (kLeft > 1 && kBlock % 2 == 0) read_scales(stage, kBlock + 2, next_scale);
        if (kLeft == 1) read_scales(next.stage, 0, next_scale);
        read_codes((kBlock + 2) % Shape::kBlocks, codes[kFrom]);
      }
      wgmma_wait<0>();
      wgmma_hold(part);
    } else {
      if (more) {
        if (kLeft == 0) enter(next);
        if (kLeft > 0 && kBlock % 2 == 1) read_scales(stage, kBlock + 1, scale[0]);
        if (kLeft == 0) read_scales(next.stage, 0, scale[0]);
        read_codes((kBlock + 1) % Shape::kBlocks, codes[0]);
        wgmma_wait<3>();
        look_up(codes[0], 0, a[0][0]);
        wgmma_wait<2>();
        look_up(codes[0], 1, a[0][1]);
        wgmma_wait<1>();
        look_up(codes[0], 2, a[0][2]);
      }
      wgmma_wait<0>();
      wgmma_hold(part);
      if (more) look_up(codes[0], 3, a[0][3]);
    }
    if (kLeft == 0) {
      release(slot);
      slot.advance();
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[0][i] = __fmaf_rn(part[i], own[i / 2 % 2], sums[0][i]);
    if constexpr (kSets == 2 && kBlock % 2 == 1) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scale[0][i / 2][i % 2] = next_scale[i / 2][i % 2];
    }
  }

  // The first weights of all, and the codes after them.
  __device__ __forceinline__ void begin_scaling_sums(int stage) {
    wait_for_scales();
    enter();
    read_scales(stage, 0, scale[0]);
    read_codes(0, codes[0]);
#pragma unroll
    for (int product = 0; product < 4; ++product) look_up(codes[0], product, a[0][product]);
    if constexpr (kSets == 2) read_codes(1, codes[1]);
  }

  __device__ __forceinline__ void stage_scaling_sums(int stage, const Next& next) {
    static_assert(Shape::kBlocks % 2 == 0);
    step_scaling_sums<0>(stage, next);
    step_scaling_sums<1>(stage, next);
    if constexpr (Shape::kBlocks == 4) {
      step_scaling_sums<2>(stage, next);
      step_scaling_sums<3>(stage, next);
    }
  }

  // The slot before the present one.
  __device__ __forceinline__ WgmmaSlot<Shape> before() const {
    return {slot.base, slot.number == 0 ? Shape::kStages - 1 : slot.number - 1, 0};
  }

  // Three products are under way while the weights of a fourth are scaled.
  __device__ __forceinline__ void stage_scaling_weights(int stage, bool first, const Next& next) {
    if (first || stage % Shape::kScaleStages == 0) wait_for_scales();
    enter();
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block) {
#pragma unroll
      for (int high = 0; high < kHigh; ++high) {
        if (block % 2 == 0) {
          read_scales(stage, block, scale[high], high);
#pragma unroll
          for (int i = 0; i < (Shape::kBlocks > 1 ? 4 : 2); ++i) {
            scale[high][i / 2][i % 2] = __fmul_rn(scale[high][i / 2][i % 2], unit);
          }
        }
        read_codes(block, codes[high], high);
      }
      const uint64_t tokens = tokens_of(block);
      uint32_t pairs[4];
      look_up(codes[0], 0, pairs);
#pragma unroll
      for (int i = 0; i < 4 * kHigh; ++i) {
        const int product = i / kHigh;
        const int high = i % kHigh;
        uint32_t (&weights)[4] = a[0][i % 4];
        wgmma_wait<3>();
        if (i == 3 && block == 0 && !first) release(before());
#pragma unroll
        for (int j = 0; j < 4; ++j) weights[j] = scaled(pairs[j], scale[high][block % 2][j % 2]);
        if (i + 1 < 4 * kHigh) look_up(codes[(i + 1) % kHigh], (i + 1) / kHigh, pairs);
        wgmma_fence();
        Wgmma<T, Shape::kTokens>::run(sums[high], weights, advance_k(tokens, product),
                                      !first || block > 0 || product > 0);
        wgmma_commit();
      }
    }
    if (next.new_scales) leave_scales();
    slot.advance();
  }

  __device__ __forceinline__ void run() {
    WgmmaWalk walk(plan, walker<Shape>());
    bool more = walk.next();
    if (!more) return;
    if constexpr (Shape::kScaleSums) begin_scaling_sums(walk.begin);
    while (more) {
      const int tile = walk.tile;
      const int begin = walk.begin;
      const int end = walk.end;
      more = walk.next();
      if constexpr (Shape::kScaleSums) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[0][i] = 0.0f;
      }
      for (int stage = begin; stage < end; ++stage) {
        const bool last = stage + 1 == end;
        const Next next{more || !last, last ? walk.begin : stage + 1,
                        last || (stage + 1) % Shape::kScaleStages == 0};
        if constexpr (Shape::kScaleSums) {
          stage_scaling_sums(stage, next);
        } else {
          stage_scaling_weights(stage, stage == begin, next);
        }
        if constexpr (Shape::kScaleSums) tell();  // otherwise products are under way
      }
      if constexpr (!Shape::kScaleSums) {
        wgmma_wait<0>();
#pragma unroll
        for (int high = 0; high < kHigh; ++high) wgmma_hold(sums[high]);
        release(before());
      }
      if (begin > 0) {
        leave_part();
        if constexpr (!Shape::kScaleSums) tell();
      } else {
        if (end < plan.stages) add_parts(tile);
#pragma unroll
        for (int high = 0; high < kHigh; ++high) store(tile, high);
      }
    }
    tell();
  }

  // Of a block's part of a tile that begins elsewhere; parts are as long as the sums of a tile.
  __device__ __forceinline__ float4* part_of(int block) const {
    constexpr int64_t kPart = Shape::kTileRows * Shape::kTokens / 4;
    return reinterpret_cast<float4*>(workspace + plan.sums_at) + block * kPart +
           tile_warp() * (kHigh * kSums * 8) + lane;
  }
  __device__ __forceinline__ unsigned long long* flag_of(int block) const {
    return reinterpret_cast<unsigned long long*>(workspace + plan.flags_at) +
           block * (Shape::kFan * Shape::kWarps) + tile_warp();
  }
  __device__ __forceinline__ int tile_warp() const {
    return rank * Shape::kWarps + static_cast<int>(warp);
  }

  // Leaves the sums to the block that has the beginning of the tile. It is told a stage later, when
  // that no longer takes time.
  __device__ __forceinline__ void leave_part() {
    float4* to = part_of(walker<Shape>());
#pragma unroll
    for (int i = 0; i < kHigh * kSums / 4; ++i) {
      const float* from = &sums[i / (kSums / 4)][4 * i % kSums];
      __stcg(to + i * kWarp, make_float4(from[0], from[1], from[2], from[3]));
    }
    told = false;
  }
  __device__ __forceinline__ void tell() {
    if (told) return;
    __syncwarp();
    if (lane == 0) set_flag(flag_of(walker<Shape>()), number);
    told = true;
  }

  // Adds what others have of a tile of which this block has the beginning.
  __device__ __forceinline__ void add_parts(int tile) {
    const int own = walker<Shape>();
    const int last = plan.block_of((tile - plan.whole + 1) * plan.stages - 1);
    for (int block = own + 1; block <= last; ++block) {
      if (lane == 0) {
        wait_for_flag(flag_of(block), number);
        *flag_of(block) = 0;  // a graph may use the number again
      }
      __syncwarp();
      add(part_of(block));
    }
  }

  __device__ __forceinline__ void add(const float4* part) {
#pragma unroll
    for (int i = 0; i < kHigh * kSums / 4; ++i) {
      const float4 x = __ldcg(part + i * kWarp);
      float* to = &sums[i / (kSums / 4)][4 * i % kSums];
      to[0] = __fadd_rn(to[0], x.x);
      to[1] = __fadd_rn(to[1], x.y);
      to[2] = __fadd_rn(to[2], x.z);
      to[3] = __fadd_rn(to[3], x.w);
    }
  }

  // Sixteen rows of the weight for sixteen tokens at a time.
  __device__ __forceinline__ void store(int tile, int high) {
    const int64_t n = args.weight.n;
    const int64_t first =
        int64_t{tile / plan.token_tiles} * Shape::kTileRows + rank * Shape::kRows + first_row(high);
    if (first >= n) return;
    const int64_t first_token = int64_t{tile % plan.token_tiles} * Shape::kTokens;
    const bool wide = n % 8 == 0 && is_aligned(args.out, 16);
    float bias[2] = {0.0f, 0.0f};
    if (args.bias != nullptr) {
      const T* values = static_cast<const T*>(args.bias);
      const int64_t row = first + wgmma_row_of<Shape>(lane / 4);
      if (row < n) bias[0] = widen(values[row]);
      if (row + 8 < n) bias[1] = widen(values[row + 8]);
    }
    const float factor = Shape::kScaleSums ? unit : 1.0f;
    const auto place_of = [&](uint32_t token) {
      return base + Shape::kScratchAt + 512 * warp + 32 * token;
    };
    const uint32_t to_scratch = place_of(lane % 8 + lane / 16 * 8) + lane / 8 % 2 * 16;
    const uint32_t from_scratch = place_of(lane / 2) + lane % 2 * 16;
    const int64_t row = first + lane % 2 * 8;
    T* out = static_cast<T*>(args.out) + (first_token + lane / 2) * n + row;
#pragma unroll
    for (int i = 0; i < kSums / 8; ++i) {
      if (first_token + 16 * i >= args.m) break;
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float shift = bias[j % 2];
        words[j] = pack_pair<T>(__fmaf_rn(sums[high][8 * i + 2 * j], factor, shift),
                                __fmaf_rn(sums[high][8 * i + 2 * j + 1], factor, shift));
      }
      __syncwarp();
      store_transposed(to_scratch, words);
      __syncwarp();
      const uint4 x = wgmma_in_row_order<Shape>(load_shared4(from_scratch));
      if (first_token + 16 * i + lane / 2 < args.m) {
        T* to = out + 16 * i * n;
        if (wide) {
          if (row < n) __stcg(reinterpret_cast<uint4*>(to), x);
        } else {
          const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            if (row + j < n) to[j] = T{static_cast<uint16_t>(pairs[j / 2] >> (j % 2 * 16))};
          }
        }
      }
    }
  }
};

}  // namespace bnb::gpu

#endif  // BNB_HOPPER
