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
  using Sum = Float;
  using Result = float;
  static constexpr int kVector = 32;
  static constexpr int kParts = 4;
  static constexpr int kTileHeight = 6;
  static constexpr int kLookupHeight = 4;

  // A 16-bit word holds four codes, and part p has those in its bits 4 p and up.
  static constexpr int place_of(int part, int lane) { return 4 * lane + (part ^ 1); }

  // The words of the first and of the second half of a span have tables, and with small blocks
  // scales for each quarter. Results are those of permutations, whose index takes bits of a code
  // and of the place of its word.
  static constexpr int kSpan = 128;
  static constexpr int kAlign = 64;
  template <bool kSmallBlocks>
  struct Table {
    __m512i halves[kSmallBlocks ? 2 : 1];

    template <class ScaleAt>
    BNB_HD Table(const float* levels, const ScaleAt& scale_at) {
      const __m512 entries = _mm512_loadu_ps(levels);
      for (int half = 0; half < (kSmallBlocks ? 2 : 1); ++half) {
        const __m512 first = _mm512_set1_ps(scale_at(half * 64));
        const __m512 second = _mm512_set1_ps(scale_at(half * 64 + (kSmallBlocks ? 32 : 64)));
        halves[half] = reinterpret_cast<__m512i>(
            _mm512_cvtne2ps_pbh(_mm512_mul_ps(entries, second), _mm512_mul_ps(entries, first)));
      }
    }
    template <int kPart>
    BNB_HD Vector lookup(__m512i words) const {
      // Bits of the code where the mask is set, beside them the place: (x & mask) | place.
      const __m512i index = _mm512_ternarylogic_epi32(_mm512_srli_epi16(words, 4 * kPart),
                                                      _mm512_set1_epi16(15), places(), 0xea);
      if constexpr (kSmallBlocks) {
        return _mm512_permutex2var_epi16(halves[0], index, halves[1]);
      } else {
        return _mm512_permutexvar_epi16(index, halves[0]);
      }
    }
    // 16 times the number of the table that serves a word; the permutation of one register heeds
    // the lowest five bits, that of two the lowest six.
    static BNB_HD __m512i places() {
      const __m256i even = _mm256_set_m128i(_mm_set1_epi16(16), _mm_setzero_si128());
      if constexpr (kSmallBlocks) {
        return _mm512_inserti64x4(_mm512_castsi256_si512(even),
                                  _mm256_add_epi16(even, _mm256_set1_epi16(32)), 1);
      } else {
        return _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
      }
    }
  };

  static BNB_HD __m512i load_group(const uint8_t* codes) { return _mm512_loadu_si512(codes); }

  static BNB_HD Vector load_vector(const Element* p) { return _mm512_loadu_si512(p); }
  static BNB_HD void store_vector(Element* p, Vector x) { _mm512_storeu_si512(p, x); }
  static BNB_HD Float add_products(Float sum, Vector a, Vector b) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b))};
  }
  static BNB_HD Element element(BFloat16 x) { return x; }

  // Two rows of the weight to a product: their neighbours are woven within sixteen bytes.
  static constexpr int kDepth = 2;
  static BNB_HD void weave(const Element* const (&rows)[kDepth], Element* out) {
    const Vector first = load_vector(rows[0]);
    const Vector second = load_vector(rows[1]);
    store_vector(out, _mm512_unpacklo_epi16(first, second));
    store_vector(out + kVector, _mm512_unpackhi_epi16(first, second));
  }
  static constexpr int woven_place_of(int i) {
    const int in_part = i % kVector;
    const int lane = in_part % kWidth;
    return place_of(i / kVector, lane / 4 * 8 + in_part / kWidth * 4 + lane % 4);
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
