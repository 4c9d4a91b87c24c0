// The exact INT8 product of codes of 8 bits on an ISA that adds products in int16, for many rows: the weight is split,
// W = main + excess (split.cpp), so that four products of main fit int16 whatever the codes are,
//   255 * (the positive or the negative ones of main[n][8i + {0, 1, 4, 5}] and of main[n][8i + {2, 3, 6, 7}]) < 2^15,
// and are added there before they are widened, as in int8_a7.inl. The excess is sparse: of Gaussian weights 3 to 5 %. Its
// products are summed first, for 32 rows at a time and column by column; the tiles of main start from these sums.
// Where the entries of a panel found no room, its last lines are not split, and taken one by one.
#pragma once

#include "kernels/int8_a7.inl"

namespace pyqkern {
namespace PYQKERN_ISA {

// The excess of a panel, where it lies behind the packed weight. No bytes there lead outside of the buffers: numbers are
// limited, and behind main and the columns there is room for whole segments.
struct Excess {
  size_t pairs;  // of lines that are split
  size_t segments, capacity;
  const uint8_t *fours, *k;
  const int8_t* value;

  Excess(const Packed& w, size_t panel, size_t K) : segments(pyqkern::segments(K)), capacity(excess_capacity(K)) {
    const uint8_t* at = (const uint8_t*)w.excess + panel * excess_bytes(K);
    uint32_t given;
    memcpy(&given, at, sizeof given);
    const size_t all = (quads(K) + 1) / 2;
    pairs = given < all ? given : all;
    fours = at + kLine;
    k = fours + kPanel * segments;
    value = (const int8_t*)k + capacity;
  }

  // work(s, i) for the entries [i, i + 4) of column n, in segment s; i goes on from one column to the next.
  template <class F> INLINE_MEMBER void column(size_t n, size_t& i, const F& work) const {
    for (size_t s = 0; s < segments; ++s)
      for (size_t left = fours[n * segments + s]; left && i + 4 <= capacity; --left, i += 4) work(s, i);
  }
};

// The lines of a panel less its excess, and a line of zeros where their number is odd.
static void copy_main(const int8_t* panel, size_t K, const Excess& x, int8_t* main) {
  const size_t Q = quads(K);
  memcpy(main, panel, Q * kLine);
  if (Q % 2) memset(main + Q * kLine, 0, kLine);
  for (size_t n = 0, i = 0; n < kPanel; ++n)
    x.column(n, i, [&](size_t s, size_t i) INLINE_LAMBDA {
      int8_t* quads = main + s * kSegment / 4 * kLine + n * 4;
      for (size_t j = i; j < i + 4; ++j) quads[x.k[j] / 4 * kLine + x.k[j] % 4] -= x.value[j];
    });
}

// c[R rows][a panel] += a * W over `pairs` pairs of lines of main, and the lines of the panel behind them. On the way it
// asks for the lines at `ahead`.
template <class B, int R, bool AHEAD>
INLINE void split_tile(acc_t (&c)[R][VECTORS], const uint8_t* __restrict a, size_t lda, const int8_t* __restrict main,
                       size_t pairs, const int8_t* __restrict panel, size_t Q, const int8_t* ahead) {
  for (size_t i = 0; i < pairs; ++i, main += 2 * kLine) {
    if (AHEAD) {
      __builtin_prefetch(ahead + 2 * i * kLine, 0, 1);
      __builtin_prefetch(ahead + (2 * i + 1) * kLine, 0, 1);
    }
    dot_lines<B, R>(c, a + 8 * i, lda, main);
  }
  for (size_t q = 2 * pairs; q < Q; ++q)
    unroll<VECTORS>([&](auto v) INLINE_LAMBDA {
      const typename B::quad_t b = B::load_b(panel + q * kLine + v * LANES * 4);
      unroll<R>([&](auto r) INLINE_LAMBDA { c[r][v] = B::dot_any(c[r][v], B::load_a(a + r * lda + 4 * q), b); });
    });
}

// Rows [m, m + rows), R at most; sums: those of the excess.
template <class B, int R = B::MR>
static void split_rows(size_t rows, const Strip& s, const int8_t* main, size_t pairs, size_t m,
                       const int32_t (*sums)[kPanel], const int8_t* ahead) {
  if constexpr (R > 1)
    if (rows < R) return split_rows<B, R - 1>(rows, s, main, pairs, m, sums, ahead);
  const size_t Q = quads(s.K);
  const uint8_t* a = (const uint8_t*)s.a.q + m * 4 * Q;
  acc_t c[R][VECTORS];
  unroll<R>([&](auto r) INLINE_LAMBDA {
    unroll<VECTORS>([&](auto v) INLINE_LAMBDA { c[r][v] = (acc_t)load(sums[r] + v * LANES); });
  });
  if (ahead) split_tile<B, R, true>(c, a, 4 * Q, main, pairs, s.b, Q, ahead);
  else split_tile<B, R, false>(c, a, 4 * Q, main, pairs, s.b, Q, nullptr);
  finish<R, VECTORS>(c, s.b + Q * kLine, 0, s.a, m, s.n0, s.t, s.tail);
}

template <class B>
static void split_gemm(const QRows& a, size_t m0, size_t rows, size_t K, const Packed& w, size_t begin, size_t end,
                       const Tail& t) {
  const size_t Q = quads(K);
  alignas(64) int8_t main[(kSplitMost + kSegment) / 4 * kLine];
  alignas(64) int32_t sums[kSplitRows][kPanel];
  for (size_t panel = begin; panel < end; ++panel) {
    const Strip strip{a, K, w.panel(K, panel), nullptr, panel * kPanel, t, tail_of(t)};
    const Excess excess(w, panel, K);
    copy_main(strip.b, K, excess, main);
    for (size_t m = 0; m < rows; m += kSplitRows) {
      const size_t group = rows - m < kSplitRows ? rows - m : kSplitRows, tiles = (group + B::MR - 1) / B::MR;
      B::excess_sums(a.columns + (m0 + m) * 4 * Q, excess, sums);
      for (size_t i = 0, r = 0, height; i < tiles; ++i, r += height) {
        height = group / tiles + (i < group % tiles);
        const bool asks = m == 0 && i == 0 && panel + 1 < end;
        split_rows<B>(height, strip, main, excess.pairs, m0 + m + r, sums + r, asks ? w.panel(K, panel + 1) : nullptr);
      }
    }
  }
}

// The product of rows of plain bytes: of 8 bits with a split weight, or of 7 bits.
template <class B>
static void bytes_gemm(const QRows& a, size_t m0, size_t rows, size_t K, const Packed& w, size_t begin, size_t end,
                       const Tail& t) {
  if (a.columns) split_gemm<B>(a, m0, rows, K, w, begin, end, t);
  else folded_gemm<B>(a, m0, rows, K, w, begin, end, t);
}

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
