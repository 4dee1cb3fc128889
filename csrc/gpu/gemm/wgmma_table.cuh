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

// Levels times a multiple as integers of 16 bits, with kMiddle for zero: for known levels, which
// are at most 1. In the table of level_multiple(), nf4 has 0.017 and fp4 0.
struct IntegerLevel {
  static constexpr float kMiddle = 32768.0f;
};
template <>
constexpr float level_multiple<IntegerLevel>(Code4 code) {
  return code == Code4::kFp4 ? 170.0f * 192.0f  // whose levels are multiples of 1/192
                             : 32767.0f;
}

#if BNB_HOPPER

template <>
__device__ __forceinline__ uint32_t pair_of_levels<IntegerLevel>(const Levels4& levels, int byte,
                                                                 float multiple) {
  const auto integer = [&](int code) {
    return static_cast<uint32_t>(
        __float2int_rn(__fmaf_rn(levels[code], multiple, IntegerLevel::kMiddle)));
  };
  return integer(byte >> 4) | integer(byte & 15) << 16;
}

// The halves of a pair as floats.
template <class T>
__device__ __forceinline__ float2 widen_pair(uint32_t pair) {
  if constexpr (std::is_same_v<T, IntegerLevel>) {
    // As the last bits of floats from 2^23 on.
    constexpr float kFirst = 8388608.0f;
    const uint32_t bits = float_bits(kFirst);
    return {
        __fadd_rn(bits_float(__byte_perm(pair, bits, 0x7410)), -kFirst - IntegerLevel::kMiddle),
        __fadd_rn(bits_float(__byte_perm(pair, bits, 0x7432)), -kFirst - IntegerLevel::kMiddle)};
  } else {
    static_assert(std::is_same_v<T, Half>);
    return {half_to_float(static_cast<uint16_t>(pair & 0xffffu)),
            half_to_float(static_cast<uint16_t>(pair >> 16))};
  }
}

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

// kAt: the table's address. byte: 0 to 3, which may differ among lanes.
template <int kAt>
__device__ __forceinline__ uint32_t look_up_pair(uint32_t word, uint32_t byte, uint32_t lane) {
  const uint32_t at = __byte_perm(word, 4 * lane, 0x7604u | byte << 4);
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
    const uint32_t word = byte < 4 ? words.x : words.y;
    pairs[i] = look_up_pair<kAt>(word, static_cast<uint32_t>(byte % 4), lane);
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
