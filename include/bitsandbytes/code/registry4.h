// The list of 4-bit codes. One line here gives a code its kernels and its name in the ops.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/code/fp4.h"
#include "bitsandbytes/code/nf4.h"

#define BNB_CODES4(X) \
  X(Nf4)              \
  X(Fp4)

namespace bnb {

enum class Code4 : int {
#define BNB_ENUMERATE(code) k##code,
  BNB_CODES4(BNB_ENUMERATE)
#undef BNB_ENUMERATE
      kCount
};

inline constexpr int kCode4Count = static_cast<int>(Code4::kCount);

struct Code4Info {
  const char* name;
  Code4Table levels;
};

inline constexpr Code4Info kCodes4[] = {
#define BNB_DESCRIBE(code) {code::kName, code::make_levels()},
    BNB_CODES4(BNB_DESCRIBE)
#undef BNB_DESCRIBE
};

#define BNB_CHECK_BUCKETS(code) static_assert(buckets4_hold_one_threshold<code>());
BNB_CODES4(BNB_CHECK_BUCKETS)
#undef BNB_CHECK_BUCKETS

}  // namespace bnb
