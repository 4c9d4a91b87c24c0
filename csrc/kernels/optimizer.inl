// One step of an optimizer whose moments are fp32, or codes of 8 bits of a dynamic map in blocks of kStateBlock; and
// the sum of squares of gradients. Contracts: kernels.h.
#pragma once

#include "kernels/affine.inl"

namespace pyqkern {
namespace PYQKERN_ISA {

// The numbers of a Step, in every lane.
struct StepNumbers {
  f32 scale, l2, decay, keep1, add1, keep2, add2, root, eps, size;
  bool has_l2;
  explicit StepNumbers(const Step& s)
      : scale(set1(s.scale)),
        l2(set1(s.l2)),
        decay(set1(s.decay)),
        keep1(set1(s.keep1)),
        add1(set1(s.add1)),
        keep2(set1(s.keep2)),
        add2(set1(s.add2)),
        root(set1(s.root)),
        eps(set1(s.eps)),
        size(set1(s.size)),
        has_l2(s.l2 != 0) {}
};

// p, m and v of LANES elements become those after the step.
template <int OPTIMIZER> INLINE void step_lanes(const StepNumbers& s, f32 g, f32& p, f32& m, f32& v) {
  g = s.scale * g;
  if (s.has_l2) g = fma(s.l2, p, g);
  if (OPTIMIZER == kAdam) {
    m = fma(s.add1, g, s.keep1 * m);
    v = fma(s.add2 * g, g, s.keep2 * v);
    p = fma(s.decay, p, (s.size * m) / fma(sqrt(v), s.root, s.eps));
  } else if (OPTIMIZER == kMomentum) {
    m = fma(s.add1, g, s.keep1 * m);
    p = fma(s.size, fma(s.keep2, m, s.add2 * g), p);
  } else {
    const f32 direction = fma(s.add1, g, s.keep1 * m);
    p = fma(s.decay, p, direction > f32{} ? s.size : direction < f32{} ? -s.size : f32{});
    m = fma(s.add2, g, s.keep2 * m);
  }
}

// ---- codes of the dynamic maps

// The lines of a DynamicMap for values and for codes, those of codes divided by the block's absmax.
INLINE f32 magnitude(f32 x) { return as_f32(as_i32(x) & 0x7fffffff); }

template <bool SIGNED> struct Decoder {
  table8 slope, offset;
  explicit Decoder(const DynamicMap& map) : slope(load_table8(map.slope)), offset(load_table8(map.offset)) {}
  INLINE_MEMBER void operator()(const uint8_t* codes, float absmax, float* values) const {
    for (size_t j = 0; j < kStateBlock; j += LANES) {
      const f32 x = to_float(load_bytes(codes + j) + set1(SIGNED ? -127 : 1));
      const i32 decade = (i32)((u32)as_i32(x) >> 23);
      f32 start = lookup(offset, decade);
      if (SIGNED) start = start * clamp(x, set1(-1.0f), set1(1.0f));
      store(values + j, fma(lookup(slope, decade), x, start) * set1(absmax));
    }
  }
};

template <bool SIGNED> struct Encoder {
  f32 slope[kDecades], start[kDecades], low;
  Encoder(const DynamicMap& map, float absmax) {
    const float unit = absmax > kLeastUnit ? absmax : kLeastUnit, inverse = 1.0f / unit;
    unroll<kDecades>([&](auto i) INLINE_LAMBDA {
      slope[i] = set1(map.code_slope[i] * inverse);
      start[i] = set1(map.code_offset[i]);
    });
    low = set1(map.low * unit);
  }
  // The lines of the largest decades suffice where no |x| is below `low`.
  template <bool ALL> INLINE_MEMBER i32 code(f32 x) const {
    const f32 a = SIGNED ? magnitude(x) : x;
    f32 u = fma(a, slope[kDecades - 1], start[kDecades - 1]);
    unroll<kDecades - 1 - (ALL ? 0 : kLowDecades)>([&](auto j) INLINE_LAMBDA {
      constexpr int i = kDecades - 2 - j;
      u = min(fma(a, slope[i], start[i]), u);
    });
    const i32 index = truncate(u), sign = as_i32(x) >> 31;
    return SIGNED ? ((index ^ sign) - sign) + 127 : index;
  }
  INLINE_MEMBER void operator()(const float* x, uint8_t* codes) const {
    for (size_t j = 0; j < kStateBlock; j += 4 * LANES) {
      const f32 v[4] = {load(x + j), load(x + j + LANES), load(x + j + 2 * LANES), load(x + j + 3 * LANES)};
      f32 a[4];
      for (int k = 0; k < 4; ++k) a[k] = SIGNED ? magnitude(v[k]) : v[k];
      const bytes_t all = any(min(min(a[0], a[1]), min(a[2], a[3])) < low)
                              ? narrow(code<true>(v[0]), code<true>(v[1]), code<true>(v[2]), code<true>(v[3]))
                              : narrow(code<false>(v[0]), code<false>(v[1]), code<false>(v[2]), code<false>(v[3]));
      memcpy(codes + j, &all, sizeof all);
    }
  }
};

// The moments of one block, as codes or as they are, and where the new ones go to.
struct Moments {
  uint8_t *codes1, *codes2;
  float *absmax1, *absmax2;  // of this block
  float *m, *v;              // fp32 [kStateBlock]: the moments themselves, or room for the new ones
};

// A pass for each: the way of one value through all of it is so long that the CPU would not have enough of them under way.
template <int OPTIMIZER, bool CODES, class T>
static void step_block(const Step& step, const StepNumbers& s, T* p, const float* g, const Moments& at) {
  constexpr bool SECOND = OPTIMIZER == kAdam;
  if (CODES) {
    Decoder<true>(step.maps[0])(at.codes1, *at.absmax1, at.m);
    if (SECOND) Decoder<false>(step.maps[1])(at.codes2, *at.absmax2, at.v);
  }
  f32 top1{}, top2{};
  for (size_t j = 0; j < kStateBlock; j += LANES) {
    f32 m = load(at.m + j), v{}, q = load(p + j);
    if (SECOND) v = load(at.v + j);
    step_lanes<OPTIMIZER>(s, load(g + j), q, m, v);
    store(p + j, q);
    store(at.m + j, m);
    if (SECOND) store(at.v + j, v);
    if (CODES) top1 = max(magnitude(m), top1), top2 = max(v, top2);
  }
  if (CODES) {
    *at.absmax1 = reduce_max(top1);
    if (SECOND) *at.absmax2 = reduce_max(top2);
    const Encoder<true> encode1(step.maps[0], *at.absmax1);
    if (SECOND) Encoder<false>(step.maps[1], *at.absmax2)(at.v, at.codes2);
    encode1(at.m, at.codes1);
  }
}

// The block's tail of n < kStateBlock elements, through copies that are filled up with zeros, or with the codes of zero.
template <int OPTIMIZER, bool CODES, class T>
static void step_tail(const Step& step, const StepNumbers& s, T* p, const float* g, const Moments& at, size_t n) {
  T p_copy[kStateBlock];
  float g_copy[kStateBlock], m_copy[kStateBlock], v_copy[kStateBlock];
  uint8_t codes1[kStateBlock], codes2[kStateBlock];
  Moments copy = {codes1, codes2, at.absmax1, at.absmax2, m_copy, v_copy};
  memset(p_copy, 0, sizeof p_copy), memcpy(p_copy, p, n * sizeof(T));
  memset(g_copy, 0, sizeof g_copy), memcpy(g_copy, g, n * sizeof(float));
  constexpr bool SECOND = OPTIMIZER == kAdam;
  if (CODES) {
    memset(codes1, 127, sizeof codes1), memcpy(codes1, at.codes1, n);
    if (SECOND) memset(codes2, 0, sizeof codes2), memcpy(codes2, at.codes2, n);
  } else {
    memset(m_copy, 0, sizeof m_copy), memcpy(m_copy, at.m, n * sizeof(float));
    if (SECOND) memset(v_copy, 0, sizeof v_copy), memcpy(v_copy, at.v, n * sizeof(float));
  }
  step_block<OPTIMIZER, CODES>(step, s, p_copy, g_copy, copy);
  memcpy(p, p_copy, n * sizeof(T));
  if (CODES) {
    memcpy(at.codes1, codes1, n);
    if (SECOND) memcpy(at.codes2, codes2, n);
  } else {
    memcpy(at.m, m_copy, n * sizeof(float));
    if (SECOND) memcpy(at.v, v_copy, n * sizeof(float));
  }
}

template <int OPTIMIZER, bool CODES, class T>
static void step_blocks(const Step& step, const Trained& t, size_t begin, size_t end) {
  const StepNumbers s(step);
  float wide[kStateBlock], m[kStateBlock], v[kStateBlock];
  for (size_t i = begin; i < end; i += kStateBlock) {
    const size_t n = end - i < kStateBlock ? end - i : kStateBlock, block = i / kStateBlock;
    const float* g = (const float*)t.g + i;
    if (t.g_dtype != kFloat32) {
      widen((const uint16_t*)t.g + i, t.g_dtype, n, wide);
      g = wide;
    }
    constexpr bool SECOND = OPTIMIZER == kAdam;
    Moments at = {};
    if (CODES) {
      at.codes1 = (uint8_t*)t.state1 + i, at.absmax1 = t.absmax1 + block, at.m = m, at.v = v;
      if (SECOND) at.codes2 = (uint8_t*)t.state2 + i, at.absmax2 = t.absmax2 + block;
    } else {
      at.m = (float*)t.state1 + i;
      if (SECOND) at.v = (float*)t.state2 + i;
    }
    if (n == kStateBlock) step_block<OPTIMIZER, CODES>(step, s, (T*)t.p + i, g, at);
    else step_tail<OPTIMIZER, CODES>(step, s, (T*)t.p + i, g, at, n);
  }
}

template <int OPTIMIZER, class T>
static void step_as(const Step& step, const Trained& t, size_t begin, size_t end) {
  (t.has_codes ? step_blocks<OPTIMIZER, true, T> : step_blocks<OPTIMIZER, false, T>)(step, t, begin, end);
}

template <int OPTIMIZER> static void step_of(const Step& step, const Trained& t, size_t begin, size_t end) {
  if (t.p_dtype == kFloat32) step_as<OPTIMIZER, float>(step, t, begin, end);
  else if (t.p_dtype == kBFloat16) step_as<OPTIMIZER, bf16>(step, t, begin, end);
  else step_as<OPTIMIZER, fp16>(step, t, begin, end);
}

static void optimizer_step(const Step& step, const Trained& t, size_t begin, size_t end) {
  if (step.optimizer == kAdam) step_of<kAdam>(step, t, begin, end);
  else if (step.optimizer == kMomentum) step_of<kMomentum>(step, t, begin, end);
  else step_of<kLion>(step, t, begin, end);
}

// ---- the sum of squares

constexpr int SUMS = 16 / LANES;  // vectors of the sixteen sums

// `top` becomes the greatest magnitude as an integer: that of NaN is greater than that of any number.
template <class T> INLINE void add_squares(const T* x, f32 scale, f32* sums, i32& top) {
  unroll<SUMS>([&](auto i) INLINE_LAMBDA {
    const f32 v = scale * load(x + i * LANES);
    sums[i] = fma(v, v, sums[i]);
    top = max(as_i32(magnitude(v)), top);
  });
}

template <class T> static double square_sum_as(const T* x, float scale, size_t n) {
  i32 top{};
  double sum = 0;
  for (size_t begin = 0; begin < n; begin += kStateBlock) {
    const size_t size = n - begin < kStateBlock ? n - begin : kStateBlock;
    f32 sums[SUMS];
    clear(sums);
    size_t j = 0;
    for (; j + 16 <= size; j += 16) add_squares(x + begin + j, set1(scale), sums, top);
    if (j < size) {
      T rest[16];
      memset(rest, 0, sizeof rest);
      memcpy(rest, x + begin + j, (size - j) * sizeof(T));
      add_squares(rest, set1(scale), sums, top);
    }
    float s[16];
    for (int i = 0; i < SUMS; ++i) store(s + i * LANES, sums[i]);
    for (int half = 8; half; half /= 2)
      for (int i = 0; i < half; ++i) s[i] += s[i + half];
    sum += s[0];
  }
  return any(top >= as_i32(set1(kLargestGradient))) ? (double)__builtin_nanf("") : sum;
}

static double square_sum(const void* x, int dtype, float scale, size_t n) {
  if (dtype == kFloat32) return square_sum_as((const float*)x, scale, n);
  return dtype == kBFloat16 ? square_sum_as((const bf16*)x, scale, n) : square_sum_as((const fp16*)x, scale, n);
}

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
