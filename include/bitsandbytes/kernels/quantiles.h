// Quantiles of a whole tensor: which element each one is, how floats become integers of the same
// order, arguments, and the launcher for the GPU.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "bitsandbytes/kernels/common.h"
#include "bitsandbytes/numeric.h"

namespace bnb {

inline constexpr int kQuantiles = 256;

struct QuantileRanks {
  uint64_t values[kQuantiles];  // ascending
};

// Quantile k is the element of rank round((offset + k (1 - 2 offset) / 255) (n - 1)) in ascending
// order, halves away from zero; n > 0, 0 <= offset <= 0.5.
inline QuantileRanks quantile_ranks(int64_t n, double offset) {
  QuantileRanks ranks{};
  const double last = static_cast<double>(n - 1);
  for (int k = 0; k < kQuantiles; ++k) {
    const double share = offset + k * (1.0 - 2.0 * offset) / (kQuantiles - 1);
    ranks.values[k] = static_cast<uint64_t>(std::min(std::round(share * last), last));
  }
  return ranks;
}

// Integers in the order of the numbers of T, -0 before 0 and every NaN last. NaN has the one key of
// all ones.
template <class T>
struct OrderKey {
  static constexpr int kBits = 8 * static_cast<int>(sizeof(T));
  static constexpr uint32_t kSign = 1u << (kBits - 1);
  static constexpr uint32_t kAll = kSign | (kSign - 1);

  // From the bits of a number, in the lowest kBits.
  BNB_HD static constexpr uint32_t of_bits(uint32_t bits) {
    // Without a branch: signs are hard to foretell.
    const uint32_t negative = 0u - (bits >> (kBits - 1));
    const uint32_t nan = 0u - static_cast<uint32_t>((bits & ~kSign) > kBitsOfInfinity);
    return ((bits ^ (negative | kSign)) | nan) & kAll;
  }
  BNB_HD static constexpr float to_number(uint32_t key) {
    if (key == kAll) return bits_float(0x7fc00000u);
    const uint32_t bits = (key & kSign) != 0 ? key ^ kSign : key ^ kAll;
    if constexpr (kBits == 32) {
      return bits_float(bits);
    } else {
      return to_float(T{static_cast<uint16_t>(bits)});
    }
  }

 private:
  static constexpr uint32_t kBitsOfInfinity = [] {
    if constexpr (kBits == 32) {
      return float_bits(kInfinity);
    } else {
      return uint32_t{from_float<T>(kInfinity).bits};
    }
  }();
};

struct EstimateQuantiles {
  DType dtype;
  const void* a;  // [n] of dtype
  float* out;     // [256]
  int64_t n;      // above 0
  double offset;  // 0 to 0.5
};

namespace gpu {

// Bytes of device memory that estimate_quantiles() wants, aligned to 8, in any state.
int64_t quantile_workspace_bytes(DType dtype);

void estimate_quantiles(const EstimateQuantiles& args, void* workspace, Stream stream);

}  // namespace gpu
}  // namespace bnb
