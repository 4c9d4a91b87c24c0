"""A whole encoder layer as one operator, on CPU: post-LayerNorm, of INT8 or of 4-bit linears.

    torch.ops.pyqkern.encoder_layer(x, mask, weights, scales, biases, norms, heads, scaling, eps, activation, symmetric)
    torch.ops.pyqkern.encoder_layer(..., activation, True, quant_type, blocksize, [width, wide], nested)

x [batch, length, hidden size], fp32, bf16 or fp16. mask: None, or [batch or 1, heads or 1, length or 1, length], bool
(true: the key is seen) or floats added to the scores. Where it only tells padding, padding costs nothing and is zeros
in the result. weights as int8_pack makes them, scales fp32, biases, in the order of LINEARS (a linear without one has
an empty tensor, since torch.jit.trace knows no lists with None in them); norms: weight and bias of the LayerNorm behind
the attention, then of the one behind the feed-forward; eps of both. scaling: of the scores. position_bias: floats in
the mask's shapes, added to the scores beside it. factors: nothing, or two fp32 vectors [hidden size]: what the input of
query, key and value is multiplied by, and that of up; the residuals are not. Returns a tensor like x.

quant_type "int8-a7": INT8 linears whose activations have 7 bits; symmetric is False.

4 bits: quant_type "nf4", "fp4" or "int4". weights as pack_4bit makes them, their rows whole blocks; scales: absmax in
the order of `Kernels.pack_scales`. width: rows of the query's weight; wide: of the feed-forward's. nested: nothing, or
for each weight what its absmax, then uint8, stands for: fp32 absmax of blocks, fp32 map [256], fp32 offset []. The
linears have the bits of linear_4bit with compute "int8".

Attention is in integers, see `pyqkern.backends.reference.encoder`. The result has the same bits on every ISA, with any
number of threads, and for a sentence alone or in any batch. Raises ValueError for shapes and for NaN in the mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyqkern.backends import ACTIVATIONS, INT8_LINEAR_MAX_K, Kernels, Weight4bit, cpu
from pyqkern.ops.checks import FLOATS
from pyqkern.ops.four_bit import check_format, check_weight
from pyqkern.ops.registry import is_plain, nobody_listens, operator

LINEARS = ("query", "key", "value", "output", "up", "down")


@dataclass(frozen=True)
class Prepared:
    """The parts of a layer, checked, as C++ takes them: addresses, so that it must not outlive the tensors."""

    linears: list[tuple[int, ...]]
    norms: list[int]
    norm_dtype: int
    hidden: int
    head_size: int
    bits: int  # of the codes of the linears' activations
    factors: tuple[int, ...]


def prepare(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norms: Sequence[Tensor],
    heads: int,
    activation: str,
    symmetric: bool,
    quant_type: str = "int8",
    blocksize: int = 0,
    features: Sequence[int] = (),
    nested: Sequence[Tensor] = (),
    factors: Sequence[Tensor] = (),
) -> Prepared:
    """Checks all that does not depend on the input. Raises ValueError."""
    for name, tensors, count in (
        ("weights", weights, 6),
        ("scales", scales, 6),
        ("biases", biases, 6),
        ("norms", norms, 4),
        ("nested", nested, 18 if nested else 0),
        ("factors", factors, 2 if factors else 0),
    ):
        if len(tensors) != count:
            raise ValueError(f"{name} must be {count}, got {len(tensors)}")
        for tensor in tensors:
            if tensor is not None and not (tensor.is_cpu and tensor.is_contiguous()):
                raise ValueError(f"{name} must be contiguous and on the CPU, got a tensor on {tensor.device}")
    is_int8 = quant_type in ("int8", "int8-a7")
    if any(tensor.dim() != 1 for tensor in (*norms, *(scales if is_int8 else ()))):
        raise ValueError("scales and norms must have one dimension")
    hidden = norms[0].shape[0]
    if is_int8:
        features = scales[0].shape[0], scales[4].shape[0]
    elif len(features) != 2:
        raise ValueError(f"features must be [width, wide] for 4-bit linears, got {list(features)}")
    attention, wide = features
    if heads < 1 or attention % heads or not attention or not wide:
        raise ValueError(f"heads must divide the {attention} rows of the query's weight, got {heads}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    dtype = norms[0].dtype
    for norm in norms:
        if norm.dtype not in FLOATS or norm.dtype is not dtype or norm.shape != (hidden,):
            raise ValueError(f"norms must be floats [{hidden}] of one dtype, got {norm.dtype} {tuple(norm.shape)}")
    sizes = (*((attention, hidden),) * 3, (hidden, attention), (wide, hidden), (hidden, wide))
    if not is_int8:
        check_format(quant_type, blocksize)
        if not symmetric:
            raise ValueError("symmetric must be True for 4-bit linears, got False")
    if quant_type == "int8-a7" and symmetric:
        raise ValueError("symmetric must be False for int8-a7, got True")
    linears = []
    for i, (name, (n, k)) in enumerate(zip(LINEARS, sizes, strict=True)):
        bias = biases[i]
        if bias is not None and not bias.numel():
            bias = None
        if bias is not None and (bias.dtype not in FLOATS or bias.shape != (n,)):
            raise ValueError(f"the bias of {name} must be floats [{n}], got {bias.dtype} {tuple(bias.shape)}")
        if is_int8:
            linears.append(_int8(name, weights[i], scales[i], bias, n, k))
        else:
            nested_i = tuple(nested[3 * i : 3 * i + 3]) or (None, None, None)
            weight = Weight4bit._make((weights[i], scales[i], *nested_i, quant_type, blocksize, (n, k)))
            linears.append(_4bit(name, weight, bias))
    for factor in factors:
        if factor.dtype is not torch.float32 or factor.shape != (hidden,):
            raise ValueError(f"factors must be float32 [{hidden}], got {factor.dtype} {tuple(factor.shape)}")
    bits = 7 if quant_type == "int8-a7" else 8
    addresses = [norm.data_ptr() for norm in norms], tuple(factor.data_ptr() for factor in factors) or (0, 0)
    return Prepared(linears, addresses[0], cpu.DTYPE_CODES[dtype], hidden, attention // heads, bits, addresses[1])


def _int8(name: str, packed: Tensor, scale: Tensor, bias: Tensor | None, n: int, k: int) -> tuple[int, ...]:
    if k > INT8_LINEAR_MAX_K:
        raise ValueError(f"in_features must be at most {INT8_LINEAR_MAX_K}, got {k} in {name}")
    if packed.dtype is not torch.int8 or packed.shape != cpu.packed_shape(n, k):
        raise ValueError(
            f"the weight of {name} must be what int8_pack makes of [{n}, {k}], got {packed.dtype} {tuple(packed.shape)}"
        )
    if scale.dtype is not torch.float32 or scale.shape != (n,):
        raise ValueError(f"the scale of {name} must be float32 [{n}], got {scale.dtype} {tuple(scale.shape)}")
    return cpu.encoder_linear(packed, scale, bias, n, k)


def _4bit(name: str, weight: Weight4bit, bias: Tensor | None) -> tuple[int, ...]:
    (n, k), blocksize = weight.shape, weight.blocksize
    if not cpu.in_panels(n, k, blocksize):
        raise ValueError(f"the rows of {name} must be whole blocks of {blocksize}, and 16 or more, got [{n}, {k}]")
    try:
        check_weight(weight, cpu.packed_shapes_4bit(n, k, blocksize), weight.packed.device)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    return cpu.encoder_linear_4bit(weight, bias)


def _readable(mask: Tensor | None) -> Tensor | None:
    """A mask or a bias with its keys beside each other, bool or fp32."""
    if mask is not None and mask.dim() and mask.stride(-1) != 1:
        mask = mask.contiguous()
    return mask.float() if mask is not None and mask.dtype in (torch.bfloat16, torch.float16) else mask


def _added(name: str, mask: Tensor | None, batch: int, heads: int, length: int) -> tuple[int, ...]:
    """The same as C++ takes it: address, whether bool, heads, strides in elements, 0 where it is broadcast."""
    if mask is None:
        return (0, False, 1, 0, 0, 0)
    allowed = ((1, batch), (1, heads), (1, length), (length,))
    if mask.dim() != 4 or any(size not in sizes for size, sizes in zip(mask.shape, allowed, strict=True)):
        way = "; give the model its usual mask, [batch, length] with 1 for tokens and 0 for padding"
        raise ValueError(
            f"{name} must be [{batch} or 1, {heads} or 1, {length} or 1, {length}], got {tuple(mask.shape)}"
            + way * (name == "attention_mask")
        )
    if mask.dtype is not torch.bool and mask.dtype not in FLOATS:
        raise TypeError(f"{name} must be bool or a float added to the scores, got {mask.dtype}")
    if not mask.is_cpu:
        raise ValueError(f"{name} must be on the CPU, where x is, got {mask.device}")
    strides = (0 if size == 1 else stride for size, stride in zip(mask.shape[:3], mask.stride()[:3], strict=True))
    return (mask.data_ptr(), mask.dtype is torch.bool, mask.shape[1], *strides)


def run(
    x: Tensor, mask: Tensor | None, parts: Prepared, heads: int, scaling: float, eps: Sequence[float], activation: str,
    symmetric: bool, position_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The layer on parts that are checked; x on the CPU."""
    if x.dtype not in FLOATS or x.dim() != 3 or x.shape[2] != parts.hidden:
        raise ValueError(
            f"x must be fp32, bf16 or fp16 [batch, length, {parts.hidden}], got {x.dtype} {tuple(x.shape)}"
        )
    if len(eps) != 2:
        raise ValueError(f"eps must be two numbers, one for each LayerNorm, got {len(eps)}")
    mask, position_bias = _readable(mask), _readable(position_bias)
    sizes = (x.shape[0], heads, x.shape[1])
    added = _added("attention_mask", mask, *sizes), _added("position_bias", position_bias, *sizes)
    if not x.numel():
        return _fake(x)
    return cpu.encoder_layer(
        x.contiguous(), *added, parts.linears, parts.norms, parts.norm_dtype, eps, heads, parts.head_size, scaling,
        activation, symmetric, parts.bits, parts.factors,
    )  # fmt: skip


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator(
    "encoder_layer(Tensor x, Tensor? mask, Tensor[] weights, Tensor[] scales, Tensor[] biases, Tensor[] norms,"
    " int heads, float scaling, float[] eps, str activation, bool symmetric,"
    ' str quant_type="int8", int blocksize=0, int[] features=[], Tensor[]? nested=None,'
    " Tensor? position_bias=None, Tensor[]? factors=None) -> Tensor",
    _fake,
    keys=("CPU",),
)
def _encoder_layer(
    kernels: Kernels,
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
    quant_type: str = "int8",
    blocksize: int = 0,
    features: Sequence[int] = (),
    nested: Sequence[Tensor] | None = None,
    position_bias: Tensor | None = None,
    factors: Sequence[Tensor] | None = None,
) -> Tensor:
    quantized = (symmetric, quant_type, blocksize, features, nested or (), factors or ())
    parts = prepare(weights, scales, biases, norms, heads, activation, *quantized)
    return run(x, mask, parts, heads, scaling, eps, activation, symmetric, position_bias)


