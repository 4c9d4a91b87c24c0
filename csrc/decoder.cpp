// One decoder layer over a cache of keys and values, in three steps, each shared by the threads:
//   1. groups of tokens: norm, the products of query, key and value; then head norms, rotary, and the cache's new rows
//   2. pieces of queries, each of one head of keys with all its heads of queries: scores, softmax, weighted values
//   3. groups of tokens: output product with the residual, norm, feed-forward with the residual
// A token alone goes through the same steps, in which only products and attention are shared. No result depends on the
// groups, on the threads, or on other tokens but those whose keys are seen.
#include <algorithm>
#include <cstring>

#include "arena.h"
#include "stage.h"

namespace pyqkern {
namespace {

constexpr size_t kGroupTokens = 256;          // tokens whose intermediates lie between products at a time
constexpr size_t kSerialTokens = 16;          // tokens up to which all but products and attention is left to one thread
constexpr size_t kSerialAttention = 1 << 17;  // multiply-adds: below this a second thread costs more than it brings
constexpr size_t kKeys = 64;                  // keys that are read together, a multiple of 64: the sums of the softmax
constexpr size_t kMostQueries = 48;           // rows of a piece of attention
constexpr size_t kScores = 48 << 10;          // of a piece, at most, if they are more than those of kLeastQueries
constexpr size_t kLeastQueries = 12;

size_t multiple_of_16(size_t n) { return (n + 15) / 16 * 16; }

struct Norm {
  const float *weight, *bias;  // bias nullptr: RMSNorm
};

// What all steps share.
struct Call {
  const Kernels& k;
  const DecoderLayer& layer;
  const Caches& caches;
  const Mask &mask, &position_bias;
  const char* x;
  char* y;
  int dtype;
  size_t batch, length, tokens;  // tokens: batch * length
  RowsOf rows;
  const float *input_bias[3], *output_bias, *wide_bias[2], *down_bias;
  Norm norm[2];
  const float* head_norm[2];
  const float *cos, *sin;  // fp32
  size_t rotary_dims, rotary_stride;
  float* queries;  // [tokens, heads * head size], which become the context
};

size_t width_of(const Call& c) { return c.layer.heads * c.layer.head_size; }

// ---- rows of tokens

// h [n, hidden] = x of tokens [t, t + n).
void widen(const Call& c, size_t t, size_t n, float* h) {
  const size_t H = c.layer.hidden;
  c.k.widen(c.x + t * H * dtype_size(c.dtype), c.dtype, n * H, h);
}

// y [n, hidden] = norm(h += residual); residual may be nullptr or y.
void normed(const Call& c, int which, float* h, const float* residual, size_t n, float* y) {
  const Norm& norm = c.norm[which];
  const size_t H = c.layer.hidden;
  if (norm.bias) c.k.add_layer_norm(h, residual, n, H, norm.weight, norm.bias, c.layer.eps, y, kFloat32);
  else c.k.add_rms_norm(h, residual, n, H, norm.weight, c.layer.norm_offset, c.layer.eps, y);
}

// work(first, n) for pieces of n tokens, shared by the threads where they are many.
template <class Work> void for_tokens(size_t tokens, const Work& work) {
  parallel_for((tokens + kSerialTokens - 1) / kSerialTokens, tokens <= kSerialTokens ? 1 : threads(),
               [&](size_t i) { work(i * kSerialTokens, std::min(kSerialTokens, tokens - i * kSerialTokens)); });
}

// The product of a stage whose rows fill(first, n) makes beforehand.
template <class Fill> void run(const Stage& stage, size_t tokens, const Fill& fill) {
  parallel_for(stage.pieces(), tokens <= kSerialTokens ? 1 : threads(), [&](size_t i) {
    const RowTile piece = stage.piece(i);
    if (!piece.rows) return;
    fill(piece.begin, piece.rows);
    stage.prepare(i);
  });
  stage.multiply();
}

// ---- step 1

// A head's place in the products of a token.
struct Heads {
  const float* first;
  size_t row_stride, head_stride;
};

// Query, key and value of a group's tokens in the products of the input linears.
struct Inputs { Heads query, key, value; };

Inputs inputs_of(const Call& c, const float* const* products) {
  const size_t d = c.layer.head_size, query = c.layer.heads * d, key = c.layer.kv_heads * d;
  if (c.layer.input_count == 3) return {{products[0], query, d}, {products[1], key, d}, {products[2], key, d}};
  const size_t width = query + 2 * key;
  const float* all = products[0];
  if (c.layer.interleaved) return {{all, width, 3 * d}, {all + d, width, 3 * d}, {all + 2 * d, width, 3 * d}};
  return {{all, width, d}, {all + query, width, d}, {all + query + key, width, d}};
}

// The first `dims` elements of a head, rotated in place: pairs (i, i + dims / 2).
void rotate(float* x, size_t dims, const float* cos, const float* sin) {
  const size_t half = dims / 2;
  for (size_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

// One head of token t, query (0) or key (1), in fp32 at `to`, which may be where it is.
void turned(const Call& c, int which, const float* from, size_t t, float* to) {
  const size_t d = c.layer.head_size;
  if (from != to) memcpy(to, from, d * sizeof(float));
  if (c.head_norm[which]) c.k.add_rms_norm(to, nullptr, 1, d, c.head_norm[which], c.layer.norm_offset, c.layer.eps, to);
  if (!c.cos) return;
  const size_t at = t / c.length * c.rotary_stride + t % c.length * c.rotary_dims;
  rotate(to, c.rotary_dims, c.cos + at, c.sin + at);
}

void* cache_row(const Call& c, const Cache& cache, size_t b, size_t head, size_t row) {
  const size_t at = b * cache.batch_stride + head * cache.head_stride + row * cache.row_stride;
  return static_cast<char*>(cache.data) + at * dtype_size(c.caches.dtype);
}

// Token t, the i-th of its group: its queries to c.queries, its keys and values to the caches.
void place(const Call& c, const Inputs& in, size_t i, size_t t) {
  const size_t d = c.layer.head_size, b = t / c.length, row = c.caches.past + t % c.length;
  float* key = static_cast<float*>(scratch(kStep, d * sizeof(float)));
  for (size_t h = 0; h < c.layer.heads; ++h)
    turned(c, 0, in.query.first + i * in.query.row_stride + h * in.query.head_stride, t,
           c.queries + t * width_of(c) + h * d);
  for (size_t h = 0; h < c.layer.kv_heads; ++h) {
    turned(c, 1, in.key.first + i * in.key.row_stride + h * in.key.head_stride, t, key);
    c.k.add_rows(key, nullptr, d, cache_row(c, c.caches.keys, b, h, row), c.caches.dtype);
    c.k.add_rows(in.value.first + i * in.value.row_stride + h * in.value.head_stride, nullptr, d,
                 cache_row(c, c.caches.values, b, h, row), c.caches.dtype);
  }
}

// Step 1 for tokens [t, t + n).
void project(const Call& c, size_t t, size_t n) {
  const DecoderLayer& layer = c.layer;
  const bool three = layer.input_count == 3;
  struct Group { float *h, *normed, *products[3]; };
  Group g = carve(kDecoderGroup, [&](Arena& a) {
    Group got{a.take<float>(n * layer.hidden), a.take<float>(n * layer.hidden), {}};
    for (size_t i = three ? 1 : 0; i < layer.input_count; ++i) got.products[i] = a.take<float>(n * layer.inputs[i].N);
    return got;
  });
  if (three) g.products[0] = c.queries + t * width_of(c);  // where they stay
  auto output = [&](size_t i) { return Stage::Output{&layer.inputs[i], c.input_bias[i], g.products[i]}; };
  const Stage stage = three ? Stage(c.k, c.rows, {output(0), output(1), output(2)}, g.normed, n)
                            : Stage(c.k, c.rows, {output(0)}, g.normed, n);
  run(stage, n, [&](size_t i, size_t some) {
    float* h = g.h + i * layer.hidden;
    widen(c, t + i, some, h);
    normed(c, 0, h, nullptr, some, g.normed + i * layer.hidden);
  });
  const Inputs in = inputs_of(c, g.products);
  for_tokens(n, [&](size_t first, size_t some) {
    for (size_t i = first; i < first + some; ++i) place(c, in, i, t + i);
  });
}

// ---- step 2

// The keys [begin, end) outside of which a query sees none.
struct Range { size_t begin, end; };

bool sees(const Mask& m, size_t i) {
  if (m.is_bool) return static_cast<const uint8_t*>(m.data)[i];
  return !(static_cast<const float*>(m.data)[i] <= kMasked);
}

size_t line_of(const Mask& m, size_t b, size_t head, size_t query) {
  return b * m.batch_stride + head * m.head_stride + query * m.query_stride;
}

Range range_of(const Call& c, size_t b, size_t head, size_t query) {
  const size_t own = c.caches.past + query;
  if (!c.mask.data) {
    const size_t window = c.layer.window;
    return {window && own >= window ? own + 1 - window : 0, own + 1};
  }
  const size_t at = line_of(c.mask, b, head, query);
  size_t begin = 0, end = c.caches.past + c.length;
  while (end && !sees(c.mask, at + end - 1)) --end;
  while (begin < end && !sees(c.mask, at + begin)) ++begin;
  return {begin, end};
}

// What is added to the scores of a query, from key `lo` on.
AddedLine added_to(const Call& c, size_t b, size_t head, size_t query, size_t lo) {
  auto line = [&](const Mask& m) { return line_of(m, b, head, query) + lo; };
  AddedLine a{};
  if (c.position_bias.data) a.bias = static_cast<const float*>(c.position_bias.data) + line(c.position_bias);
  if (c.mask.data && c.mask.is_bool) a.seen = static_cast<const uint8_t*>(c.mask.data) + line(c.mask);
  else if (c.mask.data) a.mask = static_cast<const float*>(c.mask.data) + line(c.mask);
  return a;
}

// Rows of a cache in fp32, those of a head filled up with zeros to a multiple of 16: as they lie, or copied.
struct Rows {
  const float* first;
  size_t stride;
};

Rows rows_of(const Call& c, const Cache& cache, size_t b, size_t head, size_t row, size_t n, float* copy) {
  const size_t d = c.layer.head_size, wide = multiple_of_16(d);
  for (size_t i = n; i < 2 * n && row + i < c.caches.past + c.length; ++i) {  // the next ones, on their way meanwhile
    const char* next = static_cast<const char*>(cache_row(c, cache, b, head, row + i));
    for (size_t at = 0; at < d * dtype_size(c.caches.dtype); at += kLine) __builtin_prefetch(next + at);
  }
  if (c.caches.dtype == kFloat32 && d == wide)
    return {static_cast<const float*>(cache_row(c, cache, b, head, row)), cache.row_stride};
  for (size_t i = 0; i < n; ++i, copy += wide) {
    c.k.widen(cache_row(c, cache, b, head, row + i), c.caches.dtype, d, copy);
    std::fill(copy + d, copy + wide, 0.0f);
  }
  return {copy - n * wide, wide};
}

// Rows of a piece of attention: row r is query r / group of head first_head + r % group.
struct Piece {
  size_t b, kv_head, group, begin, rows;
  size_t query(size_t r) const { return (begin + r) / group; }
  size_t head(size_t r) const { return kv_head * group + (begin + r) % group; }
};

// visit(first key, how many, first row, how many rows) for blocks of keys in [lo, hi) and the rows that may see them.
template <class Visit>
void for_blocks(const Range* ranges, size_t rows, size_t lo, size_t hi, const Visit& visit) {
  for (size_t j = lo; j < hi; j += kKeys) {
    if (j != lo) poll();
    auto blind = [&](size_t r) { return ranges[r].end <= j || ranges[r].begin >= j + kKeys; };
    size_t first = 0, last = rows;
    while (first < last && blind(first)) ++first;
    while (first < last && blind(last - 1)) --last;
    if (first < last) visit(j, std::min(kKeys, hi - j), first, last - first);
  }
}

void attend(const Call& c, const Piece& p) {
  const size_t d = c.layer.head_size, wide = multiple_of_16(d);
  Range ranges[kMostQueries];
  size_t lo = SIZE_MAX, hi = 0;
  for (size_t r = 0; r < p.rows; ++r) {
    ranges[r] = range_of(c, p.b, p.head(r), p.query(r));
    if (ranges[r].begin == ranges[r].end) continue;
    lo = std::min(lo, ranges[r].begin / kKeys * kKeys);
    hi = std::max(hi, ranges[r].end);
  }
  lo = std::min(lo, hi);
  const size_t n = hi - lo, ld = softmax_width(n);
  struct Buffers { float *queries, *context, *copy, *scores; };
  const Buffers f = carve(kDecoderPiece, [&](Arena& a) {
    return Buffers{a.take<float>(p.rows * wide), a.take<float>(p.rows * wide), a.take<float>(kKeys * wide),
                   a.take<float>(p.rows * ld)};
  });
  std::fill(f.queries, f.queries + p.rows * wide, 0.0f);
  std::fill(f.context, f.context + p.rows * wide, 0.0f);
  auto own = [&](size_t r) { return c.queries + (p.b * c.length + p.query(r)) * width_of(c) + p.head(r) * d; };
  for (size_t r = 0; r < p.rows; ++r) memcpy(f.queries + r * wide, own(r), d * sizeof(float));
  for_blocks(ranges, p.rows, lo, hi, [&](size_t j, size_t count, size_t first, size_t some) {
    const Rows keys = rows_of(c, c.caches.keys, p.b, p.kv_head, j, count, f.copy);
    c.k.attention_scores(f.queries + first * wide, some, keys.first, keys.stride, count, wide, c.layer.scaling,
                         f.scores + first * ld + (j - lo), ld);
  });
  float inverse[kMostQueries];
  for (size_t r = 0; r < p.rows; ++r) {
    const bool blind = ranges[r].begin == ranges[r].end;
    const AddedLine added = added_to(c, p.b, p.head(r), p.query(r), lo);
    inverse[r] = c.k.attention_softmax(f.scores + r * ld, n, blind ? 0 : ranges[r].begin - lo,
                                       blind ? 0 : ranges[r].end - lo, added);
  }
  for_blocks(ranges, p.rows, lo, hi, [&](size_t j, size_t count, size_t first, size_t some) {
    const Rows values = rows_of(c, c.caches.values, p.b, p.kv_head, j, count, f.copy);
    c.k.attention_values(f.scores + first * ld + (j - lo), ld, some, values.first, values.stride, count, wide,
                         f.context + first * wide);
  });
  for (size_t r = 0; r < p.rows; ++r) {
    float* to = own(r);
    for (size_t i = 0; i < d; ++i) to[i] = f.context[r * wide + i] * inverse[r];
  }
}

void attend_all(const Call& c) {
  const size_t kv_heads = c.layer.kv_heads, group = c.layer.heads / kv_heads, of_head = c.length * group;
  const size_t keys = c.caches.past + c.length, heads = c.batch * kv_heads;
  const int count = c.tokens * c.layer.heads * keys * c.layer.head_size * 2 <= kSerialAttention ? 1 : threads();
  size_t most = std::clamp(kScores / softmax_width(keys), kLeastQueries, kMostQueries);
  most = std::min(most, (heads * of_head + count - 1) / count);
  const size_t pieces = (of_head + most - 1) / most;
  parallel_for(heads * pieces, count, [&](size_t i) {
    const size_t at = i % pieces, begin = of_head * at / pieces, end = of_head * (at + 1) / pieces;
    attend(c, {i / pieces / kv_heads, i / pieces % kv_heads, group, begin, end - begin});
  });
}

// ---- step 3

// Step 3 for tokens [t, t + n).
void feed_forward(const Call& c, size_t t, size_t n) {
  const DecoderLayer& layer = c.layer;
  const size_t H = layer.hidden, F = layer.intermediate;
  struct Group { float *h, *normed, *wide[2], *activated; };
  const Group g = carve(kDecoderGroup, [&](Arena& a) {
    return Group{a.take<float>(n * H),
                 a.take<float>(n * H),
                 {a.take<float>(n * layer.wide[0].N), a.take<float>(layer.wide_count == 2 ? n * F : 0)},
                 a.take<float>(n * F)};
  });
  const float* context = c.queries + t * width_of(c);
  run(Stage(c.k, c.rows, {{&layer.output, c.output_bias, g.h}}, context, n), n, [](size_t, size_t) {});
  auto wide = [&](size_t i) { return Stage::Output{&layer.wide[i], c.wide_bias[i], g.wide[i]}; };
  const Stage first = layer.wide_count == 2 ? Stage(c.k, c.rows, {wide(0), wide(1)}, g.normed, n)
                                            : Stage(c.k, c.rows, {wide(0)}, g.normed, n);
  run(first, n, [&](size_t i, size_t some) {
    float* x = g.normed + i * H;
    widen(c, t + i, some, x);
    normed(c, 1, g.h + i * H, x, some, x);
  });
  const size_t stride = layer.wide[0].N;
  run(Stage(c.k, c.rows, {{&layer.down, c.down_bias, g.normed}}, g.activated, n), n, [&](size_t i, size_t some) {
    for (size_t r = i; r < i + some; ++r) {
      float* to = g.activated + r * F;
      c.k.elementwise(layer.activation, g.wide[0] + r * stride, F, to);
      if (!layer.gated) continue;
      const float* up = layer.wide_count == 2 ? g.wide[1] + r * F : g.wide[0] + r * stride + F;
      for (size_t j = 0; j < F; ++j) to[j] *= up[j];
    }
  });
  for_tokens(n, [&](size_t i, size_t some) {
    c.k.add_rows(g.h + i * H, g.normed + i * H, some * H, c.y + (t + i) * H * dtype_size(c.dtype), c.dtype);
  });
}

// ---- the call

// All small vectors in fp32: as they are, or widened into one buffer, which the calling thread keeps until the next call.
void widen_vectors(Call& c, const Rotary& rotary) {
  const DecoderLayer& layer = c.layer;
  float* room = nullptr;
  size_t used = 0;
  auto widened = [&](const void* p, int type, size_t n) -> const float* {
    if (!p || type == kFloat32) return static_cast<const float*>(p);
    if (room) c.k.widen(p, type, n, room + used);
    used += n;
    return room ? room + used - n : nullptr;
  };
  auto bias = [&](const EncoderLinear& w) { return widened(w.bias, w.bias_dtype, w.N); };
  auto all = [&] {
    for (size_t i = 0; i < layer.input_count; ++i) c.input_bias[i] = bias(layer.inputs[i]);
    for (size_t i = 0; i < layer.wide_count; ++i) c.wide_bias[i] = bias(layer.wide[i]);
    c.output_bias = bias(layer.output);
    c.down_bias = bias(layer.down);
    for (int i = 0; i < 2; ++i) {
      c.norm[i] = {widened(layer.norm[2 * i], layer.norm_dtype, layer.hidden),
                   widened(layer.norm[2 * i + 1], layer.norm_dtype, layer.hidden)};
      c.head_norm[i] = widened(layer.head_norm[i], layer.head_norm_dtype, layer.head_size);
    }
    const size_t angles = (rotary.batch_stride ? c.batch : 1) * c.length * rotary.dims;
    c.cos = widened(rotary.cos, rotary.dtype, angles);
    c.sin = widened(rotary.sin, rotary.dtype, angles);
  };
  all();
  if (!used) return;
  room = static_cast<float*>(scratch(kBias, used * sizeof(float)));
  used = 0;
  all();
}

}  // namespace

void decoder_layer(const void* x, int dtype, size_t batch, size_t length, const Caches& caches, const Mask& mask,
                   const Mask& bias, const Rotary& rotary, const DecoderLayer& layer, void* y) {
  Call c{kernels(),
         layer,
         caches,
         mask,
         bias,
         static_cast<const char*>(x),
         static_cast<char*>(y),
         dtype,
         batch,
         length,
         batch * length,
         {layer.bits, layer.symmetric, layer.in_float},
         {},
         nullptr,
         {},
         nullptr,
         {},
         {},
         nullptr,
         nullptr,
         rotary.dims,
         rotary.batch_stride,
         nullptr};
  widen_vectors(c, rotary);
  c.queries = static_cast<float*>(scratch(kDecoder, c.tokens * width_of(c) * sizeof(float)));
  for (size_t t = 0; t < c.tokens; t += kGroupTokens) project(c, t, std::min(kGroupTokens, c.tokens - t));
  attend_all(c);
  for (size_t t = 0; t < c.tokens; t += kGroupTokens) feed_forward(c, t, std::min(kGroupTokens, c.tokens - t));
}

}  // namespace pyqkern
