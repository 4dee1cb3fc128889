// Products of groups of rows with a 4-bit weight for each group, on tensor cores.
// SPDX-License-Identifier: MIT
//
// out^T = w a^T as in mma.cuh: few rows of activations, those of a group, beside 16 or 32 rows of
// its weight. What bounds the kernel is reading the codes of groups that have rows.
//
// Groups are cut into tiles of rows. Every block of threads counts them, so that all agree on a
// list of items (tile, rows of the weight) without empty groups. A warp makes an item alone, unit
// by unit: 256 k, which are 128 bytes of each row of codes. So warps never wait for each other, and
// those of a block, whose items are neighbours, find activations in the first-level cache.
//
//     codes    global memory to shared memory by copies of 16 bytes, kGroupedStages - 1 units ahead
//     scales   through registers, where nested ones are decoded, one unit later
//     weights  pairs of levels from a table in shared memory; scales multiply sums over 64 k
//
// A lane takes 16 neighbouring k of every 64: 8 bytes of codes of rows g and g + 8, and 32 of each
// row of activations. In shared memory the 16 bytes of chunk c of row r lie in place c ^ 2 (r % 4),
// so that these reads do not conflict.
#pragma once

#include <algorithm>

#include "bitsandbytes/kernels/grouped_gemm_4bit.h"
#include "gpu/device/scales.cuh"
#include "gpu/gemm/group_tiles.cuh"
#include "gpu/gemm/levels.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {

inline constexpr int kGroupedStages = 3;
inline constexpr int kGroupedBlock = 64;  // k that share a scale
inline constexpr int kGroupedBlocks = 4;  // of a unit
inline constexpr int kGroupedUnit = kGroupedBlock * kGroupedBlocks;
inline constexpr int kGroupedRowBytes = kGroupedUnit / 2;

// Shared memory begins with lines of 256 bytes: the entry of the table of pairs for a byte of
// codes, one for each lane, and the scales of 8 rows of a unit. So the place of an entry is the
// byte in the second byte of a word. Rows of codes follow.
inline constexpr int kGroupedLine = 256;
inline constexpr int kGroupedTableBytes = 256 * kGroupedLine;

// An item: kRowTilesOf x kColTilesOf tiles of the tensor core, 16 rows of the weight and 8 of
// activations each.
template <int kRowTilesOf, int kColTilesOf>
struct GroupedShape {
  static constexpr int kRowTiles = kRowTilesOf;
  static constexpr int kColTiles = kColTilesOf;
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kCols = 8 * kColTiles;
  static constexpr int kWarps = 16 / kRowTiles;                 // of a block of threads, at most
  static constexpr int kStageBytes = kRows * kGroupedRowBytes;  // of a warp
  static constexpr int kScaleLines = kRows / 8;
  static constexpr int kLaneScales = kRows * kGroupedBlocks / kWarp;  // that a lane asks for
  static_assert(kWarps * kGroupedStages * kScaleLines <= 256);

  static int shared_bytes(int warps) {
    return kGroupedTableBytes + warps * kGroupedStages * kStageBytes;
  }
};

