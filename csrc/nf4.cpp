// 4-bit codes of whole tensors, and the 4-bit linear: who computes which rows and which strips of columns.
#include <algorithm>
#include <cstring>

#include "api.h"
#include "parallel.h"

namespace pyqkern {
namespace {

constexpr size_t kSerial = 1 << 15;       // elements: below this a second thread costs more than it brings
constexpr size_t kPiece = 1 << 16;        // elements of a piece, a multiple of every blocksize
constexpr size_t kStream = 16 << 20;      // bytes written: beyond what stays in the cache, stores go past it
constexpr size_t kSerialOps = 1 << 20;    // multiply-adds
constexpr size_t kGemvRows = 4;           // rows that read the codes themselves, every one for itself
constexpr size_t kBlockRows = 192;        // rows that share an expanded step: their totals are 48 KB

size_t strips(size_t N) { return (N + kStrip - 1) / kStrip; }
size_t panels_of(size_t N, size_t strip) { return std::min<size_t>(kStrip / kPanel, panels(N) - strip * (kStrip / kPanel)); }

// The scale of block `at` (of the flat weight, or in the order of panels): q and nested, or fp32 as it is.
float scale_at(const Scales& s, size_t stored, size_t block) {
  if (!s.nested) return static_cast<const float*>(s.absmax)[stored];
  const float scaled = s.map[static_cast<const uint8_t*>(s.absmax)[stored]] * s.nested[block / kNestedBlock];
  return scaled + s.offset;
}

// The scales of a strip, fp32 [K/blocksize][panels][16].
const float* strip_scales(const Weight4& w, size_t strip, float* buffer) {
  const size_t blocks = w.K / w.blocksize, count = panels_of(w.N, strip) * kPanel, start = strip * blocks * kStrip;
  if (!w.scales.nested) return static_cast<const float*>(w.scales.absmax) + start;
  for (size_t b = 0; b < blocks; ++b)
    for (size_t j = 0; j < count; ++j) {
      const size_t n = std::min(strip * kStrip + j, w.N - 1);
      buffer[b * count + j] = scale_at(w.scales, start + b * count + j, n * blocks + b);
    }
  return buffer;
}

// One step of a strip of a weight in flat form, dequantized and turned, [size][kStrip].
void flat_step(const Weight4& w, const float* absmax, size_t strip, size_t k, size_t size, float* values) {
  alignas(64) float row[kStepMax];
  const size_t count = std::min(kStrip, w.N - strip * kStrip);
  for (size_t j = 0; j < kStrip; ++j) {
    const size_t at = (strip * kStrip + j) * w.K + k;
    if (j < count) kernels().nf4_dequantize(w.packed, absmax, w.blocksize, *w.book, at, at + size, row, kFloat32, false);
    for (size_t i = 0; i < size; ++i) values[i * kStrip + j] = j < count ? row[i] : 0.0f;
  }
}

// What all pieces of one call share: fp32 rows, or quantized ones; fp32 scales of a flat weight.
struct Shared {
  const float* x;
  const QRows* q;
  const float* flat_scales;
};

// Rows [m, m + rows) of one strip: fills total [rows][kStrip].
void strip_totals(const Weight4& w, const Shared& in, size_t strip, size_t m, size_t rows, float* total) {
  const Kernels& k = kernels();
  const size_t K = w.K, count = panels_of(w.N, strip), ones = kStrip;
  const uint8_t* packed = w.packed + strip * (kStrip / kPanel) * (K / 8) * kLine;
  char* buffer = static_cast<char*>(scratch(kStep, (kStepMax + 2) * kStrip * sizeof(float)));
  float* values = reinterpret_cast<float*>(buffer);
  float* scale = values + kStepMax * kStrip;  // of this step, filled up to a whole strip
  int32_t* minus_sums = reinterpret_cast<int32_t*>(scale + kStrip);
  if (in.flat_scales) {
    std::fill(scale, scale + ones, 1.0f);
    std::fill(total, total + rows * kStrip, 0.0f);
    for (size_t at = 0; at < K; at += kStepMax) {
      const size_t size = std::min(kStepMax, K - at);
      flat_step(w, in.flat_scales, strip, at, size, values);
      k.nf4_gemm(in.x + m * K + at, K, rows, size, values, scale, total);
    }
    return;
  }
  const float* scales = strip_scales(w, strip, static_cast<float*>(w.scales.nested ? scratch(kScales, K / w.blocksize * kStrip * sizeof(float)) : nullptr));
  if (!in.q && rows <= kGemvRows) return k.nf4_gemv(in.x + m * K, rows, K, packed, scales, w.blocksize, count, *w.book, total);
  const size_t size = step_of(w.blocksize);
  std::fill(scale, scale + kStrip, 0.0f);
  std::fill(total, total + rows * kStrip, 0.0f);
  for (size_t at = 0; at < K; at += size) {
    std::copy_n(scales + at / w.blocksize * count * kPanel, count * kPanel, scale);
    const uint8_t* step = packed + at / 8 * count * kLine;
    if (in.q) {
      int8_t* integers = reinterpret_cast<int8_t*>(values);
      k.nf4_expand_int8(step, size, count, *w.book, integers, minus_sums);
      const QRows q{static_cast<char*>(in.q->q) + m * K * k.row_element_bytes, in.q->scale + m, in.q->zero + m};
      k.nf4_gemm_int8(q, K, at, rows, size, integers, minus_sums, scale, total);
    } else {
      k.nf4_expand(step, size, count, *w.book, values);
      k.nf4_gemm(in.x + m * K + at, K, rows, size, values, scale, total);
    }
  }
}

}  // namespace

bool in_panels(size_t N, size_t K, size_t blocksize) { return N >= kPanel && K % blocksize == 0 && blocksize % 8 == 0; }

void nf4_quantize(const void* x, int dtype, size_t n, size_t blocksize, const Codebook& book, uint8_t* packed, float* absmax) {
  const Kernels& k = kernels();
  const size_t blocks = (n + blocksize - 1) / blocksize, step = kPiece / blocksize;
  parallel_for((blocks + step - 1) / step, n <= kSerial ? 1 : threads(), [&](size_t i) {
    k.nf4_quantize(x, dtype, n, blocksize, book, i * step, std::min(blocks, (i + 1) * step), packed, absmax);
  });
}

void nf4_dequantize(const uint8_t* packed, const Scales& scales, size_t blocksize, const Codebook& book, size_t n, void* y, int dtype) {
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
    k.nf4_dequantize(packed, absmax, blocksize, book, begin, end, static_cast<char*>(y) + begin * dtype_size(dtype), dtype, stream);
  });
}

