// Eight lanes with AVX2, FMA and F16C; see baseline.h for the interface.
// SPDX-License-Identifier: MIT
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "bitsandbytes/numeric.h"
#include "cpu/dispatch.h"

namespace bnb::cpu::avx2 {

inline constexpr int kWidth = 8;

struct Float {
  __m256 v;
  Float() = default;
  BNB_HD Float(__m256 x) : v(x) {}
  BNB_HD explicit Float(float x) : v(_mm256_set1_ps(x)) {}
};
struct Int {
  __m256i v;
};
struct Mask {
  __m256 v;
};

BNB_HD Int broadcast_int(int32_t x) { return {_mm256_set1_epi32(x)}; }

BNB_HD Float load(const float* p) { return {_mm256_loadu_ps(p)}; }
BNB_HD Float load(const Half* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
BNB_HD Float load(const BFloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
BNB_HD void store(float* p, Float x) { _mm256_storeu_ps(p, x.v); }
BNB_HD void store(Half* p, Float x) {
  // The processor keeps a NaN's payload; the format of this library is one quiet NaN per sign.
  __m128i half = _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m128i magnitude = _mm_and_si128(half, _mm_set1_epi16(0x7fff));
  const __m128i nan = _mm_cmpgt_epi16(magnitude, _mm_set1_epi16(0x7c00));
  const __m128i quiet =
      _mm_or_si128(_mm_and_si128(half, _mm_set1_epi16(-0x8000)), _mm_set1_epi16(0x7e00));
  half = _mm_blendv_epi8(half, quiet, nan);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
}
BNB_HD void store(BFloat16* p, Float x) {
  const __m256i b = _mm256_castps_si256(x.v);
  const __m256i high = _mm256_srli_epi32(b, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd);
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(b, bias), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i result = _mm256_blendv_epi8(rounded, quiet, nan);
  const __m256i packed = _mm256_packus_epi32(result, result);
  const __m256i ordered = _mm256_permute4x64_epi64(packed, 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(ordered));
}

BNB_HD Float operator+(Float a, Float b) { return {_mm256_add_ps(a.v, b.v)}; }
BNB_HD Float operator-(Float a, Float b) { return {_mm256_sub_ps(a.v, b.v)}; }
BNB_HD Float operator*(Float a, Float b) { return {_mm256_mul_ps(a.v, b.v)}; }
BNB_HD Float operator/(Float a, Float b) { return {_mm256_div_ps(a.v, b.v)}; }
BNB_HD Float fma(Float a, Float b, Float c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
BNB_HD Float sqrt(Float a) { return {_mm256_sqrt_ps(a.v)}; }
BNB_HD Float fast_divide(Float a, Float b) { return a / b; }
BNB_HD Float fast_sqrt(Float a) { return sqrt(a); }
// -1, 0 or 1; 0 for NaN.
BNB_HD Float sign(Float a) {
  const __m256 zero = _mm256_setzero_ps();
  const __m256 one = _mm256_set1_ps(1.0f);
  const __m256 above = _mm256_and_ps(_mm256_cmp_ps(a.v, zero, _CMP_GT_OQ), one);
  return {_mm256_sub_ps(above, _mm256_and_ps(_mm256_cmp_ps(a.v, zero, _CMP_LT_OQ), one))};
}
BNB_HD Float max(Float a, Float b) { return {_mm256_max_ps(a.v, b.v)}; }
BNB_HD Float min(Float a, Float b) { return {_mm256_min_ps(a.v, b.v)}; }

BNB_HD Int bits(Float a) { return {_mm256_castps_si256(a.v)}; }
BNB_HD Float from_bits(Int a) { return {_mm256_castsi256_ps(a.v)}; }
BNB_HD Int operator+(Int a, Int b) { return {_mm256_add_epi32(a.v, b.v)}; }
BNB_HD Int operator-(Int a, Int b) { return {_mm256_sub_epi32(a.v, b.v)}; }
BNB_HD Int operator&(Int a, Int b) { return {_mm256_and_si256(a.v, b.v)}; }
BNB_HD Int operator^(Int a, Int b) { return {_mm256_xor_si256(a.v, b.v)}; }
BNB_HD Int max(Int a, Int b) { return {_mm256_max_epi32(a.v, b.v)}; }
BNB_HD Int min(Int a, Int b) { return {_mm256_min_epi32(a.v, b.v)}; }
template <int kBits>
BNB_HD Int shift_right(Int a) {
  return {_mm256_srli_epi32(a.v, kBits)};
}
template <int kBits>
BNB_HD Int shift_right_signed(Int a) {
  return {_mm256_srai_epi32(a.v, kBits)};
}
BNB_HD Int round_to_int(Float a) { return {_mm256_cvtps_epi32(a.v)}; }
BNB_HD Float int_to_float(Int a) { return {_mm256_cvtepi32_ps(a.v)}; }

BNB_HD Mask is_negative(Float a) {
  return {_mm256_castsi256_ps(_mm256_srai_epi32(_mm256_castps_si256(a.v), 31))};
}
BNB_HD Mask greater_equal(Float a, Float b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
BNB_HD Mask equal(Float a, Float b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
BNB_HD Mask less(Float a, Float b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
BNB_HD Mask less(Int a, Int b) { return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(b.v, a.v))}; }
BNB_HD Mask equal(Int a, Int b) { return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.v, b.v))}; }
BNB_HD Float select(Mask m, Float a, Float b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }
BNB_HD Int select(Mask m, Int a, Int b) {
  return {_mm256_castps_si256(
      _mm256_blendv_ps(_mm256_castsi256_ps(b.v), _mm256_castsi256_ps(a.v), m.v))};
}
BNB_HD bool any(Mask m) { return _mm256_movemask_ps(m.v) != 0; }
BNB_HD bool all(Mask m) { return _mm256_movemask_ps(m.v) == 0xff; }

BNB_HD Float gather(const float* table, Int index) {
  return {_mm256_i32gather_ps(table, index.v, 4)};
}
BNB_HD Int gather(const uint32_t* table, Int index) {
  return {_mm256_i32gather_epi32(reinterpret_cast<const int*>(table), index.v, 4)};
}
BNB_HD Int load_codes(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
BNB_HD void store_codes(uint8_t* p, Int a) {
  const __m256i low = _mm256_and_si256(a.v, _mm256_set1_epi32(0xff));
  const __m128i words =
      _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
BNB_HD Int load_ints(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}

// Levels of kDecodeRun consecutive codes.
inline constexpr int kDecodeRun = kWidth;
BNB_HD void decode_run(const Code& code, const uint8_t* codes, float* out) {
  store(out, gather(code.levels, load_codes(codes)));
}

inline constexpr int kEncodeRun = 0;

BNB_HD int32_t reduce_max(Int a) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  return _mm_cvtsi128_si32(m);
}

inline constexpr int kDotWidth = 16;
inline constexpr int kDotOffset = 0;
struct Dot {
  __m256i v = _mm256_setzero_si256();
};
struct Bytes {
  __m128i v;
};
BNB_HD Bytes load_bytes(const int8_t* p) {
  return {_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))};
}
BNB_HD void store_bytes(int8_t* p, Bytes x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x.v);
}
BNB_HD Bytes add_dot_offset(Bytes x) { return x; }
// Widened to 16 bits: the instruction for bytes saturates.
BNB_HD Dot multiply_add(Dot acc, Bytes a, Bytes b) {
  return {_mm256_add_epi32(
      acc.v, _mm256_madd_epi16(_mm256_cvtepi8_epi16(a.v), _mm256_cvtepi8_epi16(b.v)))};
}
BNB_HD Dot add_bytes(Dot acc, Bytes) { return acc; }
BNB_HD uint32_t reduce_add(Dot acc) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(acc.v), _mm256_extracti128_si256(acc.v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(s));
}
BNB_HD void reduce_add4(const Dot (&x)[4], uint32_t* out) {
  const __m256i sums =
      _mm256_hadd_epi32(_mm256_hadd_epi32(x[0].v, x[1].v), _mm256_hadd_epi32(x[2].v, x[3].v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1)));
}

