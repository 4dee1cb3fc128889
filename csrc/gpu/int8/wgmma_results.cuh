// What becomes of the sums of the layer on Hopper's tensor cores.
// SPDX-License-Identifier: MIT
#pragma once

#include "gpu/device/dtype.cuh"
#include "gpu/int8/wgmma_tile.cuh"

#if BNB_HOPPER

namespace bnb::gpu {

struct EightWords {
  uint32_t words[8];
};

// From any block of the cluster.
__device__ __forceinline__ EightWords load_eight(uint32_t address) {
  const uint4 x = load_in_cluster(address);
  const uint4 y = load_in_cluster(address + 16);
  return {{x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w}};
}

template <class T, class Shape>
struct Int8Results {
  using Tile = Int8Tile<T, Shape>;
  static constexpr int kTokens = Shape::kTokens;
  static constexpr int kSums = Shape::kSums;

  const Tile& tile;

  // ---- Results of large tiles ----------------------------------------------------------------

  // What turns a thread's sums into results.
  struct Finish {
    const float* scales;  // of tokens, in shared memory
    float features[2];    // scales of the thread's two features
    float biases[2];
  };

  // Makes of sums of codes the bits of floats in units of a token's values, to which the products
  // of outlier columns add. In place: there are no registers for both.
  __device__ __forceinline__ void scale_tokens(const Int8Position& at, const Finish& finish,
                                               int (&sums)[kSums]) const {
#pragma unroll
    for (int j = 0; j < kSums / 4; ++j) {
      const float2 scale = *reinterpret_cast<const float2*>(finish.scales + 8 * j + 2 * at.t);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        scale_in_place(sums[4 * j + e], e % 2 == 0 ? scale.x : scale.y);
      }
    }
  }

  // Sums of codes, or, with outlier columns, the bits of what became of them. Some tokens at a time
  // lie in shared memory as [token][64 features], from where whole rows go out.
  template <bool kOutliers>
  __device__ __forceinline__ void store(const Int8Job& job, const Int8Position& at,
                                        const Finish& finish, const int (&sums)[kSums]) const {
    constexpr int kWidth = 64 * int{sizeof(T)};  // bytes
    constexpr int kRows = Shape::kStaging / kWidth;
    static_assert(kTokens % kRows == 0);
#pragma unroll
    for (int row = 0; row < kTokens; row += kRows) {
      if (row > 0) named_barrier(Tile::kGroupBarrier + at.group, kWarpgroup);
      stage_rows<kRows>(at, [&](int unit, int e) {
        const int j = row / 8 + unit;
        const float feature = finish.features[e / 2];
        const float bias = finish.biases[e / 2];
        if constexpr (kOutliers) {
          return __fmaf_rn(__int_as_float(sums[4 * j + e]), __fmul_rn(feature, 1.0f / kInt8Max),
                           bias);
        } else {
          const float2 scale = *reinterpret_cast<const float2*>(finish.scales + 8 * j + 2 * at.t);
          return __fmaf_rn(__int2float_rn(sums[4 * j + e]),
                           __fmul_rn(feature, e % 2 == 0 ? scale.x : scale.y), bias);
        }
      });
      named_barrier(Tile::kGroupBarrier + at.group, kWarpgroup);
      store_rows<kRows>(job, at, row);
    }
    // The tokens' place, and the scales, are free only when all have read them.
    named_barrier(Tile::kGroupBarrier + at.group, kWarpgroup);
  }

  __device__ __forceinline__ char* staging(const Int8Position& at) const {
    return tile.shared + Shape::kStagingAt + at.group * Shape::kStaging;
  }

