// The product with a 4-bit weight by Hopper's warpgroup products.
// SPDX-License-Identifier: MIT
//
// The product is made transposed: the weight is A, from registers, and the rows of a ("tokens") are
// B, from shared memory. A block of threads has a warpgroup that copies and some that multiply:
//
//     codes ---- cp.async ---------> [stages] --> registers --> table --> A --+
//     scales --- cp.async ---------> [stages] -------------------------+      v
//     tokens --- permuted copy, then bulk copies --> [stages] -------- | -> wgmma --> sums --> out
//                                                                      +-> weights or sums
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
// applied to sums over 64 k in float. For many, where registers do not suffice for two sets of sums,
// weights are multiplied by them in float and rounded.
#include "gpu/gemm/wgmma.cuh"

#include "gpu/device/scales.cuh"
#include "gpu/device/vector_io.cuh"
#include "gpu/device/wgmma.cuh"
#include "gpu/gemm/levels.cuh"
#include "gpu/gemm/wgmma_plan.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {

#if BNB_CLUSTERS

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
    out[row * 8 + (chunk ^ (token & 7))] = words;
  }
#endif
}

#if BNB_HOPPER

// ---- Copies -----------------------------------------------------------------------------------

// The start of everything in shared memory.
template <class Shape>
struct SharedParts {
  char* base;

  __device__ __forceinline__ char* tokens(int slot) const {
    return base + slot * Shape::kTokenStage;
  }
  __device__ __forceinline__ uint32_t* table() const {
    return reinterpret_cast<uint32_t*>(base + Shape::kTableAt);
  }
  __device__ __forceinline__ char* codes(int slot) const {
    return base + Shape::kCodesAt + slot * Shape::kCodeStage;
  }
  __device__ __forceinline__ float* scales(int slot) const {  // [kRows, kBlocks]
    return reinterpret_cast<float*>(base + Shape::kScalesAt + slot * Shape::kScaleStage);
  }
  __device__ __forceinline__ char* scratch(int warp) const {
    return base + Shape::kScratchAt + warp * Shape::kScratch;
  }
};

// Where the codes of 64 k of a row lie among those of its stage: permuted, so that four rows lie in
// different banks.
template <class Shape>
__device__ __forceinline__ int place_of_codes(int row, int block) {
  constexpr int kRowsPer128 = 4 / Shape::kBlocks;
  static_assert(Shape::kBlocks == 1 || Shape::kBlocks == 2 || Shape::kBlocks == 4);
  return row * Shape::kCodeRow + ((block ^ (row / kRowsPer128 & (Shape::kBlocks - 1))) << 5);
}

// A place in the ring of stages.
template <class Shape>
struct Slot {
  int number = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++number == Shape::kStages) {
      number = 0;
      parity ^= 1u;
    }
  }
};

// Copies of tokens, by one thread: a part of them in each block of a cluster, to all of its blocks.
template <class Shape>
class TokenCopier {
 public:
  __device__ __forceinline__ TokenCopier(const WgmmaPlan& plan, const char* ordered, int cluster,
                                         int rank)
      : plan_(plan), ordered_(ordered), rank_(rank), walk_(plan, cluster) {}

  // The next stage, whose slot is free.
  __device__ __forceinline__ void copy(const SharedParts<Shape>& parts, TransactionBarrier* full) {
    constexpr int kPart = Shape::kTokenStage / Shape::kCluster;
    if (stage_ == walk_.end) {
      walk_.next();
      stage_ = walk_.begin;
    }
    const int64_t at = int64_t{walk_.tile % plan_.token_tiles} * plan_.stages + stage_;
    const char* from = ordered_ + at * Shape::kTokenStage;
    TransactionBarrier& barrier = full[slot_.number];
    barrier.arrive_and_expect(Shape::kTokenStage);
    if constexpr (Shape::kCluster == 1) {
      bulk_copy(parts.tokens(slot_.number), from, kPart, barrier);
    } else {
      bulk_copy_to_cluster(parts.tokens(slot_.number) + rank_ * kPart, from + rank_ * kPart, kPart,
                           barrier, (1u << Shape::kCluster) - 1u);
    }
    ++stage_;
    slot_.advance();
  }

 private:
  const WgmmaPlan& plan_;
  const char* ordered_;
  int rank_;
  WgmmaWalk walk_;
  int stage_ = 0;
  Slot<Shape> slot_;
};

