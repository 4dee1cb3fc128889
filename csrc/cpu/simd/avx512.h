// Sixteen lanes with AVX-512 F, BW, DQ, VL and VBMI; see baseline.h for the interface.
// SPDX-License-Identifier: MIT
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "bitsandbytes/code/bins.h"
#include "bitsandbytes/numeric.h"
#include "cpu/dispatch.h"

namespace bnb::cpu::avx512 {

inline constexpr int kWidth = 16;

struct Float {
  __m512 v;
  Float() = default;
  BNB_HD Float(__m512 x) : v(x) {}
  BNB_HD explicit Float(float x) : v(_mm512_set1_ps(x)) {}
};
struct Int {
  __m512i v;
};
struct Mask {
  __mmask16 v;
};

BNB_HD Int broadcast_int(int32_t x) { return {_mm512_set1_epi32(x)}; }

BNB_HD Float load(const float* p) { return {_mm512_loadu_ps(p)}; }
BNB_HD Float load(const Half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// Words 2 i + 1 of a vector become words i, or words i become 2 i + 1.
alignas(64) inline constexpr uint16_t kUpperHalves[32] = {
    1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
};
alignas(64) inline constexpr uint16_t kToUpperHalves[32] = {
    0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
    0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15,
};
BNB_HD Float load(const BFloat16* p) {
  const __m512i halves =
      _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(
      _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, _mm512_load_si512(kToUpperHalves), halves))};
}
BNB_HD void store(float* p, Float x) { _mm512_storeu_ps(p, x.v); }
BNB_HD void store(Half* p, Float x) {
  // The processor keeps a NaN's payload; the format of this library is one quiet NaN per sign.
  const __m256i half = _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i magnitude = _mm256_and_si256(half, _mm256_set1_epi16(0x7fff));
  const __mmask16 nan = _mm256_cmpgt_epi16_mask(magnitude, _mm256_set1_epi16(0x7c00));
  const __m256i quiet = _mm256_or_si256(_mm256_and_si256(half, _mm256_set1_epi16(-0x8000)),
                                        _mm256_set1_epi16(0x7e00));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_mask_mov_epi16(half, nan, quiet));
}
BNB_HD void store(BFloat16* p, Float x) {
  const __m512i b = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(b, _mm512_set1_epi32(0x7fff)), odd);
  // Of a NaN, quiet or not (classes 0 and 1), the quiet x; of anything else the sum.
  const __m512i result = _mm512_castps_si512(
      _mm512_fixupimm_ps(_mm512_castsi512_ps(rounded), x.v, _mm512_set1_epi32(0x22), 0));
  const __m512i halves = _mm512_permutexvar_epi16(_mm512_load_si512(kUpperHalves), result);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(halves));
}

BNB_HD Float operator+(Float a, Float b) { return {_mm512_add_ps(a.v, b.v)}; }
BNB_HD Float operator-(Float a, Float b) { return {_mm512_sub_ps(a.v, b.v)}; }
BNB_HD Float operator*(Float a, Float b) { return {_mm512_mul_ps(a.v, b.v)}; }
BNB_HD Float operator/(Float a, Float b) { return {_mm512_div_ps(a.v, b.v)}; }
BNB_HD Float fma(Float a, Float b, Float c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
BNB_HD Float sqrt(Float a) { return {_mm512_sqrt_ps(a.v)}; }
BNB_HD Float fast_divide(Float a, Float b) { return a / b; }
BNB_HD Float fast_sqrt(Float a) { return sqrt(a); }
// -1, 0 or 1; 0 for NaN.
BNB_HD Float sign(Float a) {
  const __m512 zero = _mm512_setzero_ps();
  const __m512 above =
      _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, zero, _CMP_GT_OQ), _mm512_set1_ps(1.0f));
  return {
      _mm512_mask_mov_ps(above, _mm512_cmp_ps_mask(a.v, zero, _CMP_LT_OQ), _mm512_set1_ps(-1.0f))};
}
BNB_HD Float max(Float a, Float b) { return {_mm512_max_ps(a.v, b.v)}; }
BNB_HD Float min(Float a, Float b) { return {_mm512_min_ps(a.v, b.v)}; }

