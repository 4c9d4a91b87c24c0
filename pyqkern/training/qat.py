"""Quantization-aware training: `prepare` a float model, train it, `convert` it. docs/training.md shows how."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pyqkern.models.find import (
    KEPT,
    PREPARED,
    RECURRENT,
    Layer,
    Pattern,
    embedding_reasons,
    find_experts,
    find_layers,
    find_linears,
    keep,
    linear_reasons,
    linear_types,
    recurrent_reasons,
    with_patterns,
)
from pyqkern.models.replace import (
    leave_fast_path,
    named,
    put,
    quantized_linear,
    quantized_recurrent,
    quantized_tables,
    scheme_reason,
    tell,
    warn_if_little,
)
from pyqkern.nn.embedding import EMBEDDINGS, QEmbedding
from pyqkern.nn.experts import has_experts
from pyqkern.nn.recurrent import is_recurrent_scheme
from pyqkern.ops.checks import INT
from pyqkern.schemes import SCHEMES, Int8Static, Range, Scheme, check_type, get_scheme, range_of, ranges_for
from pyqkern.training.activations import gelus, replace_gelu
from pyqkern.training.twins import RANGES, TRAINED, TWINS, QATLinear, Twin


def prepare(
    model: nn.Module,
    scheme: str | Scheme = "int8",
    *,
    ranges: Mapping[str, Range] | None = None,
    learn_ranges: bool = False,
    include: Pattern | None = None,
    exclude: Pattern = (),
    relu: bool = False,
) -> nn.Module:
    """Makes each linear, embedding and recurrent layer that the scheme can quantize trainable in it, in place, and
    returns the model.

    A layer becomes its twin: the float Parameters stay, and the forward pass is that of the quantized layer, of weights
    that are quantized anew in each call. Gradients go straight through (`pyqkern.training.straight_through`).
    `convert` then makes the quantized layers, with those codes and outputs, bit for bit.

    scheme: "int8", "int8-a7", "int8-static", "int8-weight-only", "nf4", "fp4", "int4", or a scheme object of these.
    ranges: for "int8-static" what `pyqkern.calibrate` returned, in the twins the Parameters input_scale and
    input_offset. learn_ranges: these are trained from there on, by learned step size quantization.
    include, exclude: as in `pyqkern.replace_linear`, for the names of all these layers; one whose weight is shared with
    another is kept where the other is. relu: each GELU becomes a ReLU, whose outputs need no codes below zero.

    Make the optimizer after it: the projections of an nn.MultiheadAttention and a Conv1D of transformers get Parameters
    of their own. Kept in float, with the reason in `summary`: what replace_linear, replace_embedding and
    replace_recurrent keep, and experts. Where more than half of the bytes of linears are kept that nothing excludes, a
    warning gives the reasons.

    Raises as replace_linear, and ValueError for schemes without twins, for a layer that is prepared already, and with
    relu=True for a model without GELU; nothing has been changed then.

    >>> import torch, pyqkern
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    >>> model = pyqkern.training.prepare(model, "int8", exclude="2")
    >>> model(torch.randn(8, 64)).square().mean().backward()
    >>> model[0].weight.grad.shape
    torch.Size([64, 64])
    >>> pyqkern.training.convert(model)[0]
    Int8Linear(in_features=64, out_features=64, bias=True, scheme=int8)
    """
    check_type("model", model, nn.Module, "an nn.Module")
    scheme = _trained_scheme(scheme)
    ranges = ranges_for(scheme, ranges)
    for name, value in (("learn_ranges", learn_ranges), ("relu", relu)):
        check_type(name, value, bool, "a bool")
    if learn_ranges and not scheme.needs_ranges:
        raise ValueError(f'learn_ranges must be False for {scheme.name}, got True; only "int8-static" has given ranges')
    if relu and not gelus(model):
        raise ValueError(f"relu must be False for a model without GELU, got True for {type(model).__name__}")
    linears = [*find_linears(model), *find_experts(model)]
    embeddings, recurrent = find_layers(model, (*EMBEDDINGS, QEmbedding)), find_layers(model, RECURRENT)
    layers = [*linears, *embeddings, *recurrent]
    reasons = _reasons(model, (linears, embeddings, recurrent), scheme, ranges, include, exclude)
    chosen = [layer for layer, reason in zip(layers, reasons, strict=True) if reason is None]
    _try(chosen, scheme, ranges)
    twins = [(layer, _twin(layer, scheme, ranges, learn_ranges)) for layer in chosen]
    if linears:
        warn_if_little(linears, reasons[: len(linears)])
    result = model
    for layer, twin in twins:
        result = put(layer, twin, result)
    for layer, reason in zip(layers, reasons, strict=True):
        if reason is not None and isinstance(layer.module, linear_types()):
            keep(layer, reason)
        elif reason is not None:
            setattr(layer.module, KEPT, reason)
    leave_fast_path(result)
    if relu:
        replace_gelu(result)
    return result


def _trained_scheme(scheme: str | Scheme) -> Scheme:
    found = get_scheme(scheme)
    if type(found) not in TRAINED:  # how a subclass computes is its own
        names = ", ".join(repr(name) for name, one in SCHEMES.items() if type(one) in TRAINED)
        raise ValueError(f"scheme of quantization-aware training must be one of {names}, got {found.name!r}")
    return found


def _reasons(
    model: nn.Module,
    kinds: tuple[list[Layer], list[Layer], list[Layer]],
    scheme: Scheme,
    ranges: Mapping[str, Range] | None,
    include: Pattern | None,
    exclude: Pattern,
) -> list[str | None]:
    """Why each linear, embedding and recurrent layer is kept; None where it gets a twin."""
    linears, embeddings, recurrent = kinds
    layers = [*linears, *embeddings, *recurrent]
    kinds_at = range(len(linears)), range(len(linears), len(linears) + len(embeddings))
    picked = with_patterns(layers, lambda _: None, include, exclude, "a layer")
    structural = [
        *linear_reasons(model, linears, None, (), named=include),
        *embedding_reasons(model, embeddings, None, ()),
        *recurrent_reasons(model, recurrent, None, ()),
    ]
    for layer, pattern in zip(layers, picked, strict=True):
        if pattern is None and PREPARED in vars(layer.module):
            raise ValueError(
                f"model must not be prepared twice, but {layer.names[0] or 'it'} is {vars(layer.module)[PREPARED]}; "
                "exclude what is prepared"
            )
    found = [reason or _misfit(layer, scheme, ranges) for layer, reason in zip(layers, structural, strict=True)]
    tables = {id(layers[i].module.weight) for i in kinds_at[1] if found[i] is None}
    # An output head that is tied to an embedding goes along with it.
    tied = [i for i in kinds_at[0] if id(layers[i].module._parameters.get("weight")) in tables]
    for i in tied:
        found[i] = _misfit(layers[i], scheme, ranges)
    found = [reason or pattern for reason, pattern in zip(found, picked, strict=True)]
    for i in (*tied, *kinds_at[1]):
        weight = layers[i].module._parameters.get("weight")
        others = [j for j in (*tied, *kinds_at[1]) if layers[j].module._parameters.get("weight") is weight]
        kept = [layers[j].names[0] for j in others if found[j] is not None]
        if found[i] is None and kept:
            found[i] = f"its weight is shared with {kept[0]}, which is kept"
    return found


def _misfit(layer: Layer, scheme: Scheme, ranges: Mapping[str, Range] | None) -> str | None:
    """Why the scheme has no twin of this layer."""
    if has_experts(layer.module):
        return "experts have no trainable twins"
    if isinstance(layer.module, RECURRENT):
        return None if is_recurrent_scheme(scheme) else f"{scheme.name} is no scheme of recurrent layers"
    if isinstance(layer.module, tuple(EMBEDDINGS)):
        return scheme_reason(layer, scheme, None) if scheme.embeds else f"{scheme.name} is no scheme of embeddings"
    return scheme_reason(layer, scheme, ranges)


def _try(chosen: Sequence[Layer], scheme: Scheme, ranges: Mapping[str, Range] | None) -> None:
    """Raises what quantizing the layers would raise, naming the layer."""
    for layer in chosen:
        if isinstance(layer.module, tuple(EMBEDDINGS)):
            quantized_tables([], [layer], scheme)
        elif isinstance(layer.module, RECURRENT):
            quantized_recurrent(layer, scheme)
        else:
            quantized_linear(layer, scheme, ranges)


def _twin(layer: Layer, scheme: Scheme, ranges: Mapping[str, Range] | None, learn: bool) -> Twin:
    kind = TWINS.get(type(layer.module))
    if kind is not None:
        return kind.of(layer.module, scheme)
    bounds = range_of(ranges, layer.names)
    return QATLinear.of(layer.module, scheme, None if bounds is None else bounds[""], learn)


def twins_of(model: nn.Module) -> list[Layer]:
    """The twins of a model, each once."""
    check_type("model", model, nn.Module, "an nn.Module")
    found = [layer for layer in find_layers(model, (Twin,)) if isinstance(layer.module, Twin)]
    if not found:
        raise ValueError(
            f"model must be prepared by pyqkern.training.prepare, got {type(model).__name__} without twins"
        )
    return found


def convert(model: nn.Module) -> nn.Module:
    """Puts quantized layers where the twins of `prepare` are, in place, and returns the model.

    They have the codes that the twins compute with, and the outputs, bit for bit; where a `Schedule` has not begun to
    quantize, the twins compute in float, and the outputs differ. Hooks, train mode and biases carry over as with
    `pyqkern.replace_linear`.

    Raises ValueError for a model without twins and for NaN or an infinity in a weight or a learned range, naming the
    layer; nothing has been changed then. The quantized copies are the extra memory.
    """
    twins = twins_of(model)
    plans: list[tuple[Layer, nn.Module]] = []
    done: set[int] = set()
    floats = {id(twin): Layer(twin.module.in_float(), twin.names, twin.places) for twin in twins}
    for twin in twins:
        embedding = floats[id(twin)]
        if not isinstance(embedding.module, tuple(EMBEDDINGS)):
            continue
        heads = {id(floats[id(t)]): t for t in twins if isinstance(t.module, QATLinear)}
        of_float = {**heads, id(embedding): twin}
        linears = [floats[id(t)] for t in heads.values() if id(t) not in done]
        for layer, module in quantized_tables(linears, [embedding], twin.module.scheme):
            plans.append((of_float[id(layer)], module))
            done.add(id(of_float[id(layer)]))
    for twin in twins:
        if id(twin) not in done:
            plans.append((twin, _quantized(twin, floats[id(twin)])))
    result = model
    for twin, module in plans:
        result = put(twin, module, result)
    leave_fast_path(result)
    tell(result)
    return result


def _quantized(twin: Layer, layer: Layer) -> nn.Module:
    scheme = twin.module.scheme
    if isinstance(layer.module, RECURRENT):
        return quantized_recurrent(layer, scheme)
    if not isinstance(scheme, Int8Static):
        return quantized_linear(layer, scheme, None)
    with named(layer):
        for name in RANGES:
            if not getattr(twin.module, name).isfinite().all():
                value = getattr(twin.module, name).item()
                raise ValueError(f"{name} must be finite, got {value}: the training has diverged")
    zero = torch.tensor(0.0)
    linear: Any = quantized_linear(layer, scheme, {layer.names[0]: Range(zero, zero)})
    linear.input_scale, linear.input_zero_point = twin.module.input_qparams()
    return linear


class Schedule:
    """When the twins of a prepared model quantize, and until when their ranges are learned.

    start: steps that are computed in float before the twins quantize. freeze: steps after which learned ranges stay as
    they are; None: never. `step()` is called once after each step of the optimizer; `step(n)` says how many have been
    done, as a callback of transformers' Trainer knows it. state_dict and load_state_dict carry the count over.

    >>> import torch, pyqkern
    >>> model = pyqkern.training.prepare(torch.nn.Linear(64, 64))
    >>> schedule = pyqkern.training.Schedule(model, start=1)
    >>> model.quantizing
    False
    >>> schedule.step()
    >>> model.quantizing
    True
    """

    def __init__(self, model: nn.Module, start: int = 0, freeze: int | None = None) -> None:
        for name, value in (("start", start), ("freeze", freeze)):
            if value is not None or name == "start":
                check_type(name, value, INT, "an int")
                if value is not None and value < 0:
                    raise ValueError(f"{name} must not be negative, got {value}")
        self._twins: list[Twin] = [layer.module for layer in twins_of(model)]
        self._learned = [p for twin in self._twins for p in _ranges_of(twin) if p.requires_grad]
        if freeze is not None and not self._learned:
            warnings.warn("freeze has no effect: no ranges are learned; prepare(learn_ranges=True)", stacklevel=2)
        self.start, self.freeze = start, freeze
        self.steps = 0
        self._apply()

    def step(self, steps: int | None = None) -> None:
        """One more step of the optimizer is done; or steps of them are, counted from the first."""
        if steps is not None:
            check_type("steps", steps, INT, "an int")
            if steps < 0:
                raise ValueError(f"steps must not be negative, got {steps}")
        self.steps = self.steps + 1 if steps is None else steps
        self._apply()

    def _apply(self) -> None:
        for twin in self._twins:
            twin.quantizing = self.steps >= self.start
        learning = self.freeze is None or self.steps < self.freeze
        for parameter in self._learned:
            parameter.requires_grad_(learning)
            if not learning:
                parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.step(state_dict["steps"])


def _ranges_of(twin: nn.Module) -> list[nn.Parameter]:
    found = (twin._parameters.get(name) for name in RANGES)
    return [parameter for parameter in found if parameter is not None]


def freeze_ranges(model: nn.Module) -> None:
    """Ends the learning of the ranges of a prepared model: they stay as they are."""
    for layer in twins_of(model):
        for parameter in _ranges_of(layer.module):
            parameter.requires_grad_(False)
            parameter.grad = None