template <class T, class Shape, bool kNested>
__global__ void __launch_bounds__(Shape::kWarps* kWarp, 1)
    grouped_gemm_4bit_mma_kernel(BNB_GRID_CONSTANT const GroupedGemm4bit args,
                                 BNB_GRID_CONSTANT const Levels4 levels, float multiple,
                                 int log2_block) {
  constexpr int kColTiles = Shape::kColTiles;
  constexpr int kRowTiles = Shape::kRowTiles;
  BNB_DYNAMIC_SHARED(memory);
  __shared__ int tiles_before[kMostGroups + 1];
  __shared__ float shared_code[kNested ? kCodeLevels : 1];
  const ScaleReader<kNested> scale_of(args.weight.scales, shared_code);
  const Groups& groups = args.groups;

  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int lane = thread % kWarp;
  const int warp = thread / kWarp;
  const int warps = threads / kWarp;
  const int group = lane / 4;
  const int place = lane % 4;
  const int64_t n = args.weight.n;
  const int64_t k = args.weight.k;

  // Two weights in a word, the first in the lower half, for every byte of codes; a copy for every
  // lane, whose words lie in a bank of their own, so that lookups never conflict.
  for (int i = thread; i < 256 * kWarp; i += threads) {
    *reinterpret_cast<uint32_t*>(memory + i / kWarp * kGroupedLine + i % kWarp * 4) =
        pair_of_levels<T>(levels, i / kWarp, multiple);
  }
  const auto lookup = [&](uint32_t word, int byte) {
    const uint32_t at = byte_permute(word, static_cast<uint32_t>(lane * 4),
                                     0x5504u | (static_cast<uint32_t>(byte) << 4));
    return *reinterpret_cast<const uint32_t*>(memory + at);
  };
  // Rows of no group.
  for (int64_t i = groups.begin(groups.count) * n + int64_t{blockIdx.x} * threads + thread;
       i < groups.rows * n; i += int64_t{gridDim.x} * threads) {
    static_cast<T*>(args.out)[i] = narrow<T>(0.0f);
  }
  count_group_tiles(groups, Shape::kCols, tiles_before);

  // Tiles have their items one after the other.
  const int slabs = static_cast<int>(ceil_div(n, Shape::kRows));
  const int units = static_cast<int>(ceil_div(k, kGroupedUnit));
  const int64_t items = int64_t{tiles_before[groups.count]} * slabs;
  // Few rows: each block of threads has an equal part. Many: what all blocks make at a time are
  // neighbours, tiles of one weight, which they find in the second-level cache.
  constexpr bool kParts = Shape::kColTiles == 1;
  const int64_t first_item =
      (kParts ? items * blockIdx.x / gridDim.x : int64_t{blockIdx.x} * warps) + warp;
  const int64_t last_item = kParts ? items * (blockIdx.x + 1) / gridDim.x : items;
  const int64_t stride = kParts ? warps : int64_t{gridDim.x} * warps;
  struct Item {
    int group;
    int token;        // the first of the tile, counted from the beginning of the group
    int64_t row;      // of the weight; the last item begins earlier where it would end behind it
    int64_t own_row;  // the first that the item before it has not made
  };
  const auto locate = [&](int64_t item) {
    const int tile = static_cast<int>(item / slabs);
    const int low = group_of_tile(groups, tiles_before, tile);
    const int64_t own = item % slabs * Shape::kRows;
    return Item{low, (tile - tiles_before[low]) * Shape::kCols,
                own < n - Shape::kRows ? own : n - Shape::kRows, own};
  };

  // ---- What is asked for ahead
  const auto codes_of = [&](int stage) {
    return memory + kGroupedTableBytes + (stage * warps + warp) * Shape::kStageBytes;
  };
  const auto scales_of = [&](int stage, int row) {  // [kGroupedBlocks]
    const int line = (stage * warps + warp) * Shape::kScaleLines + row / 8;
    return reinterpret_cast<float*>(memory + line * kGroupedLine + kWarp * 4 + row % 8 * 16);
  };
  constexpr int kLaneScales = Shape::kLaneScales;
  constexpr int kRowLanes = kGroupedBlocks / kLaneScales;  // lanes that ask for scales of a row
  const int scale_row = lane / kRowLanes;
  const int scale_block = lane % kRowLanes * kLaneScales;
  int64_t next_item = first_item;
  int next_unit = 0;
  int next_stage = 0;
  int64_t next_begin = 0;  // of the item's first row among the elements of all weights
  typename ScaleReader<kNested>::Stored asked[kLaneScales] = {};
  bool asked_there[kLaneScales] = {};
  const auto ask = [&]() {
    const bool there = next_item < last_item;
    if (there && next_unit == 0) {
      const Item item = locate(next_item);
      next_begin = (item.group * n + item.row) * k;
    }
    const int64_t first = int64_t{next_unit} * kGroupedUnit;
    if (there) {
      const int chunk = lane % 8;
      const int64_t at = first + chunk * 32;
#pragma unroll
      for (int i = 0; i < Shape::kRows / 4; ++i) {
        const int row = lane / 8 + i * 4;
        if (at < k) {
          start_copy<16>(
              codes_of(next_stage) + row * kGroupedRowBytes + (chunk ^ (row % 4 * 2)) * 16,
              args.weight.codes + (next_begin + row * k + at) / 2);
        }
      }
    }
    close_copy_group();
    // The scales of the unit before.
    const int stage_before = next_stage == 0 ? kGroupedStages - 1 : next_stage - 1;
    Pack<float, kLaneScales> scales;
#pragma unroll
    for (int i = 0; i < kLaneScales; ++i) {
      scales.values[i] = asked_there[i] ? scale_of.value(asked[i]) : 0.0f;
      const int64_t at = first + (scale_block + i) * kGroupedBlock;
      asked_there[i] = there && at < k;
      if (asked_there[i]) asked[i] = scale_of.load((next_begin + scale_row * k + at) >> log2_block);
    }
    *reinterpret_cast<Pack<float, kLaneScales>*>(scales_of(stage_before, scale_row) + scale_block) =
        scales;
    next_stage = next_stage == kGroupedStages - 1 ? 0 : next_stage + 1;
    if (++next_unit == units) {
      next_unit = 0;
      next_item += stride;
    }
  };

  // ---- Products
  const float inverse = __frcp_rn(multiple);
#pragma unroll
  for (int i = 0; i < kGroupedStages - 1; ++i) ask();
  int stage = 0;
  for (int64_t number = first_item; number < last_item; number += stride) {
    const Item item = locate(number);
    const int64_t begin = groups.begin(item.group) + item.token;
    const int64_t size = groups.end(item.group) - begin;
    const int cols = size < Shape::kCols ? static_cast<int>(size) : Shape::kCols;
    // Of rows that are not there a lane reads another one: they make columns that nobody stores.
    const char* a[kColTiles];
#pragma unroll
    for (int c = 0; c < kColTiles; ++c) {
      const int own = c * 8 + group;
      const int col = own < cols ? own : cols - 1;
      a[c] = static_cast<const char*>(args.a) + (begin + col) * k * 2 + place * 32;
    }
    float sums[kRowTiles][kColTiles][4] = {};
    for (int unit = 0; unit < units; ++unit) {
      wait_copies<kGroupedStages - 2>();
      sync_warp();
      ask();
      const char* const codes = codes_of(stage) + group * kGroupedRowBytes + place % 2 * 8;
      const int64_t first = int64_t{unit} * kGroupedUnit;
      Pack<float, kGroupedBlocks> scales[kRowTiles][2];
#pragma unroll
      for (int r = 0; r < 2 * kRowTiles; ++r) {
        scales[r / 2][r % 2] =
            *reinterpret_cast<const Pack<float, kGroupedBlocks>*>(scales_of(stage, group + r * 8));
      }
#pragma unroll
      for (int b = 0; b < kGroupedBlocks; ++b) {
        const int64_t at = first + b * kGroupedBlock;
        const int chunk = ((b * 2 + place / 2) ^ (group % 4 * 2)) * 16;
        uint4 x[kColTiles][2];
#pragma unroll
        for (int c = 0; c < kColTiles; ++c) {
          const bool inside = at < k && c * 8 < cols;
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            x[c][v] = inside ? *reinterpret_cast<const uint4*>(a[c] + at * 2 + v * 16)
                             : uint4{0, 0, 0, 0};
          }
        }
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          const char* const row = codes + r * 16 * kGroupedRowBytes + chunk;
          const uint2 g0 = *reinterpret_cast<const uint2*>(row);
          const uint2 g8 = *reinterpret_cast<const uint2*>(row + 8 * kGroupedRowBytes);
          float products[kColTiles][4] = {};
#pragma unroll
          for (int s = 0; s < 4; ++s) {
            const uint32_t word0 = s < 2 ? g0.x : g0.y;
            const uint32_t word8 = s < 2 ? g8.x : g8.y;
            const int byte = s % 2 * 2;
            const uint32_t w[4] = {lookup(word0, byte), lookup(word8, byte),
                                   lookup(word0, byte + 1), lookup(word8, byte + 1)};
#pragma unroll
            for (int c = 0; c < kColTiles; ++c) {
              if (c > 0 && c * 8 >= cols) continue;
              const uint4 words = x[c][s / 2];
              multiply_add_16x8x16<T>(products[c], w, s % 2 == 0 ? words.x : words.z,
                                      s % 2 == 0 ? words.y : words.w);
            }
          }
#pragma unroll
          for (int c = 0; c < kColTiles; ++c) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              sums[r][c][i] = __fmaf_rn(products[c][i], scales[r][i / 2].values[b], sums[r][c][i]);
            }
          }
        }
      }
      stage = stage == kGroupedStages - 1 ? 0 : stage + 1;
    }
