// Rows of activations quantized on the fly: codes in the order that the ISA's product reads, scale and correction.
// Formulas: int8.inl.
#pragma once

#include "kernels/affine.inl"

namespace pyqkern {
namespace PYQKERN_ISA {

// Codes of 8 bits are ROW_T, except in plain bytes for the product with a split weight; those of 7 bits are Bytes::row_t.
// Plain bytes have the zero point for their correction.
template <class Q> constexpr bool is_paired = PAIRED && sizeof(Q) == sizeof(ROW_T);
INLINE bool is_folded(const QRows& rows) { return Bytes::FOLDED && (rows.bits == 7 || rows.columns); }

struct RowScale {
  float scale;
  int32_t zero;
};

INLINE RowScale row_scale(float least, float greatest, bool symmetric, int bits) {
  float lo = least < 0 ? least : 0.0f, hi = greatest > 0 ? greatest : 0.0f;
  if (least != least || greatest != greatest) return {__builtin_nanf(""), symmetric ? 128 : 0};
  const float levels = symmetric || bits == 7 ? 127.0f : 255.0f;
  float extent = symmetric ? (-lo > hi ? -lo : hi) : hi - lo;
  float scale = extent / levels;
  if (extent > kGreatest) scale = hi / levels - lo / levels;
  if (scale < kLeastNormal) scale = extent == 0 ? 1.0f : kLeastNormal;
  if (symmetric) return {scale, 128};
  float zero = __builtin_rintf(-lo / scale);
  return {scale, (int32_t)(zero > levels ? levels : zero)};
}

// Codes of one row, filled up to a multiple of four by that of 0 (the weight is zero there, so any code does). Returns
// the row's correction. Rounding can carry a code one past its range, x * (1/scale) + zero having three roundings:
// store_codes limits those of 8 bits.
template <int BITS = 8, class T, class Q>
INLINE int32_t quantize_row(const T* x, size_t K, float inverse, int32_t zero_point, Q* q) {
  const size_t block = 4 * LANES;
  const f32 inv_scale = set1(inverse), zero = set1((float)zero_point);
  i32 pairs{};
  auto code = [&](const T* p) {
    const i32 rounded = round(load(p) * inv_scale + zero);
    return BITS == 7 ? min(rounded, set1(127)) : rounded;
  };
  auto codes = [&](const T* p, Q* out) {
    store_codes(out, code(p), code(p + LANES), code(p + 2 * LANES), code(p + 3 * LANES), set1(zero_point), pairs);
  };
  size_t k = 0;
  for (; k + block <= K; k += block) codes(x + k, q + k);
  if (k < K) {
    T rest[block] = {};
    Q last[block];
    memcpy(rest, x + k, (K - k) * sizeof(T));
    codes(rest, last);
    memcpy(q + k, last, (4 * quads(K) - k) * sizeof *q);
  }
  return is_paired<Q> ? total(pairs) : zero_point;
}

template <int BITS, class Q, class T>
static void quantize_rows_of(const T* x, size_t ldx, size_t rows, size_t K, bool symmetric, const QRows& out) {
  float least, greatest;
  range_of(x, K, &least, &greatest);
  for (size_t m = 0; m < rows; ++m, x += ldx) {
    const RowScale s = row_scale(least, greatest, symmetric, BITS);
    if (m + 1 < rows)
      range_of(x + ldx, K, &least, &greatest);  // the next row's, while the divisions for this one are under way
    Q* q = (Q*)out.q + m * 4 * quads(K);
    out.scale[m] = s.scale;
    if (s.scale == s.scale) {
      out.correction[m] = quantize_row<BITS>(x, K, 1.0f / s.scale, s.zero, q);
    } else {  // any codes: NaN times their sum is NaN
      memset(q, 0, 4 * quads(K) * sizeof *q);
      out.correction[m] = 0;
    }
  }
}

// fill(m, n, out, BITS, Q) quantizes rows [m, m + n) to `out`, codes of BITS bits in elements of Q's type.
template <class B = Bytes, class Fill> INLINE void fill_rows(size_t rows, size_t K, const QRows& out,
                                                             const Fill& fill) {
  if (out.bits == 7) return fill(0, rows, out, Index<7>{}, typename B::row_t{});
  if constexpr (B::FOLDED)
    if (out.columns) {
      for (size_t m = 0; m < rows; m += kSplitRows) {
        const size_t n = rows - m < kSplitRows ? rows - m : kSplitRows, width = 4 * quads(K);
        uint8_t* q = (uint8_t*)out.q + m * width;
        fill(m, n, QRows{q, out.scale + m, out.correction + m}, Index<8>{}, typename B::row_t{});
        B::transpose_rows(q, n, width, out.columns + m * width);
      }
      return;
    }
  fill(0, rows, out, Index<8>{}, ROW_T{});
}

template <class T>
INLINE void quantize_rows_as(const T* x, size_t ldx, size_t rows, size_t K, bool symmetric, const QRows& out) {
  fill_rows(rows, K, out, [&](size_t m, size_t n, const QRows& to, auto bits, auto element) {
    quantize_rows_of<bits, decltype(element)>(x + m * ldx, ldx, n, K, symmetric, to);
  });
}

static void int8_quantize_rows(const void* x, int dtype, size_t ldx, size_t rows, size_t K, bool symmetric,
                               const QRows& out) {
  if (dtype == kFloat32) quantize_rows_as((const float*)x, ldx, rows, K, symmetric, out);
  else if (dtype == kBFloat16) quantize_rows_as((const bf16*)x, ldx, rows, K, symmetric, out);
  else quantize_rows_as((const fp16*)x, ldx, rows, K, symmetric, out);
}

// Codes of one row under a given scale: values beyond its range saturate before they are rounded, since they may be too
// large for an int32. False where the row holds NaN or an infinity.
template <int BITS, class T, class Q>
INLINE bool quantize_row_static(const T* x, size_t K, RowScale s, Q* q, int32_t* correction) {
  const size_t block = 4 * LANES;
  const f32 inv_scale = set1(1.0f / s.scale), zero = set1((float)s.zero);
  const f32 top = set1(BITS == 7 ? 127.0f : 255.0f);
  f32 bad[4];
  clear(bad);
  i32 pairs{};
  auto code = [&](const T* p, f32& nan) {
    const f32 v = load(p);
    nan = nan_if_not_finite(v, nan);
    return round(clamp(v * inv_scale + zero, f32{}, top));
  };
  auto codes = [&](const T* p, Q* out) {
    const i32 a = code(p, bad[0]), b = code(p + LANES, bad[1]), c = code(p + 2 * LANES, bad[2]),
              d = code(p + 3 * LANES, bad[3]);
    store_codes(out, a, b, c, d, set1(s.zero), pairs);
  };
  size_t k = 0;
  for (; k + block <= K; k += block) codes(x + k, q + k);
  if (k < K) {
    T rest[block] = {};
    Q last[block];
    memcpy(rest, x + k, (K - k) * sizeof(T));
    codes(rest, last);
    memcpy(q + k, last, (4 * quads(K) - k) * sizeof *q);
  }
  *correction = is_paired<Q> ? total(pairs) : s.zero;
  float lanes[LANES];
  store(lanes, (bad[0] + bad[1]) + (bad[2] + bad[3]));
  for (int i = 0; i < LANES; ++i)
    if (lanes[i] != lanes[i]) return false;
  return true;
}

template <int BITS, class Q, class T>
static void quantize_rows_static_of(const T* x, size_t rows, size_t K, RowScale s, const QRows& out) {
  for (size_t m = 0; m < rows; ++m, x += K) {
    Q* q = (Q*)out.q + m * 4 * quads(K);
    const bool finite = quantize_row_static<BITS>(x, K, s, q, out.correction + m);
    out.scale[m] = finite ? s.scale : __builtin_nanf("");
  }
}

template <class T> INLINE void quantize_rows_static_as(const T* x, size_t rows, size_t K, RowScale s,
                                                       const QRows& out) {
  fill_rows(rows, K, out, [&](size_t m, size_t n, const QRows& to, auto bits, auto element) {
    quantize_rows_static_of<bits, decltype(element)>(x + m * K, n, K, s, to);
  });
}

static void int8_quantize_rows_static(const void* x, int dtype, size_t rows, size_t K, float scale, int32_t zero,
                                      const QRows& out) {
  const RowScale s{scale, zero};
  if (dtype == kFloat32) quantize_rows_static_as((const float*)x, rows, K, s, out);
  else if (dtype == kBFloat16) quantize_rows_static_as((const bf16*)x, rows, K, s, out);
  else quantize_rows_static_as((const fp16*)x, rows, K, s, out);
}

static void int8_load_rows(const uint8_t* a, bool is_unsigned, size_t rows, size_t K, const QRows& out) {
  const int32_t zero = is_unsigned ? 0 : 128;
  const size_t block = 4 * LANES;
  for (size_t m = 0; m < rows; ++m, a += K) {
    ROW_T* q = (ROW_T*)out.q + m * 4 * quads(K);
    if constexpr (PAIRED) {
      i32 pairs{};
      auto code = [&](const uint8_t* p) { return load_bytes(p) ^ zero; };
      auto codes = [&](const uint8_t* p, ROW_T* to) {
        store_codes(to, code(p), code(p + LANES), code(p + 2 * LANES), code(p + 3 * LANES), set1(zero), pairs);
      };
      size_t k = 0;
      for (; k + block <= K; k += block) codes(a + k, q + k);
      if (k < K) {
        uint8_t rest[block] = {};
        ROW_T last[block];
        memcpy(rest, a + k, K - k);
        codes(rest, last);
        memcpy(q + k, last, (4 * quads(K) - k) * sizeof(ROW_T));
      }
      out.correction[m] = total(pairs);
    } else {
      for (size_t k = 0; k < K; ++k) q[k] = (ROW_T)(uint8_t(a[k] ^ zero) - (CENTERED ? zero : 0));
      for (size_t k = K; k < 4 * quads(K); ++k) q[k] = 0;
      out.correction[m] = zero;
    }
  }
}

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
