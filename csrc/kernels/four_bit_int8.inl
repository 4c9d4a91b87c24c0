// The 4-bit product of integers, one text for few rows, which read the codes, and for many, which share the integers.
//
// The integers carry `offset` too much and are unsigned, 64 at most; the rows are signed, within +-127: u8 times s8,
// as both vpdpbusd and vpmaddubsw take them. vpmaddubsw adds two products and saturates beyond int16: 2 * 127 * 64 =
// 16256 at most. With AVX2 alone
//   a fold in int32 widens the sums of two quads, four products: 4 * 127 * 64 = 32512 for integers within +-32;
//   a fold in int16 (short_sums) widens once. Its sums may wrap, modulo 2^16, on the way: in the end, with the start,
//   they are those of the true integers w, and |them| <= 2 * quads * 127 * max |w|: 32512 for int4's [-8, 7] and 16
//   quads. Integers of +-32 would allow 4 quads, which are too few: it saves no instruction.
#pragma once

#include <type_traits>

#include "kernels/four_bit.inl"

namespace pyqkern {
namespace PYQKERN_ISA {

static void four_bit_load_rows(const QRows& rows_of, size_t rows, size_t K, const Fold& fold, int8_t* x) {
  const ROW_T* q = (const ROW_T*)rows_of.q;
  for (size_t i = 0; i < rows * K; i += 4 * fold.quads, x += 4 + 4 * fold.quads)
    load_fold(q + i, fold.quads, -fold.offset, fold.short_sums, x);
}

// A table of the integers with their offset.
INLINE nibbles_t load_integers(const Codebook& book, const Fold& fold) {
  int8_t shifted[16];
  for (int c = 0; c < 16; ++c) shifted[c] = (int8_t)(book.integer[c] + fold.offset);
  return load_nibbles(shifted);
}

// Where a tile's weights come from, eight k at a time: get the two quads of vector v of columns.
// On the way it asks for the lines `ahead`, which are `part` bytes apart by panel, and then for those `step` further on.
struct PackedCodes {
  const uint8_t *line, *ahead;
  size_t stride, part, step;
  const nibbles_t& table;
  INLINE_MEMBER void get(int v, w_t& low, w_t& high) const {
    if (v % PANEL_VECTORS == 0) __builtin_prefetch(ahead + v / PANEL_VECTORS * part);
    lookup(table, line + v * LANES * 4, low, high);
  }
  INLINE_MEMBER void next() { line += stride, ahead += step; }
};
struct Integers {
  const uint8_t* quad;
  INLINE_MEMBER void get(int v, w_t& low, w_t& high) const {
    memcpy(&low, quad + v * LANES * 4, sizeof low);
    memcpy(&high, quad + 4 * kStrip + v * LANES * 4, sizeof high);
  }
  INLINE_MEMBER void next() { quad += 8 * kStrip; }
};

// sum = one fold of R rows and V vectors of columns, added up in sum_t: vectors of int32 or of int16. One row alone
// sums the two quads apart where it would wait for its additions.
template <int R, int V, class sum_t, class Weights>
INLINE void int8_fold(const int8_t* x, size_t ldx, size_t quads, Weights& weights, i32 (&sum)[R][V]) {
  constexpr int H = R == 1 && V < 8 && !SHORT_SUMS ? 2 : 1;
  sum_t part[R][V][H];
  clear(part);
  for (int r = 0; r < R; ++r) {
    int32_t start;
    memcpy(&start, x + r * ldx, 4);
    for (int v = 0; v < V; ++v) part[r][v][0] = (sum_t)set1(start);
  }
  x += 4;
  auto add = [&](auto r, auto v, w_t low, x_t a, w_t high, x_t b) INLINE_LAMBDA {
    sum_t(&p)[H] = part[r][v];
    if constexpr (SHORT_SUMS) p[0] = dot(p[0], low, a, high, b);
    else p[0] = dot(p[0], low, a), p[H - 1] = dot(p[H - 1], high, b);
  };
  size_t lines = quads / 2;  // at least four: a loop that might be skipped makes g++ 12 copy accumulators
  do {
    if constexpr (R == 1) {  // a vector at a time: with all of them looked up first g++ 12 keeps sums on the stack
      const x_t a = load_x(x), b = load_x(x + 4);
      unroll<V>([&](auto v) INLINE_LAMBDA {
        w_t low, high;
        weights.get(v, low, high);
        add(Index<0>{}, v, low, a, high, b);
      });
    } else {
      w_t low[V], high[V];
      unroll<V>([&](auto v) INLINE_LAMBDA { weights.get(v, low[v], high[v]); });
      unroll<R>([&](auto r) INLINE_LAMBDA {
        const x_t a = load_x(x + r * ldx), b = load_x(x + r * ldx + 4);
        unroll<V>([&](auto v) INLINE_LAMBDA { add(r, v, low[v], a, high[v], b); });
      });
    }
    weights.next();
    x += 8;
  } while (--lines);
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = widen(H == 2 ? part[r][v][0] + part[r][v][H - 1] : part[r][v][0]);
}

// total[r][v] += the scaled sums of R rows and V vectors of columns over `steps` steps; `scale` and `total` point at
// the first column.
template <int R, int V, class sum_t, class Weights>
INLINE void int8_tile(const int8_t* x, size_t ldx, size_t size, size_t steps, const Fold& fold, Weights weights,
                      const float* scale, size_t ld_scale, float* total) {
  const size_t quads = fold.quads;
  for (size_t step = 0; step < steps; ++step, scale += ld_scale) {
    i32 sum[R][V];
    int8_fold<R, V, sum_t>(x, ldx, quads, weights, sum);
    x += 4 + 4 * quads;
    if (!std::is_same<sum_t, i32>::value)  // a fold in int32 is a whole step
      for (size_t k = 4 * quads; k < size; k += 4 * quads, x += 4 + 4 * quads) {
        i32 more[R][V];
        int8_fold<R, V, sum_t>(x, ldx, quads, weights, more);
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < V; ++v) sum[r][v] += more[r][v];
      }
    for (int v = 0; v < V; ++v) {
      const f32 s = load(scale + v * LANES);
      for (int r = 0; r < R; ++r) {
        float* t = total + r * kStrip + v * LANES;
        store(t, fma(to_float(sum[r][v]), s, load(t)));
      }
    }
  }
}

// One row waits for the memory, and asks for a strip to come in as many places as it has panels: a CPU reads several
// places faster than one, because its own prefetchers are so many lines ahead in each, and stop at the ends of pages.
// More rows have time, and ask for what they need next.
template <int R, class sum_t>
static void gemv_int8_strip(const int8_t* x, size_t ldx, size_t K, const Fold& fold, const uint8_t* packed,
                            const uint8_t* ahead, const float* scale, size_t blocksize, size_t panels,
                            const Codebook& book, float* total) {
  constexpr int V = R > 1 ? GEMV_VECTORS_INT8 : STRIP_VECTORS < 8 ? STRIP_VECTORS : 8;
  const nibbles_t table = load_integers(book, fold);
  const size_t size = step_of(blocksize), vectors = panels * PANEL_VECTORS, stride = panels * kLine;
  const size_t part = K / 8 * kLine;
  unroll<R * STRIP_VECTORS>([&](auto v) INLINE_LAMBDA { store(total + v * LANES, f32{}); });
  for (size_t k = 0; k < K; k += size, x += fold.bytes(size)) {
    const float* scales = scale + k / blocksize * panels * kPanel;
    auto tile = [&](auto width, size_t v) INLINE_LAMBDA {
      const uint8_t* line = packed + k / 8 * stride + v * LANES * 4;
      const uint8_t* far = ahead + k / 8 * kLine + v / PANEL_VECTORS * part;
      const PackedCodes codes = R == 1 ? PackedCodes{line, far, stride, part, kLine, table}
                                       : PackedCodes{line, line + PREFETCH_4BIT, stride, kLine, stride, table};
      int8_tile<R, width, sum_t>(x, ldx, size, 1, fold, codes, scales + v * LANES, 0, total + v * LANES);
    };
    size_t v = 0;
    for (; v + V <= vectors; v += V) tile(Index<V>{}, v);
    for (; v < vectors; ++v) tile(Index<1>{}, v);
  }
}

static void four_bit_gemv_int8(const int8_t* x, size_t ldx, size_t rows, size_t K, const Fold& fold,
                               const uint8_t* packed, const uint8_t* ahead, const float* scale, size_t blocksize,
                               size_t panels, const Codebook& book, float* total) {
  auto strip = [&](auto sum) {
    typedef decltype(sum) sum_t;
    auto f = rows == 1   ? gemv_int8_strip<1, sum_t>
             : rows == 2 ? gemv_int8_strip<2, sum_t>
             : rows == 3 ? gemv_int8_strip<3, sum_t>
                         : gemv_int8_strip<4, sum_t>;
    f(x, ldx, K, fold, packed, ahead, scale, blocksize, panels, book, total);
  };
  if (fold.short_sums) strip(short_sum{});
  else strip(i32{});
}

static void four_bit_expand_int8(const uint8_t* packed, size_t size, size_t panels, const Codebook& book,
                                 const Fold& fold, uint8_t* integers) {
  const nibbles_t table = load_integers(book, fold);
  for (size_t k = 0; k < size; k += 8, integers += 8 * kStrip)
    for (size_t v = 0; v < kStrip / LANES; ++v) {
      w_t low{}, high{};
      if (v < panels * PANEL_VECTORS) lookup(table, packed + k / 8 * panels * kLine + v * LANES * 4, low, high);
      memcpy(integers + v * LANES * 4, &low, sizeof low);
      memcpy(integers + 4 * kStrip + v * LANES * 4, &high, sizeof high);
    }
}

template <int R, class sum_t>
static void gemm_int8_rows(const int8_t* x, size_t ldx, size_t size, size_t steps, const Fold& fold,
                           const uint8_t* integers, const float* scale, float* total) {
  for (size_t n = 0; n < kStrip; n += VECTORS_INT8 * LANES)
    int8_tile<R, VECTORS_INT8, sum_t>(x, ldx, size, steps, fold, Integers{integers + n * 4}, scale + n, kStrip,
                                      total + n);
}

static void four_bit_gemm_int8(const int8_t* x, size_t ldx, size_t rows, size_t size, size_t steps, const Fold& fold,
                               const uint8_t* integers, const float* scale, float* total) {
  auto all = [&](auto sum) {
    typedef decltype(sum) sum_t;
    constexpr int R = ROWS_INT8;
    auto tiles = [&](auto f, size_t m) { f(x + m * ldx, ldx, size, steps, fold, integers, scale, total + m * kStrip); };
    size_t m = 0;
    for (; m + R <= rows && rows - m != 8; m += R) tiles(gemm_int8_rows<R, sum_t>, m);
    for (; m + 4 <= rows; m += 4) tiles(gemm_int8_rows<4, sum_t>, m);  // 8 = 4 + 4: two alone would wait for their sums
    for (; m + 2 <= rows; m += 2) tiles(gemm_int8_rows<2, sum_t>, m);
    if (m < rows) tiles(gemm_int8_rows<1, sum_t>, m);
  };
  if (fold.short_sums) all(short_sum{});
  else all(i32{});
}

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