#pragma unroll
    for (int j = 0; j < kRowTiles * kColTiles * 4; ++j) {
      const int r = j / (kColTiles * 4);
      const int c = j / 4 % kColTiles;
      const int i = j % 4;
      const int64_t row = item.row + r * 16 + i / 2 * 8 + group;
      const int col = c * 8 + place * 2 + i % 2;
      if (row >= item.own_row && col < cols) {
        const float bias = args.bias != nullptr
                               ? widen(static_cast<const T*>(args.bias)[item.group * n + row])
                               : 0.0f;
        static_cast<T*>(args.out)[(begin + col) * n + row] =
            narrow<T>(__fmaf_rn(sums[r][c][i], inverse, bias));
      }
    }
  }
  wait_copies<0>();
}

// Warps that find the shared memory for their stages on the current device.
template <class Shape>
int grouped_mma_warps() {
  constexpr int kStatic = 4 * (2 * static_cast<int>(kMostGroups) + 1 + kCodeLevels);
  const int room = most_shared_bytes() - kStatic - Shape::shared_bytes(0);
  return std::min(room / (kGroupedStages * Shape::kStageBytes), Shape::kWarps);
}

using FewGroupedRows = GroupedShape<1, 1>;
using ManyGroupedRows = GroupedShape<2, 4>;

