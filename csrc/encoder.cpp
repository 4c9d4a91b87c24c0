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
#include "parallel.h"

namespace pyqkern {
namespace {

constexpr size_t kGroupTokens = 128;        // tokens per thread and group: what lies between the steps stays near
constexpr size_t kBlockRows = 64;           // tokens of a block, whose feed-forward activations are 12 KB each
constexpr size_t kBlockRows4Bit = 128;      // more of them: each block turns the codes of all weights into integers
constexpr size_t kScoreBytes = 24 << 10;    // scores of some rows of one head
constexpr size_t kTileRows = 8;

// Hands out pieces of one buffer; without a buffer it only adds up what they take.
struct Arena {
  char* base;
  size_t used;
  template <class T> T* take(size_t n) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (n * sizeof(T) + 63) / 64 * 64;
    return p;
  }
  QRows rows(size_t n, size_t row_bytes) {
    return {take<char>(n * row_bytes + 64 * 2), take<float>(n), take<int32_t>(n)};  // softmax writes up to 64 codes more
  }
};
template <class Layout> auto carve(Slot slot, const Layout& layout) {
  Arena measure{nullptr, 0};
  layout(measure);
  Arena arena{static_cast<char*>(scratch(slot, measure.used)), 0};
  return layout(arena);
}

// ---- who attends to whom

struct Sentence { size_t batch, first, count; };  // tokens [first, first + count) of the packed rows

constexpr float kMasked = -1e4f;  // a score lowered by this is out of the softmax

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

class Encoder {
 public:
  Encoder(const void* x, int dtype, size_t batch, size_t length, const Mask& mask, const Mask& bias, const EncoderLayer& layer, void* y)
      : k(kernels()), x(static_cast<const char*>(x)), y(static_cast<char*>(y)), dtype(dtype), length(length), mask(mask),
        position_bias(bias), l(layer), H(layer.query.K), A(layer.heads * layer.head_size), F(layer.up.N), d(layer.head_size), head_row(4 * quads(d) * k.row_element_bytes) {
    bool padding = false;
    if (mask.data) {
      padding = is_padding(mask, batch, length);
      if (!padding) check_no_nan(mask, batch, length);
      general = !padding;
    }
    row_of.reserve(batch * length);
    for (size_t b = 0; b < batch; ++b) {
      const size_t first = row_of.size();
      for (size_t j = 0; j < length; ++j) {
        if (!padding || mask_at(mask, b * mask.batch_stride + j) == 0) row_of.push_back(b * length + j);
        else memset(this->y + (b * length + j) * row_bytes(), 0, row_bytes());
      }
      if (row_of.size() > first) sentences.push_back({b, first, row_of.size() - first});
    }
    whole = row_of.size() == batch * length;
    widen_vectors();
  }

  void run() {
    const size_t per_token = 4 * H * A + 2 * H * F;
    for (size_t s = 0, end; s < sentences.size(); s = end) {
      size_t tokens = 0;
      const int all = threads();
      for (end = s; end < sentences.size() && (end == s || tokens + sentences[end].count <= kGroupTokens * all); ++end)
        tokens += sentences[end].count;
      count = tokens * per_token <= kSerialInt8Ops ? 1 : all;
      group(s, end, tokens);
    }
  }

 private:
  const Kernels& k;
  const char* x;
  char* y;
  const int dtype;
  const size_t length;
  const Mask &mask, &position_bias;
  const EncoderLayer& l;
  const size_t H, A, F, d, head_row;  // hidden size, heads * head size, feed-forward size, head size, bytes of its codes
  bool general = false, whole = false;
  int count = 1;
  std::vector<size_t> row_of;  // where the packed token t lies in x and y
  std::vector<Sentence> sentences;
  const float *bias[6], *norm[4];

  // Between the steps; [heads][tokens] each, and the values and then the context [tokens][A].
  struct Group {
    size_t first, tokens;
    QRows q;
    int8_t* keys;
    float *key_scale, *values;
  } g;

  size_t row_bytes() const { return H * dtype_size(dtype); }

  // The biases and the LayerNorms' vectors in fp32.
  void widen_vectors() {
    const EncoderLinear* linear[6] = {&l.query, &l.key, &l.value, &l.output, &l.up, &l.down};
    float* at = static_cast<float*>(scratch(kBias, (3 * A + 6 * H + F) * sizeof(float)));
    auto widened = [&](const void* p, int type, size_t n) -> const float* {
      if (!p || type == kFloat32) return static_cast<const float*>(p);
      k.widen(p, type, n, at);
      return (at += n) - n;
    };
    for (int i = 0; i < 6; ++i) bias[i] = widened(linear[i]->bias, linear[i]->bias_dtype, linear[i]->N);
    for (int i = 0; i < 4; ++i) norm[i] = widened(l.norm[i], l.norm_dtype, H);
  }

