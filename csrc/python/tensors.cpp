// The shortest way from a Python tensor to a kernel: reading address, dtype, shape and strides of five tensors from
// Python costs 3 us, as much as the product of one token; torch's DLPack exchange functions (torch >= 2.10) do it in
// nanoseconds and without knowing torch. Every tensor is checked here; what does not fit is left to the Python way,
// which says what is wrong with it.
//
// The structures are DLPack's ABI, https://dmlc.github.io/dlpack (C API, DLPackExchangeAPI, version 1).
#include <Python.h>

#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "api.h"
#include "python/tensors.h"

namespace pyqkern {
namespace {

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
enum { kDLCPU = 1, kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4 };

struct ExchangeApi {
  struct {
    uint32_t major, minor;
    void* previous;
  } header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*tensor_from_py_object)(void* py_object, DLTensor* out);
  void* current_work_stream;
};

const ExchangeApi* api = nullptr;
PyObject *tensor_type = nullptr, *parameter_type = nullptr, *is_neg = nullptr;  // torch.Tensor, nn.Parameter, "is_neg"

// A contiguous tensor on the CPU.
struct View : DLTensor {
  // False for what is no plain tensor: another object, which the exchange function would take for one; a subclass,
  // whose values may be elsewhere; a tensor whose values are to be negated when they are read.
  bool read(PyObject* object) {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (type != tensor_type && type != parameter_type) return false;
    PyObject* negative = PyObject_CallMethodNoArgs(object, is_neg);
    Py_XDECREF(negative);  // True and False outlive this
    if (negative != Py_False) return PyErr_Clear(), false;
    if (api->tensor_from_py_object(object, this)) return PyErr_Clear(), false;
    if (device_type != kDLCPU || lanes != 1 || !data) return false;
    data = static_cast<char*>(data) + byte_offset;
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides && strides[i] != expected) return false;
      expected *= shape[i];
    }
    return expected > 0;
  }
  // The Dtype, or -1.
  int dtype() const {
    if (code == kDLFloat && bits == 32) return kFloat32;
    if (bits != 16) return -1;
    return code == kDLBfloat ? kBFloat16 : code == kDLFloat ? kFloat16 : -1;
  }
  size_t elements() const {
    size_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= static_cast<size_t>(shape[i]);
    return n;
  }
};

// Runs it without the GIL; what it throws becomes Python's. Returns True.
template <class Function> PyObject* without_gil(Function function) {
  PyObject* error = nullptr;
  std::string message;
  PyThreadState* state = PyEval_SaveThread();
  try {
    function();
  } catch (const std::bad_alloc&) { error = PyExc_MemoryError; } catch (const std::invalid_argument& e) {
    error = PyExc_ValueError, message = e.what();
  } catch (const std::exception& e) { error = PyExc_RuntimeError, message = e.what(); }
  PyEval_RestoreThread(state);
  if (!error) Py_RETURN_TRUE;
  PyErr_SetString(error, message.c_str());
  return nullptr;
}

// Whether object is None, or floats [n], which `bias` then views.
bool bias_fits(PyObject* object, size_t n, View* bias) {
  bias->data = nullptr;
  return object == Py_None || (bias->read(object) && bias->dtype() >= 0 && bias->ndim == 1 && bias->elements() == n);
}

// int8_linear(x, packed, weight_scale, bias or None, y, activation, symmetric, bits[, x_scale, x_zero]) -> whether y
// was written
PyObject* int8_linear_tensors(PyObject*, PyObject* const* args, Py_ssize_t count) {
  View x, packed, scale, bias, y, x_scale, x_zero;
  const bool is_static = count == 10;
  if (!api || (count != 8 && !is_static) || !x.read(args[0]) || !packed.read(args[1]) || !scale.read(args[2]) ||
      !y.read(args[4]))
    Py_RETURN_FALSE;
  if (x.ndim < 1 || scale.ndim != 1 || packed.ndim != 3 || x.dtype() < 0 || scale.dtype() != kFloat32) Py_RETURN_FALSE;
  const size_t K = static_cast<size_t>(x.shape[x.ndim - 1]), M = x.elements() / K, N = scale.elements();
  if (packed.code != kDLInt || packed.bits != 8 || static_cast<size_t>(packed.shape[0]) != panels(N) ||
      static_cast<size_t>(packed.shape[1]) * kLine != panel_bytes(K) || packed.shape[2] != kLine || K > kMaxK)
    Py_RETURN_FALSE;
  if (y.dtype() != x.dtype() || y.elements() != M * N || !bias_fits(args[3], N, &bias)) Py_RETURN_FALSE;
  const long activation = PyLong_AsLong(args[5]);
  const int symmetric = PyObject_IsTrue(args[6]);
  if (activation < kNone || activation > kGeluTanh || symmetric < 0) {
    PyErr_Clear();
    Py_RETURN_FALSE;
  }
  const long bits = PyLong_AsLong(args[7]);
  if (bits != 8 && (bits != 7 || symmetric)) {
    PyErr_Clear();
    Py_RETURN_FALSE;
  }
  if (is_static && (!x_scale.read(args[8]) || x_scale.dtype() != kFloat32 || x_scale.elements() != 1 ||
                    !x_zero.read(args[9]) || x_zero.code != kDLInt || x_zero.bits != 32 || x_zero.elements() != 1))
    Py_RETURN_FALSE;
  return without_gil([&] {
    int8_linear(x.data, x.dtype(), static_cast<const int8_t*>(packed.data), static_cast<const float*>(scale.data),
                bias.data, bias.data ? bias.dtype() : 0, M, N, K, y.data, static_cast<int>(activation), symmetric != 0,
                static_cast<int>(bits), is_static ? static_cast<const float*>(x_scale.data) : nullptr,
                is_static ? static_cast<const int32_t*>(x_zero.data) : nullptr);
  });
}

