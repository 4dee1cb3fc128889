// LLM.int8(): the exact integer product, the layer, and values of products.
// SPDX-License-Identifier: MIT
#include <algorithm>

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/kernels/int8.h"
#include "gpu/device/dtype.cuh"
#include "gpu/device/vector_io.cuh"
#include "gpu/int8/wgmma.h"
#include "gpu/runtime/check.h"

namespace bnb::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kTileM = 64;
constexpr int kTileN = 64;
constexpr int kTileK = 32;  // bytes, eight 32-bit words
constexpr int kWords = kTileK / 4;
// Every thread has the sums of rows ty + 16 i and columns tx + 16 j of a tile.
constexpr int kThreadTile = 4;
constexpr int kStride = 16;
using Sums = int[kThreadTile][kThreadTile];
using ThreadTile = float[kThreadTile][kThreadTile];

__device__ __forceinline__ int thread_row() { return static_cast<int>(threadIdx.x) / kStride; }
__device__ __forceinline__ int thread_col() { return static_cast<int>(threadIdx.x) % kStride; }

// Bytes `from` to `from` + 3 of a row of k, as a word; zeros behind its end.
__device__ __forceinline__ int load_word(const int8_t* row, int64_t from, int64_t k, bool aligned) {
  if (aligned && from < k) return *reinterpret_cast<const int*>(row + from);
  int word = 0;
  for (int byte = 0; byte < 4; ++byte) {
    if (from + byte < k) word |= static_cast<uint8_t>(row[from + byte]) << (8 * byte);
  }
  return word;
}

// What becomes of sums: they are the result.
struct StoreSums {
  int32_t* out;  // [m, n]
  int64_t m;
  int64_t n;

  __device__ __forceinline__ bool has_outliers() const { return false; }
  __device__ __forceinline__ void add_outliers(int64_t, int64_t, ThreadTile&) const {}
  template <int kRows, int kCols>
  __device__ __forceinline__ void add_outliers_by_lanes(int64_t, int64_t,
                                                        float (&)[kRows * kCols]) const {}
  __device__ __forceinline__ void store(int64_t row, int64_t col, int sum, float) const {
    out[row * n + col] = sum;
  }
};

// What becomes of sums in the layer.
template <class T>
struct ScaleSums {
  Int8ScaledMatmul args;
  int64_t m;
  int64_t n;
  __host__ explicit ScaleSums(const Int8ScaledMatmul& a) : args(a), m(a.m), n(a.n) {}

  __device__ __forceinline__ bool has_outliers() const { return args.outliers != nullptr; }

  __device__ __forceinline__ float value(int64_t row, int64_t column) const {
    return widen(static_cast<const T*>(args.values)[row * args.k + column]);
  }
  __device__ __forceinline__ float weight(int64_t col, int64_t column) const {
    return static_cast<float>(args.b[col * args.k + column]);
  }

  // Adds the products of outlier columns, without the scale of the weight. All threads of the block
  // take part; a batch of columns lies in shared memory.
  __device__ __forceinline__ void add_outliers(int64_t first_row, int64_t first_col,
                                               ThreadTile& added) const {
    constexpr int kBatch = 32;
    __shared__ float values[kTileM][kBatch + 1];
    __shared__ float weights[kTileN][kBatch + 1];
    static_assert(kTileM == kTileN);
    const int count = args.outliers[0];
    for (int first = 0; first < count; first += kBatch) {
      for (int i = threadIdx.x; i < kTileM * kBatch; i += kThreads) {
        const int place = i % kBatch;
        const bool there = first + place < count;
        const int64_t column = there ? args.outliers[1 + first + place] : 0;
        const int64_t row = first_row + i / kBatch;
        const int64_t col = first_col + i / kBatch;
        values[i / kBatch][place] = there && row < m ? value(row, column) : 0.0f;
        weights[i / kBatch][place] = there && col < n ? weight(col, column) : 0.0f;
      }
      __syncthreads();
      for (int place = 0; place < min(kBatch, count - first); ++place) {
#pragma unroll
        for (int i = 0; i < kThreadTile; ++i) {
#pragma unroll
          for (int j = 0; j < kThreadTile; ++j) {
            added[i][j] = __fmaf_rn(values[thread_row() + kStride * i][place],
                                    weights[thread_col() + kStride * j][place], added[i][j]);
          }
        }
      }
      __syncthreads();
    }
  }

