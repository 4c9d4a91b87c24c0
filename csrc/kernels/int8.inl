// INT8 linear: rows of activations quantized on the fly, an exact integer product, one float tail.
//
//   per row   lo = min(0, min x), hi = max(0, max x)
//             asymmetric: scale = (hi - lo) / 255, zero = clamp(-rint(lo / scale), 0, 255), code in [0, 255]
//             symmetric:  scale = max(-lo, hi) / 127, zero = 128, code in [1, 255]
//             of 7 bits:  asymmetric, with 127 in the place of 255
//             q = clamp(rint(x * (1/scale) + zero));   a row of zeros has scale 1; NaN or inf in it makes scale NaN
//   static    scale and zero are given, the same for every row: no pass for lo and hi; q and NaN as above
//   sum       S[m][n] = sum_k q[m][k] * W[n][k] - zero[m] * sum_k W[n][k], exact while it fits an int32: K <= kMaxK
//   tail      y = activation((scale[m] * w_scale[n]) * float(S) + bias[n]), each operation rounded, then
//             rounded to y's type
//
// The product keeps a tile of MR rows by NV vectors of columns in registers over all of K. No blocking over K: up to
// K = 3072 a strip of NV vectors stays in L2, and beyond that it is still read once for the 100 rows or more of a
// block.
#pragma once

#include "kernels/math.inl"
#include "kernels/rows.inl"

