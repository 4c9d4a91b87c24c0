// The table of one ISA. isa_*.cpp define PYQKERN_ISA and include this file.
#pragma once

#include "int8.inl"

#define PYQKERN_STRING2(x) #x
#define PYQKERN_STRING(x) PYQKERN_STRING2(x)

namespace pyqkern {
namespace PYQKERN_ISA {

extern const Kernels table;
const Kernels table = {
    PYQKERN_STRING(PYQKERN_ISA), sizeof(ROW_T), GEMV_ROWS, quantize, dequantize, min_max, widen,
    int8_pack, int8_quantize_rows, int8_quantize_rows_static, int8_load_rows, int8_gemm, int8_gemv,
};

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
