// 8-bit blockwise quantization and its inverse, for any table of 256 levels.
// SPDX-License-Identifier: MIT
#include "bitsandbytes/blocks.h"
#include "bitsandbytes/kernels/check.h"
#include "bitsandbytes/kernels/quantize.h"
#include "gpu/device/code8.cuh"
#include "gpu/device/dtype.cuh"
#include "gpu/device/scales.cuh"
#include "gpu/device/tile.cuh"
#include "gpu/device/vector_io.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {
namespace {

// Puts the levels of a table that is not ascending in order, and gives the codes of the ordered
// table those that the caller knows.
struct LevelOrder {
  uint8_t codes[kCodeLevels];

  // Returns whether it had to, the same for the whole block. Called by all of its threads, which
  // must be synchronised before and after.
  __device__ bool sort(float* levels) {  // [256], in shared memory
    static_assert(kTileThreads == kCodeLevels);
    const int mine = static_cast<int>(threadIdx.x);
    const float level = levels[mine];
    if (block_all(mine == 0 || !level_before(level, levels[mine - 1]))) return false;
    int rank = 0;
    for (int i = 0; i < kCodeLevels; ++i) {
      const bool before = level_before(levels[i], level);
      const bool after = level_before(level, levels[i]);
      rank += static_cast<int>(before || (!after && i < mine));
    }
    __syncthreads();
    levels[rank] = level;
    codes[rank] = static_cast<uint8_t>(mine);
    return true;
  }
  template <class W>
  __device__ __forceinline__ void restore(W& packed) const {
#pragma unroll
    for (uint32_t& word : packed.words) {
      word = codes[word & 0xffu] | codes[(word >> 8) & 0xffu] << 8 |
             codes[(word >> 16) & 0xffu] << 16 | static_cast<uint32_t>(codes[word >> 24]) << 24;
    }
  }
};

// Random numbers of stochastic rounding: element i takes number (i + offset) mod size.
struct RandomNumbers {
  const float* values;  // [size]
  int64_t size;
  int64_t offset;

  // Moves codes of the nearest levels of kCount elements from i on to the levels on the other side,
  // by chance.
  template <int kCount>
  __device__ __forceinline__ void round(const float* levels, const float (&x)[kCount],
                                        float inverse, int64_t i,
                                        Words<uint8_t, kCount>& codes) const {
    const auto level = [levels](int k) { return levels[k]; };
    int64_t next = (i + offset) % size;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int shift = 8 * (j % 4);
      uint32_t& word = codes.words[j / 4];
      const int nearest = static_cast<int>((word >> shift) & 0xffu);
      const int code = round_stochastic(level, nearest, __fmul_rn(x[j], inverse), values[next]);
      word += static_cast<uint32_t>(code - nearest) << shift;  // stays within its byte
      next = next + 1 == size ? 0 : next + 1;
    }
  }
};

using Code = Code8<false, OneEncodeTable>;

// ---- Whole tiles, dynamic maps
// --------------------------------------------------------------------
//
// The common case. While a warp works on one tile, the next one is on its way to shared memory;
// every lane reads what it copied itself. A warp has a run of rows of 32 packs of 16 bytes:
//
//     row 0: [lane 0][lane 1] ... [lane 31]
//     row 1: ...
//
// A quantization block is a run of lanes, of rows, or of the whole runs of neighbouring warps.
constexpr int kRows = 4;
constexpr int kRunBytes = kRows * kWarp * 16;
constexpr int kSlots = 2;
constexpr int kWholeResident = 4;  // blocks of threads per multiprocessor

template <class T>
inline constexpr int kWholeTile = kTileThreads * kRows * kPackSize<T>;

// Codes of a pack whose block is not regular, or of one that is; seldom called.
template <class T>
__device__ BNB_NOINLINE Words<uint8_t, kPackSize<T>> encode_any(const Code& code,
                                                                const OneEncodeTable& tables,
                                                                Words<T, kPackSize<T>> words,
                                                                uint32_t most) {
  float x[kPackSize<T>];
#pragma unroll
  for (int j = 0; j < kPackSize<T>; ++j) x[j] = words.get(j);
  Words<uint8_t, kPackSize<T>> codes;
  code.encode(tables, x, absmax_from_bits(most), codes.words);
  return codes;
}

