// Products of groups of rows with a 4-bit weight for each group, by Hopper's warpgroup products.
// SPDX-License-Identifier: MIT
//
// The kernel of wgmma_many.cuh. Groups have tiles of tokens of their own. How many those are only
// the device knows: the kernel that orders the tokens counts them, and plans the work of the other.
#include "gpu/gemm/wgmma.cuh"
#include "gpu/gemm/wgmma_grouped.h"
#include "gpu/runtime/runtime.cuh"

#if BNB_BULK_COPIES

#include <algorithm>

#include "gpu/gemm/group_tiles.cuh"
#include "gpu/gemm/wgmma_many.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {

namespace {

constexpr int kOrderThreads = 256;

// Brings the rows of groups into tiles as wgmma.cu does, and makes those of no group zeros.
// `planned`: for the most tiles that there may be.
template <class T, class Shape>
__global__ void __launch_bounds__(kOrderThreads)
    order_groups_kernel(BNB_GRID_CONSTANT const GroupedGemm4bit args,
                        BNB_GRID_CONSTANT const WgmmaPlan planned, uint4* __restrict__ ordered,
                        GroupedWork* __restrict__ work) {
#if BNB_HOPPER
  __shared__ int tiles_before[kMostGroups + 1];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const Groups& groups = args.groups;
  const int64_t n = args.weight.n;
  const int64_t k = args.weight.k;
  const int64_t first = int64_t{blockIdx.x} * kOrderThreads + threadIdx.x;
  const int64_t stride = int64_t{gridDim.x} * kOrderThreads;
  for (int64_t i = groups.begin(groups.count) * n + first; i < groups.rows * n; i += stride) {
    static_cast<T*>(args.out)[i] = narrow<T>(0.0f);
  }
  count_group_tiles(groups, Shape::kTokens, tiles_before);
  // Groups that overlap, which none should, may have more tiles than there is room for.
  const int tiles = min(tiles_before[groups.count], planned.token_tiles);
  const auto tile_of = [&](int i) {
    const int group = group_of_tile(groups, tiles_before, i);
    const int64_t begin = groups.begin(group);
    const int64_t row = int64_t{i - tiles_before[group]} * Shape::kTokens;  // of the group
    return TokenTile{begin + row, groups.end(group), group,
                     GroupedTokens::place_of<Shape>(begin, group) + row};
  };
  if (blockIdx.x == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < tiles; i += kOrderThreads) {
      const TokenTile tile = tile_of(i);
      const int before = tiles_before[tile.group];
      work->tiles[i] = {tile, before, min(tiles_before[tile.group + 1], tiles) - before};
    }
    if (threadIdx.x == 0) {
      work->plan = planned;
      work->plan.token_tiles = tiles;
      work->row_tiles = static_cast<int>(ceil_div(n, Shape::kRows));
      work->plan.divide(work->row_tiles * tiles);
    }
  }
  const int blocks = planned.stages * Shape::kBlocks;  // of 64 k
  const int64_t chunks = int64_t{tiles} * blocks * Shape::kTokens * 8;
  for (int64_t i = first; i < chunks; i += stride) {
    const int chunk = static_cast<int>(i % 8);
    const int token = static_cast<int>(i / 8 % Shape::kTokens);
    const int64_t block = i / 8 / Shape::kTokens % blocks;
    const TokenTile tile = tile_of(static_cast<int>(i / 8 / Shape::kTokens / blocks));
    const int width = Shape::kTokens / 4 * tile.template quarters<Shape>();
    if (token >= width) continue;
    uint4 words = make_uint4(0, 0, 0, 0);
    if (tile.first + token < tile.end && 64 * block < k) {
      words =
          ordered_chunk(static_cast<const uint32_t*>(args.a), tile.first + token, k, block, chunk);
    }
    const int64_t row = tile.place * blocks + block * width + token;
    __stcg(ordered + row * 8 + (chunk ^ (token & 7)), words);
  }
#endif
}

using Tokens128 = ManyShape<128, 1, 6, 2>;
using Tokens256 = ManyShape<256, 1, 4, 1>;

// Calls visit.operator()<Shape>() for the shape that suits the rows that a group has on average.
template <class Visitor>
decltype(auto) with_shape(const GroupedGemm4bit& args, Visitor&& visit) {
  if (args.groups.rows <= 96 * args.groups.count) return visit.template operator()<Tokens128>();
  return visit.template operator()<Tokens256>();
}

// As if all rows met the same weight.
Gemm4bit ungrouped(const GroupedGemm4bit& args) {
  return {args.dtype, args.a, args.weight, args.bias, args.out, args.groups.rows};
}

int64_t most_tiles(const Groups& groups, int tokens) {
  return groups.rows / tokens + std::min(groups.count, groups.rows);
}

template <class Shape>
WgmmaPlan plan_for(const GroupedGemm4bit& args) {
  return WgmmaPlan::make_for_most<Shape>(most_tiles(args.groups, Shape::kTokens),
                                         GroupedTokens::ordered_rows<Shape>(args.groups),
                                         args.weight.k, multiprocessors());
}

template <class T, class Shape>
void launch_groups(const GroupedGemm4bit& args, char* workspace, Stream stream) {
  const WgmmaPlan plan = plan_for<Shape>(args);
  auto* const work = reinterpret_cast<GroupedWork*>(workspace + plan.bytes);
  launch_early("order_groups_kernel", &order_groups_kernel<T, Shape>,
               resident_grid(ceil_div(plan.sums_at / 16, kOrderThreads)), kOrderThreads, 0, stream,
               args, plan, reinterpret_cast<uint4*>(workspace), work);
  launch_many<T, Shape>(ungrouped(args), GroupedTokens{work}, args.groups.count * args.weight.n,
                        plan, workspace, stream);
}

}  // namespace

bool wgmma_grouped_gemm_4bit_serves(const GroupedGemm4bit& args) {
  return args.groups.count > 0 && args.groups.count <= kMostGroups &&
         args.groups.rows <= kMostRows && args.groups.count * args.weight.n <= kMostRows &&
         wgmma_gemm_4bit_serves(ungrouped(args));
}

int64_t wgmma_grouped_gemm_4bit_workspace_bytes(const GroupedGemm4bit& args) {
  return with_shape(args, [&]<class Shape>() {
    const WgmmaPlan plan = plan_for<Shape>(args);
    return plan.bytes + GroupedWork::bytes(plan.token_tiles);
  });
}

void wgmma_grouped_gemm_4bit(const GroupedGemm4bit& args, void* workspace, Stream stream) {
  char* const memory = static_cast<char*>(workspace);
  with_shape(args, [&]<class Shape>() {
    if (args.dtype == DType::kBFloat16) {
      launch_groups<BFloat16, Shape>(args, memory, stream);
    } else {
      launch_groups<Half, Shape>(args, memory, stream);
    }
  });
}

}  // namespace bnb::gpu

#else

namespace bnb::gpu {

bool wgmma_grouped_gemm_4bit_serves(const GroupedGemm4bit&) { return false; }
int64_t wgmma_grouped_gemm_4bit_workspace_bytes(const GroupedGemm4bit&) { return 0; }
void wgmma_grouped_gemm_4bit(const GroupedGemm4bit&, void*, Stream) {}

}  // namespace bnb::gpu

#endif  // BNB_BULK_COPIES
