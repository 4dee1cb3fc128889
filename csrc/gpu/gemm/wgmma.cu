// The product with a 4-bit weight by Hopper's warpgroup products.
// SPDX-License-Identifier: MIT
//
// The product is made transposed: the weight is A, from registers, and the rows of a ("tokens") are
// B, from shared memory. A block of threads has a warpgroup that copies and some that multiply:
//
//     codes ---- copy engine -------> [stages] --> registers --> table --> A --+
//     scales --- cp.async ----------> [stages] -------------------------+      v
//     tokens --- ordered by a kernel, copy engine --> [stages] -------- | -> wgmma --> sums --> out
//                                                                       +-> weights or sums
//
// k is a summation index, so its order is free. Lane t of four takes k = 16 t to 16 t + 15 of every
// 64, which are eight consecutive bytes of a row: byte 2 s + h gives it positions 8 h + 2 t and
// 8 h + 2 t + 1 of product s. A kernel of its own, which overlaps with the start of the other,
// brings the tokens into the same order:
//
//     position (in pairs of 64 k)   0  1  2  3 | 4  5  6  7 | 8 ...     8 groups of 4 pairs
//     pair of k                     0  8 16 24 | 1  9 17 25 | 2 ...
//
// A table in shared memory decodes a byte to two weights. 16 bits hold its levels, times a multiple
// of one's choice, more exactly than they hold dequantized weights. For few tokens, scales are
// applied to sums over 64 k in float. For many, where registers do not suffice for two sets of
// sums, weights are multiplied by them in float and rounded.
#include "gpu/gemm/wgmma.cuh"
#include "gpu/runtime/runtime.cuh"

#if BNB_BULK_COPIES

#include "gpu/device/scales.cuh"
#include "gpu/device/tensor_copy.cuh"
#include "gpu/device/vector_io.cuh"
#include "gpu/device/wgmma.cuh"
#include "gpu/gemm/levels.cuh"
#include "gpu/gemm/wgmma_plan.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {

namespace {

// ---- Tokens in the order of the products ------------------------------------------------------

constexpr int kOrderThreads = 256;

// Brings a [m, k] into tiles [token tile][64 k][token][128 bytes, swizzled], zeros where a ends,
// and sets the numbers of arrivals to zero.
__global__ void __launch_bounds__(kOrderThreads)
    order_tokens_kernel(const uint32_t* __restrict__ a,  // [m, k / 2] pairs
                        int64_t m, int64_t k, int tile_tokens, int blocks, int64_t chunks,
                        uint4* __restrict__ out, int* __restrict__ arrivals, int arrivals_count) {
#if BNB_HOPPER
  let_next_kernel_start();
  const int64_t first = int64_t{blockIdx.x} * kOrderThreads + threadIdx.x;
  const int64_t stride = int64_t{gridDim.x} * kOrderThreads;
  for (int64_t i = first; i < arrivals_count; i += stride) arrivals[i] = 0;
  for (int64_t i = first; i < chunks; i += stride) {
    const int chunk = static_cast<int>(i % 8);
    const int64_t row = i / 8;
    const int token = static_cast<int>(row % tile_tokens);
    const int64_t tile = row / tile_tokens;  // of 64 k
    const int64_t block = tile % blocks;
    const int64_t source = tile / blocks * tile_tokens + token;
    uint4 words = make_uint4(0, 0, 0, 0);
    if (source < m && 64 * block < k) {
      const uint32_t* pairs = a + (source * k + 64 * block) / 2 + chunk;
      words = make_uint4(pairs[0], pairs[8], pairs[16], pairs[24]);
    }
    __stcg(out + row * 8 + (chunk ^ (token & 7)), words);
  }
#endif
}

#if BNB_HOPPER

// ---- Copies -----------------------------------------------------------------------------------

// A place in the ring of stages.
template <class Shape>
struct Slot {
  uint32_t number = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++number == Shape::kStages) {
      number = 0;
      parity ^= 1u;
    }
  }
  // Codes, scales and tokens are there.
  __device__ __forceinline__ BarrierAt full() const {
    return {Shape::piece(Shape::kBarrierPiece) + 8 * number};
  }
  // All who read them have done so.
  __device__ __forceinline__ BarrierAt empty() const {
    return {Shape::piece(Shape::kBarrierPiece) + 64 + 8 * number};
  }
  __device__ __forceinline__ uint32_t tokens() const {
    return Shape::kStart + number * Shape::kTokenStage;
  }
  __device__ __forceinline__ uint32_t codes() const {
    return Shape::kCodesAt + number * Shape::kCodeStage;
  }
  // Of a row, for all blocks of the stage.
  __device__ __forceinline__ uint32_t scales(uint32_t row) const {
    return Shape::piece(0) + (number * Shape::kScalePieces + row / Shape::kRowsPerPiece) * 256 +
           row % Shape::kRowsPerPiece * (4 * Shape::kBlocks);
  }
};

