"""The operators torch.ops.pyqkern.*: what each takes, what it refuses, and which kernels run it.

This is the one place that chooses the device. `_KERNELS` names a module per device type, all with the functions of
`pyqkern.reference`; an operator here checks its arguments, gives the module contiguous tensors and shapes the result.
Sizes of zero are answered here and reach no kernel. `Library.impl` is used because it costs the least per call of the
ways that torch.compile, torch.export and autocast understand.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyqkern import cpu, cuda, reference
from pyqkern.affine import FLOATS, check_float, check_qtype, cut, from_channels, to_channels
from pyqkern.reference import ACTIVATIONS, INT8_LINEAR_MAX_K, INT8_MATMUL_MAX_K, QRANGE, qrange

_lib = torch.library.Library("pyqkern", "DEF")


_KERNELS: dict[str, Any] = {"cpu": cpu, "cuda": cuda}


def _kernels_of(device: torch.device) -> Any:
    """The kernels for a device; a device without any, such as "meta", has the plain-torch ones."""
    return _KERNELS.get(device.type, reference)


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Defines `schema`, implemented by the decorated function of (kernels, *arguments), and its fake implementation."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.split("(")[0]
        _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _lib.impl(name, partial(function, cpu), "CPU")
        _lib.impl(name, partial(function, cuda), "CUDA")
        for key in ("XPU", "MPS", "PrivateUse1"):
            _lib.impl(name, partial(function, reference), key)
        torch.library.register_fake(f"pyqkern::{name}", fake, lib=_lib)
        return function

    return register


def direct(x: Tensor) -> bool:
    """Whether a kernel may be called without the dispatcher, which costs 3 us of the 7 that a one-token linear takes.

    So where x is a plain CPU tensor, and nobody listens to operators: no torch.compile or export, no tracing, vmap or
    dispatch mode, no autocast, no profiler. What the operator does is the same either way.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) in _PLAIN
        and x.is_cpu
        and x.layout is torch.strided
        and not x.is_neg()
        and not x._is_zerotensor()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._autograd._profiler_enabled()
    )


_PLAIN = (Tensor, torch.nn.Parameter)


# ---- affine


def _check_qparams(scale: Tensor, zero_point: Tensor | None, shape: Sequence[int], device: torch.device) -> None:
    """What can be said of scale and zero_point without looking at their values."""
    if not scale.dtype.is_floating_point:
        raise TypeError(f"scale must be a floating dtype, got {scale.dtype}")
    _check_qparam("scale", scale, shape, device)
    if zero_point is not None:
        if zero_point.dtype.is_floating_point or zero_point.dtype.is_complex:
            raise TypeError(f"zero_point must be an integer dtype, got {zero_point.dtype}")
        _check_qparam("zero_point", zero_point, shape, device)


def _check_qparam(name: str, tensor: Tensor, shape: Sequence[int], device: torch.device) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{name} must have shape {tuple(shape)} for this axis and group_size, got {tuple(tensor.shape)}"
        )
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, where the data is, got {tensor.device}")


