// AVX2 without VNNI: vectors of 8, exact products by way of int16. 12 accumulators of 16 registers.
#pragma once

#include "simd/avx2_vectors.h"

namespace pyqkern {
namespace PYQKERN_ISA {

constexpr unsigned NEEDS = kAvx2;

// ---- the INT8 product
// vpmaddubsw would saturate (2*255*127 > 32767), so both sides are int16, and a vector of bytes is two of int16: its
// odd bytes by one shift, its even ones by two. Winograd's inner product (1968) then takes one multiplication for 32
// products,
//   (a0 + b1) (a1 + b0) = a0 b0 + a1 b1 + a0 a1 + b0 b1,
// where two vpmaddwd would take two. All sums are modulo 2^32. No factor leaves int16: |a| <= 255, |b| <= 128.
// A quad of a row lies in the order k0 k2 k1 k3.
typedef int16_t ROW_T;
constexpr bool CENTERED = true, PAIRED = true;
constexpr int COLS = 8;
constexpr size_t ROW_K = 32;
typedef u32 acc_t;
struct a_t { __m256i even, odd; };
typedef a_t b_t;
INLINE a_t load_a(const ROW_T* p) {
  int32_t even, odd;
  memcpy(&even, p, 4);
  memcpy(&odd, p + 2, 4);
  return {_mm256_set1_epi32(even), _mm256_set1_epi32(odd)};
}
INLINE b_t load_b(const int8_t* p) {
  const __m256i v = _mm256_loadu_si256((const __m256i*)p);
  return {_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), _mm256_srai_epi16(v, 8)};
}
constexpr size_t WIDE_QUADS = 768;  // 96 KB, which stay in L2 beside the rows
constexpr size_t WIDE_B = 32;
typedef int16_t wide_t;  // a vector's even bytes and behind them its odd ones
INLINE b_t load_b(const wide_t* p) {
  return {_mm256_load_si256((const __m256i*)p), _mm256_load_si256((const __m256i*)(p + 16))};
}
INLINE void store_b(wide_t* p, b_t b) {
  _mm256_store_si256((__m256i*)p, b.even);
  _mm256_store_si256((__m256i*)(p + 16), b.odd);
}
INLINE a_t load_row(const ROW_T* p) {
  const __m256 low = _mm256_loadu_ps((const float*)p), high = _mm256_loadu_ps((const float*)(p + 16));
  const __m256i even = _mm256_castps_si256(_mm256_shuffle_ps(low, high, 0x88));
  const __m256i odd = _mm256_castps_si256(_mm256_shuffle_ps(low, high, 0xdd));
  return {_mm256_permute4x64_epi64(even, 0xd8), _mm256_permute4x64_epi64(odd, 0xd8)};
}
INLINE int32_t reduce_add(acc_t v) { return reduce_add_lanes((i32)v); }
INLINE acc_t dot(acc_t c, a_t a, b_t b) {
  return c + (acc_t)_mm256_madd_epi16(a.even, b.even) + (acc_t)_mm256_madd_epi16(a.odd, b.odd);
}
INLINE acc_t dot_pairs(acc_t c, a_t a, b_t b) {
  return c + (acc_t)_mm256_madd_epi16(_mm256_add_epi16(a.even, b.odd), _mm256_add_epi16(a.odd, b.even));
}
INLINE void store_codes(ROW_T* q, i32 a, i32 b, i32 c, i32 d, i32 zero, i32& pairs) {
  const __m256i top = _mm256_set1_epi16(255), zeros = _mm256_packs_epi32((__m256i)zero, (__m256i)zero);
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,  //
                                         0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  const __m256i packed[2] = {_mm256_packus_epi32((__m256i)a, (__m256i)b), _mm256_packus_epi32((__m256i)c, (__m256i)d)};
  u32 sum = (u32)pairs;
  for (int i = 0; i < 2; ++i) {  // the packs work within 128 bits: a quad of a, one of b, one of a, one of b
    const __m256i codes = _mm256_sub_epi16(_mm256_min_epu16(packed[i], top), zeros);
    sum += (u32)_mm256_madd_epi16(codes, _mm256_srli_epi32(codes, 16));
    const __m256i quads = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(codes, order), 0xd8);
    _mm256_storeu_si256((__m256i*)q + i, quads);
  }
  pairs = (i32)sum;
}
INLINE int8_t code_at(const ROW_T* row, size_t k) { return (int8_t)row[k / 4 * 4 + k % 2 * 2 + k / 2 % 2]; }
INLINE void load_codes(const ROW_T* q, int8_t* codes) {
  const __m128i v = _mm_packs_epi16(_mm_loadu_si128((const __m128i*)q), _mm_loadu_si128((const __m128i*)(q + 8)));
  const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  _mm_storeu_si128((__m128i*)codes, _mm_shuffle_epi8(v, order));
}

