// The vectors that the kernels are written over, one set per ISA. This is the only file that asks which ISA it is
// compiled for; isa_*.cpp set PYQKERN_ISA, the namespace.
//
// f32 and i32 are compiler vectors of LANES elements, so + - * and << >> on them mean the lane-wise operation everywhere.
// What has no such operator stands below, as functions of the same names on every ISA:
//   set1 load store min max fma round to_float reduce_min narrow stream lookup interleave ...
// lookup_bytes turns a line of 64 bytes into the table's entries of their low and of their high four bits.
// store_halves does so with 32 consecutive codes and a table of sixteen 16-bit floats.
// and the INT8 product: acc, a (four codes of one row, broadcast), b (four k of COLS columns), dot.
//
// No std containers or algorithms here: at -O0 they would leave weak symbols, compiled for this ISA, to the whole program.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

namespace pyqkern {
namespace PYQKERN_ISA {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float f32 __attribute__((vector_size(4 * LANES)));
typedef int32_t i32 __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32 __attribute__((vector_size(4 * LANES)));
typedef uint8_t bytes_t __attribute__((vector_size(4 * LANES)));  // four i32 in [-32768, 32767], saturated

INLINE f32 set1(float x) { return x - f32{}; }
INLINE i32 set1(int32_t x) { return x - i32{}; }
INLINE f32 load(const float* p) { f32 v; memcpy(&v, p, sizeof v); return v; }
INLINE i32 load(const int32_t* p) { i32 v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float* p, f32 v) { memcpy(p, &v, sizeof v); }
INLINE void store(int32_t* p, i32 v) { memcpy(p, &v, sizeof v); }

// Round to nearest even by hand: the CPU's own bf16 conversion flushes denormals. NaN becomes 0x7fc0, as in torch.
INLINE i32 bf16_bits(f32 v) {
  u32 u = (u32)v;
  u32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return v == v ? (i32)rounded : set1(0x7fc0);
}

#if defined(__AVX512F__)
// ---- AVX-512 (F, BW, DQ, VL) with VNNI
INLINE f32 min(f32 a, f32 b) { return (f32)_mm512_min_ps((__m512)a, (__m512)b); }  // b where either is NaN
INLINE f32 max(f32 a, f32 b) { return (f32)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE f32 fma(f32 a, f32 b, f32 c) { return (f32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE i32 round(f32 v) { return (i32)_mm512_cvtps_epi32((__m512)v); }  // ties to even
INLINE f32 to_float(i32 v) { return (f32)_mm512_cvtepi32_ps((__m512i)v); }
INLINE float reduce_min(f32 v) { return _mm512_reduce_min_ps((__m512)v); }
INLINE float reduce_max(f32 v) { return _mm512_reduce_max_ps((__m512)v); }
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
INLINE void store_shorts(int16_t* p, i32 a, i32 b) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)a));
  _mm256_storeu_si256((__m256i*)(p + LANES), _mm512_cvtepi32_epi16((__m512i)b));
}
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
INLINE f32 lookup(const table16& t, i32 v, int shift) {  // by bits [shift, shift + 4) of each lane; vpermps reads no others
  return (f32)_mm512_permutexvar_ps((__m512i)((u32)v >> shift), (__m512)t.values);
}
INLINE void interleave(f32 a, f32 b, f32& low, f32& high) {  // a0 b0 a1 b1 ...
  const __m512i from = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  low = (f32)_mm512_permutex2var_ps((__m512)a, from, (__m512)b);
  high = (f32)_mm512_permutex2var_ps((__m512)a, _mm512_add_epi32(from, _mm512_set1_epi32(8)), (__m512)b);
}
INLINE void lookup_bytes(const int8_t* table, const uint8_t* line, int8_t* low, int8_t* high) {
  const __m512i t = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), mask = _mm512_set1_epi8(15);
  const __m512i v = _mm512_loadu_si512(line);
  _mm512_storeu_si512(low, _mm512_shuffle_epi8(t, _mm512_and_si512(v, mask)));
  _mm512_storeu_si512(high, _mm512_shuffle_epi8(t, _mm512_and_si512(_mm512_srli_epi16(v, 4), mask)));
}
struct halves32 { __m512i twice; };  // 16 halves, looked up 32 codes at a time; bit 4 of an index chooses the copy
INLINE halves32 load_halves(const uint16_t* p) { return {_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)p))}; }
INLINE __m512i lookup_halves(const halves32& t, const uint8_t* packed) {  // 32 codes, high four bits of a byte first
  const __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)packed));
  return _mm512_permutexvar_epi16(_mm512_or_si512(_mm512_srli_epi32(v, 4), _mm512_slli_epi32(v, 16)), t.twice);
}
INLINE void store_halves(const halves32& t, const uint8_t* packed, void* y) { _mm512_storeu_si512(y, lookup_halves(t, packed)); }
INLINE void stream_halves(const halves32& t, const uint8_t* packed, void* y) { _mm512_stream_si512((__m512i*)y, lookup_halves(t, packed)); }
INLINE void stream_end() { _mm_sfence(); }
#elif defined(__AVX2__)
// ---- AVX2 with FMA and F16C
INLINE f32 min(f32 a, f32 b) { return (f32)_mm256_min_ps((__m256)a, (__m256)b); }  // b where either is NaN
INLINE f32 max(f32 a, f32 b) { return (f32)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE f32 fma(f32 a, f32 b, f32 c) { return (f32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE i32 round(f32 v) { return (i32)_mm256_cvtps_epi32((__m256)v); }  // ties to even
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
INLINE void store_shorts(int16_t* p, i32 a, i32 b) {
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)a, (__m256i)b), 0xd8));
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
  const __m256i at = (__m256i)((u32)v >> shift);  // vpermps reads three bits, vblendvps the highest of the lane
  const __m256 low = _mm256_permutevar8x32_ps((__m256)t.low, at), high = _mm256_permutevar8x32_ps((__m256)t.high, at);
  return (f32)_mm256_blendv_ps(low, high, (__m256)((u32)v << (28 - shift)));
}
INLINE void interleave(f32 a, f32 b, f32& low, f32& high) {  // a0 b0 a1 b1 ...
  const __m256 even = _mm256_unpacklo_ps((__m256)a, (__m256)b), odd = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  low = (f32)_mm256_permute2f128_ps(even, odd, 0x20);
  high = (f32)_mm256_permute2f128_ps(even, odd, 0x31);
}
INLINE void lookup_bytes(const int8_t* table, const uint8_t* line, int8_t* low, int8_t* high) {
  const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table)), mask = _mm256_set1_epi8(15);
  for (int i = 0; i < 64; i += 32) {
    const __m256i v = _mm256_loadu_si256((const __m256i*)(line + i));
    _mm256_storeu_si256((__m256i*)(low + i), _mm256_shuffle_epi8(t, _mm256_and_si256(v, mask)));
    _mm256_storeu_si256((__m256i*)(high + i), _mm256_shuffle_epi8(t, _mm256_and_si256(_mm256_srli_epi16(v, 4), mask)));
  }
}
struct halves32 { __m256i low, high; };  // 16 halves as their low and their high bytes
INLINE halves32 load_halves(const uint16_t* p) {
  const __m128i a = _mm_loadu_si128((const __m128i*)p), b = _mm_loadu_si128((const __m128i*)(p + 8)), mask = _mm_set1_epi16(255);
  return {_mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(a, mask), _mm_and_si128(b, mask))),
          _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)))};
}
INLINE void lookup_halves(const halves32& t, const uint8_t* packed, __m256i& a, __m256i& b) {  // 32 codes, high four bits of a byte first
  const __m256i v = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)packed));
  const __m256i codes = _mm256_and_si256(_mm256_or_si256(_mm256_srli_epi16(v, 4), _mm256_slli_epi16(v, 8)), _mm256_set1_epi8(15));
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
#else
// ---- any CPU: the compiler's vectors of four, and loops over their lanes
INLINE f32 min(f32 a, f32 b) { return a < b ? a : b; }  // b where either is NaN
INLINE f32 max(f32 a, f32 b) { return a > b ? a : b; }
INLINE f32 fma(f32 a, f32 b, f32 c) {
  f32 r;
  for (int i = 0; i < LANES; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
}
INLINE i32 round(f32 v) {  // ties to even; |v| < 2^22: adding 1.5 * 2^23 leaves the integer in the low mantissa bits
  return (i32)(v + 12582912.0f) - 0x4b400000;
}
INLINE f32 to_float(i32 v) { return __builtin_convertvector(v, f32); }
INLINE float reduce_min(f32 v) {
  float r = v[0];
  for (int i = 1; i < LANES; ++i) r = r < v[i] ? r : v[i];
  return r;
}
INLINE float reduce_max(f32 v) { return -reduce_min(-v); }
INLINE f32 load(const bf16* p) {
  i32 r;
  for (int i = 0; i < LANES; ++i) r[i] = (int32_t)((uint32_t)p[i].bits << 16);
  return (f32)r;
}
INLINE float bits_to_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
INLINE uint32_t float_to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
INLINE float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13;
  if ((h & 0x7c00) == 0x7c00) return bits_to_float(sign | 0x7f800000 | rest | ((h & 0x3ff) ? 0x400000 : 0));
  // The exponent is 112 too small; a multiplication by 2^112 mends it, and makes denormals right as well.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest) * bits_to_float(0x77800000)));
}
INLINE uint16_t float_to_half(float f) {
  uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00 | ((a >> 13) & 0x3ff));
  if (a >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // 65520 and above round to infinity
  if (a < 0x38800000)  // below 2^-14: adding 0.5 lets the float addition round at the half's last denormal bit
    return (uint16_t)(sign | (float_to_bits(bits_to_float(a) + 0.5f) - 0x3f000000));
  return (uint16_t)(sign | ((a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13));
}
INLINE f32 load(const fp16* p) {
  f32 r;
  for (int i = 0; i < LANES; ++i) r[i] = half_to_float(p[i].bits);
  return r;
}
INLINE void store(bf16* p, f32 v) {
  i32 b = bf16_bits(v);
  for (int i = 0; i < LANES; ++i) p[i].bits = (uint16_t)b[i];
}
INLINE void store(fp16* p, f32 v) {
  for (int i = 0; i < LANES; ++i) p[i].bits = float_to_half(v[i]);
}
INLINE i32 load_bytes(const uint8_t* p) { return i32{p[0], p[1], p[2], p[3]}; }
INLINE i32 load_bytes(const int8_t* p) { return i32{p[0], p[1], p[2], p[3]}; }
INLINE void store_bytes(uint8_t* p, i32 v) {
  for (int i = 0; i < LANES; ++i) p[i] = (uint8_t)v[i];
}
INLINE void store_shorts(int16_t* p, i32 a, i32 b) {
  for (int i = 0; i < LANES; ++i) p[i] = (int16_t)a[i], p[LANES + i] = (int16_t)b[i];
}
INLINE bytes_t narrow(i32 a, i32 b, i32 c, i32 d) {
  const i32 v[4] = {a, b, c, d};
  bytes_t r;
  for (int i = 0; i < 4 * LANES; ++i) {
    const int32_t code = v[i / LANES][i % LANES];
    r[i] = (uint8_t)(code < 0 ? 0 : code > 255 ? 255 : code);
  }
  return r;
}
template <class T> INLINE void stream(T* p, f32 v) { store(p, v); }
INLINE f32 nan_if_not_finite(f32 v, f32 bad) { return v * 0.0f + bad; }
INLINE void stream(uint8_t* p, bytes_t v) { memcpy(p, &v, sizeof v); }
struct table16 { const float* values; };  // 16 floats, looked up by four bits
INLINE table16 load_table(const float* p) { return {p}; }
INLINE f32 lookup(const table16& t, i32 v, int shift) {  // by bits [shift, shift + 4) of each lane
  const i32 at = (v >> shift) & 15;
  f32 r;
  for (int i = 0; i < LANES; ++i) r[i] = t.values[at[i]];
  return r;
}
INLINE void interleave(f32 a, f32 b, f32& low, f32& high) {  // a0 b0 a1 b1 ...
  low = f32{a[0], b[0], a[1], b[1]};
  high = f32{a[2], b[2], a[3], b[3]};
}
INLINE void lookup_bytes(const int8_t* table, const uint8_t* line, int8_t* low, int8_t* high) {
  for (int i = 0; i < 64; ++i) low[i] = table[line[i] & 15], high[i] = table[line[i] >> 4];
}
struct halves32 { uint16_t values[16]; };
INLINE halves32 load_halves(const uint16_t* p) { halves32 t; memcpy(t.values, p, sizeof t.values); return t; }
INLINE void store_halves(const halves32& t, const uint8_t* packed, void* y) {  // 32 codes, high four bits of a byte first
  uint16_t v[32];
  for (int i = 0; i < 16; ++i) v[2 * i] = t.values[packed[i] >> 4], v[2 * i + 1] = t.values[packed[i] & 15];
  memcpy(y, v, sizeof v);
}
INLINE void stream_halves(const halves32& t, const uint8_t* packed, void* y) { store_halves(t, packed, y); }
INLINE void stream_end() {}
#endif

// ---- the INT8 product: acc[COLS columns] += sum over four k of a[k] * b[column][k]
// ROW_T is the element of a quantized row; CENTERED says that its zero point is already taken off.
// SUMS accumulators make LANES finished sums. WIDEN says that a strip of the weight pays to be widened once for many rows.
// ROW_K is how many k of a plain row dot takes at once, a from load_row and b from load_b; 0: not at all.
#if defined(__AVX512VNNI__)
typedef uint8_t ROW_T;
constexpr bool CENTERED = false;
constexpr int COLS = 16, SUMS = 1;
constexpr bool WIDEN = false;
constexpr size_t ROW_K = 64;
typedef i32 acc_t, a_t, b_t;
INLINE a_t load_a(const ROW_T* p) { int32_t quad; memcpy(&quad, p, 4); return (a_t)_mm512_set1_epi32(quad); }
INLINE b_t load_b(const int8_t* p) { return (b_t)_mm512_loadu_si512(p); }
INLINE a_t load_row(const ROW_T* p) { return (a_t)_mm512_loadu_si512(p); }
INLINE int32_t reduce_add(acc_t v) { return _mm512_reduce_add_epi32((__m512i)v); }
INLINE acc_t dot(acc_t c, a_t a, b_t b) { return (acc_t)_mm512_dpbusd_epi32((__m512i)c, (__m512i)a, (__m512i)b); }
INLINE i32 sums(const acc_t* c) { return c[0]; }
#elif defined(__AVXVNNI__)
typedef uint8_t ROW_T;
constexpr bool CENTERED = false;
constexpr int COLS = 8, SUMS = 1;
constexpr bool WIDEN = false;
constexpr size_t ROW_K = 32;
typedef i32 acc_t, a_t, b_t;
INLINE a_t load_a(const ROW_T* p) { int32_t quad; memcpy(&quad, p, 4); return (a_t)_mm256_set1_epi32(quad); }
INLINE b_t load_b(const int8_t* p) { return (b_t)_mm256_loadu_si256((const __m256i*)p); }
INLINE a_t load_row(const ROW_T* p) { return (a_t)_mm256_loadu_si256((const __m256i*)p); }
INLINE int32_t reduce_add(acc_t v) { return reduce_add_lanes(v); }
INLINE acc_t dot(acc_t c, a_t a, b_t b) { return (acc_t)_mm256_dpbusd_avx_epi32((__m256i)c, (__m256i)a, (__m256i)b); }
INLINE i32 sums(const acc_t* c) { return c[0]; }
#elif defined(__AVX2__)
// vpmaddubsw would saturate (2*255*127 > 32767), so both sides are widened to int16 and vpmaddwd is exact. An
// accumulator holds two partial sums for each of four columns.
typedef int16_t ROW_T;
constexpr bool CENTERED = true;
constexpr int COLS = 4, SUMS = 2;
constexpr bool WIDEN = true;
constexpr size_t ROW_K = 16;
typedef i32 acc_t, a_t, b_t;
INLINE a_t load_a(const ROW_T* p) { int64_t quad; memcpy(&quad, p, 8); return (a_t)_mm256_set1_epi64x(quad); }
INLINE b_t load_b(const int8_t* p) { return (b_t)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
INLINE b_t load_b(const int16_t* p) { return (b_t)_mm256_loadu_si256((const __m256i*)p); }  // widened before
INLINE a_t load_row(const ROW_T* p) { return (a_t)_mm256_loadu_si256((const __m256i*)p); }
INLINE int32_t reduce_add(acc_t v) { return reduce_add_lanes(v); }
INLINE acc_t dot(acc_t c, a_t a, b_t b) { return c + (acc_t)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
INLINE i32 sums(const acc_t* c) {
  return (i32)_mm256_permute4x64_epi64(_mm256_hadd_epi32((__m256i)c[0], (__m256i)c[1]), 0xd8);
}
#else
typedef int16_t ROW_T;
constexpr bool CENTERED = true;
constexpr int COLS = 4, SUMS = 1;
constexpr bool WIDEN = false;
constexpr size_t ROW_K = 0;
typedef i32 acc_t, b_t;
struct a_t { int32_t k[4]; };
INLINE a_t load_a(const ROW_T* p) { return {{p[0], p[1], p[2], p[3]}}; }
INLINE b_t load_b(const int8_t* p) { return load((const int32_t*)p); }
INLINE a_t load_row(const ROW_T* p) { return load_a(p); }  // not used: ROW_K = 0
INLINE int32_t reduce_add(acc_t v) { return v[0]; }
INLINE acc_t dot(acc_t c, a_t a, b_t b) {  // byte k of each lane, sign-extended by two shifts
  for (int k = 0; k < 4; ++k) c += ((i32)((u32)b << (8 * (3 - k))) >> 24) * a.k[k];
  return c;
}
INLINE i32 sums(const acc_t* c) { return c[0]; }
#endif

// ---- the 4-bit product of integers: acc[lane] += sum over four k of x[k] * w[lane][k]
// w_t holds looked-up integers, x_t four s8 of one row, broadcast; all within [-127, 127]. OFFSET: the table, and with it every
// w, has 128 too much, because vpdpbusd takes them as unsigned.
#if defined(__AVX512VNNI__)
constexpr int OFFSET = 128;
typedef __m512i w_t, x_t, nibbles_t;
INLINE nibbles_t load_nibbles(const int8_t* p) { return _mm512_xor_si512(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)), _mm512_set1_epi8(-128)); }
INLINE x_t load_x(const int8_t* p) { int32_t quad; memcpy(&quad, p, 4); return _mm512_set1_epi32(quad); }
INLINE void lookup(nibbles_t t, const uint8_t* line, w_t& low, w_t& high) {
  const __m512i v = _mm512_loadu_si512(line), mask = _mm512_set1_epi8(15);
  low = _mm512_shuffle_epi8(t, _mm512_and_si512(v, mask));
  high = _mm512_shuffle_epi8(t, _mm512_and_si512(_mm512_srli_epi16(v, 4), mask));
}
INLINE i32 dot(i32 acc, w_t w, x_t x) { return (i32)_mm512_dpbusd_epi32((__m512i)acc, w, x); }
#elif defined(__AVX2__)
typedef __m256i w_t, nibbles_t;
INLINE void lookup(nibbles_t t, const uint8_t* line, w_t& low, w_t& high) {
  const __m256i v = _mm256_loadu_si256((const __m256i*)line), mask = _mm256_set1_epi8(15);
  low = _mm256_shuffle_epi8(t, _mm256_and_si256(v, mask));
  high = _mm256_shuffle_epi8(t, _mm256_and_si256(_mm256_srli_epi16(v, 4), mask));
}
#if defined(__AVXVNNI__)
constexpr int OFFSET = 128;
typedef __m256i x_t;
INLINE nibbles_t load_nibbles(const int8_t* p) { return _mm256_xor_si256(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)), _mm256_set1_epi8(-128)); }
INLINE x_t load_x(const int8_t* p) { int32_t quad; memcpy(&quad, p, 4); return _mm256_set1_epi32(quad); }
INLINE i32 dot(i32 acc, w_t w, x_t x) { return (i32)_mm256_dpbusd_avx_epi32((__m256i)acc, w, x); }
#else
// vpmaddubsw of |x| and w with x's sign: at most 2 * 127 * 127 = 32258, which an int16 holds.
constexpr int OFFSET = 0;
struct x_t { __m256i value, magnitude; };
INLINE nibbles_t load_nibbles(const int8_t* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)); }
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
#endif
#else
constexpr int OFFSET = 0;
struct w_t { int8_t k[LANES][4]; };
struct x_t { int8_t k[4]; };
struct nibbles_t { int8_t values[16]; };
INLINE nibbles_t load_nibbles(const int8_t* p) { nibbles_t t; memcpy(t.values, p, 16); return t; }
INLINE x_t load_x(const int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
INLINE void lookup(const nibbles_t& t, const uint8_t* line, w_t& low, w_t& high) {
  for (int i = 0; i < LANES; ++i)
    for (int j = 0; j < 4; ++j) low.k[i][j] = t.values[line[4 * i + j] & 15], high.k[i][j] = t.values[line[4 * i + j] >> 4];
}
INLINE i32 dot(i32 acc, const w_t& w, x_t x) {
  for (int i = 0; i < LANES; ++i)
    for (int j = 0; j < 4; ++j) acc[i] += x.k[j] * w.k[i][j];
  return acc;
}
#endif

// Four rows of four quads each, to four lines of a panel: quad q of the rows r goes to out + q * line, behind each other.
INLINE void transpose_quads(const int8_t* const* row, size_t k, int8_t* out, size_t line) {
#if defined(__x86_64__)
  __m128i r[4];
  for (int i = 0; i < 4; ++i) r[i] = _mm_loadu_si128((const __m128i*)(row[i] + k));
  const __m128i ab = _mm_unpacklo_epi32(r[0], r[1]), cd = _mm_unpacklo_epi32(r[2], r[3]);
  const __m128i AB = _mm_unpackhi_epi32(r[0], r[1]), CD = _mm_unpackhi_epi32(r[2], r[3]);
  _mm_storeu_si128((__m128i*)out, _mm_unpacklo_epi64(ab, cd));
  _mm_storeu_si128((__m128i*)(out + line), _mm_unpackhi_epi64(ab, cd));
  _mm_storeu_si128((__m128i*)(out + 2 * line), _mm_unpacklo_epi64(AB, CD));
  _mm_storeu_si128((__m128i*)(out + 3 * line), _mm_unpackhi_epi64(AB, CD));
#else
  for (int q = 0; q < 4; ++q)
    for (int i = 0; i < 4; ++i) memcpy(out + q * line + 4 * i, row[i] + k + 4 * q, 4);
#endif
}

// ---- the same for every ISA
INLINE f32 as_f32(i32 v) { return (f32)v; }
INLINE i32 as_i32(f32 v) { return (i32)v; }
INLINE f32 clamp(f32 v, f32 lo, f32 hi) { return min(max(v, lo), hi); }
INLINE i32 min(i32 a, i32 b) { return a < b ? a : b; }
INLINE i32 max(i32 a, i32 b) { return a > b ? a : b; }

// The first n < LANES elements, through a copy: ragged edges are rare, and no lane may touch memory beyond them.
template <class T> INLINE auto load_part(const T* p, size_t n) {
  T copy[LANES] = {};
  memcpy(copy, p, n * sizeof(T));
  return load(copy);
}
template <class T, class V> INLINE void store_part(T* p, V v, size_t n) {
  T copy[LANES];
  store(copy, v);
  memcpy(p, copy, n * sizeof(T));
}

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
