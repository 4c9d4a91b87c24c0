// The gates of recurrent layers. x and p are the products of the input and of the hidden state, each with its bias;
// their G * n columns are the gates behind each other, in torch's order.
//
//   LSTM  i, f, o = sigmoid(x + p), g = tanh(x + p);  c = fma(f, c, i * g);  h = o * tanh(c)
//   GRU   r, z = sigmoid(x + p);  m = tanh(fma(r, p_m, x_m));  h = fma(z, h - m, m)
//   RNN   h = tanh(x + p) or max(x + p, 0)
//
// NaN stays in its column. sigmoid, tanh: math.inl.
#pragma once

#include "kernels/encoder.inl"

namespace pyqkern {
namespace PYQKERN_ISA {

template <int CELL>
static void gates_as(const float* x, const float* product, size_t rows, size_t n, float* h, float* c, float* y) {
  const size_t width = gates_of(CELL) * n;
  for (size_t m = 0; m < rows; ++m, x += width, product += width) {
    for (size_t j = 0; j < n; j += LANES) {
      const size_t part = n - j < LANES ? n - j : LANES, at = m * n + j;
      auto of_x = [&](size_t gate) INLINE_LAMBDA { return load_n(x + gate * n + j, part); };
      auto of_h = [&](size_t gate) INLINE_LAMBDA { return load_n(product + gate * n + j, part); };
      f32 state;
      if (CELL == kLstm) {
        const f32 i = sigmoid(of_x(0) + of_h(0)), f = sigmoid(of_x(1) + of_h(1));
        const f32 g = tanh(of_x(2) + of_h(2)), o = sigmoid(of_x(3) + of_h(3));
        const f32 cell = fma(f, load_n(c + at, part), i * g);
        store_n(c + at, cell, part);
        state = o * tanh(cell);
      } else if (CELL == kGru) {
        const f32 r = sigmoid(of_x(0) + of_h(0)), z = sigmoid(of_x(1) + of_h(1));
        const f32 fresh = tanh(fma(r, of_h(2), of_x(2)));
        state = fma(z, load_n(h + at, part) - fresh, fresh);
      } else {
        const f32 sum = of_x(0) + of_h(0);
        state = CELL == kRnnTanh ? tanh(sum) : activate<kRelu>(sum);
      }
      store_n(h + at, state, part);
      if (y) store_n(y + at, state, part);
    }
  }
}

static void recurrent_gates(int cell, const float* x, const float* product, size_t rows, size_t n, float* h, float* c,
                            float* y) {
  auto gates = cell == kLstm      ? gates_as<kLstm>
               : cell == kGru     ? gates_as<kGru>
               : cell == kRnnTanh ? gates_as<kRnnTanh>
                                  : gates_as<kRnnRelu>;
  gates(x, product, rows, n, h, c, y);
}

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
