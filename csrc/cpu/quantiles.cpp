// Counting and locating, the two halves of every pass over the keys.
// SPDX-License-Identifier: MIT
#include "cpu/quantiles.h"

#include <algorithm>

namespace bnb::cpu {
namespace {

uint32_t bits_of(float x) { return float_bits(x); }
uint32_t bits_of(Half x) { return x.bits; }
uint32_t bits_of(BFloat16 x) { return x.bits; }

}  // namespace

QuantileSearch::QuantileSearch(const EstimateQuantiles& args, int64_t pieces)
    : args_(args),
      // Counts of a piece have 32 bits.
      pieces_(std::max(pieces, (args.n >> 31) + 1)),
      counts_(static_cast<size_t>(pieces_ * kCounts)) {
  const QuantileRanks ranks = quantile_ranks(args.n, args.offset);
  for (int k = 0; k < kQuantiles; ++k) quantiles_[k] = {ranks.values[k], 0, 0};
  groups_[0].assign(size_t{1} << kFirstBits, kNone);
  groups_[1].assign(static_cast<size_t>(kCounts), kNone);
}

template <class T>
void QuantileSearch::count_keys(int pass, int64_t piece) {
  const T* a = static_cast<const T*>(args_.a);
  const int64_t size = (args_.n + pieces_ - 1) / pieces_;
  const int64_t end = std::min(args_.n, (piece + 1) * size);
  uint32_t* const counts = counts_.data() + piece * kCounts;
  const auto for_each_key = [&](const auto& body) {
    for (int64_t i = piece * size; i < end; ++i) body(OrderKey<T>::of_bits(bits_of(a[i])));
  };
  if (pass == 0) {
    constexpr int kShift = OrderKey<T>::kBits - kFirstBits;
    for_each_key([&](uint32_t key) { ++counts[key >> kShift]; });
    return;
  }
  if constexpr (OrderKey<T>::kBits == 32) {
    const uint16_t* const first = groups_[0].data();
    const uint16_t* const second = groups_[1].data();
    if (pass == 1) {
      for_each_key([&](uint32_t key) {
        ++counts[first[key >> 16] * kBins + ((key >> kBits) & (kBins - 1))];
      });
    } else {
      for_each_key([&](uint32_t key) {
        const uint16_t group = second[first[key >> 16] * kBins + ((key >> kBits) & (kBins - 1))];
        ++counts[group * kBins + (key & (kBins - 1))];
      });
    }
  }
}

void QuantileSearch::count(int pass, int64_t piece) {
  switch (args_.dtype) {
    case DType::kFloat16:
      return count_keys<Half>(pass, piece);
    case DType::kBFloat16:
      return count_keys<BFloat16>(pass, piece);
    default:
      return count_keys<float>(pass, piece);
  }
}

void QuantileSearch::locate(int pass) {
  const int bits = pass == 0 ? kFirstBits : kBits;
  const int64_t bins = int64_t{1} << bits;
  int k = 0;
  while (k < kQuantiles) {
    // Elements of the group that lie before a bin, for one bin after the other.
    const uint16_t group = quantiles_[k].group;
    uint64_t before = 0;
    for (int64_t bin = 0; bin < bins; ++bin) {
      const int64_t place = group * bins + bin;
      uint64_t count = 0;
      for (int64_t piece = 0; piece < pieces_; ++piece) {
        count += counts_[static_cast<size_t>(piece * kCounts + place)];
      }
      const auto leader = static_cast<uint16_t>(k);
      while (k < kQuantiles && quantiles_[k].group == group &&
             quantiles_[k].rank < before + count) {
        Quantile& q = quantiles_[k++];
        q = {q.rank - before, (q.key << bits) | static_cast<uint32_t>(bin), leader};
        if (pass < 2) groups_[pass][static_cast<size_t>(place)] = leader;
      }
      before += count;
    }
  }
  if (pass + 1 < passes()) {
    std::fill(counts_.begin(), counts_.end(), 0u);
    return;
  }
  for (int i = 0; i < kQuantiles; ++i) {
    const uint32_t key = quantiles_[i].key;
    args_.out[i] = args_.dtype == DType::kFloat16    ? OrderKey<Half>::to_number(key)
                   : args_.dtype == DType::kBFloat16 ? OrderKey<BFloat16>::to_number(key)
                                                     : OrderKey<float>::to_number(key);
  }
}

}  // namespace bnb::cpu
