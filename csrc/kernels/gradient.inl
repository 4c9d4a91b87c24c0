// Rows of weights that are expanded to fp32 on the way, for the gradient of a linear's input: the sum runs over the
// rows of W, the output channels, so that sixteen of them stand behind each other, each with sixteen columns. The tiles
// are those of weight_only.inl.
//
//   y[m][k] = sum over n of g[m][n] * w[n][k],   w[n][k] = value * scale, rounded; one chain of fma from zero, n ascending
#pragma once

#include "kernels/four_bit.inl"

namespace pyqkern {
namespace PYQKERN_ISA {

constexpr int ROW_VECTORS = (int)kPanel / LANES;

static void int8_expand_rows(const int8_t* packed, size_t quads, const float* scale, size_t rows, float* values) {
  for (size_t n = 0; n < rows; ++n, packed += 4, values += kPanel) {
    int8_t codes[kPanel] = {};
    for (size_t q = 0; q < quads; ++q) memcpy(codes + 4 * q, packed + q * kLine, 4);
    unroll<ROW_VECTORS>([&](auto v) INLINE_LAMBDA {
      store(values + v * LANES, to_float(load_bytes(codes + v * LANES)) * set1(scale[n]));
    });
  }
}

static void four_bit_expand_rows(const uint8_t* packed, size_t stride, const Codebook& book, const float* scale,
                                 size_t rows, float* values) {
  static const int32_t shifts[kPanel] = {0, 8, 16, 24, 4, 12, 20, 28, 0, 8, 16, 24, 4, 12, 20, 28};  // of column k % 8
  static const int32_t second[kPanel] = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1};    // line of column k
  const table16 table = load_table(book.value);
  for (size_t n = 0; n < rows; ++n, packed += 4, values += kPanel) {
    int32_t line[2];
    memcpy(line, packed, 4), memcpy(line + 1, packed + stride, 4);
    unroll<ROW_VECTORS>([&](auto v) INLINE_LAMBDA {
      const i32 other = load(second + v * LANES);
      const u32 codes = (u32)((set1(line[0]) & ~other) | (set1(line[1]) & other)) >> (u32)load(shifts + v * LANES);
      store(values + v * LANES, lookup(table, (i32)codes, 0) * set1(scale[n]));
    });
  }
}

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
