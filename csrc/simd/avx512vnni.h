// AVX-512 (F, BW, DQ, VL) with VNNI: vectors of 16, vpdpbusd. 24 accumulators of 32 registers.
#pragma once

#include <immintrin.h>

#include "kernels/kernels.h"

namespace pyqkern {
namespace PYQKERN_ISA {

constexpr unsigned NEEDS = kAvx2 | kAvx512 | kAvx512Vnni;
constexpr int LANES = 16;

}  // namespace PYQKERN_ISA
}  // namespace pyqkern

#include "simd/vectors.h"

namespace pyqkern {
namespace PYQKERN_ISA {

INLINE f32 min(f32 a, f32 b) { return (f32)_mm512_min_ps((__m512)a, (__m512)b); }  // b where either is NaN
INLINE f32 max(f32 a, f32 b) { return (f32)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE f32 fma(f32 a, f32 b, f32 c) { return (f32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE f32 sqrt(f32 v) { return (f32)_mm512_sqrt_ps((__m512)v); }
INLINE i32 truncate(f32 v) { return (i32)_mm512_cvttps_epi32((__m512)v); }
INLINE bool any(i32 mask) { return _mm512_movepi32_mask((__m512i)mask) != 0; }  // of lanes that are 0 or -1
INLINE i32 round(f32 v) { return (i32)_mm512_cvtps_epi32((__m512)v); }          // ties to even
INLINE f32 to_float(i32 v) { return (f32)_mm512_cvtepi32_ps((__m512i)v); }
INLINE float reduce_min(f32 v) { return _mm512_reduce_min_ps((__m512)v); }
INLINE float reduce_max(f32 v) { return _mm512_reduce_max_ps((__m512)v); }
INLINE float add_halves(f32 v) {  // lanes i and i + 8, then i and i + 4, and so on
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  __m128 m = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  m = _mm_add_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
}
INLINE void add_halves(const f32 (&v)[4], float* sums) {  // the same of four vectors at once
  __m128 m[4];
  for (int i = 0; i < 4; ++i) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[i]), _mm512_extractf32x8_ps((__m512)v[i], 1));
    m[i] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(m[0], m[1]), _mm_unpackhi_ps(m[0], m[1]));
  const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(m[2], m[3]), _mm_unpackhi_ps(m[2], m[3]));
  _mm_storeu_ps(sums, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
}
INLINE f32 load(const bf16* p) {
  return (f32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
INLINE f32 load(const fp16* p) { return (f32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE __m256i halves(const bf16*, f32 v) { return _mm512_cvtepi32_epi16((__m512i)bf16_bits(v)); }
INLINE __m256i halves(const fp16*, f32 v) { return _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
template <class T> INLINE void store(T* p, f32 v) { _mm256_storeu_si256((__m256i*)p, halves(p, v)); }
INLINE i32 load_bytes(const uint8_t* p) { return (i32)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE i32 load_bytes(const int8_t* p) { return (i32)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE void store_bytes(uint8_t* p, i32 v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v)); }
INLINE bytes_t narrow(i32 a, i32 b, i32 c, i32 d) {  // the packs work within 128 bits, the permutation mends the order
  __m512i ab = _mm512_packus_epi32((__m512i)a, (__m512i)b), cd = _mm512_packus_epi32((__m512i)c, (__m512i)d);
  return (bytes_t)_mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15),
                                           _mm512_packus_epi16(ab, cd));
}
INLINE void stream(float* p, f32 v) { _mm512_stream_ps(p, (__m512)v); }
template <class T> INLINE void stream(T* p, f32 v) { _mm256_stream_si256((__m256i*)p, halves(p, v)); }
INLINE f32 nan_if_not_finite(f32 v, f32 bad) { return fma(v, f32{}, bad); }  // 0 * inf is NaN
INLINE void stream(uint8_t* p, bytes_t v) { _mm512_stream_si512((__m512i*)p, (__m512i)v); }
struct table16 { f32 values; };  // 16 floats, looked up by four bits
INLINE table16 load_table(const float* p) { return {load(p)}; }
INLINE f32 lookup(const table16& t, i32 v,
                  int shift) {  // by bits [shift, shift + 4) of each lane; vpermps reads no others
  return (f32)_mm512_permutexvar_ps((__m512i)((u32)v >> shift), (__m512)t.values);
}
typedef table16 line_table;
INLINE line_table load_line_table(const float* p) { return load_table(p); }
INLINE void lookup_line(const line_table& t, i32 codes,
                        f32 (&w)[8]) {  // the low four bits of four bytes, then the high
  unroll<8>([&](auto j) INLINE_LAMBDA { w[j] = lookup(t, codes, 8 * (j % 4) + 4 * (j / 4)); });
}
struct table8 { f32 twice; };  // 8 floats, looked up by the low three bits of each lane; bit 3 chooses the copy
INLINE table8 load_table8(const float* p) { return {(f32)_mm512_broadcast_f32x8(_mm256_loadu_ps(p))}; }
INLINE f32 lookup(const table8& t, i32 at) { return (f32)_mm512_permutexvar_ps((__m512i)at, (__m512)t.twice); }
INLINE void interleave(f32 a, f32 b, f32& low, f32& high) {  // a0 b0 a1 b1 ...
  const __m512i from = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  low = (f32)_mm512_permutex2var_ps((__m512)a, from, (__m512)b);
  high = (f32)_mm512_permutex2var_ps((__m512)a, _mm512_add_epi32(from, _mm512_set1_epi32(8)), (__m512)b);
}
struct halves32 { __m512i twice; };  // 16 halves, looked up 32 codes at a time; bit 4 of an index chooses the copy
INLINE halves32 load_halves(const uint16_t* p) {
  return {_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)p))};
}
INLINE __m512i lookup_halves(const halves32& t, const uint8_t* packed) {  // 32 codes, high four bits of a byte first
  const __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)packed));
  return _mm512_permutexvar_epi16(_mm512_or_si512(_mm512_srli_epi32(v, 4), _mm512_slli_epi32(v, 16)), t.twice);
}
INLINE void store_halves(const halves32& t, const uint8_t* packed, void* y) {
  _mm512_storeu_si512(y, lookup_halves(t, packed));
}
INLINE void stream_halves(const halves32& t, const uint8_t* packed, void* y) {
  _mm512_stream_si512((__m512i*)y, lookup_halves(t, packed));
}
INLINE void stream_end() { _mm_sfence(); }