// The absmax of every row's quantization block, from those of a lane's packs. Called by all threads
// of the block. `warp_most` [warps]: scratch.
template <class T>
__device__ __forceinline__ void reduce_rows(uint32_t (&most)[kRows], int log2_block,
                                            uint32_t* warp_most) {
  constexpr int kRow = kWarp * kPackSize<T>;
  const int block_size = 1 << log2_block;
  if (block_size < kRow) {
#pragma unroll
    for (int v = 0; v < kRows; ++v) {
      for (int lanes = block_size / kPackSize<T> / 2; lanes > 0; lanes /= 2) {
        most[v] = max(most[v], shuffle_xor(most[v], lanes));
      }
    }
    return;
  }
  if (block_size == kRow) {
#pragma unroll
    for (int v = 0; v < kRows; ++v) most[v] = warp_max(most[v]);
    return;
  }
  static_assert(kRows == 4);
  uint32_t low = max(most[0], most[1]);
  uint32_t high = max(most[2], most[3]);
  if (block_size > 2 * kRow) low = high = max(low, high);
  low = warp_max(low);
  high = block_size > 2 * kRow ? low : warp_max(high);
  if (block_size > kRows * kRow) {
    const int warps = block_size / (kRows * kRow);
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (lane == 0) warp_most[warp] = low;
    __syncthreads();
    low = high = warp_max(warp_most[(warp & ~(warps - 1)) + (lane & (warps - 1))]);
  }
  most[0] = most[1] = low;
  most[2] = most[3] = high;
}

template <bool kSigned, class T>
__device__ __forceinline__ void quantize_whole_tiles(const T* __restrict__ a,
                                                     uint8_t* __restrict__ out,
                                                     float* __restrict__ absmax, int64_t tiles,
                                                     int log2_block, const Code& code,
                                                     const OneEncodeTable& tables, char* slots,
                                                     uint32_t (*warp_most)[kTileWarps]) {
  constexpr int kPack = kPackSize<T>;
  constexpr int kRow = kWarp * kPack;
  using Values = Words<T, kPack>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t own = int64_t{warp} * kRows * kRow + lane * kPack;  // in a tile
  const auto place = [&](int slot, int v) {
    return slots + (slot * kTileWarps + warp) * kRunBytes + (v * kWarp + lane) * 16;
  };
  const auto fetch = [&](int64_t tile, int slot) {
    if (tile < tiles) {
      const T* from = a + tile * kWholeTile<T> + own;
#pragma unroll
      for (int v = 0; v < kRows; ++v) start_copy<16>(place(slot, v), from + v * kRow);
    }
    close_copy_group();
  };
  int slot = 0;
  fetch(blockIdx.x, slot);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    fetch(tile + gridDim.x, slot ^ 1);
    wait_copies<1>();
    Values words[kRows];
    uint32_t most[kRows];
#pragma unroll
    for (int v = 0; v < kRows; ++v) {
      words[v] = load_aligned<Values>(place(slot, v));
      most[v] = largest_magnitude(words[v]);
    }
    reduce_rows<T>(most, log2_block, warp_most[slot]);
    const int64_t first = tile * kWholeTile<T> + own;
#pragma unroll
    for (int v = 0; v < kRows; ++v) {
      const int64_t i = first + v * kRow;
      const float scale = absmax_from_bits(most[v]);
      if ((static_cast<int>(i) & ((1 << log2_block) - 1)) == 0) absmax[i >> log2_block] = scale;
      Words<uint8_t, kPack> codes;
      if (most[v] != 0 && has_quick_reciprocal(most[v])) {
        float x[kPack];
#pragma unroll
        for (int j = 0; j < kPack; ++j) x[j] = words[v].get(j);
        Code::encode_dynamic(kSigned, tables, x, quick_reciprocal(scale), codes.words);
      } else {
        codes = encode_any<T>(code, tables, words[v], most[v]);
      }
      store_aligned(out + i, codes);
    }
    slot ^= 1;
  }
}

