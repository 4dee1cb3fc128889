// LLM.int8(): row-wise quantization.
// SPDX-License-Identifier: MIT
#include <algorithm>

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/kernels/int8.h"
#include "gpu/device/vector_io.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// A block of threads per row, which it reads twice, the second time from cache: for the largest
// magnitude that is no outlier, and for the codes. Columns that hold outliers are marked; their
// codes are not zero yet, because other rows may mark them later.
template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize_rows_kernel(const T* __restrict__ a,             // [rows, cols]
                         int8_t* __restrict__ out,            // [rows, cols]
                         float* __restrict__ row_stats,       // [rows]
                         uint8_t* __restrict__ outlier_mask,  // [cols] or null
                         int64_t rows, int64_t cols, float threshold, bool aligned) {
  constexpr int kPack = kPackSize<T>;
  constexpr int64_t kStep = int64_t{kThreads} * kPack;
  __shared__ uint32_t warp_most[kWarps];
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* const from = a + row * cols;
    uint32_t most = 0;
    for (int64_t col = int64_t{threadIdx.x} * kPack; col < cols; col += kStep) {
      const Pack<T, kPack> pack = load_pack<T, kPack>(from + col, cols - col, aligned);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const uint32_t m = magnitude_bits(widen(pack.values[i]));
        if (outlier_mask != nullptr && bits_float(m) >= threshold) {
          outlier_mask[col + i] = 1;  // every writer writes the same
        } else {
          most = max(most, m);
        }
      }
    }
    most = warp_max(most);
    if (threadIdx.x % kWarp == 0) warp_most[threadIdx.x / kWarp] = most;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) most = max(most, warp_most[w]);
    __syncthreads();  // the next row's maxima come to the same place
    const float stat = absmax_from_bits(most);
    if (threadIdx.x == 0) row_stats[row] = stat;
    const float inverse = __fdiv_rn(kInt8Max, stat);
    // A row of zeros, or one whose statistic says that it is not finite, has codes of zero.
    const bool regular = stat > 0.0f && inverse > 0.0f && inverse <= kFloatMax;
    for (int64_t col = int64_t{threadIdx.x} * kPack; col < cols; col += kStep) {
      const Pack<T, kPack> pack = load_pack<T, kPack>(from + col, cols - col, aligned);
      Pack<int8_t, kPack> codes;
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const float scaled = __fmul_rn(widen(pack.values[i]), inverse);
        const float bounded = fminf(fmaxf(scaled, -kInt8Max), kInt8Max);
        codes.values[i] = regular ? static_cast<int8_t>(__float2int_rn(bounded)) : int8_t{0};
      }
      store_pack(out + row * cols + col, codes, cols - col, aligned);
    }
  }
}

// Writes the number of the columns in a mask and then the columns, in order. One block of threads,
// each with neighbouring columns of its own.
__device__ __forceinline__ void list_columns(const uint8_t* mask, int64_t cols, int32_t* list) {
  __shared__ int32_t counts[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t share = ceil_div(cols, int64_t{kThreads});
  const int64_t first = min(thread * share, cols);
  const int64_t last = min(first + share, cols);
  int32_t count = 0;
  for (int64_t col = first; col < last; ++col) count += mask[col];
  counts[thread] = count;
  __syncthreads();
  int32_t place = 1;
  for (int i = 0; i < thread; ++i) place += counts[i];
  if (thread == kThreads - 1) list[0] = place - 1 + count;
  for (int64_t col = first; col < last; ++col) {
    if (mask[col] != 0) list[place++] = static_cast<int32_t>(col);
  }
}

// Zeroes the codes of outlier columns, and lists those columns.
__global__ void __launch_bounds__(kThreads)
    clear_outliers_kernel(const uint8_t* __restrict__ outlier_mask,  // [cols]
                          int8_t* __restrict__ out,                  // [rows, cols]
                          int32_t* __restrict__ outliers,            // [1 + cols] or null
                          int64_t rows, int64_t cols) {
  for (int64_t col = threadIdx.x; col < cols; col += kThreads) {
    if (outlier_mask[col] == 0) continue;
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) out[row * cols + col] = 0;
  }
  if (outliers != nullptr && blockIdx.x == 0) list_columns(outlier_mask, cols, outliers);
}

template <class T>
void vectorwise_quant(const Int8VectorwiseQuant& args, Stream stream) {
  const T* a = static_cast<const T*>(args.a);
  const int blocks =
      static_cast<int>(std::min<int64_t>(args.rows, int64_t{multiprocessors()} * 16));
  const bool aligned =
      args.cols % kPackSize<T> == 0 && is_aligned(a, 16) && is_aligned(args.out, kPackSize<T>);
  launch("quantize_rows_kernel", quantize_rows_kernel<T>, blocks, kThreads, 0, stream, a, args.out,
         args.row_stats, args.outlier_mask, args.rows, args.cols, args.threshold, aligned);
  if (args.outlier_mask == nullptr) return;
  launch("clear_outliers_kernel", clear_outliers_kernel, blocks, kThreads, 0, stream,
         args.outlier_mask, args.out, args.outliers, args.rows, args.cols);
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

}  // namespace bnb::gpu
