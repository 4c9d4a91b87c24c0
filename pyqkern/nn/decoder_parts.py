"""The parts of a decoder layer of transformers, and whether they compute what the operator decoder_layer computes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pyqkern.backends import DECODER_ACTIVATIONS, DecoderForm
from pyqkern.nn.fused_parts import (
    Family,
    Format,
    InputScale,
    Layout,
    Parts,
    Path,
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
from pyqkern.nn.int8 import Int8Linear, Int8WeightOnlyLinear
from pyqkern.ops import decoder

ROTARY = "position_embeddings"  # the argument that holds cos and sin
MASK = "attention_mask"


@dataclass(frozen=True, kw_only=True)
class DecoderLayout(Layout):
    """linears: in the order of pyqkern.ops.decoder; there may be one of query, key and value, or of gate and up.

    heads: attribute of the attention with the heads of key and value, "" where the key's linear tells.
    """

    cache: str = "past_key_values"  # argument of forward
    alibi: str = ""  # argument of forward that is added to the scores
    rotary: bool = False
    norm: str = ""
    norm_offset: float = 0.0
    head_norms: tuple[Path, ...] = ()
    scaling: str = "scaling"  # attribute of the attention
    gated: bool = False
    interleaved: bool = False
    returns_weights: bool = False
    constants: tuple[tuple[Path, object, str], ...] = ()  # what an attribute must be, and why not otherwise

    def known(self) -> set[Path]:
        return super().known() | set(self.head_norms)

    def handled(self, arguments: Sequence[str]) -> set[str]:
        return {arguments[0], MASK, self.cache, ROTARY if self.rotary else self.alibi} - {""}


@dataclass(eq=False)
class DecoderParts(Parts):
    """What the operator needs of a decoder layer. norms: the two of the layer, then those of the heads."""

    form: DecoderForm | None = None
    index: int = 0  # the layer's place in a cache

    def _gather(self) -> decoder.Layer:
        linears, norms = self.linears, [norm._parameters for norm in self.norms]
        parts = decoder.Parts(
            [linear._buffers["packed"] for linear in linears],  # read directly: see Int8Linear._linear
            [linear._scales() for linear in linears],
            [linear._parameters["bias"] for linear in linears],
            [norm[name] for norm in norms[:2] for name in ("weight", "bias") if name in norm],
            [linear._buffers[name] for linear in linears for name in self.format.nested],
            [norm["weight"] for norm in norms[2:]],
        )
        assert self.form is not None  # there is no reason, so there is all else
        return decoder.layer_of(parts, self.form)


def find_decoder_parts(layer: nn.Module, family: Family) -> DecoderParts:
    """The parts of a layer, or the reason why it cannot become one operator."""
    try:
        return _find(layer, family)
    except AttributeError as error:
        return DecoderParts(f"not the {family.base.__name__} that is known: {error}")


def _find(layer: nn.Module, family: Family) -> DecoderParts:
    layout: DecoderLayout = family.layout
    attention: Any = part_of(layer, layout.attention)
    linears = [part_of(layer, path) for path in layout.linears]
    norms = [part_of(layer, path) for path in (*layout.norms, *layout.head_norms)]
    function, places = activation_of(layer, layout)
    constants = [(part_of(layer, path[:-1]), path[-1], value, why) for path, value, why in layout.constants]
    reason = (
        stock_reason(layer, family)
        or next((why for holder, name, value, why in constants if getattr(holder, name) != value), None)
        or _linears_reason(layout, linears)
        or _norms_reason(norms, family.norm)
        or _scaling_reason(attention, layout)
    )
    activation = kernel_activation(function)
    if reason is None and activation not in DECODER_ACTIVATIONS:
        reason = activation_reason(function)
    if reason is not None:
        return DecoderParts(reason)
    found = common_format(linears)
    assert found is not None and activation is not None  # _linears_reason has seen to it
    form, reason = _form(layout, attention, linears, norms, activation, found)
    if form is None or reason is not None:
        return DecoderParts(reason)
    parts = DecoderParts(
        None, linears, norms, found, activation, getattr(attention, "config", None), form=form,
        index=attention.layer_idx, slots=list(slots_of(linears, norms, found)),
    )  # fmt: skip
    for holder, name, _, _ in constants:
        places += attributes(holder, [name])
    for norm in norms:
        places += attributes(norm, _EPS)
    parts.watch(layer, [*attributes(attention, (*_READ, layout.heads, layout.scaling)), *places])
    return parts


# Attributes of the attention that the operator is told, or that say what its code does.
_READ = (
    "config", "layer_idx", "head_dim", "num_key_value_groups", "split_size", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
)  # fmt: skip
_EPS = ("variance_epsilon", "eps")


def unfit(linear: nn.Module) -> str | None:
    """Why the operator cannot take this linear."""
    if any(type(hook) is InputScale for hook in linear._forward_pre_hooks.values()):
        return "is smoothed, and the operator multiplies by no factors"
    if type(linear) in (Int8Linear, Int8WeightOnlyLinear):
        return None
    return (
        in_panels_reason(linear) if is_four_bit(linear) else f"is of a kind that only runs by itself: {kind_of(linear)}"
    )


def _linears_reason(layout: DecoderLayout, linears: Sequence[Any]) -> str | None:
    for path, linear in zip(layout.linears, linears, strict=True):
        if (why := unfit(linear)) is not None:
            return f"{'.'.join(path)} {why}"
    return None if common_format(linears) is not None else "its linears are quantized in different ways"


def _norms_reason(norms: Sequence[Any], kind: type[nn.Module]) -> str | None:
    if any(type(norm) is not kind for norm in norms):
        return f"its norms are no {kind.__name__}s"
    names = ("weight", "bias") if kind is nn.LayerNorm else ("weight",)
    if any(norm._parameters.get(name) is None for norm in norms for name in names):
        return "its norms have no weight, or no bias"
    if len({_eps(norm) for norm in norms}) > 1:
        return "its norms have different eps"
    return None


def _eps(norm: Any) -> float:
    return float(next(vars(norm)[name] for name in _EPS if name in vars(norm)))


def _scaling_reason(attention: Any, layout: DecoderLayout) -> str | None:
    """Where the attention has no scaling, as GPT-2 in transformers 4, it depends on who computes it."""
    if layout.scaling in vars(attention):
        return None
    if attention.scale_attn_weights and not attention.scale_attn_by_inverse_layer_idx:
        return None
    return "its scores are not scaled by the square root of the head size"


def _form(
    layout: DecoderLayout, attention: Any, linears: Sequence[Any], norms: Sequence[Any], activation: str, found: Format
) -> tuple[DecoderForm | None, str | None]:
    """What the operator is told, or why the linears do not fit together."""
    hidden, size = linears[0].in_features, attention.head_dim
    separate = len(layout.linears) - 2 - layout.gated >= 4  # query, key and value, not one of all
    kv_heads = getattr(attention, layout.heads) if layout.heads else linears[1].out_features // size
    rows = linears[0].out_features if separate else linears[0].out_features - 2 * kv_heads * size
    wide = linears[-1].in_features
    form = DecoderForm(
        rows // size, kv_heads, size, wide, vars(attention).get(layout.scaling, size**-0.5), _eps(norms[0]), activation,
        layout.gated, found.quant_type, found.symmetric, found.compute, found.blocksize, layout.norm_offset,
        layout.interleaved,
    )  # fmt: skip
    shapes = [(linear.out_features, linear.in_features) for linear in linears]
    heads, groups = form.heads, vars(attention).get("num_key_value_groups", 1)
    split = vars(attention).get("split_size", heads * size)
    stated = heads if separate else getattr(getattr(attention, "config", None), "num_attention_heads", heads)
    if kv_heads < 1 or heads != kv_heads * groups or heads * size != rows or split != rows or stated != heads:
        return None, f"its heads do not fit its linears: {heads} and {kv_heads} heads of {size} features, {shapes}"
    if shapes != [(n, k) for _, n, k in form.linears(len(linears), hidden)]:
        return None, f"its linears do not fit together: {shapes}"
    sizes = [norm._parameters["weight"].shape[0] for norm in norms]
    if sizes != [hidden] * 2 + [size] * (len(norms) - 2):
        return None, f"its norms do not fit its linears: {sizes}"
    return form, None
