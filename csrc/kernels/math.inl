// exp and the activations, as one sequence of operations on every ISA; fma where it says fma.
// Coefficients: minimax fits of this project (weighted least squares, Lawson), rounded to fp32.
#pragma once

#include "kernels/kernels.h"
#include "simd/simd.h"

namespace pyqkern {
namespace PYQKERN_ISA {

// n = rint(x / ln 2), and e^(x - n ln 2) - 1, relative to which the error stays small as it goes to 0.
INLINE f32 exp_rest(f32 x, i32& n) {
  n = round(x * kLog2E);
  const f32 nf = to_float(n);
  f32 r = fma(nf, set1(-0.693145752f), x);  // ln 2 in two parts, the first with trailing zeros
  r = fma(nf, set1(-1.42860677e-6f), r);
  f32 p = fma(r, set1(0.0013950557f), set1(0.0083689289f));
  p = fma(p, r, set1(0.041666205f));
  p = fma(p, r, set1(0.16666519f));
  p = fma(p, r, set1(0.5f));
  return fma(p, r * r, r);
}

// e^x for x in [-87.3, 88.7], clamped there; <= 1 ulp. NaN gives NaN.
INLINE f32 exp(f32 x) {
  x = min(set1(88.72283f), max(set1(-87.33654f), x));  // this order of operands lets NaN through
  i32 n;
  f32 p = exp_rest(x, n) + 1.0f;
  // 2^n in two steps, so that n = 128 does not overflow on the way
  const i32 half = n >> 1;
  p = p * as_f32((half + 127) << 23);
  return p * as_f32((n - half + 127) << 23);
}

// 1 / (1 + e^-x); <= 3 ulp where x >= -87.3, and below 2^-126 from there on. NaN gives NaN.
INLINE f32 sigmoid(f32 x) { return set1(1.0f) / (exp(-x) + 1.0f); }

// tanh x = t / (t + 2), t = e^(2|x|) - 1, with the sign of x; <= 3 ulp. NaN gives NaN.
INLINE f32 tanh(f32 x) {
  const i32 sign = as_i32(x) & (int32_t)0x80000000;
  const f32 a = as_f32(as_i32(x) ^ sign);
  i32 n;
  const f32 p = exp_rest(min(set1(20.0f), a + a), n);  // 1 from there on; this order of operands lets NaN through
  const f32 power = as_f32((n + 127) << 23);
  const f32 t = fma(power, p, power - 1.0f);
  return as_f32(as_i32(t / (t + 2.0f)) | sign);
}

// E(a) = erf(a / sqrt 2) / 2 on sixteen intervals of 91/256 around the multiples of that: polynomials in a less the
// multiple, the highest power first. They err by 1.43 * 2^-24. The last one ends at 1/2, so that GELU is 0 or x from
// there on.
alignas(64) static const float kGeluTable[5][16] = {
    {0.00439242367f, 0.0158003848f, 0.0227285214f, 0.0186089948f, 0.00843164977f, -0.000894017634f, -0.00558234844f,
     -0.00594244758f, -0.00421607215f, -0.00231519481f, -0.00103644235f, -0.000387787411f, -0.000122991827f,
     -3.33634634e-05f, -7.78770573e-06f, 2.68174244e-05f},
    {-0.0671702698f, -0.0542551167f, -0.0255182963f, 0.00498007471f, 0.0244818907f, 0.0294217281f, 0.0242213104f,
     0.0156407878f, 0.00830907654f, 0.00371510279f, 0.00141607958f, 0.000463859004f, 0.000131281136f, 3.22246888e-05f,
     6.87955571e-06f, 3.52076609e-06f},
    {4.30231048e-05f, -0.0665625334f, -0.110140979f, -0.120462887f, -0.103211902f, -0.0730635002f, -0.0437586121f,
     -0.02245491f, -0.00994766038f, -0.00382300606f, -0.00127880566f, -0.000373203889f, -9.5188916e-05f,
     -2.12470313e-05f, -4.15456725e-06f, -1.3101868e-06f},
    {0.398941338f, 0.374515027f, 0.309853673f, 0.22592704f, 0.14517872f, 0.0822165683f, 0.0410332009f, 0.0180479903f,
     0.00699578878f, 0.00238976791f, 0.000719419273f, 0.000190858496f, 4.46209851e-05f, 9.19305148e-06f,
     1.66904192e-06f, 2.36713603e-07f},
    {2.38747e-09f, 0.138880774f, 0.261438519f, 0.356879979f, 0.422468722f, 0.462244153f, 0.483529955f, 0.493581891f,
     0.497770697f, 0.499311f, 0.499810785f, 0.499953896f, 0.499990046f, 0.499998093f, 0.499999672f, 0.49999994f}};

// 0.5 * x * (1 + erf(x / sqrt 2)) as x/2 + |x| * E(|x|); errs by 4 * 2^-24 * |x| at most.
INLINE f32 gelu(f32 x) {
  const f32 a = as_f32(as_i32(x) & 0x7fffffff);
  const f32 inside = min(set1(5.50976515f), a);                         // this order of operands lets NaN through
  const f32 shifted = fma(inside, set1(2.81318688f), set1(kRounding));  // the lowest bits are the interval
  const f32 t = fma(shifted - kRounding, set1(-0.35546875f), inside);
  f32 p = lookup(load_table(kGeluTable[0]), as_i32(shifted), 0);
  for (int i = 1; i < 5; ++i) p = fma(p, t, lookup(load_table(kGeluTable[i]), as_i32(shifted), 0));
  return fma(x, set1(0.5f), a * p);
}

// The tail's activation. ReLU and both GELUs keep NaN.
template <int ACTIVATION> INLINE f32 activate(f32 v) {
  if (ACTIVATION == kRelu) return max(f32{}, v);
  if (ACTIVATION == kGelu) return gelu(v);
  if (ACTIVATION == kGeluTanh) {  // 0.5 * (1 + tanh(u)) = 1 / (1 + exp(-2u))
    const f32 u = v * fma(v * v, set1(0.044715f * 0.79788456f), set1(0.79788456f));
    return v / (exp(u * -2.0f) + 1.0f);
  }
  return v;
}

INLINE f32 activate(int activation, f32 v) {
  return activation == kNone   ? v
         : activation == kRelu ? activate<kRelu>(v)
         : activation == kGelu ? activate<kGelu>(v)
                               : activate<kGeluTanh>(v);
}

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
