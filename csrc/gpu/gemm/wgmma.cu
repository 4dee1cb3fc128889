// The product with a 4-bit weight by Hopper's warpgroup products.
// SPDX-License-Identifier: MIT
//
// The product is made transposed: the weight is A, from registers, and the rows of a ("tokens") are
// B, from shared memory. A block of threads has a warpgroup that copies and some that multiply:
//
//     codes ---- copy engine -------> [stages] --> registers --> table --> A --+
//     scales --- cp.async ----------> [stages] -------------------------+      v
//     tokens --- copy engine -------> [stages] ------------------------ | -> wgmma --> sums --> out
//                                                                       +-> weights or sums
//
// Lane t of four takes byte t of every four, which are positions 2 t and 2 t + 1 of eight. Where
// registers do not suffice for words of which it uses a byte, or tiles are long, another order of
// k, over which products are summed, lets it use whole words: it takes k = 16 t to 16 t + 15 of
// every 64, which are eight consecutive bytes of a row: byte 2 s + h gives it positions 8 h + 2 t
// and 8 h + 2 t + 1 of product s. A kernel of its own, which overlaps with the start of the other,
// brings the tokens into the same order:
//
//     position (in pairs of 64 k)   0  1  2  3 | 4  5  6  7 | 8 ...     8 groups of 4 pairs
//     pair of k                     0  8 16 24 | 1  9 17 25 | 2 ...
//
// A table in shared memory decodes a byte to two weights. 16 bits hold its levels, times a multiple
// of one's choice, more exactly than they hold dequantized weights. For few tokens, scales are
// applied to sums over 64 k in float. For many (wgmma_many.cuh), where registers do not suffice for
// two sets of sums, weights are multiplied by them in float and rounded.
#include "gpu/gemm/wgmma.cuh"
#include "gpu/runtime/runtime.cuh"

#if BNB_BULK_COPIES

#include "gpu/gemm/wgmma_many.cuh"
#include "gpu/gemm/wgmma_multiplier.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {

namespace {

// ---- Tokens in the order of the products ------------------------------------------------------

constexpr int kOrderThreads = 256;

// Brings a [m, k] into tiles [token tile][64 k][token][128 bytes, swizzled], zeros where a ends.
__global__ void __launch_bounds__(kOrderThreads)
    order_tokens_kernel(const uint32_t* __restrict__ a,  // [m, k / 2] pairs
                        int64_t m, int64_t k, int tile_tokens, int blocks, int64_t chunks,
                        uint4* __restrict__ out) {
#if BNB_HOPPER
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t first = int64_t{blockIdx.x} * kOrderThreads + threadIdx.x;
  const int64_t stride = int64_t{gridDim.x} * kOrderThreads;
  for (int64_t i = first; i < chunks; i += stride) {
    const int chunk = static_cast<int>(i % 8);
    const int64_t row = i / 8;
    const int token = static_cast<int>(row % tile_tokens);
    const int64_t tile = row / tile_tokens;  // of 64 k
    const int64_t block = tile % blocks;
    const int64_t source = tile / blocks * tile_tokens + token;
    uint4 words = make_uint4(0, 0, 0, 0);
    if (source < m && 64 * block < k) words = ordered_chunk(a, source, k, block, chunk);
    __stcg(out + row * 8 + (chunk ^ (token & 7)), words);
  }
#endif
}

// ---- Few tokens -----------------------------------------------------------------------------

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    wgmma_gemm_4bit_kernel(BNB_GRID_CONSTANT const Gemm4bit args,
                           BNB_GRID_CONSTANT const Levels4 levels,
                           BNB_GRID_CONSTANT const TensorMap codes,
                           BNB_GRID_CONSTANT const TensorMap tokens,
                           BNB_GRID_CONSTANT const WgmmaPlan plan, char* workspace,
                           unsigned long long number, float multiple, int log2_block) {
#if BNB_HOPPER
  BNB_DYNAMIC_SHARED(dynamic);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int copier = thread - 128 * Shape::kGroups;
  // Until the kernel before this one has ended, nothing is read that it may have written: that
  // which orders tokens has written those.
  const auto wait_for_weight = [] {
    if constexpr (!Shape::kOrdered) wait_for_previous_kernel();
  };
  if (copier == 0) {
    prefetch_map(codes);
    prefetch_map(tokens);
    // has_wgmma_kernels() has looked.
    if (shared_address(dynamic) != kSharedStart) __trap();
    init_barriers<Shape>();
    WgmmaCopier<Shape> first(plan, codes, tokens, workspace);
    for (int i = 0; i < Shape::kStages && first.prefetch(); ++i) continue;
  }
  __syncthreads();
  if (warp < Shape::kWarps) {
    take_registers<Shape::kMultiplyRegisters>();
    if (levels.table != nullptr) wait_for_weight();
    fill_pair_table<T>(Shape::kTableAt, levels, multiple, thread, 128 * Shape::kGroups);
    wait_for_weight();
    let_next_kernel_start();
    named_barrier(1, 128 * Shape::kGroups);
    const auto lane = static_cast<uint32_t>(thread % kWarp);
    WgmmaMultiplier<T, Shape> multiplier{
        {args, plan, workspace, number, static_cast<uint32_t>(warp), lane}, 1.0f / multiple, lane};
    multiplier.run();
  } else {
    give_registers<Shape::kCopyRegisters>();
    wait_for_weight();
    let_next_kernel_start();
    const Scales& scales = args.weight.scales;
    const bool fours = log2_block == 6 && args.weight.k % 256 == 0;
    if (copier < kWarp) {
      if (copier == 0) {
        wait_for_previous_kernel();
        WgmmaCopier<Shape> all(plan, codes, tokens, workspace);
        while (all.copy()) continue;
      }
    } else if (scales.codes != nullptr) {
      auto* const levels_of_scales =
          reinterpret_cast<float*>(dynamic + Shape::kNestedAt - kSharedStart);
      for (int i = copier - kWarp; i < kCodeLevels; i += kScaleThreads) {
        levels_of_scales[i] = scales.code[i];
      }
      named_barrier(2, kScaleThreads);
      bring_scales<Shape>(args, plan,
                          ScaleReader<true>(scales, static_cast<const float*>(levels_of_scales)),
                          log2_block - 6,
                          fours && is_aligned(scales.codes, 4) && scales.block_size % 4 == 0 &&
                              log2_of(scales.block_size) > 0,
                          copier - kWarp);
    } else {
      bring_scales<Shape>(args, plan,
                          ScaleReader<false>(scales, static_cast<const float*>(nullptr)),
                          log2_block - 6, fours && is_aligned(scales.absmax, 16), copier - kWarp);
    }
  }
#endif
}

// ---- Launch -----------------------------------------------------------------------------------

//                     tokens groups stages ordered
using Wide16 = WgmmaShape<16, 4, 3, true>;
using Wide32 = WgmmaShape<32, 4, 3, true>;
using Long64 = WgmmaShape<64, 2, 3, true>;
using Narrow16 = WgmmaShape<16, 2, 5, false>;
using Narrow32 = WgmmaShape<32, 2, 4, false>;
using Narrow64 = WgmmaShape<64, 2, 3, false>;
//                         tokens, blocks and slots of them, products together
using Tokens128 = ManyShape<128, 1, 6, 2>;
using Tokens192 = ManyShape<192, 1, 5, 2>;
using Tokens256 = ManyShape<256, 1, 4, 1>;

// Above it kernels are those for many tokens.
constexpr int kFewTokens = 64;
template <class Shape>
constexpr bool kMany = Shape::kTokens > kFewTokens;

// Calls visit.operator()<Shape>() for the shape that suits a product.
template <class Visitor>
decltype(auto) with_shape(const Gemm4bit& args, int multiprocessors, Visitor&& visit) {
  // Tiles of many rows of the weight share their tokens better, but end together later.
  constexpr int kLongStages = 32;
  const bool wide = ceil_div(args.weight.n, Wide16::kRows) * ceil_div(args.weight.k, 128) >=
                    int64_t{kLongStages} * multiprocessors;
  if (args.m <= 16 && wide) return visit.template operator()<Wide16>();
  if (args.m <= 16) return visit.template operator()<Narrow16>();
  if (args.m <= 32 && wide) return visit.template operator()<Wide32>();
  if (args.m <= 32) return visit.template operator()<Narrow32>();
  if (args.m <= kFewTokens && wide) return visit.template operator()<Long64>();
  if (args.m <= kFewTokens) return visit.template operator()<Narrow64>();
  // Measured times of tiles relate like these numbers.
  const int64_t of_128 = ceil_div(args.m, 128) * 72;
  const int64_t of_192 = ceil_div(args.m, 192) * 84;
  // Of few tiles, those of 256 tokens are cut in too many parts.
  const int64_t tiles = ceil_div(args.m, 256) * ceil_div(args.weight.n, Tokens256::kRows);
  const int64_t of_256 = ceil_div(args.m, 256) * (4 * tiles <= multiprocessors ? 150 : 100);
  if (of_128 < std::min(of_192, of_256)) {
    return visit.template operator()<Tokens128>();
  }
  if (of_192 < of_256) return visit.template operator()<Tokens192>();
  return visit.template operator()<Tokens256>();
}

template <class Shape>
WgmmaPlan plan_of(const Gemm4bit& args, int multiprocessors) {
  // Stages that take as long as it takes to store the sums of a part and to add them.
  constexpr int kSplitting = kMany<Shape> ? 3 : 0;
  return WgmmaPlan::make<Shape>(args.m, args.weight.n, args.weight.k, multiprocessors, kSplitting);
}

template <class T, class Shape>
void launch_wgmma(const Gemm4bit& args, char* workspace, Stream stream) {
  const Weight4bit& weight = args.weight;
  const WgmmaPlan plan = plan_of<Shape>(args, multiprocessors());
  if (const int64_t chunks = plan.sums_at / 16; chunks > 0) {
    launch_early("order_tokens_kernel", &order_tokens_kernel,
                 resident_grid(ceil_div(chunks, kOrderThreads)), kOrderThreads, 0, stream,
                 static_cast<const uint32_t*>(args.a), args.m, weight.k, Shape::kTokens,
                 plan.stages * Shape::kBlocks, chunks, reinterpret_cast<uint4*>(workspace));
  }
  if constexpr (kMany<Shape>) {
    launch_many<T, Shape>(args, AllTokens{args.m}, weight.n, plan, workspace, stream);
  } else {
    constexpr int kShared = Shape::kEnd - kSharedStart;
    const auto kernel = &wgmma_gemm_4bit_kernel<T, Shape>;
    allow_shared(reinterpret_cast<const void*>(kernel), kShared);
    launch_early(
        "wgmma_gemm_4bit_kernel", kernel, static_cast<unsigned>(plan.blocks), Shape::kThreads,
        kShared, stream, args, Levels4(weight), code_map<Shape>(weight, weight.n),
        tensor_map(args.a, args.m, weight.k * 2, Shape::kTokens, Swizzle::k128), plan, workspace,
        next_launch_number(), level_multiple<T>(weight.code), log2_of(weight.block_size));
  }
}

// Whether the device has a kernel of sm_90a, which this one tells by its shared memory: for other
// targets kernels are empty. And whether memory begins where the kernel's addresses do.
__global__ void marker_kernel(int* out) {
#if BNB_HOPPER
  __shared__ int marker[32];
  marker[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = marker[31 - threadIdx.x];
#endif
}

}  // namespace

bool has_wgmma_kernels() {
  if (!is_hopper()) return false;
  int device = 0;
  int reserved = 0;
  BNB_GPU_CHECK(cudaGetDevice(&device));
  BNB_GPU_CHECK(cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device));
  static const bool built = is_built(reinterpret_cast<const void*>(&marker_kernel));
  return built && reserved == kSharedStart;
}