// ---- Any tile, any levels
// -------------------------------------------------------------------------
template <class T, bool kStochastic>
__global__ void BNB_LAUNCH_BOUNDS(kTileThreads, kWholeResident)
    quantize_blockwise_kernel(const T* __restrict__ a,         // [n]
                              const float* __restrict__ code,  // [256]
                              uint8_t* __restrict__ out,       // [n]
                              float* __restrict__ absmax,      // [ceil(n / block_size)] or null
                              int64_t n, int log2_block, bool aligned, RandomNumbers random) {
  using Elements = Tile<T>;
  constexpr int kPack = Elements::kPack;

  BNB_DYNAMIC_SHARED(slots);
  __shared__ Code levels;
  __shared__ OneEncodeTable tables;
  __shared__ typename Elements::Exchange exchange;
  __shared__ LevelOrder order;
  levels.fill(code, tables);
  // The dynamic maps' own encode knows numbers up to 1 only.
  if (absmax == nullptr && threadIdx.x == 0) levels.kind = CodeKind::kTable;
  __syncthreads();
  const bool reordered = levels.kind == CodeKind::kTable && order.sort(levels.levels);
  __syncthreads();

  int64_t done = 0;  // elements
  if (!kStochastic && aligned && levels.kind != CodeKind::kTable) {
    static_assert(kSlots <= 2 && kWholeTile<T> % kTileElements == 0);
    __shared__ uint32_t run_most[kSlots][kTileWarps];
    const int64_t tiles = n / kWholeTile<T>;
    if (levels.kind == CodeKind::kSignedDynamic8) {
      quantize_whole_tiles<true>(a, out, absmax, tiles, log2_block, levels, tables, slots,
                                 run_most);
    } else {
      quantize_whole_tiles<false>(a, out, absmax, tiles, log2_block, levels, tables, slots,
                                  run_most);
    }
    done = tiles * kWholeTile<T>;
  }

  const int block_size = 1 << log2_block;
  int buffer = 0;
  for (int64_t tile = done / kTileElements + blockIdx.x; tile * kTileElements < n;
       tile += gridDim.x) {
    Elements elements;
    elements.load(a, n, tile, aligned);
    elements.reduce(block_size, exchange, buffer);
#pragma unroll
    for (int v = 0; v < Elements::kSlices; ++v) {
      const int64_t i = Elements::base_of(tile) + v * Elements::kSlice;
      if (i >= n) break;
      const float (&x)[kPack] = elements.x[v];
      const float scale = absmax != nullptr ? absmax_from_bits(elements.most[v]) : 1.0f;
      if (absmax != nullptr && (i & (block_size - 1)) == 0) absmax[i >> log2_block] = scale;
      Words<uint8_t, kPack> codes;
      levels.encode(tables, x, scale, codes.words);
      if constexpr (kStochastic) random.round(levels.levels, x, __frcp_rn(scale), i, codes);
      if (reordered) order.restore(codes);
      if (aligned && n - i >= kPack) {
        store_aligned(out + i, codes);
      } else {
        for (int j = 0; j < kPack && i + j < n; ++j) out[i + j] = codes.byte(j);
      }
    }
  }
}

