// A second way to encode the dynamic maps, for processors on which arithmetic and small tables in
// registers beat an access to memory per element.
//
// The thresholds of one binade [2^e, 2^(e+1)) lie on a ruler: the cells of a decade are equally
// wide, those of the next one five times as wide, and the threshold between two decades fits the
// finer ruler too. So one fused multiply-add, with two numbers of the binade, tells the bin between
// two marks of the ruler, and a table the code of the bin:
//
//     y = fma(x, scale[e], offset[e]),  bin = bits(y) >> 16 - bits(128) >> 16,  code = codes[bin]
//
// Bins are numbered by the bits of y, in which they start at multiples of 2^16: so a byte of y is
// the index into the table. There are 128 of width 1 from y = 128 on, 128 of width 2 from 256 on,
// and those of width 4 from 512 on need no table. Rounding leaves an x very near a mark undecided;
// those are encoded the first way (dynamic8.h). All this is in units in which the last threshold,
// to level 1, is just below 1: it fits no ruler.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "bitsandbytes/config.h"
#include "bitsandbytes/numeric.h"

namespace bnb {

struct BinTables {
  static constexpr int kBinades = 32;  // up to [1, 2); all below the first one is zero
  static constexpr int kBins = 256;    // by table
  static constexpr int kOctave = 128;  // bins of one width
  static constexpr int kFraction = 16;
  // Number of the first bin: y = 128.
  static constexpr uint32_t kFirst = float_bits(128.0f) >> kFraction;
  // Bins from kBins on have this bit in common, in y.
  static constexpr uint32_t kUpperBit = 1u << 26;
  // An x less than this from a mark is undecided, in units of the last place of y.
  // make_bin_tables() proves that it is enough.
  static constexpr int kNear = 4;

  // By the lowest five bits of the exponent. Offsets are kNear units too large.
  alignas(64) float scale[kBinades];
  float offset[kBinades];
  alignas(64) uint8_t codes[kBins];
  uint8_t upper;  // bins from kBins on, all in [0.5, 2): code = bin - upper, modulo 256
  float unit;     // x is measured in 1 / unit
  int count;      // of bins, with those that are left out between two widths
  bool valid;     // every mark fits

  static constexpr uint32_t kUndecided = (1u << kFraction) - 2 * kNear;
};

static_assert((float_bits(512.0f) & BinTables::kUpperBit) != 0 &&
              (float_bits(256.0f) & BinTables::kUpperBit) == 0 &&
              (float_bits(128.0f) & BinTables::kUpperBit) == 0);

// True when the bits of y leave open on which side of a mark x lies.
BNB_HD constexpr bool is_undecided(uint32_t y_bits) {
  return (y_bits & BinTables::kUndecided) == 0;
}

namespace detail {

// How far a mark may be off its ruler, in cells: enough to tell that it belongs there.
constexpr double kMarkError = 0x1p-10;

// Thresholds of one binade.
struct Marks {
  double values[128];
  int count;

  constexpr int below(double x) const {
    int n = 0;
    while (n < count && values[n] < x) ++n;
    return n;
  }

