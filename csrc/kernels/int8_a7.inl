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

// Lines to ask for, one with each line that is read: those of PLACES panels in turns, `apart` bytes from each other.
template <int PLACES> struct LinesAhead {
  const int8_t* at = nullptr;
  size_t apart = 0;
  int place = 0;
  INLINE_MEMBER void ask() {
    if constexpr (PLACES > 0) {
      __builtin_prefetch(at + place * apart, 0, 1);
      if (++place == PLACES) place = 0, at += kLine;
    }
  }
};

// c[R rows][VECTORS vectors] += a [R rows, stride lda] * b, a panel of Q quads.
template <class B, int R, int PLACES>
INLINE void folded_tile(acc_t (&c)[R][VECTORS], const uint8_t* __restrict a, size_t lda, const int8_t* __restrict b,
                        size_t Q, LinesAhead<PLACES> ahead) {
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
    for (size_t i = 0; i < lines; ++i) ahead.ask();
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

template <class B, int R = B::MR, int PLACES>
static void folded_rows(size_t rows, const Strip& s, size_t m, LinesAhead<PLACES> ahead) {
  if constexpr (R > 1)
    if (rows < R) return folded_rows<B, R - 1>(rows, s, m, ahead);
  const size_t Q = quads(s.K);
  acc_t c[R][VECTORS];
  clear(c);
  folded_tile<B, R>(c, (const uint8_t*)s.a.q + m * 4 * Q, 4 * Q, s.b, Q, ahead);
  finish<R, VECTORS>(c, s.b + Q * kLine, 0, s.a, m, s.n0, s.t, s.tail);
}

// One row asks for its panels in four places at once, for the reason of gemv_panels. Their marks differ, so that they are
// multiplied one after the other: the first of each quarter, the second of each, ... each asking for a part of the next.
template <class B>
static void folded_gemv(const QRows& a, size_t m0, size_t K, const Packed& w, size_t begin, size_t end, const Tail& t) {
  const size_t apart = (end - begin) / kGemvPanels, lines = quads(K) / kGemvPanels;
  auto multiply = [&](size_t panel, auto ahead) {
    folded_rows<B, 1>(1, Strip{a, K, w.panel(K, panel), nullptr, panel * kPanel, t, tail_of(t)}, m0, ahead);
  };
  for (size_t i = 0; i < apart; ++i)
    for (size_t j = 0; j < kGemvPanels; ++j)
      multiply(begin + i + j * apart,
               LinesAhead<kGemvPanels>{w.panel(K, begin + i + 1) + j * lines * kLine, apart * panel_bytes(K)});
  for (size_t panel = begin + apart * kGemvPanels; panel < end; ++panel)
    multiply(panel, LinesAhead<1>{w.panel(K, panel + 1)});
}

template <class B>
static void folded_gemm(const QRows& a, size_t m0, size_t rows, size_t K, const Packed& w, size_t begin, size_t end,
                        const Tail& t) {
  if (rows == 1) return folded_gemv<B>(a, m0, K, w, begin, end, t);
  const size_t tiles = (rows + B::MR - 1) / B::MR;
  for (size_t panel = begin; panel < end; ++panel) {
    const int8_t* b = w.panel(K, panel);
    const Strip strip{a, K, b, nullptr, panel * kPanel, t, tail_of(t)};
    for (size_t i = 0, m = m0, height; i < tiles; ++i, m += height) {
      height = rows / tiles + (i < rows % tiles);
      if (i == 0 && panel + 1 < end) folded_rows<B>(height, strip, m, LinesAhead<1>{b + panel_bytes(K)});
      else folded_rows<B>(height, strip, m, LinesAhead<0>{});
    }
  }
}

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
