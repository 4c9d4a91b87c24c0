"""The operators of 4-bit weights: quantize_4bit, dequantize_4bit, linear_4bit and the packing of a linear's weight.

The scales of a weight are `absmax` fp32 [blocks]; doubly quantized, `absmax` uint8 [blocks], nested_absmax fp32
[blocks / 256], nested_map fp32 [256] and the offset fp32 [].
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyqkern.backends import cpu, cuda, reference
from pyqkern.backends.reference.four_bit import CODEBOOKS, NESTED_BLOCKSIZE, QUANT_TYPES
from pyqkern.ops.checks import FLOATS, check_float
from pyqkern.ops.registry import _kernels_of, _lib, _operator, direct
from pyqkern.schemes import BLOCKSIZES, COMPUTE


class _Triton4bit:
    """The Triton kernels behind the functions of `pyqkern.backends.reference`; imported for the first CUDA tensor."""

    packed_sizes = staticmethod(reference.packed_sizes)  # needs no triton

    def __getattr__(self, name: str) -> Any:
        return getattr(cuda.kernels("four_bit"), name)


_KERNELS_4BIT: dict[Any, Any] = {cpu: cpu, cuda: _Triton4bit()}


def kernels_of(device: torch.device) -> Any:
    """The 4-bit kernels for a device; one without any, such as "meta", has the plain-torch ones."""
    return _kernels(_kernels_of(device))


def _kernels(kernels: Any) -> Any:
    return _KERNELS_4BIT.get(kernels, reference)


# ---- checks


def check_format(quant_type: str, blocksize: int, quant_types: Sequence[str] = tuple(CODEBOOKS)) -> None:
    if quant_type not in quant_types:
        raise ValueError(f"quant_type must be one of {', '.join(quant_types)}, got {quant_type!r}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {blocksize}")


def _check(name: str, tensor: Tensor, dtype: torch.dtype, numel: int, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}; move the module with .to()")
    if tensor.dtype is not dtype or tensor.numel() != numel:
        raise ValueError(
            f"{name} must be {dtype} of {numel} elements for this shape and blocksize, "
            f"got {tensor.dtype} {tuple(tensor.shape)}"
        )


def check_scales(
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    blocks: int,
    stored: int,
    device: torch.device,
) -> None:
    """blocks: of the weight. stored: with those that fill up the last rows of a packed weight."""
    if nested_absmax is None and nested_map is None and offset is None:
        return _check("absmax", absmax, torch.float32, stored, device)
    if nested_absmax is None or nested_map is None or offset is None:
        raise ValueError("nested_absmax, nested_map and nested_offset must be given together, or none of them")
    _check("absmax", absmax, torch.uint8, stored, device)
    _check("nested_absmax", nested_absmax, torch.float32, -(-blocks // NESTED_BLOCKSIZE), device)
    _check("nested_map", nested_map, torch.float32, 256, device)
    _check("nested_offset", offset, torch.float32, 1, device)


# ---- quantize and dequantize


def _quantize_fake(x: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    check_float("x", x.dtype)
    check_format(quant_type, blocksize, QUANT_TYPES)
    packed = x.new_empty((x.numel() + 1) // 2, dtype=torch.uint8)
    return packed, x.new_empty(-(-x.numel() // blocksize), dtype=torch.float32)


@_operator("quantize_4bit(Tensor x, str quant_type, int blocksize) -> (Tensor, Tensor)", _quantize_fake)
def _quantize(kernels: Any, x: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    check_float("x", x.dtype)
    check_format(quant_type, blocksize, QUANT_TYPES)
    if x.numel() == 0:
        return _quantize_fake(x, quant_type, blocksize)
    packed, absmax = _kernels(kernels).quantize_4bit(x.contiguous(), quant_type, blocksize)
    finite = absmax.isfinite()
    if not finite.all():
        block = int((~finite).nonzero()[0])
        raise ValueError(f"x must be finite, got NaN or an infinity in block {block} of {blocksize}; repair it first")
    return packed, absmax


def _dequantize_fake(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    check_float("dtype", dtype)
    check_format(quant_type, blocksize)
    if any(size < 0 for size in shape):
        raise ValueError(f"shape must not be negative, got {tuple(shape)}")
    numel = math.prod(shape)
    blocks = -(-numel // blocksize)
    _check("packed", packed, torch.uint8, (numel + 1) // 2, packed.device)
    check_scales(absmax, nested_absmax, nested_map, offset, blocks, blocks, packed.device)
    return packed.new_empty(tuple(shape), dtype=dtype)


@_operator(
    "dequantize_4bit(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_map, Tensor? offset, "
    "str quant_type, int blocksize, int[] shape, ScalarType dtype) -> Tensor",
    _dequantize_fake,
)
def _dequantize(
    kernels: Any,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    y = _dequantize_fake(packed, absmax, nested_absmax, nested_map, offset, quant_type, blocksize, shape, dtype)
    if y.numel() == 0:
        return y
    return _kernels(kernels).dequantize_4bit(
        packed.contiguous(), absmax.contiguous(), *_contiguous(nested_absmax, nested_map, offset), quant_type,
        blocksize, shape, dtype,
    )  # fmt: skip


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


# ---- a linear's weight


def _pack_fake(packed: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    _check_sizes(n, k, blocksize)
    _check("packed", packed, torch.uint8, (n * k + 1) // 2, packed.device)
    return packed.new_empty(kernels_of(packed.device).packed_sizes(n, k, blocksize)[0])


def _check_sizes(n: int, k: int, blocksize: int) -> None:
    if n < 0 or k < 0:
        raise ValueError(f"n and k must not be negative, got {n} and {k}")
    check_format("nf4", blocksize)


@_operator("pack_4bit(Tensor packed, int n, int k, int blocksize) -> Tensor", _pack_fake)
def _pack(kernels: Any, packed: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    _pack_fake(packed, n, k, blocksize)
    return _kernels(kernels).pack_4bit(packed.reshape(-1).contiguous(), n, k, blocksize)


def _unpack_fake(lines: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    _check_sizes(n, k, blocksize)
    _check("lines", lines, torch.uint8, kernels_of(lines.device).packed_sizes(n, k, blocksize)[0], lines.device)
    return lines.new_empty((n * k + 1) // 2)


@_operator("unpack_4bit(Tensor lines, int n, int k, int blocksize) -> Tensor", _unpack_fake)
def _unpack(kernels: Any, lines: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    _unpack_fake(lines, n, k, blocksize)
    return _kernels(kernels).unpack_4bit(lines.contiguous(), n, k, blocksize)


# ---- the linear


def _linear_fake(
    x: Tensor,
    lines: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    quant_type: str,
    blocksize: int,
    n: int,
    compute: str,
) -> Tensor:
    """Checks everything, and returns an empty result."""
    check_float("x", x.dtype)
    check_format(quant_type, blocksize)
    if x.dim() == 0:
        raise ValueError("x must be [..., K], got a 0-dim tensor")
    if compute not in COMPUTE:
        raise ValueError(f"compute must be one of {', '.join(COMPUTE)}, got {compute!r}")
    k = x.shape[-1]
    _check_sizes(n, k, blocksize)
    codes, stored = kernels_of(x.device).packed_sizes(n, k, blocksize)
    _check("weight", lines, torch.uint8, codes, x.device)
    check_scales(absmax, nested_absmax, nested_map, offset, -(-n * k // blocksize), stored, x.device)
    if bias is not None:
        check_float("bias", bias.dtype)
        if bias.shape != (n,):
            raise ValueError(f"bias must have shape ({n},), got {tuple(bias.shape)}")
        if bias.device != x.device:
            raise ValueError(f"bias must be on {x.device}, where x is, got {bias.device}; move the module with .to()")
    return x.new_empty((*x.shape[:-1], n))


@_operator(
    "linear_4bit(Tensor x, Tensor weight, Tensor absmax, Tensor? nested_absmax, Tensor? nested_map, Tensor? offset, "
    "Tensor? bias, str quant_type, int blocksize, int n, str compute) -> Tensor",
    _linear_fake,
)
def _linear(
    kernels: Any,
    x: Tensor,
    lines: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    quant_type: str,
    blocksize: int,
    n: int,
    compute: str,
) -> Tensor:
    weight = (lines, absmax, nested_absmax, nested_map, offset)
    usual = quant_type in CODEBOOKS and compute in COMPUTE and _fits(kernels, x, *weight, bias, blocksize, n)
    if not usual:
        y = _linear_fake(x, *weight, bias, quant_type, blocksize, n, compute)
        if x.numel() == 0 or n == 0:
            return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    if bias is not None:
        bias = bias.contiguous()
    lines, absmax = lines.contiguous(), absmax.contiguous()
    nested = (None, None, None) if nested_absmax is None else _contiguous(nested_absmax, nested_map, offset)
    return _kernels(kernels).linear_4bit(
        x.contiguous(), lines, absmax, *nested, bias, quant_type, blocksize, n, compute
    )


# What the sizes of a weight must be, by (n, k, blocksize): few, and asked for at every call.
_sizes: dict[tuple[int, int, int], tuple[int, int]] = {}


def _fits(
    kernels: Any,
    x: Tensor,
    lines: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    blocksize: int,
    n: int,
) -> bool:
    """A quick check that the usual case passes: CPU, fp32 scales, nothing empty. _linear_fake looks at the rest."""
    if (
        kernels is not cpu
        or not x.numel()
        or not x.dim()
        or nested_absmax is not None
        or nested_map is not None
        or offset is not None
    ):
        return False
    key = (n, x.shape[-1], blocksize)
    sizes = _sizes.get(key)
    if sizes is None:
        if len(_sizes) > 1000 or n <= 0 or blocksize not in BLOCKSIZES:
            return False
        sizes = _sizes[key] = cpu.packed_sizes(*key)
    return (
        x.dtype in FLOATS
        and lines.dtype is torch.uint8
        and absmax.dtype is torch.float32
        and (lines.numel(), absmax.numel()) == sizes
        and lines.is_cpu
        and absmax.is_cpu
        and (bias is None or (bias.is_cpu and bias.dtype in FLOATS and bias.shape == (n,)))
    )


def linear_4bit(x: Tensor, *arguments: Any) -> Tensor:
    """torch.ops.pyqkern.linear_4bit, by the shortest way."""
    if direct(x):
        if cpu.HAS_EXCHANGE and x.dim():
            y = cpu.linear_4bit_tensors(x, *arguments)
            if y is not None:
                return y
        return _linear(cpu, x, *arguments)
    return torch.ops.pyqkern.linear_4bit.default(x, *arguments)


def _linear_autocast(device_type: str, x: Tensor, *arguments: Any) -> Tensor:
    """As nn.Linear under autocast: x in the autocast dtype, and so the result. The scales stay as they are."""
    key = torch._C.DispatchKey.AutocastCPU if device_type == "cpu" else torch._C.DispatchKey.AutocastCUDA
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
        if x.dtype in FLOATS:
            x = x.to(torch.get_autocast_dtype(device_type))
        return torch.ops.pyqkern.linear_4bit.default(x, *arguments)


_lib.impl("linear_4bit", partial(_linear_autocast, "cpu"), "AutocastCPU")


_lib.impl("linear_4bit", partial(_linear_autocast, "cuda"), "AutocastCUDA")