// Reads absmax, nested_absmax, nested_map and nested_offset (or None, all three of them). count: absmax's elements;
// blocks: without those that fill up the last rows of a panel.
bool scales_fit(PyObject* const* args, size_t count, size_t blocks, Scales* scales) {
  View absmax, nested, map, offset;
  if (!absmax.read(args[0]) || absmax.elements() != count) return false;
  *scales = {absmax.data, nullptr, nullptr, 0};
  if (args[1] == Py_None) return absmax.dtype() == kFloat32 && args[2] == Py_None && args[3] == Py_None;
  if (absmax.code != kDLUInt || absmax.bits != 8) return false;
  if (!nested.read(args[1]) || nested.dtype() != kFloat32 ||
      nested.elements() != (blocks + kNestedBlock - 1) / kNestedBlock)
    return false;
  if (!map.read(args[2]) || map.dtype() != kFloat32 || map.elements() != 256) return false;
  if (!offset.read(args[3]) || offset.dtype() != kFloat32 || offset.elements() != 1) return false;
  *scales = {absmax.data, static_cast<const float*>(nested.data), static_cast<const float*>(map.data),
             *static_cast<const float*>(offset.data)};
  return true;
}

// linear_4bit(x, packed, absmax, nested_absmax, nested_map, nested_offset (or None, all three), bias or None, y,
// codebook, blocksize, as_int8) -> whether y was written. `codebook` is the address of a Codebook.
PyObject* linear_4bit_tensors(PyObject*, PyObject* const* args, Py_ssize_t count) {
  View x, packed, bias, y;
  if (!api || count != 11 || !x.read(args[0]) || !packed.read(args[1]) || !y.read(args[7])) Py_RETURN_FALSE;
  if (x.ndim < 1 || y.ndim < 1 || x.dtype() < 0 || y.dtype() != x.dtype()) Py_RETURN_FALSE;
  const size_t K = static_cast<size_t>(x.shape[x.ndim - 1]), N = static_cast<size_t>(y.shape[y.ndim - 1]),
               M = x.elements() / K;
  const void* book = PyLong_AsVoidPtr(args[8]);
  const size_t blocksize = PyErr_Occurred() ? 0 : PyLong_AsSize_t(args[9]);
  const int as_int8 = PyErr_Occurred() ? -1 : PyObject_IsTrue(args[10]);
  if (as_int8 < 0 || !book || blocksize < 32 || blocksize > 4096 || blocksize & (blocksize - 1)) {
    PyErr_Clear();
    Py_RETURN_FALSE;
  }
  const bool panelled = in_panels(N, K, blocksize);
  const size_t blocks = (N * K + blocksize - 1) / blocksize, rows = panels(N) * kPanel;
  // Codes in panels have two dimensions and flat ones have one: another device's form is not taken for this one's.
  if (packed.code != kDLUInt || packed.bits != 8 || packed.ndim != (panelled ? 2 : 1) ||
      packed.elements() != (panelled ? rows * K / 2 : (N * K + 1) / 2))
    Py_RETURN_FALSE;
  Scales scales;
  if (!scales_fit(args + 2, panelled ? rows * K / blocksize : blocks, blocks, &scales)) Py_RETURN_FALSE;
  if (y.elements() != M * N || !bias_fits(args[6], N, &bias)) Py_RETURN_FALSE;
  const Weight4Bit w{static_cast<const uint8_t*>(packed.data), scales, N, K, blocksize,
                     static_cast<const Codebook*>(book)};
  return without_gil(
      [&] { four_bit_linear(x.data, x.dtype(), w, bias.data, bias.data ? bias.dtype() : 0, M, y.data, as_int8 != 0); });
}

// use_exchange(torch.Tensor.__dlpack_c_exchange_api__, torch.Tensor, torch.nn.Parameter). Another major version is
// another ABI.
PyObject* use_exchange(PyObject*, PyObject* args) {
  PyObject *capsule, *tensor, *parameter;
  if (!PyArg_ParseTuple(args, "OO!O!", &capsule, &PyType_Type, &tensor, &PyType_Type, &parameter)) return nullptr;
  const auto* given = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (!given || !(is_neg = PyUnicode_InternFromString("is_neg"))) return nullptr;
  Py_INCREF(tensor_type = tensor);
  Py_INCREF(parameter_type = parameter);
  api = given->header.major == 1 && given->tensor_from_py_object ? given : nullptr;
  return PyBool_FromLong(api != nullptr);
}

PyMethodDef methods[] = {
    {"int8_linear_tensors", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(int8_linear_tensors)),
     METH_FASTCALL,
     "(x, packed, weight_scale, bias or None, y, activation, symmetric, bits[, x_scale, x_zero]) -> whether y was "
     "written; "
     "False: take the other way."},
    {"linear_4bit_tensors", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(linear_4bit_tensors)),
     METH_FASTCALL,
     "(x, packed, absmax, nested_absmax, nested_map, offset, bias or None, y, codebook, blocksize, as_int8) -> whether "
     "y was written."},
    {"use_exchange", use_exchange, METH_VARARGS,
     "(torch.Tensor.__dlpack_c_exchange_api__, torch.Tensor, torch.nn.Parameter) -> whether it can be used."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_tensor_functions(PyObject* module) { return PyModule_AddFunctions(module, methods) == 0; }

}  // namespace pyqkern