  void product(const EncoderLinear& w, const float* b, const QRows& rows, size_t n, int activation, float* out) const {
    if (!w.packed) return nf4_rows(rows, n, w.four, b, activation, out);
    gemm(rows, n, w.K, w.packed, Tail{w.scale, b, activation, kFloat32, out, w.N, w.N});
  }
  void gemm(const QRows& rows, size_t n, size_t K, const int8_t* packed, const Tail& t) const {
    (n <= k.gemv_rows ? k.int8_gemv : k.int8_gemm)(rows, 0, n, K, packed, 0, panels(t.N), t);
  }
  void quantize(const float* from, size_t n, size_t K, const QRows& out) const {
    k.int8_quantize_rows(from, kFloat32, K, n, K, l.symmetric, out);
  }

  // Tokens [t, t + n) in fp32: as they lie in x, or gathered into `copy`.
  const float* input(size_t t, size_t n, float* copy) const {
    if (whole && dtype == kFloat32) return reinterpret_cast<const float*>(x) + row_of[t] * H;
    for (size_t i = 0; i < n; ++i) k.widen(x + row_of[t + i] * row_bytes(), dtype, H, copy + i * H);
    return copy;
  }

  template <class Work> void blocks(size_t tokens, const Work& work) const {
    const size_t most = l.query.packed ? kBlockRows : kBlockRows4Bit;
    const size_t wanted = (tokens + most * count - 1) / (most * count) * count;
    const size_t height = (tokens + wanted * kTileRows - 1) / (wanted * kTileRows) * kTileRows;
    parallel_for((tokens + height - 1) / height, count, [&](size_t i) { work(i * height, std::min(height, tokens - i * height)); });
  }

  void group(size_t begin, size_t end, size_t tokens) {
    const size_t first = sentences[begin].first, heads = l.heads;
    g = carve(kEncoderGroup, [&](Arena& a) {
      return Group{first, tokens, a.rows(heads * tokens, head_row), a.take<int8_t>(heads * tokens * d),
                   a.take<float>(heads * tokens), a.take<float>(tokens * A)};
    });
    blocks(tokens, [&](size_t t, size_t n) { project(t, n); });
    parallel_for((end - begin) * heads, count, [&](size_t i) { attend(sentences[begin + i / heads], i % heads); });
    blocks(tokens, [&](size_t t, size_t n) { feed_forward(t, n); });
  }

  QRows head_rows(size_t head, size_t t) const {
    const size_t row = head * g.tokens + t;
    return {static_cast<char*>(g.q.q) + row * head_row, g.q.scale + row, g.q.zero + row};
  }

  void project(size_t t, size_t n) const {
    struct Block { float *copy, *out; QRows x; };
    const Block b = carve(kEncoderBlock, [&](Arena& a) {
      return Block{a.take<float>(n * H), a.take<float>(n * A), a.rows(n, 4 * quads(H) * k.row_element_bytes)};
    });
    quantize(input(g.first + t, n, b.copy), n, H, b.x);
    product(l.query, bias[0], b.x, n, kNone, b.out);
    k.int8_quantize_heads(b.out, n, l.heads, d, g.tokens, head_rows(0, t), nullptr);
    product(l.key, bias[1], b.x, n, kNone, b.out);
    k.int8_quantize_heads(b.out, n, l.heads, d, g.tokens, {nullptr, g.key_scale + t, nullptr}, g.keys + t * d);
    product(l.value, bias[2], b.x, n, kNone, g.values + t * A);
  }

