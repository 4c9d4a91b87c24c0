// exp, erf and the activations, as one sequence of operations on every ISA; fma where it says fma.
// Coefficients: minimax fits of this project (weighted least squares, Lawson), rounded to fp32.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace pyqkern {
namespace PYQKERN_ISA {

// e^x for x in [-87.3, 88.7], clamped there; <= 1 ulp. NaN gives NaN.
INLINE f32 exp(f32 x) {
  x = min(set1(88.72283f), max(set1(-87.33654f), x));  // this order of operands lets NaN through
  const i32 n = round(x * 1.44269504f);
  const f32 nf = to_float(n);
  f32 r = fma(nf, set1(-0.693145752f), x);  // ln 2 in two parts, the first with trailing zeros
  r = fma(nf, set1(-1.42860677e-6f), r);
  f32 p = fma(r, set1(0.0013950557f), set1(0.0083689289f));
  p = fma(p, r, set1(0.041666205f));
  p = fma(p, r, set1(0.16666519f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r * r, r) + 1.0f;
  // 2^n in two steps, so that n = 128 does not overflow on the way
  const i32 half = n >> 1;
  p = p * as_f32((half + 127) << 23);
  return p * as_f32((n - half + 127) << 23);
}

// erf(x): a polynomial up to |x| = 1, beyond it 1 - exp(polynomial of |x|); <= 2 ulp. NaN gives NaN.
INLINE f32 erf(f32 x) {
  const f32 a = as_f32(as_i32(x) & 0x7fffffff), s = x * x;
  f32 near = fma(s, set1(7.853858e-05f), set1(-0.00080101925f));
  near = fma(near, s, set1(0.0051883277f));
  near = fma(near, s, set1(-0.026853811f));
  near = fma(near, s, set1(0.11283585f));
  near = fma(near, s, set1(-0.37612626f));
  near = fma(near, s, set1(0.12837917f));
  near = fma(near, x, x);
  const f32 t = min(set1(4.0f), a);  // erf(4) rounds to 1; NaN passes
  f32 far = fma(t, set1(0.00018797255f), set1(-0.002964014f));
  far = fma(far, t, set1(0.021906508f));
  far = fma(far, t, set1(-0.10325627f));
  far = fma(far, t, set1(-0.6379649f));
  far = fma(far, t, set1(-1.1272023f));
  far = fma(far, t, set1(-0.00031245977f));
  far = 1.0f - exp(far);
  far = as_f32(as_i32(far) | (as_i32(x) & (int32_t)0x80000000));
  return a < 1.0f ? near : far;
}

// The tail's activation. ReLU and both GELUs keep NaN.
template <int ACTIVATION> INLINE f32 activate(f32 v) {
  if (ACTIVATION == kRelu) return max(f32{}, v);
  if (ACTIVATION == kGelu) return (v * 0.5f) * (erf(v * 0.70710678f) + 1.0f);
  if (ACTIVATION == kGeluTanh) {  // 0.5 * (1 + tanh(u)) = 1 / (1 + exp(-2u))
    const f32 u = v * fma(v * v, set1(0.044715f * 0.79788456f), set1(0.79788456f));
    return v / (exp(u * -2.0f) + 1.0f);
  }
  return v;
}

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