// ---- the INT8 product
typedef uint8_t ROW_T;
constexpr bool CENTERED = false, PAIRED = false;
constexpr int COLS = 16;
constexpr size_t ROW_K = 64;
typedef i32 acc_t, a_t, b_t;
INLINE a_t load_a(const ROW_T* p) {
  int32_t quad;
  memcpy(&quad, p, 4);
  return (a_t)_mm512_set1_epi32(quad);
}
INLINE b_t load_b(const int8_t* p) { return (b_t)_mm512_loadu_si512(p); }
constexpr size_t WIDE_QUADS = 0, WIDE_B = 0;
constexpr int MR_WIDE = 0;
typedef int8_t wide_t;
INLINE a_t load_row(const ROW_T* p) { return (a_t)_mm512_loadu_si512(p); }
INLINE int32_t reduce_add(acc_t v) { return _mm512_reduce_add_epi32((__m512i)v); }
INLINE acc_t dot(acc_t c, a_t a, b_t b) { return (acc_t)_mm512_dpbusd_epi32((__m512i)c, (__m512i)a, (__m512i)b); }
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
typedef __m512i w_t, x_t, nibbles_t;
INLINE nibbles_t load_nibbles(const int8_t* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }
INLINE x_t load_x(const int8_t* p) {
  int32_t quad;
  memcpy(&quad, p, 4);
  return _mm512_set1_epi32(quad);
}
INLINE void lookup(nibbles_t t, const uint8_t* line, w_t& low, w_t& high) {
  const __m512i v = _mm512_loadu_si512(line), mask = _mm512_set1_epi8(15);
  low = _mm512_shuffle_epi8(t, _mm512_and_si512(v, mask));
  high = _mm512_shuffle_epi8(t, _mm512_and_si512(_mm512_srli_epi16(v, 4), mask));
}
INLINE i32 dot(i32 c, w_t w, x_t x) { return (i32)_mm512_dpbusd_epi32((__m512i)c, w, x); }

// ---- tiles
constexpr int MR = 8, NV = 3;
constexpr size_t GEMV_ROWS = 4, SPLIT_ROWS = 0, DOT_ROWS = 4;
constexpr int GEMV_SUMS = 16;
constexpr int FLOAT_ROWS = 6, FLOAT_VECTORS = 4, FLOAT_SUMS = 16;
constexpr int ROWS_INT8 = 6, VECTORS_INT8 = 2;
constexpr int GEMV_STEPS_4BIT = 2, GEMV_VECTORS_INT8 = 4, DOT_ROWS_4BIT = 4;

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