def _valid_qparams(scale: Tensor, zero_point: Tensor | None, qrange: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Both as the kernels take them, contiguous fp32 and int32, their values checked."""
    if scale.dtype is not torch.float32:
        scale = scale.float()
    least, greatest = _least_and_greatest(scale)
    if not 0 < least <= greatest < math.inf:
        wrong = greatest if least > 0 else least
        raise ValueError(f"scale must be finite and > 0 in fp32, got {wrong}; choose_qparams_affine makes such scales")
    if zero_point is None:
        return scale.contiguous(), None
    least, greatest = _least_and_greatest(zero_point)
    if least < qrange[0] or greatest > qrange[1]:
        wrong = least if least < qrange[0] else greatest
        raise ValueError(f"zero_point must be within [{qrange[0]}, {qrange[1]}], the range of the dtype, got {wrong}")
    if zero_point.dtype is not torch.int32:
        zero_point = zero_point.int()
    return scale.contiguous(), zero_point.contiguous()


def _least_and_greatest(tensor: Tensor) -> tuple[float, float]:
    """Of a CPU tensor. On CUDA, reading values would stop the stream: there 1 and 1, which pass every check."""
    if tensor.is_cuda or not tensor.numel():
        return 1, 1
    if tensor.numel() == 1:
        return (value := tensor.item()), value
    least, greatest = tensor.aminmax()
    return least.item(), greatest.item()


def _qparams_shape(view: Sequence[int], kept: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(view[d] for d in kept)


def _choose_qparams_fake(
    x: Tensor, dtype: torch.dtype, axis: Sequence[int] | None, group_size: int | None, symmetric: bool, bits: int = 8
) -> tuple[Tensor, Tensor]:
    check_float("x", x.dtype)
    check_qtype("dtype", dtype, bits)
    shape = _qparams_shape(*cut(x.shape, axis, group_size))
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int32)


@_operator(
    "choose_qparams_affine(Tensor x, ScalarType dtype, int[]? axis, int? group_size, bool symmetric, int bits=8)"
    " -> (Tensor, Tensor)",
    _choose_qparams_fake,
)
def _choose_qparams(
    kernels: Any,
    x: Tensor,
    dtype: torch.dtype,
    axis: Sequence[int] | None,
    group_size: int | None,
    symmetric: bool,
    bits: int = 8,
) -> tuple[Tensor, Tensor]:
    check_float("x", x.dtype)
    check_qtype("dtype", dtype, bits)
    view, kept = cut(x.shape, axis, group_size)
    flat, sizes, _ = to_channels(x, view, kept)
    lo, hi = kernels.min_max(flat, sizes) if x.numel() else reference.min_max(x, (0, sizes[1], 0))
    scale, zero_point = reference.qparams_from_range(lo, hi, dtype, symmetric, bits)
    if scale.isnan().any():
        raise ValueError("x must be finite to have a range, got NaN or an infinity in it; clamp or repair x first")
    shape = _qparams_shape(view, kept)
    return scale.view(shape), zero_point.view(shape)


def _quantize_fake(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: Sequence[int] | None,
    group_size: int | None,
    dtype: torch.dtype,
    bits: int = 8,
) -> Tensor:
    check_float("x", x.dtype)
    check_qtype("dtype", dtype, bits)
    _check_qparams(scale, zero_point, _qparams_shape(*cut(x.shape, axis, group_size)), x.device)
    return x.new_empty(x.shape, dtype=dtype)


@_operator(
    "quantize_affine(Tensor x, Tensor scale, Tensor? zero_point, int[]? axis, int? group_size, ScalarType dtype, "
    "int bits=8) -> Tensor",
    _quantize_fake,
)
def _quantize(
    kernels: Any,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: Sequence[int] | None,
    group_size: int | None,
    dtype: torch.dtype,
    bits: int = 8,
) -> Tensor:
    check_float("x", x.dtype)
    check_qtype("dtype", dtype, bits)
    view, kept = cut(x.shape, axis, group_size)
    _check_qparams(scale, zero_point, _qparams_shape(view, kept), x.device)
    scale, zero_point = _valid_qparams(scale, zero_point, qrange(dtype, bits))
    if x.numel() == 0:
        return x.new_empty(x.shape, dtype=dtype)
    flat, sizes, order = to_channels(x, view, kept)
    if bits == 4:
        kernels = kernels if kernels is cpu else reference
        q = kernels.quantize(flat, sizes, scale, zero_point, dtype, not kept, bits)
    else:
        q = kernels.quantize(flat, sizes, scale, zero_point, dtype, not kept)
    return from_channels(q, x.shape, order)


def _dequantize_fake(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: Sequence[int] | None,
    group_size: int | None,
    dtype: torch.dtype,
) -> Tensor:
    check_qtype("q", q.dtype)
    check_float("dtype", dtype)
    _check_qparams(scale, zero_point, _qparams_shape(*cut(q.shape, axis, group_size)), q.device)
    return q.new_empty(q.shape, dtype=dtype)


@_operator(
    "dequantize_affine(Tensor q, Tensor scale, Tensor? zero_point, int[]? axis, int? group_size, ScalarType dtype)"
    " -> Tensor",
    _dequantize_fake,
)
def _dequantize(
    kernels: Any,
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: Sequence[int] | None,
    group_size: int | None,
    dtype: torch.dtype,
) -> Tensor:
    check_qtype("q", q.dtype)
    check_float("dtype", dtype)
    view, kept = cut(q.shape, axis, group_size)
    _check_qparams(scale, zero_point, _qparams_shape(view, kept), q.device)
    scale, zero_point = _valid_qparams(scale, zero_point, QRANGE[q.dtype])
    if q.numel() == 0:
        return q.new_empty(q.shape, dtype=dtype)
    flat, sizes, order = to_channels(q, view, kept)
    return from_channels(kernels.dequantize(flat, sizes, scale, zero_point, dtype), q.shape, order)


# ---- the integer product


def int8_matmul(a: Tensor, w: Tensor) -> Tensor:
    """The exact integer product a @ w.T, on every ISA and device.

    a: int8 or uint8 [..., M, K], w: int8 [N, K]; every value, -128 and 255 included, any strides, sizes from 0.
    Returns int32 [..., M, N].

    Raises ValueError for shapes, devices, and K past 131071 (int8) or 65793 (uint8), where an int32 sum could wrap;
    TypeError for dtypes.
    """
    for name, tensor in (("a", a), ("w", w)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    return torch.ops.pyqkern.int8_matmul(a, w)


def _check_matmul(a: Tensor, w: Tensor) -> None:
    check_qtype("a", a.dtype)
    if w.dtype is not torch.int8:
        raise TypeError(f"w must be torch.int8, got {w.dtype}")
    if a.dim() < 2 or w.dim() != 2:
        raise ValueError(f"a must be [..., M, K] and w [N, K], got shapes {tuple(a.shape)} and {tuple(w.shape)}")
    k = a.shape[-1]
    if w.shape[1] != k:
        raise ValueError(
            f"a and w must have the same K, got {k} in a {tuple(a.shape)} and {w.shape[1]} in w {tuple(w.shape)}"
        )
    if k > INT8_MATMUL_MAX_K[a.dtype]:
        raise ValueError(
            f"K must be at most {INT8_MATMUL_MAX_K[a.dtype]} for {a.dtype}, so that no int32 sum wraps, got {k}; "
            "split K and add the parts in int64"
        )
    if a.device != w.device:
        raise ValueError(f"a and w must be on one device, got {a.device} and {w.device}")


def _matmul_fake(a: Tensor, w: Tensor) -> Tensor:
    _check_matmul(a, w)
    return a.new_empty((*a.shape[:-1], w.shape[0]), dtype=torch.int32)


@_operator("int8_matmul(Tensor a, Tensor w) -> Tensor", _matmul_fake)
def _matmul(kernels: Any, a: Tensor, w: Tensor) -> Tensor:
    _check_matmul(a, w)
    shape, k = (*a.shape[:-1], w.shape[0]), a.shape[-1]
    if a.numel() == 0 or w.numel() == 0:
        return a.new_zeros(shape, dtype=torch.int32)
    return kernels.int8_matmul(a.reshape(-1, k).contiguous(), w.contiguous()).view(shape)


# ---- the weight, packed


def _check_weight(weight: Tensor) -> None:
    if weight.dtype is not torch.int8:
        raise TypeError(f"weight must be torch.int8, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight must be [N, K], got shape {tuple(weight.shape)}")


def _pack_fake(weight: Tensor) -> Tensor:
    _check_weight(weight)
    return weight.new_empty(_kernels_of(weight.device).packed_shape(*weight.shape))


@_operator("int8_pack(Tensor weight) -> Tensor", _pack_fake)
def _pack(kernels: Any, weight: Tensor) -> Tensor:
    _check_weight(weight)
    if weight.numel() == 0:
        return weight.new_zeros(kernels.packed_shape(*weight.shape))
    return kernels.int8_pack(weight.contiguous())


def _check_packed(kernels: Any, packed: Tensor, n: int, k: int) -> None:
    if packed.dtype is not torch.int8:
        raise TypeError(f"packed must be torch.int8, got {packed.dtype}")
    if n < 0 or k < 0 or packed.shape != kernels.packed_shape(n, k):
        raise ValueError(
            f"packed must be what int8_pack makes of [{n}, {k}] on {packed.device}, got shape {tuple(packed.shape)}"
        )


def _unpack_fake(packed: Tensor, n: int, k: int) -> Tensor:
    _check_packed(_kernels_of(packed.device), packed, n, k)
    return packed.new_empty((n, k))


@_operator("int8_unpack(Tensor packed, int n, int k) -> Tensor", _unpack_fake)
def _unpack(kernels: Any, packed: Tensor, n: int, k: int) -> Tensor:
    _check_packed(kernels, packed, n, k)
    if n == 0 or k == 0:
        return packed.new_empty((n, k))
    return kernels.int8_unpack(packed.contiguous(), n, k)


# ---- the linear


def _linear_fits(
    kernels: Any, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str
) -> bool:
    """Whether `_check_linear` has nothing to say: the same questions in half the time, for every call."""
    n, k = weight_scale.numel(), x.shape[-1] if x.dim() else -1
    device = x.device
    return (
        x.dtype in FLOATS
        and 0 <= k <= INT8_LINEAR_MAX_K
        and weight.shape == kernels.packed_shape(n, k)
        and weight.dtype is torch.int8
        and weight_scale.dtype is torch.float32
        and weight_scale.dim() == 1
        and (bias is None or (bias.shape == weight_scale.shape and bias.dtype in FLOATS and bias.device == device))
        and weight.device == device
        and weight_scale.device == device
        and activation in ACTIVATIONS
    )


def _check_linear(
    kernels: Any, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str
) -> None:
    """Finds what is wrong with the arguments of int8_linear and raises."""
    check_float("x", x.dtype)
    if x.dim() == 0:
        raise ValueError("x must be [..., K], got a 0-dim tensor")
    k = x.shape[-1]
    if k > INT8_LINEAR_MAX_K:
        raise ValueError(
            f"K must be at most {INT8_LINEAR_MAX_K} (255 * 127 * K < 2**31), got {k}; "
            "split the layer, or keep it in float"
        )
    if weight_scale.dtype is not torch.float32 or weight_scale.dim() != 1:
        raise ValueError(f"weight_scale must be float32 [N], got {weight_scale.dtype} {tuple(weight_scale.shape)}")
    device = x.device
    if weight.device != device or weight_scale.device != device or (bias is not None and bias.device != device):
        others = [str(t.device) for t in (weight, weight_scale, bias) if t is not None]
        raise ValueError(
            f"weight, weight_scale and bias must be on {device}, where x is, got {', '.join(others)}; "
            "move the module with .to()"
        )
    _check_packed(kernels, weight, weight_scale.shape[0], k)
    if bias is not None:
        check_float("bias", bias.dtype)
        if bias.shape != weight_scale.shape:
            raise ValueError(f"bias must have shape {tuple(weight_scale.shape)}, got {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def _linear_fake(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str, symmetric: bool
) -> Tensor:
    _check_linear(_kernels_of(x.device), x, weight, weight_scale, bias, activation)
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


@_operator(
    "int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, str activation, bool symmetric) -> Tensor",
    _linear_fake,
)
def _linear(
    kernels: Any,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    symmetric: bool,
) -> Tensor:
    if not _linear_fits(kernels, x, weight, weight_scale, bias, activation):
        _check_linear(kernels, x, weight, weight_scale, bias, activation)
    if x.numel() == 0 or weight_scale.numel() == 0:
        return _linear_of_nothing(x, weight_scale, bias, activation)
    if bias is not None:
        bias = bias.contiguous()
    return kernels.int8_linear(
        x.contiguous(), weight.contiguous(), weight_scale.contiguous(), bias, activation, symmetric
    )


def int8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str, symmetric: bool
) -> Tensor:
    """torch.ops.pyqkern.int8_linear, by the shortest way."""
    if direct(x):
        y = None
        if cpu.HAS_EXCHANGE and x.dim() and weight_scale.dim() == 1:
            y = cpu.int8_linear_tensors(x, weight, weight_scale, bias, activation, symmetric)
        return _linear(cpu, x, weight, weight_scale, bias, activation, symmetric) if y is None else y
    return torch.ops.pyqkern.int8_linear.default(x, weight, weight_scale, bias, activation, symmetric)


def _linear_of_nothing(x: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The linear where M, N or K is 0: a row without elements counts as zeros and gives the bias."""
    y = torch.zeros((*x.shape[:-1], weight_scale.shape[0]), device=x.device)
    return reference.activate(y if bias is None else y + bias, activation).to(x.dtype)


def _linear_autocast(
    device_type: str,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    symmetric: bool,
) -> Tensor:
    """As nn.Linear under autocast: x in the autocast dtype, and so the result. The scales stay fp32."""
    key = torch._C.DispatchKey.AutocastCPU if device_type == "cpu" else torch._C.DispatchKey.AutocastCUDA
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
        if x.dtype in FLOATS:
            x = x.to(torch.get_autocast_dtype(device_type))
        return torch.ops.pyqkern.int8_linear.default(x, weight, weight_scale, bias, activation, symmetric)


_lib.impl("int8_linear", partial(_linear_autocast, "cpu"), "AutocastCPU")
_lib.impl("int8_linear", partial(_linear_autocast, "cuda"), "AutocastCUDA")
