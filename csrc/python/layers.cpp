// Whole layers: encoder_layer, decoder_layer and recurrent, their parts checked.
#include <algorithm>

#include "python/tensors.h"

namespace pyqkern {
namespace {

using Objects = py::tuple;  // of tensors

void check_count(const char* name, const Objects& objects, size_t count) {
  if (objects.size() != count)
    throw py::value_error(std::string(name) + " must be " + std::to_string(count) + ", got " +
                          std::to_string(objects.size()));
}

// A mask or a position bias, or None: [batch or 1, heads or 1, length or 1, keys or capacity], keys beside each other.
Mask added(const char* name, const py::object& object, size_t batch, size_t heads, size_t length, size_t keys,
           size_t capacity) {
  if (object.is_none()) return {nullptr, false, 1, 0, 0, 0};
  const Tensor t(name, object, true, kTrusted);
  t.check_rank(4);
  const size_t whole[] = {batch, heads, length};
  size_t strides[3];
  for (int i = 0; i < 3; ++i) {
    if (t.size(i) != 1 && t.size(i) != whole[i]) t.fail_shape("[batch or 1, heads or 1, length or 1, keys]");
    strides[i] = t.size(i) == 1 || !t.strides ? 0 : static_cast<size_t>(t.strides[i]);
  }
  if ((t.size(3) != keys && t.size(3) != capacity) || (t.size(3) > 1 && t.strides && t.strides[3] != 1))
    t.fail_shape("of " + std::to_string(keys) + " keys beside each other");
  const bool is_bool = t.code == kDLBool && t.bits == 8;
  return {is_bool ? t.data : t.as<float>(), is_bool, t.size(1), strides[0], strides[1], strides[2]};
}

constexpr long kNoBook = -1;

// How all linears of the layer are stored; INT8 ones have no book, a blocksize of 0 and nothing nested.
struct Format {
  long book;
  size_t blocksize;
  const Objects& nested;
};

void check_format(long book, size_t blocksize, const Objects& nested, bool symmetric, int bits) {
  if (book == kNoBook && (blocksize || !nested.empty()))
    throw py::value_error("blocksize and nested must be 0 and empty for INT8 linears");
  if (book != kNoBook && (!symmetric || bits != 8))
    throw py::value_error("symmetric must be True, and bits 8, for 4-bit linears");
  if (book != kNoBook) check_blocksize(blocksize);
}

EncoderLinear linear(const Format& f, size_t i, py::handle packed, py::handle scale, py::handle bias, size_t N,
                     size_t K) {
  const Floats b = bias_of(bias.ptr(), N, kTrusted);
  if (f.book == kNoBook) {
    if (K > kMaxK) throw py::value_error("in_features must be at most " + std::to_string(kMaxK));
    return {packed_int8(packed.ptr(), N, K, kTrusted),
            Tensor("scale", scale, false, kTrusted).as<float>(N),
            b.data,
            b.dtype,
            N,
            K,
            {}};
  }
  auto nested = [&](size_t j) { return f.nested.empty() ? Py_None : f.nested[3 * i + j].ptr(); };
  const Weight4Bit four = weight_4bit(packed.ptr(), scale.ptr(), nested(0), nested(1), nested(2), N, K, f.blocksize,
                                      static_cast<size_t>(f.book), kTrusted);
  return {{}, nullptr, b.data, b.dtype, N, K, four};
}

void encoder_layer_call(py::handle x, const py::object& mask, const py::object& position_bias, const Objects& weights,
                        const Objects& scales, const Objects& biases, const Objects& nested, const Objects& norms,
                        const Objects& factors, size_t attention, size_t wide, size_t heads, float eps1, float eps2,
                        float scaling, int activation, bool symmetric, int bits, long book, size_t blocksize,
                        py::handle y) {
  check_count("weights", weights, 6);
  check_count("scales", scales, 6);
  check_count("biases", biases, 6);
  check_count("norms", norms, 4);
  check_count("nested", nested, nested.empty() ? 0 : 18);
  check_count("factors", factors, factors.empty() ? 0 : 2);
  check_activation(activation);
  check_bits(bits, symmetric);
  check_format(book, blocksize, nested, symmetric, bits);
  if (!attention || !wide || !heads || attention % heads)
    throw py::value_error("heads must divide the rows of the query's weight");
  const size_t hidden = Tensor("norm", norms[0], false, kTrusted).elements(), head_size = attention / heads;
  if (head_size > kMaxK) throw py::value_error("heads must be of at most " + std::to_string(kMaxK) + " columns");

  EncoderLayer layer{};
  const size_t sizes[6][2] = {{attention, hidden}, {attention, hidden}, {attention, hidden},
                              {hidden, attention}, {wide, hidden},      {hidden, wide}};
  EncoderLinear* const linears[] = {&layer.query, &layer.key, &layer.value, &layer.output, &layer.up, &layer.down};
  const Format format{book, blocksize, nested};
  for (size_t i = 0; i < 6; ++i) {
    if (book != kNoBook && !in_panels(sizes[i][0], sizes[i][1], blocksize))
      throw py::value_error("4-bit weights must be in panels");
    *linears[i] = linear(format, i, weights[i], scales[i], biases[i], sizes[i][0], sizes[i][1]);
  }
  layer.norm_dtype = Tensor("norm", norms[0], false, kTrusted).dtype();
  for (size_t i = 0; i < 4; ++i) {
    const Tensor norm("norm", norms[i], false, kTrusted);
    norm.check_elements(hidden);
    if (norm.dtype() != layer.norm_dtype) throw py::type_error("norms must have one dtype");
    layer.norm[i] = norm.data;
  }
  if (!factors.empty()) {
    layer.input_factor = Tensor("factor", factors[0], false, kTrusted).as<float>(hidden);
    layer.up_factor = Tensor("factor", factors[1], false, kTrusted).as<float>(hidden);
  }
  layer.eps[0] = eps1, layer.eps[1] = eps2;
  layer.heads = heads, layer.head_size = head_size, layer.scaling = scaling;
  layer.activation = activation, layer.symmetric = symmetric, layer.bits = bits;

  const Tensor from("x", x, false, kTrusted), to("y", y, false, kTrusted);
  from.check_rank(3);
  const size_t batch = from.size(0), length = from.size(1);
  from.check_shape({batch, length, hidden});
  to.check_shape({batch, length, hidden});
  const int dtype = from.dtype();
  if (to.dtype() != dtype) throw py::type_error("y must have the dtype of x");
  if (length > kMaxK) from.fail_shape("of at most " + std::to_string(kMaxK) + " tokens");
  const Mask m = added("attention_mask", mask, batch, heads, length, length, length),
             b = added("position_bias", position_bias, batch, heads, length, length, length);
  without_gil([&] { encoder_layer(from.data, dtype, batch, length, m, b, layer, to.data); });
}

// Keys or values, [batch, kv_heads, capacity, head_size]: the elements of a head beside each other, none in one place.
Cache cache_of(const Tensor& t, size_t batch, size_t kv_heads, size_t capacity, size_t head_size, int dtype) {
  t.check_shape({batch, kv_heads, capacity, head_size});
  if (t.dtype() != dtype) throw py::type_error("keys and values must have one dtype");
  size_t strides[4] = {kv_heads * capacity * head_size, capacity * head_size, head_size, 1};
  for (int i = 0; i < 4 && t.strides; ++i) strides[i] = static_cast<size_t>(t.strides[i]);
  if (head_size > 1 && strides[3] != 1) t.fail_shape("with the elements of a head beside each other");
  int order[] = {0, 1, 2, 3};
  std::sort(order, order + 4, [&](int a, int b) { return strides[a] < strides[b]; });
  size_t extent = 1;
  for (const int i : order) {
    if (t.size(i) == 1) continue;
    if (strides[i] < extent) t.fail_shape("without two elements in one place");
    extent += strides[i] * (t.size(i) - 1);
  }
  return {t.data, strides[0], strides[1], strides[2]};
}

Rotary rotary_of(const py::object& cos, const py::object& sin, size_t batch, size_t length, size_t head_size) {
  if (cos.is_none() && sin.is_none()) return {};
  const Tensor c("cos", cos, false, kTrusted), s("sin", sin, false, kTrusted);
  c.check_rank(3);
  const size_t dims = c.size(2), sets = c.size(0) == 1 ? 1 : batch;
  if (dims % 2 || dims > head_size) c.fail_shape("[.., .., an even number up to head_size]");
  c.check_shape({sets, length, dims});
  s.check_shape({sets, length, dims});
  if (s.dtype() != c.dtype()) throw py::type_error("cos and sin must have one dtype");
  return {c.data, s.data, c.dtype(), dims, sets == 1 ? 0 : length * dims};
}

// All of a decoder layer but its tensors. It outlives calls, in which its arguments would take a microsecond to read.
struct DecoderForm {
  size_t heads, kv_heads, head_size, wide;
  float scaling, eps;
  int activation;
  bool gated, symmetric;
  int bits;
  bool in_float;
  long book;
  size_t blocksize;
  float norm_offset;
  bool interleaved;
  size_t window;
};

void check_form(const DecoderForm& f) {
  if (f.activation != kSilu && f.activation != kReluValue && f.activation != kGeluValue &&
      f.activation != kGeluTanhValue)
    throw py::value_error("activation must be 1, 5, 6 or 7, got " + std::to_string(f.activation));
  check_bits(f.bits, f.symmetric);
  if (!f.heads || !f.kv_heads || f.heads % f.kv_heads || (f.interleaved && f.heads != f.kv_heads) || !f.head_size ||
      !f.wide)
    throw py::value_error("kv_heads must divide heads, and be heads where rows are interleaved");
}

// Linears of a decoder layer: the first and the number of a part's, of `count` in all.
struct DecoderCounts {
  size_t inputs, wide;
  DecoderCounts(size_t count, bool gated) : inputs(count == 4 || count == 5 ? 1 : 3), wide(count - 2 - inputs) {
    if (count < 4 || count > 7 || (!gated && wide != 1))
      throw py::value_error("weights must be 4 to 7, or 4 or 6 without a gate, got " + std::to_string(count));
  }
};

const void* norm_of(const char* name, const py::object& object, size_t n, int* dtype) {
  const Tensor norm(name, object, false, kTrusted);
  norm.check_elements(n);
  if (*dtype >= 0 && norm.dtype() != *dtype) throw py::type_error(std::string(name) + " must have one dtype");
  *dtype = norm.dtype();
  return norm.data;
}

void decoder_layer_call(py::handle x, py::handle keys, py::handle values, size_t past, const py::object& mask,
                        const py::object& position_bias, const py::object& cos, const py::object& sin,
                        const Objects& weights, const Objects& scales, const Objects& biases, const Objects& norms,
                        const Objects& nested, const Objects& head_norms, const DecoderForm& form, py::handle y) {
  const size_t heads = form.heads, kv_heads = form.kv_heads, head_size = form.head_size, wide = form.wide;
  const DecoderCounts counts(weights.size(), form.gated);
  check_count("scales", scales, weights.size());
  check_count("biases", biases, weights.size());
  check_count("norms", norms, norms.size() == 4 ? 4 : 2);
  check_count("nested", nested, nested.empty() ? 0 : 3 * weights.size());
  check_count("head_norms", head_norms, head_norms.empty() ? 0 : 2);
  check_form(form);
  check_format(form.book, form.blocksize, nested, form.symmetric, form.bits);
  const Format format{form.book, form.blocksize, nested};
  const size_t query = product({heads, head_size}), key = product({kv_heads, head_size});

  DecoderLayer layer{};
  layer.norm_dtype = layer.head_norm_dtype = -1;
  const size_t hidden = Tensor("norm", norms[0], false, kTrusted).elements();
  for (size_t i = 0; i < norms.size(); ++i)
    layer.norm[norms.size() == 2 ? 2 * i : i] = norm_of("norms", norms[i], hidden, &layer.norm_dtype);
  for (size_t i = 0; i < head_norms.size(); ++i)
    layer.head_norm[i] = norm_of("head_norms", head_norms[i], head_size, &layer.head_norm_dtype);
  size_t next = 0;
  auto add = [&](EncoderLinear& to, size_t n, size_t k) {
    if (form.book != kNoBook && !in_panels(n, k, form.blocksize))
      throw py::value_error("4-bit weights must be in panels");
    to = linear(format, next, weights[next], scales[next], biases[next], product({n}), k);
    ++next;
  };
  layer.input_count = counts.inputs, layer.wide_count = counts.wide;
  if (counts.inputs == 1) add(layer.inputs[0], query + 2 * key, hidden);
  else
    for (size_t i = 0; i < 3; ++i) add(layer.inputs[i], i ? key : query, hidden);
  add(layer.output, hidden, query);
  const size_t columns = form.gated && counts.wide == 1 ? product({2, wide}) : wide;
  for (size_t i = 0; i < counts.wide; ++i) add(layer.wide[i], columns, hidden);
  add(layer.down, hidden, wide);
  layer.interleaved = form.interleaved, layer.gated = form.gated;
  layer.norm_offset = form.norm_offset, layer.eps = form.eps, layer.scaling = form.scaling;
  layer.heads = heads, layer.kv_heads = kv_heads, layer.head_size = head_size;
  layer.hidden = hidden, layer.intermediate = wide, layer.activation = form.activation;
  layer.symmetric = form.symmetric, layer.bits = form.bits, layer.in_float = form.in_float;
  layer.window = form.window;

  const Tensor from("x", x, false, kTrusted), to("y", y, false, kTrusted);
  from.check_rank(3);
  const size_t batch = from.size(0), length = from.size(1);
  from.check_shape({batch, length, hidden});
  to.check_shape({batch, length, hidden});
  const int dtype = from.dtype();
  if (to.dtype() != dtype) throw py::type_error("y must have the dtype of x");
  const Tensor k("keys", keys, true, kTrusted), v("values", values, true, kTrusted);
  k.check_rank(4);
  const size_t capacity = k.size(2);
  const Caches caches{cache_of(k, batch, kv_heads, capacity, head_size, k.dtype()),
                      cache_of(v, batch, kv_heads, capacity, head_size, k.dtype()), k.dtype(), past};
  if (past > capacity || length > capacity - past)
    k.fail_shape("of a capacity of at least " + std::to_string(past) + " + " + std::to_string(length));
  const Rotary rotary = rotary_of(cos, sin, batch, length, head_size);
  const Mask m = added("mask", mask, batch, heads, length, past + length, capacity),
             b = added("position_bias", position_bias, batch, heads, length, past + length, capacity);
  if (b.is_bool) throw py::type_error("position_bias must be float32, got bool");
  if (m.data && form.window) throw py::value_error("window must be 0 where a mask is given");
  without_gil([&] { decoder_layer(from.data, dtype, batch, length, caches, m, b, rotary, layer, to.data); });
}

void recurrent_call(py::handle x, py::handle batch_sizes, const Objects& weights, const Objects& scales,
                    const Objects& biases, const Objects& nested, int cell, bool reverse, bool symmetric, int bits,
                    bool as_int8, long book, size_t blocksize, py::handle h, const py::object& c, py::handle y) {
  if (cell < kRnnTanh || cell > kLstm) throw py::value_error("cell must be from 0 to 3, got " + std::to_string(cell));
  if ((cell == kLstm) == c.is_none()) throw py::value_error("c must be given for an LSTM, and for nothing else");
  check_bits(bits, symmetric);
  check_format(book, blocksize, nested, symmetric, bits);
  const Tensor from("x", x, false, kTrusted), state("h", h, false, kTrusted), to("y", y, false, kTrusted),
      sizes("batch_sizes", batch_sizes, false, kTrusted);
  from.check_rank(2);
  state.check_rank(2);
  sizes.check_rank(1);
  const size_t rows = from.size(0), K = from.size(1), batch = state.size(0), P = state.size(1), steps = sizes.size(0);
  size_t hidden = P;
  float* cells = nullptr;
  if (!c.is_none()) {
    const Tensor t("c", c, false, kTrusted);
    t.check_rank(2);
    t.check_shape({batch, hidden = t.size(1)});
    cells = t.as<float>();
  }
  const bool projects = hidden != P;
  const size_t count = projects ? 3 : 2, width = product({gates_of(cell), hidden});
  check_count("weights", weights, count);
  check_count("scales", scales, count);
  check_count("biases", biases, biases.empty() ? 0 : 2);
  check_count("nested", nested, nested.empty() ? 0 : 3 * count);

  RecurrentLayer layer{};
  const size_t shapes[3][2] = {{width, K}, {width, P}, {P, hidden}};
  EncoderLinear* const linears[] = {&layer.input, &layer.hidden, &layer.projection};
  const Format format{book, blocksize, nested};
  for (size_t i = 0; i < count; ++i) {
    const py::object bias = i < biases.size() ? py::object(biases[i]) : py::none();
    *linears[i] = linear(format, i, weights[i], scales[i], bias, shapes[i][0], shapes[i][1]);
    if (linears[i]->bias_dtype != kFloat32) throw py::type_error("biases must be float32");
  }
  layer.cell = cell, layer.reverse = reverse, layer.symmetric = symmetric, layer.bits = bits, layer.as_int8 = as_int8;

  const int64_t* of_step = sizes.as<int64_t>();
  size_t sum = 0;
  for (size_t t = 0; t < steps; sum += static_cast<size_t>(of_step[t++]))
    if (of_step[t] < 1 || of_step[t] > (t ? of_step[t - 1] : static_cast<int64_t>(batch)))
      throw py::value_error("batch_sizes must descend from the rows of h to 1 or more");
  if (sum != rows || static_cast<size_t>(of_step[0]) != batch)
    throw py::value_error("batch_sizes must begin with the rows of h and add up to those of x");
  const float* values = from.as<float>();
  float *states = state.as<float>(), *outputs = to.as<float>();
  to.check_shape({rows, P});
  without_gil([&] { recurrent(values, of_step, steps, layer, states, cells, outputs); });
}

}  // namespace

void add_layers(py::module_& m) {
  m.def("encoder_layer", &encoder_layer_call,
        "x and y [batch, length, hidden]; mask and position_bias or None; six weights, scales and biases (or None); "
        "nested: none, or absmax, map and offset for each weight; four norms; no factors or two; book -1: INT8.");
  py::class_<DecoderForm>(m, "DecoderForm",
                          "Of a decoder layer; book as for encoder_layer; activation: an Elementwise.")
      .def(py::init<size_t, size_t, size_t, size_t, float, float, int, bool, bool, int, bool, long, size_t, float, bool,
                    size_t>());
  m.def("decoder_layer", &decoder_layer_call,
        "x and y [batch, length, hidden]; keys and values are written; 4 to 7 weights, scales and biases (or None); "
        "two norms, or four with biases; nested as for encoder_layer; none or two norms of heads; a DecoderForm.");
  m.def("recurrent", &recurrent_call,
        "x [rows, K], y [rows, P], h [batch, P], c [batch, H] or None; weights of input, hidden state and, where P is "
        "not H, of the projection; h and c become the last states.");
}

}  // namespace pyqkern
