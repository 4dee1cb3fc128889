// LLM.int8(): row-wise quantization.
// SPDX-License-Identifier: MIT
#include <algorithm>

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/kernels/int8.h"
#include "gpu/device/dtype.cuh"
#include "gpu/device/vector_io.cuh"
#include "gpu/int8/few_rows.h"
#include "gpu/int8/outlier_terms.cuh"
#include "gpu/int8/rows.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

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
  __shared__ uint32_t warp_most[2][kWarps];
  int turn = 0;
  if (outlier_mask == nullptr) {
    wait_for_previous_kernel();
    let_next_kernel_start();
  }  // else the kernel before has waited for those that make the rows, and clears the mask
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* const from = a + row * cols;
    const auto load = [&](int64_t col) {
      return aligned ? load_aligned<Row>(from + col) : load_words<T, kPack>(from + col, cols - col);
    };
    const auto largest = [&](const Row& words, int64_t col) {
      if (outlier_mask == nullptr) return largest_magnitude(words);
      // Every writer writes the same.
      return largest_below<T>(words, threshold, [&](int i) { outlier_mask[col + i] = 1; });
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
    if (outlier_mask != nullptr) wait_for_previous_kernel();
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (first + i * kStep < cols) most = max(most, largest(held[i], first + i * kStep));
    }
    for (int64_t col = first + kHeld * kStep; col < cols; col += kStep) {
      most = max(most, largest(load(col), col));
    }
    // What the next kernel reads ahead would be in the way of these loads, which have to wait for
    // more than the rows.
    if (outlier_mask != nullptr) let_next_kernel_start();
    most = warp_max(most);
    if (threadIdx.x % kWarp == 0) warp_most[turn][threadIdx.x / kWarp] = most;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) most = max(most, warp_most[turn][w]);
    turn ^= 1;  // the next row's maxima come to the other place
    const float stat = absmax_from_bits(most);
    if (threadIdx.x == 0) row_stats[row] = stat;
    const RowScale scale(stat);
    const auto store = [&](const Row& words, int64_t col) {
      const Words<uint8_t, kPack> codes = scale.codes(words);
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

__global__ void __launch_bounds__(kThreads)
    clear_mask_kernel(uint8_t* __restrict__ outlier_mask, int64_t cols) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t col = int64_t{blockIdx.x} * kThreads + threadIdx.x; col < cols; col += step) {
    outlier_mask[col] = 0;
  }
}

// Columns that a block of threads keeps at hand: those of a slab of terms.
constexpr int kListed = 64;

// The columns in a mask, in order, as every block of threads finds them: their number, the first of
// them in shared memory, and all of them in `list` if that is not null. Each thread looks at
// neighbouring columns; calls visit(column, place) for those that are marked.
template <class Visit>
__device__ __forceinline__ int list_columns(const MaskReader& mask, const Visit& visit) {
  __shared__ int counts[kThreads];
  __shared__ int warp_counts[kWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t share = ceil_div(mask.cols, int64_t{16 * kThreads}) * 16;
  const int64_t first = min(thread * share, mask.cols);
  const int64_t last = min(first + share, mask.cols);
  int count = 0;
  for (int64_t col = first; col < last; col += 16) count += MaskReader::count(mask.load(col));
  counts[thread] = count;
  int of_warp = count;
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) of_warp += shuffle_xor(of_warp, lanes);
  const int warp = thread / kWarp;
  if (thread % kWarp == 0) warp_counts[warp] = of_warp;
  __syncthreads();
  int before = 0;
  int total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp ? warp_counts[w] : 0;
    total += warp_counts[w];
  }
  if (count > 0) {
    for (int i = warp * kWarp; i < thread; ++i) before += counts[i];
    for (int64_t col = first; col < last; col += 16) {
      mask.each(col, [&](int64_t c) { visit(c, before++); });
    }
  }
  return total;
}

// Zeroes the codes of outlier columns, lists those columns, and packs terms of the first.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_outliers_kernel(const MaskReader mask, const Int8VectorwiseQuant args) {
  using Terms = OutlierTerms<T>;
  using Term = typename Terms::Term;
  static_assert(Terms::kColumns <= kListed);
  __shared__ int listed[kListed];
  const int thread = static_cast<int>(threadIdx.x);
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int count = list_columns(mask, [&](int64_t col, int place) {
    if (args.outliers != nullptr && blockIdx.x == 0) {
      args.outliers[1 + place] = static_cast<int32_t>(col);
    }
    if (place < kListed) {
      listed[place] = static_cast<int>(col);
    } else {
      for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
        args.out[row * args.cols + col] = 0;
      }
    }
  });
  if (args.outliers != nullptr && blockIdx.x == 0 && thread == 0) args.outliers[0] = count;
  __syncthreads();
  if (count == 0) return;
  const int columns = min(count, kListed);
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    if (thread < columns) args.out[row * args.cols + listed[thread]] = 0;
  }
  if (args.outlier_terms == nullptr) return;

  // Neighbouring threads have neighbouring terms.
  const int terms = Terms::steps(count) * Terms::kStep;
  const int rows_at_a_time = kThreads / terms;
  const int term = thread % terms;
  const int column = term / Terms::kParts;
  if (thread / terms >= rows_at_a_time) return;
  const bool there = column < min(count, Terms::kColumns);
  const int64_t from = listed[there ? column : 0];
  const int64_t step = int64_t{gridDim.x} * rows_at_a_time;
  Term* const to = static_cast<Term*>(args.outlier_terms) + term;
