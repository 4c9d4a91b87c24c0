"""The operators of 4-bit weights: quantize_4bit, quantize_int4, dequantize_4bit, pack_4bit, unpack_4bit, linear_4bit,
embedding_4bit.

torch.library knows tensors and numbers: this is the one place where a Weight4bit is taken apart for the schema of an
operator, and put together behind it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyqkern.backends import (
    BITSANDBYTES_TYPES,
    NESTED_BLOCKSIZE,
    QUANT_TYPES,
    Kernels,
    Shape,
    Weight4bit,
    reference,
)
from pyqkern.ops import registry
from pyqkern.ops.checks import check_float, check_ids, checked_rows
from pyqkern.ops.registry import kernels_of, operator
from pyqkern.schemes import BLOCKSIZES, COMPUTE, check_type

TENSORS = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_map, Tensor? nested_offset"

# ---- checks


def check_format(quant_type: str, blocksize: int, quant_types: Sequence[str] = QUANT_TYPES) -> None:
    check_type("quant_type", quant_type, str, "a str")
    check_type("blocksize", blocksize, int, "an int")
    if quant_type not in quant_types:
        raise ValueError(f"quant_type must be one of {', '.join(quant_types)}, got {quant_type!r}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {blocksize}")


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: Shape, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}; move the module with .to()")
    if tensor.dtype is not dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    # Flat data may be a column or a row, as bitsandbytes has it; a form in panels has two dimensions.
    flat = len(shape) < 2 and tensor.numel() == math.prod(shape) and tensor.numel() in (0, max(tensor.shape, default=1))
    if not flat and tensor.shape != shape:
        raise ValueError(
            f"{name} must be {dtype} of {math.prod(shape)} elements, {list(shape)}, for this shape and blocksize on "
            f"{device.type}, got {list(tensor.shape)}; .to() moves a module, its state_dict loads on every device"
        )


def check_weight(weight: Weight4bit, shapes: tuple[Shape, Shape], device: torch.device) -> None:
    """Format, dtypes and shapes. shapes: of packed and absmax, in the form that is meant."""
    packed, absmax, nested_absmax, nested_map, nested_offset, quant_type, blocksize, shape = weight
    check_format(quant_type, blocksize)
    _check("packed", packed, torch.uint8, shapes[0], device)
    if nested_absmax is None and nested_map is None and nested_offset is None:
        return _check("absmax", absmax, torch.float32, shapes[1], device)
    if nested_absmax is None or nested_map is None or nested_offset is None:
        raise ValueError("nested_absmax, nested_map and nested_offset must be given together, or none of them")
    blocks = -(-math.prod(shape) // blocksize)
    _check("absmax", absmax, torch.uint8, shapes[1], device)
    _check("nested_absmax", nested_absmax, torch.float32, (-(-blocks // NESTED_BLOCKSIZE),), device)
    _check("nested_map", nested_map, torch.float32, (256,), device)
    _check("nested_offset", nested_offset, torch.float32, (), device)


def flat_shapes(shape: Sequence[int], blocksize: int) -> tuple[Shape, Shape]:
    """Of packed and absmax of a tensor that is not packed for a linear."""
    numel = math.prod(shape)
    return ((numel + 1) // 2,), (-(-numel // blocksize),)


def _check_sizes(n: int, k: int, blocksize: int) -> None:
    if n < 0 or k < 0:
        raise ValueError(f"n and k must not be negative, got {n} and {k}")
    check_format("nf4", blocksize)


def check_packed_4bit(weight: Weight4bit, device: torch.device) -> None:
    """weight: of a linear, in the form of the device's backend."""
    n, k = weight.shape
    _check_sizes(n, k, weight.blocksize)
    check_weight(weight, kernels_of(device).packed_shapes_4bit(n, k, weight.blocksize), device)


def contiguous(weight: Weight4bit) -> Weight4bit:
    return Weight4bit._make((*(None if t is None else t.contiguous() for t in weight[:5]), *weight[5:]))


def _flat(weight: Weight4bit) -> Weight4bit:
    return Weight4bit._make((*(None if t is None else t.reshape(-1) for t in weight[:5]), *weight[5:]))


# ---- quantize and dequantize


