// 4-bit blockwise quantization and its inverse, for every 4-bit code.
// SPDX-License-Identifier: MIT
#include <type_traits>

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/kernels/check.h"
#include "bitsandbytes/kernels/quantize_4bit.h"
#include "gpu/device/dtype.cuh"
#include "gpu/device/runs.cuh"
#include "gpu/device/scales.cuh"
#include "gpu/device/tile.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {
namespace {

template <class Code>
__device__ const constexpr Buckets4<Code> kBuckets = make_buckets4<Code>();

// [code][level]
struct AllLevels {
  float values[kCode4Count][kCode4Levels];
};
constexpr AllLevels make_all_levels() {
  AllLevels all{};
  for (int code = 0; code < kCode4Count; ++code) {
    for (int i = 0; i < kCode4Levels; ++i) all.values[code][i] = kCodes4[code].levels[i];
  }
  return all;
}
__device__ const constexpr AllLevels kLevels = make_all_levels();

// Blocks of threads on a multiprocessor whose slots find room in its shared memory.
template <class T>
constexpr int kResident = sizeof(T) == 2 ? 4 : 3;

// The packed codes of a pack of elements.
template <int kPack>
using PackedCodes = std::conditional_t<kPack == 8, uint32_t, uint16_t>;

// Takes what a block without a finite, nonzero scale has to a number of the same code: NaN (0 / 0,
// infinity / infinity) counts no threshold, and every threshold lies below 1.
template <class Code>
__device__ __forceinline__ float tame(float s) {
  if (is_nan(s)) return Code::kSignBit ? 0.0f : -1.0f;
  return fminf(fmaxf(s, -1.0f), 1.0f);
}

// Codes of elements of one pack from s, an element over its block's absmax, which is tame or of a
// regular block. The first one is in the upper half of the lowest byte.
template <class Code, int kPack>
__device__ __forceinline__ PackedCodes<kPack> encode_tame(const Buckets4<Code>& buckets,
                                                          const float (&s)[kPack]) {
  // Nibbles enter from below, so that the first element ends up in the highest.
  uint32_t ranks = 0;
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    ranks = (ranks << 4) + buckets.rank_of(Code::kSignBit ? magnitude(s[j]) : s[j]);
  }
  uint32_t codes = Code::from_rank(ranks);
  if constexpr (Code::kSignBit) {
    uint32_t signs = 0;  // and the next three bits, which are dropped in the end
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      // Adding zero takes the sign from a negative zero and changes nothing else.
      signs = (signs << 4) | (float_bits(__fadd_rn(s[j], 0.0f)) >> 28);
    }
    codes |= signs & 0x88888888u;
  }
  return static_cast<PackedCodes<kPack>>(byte_permute(codes, 0, kPack == 8 ? 0x0123 : 0x3201));
}

// Codes of the elements of one pack.
template <class Code, int kPack>
__device__ __forceinline__ PackedCodes<kPack> encode(const Buckets4<Code>& buckets,
                                                     const float (&x)[kPack], uint32_t most) {
  const float absmax = absmax_from_bits(most);
  const float inverse = has_quick_reciprocal(most) ? quick_reciprocal(absmax) : __frcp_rn(absmax);
  float s[kPack];
#pragma unroll
  for (int j = 0; j < kPack; ++j) s[j] = __fmul_rn(x[j], inverse);
  if (!is_regular_block(absmax, inverse)) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) s[j] = tame<Code>(s[j]);
  }
  return encode_tame<Code>(buckets, s);
}

// The same for any block, seldom called.
template <class Code, class T, int kPack>
__device__ BNB_NOINLINE PackedCodes<kPack> encode_any(const Buckets4<Code>& buckets,
                                                      Words<T, kPack> x, uint32_t most) {
  float values[kPack];
#pragma unroll
  for (int j = 0; j < kPack; ++j) values[j] = x.get(j);
  return encode<Code>(buckets, values, most);
}

// Codes of a run: one 16-byte pack.
constexpr int kRun = 32;