  // Distance of the marks of the coarsest ruler that all of them fit, 0 if there is none.
  constexpr double ruler() const {
    const double span = values[count - 1] - values[0];
    double gap = span;
    for (int i = 1; i < count; ++i) {
      const double next = values[i] - values[i - 1];
      gap = next < gap ? next : gap;
    }
    for (int parts = 1; parts <= 8; ++parts) {
      // The width comes from the whole span: a single gap is known less well.
      const double cells = static_cast<int>(span / gap * parts + 0.5);
      bool fits = true;
      for (int i = 1; i < count; ++i) {
        const double place = (values[i] - values[0]) / span * cells;
        const double off = place - static_cast<double>(static_cast<int>(place + 0.5));
        fits = fits && off < kMarkError && off > -kMarkError;
      }
      if (fits) return span / cells;
    }
    return 0.0;
  }
};

}  // namespace detail

// `thresholds`: of |x|, ascending; code = `first` + number of thresholds <= |x|.
constexpr BinTables make_bin_tables(const float* thresholds,  // [count]
                                    int count, int first) {
  BinTables t{};
  t.valid = true;
  // A little more than what moves the last threshold to 1: rounding cannot carry it below.
  t.unit = static_cast<float>((1.0 + 0x1p-22) / thresholds[count - 1]);
  int code = 0;
  int bin = 0;
  for (int i = 0; i < BinTables::kBinades; ++i) {
    const uint32_t exponent = 127 - BinTables::kBinades + 1 + static_cast<uint32_t>(i);
    const double low = bits_float(exponent << 23);
    detail::Marks marks{};
    while (code + marks.count < count &&
           thresholds[code + marks.count] * double{t.unit} < 2 * low) {
      marks.values[marks.count] = thresholds[code + marks.count] * double{t.unit};
      ++marks.count;
    }
    // Binades without a mark share a bin with those in front of them.
    if (marks.count == 0 && low < 1.0 && bin > 0) --bin;
    double start = low;  // of the first bin
    double per_unit = 0.0;
    int bins = 1;
    if (low == 1.0) {
      // The last threshold is its edge, and what is very near it undecided.
      per_unit = 32.0;
      code = count;
    } else if (marks.count > 0) {
      const double width = marks.count > 1 ? marks.ruler() : low;
      t.valid = t.valid && width > 0.0;
      start = marks.values[0];
      while (width > 0.0 && start > low) start -= width;
      per_unit = 1.0 / width;
      bins = 1 + static_cast<int>((2 * low - start) * per_unit);
      // Rounding must not carry a threshold over the edge of a binade.
      t.valid = t.valid && marks.values[0] > low * (1 + 0x1p-21) &&
                marks.values[marks.count - 1] < low * (2 - 0x1p-21);
    }
    // One ruler needs bins of one width.
    if (bin / BinTables::kOctave != (bin + bins - 1) / BinTables::kOctave) {
      bin = (bin / BinTables::kOctave + 1) * BinTables::kOctave;
    }
    const double first_y =
        bits_float((BinTables::kFirst + static_cast<uint32_t>(bin)) << BinTables::kFraction);
    const double bin_width = 1 << (bin / BinTables::kOctave);
    const double unit_of_y = bin_width / (1 << BinTables::kFraction);
    const int slot = static_cast<int>(exponent % BinTables::kBinades);
    t.scale[slot] = static_cast<float>(per_unit * bin_width);
    const double of_start = per_unit > 0.0 ? start * per_unit : -0.5;
    t.offset[slot] =
        static_cast<float>(first_y - of_start * bin_width + BinTables::kNear * unit_of_y);
    for (int k = 0; k < marks.count; ++k) {
      // y of a threshold should be the edge of a bin. What it is off, three roundings of x and
      // that of y must stay below kNear units of the last place of y.
      const double place = marks.values[k] * t.scale[slot];
      const double y = place + t.offset[slot] - BinTables::kNear * unit_of_y;
      const double from_first = (y - first_y) / bin_width;
      const double off = from_first - static_cast<double>(static_cast<int>(from_first + 0.5));
      const double rounding = place * 0x3p-24 / unit_of_y + 0.5;
      const double off_units = off * (1 << BinTables::kFraction);
      t.valid = t.valid && off_units + rounding < BinTables::kNear &&
                off_units - rounding > -BinTables::kNear;
    }
    for (int j = 0; j < bins; ++j, ++bin) {
      const double middle = start + (j + 0.5) / (per_unit > 0.0 ? per_unit : 1.0);
      const int c = first + code + (low < 1.0 ? marks.below(middle) : 0);
      if (bin < BinTables::kBins) {
        t.codes[bin] = static_cast<uint8_t>(c);
      } else {
        if (bin == BinTables::kBins) t.upper = static_cast<uint8_t>(bin - c);
        t.valid = t.valid && static_cast<uint8_t>(bin - c) == t.upper;
      }
    }
    if (low < 1.0) code += marks.count;
  }
  t.count = bin;
  t.valid = t.valid && bin <= BinTables::kBins + BinTables::kOctave;
  return t;
}

// The code of a finite |x| <= 1 (and rounding), or -1 where it is undecided. `x`: |x| * unit.
constexpr int encode_by_bins(const BinTables& t, float x) {
  const uint32_t least = static_cast<uint32_t>(127 - BinTables::kBinades + 1) << 23;
  const uint32_t b = float_bits(x) > least ? float_bits(x) : least;
  const int slot = static_cast<int>((b >> 23) % BinTables::kBinades);
  // In double: one rounding, as the fused multiply-add of processors.
  const float y = static_cast<float>(double{bits_float(b)} * t.scale[slot] + t.offset[slot]);
  const uint32_t y_bits = float_bits(y);
  if (is_undecided(y_bits)) return -1;
  const int bin = static_cast<int>((y_bits >> BinTables::kFraction) - BinTables::kFirst);
  return bin < BinTables::kBins ? t.codes[bin] : (bin - t.upper) & 255;
}

}  // namespace bnb
