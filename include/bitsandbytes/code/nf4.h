// NormalFloat4: levels at quantiles of the normal distribution (Dettmers et al. 2023,
// arXiv:2305.14314, section 3 and appendix E).
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/code/code4.h"

namespace bnb {

struct Nf4 {
  static constexpr const char* kName = "nf4";
  static constexpr int kThresholds = 15;
  static constexpr bool kSignBit = false;

  BNB_HD static constexpr Code4Table make_levels() {
    return {{-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
             -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
             0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
             0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f}};
  }

  // The f32 midpoints of neighbouring levels.
  BNB_HD static constexpr Table<float, kThresholds> make_thresholds() {
    const Code4Table levels = make_levels();
    Table<float, kThresholds> t{};
    for (int k = 0; k < kThresholds; ++k) t[k] = (levels[k] + levels[k + 1]) * 0.5f;
    return t;
  }

  template <class Int>
  BNB_HD static constexpr Int from_rank(Int rank) {
    return rank;
  }
};

}  // namespace bnb