template <class Code, class T>
__device__ __forceinline__ Words<uint8_t, kRun / 2> encode_run(const Buckets4<Code>& buckets,
                                                               const Words<T, kRun>& run,
                                                               uint32_t most) {
  constexpr int kPack = 8;  // elements whose codes fill a word
  Words<uint8_t, kRun / 2> codes;
  if (most != 0 && has_quick_reciprocal(most)) {
    const float inverse = quick_reciprocal(absmax_from_bits(most));
#pragma unroll
    for (int w = 0; w < kRun / kPack; ++w) {
      float s[kPack];
#pragma unroll
      for (int j = 0; j < kPack; ++j) s[j] = __fmul_rn(run.get(w * kPack + j), inverse);
      codes.words[w] = encode_tame<Code>(buckets, s);
    }
  } else {
#pragma unroll
    for (int w = 0; w < kRun / kPack; ++w) {
      codes.words[w] = encode_any<Code>(buckets, part<kPack>(run, w), most);
    }
  }
  return codes;
}

// code(i) = encode(a[i] * (1 / absmax)): whole tiles of runs (device/runs.cuh), and then what is
// left, or everything that is not aligned, a tile of 4096 elements at a time (device/tile.cuh).
template <class Code, class T>
__global__ void BNB_LAUNCH_BOUNDS(kTileThreads, kResident<T>)
    quantize_4bit_kernel(const T* __restrict__ a,     // [n]
                         uint8_t* __restrict__ out,   // [ceil(n / 2)]
                         float* __restrict__ absmax,  // [ceil(n / block_size)]
                         int64_t n, int log2_block, bool aligned,
                         int64_t run_tiles) {  // 0 where something is not aligned
  using Elements = Tile<T>;
  constexpr int kPack = Elements::kPack;
  using Packed = PackedCodes<kPack>;

  BNB_DYNAMIC_SHARED(slots);
  struct alignas(kRunRow) Shared {
    Buckets4<Code> buckets;
    typename Elements::Exchange exchange;
    typename RunTile<T, kRun>::Exchange run_exchange;
  };
  __shared__ Shared shared;
  Buckets4<Code>& buckets = shared.buckets;
  if (threadIdx.x < Buckets4<Code>::kCount) {
    buckets.threshold[threadIdx.x] = kBuckets<Code>.threshold[threadIdx.x];
    buckets.rank[threadIdx.x] = kBuckets<Code>.rank[threadIdx.x];
  }
  __syncthreads();

  for_each_run<kRun>(a, absmax, run_tiles, log2_block, slots, shared.run_exchange,
                     [&](const Words<T, kRun>& run, uint32_t most, int64_t i) {
                       store_aligned(out + i / 2, encode_run<Code>(buckets, run, most));
                     });
  const int64_t done = run_tiles * RunTile<T, kRun>::kElements;

  const int block_size = 1 << log2_block;
  int buffer = 0;
  for (int64_t tile = done / kTileElements + blockIdx.x; tile * kTileElements < n;
       tile += gridDim.x) {
    Elements elements;
    elements.load(a, n, tile, aligned);
    elements.reduce(block_size, shared.exchange, buffer);
#pragma unroll
    for (int v = 0; v < Elements::kSlices; ++v) {
      const int64_t i = Elements::base_of(tile) + v * Elements::kSlice;
      if (i >= n) break;
      if ((i & (block_size - 1)) == 0) {
        absmax[i >> log2_block] = absmax_from_bits(elements.most[v]);
      }
      const Packed codes = encode<Code>(buckets, elements.x[v], elements.most[v]);
      if (aligned && n - i >= kPack) {
        *reinterpret_cast<Packed*>(out + i / 2) = codes;
      } else {
#pragma unroll
        for (int j = 0; j < kPack; j += 2) {
          if (i + j < n) out[(i + j) / 2] = static_cast<uint8_t>(codes >> (4 * j));
        }
      }
    }
  }
}

