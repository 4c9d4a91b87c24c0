// One step of a layer: linears that take the same rows. The rows are prepared once, then the threads share the columns
// of all linears.
#pragma once

#include <vector>

#include "api.h"
#include "float_linear.h"
#include "int8_linear.h"

namespace pyqkern {

// How rows go into the linears of a layer.
struct RowsOf {
  int bits;        // of the codes of rows that are quantized for INT8, 8 or 7
  bool symmetric;  // of those with 8 bits
  bool in_float;   // not quantized
};

class Stage {
 public:
  // A linear, its bias in fp32 or nullptr, and where it goes: y fp32 [rows, N].
  struct Output {
    const EncoderLinear* linear;
    const float* bias;
    float* y;
  };

  // x fp32 [rows, K] is read when its rows are prepared; up to kGemvRows rows in float are read by multiply. Prepared
  // rows are in a buffer of the calling thread, which the next stage takes over.
  Stage(const Kernels& k, const RowsOf& how, std::initializer_list<Output> outputs, const float* x, size_t rows);

  // The rows in pieces that are prepared apart, by any thread.
  size_t pieces() const { return blocks.count * pieces_of_block; }
  RowTile piece(size_t i) const;
  void prepare(size_t i) const;

  // After all rows are prepared.
  void multiply() const;

 private:
  void multiply_int8(int count) const;
  void multiply_strips(int count) const;
  void multiply_strip(size_t block, size_t at) const;

  const Kernels& k;
  RowsOf how;
  std::vector<Output> outputs;
  const float* x;
  size_t rows, K;
  Blocks blocks;  // of rows that are multiplied together
  size_t pieces_of_block;
  RowForm form{};          // of INT8 rows
  QRows quantized{};       // the same
  IntegerRows integers{};  // rows quantized for 4 bits
  float* wide = nullptr;   // rows in float
};

}  // namespace pyqkern
