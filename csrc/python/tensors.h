#pragma once

#include <Python.h>

namespace pyqkern {

// Adds the functions that take tensors to the module; false with a Python error set where that fails.
bool add_tensor_functions(PyObject* module);

}  // namespace pyqkern
