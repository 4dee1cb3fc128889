// Exact quantiles of a whole tensor, by counting leading digits of order keys.
//
// A pass counts one more digit of the keys of those elements that share their leading digits with
// some quantile. From the counts follows that digit of every quantile. Nothing is sorted, and
// nothing but integers is added, so the order of threads does not matter.
//
//     pass   digit            counted in                           of which elements
//     1      13 bits          shared memory                        all
//     2      3 to 7 bits      shared memory, for each group        those of a quantile's group
//     3      the others       global memory, behind a small cache  the few of a quantile's group
//
// A group is the quantiles that share their digits so far, named by its first member: at most 256.
// Numbers of 16 bits are done after the second pass.
// SPDX-License-Identifier: MIT
#include <algorithm>

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/kernels/check.h"
#include "bitsandbytes/kernels/quantiles.h"
#include "gpu/device/dtype.cuh"
#include "gpu/device/vector_io.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {
namespace {

constexpr int kThreads = 1024;
constexpr int kUnroll = 4;  // 16-byte loads in flight per thread
constexpr int kFirstBits = 13;
constexpr int kFirstBins = 1 << kFirstBits;
constexpr uint16_t kNone = 0xffff;

using Count = unsigned long long;  // as atomicAdd() spells 64 bits

// What is known of the quantiles after a pass.
struct Found {
  uint64_t rank[kQuantiles];   // among the elements of the group
  uint32_t key[kQuantiles];    // digits so far
  uint16_t group[kQuantiles];  // first member of the group
};

// Device memory of a call. Groups by their digits: kNone where no quantile lies.
struct Workspace {
  Count* first_counts;      // [kFirstBins]
  Count* second_counts;     // [kQuantiles, 2^second_bits]
  Count* third_counts;      // [kQuantiles, 2^third_bits], or null
  uint16_t* first_groups;   // [kFirstBins]
  uint16_t* second_groups;  // [kQuantiles, 2^second_bits]
  Found* found;             // [2], after the first and after the second pass
  int second_bits;
  int third_bits;  // 0: two passes
};

template <class T>
__device__ __forceinline__ uint32_t key_of(const Words<T, kPackSize<T>>& words, int i) {
  if constexpr (sizeof(T) == 4) {
    return OrderKey<T>::of_bits(words.words[i]);
  } else {
    return OrderKey<T>::of_bits((words.words[i / 2] >> (16 * (i % 2))) & 0xffffu);
  }
}

__device__ __forceinline__ uint32_t bits_of(float x) { return float_bits(x); }
__device__ __forceinline__ uint32_t bits_of(Half x) { return x.bits; }
__device__ __forceinline__ uint32_t bits_of(BFloat16 x) { return x.bits; }

// Calls body(key) for the thread's share of all elements.
template <class T, class Body>
__device__ __forceinline__ void for_each_key(const T* __restrict__ a, int64_t n, bool aligned,
                                             const Body& body) {
  constexpr int kPack = kPackSize<T>;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t packs = aligned ? n / kPack : 0;
  for (int64_t p = thread; p < packs; p += threads * kUnroll) {
    Words<T, kPack> words[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t pack = p + u * threads;
      if (pack < packs) words[u] = load_aligned<Words<T, kPack>>(a + pack * kPack);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (p + u * threads >= packs) break;
#pragma unroll
      for (int i = 0; i < kPack; ++i) body(key_of<T>(words[u], i));
    }
  }
  for (int64_t i = packs * kPack + thread; i < n; i += threads) {
    body(OrderKey<T>::of_bits(bits_of(a[i])));
  }
}

// Called by all threads of all blocks; a later kernel may count there.
__device__ void clear(Count* counts, int64_t size) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < size;
       i += threads) {
    counts[i] = 0;
  }
}

__device__ void clear_shared(uint32_t* bins, int size) {
  for (int i = threadIdx.x; i < size; i += kThreads) bins[i] = 0;
}

