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

// ---- the INT8 products of plain bytes
// vpmaddubsw, which int8_a7.inl and int8_split.inl keep from saturating. 8 accumulators, two quads of a panel, ones, and
// the rows' quads take the 16 registers.
INLINE void store_codes(uint8_t* q, i32 a, i32 b, i32 c, i32 d, i32, i32&) {
  const bytes_t codes = narrow(a, b, c, d);
  memcpy(q, &codes, sizeof codes);
}
// Four rows of 32 codes: bytes 4j to 4j + 3 of quads[i] are of row 16 * (j / 4) + 4 * i + j % 4.
INLINE void interleave_rows(const uint8_t* const (&row)[4], __m256i (&quads)[4]) {
  __m256i r[4];
  unroll<4>([&](auto i) INLINE_LAMBDA { r[i] = _mm256_loadu_si256((const __m256i*)row[i]); });
  const __m256i low01 = _mm256_unpacklo_epi8(r[0], r[1]), low23 = _mm256_unpacklo_epi8(r[2], r[3]);
  const __m256i high01 = _mm256_unpackhi_epi8(r[0], r[1]), high23 = _mm256_unpackhi_epi8(r[2], r[3]);
  quads[0] = _mm256_unpacklo_epi16(low01, low23);
  quads[1] = _mm256_unpackhi_epi16(low01, low23);
  quads[2] = _mm256_unpacklo_epi16(high01, high23);
  quads[3] = _mm256_unpackhi_epi16(high01, high23);
}
struct Bytes {
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
  static INLINE_MEMBER acc_t dot_any(acc_t c, quad_t a, quad_t b) {  // of all codes and weights
    const __m256i even = _mm256_and_si256(a, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(a, 8);
    c += (acc_t)_mm256_madd_epi16(even, _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    return c + (acc_t)_mm256_madd_epi16(odd, _mm256_srai_epi16(b, 8));
  }

  // 32 rows of codes, of which the first `rows` are there, `width` long: code k of row r goes to columns[32 * k + r].
  static void transpose_rows(const uint8_t* q, size_t rows, size_t width, uint8_t* columns) {
    for (size_t half = 0; half < 32; half += 16)
      for (size_t k = 0; k < width; k += 16) {
        const size_t count = width - k < 16 ? width - k : 16;
        __m128i v[16], next[16];
        for (size_t r = 0; r < 16; ++r) {
          v[r] = _mm_setzero_si128();
          if (half + r < rows) memcpy(&v[r], q + (half + r) * width + k, count);
        }
        for (int step = 0; step < 4; ++step) {  // each moves one bit of a row's number below those of k
          for (size_t r = 0; r < 8; ++r) {
            next[2 * r] = _mm_unpacklo_epi8(v[r], v[r + 8]);
            next[2 * r + 1] = _mm_unpackhi_epi8(v[r], v[r + 8]);
          }
          memcpy(v, next, sizeof v);
        }
        for (size_t i = 0; i < count; ++i) _mm_storeu_si128((__m128i*)(columns + (k + i) * 32 + half), v[i]);
      }
  }

  // sums[r][n] = sum over the entries of column n of code k of row r times their value, for 32 rows. The two values that
  // vpmaddubsw takes at once do not pass 128 together, so it does not saturate.
  template <class Excess> static void excess_sums(const uint8_t* columns, const Excess& x, int32_t (*sums)[kPanel]) {
    alignas(32) int32_t by_column[kPanel][32];
    for (size_t n = 0, i = 0; n < kPanel; ++n) {
      acc_t c[4];
      clear(c);
      x.column(n, i, [&](size_t s, size_t i) INLINE_LAMBDA {
        const uint8_t* from = columns + s * kSegment * 32;
        const uint8_t* const row[4] = {from + 32 * x.k[i], from + 32 * x.k[i + 1], from + 32 * x.k[i + 2],
                                       from + 32 * x.k[i + 3]};
        __m256i codes[4];
        interleave_rows(row, codes);
        int32_t four;
        memcpy(&four, x.value + i, 4);
        const __m256i values = _mm256_set1_epi32(four);
        unroll<4>([&](auto j) INLINE_LAMBDA { c[j] = dot(c[j], codes[j], values); });
      });
      unroll<2>([&](auto j) INLINE_LAMBDA {
        const __m256i first = (__m256i)c[2 * j], second = (__m256i)c[2 * j + 1];
        int32_t* to = by_column[n] + 8 * j;
        _mm256_store_si256((__m256i*)to, _mm256_permute2x128_si256(first, second, 0x20));
        _mm256_store_si256((__m256i*)(to + 16), _mm256_permute2x128_si256(first, second, 0x31));
      });
    }
    for (size_t n = 0; n < kPanel; n += 8)
      for (size_t r = 0; r < 32; r += 8) transpose_sums(&by_column[n][r], 32, &sums[r][n]);
  }

 private:
  // Eight by eight int32.
  static INLINE_MEMBER void transpose_sums(const int32_t* from, size_t ld, int32_t* to) {
    __m256 v[8], pairs[8];
    unroll<8>([&](auto i) INLINE_LAMBDA { v[i] = _mm256_load_ps((const float*)(from + i * ld)); });
    unroll<4>([&](auto i) INLINE_LAMBDA {
      pairs[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
      pairs[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
    });
    unroll<4>([&](auto i) INLINE_LAMBDA {
      const __m256 low = pairs[i / 2 * 4 + i % 2], high = pairs[i / 2 * 4 + i % 2 + 2];
      v[i / 2 * 4 + i % 2 * 2] = _mm256_shuffle_ps(low, high, 0x44);
      v[i / 2 * 4 + i % 2 * 2 + 1] = _mm256_shuffle_ps(low, high, 0xee);
    });
    unroll<4>([&](auto i) INLINE_LAMBDA {
      _mm256_store_ps((float*)(to + i * kPanel), _mm256_permute2f128_ps(v[i], v[i + 4], 0x20));
      _mm256_store_ps((float*)(to + (i + 4) * kPanel), _mm256_permute2f128_ps(v[i], v[i + 4], 0x31));
    });
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
constexpr size_t GEMV_ROWS = 4, SPLIT_ROWS = 32, DOT_ROWS = 4;
constexpr int GEMV_SUMS = 8;
constexpr int FLOAT_ROWS = 6, FLOAT_VECTORS = 2, FLOAT_SUMS = 8;
constexpr int ROWS_INT8 = 4, VECTORS_INT8 = 2;
constexpr int GEMV_STEPS_4BIT = 1, GEMV_VECTORS_INT8 = 2, DOT_ROWS_4BIT = 1;

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
