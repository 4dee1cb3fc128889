// Prepares tables: sorts levels that are not ascending, and gives the results their codes back;
// makes buckets for those that are none of the dynamic maps.
// SPDX-License-Identifier: MIT
#include "cpu/quantize.h"

#include <algorithm>
#include <numeric>

namespace bnb::cpu {
namespace {

// Elements from which filling the buckets takes less time than they save.
constexpr int64_t kWorthBuckets = 1 << 13;

}  // namespace

Quantizer::Quantizer(const QuantizeBlockwise& args) : args_(args), kernels_(kernels()) {
  const float* levels = args.code;
  const auto before = [](float a, float b) { return level_before(a, b); };
  reordered_ = !std::is_sorted(levels, levels + kCodeLevels, before);
  if (reordered_) {
    std::iota(codes_, codes_ + kCodeLevels, uint8_t{0});
    std::stable_sort(codes_, codes_ + kCodeLevels,
                     [&](uint8_t a, uint8_t b) { return before(levels[a], levels[b]); });
    for (int i = 0; i < kCodeLevels; ++i) levels_[i] = levels[codes_[i]];
    args_.code = levels_;
  }
  code_ = prepare_code(args_.code);
  // The dynamic maps' own encode knows numbers up to 1 only.
  if (args_.absmax == nullptr) code_.kind = CodeKind::kTable;
  if (code_.kind == CodeKind::kTable) {
    prepare_search(args_.code, args_.n >= kWorthBuckets, args_.absmax != nullptr, searched_);
  }
}

void Quantizer::run(int64_t first_block, int64_t last_block) const {
  kernels_.quantize_blockwise(args_, code_, searched_, first_block, last_block);
  if (!reordered_) return;
  uint8_t* const end = args_.out + std::min(last_block * args_.block_size, args_.n);
  for (uint8_t* out = args_.out + first_block * args_.block_size; out < end; ++out) {
    *out = codes_[*out];
  }
}

}  // namespace bnb::cpu
