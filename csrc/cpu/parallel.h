// How the work of a call is cut for threads.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#include "bitsandbytes/cpu.h"

namespace bnb::cpu {

// Elements a thread should get at least, so that waking it pays.
inline constexpr int64_t kGrain = 32768;

// Splits [0, count) over threads; `elements` is the work behind one index.
template <class Body>
void parallel(const Threads& threads, int64_t count, int64_t elements, const Body& body) {
  if (count == 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
  threads.parallel_for(count, grain, std::cref(body));
}

}  // namespace bnb::cpu
