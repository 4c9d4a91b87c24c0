// The table of one ISA. isa_*.cpp define PYQKERN_ISA and include this file.
#pragma once

#include "kernels/decoder.inl"
#include "kernels/fake_quantize.inl"
#include "kernels/four_bit_int8.inl"
#include "kernels/gradient.inl"
#include "kernels/int8_split.inl"
#include "kernels/optimizer.inl"
#include "kernels/recurrent.inl"

namespace pyqkern {
namespace PYQKERN_ISA {

extern const Kernels table;
const Kernels table = {
    PYQKERN_STRING(PYQKERN_ISA),
    NEEDS,
    sizeof(ROW_T),
    sizeof(Bytes::row_t),
    GEMV_ROWS,
    SPLIT_ROWS,
    DOT_ROWS,
    FLOAT_ROWS,
    TILE_PANELS,
    SHORT_SUMS,
    quantize,
    dequantize,
    min_max,
    fake_quantize,
    fake_quantize_backward,
    widen,
    int8_pack,
    int8_mark,
    int8_quantize_rows,
    int8_quantize_rows_static,
    int8_load_rows,
    int8_gemm,
    int8_gemv,
    int8_dot,
    softmax_codes,
    int8_quantize_heads,
    int8_pack_values,
    elementwise,
    add_layer_norm,
    add_rms_norm,
    add_rows,
    attention_scores,
    attention_softmax,
    attention_values,
    recurrent_gates,
    optimizer_step,
    square_sum,
    four_bit_quantize,
    four_bit_dequantize,
    four_bit_unpack_panel,
    four_bit_gemv,
    four_bit_load_rows,
    four_bit_gemv_int8,
    four_bit_dot,
    four_bit_expand,
    four_bit_expand_int8,
    four_bit_gemm_int8,
    int8_gemv_float,
    int8_expand,
    load_tile,
    int8_expand_rows,
    four_bit_expand_rows,
    float_gemm,
    finish_totals,
};

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