template <class T, bool kNested>
__global__ void __launch_bounds__(kTileThreads)
    dequantize_blockwise_kernel(const uint8_t* __restrict__ a,  // [n]
                                BNB_GRID_CONSTANT const Scales scales,
                                const float* __restrict__ code,  // [256]
                                T* __restrict__ out,             // [n]
                                int64_t n, int64_t block_size,
                                int log2_block,  // or -1 when block_size is no power of two
                                bool aligned) {  // packs are, and lie within one block
  constexpr int kPack = kPackSize<T>;
  constexpr int kUnroll = 4;
  constexpr int64_t kSlice = kTileThreads * kPack;
  __shared__ float levels[kCodeLevels];
  __shared__ float scale_levels[kNested ? kCodeLevels : 1];
  for (int i = threadIdx.x; i < kCodeLevels; i += kTileThreads) levels[i] = code[i];
  const ScaleReader<kNested> scale_of(scales, scale_levels);
  __syncthreads();

  const int64_t turn = kSlice * kUnroll;
  for (int64_t tile = blockIdx.x; tile * turn < n; tile += gridDim.x) {
    const int64_t base = tile * turn + static_cast<int64_t>(threadIdx.x) * kPack;
    if (aligned && (tile + 1) * turn <= n) {
      // A pack lies within one quantization block: `aligned` says so too.
      Words<uint8_t, kPack> codes[kUnroll];
      float scale[kUnroll];
#pragma unroll
      for (int v = 0; v < kUnroll; ++v) {
        const int64_t i = base + v * kSlice;
        codes[v] = load_aligned<Words<uint8_t, kPack>>(a + i);
        scale[v] = scale_of(i >> log2_block);
      }
#pragma unroll
      for (int v = 0; v < kUnroll; ++v) {
        float x[kPack];
#pragma unroll
        for (int j = 0; j < kPack; ++j) x[j] = __fmul_rn(levels[codes[v].byte(j)], scale[v]);
        Words<T, kPack> words;
        words.set(x);
        store_aligned(out + base + v * kSlice, words);
      }
    } else {
      for (int v = 0; v < kUnroll; ++v) {
        for (int j = 0; j < kPack; ++j) {
          const int64_t i = base + v * kSlice + j;
          if (i >= n) break;
          const float scale = scale_of(log2_block >= 0 ? i >> log2_block : i / block_size);
          out[i] = narrow<T>(__fmul_rn(levels[a[i]], scale));
        }
      }
    }
  }
}

template <class T>
void quantize(const QuantizeBlockwise& args, Stream stream) {
  const bool aligned = is_aligned(args.a, 16) && is_aligned(args.out, kPackSize<T>);
  const auto kernel = args.rand != nullptr ? quantize_blockwise_kernel<T, true>
                                           : quantize_blockwise_kernel<T, false>;
  // Without whole tiles nothing is copied ahead.
  const int slots =
      args.n >= kWholeTile<T> && args.rand == nullptr ? kSlots * kTileWarps * kRunBytes : 0;
  allow_shared(reinterpret_cast<const void*>(kernel), slots);
  prefer_shared(reinterpret_cast<const void*>(kernel));
  launch("quantize_blockwise_kernel", kernel,
         resident_grid(ceil_div(args.n, kTileElements), kWholeResident), kTileThreads, slots,
         stream, static_cast<const T*>(args.a), args.code, args.out, args.absmax, args.n,
         log2_of(args.block_size), aligned,
         RandomNumbers{args.rand, args.rand_size, args.rand_offset});
}

template <class T, bool kNested>
void launch_dequantize(const DequantizeBlockwise& args, Stream stream) {
  const int log2_block = log2_of(args.block_size);
  const bool aligned = is_aligned(args.a, kPackSize<T>) && is_aligned(args.out, 16) &&
                       log2_block >= 0 && args.block_size >= kPackSize<T>;
  constexpr int64_t kTurn = kTileThreads * kPackSize<T> * 4;
  launch("dequantize_blockwise_kernel", dequantize_blockwise_kernel<T, kNested>,
         resident_grid(ceil_div(args.n, kTurn)), kTileThreads, 0, stream, args.a, args.scales,
         args.code, static_cast<T*>(args.out), args.n, args.block_size, log2_block, aligned);
}

template <class T>
void dequantize(const DequantizeBlockwise& args, Stream stream) {
  args.scales.nested() ? launch_dequantize<T, true>(args, stream)
                       : launch_dequantize<T, false>(args, stream);
}

}  // namespace

void quantize_blockwise(const QuantizeBlockwise& args, Stream stream) {
  check_arguments(args, BlockSizes::kPowersOfTwo);
  if (args.n == 0) return;
  by_dtype(args.dtype, [&]<class T>() { quantize<T>(args, stream); });
}

void dequantize_blockwise(const DequantizeBlockwise& args, Stream stream) {
  check_arguments(args);
  if (args.n == 0) return;
  by_dtype(args.dtype, [&]<class T>() { dequantize<T>(args, stream); });
}

}  // namespace bnb::gpu
