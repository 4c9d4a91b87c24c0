// The operations on whole tensors: affine.cpp, fake_quantize.cpp, int8.cpp, weight_only.cpp, four_bit.cpp, gradient.cpp,
// embedding.cpp, encoder.cpp, decoder.cpp, recurrent.cpp, gate.cpp and optimizer.cpp cut them into pieces for the kernels
// and the threads. Each reads kernels() once, so that a call does not mix two ISAs.
// Pointers are to contiguous row-major data; the caller has checked shapes and types. Formulas: kernels/kernels.h.
#pragma once

#include "kernels/kernels.h"

namespace pyqkern {

void quantize(const void* x, int dtype, size_t outer, Channels c, uint8_t* q, int qtype);
void dequantize(const uint8_t* q, int qtype, size_t outer, Channels c, void* y, int dtype);
void min_max(const void* x, int dtype, size_t outer, size_t channels, size_t inner, float* lo, float* hi);

// y, by_x: tensors like x; by_scale, by_offset fp32 [rows].
void fake_quantize(const FakeRows& f, void* y);
void fake_quantize_backward(const FakeRows& f, const void* g, void* by_x, float* by_scale, float* by_offset);

// A bias [n] in fp32: as it is, or widened into a buffer of this thread until the next call. nullptr stays nullptr.
const float* widened(const Kernels& k, const void* bias, int dtype, size_t n);

// w int8 [N, K] to and from its panels, marked for codes of 7 bits, and, where there is room for it, its excess.
void int8_pack(const int8_t* w, size_t N, size_t K, const Packed& packed);
void int8_unpack(const Packed& packed, size_t N, size_t K, int8_t* w);

// Writes the excess of a packed panel (kernels.h) to excess_bytes(K) bytes, and returns how many pairs of lines it is of.
size_t split_panel(const int8_t* panel, size_t K, uint8_t* excess);

// y int32 [M, N] = a [M, K] (int8 or uint8) times the transpose of w int8 [N, K].
void int8_matmul(const uint8_t* a, bool is_unsigned, const int8_t* w, size_t M, size_t N, size_t K, int32_t* y);

// y [M, N] = the INT8 linear of x [M, K], both of `dtype`; bias [N] of bias_dtype or nullptr. x_scale, x_zero: one
// scale and zero point for all of x; nullptr: every row its own. bits: of the codes, 8 or 7; symmetric ones have 8.
void int8_linear(const void* x, int dtype, const Packed& w, const float* w_scale, const void* bias, int bias_dtype,
                 size_t M, size_t N, size_t K, void* y, int activation, bool symmetric, int bits, const float* x_scale,
                 const int32_t* x_zero);

// y [M, N] = (x [M, K] in fp32 times the transpose of w's codes) * w_scale [N] + bias: weight_only.inl. x and y of `dtype`.
void int8_linear_weight_only(const void* x, int dtype, const Packed& w, const float* w_scale, const void* bias,
                             int bias_dtype, size_t M, size_t N, size_t K, void* y);

// Scales of blocks: fp32, or, with `nested`, codes of an 8-bit map in blocks of kNestedBlock of their own:
// map[absmax[b]] * nested[b / kNestedBlock] + offset, b counted along the flat weight.
constexpr size_t kNestedBlock = 256;
struct Scales {
  const void* absmax;
  const float* nested;  // or nullptr
  const float* map;     // [256]
  float offset;
};

// A 4-bit weight [N, K]. Where in_panels says so, packed and scales are in the order of kernels.h; elsewhere flat, in
// the order of four_bit_quantize.
struct Weight4Bit {
  const uint8_t* packed;
  Scales scales;
  size_t N, K, blocksize;
  const Codebook* book;
};
bool in_panels(size_t N, size_t K, size_t blocksize);

// One linear of an encoder or decoder layer or of a recurrent one: an INT8 weight [N, K] as int8_pack makes it with one scale per
// row, or, where packed.panels is nullptr, one of 4 bits (in panels but for a recurrent layer); bias [N] of bias_dtype or nullptr.
struct EncoderLinear {
  Packed packed;
  const float* scale;
  const void* bias;
  int bias_dtype;
  size_t N, K;
  Weight4Bit four;
};

// A post-LayerNorm encoder layer: h = norm(x + output(attention)), y = norm(h + down(activation(up(h)))).
struct EncoderLayer {
  EncoderLinear query, key, value, output, up, down;
  const void* norm[4];  // weight and bias [hidden size] behind the attention, and behind the feed-forward
  int norm_dtype;
  float eps[2];
  size_t heads, head_size;
  float scaling;  // of the scores
  int activation;
  bool symmetric;  // how activations are quantized; for 4 bits always
  int bits;        // of the codes of activations, 8 or 7; attention's have 8
  // fp32 [hidden size] or nullptr: what x is multiplied by on its way into query, key and value, and h into up. The
  // residuals are not.
  const float *input_factor, *up_factor;
};

// An attention mask [batch, heads, length, keys]: true where a key is seen, or fp32 added to the scores. Strides in
// elements, 0 where a dimension is broadcast; keys are contiguous. data = nullptr: everyone sees everyone.
struct Mask {
  const void* data;
  bool is_bool;
  size_t heads, batch_stride, head_stride, query_stride;
};

// y [batch, length, hidden size] of x, both of `dtype`; NaN in the mask throws std::invalid_argument. Tokens that are
// padding, which no query sees, cost nothing, and are zeros in y. bias: fp32, added to the scores beside the mask; a
// query that NaN is added to gives NaN.
void encoder_layer(const void* x, int dtype, size_t batch, size_t length, const Mask& mask, const Mask& bias,
                   const EncoderLayer& layer, void* y);

// A decoder layer: h = x + output(attention(norm(x))), y = h + down(activation(gate(norm(h))) * up(norm(h))).
struct DecoderLayer {
  EncoderLinear inputs[3];  // query, key and value; or one with the rows of all
  size_t input_count;
  bool interleaved;  // the rows of the one: of each head its query, key and value; else all queries, keys, values
  EncoderLinear output;
  EncoderLinear wide[2];  // gate and up; or one with the rows of both, or up alone
  size_t wide_count;
  bool gated;
  EncoderLinear down;
  const void* norm[4];  // weight and bias [hidden size] before attention, and before the feed-forward; no bias: RMSNorm
  int norm_dtype;
  const void* head_norm[2];  // weights [head size] of RMSNorm of queries and of keys, or nullptr
  int head_norm_dtype;
  float norm_offset, eps, scaling;
  size_t heads, kv_heads, head_size, hidden, intermediate;
  int activation;  // Elementwise
  bool symmetric;  // as for the encoder
  int bits;
  bool in_float;  // the rows of linears are not quantized
  size_t window;  // how many keys a query sees without a mask; 0: all before it
};

// keys or values [batch, kv_heads, capacity, head_size] of dtype; strides in elements, those of a head are contiguous.
struct Cache {
  void* data;
  size_t batch_stride, head_stride, row_stride;
};
struct Caches {
  Cache keys, values;
  int dtype;
  size_t past;  // rows before those of x
};

// cos and sin [batch, length, dims] of dtype, or nullptr; contiguous, batch_stride 0 where they are one for all.
struct Rotary {
  const void *cos, *sin;
  int dtype;
  size_t dims, batch_stride;
};

// y [batch, length, hidden size] of x, both of `dtype`; rows [past, past + length) of the caches are written. A mask
// says who sees whom among the first past + length keys; without one it is causal. bias as for the encoder.
void decoder_layer(const void* x, int dtype, size_t batch, size_t length, const Caches& caches, const Mask& mask,
                   const Mask& bias, const Rotary& rotary, const DecoderLayer& layer, void* y);

// One direction of a recurrent layer: the linears of its input and of its hidden state, to gates_of(cell) gates, and,
// where projection.N is not 0, that of the new hidden state, to fewer features. Biases are fp32 or nullptr.
struct RecurrentLayer {
  EncoderLinear input, hidden, projection;
  int cell;  // Cell
  bool reverse, symmetric;
  int bits;      // of the codes of activations, 8 or 7
  bool as_int8;  // for 4 bits: the rows are quantized, and the products integers, if the weight is in panels
};

// x [rows, input.K] holds a step's rows behind the other's: batch_sizes[t] of them, descending, rows the same sequence.
// h [batch, hidden.K] and, of an LSTM, c [batch, hidden size]: the states before, and in the end those after the last
// step of each sequence. y [rows, hidden.K].
void recurrent(const float* x, const int64_t* batch_sizes, size_t steps, const RecurrentLayer& layer, float* h,
               float* c, float* y);

// y [M, N] = f(h[:, :N]) * h[:, N:] for h [M, 2 * N], the gate of a feed-forward; function: Elementwise.
void gate(const float* h, size_t M, size_t N, int function, float* y);

// One step for every parameter.
void optimizer_step(const Step& step, const Trained* trained, size_t count);

// The sum of (scale * x)^2 over all x [n], in pieces of kSquares elements; see Kernels::square_sum.
constexpr size_t kSquares = 1 << 16;
struct Squared {
  const void* x;
  int dtype;
  size_t n;
};
double square_sum(const Squared* tensors, size_t count, float scale);

// x [n] to and from codes, two to a byte; blocksize is a power of two from 32 to 4096.
void four_bit_quantize(const void* x, int dtype, size_t n, size_t blocksize, const Codebook& book, uint8_t* packed,
                       float* absmax);
void four_bit_dequantize(const uint8_t* packed, const Scales& scales, size_t blocksize, const Codebook& book, size_t n,
                         void* y, int dtype);

// The flat codes [N * K / 2] to and from panels; rows past N are filled with zeros.
void four_bit_pack(const uint8_t* flat, size_t N, size_t K, uint8_t* packed);
void four_bit_unpack(const uint8_t* packed, size_t N, size_t K, uint8_t* flat);

// y [M, K] = g [M, N] times the weight [N, K] in fp32, both of `dtype`: gradient.inl.
void int8_grad_input(const void* g, int dtype, const Packed& w, const float* w_scale, size_t M, size_t N, size_t K,
                     void* y);
void four_bit_grad_input(const void* g, int dtype, const Weight4Bit& w, size_t M, void* y);

// The fp32 scale of block `at` of the flat weight, `stored` in the order of panels.
float scale_at(const Scales& s, size_t stored, size_t block);

// The scales of a flat weight in fp32: as they lie in it, or computed until the next call.
const float* flat_scales(const Weight4Bit& w);

// y [M, N] = the 4-bit linear of x [M, K], both of `dtype`; with as_int8 the rows are quantized and the products
// integers, if the weight is in panels.
void four_bit_linear(const void* x, int dtype, const Weight4Bit& w, const void* bias, int bias_dtype, size_t M, void* y,
                     bool as_int8);

// y fp32 [rows, N] = activation(the 4-bit linear of rows that are quantized already, symmetric), for a weight in
// panels; has the bits of four_bit_linear with as_int8. Works on the calling thread alone.
void four_bit_rows(const Kernels& k, const QRows& q, size_t rows, const Weight4Bit& w, const float* bias,
                   int activation, float* y);

// Rows of a packed weight: out[m] = W[rows[m]], every rows[m] < N. K > 0. int8 [M, K]; 4-bit, for weights in panels,
// flat codes [M, K / 2] and scales [M, K / blocksize] of scale_bytes each; four_bit_dequantize_rows, for flat ones, y
// [M, K].
void int8_gather(const Packed& w, size_t K, const int64_t* rows, size_t M, int8_t* out);
void four_bit_gather(const uint8_t* packed, const uint8_t* scales, size_t scale_bytes, size_t N, size_t K,
                     size_t blocksize, const int64_t* rows, size_t M, uint8_t* codes, uint8_t* row_scales);
void four_bit_dequantize_rows(const uint8_t* packed, const float* absmax, size_t K, size_t blocksize,
                              const Codebook& book, const int64_t* rows, size_t M, void* y, int dtype);

}  // namespace pyqkern
