// The Python module pyqkern._C: tensors in, nothing out but what is written to them. Every tensor, size and number is
// checked here, with the GIL held; then it is released and the operation called.
#include <pybind11/stl.h>

#include "python/tensors.h"

using namespace pyqkern;

namespace {

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (size_t i = 0; i < kBuiltCount; ++i)
    if (supported(*kBuilt[i])) names.emplace_back(kBuilt[i]->name);
  return names;
}

// The Qtype of codes of 8 or 4 bits.
int qtype_of(const Tensor& q, int bits) {
  if (bits != 8 && bits != 4) throw py::value_error("bits must be 8 or 4, got " + std::to_string(bits));
  const int qtype = !q.is<int8_t>() && q.as<uint8_t>() ? kUInt8 : kInt8;
  return qtype + (bits == 4 ? kInt4 : 0);
}

Channels channels_of(py::handle scale, py::handle zero_point, size_t channels, size_t inner, bool per_tensor) {
  if (per_tensor && channels != 1) throw py::value_error("channels must be 1 per tensor");
  return {channels,
          inner,
          Tensor("scale", scale).as<float>(channels),
          nullptr,
          zero_point.is_none() ? nullptr : Tensor("zero_point", zero_point).as<int32_t>(channels),
          per_tensor};
}

// x as rows of `size`; one scale for each row, or one for all.
FakeRows fake_rows(py::handle x, size_t size, py::handle scale, py::handle zero_point, int qmin, int qmax) {
  const bool is_signed = qmin != 0;
  const bool is_range =
      qmax > 0 && qmax <= (is_signed ? 127 : 255) && (!is_signed || qmin == -qmax || qmin == -qmax - 1);
  if (!is_range) throw py::value_error("qmin and qmax must be 0 and up to 255, or -qmax or -qmax - 1 and up to 127");
  const Tensor from("x", x), scales("scale", scale);
  const size_t n = from.elements();
  if (!size || n % size) throw py::value_error("size must divide the elements of x, got " + std::to_string(size));
  const bool per_row = scales.elements() != 1;
  const size_t count = per_row ? n / size : 1;
  return {from.data,
          from.dtype(),
          n / size,
          size,
          scales.as<float>(count),
          zero_point.is_none() ? nullptr : Tensor("zero_point", zero_point).as<int32_t>(count),
          per_row,
          qmin,
          qmax};
}

// The data of a tensor of as many elements and the dtype of f's x.
void* like(const char* name, py::handle object, const FakeRows& f) {
  const Tensor t(name, object);
  t.check_elements(f.rows * f.size);
  if (t.dtype() != f.dtype) throw py::type_error(std::string(name) + " must have the dtype of x");
  return t.data;
}

void check_function(int function) {
  if (function < kExp || function > kReluValue)
    throw py::value_error("function must be from 0 to 7, got " + std::to_string(function));
}

// Row numbers of a weight of n rows.
struct RowNumbers {
  const int64_t* data;
  size_t count;
  RowNumbers(py::handle object, size_t n) {
    const Tensor t("rows", object);
    t.check_rank(1);
    data = t.as<int64_t>();
    count = t.elements();
    for (size_t i = 0; i < count; ++i)
      if (data[i] < 0 || static_cast<size_t>(data[i]) >= n)
        throw py::value_error("rows must be within [0, " + std::to_string(n) + "), got " + std::to_string(data[i]));
  }
};

