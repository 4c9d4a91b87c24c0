// The shortest way from a Python tensor to a kernel: reading address, dtype, shape and strides of five tensors from
// Python costs 3 us, as much as the product of one token; torch's DLPack exchange functions (torch >= 2.10) do it in
// nanoseconds and without knowing torch. Every tensor is checked here; what does not fit is left to the Python way,
// which says what is wrong with it.
//
// The structures are DLPack's ABI, https://dmlc.github.io/dlpack (C API, DLPackExchangeAPI, version 1).
#include <Python.h>

#include <new>

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

// A contiguous tensor on the CPU.
struct View : DLTensor {
  bool read(PyObject* object) {
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

// int8_linear(x, packed, weight_scale, bias or None, y, activation, symmetric[, x_scale, x_zero]) -> whether y was
// written
PyObject* int8_linear_tensors(PyObject*, PyObject* const* args, Py_ssize_t count) {
  View x, packed, scale, bias, y, x_scale, x_zero;
  const bool is_static = count == 9;
  if (!api || (count != 7 && !is_static) || !x.read(args[0]) || !packed.read(args[1]) || !scale.read(args[2]) ||
      !y.read(args[4]))
    Py_RETURN_FALSE;
  if (x.ndim < 1 || scale.ndim != 1 || packed.ndim != 3 || x.dtype() < 0 || scale.dtype() != kFloat32) Py_RETURN_FALSE;
  const size_t K = static_cast<size_t>(x.shape[x.ndim - 1]), M = x.elements() / K, N = scale.elements();
  if (packed.code != kDLInt || packed.bits != 8 || static_cast<size_t>(packed.shape[0]) != panels(N) ||
      static_cast<size_t>(packed.shape[1]) != quads(K) + 2 || packed.shape[2] != kLine || K > kMaxK)
    Py_RETURN_FALSE;
  if (y.dtype() != x.dtype() || y.elements() != M * N) Py_RETURN_FALSE;
  const bool has_bias = args[3] != Py_None;
  if (has_bias && (!bias.read(args[3]) || bias.dtype() < 0 || bias.ndim != 1 || bias.elements() != N)) Py_RETURN_FALSE;
  const long activation = PyLong_AsLong(args[5]);
  if (activation < kNone || activation > kGeluTanh) {
    PyErr_Clear();
    Py_RETURN_FALSE;
  }
  const bool symmetric = PyObject_IsTrue(args[6]) == 1;
  if (is_static && (!x_scale.read(args[7]) || x_scale.dtype() != kFloat32 || x_scale.elements() != 1 ||
                    !x_zero.read(args[8]) || x_zero.code != kDLInt || x_zero.bits != 32 || x_zero.elements() != 1))
    Py_RETURN_FALSE;

  bool out_of_memory = false;
  Py_BEGIN_ALLOW_THREADS try {
    int8_linear(x.data, x.dtype(), static_cast<const int8_t*>(packed.data), static_cast<const float*>(scale.data),
                has_bias ? bias.data : nullptr, has_bias ? bias.dtype() : 0, M, N, K, y.data,
                static_cast<int>(activation), symmetric, is_static ? static_cast<const float*>(x_scale.data) : nullptr,
                is_static ? static_cast<const int32_t*>(x_zero.data) : nullptr);
  } catch (const std::bad_alloc&) { out_of_memory = true; }
  Py_END_ALLOW_THREADS if (out_of_memory) return PyErr_NoMemory();
  Py_RETURN_TRUE;
}

// linear_4bit(x, packed, absmax, nested_absmax, nested_map, offset (or None, all three), bias or None, y, codebook,
// blocksize, as_int8) -> whether y was written. `codebook` is the address of a Codebook.
PyObject* linear_4bit_tensors(PyObject*, PyObject* const* args, Py_ssize_t count) {
  View x, packed, absmax, nested, map, offset, bias, y;
  if (!api || count != 11 || !x.read(args[0]) || !packed.read(args[1]) || !absmax.read(args[2]) || !y.read(args[7]))
    Py_RETURN_FALSE;
  if (x.ndim < 1 || y.ndim < 1 || x.dtype() < 0 || y.dtype() != x.dtype()) Py_RETURN_FALSE;
  const size_t K = static_cast<size_t>(x.shape[x.ndim - 1]), N = static_cast<size_t>(y.shape[y.ndim - 1]),
               M = x.elements() / K;
  const size_t blocksize = PyLong_AsSize_t(args[9]);
  const void* book = PyLong_AsVoidPtr(args[8]);
  if (PyErr_Occurred() || !book || blocksize < 32 || blocksize > 4096 || blocksize & (blocksize - 1)) {
    PyErr_Clear();
    Py_RETURN_FALSE;
  }
  if (y.elements() != M * N) Py_RETURN_FALSE;
  const size_t blocks = (N * K + blocksize - 1) / blocksize, rows = panels(N) * kPanel;
  const bool panelled = in_panels(N, K, blocksize), is_nested = args[3] != Py_None;
  if (packed.code != kDLUInt || packed.bits != 8 || packed.elements() != (panelled ? rows * K / 2 : (N * K + 1) / 2) ||
      absmax.elements() != (panelled ? rows * K / blocksize : blocks))
    Py_RETURN_FALSE;
  if (!is_nested ? absmax.dtype() != kFloat32 || args[4] != Py_None || args[5] != Py_None
                 : absmax.code != kDLUInt || absmax.bits != 8 || !nested.read(args[3]) || nested.dtype() != kFloat32 ||
                       nested.elements() != (blocks + kNestedBlock - 1) / kNestedBlock || !map.read(args[4]) ||
                       map.dtype() != kFloat32 || map.elements() != 256 || !offset.read(args[5]) ||
                       offset.dtype() != kFloat32 || offset.elements() != 1)
    Py_RETURN_FALSE;
  const bool has_bias = args[6] != Py_None, as_int8 = PyObject_IsTrue(args[10]) == 1;
  if (has_bias && (!bias.read(args[6]) || bias.dtype() < 0 || bias.ndim != 1 || bias.elements() != N)) Py_RETURN_FALSE;
  Scales scales{absmax.data, nullptr, nullptr, 0};
  if (is_nested)
    scales = {absmax.data, static_cast<const float*>(nested.data), static_cast<const float*>(map.data),
              *static_cast<const float*>(offset.data)};
  const Weight4Bit w{static_cast<const uint8_t*>(packed.data), scales, N, K, blocksize,
                     static_cast<const Codebook*>(book)};

  bool out_of_memory = false;
  Py_BEGIN_ALLOW_THREADS try {
    four_bit_linear(x.data, x.dtype(), w, has_bias ? bias.data : nullptr, has_bias ? bias.dtype() : 0, M, y.data,
                    as_int8);
  } catch (const std::bad_alloc&) { out_of_memory = true; }
  Py_END_ALLOW_THREADS if (out_of_memory) return PyErr_NoMemory();
  Py_RETURN_TRUE;
}

// use_exchange(capsule): torch.Tensor.__dlpack_c_exchange_api__. Another major version is another ABI.
PyObject* use_exchange(PyObject*, PyObject* capsule) {
  const auto* given = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (!given) return nullptr;
  api = given->header.major == 1 && given->tensor_from_py_object ? given : nullptr;
  return PyBool_FromLong(api != nullptr);
}

PyMethodDef methods[] = {
    {"int8_linear_tensors", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(int8_linear_tensors)),
     METH_FASTCALL,
     "(x, packed, weight_scale, bias or None, y, activation, symmetric[, x_scale, x_zero]) -> whether y was written; "
     "False: take the other way."},
    {"linear_4bit_tensors", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(linear_4bit_tensors)),
     METH_FASTCALL,
     "(x, packed, absmax, nested_absmax, nested_map, offset, bias or None, y, codebook, blocksize, as_int8) -> whether "
     "y was written."},
    {"use_exchange", use_exchange, METH_O,
     "Takes torch.Tensor.__dlpack_c_exchange_api__; returns whether it can be used."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_tensor_functions(PyObject* module) { return PyModule_AddFunctions(module, methods) == 0; }

}  // namespace pyqkern