// A warpgroup that copies. The first codes and scales need not wait for the kernel that orders the
// tokens.
template <class Shape, bool kNested>
struct Copier {
  static constexpr int kThreads = 128;
  static constexpr int kChunks = 2 * Shape::kBlocks;            // of a row, 16 bytes each
  static constexpr int kCodeRows = kThreads / kChunks;          // at a time
  static constexpr int kScaleRows = kThreads / Shape::kBlocks;  // at a time

  const Gemm4bit& args;
  const WgmmaPlan& plan;
  const SharedParts<Shape>& parts;
  const ScaleReader<kNested>& scale_of;
  TransactionBarrier* full;
  TransactionBarrier* empty;
  int log2_blocks;  // of 64 in a block of the weight
  bool pairs;       // of scales of a row can be read at a time
  int rank;
  int thread;

  // The scales of one stage to [kRows, kBlocks].
  __device__ __forceinline__ void copy_scales(int64_t first, int rows, int stage,
                                              uint32_t to) const {
    const int columns = static_cast<int>(args.weight.k / 64);
    const int row = thread / Shape::kBlocks;
    const int column = min(stage * Shape::kBlocks + thread % Shape::kBlocks, columns - 1);
    int64_t scale = (first + row) * columns + column;
    constexpr int kCount = Shape::kRows / kScaleRows;
    if constexpr (kNested) {
      float numbers[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        numbers[i] = row + i * kScaleRows < rows ? scale_of(scale >> log2_blocks) : 0.0f;
        scale += int64_t{kScaleRows} * columns;
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(to + 4 * (thread + i * kThreads)),
                     "f"(numbers[i])
                     : "memory");
      }
    } else if (Shape::kBlocks == 2 && pairs) {
      const float* from = args.weight.scales.absmax + (first + thread) * columns + 2 * stage;
#pragma unroll
      for (int i = 0; i < Shape::kRows; i += kThreads) {
        start_copy_if<8>(thread + i < rows, to + 8 * (thread + i), from + int64_t{i} * columns);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        start_copy_if<4>(row + i * kScaleRows < rows, to + 4 * (thread + i * kThreads),
                         args.weight.scales.absmax + (scale >> log2_blocks));
        scale += int64_t{kScaleRows} * columns;
      }
    }
  }

  __device__ __forceinline__ void run(const char* ordered, int cluster) const {
    const int64_t n = args.weight.n;
    const int columns = static_cast<int>(args.weight.k / 64);
    const int64_t pitch = int64_t{columns} * 32;
    const int code_row = thread / kChunks;
    const int code_block = thread / 2 % Shape::kBlocks;
    const uint32_t code_place = shared_address(parts.codes(0)) +
                                place_of_codes<Shape>(code_row, code_block) + thread % 2 * 16;
    const uint32_t scale_place = shared_address(parts.scales(0));
    TokenCopier<Shape> tokens(plan, ordered, cluster, rank);
    Slot<Shape> slot;
    WgmmaWalk walk(plan, cluster);
    const int first_stages = min(walk.all_stages(cluster), Shape::kStages);
    int early = first_stages;
    while (walk.next()) {
      const int64_t first =
          (int64_t{walk.tile / plan.token_tiles} * Shape::kCluster + rank) * Shape::kRows;
      const int rows = static_cast<int>(min(n - first, int64_t{Shape::kRows}));
      for (int stage = walk.begin; stage < walk.end; ++stage) {
        empty[slot.number].wait(slot.parity ^ 1u);
        // Zeros beyond the last row. Beyond the last column those before, which meet tokens of
        // zeros.
        const int code_column = min(stage * Shape::kBlocks + code_block, columns - 1);
        const uint8_t* codes = args.weight.codes + (first + code_row) * pitch + code_column * 32 +
                               thread % 2 * 16;
#pragma unroll
        for (int i = 0; i < Shape::kRows; i += kCodeRows) {
          start_copy_if<16>(code_row + i < rows,
                            code_place + slot.number * Shape::kCodeStage + i * Shape::kCodeRow,
                            codes);
          codes += kCodeRows * pitch;
        }
        copy_scales(first, rows, stage, scale_place + slot.number * Shape::kScaleStage);
        full[slot.number].arrive_after_copies();
        if constexpr (kNested) full[slot.number].arrive();
        slot.advance();
        if (thread == 0) {
          if (early == 1) {
            wait_for_previous_kernel();
            for (int i = 1; i < first_stages; ++i) tokens.copy(parts, full);
          }
          if (early > 1) {
            --early;
          } else {
            early = 0;
            tokens.copy(parts, full);
          }
        }
      }
    }
  }
};

