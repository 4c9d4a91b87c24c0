// What every ISA provides: one table of serial kernels, the same text (*.inl) compiled once per ISA.
//
// A kernel works on a piece of the problem and starts no threads; the files above this folder cut the problem into
// pieces. All kernels give the same bits on every ISA: integer sums are exact, and the float operations are one
// written-down sequence, in which an fma stands only where the text says fma (the build passes -ffp-contract=off).
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyqkern {

// Element types of the float side; the values are part of the binding's interface.
enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Element types of the quantized side: the range [qmin, qmax], stored one value to a byte.
enum Qtype : int { kInt8 = 0, kUInt8 = 1, kInt4 = 2, kUInt4 = 3 };

// Activations that the linear's tail can apply.
enum Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3 };

// Functions that Kernels::elementwise applies.
enum Elementwise : int {
  kExp = 0,
  kGeluValue = 1,
  kProbabilityCode = 2,
  kSigmoid = 3,
  kTanh = 4,
  kSilu = 5,
  kGeluTanhValue = 6,
  kReluValue = 7
};

// Recurrent cells; each has its number of gates.
enum Cell : int { kRnnTanh = 0, kRnnRelu = 1, kGru = 2, kLstm = 3 };
static inline size_t gates_of(int cell) { return cell == kLstm ? 4 : cell == kGru ? 3 : 1; }

static inline size_t dtype_size(int dtype) { return dtype == kFloat32 ? 4 : 2; }
static inline int qmin(int qtype) { return qtype == kInt8 ? -128 : qtype == kInt4 ? -8 : 0; }
static inline int qmax(int qtype) { return qtype == kInt8 ? 127 : qtype == kUInt8 ? 255 : qtype == kInt4 ? 7 : 15; }

// Instruction sets, each with the operating system's support for its registers. A table of kernels needs some of them.
enum CpuFeature : unsigned {
  kAvx2 = 1,        // AVX2, FMA and F16C
  kAvxVnni = 2,     // AVX-VNNI
  kAvx512 = 4,      // AVX-512 F, BW, DQ and VL
  kAvx512Vnni = 8,  // AVX512-VNNI
};

constexpr float kLog2E = 1.44269504f;
constexpr float kLeastNormal = 1.1754943508222875e-38f;
constexpr float kGreatest = 3.4028234663852886e38f;
constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23: added to |v| < 2^22, it leaves rint(v) in the lowest bits
constexpr size_t kMaxK = 66311;           // 255 * 127 * K < 2^31: longer sums of the INT8 product could overflow
// The same of plain matrices, whose weights may be -128: 255 * 128 * K and 128 * 128 * K.
constexpr size_t kMaxMatmulUnsigned = 65793, kMaxMatmulSigned = 131071;

// A tensor seen as [outer, channels, inner] in row-major order; channel c has scale[c] and zero_point[c].
// Per token and per group are outer = 1. Per tensor is channels = 1, and rounds once less (see Kernels::quantize).
struct Channels {
  size_t channels, inner;
  const float* scale;         // [channels]
  const float* inv_scale;     // [channels], 1 / scale: read where inner = 1, else nullptr
  const int32_t* zero_point;  // [channels], or nullptr: all zero
  bool per_tensor;
};

// x [rows, size] for fake quantization, with a scale and a zero point for each row, or, where per_row is not set, one for
// all rows. zero_point = nullptr: zero.
struct FakeRows {
  const void* x;
  int dtype;
  size_t rows, size;
  const float* scale;
  const int32_t* zero_point;
  bool per_row;
  int qmin, qmax;  // of the codes
};

// The packed weight of an INT8 linear, the same on every ISA: panels of 16 rows of W, int8
//   packed[panel][k/4][n%16][k%4] = W[n][k],  n = 16*panel + n%16,  zero outside [N, K],
// and behind each panel, as int32, its 16 column sums, sum_k W[n][k], and its 16 sums of pairs, sum_i W[n][2i]
// W[n][2i+1]; then the marks of int8_mark, one bit for two lines, bit i in byte i/8. So a panel is
// (ceil(K/4) + 2 + mark_lines(K)) * 64 bytes.
constexpr size_t kPanel = 16;
constexpr size_t kLine = 64;
constexpr size_t kGemvPanels = 4;  // panels that one row reads side by side
static inline size_t quads(size_t K) { return (K + 3) / 4; }
static inline size_t panels(size_t N) { return (N + kPanel - 1) / kPanel; }
static inline size_t mark_lines(size_t K) { return (quads(K) / 2 + 8 * kLine - 1) / (8 * kLine); }
static inline size_t panel_bytes(size_t K) { return (quads(K) + 2 + mark_lines(K)) * kLine; }

