// Any CPU: the compiler's vectors of four, and loops over their lanes.
#pragma once

#include "kernels/kernels.h"

namespace pyqkern {
namespace PYQKERN_ISA {

constexpr unsigned NEEDS = 0;
constexpr int LANES = 4;

}  // namespace PYQKERN_ISA
}  // namespace pyqkern

#include "simd/vectors.h"

namespace pyqkern {
namespace PYQKERN_ISA {

INLINE f32 min(f32 a, f32 b) { return a < b ? a : b; }  // b where either is NaN
INLINE f32 max(f32 a, f32 b) { return a > b ? a : b; }
INLINE f32 fma(f32 a, f32 b, f32 c) {
  f32 r;
  for (int i = 0; i < LANES; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
}
INLINE f32 sqrt(f32 v) {
  for (int i = 0; i < LANES; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
INLINE i32 truncate(f32 v) { return __builtin_convertvector(v, i32); }  // of |v| < 2^31
INLINE bool any(i32 mask) {                                             // of lanes that are 0 or -1
  bool r = false;
  for (int i = 0; i < LANES; ++i) r |= mask[i] != 0;
  return r;
}
INLINE i32 round(f32 v) {  // ties to even; |v| < 2^22
  return (i32)(v + kRounding) - 0x4b400000;
}
INLINE f32 to_float(i32 v) { return __builtin_convertvector(v, f32); }
INLINE float reduce_min(f32 v) {
  float r = v[0];
  for (int i = 1; i < LANES; ++i) r = r < v[i] ? r : v[i];
  return r;
}
INLINE float reduce_max(f32 v) { return -reduce_min(-v); }
INLINE float add_halves(f32 v) { return (v[0] + v[2]) + (v[1] + v[3]); }
INLINE void add_halves(const f32 (&v)[4], float* sums) {
  for (int i = 0; i < 4; ++i) sums[i] = add_halves(v[i]);
}
INLINE f32 load(const bf16* p) {
  i32 r;
  for (int i = 0; i < LANES; ++i) r[i] = (int32_t)((uint32_t)p[i].bits << 16);
  return (f32)r;
}
INLINE float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
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
typedef table16 line_table;
INLINE line_table load_line_table(const float* p) { return load_table(p); }
INLINE void lookup_line(const line_table& t, i32 codes,
                        f32 (&w)[8]) {  // the low four bits of four bytes, then the high
  unroll<8>([&](auto j) INLINE_LAMBDA { w[j] = lookup(t, codes, 8 * (j % 4) + 4 * (j / 4)); });
}
struct table8 { const float* values; };  // 8 floats, looked up by the low three bits of each lane
INLINE table8 load_table8(const float* p) { return {p}; }
INLINE f32 lookup(const table8& t, i32 at) {
  f32 r;
  for (int i = 0; i < LANES; ++i) r[i] = t.values[at[i] & 7];
  return r;
}
INLINE void interleave(f32 a, f32 b, f32& low, f32& high) {  // a0 b0 a1 b1 ...
  low = f32{a[0], b[0], a[1], b[1]};
  high = f32{a[2], b[2], a[3], b[3]};
}
struct halves32 { uint16_t values[16]; };
INLINE halves32 load_halves(const uint16_t* p) {
  halves32 t;
  memcpy(t.values, p, sizeof t.values);
  return t;
}
INLINE void store_halves(const halves32& t, const uint8_t* packed,
                         void* y) {  // 32 codes, high four bits of a byte first
  uint16_t v[32];
  for (int i = 0; i < 16; ++i) v[2 * i] = t.values[packed[i] >> 4], v[2 * i + 1] = t.values[packed[i] & 15];
  memcpy(y, v, sizeof v);
}
INLINE void stream_halves(const halves32& t, const uint8_t* packed, void* y) { store_halves(t, packed, y); }
INLINE void stream_end() {}

// ---- the INT8 product
typedef int16_t ROW_T;
constexpr bool CENTERED = true, PAIRED = false;
constexpr int COLS = 4;
constexpr size_t ROW_K = 0;
typedef i32 acc_t, b_t;
struct a_t { int32_t k[4]; };
INLINE a_t load_a(const ROW_T* p) { return {{p[0], p[1], p[2], p[3]}}; }
INLINE b_t load_b(const int8_t* p) { return load((const int32_t*)p); }
constexpr size_t WIDE_QUADS = 0, WIDE_B = 0;
constexpr int MR_WIDE = 0;
typedef int8_t wide_t;
INLINE a_t load_row(const ROW_T* p) { return load_a(p); }  // not used: ROW_K = 0
INLINE int32_t reduce_add(acc_t v) { return v[0]; }
INLINE acc_t dot(acc_t c, a_t a, b_t b) {  // byte k of each lane, sign-extended by two shifts
  for (int k = 0; k < 4; ++k) c += ((i32)((u32)b << (8 * (3 - k))) >> 24) * a.k[k];
  return c;
}
INLINE void store_codes(ROW_T* q, i32 a, i32 b, i32 c, i32 d, i32 zero, i32&) {
  const i32 v[4] = {a, b, c, d}, top = set1(255);
  i32 code[4];
  for (int j = 0; j < 4; ++j) {
    const i32 least = v[j] < top ? v[j] : top;
    code[j] = (least > i32{} ? least : i32{}) - zero;
  }
  store_shorts(q, code[0], code[1]);
  store_shorts(q + 2 * LANES, code[2], code[3]);
}
INLINE int8_t code_at(const ROW_T* row, size_t k) { return (int8_t)row[k]; }
INLINE void load_codes(const ROW_T* q, int8_t* codes) {
  for (int k = 0; k < 16; ++k) codes[k] = (int8_t)q[k];
}
INLINE acc_t dot_pairs(acc_t c, a_t a, b_t b) { return dot(c, a, b); }

struct Bytes {
  static constexpr bool FOLDED = false;
  typedef ROW_T row_t;
};

// ---- the 4-bit product of integers
constexpr bool SHORT_SUMS = false;
typedef i32 short_sum;
struct w_t { uint8_t k[LANES][4]; };
struct x_t { int8_t k[4]; };
struct nibbles_t { uint8_t values[16]; };
INLINE nibbles_t load_nibbles(const int8_t* p) {
  nibbles_t t;
  memcpy(t.values, p, 16);
  return t;
}
INLINE x_t load_x(const int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
INLINE void lookup(const nibbles_t& t, const uint8_t* line, w_t& low, w_t& high) {
  for (int i = 0; i < LANES; ++i)
    for (int j = 0; j < 4; ++j)
      low.k[i][j] = t.values[line[4 * i + j] & 15], high.k[i][j] = t.values[line[4 * i + j] >> 4];
}
INLINE i32 dot(i32 c, const w_t& w, x_t x) {
  for (int i = 0; i < LANES; ++i)
    for (int j = 0; j < 4; ++j) c[i] += x.k[j] * w.k[i][j];
  return c;
}

// ---- tiles
constexpr int MR = 4, NV = 2;
constexpr size_t GEMV_ROWS = 4, SPLIT_ROWS = 0, DOT_ROWS = 0;
constexpr int GEMV_SUMS = 8;
constexpr int FLOAT_ROWS = 6, FLOAT_VECTORS = 2, FLOAT_SUMS = 8;
constexpr int ROWS_INT8 = 4, VECTORS_INT8 = 2;
constexpr int GEMV_STEPS_4BIT = 1, GEMV_VECTORS_INT8 = 2, DOT_ROWS_4BIT = 1;

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