  // Brings value(u, e), of tokens 8 u + 2 t + e % 2 and feature g + 8 (e / 2), to shared memory.
  template <int kRows, class Value>
  __device__ __forceinline__ void stage_rows(const Int8Position& at, const Value& value) const {
    if constexpr (sizeof(T) == 2) {
      const int matrix = static_cast<int>(threadIdx.x) % kWarp / 8;
#pragma unroll
      for (int u = 0; u < kRows / 8; u += 2) {
        const uint32_t words[4] = {pack_pair<T>(value(u, 0), value(u, 1)),
                                   pack_pair<T>(value(u, 2), value(u, 3)),
                                   pack_pair<T>(value(u + 1, 0), value(u + 1, 1)),
                                   pack_pair<T>(value(u + 1, 2), value(u + 1, 3))};
        const int row = 8 * (u + matrix / 2) + static_cast<int>(threadIdx.x) % 8;
        store_transposed(shared_address(staging(at)) + swizzled(row, 2 * at.warp + matrix % 2),
                         words);
      }
    } else {
      float* const to = reinterpret_cast<float*>(staging(at));
#pragma unroll
      for (int u = 0; u < kRows / 8; ++u) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = 8 * u + 2 * at.t + e % 2;
          to[row * 64 + spread(row, 16 * at.warp + at.g + e / 2 * 8)] = value(u, e);
        }
      }
    }
  }

  __device__ __forceinline__ static const char* staged(const char* staging, int row, int pack) {
    if constexpr (sizeof(T) == 2) {
      return staging + swizzled(row, pack);
    } else {
      return staging + 4 * (row * 64 + spread(row, pack * kPackSize<T>));
    }
  }

  template <int kRows>
  __device__ __forceinline__ void store_rows(const Int8Job& job, const Int8Position& at,
                                             int first) const {
    constexpr int kPack = kPackSize<T>;
    constexpr int kPacks = 64 / kPack;  // of a token
#pragma unroll
    for (int i = 0; i < kRows * kPacks / kWarpgroup; ++i) {
      const int place = i * kWarpgroup + at.thread;
      const int row = place / kPacks;
      const int pack = place % kPacks;
      const int64_t token = job.token + first + row;
      const int64_t feature = job.feature + 64 * at.group + pack * kPack;
      if (token >= tile.task.args.m || feature >= tile.task.args.n) continue;
      store_pack(static_cast<T*>(tile.task.args.out) + token * tile.task.args.n + feature,
                 *reinterpret_cast<const Pack<T, kPack>*>(staged(staging(at), row, pack)),
                 tile.task.args.n - feature, tile.task.aligned);
    }
  }

  // Where a 32-bit number of a token lies among those of 64 features: tokens 2 t, t = 0 to 3, in
  // different banks; eight features stay together.
  __device__ __forceinline__ static int spread(int token, int feature) {
    return feature ^ ((token / 2 & 3) << 3);
  }

  // ---- Results of tiles whose terms are shared -----------------------------------------------

  // The share of the results that a thread finishes: units of eight features, always the same, of
  // one token, every kStep-th.
  static constexpr int kUnits = Shape::kFeatures / 8;  // of a token
  struct Share {
    int first_unit;
    int64_t feature;
    float stats[8];
    float biases[8];
    float row_stat;  // of the first unit
  };

  __device__ __forceinline__ float row_stat(const Int8Job& job, int unit) const {
    const int64_t token = job.token + unit / kUnits;
    return unit / kUnits < kTokens && token < tile.task.args.m ? tile.task.args.row_stats[token]
                                                               : 0.0f;
  }

  // Reads what finishes the thread's share, long before it is needed.
  __device__ __forceinline__ Share share(const Int8Job& job, int maker) const {
    static_assert(Shape::kMakers % kUnits == 0);
    const Int8ScaledMatmul& args = tile.task.args;
    Share share;
    share.first_unit = tile.rank * Shape::kMakers + maker;
    share.feature = job.feature + share.first_unit % kUnits * 8;
    share.row_stat = row_stat(job, share.first_unit);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool there = share.feature + i < args.n;
      share.stats[i] = there ? args.col_stats[share.feature + i] : 0.0f;
      share.biases[i] = there ? bias_at(args.bias, args.bias_dtype, share.feature + i) : 0.0f;
    }
    return share;
  }

  // Where in shared memory, which holds no stages any more, the sums of a tile lie, and behind them
  // those of the outlier columns.
  static constexpr int kAddedAt = kTokens * Shape::kFeatures;
  __device__ __forceinline__ static int place_of(int token, int feature) {
    return (feature / 64 * kTokens + token) * 64 + spread(token, feature % 64);
  }

  template <class Sum>
  __device__ __forceinline__ void keep(const Int8Position& at, const Sum (&sums)[kSums],
                                       int first) const {
    Sum* const to = reinterpret_cast<Sum*>(tile.shared) + first;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      to[place_of(i / 4 * 8 + 2 * at.t + i % 2,
                  64 * at.group + 16 * at.warp + at.g + i % 4 / 2 * 8)] = sums[i];
    }
  }

  // Every block adds the sums that all have kept, for its share of the results.
  __device__ __forceinline__ void exchange(const Int8Job& job, const Share& share,
                                           bool outliers) const {
    const Int8ScaledMatmul& args = tile.task.args;
    cluster_barrier();
    if (share.feature >= args.n) return;
    const uint32_t here = shared_address(tile.shared);
    float next_stat = share.row_stat;
    const int step = tile.task.splits * Shape::kMakers;
    for (int unit = share.first_unit; unit < kTokens * kUnits; unit += step) {
      const int row = unit / kUnits;
      const int64_t token = job.token + row;
      if (token >= args.m) return;
      const uint32_t place = here + 4 * place_of(row, unit % kUnits * 8);
      const float row_scale = __fmul_rn(next_stat, kInt8Product);
      next_stat = row_stat(job, unit + step);
      float results[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) results[i] = share.biases[i];
      uint32_t totals[8] = {};
#pragma unroll 4
      for (int s = 0; s < tile.task.splits; ++s) {
        const EightWords part = load_eight(address_in_block(place, s));
#pragma unroll
        for (int i = 0; i < 8; ++i) totals[i] += part.words[i];
      }
      if (outliers) {
        float products[8] = {};
#pragma unroll 4
        for (int s = 0; s < tile.task.splits; ++s) {
          const EightWords part = load_eight(address_in_block(place + 4 * kAddedAt, s));
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            products[i] = __fadd_rn(products[i], bits_float(part.words[i]));
          }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          results[i] =
              __fmaf_rn(products[i], __fmul_rn(share.stats[i], 1.0f / kInt8Max), results[i]);
        }
      }
      Pack<T, kPackSize<T>> packs[8 / kPackSize<T>];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        packs[i / kPackSize<T>].values[i % kPackSize<T>] =
            narrow<T>(__fmaf_rn(__int2float_rn(static_cast<int>(totals[i])),
                                __fmul_rn(share.stats[i], row_scale), results[i]));
      }
#pragma unroll
      for (int p = 0; p < 8 / kPackSize<T>; ++p) {
        const int64_t from = share.feature + p * kPackSize<T>;
        store_pack(static_cast<T*>(args.out) + token * args.n + from, packs[p], args.n - from,
                   tile.task.aligned);
      }
    }
  }
};

}  // namespace bnb::gpu

#endif  // BNB_HOPPER