#pragma unroll 4
  for (int64_t row = int64_t{blockIdx.x} * rows_at_a_time + thread / terms; row < args.rows;
       row += step) {
    const T value = static_cast<const T*>(args.a)[row * args.cols + from];
    to[row * Terms::kSlab] = there ? Terms::of_value(value, term % Terms::kParts) : Term{};
  }
}

template <class T>
void vectorwise_quant(const Int8VectorwiseQuant& args, Stream stream) {
  const T* a = static_cast<const T*>(args.a);
  const bool aligned =
      args.cols % kPackSize<T> == 0 && is_aligned(a, 16) && is_aligned(args.out, kPackSize<T>);
  const int blocks = resident_grid(args.rows, 16);
  const bool outliers = args.outlier_mask != nullptr;
  if (outliers) {
    launch_early("clear_mask_kernel", clear_mask_kernel,
                 resident_grid(ceil_div(args.cols, int64_t{kThreads})), kThreads, 0, stream,
                 args.outlier_mask, args.cols);
  }
  launch_early("quantize_rows_kernel", quantize_rows_kernel<T>, blocks, kThreads, 0, stream, a,
               args.out, args.row_stats, args.outlier_mask, args.rows, args.cols, args.threshold,
               aligned);
  if (!outliers) return;
  launch_early("finish_outliers_kernel", finish_outliers_kernel<T>, resident_grid(args.rows),
               kThreads, 0, stream,
               MaskReader{args.outlier_mask, args.cols, is_aligned(args.outlier_mask, 16)}, args);
}

// Rows that a thread reads before it writes the first, all at the same columns.
constexpr int kAhead = 8;

// Blocks of threads have `across` packs of columns and kThreads / across rows at a time.
template <class T>
__global__ void __launch_bounds__(kThreads)
    dequantize_rows_kernel(const Int8VectorwiseDequant args, int across, bool aligned) {
  constexpr int kPack = kPackSize<T>;
  using Codes = Words<uint8_t, kPack>;
  const int thread = static_cast<int>(threadIdx.x);
  const int rows = kThreads / across;
  const int64_t col = (int64_t{blockIdx.x} * across + thread % across) * kPack;
  if (col >= args.cols) return;
  T* const out = static_cast<T*>(args.out);
  const int64_t step = int64_t{gridDim.y} * rows * kAhead;
  for (int64_t first = int64_t{blockIdx.y} * rows * kAhead + thread / across; first < args.rows;
       first += step) {
    Codes codes[kAhead];
    float stats[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t row = first + i * rows;
      if (row >= args.rows) continue;
      const int8_t* const from = args.a + row * args.stride + col;
      stats[i] = args.stats[row];
      if (aligned) {
        codes[i] = load_aligned<Codes>(from);
      } else {
        codes[i] = Codes{};
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          const uint32_t code = col + j < args.cols ? static_cast<uint8_t>(from[j]) : 0u;
          codes[i].words[j / 4] |= code << j % 4 * 8;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t row = first + i * rows;
      if (row >= args.rows) continue;
      Pack<T, kPack> values;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const float code = static_cast<float>(static_cast<int8_t>(codes[i].byte(j)));
        values.values[j] = narrow<T>(__fmul_rn(__fmul_rn(code, stats[i]), 1.0f / kInt8Max));
      }
      store_pack(out + row * args.cols + col, values, args.cols - col, aligned);
    }
  }
}

template <class T>
void vectorwise_dequant(const Int8VectorwiseDequant& args, Stream stream) {
  constexpr int kPack = kPackSize<T>;
  constexpr int64_t kMostBlocks = 65535;  // of a grid's second dimension
  const int64_t packs = ceil_div(args.cols, int64_t{kPack});
  int across = kThreads;
  while (across > 1 && across / 2 >= packs) across /= 2;
  const int64_t down = ceil_div(args.rows, int64_t{kThreads / across} * kAhead);
  const bool aligned = args.cols % kPack == 0 && args.stride % kPack == 0 &&
                       is_aligned(args.a, kPack) && is_aligned(args.out, 16);
  launch("dequantize_rows_kernel", dequantize_rows_kernel<T>,
         dim3(static_cast<unsigned>(ceil_div(packs, int64_t{across})),
              static_cast<unsigned>(std::min(down, kMostBlocks))),
         kThreads, 0, stream, args, across, aligned);
}

}  // namespace

void int8_vectorwise_dequant(const Int8VectorwiseDequant& args, Stream stream) {
  by_dtype(args.dtype, [&]<class T>() { vectorwise_dequant<T>(args, stream); });
}

void int8_vectorwise_quant(const Int8VectorwiseQuant& args, Stream stream) {
  if (cluster_quantizes(args)) return quantize_few_rows(args, stream);
  by_dtype(args.dtype, [&]<class T>() { vectorwise_quant<T>(args, stream); });
}

}  // namespace bnb::gpu
