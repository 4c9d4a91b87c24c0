// How linears are cut into pieces that fill totals, and those that multiply rows in fp32.
#pragma once

#include <algorithm>

#include "api.h"
#include "parallel.h"

namespace pyqkern {

constexpr size_t kGemvRows = 4;          // rows that read the codes themselves, every one for itself
constexpr size_t kBlockRows = 192;       // rows that share expanded columns: their totals are 48 KB
constexpr size_t kGroupBytes = 8 << 20;  // rows that are copied to tiles at a time
constexpr size_t kRowStrips = 8;         // strips of a piece of one row, at least, if each thread has a piece
constexpr size_t kRowPieces = 3;         // pieces of one row for each thread, at most
constexpr size_t kSerialOps = 1 << 20;   // multiply-adds: below this a second thread costs more than it brings

// Blocks of rows, all of one height but the last ones.
struct Blocks {
  size_t rows, count, height;
  explicit Blocks(size_t rows)
      : rows(rows), count((rows + kBlockRows - 1) / kBlockRows), height((rows + count - 1) / count) {}
  size_t begin(size_t i) const { return std::min(i * height, rows); }
  size_t size(size_t i) const { return begin(i + 1) - begin(i); }
};

// work(block, strip) for all blocks of rows and `all` strips. Of one row a thread takes several strips at a time, which
// follow each other in memory: each asks for the next (four_bit_gemv_int8).
template <class Work> void parallel_strips(const Blocks& blocks, size_t all, int count, const Work& work) {
  const size_t threads = count, many = std::clamp(all / kRowStrips, threads, kRowPieces * threads);
  const size_t pieces = blocks.rows > 1 ? all : std::min(all, many);
  parallel_for(blocks.count * pieces, count, [&](size_t i) {
    const size_t piece = i % pieces, end = all * (piece + 1) / pieces;
    for (size_t strip = all * piece / pieces; strip < end; ++strip) work(i / pieces, strip);
  });
}

// What happens to totals [rows][kStrip] before they are stored: Kernels::finish_totals.
struct Finish {
  const float *row_scale, *scale, *bias;
  size_t N;
  void* y;
  int dtype;
};

// totals(m, rows, strip, total) fills total for rows [m, m + rows) of one strip.
template <class Totals>
void for_strips(const Kernels& k, const Blocks& blocks, int count, const Finish& f, const Totals& totals) {
  parallel_strips(blocks, strips(f.N), count, [&](size_t block, size_t strip) {
    const size_t m = blocks.begin(block), rows = blocks.size(block), n0 = strip * kStrip;
    if (!rows) return;
    float* total = static_cast<float*>(scratch(kTotals, kBlockRows * kStrip * sizeof(float)));
    totals(m, rows, strip, total);
    k.finish_totals(total, f.row_scale ? f.row_scale + m : nullptr, f.scale, f.bias, kNone, rows, n0,
                    std::min(kStrip, f.N - n0), f.N, static_cast<char*>(f.y) + m * f.N * dtype_size(f.dtype), f.dtype);
  });
}

// Rows in fp32: up to kGemvRows as they lie, [rows][K]; more as tiles of load_tile.
struct FloatRows {
  const float* x;
  size_t rows;
  bool in_tiles;
};

// Totals of these rows and one strip, [rows][kStrip], and what is left to do to them (Finish): of an INT8 weight
// [N, K], w_scale; of one of 4 bits nothing; of integers row_scale.
void weight_only_totals(const Kernels& k, const Packed& w, size_t N, size_t K, const FloatRows& in, size_t strip,
                        float* total);
void four_bit_totals(const Kernels& k, const Weight4Bit& w, const FloatRows& in, size_t strip, float* total);

// Rows as integers: four_bit_load_rows' codes [rows][fold.bytes(K)], and one scale for each row.
struct IntegerRows {
  int8_t* x;
  float* scale;
  Fold fold;
};
void four_bit_totals(const Kernels& k, const Weight4Bit& w, const IntegerRows& q, size_t strip, size_t rows,
                     float* total);

// How the rows of a call lie as integers.
Fold fold_of(const Kernels& k, const Weight4Bit& w);

// Quantizes up to kLoadRows rows of x [rows, K] for a weight of this book.
constexpr size_t kLoadRows = 16;
void load_integer_rows(const Kernels& k, const void* x, int dtype, size_t rows, size_t K, const Codebook& book,
                       const IntegerRows& to);

// The rows of x, all in a buffer of this thread, or where they are if nothing is to be done. few: rows that stay as they
// lie.
inline FloatRows float_rows(const Kernels& k, const void* x, int dtype, const Blocks& blocks, size_t K, int count,
                            size_t few = kGemvRows) {
  const bool in_tiles = blocks.rows > few;
  if (!in_tiles && dtype == kFloat32) return {static_cast<const float*>(x), blocks.rows, false};
  float* wide = static_cast<float*>(scratch(kRows, blocks.rows * K * sizeof(float)));
  const size_t most = tiles_of(blocks.height, k.tile_rows);
  if (!in_tiles) k.widen(x, dtype, blocks.rows * K, wide);
  else
    parallel_for(blocks.count * most, count, [&](size_t i) {
      const size_t rows = blocks.size(i / most), tiles = tiles_of(rows, k.tile_rows);
      if (i % most >= tiles) return;
      const RowTile tile = row_tile(rows, tiles, i % most);
      const size_t at = (blocks.begin(i / most) + tile.begin) * K;
      k.load_tile(static_cast<const char*>(x) + at * dtype_size(dtype), dtype, K, tile.rows, wide + at);
    });
  return {wide, blocks.rows, in_tiles};
}

// y [M, N] of x [M, K], both of `dtype`: totals(rows, strip, total) fills total from rows in fp32.
template <class Totals>
void float_linear(const Kernels& k, const void* x, int dtype, size_t M, size_t N, size_t K, const float* scale,
                  const float* bias, void* y, const Totals& totals) {
  const int count = M * N * K <= kSerialOps ? 1 : threads();
  const size_t bytes = dtype_size(dtype), group = std::max(kGroupBytes / (sizeof(float) * K), kBlockRows);
  for (size_t m0 = 0; m0 < M; m0 += group) {
    const Blocks blocks(std::min(group, M - m0));
    const FloatRows in = float_rows(k, static_cast<const char*>(x) + m0 * K * bytes, dtype, blocks, K, count);
    const Finish finish{nullptr, scale, bias, N, static_cast<char*>(y) + m0 * N * bytes, dtype};
    for_strips(k, blocks, count, finish, [&](size_t m, size_t rows, size_t strip, float* total) {
      totals(FloatRows{in.x + m * K, rows, in.in_tiles}, strip, total);
    });
  }
}

}  // namespace pyqkern
