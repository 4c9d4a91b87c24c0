// Reading tensors: address, dtype, shape and strides of five tensors, asked for in Python, cost 3 us, as much as the
// product of one token. torch's DLPack exchange functions (torch >= 2.10) give them in nanoseconds and without knowing
// torch; older versions make a capsule of the same structure.
#include "python/tensors.h"

#include <cstring>
#include <string>

namespace pyqkern {
namespace {

// DLPack's DLPackExchangeAPI, version 1.
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

// What torch gives, by use_torch.
const ExchangeApi* exchange = nullptr;
PyObject *tensor_type = nullptr, *parameter_type = nullptr, *to_capsule = nullptr, *num_threads = nullptr;
PyObject* is_neg = nullptr;                                // a method of Tensor
PyObject *untyped_storage = nullptr, *data_ptr = nullptr;  // names of methods

constexpr size_t kMaxCodebooks = 16;
Codebook codebooks[kMaxCodebooks];
size_t codebook_count = 0;

std::string dtype_name(int code, int bits) {
  const char* kind = code == kDLInt      ? "int"
                     : code == kDLUInt   ? "uint"
                     : code == kDLFloat  ? "float"
                     : code == kDLBfloat ? "bfloat"
                     : code == kDLBool   ? "bool"
                                         : "another type of ";
  return kind + (code == kDLBool ? "" : std::to_string(bits));
}

std::string shape_text(const DLTensor& t) {
  std::string text;
  for (int i = 0; i < t.ndim; ++i) text += (i ? ", " : "") + std::to_string(t.shape[i]);
  return "[" + text + "]";
}

// Fills `t`, and returns what owns its shape, or nullptr. False where torch cannot: no memory on a device of DLPack's.
bool read(PyObject* object, DLTensor* t, PyObject** owner) {
  *owner = nullptr;
  if (exchange) {
    if (!exchange->tensor_from_py_object(object, t)) return true;
  } else if (PyObject* capsule = PyObject_CallOneArg(to_capsule, object)) {
    // A DLManagedTensor starts with its DLTensor.
    if (const auto* held = static_cast<const DLTensor*>(PyCapsule_GetPointer(capsule, "dltensor"))) {
      *t = *held;
      *owner = capsule;
      return true;
    }
    Py_DECREF(capsule);
  }
  PyErr_Clear();
  return false;
}

// Whether the object's storage holds the bytes [begin, end): resizing a storage leaves its tensors as they were.
bool holds(PyObject* object, const void* begin, const void* end) {
  PyObject* storage = PyObject_CallMethodNoArgs(object, untyped_storage);
  const Py_ssize_t bytes = storage ? PyObject_Size(storage) : -1;
  PyObject* address = bytes < 0 ? nullptr : PyObject_CallMethodNoArgs(storage, data_ptr);
  const auto start = address ? reinterpret_cast<uintptr_t>(PyLong_AsVoidPtr(address)) : 0;
  Py_XDECREF(address);
  Py_XDECREF(storage);
  if (PyErr_Occurred()) return PyErr_Clear(), false;
  return start <= reinterpret_cast<uintptr_t>(begin) &&
         reinterpret_cast<uintptr_t>(end) <= start + static_cast<size_t>(bytes);
}

}  // namespace

Tensor::Tensor(const char* name, PyObject* object, bool strided, bool trusted) : name(name), owner(nullptr) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (!tensor_type || (type != tensor_type && type != parameter_type))
    throw py::type_error(std::string(name) + " must be a torch.Tensor, and no subclass, got " +
                         Py_TYPE(object)->tp_name);
  PyObject* negative = PyObject_CallOneArg(is_neg, object);
  Py_XDECREF(negative);  // True and False outlive this
  if (negative != Py_False) {
    PyErr_Clear();
    throw py::value_error(std::string(name) + " must not have the negative bit; use resolve_neg()");
  }
  if (!read(object, this, &owner) || device_type != kDLCPU)
    throw py::value_error(std::string(name) + " must be on the CPU");
  if (!data || lanes != 1) throw py::value_error(std::string(name) + " must have elements");
  data = static_cast<char*>(data) + byte_offset;
  int64_t expected = 1, last = 0;  // elements, and the place of the last one
  for (int i = ndim - 1; i >= 0; --i) {
    last += (shape[i] - 1) * (strides ? strides[i] : expected);
    if (!strided && shape[i] != 1 && strides && strides[i] != expected)
      throw py::value_error(std::string(name) + " must be contiguous");
    expected *= shape[i];
  }
  if (expected <= 0) throw py::value_error(std::string(name) + " must have elements");
  if (!trusted && !holds(object, data, static_cast<char*>(data) + (static_cast<size_t>(last) + 1) * (bits / 8)))
    throw py::value_error(std::string(name) + " must not be larger than its storage");
}

