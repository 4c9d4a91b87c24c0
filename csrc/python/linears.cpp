// The linears, which one token calls dozens of times: without pybind11, whose call of ten arguments costs a
// microsecond. Storages are trusted: see tensors.h.
#include "python/tensors.h"

namespace pyqkern {
namespace {

// The result of f, or nullptr with a Python error set for what it throws.
template <class F> PyObject* translated(const F& f) {
  try {
    f();
    Py_RETURN_NONE;
  } catch (py::error_already_set& e) { e.restore(); } catch (const py::builtin_exception& e) {
    e.set_error();
  } catch (const std::bad_alloc&) { PyErr_NoMemory(); } catch (const std::invalid_argument& e) {
    PyErr_SetString(PyExc_ValueError, e.what());
  } catch (const std::exception& e) { PyErr_SetString(PyExc_RuntimeError, e.what()); }
  return nullptr;
}

void check_count(Py_ssize_t count, Py_ssize_t least, Py_ssize_t most) {
  if (count < least || count > most)
    throw py::type_error("takes " + std::to_string(most) + " arguments, got " + std::to_string(count));
}

long integer(PyObject* object) {
  int overflow;
  const long value = PyLong_AsLongAndOverflow(object, &overflow);
  if (overflow) throw py::value_error("numbers must fit a C long");
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

bool boolean(PyObject* object) {
  if (object != Py_True && object != Py_False) throw py::type_error("symmetric and as_int8 must be True or False");
  return object == Py_True;
}

// x [..., K] and y [..., N]: one row of y for each of x, of the same dtype.
struct Rows {
  Tensor x, y;
  int dtype;
  size_t M, N, K;
  Rows(PyObject* from, PyObject* to) : x("x", from, false, kTrusted), y("y", to, false, kTrusted), dtype(x.dtype()) {
    if (!x.ndim) x.fail_shape("[..., K]");
    if (!y.ndim) y.fail_shape("[..., N]");
    K = x.size(x.ndim - 1), N = y.size(y.ndim - 1), M = x.elements() / K;
    if (y.dtype() != dtype) throw py::type_error("y must have the dtype of x");
    if (y.elements() / N != M) y.fail_shape("of " + std::to_string(M) + " rows, as x is");
  }
};

PyObject* int8_linear_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return translated([&] {
    check_count(count, count == 10 ? 10 : 8, count == 10 ? 10 : 8);
    const bool is_static = count == 10;
    const Rows r(args[0], args[4]);
    if (r.K > kMaxK) r.x.fail_shape("of at most " + std::to_string(kMaxK) + " columns");
    const Packed packed = packed_int8(args[1], r.N, r.K, kTrusted);
    const float* scale = Tensor("weight_scale", args[2], false, kTrusted).as<float>(r.N);
    const Floats bias = bias_of(args[3], r.N, kTrusted);
    const long activation = integer(args[5]), bits = integer(args[7]);
    const bool symmetric = boolean(args[6]);
    check_activation(activation);
    check_bits(bits, symmetric);
    const float* x_scale = is_static ? Tensor("input_scale", args[8], false, kTrusted).as<float>(1) : nullptr;
    const int32_t* x_zero = is_static ? Tensor("input_zero_point", args[9], false, kTrusted).as<int32_t>(1) : nullptr;
    without_gil([&] {
      int8_linear(r.x.data, r.dtype, packed, scale, bias.data, bias.dtype, r.M, r.N, r.K, r.y.data,
                  static_cast<int>(activation), symmetric, static_cast<int>(bits), x_scale, x_zero);
    });
  });
}

PyObject* int8_linear_weight_only_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return translated([&] {
    check_count(count, 5, 5);
    const Rows r(args[0], args[4]);
    const Packed packed = packed_int8(args[1], r.N, r.K, kTrusted);
    const float* scale = Tensor("weight_scale", args[2], false, kTrusted).as<float>(r.N);
    const Floats bias = bias_of(args[3], r.N, kTrusted);
    without_gil([&] {
      int8_linear_weight_only(r.x.data, r.dtype, packed, scale, bias.data, bias.dtype, r.M, r.N, r.K, r.y.data);
    });
  });
}

PyObject* linear_4bit_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return translated([&] {
    check_count(count, 11, 11);
    const Rows r(args[0], args[7]);
    const Weight4Bit w =
        weight_4bit(args[1], args[2], args[3], args[4], args[5], r.N, r.K, static_cast<size_t>(integer(args[9])),
                    static_cast<size_t>(integer(args[8])), kTrusted);
    const Floats bias = bias_of(args[6], r.N, kTrusted);
    const bool as_int8 = boolean(args[10]);
    without_gil([&] { four_bit_linear(r.x.data, r.dtype, w, bias.data, bias.dtype, r.M, r.y.data, as_int8); });
  });
}

// g [..., N] and y [..., K], as Rows x [..., K] and y [..., N].
PyObject* int8_grad_input_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return translated([&] {
    check_count(count, 4, 4);
    const Rows r(args[0], args[3]);
    const size_t N = r.K, K = r.N;
    const Packed packed = packed_int8(args[1], N, K, kTrusted);
    const float* scale = Tensor("weight_scale", args[2], false, kTrusted).as<float>(N);
    without_gil([&] { int8_grad_input(r.x.data, r.dtype, packed, scale, r.M, N, K, r.y.data); });
  });
}

PyObject* grad_input_4bit_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return translated([&] {
    check_count(count, 9, 9);
    const Rows r(args[0], args[6]);
    const Weight4Bit w =
        weight_4bit(args[1], args[2], args[3], args[4], args[5], r.K, r.N, static_cast<size_t>(integer(args[8])),
                    static_cast<size_t>(integer(args[7])), kTrusted);
    without_gil([&] { four_bit_grad_input(r.x.data, r.dtype, w, r.M, r.y.data); });
  });
}

template <class F> PyCFunction function(F* f) { return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f)); }

PyMethodDef methods[] = {
    {"int8_linear", function(int8_linear_call), METH_FASTCALL,
     "(x, packed, weight_scale, bias or None, y, activation, symmetric, bits[, input_scale, input_zero_point])"},
    {"int8_linear_weight_only", function(int8_linear_weight_only_call), METH_FASTCALL,
     "(x, packed, weight_scale, bias or None, y)"},
    {"linear_4bit", function(linear_4bit_call), METH_FASTCALL,
     "(x, packed, absmax, nested_absmax, nested_map, nested_offset (or None, all three), bias or None, y, codebook, "
     "blocksize, as_int8)"},
    {"int8_grad_input", function(int8_grad_input_call), METH_FASTCALL, "(g, packed, weight_scale, y)"},
    {"grad_input_4bit", function(grad_input_4bit_call), METH_FASTCALL,
     "(g, packed, absmax, nested_absmax, nested_map, nested_offset (or None, all three), y, codebook, blocksize)"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void add_linears(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods)) throw py::error_already_set();
}

}  // namespace pyqkern
