// One encoder layer, post-LayerNorm: attention and feed-forward of a batch of sentences whose padding is left out.
//
// A group of sentences goes through three steps, each shared by the threads:
//   1. blocks of tokens: the input quantized once, three products; queries and keys quantized per token and head
//   2. sentences by heads: scores, softmax and the weighted values, in integers; the result takes the values' place
//   3. blocks of tokens: output product, LayerNorm, both products of the feed-forward, LayerNorm
// A block's intermediates stay in L2. No result depends on the blocks, on the threads, or on other sentences.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "api.h"
#include "arena.h"
#include "parallel.h"

namespace pyqkern {
namespace {

constexpr size_t kGroupTokens = 128;  // tokens per thread and group: what lies between the steps stays near
constexpr size_t kBlockRows = 128;  // tokens of a block: each reads every weight anew, as integers or as main + excess
constexpr size_t kScoreBytes = 24 << 10;  // scores of some rows of one head
constexpr size_t kTileRows = 8;

// ---- who attends to whom

struct Sentence { size_t batch, first, count; };  // tokens [first, first + count) of the packed rows

float mask_at(const Mask& m, size_t i) {
  if (m.is_bool) return static_cast<const uint8_t*>(m.data)[i] ? 0.0f : std::numeric_limits<float>::lowest();
  return static_cast<const float*>(m.data)[i];
}

// Whether every query of every head sees the same keys, each wholly or not at all.
bool is_padding(const Mask& m, size_t batch, size_t length) {
  const size_t size = m.is_bool ? 1 : sizeof(float);
  if (m.heads > 1 && m.head_stride) return false;
  for (size_t b = 0; b < (m.batch_stride ? batch : 1); ++b) {
    const char* first = static_cast<const char*>(m.data) + b * m.batch_stride * size;
    for (size_t q = 1; m.query_stride && q < length; ++q)
      if (memcmp(first, first + q * m.query_stride * size, length * size)) return false;
    for (size_t j = 0; j < length; ++j) {
      const float value = mask_at(m, b * m.batch_stride + j);
      if (value != 0 && !(value <= kMasked)) return false;
    }
  }
  return true;
}

void check_no_nan(const Mask& m, size_t batch, size_t length) {
  for (size_t b = 0; b < (m.batch_stride ? batch : 1); ++b)
    for (size_t h = 0; h < (m.head_stride ? m.heads : 1); ++h)
      for (size_t q = 0; q < (m.query_stride ? length : 1); ++q)
        for (size_t j = 0; j < length; ++j)
          if (std::isnan(mask_at(m, b * m.batch_stride + h * m.head_stride + q * m.query_stride + j)))
            throw std::invalid_argument("attention_mask must not hold NaN; use True and False, or 0 and -inf");
}

// ---- the layer

// One linear with its bias in fp32, or nullptr.
struct Linear {
  const EncoderLinear& weight;
  const float* bias;
};

struct Norm {
  const float *weight, *bias;
  float eps;
};

// What all pieces of one call share. The packed tokens are those that are no padding, sentence behind sentence.
struct Call {
  const Kernels& kernels;
  const EncoderLayer& layer;
  const Mask &mask, &position_bias;
  const char* x;
  char* y;
  int dtype;
  size_t length, hidden, attention, feed_forward;  // attention: heads * head size
  size_t row_bytes, head_row_bytes;                // of a token in x and y, and of a head's codes
  bool adds_mask;                                  // the mask is more than padding
  bool is_whole;                                   // no token is padding
  std::vector<size_t> row_of;                      // where the packed token t lies in x and y
  std::vector<Sentence> sentences;
  Linear query, key, value, output, up, down;
  Norm attention_norm, output_norm;
};

// What lies between the steps of one group of sentences.
struct Group {
  size_t first, tokens;  // of the packed tokens
  int threads;
  QRows queries;              // [heads][tokens]
  int8_t* keys;               // [heads][tokens][head size]
  float *key_scale, *values;  // [heads][tokens]; values, and then the context: [tokens][attention]
};

Call make_call(const Kernels& k, const void* x, int dtype, size_t length, const Mask& mask, const Mask& position_bias,
               const EncoderLayer& layer, void* y) {
  const size_t hidden = layer.query.K, attention = layer.heads * layer.head_size, feed_forward = layer.up.N;
  float* room = static_cast<float*>(scratch(kBias, (3 * attention + 6 * hidden + feed_forward) * sizeof(float)));
  auto widened = [&](const void* p, int type, size_t n) -> const float* {
    if (!p || type == kFloat32) return static_cast<const float*>(p);
    k.widen(p, type, n, room);
    return (room += n) - n;
  };
  auto linear = [&](const EncoderLinear& w) { return Linear{w, widened(w.bias, w.bias_dtype, w.N)}; };
  auto norm = [&](int i) {
    const float* weight = widened(layer.norm[2 * i], layer.norm_dtype, hidden);
    return Norm{weight, widened(layer.norm[2 * i + 1], layer.norm_dtype, hidden), layer.eps[i]};
  };
  return {k,
          layer,
          mask,
          position_bias,
          static_cast<const char*>(x),
          static_cast<char*>(y),
          dtype,
          length,
          hidden,
          attention,
          feed_forward,
          hidden * dtype_size(dtype),
          4 * quads(layer.head_size) * k.row_element_bytes,
          false,
          false,
          {},
          {},
          linear(layer.query),
          linear(layer.key),
          linear(layer.value),
          linear(layer.output),
          linear(layer.up),
          linear(layer.down),
          norm(0),
          norm(1)};
}

// Finds the tokens that are no padding; the others are zeros in y.
void find_tokens(Call& c, size_t batch) {
  const bool padding = c.mask.data && is_padding(c.mask, batch, c.length);
  c.adds_mask = c.mask.data && !padding;
  if (c.adds_mask) check_no_nan(c.mask, batch, c.length);
  c.row_of.reserve(batch * c.length);
  for (size_t b = 0; b < batch; ++b) {
    const size_t first = c.row_of.size();
    for (size_t j = 0; j < c.length; ++j) {
      const size_t row = b * c.length + j;
      if (!padding || mask_at(c.mask, b * c.mask.batch_stride + j) == 0) c.row_of.push_back(row);
      else memset(c.y + row * c.row_bytes, 0, c.row_bytes);
    }
    if (c.row_of.size() > first) c.sentences.push_back({b, first, c.row_of.size() - first});
  }
  c.is_whole = c.row_of.size() == batch * c.length;
}

void gemm(const Kernels& k, const QRows& rows, size_t n, size_t K, const Packed& w, const Tail& t) {
  (n <= k.gemv_rows ? k.int8_gemv : k.int8_gemm)(rows, 0, n, K, w, 0, panels(t.N), t);
}

// out [n, N] = activation(the linear of n quantized rows).
void product(const Call& c, const Linear& l, const QRows& rows, size_t n, int activation, float* out) {
  const EncoderLinear& w = l.weight;
  if (!w.packed.panels) return four_bit_rows(c.kernels, rows, n, w.four, l.bias, activation, out);
  gemm(c.kernels, rows, n, w.K, w.packed, Tail{w.scale, l.bias, activation, kFloat32, out, w.N, w.N});
}

void quantize(const Call& c, const float* from, size_t n, size_t K, const QRows& out) {
  c.kernels.int8_quantize_rows(from, kFloat32, K, n, K, c.layer.symmetric, out);
}

// Room for n quantized rows of K, in the form that all of these linears take.
QRows rows(const Call& c, Arena& arena, size_t n, size_t K, std::initializer_list<const Linear*> linears) {
  const int bits = c.layer.bits;
  for (const Linear* l : linears)
    if (!splits(c.kernels, n, l->weight.packed, bits)) return arena.rows(n, row_bytes(c.kernels, K, bits), bits);
  return arena.rows_with_columns(n, split_row_bytes(K));
}

// n rows times a factor for each column, in `out`; without a factor the rows themselves.
const float* scaled(const float* rows, size_t n, size_t K, const float* factor, float* out) {
  if (!factor) return rows;
  for (size_t i = 0; i < n; ++i)
    for (size_t j = 0; j < K; ++j) out[i * K + j] = rows[i * K + j] * factor[j];
  return out;
}

// Packed tokens [t, t + n) in fp32: as they lie in x, or gathered into `copy`.
const float* input(const Call& c, size_t t, size_t n, float* copy) {
  if (c.is_whole && c.dtype == kFloat32) return reinterpret_cast<const float*>(c.x) + c.row_of[t] * c.hidden;
  for (size_t i = 0; i < n; ++i)
    c.kernels.widen(c.x + c.row_of[t + i] * c.row_bytes, c.dtype, c.hidden, copy + i * c.hidden);
  return copy;
}

// y of the packed tokens [t, t + n) = the LayerNorm of a + residual.
void output(const Call& c, float* a, const float* residual, size_t t, size_t n) {
  const Norm& norm = c.output_norm;
  const size_t together = c.is_whole ? n : 1;  // rows of y that lie behind each other
  for (size_t i = 0; i < n; i += together)
    c.kernels.add_layer_norm(a + i * c.hidden, residual + i * c.hidden, together, c.hidden, norm.weight, norm.bias,
                             norm.eps, c.y + c.row_of[t + i] * c.row_bytes, c.dtype);
}

// work(t, n) for blocks of the group's tokens, shared by the threads.
template <class Work> void for_blocks(const Group& g, const Work& work) {
  const size_t threads = g.threads, most = kBlockRows * threads;
  const size_t wanted = (g.tokens + most - 1) / most * threads;
  const size_t height = (g.tokens + wanted * kTileRows - 1) / (wanted * kTileRows) * kTileRows;
  parallel_for((g.tokens + height - 1) / height, g.threads,
               [&](size_t i) { work(i * height, std::min(height, g.tokens - i * height)); });
}

// Where the queries of a head, from token t of the group on, lie.
QRows queries_at(const Call& c, const Group& g, size_t head, size_t t) {
  const size_t row = head * g.tokens + t;
  return {static_cast<char*>(g.queries.q) + row * c.head_row_bytes, g.queries.scale + row, g.queries.correction + row};
}

// Step 1 for tokens [t, t + n) of the group.
void project(const Call& c, const Group& g, size_t t, size_t n) {
  const Kernels& k = c.kernels;
  const size_t heads = c.layer.heads, head_size = c.layer.head_size;
  struct Block {
    float *copy, *out;
    QRows x;
  };
  const Block b = carve(kEncoderBlock, [&](Arena& a) {
    return Block{a.take<float>(n * c.hidden), a.take<float>(n * c.attention),
                 rows(c, a, n, c.hidden, {&c.query, &c.key, &c.value})};
  });
  const float* x = input(c, g.first + t, n, b.copy);
  quantize(c, scaled(x, n, c.hidden, c.layer.input_factor, b.copy), n, c.hidden, b.x);
  product(c, c.query, b.x, n, kNone, b.out);
  k.int8_quantize_heads(b.out, n, heads, head_size, g.tokens, queries_at(c, g, 0, t), nullptr);
  product(c, c.key, b.x, n, kNone, b.out);
  k.int8_quantize_heads(b.out, n, heads, head_size, g.tokens, {nullptr, g.key_scale + t, nullptr},
                        g.keys + t * head_size);
  product(c, c.value, b.x, n, kNone, g.values + t * c.attention);
}

// Adds a mask that is more than padding, or a bias, to the scores of queries [m, m + rows). Masked scores stay finite,
// so that a row without any key takes the mean of all. NaN goes into `bad`, since a maximum does not keep it.
void add(const Call& c, const Mask& added, const Sentence& s, size_t head, size_t m, size_t rows, size_t ld,
         float* scores, float* bad) {
  const size_t n = s.count, *row = &c.row_of[s.first], origin = s.batch * c.length;
  const bool contiguous = row[n - 1] - row[0] == n - 1;
  float* line = static_cast<float*>(scratch(kStep, n * sizeof(float)));
  for (size_t r = 0; r < rows; ++r, scores += ld) {
    const size_t at =
        s.batch * added.batch_stride + head * added.head_stride + (row[m + r] - origin) * added.query_stride;
    const float* from = line;
    if (contiguous && !added.is_bool) from = static_cast<const float*>(added.data) + at + (row[0] - origin);
    else
      for (size_t j = 0; j < n; ++j) line[j] = mask_at(added, at + (row[j] - origin));
    uint32_t is_nan = 0;
    for (size_t j = 0; j < n; ++j) {
      uint32_t bits;
      memcpy(&bits, from + j, sizeof bits);
      is_nan |= (bits & 0x7fffffff) > 0x7f800000;
      const float sum = scores[j] + from[j] * kLog2E;
      scores[j] = std::max(sum, -std::numeric_limits<float>::max());
    }
    if (is_nan) bad[r] = std::numeric_limits<float>::quiet_NaN();
  }
}

// Step 2 for one head of one sentence. The softmax works in units of log 2.
void attend(const Call& c, const Group& g, const Sentence& s, size_t head) {
  const Kernels& k = c.kernels;
  const size_t n = s.count, t = s.first - g.first, d = c.layer.head_size, ld = softmax_width(n);
  const size_t most = std::max<size_t>(1, kScoreBytes / (ld * sizeof(float)) / kTileRows) * kTileRows;
  struct Piece {
    int8_t *keys, *values;
    float *key_scale, *value_scale, *scores, *bad;
    QRows probabilities;
  };
  const Piece p = carve(kEncoderBlock, [&](Arena& a) {
    return Piece{a.take<int8_t>(panels(n) * panel_bytes(d)),
                 a.take<int8_t>(panels(d) * panel_bytes(n)),
                 a.take<float>(n),
                 a.take<float>(d),
                 a.take<float>(most * ld),
                 a.take<float>(most),
                 a.rows(most, 4 * quads(n) * k.row_element_bytes)};
  });
  const int8_t* keys = g.keys + (head * g.tokens + t) * d;
  for (size_t i = 0; i < panels(n); ++i) k.int8_pack(keys, n, d, i, p.keys + i * panel_bytes(d));
  const float factor = c.layer.scaling * kLog2E, *key_scale = g.key_scale + head * g.tokens + t;
  float poison = 0;  // NaN if any key is: then no row of this head has a softmax
  for (size_t j = 0; j < n; ++j) {
    p.key_scale[j] = key_scale[j] * factor;
    poison += key_scale[j] * 0;
  }
  float* context = g.values + t * c.attention + head * d;
  k.int8_pack_values(context, c.attention, n, d, p.value_scale, p.values);
  for (size_t m = 0, rows; m < n; m += rows) {
    if (m) poll();
    rows = std::min(most, n - m);
    const QRows q = queries_at(c, g, head, t + m);
    gemm(k, q, rows, d, Packed{p.keys, nullptr}, Tail{p.key_scale, nullptr, kNone, kFloat32, p.scores, n, ld});
    for (size_t r = 0; r < rows; ++r) p.bad[r] = q.scale[r] * 0 + poison;
    if (c.adds_mask) add(c, c.mask, s, head, m, rows, ld, p.scores, p.bad);
    if (c.position_bias.data) add(c, c.position_bias, s, head, m, rows, ld, p.scores, p.bad);
    k.softmax_codes(p.scores, ld, rows, n, p.probabilities);
    for (size_t r = 0; r < rows; ++r) p.probabilities.scale[r] += p.bad[r];
    gemm(k, p.probabilities, rows, n, Packed{p.values, nullptr},
         Tail{p.value_scale, nullptr, kNone, kFloat32, context + m * c.attention, d, c.attention});
  }
}

// Step 3 for tokens [t, t + n) of the group.
void feed_forward(const Call& c, const Group& g, size_t t, size_t n) {
  const Norm& norm = c.attention_norm;
  const size_t H = c.hidden, F = c.feed_forward;
  struct Block {
    float *copy, *sum, *hidden, *wide;
    QRows context, rows, wide_rows;
  };
  const Block b = carve(kEncoderBlock, [&](Arena& a) {
    return Block{a.take<float>(n * H),
                 a.take<float>(n * H),
                 a.take<float>(n * H),
                 a.take<float>(n * F),
                 rows(c, a, n, c.attention, {&c.output}),
                 rows(c, a, n, H, {&c.up}),
                 rows(c, a, n, F, {&c.down})};
  });
  quantize(c, g.values + t * c.attention, n, c.attention, b.context);
  product(c, c.output, b.context, n, kNone, b.sum);
  c.kernels.add_layer_norm(b.sum, input(c, g.first + t, n, b.copy), n, H, norm.weight, norm.bias, norm.eps, b.hidden,
                           kFloat32);
  quantize(c, scaled(b.hidden, n, H, c.layer.up_factor, b.sum), n, H, b.rows);
  product(c, c.up, b.rows, n, c.layer.activation, b.wide);
  quantize(c, b.wide, n, F, b.wide_rows);
  product(c, c.down, b.wide_rows, n, kNone, b.sum);
  output(c, b.sum, b.hidden, g.first + t, n);
}

// The three steps for sentences [begin, end), which have `tokens` tokens.
void run_group(const Call& c, size_t begin, size_t end, size_t tokens, int threads) {
  const size_t heads = c.layer.heads;
  const Group g = carve(kEncoderGroup, [&](Arena& a) {
    return Group{c.sentences[begin].first,
                 tokens,
                 threads,
                 a.rows(heads * tokens, c.head_row_bytes),
                 a.take<int8_t>(heads * tokens * c.layer.head_size),
                 a.take<float>(heads * tokens),
                 a.take<float>(tokens * c.attention)};
  });
  for_blocks(g, [&](size_t t, size_t n) { project(c, g, t, n); });
  parallel_for((end - begin) * heads, threads,
               [&](size_t i) { attend(c, g, c.sentences[begin + i / heads], i % heads); });
  for_blocks(g, [&](size_t t, size_t n) { feed_forward(c, g, t, n); });
}

}  // namespace

void encoder_layer(const void* x, int dtype, size_t batch, size_t length, const Mask& mask, const Mask& bias,
                   const EncoderLayer& layer, void* y) {
  Call c = make_call(kernels(), x, dtype, length, mask, bias, layer, y);
  find_tokens(c, batch);
  const size_t per_token = 4 * c.hidden * c.attention + 2 * c.hidden * c.feed_forward;
  const int all = threads();
  for (size_t s = 0, end; s < c.sentences.size(); s = end) {
    size_t tokens = 0;
    for (end = s; end < c.sentences.size() && (end == s || tokens + c.sentences[end].count <= kGroupTokens * all);
         ++end)
      tokens += c.sentences[end].count;
    run_group(c, s, end, tokens, tokens * per_token <= kSerialInt8Ops ? 1 : all);
  }
}

}  // namespace pyqkern