  // The same for a warp's rows and columns, of which each lane adds every kWarp-th outlier column.
  template <int kRows, int kCols>
  __device__ __forceinline__ void add_outliers_by_lanes(int64_t first_row, int64_t first_col,
                                                        float (&added)[kRows * kCols]) const {
    const int count = args.outliers[0];
    for (int i = static_cast<int>(threadIdx.x) % kWarp; i < count; i += kWarp) {
      const int64_t column = args.outliers[1 + i];
      float weights[kCols];
#pragma unroll
      for (int c = 0; c < kCols; ++c) weights[c] = weight(min(first_col + c, n - 1), column);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float x = value(min(first_row + r, m - 1), column);
#pragma unroll
        for (int c = 0; c < kCols; ++c) {
          added[r * kCols + c] = __fmaf_rn(x, weights[c], added[r * kCols + c]);
        }
      }
    }
  }

  // `added`: the products of outlier columns.
  __device__ __forceinline__ void store(int64_t row, int64_t col, int sum, float added) const {
    const float col_stat = args.col_stats[col];
    const float row_scale = __fmul_rn(args.row_stats[row], kInt8Product);
    float result = bias_at(args.bias, args.bias_dtype, col);
    if (has_outliers()) {
      result = __fmaf_rn(added, __fmul_rn(col_stat, 1.0f / kInt8Max), result);
    }
    result = __fmaf_rn(__int2float_rn(sum), __fmul_rn(col_stat, row_scale), result);
    static_cast<T*>(args.out)[row * n + col] = narrow<T>(result);
  }
};

// What a block of threads has of a tile goes to `finish`.
template <class Finish>
__device__ __forceinline__ void finish_tile(const Finish& finish, const Sums& sums,
                                            int64_t first_row, int64_t first_col) {
  ThreadTile added = {};
  if (finish.has_outliers()) finish.add_outliers(first_row, first_col, added);
#pragma unroll
  for (int i = 0; i < kThreadTile; ++i) {
    const int64_t row = first_row + thread_row() + kStride * i;
#pragma unroll
    for (int j = 0; j < kThreadTile; ++j) {
      const int64_t col = first_col + thread_col() + kStride * j;
      if (row < finish.m && col < finish.n) finish.store(row, col, sums[i][j], added[i][j]);
    }
  }
}

// a b^T by tiles of 64 x 64, each thread 4 x 4 of them, four products an instruction; then
// `finish` takes the sums. Serves the shapes that the vendor's library refuses, and
// devices without one.
template <class Finish>
__global__ void __launch_bounds__(kThreads)
    int8_matmul_kernel(const int8_t* __restrict__ a,  // [m, k]
                       const int8_t* __restrict__ b,  // [n, k]
                       int64_t from_row, int64_t m, int64_t n, int64_t k, bool aligned,
                       const Finish finish) {
  // One word of padding per row spreads the rows over the memory banks.
  __shared__ int tile_a[kTileM][kWords + 1];
  __shared__ int tile_b[kTileN][kWords + 1];
  const int64_t first_row = from_row + int64_t{blockIdx.y} * kTileM;
  const int64_t first_col = int64_t{blockIdx.x} * kTileN;
  Sums sums = {};
  for (int64_t k0 = 0; k0 < k; k0 += kTileK) {
    for (int word = threadIdx.x; word < kTileM * kWords; word += kThreads) {
      const int row = word / kWords;
      const int64_t from = k0 + (word % kWords) * 4;
      const int64_t row_a = first_row + row;
      const int64_t row_b = first_col + row;
      tile_a[row][word % kWords] = row_a < m ? load_word(a + row_a * k, from, k, aligned) : 0;
      tile_b[row][word % kWords] = row_b < n ? load_word(b + row_b * k, from, k, aligned) : 0;
    }
    __syncthreads();
    for (int w = 0; w < kWords; ++w) {
      int x[kThreadTile];
      int y[kThreadTile];
#pragma unroll
      for (int i = 0; i < kThreadTile; ++i) x[i] = tile_a[thread_row() + kStride * i][w];
#pragma unroll
      for (int j = 0; j < kThreadTile; ++j) y[j] = tile_b[thread_col() + kStride * j][w];
#pragma unroll
      for (int i = 0; i < kThreadTile; ++i) {
#pragma unroll
        for (int j = 0; j < kThreadTile; ++j) sums[i][j] = dot4(x[i], y[j], sums[i][j]);
      }
    }
    __syncthreads();
  }
  finish_tile(finish, sums, first_row, first_col);
}

// Rows that the kernel below takes.
constexpr int64_t kMostFewRows = 16;
constexpr int kFewThreads = 128;
constexpr int kFewCols = 4;  // rows of b that a warp multiplies

// Sixteen bytes along k.
struct alignas(16) Chunk {
  int words[4];
};

__device__ __forceinline__ Chunk load_chunk(const int8_t* row, int64_t from, int64_t k,
                                            bool aligned) {
  if (aligned) return *reinterpret_cast<const Chunk*>(row + from);
  Chunk chunk;
#pragma unroll
  for (int w = 0; w < 4; ++w) chunk.words[w] = load_word(row, from + 4 * w, k, false);
  return chunk;
}

