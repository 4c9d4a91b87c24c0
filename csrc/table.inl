// The table of one ISA. isa_*.cpp define PYQKERN_ISA and include this file.
#pragma once

#include "encoder.inl"
#include "nf4.inl"

#define PYQKERN_STRING2(x) #x
#define PYQKERN_STRING(x) PYQKERN_STRING2(x)

namespace pyqkern {
namespace PYQKERN_ISA {

extern const Kernels table;
const Kernels table = {
    PYQKERN_STRING(PYQKERN_ISA), sizeof(ROW_T), GEMV_ROWS, DOT_ROWS, quantize, dequantize, min_max, widen,
    int8_pack, int8_quantize_rows, int8_quantize_rows_static, int8_load_rows, int8_gemm, int8_gemv, int8_dot,
    softmax_codes, int8_quantize_heads, int8_pack_values, elementwise, add_layer_norm,
    nf4_quantize, nf4_dequantize, nf4_unpack_panel, nf4_gemv, nf4_gemv_int8, nf4_dot, nf4_expand, nf4_expand_int8, nf4_gemm,
    nf4_gemm_int8, nf4_finish, nf4_finish_bf16,
};

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
