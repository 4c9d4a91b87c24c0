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

// erf(a) / a below 1, erf(a) from there to 4, on sixteen intervals of 1/4: polynomials in a less the interval's middle, the
// highest power first. The last one's constant term is 1, so that erf(4) is.
alignas(64) static const float kErfTable[6][16] = {
    {-0.0194441956f, -0.0462021083f, -0.0464203209f, -0.0255043153f, -0.0610670969f, -0.0306805745f, -0.00233663386f, 0.0113077424f,
     0.0124371229f, 0.00836111419f, 0.00423907256f, 0.00172977254f, 0.000585307134f, 0.000166982238f, 4.05842729e-05f, 8.46234252e-06f},
    {0.106054433f, 0.0626983494f, 0.0019803436f, -0.0444001406f, 0.0283349585f, -0.0299829375f, -0.0493812673f, -0.0421631224f,
     -0.0264028795f, -0.013205938f, -0.00546693569f, -0.00190853688f, -0.000568222022f, -0.000145342725f, -3.2103595e-05f, -6.14643568e-06f},
    {0.0553772375f, 0.142984897f, 0.17534402f, 0.151600838f, 0.162450403f, 0.157938719f, 0.114842586f, 0.0674425364f,
     0.0330379456f, 0.013730499f, 0.00489023002f, 0.0015023828f, 0.000399942306f, 9.25531422e-05f, 1.86645193e-05f, 3.28612987e-06f},
    {-0.365642309f, -0.288495272f, -0.16526486f, -0.0397309475f, -0.35806033f, -0.234247714f, -0.130769402f, -0.0628989935f,
     -0.0262239985f, -0.00951495953f, -0.00301286392f, -0.000834249309f, -0.000202308409f, -4.30168402e-05f, -8.02721661e-06f, -1.3155535e-06f},
    {-0.0931549445f, -0.259446084f, -0.373897403f, -0.424389422f, 0.318273962f, 0.170359775f, 0.0804722533f, 0.0335458256f,
     0.0123408195f, 0.004006478f, 0.00114787556f, 0.000290228665f, 6.47588749e-05f, 1.27518142e-05f, 2.21594314e-06f, 3.39828205e-07f},
    {1.12252963f, 1.07764506f, 0.997185409f, 0.896085799f, 0.888388216f, 0.948170066f, 0.978443742f, 0.99199003f,
     0.997345984f, 0.999217033f, 0.999794602f, 0.999952137f, 0.999990106f, 0.999998212f, 0.999999702f, 1.f}
};

// erf(x); from |x| = 4 on it is that of 4, which rounds to 1; <= 2 ulp. NaN gives NaN.
INLINE f32 erf(f32 x) {
  const f32 a = min(set1(3.99999976f), as_f32(as_i32(x) & 0x7fffffff));  // this order of operands lets NaN through
  const i32 interval = round(fma(a, set1(4.0f), set1(-0.5f)));
  const f32 t = fma(to_float(interval), set1(-0.25f), a - 0.125f);
  f32 p = lookup(load_table(kErfTable[0]), interval, 0);
  for (int i = 1; i < 6; ++i) p = fma(p, t, lookup(load_table(kErfTable[i]), interval, 0));
  p = min(set1(1.0f), a) * p;  // never above 1: the test goes through every argument
  return as_f32(as_i32(p) | (as_i32(x) & (int32_t)0x80000000));
}

// The tail's activation. ReLU and both GELUs keep NaN.
template <int ACTIVATION> INLINE f32 activate(f32 v) {
  if (ACTIVATION == kRelu) return max(f32{}, v);
  if (ACTIVATION == kGelu) {
    const f32 half = v * 0.5f;
    return fma(half, erf(v * 0.70710678f), half);
  }
  if (ACTIVATION == kGeluTanh) {  // 0.5 * (1 + tanh(u)) = 1 / (1 + exp(-2u))
    const f32 u = v * fma(v * v, set1(0.044715f * 0.79788456f), set1(0.79788456f));
    return v / (exp(u * -2.0f) + 1.0f);
  }
  return v;
}

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