// A weight may be split for int8_split.inl, W = main + excess: behind all panels it then has the excess of each,
//   a line: uint32 pairs, how many pairs of lines are split, from the first on; for the first panel also uint8 pays,
//           whether enough of the weight is
//   uint8 fours[16][segments(K)]: for each column and kSegment k of it how many times four entries there are, some zero
//   uint8 k % kSegment [excess_capacity(K)], int8 value [excess_capacity(K)]: the entries, one behind the other
// filled up to whole lines. Only for K in [kSplitLeast, kSplitMost].
constexpr size_t kSegment = 256, kSplitLeast = 256, kSplitMost = 4096;
static inline size_t segments(size_t K) { return (K + kSegment - 1) / kSegment; }
// Of Gaussian weights 5 % at K = 384, and 3 % at 3072, are entries.
static constexpr size_t excess_capacity(size_t K) { return (K / 2 + 320) / 4 * 4; }
static inline size_t excess_bytes(size_t K) {
  if (K < kSplitLeast || K > kSplitMost) return 0;
  return (1 + (kPanel * segments(K) + 2 * excess_capacity(K) + kLine - 1) / kLine) * kLine;
}

// A packed weight [N, K].
struct Packed {
  int8_t* panels;
  int8_t* excess;  // or nullptr
  const int8_t* panel(size_t K, size_t i) const { return panels + i * panel_bytes(K); }
};
static inline bool pays_split(const Packed& w) { return w.excess && w.excess[sizeof(uint32_t)]; }

// The softmax takes this many scores at a time; it overwrites those past the last.
constexpr size_t kSoftmaxStep = 64;
static inline size_t softmax_width(size_t n) { return (n + kSoftmaxStep - 1) / kSoftmaxStep * kSoftmaxStep; }

// What is added to the scores of one query: each nullptr or of its n keys. A key is masked where seen is 0, or mask -1e4
// or less.
struct AddedLine {
  const float *bias, *mask;
  const uint8_t* seen;
};
constexpr float kMasked = -1e4f;

// What happens to a sum before it is stored.
struct Tail {
  const float* w_scale;  // [N]; nullptr: the exact int32 sums are stored
  const float* bias;     // [N] or nullptr
  int activation;        // Activation
  int dtype;             // Dtype of y
  void* y;               // [M, N], rows `ld` apart
  size_t N, ld;
};

// Rows of activations, quantized: what int8_quantize_rows fills and int8_gemm reads.
struct QRows {
  void* q;       // [rows, 4 * ceil(K/4)] of Kernels::row_element_bytes each, in the order that the ISA's product reads
  float* scale;  // [rows]
  int32_t* correction;  // [rows], what the ISA's product takes off its sums for a row (simd.h)
  int bits = 8;         // of the codes; 7: asymmetric codes in [0, 127], a form of their own where that is faster
  // [rows / kSplitRows][4 * ceil(K/4)][kSplitRows]: the codes once more, by column, column_bytes in
  // all. Given for the product with a split weight, for which q are plain bytes; else nullptr.
  uint8_t* columns = nullptr;
};
constexpr size_t kSplitRows = 32;
static inline size_t split_row_bytes(size_t K) { return 4 * quads(K); }
static inline size_t column_bytes(size_t rows, size_t row_bytes) {
  return (rows + kSplitRows - 1) / kSplitRows * kSplitRows * row_bytes + kSegment * kSplitRows;
}

// A 4-bit code: what its sixteen codes stand for, in units of a block's scale.
struct Codebook {
  float value[16];     // of code c
  float bound[15];     // the 15 midpoints between neighbouring values, ascending
  float order[16];     // the code of the i-th value in ascending order
  int8_t integer[16];  // of code c, for the product of integers: value * levels, rounded; within [-32, 32]
  float levels;
};
static_assert(sizeof(Codebook) == 208 && offsetof(Codebook, bound) == 64 && offsetof(Codebook, order) == 124 &&
                  offsetof(Codebook, integer) == 188 && offsetof(Codebook, levels) == 204,
              "Python fills a Codebook from bytes");

