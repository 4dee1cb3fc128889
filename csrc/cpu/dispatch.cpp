// Picks the instruction set and holds the tables that all of them share.
// SPDX-License-Identifier: MIT
#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "bitsandbytes/code/dynamic8.h"
#include "cpu/isa/isa.h"
#include "cpu/tables.h"

namespace bnb::cpu {

constexpr CodeTable kSignedLevels = SignedDynamic8::make_levels();
constexpr CodeTable kUnsignedLevels = UnsignedDynamic8::make_levels();
constexpr SignedDynamic8::Buckets kSignedBuckets = SignedDynamic8::make_buckets(false);
constexpr SignedDynamic8::Buckets kSignKeepingBuckets = SignedDynamic8::make_buckets(true);
constexpr UnsignedDynamic8::Buckets kUnsignedBuckets = UnsignedDynamic8::make_buckets();
constexpr BinTables kSignedBins = SignedDynamic8::make_bins();
constexpr BinTables kUnsignedBins = UnsignedDynamic8::make_bins();

Code prepare_code(const float* levels) {
  CodeKind kind = CodeKind::kTable;
  if (std::memcmp(levels, kSignedLevels.values, sizeof(kSignedLevels)) == 0) {
    kind = CodeKind::kSignedDynamic8;
  } else if (std::memcmp(levels, kUnsignedLevels.values, sizeof(kUnsignedLevels)) == 0) {
    kind = CodeKind::kUnsignedDynamic8;
  }
  Code code{levels, kind, {}};
  for (int i = 0; i < kCodeLevels; ++i) {
    const uint32_t bits = float_bits(levels[i]);
    for (int plane = 0; plane < 4; ++plane) {
      code.planes[plane][i] = static_cast<uint8_t>(bits >> (8 * plane));
    }
  }
  return code;
}

void prepare_search(const float* levels, bool buckets, bool bounded, SearchedCode& code) {
  for (int k = 0; k < kCodeThresholds; ++k) {
    code.thresholds[k] = code_threshold(levels[k], levels[k + 1], k);
  }
  const Thresholds8 thresholds{code.thresholds};
  code.front_apart = false;
  code.bounded = bounded;
  for (int k = 0; k < kCodeThresholds; ++k) {
    code.front_apart = code.front_apart || thresholds.is_front(k);
    const float threshold = code.thresholds[k];
    // All numbers from 1 on are then one, and all down from -1.
    const bool inside = is_nan(threshold) || magnitude(threshold) < 1.0f;
    buckets = buckets && (bounded || inside) && (thresholds.is_front(k) || thresholds.ascends(k));
  }
  code.buckets = buckets && thresholds.fill(0, Thresholds8::kBuckets, code.entries);
}

namespace {

// A table is only asked for where it is supported: its file is compiled for its instruction set.
struct Candidate {
  const Kernels* (*table)();
  bool supported;
};

// Widest first.
std::vector<Candidate> candidates() {
  std::vector<Candidate> list;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
  list.push_back({avx512_bf16::kernel_table, avx512 && __builtin_cpu_supports("avx512bf16")});
  list.push_back({avx512::kernel_table, avx512});
  list.push_back({avx2::kernel_table, __builtin_cpu_supports("avx2") &&
                                          __builtin_cpu_supports("fma") &&
                                          __builtin_cpu_supports("f16c")});
#endif
  list.push_back({baseline::kernel_table, true});
  return list;
}

const Kernels* find(const char* name) {
  for (const Candidate& c : candidates()) {
    if (!c.supported) continue;
    const Kernels* table = c.table();
    if (name == nullptr || std::strcmp(table->isa, name) == 0) return table;
  }
  return nullptr;
}

const Kernels* first_choice() {
  const char* name = std::getenv("BNB_CPU_ISA");
  const Kernels* chosen = name != nullptr ? find(name) : nullptr;
  return chosen != nullptr ? chosen : find(nullptr);
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> table{first_choice()};
  return table;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates()) {
    if (c.supported) names.emplace_back(c.table()->isa);
  }
  return names;
}

bool set_isa(const std::string& name) {
  const Kernels* table = find(name.c_str());
  if (table != nullptr) current().store(table, std::memory_order_relaxed);
  return table != nullptr;
}

}  // namespace bnb::cpu