BNB_HD Int bits(Float a) { return {_mm512_castps_si512(a.v)}; }
BNB_HD Float from_bits(Int a) { return {_mm512_castsi512_ps(a.v)}; }
BNB_HD Int operator+(Int a, Int b) { return {_mm512_add_epi32(a.v, b.v)}; }
BNB_HD Int operator-(Int a, Int b) { return {_mm512_sub_epi32(a.v, b.v)}; }
BNB_HD Int operator&(Int a, Int b) { return {_mm512_and_si512(a.v, b.v)}; }
BNB_HD Int operator^(Int a, Int b) { return {_mm512_xor_si512(a.v, b.v)}; }
BNB_HD Int max(Int a, Int b) { return {_mm512_max_epi32(a.v, b.v)}; }
BNB_HD Int min(Int a, Int b) { return {_mm512_min_epi32(a.v, b.v)}; }
template <int kBits>
BNB_HD Int shift_right(Int a) {
  return {_mm512_srli_epi32(a.v, kBits)};
}
template <int kBits>
BNB_HD Int shift_right_signed(Int a) {
  return {_mm512_srai_epi32(a.v, kBits)};
}
BNB_HD Int round_to_int(Float a) { return {_mm512_cvtps_epi32(a.v)}; }
BNB_HD Float int_to_float(Int a) { return {_mm512_cvtepi32_ps(a.v)}; }

