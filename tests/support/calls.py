"""Calls of the operators on small tensors, for the tests of all of them."""

import torch
from strategies import floats, integers

import pyqkern  # noqa: F401  registers the operators
from pyqkern.backends import cpu

ops = torch.ops.pyqkern

X = floats((4, 96), 1)
W = integers((40, 96), 2, torch.int8)
SCALE, BIAS = torch.rand(40) * 0.01 + 1e-3, torch.randn(40)
X_SCALE, X_ZERO = torch.rand(4) + 0.1, torch.arange(4, dtype=torch.int32)
Q = integers((4, 96), 3, torch.int8)
WIDE, MANY = integers((40, 256), 4, torch.int8) // 4, floats((33, 256), 5)  # which a split weight is for

CALLS = {
    "choose_qparams_affine": [
        (X, torch.int8, None, None, False),
        (X, torch.uint8, [0], None, True),
        (X.half(), torch.int8, None, 32, False),
    ],
    "quantize_affine": [
        (X, torch.tensor(0.1), None, None, None, torch.int8),
        (X, X_SCALE, X_ZERO, [0], None, torch.uint8),
        (X.T, X_SCALE, X_ZERO, [1], None, torch.int8),
        (X.bfloat16(), torch.ones(4, 3), None, None, 32, torch.int8),
        (X, torch.ones(2, 96), None, [0], 2, torch.int8),
    ],
    "dequantize_affine": [
        (Q, torch.tensor(0.1), None, None, None, torch.float32),
        (Q.T, X_SCALE, X_ZERO, [1], None, torch.float16),
        (Q, torch.ones(4, 3), None, None, 32, torch.bfloat16),
    ],
    "fake_quantize": [
        (X, 96, X_SCALE, X_ZERO, 0, 255),
        (X.T.half(), 32, torch.ones(1), None, -127, 127),
        (X[:0], 96, torch.ones(1), None, -8, 7),
    ],
    "fake_quantize_rows": [(X, 96, torch.uint8, False, 7), (X.bfloat16(), 32, torch.int8, True, 4)],
    "fake_quantize_backward": [
        (X, X.flip(0), 96, X_SCALE, X_ZERO, 0, 127),
        (X.T, X.T, 96, torch.ones(1), None, -127, 127),
        (X[:0], X[:0], 96, torch.ones(1), None, -127, 127),
    ],
    "int8_matmul": [(Q, W), (Q.to(torch.uint8).view(2, 2, 96), W), (Q[:0], W)],
    "int8_pack": [(W,), (W[:3, :5],), (W[:0],), (WIDE, True)],
    "int8_quantize_weight": [(X, None, False), (MANY.half(), torch.ones(33), True), (X[:0], None, True)],
    "int8_unpack": [(ops.int8_pack(W), 40, 96), (ops.int8_pack(WIDE, True), 40, 256)],
    "int8_linear": [
        (X, ops.int8_pack(W), SCALE, BIAS, "none", False),
        (X.view(2, 2, 96).bfloat16(), ops.int8_pack(W), SCALE, None, "gelu", True),
        (X.half()[0], ops.int8_pack(W), SCALE, BIAS.half(), "relu", False),
        (X[:0], ops.int8_pack(W), SCALE, BIAS, "none", False),
        (MANY, ops.int8_pack(WIDE, True), SCALE, BIAS, "none", False),
    ],
    "int8_linear_static": [
        (X, ops.int8_pack(W), SCALE, BIAS, "none", torch.tensor([0.02]), torch.tensor([90], dtype=torch.int32)),
        (X.half()[0], ops.int8_pack(W), SCALE, None, "relu", torch.ones(1), torch.zeros(1, dtype=torch.int32)),
        (X[:0], ops.int8_pack(W), SCALE, BIAS, "none", torch.ones(1), torch.zeros(1, dtype=torch.int32)),
    ],
    "int8_linear_weight_only": [
        (X, ops.int8_pack(W), SCALE, BIAS),
        (X.view(2, 2, 96).bfloat16(), ops.int8_pack(W), SCALE, None),
        (X.half()[0], ops.int8_pack(W), SCALE, BIAS.half()),
        (X[:0], ops.int8_pack(W), SCALE, BIAS),
        (MANY, ops.int8_pack(WIDE, True), SCALE, BIAS),
    ],
    "int8_linear_outlier": [
        (X, ops.int8_pack(W), SCALE, BIAS, 6.0, False),
        (X.view(2, 2, 96), ops.int8_pack(W), SCALE, None, float(X.abs().median()), True),
        (X[:0], ops.int8_pack(W), SCALE, BIAS, 6.0, False),
    ],
}

PACKED, ABSMAX = ops.quantize_4bit(floats((40, 128), 5), "nf4", 64)
LINES, SCALES = ops.pack_4bit(PACKED, 40, 128, 64), cpu.pack_scales(ABSMAX, 40, 128, 64)
X4, PLAIN, GRAD = floats((4, 128), 6), (None, None, None), floats((4, 40), 7)
CALLS |= {
    "quantize_4bit": [(X, "nf4", 32), (X.T.half(), "fp4", 64), (X[:0], "nf4", 64)],
    "dequantize_4bit": [
        (PACKED, ABSMAX, *PLAIN, "nf4", 64, [40, 128], torch.float32),
        (PACKED, ABSMAX, *PLAIN, "fp4", 64, [40, 128], torch.bfloat16),
    ],
    "quantize_int4": [(X, 32), (X.T.half(), 64), (X[:0], 64)],
    "pack_4bit": [(PACKED, 40, 128, 64)],
    "unpack_4bit": [(LINES, 40, 128, 64)],
    "linear_4bit": [
        (X4, LINES, SCALES, *PLAIN, BIAS, "nf4", 64, 40, "auto"),
        (X4.bfloat16().view(2, 2, 128), LINES, SCALES, *PLAIN, None, "nf4", 64, 40, "int8"),
        (X4[:0], LINES, SCALES, *PLAIN, BIAS, "nf4", 64, 40, "fp32"),
    ],
    "int8_grad_input": [
        (GRAD, ops.int8_pack(W), SCALE, 96),
        (GRAD.view(2, 2, 40).bfloat16(), ops.int8_pack(WIDE, True), SCALE, 256),
        (GRAD[:0], ops.int8_pack(W), SCALE, 96),
    ],
    "grad_input_4bit": [
        (GRAD, LINES, SCALES, *PLAIN, "nf4", 64, 128),
        (GRAD.view(2, 2, 40).bfloat16(), LINES, SCALES, *PLAIN, "nf4", 64, 128),
        (GRAD[:0], LINES, SCALES, *PLAIN, "nf4", 64, 128),
    ],
}
