// What a decoder layer needs beside its products: RMSNorm, and attention in fp32. Formulas, and the order of sums:
// pyqkern/backends/reference/decoder.py.
//
//   dot16     sixteen chains of fma, element i in the (i % 16)th, added in halves: 8 to 8, 4 to 4, 2 to 2, 1 to 1
//   softmax   p = e^(score - greatest), never 0 but of a masked key; their sum is sum_of (encoder.inl) by position
//   values    one chain of fma over the keys whose p is not 0, ascending
#pragma once

#include "kernels/encoder.inl"
#include "kernels/weight_only.inl"

namespace pyqkern {
namespace PYQKERN_ISA {

static void add_rms_norm(float* a, const float* residual, size_t rows, size_t n, const float* weight, float offset,
                         float eps, float* y) {
  for (size_t m = 0; m < rows; ++m, a += n, y += n) {
    const float squares = sum_of(n, [&](size_t i, size_t part) {
      const f32 z = added(a, residual, i, part);
      return z * z;
    });
    if (residual) residual += n;
    const float inverse = 1.0f / __builtin_sqrtf(squares / (float)n + eps);
    for (size_t i = 0; i < n; i += LANES) {
      const size_t part = n - i < LANES ? n - i : LANES;
      store_n(y + i, (load_n(a + i, part) * inverse) * (load_n(weight + i, part) + offset), part);
    }
  }
}

template <class T> INLINE void add_rows_as(const float* a, const float* b, size_t n, T* y) {
  for (size_t i = 0; i < n; i += LANES) {
    const size_t part = n - i < LANES ? n - i : LANES;
    const f32 v = load_n(a + i, part);
    store_n(y + i, b ? v + load_n(b + i, part) : v, part);
  }
}

static void add_rows(const float* a, const float* b, size_t n, void* y, int dtype) {
  if (dtype == kFloat32) add_rows_as(a, b, n, (float*)y);
  else if (dtype == kBFloat16) add_rows_as(a, b, n, (bf16*)y);
  else add_rows_as(a, b, n, (fp16*)y);
}

// ---- scores

constexpr int DOT_PARTS = 16 / LANES;
constexpr int SCORE_ROWS = LANES == 16 ? 4 : 2;

// R rows times C keys.
template <int R, int C>
static void score_tile(const float* q, const float* keys, size_t ldk, size_t d, float scaling, float* scores,
                       size_t ld) {
  f32 acc[R * C][DOT_PARTS];
  clear(acc);
  for (size_t i = 0; i < d; i += 16)
    unroll<DOT_PARTS>([&](auto p) INLINE_LAMBDA {
      f32 key[C];
      unroll<C>([&](auto c) INLINE_LAMBDA { key[c] = load(keys + c * ldk + i + p * LANES); });
      unroll<R>([&](auto r) INLINE_LAMBDA {
        const f32 a = load(q + r * d + i + p * LANES);
        unroll<C>([&](auto c) INLINE_LAMBDA { acc[r * C + c][p] = fma(a, key[c], acc[r * C + c][p]); });
      });
    });
  f32 dots[R * C];
  unroll<R * C>([&](auto t) INLINE_LAMBDA {
    f32* part = acc[t];
    if constexpr (DOT_PARTS == 4) part[0] += part[2], part[1] += part[3];
    if constexpr (DOT_PARTS >= 2) part[0] += part[1];
    dots[t] = part[0];
  });
  float sums[R * C];
  if constexpr (R * C % 4 == 0)
    unroll<R * C / 4>([&](auto t) INLINE_LAMBDA {
      const f32 four[4] = {dots[4 * t], dots[4 * t + 1], dots[4 * t + 2], dots[4 * t + 3]};
      add_halves(four, sums + 4 * t);
    });
  else unroll<R * C>([&](auto t) INLINE_LAMBDA { sums[t] = add_halves(dots[t]); });
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) scores[r * ld + c] = sums[r * C + c] * scaling;
}

template <int R>
static void score_rows(const float* q, const float* keys, size_t ldk, size_t count, size_t d, float scaling,
                       float* scores, size_t ld) {
  constexpr int C = R == 2 ? 2 : 4;
  size_t j = 0;
  for (; j + C <= count; j += C) score_tile<R, C>(q, keys + j * ldk, ldk, d, scaling, scores + j, ld);
  for (; j < count; ++j) score_tile<R, 1>(q, keys + j * ldk, ldk, d, scaling, scores + j, ld);
}

static void attention_scores(const float* queries, size_t rows, const float* keys, size_t ldk, size_t count, size_t d,
                             float scaling, float* scores, size_t ld) {
  size_t m = 0;
  for (; m + SCORE_ROWS <= rows; m += SCORE_ROWS)
    score_rows<SCORE_ROWS>(queries + m * d, keys, ldk, count, d, scaling, scores + m * ld, ld);
  for (; m < rows; ++m) score_rows<1>(queries + m * d, keys, ldk, count, d, scaling, scores + m * ld, ld);
}

// ---- softmax

// Whether each of `part` bytes is not 0, as lanes of 0 or -1.
INLINE i32 load_seen(const uint8_t* p, size_t part) {
  uint8_t bytes[LANES] = {};
  memcpy(bytes, p, part);
  return load_bytes(part == LANES ? p : bytes) != 0;
}

static float attention_softmax(float* scores, size_t n, size_t begin, size_t end, const AddedLine& added) {
  const f32 least = set1(-__builtin_inff());
  const size_t first = begin / 64 * 64, whole = softmax_width(n);
  if (added.bias || added.mask || added.seen)
    for (size_t j = begin / LANES * LANES; j < end; j += LANES) {
      const size_t part = end - j < LANES ? end - j : LANES;
      f32 s = load(scores + j);
      if (added.bias) s += load_n(added.bias + j, part);
      if (added.mask) {
        const f32 mask = load_n(added.mask + j, part);
        s = mask <= set1(kMasked) ? least : s + mask;
      }
      if (added.seen) s = load_seen(added.seen + j, part) ? s : least;
      store(scores + j, s);
    }
  for (size_t j = 0; j < begin; ++j) scores[j] = -__builtin_inff();
  for (size_t j = end; j < whole; ++j) scores[j] = -__builtin_inff();
  f32 most = least;
  for (size_t j = first; j < end; j += LANES) most = max(load(scores + j), most);  // NaN is passed over
  const f32 greatest = set1(reduce_max(most));
  auto p_at = [&](float* at) INLINE_LAMBDA {
    const f32 s = load(at), p = s == least ? f32{} : exp(s - greatest);
    store(at, p);
    return p;
  };
  for (size_t j = 0; j < first; ++j) scores[j] = 0;
  const float total = sum_of(softmax_width(end - first), [&](size_t i, size_t) { return p_at(scores + first + i); });
  for (size_t j = first + softmax_width(end - first); j < whole; ++j) scores[j] = 0;
  return total == 0 ? 0.0f : 1.0f / total;
}

// ---- values

template <int R, int V, bool ALL_SEEN>
INLINE void value_tile(const float* p, size_t ld, const float* values, size_t ldv, size_t count, size_t d,
                       float* context) {
  f32 acc[R][V];
  unroll<R>([&](auto r) INLINE_LAMBDA {
    unroll<V>([&](auto v) INLINE_LAMBDA { acc[r][v] = load(context + r * d + v * LANES); });
  });
  for (size_t j = 0; j < count; ++j, values += ldv) {
    f32 value[V];
    unroll<V>([&](auto v) INLINE_LAMBDA { value[v] = load(values + v * LANES); });
    unroll<R>([&](auto r) INLINE_LAMBDA {
      const float weight = p[r * ld + j];
      if (ALL_SEEN || weight != 0)
        unroll<V>([&](auto v) INLINE_LAMBDA { acc[r][v] = fma(set1(weight), value[v], acc[r][v]); });
    });
  }
  unroll<R>([&](auto r) INLINE_LAMBDA {
    unroll<V>([&](auto v) INLINE_LAMBDA { store(context + r * d + v * LANES, acc[r][v]); });
  });
}

template <int R, bool ALL_SEEN>
static void value_columns(const float* p, size_t ld, const float* values, size_t ldv, size_t count, size_t d,
                          float* context) {
  size_t i = 0;
  for (; i + FLOAT_VECTORS * LANES <= d; i += FLOAT_VECTORS * LANES)
    value_tile<R, FLOAT_VECTORS, ALL_SEEN>(p, ld, values + i, ldv, count, d, context + i);
  for (; i < d; i += LANES) value_tile<R, 1, ALL_SEEN>(p, ld, values + i, ldv, count, d, context + i);
}

template <int R = FLOAT_ROWS>
static void value_rows(const float* p, size_t ld, size_t rows, const float* values, size_t ldv, size_t count, size_t d,
                       float* context) {
  if constexpr (R > 1)
    if (rows < R) return value_rows<R - 1>(p, ld, rows, values, ldv, count, d, context);
  size_t dense = count, last = 0;  // every row sees the keys before `dense`, none sees those from `last` on
  for (size_t r = 0; r < R; ++r) {
    const float* row = p + r * ld;
    size_t j = 0;
    while (j + LANES <= dense && !any(load(row + j) == f32{})) j += LANES;
    while (j < dense && row[j] != 0) ++j;
    dense = j;
    size_t end = count;
    while (end > last && row[end - 1] == 0) --end;
    last = end > last ? end : last;
  }
  if (dense) value_columns<R, true>(p, ld, values, ldv, dense, d, context);
  if (last > dense) value_columns<R, false>(p + dense, ld, values + dense * ldv, ldv, last - dense, d, context);
}

static void attention_values(const float* p, size_t ld, size_t rows, const float* values, size_t ldv, size_t count,
                             size_t d, float* context) {
  const size_t tiles = tiles_of(rows, FLOAT_ROWS);
  for (size_t i = 0; i < tiles; ++i) {
    const RowTile tile = row_tile(rows, tiles, i);
    value_rows(p + tile.begin * ld, ld, tile.rows, values, ldv, count, d, context + tile.begin * d);
  }
}

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