BNB_HD Mask is_negative(Float a) { return {_mm512_movepi32_mask(_mm512_castps_si512(a.v))}; }
BNB_HD Mask greater_equal(Float a, Float b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
BNB_HD Mask equal(Float a, Float b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
BNB_HD Mask less(Float a, Float b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
BNB_HD Mask less(Int a, Int b) { return {_mm512_cmplt_epi32_mask(a.v, b.v)}; }
BNB_HD Mask equal(Int a, Int b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
BNB_HD Float select(Mask m, Float a, Float b) { return {_mm512_mask_mov_ps(b.v, m.v, a.v)}; }
BNB_HD Int select(Mask m, Int a, Int b) { return {_mm512_mask_mov_epi32(b.v, m.v, a.v)}; }
BNB_HD bool any(Mask m) { return m.v != 0; }
BNB_HD bool all(Mask m) { return m.v == 0xffff; }

BNB_HD Float gather(const float* table, Int index) {
  return {_mm512_i32gather_ps(index.v, table, 4)};
}
BNB_HD Int gather(const uint32_t* table, Int index) {
  return {_mm512_i32gather_epi32(index.v, table, 4)};
}
BNB_HD Int load_codes(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
BNB_HD void store_codes(uint8_t* p, Int a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
BNB_HD Int load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }

// Levels of kDecodeRun consecutive codes: each of a level's four bytes is looked up on its own, in
// two halves of the table, and the bytes are woven together.
inline constexpr int kDecodeRun = 64;
BNB_HD __m512i lookup_bytes(const uint8_t* table, __m512i index, __mmask64 upper) {
  const __m512i low =
      _mm512_permutex2var_epi8(_mm512_load_si512(table), index, _mm512_load_si512(table + 64));
  const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(table + 128), index,
                                                _mm512_load_si512(table + 192));
  return _mm512_mask_mov_epi8(low, upper, high);
}
BNB_HD void decode_run(const Code& code, const uint8_t* codes, float* out) {
  // Weaving works within 16-byte lanes: dword 4 l + q of the codes goes to dword 4 q + l first, so
  // that the woven parts come out in order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i index = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes));
  const __mmask64 upper = _mm512_movepi8_mask(index);
  const __m512i byte0 = lookup_bytes(code.planes[0], index, upper);
  const __m512i byte1 = lookup_bytes(code.planes[1], index, upper);
  const __m512i byte2 = lookup_bytes(code.planes[2], index, upper);
  const __m512i byte3 = lookup_bytes(code.planes[3], index, upper);
  const __m512i low01 = _mm512_unpacklo_epi8(byte0, byte1);
  const __m512i high01 = _mm512_unpackhi_epi8(byte0, byte1);
  const __m512i low23 = _mm512_unpacklo_epi8(byte2, byte3);
  const __m512i high23 = _mm512_unpackhi_epi8(byte2, byte3);
  _mm512_storeu_si512(out, _mm512_unpacklo_epi16(low01, low23));
  _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi16(low01, low23));
  _mm512_storeu_si512(out + 32, _mm512_unpacklo_epi16(high01, high23));
  _mm512_storeu_si512(out + 48, _mm512_unpackhi_epi16(high01, high23));
}

// A table of 32 numbers by the lowest five bits of `index`.
BNB_HD __m512 lookup32(const float* table, __m512i index) {
  return _mm512_permutex2var_ps(_mm512_load_ps(table), index, _mm512_load_ps(table + 16));
}

// Codes of kEncodeRun consecutive values by bins (code/bins.h). Returns which of them are
// undecided, one bit each: their codes are not valid. `scale`: unit / absmax. `least_negative`:
// code of the negative values next to zero.
inline constexpr int kEncodeRun = 64;
template <bool kSigned, class T>
BNB_HD uint64_t encode_run(const BinTables& t, const T* a, Float scale, int least_negative,
                           uint8_t* out) {
  const __m512i sign = _mm512_set1_epi32(static_cast<int32_t>(0x80000000u));
  const __m512i least = _mm512_set1_epi32((127 - BinTables::kBinades + 1) << 23);
  const __m512i undecided = _mm512_set1_epi32(BinTables::kUndecided);
  __m512i nearest = _mm512_set1_epi32(-1);
  __m512i y[4];
  for (int v = 0; v < 4; ++v) {
    const __m512i x = _mm512_castps_si512((load(a + 16 * v) * scale).v);
    const __m512i m = _mm512_max_epi32(kSigned ? _mm512_andnot_si512(sign, x) : x, least);
    const __m512i exponent = _mm512_srli_epi32(m, 23);
    const __m512 place = _mm512_fmadd_ps(_mm512_castsi512_ps(m), lookup32(t.scale, exponent),
                                         lookup32(t.offset, exponent));
    y[v] = _mm512_castps_si512(place);
    // The place in the bin is the lower half of y.
    nearest = _mm512_min_epu16(nearest, y[v]);
    // y | (x & sign), where y has no sign.
    if (kSigned) y[v] = _mm512_ternarylogic_epi32(y[v], x, sign, 0xf8);
  }
  // Bytes 2 of 32 elements, then bytes 3: the lower eight bits of the bin, and sign and exponent.
  alignas(64) static constexpr uint8_t kOrder[64] = {
      2,  6,  10, 14, 18, 22, 26, 30, 34, 38,  42,  46,  50,  54,  58,  62,
      66, 70, 74, 78, 82, 86, 90, 94, 98, 102, 106, 110, 114, 118, 122, 126,
      3,  7,  11, 15, 19, 23, 27, 31, 35, 39,  43,  47,  51,  55,  59,  63,
      67, 71, 75, 79, 83, 87, 91, 95, 99, 103, 107, 111, 115, 119, 123, 127};
  const __m512i order = _mm512_load_si512(kOrder);
  const __m512i first = _mm512_permutex2var_epi8(y[0], order, y[1]);
  const __m512i second = _mm512_permutex2var_epi8(y[2], order, y[3]);
  const __m512i bins = _mm512_shuffle_i64x2(first, second, 0x44);
  const __m512i high = _mm512_shuffle_i64x2(first, second, 0xee);
  __m512i codes = lookup_bytes(t.codes, bins, _mm512_movepi8_mask(bins));
  if (kSigned) {
    const __m512i mirrored = _mm512_subs_epu8(_mm512_set1_epi8(static_cast<char>(254)), codes);
    const __m512i negative =
        _mm512_min_epu8(mirrored, _mm512_set1_epi8(static_cast<char>(least_negative)));
    codes = _mm512_mask_mov_epi8(codes, _mm512_movepi8_mask(high), negative);
  } else {
    const __mmask64 upper =
        _mm512_test_epi8_mask(high, _mm512_set1_epi8(BinTables::kUpperBit >> 24));
    codes = _mm512_mask_sub_epi8(codes, upper, bins, _mm512_set1_epi8(static_cast<char>(t.upper)));
  }
  _mm512_storeu_si512(out, codes);
  if (_mm512_testn_epi32_mask(nearest, undecided) == 0) [[likely]] {
    return 0;
  }
  uint64_t lanes = 0;
  for (int v = 0; v < 4; ++v) {
    lanes |= static_cast<uint64_t>(_mm512_testn_epi32_mask(y[v], undecided)) << (16 * v);
  }
  return lanes;
}

BNB_HD int32_t reduce_max(Int a) { return _mm512_reduce_max_epi32(a.v); }

inline constexpr int kDotWidth = 64;
inline constexpr int kDotOffset = 128;
struct Dot {
  // Sixteen ints, not __m512i: GCC 12 copies sums around where it sees one as the other in a loop.
  using Lanes [[gnu::vector_size(64)]] = int32_t;
  Lanes v = {};
  __m512i all() const { return reinterpret_cast<__m512i>(v); }
};
struct Bytes {
  __m512i v;
};
BNB_HD Bytes load_bytes(const int8_t* p) { return {_mm512_loadu_si512(p)}; }
BNB_HD void store_bytes(int8_t* p, Bytes x) { _mm512_storeu_si512(p, x.v); }
BNB_HD Bytes add_dot_offset(Bytes x) {
  return {_mm512_xor_si512(x.v, _mm512_set1_epi8(static_cast<char>(kDotOffset)))};
}
BNB_HD Dot multiply_add(Dot acc, Bytes a, Bytes b) {
  return {reinterpret_cast<Dot::Lanes>(_mm512_dpbusd_epi32(acc.all(), b.v, a.v))};
}
BNB_HD Dot add_bytes(Dot acc, Bytes a) { return multiply_add(acc, a, {_mm512_set1_epi8(1)}); }
BNB_HD uint32_t reduce_add(Dot acc) {
  return static_cast<uint32_t>(_mm512_reduce_add_epi32(acc.all()));
}
BNB_HD void reduce_add4(const Dot (&x)[4], uint32_t* out) {
  const __m512i first = _mm512_add_epi32(_mm512_unpacklo_epi32(x[0].all(), x[1].all()),
                                         _mm512_unpackhi_epi32(x[0].all(), x[1].all()));
  const __m512i second = _mm512_add_epi32(_mm512_unpacklo_epi32(x[2].all(), x[3].all()),
                                          _mm512_unpackhi_epi32(x[2].all(), x[3].all()));
  const __m512i sums =
      _mm512_add_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}

// ---- 4-bit codes -------------------------------------------------------------------------------

// A permutation of sixteen heeds four bits of the index: the table stands there twice.
BNB_HD Float lookup8(const float* table, Int index) {
  return {_mm512_permutexvar_ps(index.v, _mm512_broadcast_f32x8(_mm256_loadu_ps(table)))};
}
BNB_HD Int lookup8(const int32_t* table, Int index) {
  const __m256i entries = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table));
  return {_mm512_permutexvar_epi32(index.v, _mm512_broadcast_i32x8(entries))};
}

inline constexpr int kNibbleRun = 32;
BNB_HD void pack_nibbles(const uint8_t* codes, uint8_t* out) {
  const __m256i pairs = _mm256_maddubs_epi16(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)), _mm256_set1_epi16(0x0110));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtepi16_epi8(pairs));
}
// The bits of eight bytes are moved to where the permutation wants its index: byte j's upper half
// to lane 2 j, its lower half to lane 2 j + 1. What else comes along are bits that do not count.
template <class T>
BNB_HD void lookup_nibbles(const T* table, const uint8_t* bytes, T* out) {
  if constexpr (sizeof(T) == 4) {
    constexpr long long kFirst = 0x0000000000000004;  // shifts for the two lanes of one byte
    constexpr long long kNext = 0x0000000800000008;
    const __m512i places = _mm512_setr_epi64(
        kFirst, kFirst + kNext, kFirst + 2 * kNext, kFirst + 3 * kNext, kFirst + 4 * kNext,
        kFirst + 5 * kNext, kFirst + 6 * kNext, kFirst + 7 * kNext);
    const __m512 entries = _mm512_loadu_ps(table);
    for (int i = 0; i < 2; ++i) {
      long long eight;
      __builtin_memcpy(&eight, bytes + 8 * i, 8);
      const __m512i index = _mm512_multishift_epi64_epi8(places, _mm512_set1_epi64(eight));
      _mm512_storeu_ps(out + 16 * i, _mm512_permutexvar_ps(index, entries));
    }
  } else {
    // The table stands there twice, so that the fifth bit of an index does not count.
    constexpr long long kFirst = 0x0008000c00000004;  // shifts for the four lanes of two bytes
    constexpr long long kNext = 0x0010001000100010;
    const __m512i places =
        _mm512_setr_epi64(kFirst, kFirst + kNext, kFirst + 2 * kNext, kFirst + 3 * kNext, kFirst,
                          kFirst + kNext, kFirst + 2 * kNext, kFirst + 3 * kNext);
    const __m512i packed =
        _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m512i eights =
        _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 0, 0, 1, 1, 1, 1), packed);
    const __m512i entries =
        _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
    const __m512i index = _mm512_multishift_epi64_epi8(places, eights);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, entries));
  }
}

