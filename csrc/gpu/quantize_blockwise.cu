// 8-bit blockwise quantization and its inverse, for any table of 256 levels.
// SPDX-License-Identifier: MIT
#include "bitsandbytes/blocks.h"
#include "bitsandbytes/kernels/check.h"
#include "bitsandbytes/kernels/quantize.h"
#include "gpu/device/dtype.cuh"
#include "gpu/device/encode8.cuh"
#include "gpu/device/runs.cuh"
#include "gpu/device/scales.cuh"
#include "gpu/device/tile.cuh"
#include "gpu/device/vector_io.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {
namespace {

// Random numbers of stochastic rounding: element i takes number (i + offset) mod size.
struct RandomNumbers {
  const float* values;  // [size]
  int64_t size;
  int64_t offset;

  // The place of element i's number, and that of an element further on by a number of which the
  // rest is `step`.
  __device__ __forceinline__ int64_t place(int64_t i) const { return (i + offset) % size; }
  __device__ __forceinline__ int64_t after(int64_t place, int64_t step) const {
    return place + step < size ? place + step : place + step - size;
  }

  // Those of kCount elements, of which the first one's is at `start`.
  template <int kCount>
  __device__ __forceinline__ Words<float, kCount> read(int64_t start) const {
    constexpr int kPack = kPackSize<float>;
    using Aligned = Words<float, kPack>;
    const float* const p = values + start;
    // Numbers since the last 16-byte boundary: mostly the same for all.
    const int over = static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(float) % kPack);
    Words<float, kCount> r;
    if (start < over || start + kCount + kPack > size) {
      int64_t next = start;
#pragma unroll
      for (uint32_t& word : r.words) {
        word = float_bits(values[next]);
        next = after(next, 1);
      }
      return r;
    }
    uint32_t around[kCount + kPack];
#pragma unroll
    for (int w = 0; w < kCount / kPack + 1; ++w) {
      const auto pack = load_aligned<Aligned>(p - over + w * kPack);
#pragma unroll
      for (int j = 0; j < kPack; ++j) around[w * kPack + j] = pack.words[j];
    }
    // A run-time index would move the numbers to local memory.
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      if (over != k) continue;
#pragma unroll
      for (int j = 0; j < kCount; ++j) r.words[j] = around[k + j];
    }
    return r;
  }
};

// What a pack of elements becomes: seldom called.
template <int kCount>
__device__ BNB_NOINLINE Words<uint8_t, kCount> round_exactly(const float* levels,
                                                             Words<float, kCount> s,
                                                             Words<float, kCount> r,
                                                             Words<uint8_t, kCount> codes) {
  const auto level = [levels](int k) { return levels[k]; };
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const int shift = 8 * (j % 4);
    uint32_t& word = codes.words[j / 4];
    const int nearest = static_cast<int>((word >> shift) & 0xffu);
    const int code = round_stochastic(level, nearest, s.get(j), r.get(j));
    word += static_cast<uint32_t>(code - nearest) << shift;  // stays within its byte
  }
  return codes;
}

// round_stochastic() for codes of the nearest levels. `levels` [256] lies between two numbers that
// are too large for any s to move there.
template <int kCount>
__device__ __forceinline__ void round_codes(const float* levels, const Words<float, kCount>& s,
                                            const Words<float, kCount>& r,
                                            Words<uint8_t, kCount>& codes) {
  // r is compared with part / whole: as r * whole with part, but very near equality, where it
  // matters how the quotient is rounded.
  constexpr float kNear = 0x1p-20f;
  Words<uint8_t, kCount> moved = codes;
  bool sure = true;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const int shift = 8 * (j % 4);
    const int code = static_cast<int>((codes.words[j / 4] >> shift) & 0xffu);
    const float nearest = levels[code];
    const float way = __fsub_rn(s.get(j), nearest);
    const int32_t step = (static_cast<int32_t>(float_bits(way)) >> 31) | 1;
    const float other = levels[code + step];
    const float part = __fsub_rn(other, s.get(j));
    const float over = __fmaf_rn(r.get(j), __fsub_rn(other, nearest), -part);
    sure = sure && fabsf(over) > kNear * fabsf(part);
    // Below the nearest level both differences are negative.
    const int32_t stays = static_cast<int32_t>(float_bits(over) ^ float_bits(way)) >> 31;
    moved.words[j / 4] += static_cast<uint32_t>(step & ~stays) << shift;  // within its byte
  }
  codes = sure ? moved : round_exactly(levels, s, r, codes);
}

constexpr int kRun = 16;  // elements of a lane's run: their codes are one 16-byte pack
template <class T>
using Runs = RunTile<T, kRun>;
// Blocks of threads on a multiprocessor.
template <class T, bool kStochastic>
constexpr int kResident = kStochastic || sizeof(T) == 2 ? 4 : 3;

// Codes of a pack of any block, seldom called.
template <class T>
__device__ BNB_NOINLINE Words<uint8_t, kPackSize<T>> encode_any(const Encode8& code,
                                                                Words<T, kPackSize<T>> pack,
                                                                uint32_t most) {
  Words<uint8_t, kPackSize<T>> codes;
  code.encode(pack, absmax_from_bits(most), codes.words);
  return codes;
}