// The packed weight of a 4-bit linear whose rows are whole blocks, the same on every ISA. Sixteen rows of W make a
// panel and four panels a strip (the last one may have fewer). A line of 64 bytes holds 16 rows by 8 columns:
//   line[strip][k/8][panel][4 * (n%16) + k%4], its low four bits for k%8 < 4, its high four bits for the others;
// the scales lie beside it as scale[strip][k/blocksize][panel][n%16]. Rows past N are filled with zeros.
constexpr size_t kStrip = 64;     // columns of y, rows of W
constexpr size_t kStepMax = 128;  // a sum runs over at most so many k before it is scaled
static inline size_t step_of(size_t blocksize) { return blocksize < kStepMax ? blocksize : kStepMax; }

static inline size_t strips(size_t N) { return (N + kStrip - 1) / kStrip; }
static inline size_t panels_of(size_t N, size_t strip) {
  const size_t left = panels(N) - strip * (kStrip / kPanel);
  return left < kStrip / kPanel ? left : kStrip / kPanel;
}

// Rows that are multiplied in fp32 are cut into tiles of at most `most`, which differ by one row at most.
struct RowTile { size_t begin, rows; };
static inline size_t tiles_of(size_t rows, size_t most) { return (rows + most - 1) / most; }
static inline RowTile row_tile(size_t rows, size_t tiles, size_t i) {
  const size_t more = rows % tiles;
  return {i * (rows / tiles) + (i < more ? i : more), rows / tiles + (i < more)};
}

// A row of activations as the 4-bit product of integers takes it: for each fold of `quads` times four k a start of four
// bytes, and behind it the s8 codes. The weights are taken as unsigned, `offset` too large, and the start takes
// offset * (sum of the codes) off again: as one int32 where a fold, then a whole step, is summed in int32; as two int16
// where it is summed in int16 (short_sums).
struct Fold {
  size_t quads;
  int32_t offset;
  bool short_sums;
  size_t bytes(size_t k) const { return k / (4 * quads) * (4 + 4 * quads); }  // of k codes; k a multiple of 4 * quads
};

// Optimizers: the rule of Kernels::optimizer_step.
enum Optimizer : int { kAdam = 0, kMomentum = 1, kLion = 2 };

// A dynamic map of 8 bits: zero, seven decades [10^(i-7), 10^(i-6)] of 2^i intervals each (twice as many where there is
// no sign), and 1. A code stands for the middle of its interval.
//   value of code c: fma(slope[e], x, offset[e] * clamp(x, -1, 1)), x = c - 127, or without sign x = c + 1 and no clamp;
//     e the low three bits of the exponent of x as a float
//   code of x: u = the least of fma(|x|, code_slope[i] * (1 / max(absmax, 2^-100)), code_offset[i]) for i in [0, 7),
//     from the largest i on, truncated; 127 + u or 127 - u, or without sign u; saturated. Where |x| is at least
//     low * max(absmax, 2^-100) the first kLowDecades are not the least.
constexpr size_t kStateBlock = 256;
constexpr int kDecades = 7, kLowDecades = 3;
constexpr float kLeastUnit = 7.888609052210118e-31f;  // 2^-100: the steepest line stays finite
struct DynamicMap { float slope[8], offset[8], code_slope[kDecades], code_offset[kDecades], low; };
static_assert(sizeof(DynamicMap) == 31 * sizeof(float), "Python fills a DynamicMap from floats");

// The numbers of one step of an optimizer; g = scale * gradient, and fma(l2, p, g) where l2 is not 0.
//   kAdam      m = fma(add1, g, keep1 * m)   v = fma(add2 * g, g, keep2 * v)
//              p = fma(decay, p, (size * m) / fma(sqrt(v), root, eps))
//   kMomentum  m = fma(add1, g, keep1 * m)   p = fma(size, fma(keep2, m, add2 * g), p)
//   kLion      p = fma(decay, p, size * sign(fma(add1, g, keep1 * m)))   m = fma(add2, g, keep2 * m)
struct Step {
  int optimizer;
  float scale, l2, decay, keep1, add1, keep2, add2, root, eps, size;
  const DynamicMap* maps;  // of m, signed, and of v
};
constexpr int kStepNumbers = 10;

