// How blockwise steps decode and encode states with the dynamic maps: from tables that leave room
// for more than one block of threads on a multiprocessor, or from tables that take most of its
// shared memory and the fewest instructions.
//
// Both ways have the same members: `Tables`, static shared memory, with fill(); and, for a thread,
// level(), grow(), is_usual() and encode() of the elements of a lane, and encode_any() for blocks
// that are not usual.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/code/lowered8.h"
#include "gpu/device/code8.cuh"
#include "gpu/optimizer/list.cuh"
#if BNB_BULK_COPIES
#include "gpu/device/tensor_copy.cuh"
#endif

namespace bnb::gpu {

// Whether state k of a rule has the signed map.
__host__ __device__ constexpr bool is_signed_state(int states, int k) {
  return tensor_of_state(states, k) == 0;
}

// Any device.
template <class R>
class SmallTables {
 public:
  static constexpr int kResident = 2;  // blocks of threads on a multiprocessor
  static constexpr int kThreads = R::kStates < 3 ? 384 : 256;
  // Constants stay in shared memory, which leaves registers to the elements.
  template <class S>
  using Constants = const S&;

  struct Tables {
    Code8<true> codes[state_tensors(R::kStates)];
    EncodeTables<true> buckets;

    // Called by all threads of the block, which must be synchronised before tables are used.
    __device__ void fill(const OptimizerStep& args) {
#pragma unroll
      for (int k = 0; k < state_tensors(R::kStates); ++k) codes[k].fill(args.qmap[k], buckets);
    }
  };

  __device__ __forceinline__ explicit SmallTables(const Tables& tables) : tables_(tables) {}

  __device__ __forceinline__ float level(int k, const uint32_t* words, int i) const {
    return tables_.codes[tensor_of_state(R::kStates, k)].level(words, i);
  }

  // Takes a state of a lane into what tells the largest; of this, the bits that count.
  __device__ __forceinline__ static void grow(int, float& largest, float x) {
    largest = absmax_step(largest, x);
  }
  __device__ __forceinline__ static uint32_t counted_bits(int, float largest) {
    return magnitude_bits(largest);
  }

  // Whether encode() serves a block with that absmax.
  __device__ __forceinline__ static bool is_usual(uint32_t absmax_bits) {
    return absmax_bits == 0 || has_quick_reciprocal(absmax_bits);
  }

  // `absmax`: is_usual() and not zero. In a block of zeros the codes that it makes with 1 are
  // wrong.
  template <int kCount>
  __device__ __forceinline__ void encode(int k, const float (&x)[kCount], float absmax,
                                         uint32_t (&words)[kCount / 4]) const {
    Code8<true>::encode_dynamic(is_signed_state(R::kStates, k), tables_.buckets, x,
                                quick_reciprocal(absmax), words);
  }

  // The same for any block.
  template <int kCount>
  __device__ __forceinline__ void encode_any(int k, const float (&x)[kCount], float absmax,
                                             uint32_t (&words)[kCount / 4]) const {
    tables_.codes[tensor_of_state(R::kStates, k)].encode(tables_.buckets, x, absmax, words);
  }

 private:
  const Tables& tables_;
};

#if BNB_LANE_TABLES

namespace {

__device__ const constexpr auto kLoweredPositive = LoweredSigned8::make_buckets(false);
__device__ const constexpr auto kLoweredNegative = LoweredSigned8::make_buckets(true);
__device__ const constexpr auto kLoweredUnsigned = LoweredUnsigned8::make_buckets();

}  // namespace

#endif

// Bytes rounded up to cache lines: copies that do not start at one take more turns.
constexpr int whole_lines(int bytes) { return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine; }

// Where everything lies in the dynamic shared memory of LaneTables: behind `before` bytes levels,
// at a multiple of kSecondByte, and behind these
//
//     positive buckets | room | negative buckets | room
//
// in which the second ones follow the first at the distance that the sign bit makes.
struct LaneLayout {
  static constexpr int kLevelStride = 256;  // bytes from one code to the next: two maps, 32 lanes
  static constexpr int kPositive = kCodeLevels * kLevelStride;
  static constexpr int kNegative = kPositive + LoweredSigned8::kSignBit * 4;
  static constexpr int kSignedBytes = whole_lines(LoweredSigned8::kEntries * 4);
  static constexpr int kUnsignedBytes = whole_lines(LoweredUnsigned8::kEntries * 4);
  static constexpr int kEnd = kNegative + kSignedBytes;