// out[i] = level(code i) * scale(i / block_size). A thread holds kUnroll packs of codes at a time,
// each for 16 bytes of results. Sixteen levels lie in sixteen banks: lookups do not conflict.
template <class T, bool kNested>
__global__ void __launch_bounds__(kTileThreads)
    dequantize_4bit_kernel(const uint8_t* __restrict__ a,  // [ceil(n / 2)]
                           BNB_GRID_CONSTANT const Scales scales, Code4 code,
                           T* __restrict__ out,  // [n]
                           int64_t n, int log2_block, bool aligned) {
  constexpr int kPack = kPackSize<T>;
  using Packed = PackedCodes<kPack>;
  constexpr int kUnroll = 4;
  constexpr int64_t kSlice = kTileThreads * kPack;
  __shared__ float levels[kCode4Levels];
  __shared__ float scale_levels[kNested ? kCodeLevels : 1];
  if (threadIdx.x < kCode4Levels) {
    levels[threadIdx.x] = kLevels.values[static_cast<int>(code)][threadIdx.x];
  }
  const ScaleReader<kNested> scale_of(scales, scale_levels);
  __syncthreads();

  constexpr int64_t kTurn = kSlice * kUnroll;
  for (int64_t tile = blockIdx.x; tile * kTurn < n; tile += gridDim.x) {
    const int64_t base = tile * kTurn + static_cast<int64_t>(threadIdx.x) * kPack;
    if (aligned && (tile + 1) * kTurn <= n) {
      uint32_t codes[kUnroll];
      float scale[kUnroll];
#pragma unroll
      for (int v = 0; v < kUnroll; ++v) {
        const int64_t i = base + v * kSlice;
        codes[v] = *reinterpret_cast<const Packed*>(a + i / 2);
        scale[v] = scale_of(i >> log2_block);
      }
#pragma unroll
      for (int v = 0; v < kUnroll; ++v) {
        float x[kPack];
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          const uint32_t nibble = (codes[v] >> (4 * (j ^ 1))) & 15u;
          x[j] = __fmul_rn(levels[nibble], scale[v]);
        }
        Words<T, kPack> words;
        words.set(x);
        store_aligned(out + base + v * kSlice, words);
      }
    } else {
      for (int v = 0; v < kUnroll; ++v) {
        for (int j = 0; j < kPack; ++j) {
          const int64_t i = base + v * kSlice + j;
          if (i >= n) break;
          const uint32_t byte = a[i / 2];
          const uint32_t nibble = j % 2 == 0 ? byte >> 4 : byte & 15u;
          out[i] = narrow<T>(__fmul_rn(levels[nibble], scale_of(i >> log2_block)));
        }
      }
    }
  }
}

template <class Code, class T>
void launch_quantize(const Quantize4bit& args, Stream stream) {
  using Runs = RunTile<T, kRun>;
  static_assert(Runs::kElements % kTileElements == 0);
  const bool aligned = is_aligned(args.a, 16) && is_aligned(args.out, kPackSize<T> / 2);
  const auto kernel = quantize_4bit_kernel<Code, T>;
  const bool runs = args.n >= Runs::kElements && is_aligned(args.a, 16) &&
                    is_aligned(args.out, kRun / 2) &&
                    take_shared(reinterpret_cast<const void*>(kernel), Runs::kBytes);
  launch("quantize_4bit_kernel", kernel,
         resident_grid(ceil_div(args.n, kTileElements), kResident<T>), kTileThreads,
         runs ? Runs::kBytes : 0, stream, static_cast<const T*>(args.a), args.out, args.absmax,
         args.n, log2_of(args.block_size), aligned, runs ? args.n / Runs::kElements : 0);
}

template <class T>
void quantize(const Quantize4bit& args, Stream stream) {
  switch (args.code) {
#define BNB_CASE(code) \
  case Code4::k##code: \
    return launch_quantize<code, T>(args, stream);
    BNB_CODES4(BNB_CASE)
#undef BNB_CASE
    case Code4::kCount:
      return;
  }
}

template <class T, bool kNested>
void launch_dequantize(const Dequantize4bit& args, Stream stream) {
  const bool aligned = is_aligned(args.a, kPackSize<T> / 2) && is_aligned(args.out, 16);
  constexpr int64_t kTurn = kTileThreads * kPackSize<T> * 4;
  launch("dequantize_4bit_kernel", dequantize_4bit_kernel<T, kNested>,
         resident_grid(ceil_div(args.n, kTurn)), kTileThreads, 0, stream, args.a, args.scales,
         args.code, static_cast<T*>(args.out), args.n, log2_of(args.block_size), aligned);
}

template <class T>
void dequantize(const Dequantize4bit& args, Stream stream) {
  args.scales.nested() ? launch_dequantize<T, true>(args, stream)
                       : launch_dequantize<T, false>(args, stream);
}

}  // namespace

void quantize_4bit(const Quantize4bit& args, Stream stream) {
  check_arguments(args);
  if (args.n == 0) return;
  by_dtype(args.dtype, [&]<class T>() { quantize<T>(args, stream); });
}

void dequantize_4bit(const Dequantize4bit& args, Stream stream) {
  check_arguments(args);
  if (args.n == 0) return;
  by_dtype(args.dtype, [&]<class T>() { dequantize<T>(args, stream); });
}

}  // namespace bnb::gpu
