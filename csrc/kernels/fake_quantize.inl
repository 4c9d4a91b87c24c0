// Fake quantization of rows, and its backward pass; contracts in kernels.h.
#pragma once

#include "kernels/affine.inl"

namespace pyqkern {
namespace PYQKERN_ISA {

template <class T>
static void fake_quantize_row(const T* x, size_t n, f32 scale, i32 zero_point, const FakeRows& f, T* y) {
  const Quantizer<false> quantizer{set1(1.0f) / scale, to_float(zero_point), set1((float)f.qmin), set1((float)f.qmax)};
  auto value = [&](f32 v) INLINE_LAMBDA {
    const f32 result = scale * to_float(quantizer(v) - zero_point);
    return v == v ? result : v;
  };
  size_t i = 0;
  for (; i + LANES <= n; i += LANES) store(y + i, value(load(x + i)));
  if (i < n) store_part(y + i, value(load_part(x + i, n - i)), n - i);
}

template <class T> static void fake_quantize_as(const FakeRows& f, size_t begin, size_t end, void* y) {
  for (size_t r = begin; r < end; ++r) {
    const size_t c = f.per_row ? r : 0;
    fake_quantize_row((const T*)f.x + r * f.size, f.size, set1(f.scale[c]), set1(f.zero_point ? f.zero_point[c] : 0), f,
                      (T*)y + r * f.size);
  }
}

static void fake_quantize(const FakeRows& f, size_t begin, size_t end, void* y) {
  if (f.dtype == kFloat32) fake_quantize_as<float>(f, begin, end, y);
  else if (f.dtype == kBFloat16) fake_quantize_as<bf16>(f, begin, end, y);
  else fake_quantize_as<fp16>(f, begin, end, y);
}

// The derivatives of one element: by x, by scale and by offset.
struct FakeGradient {
  f32 inv_scale, zero_point, lo, hi;
  INLINE_MEMBER void operator()(f32 g, f32 x, f32& by_x, f32& by_scale, f32& by_offset) const {
    f32 v = x * inv_scale + zero_point;
    v = v == v ? v : zero_point;
    const f32 one = set1(1.0f), q = to_float(round(clamp(v, lo - one, hi + one)));
    const i32 inside = (q >= lo) & (q <= hi);
    by_x = inside ? g : f32{};
    by_offset = inside ? f32{} : g;
    by_scale = g * (inside ? q - v : clamp(q, lo, hi));
  }
};

constexpr int FAKE_SUMS = 16 / LANES;  // vectors of the sixteen sums

INLINE float fold(const f32* sums) {
  float s[16];
  for (int i = 0; i < FAKE_SUMS; ++i) store(s + i * LANES, sums[i]);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) s[i] += s[i + half];
  return s[0];
}

template <class T>
static void fake_backward_row(const T* g, const T* x, size_t n, const FakeGradient& gradient, T* by_x, float* by_scale,
                              float* by_offset) {
  f32 of_scale[FAKE_SUMS], of_offset[FAKE_SUMS];
  clear(of_scale);
  clear(of_offset);
  auto sixteen = [&](const T* grads, const T* values, T* to) INLINE_LAMBDA {
    unroll<FAKE_SUMS>([&](auto i) INLINE_LAMBDA {
      f32 by, scale, offset;
      gradient(load(grads + i * LANES), load(values + i * LANES), by, scale, offset);
      store(to + i * LANES, by);
      of_scale[i] = of_scale[i] + scale;
      of_offset[i] = of_offset[i] + offset;
    });
  };
  size_t i = 0;
  for (; i + 16 <= n; i += 16) sixteen(g + i, x + i, by_x + i);
  if (i < n) {  // zeros behind the row add zeros to the sums: their gradient is zero
    T grads[16], values[16], to[16];
    memset(grads, 0, sizeof grads), memcpy(grads, g + i, (n - i) * sizeof(T));
    memset(values, 0, sizeof values), memcpy(values, x + i, (n - i) * sizeof(T));
    sixteen(grads, values, to);
    memcpy(by_x + i, to, (n - i) * sizeof(T));
  }
  *by_scale = fold(of_scale);
  *by_offset = fold(of_offset);
}

template <class T>
static void fake_backward_as(const FakeRows& f, const void* g, size_t begin, size_t end, void* by_x, float* by_scale,
                             float* by_offset) {
  const f32 lo = set1((float)f.qmin), hi = set1((float)f.qmax);
  for (size_t r = begin; r < end; ++r) {
    const size_t c = f.per_row ? r : 0, at = r * f.size;
    const f32 scale = set1(f.scale[c]);
    const FakeGradient gradient{set1(1.0f) / scale, set1((float)(f.zero_point ? f.zero_point[c] : 0)), lo, hi};
    fake_backward_row((const T*)g + at, (const T*)f.x + at, f.size, gradient, (T*)by_x + at, by_scale + r,
                      by_offset + r);
  }
}

static void fake_quantize_backward(const FakeRows& f, const void* g, size_t begin, size_t end, void* by_x,
                                   float* by_scale, float* by_offset) {
  if (f.dtype == kFloat32) fake_backward_as<float>(f, g, begin, end, by_x, by_scale, by_offset);
  else if (f.dtype == kBFloat16) fake_backward_as<bf16>(f, g, begin, end, by_x, by_scale, by_offset);
  else fake_backward_as<fp16>(f, g, begin, end, by_x, by_scale, by_offset);
}

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
