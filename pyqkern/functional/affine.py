"""Affine quantization, `q = clamp(rint(x / scale) + zero_point)`: the public functions and how a tensor is cut.

Granularities, all with the same two arguments:

    axis=None                 per tensor: scale and zero_point are 0-dim
    axis=0                    per channel along one dimension of any tensor: [x.shape[0]]
    axis=(0, 1)               the dimensions that keep their own scale, e.g. per token of [batch, sequence, features]
    group_size=64             per group of 64 along `axis` (default: the last): x.shape with that dimension / 64

The numbers are those of torch.quantize_per_tensor (axis=None) and torch.quantize_per_channel (everything else), bit for
bit: the reciprocal of the scale is taken in fp32 and multiplied with, the zero point is added in fp32 before rounding
(in one fma per tensor, after a rounding of the product otherwise), and ties go to even. NaN gives the zero point, where
torch gives qmax or 0; so does 0 where the scale is below 2**-128 and its reciprocal infinite. bf16 and fp16 are widened
to fp32 first.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from pyqkern.backends import qrange
from pyqkern.ops.checks import INT, check_float, check_qtype, check_shape, short
from pyqkern.schemes import check_type

Axis = int | Sequence[int] | None


def choose_qparams_affine(
    x: Tensor,
    *,
    dtype: torch.dtype = torch.int8,
    axis: Axis = None,
    group_size: int | None = None,
    symmetric: bool = False,
    bits: int = 8,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover the range of x, zero included.

    x: fp32, bf16 or fp16, any shape and strides. dtype: torch.int8 or torch.uint8.
    axis, group_size: what keeps its own scale, as the head of `pyqkern.functional.affine` lists it.
    symmetric: zero is the middle code (0 for int8, 128 for uint8), the scale is absmax / 127.
    bits: see quantize_affine; with 4 the middle code is 0 or 8, the symmetric scale absmax / 7.

    Returns scale (fp32) and zero_point (int32). A range of zero, or of nothing, has scale 1; no scale is below 2**-126.

    Raises ValueError if x holds NaN or an infinity, or if axis or group_size do not fit; TypeError for other dtypes.

    >>> import torch, pyqkern
    >>> pyqkern.choose_qparams_affine(torch.tensor([-1.0, 0.5, 1.55]), dtype=torch.uint8)
    (tensor(0.0100), tensor(100, dtype=torch.int32))
    """
    check_type("x", x, Tensor, "a torch.Tensor")
    check_qtype("dtype", dtype, bits)
    check_type("symmetric", symmetric, bool, "a bool")
    cut = (_axes(axis), _group_size(group_size))
    return torch.ops.pyqkern.choose_qparams_affine(_detached(x), dtype, *cut, symmetric, bits)


def quantize_affine(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int | None = None,
    *,
    axis: Axis = None,
    group_size: int | None = None,
    dtype: torch.dtype = torch.int8,
    bits: int = 8,
) -> Tensor:
    """clamp(rint(x * (1/scale) + zero_point), qmin, qmax), as dtype (torch.int8 or torch.uint8), contiguous.

    x: fp32, bf16 or fp16, any shape and strides. scale: floating, finite and > 0; zero_point: integer, within
    [qmin, qmax], None means 0; both of the shape that axis and group_size ask for. On CUDA their
    values are not checked, because that would stop the stream.
    bits: 8, or 4: codes in [-8, 7] (int8) or [0, 15] (uint8), one to a byte; `pack_int4` puts two into one.

    Raises ValueError for values or shapes, TypeError for dtypes.

    >>> import torch, pyqkern
    >>> x = torch.tensor([[-1.0, 0.0, 2.0], [0.5, 0.25, 0.125]])
    >>> scale, zero_point = pyqkern.choose_qparams_affine(x, axis=0, symmetric=True)
    >>> pyqkern.quantize_affine(x, scale, zero_point, axis=0)
    tensor([[-64,   0, 127],
            [127,  64,  32]], dtype=torch.int8)
    """
    check_type("x", x, Tensor, "a torch.Tensor")
    check_qtype("dtype", dtype, bits)
    scale, zero_point = _qparams(scale, zero_point, x.device)
    cut = (_axes(axis), _group_size(group_size))
    return torch.ops.pyqkern.quantize_affine(_detached(x), scale, zero_point, *cut, dtype, bits)


