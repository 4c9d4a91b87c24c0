"""The INT8 operators: int8_matmul, int8_pack, int8_quantize_weight, int8_unpack, int8_linear, int8_linear_static,
int8_linear_weight_only, int8_linear_outlier.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from pyqkern.backends import ACTIVATION_BITS, ACTIVATIONS, INT8_LINEAR_MAX_K, INT8_MATMUL_MAX_K, Kernels, reference
from pyqkern.ops import registry
from pyqkern.ops.checks import FLOATS, check_float, check_qtype
from pyqkern.ops.registry import kernels_of, operator


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


@operator("int8_matmul(Tensor a, Tensor w) -> Tensor", _matmul_fake)
def _matmul(kernels: Kernels, a: Tensor, w: Tensor) -> Tensor:
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


def _pack_fake(weight: Tensor, split: bool = False) -> Tensor:
    _check_weight(weight)
    n, k = weight.shape
    return weight.new_empty(kernels_of(weight.device).packed_shape(n, k, split))


@operator("int8_pack(Tensor weight, bool split=False) -> Tensor", _pack_fake)
def _pack(kernels: Kernels, weight: Tensor, split: bool = False) -> Tensor:
    _check_weight(weight)
    n, k = weight.shape
    if weight.numel() == 0:
        return weight.new_zeros(kernels.packed_shape(n, k, split))
    if k > INT8_MATMUL_MAX_K[torch.uint8] and int(weight.min()) == -128:
        raise ValueError(
            f"weight must be in [-127, 127] where K={k} is above {INT8_MATMUL_MAX_K[torch.uint8]}, "
            "so that no int32 sum wraps, got -128; split the layer"
        )
    return kernels.int8_pack(weight.contiguous(), split)


def _check_form(kernels: Kernels, packed: Tensor, n: int, k: int) -> None:
    if packed.dtype is not torch.int8:
        raise TypeError(f"packed must be torch.int8, got {packed.dtype}")
    if n < 0 or k < 0 or packed.shape not in (kernels.packed_shape(n, k), kernels.packed_shape(n, k, True)):
        raise ValueError(
            f"packed must be what int8_pack makes of [{n}, {k}] on {packed.device}, got shape {tuple(packed.shape)}"
        )


def _quantize_weight_fake(weight: Tensor, scale: Tensor | None, may_split: bool) -> tuple[Tensor, Tensor]:
    check_float("weight", weight.dtype)
    if weight.dim() != 2 or (scale is not None and scale.shape != weight.shape[:1]):
        raise ValueError(f"weight must be [N, K], and scale [N] or None, got shape {tuple(weight.shape)}")
    n, k = weight.shape
    kernels = kernels_of(weight.device)
    shape = kernels.packed_shape(n, k, may_split and kernels.splits())
    return weight.new_empty(shape, dtype=torch.int8), weight.new_empty(n, dtype=torch.float32)


@operator(
    "int8_quantize_weight(Tensor weight, Tensor? scale, bool may_split) -> (Tensor, Tensor)", _quantize_weight_fake
)
def _quantize_weight(kernels: Kernels, weight: Tensor, scale: Tensor | None, may_split: bool) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> its codes in [-127, 127], packed for the linear, and the scales, fp32 [N]: absmax / 127, or
    those given. may_split: whether the packed weight may take more memory where many rows are then faster.
    """
    packed, empty = _quantize_weight_fake(weight, scale, may_split)
    if not weight.numel():
        return packed.zero_(), empty.fill_(1.0)
    weight, sizes = weight.contiguous(), (1, *weight.shape)
    if scale is None:
        scale, _ = reference.qparams_from_range(*kernels.min_max(weight, sizes), torch.int8, symmetric=True)
    if not scale.isfinite().all():
        row = int((~scale.isfinite()).nonzero()[0])
        raise ValueError(f"weight must be finite, got NaN or an infinity in row {row}; repair it first")
    codes = kernels.quantize(weight, sizes, scale, None, torch.int8, False, 8).clamp_(min=-127)
    return kernels.int8_pack(codes, may_split and kernels.splits()), scale.clone()


def _unpack_fake(packed: Tensor, n: int, k: int) -> Tensor:
    _check_form(kernels_of(packed.device), packed, n, k)
    return packed.new_empty((n, k))


@operator("int8_unpack(Tensor packed, int n, int k) -> Tensor", _unpack_fake)
def _unpack(kernels: Kernels, packed: Tensor, n: int, k: int) -> Tensor:
    _check_form(kernels, packed, n, k)
    if n == 0 or k == 0:
        return packed.new_empty((n, k))
    return kernels.int8_unpack(packed.contiguous(), n, k)


