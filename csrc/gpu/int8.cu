// LLM.int8(): row-wise quantization, the exact integer product, and its dequantization.
// SPDX-License-Identifier: MIT
#include <algorithm>

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/kernels/int8.h"
#include "gpu/device/code8.cuh"
#include "gpu/device/vector_io.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// A block of threads per row: the largest magnitude that is no outlier, and the columns that hold
// outliers.
template <class T>
__global__ void __launch_bounds__(kThreads)
    row_stats_kernel(const T* __restrict__ a,             // [rows, cols]
                     float* __restrict__ row_stats,       // [rows]
                     uint8_t* __restrict__ outlier_mask,  // [cols] or null
                     int64_t rows, int64_t cols, float threshold) {
  __shared__ uint32_t warp_most[kWarps];
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    uint32_t most = 0;
    for (int64_t col = threadIdx.x; col < cols; col += kThreads) {
      const uint32_t m = magnitude_bits(widen(a[row * cols + col]));
      if (outlier_mask != nullptr && bits_float(m) >= threshold) {
        outlier_mask[col] = 1;  // every writer writes the same
      } else {
        most = max(most, m);
      }
    }
    most = warp_max(most);
    if (threadIdx.x % kWarp == 0) warp_most[threadIdx.x / kWarp] = most;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < kWarps; ++w) most = max(most, warp_most[w]);
      row_stats[row] = absmax_from_bits(most);
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize_rows_kernel(const T* __restrict__ a,                   // [rows, cols]
                         const float* __restrict__ row_stats,       // [rows]
                         const uint8_t* __restrict__ outlier_mask,  // [cols] or null
                         int8_t* __restrict__ out,                  // [rows, cols]
                         int64_t rows, int64_t cols) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const float stat = row_stats[row];
    const float inverse = __fdiv_rn(kInt8Max, stat);
    // A row of zeros, or one whose statistic says that it is not finite, has codes of zero.
    const bool regular = stat > 0.0f && inverse > 0.0f && inverse <= kFloatMax;
    for (int64_t col = threadIdx.x; col < cols; col += kThreads) {
      const bool zero = !regular || (outlier_mask != nullptr && outlier_mask[col] != 0);
      const float scaled = __fmul_rn(widen(a[row * cols + col]), inverse);
      const float bounded = fminf(fmaxf(scaled, -kInt8Max), kInt8Max);
      out[row * cols + col] = zero ? int8_t{0} : static_cast<int8_t>(__float2int_rn(bounded));
    }
  }
}

constexpr int kTileM = 64;
constexpr int kTileN = 64;
constexpr int kTileK = 32;  // bytes, eight 32-bit words
constexpr int kWords = kTileK / 4;

// out = a b^T by tiles of 64 x 64, each thread 4 x 4 of them, four products an instruction. Serves
// the shapes that the vendor's library refuses, and devices without one.
__global__ void __launch_bounds__(kThreads)
    int8_matmul_kernel(const int8_t* __restrict__ a,  // [m, k]
                       const int8_t* __restrict__ b,  // [n, k]
                       int32_t* __restrict__ out,     // [m, n]
                       int64_t m, int64_t n, int64_t k) {
  // One word of padding per row spreads the rows over the memory banks.
  __shared__ int tile_a[kTileM][kWords + 1];
  __shared__ int tile_b[kTileN][kWords + 1];
  const int64_t first_row = int64_t{blockIdx.y} * kTileM;
  const int64_t first_col = int64_t{blockIdx.x} * kTileN;
  const int ty = static_cast<int>(threadIdx.x) / 16;
  const int tx = static_cast<int>(threadIdx.x) % 16;
  int acc[4][4] = {};
  for (int64_t k0 = 0; k0 < k; k0 += kTileK) {
    for (int word = threadIdx.x; word < kTileM * kWords; word += kThreads) {
      const int row = word / kWords;
      const int64_t from = k0 + (word % kWords) * 4;
      int packed_a = 0;
      int packed_b = 0;
      for (int byte = 0; byte < 4; ++byte) {
        if (from + byte >= k) break;
        if (first_row + row < m) {
          packed_a |= static_cast<uint8_t>(a[(first_row + row) * k + from + byte]) << (8 * byte);
        }
        if (first_col + row < n) {
          packed_b |= static_cast<uint8_t>(b[(first_col + row) * k + from + byte]) << (8 * byte);
        }
      }
      tile_a[row][word % kWords] = packed_a;
      tile_b[row][word % kWords] = packed_b;
    }
    __syncthreads();
    for (int w = 0; w < kWords; ++w) {
      int x[4];
      int y[4];
      for (int i = 0; i < 4; ++i) x[i] = tile_a[ty + 16 * i][w];
      for (int j = 0; j < 4; ++j) y[j] = tile_b[tx + 16 * j][w];
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) acc[i][j] = dot4(x[i], y[j], acc[i][j]);
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i) {
    const int64_t row = first_row + ty + 16 * i;
    for (int j = 0; j < 4; ++j) {
      const int64_t col = first_col + tx + 16 * j;
      if (row < m && col < n) out[row * n + col] = acc[i][j];
    }
  }
}

