// 8-bit blockwise quantization and its inverse, for any table of 256 levels.
// SPDX-License-Identifier: MIT
#include "bitsandbytes/blocks.h"
#include "bitsandbytes/kernels/quantize.h"
#include "gpu/device/code8.cuh"
#include "gpu/device/scales.cuh"
#include "gpu/device/tile.cuh"
#include "gpu/device/vector_io.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {
namespace {

template <class T>
__global__ void __launch_bounds__(kTileThreads)
    quantize_blockwise_kernel(const T* __restrict__ a,         // [n]
                              const float* __restrict__ code,  // [256]
                              uint8_t* __restrict__ out,       // [n]
                              float* __restrict__ absmax,      // [ceil(n / block_size)]
                              int64_t n, int log2_block, bool aligned) {
  using Elements = Tile<T>;
  constexpr int kPack = Elements::kPack;

  __shared__ Code8<false> levels;
  __shared__ EncodeTables<false> tables;
  __shared__ typename Elements::Exchange exchange;
  levels.fill(code, tables);
  __syncthreads();

  const int block_size = 1 << log2_block;
  int buffer = 0;
  for (int64_t tile = blockIdx.x; tile * kTileElements < n; tile += gridDim.x) {
    Elements elements;
    elements.load(a, n, tile, aligned);
    elements.reduce(block_size, exchange, buffer);
#pragma unroll
    for (int v = 0; v < Elements::kSlices; ++v) {
      const int64_t i = Elements::base_of(tile) + v * Elements::kSlice;
      if (i >= n) break;
      const float scale = absmax_from_bits(elements.most[v]);
      if ((i & (block_size - 1)) == 0) absmax[i >> log2_block] = scale;
      Words<uint8_t, kPack> codes;
      levels.encode(tables, elements.x[v], scale, codes.words);
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
  launch("quantize_blockwise_kernel", quantize_blockwise_kernel<T>,
         resident_grid(ceil_div(args.n, kTileElements)), kTileThreads, 0, stream,
         static_cast<const T*>(args.a), args.code, args.out, args.absmax, args.n,
         log2_of(args.block_size), aligned);
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
  switch (args.dtype) {
    case DType::kFloat16:
      return quantize<Half>(args, stream);
    case DType::kBFloat16:
      return quantize<BFloat16>(args, stream);
    default:
      return quantize<float>(args, stream);
  }
}

void dequantize_blockwise(const DequantizeBlockwise& args, Stream stream) {
  switch (args.dtype) {
    case DType::kFloat16:
      return dequantize<Half>(args, stream);
    case DType::kBFloat16:
      return dequantize<BFloat16>(args, stream);
    default:
      return dequantize<float>(args, stream);
  }
}

}  // namespace bnb::gpu
