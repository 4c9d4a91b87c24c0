// How the rows of an INT8 product are stored and cut into blocks, and its columns into pieces.
#pragma once

#include <algorithm>

#include "api.h"
#include "arena.h"
#include "parallel.h"

namespace pyqkern {

constexpr size_t kBlockBytes = 288 << 10;       // quantized rows that stay in L2 beside a strip of the weight
constexpr size_t kSplitBlockBytes = 256 << 10;  // the same with their columns, for 128 rows at least: each block splits
                                                // the weight anew
constexpr size_t kStripPanels = 12;             // columns of a piece: a multiple of every tile width
constexpr size_t kTileRows = 24;                // rows of a block: a multiple of every tile height

// How the rows of one product are stored, and cut into blocks.
struct RowForm {
  size_t bytes;  // of a row
  int bits;
  bool has_columns;
  size_t multiple, most;  // rows of a block: a multiple, and at most so many
  size_t height(size_t M) const {
    const size_t blocks = (M + most - 1) / most;
    return (M + blocks * multiple - 1) / (blocks * multiple) * multiple;
  }
};

// split: whether the weight is taken in its split form.
inline RowForm row_form(const Kernels& k, size_t K, bool split, int bits) {
  if (split) {
    const size_t bytes = split_row_bytes(K);
    return {bytes, bits, true, kSplitRows,
            std::max(kSplitBlockBytes / (2 * bytes), size_t{128}) / kSplitRows * kSplitRows};
  }
  const size_t bytes = row_bytes(k, K, bits);
  return {bytes, bits, false, kTileRows, std::max(kBlockBytes / bytes / kTileRows, size_t{1}) * kTileRows};
}

inline QRows take_rows(Arena& a, size_t rows, const RowForm& form) {
  return form.has_columns ? a.rows_with_columns(rows, form.bytes) : a.rows(rows, form.bytes, form.bits);
}

inline QRows rows_at(const QRows& r, size_t m, const RowForm& form) {
  return {static_cast<char*>(r.q) + m * form.bytes, r.scale + m, r.correction + m, r.bits,
          r.columns ? r.columns + m * form.bytes : nullptr};
}

// Where piece i of `pieces` begins. One row reads kGemvPanels side by side.
inline size_t first_panel(size_t all, size_t rows, size_t i, size_t pieces) {
  const size_t unit = rows == 1 && all >= pieces * kGemvPanels ? kGemvPanels : 1;
  return std::min(all, (all + unit - 1) / unit * i / pieces * unit);
}

// Panels [begin, end) of rows [m0, m0 + rows).
inline void int8_columns(const Kernels& k, const QRows& q, size_t m0, size_t rows, size_t K, const Packed& w,
                         size_t begin, size_t end, const Tail& t) {
  (rows <= k.gemv_rows ? k.int8_gemv : k.int8_gemm)(q, m0, rows, K, w, begin, end, t);
}

}  // namespace pyqkern
