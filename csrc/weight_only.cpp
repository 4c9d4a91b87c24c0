// The linear with INT8 weights and float rows.
#include "float_linear.h"

namespace pyqkern {

void weight_only_totals(const Kernels& k, const Packed& w, size_t N, size_t K, const FloatRows& in, size_t strip,
                        float* total) {
  const int8_t* packed = w.panel(K, strip * (kStrip / kPanel));
  const size_t count = panels_of(N, strip);
  if (!in.in_tiles) return k.int8_gemv_float(in.x, in.rows, K, packed, count, total);
  float* values = static_cast<float*>(scratch(kStep, k.tile_panels * kStepMax * kPanel * sizeof(float)));
  std::fill(total, total + in.rows * kStrip, 0.0f);
  for (size_t at = 0; at < K; at += kStepMax) {
    const size_t size = std::min(kStepMax, K - at);
    for (size_t p = 0; p < count; p += k.tile_panels) {
      const size_t some = std::min(k.tile_panels, count - p);
      k.int8_expand(packed + p * panel_bytes(K) + at * kPanel, panel_bytes(K), size, some, values);
      k.float_gemm(in.x, K, at, in.rows, size, 1, values, some, nullptr, total + p * kPanel);
    }
  }
}

void int8_linear_weight_only(const void* x, int dtype, const Packed& w, const float* w_scale, const void* bias,
                             int bias_dtype, size_t M, size_t N, size_t K, void* y) {
  if (M == 0 || N == 0 || K == 0) return;  // Python answers these
  const Kernels& k = kernels();
  auto totals = [&](const FloatRows& in, size_t strip, float* total) {
    weight_only_totals(k, w, N, K, in, strip, total);
  };
  float_linear(k, x, dtype, M, N, K, w_scale, widened(k, bias, bias_dtype, N), y, totals);
}

}  // namespace pyqkern