// A parameter of n elements, its gradient and its moments: uint8 codes with an fp32 absmax for each kStateBlock of them,
// or fp32. state2 and absmax2 are nullptr where there is no second moment.
struct Trained {
  void* p;
  const void* g;
  void *state1, *state2;
  float *absmax1, *absmax2;
  size_t n;
  int p_dtype, g_dtype;
  bool has_codes;
};

// Gradients of 2^59 and more are taken for infinite: the squares of a block could not be added.
constexpr float kLargestGradient = 576460752303423488.0f;

struct Kernels {
  const char* name;
  unsigned needs;                 // the instruction sets it is compiled for: CpuFeature, or-ed
  size_t row_element_bytes;       // 1: u8 codes; 2: i16 codes with the zero point already taken off
  size_t row_element_bytes_a7;    // the same of rows of 7 bits, at most as many
  size_t gemv_rows;               // int8_gemv takes up to this many rows
  size_t split_rows;              // rows from which a split weight is faster than a plain one; 0: never
  size_t dot_rows;                // int8_dot too; 0 where it does not pay
  size_t tile_rows, tile_panels;  // the tiles of float_gemm, at most
  bool short_sums;  // the 4-bit product of integers pays to be summed in int16 where a fold is long enough

  // q[i] = clamp(rint(t), qmin, qmax) for i in [begin, end) of the flat tensor, ties to even;
  //   t = fma(x[i], 1/scale, zero_point) per tensor, t = x[i] * (1/scale) + zero_point (two roundings) otherwise:
  // the two ways of torch.quantize_per_tensor and torch.quantize_per_channel. NaN gives the zero point. Stores bypass
  // the cache where `stream` is set.
  void (*quantize)(const void* x, int dtype, const Channels&, size_t begin, size_t end, uint8_t* q, int qtype,
                   bool stream);

  // y[i] = scale * (q[i] - zero_point), rounded once to dtype.
  void (*dequantize)(const uint8_t* q, int qtype, const Channels&, size_t begin, size_t end, void* y, int dtype,
                     bool stream);

  // lo[c], hi[c] = least and greatest of x[:, c, :] for c in [begin, end), x being [outer, channels, inner];
  // NaN in both if any element is NaN or infinite; +inf, -inf if there is no element.
  void (*min_max)(const void* x, int dtype, size_t outer, size_t channels, size_t inner, size_t begin, size_t end,
                  float* lo, float* hi);

  // y [rows, size] = scale * (q - zero_point) for the q of `quantize` with two roundings, rows [begin, end), rounded once to
  // dtype. NaN stays NaN, and a scale that is NaN makes its row NaN.
  void (*fake_quantize)(const FakeRows&, size_t begin, size_t end, void* y);

  // The backward pass of y = scale * q + offset, offset being scale * -zero_point, with v = x * (1/scale) + zero_point
  // and r = rint(v), where rounding counts as the identity (Esser et al., "Learned step size quantization", 2020;
  // Bhalgat et al., "LSQ+", 2020). g, by_x [rows, size] of dtype; by_scale, by_offset [rows] fp32.
  //   r within [qmin, qmax]   by_x = g   by_scale += g * (r - v)
  //   elsewhere               by_x = 0   by_scale += g * clamp(r, qmin, qmax)   by_offset += g
  // A row's terms are added into sixteen sums, i % 16, i ascending, which are added in halves. Where v is NaN it counts
  // as zero_point.
  void (*fake_quantize_backward)(const FakeRows&, const void* g, size_t begin, size_t end, void* by_x, float* by_scale,
                                 float* by_offset);

  // y = x in fp32.
  void (*widen)(const void* x, int dtype, size_t n, float* y);

  // Packs rows [16*panel, 16*panel + 16) of w [N, K]. Every value, -128 included.
  void (*int8_pack)(const int8_t* w, size_t N, size_t K, size_t panel, int8_t* packed_panel);

  // Marks the lines 2i and 2i + 1 of a packed panel where products with codes of 7 bits cannot be added in int16: where
  // in a column the positive or the negative ones of W[n][8i + {0, 1, 4, 5}] or of W[n][8i + {2, 3, 6, 7}] sum to more
  // than 258 (127 * 258 < 2^15). The product of rows of 7 bits reads the marks, that of 8 bits does not.
  void (*int8_mark)(size_t K, int8_t* packed_panel);

