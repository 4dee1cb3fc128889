// One call of blockwise quantization on the CPU: what is prepared once for all of its blocks.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"

namespace bnb::cpu {

class Quantizer {
 public:
  explicit Quantizer(const QuantizeBlockwise& args);
  Quantizer(const Quantizer&) = delete;
  Quantizer& operator=(const Quantizer&) = delete;

  // Quantizes the blocks of a half-open range; ranges may run in parallel.
  void run(int64_t first_block, int64_t last_block) const;

 private:
  QuantizeBlockwise args_;
  const Kernels& kernels_;
  bool reordered_;
  float levels_[kCodeLevels];   // ascending
  uint8_t codes_[kCodeLevels];  // of them, in the caller's table
  Code code_;
  SearchedCode searched_;
};

}  // namespace bnb::cpu
