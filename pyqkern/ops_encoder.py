"""A whole encoder layer as one operator, on CPU: post-LayerNorm, of INT8 linears.

    torch.ops.pyqkern.encoder_layer(x, mask, weights, scales, biases, norms, heads, scaling, eps, activation, symmetric)

x [batch, length, hidden size], fp32, bf16 or fp16. mask: None, or [batch or 1, heads or 1, length or 1, length], bool
(true: the key is seen) or floats added to the scores. Where it only tells padding, padding costs nothing and is zeros
in the result. weights as int8_pack makes them, scales fp32, biases or None, in the order of LINEARS; norms: weight and
bias of the LayerNorm behind the attention, then of the one behind the feed-forward; eps of both. scaling: of the
scores. Returns a tensor like x.

Attention is in integers, see pyqkern.reference_encoder. The result has the same bits on every ISA, with any number of
threads, and for a sentence alone or in any batch. Raises ValueError for shapes and for NaN in the mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyqkern import _C, cpu, ops
from pyqkern.affine import FLOATS
from pyqkern.reference import ACTIVATIONS, INT8_LINEAR_MAX_K

LINEARS = ("query", "key", "value", "output", "up", "down")


@dataclass(frozen=True)
class Prepared:
    """The parts of a layer, checked, as C++ takes them: addresses, so that it must not outlive the tensors."""

    linears: list[tuple[int, ...]]
    norms: list[int]
    norm_dtype: int
    hidden: int
    head_size: int


def prepare(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norms: Sequence[Tensor],
    heads: int,
    activation: str,
) -> Prepared:
    """Checks all that does not depend on the input. Raises ValueError."""
    for name, tensors, count in (
        ("weights", weights, 6),
        ("scales", scales, 6),
        ("biases", biases, 6),
        ("norms", norms, 4),
    ):
        if len(tensors) != count:
            raise ValueError(f"{name} must be {count}, got {len(tensors)}")
        for tensor in tensors:
            if tensor is not None and not (tensor.is_cpu and tensor.is_contiguous()):
                raise ValueError(f"{name} must be contiguous and on the CPU, got a tensor on {tensor.device}")
    if any(tensor.dim() != 1 for tensor in (*scales, *norms)):
        raise ValueError("scales and norms must have one dimension")
    hidden, attention, wide = norms[0].shape[0], scales[0].shape[0], scales[4].shape[0]
    if heads < 1 or attention % heads or not attention or not wide:
        raise ValueError(f"heads must divide the {attention} rows of the query's weight, got {heads}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    dtype = norms[0].dtype
    for norm in norms:
        if norm.dtype not in FLOATS or norm.dtype is not dtype or norm.shape != (hidden,):
            raise ValueError(f"norms must be floats [{hidden}] of one dtype, got {norm.dtype} {tuple(norm.shape)}")
    sizes = (*((attention, hidden),) * 3, (hidden, attention), (wide, hidden), (hidden, wide))
    linears = [
        _linear(name, weight, scale, bias, *size)
        for name, weight, scale, bias, size in zip(LINEARS, weights, scales, biases, sizes, strict=True)
    ]
    return Prepared(linears, [norm.data_ptr() for norm in norms], cpu.DTYPE_CODES[dtype], hidden, attention // heads)


def _linear(name: str, weight: Tensor, scale: Tensor, bias: Tensor | None, n: int, k: int) -> tuple[int, ...]:
    if k > INT8_LINEAR_MAX_K:
        raise ValueError(f"in_features must be at most {INT8_LINEAR_MAX_K}, got {k} in {name}")
    if weight.dtype is not torch.int8 or weight.shape != cpu.packed_shape(n, k):
        raise ValueError(
            f"the weight of {name} must be what int8_pack makes of [{n}, {k}], got {weight.dtype} {tuple(weight.shape)}"
        )
    if scale.dtype is not torch.float32 or scale.shape != (n,):
        raise ValueError(f"the scale of {name} must be float32 [{n}], got {scale.dtype} {tuple(scale.shape)}")
    if bias is not None and (bias.dtype not in FLOATS or bias.shape != (n,)):
        raise ValueError(f"the bias of {name} must be floats [{n}], got {bias.dtype} {tuple(bias.shape)}")
    bias_at, bias_dtype = (0, 0) if bias is None else (bias.data_ptr(), cpu.DTYPE_CODES[bias.dtype])
    return weight.data_ptr(), scale.data_ptr(), bias_at, bias_dtype, n, k


def _seen(mask: Tensor | None, batch: int, heads: int, length: int) -> tuple[int, ...]:
    """The mask as C++ takes it: address, whether bool, heads, and strides in elements, 0 where it is broadcast."""
    if mask is None:
        return (0, False, 1, 0, 0, 0)
    allowed = ((1, batch), (1, heads), (1, length), (length,))
    if mask.dim() != 4 or any(size not in sizes for size, sizes in zip(mask.shape, allowed, strict=True)):
        raise ValueError(
            f"attention_mask must be [{batch} or 1, {heads} or 1, {length} or 1, {length}], got {tuple(mask.shape)}; "
            "give the model its usual mask, [batch, length] with 1 for tokens and 0 for padding"
        )
    if mask.dtype is not torch.bool and mask.dtype not in FLOATS:
        raise TypeError(f"attention_mask must be bool or a float added to the scores, got {mask.dtype}")
    if not mask.is_cpu:
        raise ValueError(f"attention_mask must be on the CPU, where x is, got {mask.device}")
    strides = (0 if size == 1 else stride for size, stride in zip(mask.shape[:3], mask.stride()[:3], strict=True))
    return (mask.data_ptr(), mask.dtype is torch.bool, mask.shape[1], *strides)


def run(
    x: Tensor, mask: Tensor | None, parts: Prepared, heads: int, scaling: float, eps: Sequence[float], activation: str,
    symmetric: bool,
) -> Tensor:  # fmt: skip
    """The layer on parts that are checked; x on the CPU."""
    if x.dtype not in FLOATS or x.dim() != 3 or x.shape[2] != parts.hidden:
        raise ValueError(
            f"x must be fp32, bf16 or fp16 [batch, length, {parts.hidden}], got {x.dtype} {tuple(x.shape)}"
        )
    if len(eps) != 2:
        raise ValueError(f"eps must be two numbers, one for each LayerNorm, got {len(eps)}")
    if mask is not None and mask.dim() and mask.stride(-1) != 1:
        mask = mask.contiguous()
    if mask is not None and mask.dtype in (torch.bfloat16, torch.float16):
        mask = mask.float()
    seen = _seen(mask, x.shape[0], heads, x.shape[1])
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        _C.encoder_layer(
            x.data_ptr(), cpu.DTYPE_CODES[x.dtype], x.shape[0], x.shape[1], *seen, parts.linears, parts.norms,
            parts.norm_dtype, *eps, heads, parts.head_size, scaling, cpu.ACTIVATION_CODES[activation], symmetric,
            y.data_ptr(),
        )  # fmt: skip
    return y


def _fake(
    x: Tensor,
    mask: Tensor | None,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norms: Sequence[Tensor],
    heads: int,
    scaling: float,
    eps: Sequence[float],
    activation: str,
    symmetric: bool,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _encoder_layer(
    x: Tensor,
    mask: Tensor | None,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norms: Sequence[Tensor],
    heads: int,
    scaling: float,
    eps: Sequence[float],
    activation: str,
    symmetric: bool,
) -> Tensor:
    parts = prepare(weights, scales, biases, norms, heads, activation)
    return run(x, mask, parts, heads, scaling, eps, activation, symmetric)


ops._lib.define(
    "encoder_layer(Tensor x, Tensor? mask, Tensor[] weights, Tensor[] scales, Tensor?[] biases, Tensor[] norms,"
    " int heads, float scaling, float[] eps, str activation, bool symmetric) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
ops._lib.impl("encoder_layer", _encoder_layer, "CPU")
torch.library.register_fake("pyqkern::encoder_layer", _fake, lib=ops._lib)
