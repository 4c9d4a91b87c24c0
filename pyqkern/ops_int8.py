"""Two more INT8 linears as operators: activations with given qparams, and activations with outlier columns in float."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from pyqkern import cpu, ops
from pyqkern.affine import FLOATS
from pyqkern.ops import _check_linear, _kernels_of, _lib, _linear_fits, _linear_of_nothing, _operator

__all__ = ["int8_linear_static"]


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
    if ops.direct(x):
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