// ---- Products ---------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return to_bfloat16_pair(low, high);
  } else {
    uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
  }
}

template <class T, class Shape>
struct Multiplier {
  // Where weights are scaled, the table holds levels as float16, which is more exact than bfloat16.
  using TableType = std::conditional_t<Shape::kScaleSums, T, Half>;
  static constexpr int kSums = Shape::kSums;

  const Gemm4bit& args;
  const WgmmaPlan& plan;
  const SharedParts<Shape>& parts;
  char* workspace;
  TransactionBarrier* full;
  TransactionBarrier* empty;
  float unit;  // 1 / multiple of the levels
  int rank;
  int cluster;
  int warp;  // of those that multiply
  int lane;

  uint32_t lane_table;   // address of the lane's copy
  uint32_t a[4][4];      // weights of 64 k: [product][fragment]
  uint2 codes[2];        // of rows g and g + 8
  float scale[Shape::kBlocks][2];  // of the same
  float sums[kSums];
  Slot<Shape> slot;      // of what is multiplied ...
  Slot<Shape> coded;     // ... and of what is decoded

  __device__ __forceinline__ uint32_t look_up(uint32_t word, int byte) const {
    uint32_t pair;
    const uint32_t at = __byte_perm(word, 0, 0x4440u + static_cast<uint32_t>(byte));
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(at * (kWarp * 4) + lane_table));
    return pair;
  }

  __device__ __forceinline__ static uint32_t scaled(uint32_t pair, float scale) {
    const float low = half_to_float(static_cast<uint16_t>(pair & 0xffffu));
    const float high = half_to_float(static_cast<uint16_t>(pair >> 16));
    return narrow_pair<T>(__fmul_rn(low, scale), __fmul_rn(high, scale));
  }

  // Waits for 64 k and reads their codes and scales.
  __device__ __forceinline__ void read(int block) {
    if (block == 0) full[coded.number].wait(coded.parity);
    const int row = 16 * warp + lane / 4;
    const char* from = parts.codes(coded.number) + lane % 4 * 8;
    codes[0] = *reinterpret_cast<const uint2*>(from + place_of_codes<Shape>(row, block));
    codes[1] = *reinterpret_cast<const uint2*>(from + place_of_codes<Shape>(row + 8, block));
    if (block == 0) {
      const auto* scales = reinterpret_cast<const Pack<float, Shape::kBlocks>*>(
          parts.scales(coded.number));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto numbers = scales[row + 8 * i];
#pragma unroll
        for (int b = 0; b < Shape::kBlocks; ++b) {
          scale[b][i] =
              Shape::kScaleSums ? numbers.values[b] : __fmul_rn(numbers.values[b], unit);
        }
      }
    }
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

  // One lane for each block of the cluster tells it that the warp has done with the stage.
  __device__ __forceinline__ void release(int number) {
    if constexpr (Shape::kCluster == 1) {
      if (lane == 0) empty[number].arrive();
    } else {
      if (lane < Shape::kCluster) empty[number].arrive_at(lane);
    }
  }

  __device__ __forceinline__ uint32_t tokens_of(int block) const {
    return shared_address(parts.tokens(slot.number)) + block * Shape::kTokenBlock;
  }

  // 64 k, whose weights are decoded. The next are decoded as products end.
  __device__ __forceinline__ void step_scaling_sums(int block, bool more) {
    float part[kSums];
    const float own[2] = {scale[block][0], scale[block][1]};
    const int next = (block + 1) % Shape::kBlocks;
    const uint32_t tokens = tokens_of(block);
    wgmma_fence();
#pragma unroll
    for (int product = 0; product < 4; ++product) {
      Wgmma<T, Shape::kTokens>::run(part, a[product], swizzled_descriptor(tokens, product), product > 0);
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
      release(slot.number);
      slot.advance();
    }
    if (more) decode(3, next);
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = __fmaf_rn(part[i], own[i / 2 % 2], sums[i]);
  }

  // 64 k. Three products are under way while the weights of a fourth are decoded.
  __device__ __forceinline__ void step_scaling_weights(int block, bool first) {
    read(block);
    const uint32_t tokens = tokens_of(block);
#pragma unroll
    for (int product = 0; product < 4; ++product) {
      wgmma_wait<3>();
      if (product == 3 && block == 0 && !first) {
        release(slot.number == 0 ? Shape::kStages - 1 : slot.number - 1);
      }
      decode(product, block);
      wgmma_fence();
      Wgmma<T, Shape::kTokens>::run(sums, a[product], swizzled_descriptor(tokens, product),
                                    !first || product > 0);
      wgmma_commit();
    }
    if (block == Shape::kBlocks - 1) slot.advance();
  }

  __device__ __forceinline__ void run() {
    WgmmaWalk walk(plan, cluster);
    int left = walk.all_stages(cluster);
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
        release(slot.number == 0 ? Shape::kStages - 1 : slot.number - 1);
      }
      if (add_parts(walk)) store(walk.tile);
    }
  }

  // Adds what other clusters have of the tile to the warp's sums, or leaves the sums to them;
  // whether it was the last.
  __device__ __forceinline__ bool add_parts(const WgmmaWalk& walk) {
    if (walk.begin == 0 && walk.end == plan.stages) return true;
    const int split = walk.tile - plan.whole;
    const int first_stage = split * plan.stages;
    const int first = plan.cluster_of(first_stage);
    const int last = plan.cluster_of(first_stage + plan.stages - 1);
    const auto part_of = [&](int c) {
      const int number = 2 * c + (plan.first_of(c) < first_stage ? 1 : 0);
      return reinterpret_cast<float4*>(workspace + plan.sums_at) +
             ((int64_t{number} * Shape::kCluster + rank) * Shape::kWarps + warp) * (kSums * 8) +
             lane;
    };
    float4* own = part_of(cluster);
#pragma unroll
    for (int i = 0; i < kSums / 4; ++i) {
      __stcg(own + i * kWarp,
             make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
    }
    __threadfence();
    __syncwarp();
    int before = 0;
    if (lane == 0) {
      int* arrivals = reinterpret_cast<int*>(workspace + plan.arrivals_at);
      before = atomicAdd(
          arrivals + (split * Shape::kCluster + rank) * Shape::kWarps + warp, 1);
    }
    before = __shfl_sync(0xffffffffu, before, 0);
    if (before != last - first) return false;
    __threadfence();
    // Two parts have the same sum in either order.
    const bool two = last - first == 1;
    if (!two) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
    }
    for (int c = first; c <= last; ++c) {
      if (two && c == cluster) continue;
      const float4* part = part_of(c);
#pragma unroll
      for (int i = 0; i < kSums / 4; ++i) {
        const float4 x = __ldcg(part + i * kWarp);
        sums[4 * i] = __fadd_rn(sums[4 * i], x.x);
        sums[4 * i + 1] = __fadd_rn(sums[4 * i + 1], x.y);
        sums[4 * i + 2] = __fadd_rn(sums[4 * i + 2], x.z);
        sums[4 * i + 3] = __fadd_rn(sums[4 * i + 3], x.w);
      }
    }
    return true;
  }

  // Sixteen rows of the weight for sixteen tokens at a time.
  __device__ __forceinline__ void store(int tile) {
    const int64_t n = args.weight.n;
    const int64_t first_row =
        (int64_t{tile / plan.token_tiles} * Shape::kCluster + rank) * Shape::kRows + 16 * warp;
    if (first_row >= n) return;
    const int64_t first_token = int64_t{tile % plan.token_tiles} * Shape::kTokens;
    const bool wide = n % 8 == 0 && is_aligned(args.out, 16);
    float bias[2] = {0.0f, 0.0f};
    if (args.bias != nullptr) {
      const T* values = static_cast<const T*>(args.bias);
      const int64_t row = first_row + lane / 4;
      if (row < n) bias[0] = widen(values[row]);
      if (row + 8 < n) bias[1] = widen(values[row + 8]);
    }
    const float factor = Shape::kScaleSums ? unit : 1.0f;
    char* scratch = parts.scratch(warp);
    const int column = lane % 8 + lane / 16 * 8;
    const uint32_t place = shared_address(scratch) + column * Shape::kScratchRow + lane / 8 % 2 * 16;
    const int64_t row = first_row + lane % 2 * 8;
    T* out = static_cast<T*>(args.out) + (first_token + lane / 2) * n + row;
#pragma unroll
    for (int i = 0; i < kSums / 8; ++i) {
      if (first_token + 16 * i >= args.m) break;
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float shift = bias[j % 2];
        words[j] = narrow_pair<T>(__fmaf_rn(sums[8 * i + 2 * j], factor, shift),
                                  __fmaf_rn(sums[8 * i + 2 * j + 1], factor, shift));
      }
      __syncwarp();
      store_transposed(place, words);
      __syncwarp();
      if (first_token + 16 * i + lane / 2 < args.m) {
        const char* from = scratch + lane / 2 * Shape::kScratchRow + lane % 2 * 16;
        T* to = out + 16 * i * n;
        if (wide) {
          if (row < n) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        } else {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            if (row + j < n) to[j] = reinterpret_cast<const T*>(from)[j];
          }
        }
      }
    }
  }
};

