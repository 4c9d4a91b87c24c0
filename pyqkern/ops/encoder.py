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
from typing import NamedTuple

import torch
from torch import Tensor

from pyqkern.backends import ACTIVATIONS, INT8_LINEAR_MAX_K, Kernels, cpu
from pyqkern.ops.checks import FLOATS
from pyqkern.ops.four_bit import check_format
from pyqkern.ops.layers import check_added, check_linear, check_vector, readable
from pyqkern.ops.registry import nobody_listens, operator

LINEARS = ("query", "key", "value", "output", "up", "down")

# The most tokens of a sentence: the codes of probabilities are up to 255 and those of values up to 127, so that the
# exact sums are as long as those of a linear may be.
MAX_LENGTH = INT8_LINEAR_MAX_K


class Form(NamedTuple):
    """How the linears are stored. blocksize, features and nested are those of 4 bits."""

    quant_type: str = "int8"
    blocksize: int = 0
    features: Sequence[int] = ()
    nested: Sequence[Tensor] = ()

    @property
    def is_int8(self) -> bool:
        return self.quant_type in ("int8", "int8-a7")

    def rows(self, scales: Sequence[Tensor]) -> tuple[int, int]:
        """Rows of the query's weight, and of the feed-forward's."""
        if not self.is_int8:
            if len(self.features) != 2:
                raise ValueError(f"features must be [width, wide] for 4-bit linears, got {list(self.features)}")
            return self.features[0], self.features[1]
        if any(scale.dim() != 1 for scale in scales):
            raise ValueError("scales must have one dimension")
        return scales[0].shape[0], scales[4].shape[0]


def _check_parts(
    weights: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor | None], norms: Sequence[Tensor],
    nested: Sequence[Tensor], factors: Sequence[Tensor],
) -> None:  # fmt: skip
    """How many parts there are, and where."""
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


def _check_vectors(norms: Sequence[Tensor], factors: Sequence[Tensor]) -> int:
    """Dtypes and shapes of what lies along the hidden size, which is returned."""
    if any(norm.dim() != 1 for norm in norms):
        raise ValueError("norms must have one dimension")
    hidden, dtype = norms[0].shape[0], norms[0].dtype
    for norm in norms:
        if norm.dtype not in FLOATS or norm.dtype is not dtype:
            raise TypeError(f"norms must be floats [{hidden}] of one dtype, got {norm.dtype} {tuple(norm.shape)}")
        if norm.shape != (hidden,):
            raise ValueError(f"norms must be floats [{hidden}] of one dtype, got {norm.dtype} {tuple(norm.shape)}")
    for factor in factors:
        check_vector("factors", factor, hidden, factor.dtype is torch.float32, "float32")
    return hidden


def _check_format(heads: int, attention: int, wide: int, activation: str, symmetric: bool, form: Form) -> None:
    if heads < 1 or attention < 1 or attention % heads or wide < 1:
        raise ValueError(f"heads must divide the {attention} rows of the query's weight, got {heads}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not form.is_int8:
        check_format(form.quant_type, form.blocksize)
        if not symmetric:
            raise ValueError("symmetric must be True for 4-bit linears, got False")
    if form.quant_type == "int8-a7" and symmetric:
        raise ValueError("symmetric must be False for int8-a7, got True")


def check(
    weights: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor | None], norms: Sequence[Tensor],
    heads: int, activation: str, symmetric: bool, form: Form, factors: Sequence[Tensor],
) -> None:  # fmt: skip
    """Checks all that does not depend on the input. Raises TypeError and ValueError."""
    _check_parts(weights, scales, biases, norms, form.nested, factors)
    hidden = _check_vectors(norms, factors)
    attention, wide = form.rows(scales)
    _check_format(heads, attention, wide, activation, symmetric, form)
    sizes = (*((attention, hidden),) * 3, (hidden, attention), (wide, hidden), (hidden, wide))
    for i, (name, (n, k)) in enumerate(zip(LINEARS, sizes, strict=True)):
        bias = biases[i]
        if bias is not None:
            check_vector(f"the bias of {name}", bias, n, bias.dtype in FLOATS, "floats")
        nested = form.nested[3 * i : 3 * i + 3]
        check_linear(name, weights[i], scales[i], n, k, form.quant_type, form.blocksize, nested)


def _check_input(
    x: Tensor, mask: Tensor | None, position_bias: Tensor | None, hidden: int, heads: int, eps: Sequence[float]
) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be fp32, bf16 or fp16 [batch, length, {hidden}], got {x.dtype} {tuple(x.shape)}")
    if x.dim() != 3 or x.shape[2] != hidden:
        raise ValueError(f"x must be fp32, bf16 or fp16 [batch, length, {hidden}], got {x.dtype} {tuple(x.shape)}")
    if x.shape[1] > MAX_LENGTH:
        raise ValueError(
            f"length must be at most {MAX_LENGTH}, so that attention's int32 sums do not wrap, got {x.shape[1]}; "
            "split the text"
        )
    if len(eps) != 2:
        raise ValueError(f"eps must be two numbers, one for each LayerNorm, got {len(eps)}")
    batch, length = x.shape[:2]
    check_added("attention_mask", mask, batch, heads, length, (length,))
    check_added("position_bias", position_bias, batch, heads, length, (length,))


def _run(
    x: Tensor, mask: Tensor | None, weights: Sequence[Tensor], scales: Sequence[Tensor],
    biases: Sequence[Tensor | None], norms: Sequence[Tensor], heads: int, scaling: float, eps: Sequence[float],
    activation: str, symmetric: bool, form: Form, position_bias: Tensor | None, factors: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """The C++ kernel, which checks what it is given once more."""
    bits = 7 if form.quant_type == "int8-a7" else 8
    return cpu.encoder_layer(
        x.contiguous(), readable(mask), readable(position_bias), weights, scales, biases, form.nested, norms, factors,
        form.rows(scales), heads, eps, scaling, activation, symmetric, bits,
        None if form.is_int8 else form.quant_type, form.blocksize,
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
    form = Form(quant_type, blocksize, features, nested or ())
    biases = [bias if bias is not None and bias.numel() else None for bias in biases]
    check(weights, scales, biases, norms, heads, activation, symmetric, form, factors or ())
    _check_input(x, mask, position_bias, norms[0].shape[0], heads, eps)
    if not x.numel():
        return _fake(x)
    parts = (weights, scales, biases, norms, heads, scaling, eps, activation, symmetric, form)
    return _run(x, mask, *parts, position_bias, factors or ())


def encoder_layer(
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
    quiet: bool | None = None,
) -> Tensor:
    """torch.ops.pyqkern.encoder_layer by the shortest way; biases may be None.

    quiet: what nobody_listens says, if the caller has asked.

    C++ checks that its arguments are plain CPU tensors that fit; what it does not take goes to the operator, which says
    what is wrong.
    """
    if cpu.READS_FAST and (nobody_listens() if quiet is None else quiet):
        form = Form(quant_type, blocksize, features, nested)
        parts = (weights, scales, biases, norms, heads, scaling, eps, activation, symmetric, form)
        try:
            return _run(x, mask, *parts, position_bias, factors)
        except (*cpu.UNFIT, AttributeError):
            pass
    given = [x.new_empty(0) if bias is None else bias for bias in biases]
    rest = (heads, scaling, eps, activation, symmetric, quant_type, blocksize, features, nested, position_bias, factors)
    return torch.ops.pyqkern.encoder_layer.default(x, mask, weights, scales, given, norms, *rest)
