// The list of optimizers. One line here gives a rule its CPU and GPU instantiations, its name in
// the ops and its place in `bitsandbytes._C.optimizers()`.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/optim/adagrad.h"
#include "bitsandbytes/optim/adam.h"
#include "bitsandbytes/optim/lion.h"
#include "bitsandbytes/optim/momentum.h"
#include "bitsandbytes/optim/rmsprop.h"

#define BNB_OPTIMIZERS(X) \
  X(Adam)                 \
  X(Lion)                 \
  X(Momentum)             \
  X(RMSprop)              \
  X(Adagrad)

namespace bnb {

enum class Rule : int {
#define BNB_ENUMERATE(rule) k##rule,
  BNB_OPTIMIZERS(BNB_ENUMERATE)
#undef BNB_ENUMERATE
      kCount
};

inline constexpr int kRuleCount = static_cast<int>(Rule::kCount);

struct RuleInfo {
  const char* name;
  int states;
};

inline constexpr RuleInfo kRules[] = {
#define BNB_DESCRIBE(rule) {rule::kName, rule::kStates},
    BNB_OPTIMIZERS(BNB_DESCRIBE)
#undef BNB_DESCRIBE
};

}  // namespace bnb