__device__ void add_counts(Count* counts, const uint32_t* bins, int size) {
  for (int i = threadIdx.x; i < size; i += kThreads) {
    if (bins[i] != 0) atomicAdd(&counts[i], static_cast<Count>(bins[i]));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    count_first_kernel(const T* __restrict__ a,  // [n]
                       int64_t n, bool aligned, Workspace w) {
  __shared__ uint32_t bins[kFirstBins];
  clear_shared(bins, kFirstBins);
  clear(w.second_counts, int64_t{kQuantiles} << w.second_bits);
  __syncthreads();
  for_each_key<T>(a, n, aligned, [&](uint32_t key) {
    atomicAdd(&bins[key >> (OrderKey<T>::kBits - kFirstBits)], 1u);
  });
  __syncthreads();
  add_counts(w.first_counts, bins, kFirstBins);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    count_second_kernel(const T* __restrict__ a,  // [n]
                        int64_t n, bool aligned, Workspace w) {
  BNB_DYNAMIC_SHARED(shared);  // bins [kQuantiles, 2^second_bits], groups [kFirstBins]
  const int size = kQuantiles << w.second_bits;
  uint32_t* const bins = reinterpret_cast<uint32_t*>(shared);
  uint16_t* const groups = reinterpret_cast<uint16_t*>(bins + size);
  clear_shared(bins, size);
  for (int i = threadIdx.x; i < kFirstBins; i += kThreads) groups[i] = w.first_groups[i];
  if (w.third_bits > 0) clear(w.third_counts, int64_t{kQuantiles} << w.third_bits);
  __syncthreads();
  const uint32_t mask = (1u << w.second_bits) - 1;
  for_each_key<T>(a, n, aligned, [&](uint32_t key) {
    const uint32_t group = groups[key >> (OrderKey<T>::kBits - kFirstBits)];
    if (group == kNone) return;
    atomicAdd(&bins[(group << w.second_bits) | ((key >> w.third_bits) & mask)], 1u);
  });
  __syncthreads();
  add_counts(w.second_counts, bins, size);
}

// Counts in global memory, behind a cache in shared memory for those that come often: equal numbers
// would otherwise queue up at one address.
constexpr int kCacheSize = 2048;
constexpr uint32_t kEmpty = 0xffffffffu;

struct CountCache {
  uint32_t places[kCacheSize];
  uint32_t counts[kCacheSize];

  // Called by all threads of the block, which must be synchronised before the first add() and
  // before flush().
  __device__ void clear() {
    for (int i = threadIdx.x; i < kCacheSize; i += kThreads) {
      places[i] = kEmpty;
      counts[i] = 0;
    }
  }
  // The first place that asks for a slot keeps it.
  __device__ void add(Count* global, uint32_t place) {
    const uint32_t slot = (place * 0x9e3779b1u) >> 21;
    static_assert(kCacheSize == 1 << (32 - 21));
    uint32_t holder = places[slot];
    if (holder == kEmpty) holder = atomicCAS(&places[slot], kEmpty, place);
    if (holder == kEmpty || holder == place) {
      atomicAdd(&counts[slot], 1u);
    } else {
      atomicAdd(&global[place], Count{1});
    }
  }
  __device__ void flush(Count* global) const {
    for (int i = threadIdx.x; i < kCacheSize; i += kThreads) {
      if (counts[i] != 0) atomicAdd(&global[places[i]], static_cast<Count>(counts[i]));
    }
  }
};

__global__ void __launch_bounds__(kThreads)
    count_third_kernel(const float* __restrict__ a,  // [n]
                       int64_t n, bool aligned, Workspace w) {
  constexpr int kMostBins = kQuantiles << 7;  // of the second pass
  __shared__ uint16_t groups[kFirstBins];
  __shared__ uint32_t wanted[kMostBins / 32];  // a bit for each bin of the second pass
  __shared__ CountCache cache;
  for (int i = threadIdx.x; i < kFirstBins; i += kThreads) groups[i] = w.first_groups[i];
  const int words = (kQuantiles << w.second_bits) / 32;
  for (int i = threadIdx.x; i < words; i += kThreads) {
    uint32_t word = 0;
    for (int bit = 0; bit < 32; ++bit) {
      word |= static_cast<uint32_t>(w.second_groups[32 * i + bit] != kNone) << bit;
    }
    wanted[i] = word;
  }
  cache.clear();
  __syncthreads();
  const uint32_t second_mask = (1u << w.second_bits) - 1;
  const uint32_t third_mask = (1u << w.third_bits) - 1;
  for_each_key<float>(a, n, aligned, [&](uint32_t key) {
    const uint32_t group = groups[key >> (32 - kFirstBits)];
    if (group == kNone) return;
    const uint32_t bin = (group << w.second_bits) | ((key >> w.third_bits) & second_mask);
    if ((wanted[bin / 32] >> (bin % 32) & 1u) == 0) return;
    const uint32_t place =
        (static_cast<uint32_t>(w.second_groups[bin]) << w.third_bits) | (key & third_mask);
    cache.add(w.third_counts, place);
  });
  __syncthreads();
  cache.flush(w.third_counts);
}

// Where a pass writes what it found: to `next` and `groups`, or, the last one, to `out`.
struct Located {
  Found* next;
  uint16_t* groups;  // [groups, 2^bits]
  float* out;        // [kQuantiles]
};

// A block of at most kThreads per group: finds the bin of each of its quantiles. `before` is what
// was found until now, `ranks` what to begin with in the first pass.
template <class T, bool kFirst>
__global__ void __launch_bounds__(kThreads)
    locate_kernel(const Count* __restrict__ counts,  // [groups, 2^bits]
                  int bits, const BNB_GRID_CONSTANT QuantileRanks ranks,
                  const Found* __restrict__ before, Located located) {
  __shared__ uint64_t rank[kQuantiles];
  __shared__ uint64_t sums[kThreads];
  __shared__ int members;
  const int group = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  if (!kFirst && before->group[group] != group) return;  // the same for the whole block
  const int bins = 1 << bits;
  const int64_t row = static_cast<int64_t>(group) << bits;

  // The members, from `group` on.
  if (thread == 0) members = 0;
  __syncthreads();
  if (thread < kQuantiles - group && (kFirst || before->group[group + thread] == group)) {
    rank[thread] = kFirst ? ranks.values[thread] : before->rank[group + thread];
    atomicAdd(&members, 1);
  }

  // Each thread has a run of bins, and needs the number of elements before it.
  const int threads = static_cast<int>(blockDim.x);
  const int run = max(bins / threads, 1);
  const int first = thread * run;
  const int last = min(first + run, bins);
  uint64_t sum = 0;
  for (int bin = first; bin < last; ++bin) sum += counts[row + bin];
  sums[thread] = sum;
  __syncthreads();
  for (int distance = 1; distance < threads; distance *= 2) {
    const uint64_t other = thread >= distance ? sums[thread - distance] : 0;
    __syncthreads();
    sums[thread] += other;
    __syncthreads();
  }
  uint64_t start = sums[thread] - sum;

  int k = 0;  // the first member that is not before the bin
  for (int step = kQuantiles / 2; step > 0; step /= 2) {
    if (k + step <= members && rank[k + step - 1] < start) k += step;
  }
  if (k < members && rank[k] < start) ++k;
  for (int bin = first; bin < last; ++bin) {
    const uint64_t end = start + counts[row + bin];
    const uint16_t leader = static_cast<uint16_t>(group + k);
    bool taken = false;
    for (; k < members && rank[k] < end; ++k) {
      taken = true;
      const uint32_t digits = kFirst ? 0 : before->key[group + k] << bits;
      const uint32_t key = digits | static_cast<uint32_t>(bin);
      if (located.out != nullptr) {
        located.out[group + k] = OrderKey<T>::to_number(key);
      } else {
        located.next->rank[group + k] = rank[k] - start;
        located.next->key[group + k] = key;
        located.next->group[group + k] = leader;
      }
    }
    if (located.groups != nullptr) located.groups[row + bin] = taken ? leader : kNone;
    start = end;
  }
}

// Bytes of shared memory that the second pass takes.
constexpr int second_bytes(int bits) {
  return (kQuantiles << bits) * static_cast<int>(sizeof(uint32_t)) +
         kFirstBins * static_cast<int>(sizeof(uint16_t));
}

// Digits of the second pass: all that are left of 16 bits; of 32 as many as shared memory counts.
int second_bits(DType dtype) {
  if (dtype != DType::kFloat32) return 16 - kFirstBits;
  int bits = 7;
  while (bits > 5 && second_bytes(bits) > most_shared_bytes()) --bits;
  return bits;
}

// Hands out parts of the memory from `base` on; without a base it only adds them up.
struct Cutter {
  char* base;
  int64_t bytes = 0;

  template <class P>
  P* take(int64_t count) {
    const int64_t start = bytes;
    bytes += ceil_div(count * static_cast<int64_t>(sizeof(P)), 16) * 16;
    return base == nullptr ? nullptr : reinterpret_cast<P*>(base + start);
  }
};

Workspace lay_out(DType dtype, Cutter& cutter) {
  Workspace w{};
  w.second_bits = second_bits(dtype);
  w.third_bits = dtype == DType::kFloat32 ? 32 - kFirstBits - w.second_bits : 0;
  const int64_t second_bins = int64_t{kQuantiles} << w.second_bits;
  w.first_counts = cutter.take<Count>(kFirstBins);
  w.second_counts = cutter.take<Count>(second_bins);
  w.first_groups = cutter.take<uint16_t>(kFirstBins);
  w.second_groups = cutter.take<uint16_t>(second_bins);
  w.found = cutter.take<Found>(2);
  if (w.third_bits > 0) w.third_counts = cutter.take<Count>(int64_t{kQuantiles} << w.third_bits);
  return w;
}

// Blocks of threads for a pass over n elements, `resident` on a multiprocessor.
int grid(int64_t n, int pack, int resident) {
  const int64_t work = ceil_div(n, int64_t{kThreads} * kUnroll * pack);
  return static_cast<int>(std::min<int64_t>(work, int64_t{multiprocessors()} * resident));
}

template <class T>
void estimate(const EstimateQuantiles& args, void* workspace, Stream stream) {
  Cutter cutter{static_cast<char*>(workspace)};
  const Workspace w = lay_out(args.dtype, cutter);
  const T* const a = static_cast<const T*>(args.a);
  const bool aligned = is_aligned(a, 16);
  const QuantileRanks ranks = quantile_ranks(args.n, args.offset);
  const int two_blocks = grid(args.n, kPackSize<T>, 2);
  const bool two_passes = w.third_bits == 0;

  BNB_GPU_CHECK(cudaMemsetAsync(w.first_counts, 0, kFirstBins * sizeof(Count),
                                static_cast<cudaStream_t>(stream.handle)));
  launch("count_first_kernel", count_first_kernel<T>, two_blocks, kThreads, 0, stream, a, args.n,
         aligned, w);
  launch("locate_kernel", locate_kernel<T, true>, 1, kThreads, 0, stream, w.first_counts,
         kFirstBits, ranks, nullptr, Located{w.found, w.first_groups, nullptr});

  const int bytes = second_bytes(w.second_bits);
  BNB_GPU_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(count_second_kernel<T>),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  launch("count_second_kernel", count_second_kernel<T>,
         w.second_bits > 6 ? grid(args.n, kPackSize<T>, 1) : two_blocks, kThreads, bytes, stream, a,
         args.n, aligned, w);
  launch("locate_kernel", locate_kernel<T, false>, kQuantiles, kQuantiles, 0, stream,
         w.second_counts, w.second_bits, ranks, w.found,
         two_passes ? Located{nullptr, nullptr, args.out}
                    : Located{w.found + 1, w.second_groups, nullptr});
  if (two_passes) return;

  if constexpr (sizeof(T) == 4) {
    launch("count_third_kernel", count_third_kernel, two_blocks, kThreads, 0, stream, a, args.n,
           aligned, w);
    launch("locate_kernel", locate_kernel<T, false>, kQuantiles, kQuantiles, 0, stream,
           w.third_counts, w.third_bits, ranks, w.found + 1, Located{nullptr, nullptr, args.out});
  }
}

}  // namespace

int64_t quantile_workspace_bytes(DType dtype) {
  Cutter cutter{nullptr};
  lay_out(dtype, cutter);
  return cutter.bytes;
}

void estimate_quantiles(const EstimateQuantiles& args, void* workspace, Stream stream) {
  check_arguments(args);
  ArgumentCheck("estimate_quantiles").pointer("workspace", static_cast<const Count*>(workspace), 1);
  by_dtype(args.dtype, [&]<class T>() { estimate<T>(args, workspace, stream); });
}

}  // namespace bnb::gpu