// ---- Products with 4-bit weights ---------------------------------------------------------------

// The operand of gemm_4bit.inl that multiplies numbers of type T, where it is not floats.
template <class T>
struct NativeOperand {
  using type = void;
};

BNB_HD Float round_to(Float x, float) { return x; }
BNB_HD Float round_to(Float x, Half) {
  return {_mm512_cvtph_ps(_mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}
BNB_HD Float round_to(Float x, BFloat16) {
  const __m512i b = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(b, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd));
  const __m512i kept = _mm512_and_si512(sum, _mm512_set1_epi32(-0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return {_mm512_mask_mov_ps(_mm512_castsi512_ps(kept), nan, x.v)};
}

BNB_HD Float multiply_add(Float a, Float b, Float sum) { return fma(a, b, sum); }

// The permutation heeds the lowest four bits of a lane alone.
BNB_HD Float lookup_code(const Float (&table)[1], Int code) {
  return {_mm512_permutexvar_ps(code.v, table[0].v)};
}

BNB_HD void reduce_add4(const Float (&x)[4], float* out) {
  const __m512 first =
      _mm512_add_ps(_mm512_unpacklo_ps(x[0].v, x[1].v), _mm512_unpackhi_ps(x[0].v, x[1].v));
  const __m512 second =
      _mm512_add_ps(_mm512_unpacklo_ps(x[2].v, x[3].v), _mm512_unpackhi_ps(x[2].v, x[3].v));
  const __m512 sums =
      _mm512_add_ps(_mm512_shuffle_ps(first, second, 0x44), _mm512_shuffle_ps(first, second, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

}  // namespace bnb::cpu::avx512