  // Bytes that levels may lie behind the beginning of shared memory.
  static constexpr int levels_at_most(int before) {
    return before > kSecondByte ? before : kSecondByte;
  }

  // Begin of part i of those of `part` bytes that the rooms are cut into, behind levels.
  __host__ __device__ static constexpr int room(int part, int i) {
    const int begin = kPositive + kSignedBytes;
    const int fit = (kNegative - begin) / part;
    return i < fit ? begin + i * part : kEnd + (i - fit) * part;
  }

  // Bytes from levels on, with so many parts.
  static constexpr int bytes(int part, int parts) {
    const int end = room(part, parts - 1) + part;
    return end > kEnd ? end : kEnd;
  }
};

// Whether the current device has the memory, and what was built has `kernel` for it.
inline bool has_lane_tables(const void* kernel) {
#if BNB_BULK_COPIES
  return is_hopper() && is_built(kernel);
#else
  return kernel != nullptr && kLaneTables;
#endif
}

// Devices with some 200 KB of shared memory for one block of threads. Levels lie there once per
// lane, each lane's in a bank of its own, so that 32 lookups are one access; the code is the second
// byte of an address, put there in one instruction. Numbers are encoded with lowered exponents.
template <class R>
class LaneTables {
 public:
  static constexpr int kResident = 1;
  // As many registers as the elements of a lane need.
  static constexpr int kThreads = R::kStates < 3 ? 640 : 512;
  template <class S>
  using Constants = const S;

  struct NoBuckets {
    __device__ void fill(CodeKind) {}
  };

  struct Tables {
    Code8<true, NoBuckets> codes[state_tensors(R::kStates)];

    __device__ void fill(const OptimizerStep& args) {
      NoBuckets none;
#pragma unroll
      for (int k = 0; k < state_tensors(R::kStates); ++k) codes[k].fill(args.qmap[k], none);
    }
  };

#if BNB_LANE_TABLES

  // `before`: shared memory of LaneLayout::kUnsignedBytes at least, in front of levels.
  __device__ __forceinline__ LaneTables(const Tables& tables, char* before, char* levels)
      : tables_(tables),
        lane_(shared_pointer(levels + static_cast<int>(threadIdx.x) % kWarp * 4)),
        positive_(shared_pointer(levels + LaneLayout::kPositive)),
        unsigned_(shared_pointer(before)) {}

  // Called by all threads of the block, after a barrier behind Tables::fill(), and before one.
  __device__ void fill(char* before, char* levels) const {
    const int threads = static_cast<int>(blockDim.x);
    for (int i = static_cast<int>(threadIdx.x); i < kCodeLevels * 2 * kWarp; i += threads) {
      const int tensor = i / kWarp % 2;
      if (tensor < state_tensors(R::kStates)) {
        reinterpret_cast<float*>(levels)[i] = tables_.codes[tensor].levels[i / (2 * kWarp)];
      }
    }
    const auto copy = [](char* to, const auto& from, int count) {
      copy_table(reinterpret_cast<uint32_t*>(to), from.values, count);
    };
    copy(levels + LaneLayout::kPositive, kLoweredPositive, LoweredSigned8::kEntries);
    copy(levels + LaneLayout::kNegative, kLoweredNegative, LoweredSigned8::kEntries);
    copy(before, kLoweredUnsigned, LoweredUnsigned8::kEntries);
  }

