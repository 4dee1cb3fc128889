// Sums of products on their way from the registers of a warp to the result, for the warpgroup
// kernels of 4-bit products.
// SPDX-License-Identifier: MIT
//
// A unit is 16 rows of the weight by all tokens of a tile; a warp has its sums as wgmma leaves
// them. Codes lie in rows of 128 bytes, swizzled. So that lanes which read together find them in
// different banks, lane 4 g + t holds rows wgmma_row_of(g) and eight more, in the place of rows g
// and g + 8.
#pragma once

#include "gpu/device/vector_io.cuh"
#include "gpu/device/wgmma.cuh"
#include "gpu/gemm/wgmma_plan.cuh"
#include "gpu/gemm/wgmma_tokens.cuh"

#if BNB_HOPPER

namespace bnb::gpu {

// Which block of threads of the plan this is. Who starts first comes last in the plan: blocks wait
// for what later ones of the plan have done.
__device__ __forceinline__ int wgmma_walker() {
  return static_cast<int>(gridDim.x - 1 - blockIdx.x);
}

__device__ __forceinline__ uint32_t wgmma_row_of(uint32_t g) { return (g & 3u) << 1 | g >> 2; }
// Eight 16-bit elements in the order of g become elements in the order of rows.
__device__ __forceinline__ uint4 wgmma_in_row_order(uint4 x) {
  return make_uint4(__byte_perm(x.x, x.z, 0x5410), __byte_perm(x.x, x.z, 0x7632),
                    __byte_perm(x.y, x.w, 0x5410), __byte_perm(x.y, x.w, 0x7632));
}

template <class T, class Shape>
struct WgmmaSums {
  static constexpr int kSums = Shape::kTokens / 2;  // of a thread
  static constexpr int kUnits = Shape::kRows / 16;  // of a tile
  using Sums = float[kSums];

  const Gemm4bit& args;
  const WgmmaPlan& plan;
  char* workspace;
  unsigned long long number;  // of the launch
  uint32_t warp;
  uint32_t lane;

  // Of a block's part of a tile that begins elsewhere; parts are as long as the sums of a tile.
  __device__ __forceinline__ float4* part_of(int block, int unit) const {
    constexpr int64_t kPart = Shape::kRows * Shape::kTokens / 4;
    return reinterpret_cast<float4*>(workspace + plan.sums_at) + block * kPart +
           unit * (kSums * 8) + lane;
  }
  __device__ __forceinline__ unsigned long long* flag_of(int block, int unit) const {
    return reinterpret_cast<unsigned long long*>(workspace + plan.flags_at) + block * kUnits + unit;
  }

  // Leaves the sums to the block that has the beginning of the tile, which tell() tells.
  __device__ __forceinline__ void leave_part(int unit, const Sums& sums) const {
    float4* to = part_of(wgmma_walker(), unit);
#pragma unroll
    for (int i = 0; i < kSums / 4; ++i) {
      const float* from = sums + 4 * i;
      __stcg(to + i * kWarp, make_float4(from[0], from[1], from[2], from[3]));
    }
  }
  __device__ __forceinline__ void tell(int unit) const {
    __syncwarp();
    if (lane == 0) set_flag(flag_of(wgmma_walker(), unit), number);
  }

