// One lane at a time: the vector interface on plain C++, for any processor.
// SPDX-License-Identifier: MIT
//
// Every header in this folder offers the same small set of types and functions; kernels.inl is
// written on top of it once. Names are found in the namespace of the including ISA file.
#pragma once

#include <cmath>
#include <cstdint>

#include "bitsandbytes/numeric.h"
#include "cpu/dispatch.h"

namespace bnb::cpu::baseline {

inline constexpr int kWidth = 1;

struct Float {
  float v;
  Float() = default;
  BNB_HD Float(float x) : v(x) {}
};
struct Int {
  int32_t v;
};
struct Mask {
  bool v;
};

BNB_HD Int broadcast_int(int32_t x) { return {x}; }

template <class T>
BNB_HD Float load(const T* p) {
  return {to_float(*p)};
}
template <class T>
BNB_HD void store(T* p, Float x) {
  *p = from_float<T>(x.v);
}

BNB_HD Float operator+(Float a, Float b) { return {a.v + b.v}; }
BNB_HD Float operator-(Float a, Float b) { return {a.v - b.v}; }
BNB_HD Float operator*(Float a, Float b) { return {a.v * b.v}; }
BNB_HD Float operator/(Float a, Float b) { return {a.v / b.v}; }
BNB_HD Float fma(Float a, Float b, Float c) { return {__builtin_fmaf(a.v, b.v, c.v)}; }
BNB_HD Float sqrt(Float a) { return {__builtin_sqrtf(a.v)}; }
BNB_HD Float fast_divide(Float a, Float b) { return a / b; }
BNB_HD Float fast_sqrt(Float a) { return sqrt(a); }
// -1, 0 or 1; 0 for NaN.
BNB_HD Float sign(Float a) {
  return {static_cast<float>(a.v > 0.0f) - static_cast<float>(a.v < 0.0f)};
}
BNB_HD Float max(Float a, Float b) { return {a.v > b.v ? a.v : b.v}; }
BNB_HD Float min(Float a, Float b) { return {a.v < b.v ? a.v : b.v}; }

BNB_HD Int bits(Float a) { return {static_cast<int32_t>(float_bits(a.v))}; }
BNB_HD Float from_bits(Int a) { return {bits_float(static_cast<uint32_t>(a.v))}; }
BNB_HD Int operator+(Int a, Int b) { return {a.v + b.v}; }
BNB_HD Int operator-(Int a, Int b) { return {a.v - b.v}; }
BNB_HD Int operator&(Int a, Int b) { return {a.v & b.v}; }
BNB_HD Int operator^(Int a, Int b) { return {a.v ^ b.v}; }
BNB_HD Int max(Int a, Int b) { return {a.v > b.v ? a.v : b.v}; }
BNB_HD Int min(Int a, Int b) { return {a.v < b.v ? a.v : b.v}; }
template <int kBits>
BNB_HD Int shift_right(Int a) {
  return {static_cast<int32_t>(static_cast<uint32_t>(a.v) >> kBits)};
}
template <int kBits>
BNB_HD Int shift_right_signed(Int a) {
  return {a.v >> kBits};
}
BNB_HD Int round_to_int(Float a) { return {static_cast<int32_t>(__builtin_rintf(a.v))}; }
BNB_HD Float int_to_float(Int a) { return {static_cast<float>(a.v)}; }

BNB_HD Mask is_negative(Float a) { return {sign_bit(a.v)}; }
BNB_HD Mask greater_equal(Float a, Float b) { return {a.v >= b.v}; }
BNB_HD Mask equal(Float a, Float b) { return {a.v == b.v}; }
BNB_HD Mask less(Float a, Float b) { return {a.v < b.v}; }
BNB_HD Mask less(Int a, Int b) { return {a.v < b.v}; }
BNB_HD Mask equal(Int a, Int b) { return {a.v == b.v}; }
BNB_HD Float select(Mask m, Float a, Float b) { return m.v ? a : b; }
BNB_HD Int select(Mask m, Int a, Int b) { return m.v ? a : b; }
BNB_HD bool any(Mask m) { return m.v; }
BNB_HD bool all(Mask m) { return m.v; }

BNB_HD Float gather(const float* table, Int index) { return {table[index.v]}; }
BNB_HD Int gather(const uint32_t* table, Int index) {
  return {static_cast<int32_t>(table[index.v])};
}
BNB_HD Int load_codes(const uint8_t* p) { return {*p}; }
BNB_HD void store_codes(uint8_t* p, Int a) { *p = static_cast<uint8_t>(a.v); }
BNB_HD Int load_ints(const int32_t* p) { return {*p}; }

// Levels of kDecodeRun consecutive codes.
inline constexpr int kDecodeRun = kWidth;
BNB_HD void decode_run(const Code& code, const uint8_t* codes, float* out) {
  store(out, gather(code.levels, load_codes(codes)));
}

// Codes of kEncodeRun consecutive values by bins (code/bins.h), where that beats gathers.
inline constexpr int kEncodeRun = 0;

BNB_HD int32_t reduce_max(Int a) { return a.v; }

// Sum of products of kDotWidth bytes, kept exactly in 32-bit lanes. The left factor is signed; to
// the right one kDotOffset was added, where the processor multiplies signed by unsigned bytes only.
// add_bytes adds up left factors, for what sums then have too much.
inline constexpr int kDotWidth = 128;
inline constexpr int kDotOffset = 0;
struct Dot {
  uint32_t v = 0;
};
// They stay where they are: a loop over so many is what compilers find instructions for.
struct Bytes {
  const int8_t* p;
};
BNB_HD Bytes load_bytes(const int8_t* p) { return {p}; }
BNB_HD void store_bytes(int8_t* p, Bytes x) { __builtin_memcpy(p, x.p, kDotWidth); }
BNB_HD Bytes add_dot_offset(Bytes x) { return x; }
BNB_HD Dot multiply_add(Dot acc, Bytes a, Bytes b) {
  int32_t sum = 0;
  for (int i = 0; i < kDotWidth; ++i) sum += int32_t{a.p[i]} * int32_t{b.p[i]};
  return {acc.v + static_cast<uint32_t>(sum)};
}
BNB_HD Dot add_bytes(Dot acc, Bytes) { return acc; }
BNB_HD uint32_t reduce_add(Dot acc) { return acc.v; }
BNB_HD void reduce_add4(const Dot (&x)[4], uint32_t* out) {
  for (int i = 0; i < 4; ++i) out[i] = x[i].v;
}

// ---- 4-bit codes -------------------------------------------------------------------------------

// Only the lowest three bits of the index count.
BNB_HD Float lookup8(const float* table, Int index) { return {table[index.v & 7]}; }
BNB_HD Int lookup8(const int32_t* table, Int index) { return {table[index.v & 7]}; }

// Two codes to a byte, the first in its upper half: kNibbleRun codes, half as many bytes.
inline constexpr int kNibbleRun = 2;
BNB_HD void pack_nibbles(const uint8_t* codes, uint8_t* out) {
  *out = static_cast<uint8_t>(codes[0] << 4 | codes[1]);
}
// Entries of a table of 16 for the codes in kNibbleRun / 2 bytes.
template <class T>
BNB_HD void lookup_nibbles(const T* table, const uint8_t* bytes, T* out) {
  out[0] = table[*bytes >> 4];
  out[1] = table[*bytes & 15];
}

// ---- Products with 4-bit weights ---------------------------------------------------------------

// The operand of gemm_4bit.inl that multiplies numbers of type T, where it is not floats.
template <class T>
struct NativeOperand {
  using type = void;
};

BNB_HD Float round_to(Float x, float) { return x; }
template <class T>
BNB_HD Float round_to(Float x, T) {
  return {to_float(from_float<T>(x.v))};
}

// A product and a sum, rounded once or twice.
BNB_HD Float multiply_add(Float a, Float b, Float sum) { return sum + a * b; }

// Entries of a table of 16. Only the lowest four bits of a code count.
BNB_HD Float lookup_code(const Float (&table)[16], Int code) { return table[code.v & 15]; }

// The sums of the lanes of four vectors.
BNB_HD void reduce_add4(const Float (&x)[4], float* out) {
  for (int i = 0; i < 4; ++i) out[i] = x[i].v;
}

}  // namespace bnb::cpu::baseline