#endif  // BNB_HOPPER

// Registers of a thread: those that copy weights give theirs to those that multiply.
template <class Shape>
constexpr int kCopyRegisters = Shape::kGroups == 2 ? 40 : 32;
template <class Shape>
constexpr int kMultiplyRegisters = Shape::kGroups == 2 ? 232 : Shape::kGroups == 3 ? 160 : 112;

template <class T, class Shape, bool kNested>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    wgmma_gemm_4bit_kernel(BNB_GRID_CONSTANT const Gemm4bit args,
                           BNB_GRID_CONSTANT const Levels4 levels,
                           BNB_GRID_CONSTANT const WgmmaPlan plan, char* workspace, float multiple,
                           int log2_block) {
#if BNB_HOPPER
  BNB_DYNAMIC_SHARED(dynamic);
  __shared__ TransactionBarrier full[Shape::kStages];
  __shared__ TransactionBarrier empty[Shape::kStages];
  __shared__ float shared_code[kNested ? kCodeLevels : 1];
  using Mine = Multiplier<T, Shape>;

  const uint32_t start = shared_address(dynamic);
  const SharedParts<Shape> parts{dynamic + ((1024u - start % 1024u) % 1024u)};
  const int rank = Shape::kCluster == 1 ? 0 : cluster_rank();
  const int cluster = static_cast<int>(blockIdx.x) / Shape::kCluster;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (int i = 0; i < Shape::kStages; ++i) {
      full[i].init((kNested ? 2 : 1) * 128 + 1);
      empty[i].init(Shape::kCluster * Shape::kWarps);
    }
    fence_barrier_init();
  }
  const ScaleReader<kNested> scale_of(args.weight.scales, shared_code);
  fill_pair_table<typename Mine::TableType>(levels, multiple, parts.table());
  __syncthreads();
  if constexpr (Shape::kCluster > 1) cluster_barrier();

  const int warp = thread / kWarp;
  if (warp < Shape::kWarps) {
    take_registers<kMultiplyRegisters<Shape>>();
    const int lane = thread % kWarp;
    Mine mine{args, plan, parts, workspace, full, empty, 1.0f / multiple, rank, cluster, warp, lane};
    mine.lane_table = shared_address(parts.table()) + lane * 4;
    wait_for_previous_kernel();
    mine.run();
  } else {
    give_registers<kCopyRegisters<Shape>>();
    const bool pairs = log2_block == 6 && args.weight.k % 128 == 0 &&
                       is_aligned(args.weight.scales.absmax, 8);
    Copier<Shape, kNested>{args, plan,  parts,          scale_of, full,
                                 empty, log2_block - 6, pairs, rank, thread - 128 * Shape::kGroups}
        .run(workspace, cluster);
  }
  __syncwarp();
  // A block must not end while another may still signal to it.
  if constexpr (Shape::kCluster > 1) cluster_barrier();
