// 4-bit codes of whole tensors, and the 4-bit linear: who computes which rows and which strips of columns.
#include <algorithm>
#include <cstring>

#include "float_linear.h"

namespace pyqkern {
namespace {

constexpr size_t kSerial = 1 << 15;   // elements: below this a second thread costs more than it brings
constexpr size_t kPiece = 1 << 16;    // elements of a piece, a multiple of every blocksize
constexpr size_t kStream = 16 << 20;  // bytes written: beyond what stays in the cache, stores go past it
constexpr size_t kShortestFold = 8;   // quads: shorter sums in int16 save nothing
constexpr size_t kChunk = 256;        // columns of a strip that are integers at a time: 16 KB, which stay in L1

const uint8_t* strip_codes(const Weight4Bit& w, size_t strip) {
  return w.packed + strip * (kStrip / kPanel) * (w.K / 8) * kLine;
}

// The scales of a strip, fp32 [K/blocksize][panels][16]: as they lie in the weight, or computed until the next call.
const float* strip_scales(const Weight4Bit& w, size_t strip) {
  const size_t blocks = w.K / w.blocksize, count = panels_of(w.N, strip) * kPanel, start = strip * blocks * kStrip;
  if (!w.scales.nested) return static_cast<const float*>(w.scales.absmax) + start;
  float* buffer = static_cast<float*>(scratch(kScales, blocks * kStrip * sizeof(float)));
  for (size_t b = 0; b < blocks; ++b)
    for (size_t j = 0; j < count; ++j) {
      const size_t n = std::min(strip * kStrip + j, w.N - 1);
      buffer[b * count + j] = scale_at(w.scales, start + b * count + j, n * blocks + b);
    }
  return buffer;
}

// Rows [m, m + rows) of one strip of a weight in flat form: four of its rows are dequantized at a time.
void flat_totals(const Kernels& k, const Weight4Bit& w, const float* absmax, const float* x, size_t strip, size_t rows,
                 float* total) {
  const size_t K = w.K, wide = (K + 15) / 16 * 16, count = std::min(kStrip, w.N - strip * kStrip);
  float* values = static_cast<float*>(scratch(kStep, 4 * wide * sizeof(float)));
  std::fill(values, values + 4 * wide, 0.0f);
  for (size_t j = 0; j < count; j += 4) {
    for (size_t i = 0; i < std::min<size_t>(4, count - j); ++i) {
      const size_t at = (strip * kStrip + j + i) * K;
      k.four_bit_dequantize(w.packed, absmax, w.blocksize, *w.book, at, at + K, values + i * wide, kFloat32, false);
    }
    k.four_bit_dot(x, K, rows, K, values, wide, total + j);
  }
}

}  // namespace

// int16 holds a fold where 2 * quads * 127 * (the greatest |integer|) <= 32767.
Fold fold_of(const Kernels& k, const Weight4Bit& w) {
  const int8_t* integer = w.book->integer;
  const int least = *std::min_element(integer, integer + 16), most = *std::max_element(integer, integer + 16);
  const size_t step = step_of(w.blocksize) / 4;
  size_t quads = step;
  while (static_cast<int>(2 * quads * 127) * std::max(-least, most) > 32767) quads /= 2;
  const bool short_sums = k.short_sums && quads >= kShortestFold;
  return {short_sums ? quads : step, -least, short_sums};
}

void four_bit_totals(const Kernels& k, const Weight4Bit& w, const FloatRows& in, size_t strip, float* total) {
  const size_t count = panels_of(w.N, strip), size = step_of(w.blocksize), most = kStepMax / size;
  const float* scales = strip_scales(w, strip);
  const uint8_t* packed = strip_codes(w, strip);
  if (!in.in_tiles) return k.four_bit_gemv(in.x, in.rows, w.K, packed, scales, w.blocksize, count, *w.book, total);
  float* values = static_cast<float*>(scratch(kStep, (kStepMax + most) * kStrip * sizeof(float)));
  float* scale = values + kStepMax * kStrip;  // of these steps, filled up to a whole strip
  std::fill(scale, scale + most * kStrip, 0.0f);
  std::fill(total, total + in.rows * kStrip, 0.0f);
  for (size_t at = 0; at < w.K; at += kStepMax) {
    const size_t steps = std::min(kStepMax, w.K - at) / size;
    for (size_t s = 0; s < steps; ++s)
      std::copy_n(scales + (at + s * size) / w.blocksize * count * kPanel, count * kPanel, scale + s * kStrip);
    for (size_t p = 0; p < count; p += k.tile_panels) {
      const size_t some = std::min(k.tile_panels, count - p);
      k.four_bit_expand(packed + (at / 8 * count + p) * kLine, count * kLine, steps * size, some, *w.book, values);
      k.float_gemm(in.x, w.K, at, in.rows, size, steps, values, some, scale + p * kPanel, total + p * kPanel);
    }
  }
}

void four_bit_totals(const Kernels& k, const Weight4Bit& w, const IntegerRows& q, size_t strip, size_t rows,
                     float* total) {
  const size_t count = panels_of(w.N, strip), size = step_of(w.blocksize), most = kChunk / size,
               ldx = q.fold.bytes(w.K);
  const float* scales = strip_scales(w, strip);
  const uint8_t* packed = strip_codes(w, strip);
  if (rows <= kGemvRows) {
    const uint8_t* ahead = strip + 1 < strips(w.N) ? strip_codes(w, strip + 1) : packed;
    return k.four_bit_gemv_int8(q.x, ldx, rows, w.K, q.fold, packed, ahead, scales, w.blocksize, count, *w.book, total);
  }
  char* buffer = static_cast<char*>(scratch(kStep, kChunk * kStrip + most * kStrip * sizeof(float)));
  uint8_t* integers = reinterpret_cast<uint8_t*>(buffer);
  float* scale = reinterpret_cast<float*>(buffer + kChunk * kStrip);
  std::fill(scale, scale + most * kStrip, 0.0f);
  std::fill(total, total + rows * kStrip, 0.0f);
  for (size_t at = 0; at < w.K; at += kChunk) {
    const size_t steps = std::min(kChunk, w.K - at) / size;
    for (size_t s = 0; s < steps; ++s)
      std::copy_n(scales + (at + s * size) / w.blocksize * count * kPanel, count * kPanel, scale + s * kStrip);
    k.four_bit_expand_int8(packed + at / 8 * count * kLine, steps * size, count, *w.book, q.fold, integers);
    const uint8_t* next = packed + (at + steps * size) / 8 * count * kLine;  // of this strip, or of the one behind it
    for (size_t i = 0; i < kChunk / 8 * count; ++i) __builtin_prefetch(next + i * kLine);
    for (size_t i = 0; i < most * count; ++i)
      __builtin_prefetch(scales + ((at + steps * size) / w.blocksize * count + i) * kPanel);
    k.four_bit_gemm_int8(q.x + q.fold.bytes(at), ldx, rows, size, steps, q.fold, integers, scale, total);
  }
}

void load_integer_rows(const Kernels& k, const void* x, int dtype, size_t rows, size_t K, const Codebook& book,
                       const IntegerRows& to) {
  int32_t correction[kLoadRows];
  const QRows part{scratch(kRows, kLoadRows * K * k.row_element_bytes), to.scale, correction};
  k.int8_quantize_rows(x, dtype, K, rows, K, true, part);
  k.four_bit_load_rows(part, rows, K, to.fold, to.x);
  for (size_t r = 0; r < rows; ++r) to.scale[r] *= 1.0f / book.levels;
}

namespace {

// The linear with quantized rows, for a weight in panels.
void linear_int8(const Kernels& k, const void* x, int dtype, const Weight4Bit& w, size_t M, int count, Finish finish) {
  const size_t K = w.K;
  const Fold fold = fold_of(k, w);
  const size_t ldx = fold.bytes(K);
  float* scale = static_cast<float*>(scratch(kRowScales, M * sizeof(float)));
  int8_t* rows_of = static_cast<int8_t*>(scratch(kPacked, M * ldx));
  parallel_for((M + kLoadRows - 1) / kLoadRows, count, [&](size_t i) {
    const size_t m = i * kLoadRows;
    load_integer_rows(k, static_cast<const char*>(x) + m * K * dtype_size(dtype), dtype, std::min(kLoadRows, M - m), K,
                      *w.book, {rows_of + m * ldx, scale + m, fold});
  });
  finish.row_scale = scale;
  for_strips(k, Blocks(M), count, finish, [&](size_t m, size_t rows, size_t strip, float* total) {
    four_bit_totals(k, w, IntegerRows{rows_of + m * ldx, scale + m, fold}, strip, rows, total);
  });
}

// The linear in fp32 for a weight in flat form.
void linear_flat(const Kernels& k, const void* x, int dtype, const Weight4Bit& w, size_t M, int count,
                 const Finish& finish) {
  const size_t N = w.N, K = w.K;
  const float* rows_of = static_cast<const float*>(x);
  if (dtype != kFloat32) {
    float* wide = static_cast<float*>(scratch(kRows, M * K * sizeof(float)));
    k.widen(x, dtype, M * K, wide);
    rows_of = wide;
  }
  const float* scales = flat_scales(w);
  for_strips(k, Blocks(M), count, finish, [&](size_t m, size_t rows, size_t strip, float* total) {
    flat_totals(k, w, scales, rows_of + m * K, strip, rows, total);
  });
}

}  // namespace

float scale_at(const Scales& s, size_t stored, size_t block) {
  if (!s.nested) return static_cast<const float*>(s.absmax)[stored];
  const float scaled = s.map[static_cast<const uint8_t*>(s.absmax)[stored]] * s.nested[block / kNestedBlock];
  return scaled + s.offset;
}

const float* flat_scales(const Weight4Bit& w) {
  if (!w.scales.nested) return static_cast<const float*>(w.scales.absmax);
  const size_t blocks = (w.N * w.K + w.blocksize - 1) / w.blocksize;
  float* all = static_cast<float*>(scratch(kScales, blocks * sizeof(float)));
  for (size_t b = 0; b < blocks; ++b) all[b] = scale_at(w.scales, b, b);
  return all;
}

bool in_panels(size_t N, size_t K, size_t blocksize) { return N >= kPanel && K % blocksize == 0 && blocksize % 8 == 0; }

void four_bit_quantize(const void* x, int dtype, size_t n, size_t blocksize, const Codebook& book, uint8_t* packed,
                       float* absmax) {
  const Kernels& k = kernels();
  const size_t blocks = (n + blocksize - 1) / blocksize, step = kPiece / blocksize;
  parallel_for((blocks + step - 1) / step, n <= kSerial ? 1 : threads(), [&](size_t i) {
    k.four_bit_quantize(x, dtype, n, blocksize, book, i * step, std::min(blocks, (i + 1) * step), packed, absmax);
  });
}

void four_bit_dequantize(const uint8_t* packed, const Scales& scales, size_t blocksize, const Codebook& book, size_t n,
                         void* y, int dtype) {
  const Kernels& k = kernels();
  const size_t blocks = (n + blocksize - 1) / blocksize;
  const float* absmax = static_cast<const float*>(scales.absmax);
  if (scales.nested) {
    float* values = static_cast<float*>(scratch(kScales, blocks * sizeof(float)));
    for (size_t b = 0; b < blocks; ++b) values[b] = scale_at(scales, b, b);
    absmax = values;
  }
  const bool stream = n * dtype_size(dtype) >= kStream;
  parallel_for((n + kPiece - 1) / kPiece, n <= kSerial ? 1 : threads(), [&](size_t i) {
    const size_t begin = i * kPiece, end = std::min(n, begin + kPiece);
    k.four_bit_dequantize(packed, absmax, blocksize, book, begin, end,
                          static_cast<char*>(y) + begin * dtype_size(dtype), dtype, stream);
  });
}

void four_bit_pack(const uint8_t* flat, size_t N, size_t K, uint8_t* packed) {
  parallel_for(strips(N), N * K <= kSerial ? 1 : threads(), [&](size_t s) {
    uint8_t* to = packed + s * kStrip * K / 2;
    for (size_t k = 0; k < K; k += 8)
      for (size_t p = 0; p < panels_of(N, s); ++p)
        for (size_t j = 0; j < kLine; ++j, ++to) {
          const size_t n = s * kStrip + p * kPanel + j / 4, at = (n * K + k + j % 4) / 2;
          const int shift = j % 2 ? 0 : 4;
          *to = n < N ? static_cast<uint8_t>((flat[at] >> shift & 15) | (flat[at + 2] >> shift & 15) << 4) : uint8_t{0};
        }
  });
}

void four_bit_unpack(const uint8_t* packed, size_t N, size_t K, uint8_t* flat) {
  const Kernels& k = kernels();
  parallel_for(panels(N), N * K <= kSerial ? 1 : threads(), [&](size_t p) {
    const size_t n = p * kPanel, strip = n / kStrip, bytes = std::min(kPanel, N - n) * K / 2;
    const uint8_t* panel = packed + strip * (kStrip / kPanel) * (K / 8) * kLine + p % (kStrip / kPanel) * kLine;
    uint8_t* to = flat + n * K / 2;
    uint8_t* rows = n + kPanel <= N ? to : static_cast<uint8_t*>(scratch(kStep, kPanel * K / 2));
    k.four_bit_unpack_panel(panel, panels_of(N, strip) * kLine, K, rows, K / 2);
    if (rows != to) std::memcpy(to, rows, bytes);
  });
}

void four_bit_linear(const void* x, int dtype, const Weight4Bit& w, const void* bias, int bias_dtype, size_t M, void* y,
                     bool as_int8) {
  if (M == 0 || w.N == 0 || w.K == 0) return;  // Python answers these
  const Kernels& k = kernels();
  const float* wide_bias = widened(k, bias, bias_dtype, w.N);
  const Finish finish{nullptr, nullptr, wide_bias, w.N, y, dtype};
  const int count = M * w.N * w.K <= kSerialOps ? 1 : threads();
  if (!in_panels(w.N, w.K, w.blocksize)) return linear_flat(k, x, dtype, w, M, count, finish);
  if (as_int8) return linear_int8(k, x, dtype, w, M, count, finish);
  float_linear(k, x, dtype, M, w.N, w.K, nullptr, wide_bias, y,
               [&](const FloatRows& in, size_t strip, float* total) { four_bit_totals(k, w, in, strip, total); });
}

void four_bit_rows(const Kernels& k, const QRows& q, size_t rows, const Weight4Bit& w, const float* bias,
                   int activation, float* y) {
  const Fold fold = fold_of(k, w);
  int8_t* x = static_cast<int8_t*>(scratch(kPacked, rows * fold.bytes(w.K)));
  k.four_bit_load_rows(q, rows, w.K, fold, x);
  float* row_scale = static_cast<float*>(scratch(kRowScales, rows * sizeof(float)));
  for (size_t r = 0; r < rows; ++r) row_scale[r] = q.scale[r] * (1.0f / w.book->levels);
  float* total = static_cast<float*>(scratch(kTotals, rows * kStrip * sizeof(float)));
  for (size_t strip = 0; strip < strips(w.N); ++strip) {
    four_bit_totals(k, w, IntegerRows{x, row_scale, fold}, strip, rows, total);
    k.finish_totals(total, row_scale, nullptr, bias, activation, rows, strip * kStrip,
                    std::min(kStrip, w.N - strip * kStrip), w.N, y, kFloat32);
  }
}

}  // namespace pyqkern