namespace pyqkern {
namespace PYQKERN_ISA {

// ---- packed weights

// Writes the sums of a panel behind its Q quads.
static void sum_panel(int8_t* packed, size_t Q) {
  auto byte = [](u32 quad, int k) { return (i32)(quad << (24 - 8 * k)) >> 24; };
  for (size_t n = 0; n < kPanel; n += LANES) {
    i32 sum{}, pairs{};
    for (size_t q = 0; q < Q; ++q) {
      const u32 quad = (u32)load((const int32_t*)(packed + q * kLine) + n);
      const i32 a = byte(quad, 0), b = byte(quad, 1), c = byte(quad, 2), d = byte(quad, 3);
      sum += a + b + c + d;
      pairs += a * b + c * d;
    }
    store((int32_t*)(packed + Q * kLine) + n, sum);
    store((int32_t*)(packed + (Q + 1) * kLine) + n, pairs);
  }
}

static void int8_pack(const int8_t* w, size_t N, size_t K, size_t panel, int8_t* packed) {
  const size_t n0 = panel * kPanel, count = N - n0 < kPanel ? N - n0 : kPanel;
  if (count < kPanel || K % 4) memset(packed, 0, quads(K) * kLine);
  if (count == kPanel)
    for (size_t k = 0; k + 16 <= K; k += 16)
      for (size_t n = 0; n < kPanel; n += 4) {
        const int8_t* first = w + (n0 + n) * K;
        const int8_t* const row[4] = {first, first + K, first + 2 * K, first + 3 * K};
        transpose_quads(row, k, packed + k * kPanel + 4 * n, kLine);
      }
  for (size_t n = 0; n < count; ++n) {
    const int8_t* row = w + (n0 + n) * K;
    int8_t* out = packed + 4 * n;
    const size_t whole = count == kPanel ? K / 16 * 16 : 0;  // up to there it was transposed
    for (size_t k = whole; k + 4 <= K; k += 4) memcpy(out + k * kPanel, row + k, 4);
    if (K % 4) memcpy(out + (K - K % 4) * kPanel, row + K - K % 4, K % 4);
  }
  sum_panel(packed, quads(K));
}

// ---- the tail

constexpr size_t VECTORS = kPanel / COLS;  // vectors of columns in a panel
static_assert(VECTORS == 1 || VECTORS % NV == 0, "tile");

// Takes the corrections of row m and of LANES columns, whose sums are k, off their sums s. Modulo 2^32: what is left is
// exact.
struct ColumnSums { i32 sum, pairs; };
INLINE ColumnSums load_sums(const int8_t* column_sums) {
  ColumnSums k;
  if (!CENTERED || Bytes::FOLDED) k.sum = load((const int32_t*)column_sums);
  if (PAIRED) k.pairs = load((const int32_t*)(column_sums + kLine));
  return k;
}
INLINE i32 correct(i32 s, const QRows& a, size_t m, const ColumnSums& k) {
  const u32 correction = (u32)set1(a.correction[m]);
  if (is_folded(a)) return (i32)((u32)s - correction * (u32)k.sum);
  if (PAIRED) return (i32)((u32)s - (u32)k.pairs - correction);
  return CENTERED ? s : (i32)((u32)s - correction * (u32)k.sum);
}

// Applies the tail to `rows` rows of V vectors of columns, the last of them `part` wide: sum_at(r, v) are the sums.
// What belongs to the columns is loaded once; `column_sums` points at those of the first column, `stride` apart by
// panel.
template <class T, int ACTIVATION, int V, class SumAt>
INLINE void apply_tail(SumAt sum_at, size_t rows, size_t part, const int8_t* column_sums, size_t stride, const QRows& a,
                       size_t m, size_t n0, const Tail& t) {
  for (int v = 0; v < V; ++v) {
    const size_t n = n0 + v * LANES;
    const bool whole = v < V - 1 || part == LANES;
    const f32 w = whole ? load(t.w_scale + n) : load_part(t.w_scale + n, part);
    const f32 b = !t.bias ? f32{} : whole ? load(t.bias + n) : load_part(t.bias + n, part);
    const ColumnSums k = load_sums(column_sums + v * LANES / kPanel * stride + v * LANES % kPanel * 4);
    T* y = (T*)t.y + m * t.ld + n;
#pragma GCC unroll 8
    for (size_t r = 0; r < rows; ++r, y += t.ld) {
      const i32 s = correct(sum_at(r, v), a, m + r, k);
      const f32 value = activate<ACTIVATION>((set1(a.scale[m + r]) * w) * to_float(s) + b);
      if (whole) store(y, value);
      else store_part(y, value, part);
    }
  }
}

// The same from memory: rows [m, m + rows) of columns [n0, n0 + n), which are those of one tile.
template <class T, int ACTIVATION>
static void tail_tile(const int32_t* sum, size_t ld_sum, const int8_t* column_sums, size_t stride, const QRows& a,
                      size_t m, size_t rows, size_t n0, size_t n, const Tail& t) {
  for (size_t j = 0; j < n; j += LANES)
    apply_tail<T, ACTIVATION, 1>([&](size_t r, int) { return load(sum + r * ld_sum + j); }, rows,
                                 n - j < LANES ? n - j : LANES, column_sums + j / kPanel * stride + j % kPanel * 4,
                                 stride, a, m, n0 + j, t);
}

// The same for exact sums: nothing but the zero point.
static void tail_sums(const int32_t* sum, size_t ld_sum, const int8_t* column_sums, size_t stride, const QRows& a,
                      size_t m, size_t rows, size_t n0, size_t n, const Tail& t) {
  int32_t* y = (int32_t*)t.y + m * t.ld + n0;
  for (size_t j = 0; j < n; j += LANES) {
    const size_t part = n - j < LANES ? n - j : LANES;
    const ColumnSums k = load_sums(column_sums + j / kPanel * stride + j % kPanel * 4);
    for (size_t r = 0; r < rows; ++r) {
      const i32 s = correct(load(sum + r * ld_sum + j), a, m + r, k);
      if (part == LANES) store(y + r * t.ld + j, s);
      else store_part(y + r * t.ld + j, s, part);
    }
  }
}

typedef void (*TailFunction)(const int32_t*, size_t, const int8_t*, size_t, const QRows&, size_t, size_t, size_t,
                             size_t, const Tail&);

template <class T> INLINE TailFunction tail_of(int activation) {
  return activation == kNone   ? tail_tile<T, kNone>
         : activation == kRelu ? tail_tile<T, kRelu>
         : activation == kGelu ? tail_tile<T, kGelu>
                               : tail_tile<T, kGeluTanh>;
}

static TailFunction tail_of(const Tail& t) {
  if (!t.w_scale) return tail_sums;
  return t.dtype == kFloat32    ? tail_of<float>(t.activation)
         : t.dtype == kBFloat16 ? tail_of<bf16>(t.activation)
                                : tail_of<fp16>(t.activation);
}

// ---- the product

// Where vector v of the packed weight starts.
INLINE const int8_t* vector_at(const Packed& w, size_t K, size_t v) {
  return w.panel(K, v / VECTORS) + v % VECTORS * COLS * 4;
}

// c[R rows][V vectors] += a [R rows, stride lda] * vectors b, b + stride, ... over Q quads of k, `step` apart. On the
// way it asks for AHEAD panels of the weight, a line of each in each step: a model's weights come from memory, not from
// the cache.
template <int R, int V, int AHEAD, bool PAIRS, class B>
INLINE void tile(acc_t (&c)[R][V], const ROW_T* __restrict a, size_t lda, const B* __restrict b, size_t stride,
                 size_t step, size_t Q, const int8_t* ahead, size_t ahead_stride) {
  for (size_t q = 0; q < Q; ++q, a += 4, b += step, ahead += kLine) {
    for (int p = 0; p < AHEAD; ++p) __builtin_prefetch(ahead + p * ahead_stride, 0, 1);
    b_t bv[V];
    unroll<V>([&](auto v) INLINE_LAMBDA { bv[v] = load_b(b + v * stride); });
    unroll<R>([&](auto r) INLINE_LAMBDA {
      const a_t av = load_a(a + r * lda);
      unroll<V>([&](auto v)
                    INLINE_LAMBDA { c[r][v] = PAIRS ? dot_pairs(c[r][v], av, bv[v]) : dot(c[r][v], av, bv[v]); });
    });
  }
}

// The tail of a tile: straight from the registers in the common case, else through memory, lest every case be compiled
// for every tile.
template <int R, int V>
INLINE void finish(acc_t (&c)[R][V], const int8_t* column_sums, size_t stride, const QRows& a, size_t m, size_t n0,
                   const Tail& t, TailFunction tail) {
  constexpr int COLUMNS = V * COLS;
  const size_t n = t.N - n0 < COLUMNS ? t.N - n0 : COLUMNS;
  auto sum_at = [&](size_t r, int v) { return (i32)c[r][v]; };
  if (tail == tail_tile<float, kNone> && n == COLUMNS)
    return apply_tail<float, kNone, V>(sum_at, R, LANES, column_sums, stride, a, m, n0, t);
  alignas(64) int32_t sum[R][COLUMNS];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(sum[r] + v * LANES, sum_at(r, v));
  tail(sum[0], COLUMNS, column_sums, stride, a, m, R, n0, n, t);
}

// What the tiles of one strip, V vectors of columns from n0 on, share.
struct Strip {
  const QRows& a;
  size_t K;
  const int8_t* b;     // its first vector in the packed weight
  const wide_t* wide;  // the strip widened, [quads][V], or nullptr
  size_t n0;
  const Tail& t;
  TailFunction tail;
};

// Panels of the next strip, to be asked for by one tile.
struct Ahead {
  const int8_t* from;
  size_t panels;
};
constexpr size_t STRIP_PANELS = NV > VECTORS ? NV / VECTORS : 1;
static_assert(STRIP_PANELS <= 3, "tile_and_tail asks for three at most");

template <int R, int V>
static void tile_and_tail(const Strip& s, size_t m, Ahead ahead) {
  const size_t Q = quads(s.K), panel = panel_bytes(s.K), stride = VECTORS == 1 ? panel : COLS * 4;
  const ROW_T* a = (const ROW_T*)s.a.q + m * 4 * Q;
  acc_t c[R][V];
  clear(c);
  auto product = [&](auto* b, size_t vector, size_t step) INLINE_LAMBDA {
    if (ahead.panels == 1) tile<R, V, 1, true>(c, a, 4 * Q, b, vector, step, Q, ahead.from, panel);
    else if (STRIP_PANELS > 1 && ahead.panels == 2)
      tile<R, V, 2, true>(c, a, 4 * Q, b, vector, step, Q, ahead.from, panel);
    else if (STRIP_PANELS > 2 && ahead.panels == 3)
      tile<R, V, 3, true>(c, a, 4 * Q, b, vector, step, Q, ahead.from, panel);
    else tile<R, V, 0, true>(c, a, 4 * Q, b, vector, step, Q, nullptr, 0);
  };
  if constexpr (WIDE_QUADS) {
    if (R <= MR_WIDE && s.wide) product(s.wide, WIDE_B, V * WIDE_B);
    else product(s.b, stride, kLine);
  } else {
    product(s.b, stride, kLine);
  }
  finish<R, V>(c, s.b + Q * kLine, panel, s.a, m, s.n0, s.t, s.tail);  // a panel's sums are behind its last quad
}

template <int V, int R = MR>
static void tile_rows(size_t rows, const Strip& s, size_t m, Ahead ahead) {
  if constexpr (R > 1)
    if (rows < R) return tile_rows<V, R - 1>(rows, s, m, ahead);
  tile_and_tail<R, V>(s, m, ahead);
}

// Widens a strip of NV vectors once for all its tiles, which saves them the shifts: worth it from eight tiles on.
template <class Wide> INLINE const Wide* widen_strip(const int8_t* b, size_t Q, Wide* wide) {
  if constexpr (WIDE_QUADS)
    for (size_t q = 0; q < Q; ++q)
      unroll<NV>([&](auto v)
                     INLINE_LAMBDA { store_b(wide + (q * NV + v) * WIDE_B, load_b(b + q * kLine + v * COLS * 4)); });
  return wide;
}

template <class B>
static void bytes_gemm(const QRows&, size_t m0, size_t rows, size_t K, const Packed&, size_t begin, size_t end,
                       const Tail&);  // int8_split.inl

static void int8_gemm(const QRows& a, size_t m0, size_t rows, size_t K, const Packed& w, size_t begin, size_t end,
                      const Tail& t) {
  if constexpr (Bytes::FOLDED)
    if (is_folded(a)) return bytes_gemm<Bytes>(a, m0, rows, K, w, begin, end, t);
  const size_t first = begin * VECTORS, stop = end * kPanel < t.N ? end * kPanel : t.N;
  const size_t vectors = (stop - begin * kPanel + COLS - 1) / COLS;
  const bool widen = WIDE_QUADS && quads(K) <= WIDE_QUADS && rows >= 8 * MR_WIDE;
  const size_t most = widen ? MR_WIDE : MR, tiles = (rows + most - 1) / most;
  const size_t per_tile = (STRIP_PANELS + tiles - 1) / tiles;  // the next strip is asked for by this one's first tiles
  alignas(64) wide_t wide[WIDE_QUADS ? WIDE_QUADS * NV * WIDE_B : 1];
  for (size_t v = 0, width; v < vectors; v += width) {
    const int8_t* b = vector_at(w, K, first + v);
    const wide_t* widened = widen ? widen_strip(b, quads(K), wide) : nullptr;
    const Strip strip{a, K, b, widened, begin * kPanel + v * COLS, t, tail_of(t)};
    const size_t left = vectors - v;
    width = left < NV ? left : NV > 2 && left == NV + 1 ? 2 : NV;  // two and two: a tile of one waits for its own sums
    for (size_t i = 0, m = m0, height; i < tiles; ++i, m += height) {
      height = rows / tiles + (i < rows % tiles);  // differing by one at most: a tile of one row wastes the machine
      const size_t next = v + width + i * per_tile * VECTORS;
      const Ahead ahead{vector_at(w, K, first + next), i * per_tile < STRIP_PANELS && next < vectors ? per_tile : 0};
      if (VECTORS > 1 || width == NV) tile_rows<NV>(height, strip, m, ahead);
      else if (NV > 2 && width == 2) tile_rows<2>(height, strip, m, ahead);
      else tile_rows<1>(height, strip, m, ahead);
    }
  }
}

// ---- few rows: the weight comes from memory, and one pass over it is what counts

constexpr size_t PREFETCH = 2048;  // bytes ahead, where panels are read one after the other

// P panels side by side, `stride` bytes and `columns` columns apart: a CPU reads several places of the memory faster than
// one, because its own prefetchers are so many lines ahead in each, and stop at the ends of pages. U quads at a time
// with sums of their own, so that the latency of dot is hidden.
template <int R, int P>
static void gemv_panels(const QRows& a, size_t m0, size_t K, const int8_t* packed, size_t stride, size_t n0,
                        size_t columns, const Tail& t, TailFunction tail) {
  constexpr int V = VECTORS < 2 ? VECTORS : 2, SUMS = R * P * V;
  constexpr int U = SUMS * 4 <= GEMV_SUMS ? 4 : SUMS * 2 <= 8 ? 2 : 1;
  const size_t Q = quads(K), lda = 4 * Q;
  for (size_t v0 = 0; v0 < VECTORS; v0 += V) {
    const ROW_T* row = (const ROW_T*)a.q + m0 * lda;
    const int8_t* b = packed + v0 * COLS * 4;
    acc_t c[U][P][R][V];
    clear(c);
    auto step = [&](auto u) INLINE_LAMBDA {
      if constexpr (P == 1) __builtin_prefetch(b + PREFETCH + u * kLine);
      unroll<P>([&](auto p) INLINE_LAMBDA {
        unroll<V>([&](auto v) INLINE_LAMBDA {
          const b_t bv = load_b(b + p * stride + u * kLine + v * COLS * 4);
          unroll<R>([&](auto r)
                        INLINE_LAMBDA { c[u][p][r][v] = dot_pairs(c[u][p][r][v], load_a(row + r * lda + 4 * u), bv); });
        });
      });
    };
    size_t q = 0;
    for (; q + U <= Q; q += U, row += 4 * U, b += U * kLine) unroll<U>(step);
    for (; q < Q; ++q, row += 4, b += kLine) step(Index<0>{});
    unroll<P>([&](auto p) INLINE_LAMBDA {
      unroll<U - 1>([&](auto u) INLINE_LAMBDA {
        unroll<R>([&](auto r)
                      INLINE_LAMBDA { unroll<V>([&](auto v) INLINE_LAMBDA { c[0][p][r][v] += c[u + 1][p][r][v]; }); });
      });
      const size_t n = n0 + p * columns + v0 * COLS;
      if (n < t.N) finish<R, V>(c[0][p], packed + p * stride + v0 * COLS * 4 + Q * kLine, 0, a, m0, n, t, tail);
    });
  }
}

template <int R>
static void gemv_rows(const QRows& a, size_t m0, size_t K, const Packed& w, size_t begin, size_t end, const Tail& t) {
  const TailFunction tail = tail_of(t);
  constexpr size_t P = R == 1 ? kGemvPanels : R == 2 ? kGemvPanels / 2 : 1;
  const size_t apart = (end - begin) / P, stride = apart * panel_bytes(K);
  for (size_t i = 0; i < apart; ++i)
    gemv_panels<R, P>(a, m0, K, w.panel(K, begin + i), stride, (begin + i) * kPanel, apart * kPanel, t, tail);
  for (size_t panel = begin + apart * P; panel < end; ++panel)
    gemv_panels<R, 1>(a, m0, K, w.panel(K, panel), 0, panel * kPanel, 0, t, tail);
}

static void int8_gemv(const QRows& a, size_t m0, size_t rows, size_t K, const Packed& w, size_t begin, size_t end,
                      const Tail& t) {
  if constexpr (Bytes::FOLDED)
    if (is_folded(a)) return bytes_gemm<Bytes>(a, m0, rows, K, w, begin, end, t);
  if (rows == 1) gemv_rows<1>(a, m0, K, w, begin, end, t);
  else if (rows == 2) gemv_rows<2>(a, m0, K, w, begin, end, t);
  else if (rows == 3) gemv_rows<3>(a, m0, K, w, begin, end, t);
  else gemv_rows<4>(a, m0, K, w, begin, end, t);
}

// ---- few rows against a plain weight, which would take longer to pack than to read

// y[r][n] for R rows and four columns from n on (those past N are computed as the last, and not stored).
template <int R>
static void dot_columns(const QRows& a, size_t K, const int8_t* w, size_t N, size_t n, int32_t* y) {
  constexpr size_t STEP = ROW_K ? ROW_K : 16;  // where it is 0, nobody comes here
  const size_t lda = 4 * quads(K);
  const int8_t* column[4];
  for (size_t j = 0; j < 4; ++j) column[j] = w + (n + j < N ? n + j : N - 1) * K;
  alignas(64) ROW_T ones[STEP];
  for (size_t k = 0; k < STEP; ++k) ones[k] = 1;
  acc_t c[R][4], column_sum[4];
  clear(c);
  clear(column_sum);
  auto step = [&](auto row_at, auto column_at) {
    for (int j = 0; j < 4; ++j) {
      const b_t b = load_b(column_at(j));
      if (!CENTERED) column_sum[j] = dot(column_sum[j], load_row(ones), b);
      for (int r = 0; r < R; ++r) c[r][j] = dot(c[r][j], load_row(row_at(r)), b);
    }
  };
  size_t k = 0;
  for (; k + STEP <= K; k += STEP)
    step([&](int r) { return (const ROW_T*)a.q + r * lda + k; }, [&](int j) { return column[j] + k; });
  if (k < K) {
    alignas(64) ROW_T rows[R][STEP] = {};
    alignas(64) int8_t columns[4][STEP] = {};
    for (int r = 0; r < R; ++r) memcpy(rows[r], (const ROW_T*)a.q + r * lda + k, (lda - k) * sizeof(ROW_T));
    for (int j = 0; j < 4; ++j) memcpy(columns[j], column[j] + k, K - k);
    step([&](int r) { return (const ROW_T*)rows[r]; }, [&](int j) { return (const int8_t*)columns[j]; });
  }
  for (int r = 0; r < R; ++r)
    for (size_t j = 0; j < 4 && n + j < N; ++j) {
      const uint32_t off = CENTERED ? 0 : (uint32_t)a.correction[r] * (uint32_t)reduce_add(column_sum[j]);
      y[r * N + n + j] = (int32_t)((uint32_t)reduce_add(c[r][j]) - off);
    }
}

static void int8_dot(const QRows& a, size_t rows, size_t K, const int8_t* w, size_t N, size_t begin, size_t end,
                     int32_t* y) {
  for (size_t n = begin; n < end; n += 4) {
    if (rows == 1) dot_columns<1>(a, K, w, N, n, y);
    else if (rows == 2) dot_columns<2>(a, K, w, N, n, y);
    else if (rows == 3) dot_columns<3>(a, K, w, N, n, y);
    else dot_columns<4>(a, K, w, N, n, y);
  }
}

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