void add_affine(py::module_& m) {
  m.def("min_max", [](py::handle x, size_t outer, size_t channels, size_t inner, py::handle lo, py::handle hi) {
    const Tensor from("x", x);
    const int dtype = from.dtype();
    from.check_elements(product({outer, channels, inner}));
    float *least = Tensor("lo", lo).as<float>(channels), *greatest = Tensor("hi", hi).as<float>(channels);
    without_gil([&] { min_max(from.data, dtype, outer, channels, inner, least, greatest); });
  });
  m.def("quantize", [](py::handle x, py::handle scale, py::handle zero_point, size_t outer, size_t channels,
                       size_t inner, bool per_tensor, py::handle q, int bits) {
    const Tensor from("x", x), to("q", q);
    const int dtype = from.dtype(), qtype = qtype_of(to, bits);
    const size_t n = product({outer, channels, inner});
    from.check_elements(n);
    to.check_elements(n);
    const Channels c = channels_of(scale, zero_point, channels, inner, per_tensor);
    without_gil([&] { quantize(from.data, dtype, outer, c, static_cast<uint8_t*>(to.data), qtype); });
  });
  m.def("dequantize", [](py::handle q, py::handle scale, py::handle zero_point, size_t outer, size_t channels,
                         size_t inner, py::handle y) {
    const Tensor from("q", q), to("y", y);
    const int qtype = qtype_of(from, 8), dtype = to.dtype();
    const size_t n = product({outer, channels, inner});
    from.check_elements(n);
    to.check_elements(n);
    const Channels c = channels_of(scale, zero_point, channels, inner, false);
    without_gil([&] { dequantize(static_cast<const uint8_t*>(from.data), qtype, outer, c, to.data, dtype); });
  });
  m.def("fake_quantize",
        [](py::handle x, size_t size, py::handle scale, py::handle zero_point, int qmin, int qmax, py::handle y) {
          const FakeRows f = fake_rows(x, size, scale, zero_point, qmin, qmax);
          void* to = like("y", y, f);
          without_gil([&] { fake_quantize(f, to); });
        });
  m.def(
      "fake_quantize_backward",
      [](py::handle g, py::handle x, size_t size, py::handle scale, py::handle zero_point, int qmin, int qmax,
         py::handle by_x, py::handle by_scale, py::handle by_offset) {
        const FakeRows f = fake_rows(x, size, scale, zero_point, qmin, qmax);
        const void* grads = like("g", g, f);
        void* to = like("by_x", by_x, f);
        float* of_scale = Tensor("by_scale", by_scale).as<float>(f.rows);
        float* of_offset = Tensor("by_offset", by_offset).as<float>(f.rows);
        without_gil([&] { fake_quantize_backward(f, grads, to, of_scale, of_offset); });
      },
      "x, g and by_x of one dtype, rows of `size` elements; by_scale, by_offset fp32 [rows].");
  m.def(
      "elementwise",
      [](int function, py::handle x, py::handle y) {
        check_function(function);
        const Tensor from("x", x);
        const size_t n = from.elements();
        const float* values = from.as<float>();
        float* to = Tensor("y", y).as<float>(n);
        without_gil([&] { kernels().elementwise(function, values, n, to); });
      },
      "0: exp, 1: GELU, 2: rint(255 * 2^x) for x <= 0, 3: sigmoid, 4: tanh, 5: SiLU, 6: GELU by tanh; for the tests.");
  m.def(
      "gate",
      [](int function, py::handle h, py::handle y) {
        check_function(function);
        const Tensor from("h", h), to("y", y);
        to.check_rank(2);
        const size_t M = to.size(0), N = to.size(1);
        const float* values = from.as<float>();
        from.check_shape({M, product({2, N})});
        float* results = to.as<float>();
        without_gil([&] { gate(values, M, N, function, results); });
      },
      "h [M, 2 * N], y [M, N]: f(h[:, :N]) * h[:, N:], f as for elementwise.");
}

void add_int8(py::module_& m) {
  m.def("splits", [] { return kernels().split_rows != 0; });
  m.def("pack_int8", [](py::handle w, py::handle packed) {
    const Tensor from("w", w);
    from.check_rank(2);
    const int8_t* codes = from.as<int8_t>();
    const size_t N = from.size(0), K = from.size(1);
    const Packed to = packed_int8(packed.ptr(), N, K);
    without_gil([&] { int8_pack(codes, N, K, to); });
  });
  m.def("unpack_int8", [](py::handle packed, py::handle w) {
    const Tensor to("w", w);
    to.check_rank(2);
    int8_t* codes = to.as<int8_t>();
    const size_t N = to.size(0), K = to.size(1);
    const Packed from = packed_int8(packed.ptr(), N, K);
    without_gil([&] { int8_unpack(from, N, K, codes); });
  });
  m.def("int8_gather", [](py::handle packed, size_t n, py::handle rows, py::handle out) {
    const Tensor to("out", out);
    to.check_rank(2);
    int8_t* codes = to.as<int8_t>();
    const size_t K = to.size(1);
    const Packed from = packed_int8(packed.ptr(), n, K);
    const RowNumbers numbers(rows, n);
    to.check_shape({numbers.count, K});
    without_gil([&] { int8_gather(from, K, numbers.data, numbers.count, codes); });
  });
  m.def("int8_matmul", [](py::handle a, py::handle w, py::handle y) {
    const Tensor left("a", a), right("w", w), to("y", y);
    left.check_rank(2);
    const size_t M = left.size(0), K = left.size(1);
    const bool is_unsigned = qtype_of(left, 8) == kUInt8;
    const int8_t* codes = right.as<int8_t>();
    right.check_rank(2);
    const size_t N = right.size(0);
    right.check_shape({N, K});
    int32_t* sums = to.as<int32_t>();
    to.check_shape({M, N});
    if (K > (is_unsigned ? kMaxMatmulUnsigned : kMaxMatmulSigned)) left.fail_shape("of sums that int32 holds");
    without_gil([&] { int8_matmul(static_cast<const uint8_t*>(left.data), is_unsigned, codes, M, N, K, sums); });
  });
}