void nf4_pack(const uint8_t* flat, size_t N, size_t K, uint8_t* lines) {
  for (size_t s = 0; s < strips(N); ++s)
    for (size_t k = 0; k < K; k += 8)
      for (size_t p = 0; p < panels_of(N, s); ++p)
        for (size_t j = 0; j < kLine; ++j, ++lines) {
          const size_t n = s * kStrip + p * kPanel + j / 4, at = (n * K + k + j % 4) / 2;
          const int shift = j % 2 ? 0 : 4;
          *lines = n < N ? static_cast<uint8_t>((flat[at] >> shift & 15) | (flat[at + 2] >> shift & 15) << 4) : uint8_t{0};
        }
}

void nf4_unpack(const uint8_t* lines, size_t N, size_t K, uint8_t* flat) {
  for (size_t s = 0; s < strips(N); ++s)
    for (size_t k = 0; k < K; k += 8)
      for (size_t p = 0; p < panels_of(N, s); ++p, lines += kLine) {
        const size_t n = s * kStrip + p * kPanel;
        uint32_t row[kPanel];
        memcpy(row, lines, kLine);
        for (uint32_t& codes : row) {  // each lane: columns 0 to 3 in its low halves of bytes, 4 to 7 in the high ones
          const uint32_t low = codes & 0x0f0f0f0f, high = codes >> 4 & 0x0f0f0f0f;
          const uint32_t a = low << 4 | low >> 8, b = high << 4 | high >> 8;  // a pair in bytes 0 and 2
          codes = (a & 0xff) | (a >> 8 & 0xff00) | (b & 0xff) << 16 | (b << 8 & 0xff000000);
        }
        for (size_t j = 0; j < std::min(kPanel, N - n); ++j) memcpy(flat + ((n + j) * K + k) / 2, row + j, 4);
      }
}

