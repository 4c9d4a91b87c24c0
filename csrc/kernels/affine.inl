// Affine quantization of a piece [begin, end) of a flat tensor seen as [outer, channels, inner]; contracts in
// kernels.h.
#pragma once

#include "kernels/kernels.h"
#include "simd/simd.h"

namespace pyqkern {
namespace PYQKERN_ISA {

constexpr size_t AHEAD = 2048;  // bytes: how far past the cache a stream is asked for

// The way from x to the code, of one channel or (with vectors loaded from arrays) of LANES channels.
template <bool FUSED> struct Quantizer {
  f32 inv_scale, zero_point, lo, hi;
  INLINE_MEMBER i32 operator()(f32 x) const {
    f32 v = FUSED ? fma(x, inv_scale, zero_point) : x * inv_scale + zero_point;
    v = v == v ? v : zero_point;
    return round(clamp(v, lo, hi));  // clamped first: rounding is monotone and the bounds are integers
  }
};

template <bool FUSED> INLINE Quantizer<FUSED> make_quantizer(f32 scale, i32 zero_point, int qtype) {
  return {set1(1.0f) / scale, to_float(zero_point), set1((float)qmin(qtype)), set1((float)qmax(qtype))};
}

// One channel, n elements behind each other.
template <class T, bool FUSED>
static void quantize_run(const T* x, size_t n, const Quantizer<FUSED>& quantizer, uint8_t* q, bool streamed) {
  size_t i = 0;
  const size_t block = 4 * LANES;
  if (streamed) {
    for (; i < n && (uintptr_t)(q + i) % block; ++i) {
      uint8_t code[LANES];
      store_bytes(code, quantizer(load_part(x + i, 1)));
      q[i] = code[0];
    }
  }
  for (; i + block <= n; i += block) {
    i32 v[4];
    for (int j = 0; j < 4; ++j) {
      if (streamed) __builtin_prefetch((const char*)(x + i + j * LANES) + AHEAD);
      v[j] = quantizer(load(x + i + j * LANES)) & 0xff;
    }
    bytes_t codes = narrow(v[0], v[1], v[2], v[3]);
    if (streamed) stream(q + i, codes);
    else memcpy(q + i, &codes, block);
  }
  for (; i < n; i += LANES) {
    size_t part = n - i < LANES ? n - i : LANES;
    uint8_t codes[LANES];
    store_bytes(codes, quantizer(load_part(x + i, part)));
    memcpy(q + i, codes, part);
  }
}

// n channels behind each other, one element each (inner = 1). inv_scale is 1/scale, made once for all rows.
template <class T>
static void quantize_across(const T* x, size_t n, const float* inv_scale, const int32_t* zero_point, int qtype,
                            uint8_t* q) {
  const size_t block = 4 * LANES;
  const f32 lo = set1((float)qmin(qtype)), hi = set1((float)qmax(qtype));
  size_t i = 0;
  auto code = [&](size_t j) {
    const f32 zero = zero_point ? to_float(load(zero_point + j)) : f32{};
    return Quantizer<false>{load(inv_scale + j), zero, lo, hi}(load(x + j)) & 0xff;
  };
  for (; i + block <= n; i += block) {
    bytes_t codes = narrow(code(i), code(i + LANES), code(i + 2 * LANES), code(i + 3 * LANES));
    memcpy(q + i, &codes, block);
  }
  for (; i < n; i += LANES) {
    const size_t part = n - i < LANES ? n - i : LANES;
    const f32 zero = zero_point ? to_float(load_part(zero_point + i, part)) : f32{};
    uint8_t codes[LANES];
    store_bytes(codes, Quantizer<false>{load_part(inv_scale + i, part), zero, lo, hi}(load_part(x + i, part)));
    memcpy(q + i, codes, part);
  }
}

// Walks [begin, end) run by run: across(i, channel, n) for n channels of one element, along(i, channel, n) for n
// elements of one channel.
template <class Along, class Across>
INLINE void walk(const Channels& c, size_t begin, size_t end, Along along, Across across) {
  for (size_t i = begin, n; i < end; i += n) {
    size_t run = i / c.inner, channel = run % c.channels;
    size_t rest = c.inner == 1 ? c.channels - channel : (run + 1) * c.inner - i;
    n = rest < end - i ? rest : end - i;
    if (c.inner == 1 && !c.per_tensor) across(i, channel, n);
    else along(i, channel, n);
  }
}

template <class T>
static void quantize_as(const T* x, const Channels& c, size_t begin, size_t end, uint8_t* q, int qtype, bool streamed) {
  walk(
      c, begin, end,
      [&](size_t i, size_t channel, size_t n) {
        i32 zero = set1(c.zero_point ? c.zero_point[channel] : 0);
        const f32 scale = set1(c.scale[channel]);
        if (c.per_tensor) quantize_run(x + i, n, make_quantizer<true>(scale, zero, qtype), q + i, streamed);
        else quantize_run(x + i, n, make_quantizer<false>(scale, zero, qtype), q + i, streamed);
      },
      [&](size_t i, size_t channel, size_t n) {
        quantize_across(x + i, n, c.inv_scale + channel, c.zero_point ? c.zero_point + channel : nullptr, qtype, q + i);
      });
  if (streamed) stream_end();
}

static void quantize(const void* x, int dtype, const Channels& c, size_t begin, size_t end, uint8_t* q, int qtype,
                     bool streamed) {
  if (dtype == kFloat32) quantize_as((const float*)x, c, begin, end, q, qtype, streamed);
  else if (dtype == kBFloat16) quantize_as((const bf16*)x, c, begin, end, q, qtype, streamed);
  else quantize_as((const fp16*)x, c, begin, end, q, qtype, streamed);
}

// scale and zero point are those of one channel, or with ACROSS one to an element.
template <bool ACROSS, class Q, class T>
static void dequantize_run(const Q* q, size_t n, const float* scale, const int32_t* zero_point, T* y, bool streamed) {
  f32 s = set1(scale[0]);
  i32 zero = set1(zero_point ? zero_point[0] : 0);
  size_t i = 0;
  auto piece = [&](size_t part) {  // fewer than LANES elements
    if (ACROSS) {
      s = load_part(scale + i, part);
      zero = zero_point ? load_part(zero_point + i, part) : i32{};
    }
    Q codes[LANES] = {};
    memcpy(codes, q + i, part);
    store_part(y + i, s * to_float(load_bytes(codes) - zero), part);
    i += part;
  };
  if (streamed && (uintptr_t)y % sizeof(T) == 0)
    while (i < n && (uintptr_t)(y + i) % sizeof(f32)) piece(1);
  for (; i + LANES <= n; i += LANES) {
    if (ACROSS) {
      s = load(scale + i);
      zero = zero_point ? load(zero_point + i) : i32{};
    }
    if (streamed) __builtin_prefetch(q + i + AHEAD);
    const f32 v = s * to_float(load_bytes(q + i) - zero);
    if (streamed) stream(y + i, v);
    else store(y + i, v);
  }
  if (i < n) piece(n - i);
}

template <class Q, class T>
static void dequantize_as(const Q* q, const Channels& c, size_t begin, size_t end, T* y, bool streamed) {
  walk(
      c, begin, end,
      [&](size_t i, size_t channel, size_t n) {
        dequantize_run<false>(q + i, n, c.scale + channel, c.zero_point ? c.zero_point + channel : nullptr, y + i,
                              streamed);
      },
      [&](size_t i, size_t channel, size_t n) {
        dequantize_run<true>(q + i, n, c.scale + channel, c.zero_point ? c.zero_point + channel : nullptr, y + i,
                             streamed);
      });
  if (streamed) stream_end();
}

template <class Q>
static void dequantize_from(const Q* q, const Channels& c, size_t begin, size_t end, void* y, int dtype,
                            bool streamed) {
  if (dtype == kFloat32) dequantize_as(q, c, begin, end, (float*)y, streamed);
  else if (dtype == kBFloat16) dequantize_as(q, c, begin, end, (bf16*)y, streamed);
  else dequantize_as(q, c, begin, end, (fp16*)y, streamed);
}

static void dequantize(const uint8_t* q, int qtype, const Channels& c, size_t begin, size_t end, void* y, int dtype,
                       bool streamed) {
  if (qtype == kInt8 || qtype == kInt4) dequantize_from((const int8_t*)q, c, begin, end, y, dtype, streamed);
  else dequantize_from(q, c, begin, end, y, dtype, streamed);
}

// Running least and greatest value; `bad` turns NaN with the first NaN or infinity.
struct Range {
  f32 lo = set1(__builtin_inff()), hi = set1(-__builtin_inff()), bad = f32{};
  INLINE_MEMBER void add(f32 v) {
    lo = min(v, lo);
    hi = max(v, hi);
    bad = nan_if_not_finite(v, bad);
  }
};

// The least and greatest of n elements; NaN in both where one is NaN or infinite.
template <class T> INLINE void range_of(const T* x, size_t n, float* lo, float* hi) {
  Range r[4];
  size_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES)
    for (int j = 0; j < 4; ++j) r[j].add(load(x + i + j * LANES));
  for (; i + LANES <= n; i += LANES) r[0].add(load(x + i));
  if (i < n) {  // the rest, padded with its own first element, so that the padding changes nothing
    T rest[LANES];
    for (size_t j = 0; j < LANES; ++j) rest[j] = x[i + (j < n - i ? j : 0)];
    r[0].add(load(rest));
  }
  f32 bad = (r[0].bad + r[1].bad) + (r[2].bad + r[3].bad);
  float nan = reduce_max(bad == bad ? f32{} : set1(1.0f)) > 0 ? __builtin_nanf("") : 0.0f;
  *lo = reduce_min(min(min(r[0].lo, r[1].lo), min(r[2].lo, r[3].lo))) + nan;
  *hi = reduce_max(max(max(r[0].hi, r[1].hi), max(r[2].hi, r[3].hi))) + nan;
}

template <class T>
static void min_max_as(const T* x, size_t outer, size_t channels, size_t inner, size_t begin, size_t end, float* lo,
                       float* hi) {
  for (size_t c = begin; c < end; ++c) {
    lo[c] = __builtin_inff();
    hi[c] = -__builtin_inff();
  }
  for (size_t o = 0; o < outer; ++o) {
    if (inner == 1) {  // channels behind each other: LANES of them at a time
      for (size_t c = begin; c < end; c += LANES) {
        size_t part = end - c < LANES ? end - c : LANES;
        f32 v = load_part(x + o * channels + c, part), nan = v * 0.0f;
        store_part(lo + c, min(v, load_part(lo + c, part)) + nan, part);
        store_part(hi + c, max(v, load_part(hi + c, part)) + nan, part);
      }
    } else {
      for (size_t c = begin; c < end; ++c) {
        float least, greatest;
        range_of(x + (o * channels + c) * inner, inner, &least, &greatest);
        lo[c] = least < lo[c] || least != least ? least : lo[c];
        hi[c] = greatest > hi[c] || greatest != greatest ? greatest : hi[c];
      }
    }
  }
}

static void min_max(const void* x, int dtype, size_t outer, size_t channels, size_t inner, size_t begin, size_t end,
                    float* lo, float* hi) {
  if (dtype == kFloat32) min_max_as((const float*)x, outer, channels, inner, begin, end, lo, hi);
  else if (dtype == kBFloat16) min_max_as((const bf16*)x, outer, channels, inner, begin, end, lo, hi);
  else min_max_as((const fp16*)x, outer, channels, inner, begin, end, lo, hi);
}

template <class T> static void widen_as(const T* x, size_t n, float* y) {
  size_t i = 0;
  for (; i + LANES <= n; i += LANES) store(y + i, load(x + i));
  if (i < n) store_part(y + i, load_part(x + i, n - i), n - i);
}

static void widen(const void* x, int dtype, size_t n, float* y) {
  if (dtype == kFloat32) memcpy(y, x, n * sizeof(float));
  else if (dtype == kBFloat16) widen_as((const bf16*)x, n, y);
  else widen_as((const fp16*)x, n, y);
}

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
