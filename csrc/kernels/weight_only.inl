// fp32 rows times weights that are expanded to fp32 on the way, never as a whole: INT8 with one scale per output
// channel, and the tiles that four_bit.inl takes from here.
//
//   total[m][n] = sum over k of x[m][k] * q[n][k],   y = total * scale[n] + bias[n], each operation rounded
//
// A total is one chain of fma from zero in the order of k, for few rows and for many: a row's result does not depend on
// its batch, nor on the ISA. A code is exact in fp32. Few rows expand the codes in registers; many rows expand kStepMax
// columns of the panels of a tile once, into L1, and carry their totals on in memory.
#pragma once

#include "kernels/int8.inl"

namespace pyqkern {
namespace PYQKERN_ISA {

constexpr int PANEL_VECTORS = kPanel / LANES;
constexpr int STRIP_VECTORS = kStrip / LANES;
constexpr size_t PANEL_VALUES = kStepMax * kPanel;  // floats of an expanded panel
constexpr size_t TILE_PANELS = FLOAT_VECTORS > PANEL_VECTORS ? FLOAT_VECTORS / PANEL_VECTORS : 1;

// Vector v of expanded panels.
INLINE constexpr size_t values_at(int v) { return v / PANEL_VECTORS * PANEL_VALUES + v % PANEL_VECTORS * LANES; }

// Byte j of each lane, signed.
INLINE i32 byte_of(i32 quads, int j) { return (i32)((u32)quads << (24 - 8 * j)) >> 24; }

// ---- few rows: straight from the packed codes

// R rows times V vectors of a strip, which start at `b`; panels are `stride` apart.
template <int R, int V>
static void gemv_float(const float* x, size_t K, const int8_t* b, size_t stride, float* total) {
  f32 acc[R][V];
  clear(acc);
  auto codes_of = [&](auto v) INLINE_LAMBDA {
    const int8_t* at = b + v / PANEL_VECTORS * stride;
    if (v % PANEL_VECTORS == 0) __builtin_prefetch(at + PREFETCH);
    return load((const int32_t*)at + v % PANEL_VECTORS * LANES);
  };
  size_t k = 0;
  for (; k + 4 <= K; k += 4, x += 4, b += kLine) {
    if constexpr (R == 1) {  // the four x stay in registers, and one vector of codes is enough
      f32 a[4];
      unroll<4>([&](auto j) INLINE_LAMBDA { a[j] = set1(x[j]); });
      unroll<V>([&](auto v) INLINE_LAMBDA {
        const i32 codes = codes_of(v);
        unroll<4>([&](auto j) INLINE_LAMBDA { acc[0][v] = fma(a[j], to_float(byte_of(codes, j)), acc[0][v]); });
      });
    } else {
      i32 codes[V];
      unroll<V>([&](auto v) INLINE_LAMBDA { codes[v] = codes_of(v); });
      unroll<4>([&](auto j) INLINE_LAMBDA {
        f32 w[V];
        unroll<V>([&](auto v) INLINE_LAMBDA { w[v] = to_float(byte_of(codes[v], j)); });
        unroll<R>([&](auto r) INLINE_LAMBDA {
          const f32 a = set1(x[r * K + j]);
          unroll<V>([&](auto v) INLINE_LAMBDA { acc[r][v] = fma(a, w[v], acc[r][v]); });
        });
      });
    }
  }
  for (int j = 0; k + j < K; ++j)
    unroll<V>([&](auto v) INLINE_LAMBDA {
      const f32 w = to_float(byte_of(codes_of(v), j));
      unroll<R>([&](auto r) INLINE_LAMBDA { acc[r][v] = fma(set1(x[r * K + j]), w, acc[r][v]); });
    });
  unroll<R>([&](auto r) INLINE_LAMBDA {
    unroll<V>([&](auto v) INLINE_LAMBDA { store(total + r * kStrip + v * LANES, acc[r][v]); });
  });
}

// Sums side by side hide the latency of fma.
template <int R>
static void gemv_float_strip(const float* x, size_t K, const int8_t* packed, size_t panels, float* total) {
  constexpr int MOST = R == 1 ? FLOAT_SUMS : R == 2 ? FLOAT_SUMS / 2 : FLOAT_SUMS / 4;
  constexpr int V = MOST < STRIP_VECTORS ? MOST : STRIP_VECTORS, LESS = V < PANEL_VECTORS ? V : PANEL_VECTORS;
  const size_t vectors = panels * PANEL_VECTORS, stride = panel_bytes(K);
  for (size_t v = 0, width; v < vectors; v += width) {
    const int8_t* b = packed + v / PANEL_VECTORS * stride + v % PANEL_VECTORS * LANES * 4;
    width = vectors - v >= V ? V : LESS;
    (width == V ? gemv_float<R, V> : gemv_float<R, LESS>)(x, K, b, stride, total + v * LANES);
  }
}

static void int8_gemv_float(const float* x, size_t rows, size_t K, const int8_t* packed, size_t panels, float* total) {
  if (rows == 1) gemv_float_strip<1>(x, K, packed, panels, total);
  else if (rows == 2) gemv_float_strip<2>(x, K, packed, panels, total);
  else if (rows == 3) gemv_float_strip<3>(x, K, packed, panels, total);
  else gemv_float_strip<4>(x, K, packed, panels, total);
}

// ---- many rows

static void int8_expand(const int8_t* packed, size_t stride, size_t size, size_t panels, float* values) {
  for (size_t p = 0; p < TILE_PANELS; ++p, packed += stride, values += PANEL_VALUES) {
    if (p >= panels) {
      memset(values, 0, size * kPanel * sizeof(float));
      continue;
    }
    for (size_t k = 0; k < size; k += 4)
      unroll<PANEL_VECTORS>([&](auto v) INLINE_LAMBDA {
        const i32 codes = load((const int32_t*)(packed + k * kPanel) + v * LANES);
        float* to = values + k * kPanel + v * LANES;
        unroll<4>([&](auto j) INLINE_LAMBDA { store(to + j * kPanel, to_float(byte_of(codes, j))); });
      });
  }
}

template <class T> static void load_tile_of(const T* x, size_t K, size_t rows, float* tile) {
  float lanes[FLOAT_ROWS][LANES];
  for (size_t k = 0; k < K; k += LANES) {
    const size_t n = K - k < LANES ? K - k : LANES;
    for (size_t r = 0; r < rows; ++r) store(lanes[r], n == LANES ? load(x + r * K + k) : load_part(x + r * K + k, n));
    for (size_t j = 0; j < n; ++j)
      for (size_t r = 0; r < rows; ++r) *tile++ = lanes[r][j];
  }
}

static void load_tile(const void* x, int dtype, size_t K, size_t rows, float* tile) {
  if (dtype == kFloat32) load_tile_of((const float*)x, K, rows, tile);
  else if (dtype == kBFloat16) load_tile_of((const bf16*)x, K, rows, tile);
  else load_tile_of((const fp16*)x, K, rows, tile);
}

// A tile of R rows, x [steps * size][R], times FLOAT_VECTORS vectors of the expanded weight: with a scale as
// four_bit.inl says, without one the chains of `total` go on.
template <int R>
static void float_tile(const float* __restrict x, size_t size, size_t steps, const float* __restrict values,
                       const float* scale, float* total) {
  for (size_t s = 0; s < steps; ++s) {
    f32 acc[R][FLOAT_VECTORS];
    clear(acc);
    if (!scale)
      unroll<R>([&](auto r) INLINE_LAMBDA {
        unroll<FLOAT_VECTORS>([&](auto v) INLINE_LAMBDA { acc[r][v] = load(total + r * kStrip + v * LANES); });
      });
    auto add = [&](auto k) INLINE_LAMBDA {
      f32 w[FLOAT_VECTORS];
      unroll<FLOAT_VECTORS>([&](auto v) INLINE_LAMBDA { w[v] = load(values + k * kPanel + values_at(v)); });
      unroll<R>([&](auto r) INLINE_LAMBDA {
        const f32 a = set1(x[k * R + r]);
        unroll<FLOAT_VECTORS>([&](auto v) INLINE_LAMBDA { acc[r][v] = fma(a, w[v], acc[r][v]); });
      });
    };
    size_t k = 0;  // four at a time: the loop's own instructions would cost a sixth
    for (; k + 4 <= size; k += 4, x += 4 * R, values += 4 * kPanel) unroll<4>(add);
    for (; k < size; ++k, x += R, values += kPanel) add(Index<0>{});
    unroll<R>([&](auto r) INLINE_LAMBDA {
      unroll<FLOAT_VECTORS>([&](auto v) INLINE_LAMBDA {
        float* t = total + r * kStrip + v * LANES;
        store(t, scale ? fma(acc[r][v], load(scale + s * kStrip + v * LANES), load(t)) : acc[r][v]);
      });
    });
  }
}

template <int R = FLOAT_ROWS>
static void float_rows(size_t rows, const float* x, size_t size, size_t steps, const float* values, const float* scale,
                       float* total) {
  if constexpr (R > 1)
    if (rows < R) return float_rows<R - 1>(rows, x, size, steps, values, scale, total);
  float_tile<R>(x, size, steps, values, scale, total);
}

static void float_gemm(const float* x, size_t K, size_t at, size_t rows, size_t size, size_t steps, const float* values,
                       size_t panels, const float* scale, float* total) {
  const size_t tiles = tiles_of(rows, FLOAT_ROWS);
  for (size_t v = 0; v < panels * PANEL_VECTORS; v += FLOAT_VECTORS)
    for (size_t i = 0; i < tiles; ++i) {
      const RowTile tile = row_tile(rows, tiles, i);
      float_rows(tile.rows, x + tile.begin * K + at * tile.rows, size, steps, values + values_at((int)v),
                 scale ? scale + v * LANES : nullptr, total + tile.begin * kStrip + v * LANES);
    }
}

// ---- the tail

template <class T>
static void finish_rows(const float* total, const float* row_scale, const float* scale, const float* bias,
                        int activation, size_t rows, size_t n0, size_t columns, size_t N, T* y) {
  for (size_t m = 0; m < rows; ++m, total += kStrip)
    for (size_t j = 0; j < columns; j += LANES) {
      const size_t n = n0 + j, part = columns - j < LANES ? columns - j : LANES;
      f32 v = load(total + j);
      if (row_scale) v *= set1(row_scale[m]);
      if (scale) v *= part == LANES ? load(scale + n) : load_part(scale + n, part);
      if (bias) v += part == LANES ? load(bias + n) : load_part(bias + n, part);
      v = activate(activation, v);
      if (part == LANES) store(y + m * N + n, v);
      else store_part(y + m * N + n, v, part);
    }
}

static void finish_totals(const float* total, const float* row_scale, const float* scale, const float* bias,
                          int activation, size_t rows, size_t n0, size_t columns, size_t N, void* y, int dtype) {
  auto rows_as = [&](auto* to) { finish_rows(total, row_scale, scale, bias, activation, rows, n0, columns, N, to); };
  if (dtype == kFloat32) rows_as((float*)y);
  else if (dtype == kBFloat16) rows_as((bf16*)y);
  else rows_as((fp16*)y);
}

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