// Stores the codes of a run.
template <bool kZeroApart, class T>
__device__ __forceinline__ void quantize_run(const Encode8& code, const Words<T, kRun>& run,
                                             uint32_t most, uint8_t* out) {
  Words<uint8_t, kRun> codes;
  if (most != 0 && has_quick_reciprocal(most)) {
    code.encode_regular<kZeroApart>(run, quick_reciprocal(absmax_from_bits(most)), codes.words);
  } else {
    constexpr int kPack = kPackSize<T>;
#pragma unroll
    for (int v = 0; v < kRun / kPack; ++v) {
      const auto pack = encode_any<T>(code, part<kPack>(run, v), most);
#pragma unroll
      for (int w = 0; w < kPack / 4; ++w) codes.words[v * kPack / 4 + w] = pack.words[w];
    }
  }
  if (code.reordered) code.restore(codes);
  store_aligned(out, codes);
}

// Whole tiles of runs (device/runs.cuh), and then what is left, or everything where buckets or
// alignment are missing, a tile of 4096 elements at a time (device/tile.cuh).
template <class T, bool kStochastic>
__global__ void BNB_LAUNCH_BOUNDS(kTileThreads, (kResident<T, kStochastic>))
    quantize_blockwise_kernel(const T* __restrict__ a,         // [n]
                              const float* __restrict__ code,  // [256]
                              uint8_t* __restrict__ out,       // [n]
                              float* __restrict__ absmax,      // [ceil(n / block_size)] or null
                              int64_t n, int log2_block, bool aligned,
                              int64_t run_tiles,  // 0 where something is not aligned
                              RandomNumbers random) {
  using Elements = Tile<T>;
  constexpr int kPack = Elements::kPack;

  BNB_DYNAMIC_SHARED(slots);
  struct alignas(kRunRow) Shared {
    Encode8 levels;
    typename Elements::Exchange exchange;
    typename Runs<T>::Exchange run_exchange;
  };
  __shared__ Shared shared;
  Encode8& levels = shared.levels;
  levels.fill(code);
  __syncthreads();

  int64_t done = 0;  // elements
  if (!kStochastic && absmax != nullptr && levels.kind != Buckets8::kNone) {
    const auto each = [&](const auto& body) {
      for_each_run<kRun>(a, absmax, run_tiles, log2_block, slots, shared.run_exchange, body);
    };
    if (levels.kind == Buckets8::kPlain) {
      each([&](const Words<T, kRun>& run, uint32_t most, int64_t i) {
        quantize_run<false>(levels, run, most, out + i);
      });
    } else {
      each([&](const Words<T, kRun>& run, uint32_t most, int64_t i) {
        quantize_run<true>(levels, run, most, out + i);
      });
    }
    done = run_tiles * Runs<T>::kElements;
  }

  const int block_size = 1 << log2_block;
  int buffer = 0;
  int64_t tile = done / kTileElements + blockIdx.x;
  // Where the random numbers of the thread's next pack are, and how far it is to the one after it.
  [[maybe_unused]] int64_t place = 0;
  [[maybe_unused]] int64_t slice_step = 0;
  [[maybe_unused]] int64_t tile_step = 0;
  if constexpr (kStochastic) {
    place = random.place(Elements::base_of(tile));
    slice_step = Elements::kSlice % random.size;
    tile_step = int64_t{gridDim.x} * kTileElements % random.size;
  }
  for (; tile * kTileElements < n; tile += gridDim.x) {
    Elements elements;
    elements.load(a, n, tile, aligned);
    elements.reduce(block_size, shared.exchange, buffer);
    [[maybe_unused]] int64_t random_at = place;
    if constexpr (kStochastic) place = random.after(place, tile_step);
#pragma unroll
    for (int v = 0; v < Elements::kSlices; ++v) {
      const int64_t i = Elements::base_of(tile) + v * Elements::kSlice;
      if (i >= n) break;
      const float scale = absmax != nullptr ? absmax_from_bits(elements.most[v]) : 1.0f;
      if (absmax != nullptr && (i & (block_size - 1)) == 0) absmax[i >> log2_block] = scale;
      Words<float, kPack> x;
      x.set(elements.x[v]);
      Words<uint8_t, kPack> codes;
      // Buckets know numbers up to 1 only.
      if (absmax != nullptr) {
        levels.encode(x, scale, codes.words);
      } else {
        levels.encode_by_search(x, 1.0f, codes.words);
      }
      if constexpr (kStochastic) {
        const float inverse = __frcp_rn(scale);
#pragma unroll
        for (int j = 0; j < kPack; ++j) x.words[j] = float_bits(__fmul_rn(x.get(j), inverse));
        round_codes(levels.levels(), x, random.read<kPack>(random_at), codes);
        random_at = random.after(random_at, slice_step);
      }
      if (levels.reordered) levels.restore(codes);
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

template <class T, bool kStochastic>
void launch_quantize(const QuantizeBlockwise& args, Stream stream) {
  const bool aligned = is_aligned(args.a, 16) && is_aligned(args.out, kPackSize<T>);
  const auto kernel = quantize_blockwise_kernel<T, kStochastic>;
  const bool runs = !kStochastic && args.n >= Runs<T>::kElements && is_aligned(args.a, 16) &&
                    is_aligned(args.out, 16) &&
                    take_shared(reinterpret_cast<const void*>(kernel), Runs<T>::kBytes);
  launch("quantize_blockwise_kernel", kernel,
         resident_grid(ceil_div(args.n, kTileElements), kResident<T, kStochastic>), kTileThreads,
         runs ? Runs<T>::kBytes : 0, stream, static_cast<const T*>(args.a), args.code, args.out,
         args.absmax, args.n, log2_of(args.block_size), aligned,
         runs ? args.n / Runs<T>::kElements : 0,
         RandomNumbers{args.rand, args.rand_size, args.rand_offset});
}

template <class T>
void quantize(const QuantizeBlockwise& args, Stream stream) {
  args.rand != nullptr ? launch_quantize<T, true>(args, stream)
                       : launch_quantize<T, false>(args, stream);
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
