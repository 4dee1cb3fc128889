// Products of pairs of bfloat16 with AVX-512 BF16, beside what avx512.h has.
// SPDX-License-Identifier: MIT
#pragma once

#include "cpu/simd/avx512.h"

namespace bnb::cpu::avx512_bf16 {

using namespace avx512;  // NOLINT(google-build-using-namespace): the same lanes, one product more

// What gemm_4bit.inl calls an operand: thirty-two bfloat16 to a vector. The processor takes numbers
// below the normal ones for zero; sums are float32.
struct PairOperand {
  using Element = BFloat16;
  using Vector = __m512i;
  static constexpr int kVector = 32;
  static constexpr int kTileHeight = 6;
  static constexpr int kLookupHeight = 4;

  struct Table {
    __m512i low;   // for the first half of a vector, the sixteen entries twice
    __m512i high;  // for its second half; read where it has a scale of its own
  };
  static BNB_HD __m512i entries(const float* levels, float scale) {
    const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(scale));
    return _mm512_broadcast_i64x4(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(scaled)));
  }
  static BNB_HD Table make_table(const float* levels, float scale) {
    const __m512i both = entries(levels, scale);
    return {both, both};
  }
  static BNB_HD Table make_table(const float* levels, float first, float second) {
    return {entries(levels, first), entries(levels, second)};
  }
  // The permutation heeds the lowest five bits of a lane, and the fifth changes nothing.
  static BNB_HD void lookup(const Table& table, const uint8_t* bytes, Vector& even, Vector& odd) {
    const __m512i pairs =
        _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
    even = _mm512_permutexvar_epi16(_mm512_srli_epi16(pairs, 4), table.low);
    odd = _mm512_permutexvar_epi16(pairs, table.low);
  }
  static BNB_HD void lookup_halves(const Table& table, const uint8_t* bytes, Vector& even,
                                   Vector& odd) {
    constexpr __mmask32 kSecond = 0xffff0000;
    const __m512i pairs =
        _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
    const __m512i upper = _mm512_srli_epi16(pairs, 4);
    even = _mm512_mask_permutexvar_epi16(_mm512_permutexvar_epi16(upper, table.low), kSecond, upper,
                                         table.high);
    odd = _mm512_mask_permutexvar_epi16(_mm512_permutexvar_epi16(pairs, table.low), kSecond, pairs,
                                        table.high);
  }
  static BNB_HD Vector load_vector(const Element* p) { return _mm512_loadu_si512(p); }
  static BNB_HD void store_vector(Element* p, Vector x) { _mm512_storeu_si512(p, x); }
  static BNB_HD Float add_products(Float sum, Vector a, Vector b) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b))};
  }
  static BNB_HD Element element(BFloat16 x) { return x; }

  // Two rows of the weight to a product: their neighbours are woven within sixteen bytes.
  static constexpr int kDepth = 2;
  static BNB_HD void weave(const Element* const (&rows)[kDepth], Element* out) {
    for (int half = 0; half < 2; ++half) {
      const Vector first = load_vector(rows[0] + half * kVector);
      const Vector second = load_vector(rows[1] + half * kVector);
      store_vector(out + 2 * half * kVector, _mm512_unpacklo_epi16(first, second));
      store_vector(out + (2 * half + 1) * kVector, _mm512_unpackhi_epi16(first, second));
    }
  }
  static constexpr int column_of(int place) {
    const int vector = place / kWidth;
    const int lane = place % kWidth;
    return 2 * (lane / 4 * 8 + vector % 2 * 4 + lane % 4) + vector / 2;
  }
  static BNB_HD Vector broadcast(const Element* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
};

template <class T>
struct NativeOperand {
  using type = void;
};
template <>
struct NativeOperand<BFloat16> {
  using type = PairOperand;
};

}  // namespace bnb::cpu::avx512_bf16