// Tokens of the stages of a walk, one after the other, to slots that are free.
template <class Shape>
class TokenCopier {
 public:
  __device__ __forceinline__ TokenCopier(const WgmmaPlan& plan, const char* ordered)
      : plan_(plan), ordered_(ordered), walk_(plan, static_cast<int>(blockIdx.x)) {}

  __device__ __forceinline__ void copy() {
    if (stage_ == walk_.end) {
      walk_.next();
      stage_ = walk_.begin;
    }
    const int64_t at = int64_t{walk_.tile % plan_.token_tiles} * plan_.stages + stage_;
    bulk_copy(slot_.tokens(), ordered_ + at * Shape::kTokenStage, Shape::kTokenStage, slot_.full());
    ++stage_;
    slot_.advance();
  }

 private:
  const WgmmaPlan& plan_;
  const char* ordered_;
  WgmmaWalk walk_;
  int stage_ = 0;
  Slot<Shape> slot_;
};

// One thread starts the copies of codes and tokens. The first codes need not wait for the kernel
// that orders the tokens.
template <class Shape>
__device__ __forceinline__ void copy_codes_and_tokens(const TensorMap& codes, const WgmmaPlan& plan,
                                                      const char* ordered) {
  TokenCopier<Shape> tokens(plan, ordered);
  WgmmaWalk walk(plan, static_cast<int>(blockIdx.x));
  const int first_stages = min(walk.all_stages(static_cast<int>(blockIdx.x)), Shape::kStages);
  int stages = 0;
  Slot<Shape> slot;
  while (walk.next()) {
    const int row = walk.tile / plan.token_tiles * Shape::kRows;
    for (int stage = walk.begin; stage < walk.end; ++stage) {
      slot.empty().wait(slot.parity ^ 1u);
      slot.full().arrive_and_expect(Shape::kTokenStage + Shape::kCodeStage);
      tensor_copy(slot.codes(), codes, stage * (Shape::kBlocks * 32 / 2), row, slot.full());
      slot.advance();
      if (++stages < first_stages) continue;
      if (stages == first_stages) {
        wait_for_previous_kernel();
        for (int i = 1; i < first_stages; ++i) tokens.copy();
      }
      tokens.copy();
    }
  }
}

// Some warps bring scales.
constexpr int kScaleThreads = 96;