  // Quantizes `rows` rows of x, K elements each, `ldx` apart, each with its own scale and zero point (see int8.inl).
  // `symmetric` is of rows of 8 bits.
  void (*int8_quantize_rows)(const void* x, int dtype, size_t ldx, size_t rows, size_t K, bool symmetric, const QRows&);

  // The same with one given scale and zero point for all rows.
  void (*int8_quantize_rows_static)(const void* x, int dtype, size_t rows, size_t K, float scale, int32_t zero,
                                    const QRows&);

  // The same for rows that are integers already: int8 as u8 with zero = 128, or uint8 with zero = 0.
  void (*int8_load_rows)(const uint8_t* a, bool is_unsigned, size_t rows, size_t K, const QRows&);

  // y[m0 + m][n] = tail(sum_k q[m][k] * W[n][k] - zero[m] * sum_k W[n][k]) for m in [0, rows), n in panels [begin,
  // end). m0 is a multiple of kSplitRows where the rows have columns.
  void (*int8_gemm)(const QRows&, size_t m0, size_t rows, size_t K, const Packed&, size_t begin, size_t end,
                    const Tail&);

  // The same for few rows: reads the weight once, front to back, prefetching.
  void (*int8_gemv)(const QRows&, size_t m0, size_t rows, size_t K, const Packed&, size_t begin, size_t end,
                    const Tail&);

  // y[m][n] = sum_k q[m][k] * w[n][k] - zero[m] * sum_k w[n][k] for all rows and n in [begin, end), begin a multiple of
  // four; w [N, K] as it is, y [rows, N].
  void (*int8_dot)(const QRows&, size_t rows, size_t K, const int8_t* w, size_t N, size_t begin, size_t end,
                   int32_t* y);

  // Attention, see encoder.inl. Rows of scores [rows, n], `ld` >= softmax_width(n) apart and in units of log 2, to
  // codes in [0, 255] and 1 / (their sum). Writes up to 64 codes past the last row, and over the scores.
  void (*softmax_codes)(float* scores, size_t ld, size_t rows, size_t n, const QRows&);

  // Queries or keys [rows, heads * d], symmetric, one scale for each head of each row: row m of head h goes to place
  // h * tokens + m, its codes into `codes` [.., d] as int8 if that is given, else into QRows.
  void (*int8_quantize_heads)(const float* x, size_t rows, size_t heads, size_t d, size_t tokens, const QRows&,
                              int8_t* codes);

  // Values [tokens, d], `ld` apart, quantized per channel and packed as the weight [d, tokens] of the product.
  void (*int8_pack_values)(const float* v, size_t ld, size_t tokens, size_t d, float* scale, int8_t* packed);

  // y[i] = f(x[i]): the activations of experts, and the functions that the other kernels are made of, so that they can
  // be tested on their own.
  void (*elementwise)(int function, const float* x, size_t n, float* y);

  // y = LayerNorm(a + residual), rows of n behind each other, y of `dtype`; a is overwritten by the sum. residual may be
  // nullptr, and fp32 y may be residual.
  void (*add_layer_norm)(float* a, const float* residual, size_t rows, size_t n, const float* weight, const float* bias,
                         float eps, void* y, int dtype);

  // The same with RMSNorm, y = z * (1 / sqrt(mean(z^2) + eps)) * (weight + offset), in fp32.
  void (*add_rms_norm)(float* a, const float* residual, size_t rows, size_t n, const float* weight, float offset,
                       float eps, float* y);

  // y = a + b, or a where b is nullptr, rounded to dtype.
  void (*add_rows)(const float* a, const float* b, size_t n, void* y, int dtype);

  // Attention in fp32, see decoder.inl; d, and rows of queries, keys, values and context, are multiples of 16, filled up
  // with zeros. scores[r][j] = dot16(query[r], key[j]) * scaling for rows of queries d apart, keys ldk apart.
  void (*attention_scores)(const float* queries, size_t rows, const float* keys, size_t ldk, size_t count, size_t d,
                           float scaling, float* scores, size_t ld);

