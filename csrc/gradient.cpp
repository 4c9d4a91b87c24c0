// The gradient of a linear's input, from the packed weight: 64 columns of y for a block of rows at a time, for which
// kStepMax rows of these columns of W are expanded at once.
#include "float_linear.h"

namespace pyqkern {
namespace {

// y [M, K] = g [M, N] times a weight [N, K]. expand(n, k, values) writes rows [n, n + 16) of columns [k, k + 16), of
// which row n and column k exist, to values [16][kPanel].
template <class Expand>
void grad_input(const Kernels& k, const void* g, int dtype, size_t M, size_t N, size_t K, void* y,
                const Expand& expand) {
  const int count = M * N * K <= kSerialOps ? 1 : threads();
  const size_t bytes = dtype_size(dtype), group = std::max(kGroupBytes / (sizeof(float) * N), kBlockRows);
  for (size_t m0 = 0; m0 < M; m0 += group) {
    const Blocks blocks(std::min(group, M - m0));
    const FloatRows in = float_rows(k, static_cast<const char*>(g) + m0 * N * bytes, dtype, blocks, N, count, 0);
    const Finish finish{nullptr, nullptr, nullptr, K, static_cast<char*>(y) + m0 * K * bytes, dtype};
    for_strips(k, blocks, count, finish, [&](size_t m, size_t rows, size_t strip, float* total) {
      const size_t tile = kStepMax * kPanel, panels = panels_of(K, strip);
      float* values = static_cast<float*>(scratch(kStep, k.tile_panels * tile * sizeof(float)));
      std::fill(values, values + k.tile_panels * tile, 0.0f);  // where there is no panel they stay so
      std::fill(total, total + rows * kStrip, 0.0f);
      for (size_t at = 0; at < N; at += kStepMax) {
        const size_t size = std::min(kStepMax, N - at);
        for (size_t p = 0; p < panels; p += k.tile_panels) {
          const size_t some = std::min(k.tile_panels, panels - p);
          for (size_t i = 0; i < some; ++i)
            for (size_t n = 0; n < size; n += kPanel)
              expand(at + n, strip * kStrip + (p + i) * kPanel, values + i * tile + n * kPanel);
          k.float_gemm(in.x + m * N, N, at, rows, size, 1, values, some, nullptr, total + p * kPanel);
        }
      }
    });
  }
}

// All scales of a weight in panels, in their order, in fp32: as they lie in it, or computed until the next call.
const float* panel_scales(const Weight4Bit& w) {
  if (!w.scales.nested) return static_cast<const float*>(w.scales.absmax);
  const size_t blocks = w.K / w.blocksize;
  float* all = static_cast<float*>(scratch(kScales, panels(w.N) * kPanel * blocks * sizeof(float)));
  for (size_t strip = 0; strip < strips(w.N); ++strip) {
    const size_t count = panels_of(w.N, strip) * kPanel, start = strip * blocks * kStrip;
    for (size_t b = 0; b < blocks; ++b)
      for (size_t j = 0; j < count; ++j) {
        const size_t n = std::min(strip * kStrip + j, w.N - 1), at = start + b * count + j;
        all[at] = scale_at(w.scales, at, n * blocks + b);
      }
  }
  return all;
}

}  // namespace

void int8_grad_input(const void* g, int dtype, const Packed& w, const float* w_scale, size_t M, size_t N, size_t K,
                     void* y) {
  if (M == 0 || N == 0 || K == 0) return;  // Python answers these
  const Kernels& k = kernels();
  grad_input(k, g, dtype, M, N, K, y, [&](size_t n, size_t at, float* values) {
    const int8_t* packed = w.panel(K, n / kPanel) + at / 4 * kLine;
    k.int8_expand_rows(packed, std::min(kPanel / 4, quads(K) - at / 4), w_scale + n, std::min(kPanel, N - n), values);
  });
}

void four_bit_grad_input(const void* g, int dtype, const Weight4Bit& w, size_t M, void* y) {
  const size_t N = w.N, K = w.K;
  if (M == 0 || N == 0 || K == 0) return;  // Python answers these
  const Kernels& k = kernels();
  if (!in_panels(N, K, w.blocksize)) {
    const float* scales = flat_scales(w);
    return grad_input(k, g, dtype, M, N, K, y, [&](size_t n, size_t at, float* values) {
      for (size_t i = 0; i < std::min(kPanel, N - n); ++i) {
        const size_t begin = (n + i) * K + at, end = begin + std::min(kPanel, K - at);
        k.four_bit_dequantize(w.packed, scales, w.blocksize, *w.book, begin, end, values + i * kPanel, kFloat32, false);
      }
    });
  }
  const float* scales = panel_scales(w);
  const size_t blocks = K / w.blocksize;
  grad_input(k, g, dtype, M, N, K, y, [&](size_t n, size_t at, float* values) {
    const size_t strip = n / kStrip, panel = n % kStrip / kPanel, count = panels_of(N, strip);
    const uint8_t* packed = w.packed + strip * (kStrip / kPanel) * (K / 8) * kLine + (at / 8 * count + panel) * kLine;
    const float* scale = scales + strip * blocks * kStrip + (at / w.blocksize * count + panel) * kPanel;
    k.four_bit_expand_rows(packed, count * kLine, *w.book, scale, std::min(kPanel, N - n), values);
  });
}

}  // namespace pyqkern
