// AVX2 with AVX-VNNI: vectors of 8, vpdpbusd. 12 accumulators of 16 registers.
#pragma once

#include "simd/avx2_vectors.h"

namespace pyqkern {
namespace PYQKERN_ISA {

constexpr unsigned NEEDS = kAvx2 | kAvxVnni;

// ---- the INT8 product
typedef uint8_t ROW_T;
constexpr bool CENTERED = false, PAIRED = false;
constexpr int COLS = 8;
constexpr size_t ROW_K = 32;
typedef i32 acc_t, a_t, b_t;
INLINE a_t load_a(const ROW_T* p) {
  int32_t quad;
  memcpy(&quad, p, 4);
  return (a_t)_mm256_set1_epi32(quad);
}
INLINE b_t load_b(const int8_t* p) { return (b_t)_mm256_loadu_si256((const __m256i*)p); }
constexpr size_t WIDE_QUADS = 0, WIDE_B = 0;
constexpr int MR_WIDE = 0;
typedef int8_t wide_t;
INLINE a_t load_row(const ROW_T* p) { return (a_t)_mm256_loadu_si256((const __m256i*)p); }
INLINE int32_t reduce_add(acc_t v) { return reduce_add_lanes(v); }
INLINE acc_t dot(acc_t c, a_t a, b_t b) { return (acc_t)_mm256_dpbusd_avx_epi32((__m256i)c, (__m256i)a, (__m256i)b); }
INLINE void store_codes(ROW_T* q, i32 a, i32 b, i32 c, i32 d, i32, i32&) {
  const bytes_t codes = narrow(a, b, c, d);
  memcpy(q, &codes, sizeof codes);
}
INLINE int8_t code_at(const ROW_T* row, size_t k) { return (int8_t)(row[k] ^ 128); }
INLINE void load_codes(const ROW_T* q, int8_t* codes) {
  const __m128i v = _mm_loadu_si128((const __m128i*)q);
  _mm_storeu_si128((__m128i*)codes, _mm_xor_si128(v, _mm_set1_epi8(-128)));
}
INLINE acc_t dot_pairs(acc_t c, a_t a, b_t b) { return dot(c, a, b); }

struct Bytes {
  static constexpr bool FOLDED = false;
  typedef ROW_T row_t;
};

// ---- the 4-bit product of integers
constexpr bool SHORT_SUMS = false;
typedef i32 short_sum;
INLINE i32 dot(i32 c, w_t w, x_t x) { return (i32)_mm256_dpbusd_avx_epi32((__m256i)c, w, x); }

// ---- tiles
constexpr int MR = 6, NV = 2;
constexpr size_t GEMV_ROWS = 4, SPLIT_ROWS = 0, DOT_ROWS = 4;
constexpr int GEMV_SUMS = 8;
constexpr int FLOAT_ROWS = 6, FLOAT_VECTORS = 2, FLOAT_SUMS = 8;
constexpr int ROWS_INT8 = 4, VECTORS_INT8 = 2;
constexpr int GEMV_STEPS_4BIT = 1, GEMV_VECTORS_INT8 = 2, DOT_ROWS_4BIT = 1;

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
