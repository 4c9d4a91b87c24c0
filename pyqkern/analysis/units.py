"""What `auto` chooses for: each layer of transformers that `optimize` fuses, and each other that can be quantized."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import nn

from pyqkern.calibration.smooth import Pair, scales
from pyqkern.models.find import (
    RECURRENT,
    Layer,
    as_linear,
    embedding_reasons,
    find_attentions,
    find_experts,
    find_layers,
    find_linears,
    linear_reasons,
    linear_types,
    recurrent_reasons,
)
from pyqkern.models.layouts import layout_of
from pyqkern.models.optimize import optimize
from pyqkern.models.plan import Choice, Plan, Smoothing
from pyqkern.models.replace import put, quantized_tables, scheme_reason
from pyqkern.models.summary import count_tensors, shape_of
from pyqkern.nn.attention import unfold
from pyqkern.nn.decoder import QDecoderLayer
from pyqkern.nn.embedding import EMBEDDINGS, QEmbedding
from pyqkern.nn.experts import QExperts, has_experts
from pyqkern.nn.fused import QFusedLayer
from pyqkern.nn.linear import QLinear
from pyqkern.nn.recurrent import QRecurrent
from pyqkern.schemes import Int8Outlier, Int8WeightOnly, Range, Scheme

# How an encoder layer is smoothed before it is quantized: not, only where it costs nothing, or in front of all linears.
PLAIN, FREE, ALL = "", "smoothed in V", "smoothed"


@dataclass
class Unit:
    """A layer to choose for. layer: what is called; parts: the layers in it that are quantized, by name.

    heads: the linears that are tied to an embedding.
    """

    kind: str
    layer: Layer
    parts: dict[str, tuple[int, ...]]
    heads: list[Layer] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.layer.names[0]

    def called(self) -> list[Layer]:
        return [self.layer, *self.heads]

    def form(self) -> str:
        """The same for units whose time is the same."""
        modules = [one.module for one in self.called()]
        return "; ".join(
            f"{type(module).__name__} {[list(parameter.shape) for parameter in module.parameters()]}"
            for module in modules
        )


@dataclass(frozen=True)
class Option:
    """What a unit can become."""

    scheme: Scheme | None
    smoothing: str = PLAIN

    @property
    def title(self) -> str:
        name = "float" if self.scheme is None else repr(self.scheme)
        return f"{name}, {self.smoothing}" if self.smoothing else name


FLOAT = Option(None)


def own_copy(model: nn.Module) -> nn.Module:
    """A copy of the model in eval mode, in which each projection of an nn.MultiheadAttention is a linear.

    Raises ValueError for a model with quantized layers.
    """
    for name, module in model.named_modules():
        if isinstance(module, QLinear | QEmbedding | QRecurrent | QExperts):
            raise ValueError(
                f"model must be in float, but {name or 'it'} is quantized already: {type(module).__name__}; give the "
                "float model"
            )
    own = copy.deepcopy(model).eval()
    for attention in find_attentions(own):
        unfold(attention)
    return own


def find_units(model: nn.Module) -> list[Unit]:
    """The units of what `own_copy` returned. Raises ValueError where there are none."""
    linears = [*find_linears(model), *find_experts(model)]
    free = [one for one, why in zip(linears, linear_reasons(model, linears, None, ()), strict=True) if why is None]
    units = list(_fused_units(model, free))
    inside = {name for unit in units for name in unit.parts}
    for layer in free:
        if inside.isdisjoint(layer.names):
            units.append(_unit("experts" if has_experts(layer.module) else "linear", layer))
    recurrent = find_layers(model, RECURRENT)
    reasons = recurrent_reasons(model, recurrent, None, ())
    units += [_unit("recurrent layer", one) for one, why in zip(recurrent, reasons, strict=True) if why is None]
    embeddings = find_layers(model, (*EMBEDDINGS,))
    taken = {id(layer.module) for layer in free}
    tied = [layer for layer in find_layers(model, linear_types()) if id(layer.module) not in taken]
    seen: set[int] = set()
    for layer, why in zip(embeddings, embedding_reasons(model, embeddings, None, ()), strict=True):
        weight = layer.module._parameters.get("weight")
        if why is None and id(weight) not in seen:
            seen.add(id(weight))
            heads = [head for head in tied if head.module._parameters.get("weight") is weight]
            shared = [one for one in embeddings if one.module._parameters.get("weight") is weight]
            if len(shared) == 1:
                units.append(Unit("embedding", layer, {layer.names[0]: shape_of(layer.module)}, heads))
    if not units:
        raise ValueError("model must have layers that can be quantized, got none; see pyqkern.summary(model)")
    return units


def _unit(kind: str, layer: Layer) -> Unit:
    return Unit(kind, layer, {layer.names[0]: shape_of(layer.module)})


def _fused_units(model: nn.Module, free: Sequence[Layer]) -> Iterator[Unit]:
    """Of the encoder and decoder layers that `optimize` makes one operator, tried on a copy of each."""
    names = {id(layer.module): layer.names[0] for layer in free}
    kinds = {type(module) for module in model.modules() if layout_of(module) is not None}
    for layer in find_layers(model, tuple(kinds)) if kinds else ():
        layout = layout_of(layer.module)
        tried = optimize(copy.deepcopy(layer.module))
        if layout is None or not isinstance(tried, QFusedLayer):
            continue
        kind = "decoder layer" if isinstance(tried, QDecoderLayer) else "encoder layer"
        linears = [layer.module.get_submodule(".".join(path)) for path in layout.linears]
        if all(id(linear) in names for linear in linears):
            yield Unit(kind, layer, {names[id(linear)]: shape_of(linear) for linear in linears})


# ---- what a unit can become


@dataclass
class Ranges:
    """Of each linear's input: per channel for smoothing, per tensor for "int8-static"."""

    channels: Mapping[str, Range] = field(default_factory=dict)
    tensors: Mapping[str, Range] = field(default_factory=dict)


