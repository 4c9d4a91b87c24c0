"""The INT8 operators: int8_matmul, int8_pack, int8_unpack, int8_linear, int8_linear_static, int8_linear_outlier."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyqkern.backends import ACTIVATIONS, INT8_LINEAR_MAX_K, INT8_MATMUL_MAX_K, cpu, reference
from pyqkern.ops import registry
from pyqkern.ops.checks import FLOATS, check_float, check_qtype
from pyqkern.ops.registry import _kernels_of, _lib, _operator, direct


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


def _check_qparams(x: Tensor, input_scale: Tensor, input_zero_point: Tensor) -> None:
    """Shapes and dtypes. Values were checked where the layer was made: reading them would stop a CUDA stream."""
    for name, tensor, dtype in (
        ("input_scale", input_scale, torch.float32),
        ("input_zero_point", input_zero_point, torch.int32),
    ):
        if tensor.dtype is not dtype or tensor.numel() != 1 or tensor.device != x.device:
            raise ValueError(
                f"{name} must be one {str(dtype).removeprefix('torch.')} on {x.device}, "
                f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )


def _static_fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    input_scale: Tensor,
    input_zero_point: Tensor,
) -> Tensor:
    _check_linear(_kernels_of(x.device), x, weight, weight_scale, bias, activation)
    _check_qparams(x, input_scale, input_zero_point)
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


@_operator(
    "int8_linear_static(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, str activation,"
    " Tensor input_scale, Tensor input_zero_point) -> Tensor",
    _static_fake,
)
def _static(
    kernels: object,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    input_scale: Tensor,
    input_zero_point: Tensor,
) -> Tensor:
    if not _linear_fits(kernels, x, weight, weight_scale, bias, activation):
        _check_linear(kernels, x, weight, weight_scale, bias, activation)
    _check_qparams(x, input_scale, input_zero_point)
    if x.numel() == 0 or weight_scale.numel() == 0:
        return _linear_of_nothing(x, weight_scale, bias, activation)
    x, weight, weight_scale = x.contiguous(), weight.contiguous(), weight_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    return kernels.int8_linear_static(x, weight, weight_scale, bias, activation, input_scale, input_zero_point)  # type: ignore[attr-defined]


def int8_linear_static(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    input_scale: Tensor,
    input_zero_point: Tensor,
) -> Tensor:
    """torch.ops.pyqkern.int8_linear_static, by the shortest way.

    x [..., K] fp32, bf16 or fp16; weight as `int8_pack` makes it of int8 [N, K]; weight_scale fp32 [N]; bias [N] or
    None; input_scale fp32 and input_zero_point int32, one element each -> [..., N] of x's dtype.
    """
    if registry.direct(x):
        if cpu.HAS_EXCHANGE and x.dim() and weight_scale.dim() == 1:
            y = cpu.int8_linear_static_tensors(x, weight, weight_scale, bias, activation, input_scale, input_zero_point)
            if y is not None:
                return y
        return _static(cpu, x, weight, weight_scale, bias, activation, input_scale, input_zero_point)
    return torch.ops.pyqkern.int8_linear_static.default(
        x, weight, weight_scale, bias, activation, input_scale, input_zero_point
    )


def _static_autocast(device_type: str, x: Tensor, *rest: object) -> Tensor:
    """As nn.Linear under autocast: x in the autocast dtype, and so the result."""
    return _without_autocast(device_type, torch.ops.pyqkern.int8_linear_static.default, x, rest)


# ---- outlier columns


def _outlier_fake(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, threshold: float, symmetric: bool
) -> Tensor:
    _check_linear(_kernels_of(x.device), x, weight, weight_scale, bias, "none")
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


@_operator(
    "int8_linear_outlier(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, float threshold, bool symmetric)"
    " -> Tensor",
    _outlier_fake,
)
def _outlier(
    kernels: object,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    threshold: float,
    symmetric: bool,
) -> Tensor:
    """The columns of x that hold a magnitude above the threshold times the dequantized weight, plus the INT8 rest.

    The source is Dettmers et al., "LLM.int8()", 2022. A NaN is in no outlier column; it makes its row NaN as elsewhere.
    """
    _check_linear(kernels, x, weight, weight_scale, bias, "none")
    if x.numel() == 0 or weight_scale.numel() == 0:
        return _linear_of_nothing(x, weight_scale, bias, "none")
    n, k = weight_scale.shape[0], x.shape[-1]
    flat = x.reshape(-1, k)
    lo, hi = flat.aminmax(dim=0)
    finite = lo.isfinite() & hi.isfinite()  # an infinity stays with the INT8 part, which makes its row NaN
    columns = (((hi > threshold) | (lo < -threshold)) & finite).nonzero().view(-1)
    bias = None if bias is None else bias.contiguous()
    args = (weight.contiguous(), weight_scale.contiguous())
    if columns.numel() == 0:
        return kernels.int8_linear(x.contiguous(), *args, bias, "none", symmetric)  # type: ignore[attr-defined]
    rest = flat.float().index_fill(1, columns, 0.0)
    outliers = flat.index_select(1, columns).float()
    codes = kernels.int8_unpack(args[0], n, k).index_select(1, columns)  # type: ignore[attr-defined]
    y = kernels.int8_linear(rest, *args, bias, "none", symmetric)  # type: ignore[attr-defined]
    y = y + functional.linear(outliers, codes.float() * weight_scale[:, None])
    return y.to(x.dtype).view(*x.shape[:-1], n)


def _outlier_autocast(device_type: str, x: Tensor, *rest: object) -> Tensor:
    return _without_autocast(device_type, torch.ops.pyqkern.int8_linear_outlier.default, x, rest)


def _without_autocast(device_type: str, operator: object, x: Tensor, rest: tuple[object, ...]) -> Tensor:
    key = torch._C.DispatchKey.AutocastCPU if device_type == "cpu" else torch._C.DispatchKey.AutocastCUDA
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
        if x.dtype in FLOATS:
            x = x.to(torch.get_autocast_dtype(device_type))
        return operator(x, *rest)  # type: ignore[operator]


for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    for _name, _autocast in (("int8_linear_static", _static_autocast), ("int8_linear_outlier", _outlier_autocast)):
        _lib.impl(_name, partial(_autocast, _device), _key)