__device__ __forceinline__ float read_as_float(DType dtype, const void* p, int64_t i) {
  switch (dtype) {
    case DType::kFloat16:
      return widen(static_cast<const Half*>(p)[i]);
    case DType::kBFloat16:
      return widen(static_cast<const BFloat16*>(p)[i]);
    default:
      return static_cast<const float*>(p)[i];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) int8_mm_dequant_kernel(const Int8MmDequant args) {
  T* const out = static_cast<T*>(args.out);
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const float row_scale = __fmul_rn(args.row_stats[row], kInt8Product);
    for (int64_t col = threadIdx.x; col < args.cols; col += kThreads) {
      const float scale = __fmul_rn(args.col_stats[col], row_scale);
      const float bias =
          args.bias != nullptr ? read_as_float(args.bias_dtype, args.bias, col) : 0.0f;
      const float product = __int2float_rn(args.a[row * args.cols + col]);
      out[row * args.cols + col] = narrow<T>(__fmaf_rn(product, scale, bias));
    }
  }
}

int row_grid(int64_t rows) {
  return static_cast<int>(std::min<int64_t>(rows, int64_t{multiprocessors()} * 16));
}

template <class T>
void vectorwise_quant(const Int8VectorwiseQuant& args, Stream stream) {
  const T* a = static_cast<const T*>(args.a);
  const int blocks = row_grid(args.rows);
  launch("row_stats_kernel", row_stats_kernel<T>, blocks, kThreads, 0, stream, a, args.row_stats,
         args.outlier_mask, args.rows, args.cols, args.threshold);
  launch("quantize_rows_kernel", quantize_rows_kernel<T>, blocks, kThreads, 0, stream, a,
         args.row_stats, args.outlier_mask, args.out, args.rows, args.cols);
}

template <class T>
void mm_dequant(const Int8MmDequant& args, Stream stream) {
  launch("int8_mm_dequant_kernel", int8_mm_dequant_kernel<T>, row_grid(args.rows), kThreads, 0,
         stream, args);
}

}  // namespace

void int8_vectorwise_quant(const Int8VectorwiseQuant& args, Stream stream) {
  switch (args.dtype) {
    case DType::kFloat16:
      return vectorwise_quant<Half>(args, stream);
    case DType::kBFloat16:
      return vectorwise_quant<BFloat16>(args, stream);
    default:
      return vectorwise_quant<float>(args, stream);
  }
}

void int8_linear_matmul(const Int8Matmul& args, Stream stream) {
  // The grid's second dimension ends at 65535.
  constexpr int64_t kMostRows = int64_t{65535} * kTileM;
  for (int64_t row = 0; row < args.m; row += kMostRows) {
    const int64_t rows = std::min(args.m - row, kMostRows);
    const dim3 grid(static_cast<unsigned>(ceil_div(args.n, kTileN)),
                    static_cast<unsigned>(ceil_div(rows, kTileM)));
    launch("int8_matmul_kernel", int8_matmul_kernel, grid, kThreads, 0, stream,
           args.a + row * args.k, args.b, args.out + row * args.n, rows, args.n, args.k);
  }
}

void int8_mm_dequant(const Int8MmDequant& args, Stream stream) {
  switch (args.dtype) {
    case DType::kFloat16:
      return mm_dequant<Half>(args, stream);
    case DType::kBFloat16:
      return mm_dequant<BFloat16>(args, stream);
    default:
      return mm_dequant<float>(args, stream);
  }
}

}  // namespace bnb::gpu