// Leaves in values[0] of lane l the sum, over the lanes of the warp, of values[l % kCount]: lanes
// halve what they hold as they add, so that kCount values take little more shuffles than one.
template <class T, int kCount>
__device__ __forceinline__ void add_over_warp(T (&values)[kCount]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
    const bool upper = (lane & half) != 0;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      if (i >= half) continue;
      const T kept = upper ? values[i + half] : values[i];
      const T given = upper ? values[i] : values[i + half];
      values[i] = kept + shuffle_xor(given, half);
    }
  }
#pragma unroll
  for (int lanes = kCount; lanes < kWarp; lanes *= 2) {
    values[0] += shuffle_xor(values[0], lanes);
  }
}

// The same for few rows of a, where reading b takes the time: a warp reads kFewCols rows of b once,
// each lane sixteen bytes of them at a time, and multiplies them with kRows rows of a, which stay
// in cache.
template <int kRows, class Finish>
__global__ void __launch_bounds__(kFewThreads)
    int8_few_rows_kernel(const int8_t* __restrict__ a,  // [m, k]
                         const int8_t* __restrict__ b,  // [n, k]
                         int64_t k, bool aligned, bool b_is_older, const Finish finish) {
  constexpr int kSums = kRows * kFewCols;
  static_assert(kSums <= kWarp);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warp = int64_t{blockIdx.x} * (kFewThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t first_row = int64_t{blockIdx.y} * kRows;
  const int64_t first_col = warp * kFewCols;
  if (first_col >= finish.n) return;
  // Behind the last row and column the last one is multiplied once more, for nothing.
  const auto row_of_a = [&](int i) { return a + min(first_row + i, finish.m - 1) * k; };
  const auto row_of_b = [&](int j) { return b + min(first_col + j, finish.n - 1) * k; };
  let_next_kernel_start();
  if (b_is_older) {
    constexpr int64_t kAhead = 4096;  // bytes of a row that are under way when `a` is there
    for (int64_t from = lane * kCacheLine; from < min(k, kAhead); from += kWarp * kCacheLine) {
#pragma unroll
      for (int j = 0; j < kFewCols; ++j) prefetch_to_cache(row_of_b(j) + from);
    }
  }
  wait_for_previous_kernel();
  int sums[kSums] = {};
#pragma unroll 2
  for (int64_t from = lane * 16; from < k; from += kWarp * 16) {
    Chunk y[kFewCols];
#pragma unroll
    for (int j = 0; j < kFewCols; ++j) y[j] = load_chunk(row_of_b(j), from, k, aligned);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Chunk x = load_chunk(row_of_a(i), from, k, aligned);
#pragma unroll
      for (int j = 0; j < kFewCols; ++j) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          int& sum = sums[i * kFewCols + j];
          sum = dot4(x.words[w], y[j].words[w], sum);
        }
      }
    }
  }
  add_over_warp(sums);
  float added[kSums] = {};
  if (finish.has_outliers()) {
    finish.template add_outliers_by_lanes<kRows, kFewCols>(first_row, first_col, added);
    add_over_warp(added);
  }
  const int64_t row = first_row + lane / kFewCols;
  const int64_t col = first_col + lane % kFewCols;
  if (lane < kSums && row < finish.m && col < finish.n) {
    finish.store(row, col, sums[0], added[0]);
  }
}

// What is left to do where another kernel made the integer product.
template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_product_kernel(const int32_t* __restrict__ product,  // [m, n]
                         int64_t from_row, const ScaleSums<T> finish) {
  const int64_t first_row = from_row + int64_t{blockIdx.y} * kTileM;
  const int64_t first_col = int64_t{blockIdx.x} * kTileN;
  Sums sums = {};
#pragma unroll
  for (int i = 0; i < kThreadTile; ++i) {
    const int64_t row = first_row + thread_row() + kStride * i;
#pragma unroll
    for (int j = 0; j < kThreadTile; ++j) {
      const int64_t col = first_col + thread_col() + kStride * j;
      if (row < finish.m && col < finish.n) sums[i][j] = product[row * finish.n + col];
    }
  }
  finish_tile(finish, sums, first_row, first_col);
}

// Calls body(grid, first row) for parts of all tiles: a grid's second dimension ends at 65535.
template <class Body>
void over_tiles(int64_t m, int64_t n, const Body& body) {
  constexpr int64_t kMostRows = int64_t{65535} * kTileM;
  for (int64_t row = 0; row < m; row += kMostRows) {
    const int64_t rows = std::min(m - row, kMostRows);
    body(dim3(static_cast<unsigned>(ceil_div(n, kTileN)),
              static_cast<unsigned>(ceil_div(rows, kTileM))),
         row);
  }
}