// Whether this kernel takes the arguments, on the current device.
inline bool takes_grouped_mma(const GroupedGemm4bit& args) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const Weight4bit& w = args.weight;
  return args.dtype != DType::kFloat32 && args.groups.count <= kMostGroups &&
         args.groups.rows <= kMost && w.n >= ManyGroupedRows::kRows && w.n <= kMost && w.k > 0 &&
         w.k <= kMost && w.k % kGroupedBlock == 0 && w.block_size >= kGroupedBlock &&
         is_aligned(w.codes, 16) && is_aligned(args.a, 16) && has_tensor_products() &&
         grouped_mma_warps<ManyGroupedRows>() > 0;
}

template <class T, class Shape, bool kNested>
void launch_grouped_mma(const GroupedGemm4bit& args, Stream stream) {
  const auto kernel = grouped_gemm_4bit_mma_kernel<T, Shape, kNested>;
  const Weight4bit& w = args.weight;
  const int64_t tiles =
      std::min(args.groups.rows, args.groups.rows / Shape::kCols + args.groups.count);
  const int64_t items = tiles * ceil_div(w.n, Shape::kRows);
  const int64_t grid = std::clamp<int64_t>(items, 1, multiprocessors());
  const int warps = grouped_mma_warps<Shape>();
  const int bytes = Shape::shared_bytes(warps);
  allow_shared(reinterpret_cast<const void*>(kernel), bytes);
  launch("grouped_gemm_4bit_mma_kernel", kernel, dim3(static_cast<unsigned>(grid)), warps * kWarp,
         bytes, stream, args, Levels4(w), level_multiple<T>(w.code), log2_of(w.block_size));
}

template <class T, bool kNested>
void mma_grouped_gemm_4bit(const GroupedGemm4bit& args, Stream stream) {
  // Rows that a group has on average, as far as the host knows.
  if (args.groups.rows <= FewGroupedRows::kCols / 2 * args.groups.count) {
    return launch_grouped_mma<T, FewGroupedRows, kNested>(args, stream);
  }
  launch_grouped_mma<T, ManyGroupedRows, kNested>(args, stream);
}

}  // namespace bnb::gpu
