// Exact quantiles of a whole tensor on the CPU, by counting leading digits of order keys.
// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "bitsandbytes/kernels/quantiles.h"

namespace bnb::cpu {

// Finds all quantiles in a few passes. A pass counts one more digit of the keys of those elements
// that share their leading digits with some quantile, and thereby finds that digit of every
// quantile:
//
//     for each pass: count(pass, piece) for every piece, in parallel; then locate(pass)
//
// The first digit has 16 bits, which is all of a 16-bit number.
class QuantileSearch {
 public:
  QuantileSearch(const EstimateQuantiles& args, int64_t pieces);

  int64_t pieces() const { return pieces_; }  // those asked for, or more
  int passes() const { return args_.dtype == DType::kFloat32 ? 3 : 1; }
  void count(int pass, int64_t piece);
  void locate(int pass);  // the last one writes args.out

 private:
  static constexpr int kFirstBits = 16;
  static constexpr int kBits = 8;           // of the other digits
  static constexpr int kBins = 1 << kBits;  // of a group
  // The group of elements that are near no quantile. They are counted, so that no branch depends on
  // them, but nobody looks.
  static constexpr uint16_t kNone = kQuantiles;
  static constexpr int64_t kCounts = (kQuantiles + 1) * kBins;  // of a piece
  static_assert(kCounts >= 1 << kFirstBits);

  // Quantiles that share their digits so far are a group, named by its first member.
  struct Quantile {
    uint64_t rank;  // among the elements of the group
    uint32_t key;   // digits so far
    uint16_t group;
  };

  template <class T>
  void count_keys(int pass, int64_t piece);

  EstimateQuantiles args_;
  int64_t pieces_;
  std::array<Quantile, kQuantiles> quantiles_;
  std::vector<uint32_t> counts_;  // [pieces, kCounts]: of bins, or of groups and their bins
  // Groups by their digits: [2^16] after the first pass, [groups, kBins] after the second.
  std::vector<uint16_t> groups_[2];
};

}  // namespace bnb::cpu
