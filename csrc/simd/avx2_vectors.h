// AVX2 with FMA and F16C: vectors of 8. What avx2.h and avxvnni.h have in common.
#pragma once

#include <immintrin.h>

#include "kernels/kernels.h"

namespace pyqkern {
namespace PYQKERN_ISA { constexpr int LANES = 8; }  // namespace PYQKERN_ISA
}  // namespace pyqkern

#include "simd/vectors.h"

namespace pyqkern {
namespace PYQKERN_ISA {

INLINE f32 min(f32 a, f32 b) { return (f32)_mm256_min_ps((__m256)a, (__m256)b); }  // b where either is NaN
INLINE f32 max(f32 a, f32 b) { return (f32)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE f32 fma(f32 a, f32 b, f32 c) { return (f32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE f32 sqrt(f32 v) { return (f32)_mm256_sqrt_ps((__m256)v); }
INLINE i32 truncate(f32 v) { return (i32)_mm256_cvttps_epi32((__m256)v); }
INLINE bool any(i32 mask) { return _mm256_movemask_ps((__m256)mask) != 0; }  // of lanes that are 0 or -1
INLINE i32 round(f32 v) { return (i32)_mm256_cvtps_epi32((__m256)v); }       // ties to even
INLINE f32 to_float(i32 v) { return (f32)_mm256_cvtepi32_ps((__m256i)v); }
INLINE float reduce_min(f32 v) {
  __m128 m = _mm_min_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  m = _mm_min_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_min_ss(m, _mm_movehdup_ps(m)));
}
INLINE float reduce_max(f32 v) { return -reduce_min(-v); }
INLINE int32_t reduce_add_lanes(i32 v) {
  __m128i m = _mm_add_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  m = _mm_add_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}
INLINE float add_halves(f32 v) {  // lanes i and i + 4, then i and i + 2, then both
  __m128 m = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  m = _mm_add_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
}
INLINE void add_halves(const f32 (&v)[4], float* sums) {  // the same of four vectors at once
  __m128 m[4];
  for (int i = 0; i < 4; ++i)
    m[i] = _mm_add_ps(_mm256_castps256_ps128((__m256)v[i]), _mm256_extractf128_ps((__m256)v[i], 1));
  const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(m[0], m[1]), _mm_unpackhi_ps(m[0], m[1]));
  const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(m[2], m[3]), _mm_unpackhi_ps(m[2], m[3]));
  _mm_storeu_ps(sums, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
}
INLINE f32 load(const bf16* p) {
  return (f32)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
INLINE f32 load(const fp16* p) { return (f32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE __m128i low_shorts(i32 v) {  // values in [-32768, 65535], low 16 bits of each
  __m256i shorts = _mm256_packus_epi32(_mm256_and_si256((__m256i)v, _mm256_set1_epi32(0xffff)), _mm256_setzero_si256());
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(shorts, 0x08));
}
INLINE __m128i halves(const bf16*, f32 v) { return low_shorts(bf16_bits(v)); }
INLINE __m128i halves(const fp16*, f32 v) { return _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
template <class T> INLINE void store(T* p, f32 v) { _mm_storeu_si128((__m128i*)p, halves(p, v)); }
INLINE i32 load_bytes(const uint8_t* p) { return (i32)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
INLINE i32 load_bytes(const int8_t* p) { return (i32)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
INLINE void store_bytes(uint8_t* p, i32 v) {
  __m128i shorts = low_shorts(v & 0xff);
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(shorts, shorts));
}
INLINE bytes_t narrow(i32 a, i32 b, i32 c, i32 d) {  // the packs work within 128 bits, the permutation mends the order
  __m256i ab = _mm256_packus_epi32((__m256i)a, (__m256i)b), cd = _mm256_packus_epi32((__m256i)c, (__m256i)d);
  return (bytes_t)_mm256_permutevar8x32_epi32(_mm256_packus_epi16(ab, cd), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
INLINE void stream(float* p, f32 v) { _mm256_stream_ps(p, (__m256)v); }
template <class T> INLINE void stream(T* p, f32 v) { _mm_stream_si128((__m128i*)p, halves(p, v)); }
INLINE f32 nan_if_not_finite(f32 v, f32 bad) { return fma(v, f32{}, bad); }  // 0 * inf is NaN
INLINE void stream(uint8_t* p, bytes_t v) { _mm256_stream_si256((__m256i*)p, (__m256i)v); }
struct table16 { f32 low, high; };  // 16 floats, looked up by four bits
INLINE table16 load_table(const float* p) { return {load(p), load(p + 8)}; }
INLINE f32 lookup(const table16& t, i32 v, int shift) {  // by bits [shift, shift + 4) of each lane
  const __m256i at = (__m256i)((u32)v >> shift);         // vpermps reads three bits, vblendvps the highest of the lane
  const __m256 low = _mm256_permutevar8x32_ps((__m256)t.low, at), high = _mm256_permutevar8x32_ps((__m256)t.high, at);
  return (f32)_mm256_blendv_ps(low, high, (__m256)((u32)v << (28 - shift)));
}
struct line_table { __m256i byte[4]; };  // 16 floats as their four bytes, for lines of 4-bit codes
INLINE line_table load_line_table(const float* p) {
  uint8_t bytes[4][16], all[64];
  memcpy(all, p, sizeof all);
  for (int i = 0; i < 64; ++i) bytes[i % 4][i / 4] = all[i];
  line_table t;
  for (int b = 0; b < 4; ++b) t.byte[b] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)bytes[b]));
  return t;
}
// w[j], by the low four bits of byte j of each lane, w[4 + j] by its high ones: bytes are looked up 32 at a time, in
// half the instructions of lookup.
INLINE void lookup_line(const line_table& t, i32 codes, f32 (&w)[8]) {
  const __m256i order = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                         0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m256i mask = _mm256_set1_epi8(15), by_byte = _mm256_shuffle_epi8((__m256i)codes, order);
  auto half = [&](__m256i at, f32* to) INLINE_LAMBDA {
    const __m256i b0 = _mm256_shuffle_epi8(t.byte[0], at), b1 = _mm256_shuffle_epi8(t.byte[1], at);
    const __m256i b2 = _mm256_shuffle_epi8(t.byte[2], at), b3 = _mm256_shuffle_epi8(t.byte[3], at);
    const __m256i low01 = _mm256_unpacklo_epi8(b0, b1), low23 = _mm256_unpacklo_epi8(b2, b3);
    const __m256i high01 = _mm256_unpackhi_epi8(b0, b1), high23 = _mm256_unpackhi_epi8(b2, b3);
    to[0] = (f32)_mm256_unpacklo_epi16(low01, low23);
    to[1] = (f32)_mm256_unpackhi_epi16(low01, low23);
    to[2] = (f32)_mm256_unpacklo_epi16(high01, high23);
    to[3] = (f32)_mm256_unpackhi_epi16(high01, high23);
  };
  half(_mm256_and_si256(by_byte, mask), w);
  half(_mm256_and_si256(_mm256_srli_epi16(by_byte, 4), mask), w + 4);
}
struct table8 { f32 values; };  // 8 floats, looked up by the low three bits of each lane
INLINE table8 load_table8(const float* p) { return {load(p)}; }
INLINE f32 lookup(const table8& t, i32 at) { return (f32)_mm256_permutevar8x32_ps((__m256)t.values, (__m256i)at); }
INLINE void interleave(f32 a, f32 b, f32& low, f32& high) {  // a0 b0 a1 b1 ...
  const __m256 even = _mm256_unpacklo_ps((__m256)a, (__m256)b), odd = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  low = (f32)_mm256_permute2f128_ps(even, odd, 0x20);
  high = (f32)_mm256_permute2f128_ps(even, odd, 0x31);
}
struct halves32 { __m256i low, high; };  // 16 halves as their low and their high bytes
INLINE halves32 load_halves(const uint16_t* p) {
  const __m128i a = _mm_loadu_si128((const __m128i*)p), b = _mm_loadu_si128((const __m128i*)(p + 8)),
                mask = _mm_set1_epi16(255);
  return {_mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(a, mask), _mm_and_si128(b, mask))),
          _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)))};
}
INLINE void lookup_halves(const halves32& t, const uint8_t* packed, __m256i& a,
                          __m256i& b) {  // 32 codes, high four bits of a byte first
  const __m256i v = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)packed));
  const __m256i codes =
      _mm256_and_si256(_mm256_or_si256(_mm256_srli_epi16(v, 4), _mm256_slli_epi16(v, 8)), _mm256_set1_epi8(15));
  const __m256i low = _mm256_shuffle_epi8(t.low, codes), high = _mm256_shuffle_epi8(t.high, codes);
  const __m256i even = _mm256_unpacklo_epi8(low, high), odd = _mm256_unpackhi_epi8(low, high);
  a = _mm256_permute2x128_si256(even, odd, 0x20);
  b = _mm256_permute2x128_si256(even, odd, 0x31);
}
INLINE void store_halves(const halves32& t, const uint8_t* packed, void* y) {
  __m256i a, b;
  lookup_halves(t, packed, a, b);
  _mm256_storeu_si256((__m256i*)y, a);
  _mm256_storeu_si256((__m256i*)y + 1, b);
}
INLINE void stream_halves(const halves32& t, const uint8_t* packed, void* y) {
  __m256i a, b;
  lookup_halves(t, packed, a, b);
  _mm256_stream_si256((__m256i*)y, a);
  _mm256_stream_si256((__m256i*)y + 1, b);
}
INLINE void stream_end() { _mm_sfence(); }

typedef __m256i w_t, x_t, nibbles_t;
INLINE nibbles_t load_nibbles(const int8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
}
INLINE x_t load_x(const int8_t* p) {
  int32_t quad;
  memcpy(&quad, p, 4);
  return _mm256_set1_epi32(quad);
}
INLINE void lookup(nibbles_t t, const uint8_t* line, w_t& low, w_t& high) {
  const __m256i v = _mm256_loadu_si256((const __m256i*)line), mask = _mm256_set1_epi8(15);
  low = _mm256_shuffle_epi8(t, _mm256_and_si256(v, mask));
  high = _mm256_shuffle_epi8(t, _mm256_and_si256(_mm256_srli_epi16(v, 4), mask));
}

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