  void attend(const Sentence& s, size_t head) const {
    const size_t n = s.count, t = s.first - g.first, ld = (n + 63) / 64 * 64;
    const size_t most = std::max<size_t>(1, kScoreBytes / (ld * sizeof(float)) / kTileRows) * kTileRows;
    struct Piece { int8_t *keys, *values; float *key_scale, *value_scale, *scores, *bad; QRows p; };
    const Piece w = carve(kEncoderBlock, [&](Arena& a) {
      return Piece{a.take<int8_t>(panels(n) * panel_bytes(d)), a.take<int8_t>(panels(d) * panel_bytes(n)), a.take<float>(n),
                   a.take<float>(d), a.take<float>(most * ld), a.take<float>(most), a.rows(most, 4 * quads(n) * k.row_element_bytes)};
    });
    const int8_t* keys = g.keys + (head * g.tokens + t) * d;
    for (size_t p = 0; p < panels(n); ++p) k.int8_pack(keys, n, d, p, w.keys + p * panel_bytes(d));
    const float factor = l.scaling * 1.44269504f, *key_scale = g.key_scale + head * g.tokens + t;  // softmax works in log 2
    float poison = 0;  // NaN if any key is: then no row of this head has a softmax
    for (size_t j = 0; j < n; ++j) {
      w.key_scale[j] = key_scale[j] * factor;
      poison += key_scale[j] * 0;
    }
    float* context = g.values + t * A + head * d;
    k.int8_pack_values(context, A, n, d, w.value_scale, w.values);
    for (size_t m = 0, rows; m < n; m += rows) {
      rows = std::min(most, n - m);
      const QRows q = head_rows(head, t + m);
      gemm(q, rows, d, w.keys, Tail{w.key_scale, nullptr, kNone, kFloat32, w.scores, n, ld});
      for (size_t r = 0; r < rows; ++r) w.bad[r] = q.scale[r] * 0 + poison;
      if (general) add(mask, s, head, m, rows, ld, w.scores, w.bad);
      if (position_bias.data) add(position_bias, s, head, m, rows, ld, w.scores, w.bad);
      k.softmax_codes(w.scores, ld, rows, n, w.p);
      for (size_t r = 0; r < rows; ++r) w.p.scale[r] += w.bad[r];
      gemm(w.p, rows, n, w.values, Tail{w.value_scale, nullptr, kNone, kFloat32, context + m * A, d, A});
    }
  }

  // A mask that is more than padding, or a bias; masked scores stay finite, so that a row without any key takes the mean of
  // all. NaN goes into `bad`, since a maximum does not keep it.
  void add(const Mask& added, const Sentence& s, size_t head, size_t m, size_t rows, size_t ld, float* scores, float* bad) const {
    const size_t n = s.count, *row = &row_of[s.first], origin = s.batch * length;
    const bool contiguous = row[n - 1] - row[0] == n - 1;
    float* line = static_cast<float*>(scratch(kStep, n * sizeof(float)));
    for (size_t r = 0; r < rows; ++r, scores += ld) {
      const size_t at = s.batch * added.batch_stride + head * added.head_stride + (row[m + r] - origin) * added.query_stride;
      const float* from = line;
      if (contiguous && !added.is_bool) from = static_cast<const float*>(added.data) + at + (row[0] - origin);
      else for (size_t j = 0; j < n; ++j) line[j] = mask_at(added, at + (row[j] - origin));
      uint32_t is_nan = 0;
      for (size_t j = 0; j < n; ++j) {
        uint32_t bits;
        memcpy(&bits, from + j, sizeof bits);
        is_nan |= (bits & 0x7fffffff) > 0x7f800000;
        const float sum = scores[j] + from[j] * 1.44269504f;
        scores[j] = std::max(sum, -std::numeric_limits<float>::max());
      }
      if (is_nan) bad[r] = std::numeric_limits<float>::quiet_NaN();
    }
  }

  void feed_forward(size_t t, size_t n) const {
    struct Block { float *copy, *sum, *hidden, *wide; QRows rows, wide_rows; };
    const size_t element = k.row_element_bytes;
    const Block b = carve(kEncoderBlock, [&](Arena& a) {
      return Block{a.take<float>(n * H), a.take<float>(n * H), a.take<float>(n * H), a.take<float>(n * F),
                   a.rows(n, 4 * quads(std::max(H, A)) * element), a.rows(n, 4 * quads(F) * element)};
    });
    quantize(g.values + t * A, n, A, b.rows);
    product(l.output, bias[3], b.rows, n, kNone, b.sum);
    k.add_layer_norm(b.sum, input(g.first + t, n, b.copy), n, H, norm[0], norm[1], l.eps[0], b.hidden, kFloat32);
    quantize(b.hidden, n, H, b.rows);
    product(l.up, bias[4], b.rows, n, l.activation, b.wide);
    quantize(b.wide, n, F, b.wide_rows);
    product(l.down, bias[5], b.wide_rows, n, kNone, b.sum);
    if (whole) return k.add_layer_norm(b.sum, b.hidden, n, H, norm[2], norm[3], l.eps[1], y + row_of[g.first + t] * row_bytes(), dtype);
    for (size_t i = 0; i < n; ++i)
      k.add_layer_norm(b.sum + i * H, b.hidden + i * H, 1, H, norm[2], norm[3], l.eps[1], y + row_of[g.first + t + i] * row_bytes(), dtype);
  }
};

}  // namespace

void encoder_layer(const void* x, int dtype, size_t batch, size_t length, const Mask& mask, const Mask& bias, const EncoderLayer& layer,
                   void* y) {
  Encoder(x, dtype, batch, length, mask, bias, layer, y).run();
}

}  // namespace pyqkern
