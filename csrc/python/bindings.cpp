// The Python module pyqkern._C: addresses and sizes in, nothing out. Python has checked them; here the GIL is released
// and the operation called. Knows no torch, so one build serves every version of it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "api.h"
#include "parallel.h"
#include "python/tensors.h"

namespace py = pybind11;
using namespace pyqkern;

namespace {

using Address = uintptr_t;

template <class T> T* at(Address a) { return reinterpret_cast<T*>(a); }

Weight4Bit weight_4bit(Address packed, Address absmax, Address nested, Address map, float offset, size_t N, size_t K,
                       size_t blocksize, Address book) {
  return {at<uint8_t>(packed), {at<void>(absmax), at<float>(nested), at<float>(map), offset}, N, K, blocksize,
          at<Codebook>(book)};
}

// packed, scale, bias, its dtype, N, K; of 4 bits also nested absmax, map, offset (or 0), blocksize and codebook, else 0
using Linear = std::array<Address, 11>;

EncoderLinear linear_at(const Linear& a) {
  EncoderLinear l{at<int8_t>(a[0]), at<float>(a[1]), at<void>(a[2]), static_cast<int>(a[3]), a[4], a[5], {}};
  if (!a[9]) return l;
  l.four = weight_4bit(a[0], a[1], a[6], a[7], a[8] ? *at<float>(a[8]) : 0.0f, a[4], a[5], a[9], a[10]);
  l.packed = nullptr;
  return l;
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (size_t i = 0; i < kBuiltCount; ++i)
    if (supported(*kBuilt[i])) names.emplace_back(kBuilt[i]->name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of pyqkern. Addresses and sizes, unchecked: use the functions of pyqkern.";
  if (!add_tensor_functions(m.ptr())) throw py::error_already_set();
  const auto nogil = py::call_guard<py::gil_scoped_release>();

  m.def("isas", &isas, "The ISAs that this CPU runs, best first.");
  m.def("isa", [] { return std::string(kernels().name); }, "The ISA in use.");
  m.def(
      "set_isa", [](const std::string& name) { return std::string(set_isa(name.c_str())); },
      "Switches the ISA, returns the previous one.", py::arg("name"));
  m.def("threads", &threads, "Threads that the next call may use.");
  m.def("openmp", [] { return std::string(openmp_path()); }, "Path of the OpenMP runtime in use, or an empty string.");

  m.def(
      "min_max",
      [](Address x, int dtype, size_t outer, size_t channels, size_t inner, Address lo, Address hi) {
        min_max(at<void>(x), dtype, outer, channels, inner, at<float>(lo), at<float>(hi));
      },
      nogil);
  m.def(
      "quantize",
      [](Address x, int dtype, Address scale, Address zero_point, size_t outer, size_t channels, size_t inner,
         bool per_tensor, Address q, int qtype) {
        quantize(at<void>(x), dtype, outer,
                 {channels, inner, at<float>(scale), nullptr, at<int32_t>(zero_point), per_tensor}, at<uint8_t>(q),
                 qtype);
      },
      nogil);
  m.def(
      "dequantize",
      [](Address q, int qtype, Address scale, Address zero_point, size_t outer, size_t channels, size_t inner,
         Address y, int dtype) {
        dequantize(at<uint8_t>(q), qtype, outer,
                   {channels, inner, at<float>(scale), nullptr, at<int32_t>(zero_point), false}, at<void>(y), dtype);
      },
      nogil);
  m.def(
      "pack_int8",
      [](Address w, size_t N, size_t K, Address packed) { int8_pack(at<int8_t>(w), N, K, at<int8_t>(packed)); }, nogil);
  m.def(
      "unpack_int8",
      [](Address packed, size_t N, size_t K, Address w) { int8_unpack(at<int8_t>(packed), N, K, at<int8_t>(w)); },
      nogil);
  m.def(
      "int8_matmul",
      [](Address a, bool is_unsigned, Address w, size_t M, size_t N, size_t K, Address y) {
        int8_matmul(at<uint8_t>(a), is_unsigned, at<int8_t>(w), M, N, K, at<int32_t>(y));
      },
      nogil);
  m.def(
      "int8_linear",
      [](Address x, int dtype, Address packed, Address w_scale, Address bias, int bias_dtype, size_t M, size_t N,
         size_t K, Address y, int activation, bool symmetric, int bits) {
        int8_linear(at<void>(x), dtype, at<int8_t>(packed), at<float>(w_scale), at<void>(bias), bias_dtype, M, N, K,
                    at<void>(y), activation, symmetric, bits, nullptr, nullptr);
      },
      nogil);
  m.def(
      "int8_linear_static",
      [](Address x, int dtype, Address packed, Address w_scale, Address bias, int bias_dtype, size_t M, size_t N,
         size_t K, Address y, int activation, int bits, Address x_scale, Address x_zero) {
        int8_linear(at<void>(x), dtype, at<int8_t>(packed), at<float>(w_scale), at<void>(bias), bias_dtype, M, N, K,
                    at<void>(y), activation, false, bits, at<float>(x_scale), at<int32_t>(x_zero));
      },
      nogil);

  m.def(
      "elementwise",
      [](int function, Address x, size_t n, Address y) {
        kernels().elementwise(function, at<float>(x), n, at<float>(y));
      },
      nogil, "0: exp, 1: GELU, 2: rint(255 * 2^x) for x <= 0, 3: sigmoid, 4: tanh; for the tests.");

  using Added = std::array<Address, 6>;  // data (or 0), whether bool, heads, strides of batch, head and query
  m.def(
      "encoder_layer",
      [](Address x, int dtype, size_t batch, size_t length, const Added& mask, const Added& bias,
         const std::array<Linear, 6>& linears, const std::array<Address, 4>& norms, int norm_dtype, float eps1,
         float eps2, size_t heads, size_t head_size, float scaling, int activation, bool symmetric, int bits,
         Address input_factor, Address up_factor, Address y) {
        auto linear = [&](int i) { return linear_at(linears[i]); };
        const EncoderLayer layer{linear(0),
                                 linear(1),
                                 linear(2),
                                 linear(3),
                                 linear(4),
                                 linear(5),
                                 {at<void>(norms[0]), at<void>(norms[1]), at<void>(norms[2]), at<void>(norms[3])},
                                 norm_dtype,
                                 {eps1, eps2},
                                 heads,
                                 head_size,
                                 scaling,
                                 activation,
                                 symmetric,
                                 bits,
                                 at<float>(input_factor),
                                 at<float>(up_factor)};
        auto added = [](const Added& a) { return Mask{at<void>(a[0]), a[1] != 0, a[2], a[3], a[4], a[5]}; };
        encoder_layer(at<void>(x), dtype, batch, length, added(mask), added(bias), layer, at<void>(y));
      },
      nogil);

  m.def(
      "recurrent",
      [](Address x, Address batch_sizes, size_t steps, const std::array<Linear, 3>& linears, int cell, bool reverse,
         bool symmetric, int bits, bool as_int8, Address h, Address c, Address y) {
        const RecurrentLayer layer{linear_at(linears[0]),
                                   linear_at(linears[1]),
                                   linear_at(linears[2]),
                                   cell,
                                   reverse,
                                   symmetric,
                                   bits,
                                   as_int8};
        recurrent(at<float>(x), at<int64_t>(batch_sizes), steps, layer, at<float>(h), at<float>(c), at<float>(y));
      },
      nogil);

  m.def(
      "quantize_4bit",
      [](Address x, int dtype, size_t n, size_t blocksize, Address book, Address packed, Address absmax) {
        four_bit_quantize(at<void>(x), dtype, n, blocksize, *at<Codebook>(book), at<uint8_t>(packed),
                          at<float>(absmax));
      },
      nogil);
  m.def(
      "dequantize_4bit",
      [](Address packed, Address absmax, Address nested, Address map, float offset, size_t blocksize, Address book,
         size_t n, Address y, int dtype) {
        four_bit_dequantize(at<uint8_t>(packed), {at<void>(absmax), at<float>(nested), at<float>(map), offset},
                            blocksize, *at<Codebook>(book), n, at<void>(y), dtype);
      },
      nogil);
  m.def(
      "pack_4bit",
      [](Address flat, size_t N, size_t K, Address packed) {
        four_bit_pack(at<uint8_t>(flat), N, K, at<uint8_t>(packed));
      },
      nogil);
  m.def(
      "unpack_4bit",
      [](Address packed, size_t N, size_t K, Address flat) {
        four_bit_unpack(at<uint8_t>(packed), N, K, at<uint8_t>(flat));
      },
      nogil);
  m.def(
      "weight_4bit",
      [](Address packed, Address absmax, Address nested, Address map, float offset, size_t N, size_t K,
         size_t blocksize, Address book, Address y, int dtype) {
        four_bit_weight(weight_4bit(packed, absmax, nested, map, offset, N, K, blocksize, book), at<void>(y), dtype);
      },
      nogil);
  m.def(
      "finish_bf16",
      [](Address product, Address bias, int bias_dtype, size_t M, size_t N, Address y, int dtype) {
        four_bit_finish_bf16(at<uint16_t>(product), at<void>(bias), bias_dtype, M, N, at<void>(y), dtype);
      },
      nogil);
  m.def(
      "linear_4bit",
      [](Address x, int dtype, Address packed, Address absmax, Address nested, Address map, float offset, size_t N,
         size_t K, size_t blocksize, Address book, Address bias, int bias_dtype, size_t M, Address y, bool as_int8) {
        const Weight4Bit w = weight_4bit(packed, absmax, nested, map, offset, N, K, blocksize, book);
        four_bit_linear(at<void>(x), dtype, w, at<void>(bias), bias_dtype, M, at<void>(y), as_int8);
      },
      nogil);

  m.def(
      "int8_gather",
      [](Address packed, size_t K, Address rows, size_t M, Address out) {
        int8_gather(at<int8_t>(packed), K, at<int64_t>(rows), M, at<int8_t>(out));
      },
      nogil);
  m.def(
      "gather_4bit",
      [](Address packed, Address scales, size_t scale_bytes, size_t N, size_t K, size_t blocksize, Address rows,
         size_t M, Address codes, Address row_scales) {
        four_bit_gather(at<uint8_t>(packed), at<uint8_t>(scales), scale_bytes, N, K, blocksize, at<int64_t>(rows), M,
                        at<uint8_t>(codes), at<uint8_t>(row_scales));
      },
      nogil);
  m.def(
      "dequantize_rows_4bit",
      [](Address packed, Address absmax, size_t K, size_t blocksize, Address book, Address rows, size_t M, Address y,
         int dtype) {
        four_bit_dequantize_rows(at<uint8_t>(packed), at<float>(absmax), K, blocksize, *at<Codebook>(book),
                                 at<int64_t>(rows), M, at<void>(y), dtype);
      },
      nogil);
}
