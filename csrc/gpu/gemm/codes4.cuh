// A weight of 4-bit codes on its way to the registers from which the tensor cores multiply.
// SPDX-License-Identifier: MIT
//
// What the kernel of wgmma_dgrad.cuh asks of a format of weights. A warp reads codes as matrices of
// 8 rows (terms) by 8 pairs of bytes, transposed, so that lane 4 g + t has pair g of rows 2 t and
// 2 t + 1. It needs one byte of each pair, two neighbouring features, and its neighbour the other.
#pragma once

#include "gpu/device/scales.cuh"
#include "gpu/gemm/wgmma_table.cuh"

namespace bnb::gpu {

#if BNB_HOPPER

// Scales of blocks, divided by the multiple of the levels. kWidth: 32 for blocks of 32, 64 for all
// larger ones.
template <bool kNested, int kWidth_>
class BlockScales {
  using Reader = ScaleReader<kNested>;

 public:
  static constexpr int kWidth = kWidth_;  // features that a warpgroup reads one scale for
  using Stored = typename Reader::Stored;

  __device__ __forceinline__ BlockScales(const Scales& scales, int64_t k, int log2_block,
                                         float unit, const float* shared_code)
      : reader_(scales, shared_code), k_(k), log2_block_(log2_block), unit_(unit) {}

  __device__ __forceinline__ Stored load(int64_t row, int64_t feature) const {
    return reader_.load((row * k_ + feature) >> log2_block_);
  }
  __device__ __forceinline__ float value(const Stored& stored) const {
    return __fmul_rn(reader_.value(stored), unit_);
  }

 private:
  Reader reader_;
  int64_t k_;
  int log2_block_;
  float unit_;
};

// Level: how the table at kTableAt holds levels.
template <class Level, int kTableAt>
class Decoder4 {
 public:
  using Pair = uint32_t;  // levels of two features

  __device__ __forceinline__ Decoder4(uint32_t warp, uint32_t lane) : lane4_(4 * lane) {
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) selectors_[i] = 0x7604u | (2 * i + warp % 2) << 4;
  }

  // Where the codes of a warp of a warpgroup begin, in chunks of 16 bytes; the first feature of two
  // of lanes 4 g to 4 g + 3.
  __device__ __forceinline__ static uint32_t chunk_of(uint32_t warp) { return warp / 2; }
  __device__ __forceinline__ static uint32_t feature_of(uint32_t warp, uint32_t g) {
    return warp / 2 * 32 + 4 * g + warp % 2 * 2;
  }

  // From a word of two rows.
  __device__ __forceinline__ Pair look_up(uint32_t word, int row) const {
    const uint32_t at = __byte_perm(word, lane4_, selectors_[row]);
    Pair pair;
    asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(pair) : "r"(at), "n"(kTableAt));
    return pair;
  }
  __device__ __forceinline__ static float2 widen(Pair pair, int) { return widen_pair<Level>(pair); }

 private:
  uint32_t lane4_;
  uint32_t selectors_[2];
};

#endif  // BNB_HOPPER

// A weight of 4-bit codes as a kernel's argument. Level: how a table holds levels.
template <class Level>
struct Codes4 {
  static constexpr int kCodeBytes = 32;   // of 64 elements
  static constexpr int kLeastWidth = 32;  // elements of a row that have one scale
  static constexpr int kTableBytes = kPairTableBytes;
  static constexpr int kNestedBytes = kCodeLevels * int{sizeof(float)};

  Scales scales;
  Levels4 levels;
  float multiple;
  int64_t k;
  int log2_block;

  explicit Codes4(const Weight4bit& weight)
      : scales(weight.scales),
        levels(weight),
        multiple(level_multiple<Level>(weight.code)),
        k(weight.k),
        log2_block(log2_of(weight.block_size)) {}

#if BNB_HOPPER
  template <int kTableAt>
  using Decoder = Decoder4<Level, kTableAt>;

  // Called by all threads of the block, before a barrier.
  template <int kTableAt>
  __device__ __forceinline__ void fill(float* nested) const {
    fill_pair_table<Level>(kTableAt, levels, multiple, static_cast<int>(threadIdx.x),
                           static_cast<int>(blockDim.x));
    if (scales.codes != nullptr) ScaleReader<true>::fill_code(scales, nested);
  }

  // Which scale of a row 16 features that begin at `feature` of a tile have.
  __device__ __forceinline__ uint32_t column_of(uint32_t feature) const {
    return feature / (log2_block == 5 ? 32u : 64u);
  }

  // Calls visit(scales).
  template <class Visitor>
  __device__ __forceinline__ void with_scales(const float* nested, Visitor&& visit) const {
    const auto with = [&]<bool kNested, int kWidth>() {
      visit(BlockScales<kNested, kWidth>(scales, k, log2_block, 1.0f / multiple, nested));
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