#endif
}

// ---- Launch -----------------------------------------------------------------------------------

//                              tokens groups blocks stages cluster scale sums
using Shape16 = WgmmaShape<16, 4, 2, 6, 1, true>;
using Shape32 = WgmmaShape<32, 4, 2, 6, 1, true>;
using Shape64 = WgmmaShape<64, 4, 2, 4, 2, true>;
using Shape128 = WgmmaShape<128, 4, 2, 3, 2, false>;
using Shape256 = WgmmaShape<256, 2, 1, 4, 2, false>;

template <class Visitor>
decltype(auto) with_shape(int64_t m, Visitor&& visit) {
  if (m <= 16) return visit.template operator()<Shape16>();
  if (m <= 32) return visit.template operator()<Shape32>();
  if (m <= 64) return visit.template operator()<Shape64>();
  if (m <= 128) return visit.template operator()<Shape128>();
  return visit.template operator()<Shape256>();
}

template <class T, class Shape, bool kNested>
void launch_wgmma(const Gemm4bit& args, char* workspace, Stream stream) {
  const Weight4bit& weight = args.weight;
  const auto plan = WgmmaPlan::make<Shape>(args.m, weight.n, weight.k, multiprocessors());
  const int64_t chunks = plan.sums_at / 16;
  launch("order_tokens", &order_tokens_kernel,
         dim3(static_cast<unsigned>(resident_grid(ceil_div(chunks, kOrderThreads)))),
         dim3(kOrderThreads), 0, stream, static_cast<const uint32_t*>(args.a), args.m, weight.k,
         Shape::kTokens, plan.stages * Shape::kBlocks, chunks, reinterpret_cast<uint4*>(workspace),
         reinterpret_cast<int*>(workspace + plan.arrivals_at), plan.arrivals);

  auto* kernel = &wgmma_gemm_4bit_kernel<T, Shape, kNested>;
  allow_shared(reinterpret_cast<const void*>(kernel), Shape::kShared);
  using TableType = std::conditional_t<Shape::kScaleSums, T, Half>;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {Shape::kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.clusters * Shape::kCluster));
  config.blockDim = dim3(Shape::kThreads);
  config.dynamicSmemBytes = Shape::kShared;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = attributes;
  config.numAttrs = 2;
  BNB_GPU_CHECK(cudaLaunchKernelEx(&config, kernel, args, Levels4(weight), plan, workspace,
                                   level_multiple<TableType>(weight.code),
                                   log2_of(weight.block_size)));
}