def dequantize_affine(
    q: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int | None = None,
    *,
    axis: Axis = None,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """scale * (q - zero_point) in fp32, rounded once to dtype (torch.float32, bfloat16 or float16); contiguous.

    q: int8 or uint8, any shape and strides. scale, zero_point, axis, group_size: as for `quantize_affine`.

    Raises ValueError for values or shapes, TypeError for dtypes.

    >>> import torch, pyqkern
    >>> pyqkern.dequantize_affine(torch.tensor([0, 100, 255], dtype=torch.uint8), 0.5, 100)
    tensor([-50.0000,   0.0000,  77.5000])
    """
    check_type("q", q, Tensor, "a torch.Tensor")
    check_float("dtype", dtype)
    scale, zero_point = _qparams(scale, zero_point, q.device)
    return torch.ops.pyqkern.dequantize_affine(q, scale, zero_point, _axes(axis), _group_size(group_size), dtype)


def pack_int4(q: Tensor) -> Tensor:
    """Codes of four bits, two to a byte: uint8 [(numel + 1) // 2].

    q: int8 in [-8, 7] or uint8 in [0, 15], any shape and strides, taken in row-major order:

        bit   7 6 5 4   3 2 1 0
        byte   q[2*i]   q[2*i + 1]      int8 in two's complement; the last half of an odd one is 0

    Raises ValueError for codes outside of the range, TypeError for other dtypes.

    >>> import torch, pyqkern
    >>> pyqkern.pack_int4(torch.tensor([1, -1, 7], dtype=torch.int8))
    tensor([ 31, 112], dtype=torch.uint8)
    """
    check_type("q", q, Tensor, "a torch.Tensor")
    check_qtype("q", q.dtype)
    qmin, qmax = qrange(q.dtype, 4)
    if q.numel() and not (qmin <= int(q.min()) and int(q.max()) <= qmax):
        wrong = int(q.min()) if int(q.min()) < qmin else int(q.max())
        raise ValueError(
            f"q must be within [{qmin}, {qmax}], got {wrong}; quantize_affine(..., bits=4) makes such codes"
        )
    codes = (q.reshape(-1) & 15).view(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2))
    return codes[::2] << 4 | codes[1::2]


def unpack_int4(packed: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.int8) -> Tensor:
    """The codes that `pack_int4` packed, of that shape; dtype: torch.int8 or torch.uint8.

    Raises ValueError where packed does not have (numel + 1) // 2 elements, TypeError for other dtypes.

    >>> import torch, pyqkern
    >>> pyqkern.unpack_int4(torch.tensor([31, 112], dtype=torch.uint8), (3,))
    tensor([ 1, -1,  7], dtype=torch.int8)
    """
    check_type("packed", packed, Tensor, "a torch.Tensor")
    check_qtype("dtype", dtype)
    check_shape(shape)
    if packed.dtype is not torch.uint8:
        raise TypeError(f"packed must be torch.uint8, got {short(packed.dtype)}")
    numel = math.prod(shape)
    if packed.numel() != (numel + 1) // 2:
        raise ValueError(f"packed must have {(numel + 1) // 2} elements for shape {tuple(shape)}, got {packed.numel()}")
    packed = packed.reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[:numel].view(tuple(shape))
    return codes if dtype is torch.uint8 else (codes << 4).view(torch.int8) >> 4


def _detached(x: Tensor) -> Tensor:
    return x.detach() if x.requires_grad else x


def _axes(axis: Axis) -> Sequence[int] | None:
    axes = axis if axis is None or isinstance(axis, Sequence) else (axis,)
    for one in axes or ():
        check_type("axis", one, INT, "None, an int or several")
    return axes


def _group_size(group_size: int | None) -> int | None:
    if group_size is not None:
        check_type("group_size", group_size, INT, "None or an int")
    return group_size


def _qparams(
    scale: Tensor | float, zero_point: Tensor | int | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Both as tensors; their values are checked where they are used."""
    if not isinstance(scale, Tensor):
        check_type("scale", scale, Real, "a tensor or a number")
        scale = torch.tensor(float(scale), dtype=torch.float32, device=device)
    if zero_point is not None and not isinstance(zero_point, Tensor):
        check_type("zero_point", zero_point, Integral, "None, a tensor or an int")
        if not -(2**31) <= zero_point < 2**31:
            raise ValueError(f"zero_point must be within the range of the dtype, got {zero_point}")
        zero_point = torch.tensor(int(zero_point), dtype=torch.int64, device=device)
    return scale, zero_point