void add_four_bit(py::module_& m) {
  m.def("quantize_4bit", [](py::handle x, size_t blocksize, size_t book, py::handle packed, py::handle absmax) {
    check_blocksize(blocksize);
    const Tensor from("x", x);
    const int dtype = from.dtype();
    const size_t n = from.elements();
    const Codebook* codes = codebook(book);
    uint8_t* to = Tensor("packed", packed).as<uint8_t>((n + 1) / 2);
    float* scales = Tensor("absmax", absmax).as<float>((n + blocksize - 1) / blocksize);
    without_gil([&] { four_bit_quantize(from.data, dtype, n, blocksize, *codes, to, scales); });
  });
  m.def("dequantize_4bit", [](py::handle packed, py::handle absmax, py::handle nested, py::handle map,
                              py::handle offset, size_t blocksize, size_t book, py::handle y) {
    check_blocksize(blocksize);
    const Tensor to("y", y);
    const int dtype = to.dtype();
    const size_t n = to.elements(), blocks = (n + blocksize - 1) / blocksize;
    const uint8_t* codes = Tensor("packed", packed).as<uint8_t>((n + 1) / 2);
    const Scales scales = scales_of(absmax.ptr(), nested.ptr(), map.ptr(), offset.ptr(), blocks, blocks);
    const Codebook* values = codebook(book);
    without_gil([&] { four_bit_dequantize(codes, scales, blocksize, *values, n, to.data, dtype); });
  });
  auto pack = [](py::handle flat, py::handle panelled, size_t N, size_t K, bool pack) {
    if (K % 8 || N < kPanel) throw py::value_error("a weight in panels must have 16 rows or more and K % 8 == 0");
    const size_t padded = product({panels(N) * kPanel, K});
    uint8_t *codes = Tensor("flat", flat).as<uint8_t>(N * K / 2),
            *lines = Tensor("panels", panelled).as<uint8_t>(padded / 2);
    without_gil([&] { pack ? four_bit_pack(codes, N, K, lines) : four_bit_unpack(lines, N, K, codes); });
  };
  m.def("pack_4bit",
        [pack](py::handle flat, size_t N, size_t K, py::handle panels) { pack(flat, panels, N, K, true); });
  m.def("unpack_4bit",
        [pack](py::handle panels, size_t N, size_t K, py::handle flat) { pack(flat, panels, N, K, false); });
  m.def("gather_4bit", [](py::handle packed, py::handle absmax, size_t N, size_t K, size_t blocksize, py::handle rows,
                          py::handle codes, py::handle scales) {
    check_blocksize(blocksize);
    if (!in_panels(N, K, blocksize)) throw py::value_error("the weight must be in panels");
    const size_t padded = product({panels(N) * kPanel, K});
    const uint8_t* from = Tensor("packed", packed).as<uint8_t>(padded / 2);
    const Tensor stored("absmax", absmax), gathered("scales", scales);
    const bool is_nested = !stored.is<float>() && stored.as<uint8_t>();
    stored.check_elements(padded / blocksize);
    const RowNumbers numbers(rows, N);
    uint8_t* to = Tensor("codes", codes).as<uint8_t>(product({numbers.count, K}) / 2);
    void* to_scales = is_nested ? static_cast<void*>(gathered.as<uint8_t>()) : gathered.as<float>();
    gathered.check_elements(numbers.count * (K / blocksize));
    without_gil([&] {
      four_bit_gather(from, static_cast<const uint8_t*>(stored.data), is_nested ? 1 : sizeof(float), N, K, blocksize,
                      numbers.data, numbers.count, to, static_cast<uint8_t*>(to_scales));
    });
  });
  m.def("dequantize_rows_4bit", [](py::handle packed, py::handle absmax, size_t N, size_t blocksize, size_t book,
                                   py::handle rows, py::handle y) {
    check_blocksize(blocksize);
    const Tensor to("y", y);
    to.check_rank(2);
    const int dtype = to.dtype();
    const size_t K = to.size(1), n = product({N, K});
    const uint8_t* codes = Tensor("packed", packed).as<uint8_t>((n + 1) / 2);
    const float* scales = Tensor("absmax", absmax).as<float>((n + blocksize - 1) / blocksize);
    const Codebook* values = codebook(book);
    const RowNumbers numbers(rows, N);
    to.check_shape({numbers.count, K});
    without_gil([&] {
      four_bit_dequantize_rows(codes, scales, K, blocksize, *values, numbers.data, numbers.count, to.data, dtype);
    });
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "C++ kernels of pyqkern, on contiguous tensors on the CPU; results are written into tensors. What does not fit "
      "raises TypeError or ValueError.";
#ifdef __clang__
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "g++ " __VERSION__;
#endif
  m.def("isas", &isas, "The ISAs that this CPU runs, best first.");
  m.def("isa", [] { return std::string(kernels().name); }, "The ISA in use.");
  m.def(
      "set_isa", [](const std::string& name) { return std::string(set_isa(name.c_str())); },
      "Switches the ISA, returns the previous one.", py::arg("name"));
  m.def(
      "threads",
      [] {
        use_torchs_threads();
        return threads();
      },
      "Threads that the next call may use.");
  m.def("openmp", [] { return std::string(openmp_path()); }, "Path of the OpenMP runtime in use, or an empty string.");
  add_tensors(m);
  add_affine(m);
  add_int8(m);
  add_four_bit(m);
  add_linears(m);
  add_layers(m);
  add_snapshot(m);
  add_optimizers(m);
}
