// What an encoder layer needs beside the INT8 product: softmax into codes, values into panels, LayerNorm with a
// residual.
//
//   softmax   t = scores - max, in units of log 2;  code = rint(255 * 2^t + dither);  probability = code / sum of codes
//   heads     each head of each row of queries or keys: scale = absmax / 127, code = rint(x * (1/scale)); 1 where all
//   are 0 values    per channel over the tokens of a sentence: scale = absmax / 127, code = rint(v * (1/scale)); 1
//   where all are 0 norm      z = a + residual;  y = fma((z - mean) * (1 / sqrt(variance + eps)), weight, bias)
//
// Float sums run over 64 partial sums, element i in the (i % 64)th, folded by halves: the same order for every LANES.
#pragma once

#include "kernels/int8.inl"

namespace pyqkern {
namespace PYQKERN_ISA {

constexpr int SUM_VECTORS = 64 / LANES;
constexpr size_t CODES_AT_ONCE = 64;

// The sum of value(i, part) over i = 0, LANES, ... < n, where part = LANES but for the last; lanes past n must be 0.
template <class Value> INLINE float sum_of(size_t n, Value value) {
  f32 part[SUM_VECTORS];
  clear(part);
  size_t i = 0;
  for (; i + 64 <= n; i += 64)
    for (int j = 0; j < SUM_VECTORS; ++j) part[j] += value(i + j * LANES, LANES);
  for (int j = 0; i < n; ++j, i += LANES) part[j] += value(i, n - i < LANES ? n - i : LANES);
  alignas(64) float s[64];
  for (int j = 0; j < SUM_VECTORS; ++j) store(s + j * LANES, part[j]);
  for (int w = 32; w >= 1; w /= 2)
    for (int j = 0; j < w; ++j) s[j] += s[j + w];
  return s[0];
}

template <class T> INLINE auto load_n(const T* p, size_t n) { return n == LANES ? load(p) : load_part(p, n); }
template <class T, class V> INLINE void store_n(T* p, V v, size_t n) {
  if (n == LANES) store(p, v);
  else store_part(p, v, n);
}

// Elements i of z + x, which become those of z; of z alone where x is nullptr.
INLINE f32 added(float* z, const float* x, size_t i, size_t part) {
  if (!x) return load_n(z + i, part);
  const f32 sum = load_n(z + i, part) + load_n(x + i, part);
  store_n(z + i, sum, part);
  return sum;
}

template <class T>
static void add_layer_norm_as(float* a, const float* residual, size_t rows, size_t n, const float* weight,
                              const float* bias, float eps, T* y) {
  float ones[LANES];
  for (int i = 0; i < LANES; ++i) ones[i] = 1;
  constexpr size_t TOGETHER = 4;  // rows: one's sum is folded while the next one's is added up
  for (size_t left; rows; rows -= left, a += left * n, y += left * n) {
    left = rows < TOGETHER ? rows : TOGETHER;
    float mean[TOGETHER], inverse[TOGETHER];
    for (size_t r = 0; r < left; ++r) {
      float* z = a + r * n;
      mean[r] =
          sum_of(n, [&](size_t i, size_t part) { return added(z, residual ? residual + r * n : nullptr, i, part); }) /
          (float)n;
    }
    for (size_t r = 0; r < left; ++r) {
      const float* z = a + r * n;
      const float variance = sum_of(n,
                                    [&](size_t i, size_t part) {
                                      const f32 d = part == LANES
                                                        ? load(z + i) - mean[r]
                                                        : (load_part(z + i, part) - mean[r]) * load_part(ones, part);
                                      return d * d;
                                    }) /
                             (float)n;
      inverse[r] = 1.0f / __builtin_sqrtf(variance + eps);
    }
    for (size_t r = 0; r < left; ++r) {
      auto norm = [&](f32 z, f32 w, f32 b) { return fma((z - mean[r]) * inverse[r], w, b); };
      size_t i = 0;
      for (; i + LANES <= n; i += LANES)
        store(y + r * n + i, norm(load(a + r * n + i), load(weight + i), load(bias + i)));
      if (const size_t part = n - i)
        store_part(y + r * n + i,
                   norm(load_part(a + r * n + i, part), load_part(weight + i, part), load_part(bias + i, part)), part);
    }
    if (residual) residual += left * n;
  }
}

static void add_layer_norm(float* a, const float* residual, size_t rows, size_t n, const float* weight,
                           const float* bias, float eps, void* y, int dtype) {
  if (dtype == kFloat32) add_layer_norm_as(a, residual, rows, n, weight, bias, eps, (float*)y);
  else if (dtype == kBFloat16) add_layer_norm_as(a, residual, rows, n, weight, bias, eps, (bf16*)y);
  else add_layer_norm_as(a, residual, rows, n, weight, bias, eps, (fp16*)y);
}

// A long sentence has hundreds of probabilities below half a code, and most of the weight may be theirs. Rounded each
// for itself they would all be lost; what is added before rounding, ((39 * j) % 64 + 1/2) / 64 - 1/2 for key j, keeps
// their sum.
struct Dither {
  float of[64];
  constexpr Dither() : of{} {
    for (int j = 0; j < 64; ++j) of[j] = (float)(39 * j % 64 * 2 + 1) / 128 - 0.5f;
  }
};
alignas(64) static constexpr Dither kDither;

// rint(255 * 2^t + dither) for t <= 0, |dither| < 1/2; the polynomial errs by 2.6e-6 of the value. NaN gives 0.
INLINE i32 probability_code(f32 t, f32 dither) {
  t = max(t, set1(-30.0f));
  const i32 n = round(t);
  const f32 r = t - to_float(n);
  f32 p = fma(r, set1(2.44037592f), set1(14.25905484f));
  p = fma(p, r, set1(61.26309937f));
  p = fma(p, r, set1(176.7460627f));
  p = fma(p, r, set1(254.99981167f));
  return round(as_f32(as_i32(p) + (n << 23)) + dither);
}

template <class F> INLINE void each(const float* x, size_t n, float* y, F f) {
  size_t i = 0;
  for (; i + LANES <= n; i += LANES) store(y + i, f(load(x + i)));
  if (i < n) store_part(y + i, f(load_part(x + i, n - i)), n - i);
}

static void elementwise(int function, const float* x, size_t n, float* y) {
  if (function == kExp) each(x, n, y, [](f32 v) { return exp(v); });
  else if (function == kGeluValue) each(x, n, y, [](f32 v) { return gelu(v); });
  else if (function == kSigmoid) each(x, n, y, [](f32 v) { return sigmoid(v); });
  else if (function == kTanh) each(x, n, y, [](f32 v) { return tanh(v); });
  else if (function == kSilu) each(x, n, y, [](f32 v) { return v / (exp(-v) + 1.0f); });
  else if (function == kReluValue) each(x, n, y, [](f32 v) { return activate<kRelu>(v); });
  else if (function == kGeluTanhValue) each(x, n, y, [](f32 v) { return activate<kGeluTanh>(v); });
  else each(x, n, y, [](f32 v) { return to_float(probability_code(v, f32{})); });
}

// Scores past n, up to a multiple of 64, are overwritten; so are codes of the row behind the last, up to 64.
static void softmax_codes(float* scores, size_t ld, size_t rows, size_t n, const QRows& out) {
  const size_t whole = softmax_width(n);
  for (size_t m = 0; m < rows; ++m, scores += ld) {
    for (size_t j = n; j < whole; ++j) scores[j] = -__builtin_inff();
    f32 most[4] = {load(scores), load(scores), load(scores), load(scores)};
    for (size_t j = 0; j < whole; j += 4 * LANES)
      for (int v = 0; v < 4; ++v) most[v] = max(load(scores + j + v * LANES), most[v]);
    const f32 greatest = set1(reduce_max(max(max(most[0], most[1]), max(most[2], most[3]))));
    ROW_T* q = (ROW_T*)out.q + m * 4 * quads(n);
    i32 sum[4] = {}, pairs{};
    for (size_t j = 0; j < whole; j += 4 * LANES) {
      i32 code[4];
      for (int v = 0; v < 4; ++v) {
        code[v] = probability_code(load(scores + j + v * LANES) - greatest, load(kDither.of + (j + v * LANES) % 64));
        sum[v] += code[v];
      }
      store_codes(q + j, code[0], code[1], code[2], code[3], i32{}, pairs);
    }
    out.scale[m] = 1.0f / (float)total((sum[0] + sum[1]) + (sum[2] + sum[3]));
    out.correction[m] = PAIRED ? total(pairs) : 0;
  }
}

static void int8_pack_values(const float* v, size_t ld, size_t tokens, size_t d, float* scale, int8_t* packed) {
  for (size_t j = 0; j < panels(d) * kPanel; j += LANES) {
    const size_t part = j >= d ? 0 : d - j < LANES ? d - j : LANES;
    int8_t* panel = packed + j / kPanel * panel_bytes(tokens);
    int8_t* line = panel + j % kPanel * 4;
    f32 most{}, bad{};
    for (size_t t = 0; t < tokens; ++t) {
      const f32 x = load_n(v + t * ld + j, part);
      most = max(as_f32(as_i32(x) & 0x7fffffff), most);
      bad = nan_if_not_finite(x, bad);
    }
    f32 s = most / set1(127.0f);
    s = max(s, set1(kLeastNormal));
    s = as_f32(as_i32(s) & (most > f32{})) + as_f32(as_i32(set1(1.0f)) & (most == f32{}));
    const f32 inverse = set1(1.0f) / s;
    store_part(scale + j, s + bad, part);
    for (size_t t = 0; t < tokens; t += 4, line += kLine) {
      i32 quad{};
      for (size_t i = 0; i < 4 && t + i < tokens; ++i) {
        const i32 code = max(min(round(load_n(v + (t + i) * ld + j, part) * inverse), set1(127)), set1(-127));
        quad |= (code & 0xff) << (8 * i);
      }
      store((int32_t*)line, quad);
    }
  }
  for (size_t p = 0; p < panels(d); ++p, packed += panel_bytes(tokens)) {
    if (PAIRED) sum_panel(packed, quads(tokens));
    else memset(packed + quads(tokens) * kLine, 0, kLine);  // the probabilities' zero point is 0
  }
}

// The greatest |x|; infinity where one of them is not finite. As integers, floats without a sign are in the same order.
INLINE float absmax_of(const float* x, size_t n) {
  i32 most{};
  for (size_t i = 0; i < n; i += LANES)
    most = max(as_i32(load_n(x + i, n - i < LANES ? n - i : LANES)) & 0x7fffffff, most);
  return reduce_max(as_f32(min(most, set1(0x7f800000))));
}

static void int8_quantize_heads(const float* x, size_t rows, size_t heads, size_t d, size_t tokens, const QRows& out,
                                int8_t* codes) {
  const size_t row = 4 * quads(d);
  for (size_t m = 0; m < rows; ++m)
    for (size_t h0 = 0; h0 < heads; h0 += LANES) {
      const size_t count = heads - h0 < LANES ? heads - h0 : LANES;
      const float* first = x + (m * heads + h0) * d;
      float scale[LANES] = {}, inverse[LANES];
      for (size_t h = 0; h < count; ++h) scale[h] = absmax_of(first + h * d, d);
      const f32 most = load(scale), least = set1(kLeastNormal);
      f32 s = max(most / set1(127.0f), least);
      s = most == f32{} ? set1(1.0f) : s;
      store(scale, s);
      store(inverse, set1(1.0f) / s);
      for (size_t h = 0; h < count; ++h) {
        const size_t at = (h0 + h) * tokens + m;
        const bool finite = scale[h] < __builtin_inff();
        out.scale[at] = finite ? scale[h] : __builtin_nanf("");
        if (codes) {
          alignas(64) ROW_T q[CODES_AT_ONCE];
          for (size_t k = 0; k < d; k += CODES_AT_ONCE) {
            const size_t n = d - k < CODES_AT_ONCE ? d - k : CODES_AT_ONCE;
            quantize_row(first + h * d + k, n, inverse[h], 128, q);
            for (size_t i = 0; i < n; ++i) codes[at * d + k + i] = code_at(q, i);
          }
        } else {
          out.correction[at] = quantize_row(first + h * d, d, inverse[h], 128, (ROW_T*)out.q + at * row);
        }
      }
    }
}

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