def check_packed(kernels: Kernels, packed: Tensor, weight_scale: Tensor, k: int, device: torch.device) -> None:
    """A packed weight and its scales: dtypes, shapes and device."""
    if weight_scale.dtype is not torch.float32:
        raise TypeError(f"weight_scale must be float32, got {weight_scale.dtype}")
    if weight_scale.dim() != 1:
        raise ValueError(f"weight_scale must be float32 [N], got shape {tuple(weight_scale.shape)}")
    if packed.device != device or weight_scale.device != device:
        raise ValueError(
            f"packed and weight_scale must be on {device}, got {packed.device} and {weight_scale.device}; "
            "move the module with .to()"
        )
    _check_form(kernels, packed, weight_scale.shape[0], k)


# ---- the linear


def _check_linear(
    kernels: Kernels, x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str
) -> None:
    if x.dtype not in FLOATS:
        check_float("x", x.dtype)
    if x.dim() == 0:
        raise ValueError("x must be [..., K], got a 0-dim tensor")
    k = x.shape[-1]
    if k > INT8_LINEAR_MAX_K:
        raise ValueError(
            f"K must be at most {INT8_LINEAR_MAX_K} (255 * 127 * K < 2**31), got {k}; "
            "split the layer, or keep it in float"
        )
    check_packed(kernels, packed, weight_scale, k, x.device)
    if bias is not None:
        if bias.dtype not in FLOATS:
            check_float("bias", bias.dtype)
        if bias.shape != weight_scale.shape:
            raise ValueError(f"bias must have shape {tuple(weight_scale.shape)}, got {tuple(bias.shape)}")
        if bias.device != x.device:
            raise ValueError(f"bias must be on {x.device}, where x is, got {bias.device}; move the module with .to()")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def check_bits(bits: int, symmetric: bool = False) -> None:
    """Bits of the activations' codes."""
    if bits not in ACTIVATION_BITS:
        raise ValueError(f"bits must be 8 or 7, got {bits}")
    if symmetric and bits != 8:
        raise ValueError(f"bits must be 8 for symmetric activations, got {bits}")


def _linear_fake(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    symmetric: bool,
    bits: int = 8,
) -> Tensor:
    _check_linear(kernels_of(x.device), x, packed, weight_scale, bias, activation)
    check_bits(bits, symmetric)
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


@operator(
    "int8_linear(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, str activation, bool symmetric,"
    " int bits=8) -> Tensor",
    _linear_fake,
    linear=True,
    rowwise=True,
)
def _linear(
    kernels: Kernels,
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    symmetric: bool,
    bits: int = 8,
) -> Tensor:
    _check_linear(kernels, x, packed, weight_scale, bias, activation)
    check_bits(bits, symmetric)
    if x.numel() == 0 or weight_scale.numel() == 0:
        return _linear_of_nothing(x, weight_scale, bias, activation)
    bias = None if bias is None else bias.contiguous()
    return kernels.int8_linear(
        x.contiguous(), packed.contiguous(), weight_scale.contiguous(), bias, activation, symmetric, bits
    )


