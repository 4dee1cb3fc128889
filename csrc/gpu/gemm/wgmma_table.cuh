// A table in shared memory that decodes bytes of codes, for the warpgroup kernels of 4-bit
// products. SPDX-License-Identifier: MIT
//
// The entry of a byte is its two weights as 16-bit numbers, levels times a multiple, 32 times: a
// copy for every lane. It lies at 256 times the byte, the lane's copy at 4 times the lane, so that
// an address is made of a byte of codes by one instruction. Other things lie in between, in pieces
// of 128 bytes.
#pragma once

#include "gpu/device/vector_io.cuh"
#include "gpu/device/wgmma.cuh"
#include "gpu/gemm/levels.cuh"

namespace bnb::gpu {

inline constexpr int kPairTableBytes = 256 * 256;
// Where shared memory begins; what is before is the system's.
inline constexpr int kSharedStart = 1024;

BNB_HD constexpr int pair_table_piece(int table, int i) { return table + 128 + 256 * i; }

#if BNB_HOPPER

// By `threads` threads.
template <class T>
__device__ __forceinline__ void fill_pair_table(uint32_t table, const Levels4& levels,
                                                float multiple, int thread, int threads) {
  for (int i = thread; i < 256 * 8; i += threads) {
    const int byte = i / 8;
    const uint32_t pair = pair_of_levels<T>(levels, byte, multiple);
    store_shared4(table + byte * 256 + i % 8 * 16, make_uint4(pair, pair, pair, pair));
  }
}

// kAt: the table's address.
template <int kAt>
__device__ __forceinline__ uint32_t look_up_pair(uint32_t word, int byte, uint32_t lane) {
  const uint32_t at = __byte_perm(word, 4 * lane, 0x7604u | static_cast<uint32_t>(byte) << 4);
  uint32_t pair;
  asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(pair) : "r"(at), "n"(kAt));
  return pair;
}

// The weights of product 0 to 3 of 64 k, from eight bytes each of two rows.
template <int kAt>
__device__ __forceinline__ void look_up_product(const uint2 (&codes)[2], int product, uint32_t lane,
                                                uint32_t (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint2 words = codes[i % 2];
    const int byte = 2 * product + i / 2;
    pairs[i] = look_up_pair<kAt>(byte < 4 ? words.x : words.y, byte % 4, lane);
  }
}

// The same eight bytes of codes of rows `row` and `row` + 8, of block 0 to 3 of 64 k, from rows of
// 128 bytes that begin at `codes`.
__device__ __forceinline__ void read_pair_codes(uint32_t codes, uint32_t row, int block,
                                                uint32_t lane, uint2 (&to)[2]) {
  const uint32_t chunk = (lane % 4 / 2 + 2 * static_cast<uint32_t>(block)) ^ row % 8;
  const uint32_t from = codes + row * 128 + chunk * 16 + lane % 2 * 8;
  to[0] = load_shared2(from);
  to[1] = load_shared2(from + 8 * 128);
}

#endif  // BNB_HOPPER

}  // namespace bnb::gpu
