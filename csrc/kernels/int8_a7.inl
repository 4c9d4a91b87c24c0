// The INT8 product of activations of 7 bits on an ISA that adds products in int16, those of two lines of a panel at once
// before they are widened: 2.5 instructions for 32 products instead of 3.
//
// The result is exact for all codes and weights. Four products leave int16 only where the weights are marked
// (kernels.h), and marked lines are taken one by one: two products never leave it, 2 * 127 * 128 < 2^15. So weights that
// are marked everywhere cost a fifth of the speed. Rows and tail: int8.inl.
#pragma once

#include "kernels/int8.inl"

namespace pyqkern {
namespace PYQKERN_ISA {

static void int8_mark(size_t K, int8_t* packed) {
  constexpr int32_t GREATEST = 258;  // 127 * 258 = 32766
  const size_t pairs = quads(K) / 2;
  uint8_t* marks = (uint8_t*)packed + (quads(K) + 2) * kLine;
  memset(marks, 0, mark_lines(K) * kLine);
  auto byte = [](u32 quad, int k) { return (i32)(quad << (24 - 8 * k)) >> 24; };
  for (size_t i = 0; i < pairs; ++i, packed += 2 * kLine) {
    i32 over{};
    for (size_t n = 0; n < kPanel; n += LANES) {
      const u32 first = (u32)load((const int32_t*)packed + n), second = (u32)load((const int32_t*)(packed + kLine) + n);
      for (int k = 0; k < 4; k += 2) {
        const i32 w[4] = {byte(first, k), byte(first, k + 1), byte(second, k), byte(second, k + 1)};
        i32 positive{}, negative{};
        for (int j = 0; j < 4; ++j) positive += max(w[j], i32{}), negative -= min(w[j], i32{});
        over |= max(positive, negative) > GREATEST;
      }
    }
    if (total(over)) marks[i / 8] |= 1 << i % 8;
  }
}

// How many of the lowest bits are zero.
INLINE size_t zeros(uint64_t word) { return word ? (size_t)__builtin_ctzll(word) : 64; }

// c[R rows][VECTORS vectors] += two quads of a [R rows, stride lda] * two lines of a panel, added in int16.
template <class B, int R>
INLINE void dot_lines(acc_t (&c)[R][VECTORS], const uint8_t* a, size_t lda, const int8_t* b) {
  typedef typename B::quad_t quad_t;
  quad_t b0[VECTORS], b1[VECTORS];
  unroll<VECTORS>([&](auto v) INLINE_LAMBDA {
    b0[v] = B::load_b(b + v * LANES * 4);
    b1[v] = B::load_b(b + v * LANES * 4 + kLine);
  });
  unroll<R>([&](auto r) INLINE_LAMBDA {
    const quad_t a0 = B::load_a(a + r * lda), a1 = B::load_a(a + r * lda + 4);
    unroll<VECTORS>([&](auto v) INLINE_LAMBDA { c[r][v] = B::dot(c[r][v], a0, b0[v], a1, b1[v]); });
  });
}

// c[R rows][VECTORS vectors] += a [R rows, stride lda] * b, a panel of Q quads. On the way it asks for the lines at `ahead`.
template <class B, int R, bool AHEAD>
INLINE void folded_tile(acc_t (&c)[R][VECTORS], const uint8_t* __restrict a, size_t lda, const int8_t* __restrict b,
                        size_t Q, const int8_t* ahead) {
  typedef typename B::quad_t quad_t;
  const int8_t* marks = b + (Q + 2) * kLine;
  auto single = [&]() INLINE_LAMBDA {
    quad_t bv[VECTORS];
    unroll<VECTORS>([&](auto v) INLINE_LAMBDA { bv[v] = B::load_b(b + v * LANES * 4); });
    unroll<R>([&](auto r) INLINE_LAMBDA {
      const quad_t av = B::load_a(a + r * lda);
      unroll<VECTORS>([&](auto v) INLINE_LAMBDA { c[r][v] = B::dot(c[r][v], av, bv[v]); });
    });
  };
  auto next = [&](size_t lines) INLINE_LAMBDA {
    if (AHEAD)
      for (size_t i = 0; i < lines; ++i, ahead += kLine) __builtin_prefetch(ahead, 0, 1);
    a += 4 * lines;
    b += lines * kLine;
  };
  for (size_t pairs = Q / 2; pairs; marks += 8) {  // 64 at a time
    uint64_t word;
    memcpy(&word, marks, 8);
    size_t left = pairs < 64 ? pairs : 64;
    pairs -= left;
    while (left) {  // a run of pairs without a mark, and one of pairs with one
      const size_t clear = zeros(word) < left ? zeros(word) : left;
      for (size_t i = 0; i < clear; ++i, next(2)) dot_lines<B, R>(c, a, lda, b);
      if (!(left -= clear)) break;
      word >>= clear;
      const size_t set = zeros(~word) < left ? zeros(~word) : left;
      for (size_t i = 0; i < 2 * set; ++i, next(1)) single();
      left -= set;
      word = left ? word >> set : 0;
    }
  }
  if (Q % 2) single();
}

template <class B, int R = B::MR>
static void folded_rows(size_t rows, const Strip& s, size_t m, const int8_t* ahead) {
  if constexpr (R > 1)
    if (rows < R) return folded_rows<B, R - 1>(rows, s, m, ahead);
  const size_t Q = quads(s.K);
  const uint8_t* a = (const uint8_t*)s.a.q + m * 4 * Q;
  acc_t c[R][VECTORS];
  clear(c);
  if (ahead) folded_tile<B, R, true>(c, a, 4 * Q, s.b, Q, ahead);
  else folded_tile<B, R, false>(c, a, 4 * Q, s.b, Q, nullptr);
  finish<R, VECTORS>(c, s.b + Q * kLine, 0, s.a, m, s.n0, s.t, s.tail);
}

template <class B>
static void folded_gemm(const QRows& a, size_t m0, size_t rows, size_t K, const Packed& w, size_t begin, size_t end,
                        const Tail& t) {
  const size_t tiles = (rows + B::MR - 1) / B::MR;
  for (size_t panel = begin; panel < end; ++panel) {
    const int8_t* b = w.panel(K, panel);
    const Strip strip{a, K, b, nullptr, panel * kPanel, t, tail_of(t)};
    for (size_t i = 0, m = m0, height; i < tiles; ++i, m += height) {
      height = rows / tiles + (i < rows % tiles);
      folded_rows<B>(height, strip, m, i == 0 && panel + 1 < end ? b + panel_bytes(K) : nullptr);
    }
  }
}

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