template <int kRows, class Finish>
void few_rows(const int8_t* a, const int8_t* b, int64_t k, bool b_is_older, const Finish& finish,
              Stream stream) {
  const bool aligned = k % 16 == 0 && is_aligned(a, 16) && is_aligned(b, 16);
  constexpr int64_t kCols = int64_t{kFewThreads} / kWarp * kFewCols;
  const dim3 grid(static_cast<unsigned>(ceil_div(finish.n, kCols)),
                  static_cast<unsigned>(ceil_div(finish.m, int64_t{kRows})));
  launch_early("int8_few_rows_kernel", int8_few_rows_kernel<kRows, Finish>, grid, kFewThreads, 0,
               stream, a, b, k, aligned, b_is_older, finish);
}

template <class Finish>
void matmul(const int8_t* a, const int8_t* b, int64_t k, bool b_is_older, const Finish& finish,
            Stream stream) {
  const int64_t m = finish.m;
  if (m == 1) return few_rows<1>(a, b, k, b_is_older, finish, stream);
  if (m == 2) return few_rows<2>(a, b, k, b_is_older, finish, stream);
  if (m <= 4) return few_rows<4>(a, b, k, b_is_older, finish, stream);
  if (m <= kMostFewRows) return few_rows<8>(a, b, k, b_is_older, finish, stream);
  const bool aligned = k % 4 == 0 && is_aligned(a, 4) && is_aligned(b, 4);
  over_tiles(m, finish.n, [&](dim3 grid, int64_t row) {
    launch("int8_matmul_kernel", int8_matmul_kernel<Finish>, grid, kThreads, 0, stream, a, b, row,
           m, finish.n, k, aligned, finish);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) int8_mm_dequant_kernel(const Int8MmDequant args) {
  T* const out = static_cast<T*>(args.out);
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const float row_scale = __fmul_rn(args.row_stats[row], kInt8Product);
    for (int64_t col = threadIdx.x; col < args.cols; col += kThreads) {
      const float scale = __fmul_rn(args.col_stats[col], row_scale);
      const float product = __int2float_rn(args.a[row * args.cols + col]);
      out[row * args.cols + col] =
          narrow<T>(__fmaf_rn(product, scale, bias_at(args.bias, args.bias_dtype, col)));
    }
  }
}

}  // namespace

void int8_linear_matmul(const Int8Matmul& args, Stream stream) {
  matmul(args.a, args.b, args.k, false, StoreSums{args.out, args.m, args.n}, stream);
}

void int8_scaled_matmul(const Int8ScaledMatmul& args, Stream stream) {
  // With outlier columns of a small weight, tensor cores take longer to begin.
  constexpr int64_t kFew = 2;
  constexpr int64_t kSmall = 32 << 20;
  const bool few = args.m <= kFew && args.outliers != nullptr && args.n * args.k <= kSmall;
  if (!few && wgmma_int8_serves(args)) return wgmma_int8(args, stream);
  by_dtype(args.dtype, [&]<class T>() {
    matmul(args.a, args.b, args.k, args.follows_quantization, ScaleSums<T>(args), stream);
  });
}

int64_t int8_outlier_terms_bytes(int64_t m, int64_t n, int64_t k) {
  Int8ScaledMatmul args{};
  args.m = m;
  args.n = n;
  args.k = k;
  return wgmma_int8_serves(args) ? wgmma_int8_outlier_terms_bytes(args) : 0;
}

bool int8_scaled_matmul_is_fast(const Int8ScaledMatmul& args) { return wgmma_int8_serves(args); }

void int8_scale_product(const Int8ScaledMatmul& args, const int32_t* product, Stream stream) {
  if (args.outliers == nullptr) {
    return int8_mm_dequant({args.dtype, args.bias_dtype, product, args.row_stats, args.col_stats,
                            args.bias, args.out, args.m, args.n},
                           stream);
  }
  by_dtype(args.dtype, [&]<class T>() {
    over_tiles(args.m, args.n, [&](dim3 grid, int64_t row) {
      launch("scale_product_kernel", scale_product_kernel<T>, grid, kThreads, 0, stream, product,
             row, ScaleSums<T>(args));
    });
  });
}

void int8_mm_dequant(const Int8MmDequant& args, Stream stream) {
  const int blocks =
      static_cast<int>(std::min<int64_t>(args.rows, int64_t{multiprocessors()} * 16));
  by_dtype(args.dtype, [&]<class T>() {
    launch("int8_mm_dequant_kernel", int8_mm_dequant_kernel<T>, blocks, kThreads, 0, stream, args);
  });
}

}  // namespace bnb::gpu