  // scores [n] of one query to p, 0 outside of [begin, end); returns 1 / (their sum), or 0 where that is 0. scores has
  // room for softmax_width(n).
  float (*attention_softmax)(float* scores, size_t n, size_t begin, size_t end, const AddedLine& added);

  // context[r] += p[r][j] * value[j] for each j in turn, rows of context d apart, values ldv apart; nothing where p is 0.
  void (*attention_values)(const float* p, size_t ld, size_t rows, const float* values, size_t ldv, size_t count,
                           size_t d, float* context);

  // One step of a recurrent layer (recurrent.inl), given the products of its input, x, and of its hidden state, both
  // [rows, gates_of(cell) * n] with their biases. h [rows, n] becomes the new hidden state, y is a copy of it unless
  // nullptr; c [rows, n] is the cell state of an LSTM.
  void (*recurrent_gates)(int cell, const float* x, const float* product, size_t rows, size_t n, float* h, float* c,
                          float* y);

  // One step for elements [begin, end), begin a multiple of kStateBlock. Codes are decoded, times absmax; the new
  // moments' absmax is the greatest |m| of a block. Gradients are finite.
  void (*optimizer_step)(const Step&, const Trained&, size_t begin, size_t end);

  // The sum of (scale * x)^2: for each kStateBlock sixteen sums in fp32, one for each i % 16, by fma from zero, added in
  // halves; the blocks' sums one after another in fp64. NaN where a scale * x is NaN, infinite or 2^59 and more.
  double (*square_sum)(const void* x, int dtype, float scale, size_t n);

  // Quantizes blocks [begin, end) of the flat x [n]: absmax[b], and codes packed two to a byte, high four bits first.
  // v = x * (1/absmax), clamped to [-1, 1]; a short last block divides instead, as bitsandbytes does, and stores an
  // absmax of at least 1e-38. The code is that of the nearest value, the lower one where both are as near.
  void (*four_bit_quantize)(const void* x, int dtype, size_t n, size_t blocksize, const Codebook&, size_t begin,
                            size_t end, uint8_t* packed, float* absmax);

  // y[i - begin] = value[code[i]] * absmax[i / blocksize] for i in [begin, end), rounded once to dtype; any begin.
  void (*four_bit_dequantize)(const uint8_t* packed, const float* absmax, size_t blocksize, const Codebook&,
                              size_t begin, size_t end, void* y, int dtype, bool stream);

  // The flat codes of K columns of the sixteen rows of one panel, whose lines are `stride` bytes apart: row n at flat +
  // n * ld.
  void (*four_bit_unpack_panel)(const uint8_t* packed, size_t stride, size_t K, uint8_t* flat, size_t ld);

  // total[m][n] = sum over steps of scale[step][n] * (sum over k of the step of x[m][k] * value[code[n][k]]), for up to
  // 4 rows and one strip of `panels` panels; every sum is one chain of fma, k ascending.
  void (*four_bit_gemv)(const float* x, size_t rows, size_t K, const uint8_t* packed, const float* scale,
                        size_t blocksize, size_t panels, const Codebook&, float* total);

  // Symmetric quantized rows as the products below take them; x [rows][fold.bytes(K)].
  void (*four_bit_load_rows)(const QRows&, size_t rows, size_t K, const Fold& fold, int8_t* x);

  // The same as four_bit_gemv of such rows, `ldx` bytes apart: the inner sum is an exact integer. One
  // row asks for the strip at `ahead` on the way, which may be any address.
  void (*four_bit_gemv_int8)(const int8_t* x, size_t ldx, size_t rows, size_t K, const Fold&, const uint8_t* packed,
                             const uint8_t* ahead, const float* scale, size_t blocksize, size_t panels, const Codebook&,
                             float* total);

  // total[m][j] = sum over k of x[m][k] * w[j][k] for j < 4; w [4, ldw], zero from K to the next multiple of 16.
  // Sixteen sums, one for each k % 16, by fma from zero in the order of k, then added in halves: 8 to 8, 4 to 4, 2 to
  // 2, 1 to 1.
  void (*four_bit_dot)(const float* x, size_t ldx, size_t rows, size_t K, const float* w, size_t ldw, float* total);

  // Columns of up to tile_panels panels of a strip, whose lines are `stride` bytes apart: [tile_panels][kStepMax][kPanel]
  // values, of which `size` <= kStepMax are written, zeros where there is no panel.
  void (*four_bit_expand)(const uint8_t* packed, size_t stride, size_t size, size_t panels, const Codebook&,
                          float* values);

