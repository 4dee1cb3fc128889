// LLM.int8(): row-wise quantization.
// SPDX-License-Identifier: MIT
#include <algorithm>

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/kernels/int8.h"
#include "gpu/device/dtype.cuh"
#include "gpu/device/vector_io.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Marks the columns of a pack that hold outliers; returns the bits of the largest other magnitude.
template <class T>
__device__ __forceinline__ uint32_t mark_outliers(const Words<T, kPackSize<T>>& words, int64_t col,
                                                  float threshold, uint8_t* outlier_mask) {
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < kPackSize<T>; ++i) {
    const uint32_t m = magnitude_bits(words.get(i));
    if (bits_float(m) >= threshold) {
      outlier_mask[col + i] = 1;  // every writer writes the same
    } else {
      most = max(most, m);
    }
  }
  return most;
}

// The code of x, which is no more than a row's statistic, in the lowest byte. Adding a number whose
// last place is 1 rounds to even, and leaves an integer in two's complement.
__device__ __forceinline__ uint32_t row_code(float x, float inverse) {
  constexpr float kRound = 0x1.8p23f;
  return float_bits(__fadd_rn(__fmul_rn(x, inverse), kRound));
}

// A block of threads per row: the largest magnitude that is no outlier, and then the codes. Up to
// kHeld packs of a thread stay in registers between the two; longer rows are read again. Columns
// that hold outliers are marked; their codes are not zero yet, because other rows may mark them
// later.
template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize_rows_kernel(const T* __restrict__ a,             // [rows, cols]
                         int8_t* __restrict__ out,            // [rows, cols]
                         float* __restrict__ row_stats,       // [rows]
                         uint8_t* __restrict__ outlier_mask,  // [cols] or null
                         int64_t rows, int64_t cols, float threshold, bool aligned) {
  constexpr int kPack = kPackSize<T>;
  constexpr int kHeld = 4;
  using Row = Words<T, kPack>;
  using Codes = Words<uint8_t, kPack>;
  __shared__ uint32_t warp_most[2][kWarps];
  int turn = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* const from = a + row * cols;
    const auto load = [&](int64_t col) {
      return aligned ? load_aligned<Row>(from + col) : load_words<T, kPack>(from + col, cols - col);
    };
    const auto largest = [&](const Row& words, int64_t col) {
      const uint32_t m = largest_magnitude(words);
      // Also where a NaN may hide an outlier.
      if (outlier_mask != nullptr && !(bits_float(m) < threshold)) {
        return mark_outliers<T>(words, col, threshold, outlier_mask);
      }
      return m;
    };
    // The packs of a thread are kThreads packs apart.
    const int64_t first = int64_t{threadIdx.x} * kPack;
    constexpr int64_t kStep = int64_t{kThreads} * kPack;
    Row held[kHeld];
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (first + i * kStep < cols) held[i] = load(first + i * kStep);
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (first + i * kStep < cols) most = max(most, largest(held[i], first + i * kStep));
    }
    for (int64_t col = first + kHeld * kStep; col < cols; col += kStep) {
      most = max(most, largest(load(col), col));
    }
    most = warp_max(most);
    if (threadIdx.x % kWarp == 0) warp_most[turn][threadIdx.x / kWarp] = most;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) most = max(most, warp_most[turn][w]);
    turn ^= 1;  // the next row's maxima come to the other place
    const float stat = absmax_from_bits(most);
    if (threadIdx.x == 0) row_stats[row] = stat;
    const float inverse = __fdiv_rn(kInt8Max, stat);
    // A row of zeros, or one whose statistic says that it is not finite, has codes of zero.
    const bool regular = stat > 0.0f && inverse > 0.0f && inverse <= kFloatMax;
    const auto store = [&](const Row& words, int64_t col) {
      Codes codes;
#pragma unroll
      for (int w = 0; w < Codes::kWords; ++w) {
        const uint32_t low = byte_permute(row_code(words.get(4 * w), inverse),
                                          row_code(words.get(4 * w + 1), inverse), 0x0040);
        const uint32_t high = byte_permute(row_code(words.get(4 * w + 2), inverse),
                                           row_code(words.get(4 * w + 3), inverse), 0x0040);
        codes.words[w] = regular ? byte_permute(low, high, 0x5410) : 0;
      }
      int8_t* const to = out + row * cols + col;
      if (aligned) return store_aligned(to, codes);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        if (col + i < cols) to[i] = static_cast<int8_t>(codes.byte(i));
      }
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (first + i * kStep < cols) store(held[i], first + i * kStep);
    }
    for (int64_t col = first + kHeld * kStep; col < cols; col += kStep) store(load(col), col);
  }
}