  // Adds what others have of a tile of which this block has the beginning.
  __device__ __forceinline__ void add_parts(int tile, int unit, Sums& sums) const {
    const int own = wgmma_walker();
    const int last = plan.block_of((tile - plan.whole + 1) * plan.stages - 1);
    for (int block = own + 1; block <= last; ++block) {
      if (lane == 0) {
        wait_for_flag(flag_of(block, unit), number);
        *flag_of(block, unit) = 0;  // a graph may use the number again
      }
      __syncwarp();
      add<kSums>(part_of(block, unit), sums);
    }
  }
  // Adds the first sums, several loads under way at a time.
  template <int kCount>
  __device__ __forceinline__ static void add(const float4* from, Sums& sums) {
    constexpr int kTogether = kCount % 32 == 0 ? 8 : kCount / 4;
#pragma unroll
    for (int begin = 0; begin < kCount / 4; begin += kTogether) {
      float4 x[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) x[i] = load_now(from + (begin + i) * kWarp);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        float* to = sums + 4 * (begin + i);
        to[0] = __fadd_rn(to[0], x[i].x);
        to[1] = __fadd_rn(to[1], x[i].y);
        to[2] = __fadd_rn(to[2], x[i].z);
        to[3] = __fadd_rn(to[3], x[i].w);
      }
    }
  }
  // In the order of the program, which the compiler would spread out.
  __device__ __forceinline__ static float4 load_now(const float4* from) {
    float4 x;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "l"(from)
                 : "memory");
    return x;
  }

  // Where all tokens meet the same weight.
  __device__ __forceinline__ void store(int tile, int unit, const Sums& sums, float factor) const {
    store(AllTokens{args.m}.tile<Shape>(plan, tile), unit, sums, factor);
  }

  // Shape::scratch() names shared memory of the warp for sixteen rows of a token.
  // Stores the first kCount sums, those of token `begin` of the tile and of more, times `factor`,
  // plus the bias, of sixteen rows for sixteen tokens at a time.
  template <int kCount = kSums>
  __device__ __forceinline__ void store(const WgmmaTile& tile, int unit, const Sums& sums,
                                        float factor, int begin = 0) const {
    const TokenTile& tokens = tile.tokens;
    const int64_t n = args.weight.n;
    const int64_t first = tile.row + 16 * unit;
    if (first >= n) return;
    const int64_t first_token = tokens.first + begin;
    const bool wide = n % 8 == 0 && is_aligned(args.out, 16);
    float bias[2] = {0.0f, 0.0f};
    if (args.bias != nullptr) {
      const T* values = static_cast<const T*>(args.bias) + tokens.group * n;
      const int64_t row = first + wgmma_row_of(lane / 4);
      if (row < n) bias[0] = widen(values[row]);
      if (row + 8 < n) bias[1] = widen(values[row + 8]);
    }
    const uint32_t to_scratch = Shape::scratch(warp, lane % 8 + lane / 16 * 8) + lane / 8 % 2 * 16;
    const uint32_t from_scratch = Shape::scratch(warp, lane / 2) + lane % 2 * 16;
    const int64_t row = first + lane % 2 * 8;
    T* out = static_cast<T*>(args.out) + (first_token + lane / 2) * n + row;
#pragma unroll
    for (int i = 0; i < kCount / 8; ++i) {
      if (first_token + 16 * i >= tokens.end) break;
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float shift = bias[j % 2];
        words[j] = pack_pair<T>(__fmaf_rn(sums[8 * i + 2 * j], factor, shift),
                                __fmaf_rn(sums[8 * i + 2 * j + 1], factor, shift));
      }
      __syncwarp();
      store_transposed(to_scratch, words);
      __syncwarp();
      const uint4 x = wgmma_in_row_order(load_shared4(from_scratch));
      if (first_token + 16 * i + lane / 2 < tokens.end) {
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

  // Exchanges sums with the other blocks that have parts of the tile, kParts in all: each gets
  // those of its share of the tokens, the first ones of `sums` then: its own plus the others' in
  // order.
  template <int kParts>
  __device__ __forceinline__ void exchange(int unit, Sums& sums) const {
    constexpr int kShare = kSums / kParts;
    const int own = wgmma_walker() % kParts;
    // Of what block `from` has for block `to`.
    const auto index = [&](int from, int to) {
      return (int64_t{wgmma_walker() - own + from} * kParts + to) * kUnits + unit;
    };
    auto* const parts = reinterpret_cast<float4*>(workspace + plan.sums_at) + lane;
    auto* const flags = reinterpret_cast<unsigned long long*>(workspace + plan.flags_at);
#pragma unroll
    for (int to = 0; to < kParts; ++to) {
      if (to == own) continue;
#pragma unroll
      for (int i = 0; i < kShare / 4; ++i) {
        const float* x = sums + to * kShare + 4 * i;
        __stcg(parts + (index(own, to) * (kShare / 4) + i) * kWarp,
               make_float4(x[0], x[1], x[2], x[3]));
      }
    }
    __syncwarp();
    const int other = static_cast<int>(lane);
    if (other < kParts && other != own) {
      set_flag(flags + index(own, other), number);
      unsigned long long* const flag = flags + index(other, own);
      wait_for_flag(flag, number);
      *flag = 0;  // a graph may use the number again
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
#pragma unroll
      for (int part = 1; part < kParts; ++part) {
        if (part == own) sums[i] = sums[part * kShare + i];
      }
    }
#pragma unroll 1
    for (int from = 0; from < kParts; ++from) {
      if (from == own) continue;
      add<kShare>(parts + index(from, own) * (kShare / 4) * kWarp, sums);
    }
  }
};

}  // namespace bnb::gpu

#endif  // BNB_HOPPER
