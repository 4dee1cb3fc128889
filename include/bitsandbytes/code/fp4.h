// FP4: a sign bit, two bits of exponent and one of mantissa, as bitsandbytes fixed them.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/code/code4.h"

namespace bnb {

struct Fp4 {
  static constexpr const char* kName = "fp4";
  static constexpr int kThresholds = 7;
  static constexpr bool kSignBit = true;

  // Twelfths, each rounded to f32.
  BNB_HD static constexpr Code4Table make_levels() {
    const float twelfths[kCode4Sign] = {0.0f, 0.0625f, 8.0f, 12.0f, 4.0f, 6.0f, 2.0f, 3.0f};
    Code4Table levels{};
    for (int i = 0; i < kCode4Sign; ++i) {
      levels[i] = twelfths[i] / 12.0f;
      levels[i + kCode4Sign] = -levels[i];
    }
    return levels;
  }

  // Not the midpoints of the levels to the last bit: the public kernels write them so, and
  // checkpoints come from there.
  BNB_HD static constexpr Table<float, kThresholds> make_thresholds() {
    return {{0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f, 0.4166667f, 0.583333f, 0.8333333f}};
  }

  // Magnitudes ascend in the order of codes 0, 1, 6, 7, 4, 5, 2, 3. Only the lowest three bits
  // change, so several ranks can lie in one integer.
  template <class Int>
  BNB_HD static constexpr Int from_rank(Int rank) {
    return rank ^ ((rank & static_cast<Int>(0x22222222)) << 1);
  }
};

}  // namespace bnb