def options_of(unit: Unit, schemes: Sequence[Scheme], ranges: Ranges) -> list[Option]:
    """Float, and what the schemes make of the unit. A scheme that does not fit one of its layers is left out."""
    found = [FLOAT]
    for scheme in schemes:
        if not _fits(unit, scheme, ranges):
            continue
        found.append(Option(scheme))
        smoothed = not scheme.needs_ranges and not isinstance(scheme, Int8WeightOnly | Int8Outlier)
        smoothed = smoothed and scheme.bits <= 8 and all(name in ranges.channels for name in unit.parts)
        if smoothed and unit.kind == "encoder layer":
            found.append(Option(scheme, FREE))
        if smoothed and unit.kind in ("encoder layer", "linear"):
            found.append(Option(scheme, ALL))
    return found


def _fits(unit: Unit, scheme: Scheme, ranges: Ranges) -> bool:
    if unit.kind == "recurrent layer":
        return scheme.recurs
    if unit.kind == "embedding":
        if not scheme.embeds:
            return False
        if not unit.heads and (isinstance(scheme, Int8WeightOnly) or getattr(scheme, "activation_bits", 8) != 8):
            return False  # a lookup has no activations to quantize: these are "int8"
    tensors = ranges.tensors if scheme.needs_ranges else None
    layers = [Layer(_part(unit, name), [name]) for name in unit.parts]
    return all(scheme_reason(layer, scheme, tensors) is None for layer in layers)


def choice_of(unit: Unit, option: Option, ranges: Ranges) -> Choice:
    """The choice of a plan that this option is."""
    chosen = Choice(unit.name, unit.kind, option.scheme, unit.parts)
    if option.scheme is not None and option.scheme.needs_ranges:
        ends = {name: ranges.tensors[name] for name in unit.parts}
        chosen = replace(chosen, ranges={name: (float(one.lo), float(one.hi)) for name, one in ends.items()})
    if option.smoothing:
        pairs = [pair for pair in _pairs(unit) if option.smoothing == ALL or not pair.shared]
        chosen = replace(chosen, smoothing=tuple(_smoothing(unit, pair, ranges) for pair in pairs))
    return chosen


def _pairs(unit: Unit) -> list[Pair]:
    """As `find_pairs` has them for an encoder layer; in front of a single linear stands its own factor."""
    names = list(unit.parts)
    if unit.kind == "linear":
        return [Pair("", (names[0],), shared=True)]
    query, key, value, output, up, _ = names
    return [Pair("", (query, key, value), shared=True), Pair(value, (output,)), Pair("", (up,), shared=True)]


def _smoothing(unit: Unit, pair: Pair, ranges: Ranges) -> Smoothing:
    linears = [as_linear(_part(unit, name)) for name in pair.after]
    exponents = scales(pair, linears, ranges.channels, 0.5).log2().round().int()
    return Smoothing("" if pair.shared else pair.before, pair.after, tuple(exponents.tolist()))


def _part(unit: Unit, name: str) -> nn.Module:
    module: nn.Module = unit.layer.module
    return module.get_submodule(relative(name, unit.name))


def relative(name: str, within: str) -> str:
    return name if not within else name.removeprefix(within).removeprefix(".")


# ---- a unit as it would be


def replacements(unit: Unit, choice: Choice) -> list[tuple[Layer, nn.Module]]:
    """What stands where with this choice; the unit's own modules stay as they are."""
    if choice.scheme is None:
        return [(layer, layer.module) for layer in unit.called()]
    if unit.kind == "embedding":
        return quantized_tables(unit.heads, [unit.layer], choice.scheme)

    def own(name: str) -> str:
        return relative(name, unit.name)

    inside = replace(
        choice,
        name="",
        layers={own(name): shape for name, shape in choice.layers.items()},
        ranges={own(name): ends for name, ends in choice.ranges.items()},
        smoothing=tuple(
            Smoothing(own(one.before), tuple(map(own, one.after)), one.exponents) for one in choice.smoothing
        ),
    )
    return [(unit.layer, optimize(copy.deepcopy(unit.layer.module), Plan((inside,))))]


@contextmanager
def replaced(model: nn.Module, new: Sequence[tuple[Layer, nn.Module]]) -> Iterator[nn.Module]:
    """The model with these modules in the places of its own, for a while."""
    result = model
    try:
        for layer, module in new:
            result = put(layer, module, result)
        yield result
    finally:
        for layer, _ in new:
            put(layer, layer.module, model)


def bytes_of(new: Sequence[tuple[Layer, nn.Module]]) -> int:
    """What the tensors of these modules take, each once."""
    counted: set[tuple[int, int]] = set()
    tensors = [tensor for _, module in new for tensor in (*module.parameters(), *module.buffers())]
    return count_tensors(tensors, counted)