// The marks of columns, of which each thread has some neighbouring ones, 16 at a time.
struct MaskReader {
  const uint8_t* mask;
  int64_t cols;
  bool aligned;

  __device__ __forceinline__ Words<uint8_t, 16> load(int64_t col) const {
    if (aligned && col + 16 <= cols) return load_aligned<Words<uint8_t, 16>>(mask + col);
    Words<uint8_t, 16> words{};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (col + i < cols) words.words[i / 4] |= static_cast<uint32_t>(mask[col + i]) << (i % 4 * 8);
    }
    return words;
  }
  __device__ __forceinline__ static int count(const Words<uint8_t, 16>& words) {
    int marks = 0;
#pragma unroll
    for (const uint32_t word : words.words) marks += bits_set(word);
    return marks;
  }
  // Calls visit(column) for every mark of 16, in order.
  template <class Visit>
  __device__ __forceinline__ void each(int64_t col, const Visit& visit) const {
    const Words<uint8_t, 16> words = load(col);
    if (count(words) == 0) return;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (words.byte(i) != 0) visit(col + i);
    }
  }
};

// Writes the number of the columns in a mask and then the columns, in order. One block of threads,
// each with neighbouring columns of its own.
__device__ __forceinline__ void list_columns(const MaskReader& mask, int32_t* list) {
  __shared__ int32_t counts[kThreads];
  __shared__ int32_t warp_counts[kWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t share = ceil_div(mask.cols, int64_t{16 * kThreads}) * 16;
  const int64_t first = min(thread * share, mask.cols);
  const int64_t last = min(first + share, mask.cols);
  int32_t count = 0;
  for (int64_t col = first; col < last; col += 16) count += MaskReader::count(mask.load(col));
  counts[thread] = count;
  __syncthreads();
  const int warp = thread / kWarp;
  int32_t place = 1;
  for (int i = warp * kWarp; i < thread; ++i) place += counts[i];
  if (thread % kWarp == kWarp - 1) warp_counts[warp] = place - 1 + count;
  __syncthreads();
  for (int w = 0; w < warp; ++w) place += warp_counts[w];
  if (thread == kThreads - 1) list[0] = place - 1 + count;
  for (int64_t col = first; col < last; col += 16) {
    mask.each(col, [&](int64_t c) { list[place++] = static_cast<int32_t>(c); });
  }
}

// Zeroes the codes of outlier columns, and lists those columns.
__global__ void __launch_bounds__(kThreads)
    clear_outliers_kernel(const MaskReader mask,           // [cols]
                          int8_t* __restrict__ out,        // [rows, cols]
                          int32_t* __restrict__ outliers,  // [1 + cols] or null
                          int64_t rows) {
  const int64_t step = int64_t{16} * kThreads;
  for (int64_t col = int64_t{threadIdx.x} * 16; col < mask.cols; col += step) {
    mask.each(col, [&](int64_t c) {
      for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) out[row * mask.cols + c] = 0;
    });
  }
  if (outliers != nullptr && blockIdx.x == 0) list_columns(mask, outliers);
}

template <class T>
void vectorwise_quant(const Int8VectorwiseQuant& args, Stream stream) {
  const T* a = static_cast<const T*>(args.a);
  const int blocks =
      static_cast<int>(std::min<int64_t>(args.rows, int64_t{multiprocessors()} * 16));
  const bool aligned =
      args.cols % kPackSize<T> == 0 && is_aligned(a, 16) && is_aligned(args.out, kPackSize<T>);
  if (args.outlier_mask != nullptr) {
    BNB_GPU_CHECK(cudaMemsetAsync(args.outlier_mask, 0, static_cast<size_t>(args.cols),
                                  static_cast<cudaStream_t>(stream.handle)));
  }
  launch("quantize_rows_kernel", quantize_rows_kernel<T>, blocks, kThreads, 0, stream, a, args.out,
         args.row_stats, args.outlier_mask, args.rows, args.cols, args.threshold, aligned);
  if (args.outlier_mask == nullptr) return;
  launch("clear_outliers_kernel", clear_outliers_kernel, blocks, kThreads, 0, stream,
         MaskReader{args.outlier_mask, args.cols, is_aligned(args.outlier_mask, 16)}, args.out,
         args.outliers, args.rows);
}

}  // namespace

void int8_vectorwise_quant(const Int8VectorwiseQuant& args, Stream stream) {
  by_dtype(args.dtype, [&]<class T>() { vectorwise_quant<T>(args, stream); });
}

}  // namespace bnb::gpu
