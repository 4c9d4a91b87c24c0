#include "stage.h"

namespace pyqkern {
namespace {

constexpr size_t kPieceRows = 16;    // rows that are prepared together
constexpr size_t kSerial = 1 << 19;  // multiply-adds: below this a second thread costs more than it brings, while the
                                     // pool is awake, as between the steps of a layer

}  // namespace

Stage::Stage(const Kernels& k, const RowsOf& how, std::initializer_list<Output> given, const float* x, size_t rows)
    : k(k), how(how), outputs(given), x(x), rows(rows), K(outputs[0].linear->K), blocks(rows) {
  const EncoderLinear& first = *outputs[0].linear;
  if (how.in_float) {
    pieces_of_block = tiles_of(blocks.height, k.tile_rows);
    if (rows > kGemvRows) wide = static_cast<float*>(scratch(kStageRows, rows * K * sizeof(float)));
    return;
  }
  if (first.packed.panels) {
    bool split = true;
    for (const Output& o : outputs) split = split && splits(k, rows, o.linear->packed, how.bits);
    form = row_form(k, K, split, how.bits);
    blocks.height = form.height(rows);
    blocks.count = (rows + blocks.height - 1) / blocks.height;
    quantized = carve(kStageRows, [&](Arena& a) { return take_rows(a, rows, form); });
  } else {
    const Fold fold = fold_of(k, first.four);
    integers = carve(kStageRows, [&](Arena& a) {
      return IntegerRows{a.take<int8_t>(rows * fold.bytes(K)), a.take<float>(rows), fold};
    });
  }
  const size_t most = form.has_columns ? kSplitRows : kPieceRows;
  pieces_of_block = (blocks.height + most - 1) / most;
}

RowTile Stage::piece(size_t i) const {
  const size_t begin = blocks.begin(i / pieces_of_block), size = blocks.size(i / pieces_of_block);
  const size_t at = i % pieces_of_block;
  if (how.in_float) {
    const size_t tiles = tiles_of(size, k.tile_rows);
    if (at >= tiles) return {begin, 0};
    const RowTile tile = row_tile(size, tiles, at);
    return {begin + tile.begin, tile.rows};
  }
  const size_t most = form.has_columns ? kSplitRows : kPieceRows, first = std::min(at * most, size);
  return {begin + first, std::min(most, size - first)};
}

void Stage::prepare(size_t i) const {
  const RowTile p = piece(i);
  const float* from = x + p.begin * K;
  if (!p.rows) return;
  if (how.in_float) {
    if (wide) k.load_tile(from, kFloat32, K, p.rows, wide + p.begin * K);
  } else if (outputs[0].linear->packed.panels) {
    k.int8_quantize_rows(from, kFloat32, K, p.rows, K, how.symmetric, rows_at(quantized, p.begin, form));
  } else {
    const size_t ldx = integers.fold.bytes(K);
    load_integer_rows(k, from, kFloat32, p.rows, K, *outputs[0].linear->four.book,
                      {integers.x + p.begin * ldx, integers.scale + p.begin, integers.fold});
  }
}

void Stage::multiply() const {
  size_t columns = 0;
  for (const Output& o : outputs) columns += o.linear->N;
  const int count = rows * columns * K <= kSerial ? 1 : threads();
  if (how.in_float || !outputs[0].linear->packed.panels) multiply_strips(count);
  else multiply_int8(count);
}

void Stage::multiply_int8(int count) const {
  size_t all = 0;
  for (const Output& o : outputs) all += panels(o.linear->N);
  const size_t wanted = (4 * static_cast<size_t>(count) + blocks.count - 1) / blocks.count;
  const size_t width = count == 1 ? all : std::min(kStripPanels, (all + wanted - 1) / wanted);
  size_t pieces = 0;
  for (const Output& o : outputs) pieces += (panels(o.linear->N) + width - 1) / width;
  parallel_for(blocks.count * pieces, count, [&](size_t i) {
    size_t at = i % pieces, of_linear;
    const Output* o = outputs.data();
    for (; at >= (of_linear = (panels(o->linear->N) + width - 1) / width); ++o) at -= of_linear;
    const EncoderLinear& w = *o->linear;
    const size_t m = blocks.begin(i / pieces), n = panels(w.N);
    int8_columns(k, quantized, m, blocks.size(i / pieces), K, w.packed, first_panel(n, rows, at, of_linear),
                 first_panel(n, rows, at + 1, of_linear), Tail{w.scale, o->bias, kNone, kFloat32, o->y, w.N, w.N});
  });
}

void Stage::multiply_strips(int count) const {
  size_t all = 0;
  for (const Output& o : outputs) all += strips(o.linear->N);
  parallel_strips(blocks, all, count, [&](size_t block, size_t strip) { multiply_strip(block, strip); });
}

// Strip `at` of all linears, for the rows of one block.
void Stage::multiply_strip(size_t block, size_t at) const {
  const Output* o = outputs.data();
  for (; at >= strips(o->linear->N); ++o) at -= strips(o->linear->N);
  const EncoderLinear& w = *o->linear;
  const size_t m = blocks.begin(block), n = blocks.size(block), n0 = at * kStrip;
  float* total = static_cast<float*>(scratch(kTotals, kBlockRows * kStrip * sizeof(float)));
  const float *row_scale = nullptr, *scale = nullptr;
  const FloatRows in{(wide ? wide : x) + m * K, n, wide != nullptr};
  if (w.packed.panels) {
    weight_only_totals(k, w.packed, w.N, K, in, at, total);
    scale = w.scale;
  } else if (how.in_float) {
    four_bit_totals(k, w.four, in, at, total);
  } else {
    const IntegerRows q{integers.x + m * integers.fold.bytes(K), integers.scale + m, integers.fold};
    four_bit_totals(k, w.four, q, at, n, total);
    row_scale = q.scale;
  }
  k.finish_totals(total, row_scale, scale, o->bias, kNone, n, n0, std::min(kStrip, w.N - n0), w.N, o->y + m * w.N,
                  kFloat32);
}

}  // namespace pyqkern
