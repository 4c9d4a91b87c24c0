// What the kernels are written over: the vectors, loads, products and tile sizes of one ISA. isa_*.cpp set PYQKERN_ISA,
// which is the namespace and the name of the ISA's header. Nothing that differs between ISAs stands outside these
// headers.
//
// Every header defines, besides the vectors of vectors.h,
//   NEEDS             the instruction sets it is compiled for, a set of CpuFeature
//   float and integer vectors: load store min max fma round to_float reduce_min reduce_max add_halves narrow stream ...
//     store_halves    32 consecutive codes to entries of a table of sixteen 16-bit floats
//     lookup_line     the eight columns of a line of 4-bit codes, by the entries of a line_table of sixteen floats
//   the INT8 product  acc[COLS columns] += sum over four k of a[k] * b[column][k]: acc_t, a_t (four codes of one row,
//                     broadcast), b_t (four k of COLS columns), load_a, load_b, dot
//     ROW_T           the element of a quantized row
//     CENTERED        its zero point is already taken off
//     PAIRED          dot_pairs adds a[0]*a[1] + a[2]*a[3] + b[0]*b[1] + b[2]*b[3] to each column, which the sums
//                     of pairs of the row and of the column take off at the end; else it is dot
//     store_codes     4 * LANES integers, limited to [0, 255], to codes of a row; adds up their pairs where PAIRED
//     code_at         code k of a row less 128: -127 to 127 for a symmetric one;  load_codes: the next sixteen
//     MR, NV          tile of the product: rows, and vectors of columns, which cover whole panels or a part of one
//     WIDE_QUADS      longest strip of the weight that pays to be widened once for many rows, from load_b by store_b to
//                     vectors of WIDE_B wide_t, and MR_WIDE, the rows of its tiles; 0: none
//     GEMV_ROWS       rows up to which the weight is read once, front to back;  GEMV_SUMS: accumulators that it keeps
//     DOT_ROWS        rows up to which a plain weight is not packed
//     Bytes           the products of plain bytes, where vpmaddubsw and sums in int16 are faster: FOLDED, whether they
//                     are; row_t, the element of a row of 7 bits; and where FOLDED: MR, quad_t, load_a, load_b as above,
//                     dot of one quad or of two that are added in int16, dot_any, store_codes to row_t, and, for
//                     int8_split.inl, transpose_rows and excess_sums
//     SPLIT_ROWS      rows from which a weight is multiplied in its split form; 0: never
//     ROW_K           how many k of a plain row dot takes at once, a from load_row and b from load_b; 0: not at all
//   the 4-bit product of integers  c[lane] += sum over four k of x[k] * w[lane][k]: w_t (looked-up integers, u8), x_t
//                     (four s8 of one row, broadcast), nibbles_t, load_nibbles, load_x, lookup, dot
//     SHORT_SUMS      dot takes two quads at a time, and sums of int16: short_sum has two to a lane, widen adds them
//   tiles of the products of fp32 rows with expanded weights
//     FLOAT_ROWS, FLOAT_VECTORS    many rows;  FLOAT_SUMS: accumulators of few rows of an INT8 weight
//   tiles of the 4-bit products
//     ROWS_INT8, VECTORS_INT8      many rows, integers: totals stay in registers beside the sums of one step
//     GEMV_STEPS_4BIT              few rows, fp32: steps side by side for one row
//     GEMV_VECTORS_INT8            few rows, integers: vectors at a time for more than one row
//     DOT_ROWS_4BIT                rows at a time against a weight in flat form
//
// No std containers or algorithms here: at -O0 they would leave weak symbols, compiled for this ISA, to the whole
// program.
#pragma once

#define PYQKERN_STRING2(x) #x
#define PYQKERN_STRING(x) PYQKERN_STRING2(x)
#include PYQKERN_STRING(PYQKERN_ISA.h)

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pyqkern {
namespace PYQKERN_ISA {

// Four rows of four quads each, to four lines of a panel: quad q of the rows r goes to out + q * line, behind each
// other.
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

INLINE i32 widen(i32 c) { return c; }

// A fold of a row's codes as s8 behind four bytes: their sum times `factor` as one int32, or, `in_halves`, as two int16
// modulo 2^16, of the first and of the last two k of every quad. quads is a multiple of four.
INLINE void load_fold(const ROW_T* q, size_t quads, int32_t factor, bool in_halves, int8_t* x) {
#if defined(__AVX2__)
  __m128i sum = _mm_setzero_si128();  // 32 quads at most, in four lanes: 8 * 2 * 127
  for (size_t i = 0; i < 4 * quads; i += 16) {
    load_codes(q + i, x + 4 + i);
    sum = _mm_add_epi16(sum, _mm_maddubs_epi16(_mm_set1_epi8(1), _mm_loadu_si128((const __m128i*)(x + 4 + i))));
  }
  sum = _mm_add_epi16(sum, _mm_shuffle_epi32(sum, 0x4e));
  sum = _mm_add_epi16(sum, _mm_shuffle_epi32(sum, 0xb1));
  const __m128i factors = _mm_set1_epi16((int16_t)factor);
  const int32_t start = _mm_cvtsi128_si32(in_halves ? _mm_mullo_epi16(sum, factors) : _mm_madd_epi16(sum, factors));
#else
  (void)in_halves;
  int32_t start = 0;
  for (size_t i = 0; i < 4 * quads; i += 16) {
    load_codes(q + i, x + 4 + i);
    for (size_t k = 0; k < 16; ++k) start += factor * x[4 + i + k];
  }
#endif
  memcpy(x, &start, 4);
}

// ---- the same for every ISA
INLINE f32 as_f32(i32 v) { return (f32)v; }
INLINE i32 as_i32(f32 v) { return (i32)v; }
INLINE f32 clamp(f32 v, f32 lo, f32 hi) { return min(max(v, lo), hi); }
INLINE i32 min(i32 a, i32 b) { return a < b ? a : b; }
INLINE i32 max(i32 a, i32 b) { return a > b ? a : b; }

// The sum of the lanes, modulo 2^32.
INLINE int32_t total(i32 v) {
  int32_t lanes[LANES];
  uint32_t sum = 0;
  store(lanes, v);
  for (int i = 0; i < LANES; ++i) sum += (uint32_t)lanes[i];
  return (int32_t)sum;
}

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
