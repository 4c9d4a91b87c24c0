// 4-bit weights with one scale per block: NF4, FP4 and uniform int4, which differ in their Codebook alone.
//
//   quantize    v = clamp(x * (1/absmax), -1, 1), code of the nearest value; contracts and layouts in kernels.h
//   linear      y = sum over steps of scale * (sum over k of a step of x * value), a step being a block or 128 columns
//   of one.
//               Both sums run in the order of k, by fma from zero, for few rows and for many: a row's result does not
//               depend on its batch, nor on the ISA. A weight whose rows are no whole blocks, or less than a panel,
//               goes by four_bit_dot.
//   as integers the rows are quantized to s8 (symmetric), the values to integer/levels; the inner sum is exact, below
//               2^24 (127 * 32 * 128 = 520192), so that its conversion to float is exact too.
#pragma once

#include "kernels/weight_only.inl"

namespace pyqkern {
namespace PYQKERN_ISA {

// ---- quantize and dequantize

constexpr float LEAST_ABSMAX = 1e-38f;

// Codes of a block of n elements, one to a byte.
template <class T> INLINE void quantize_block(const T* x, size_t n, float absmax, bool divide, const Codebook& book,
                                              uint8_t* codes) {
  const float least = absmax > LEAST_ABSMAX ? absmax : LEAST_ABSMAX;
  const f32 divisor = set1(least), inv = set1(1.0f / least);
  f32 bound[15];
  for (int i = 0; i < 15; ++i) bound[i] = set1(book.bound[i]);
  const table16 order = load_table(book.order);
  auto code = [&](f32 v) {
    v = clamp(divide ? v / divisor : v * inv, set1(-1.0f), set1(1.0f));
    i32 index{};
    for (int i = 0; i < 15; ++i) index -= (i32)(v > bound[i]);
    return round(lookup(order, index, 0));
  };
  size_t i = 0;
  for (; i + LANES <= n; i += LANES) store_bytes(codes + i, code(load(x + i)));
  if (i < n) {
    uint8_t rest[LANES];
    store_bytes(rest, code(load_part(x + i, n - i)));
    memcpy(codes + i, rest, n - i);
  }
}

template <class T>
static void quantize_blocks(const T* x, size_t n, size_t blocksize, const Codebook& book, size_t begin, size_t end,
                            uint8_t* packed, float* absmax) {
  const T zero{};
  uint8_t codes[4096];
  for (size_t b = begin; b < end; ++b) {
    const size_t at = b * blocksize, size = n - at < blocksize ? n - at : blocksize;
    float least, greatest;
    range_of(x + at, size, &least, &greatest);
    const float extent = -least > greatest ? -least : greatest > 0 ? greatest : 0.0f;
    const bool last = size < blocksize;
    quantize_block(x + at, size, extent, last, book, codes);
    if (size % 2) quantize_block(&zero, 1, extent, last, book, codes + size);
    uint8_t* out = packed + at / 2;
    for (size_t i = 0; i < (size + 1) / 2; ++i) out[i] = (uint8_t)(codes[2 * i] << 4 | codes[2 * i + 1]);
    absmax[b] = greatest != greatest ? greatest : last && extent < LEAST_ABSMAX ? LEAST_ABSMAX : extent;
  }
}

static void four_bit_quantize(const void* x, int dtype, size_t n, size_t blocksize, const Codebook& book, size_t begin,
                              size_t end, uint8_t* packed, float* absmax) {
  if (dtype == kFloat32) quantize_blocks((const float*)x, n, blocksize, book, begin, end, packed, absmax);
  else if (dtype == kBFloat16) quantize_blocks((const bf16*)x, n, blocksize, book, begin, end, packed, absmax);
  else quantize_blocks((const fp16*)x, n, blocksize, book, begin, end, packed, absmax);
}

// Consecutive codes, from an even element on, as many as whole vectors take; returns how many they were.
INLINE size_t dequantize_vectors(const uint8_t* packed, size_t n, const float* values, float* y, bool streamed) {
  const table16 table = load_table(values);
  size_t j = 0;
  for (; j + 2 * LANES <= n; j += 2 * LANES) {
    const i32 bytes = load_bytes(packed + j / 2);
    f32 low, high;
    interleave(lookup(table, bytes, 4), lookup(table, bytes, 0), low, high);
    if (streamed) stream(y + j, low), stream(y + j + LANES, high);
    else store(y + j, low), store(y + j + LANES, high);
  }
  return j;
}

template <class T> INLINE size_t dequantize_vectors(const uint8_t* packed, size_t n, const T* values, T* y,
                                                    bool streamed) {
  const halves32 table = load_halves(&values->bits);
  size_t j = 0;
  if (streamed)
    for (; j + 32 <= n; j += 32) stream_halves(table, packed + j / 2, y + j);
  else
    for (; j + 32 <= n; j += 32) store_halves(table, packed + j / 2, y + j);
  return j;
}

// n elements of one block, from element i of the flat tensor on. A block has sixteen values: each is rounded once.
template <class T>
INLINE void dequantize_block(const uint8_t* packed, size_t i, size_t n, float absmax, const Codebook& book, T* y,
                             bool streamed) {
  T values[16];
  for (int c = 0; c < 16; c += LANES) store(values + c, load(book.value + c) * set1(absmax));
  size_t j = 0;
  if (i % 2 && n) y[j++] = values[packed[i / 2] & 15];
  j += dequantize_vectors(packed + (i + j) / 2, n - j, values, y + j, streamed);
  for (; j < n; ++j) y[j] = values[(i + j) % 2 ? packed[(i + j) / 2] & 15 : packed[(i + j) / 2] >> 4];
}

template <class T>
static void dequantize_blocks(const uint8_t* packed, const float* absmax, size_t blocksize, const Codebook& book,
                              size_t begin, size_t end, T* y, bool streamed) {
  const size_t mask = blocksize - 1,
               shift = (size_t)__builtin_ctzll(blocksize);  // a division costs as much as half a block
  streamed = streamed && (uintptr_t)y % 64 == 0 && (begin & mask) == 0;
  for (size_t i = begin, n; i < end; i += n, y += n) {
    n = blocksize - (i & mask) < end - i ? blocksize - (i & mask) : end - i;
    if (streamed)
      __builtin_prefetch(packed + i / 2 + AHEAD), __builtin_prefetch((const char*)(absmax + (i >> shift)) + AHEAD);
    dequantize_block(packed, i, n, absmax[i >> shift], book, y, streamed);
  }
  if (streamed) stream_end();
}

static void four_bit_dequantize(const uint8_t* packed, const float* absmax, size_t blocksize, const Codebook& book,
                                size_t begin, size_t end, void* y, int dtype, bool streamed) {
  if (dtype == kFloat32) dequantize_blocks(packed, absmax, blocksize, book, begin, end, (float*)y, streamed);
  else if (dtype == kBFloat16) dequantize_blocks(packed, absmax, blocksize, book, begin, end, (bf16*)y, streamed);
  else dequantize_blocks(packed, absmax, blocksize, book, begin, end, (fp16*)y, streamed);
}

// Four lines, 32 columns of sixteen rows, at a time: first the codes of a row's eight columns in their order, then the
// rows.
static void four_bit_unpack_panel(const uint8_t* packed, size_t stride, size_t K, uint8_t* flat, size_t ld) {
  for (size_t k = 0; k < K; k += 32, packed += 4 * stride) {
    uint8_t flat_lines[4][kLine];
    const int8_t* line[4];
    for (int i = 0; i < 4; ++i) {
      line[i] = (const int8_t*)flat_lines[i];
      for (size_t j = 0; j < kLine; j += 4 * LANES) {
        const u32 codes = (u32)load((const int32_t*)(packed + i * stride + j));
        const u32 low = codes & 0x0f0f0f0fu, high = codes >> 4 & 0x0f0f0f0fu;  // columns 0 to 3, and 4 to 7
        const u32 a = low << 4 | low >> 8, b = high << 4 | high >> 8;          // a pair in bytes 0 and 2
        store((int32_t*)(flat_lines[i] + j),
              (i32)((a & 0xffu) | (a >> 8 & 0xff00u) | (b & 0xffu) << 16 | (b << 8 & 0xff000000u)));
      }
    }
    for (size_t n = 0; n < kPanel; n += 4) transpose_quads(line, 4 * n, (int8_t*)flat + n * ld + k / 2, ld);
  }
}

// ---- few rows: straight from the packed codes

constexpr size_t PREFETCH_4BIT = 8192;  // bytes ahead

// V vectors of a strip over B steps side by side, whose sums are independent: that hides the latency of fma. `line`
// points at the first step's first vector, lines are `stride` apart; scale[b] belongs to step b.
template <int R, int V, int B>
static void gemv_steps(const float* x, size_t ldx, size_t size, const uint8_t* line, size_t stride,
                       const line_table& table, const float* const* scale, size_t offset, float* total) {
  f32 acc[B][R][V];
  clear(acc);
  const size_t step_bytes = size / 8 * stride;
  for (size_t k = 0; k < size; k += 8, line += stride, x += 8)
    unroll<B>([&](auto b) INLINE_LAMBDA {
      unroll<V>([&](auto v) INLINE_LAMBDA {
        const uint8_t* at = line + b * step_bytes + v * LANES * 4;
        if (v % PANEL_VECTORS == 0) __builtin_prefetch(at + PREFETCH_4BIT);
        f32 w[8];
        lookup_line(table, load((const int32_t*)at), w);
        unroll<8>([&](auto j) INLINE_LAMBDA {
          unroll<R>([&](auto r)
                        INLINE_LAMBDA { acc[b][r][v] = fma(set1(x[r * ldx + b * size + j]), w[j], acc[b][r][v]); });
        });
      });
    });
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      float* t = total + r * kStrip + v * LANES;
      f32 sum = load(t);
      for (int b = 0; b < B; ++b) sum = fma(acc[b][r][v], load(scale[b] + offset + v * LANES), sum);
      store(t, sum);
    }
}

template <int R>
static void gemv_strip(const float* x, size_t K, const uint8_t* packed, const float* scale, size_t blocksize,
                       size_t panels, const Codebook& book, float* total) {
  constexpr int B = R == 1 ? GEMV_STEPS_4BIT : 1;
  const line_table table = load_line_table(book.value);
  const size_t size = step_of(blocksize), vectors = panels * PANEL_VECTORS, stride = panels * kLine;
  memset(total, 0, R * kStrip * sizeof(float));
  for (size_t k = 0, count; k < K; k += count * size) {
    count = K - k >= B * size ? B : 1;
    const float* scales[B];
    for (size_t b = 0; b < B; ++b) scales[b] = scale + (k + b % count * size) / blocksize * panels * kPanel;
    const uint8_t* line = packed + k / 8 * stride;
    for (size_t v = 0, width; v < vectors; v += width) {
      width = vectors - v >= 4 ? 4 : 1;
      auto f = count == B ? (width == 4 ? gemv_steps<R, 4, B> : gemv_steps<R, 1, B>)
                          : (width == 4 ? gemv_steps<R, 4, 1> : gemv_steps<R, 1, 1>);
      f(x + k, K, size, line + v * LANES * 4, stride, table, scales, v * LANES, total + v * LANES);
    }
  }
}

static void four_bit_gemv(const float* x, size_t rows, size_t K, const uint8_t* packed, const float* scale,
                          size_t blocksize, size_t panels, const Codebook& book, float* total) {
  if (rows == 1) gemv_strip<1>(x, K, packed, scale, blocksize, panels, book, total);
  else if (rows == 2) gemv_strip<2>(x, K, packed, scale, blocksize, panels, book, total);
  else if (rows == 3) gemv_strip<3>(x, K, packed, scale, blocksize, panels, book, total);
  else gemv_strip<4>(x, K, packed, scale, blocksize, panels, book, total);
}

// ---- a weight in flat form: four of its rows, dequantized, times all rows of x

template <int R>
static void dot_tile(const float* x, size_t ldx, size_t K, const float* w, size_t ldw, float* total) {
  constexpr int PARTS = 16 / LANES;
  f32 acc[R][4][PARTS];
  clear(acc);
  auto add = [&](const float* a, size_t lda, size_t k) __attribute__((always_inline)) {
    for (int p = 0; p < PARTS; ++p) {
      f32 b[4];
      for (int j = 0; j < 4; ++j) b[j] = load(w + j * ldw + k + p * LANES);
      for (int r = 0; r < R; ++r) {
        const f32 v = load(a + r * lda + p * LANES);
        for (int j = 0; j < 4; ++j) acc[r][j][p] = fma(v, b[j], acc[r][j][p]);
      }
    }
  };
  size_t k = 0;
  for (; k + 16 <= K; k += 16) add(x + k, ldx, k);
  if (k < K) {
    float rest[R][16] = {};
    for (int r = 0; r < R; ++r) memcpy(rest[r], x + r * ldx + k, (K - k) * sizeof(float));
    add(rest[0], 16, k);
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < 4; ++j) {
      float sum[16];
      for (int p = 0; p < PARTS; ++p) store(sum + p * LANES, acc[r][j][p]);
      for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
      total[r * kStrip + j] = sum[0];
    }
}

static void four_bit_dot(const float* x, size_t ldx, size_t rows, size_t K, const float* w, size_t ldw, float* total) {
  constexpr int R = DOT_ROWS_4BIT;
  size_t m = 0;
  for (; m + R <= rows; m += R) dot_tile<R>(x + m * ldx, ldx, K, w, ldw, total + m * kStrip);
  for (; m < rows; ++m) dot_tile<1>(x + m * ldx, ldx, K, w, ldw, total + m * kStrip);
}

// ---- many rows: some columns of a tile's panels are expanded once, into L1, for the tiles of weight_only.inl

static void four_bit_expand(const uint8_t* packed, size_t stride, size_t size, size_t panels, const Codebook& book,
                            float* values) {
  const line_table table = load_line_table(book.value);
  for (size_t p = 0; p < TILE_PANELS; ++p, packed += kLine, values += PANEL_VALUES) {
    if (p >= panels) {
      memset(values, 0, size * kPanel * sizeof(float));
      continue;
    }
    for (size_t k = 0; k < size; k += 8)
      for (size_t v = 0; v < PANEL_VECTORS; ++v) {
        const i32 codes = load((const int32_t*)(packed + k / 8 * stride) + v * LANES);
        f32 w[8];
        lookup_line(table, codes, w);
        unroll<8>([&](auto j) INLINE_LAMBDA { store(values + (k + j) * kPanel + v * LANES, w[j]); });
      }
  }
}

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