void nf4_linear(const void* x, int dtype, const Weight4& w, const void* bias, int bias_dtype, size_t M, void* y, bool as_int8) {
  if (M == 0 || w.N == 0 || w.K == 0) return;  // Python answers these
  const Kernels& k = kernels();
  const size_t N = w.N, K = w.K;
  const bool flat = !in_panels(N, K, w.blocksize);
  const int count = M * N * K <= kSerialOps ? 1 : threads();
  Shared in{static_cast<const float*>(x), nullptr, nullptr};
  QRows q{};
  if (as_int8 && !flat) {
    char* scales = static_cast<char*>(scratch(kRowScales, M * 8));
    q = {scratch(kRows, M * K * k.row_element_bytes), reinterpret_cast<float*>(scales), reinterpret_cast<int32_t*>(scales + M * 4)};
    parallel_for((M + 15) / 16, count, [&](size_t i) {
      const size_t m = i * 16, rows = std::min<size_t>(16, M - m);
      const QRows part{static_cast<char*>(q.q) + m * K * k.row_element_bytes, q.scale + m, q.zero + m};
      k.int8_quantize_rows(static_cast<const char*>(x) + m * K * dtype_size(dtype), dtype, K, rows, K, true, part);
      for (size_t r = 0; r < rows; ++r) q.scale[m + r] *= 1.0f / w.book->levels;
    });
    in.q = &q;
  } else if (dtype != kFloat32) {
    float* wide = static_cast<float*>(scratch(kRows, M * K * sizeof(float)));
    k.widen(x, dtype, M * K, wide);
    in.x = wide;
  }
  if (flat) {
    in.flat_scales = static_cast<const float*>(w.scales.absmax);
    if (w.scales.nested) {
      const size_t blocks = (N * K + w.blocksize - 1) / w.blocksize;
      float* values = static_cast<float*>(scratch(kPacked, blocks * sizeof(float)));
      for (size_t b = 0; b < blocks; ++b) values[b] = scale_at(w.scales, b, b);
      in.flat_scales = values;
    }
  }
  const float* wide_bias = static_cast<const float*>(bias);
  if (bias && bias_dtype != kFloat32) {
    float* values = static_cast<float*>(scratch(kBias, N * sizeof(float)));
    k.widen(bias, bias_dtype, N, values);
    wide_bias = values;
  }
  const size_t blocks = (M + kBlockRows - 1) / kBlockRows, height = (M + blocks - 1) / blocks;
  parallel_for(blocks * strips(N), count, [&](size_t i) {
    const size_t m = i / strips(N) * height, strip = i % strips(N);
    if (m >= M) return;
    const size_t rows = std::min(height, M - m);
    float* total = static_cast<float*>(scratch(kTotals, kBlockRows * kStrip * sizeof(float)));
    strip_totals(w, in, strip, m, rows, total);
    k.nf4_finish(total, in.q ? q.scale + m : nullptr, wide_bias, rows, strip * kStrip, std::min(kStrip, N - strip * kStrip), N,
                 static_cast<char*>(y) + m * N * dtype_size(dtype), dtype);
  });
}

}  // namespace pyqkern
