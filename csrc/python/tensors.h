// Python tensors as the kernels take them, and how a kernel is called. All is checked while the GIL is held: what a
// kernel is given has memory of the size that it reads or writes.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <vector>

#include "api.h"
#include "parallel.h"

namespace pyqkern {

namespace py = pybind11;

// DLPack's ABI, https://dmlc.github.io/dlpack (C API).
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
enum { kDLCPU = 1, kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6 };

// The code and bits of an element.
template <class T> struct Element;
template <> struct Element<float> { static constexpr int code = kDLFloat, bits = 32; };
template <> struct Element<int8_t> { static constexpr int code = kDLInt, bits = 8; };
template <> struct Element<uint8_t> { static constexpr int code = kDLUInt, bits = 8; };
template <> struct Element<int32_t> { static constexpr int code = kDLInt, bits = 32; };
template <> struct Element<int64_t> { static constexpr int code = kDLInt, bits = 64; };

// That no storage was resized since the tensor was made is not asked where a call may take microseconds, as torch's own
// operators do not: two calls into Python for each tensor are 4 % of the product of one token. An emptied storage has no
// address and is refused.
constexpr bool kTrusted = true;

// The memory of a tensor on the CPU that is torch.Tensor or nn.Parameter and no subclass, whose values may be elsewhere.
// Lives no longer than the object. Throws py::type_error and py::value_error, which name it.
class Tensor : public DLTensor {
 public:
  // strided: it need not be contiguous. trusted: see kTrusted.
  Tensor(const char* name, PyObject* object, bool strided = false, bool trusted = false);
  Tensor(const char* name, py::handle object, bool strided = false, bool trusted = false)
      : Tensor(name, object.ptr(), strided, trusted) {}
  Tensor(const Tensor&) = delete;
  ~Tensor() { Py_XDECREF(owner); }

  size_t elements() const {
    size_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= static_cast<size_t>(shape[i]);
    return n;
  }
  size_t size(int dimension) const { return static_cast<size_t>(shape[dimension]); }
  void check_rank(int rank) const {
    if (ndim != rank) fail_shape("of " + std::to_string(rank) + " dimensions");
  }
  void check_elements(size_t n) const {
    if (elements() != n) fail_shape("of " + std::to_string(n) + " elements");
  }
  void check_shape(std::initializer_list<size_t> sizes) const;

  template <class T> bool is() const { return code == Element<T>::code && bits == Element<T>::bits; }
  // Its elements, which must be of type T.
  template <class T> T* as() const {
    if (!is<T>()) fail_type(Element<T>::code, Element<T>::bits);
    return static_cast<T*>(data);
  }
  template <class T> T* as(size_t n) const {
    T* p = as<T>();
    check_elements(n);
    return p;
  }
  // The Dtype of floats.
  int dtype() const {
    if (is<float>()) return kFloat32;
    if (bits != 16 || (code != kDLBfloat && code != kDLFloat)) fail_floats();
    return code == kDLBfloat ? kBFloat16 : kFloat16;
  }

  [[noreturn]] void fail_shape(const std::string& rule) const;

 private:
  [[noreturn]] void fail_type(int wanted_code, int wanted_bits) const;
  [[noreturn]] void fail_floats() const;

  const char* name;
  PyObject* owner;  // of shape and strides, or nullptr
};

// Floats of any Dtype, or nothing.
struct Floats {
  void* data = nullptr;
  int dtype = kFloat32;
};
// None, or a bias [n]. Here and below, trusted: see kTrusted.
Floats bias_of(PyObject* object, size_t n, bool trusted = false);

// The product of sizes. Throws py::value_error where it is more than memory can hold.
size_t product(std::initializer_list<size_t> sizes);

// Both throw py::value_error.
void check_blocksize(size_t blocksize);
const Codebook* codebook(size_t number);

// absmax, and nested_absmax, nested_map and nested_offset, which are None all three or none of them. count: of absmax's
// elements; blocks: without those that fill up the last rows of a panel.
Scales scales_of(PyObject* absmax, PyObject* nested, PyObject* map, PyObject* offset, size_t count, size_t blocks,
                 bool trusted = false);

// A weight [N, K] in the form that in_panels tells.
Weight4Bit weight_4bit(PyObject* packed, PyObject* absmax, PyObject* nested, PyObject* map, PyObject* offset, size_t N,
                       size_t K, size_t blocksize, size_t book, bool trusted = false);

// An INT8 weight [N, K] as int8_pack makes it.
Packed packed_int8(PyObject* packed, size_t N, size_t K, bool trusted = false);

void check_activation(long activation);
void check_bits(long bits, bool symmetric);

// Whether the caller pressed Ctrl-C, a Python error being set then. Wants the GIL not to be held.
bool interrupted();

// Sees to it that this thread uses as many threads as torch would here.
void use_torchs_threads();

// Runs f without the GIL. Ctrl-C ends it where it takes long: KeyboardInterrupt is thrown.
template <class F> void without_gil(const F& f) {
  use_torchs_threads();
  try {
    py::gil_scoped_release released;
    const CallScope scope(&interrupted);
    f();
  } catch (const Interrupted&) { throw py::error_already_set(); }
}

// The same for what must not end half-way: Ctrl-C waits.
template <class F> void without_gil_to_the_end(const F& f) {
  use_torchs_threads();
  py::gil_scoped_release released;
  f();
}

// Add what they name to the module.
void add_tensors(py::module_& m);
void add_linears(py::module_& m);
void add_layers(py::module_& m);
void add_snapshot(py::module_& m);
void add_optimizers(py::module_& m);

}  // namespace pyqkern
