"""The parts of an encoder layer of transformers, and whether they compute what the operator encoder_layer computes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyqkern.backends import ACTIVATIONS, cpu
from pyqkern.nn.fused_parts import (
    Family,
    InputScale,
    Layout,
    Parts,
    activation_of,
    activation_reason,
    attributes,
    common_format,
    in_panels_reason,
    is_four_bit,
    kernel_activation,
    kind_of,
    part_of,
    slots_of,
    stock_reason,
)
from pyqkern.nn.int8 import Int8Linear
from pyqkern.ops.checks import FLOATS


@dataclass(frozen=True)
class EncoderLayout(Layout):
    """linears: in the order of pyqkern.ops.encoder.LINEARS."""

    position_bias: str = ""  # argument of forward that is added to the scores

    def handled(self, arguments: Sequence[str]) -> set[str]:
        return {*arguments[:2], *([self.position_bias] if self.position_bias else [])}


class Operands(NamedTuple):
    """What the operator is given of a layer."""

    weights: list[Tensor]
    scales: list[Tensor]
    nested: list[Tensor]
    norms: list[Tensor]  # the LayerNorms' weights and biases
    biases: list[Tensor | None]
    factors: list[Tensor]  # of the inputs of query, key and value, and of up; empty where nothing is multiplied
    eps: list[float]
    features: list[int]  # rows of the query's weight and of the feed-forward's


@dataclass(eq=False)
class EncoderParts(Parts):
    heads: int = 0
    scaling: float = 0.0
    input_scale: InputScale | None = None
    up_scale: InputScale | None = None

    def tensors(self, quiet: bool) -> Operands:
        """As they are now; torch.compile looks for them itself. quiet: what `nobody_listens` says."""
        operands: Operands = self._gather() if not quiet and torch.compiler.is_compiling() else self.operands
        return operands

    def _gather(self) -> Operands:
        linears, of_norms = self.linears, [norm._parameters for norm in self.norms]
        return Operands(
            [linear._buffers["packed"] for linear in linears],  # read directly: see Int8Linear._linear
            [linear._scales() for linear in linears],
            [linear._buffers[name] for linear in linears for name in self.format.nested],
            [parameters[name] for parameters in of_norms for name in ("weight", "bias")],
            [linear._parameters["bias"] for linear in linears],
            self._factors(),
            [norm.eps for norm in self.norms],
            [linears[0].out_features, linears[4].out_features],
        )

    def _factors(self) -> list[Tensor]:
        if self.input_scale is None or self.up_scale is None or not self.scaled:
            return []
        return [self.input_scale.factor.cpu(), self.up_scale.factor.cpu()]


def find_encoder_parts(layer: nn.Module, family: Family) -> EncoderParts:
    """The parts of a layer, or the reason why it cannot become one operator."""
    try:
        return _find(layer, family)
    except AttributeError as error:
        return EncoderParts(f"not the {family.base.__name__} that is known: {error}")


def _find(layer: nn.Module, family: Family) -> EncoderParts:
    layout: EncoderLayout = family.layout
    attention: Any = part_of(layer, layout.attention)
    linears = [part_of(layer, path) for path in layout.linears]
    norms = [part_of(layer, path) for path in layout.norms]
    heads = getattr(attention, layout.heads)
    function, places = activation_of(layer, layout)
    reason = (
        _decoder_reason(layer, attention)
        or stock_reason(layer, family)
        or _linears_reason(layout, linears, heads)
        or _norms_reason(norms, linears[0].in_features)
    )
    activation = kernel_activation(function)
    if reason is None and activation not in ACTIVATIONS:
        reason = activation_reason(function)
    if reason is not None:
        return EncoderParts(reason)
    form = common_format(linears)
    assert form is not None and activation is not None  # _linears_reason has seen to it
    scaled, input_scale, up_scale = _input_scales(linears)
    parts = EncoderParts(
        None, linears, norms, form, activation, getattr(attention, "config", None), scaled=scaled, heads=heads,
        scaling=getattr(attention, "scaling", None) or (linears[0].out_features // heads) ** -0.5,
        input_scale=input_scale, up_scale=up_scale,
    )  # fmt: skip
    parts.slots = [*slots_of(linears, norms, form), *((vars(norm), "eps") for norm in norms)]
    parts.slots += [(vars(linear), "out_features") for linear in linears]
    parts.slots += [(vars(scale), "factor") for scale in (input_scale, up_scale)]
    parts.watch(layer, [*attributes(attention, (layout.heads, "scaling", "config")), *places])
    return parts


def unfit(linear: nn.Module) -> str | None:
    """Why the operator cannot take this linear."""
    if type(linear) is Int8Linear:
        return None
    if not is_four_bit(linear):
        return f"is no linear with activations quantized per token: {kind_of(linear)}"
    compute: Any = linear.scheme.compute  # type: ignore[union-attr]
    if compute not in cpu.AS_INT8:
        return f"computes in {compute}, which only single linears do"
    return in_panels_reason(linear)


def _input_scales(linears: Sequence[Any]) -> tuple[list[tuple[dict[int, Any], InputScale]], InputScale, InputScale]:
    """The hooks of `smooth` that the operator stands for, and the factors of query, key and value, and of up.

    Others are hooks like any, which the layer goes its old way for.
    """
    found: list[tuple[dict[int, Any], InputScale]] = []
    qkv, up = _common_scale(linears[:3], found), _common_scale(linears[4:5], found)
    one = InputScale(torch.ones(linears[0].in_features, dtype=torch.float32, device="cpu"))
    return found, qkv or one, up or one


def _common_scale(linears: Sequence[Any], found: list[tuple[dict[int, Any], InputScale]]) -> InputScale | None:
    """The only pre-hook of all of them, if it has the same factor for all; the hooks are added to `found`."""
    hooks = [linear._forward_pre_hooks for linear in linears]
    scales = [next(iter(each.values())) for each in hooks if len(each) == 1]
    if len(scales) < len(linears) or not all(_is_alike(scale, scales[0]) for scale in scales):
        return None
    found += zip(hooks, scales, strict=True)
    first: InputScale = scales[0]
    return first


def _is_alike(scale: Any, other: Any) -> bool:
    return type(scale) is type(other) is InputScale and torch.equal(scale.factor.cpu(), other.factor.cpu())


def _decoder_reason(layer: Any, attention: Any) -> str | None:
    if getattr(layer, "is_decoder", False) or getattr(layer, "add_cross_attention", False):
        return "a decoder layer"
    if getattr(attention, "is_causal", False) or getattr(attention, "is_decoder", False):
        return "a decoder layer"
    embedding = getattr(attention, "position_embedding_type", "absolute")
    return None if embedding in ("absolute", None) else f"its scores have a term of their own: {embedding}"


def _linears_reason(layout: EncoderLayout, linears: Sequence[Any], heads: int) -> str | None:
    for path, linear in zip(layout.linears, linears, strict=True):
        if (why := unfit(linear)) is not None:
            return f"{'.'.join(path)} {why}"
    if common_format(linears) is None:
        return "its linears are quantized in different ways"
    hidden, width, wide = linears[0].in_features, linears[0].out_features, linears[4].out_features
    if heads < 1 or width % heads:
        return f"{heads} heads do not divide {width} features"
    shapes = [(linear.out_features, linear.in_features) for linear in linears]
    if shapes != [(width, hidden)] * 3 + [(hidden, width), (wide, hidden), (hidden, wide)]:
        return f"its linears do not fit together: {shapes}"
    return None


def _norms_reason(norms: Sequence[Any], hidden: int) -> str | None:
    if any(type(norm) is not nn.LayerNorm for norm in norms):
        return "its norms are no LayerNorms with weight and bias"
    vectors = [norm._parameters.get(name) for norm in norms for name in ("weight", "bias")]
    if any(vector is None or vector.shape != (hidden,) for vector in vectors):
        return "its norms are no LayerNorms with weight and bias"
    return None


def dtypes_reason(given: Operands) -> str | None:
    """Why the operator does not take the LayerNorms' vectors and the biases of linears as they are now."""
    dtypes = [vector.dtype for vector in given.norms]
    if dtypes[0] not in FLOATS or dtypes.count(dtypes[0]) != len(dtypes):
        return "its LayerNorms do not have one dtype of fp32, bf16 and fp16"
    for bias in given.biases:
        if bias is not None and bias.dtype not in FLOATS:
            return "a bias is not in fp32, bf16 or fp16"
    return None