// Numbers are copied. Those that are codes are read before their place is free, so that they are
// there when it is. `pairs`: the scales of two blocks of 64 lie side by side and can be read at a
// time.
template <class Shape, bool kNested>
__device__ __forceinline__ void bring_scales(const Gemm4bit& args, const WgmmaPlan& plan,
                                             const ScaleReader<kNested>& scale_of, int log2_blocks,
                                             bool pairs, int thread) {
  constexpr int kCount = static_cast<int>(ceil_div(Shape::kRows, kScaleThreads));
  const int columns = static_cast<int>(args.weight.k / 64);
  WgmmaWalk walk(plan, static_cast<int>(blockIdx.x));
  Slot<Shape> slot;
  while (walk.next()) {
    const int64_t first = int64_t{walk.tile / plan.token_tiles} * Shape::kRows;
    for (int stage = walk.begin; stage < walk.end; ++stage) {
      // Beyond the last row that one, whose products are not stored. Beyond the last column that
      // one, which meets tokens of zeros.
      const auto begin_of = [&](int i) {
        return min(first + thread + i * kScaleThreads, args.weight.n - 1) * columns;
      };
      const auto column_of = [&](int block) {
        return min(stage * Shape::kBlocks + block, columns - 1);
      };
      if constexpr (kNested) {
        typename ScaleReader<kNested>::Stored stored[kCount][Shape::kBlocks];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          if (Shape::kBlocks == 2 && pairs) {
            scale_of.load_pair(begin_of(i) + 2 * stage, stored[i][0],
                               stored[i][Shape::kBlocks - 1]);
          } else {
#pragma unroll
            for (int block = 0; block < Shape::kBlocks; ++block) {
              stored[i][block] = scale_of.load((begin_of(i) + column_of(block)) >> log2_blocks);
            }
          }
        }
        slot.empty().wait(slot.parity ^ 1u);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const int row = thread + i * kScaleThreads;
          if (row >= Shape::kRows) break;
#pragma unroll
          for (int block = 0; block < Shape::kBlocks; ++block) {
            store_shared(slot.scales(row) + 4 * block,
                         float_bits(scale_of.value(stored[i][block])));
          }
        }
        slot.full().arrive();
      } else {
        slot.empty().wait(slot.parity ^ 1u);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const int row = thread + i * kScaleThreads;
          if (row >= Shape::kRows) break;
          const float* const absmax = args.weight.scales.absmax;
          if (Shape::kBlocks == 2 && pairs) {
            start_copy_at<8>(slot.scales(row), absmax + begin_of(i) + 2 * stage);
          } else {
#pragma unroll
            for (int block = 0; block < Shape::kBlocks; ++block) {
              start_copy_at<4>(slot.scales(row) + 4 * block,
                               absmax + ((begin_of(i) + column_of(block)) >> log2_blocks));
            }
          }
        }
        slot.full().arrive_after_copies();
      }
      slot.advance();
    }
  }
}

// ---- Products ---------------------------------------------------------------------------------

// The row of eight that lane 4 g + t of a fragment holds: one for which lanes that read together
// find codes in different banks, as Swizzle::k64 leaves them.
template <class Shape>
__device__ __forceinline__ constexpr uint32_t row_of(uint32_t g) {
  return Shape::kBlocks == 2 ? (g & 1u) | (g & 2u) << 1 | (g & 4u) >> 1 : g;
}

template <class T, class Shape>
struct Multiplier {
  // Where weights are scaled, the table holds levels as float16, which is more exact than bfloat16.
  using TableType = std::conditional_t<Shape::kScaleSums, T, Half>;
  static constexpr int kSums = Shape::kSums;

  const Gemm4bit& args;
  const WgmmaPlan& plan;
  char* workspace;
  float unit;  // 1 / multiple of the levels
  uint32_t warp;
  uint32_t lane;

  uint32_t a[4][4];                // weights of 64 k: [product][fragment]
  uint2 codes[2];                  // of two rows, eight apart
  float scale[Shape::kBlocks][2];  // of the same
  float sums[kSums];
  Slot<Shape> slot;   // of what is multiplied ...
  Slot<Shape> coded;  // ... and of what is decoded