bool wgmma_gemm_4bit_serves(const Gemm4bit& args) {
  const Weight4bit& weight = args.weight;
  return args.dtype != DType::kFloat32 && args.m > 0 && weight.n > 0 && weight.k > 0 &&
         weight.k % 64 == 0 && weight.k <= kLongest && weight.n <= kMostRows &&
         weight.block_size >= 64 && is_aligned(weight.codes, 16) &&
         is_aligned(args.a, args.m <= kFewTokens ? 16 : 4) && has_wgmma_kernels();
}

int64_t wgmma_gemm_4bit_workspace_bytes(const Gemm4bit& args) {
  const int count = multiprocessors();
  return with_shape(args, count, [&]<class Shape>() { return plan_of<Shape>(args, count).bytes; });
}

void wgmma_gemm_4bit(const Gemm4bit& args, void* workspace, Stream stream) {
  char* const memory = static_cast<char*>(workspace);
  with_shape(args, multiprocessors(), [&]<class Shape>() {
    if (args.dtype == DType::kBFloat16) {
      launch_wgmma<BFloat16, Shape>(args, memory, stream);
    } else {
      launch_wgmma<Half, Shape>(args, memory, stream);
    }
  });
}

}  // namespace bnb::gpu

#else

namespace bnb::gpu {

bool has_wgmma_kernels() { return false; }
bool wgmma_gemm_4bit_serves(const Gemm4bit&) { return false; }
int64_t wgmma_gemm_4bit_workspace_bytes(const Gemm4bit&) { return 0; }
void wgmma_gemm_4bit(const Gemm4bit&, void*, Stream) {}

}  // namespace bnb::gpu

#endif  // BNB_BULK_COPIES