// ---- the INT8 product of codes of 7 bits
// vpmaddubsw cannot saturate: 2*127*128 < 2^15. 8 accumulators, two quads of a panel, ones, and the rows' quads take the
// 16 registers.
INLINE void store_codes(uint8_t* q, i32 a, i32 b, i32 c, i32 d, i32, i32&) {
  const bytes_t codes = narrow(a, b, c, d);
  memcpy(q, &codes, sizeof codes);
}
struct Codes7 {
  static constexpr bool FOLDED = true;
  static constexpr int MR = 4;
  typedef uint8_t row_t;
  typedef __m256i quad_t;
  static INLINE_MEMBER quad_t load_a(const uint8_t* p) {
    int32_t quad;
    memcpy(&quad, p, 4);
    return _mm256_set1_epi32(quad);
  }
  static INLINE_MEMBER quad_t load_b(const int8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static INLINE_MEMBER acc_t add(acc_t c, __m256i products) {
    return c + (acc_t)_mm256_madd_epi16(products, _mm256_set1_epi16(1));
  }
  static INLINE_MEMBER acc_t dot(acc_t c, quad_t a, quad_t b) { return add(c, _mm256_maddubs_epi16(a, b)); }
  static INLINE_MEMBER acc_t dot(acc_t c, quad_t a0, quad_t b0, quad_t a1, quad_t b1) {
    return add(c, _mm256_add_epi16(_mm256_maddubs_epi16(a0, b0), _mm256_maddubs_epi16(a1, b1)));
  }
};

// ---- the 4-bit product of integers
// vpmaddubsw, which four_bit_int8.inl keeps from saturating. Short sums are vectors of int16 in name too: g++ 12 copies an
// accumulator in each step where its type changes on the way.
constexpr bool SHORT_SUMS = true;
typedef int16_t short_sum __attribute__((vector_size(32)));
INLINE i32 widen(short_sum c) { return (i32)_mm256_madd_epi16((__m256i)c, _mm256_set1_epi16(1)); }
INLINE short_sum dot(short_sum c, w_t low, x_t a, w_t high, x_t b) {
  return c + (short_sum)_mm256_maddubs_epi16(low, a) + (short_sum)_mm256_maddubs_epi16(high, b);
}
INLINE i32 dot(i32 c, w_t low, x_t a, w_t high, x_t b) { return c + widen(dot(short_sum{}, low, a, high, b)); }

// ---- tiles
constexpr int MR = 6, NV = 2, MR_WIDE = 4;
constexpr size_t GEMV_ROWS = 4, DOT_ROWS = 4;
constexpr int GEMV_SUMS = 8;
constexpr int ROWS_4BIT = 6, VECTORS_4BIT = 2;
constexpr int ROWS_INT8 = 4, VECTORS_INT8 = 2;
constexpr int GEMV_STEPS_4BIT = 1, GEMV_VECTORS_INT8 = 2, DOT_ROWS_4BIT = 1;

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
