// The list of optimizers. One line here gives a rule its CPU and GPU instantiations, its name in
// the ops and its place in `bitsandbytes._C.optimizers()`.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/optim/adagrad.h"
#include "bitsandbytes/optim/adam.h"
#include "bitsandbytes/optim/ademamix.h"
#include "bitsandbytes/optim/lion.h"
#include "bitsandbytes/optim/momentum.h"
#include "bitsandbytes/optim/rmsprop.h"

#define BNB_OPTIMIZERS(X) \
  X(Adam)                 \
  X(Lion)                 \
  X(Momentum)             \
  X(RMSprop)              \
  X(Adagrad)              \
  X(AdEMAMix)

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

// Names of rules that differ from another one only in what callers bound: LAMB is Adam and LARS is
// momentum with a bound on the norm of the update.
struct RuleAlias {
  const char* name;
  Rule rule;
};

inline constexpr RuleAlias kRuleAliases[] = {{"lamb", Rule::kAdam}, {"lars", Rule::kMomentum}};

// Tensors that hold `states` numbers per element, and where state k lies among them: three states
// share two tensors, the first of which has two rows.
BNB_HD constexpr int state_tensors(int states) { return states == 1 ? 1 : 2; }
BNB_HD constexpr int state_rows(int states, int tensor) {
  return states == 3 && tensor == 0 ? 2 : 1;
}
BNB_HD constexpr int tensor_of_state(int states, int k) { return states == 3 ? k / 2 : k; }
BNB_HD constexpr int row_of_state(int states, int k) { return states == 3 && k == 1 ? 1 : 0; }

}  // namespace bnb