  // Columns of one strip: integers + offset as [size/4][kStrip][4].
  void (*four_bit_expand_int8)(const uint8_t* packed, size_t size, size_t panels, const Codebook&, const Fold&,
                               uint8_t* integers);

  // For `steps` steps of `size` columns one after another, of four_bit_load_rows' rows: x points at the first of them,
  // integers as four_bit_expand_int8 makes them, scale [steps][kStrip].
  //   total[m][n] = fma(sum over k of x[m][k] * integer[k][n], scale[n], total[m][n]); the inner sum is exact.
  void (*four_bit_gemm_int8)(const int8_t* x, size_t ldx, size_t rows, size_t size, size_t steps, const Fold&,
                             const uint8_t* integers, const float* scale, float* total);

  // total[m][n] = sum over k of x[m][k] * W[n][k] for up to 4 rows of K, one behind the other, and `panels` panels of
  // int8_pack, at most a strip: one chain of fma from zero, k ascending.
  void (*int8_gemv_float)(const float* x, size_t rows, size_t K, const int8_t* packed, size_t panels, float* total);

  // The same as four_bit_expand of such panels, which are `stride` bytes apart. Writes all columns of the last quad.
  void (*int8_expand)(const int8_t* packed, size_t stride, size_t size, size_t panels, float* values);

  // Rows of a row_tile in fp32, column by column: tile [K][rows].
  void (*load_tile)(const void* x, int dtype, size_t K, size_t rows, float* tile);

  // Up to 16 rows of one panel of int8_pack, from quad `packed` on: values[n][j] = W[n][j] * scale[n] for the 4 * quads
  // columns j of at most 16, zeros for the others; [rows][kPanel].
  void (*int8_expand_rows)(const int8_t* packed, size_t quads, const float* scale, size_t rows, float* values);

  // The same of a 4-bit panel, whose lines are `stride` bytes apart, for sixteen columns of one block from line `packed`
  // on: values[n][j] = value[code] * scale[n].
  void (*four_bit_expand_rows)(const uint8_t* packed, size_t stride, const Codebook&, const float* scale, size_t rows,
                               float* values);

  // Rows of load_tile, tiles of [K][their rows] one behind the other, from column `at` on, times `steps` steps of `size`
  // columns as four_bit_expand and int8_expand make them. total [rows][kStrip]; with scale [steps][kStrip]:
  //   total[m][n] = fma(sum over k of a step of x[m][k] * values[k][n], scale[n], total[m][n]), as four_bit_gemv;
  // with scale = nullptr the chains of int8_gemv_float go on from total.
  void (*float_gemm)(const float* x, size_t K, size_t at, size_t rows, size_t size, size_t steps, const float* values,
                     size_t panels, const float* scale, float* total);

  // y[m][n] = activation((total[m][n] * row_scale[m]) * scale[n] + bias[n]) for n in [n0, n0 + columns); row_scale,
  // scale and bias may be nullptr.
  void (*finish_totals)(const float* total, const float* row_scale, const float* scale, const float* bias,
                        int activation, size_t rows, size_t n0, size_t columns, size_t N, void* y, int dtype);
};

// Bytes of one quantized row without columns.
static inline size_t row_bytes(const Kernels& k, size_t K, int bits = 8) {
  return 4 * quads(K) * (bits == 7 ? k.row_element_bytes_a7 : k.row_element_bytes);
}

// Whether `rows` rows are quantized for the split form of a weight.
static inline bool splits(const Kernels& k, size_t rows, const Packed& w, int bits) {
  return k.split_rows && rows >= k.split_rows && bits == 8 && pays_split(w);
}

// The tables that were built, best first.
extern const Kernels* const kBuilt[];
extern const size_t kBuiltCount;

// True where this CPU and operating system have all that the table needs.
bool supported(const Kernels&);

// The table in use. The first call reads the environment variable PYQKERN_ISA; throws std::invalid_argument where
// that names an ISA which is unknown or which this CPU lacks.
const Kernels& kernels();

// Switches to the named table and returns the previous name; throws std::invalid_argument as above.
const char* set_isa(const char* name);

}  // namespace pyqkern