class ShortWay:
    """torch.ops.pyqkern.encoder_layer by the shortest way, for one layer: what was checked is remembered.

    It stays so while the tensors are the same and at their addresses: one that changes its dtype moves.
    """

    def __init__(self) -> None:
        self._checked: tuple[tuple[object, ...], list[int], Prepared] | None = None

    def __reduce__(self) -> tuple[type["ShortWay"], tuple[()]]:
        """Addresses mean nothing in a copy or in another process."""
        return ShortWay, ()

    def __call__(
        self,
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
        quant_type: str = "int8",
        blocksize: int = 0,
        features: Sequence[int] = (),
        nested: Sequence[Tensor] = (),
        position_bias: Tensor | None = None,
        factors: Sequence[Tensor] = (),
    ) -> Tensor:
        quantized = (symmetric, quant_type, blocksize, features, nested)
        parts = None
        if nobody_listens() and all(t is None or is_plain(t) for t in (x, mask, position_bias)):
            parts = self._prepared(weights, scales, biases, norms, heads, activation, *quantized, factors)
        if parts is None:
            rest = (heads, scaling, eps, activation, *quantized, position_bias, factors)
            given = [x.new_empty(0) if bias is None else bias for bias in biases]
            return torch.ops.pyqkern.encoder_layer.default(x, mask, weights, scales, given, norms, *rest)
        return run(x, mask, parts, heads, scaling, eps, activation, symmetric, position_bias)

    def _prepared(
        self, weights: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor | None],
        norms: Sequence[Tensor], heads: int, activation: str, symmetric: bool, quant_type: str, blocksize: int,
        features: Sequence[int], nested: Sequence[Tensor], factors: Sequence[Tensor],
    ) -> Prepared | None:  # fmt: skip
        """None where C++ may not read one of the tensors."""
        parts = (*weights, *scales, *biases, *norms, *nested, *factors)
        tensors = [tensor for tensor in parts if tensor is not None]
        given = (*map(id, tensors), heads, activation, symmetric, quant_type, blocksize, *features)
        checked = self._checked
        if checked and checked[0] == given and checked[1] == [tensor.data_ptr() for tensor in tensors]:
            return checked[2]
        if not all(is_plain(tensor) for tensor in tensors):
            return None
        how = (heads, activation, symmetric, quant_type, blocksize, features, nested, factors)
        prepared = prepare(weights, scales, biases, norms, *how)
        self._checked = (given, [tensor.data_ptr() for tensor in tensors], prepared)
        return prepared
