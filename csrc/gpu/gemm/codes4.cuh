// Weights of 4-bit codes on their way to the tensor cores, as 16-bit numbers in shared memory.
// SPDX-License-Identifier: MIT
//
// A thread decodes 64 neighbouring elements of a row. They belong to one block of codes, or to two
// of 32, so there are but 16 different weights: level * scale in float, rounded once, as
// dequantize_4bit gives them. They are a table in registers, lower and upper bytes apart, from
// which byte permutations select: that takes no shared memory, whose bandwidth the tensor cores
// need.
#pragma once

#include "gpu/device/scales.cuh"
#include "gpu/device/tensor_copy.cuh"
#include "gpu/device/wgmma.cuh"
#include "gpu/gemm/levels.cuh"

namespace bnb::gpu {

#if BNB_HOPPER

// Sixteen weights, found by their codes.
template <class T>
class WeightTable {
 public:
  __device__ __forceinline__ WeightTable(const float (&levels)[kCode4Levels], float scale) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* const x = levels + 4 * i;
      const uint32_t first = pack_pair<T>(__fmul_rn(x[0], scale), __fmul_rn(x[1], scale));
      const uint32_t second = pack_pair<T>(__fmul_rn(x[2], scale), __fmul_rn(x[3], scale));
      low_[i] = __byte_perm(first, second, 0x6420);
      high_[i] = __byte_perm(first, second, 0x7531);
    }
  }

  // Of eight codes, the upper one of each byte first.
  __device__ __forceinline__ uint4 find(uint32_t codes) const {
    const uint32_t within = codes & 0x77777777u;  // which of eight weights
    // For each, a byte of the first or of the second eight: 0 to 3, or 4 to 7.
    const uint32_t half = and_or(codes >> 1, 0x44444444u, 0x32103210u);
    const uint2 x = find_four(within, half);
    const uint2 y = find_four(within >> 16, half >> 16);
    return {x.x, x.y, y.x, y.y};
  }

 private:
  // By the lower 16 bits.
  __device__ __forceinline__ uint2 find_four(uint32_t within, uint32_t half) const {
    const uint32_t low =
        permute(permute(low_[0], low_[1], within), permute(low_[2], low_[3], within), half);
    const uint32_t high =
        permute(permute(high_[0], high_[1], within), permute(high_[2], high_[3], within), half);
    return {permute(low, high, 0x4051), permute(low, high, 0x6273)};
  }

  // As __byte_perm(), for selectors that need no masking.
  __device__ __forceinline__ static uint32_t permute(uint32_t x, uint32_t y, uint32_t selector) {
    uint32_t z;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(z) : "r"(x), "r"(y), "r"(selector));
    return z;
  }
  // (x & y) | z in one instruction.
  __device__ __forceinline__ static uint32_t and_or(uint32_t x, uint32_t y, uint32_t z) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(x), "r"(y), "r"(z));
    return result;
  }

  uint32_t low_[4];
  uint32_t high_[4];
};

// kWidth: 32 for blocks of 32, 64 for all larger ones.
template <class T, bool kNested, int kWidth>
class Decoder4 {
  static constexpr int kScales = 64 / kWidth;
  using Reader = ScaleReader<kNested>;

 public:
  // What is asked for long before it is needed.
  struct Ahead {
    typename Reader::Stored scales[kScales];
  };

  __device__ __forceinline__ Decoder4(const Scales& scales, const Levels4& levels, int64_t k,
                                      int log2_block, const float* shared_code)
      : scale_of_(scales, shared_code), k_(k), log2_block_(log2_block) {
#pragma unroll
    for (int i = 0; i < kCode4Levels; ++i) levels_[i] = levels[i];
  }

  __device__ __forceinline__ void load(int64_t row, int64_t column, Ahead& ahead) const {
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      ahead.scales[i] = scale_of_.load((row * k_ + column + i * kWidth) >> log2_block_);
    }
  }

  // Calls store(i, x) with 16 bytes of weights for i = 0 to 7. They are zeros unless the elements
  // are `there`, in the matrix.
  template <class Store>
  __device__ __forceinline__ void decode(const uint4 (&codes)[2], const Ahead& ahead, bool there,
                                         Store&& store) const {
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      const WeightTable<T> table(levels_, there ? scale_of_.value(ahead.scales[i]) : 0.0f);
#pragma unroll
      for (int j = i * 2 / kScales; j < (i + 1) * 2 / kScales; ++j) {
        store(4 * j, table.find(codes[j].x));
        store(4 * j + 1, table.find(codes[j].y));
        store(4 * j + 2, table.find(codes[j].z));
        store(4 * j + 3, table.find(codes[j].w));
      }
    }
  }

 private:
  Reader scale_of_;
  int64_t k_;
  int log2_block_;
  float levels_[kCode4Levels];
};

#endif  // BNB_HOPPER

// A weight of 4-bit codes as a kernel's argument: what the kernel of backward products asks of any.
struct Codes4 {
  static constexpr int kCodeBytes = 32;  // of 64 elements
  static constexpr Swizzle kSwizzle = Swizzle::k64;
  static constexpr int kSharedBytes = kCodeLevels * int{sizeof(float)};

  Scales scales;
  Levels4 levels;
  int64_t k;
  int log2_block;

  explicit Codes4(const Weight4bit& weight)
      : scales(weight.scales),
        levels(weight),
        k(weight.k),
        log2_block(log2_of(weight.block_size)) {}

#if BNB_HOPPER
  // Called by all threads of the block, before a barrier.
  __device__ __forceinline__ void fill(char* shared) const {
    if (scales.codes != nullptr) {
      ScaleReader<true>::fill_code(scales, reinterpret_cast<float*>(shared));
    }
  }

  // Calls visit(decoder).
  template <class T, class Visitor>
  __device__ __forceinline__ void with_decoder(const char* shared, Visitor&& visit) const {
    const auto with = [&]<bool kNested, int kWidth>() {
      const auto* const code = reinterpret_cast<const float*>(shared);
      visit(Decoder4<T, kNested, kWidth>(scales, levels, k, log2_block, code));
    };
    if (scales.codes != nullptr) {
      log2_block == 5 ? with.template operator()<true, 32>() : with.template operator()<true, 64>();
    } else {
      log2_block == 5 ? with.template operator()<false, 32>()
                      : with.template operator()<false, 64>();
    }
  }
#endif
};

}  // namespace bnb::gpu
