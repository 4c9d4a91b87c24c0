// AVX2 without VNNI: vectors of 8, exact products by way of int16. 12 accumulators of 16 registers.
#pragma once

#include "simd/avx2_vectors.h"

namespace pyqkern {
namespace PYQKERN_ISA {

constexpr unsigned NEEDS = kAvx2;

// ---- the INT8 product
// vpmaddubsw would saturate (2*255*127 > 32767), so both sides are widened to int16 and vpmaddwd is exact. An
// accumulator holds two partial sums for each of four columns.
typedef int16_t ROW_T;
constexpr bool CENTERED = true;
constexpr int COLS = 4, SUMS = 2;
constexpr bool WIDEN = true;
constexpr size_t ROW_K = 16;
typedef i32 acc_t, a_t, b_t;
INLINE a_t load_a(const ROW_T* p) {
  int64_t quad;
  memcpy(&quad, p, 8);
  return (a_t)_mm256_set1_epi64x(quad);
}
INLINE b_t load_b(const int8_t* p) { return (b_t)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
INLINE b_t load_b(const int16_t* p) { return (b_t)_mm256_loadu_si256((const __m256i*)p); }  // widened before
INLINE a_t load_row(const ROW_T* p) { return (a_t)_mm256_loadu_si256((const __m256i*)p); }
INLINE int32_t reduce_add(acc_t v) { return reduce_add_lanes(v); }
INLINE acc_t dot(acc_t c, a_t a, b_t b) { return c + (acc_t)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
INLINE i32 sums(const acc_t* c) {
  return (i32)_mm256_permute4x64_epi64(_mm256_hadd_epi32((__m256i)c[0], (__m256i)c[1]), 0xd8);
}

// ---- the 4-bit product of integers
// vpmaddubsw of |x| and w with x's sign: at most 2 * 127 * 127 = 32258, which an int16 holds.
constexpr int OFFSET = 0;
struct x_t { __m256i value, magnitude; };
INLINE nibbles_t load_nibbles(const int8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
}
INLINE x_t load_x(const int8_t* p) {
  int32_t quad;
  memcpy(&quad, p, 4);
  const __m256i v = _mm256_set1_epi32(quad);
  return {v, _mm256_abs_epi8(v)};
}
INLINE i32 dot(i32 acc, w_t w, x_t x) {
  const __m256i pairs = _mm256_maddubs_epi16(x.magnitude, _mm256_sign_epi8(w, x.value));
  return acc + (i32)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// ---- tiles
constexpr int MR = 6, NV = 2;
constexpr size_t GEMV_ROWS = 4, DOT_ROWS = 4;
constexpr int GEMV_SUMS = 8;
constexpr int ROWS_4BIT = 6, VECTORS_4BIT = 2;
constexpr int ROWS_INT8 = 4, VECTORS_INT8 = 2;
constexpr int GEMV_STEPS_4BIT = 1, GEMV_VECTORS_INT8 = 2, DOT_ROWS_4BIT = 1;

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