void Tensor::check_shape(std::initializer_list<size_t> sizes) const {
  int i = 0;
  bool same = static_cast<size_t>(ndim) == sizes.size();
  std::string wanted;
  for (size_t n : sizes) same = same && size(i++) == n;
  if (same) return;
  for (size_t n : sizes) wanted += (wanted.empty() ? "" : ", ") + std::to_string(n);
  fail_shape("[" + wanted + "]");
}

void Tensor::fail_shape(const std::string& rule) const {
  throw py::value_error(std::string(name) + " must be " + rule + ", got " + shape_text(*this));
}
void Tensor::fail_type(int wanted_code, int wanted_bits) const {
  throw py::type_error(std::string(name) + " must be " + dtype_name(wanted_code, wanted_bits) + ", got " +
                       dtype_name(code, bits));
}
void Tensor::fail_floats() const {
  throw py::type_error(std::string(name) + " must be float32, bfloat16 or float16, got " + dtype_name(code, bits));
}

Floats bias_of(PyObject* object, size_t n, bool trusted) {
  if (object == Py_None) return {};
  const Tensor bias("bias", object, false, trusted);
  if (bias.ndim != 1 || bias.elements() != n) bias.check_shape({n});
  return {bias.data, bias.dtype()};
}

size_t product(std::initializer_list<size_t> sizes) {
  size_t n = 1;
  for (size_t size : sizes)
    if (__builtin_mul_overflow(n, size, &n) || n > size_t{1} << 60)
      throw py::value_error("sizes must be of a tensor that memory can hold");
  return n;
}

void check_blocksize(size_t blocksize) {
  if (blocksize < 32 || blocksize > 4096 || (blocksize & (blocksize - 1)))
    throw py::value_error("blocksize must be a power of two from 32 to 4096, got " + std::to_string(blocksize));
}

const Codebook* codebook(size_t number) {
  if (number >= codebook_count)
    throw py::value_error("codebook must be what add_codebook returned, got " + std::to_string(number));
  return &codebooks[number];
}

Scales scales_of(PyObject* absmax, PyObject* nested, PyObject* map, PyObject* offset, size_t count, size_t blocks,
                 bool trusted) {
  const Tensor a("absmax", absmax, false, trusted);
  if (nested == Py_None && map == Py_None && offset == Py_None) return {a.as<float>(count), nullptr, nullptr, 0};
  return {a.as<uint8_t>(count),
          Tensor("nested_absmax", nested, false, trusted).as<float>((blocks + kNestedBlock - 1) / kNestedBlock),
          Tensor("nested_map", map, false, trusted).as<float>(256),
          *Tensor("nested_offset", offset, false, trusted).as<float>(1)};
}

