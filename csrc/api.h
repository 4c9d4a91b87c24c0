// The operations on whole tensors: affine.cpp and int8.cpp cut them into pieces for the kernels and the threads.
// Pointers are to contiguous row-major data; the caller has checked shapes and types. Formulas: kernels.h.
#pragma once

#include "kernels.h"

namespace pyqkern {

void quantize(const void* x, int dtype, size_t outer, Channels c, uint8_t* q, int qtype);
void dequantize(const uint8_t* q, int qtype, size_t outer, Channels c, void* y, int dtype);
void min_max(const void* x, int dtype, size_t outer, size_t channels, size_t inner, float* lo, float* hi);

// w int8 [N, K] to and from packed int8 [panels(N), quads(K) + 1, 64].
void int8_pack(const int8_t* w, size_t N, size_t K, int8_t* packed);
void int8_unpack(const int8_t* packed, size_t N, size_t K, int8_t* w);

// y int32 [M, N] = a [M, K] (int8 or uint8) times the transpose of w int8 [N, K].
void int8_matmul(const uint8_t* a, bool is_unsigned, const int8_t* w, size_t M, size_t N, size_t K, int32_t* y);

// y [M, N] = the INT8 linear of x [M, K], both of `dtype`; bias [N] of bias_dtype or nullptr. x_scale, x_zero: one scale
// and zero point for all of x; nullptr: every row its own.
void int8_linear(const void* x, int dtype, const int8_t* packed, const float* w_scale, const void* bias, int bias_dtype,
                 size_t M, size_t N, size_t K, void* y, int activation, bool symmetric, const float* x_scale,
                 const int32_t* x_zero);

}  // namespace pyqkern
