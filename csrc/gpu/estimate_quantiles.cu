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
constexpr int kLoads = 4;  // of 16 bytes, in flight per thread
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
  int64_t count_bytes;      // of all counts, from the first ones on
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

// Calls body(key) for the thread's share of all elements. `kSecond`: in the second pass, which
// begins with the last element, because the first one has left that in the cache. With 32 bits it
// loads ahead, because no other block of threads has room beside it.
template <bool kSecond, int kUnroll = kLoads, class T, class Body>
__device__ __forceinline__ void for_each_key(const T* __restrict__ a, int64_t n, bool aligned,
                                             const Body& body) {
  constexpr int kPack = kPackSize<T>;
  struct Turn {
    Words<T, kPack> words[kUnroll];
  };
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t packs = aligned ? n / kPack : 0;
  const auto load = [&](int64_t p) {
    Turn turn;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t pack = p + u * threads;
      if (pack >= packs) continue;
      const int64_t place = kSecond ? packs - 1 - pack : pack;
      turn.words[u] = load_aligned<Words<T, kPack>>(a + place * kPack);
    }
    return turn;
  };
  constexpr bool kAhead = kSecond && sizeof(T) == 4;
  Turn next = load(thread);
  for (int64_t p = thread; p < packs; p += threads * kUnroll) {
    const Turn turn = next;
    if constexpr (kAhead) next = load(p + threads * kUnroll);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (p + u * threads >= packs) break;
#pragma unroll
      for (int i = 0; i < kPack; ++i) body(key_of<T>(turn.words[u], i));
    }
    if constexpr (!kAhead) next = load(p + threads * kUnroll);
  }
  for (int64_t i = packs * kPack + thread; i < n; i += threads) {
    body(OrderKey<T>::of_bits(bits_of(a[i])));
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
  __syncthreads();
  for_each_key<false>(a, n, aligned, [&](uint32_t key) {
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
  __syncthreads();
  const uint32_t mask = (1u << w.second_bits) - 1;
  for_each_key<true>(a, n, aligned, [&](uint32_t key) {
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

// The few keys that the third pass counts, collected by each thread for itself: a warp would follow
// every one of them alone.
struct KeyQueues {
  static constexpr int kSize = 6;  // in the mean a thread of 16 million numbers has one or two
  uint32_t keys[kSize][kThreads];
};

__global__ void BNB_LAUNCH_BOUNDS(kThreads, 2)
    count_third_kernel(const float* __restrict__ a,  // [n]
                       int64_t n, bool aligned, Workspace w) {
  constexpr int kMostBins = kQuantiles << 7;  // of the second pass
  BNB_DYNAMIC_SHARED(shared);                 // CountCache, KeyQueues
  __shared__ uint16_t groups[kFirstBins];     // kQuantiles where no quantile lies ...
  // A bit for each bin of the second pass, ... and of that group none.
  __shared__ uint32_t wanted[kMostBins / 32 + (1 << 7) / 32];
  CountCache& cache = *reinterpret_cast<CountCache*>(shared);
  KeyQueues& queues = *reinterpret_cast<KeyQueues*>(shared + sizeof(CountCache));
  for (int i = threadIdx.x; i < kFirstBins; i += kThreads) {
    groups[i] = min(w.first_groups[i], static_cast<uint16_t>(kQuantiles));
  }
  const int words = (kQuantiles << w.second_bits) / 32;
  for (int i = threadIdx.x; i < words + (1 << w.second_bits) / 32; i += kThreads) {
    uint32_t word = 0;
    for (int bit = 0; i < words && bit < 32; ++bit) {
      word |= static_cast<uint32_t>(w.second_groups[32 * i + bit] != kNone) << bit;
    }
    wanted[i] = word;
  }
  cache.clear();
  __syncthreads();
  const uint32_t second_mask = (1u << w.second_bits) - 1;
  const uint32_t third_mask = (1u << w.third_bits) - 1;
  const auto bin_of = [&](uint32_t key) {
    return (static_cast<uint32_t>(groups[key >> (32 - kFirstBits)]) << w.second_bits) |
           ((key >> w.third_bits) & second_mask);
  };
  const auto count = [&](uint32_t bin, uint32_t key) {
    cache.add(w.third_counts,
              (static_cast<uint32_t>(w.second_groups[bin]) << w.third_bits) | (key & third_mask));
  };
  int queued = 0;
  for_each_key<false, 2>(a, n, aligned, [&](uint32_t key) {
    const uint32_t bin = bin_of(key);
    if ((wanted[bin / 32] >> (bin % 32) & 1u) == 0) return;
    if (queued < KeyQueues::kSize) {
      queues.keys[queued][threadIdx.x] = key;
      ++queued;
    } else {
      count(bin, key);
    }
  });
  for (int i = 0; i < queued; ++i) {
    const uint32_t key = queues.keys[i][threadIdx.x];
    count(bin_of(key), key);
  }
  __syncthreads();
  cache.flush(w.third_counts);
}

// Where a pass writes what it found: to `next` and `groups`, or, the last one, to `out`.
struct Located {
  Found* next;
  uint16_t* groups;  // [groups, 2^bits]
  float* out;        // [kQuantiles]
};

// The sum of the values of a warp's lanes up to the own one.
__device__ __forceinline__ uint64_t warp_prefix_sum(uint64_t value) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  uint64_t prefix = value;
  uint64_t total = value;  // of the lanes whose numbers have the same upper bits
  for (int bit = 1; bit < kWarp; bit *= 2) {
    const uint64_t other = shuffle_xor(total, bit);
    if ((lane & bit) != 0) prefix += other;
    total += other;
  }
  return prefix;
}

// A block of at most kThreads per group, a power of two and enough for its quantiles: finds the bin
// of each of them. `before` is what was found until now, `ranks` what to begin with in the first
// pass.
template <class T, bool kFirst>
__global__ void __launch_bounds__(kThreads)
    locate_kernel(const Count* __restrict__ counts,  // [groups, 2^bits]
                  int bits, const BNB_GRID_CONSTANT QuantileRanks ranks,
                  const Found* __restrict__ before, Located located) {
  static_assert(kThreads <= kWarp * kWarp);
  __shared__ uint64_t sums[kThreads];
  __shared__ uint64_t warp_sums[kWarp];
  __shared__ int bin_of[kQuantiles];
  const int group = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  if (!kFirst && before->group[group] != group) return;  // the same for the whole block
  const int bins = 1 << bits;
  const int64_t row = static_cast<int64_t>(group) << bits;

  // Each thread has a run of bins: the number of elements up to its end.
  const int run = max(bins / threads, 1);
  uint64_t sum = 0;
#pragma unroll 8  // loads in flight
  for (int bin = thread * run; bin < min((thread + 1) * run, bins); ++bin) sum += counts[row + bin];
  if (located.groups != nullptr) {
    for (int bin = thread; bin < bins; bin += threads) located.groups[row + bin] = kNone;
  }
  sums[thread] = warp_prefix_sum(sum);
  __syncthreads();
  if (thread < kWarp) {
    const int last = thread * kWarp + kWarp - 1;  // of a warp
    warp_sums[thread] = warp_prefix_sum(last < threads ? sums[last] : 0);
  }
  __syncthreads();
  if (thread >= kWarp) sums[thread] += warp_sums[thread / kWarp - 1];
  __syncthreads();

  // The group's quantiles are its first one and those after it. Each looks for its own bin.
  const int quantile = group + thread;
  const bool mine =
      quantile < kQuantiles && thread < kQuantiles && (kFirst || before->group[quantile] == group);
  uint64_t rank = 0;
  int bin = 0;
  if (mine) {
    rank = kFirst ? ranks.values[quantile] : before->rank[quantile];
    int runs = 0;  // that end before it
    for (int step = threads / 2; step > 0; step /= 2) {
      if (sums[runs + step - 1] <= rank) runs += step;
    }
    if (runs > 0) rank -= sums[runs - 1];
    for (bin = runs * run; rank >= counts[row + bin]; ++bin) rank -= counts[row + bin];
    bin_of[thread] = bin;
  }
  __syncthreads();
  if (!mine) return;
  const uint32_t digits = kFirst ? 0 : before->key[quantile] << bits;
  const uint32_t key = digits | static_cast<uint32_t>(bin);
  if (located.out != nullptr) {
    located.out[quantile] = OrderKey<T>::to_number(key);
    return;
  }
  int first = 0;  // of those in the same bin; bins ascend
  for (int last = thread; first < last;) {
    const int middle = (first + last) / 2;
    if (bin_of[middle] < bin) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  const uint16_t leader = static_cast<uint16_t>(group + first);
  located.next->rank[quantile] = rank;
  located.next->key[quantile] = key;
  located.next->group[quantile] = leader;
  if (first == thread) located.groups[row + bin] = leader;
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
  if (w.third_bits > 0) w.third_counts = cutter.take<Count>(int64_t{kQuantiles} << w.third_bits);
  w.count_bytes = cutter.bytes;
  w.first_groups = cutter.take<uint16_t>(kFirstBins);
  w.second_groups = cutter.take<uint16_t>(second_bins);
  w.found = cutter.take<Found>(2);
  return w;
}

// Blocks of threads for a pass over n elements, `resident` on a multiprocessor.
int grid(int64_t n, int pack, int resident) {
  const int64_t work = ceil_div(n, int64_t{kThreads} * kLoads * pack);
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

  BNB_GPU_CHECK(cudaMemsetAsync(w.first_counts, 0, static_cast<size_t>(w.count_bytes),
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
    constexpr int kThirdBytes = sizeof(CountCache) + sizeof(KeyQueues);
    BNB_GPU_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(count_third_kernel),
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, kThirdBytes));
    launch("count_third_kernel", count_third_kernel, two_blocks, kThreads, kThirdBytes, stream, a,
           args.n, aligned, w);
    launch("locate_kernel", locate_kernel<T, false>, kQuantiles, kThreads, 0, stream,
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