Weight4Bit weight_4bit(PyObject* packed, PyObject* absmax, PyObject* nested, PyObject* map, PyObject* offset, size_t N,
                       size_t K, size_t blocksize, size_t book, bool trusted) {
  check_blocksize(blocksize);
  const size_t elements = product({panels(N) * kPanel, K}), blocks = (N * K + blocksize - 1) / blocksize;
  const bool panelled = in_panels(N, K, blocksize);
  // Codes in panels have two dimensions and flat ones have one: another device's form is not taken for this one's.
  const Tensor codes("packed", packed, false, trusted);
  codes.check_rank(panelled ? 2 : 1);
  return {codes.as<uint8_t>(panelled ? elements / 2 : (N * K + 1) / 2),
          scales_of(absmax, nested, map, offset, panelled ? elements / blocksize : blocks, blocks, trusted),
          N,
          K,
          blocksize,
          codebook(book)};
}

Packed packed_int8(PyObject* packed, size_t N, size_t K, bool trusted) {
  const Tensor t("packed", packed, false, trusted);
  // [panels][lines], the lines of all panels first and those of their excess behind them.
  const size_t lines = panel_bytes(K) / kLine, given = t.ndim == 3 ? t.size(1) : 0;
  if (t.ndim != 3 || t.size(0) != panels(N) || t.size(2) != kLine ||
      (given != lines && given != lines + excess_bytes(K) / kLine))
    t.check_shape({panels(N), lines, kLine});
  int8_t* first = t.as<int8_t>();
  return {first, given > lines ? first + panels(N) * panel_bytes(K) : nullptr};
}

void check_activation(long activation) {
  if (activation < kNone || activation > kGeluTanh)
    throw py::value_error("activation must be from 0 to 3, got " + std::to_string(activation));
}

void check_bits(long bits, bool symmetric) {
  if (bits != 8 && (bits != 7 || symmetric))
    throw py::value_error("bits must be 8, or 7 for asymmetric codes, got " + std::to_string(bits));
}

bool interrupted() {
  py::gil_scoped_acquire acquired;
  return PyErr_CheckSignals() != 0;  // on Python's main thread; on others it answers 0
}

void use_torchs_threads() {
  // OpenMP keeps the number for each thread, and torch sets it in a thread where it first runs or is asked.
  static thread_local bool asked = false;
  if (asked || !num_threads) return;
  PyObject* number = PyObject_CallNoArgs(num_threads);
  if (!number) throw py::error_already_set();
  Py_DECREF(number);
  asked = true;
}

void add_tensors(py::module_& m) {
  m.def(
      "use_torch",
      [](py::type tensor, py::type parameter, py::object to_dlpack, py::object get_num_threads, py::object capsule) {
        const ExchangeApi* given = nullptr;
        if (!capsule.is_none()) {
          given = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
          if (!given) throw py::error_already_set();
        }
        // Another major version is another ABI.
        exchange = given && given->header.major == 1 && given->tensor_from_py_object ? given : nullptr;
        is_neg = PyObject_GetAttrString(tensor.ptr(), "is_neg");
        untyped_storage = PyUnicode_InternFromString("untyped_storage");
        data_ptr = PyUnicode_InternFromString("data_ptr");
        if (!is_neg || !untyped_storage || !data_ptr) throw py::error_already_set();
        to_capsule = to_dlpack.release().ptr();
        num_threads = get_num_threads.release().ptr();
        parameter_type = parameter.release().ptr();
        tensor_type = tensor.release().ptr();
        return exchange != nullptr;
      },
      "(torch.Tensor, torch.nn.Parameter, torch._C._to_dlpack, torch.get_num_threads, "
      "torch.Tensor.__dlpack_c_exchange_api__ or None) -> whether tensors are read the fast way. Comes first.");
  m.def(
      "add_codebook",
      [](py::handle record) {
        const Tensor t("record", record);
        const void* bytes = t.as<uint8_t>(sizeof(Codebook));
        if (codebook_count == kMaxCodebooks) throw py::value_error("there is no room for another codebook");
        memcpy(&codebooks[codebook_count], bytes, sizeof(Codebook));
        return codebook_count++;
      },
      "The number of a codebook, given as the bytes of struct Codebook.");
}

}  // namespace pyqkern