def _quantize_fake(w: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    check_float("w", w.dtype)
    check_format(quant_type, blocksize, BITSANDBYTES_TYPES)
    packed = w.new_empty((w.numel() + 1) // 2, dtype=torch.uint8)
    return packed, w.new_empty(-(-w.numel() // blocksize), dtype=torch.float32)


@operator("quantize_4bit(Tensor w, str quant_type, int blocksize) -> (Tensor, Tensor)", _quantize_fake)
def _quantize(kernels: Kernels, w: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    check_float("w", w.dtype)
    check_format(quant_type, blocksize, BITSANDBYTES_TYPES)
    if w.numel() == 0:
        return _quantize_fake(w, quant_type, blocksize)
    packed, absmax = kernels.quantize_4bit(w.contiguous(), quant_type, blocksize)
    finite = absmax.isfinite()
    if not finite.all():
        block = int((~finite).nonzero()[0])
        raise ValueError(f"w must be finite, got NaN or an infinity in block {block} of {blocksize}; repair it first")
    return packed, absmax


def _quantize_int4_fake(w: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    check_float("w", w.dtype)
    check_format("int4", group_size)
    if w.numel() % group_size:
        raise ValueError(f"group_size must divide the elements of w, got {group_size} for {w.numel()}")
    return w.new_empty(w.numel() // 2, dtype=torch.uint8), w.new_empty(w.numel() // group_size, dtype=torch.float32)


@operator("quantize_int4(Tensor w, int group_size) -> (Tensor, Tensor)", _quantize_int4_fake)
def _quantize_int4(kernels: Kernels, w: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """w, of which each group_size elements are a group -> flat packed codes in [-7, 7] and scales, absmax / 7."""
    packed, scale = _quantize_int4_fake(w, group_size)
    if not w.numel():
        return packed, scale
    w, sizes = w.contiguous(), (1, scale.numel(), group_size)
    scale, _ = reference.qparams_from_range(*kernels.min_max(w, sizes), torch.int8, symmetric=True, bits=4)
    if not scale.isfinite().all():
        group = int((~scale.isfinite()).nonzero()[0])
        raise ValueError(f"w must be finite, got NaN or an infinity in group {group} of {group_size}; repair it first")
    codes = kernels.quantize(w, sizes, scale, None, torch.int8, False, 4)
    return reference.pack((codes & 15).view(torch.uint8)), scale


def _dequantize_fake(weight: Weight4bit, dtype: torch.dtype) -> Tensor:
    """Checks everything, and returns an empty result."""
    check_float("dtype", dtype)
    check_format(weight.quant_type, weight.blocksize)
    if any(size < 0 for size in weight.shape):
        raise ValueError(f"shape must not be negative, got {tuple(weight.shape)}")
    check_weight(weight, flat_shapes(weight.shape, weight.blocksize), weight.packed.device)
    return weight.packed.new_empty(tuple(weight.shape), dtype=dtype)


@operator(
    f"dequantize_4bit({TENSORS}, str quant_type, int blocksize, int[] shape, ScalarType dtype) -> Tensor",
    _dequantize_fake,
    arguments=lambda *given: (Weight4bit._make(given[:8]), *given[8:]),
)
def _dequantize(kernels: Kernels, weight: Weight4bit, dtype: torch.dtype) -> Tensor:
    y = _dequantize_fake(weight, dtype)
    return kernels.dequantize_4bit(contiguous(_flat(weight)), dtype) if y.numel() else y


def dequantize_4bit(weight: Weight4bit, dtype: torch.dtype) -> Tensor:
    """torch.ops.pyqkern.dequantize_4bit."""
    return torch.ops.pyqkern.dequantize_4bit.default(*weight, dtype)


# ---- a linear's weight


def _pack_fake(packed: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    _check_sizes(n, k, blocksize)
    _check("packed", packed, torch.uint8, flat_shapes((n, k), blocksize)[0], packed.device)
    return packed.new_empty(kernels_of(packed.device).packed_shapes_4bit(n, k, blocksize)[0])


@operator("pack_4bit(Tensor packed, int n, int k, int blocksize) -> Tensor", _pack_fake)
def _pack(kernels: Kernels, packed: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    y = _pack_fake(packed, n, k, blocksize)
    return kernels.pack_4bit(packed.reshape(-1).contiguous(), n, k, blocksize) if y.numel() else y


def _unpack_fake(packed: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    _check_sizes(n, k, blocksize)
    shape = kernels_of(packed.device).packed_shapes_4bit(n, k, blocksize)[0]
    _check("packed", packed, torch.uint8, shape, packed.device)
    return packed.new_empty((n * k + 1) // 2)


@operator("unpack_4bit(Tensor packed, int n, int k, int blocksize) -> Tensor", _unpack_fake)
def _unpack(kernels: Kernels, packed: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    y = _unpack_fake(packed, n, k, blocksize)
    return kernels.unpack_4bit(packed.contiguous(), n, k, blocksize) if y.numel() else y


# ---- the linear


def _linear_fake(x: Tensor, weight: Weight4bit, bias: Tensor | None, compute: str) -> Tensor:
    """Checks everything, and returns an empty result."""
    check_float("x", x.dtype)
    if x.dim() == 0:
        raise ValueError("x must be [..., K], got a 0-dim tensor")
    if compute not in COMPUTE:
        raise ValueError(f"compute must be one of {', '.join(COMPUTE)}, got {compute!r}")
    check_packed_4bit(weight, x.device)
    n = weight.shape[0]
    if bias is not None:
        check_float("bias", bias.dtype)
        if bias.shape != (n,):
            raise ValueError(f"bias must have shape ({n},), got {tuple(bias.shape)}")
        if bias.device != x.device:
            raise ValueError(f"bias must be on {x.device}, where x is, got {bias.device}; move the module with .to()")
    return x.new_empty((*x.shape[:-1], n))


def _linear_arguments(x: Tensor, *given: Any) -> tuple[Any, ...]:
    *tensors, bias, quant_type, blocksize, n, compute = given
    shape = (n, x.shape[-1] if x.dim() else 0)
    return x, Weight4bit._make((*tensors, quant_type, blocksize, shape)), bias, compute


@operator(
    f"linear_4bit(Tensor x, {TENSORS}, Tensor? bias, str quant_type, int blocksize, int n, str compute) -> Tensor",
    _linear_fake,
    arguments=_linear_arguments,
    linear=True,
    rowwise=True,
)
def _linear(kernels: Kernels, x: Tensor, weight: Weight4bit, bias: Tensor | None, compute: str) -> Tensor:
    y = _linear_fake(x, weight, bias, compute)
    if x.numel() == 0 or y.numel() == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    bias = None if bias is None else bias.contiguous()
    return kernels.linear_4bit(x.contiguous(), contiguous(weight), bias, compute)


def _linear_operator(x: Tensor, weight: Weight4bit, bias: Tensor | None, compute: str) -> Tensor:
    *tensors, quant_type, blocksize, (n, k) = weight
    if x.shape[-1:] != (k,):
        raise ValueError(f"x must be [..., {k}], got shape {tuple(x.shape)}")
    return torch.ops.pyqkern.linear_4bit.default(x, *tensors, bias, quant_type, blocksize, n, compute)


# torch.ops.pyqkern.linear_4bit of (x, weight: Weight4bit, bias, compute), by the shortest way.
linear_4bit: Callable[[Tensor, Weight4bit, Tensor | None, str], Tensor] = registry.short_way(
    "linear_4bit", _linear_operator
)

# ---- the embedding: rows of a linear's weight, which may be the output head that is tied to it


def _embedding_fake(ids: Tensor, weight: Weight4bit, dtype: torch.dtype) -> Tensor:
    check_ids(ids, weight.packed.device, dtype)
    check_packed_4bit(weight, weight.packed.device)
    return weight.packed.new_empty((*ids.shape, weight.shape[1]), dtype=dtype)


def _embedding_arguments(ids: Tensor, *given: Any) -> tuple[Any, ...]:
    *tensors, quant_type, blocksize, n, k, dtype = given
    return ids, Weight4bit._make((*tensors, quant_type, blocksize, (n, k))), dtype


@operator(
    f"embedding_4bit(Tensor ids, {TENSORS}, str quant_type, int blocksize, int n, int k, ScalarType dtype) -> Tensor",
    _embedding_fake,
    arguments=_embedding_arguments,
)
def _embedding(kernels: Kernels, ids: Tensor, weight: Weight4bit, dtype: torch.dtype) -> Tensor:
    y = _embedding_fake(ids, weight, dtype)
    rows = checked_rows(ids, weight.shape[0])
    return kernels.rows_4bit(contiguous(weight), rows, dtype).view(y.shape) if y.numel() else y


def embedding_4bit(ids: Tensor, weight: Weight4bit, dtype: torch.dtype) -> Tensor:
    """torch.ops.pyqkern.embedding_4bit."""
    *tensors, quant_type, blocksize, shape = weight
    return torch.ops.pyqkern.embedding_4bit.default(ids, *tensors, quant_type, blocksize, *shape, dtype)