def _linear_of_nothing(x: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The linear where M, N or K is 0: a row without elements counts as zeros and gives the bias."""
    y = x.new_zeros((*x.shape[:-1], weight_scale.shape[0]), dtype=torch.float32)
    return reference.activate(y if bias is None else y + bias, activation).to(x.dtype)


# torch.ops.pyqkern.int8_linear, by the shortest way.
int8_linear: Callable[[Tensor, Tensor, Tensor, Tensor | None, str, bool, int], Tensor] = registry.short_way(
    "int8_linear", torch.ops.pyqkern.int8_linear.default
)

# ---- one scale and zero point for all of x


def _check_qparams(x: Tensor, input_scale: Tensor, input_zero_point: Tensor) -> None:
    """Shapes and dtypes. Values were checked where the layer was made: reading them would stop a CUDA stream."""
    for name, tensor, dtype in (
        ("input_scale", input_scale, torch.float32),
        ("input_zero_point", input_zero_point, torch.int32),
    ):
        if tensor.dtype is not dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
        if tensor.numel() != 1 or tensor.device != x.device:
            raise ValueError(f"{name} must be one element on {x.device}, got {tuple(tensor.shape)} on {tensor.device}")


def _static_fake(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    input_scale: Tensor,
    input_zero_point: Tensor,
    bits: int = 8,
) -> Tensor:
    check_bits(bits)
    _check_linear(kernels_of(x.device), x, packed, weight_scale, bias, activation)
    _check_qparams(x, input_scale, input_zero_point)
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


@operator(
    "int8_linear_static(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, str activation,"
    " Tensor input_scale, Tensor input_zero_point, int bits=8) -> Tensor",
    _static_fake,
    linear=True,
    rowwise=True,
)
def _static(
    kernels: Kernels,
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    input_scale: Tensor,
    input_zero_point: Tensor,
    bits: int = 8,
) -> Tensor:
    check_bits(bits)
    _check_linear(kernels, x, packed, weight_scale, bias, activation)
    _check_qparams(x, input_scale, input_zero_point)
    if x.numel() == 0 or weight_scale.numel() == 0:
        return _linear_of_nothing(x, weight_scale, bias, activation)
    x, packed, weight_scale = x.contiguous(), packed.contiguous(), weight_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    return kernels.int8_linear_static(x, packed, weight_scale, bias, activation, input_scale, input_zero_point, bits)


# torch.ops.pyqkern.int8_linear_static, by the shortest way.
int8_linear_static: Callable[[Tensor, Tensor, Tensor, Tensor | None, str, Tensor, Tensor, int], Tensor] = (
    registry.short_way("int8_linear_static", torch.ops.pyqkern.int8_linear_static.default)
)

# ---- activations that are not quantized


def _weight_only_fake(x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    _check_linear(kernels_of(x.device), x, packed, weight_scale, bias, "none")
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


@operator(
    "int8_linear_weight_only(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias) -> Tensor",
    _weight_only_fake,
    linear=True,
    rowwise=True,
)
def _weight_only(kernels: Kernels, x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    _check_linear(kernels, x, packed, weight_scale, bias, "none")
    if x.numel() == 0 or weight_scale.numel() == 0:
        return _linear_of_nothing(x, weight_scale, bias, "none")
    bias = None if bias is None else bias.contiguous()
    return kernels.int8_linear_weight_only(x.contiguous(), packed.contiguous(), weight_scale.contiguous(), bias)


# torch.ops.pyqkern.int8_linear_weight_only, by the shortest way.
int8_linear_weight_only: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] = registry.short_way(
    "int8_linear_weight_only", torch.ops.pyqkern.int8_linear_weight_only.default
)

# ---- outlier columns


def _outlier_fake(
    x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None, threshold: float, symmetric: bool
) -> Tensor:
    _check_linear(kernels_of(x.device), x, packed, weight_scale, bias, "none")
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


@operator(
    "int8_linear_outlier(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, float threshold, bool symmetric)"
    " -> Tensor",
    _outlier_fake,
    linear=True,
)
def _outlier(
    kernels: Kernels,
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    threshold: float,
    symmetric: bool,
) -> Tensor:
    """The columns of x that hold a magnitude above the threshold times the dequantized weight, plus the INT8 rest.

    The source is Dettmers et al., "LLM.int8()", 2022. A NaN is in no outlier column; it makes its row NaN as elsewhere.
    """
    _check_linear(kernels, x, packed, weight_scale, bias, "none")
    if x.numel() == 0 or weight_scale.numel() == 0:
        return _linear_of_nothing(x, weight_scale, bias, "none")
    n, k = weight_scale.shape[0], x.shape[-1]
    packed, weight_scale = packed.contiguous(), weight_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    flat = x.reshape(-1, k).contiguous()
    columns = _outlier_columns(flat, threshold)
    if columns.numel() == 0:
        return kernels.int8_linear(x.contiguous(), packed, weight_scale, bias, "none", symmetric, 8)
    rest = flat.float().index_fill(1, columns, 0.0)
    outliers = flat.index_select(1, columns).float()
    codes = kernels.int8_unpack(packed, n, k).index_select(1, columns)
    y = kernels.int8_linear(rest, packed, weight_scale, bias, "none", symmetric, 8)
    y = y + functional.linear(outliers, codes.float() * weight_scale[:, None])
    return y.to(x.dtype).view(*x.shape[:-1], n)


def _outlier_columns(x: Tensor, threshold: float) -> Tensor:
    """The columns of x [M, K] with a magnitude above the threshold. One with an infinity stays with the INT8 part."""
    lo, hi = x.aminmax(dim=0)
    finite = lo.isfinite() & hi.isfinite()
    return (((hi > threshold) | (lo < -threshold)) & finite).nonzero().view(-1)