// ---- 4-bit codes -------------------------------------------------------------------------------

BNB_HD Float lookup8(const float* table, Int index) {
  return {_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index.v)};
}
BNB_HD Int lookup8(const int32_t* table, Int index) {
  const __m256i entries = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table));
  return {_mm256_permutevar8x32_epi32(entries, index.v)};
}

inline constexpr int kNibbleRun = 32;
BNB_HD void pack_nibbles(const uint8_t* codes, uint8_t* out) {
  const __m256i pairs = _mm256_maddubs_epi16(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)), _mm256_set1_epi16(0x0110));
  const __m256i packed = _mm256_packus_epi16(pairs, pairs);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
template <class T>
BNB_HD void lookup_nibbles(const T* table, const uint8_t* bytes, T* out) {
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  const __m128i upper = _mm_and_si128(_mm_srli_epi16(packed, 4), mask);
  const __m128i lower = _mm_and_si128(packed, mask);
  const __m128i indices[2] = {_mm_unpacklo_epi8(upper, lower), _mm_unpackhi_epi8(upper, lower)};
  if constexpr (sizeof(T) == 4) {
    const __m256 first = _mm256_loadu_ps(table);
    const __m256 second = _mm256_loadu_ps(table + 8);
    for (int i = 0; i < 4; ++i) {
      const __m128i eight = i % 2 == 0 ? indices[i / 2] : _mm_srli_si128(indices[i / 2], 8);
      const __m256i index = _mm256_cvtepu8_epi32(eight);
      const __m256 in_second = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
      _mm256_storeu_ps(out + 8 * i,
                       _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, index),
                                        _mm256_permutevar8x32_ps(second, index), in_second));
    }
  } else {
    // The two bytes of an entry are looked up on their own and woven together.
    const __m128i* entries = reinterpret_cast<const __m128i*>(table);
    const __m128i first = _mm_loadu_si128(entries);
    const __m128i second = _mm_loadu_si128(entries + 1);
    const __m128i low_bytes = _mm_set1_epi16(0xff);
    const __m128i low =
        _mm_packus_epi16(_mm_and_si128(first, low_bytes), _mm_and_si128(second, low_bytes));
    const __m128i high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
    for (int i = 0; i < 2; ++i) {
      const __m128i low_found = _mm_shuffle_epi8(low, indices[i]);
      const __m128i high_found = _mm_shuffle_epi8(high, indices[i]);
      __m128i* to = reinterpret_cast<__m128i*>(out + 16 * i);
      _mm_storeu_si128(to, _mm_unpacklo_epi8(low_found, high_found));
      _mm_storeu_si128(to + 1, _mm_unpackhi_epi8(low_found, high_found));
    }
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
  return {_mm256_cvtph_ps(_mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}
BNB_HD Float round_to(Float x, BFloat16) {
  const __m256i b = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(b, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd));
  const __m256i kept = _mm256_and_si256(sum, _mm256_set1_epi32(-0x10000));
  const __m256 nan = _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q);
  return {_mm256_blendv_ps(_mm256_castsi256_ps(kept), x.v, nan)};
}

BNB_HD Float multiply_add(Float a, Float b, Float sum) { return fma(a, b, sum); }

// Either half of the table is permuted by the lowest three bits of a code; the fourth chooses.
BNB_HD Float lookup_code(const Float (&table)[2], Int code) {
  const __m256 in_second = _mm256_castsi256_ps(_mm256_slli_epi32(code.v, 28));
  return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(table[0].v, code.v),
                           _mm256_permutevar8x32_ps(table[1].v, code.v), in_second)};
}

BNB_HD void reduce_add4(const Float (&x)[4], float* out) {
  const __m256 sums =
      _mm256_hadd_ps(_mm256_hadd_ps(x[0].v, x[1].v), _mm256_hadd_ps(x[2].v, x[3].v));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}

}  // namespace bnb::cpu::avx2