// Whether the device has a kernel of sm_90a: for other targets kernels are empty, and use no shared
// memory.
bool has_kernels() {
  int device = 0;
  int major = 0;
  int minor = 0;
  BNB_GPU_CHECK(cudaGetDevice(&device));
  BNB_GPU_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  BNB_GPU_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (major != 9 || minor != 0) return false;
  static const bool built = [] {
    cudaFuncAttributes attributes{};
    const bool found =
        cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(
                                               &wgmma_gemm_4bit_kernel<BFloat16, Shape16, false>)) ==
        cudaSuccess;
    cudaGetLastError();
    return found && attributes.sharedSizeBytes > 0;
  }();
  return built;
}

}  // namespace

bool wgmma_gemm_4bit_serves(const Gemm4bit& args) {
  const Weight4bit& weight = args.weight;
  return args.dtype != DType::kFloat32 && args.m > 0 && weight.n > 0 && weight.k > 0 &&
         weight.k % 64 == 0 && weight.block_size >= 64 && is_aligned(weight.codes, 16) &&
         is_aligned(args.a, 4) && has_kernels();
}

int64_t wgmma_gemm_4bit_workspace_bytes(const Gemm4bit& args) {
  return with_shape(args.m, [&]<class Shape>() {
    return WgmmaPlan::make<Shape>(args.m, args.weight.n, args.weight.k, multiprocessors()).bytes;
  });
}

void wgmma_gemm_4bit(const Gemm4bit& args, void* workspace, Stream stream) {
  char* const memory = static_cast<char*>(workspace);
  with_shape(args.m, [&]<class Shape>() {
    const bool nested = args.weight.scales.nested();
    if (args.dtype == DType::kBFloat16) {
      nested ? launch_wgmma<BFloat16, Shape, true>(args, memory, stream)
             : launch_wgmma<BFloat16, Shape, false>(args, memory, stream);
    } else {
      nested ? launch_wgmma<Half, Shape, true>(args, memory, stream)
             : launch_wgmma<Half, Shape, false>(args, memory, stream);
    }
  });
}

#else

bool wgmma_gemm_4bit_serves(const Gemm4bit&) { return false; }
int64_t wgmma_gemm_4bit_workspace_bytes(const Gemm4bit&) { return 0; }
void wgmma_gemm_4bit(const Gemm4bit&, void*, Stream) {}

#endif  // BNB_CLUSTERS

}  // namespace bnb::gpu
