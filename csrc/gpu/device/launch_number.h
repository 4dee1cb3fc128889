// A number for every launch.
// SPDX-License-Identifier: MIT
#pragma once

#include <atomic>
#include <random>

namespace bnb::gpu {

// A number that flags and counters of other launches do not hold, nor, but for a chance of 2^-56,
// memory that has been something else: they need not be set before. Its lowest byte is zero.
inline unsigned long long next_launch_number() {
  static std::atomic<unsigned long long> launches = [] {
    std::random_device random;
    return static_cast<unsigned long long>(random()) << 32 | random();
  }();
  return ++launches << 8;
}

}  // namespace bnb::gpu
