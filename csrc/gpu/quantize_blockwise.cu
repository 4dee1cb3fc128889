// 8-bit blockwise quantization and its inverse, for any table of 256 levels.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <bit>

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/kernels/quantize.h"
#include "gpu/device/code8.cuh"
#include "gpu/device/vector_io.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTile = 4096;  // elements per turn of a block of threads: the largest block size
// Blocks of threads per multiprocessor in flight; enough to cover memory latency.
constexpr int kResident = 8;

// A tile is kSlices slices; in a slice each thread holds one 16-byte pack, threads in order:
//
//     slice 0: [thread 0 pack][thread 1 pack] ... [thread 255 pack]
//     slice 1: ...
//
// A quantization block is then a run of lanes, of warps, or of whole slices, and its maximum is
// reduced by shuffles, through shared memory, or over both.
template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize_blockwise_kernel(const T* __restrict__ a,         // [n]
                              const float* __restrict__ code,  // [256]
                              uint8_t* __restrict__ out,       // [n]
                              float* __restrict__ absmax,      // [ceil(n / block_size)]
                              int64_t n, int log2_block, bool aligned) {
  constexpr int kPack = kPackSize<T>;
  constexpr int kSlice = kThreads * kPack;
  constexpr int kSlices = kTile / kSlice;
  using Layout = UnsignedDynamic8::Layout;

  __shared__ Code8Storage<Layout> levels;
  __shared__ uint32_t warp_most[2][kSlices][kWarps];
  Code8<Layout>::fill(levels, code);
  __syncthreads();

  const int block_size = 1 << log2_block;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  int buffer = 0;
  for (int64_t tile = blockIdx.x; tile * kTile < n; tile += gridDim.x) {
    const int64_t base = tile * kTile + static_cast<int64_t>(threadIdx.x) * kPack;
    Pack<T, kPack> packs[kSlices];
#pragma unroll
    for (int v = 0; v < kSlices; ++v) {
      const int64_t i = base + v * kSlice;
      packs[v] = load_pack<T, kPack>(a + i, n - i, aligned);
    }
    float x[kSlices][kPack];
    uint32_t most[kSlices];
#pragma unroll
    for (int v = 0; v < kSlices; ++v) {
      most[v] = 0;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        x[v][j] = widen(packs[v].values[j]);
        most[v] = max(most[v], magnitude_bits(x[v][j]));
      }
    }

    if (block_size < kWarp * kPack) {
#pragma unroll
      for (int v = 0; v < kSlices; ++v) {
        for (int lanes = block_size / kPack / 2; lanes > 0; lanes /= 2) {
          most[v] = max(most[v], shuffle_xor(most[v], lanes));
        }
      }
    } else {
#pragma unroll
      for (int v = 0; v < kSlices; ++v) most[v] = warp_max(most[v]);
      if (block_size > kWarp * kPack) {
        // Two buffers: the next tile may be written while slower warps still read this one.
        if (threadIdx.x % kWarp == 0) {
#pragma unroll
          for (int v = 0; v < kSlices; ++v) warp_most[buffer][v][warp] = most[v];
        }
        __syncthreads();
        const int warps = min(block_size / (kWarp * kPack), kWarps);
        const int slices = max(block_size / kSlice, 1);
        const int first_warp = warp & ~(warps - 1);
#pragma unroll
        for (int v = 0; v < kSlices; ++v) {
          const int first_slice = v & ~(slices - 1);
          for (int s = first_slice; s < first_slice + slices; ++s) {
            for (int w = first_warp; w < first_warp + warps; ++w) {
              most[v] = max(most[v], warp_most[buffer][s][w]);
            }
          }
        }
        buffer ^= 1;
      }
    }

#pragma unroll
    for (int v = 0; v < kSlices; ++v) {
      const int64_t i = base + v * kSlice;
      if (i >= n) break;
      const float scale = absmax_from_bits(most[v]);
      if ((i & (block_size - 1)) == 0) absmax[i >> log2_block] = scale;
      Pack<uint8_t, kPack> codes;
      Code8<Layout>::encode<false>(levels, x[v], scale, codes.values);
      store_pack<uint8_t, kPack>(out + i, codes, n - i, aligned);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    dequantize_blockwise_kernel(const uint8_t* __restrict__ a,     // [n]
                                const float* __restrict__ absmax,  // [ceil(n / block_size)]
                                const float* __restrict__ code,    // [256]
                                T* __restrict__ out,               // [n]
                                int64_t n, int64_t block_size,
                                int log2_block,  // or -1 when block_size is no power of two
                                bool aligned) {
  constexpr int kPack = kPackSize<T>;
  constexpr int kUnroll = 4;
  constexpr int64_t kSlice = kThreads * kPack;
  __shared__ float levels[kCodeLevels];
  for (int i = threadIdx.x; i < kCodeLevels; i += kThreads) levels[i] = code[i];
  __syncthreads();

  const int64_t turn = kSlice * kUnroll;
  for (int64_t tile = blockIdx.x; tile * turn < n; tile += gridDim.x) {
    const int64_t base = tile * turn + static_cast<int64_t>(threadIdx.x) * kPack;
    Pack<uint8_t, kPack> codes[kUnroll];
    float scale[kUnroll];
#pragma unroll
    for (int v = 0; v < kUnroll; ++v) {
      const int64_t i = base + v * kSlice;
      codes[v] = load_pack<uint8_t, kPack>(a + i, n - i, aligned);
      if (i < n) scale[v] = absmax[log2_block >= 0 ? i >> log2_block : i / block_size];
    }
#pragma unroll
    for (int v = 0; v < kUnroll; ++v) {
      const int64_t i = base + v * kSlice;
      if (i >= n) break;
      Pack<T, kPack> numbers;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        // A pack may reach over the end of its block unless blocks are multiples of packs.
        if (log2_block < 0 || block_size < kPack) {
          if (i + j < n) scale[v] = absmax[(i + j) / block_size];
        }
        numbers.values[j] = narrow<T>(__fmul_rn(levels[codes[v].values[j]], scale[v]));
      }
      store_pack<T, kPack>(out + i, numbers, n - i, aligned);
    }
  }
}

int grid(int64_t tiles) {
  return static_cast<int>(std::min<int64_t>(tiles, int64_t{multiprocessors()} * kResident));
}

int log2_of(int64_t block_size) {
  return std::has_single_bit(static_cast<uint64_t>(block_size))
             ? std::countr_zero(static_cast<uint64_t>(block_size))
             : -1;
}

template <class T>
void quantize(const QuantizeBlockwise& args, Stream stream) {
  const bool aligned = is_aligned(args.a, 16) && is_aligned(args.out, kPackSize<T>);
  quantize_blockwise_kernel<T>
      <<<grid(ceil_div(args.n, kTile)), kThreads, 0, static_cast<cudaStream_t>(stream.handle)>>>(
          static_cast<const T*>(args.a), args.code, args.out, args.absmax, args.n,
          log2_of(args.block_size), aligned);
  BNB_LAUNCH_CHECK("quantize_blockwise_kernel");
}

template <class T>
void dequantize(const DequantizeBlockwise& args, Stream stream) {
  const bool aligned = is_aligned(args.a, kPackSize<T>) && is_aligned(args.out, 16);
  constexpr int64_t kTurn = kThreads * kPackSize<T> * 4;
  dequantize_blockwise_kernel<T>
      <<<grid(ceil_div(args.n, kTurn)), kThreads, 0, static_cast<cudaStream_t>(stream.handle)>>>(
          args.a, args.absmax, args.code, static_cast<T*>(args.out), args.n, args.block_size,
          log2_of(args.block_size), aligned);
  BNB_LAUNCH_CHECK("dequantize_blockwise_kernel");
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