  __device__ __forceinline__ float level(int k, const uint32_t* words, int i) const {
    constexpr int kSecondMap = 4 * kWarp;
    const SharedPointer at = with_second_byte(lane_, words[i / 4], i % 4);
    return bits_float(shared_word(is_signed_state(R::kStates, k) ? at : at + kSecondMap));
  }

  // States without a sign count by all their bits: a negative one is more than any other.
  __device__ __forceinline__ static void grow(int k, float& largest, float x) {
    if (is_signed_state(R::kStates, k)) {
      largest = absmax_step(largest, x);
    } else {
      largest = bits_float(max(float_bits(largest), float_bits(x)));
    }
  }
  __device__ __forceinline__ static uint32_t counted_bits(int k, float largest) {
    return is_signed_state(R::kStates, k) ? magnitude_bits(largest) : float_bits(largest);
  }

  __device__ __forceinline__ static bool is_usual(uint32_t absmax_bits) {
    return absmax_bits == 0 || can_be_lowered(absmax_bits);
  }

  template <int kCount>
  __device__ __forceinline__ void encode(int k, const float (&x)[kCount], float absmax,
                                         uint32_t (&words)[kCount / 4]) const {
    const float inverse = __fmul_rn(quick_reciprocal(absmax), kLoweringFactor);
#pragma unroll
    for (int w = 0; w < kCount / 4; ++w) {
      uint32_t bits[4];
      uint32_t shifted[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        bits[i] = float_bits(__fmul_rn(x[4 * w + i], inverse));
        shifted[i] =
            is_signed_state(R::kStates, k) ? encode_signed(bits[i]) : encode_unsigned(bits[i]);
      }
      const uint32_t top = is_signed_state(R::kStates, k) ? 0x0073 : 0x0062;
      words[w] = byte_permute(byte_permute(shifted[0], shifted[1], top),
                              byte_permute(shifted[2], shifted[3], top), 0x5410);
      if (is_signed_state(R::kStates, k)) {
        words[w] ^= byte_permute(byte_signs(bits[0], bits[1], 0x0073),
                                 byte_signs(bits[2], bits[3], 0x0073), 0x5410);
      }
    }
  }

  template <int kCount>
  __device__ __forceinline__ void encode_any(int k, const float (&x)[kCount], float absmax,
                                             uint32_t (&words)[kCount / 4]) const {
    const auto& code = tables_.codes[tensor_of_state(R::kStates, k)];
    if (absmax == 0.0f) {
#pragma unroll
      for (int w = 0; w < kCount / 4; ++w) words[w] = 0;
    } else if (code.kind != expected(k) || !can_be_lowered(float_bits(absmax))) {
      code.encode_by_search(x, __frcp_rn(absmax), words);
    } else if (is_signed_state(R::kStates, k)) {
      encode(k, x, absmax, words);
    } else {
      float positive[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) positive[i] = x[i] > 0.0f ? x[i] : 0.0f;
      encode(k, positive, absmax, words);
    }
  }

 private:
  __device__ static constexpr CodeKind expected(int k) {
    return is_signed_state(R::kStates, k) ? CodeKind::kSignedDynamic8 : CodeKind::kUnsignedDynamic8;
  }

  __device__ __forceinline__ uint32_t encode_signed(uint32_t bits) const {
    const uint32_t bucket = bits >> LoweredSigned8::Layout::kShift;
    return LoweredSigned8::encode_shifted(shared_word(positive_ + bucket * 4), bits);
  }
  __device__ __forceinline__ uint32_t encode_unsigned(uint32_t bits) const {
    const uint32_t bucket = bits >> LoweredUnsigned8::Layout::kShift;
    return LoweredUnsigned8::encode_shifted(shared_word(unsigned_ + bucket * 4), bits);
  }

  const Tables& tables_;
  SharedPointer lane_;      // levels of this lane
  SharedPointer positive_;  // buckets
  SharedPointer unsigned_;

#endif
};

}  // namespace bnb::gpu