  // The table's entry for a byte lies at 256 times the byte, the lane's copy at 4 times the lane.
  __device__ __forceinline__ uint32_t look_up(uint32_t word, int byte) const {
    const uint32_t at = __byte_perm(word, 4 * lane, 0x7604u | static_cast<uint32_t>(byte) << 4);
    uint32_t pair;
    asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(pair) : "r"(at), "n"(Shape::kTableAt));
    return pair;
  }

  __device__ __forceinline__ static uint32_t scaled(uint32_t pair, float scale) {
    const float low = half_to_float(static_cast<uint16_t>(pair & 0xffffu));
    const float high = half_to_float(static_cast<uint16_t>(pair >> 16));
    return pack_pair<T>(__fmul_rn(low, scale), __fmul_rn(high, scale));
  }

  __device__ __forceinline__ uint32_t row() const { return 16 * warp + row_of<Shape>(lane / 4); }

  // Waits for 64 k and reads their codes and scales.
  __device__ __forceinline__ void read(int block) {
    if (block == 0) {
      coded.full().wait(coded.parity);
      const uint32_t from = coded.scales(row());
      constexpr int kNext = 8 * 4 * Shape::kBlocks;  // eight rows on, in the same piece
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (Shape::kBlocks == 2) {
          const uint2 numbers = load_shared2(from + i * kNext);
          scale[0][i] = bits_float(numbers.x);
          scale[1][i] = bits_float(numbers.y);
        } else {
          scale[0][i] = bits_float(load_shared(from + i * kNext));
        }
        if constexpr (!Shape::kScaleSums) {
#pragma unroll
          for (int j = 0; j < Shape::kBlocks; ++j) scale[j][i] = __fmul_rn(scale[j][i], unit);
        }
      }
    }
    constexpr int kPitch = 32 * Shape::kBlocks;
    const uint32_t swizzle = Shape::kBlocks == 2 ? (row() / 2 % 4) << 4 : 0;
    const uint32_t place = row() * kPitch + (lane % 4 * 8 ^ swizzle);
    codes[0] = load_shared2(coded.codes() + (place ^ static_cast<uint32_t>(block) << 5));
    codes[1] =
        load_shared2(coded.codes() + (place ^ static_cast<uint32_t>(block) << 5) + 8 * kPitch);
    if (block == Shape::kBlocks - 1) coded.advance();
  }

  __device__ __forceinline__ void decode(int product, int block) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint2 words = codes[i % 2];
      const int byte = 2 * product + i / 2;
      const uint32_t pair = look_up(byte < 4 ? words.x : words.y, byte % 4);
      a[product][i] = Shape::kScaleSums ? pair : scaled(pair, scale[block][i % 2]);
    }
  }

  // The warp has done with a stage.
  __device__ __forceinline__ void release(const Slot<Shape>& stage) {
    if (lane == 0) stage.empty().arrive();
  }

  __device__ __forceinline__ uint64_t tokens_of(int block) const {
    return swizzled_descriptor(slot.tokens() + block * Shape::kTokenBlock);
  }

  // 64 k, whose weights are decoded. The next are decoded as products end.
  __device__ __forceinline__ void step_scaling_sums(int block, bool more) {
    float part[kSums];
    const float own[2] = {scale[block][0], scale[block][1]};
    const int next = (block + 1) % Shape::kBlocks;
    const uint64_t tokens = tokens_of(block);
    wgmma_fence();
#pragma unroll
    for (int product = 0; product < 4; ++product) {
      Wgmma<T, Shape::kTokens>::run(part, a[product], advance_k(tokens, product), product > 0);
      wgmma_commit();
    }
    if (more) {
      read(next);
      wgmma_wait<3>();
      decode(0, next);
      wgmma_wait<2>();
      decode(1, next);
      wgmma_wait<1>();
      decode(2, next);
    }
    wgmma_wait<0>();
    wgmma_hold(part);
    if (block == Shape::kBlocks - 1) {
      release(slot);
      slot.advance();
    }
    if (more) decode(3, next);
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = __fmaf_rn(part[i], own[i / 2 % 2], sums[i]);
  }

  // The slot before the present one.
  __device__ __forceinline__ Slot<Shape> before() const {
    return {slot.number == 0 ? Shape::kStages - 1 : slot.number - 1, 0};
  }

  // 64 k. Three products are under way while the weights of a fourth are decoded.
  __device__ __forceinline__ void step_scaling_weights(int block, bool first) {
    read(block);
    const uint64_t tokens = tokens_of(block);
#pragma unroll
    for (int product = 0; product < 4; ++product) {
      wgmma_wait<3>();
      if (product == 3 && block == 0 && !first) release(before());
      decode(product, block);
      wgmma_fence();
      Wgmma<T, Shape::kTokens>::run(sums, a[product], advance_k(tokens, product),
                                    !first || product > 0);
      wgmma_commit();
    }
    if (block == Shape::kBlocks - 1) slot.advance();
  }

  __device__ __forceinline__ void run() {
    WgmmaWalk walk(plan, static_cast<int>(blockIdx.x));
    int left = walk.all_stages(static_cast<int>(blockIdx.x));
    if constexpr (Shape::kScaleSums) {
      if (left == 0) return;
      read(0);
#pragma unroll
      for (int product = 0; product < 4; ++product) decode(product, 0);
    }
    while (walk.next()) {
      if constexpr (Shape::kScaleSums) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
        for (int stage = walk.begin; stage < walk.end; ++stage) {
          --left;
#pragma unroll
          for (int block = 0; block < Shape::kBlocks; ++block) {
            step_scaling_sums(block, block < Shape::kBlocks - 1 || left > 0);
          }
        }
      } else {
        for (int stage = walk.begin; stage < walk.end; ++stage) {
#pragma unroll
          for (int block = 0; block < Shape::kBlocks; ++block) {
            step_scaling_weights(block, stage == walk.begin && block == 0);
          }
        }
        wgmma_wait<0>();
        wgmma_hold(sums);
        release(before());
      }
      if (add_parts(walk)) store(walk.tile);
    }
  }

  // Adds what others have of the tile to the warp's sums, or leaves the sums to them; whether it
  // was the last.
  __device__ __forceinline__ bool add_parts(const WgmmaWalk& walk) {
    if (walk.begin == 0 && walk.end == plan.stages) return true;
    const int split = walk.tile - plan.whole;
    const int first_stage = split * plan.stages;
    const int first = plan.block_of(first_stage);
    const int count = plan.block_of(first_stage + plan.stages - 1) - first + 1;
    const int own = static_cast<int>(blockIdx.x) - first;
    // A block has at most two parts: of the tile where it begins, and of the one where it ends.
    constexpr int64_t kPart = Shape::kRows * Shape::kTokens / 4;
    auto* parts = reinterpret_cast<float4*>(workspace + plan.sums_at) + warp * (kSums * 8) + lane;
    const auto part = [&](int i) {
      return parts + (2 * (first + i) + (i == 0 && plan.first_of(first) < first_stage)) * kPart;
    };
    float4* to = part(own);
#pragma unroll
    for (int i = 0; i < kSums / 4; ++i) {
      __stcg(to + i * kWarp,
             make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
    }
    __syncwarp();
    int before = 0;
    if (lane == 0) {
      before = count_arrival(reinterpret_cast<int*>(workspace + plan.arrivals_at) +
                             split * Shape::kWarps + warp);
    }
    before = __shfl_sync(0xffffffffu, before, 0);
    if (before != count - 1) return false;
    __syncwarp();      // what lane 0 sees, all see
    if (count == 2) {  // the order does not matter
      add(part(1 - own));
      return true;
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
    constexpr int kAhead = kSums <= 16 ? 4 : 1;  // parts that are read at a time
#pragma unroll kAhead
    for (int i = 0; i < count; ++i) add(part(i));
    return true;
  }

  __device__ __forceinline__ void add(const float4* part) {
#pragma unroll
    for (int i = 0; i < kSums / 4; ++i) {
      const float4 x = __ldcg(part + i * kWarp);
      sums[4 * i] = __fadd_rn(sums[4 * i], x.x);
      sums[4 * i + 1] = __fadd_rn(sums[4 * i + 1], x.y);
      sums[4 * i + 2] = __fadd_rn(sums[4 * i + 2], x.z);
      sums[4 * i + 3] = __fadd_rn(sums[4 * i + 3], x.w);
    }
  }

  // Sixteen rows of the weight for sixteen tokens at a time.
  __device__ __forceinline__ void store(int tile) {
    const int64_t n = args.weight.n;
    const int64_t first_row = int64_t{tile / plan.token_tiles} * Shape::kRows + 16 * warp;
    if (first_row >= n) return;
    const int64_t first_token = int64_t{tile % plan.token_tiles} * Shape::kTokens;
    const bool wide = n % 8 == 0 && is_aligned(args.out, 16);
    float bias[2] = {0.0f, 0.0f};
    if (args.bias != nullptr) {
      const T* values = static_cast<const T*>(args.bias);
      const int64_t row = first_row + row_of<Shape>(lane / 4);
      if (row < n) bias[0] = widen(values[row]);
      if (row + 8 < n) bias[1] = widen(values[row + 8]);
    }
    const float factor = Shape::kScaleSums ? unit : 1.0f;
    // A token takes 32 bytes of the warp's four pieces.
    const auto place_of = [&](uint32_t token) {
      return Shape::piece(Shape::kScratchPiece + 4 * warp) + token / 4 * 256 + token % 4 * 32;
    };
    const uint32_t to_scratch = place_of(lane % 8 + lane / 16 * 8) + lane / 8 % 2 * 16;
    const uint32_t from_scratch = place_of(lane / 2) + lane % 2 * 16;
    const int64_t row = first_row + lane % 2 * 8;
    T* out = static_cast<T*>(args.out) + (first_token + lane / 2) * n + row;
#pragma unroll
    for (int i = 0; i < kSums / 8; ++i) {
      if (first_token + 16 * i >= args.m) break;
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
      uint4 x = load_shared4(from_scratch);
      if constexpr (Shape::kBlocks == 2) x = make_uint4(x.x, x.z, x.y, x.w);  // see row_of()
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

// The two weights of every byte, a copy for every lane.
template <class TableType, class Shape>
__device__ __forceinline__ void fill_table(const Levels4& levels, float multiple, int thread) {
  for (int i = thread; i < 256 * 8; i += 128 * Shape::kGroups) {
    const int byte = i / 8;
    const uint32_t pair = pair_of_levels<TableType>(levels, byte, multiple);
    store_shared4(Shape::kTableAt + byte * 256 + i % 8 * 16, make_uint4(pair, pair, pair, pair));
  }
}

#endif  // BNB_HOPPER

// Registers of a thread: those that copy give some of theirs to those that multiply.
template <class Shape>
constexpr int kCopyRegisters = Shape::kGroups == 2                           ? 56
                               : Shape::kGroups == 4 && Shape::kTokens <= 32 ? 64
                                                                             : 32;
template <class Shape>
constexpr int kMultiplyRegisters = Shape::kGroups == 2    ? 224
                                   : Shape::kGroups == 3  ? 160
                                   : Shape::kTokens <= 32 ? 104
                                                          : 112;

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    wgmma_gemm_4bit_kernel(BNB_GRID_CONSTANT const Gemm4bit args,
                           BNB_GRID_CONSTANT const Levels4 levels,
                           BNB_GRID_CONSTANT const TensorMap codes,
                           BNB_GRID_CONSTANT const WgmmaPlan plan, char* workspace, float multiple,
                           int log2_block) {
#if BNB_HOPPER
  BNB_DYNAMIC_SHARED(dynamic);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  if (thread == 0) {
    if (shared_address(dynamic) != Shape::kStart) __trap();  // has_kernels() has looked
    Slot<Shape> slot;
    for (int i = 0; i < Shape::kStages; ++i) {
      slot.full().init(kScaleThreads + 1);
      slot.empty().init(Shape::kWarps);
      slot.advance();
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (warp < Shape::kWarps) {
    take_registers<kMultiplyRegisters<Shape>>();
    using Mine = Multiplier<T, Shape>;
    fill_table<typename Mine::TableType, Shape>(levels, multiple, thread);
    named_barrier(1, 128 * Shape::kGroups);
    Mine mine{args,
              plan,
              workspace,
              1.0f / multiple,
              static_cast<uint32_t>(warp),
              static_cast<uint32_t>(thread % kWarp)};
    wait_for_previous_kernel();
    mine.run();
  } else {
    give_registers<kCopyRegisters<Shape>>();
    const int copier = thread - 128 * Shape::kGroups;
    const Scales& scales = args.weight.scales;
    const bool pairs = Shape::kBlocks == 2 && log2_block == 6 && args.weight.k % 128 == 0;
    if (copier < kWarp) {
      if (copier == 0) copy_codes_and_tokens<Shape>(codes, plan, workspace);
    } else if (scales.codes != nullptr) {
      auto* const levels_of_scales =
          reinterpret_cast<float*>(dynamic + Shape::kNestedAt - Shape::kStart);
      for (int i = copier - kWarp; i < kCodeLevels; i += kScaleThreads) {
        levels_of_scales[i] = scales.code[i];
      }
      named_barrier(2, kScaleThreads);
      bring_scales<Shape>(args, plan,
                          ScaleReader<true>(scales, static_cast<const float*>(levels_of_scales)),
                          log2_block - 6,
                          pairs && is_aligned(scales.codes, 2) && scales.block_size % 2 == 0 &&
                              log2_of(scales.block_size) > 0,
                          copier - kWarp);
    } else {
      bring_scales<Shape>(args, plan,
                          ScaleReader<false>(scales, static_cast<const float*>(nullptr)),
                          log2_block - 6, pairs && is_aligned(scales.absmax, 8), copier - kWarp);
    }
  }
#endif
}

// ---- Launch -----------------------------------------------------------------------------------

//                                tokens groups blocks stages scale sums
using Wide16 = WgmmaShape<16, 4, 2, 6, true>;
using Wide32 = WgmmaShape<32, 4, 2, 6, true>;
using Wide64 = WgmmaShape<64, 4, 2, 4, true>;
using Narrow16 = WgmmaShape<16, 2, 2, 8, true>;
using Narrow32 = WgmmaShape<32, 2, 2, 8, true>;
using Narrow64 = WgmmaShape<64, 2, 2, 5, true>;
using Tokens128 = WgmmaShape<128, 2, 1, 6, false>;
using Tokens192 = WgmmaShape<192, 2, 1, 5, false>;
using Tokens256 = WgmmaShape<256, 2, 1, 4, false>;

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
  if (args.m <= 64 && wide) return visit.template operator()<Wide64>();
  if (args.m <= 64) return visit.template operator()<Narrow64>();
  // Measured times of tiles relate like these numbers.
  const int64_t of_128 = ceil_div(args.m, 128) * 72;
  const int64_t of_192 = ceil_div(args.m, 192) * 86;
  const int64_t of_256 = ceil_div(args.m, 256) * 100;
  if (of_128 < std::min(of_192, of_256)) return visit.template operator()<Tokens128>();
  if (of_192 < of_256) return visit.template operator()<Tokens192>();
  return visit.template operator()<Tokens256>();
}

template <class T, class Shape>
void launch_wgmma(const Gemm4bit& args, char* workspace, Stream stream) {
  const Weight4bit& weight = args.weight;
  const auto plan = WgmmaPlan::make<Shape>(args.m, weight.n, weight.k, multiprocessors());
  const int64_t chunks = plan.sums_at / 16;
  launch("order_tokens", &order_tokens_kernel,
         dim3(static_cast<unsigned>(resident_grid(ceil_div(chunks, kOrderThreads)))),
         dim3(kOrderThreads), 0, stream, static_cast<const uint32_t*>(args.a), args.m, weight.k,
         Shape::kTokens, plan.stages * Shape::kBlocks, chunks, reinterpret_cast<uint4*>(workspace),
         reinterpret_cast<int*>(workspace + plan.arrivals_at), plan.arrivals);

  const TensorMap codes =
      tensor_map(weight.codes, weight.n, weight.k / 2, Shape::kRows, 32 * Shape::kBlocks,
                 Shape::kBlocks == 2 ? Swizzle::k64 : Swizzle::kNone);
  auto* kernel = &wgmma_gemm_4bit_kernel<T, Shape>;
  constexpr int kShared = Shape::kEnd - Shape::kStart;
  allow_shared(reinterpret_cast<const void*>(kernel), kShared);
  using TableType = std::conditional_t<Shape::kScaleSums, T, Half>;
  // The kernel may begin while the one before it runs.
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(Shape::kThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = &early;
  config.numAttrs = 1;
  BNB_GPU_CHECK(cudaLaunchKernelEx(&config, kernel, args, Levels4(weight), codes, plan, workspace,
                                   level_multiple<TableType>(weight.code),
                                   log2_of(weight.block_size)));
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

bool has_kernels() {
  if (!is_hopper()) return false;
  int device = 0;
  int reserved = 0;
  BNB_GPU_CHECK(cudaGetDevice(&device));
  BNB_GPU_CHECK(cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device));
  static const bool built = is_built(reinterpret_cast<const void*>(&marker_kernel));
  return built && reserved == Wide16::kStart;
}

}  // namespace

bool wgmma_gemm_4bit_serves(const Gemm4bit& args) {
  const Weight4bit& weight = args.weight;
  return args.dtype != DType::kFloat32 && args.m > 0 && weight.n > 0 && weight.k > 0 &&
         weight.k % 64 == 0 && weight.k <= kLongest && weight.n <= kMostRows &&
         weight.block_size >= 64 && is_aligned(weight.codes, 16) && is_aligned(args.a, 4) &&
         has_kernels();
}

int64_t wgmma_gemm_4bit_workspace_bytes(const Gemm4bit& args) {
  const int count = multiprocessors();
  return with_shape(args, count, [&]<class Shape>() {
    return WgmmaPlan::make<Shape>(args.m, args.weight.n, args.weight.k, count).bytes;
  });
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

bool wgmma_gemm_4bit_serves(const Gemm4bit&) { return false; }
int64_t wgmma_gemm_4bit_workspace_bytes(const Gemm4bit&) { return 0; }
void wgmma_gemm_4bit(const Gemm4bit&, void*, Stream) {}

}  // namespace bnb::gpu

#endif  // BNB_BULK_COPIES
