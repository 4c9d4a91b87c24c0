"""replace_linear and replace_embedding, which quantize a model in place, and what applies a plan."""

import math
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyqkern.models.find import (
    EXCLUDED,
    KEPT,
    NOT_INCLUDED,
    PREPARED,
    RECURRENT,
    SMOOTHED,
    Layer,
    Pattern,
    as_linear,
    embedding_reasons,
    find_experts,
    find_layers,
    find_linears,
    keep,
    linear_reasons,
    linear_types,
    recurrent_reasons,
)
from pyqkern.models.plan import Choice, Plan
from pyqkern.models.summary import said_bytes, shape_of
from pyqkern.nn.attention import Projection, is_folded, unfold
from pyqkern.nn.embedding import EMBEDDINGS, QEmbedding, check_embedding_scheme, quantized_table
from pyqkern.nn.encoder_parts import InputScale
from pyqkern.nn.experts import QExperts, has_experts, scheme_misfit
from pyqkern.nn.linear import QLinear
from pyqkern.nn.recurrent import QRecurrent
from pyqkern.schemes import Range, Scheme, get_scheme, range_of, ranges_for

# What hooks on a module are made of. The quantized layer takes over the very dicts, so that handles stay valid.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

# Called with the model when its layers have been replaced. What has to know it appends a function.
replaced: list[Callable[[nn.Module], None]] = []


def replace_linear(
    model: nn.Module,
    scheme: str | Scheme | Plan = "int8",
    *,
    ranges: Mapping[str, Range] | None = None,
    include: Pattern | None = None,
    exclude: Pattern = (),
) -> nn.Module:
    """Replaces the linears of `model` by quantized ones, in place, and returns it; a bare nn.Linear gives a QLinear.

    A linear is an nn.Linear, or a Conv1D of transformers, which is one with a transposed weight. The projections of an
    nn.MultiheadAttention are linears too, called q_proj, k_proj, v_proj and out_proj; it becomes a QMultiheadAttention.
    The experts of a mixture-of-experts layer, which transformers 5 keeps in two parameters, become one QExperts.

    scheme: a name, or a scheme object where its defaults do not do (see `pyqkern.schemes`). Or a plan of `auto`, which
    says for each layer what becomes of it, embeddings and recurrent layers too; then nothing else may be given.
    ranges: for "int8-static" what `calibrate` returned; a linear that it did not reach is kept.
    include, exclude: which linears, as name patterns (fnmatch on the qualified name, "encoder.*.dense"), types, or a
    predicate (name, module) -> bool. exclude wins. A linear with several names is one module, and any of its names
    counts. include=[nn.Linear, Mine] takes the subclass Mine of nn.Linear too, for whose forward the caller vouches.

    Kept in float, with the reason in `summary`: what is excluded; a weight shared with an embedding or another module;
    a parametrized, pruned or patched layer; a layer too wide for the scheme; the adapters of peft; a linear that
    chooses experts; experts whose class or scheme is none that QExperts knows; what a module of sentence_transformers,
    as Dense, has in a file of its own; a subclass of nn.Linear that is not named; subclasses of
    nn.MultiheadAttention. Where more than half of the bytes are kept that nothing
    excludes, a warning gives the reasons. A linear used in two places stays one shared module. All hooks, train mode
    and the bias's requires_grad carry over.

    Raises ValueError for a scheme that does not exist, a pattern that matches no linear, and NaN or infinite weights,
    and TypeError for dtypes, each naming the layer. Every layer is quantized once on
    trial before the first is changed, so that after such an error the model is as it was. What is left to stop the
    second pass is an interrupt or the lack of memory; the model then works with the layers done so far quantized, and
    calling again completes it. Extra memory: about one layer, since each float weight is dropped as its layer is done.

    >>> import torch, pyqkern
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    >>> pyqkern.replace_linear(model, exclude="2")[0]
    Int8Linear(in_features=64, out_features=64, bias=True, scheme=int8)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(scheme, Plan):
        if ranges is not None or include is not None or exclude != ():
            raise ValueError("ranges, include and exclude must be left out with a plan, which names its layers")
        return _apply(model, scheme)
    scheme = get_scheme(scheme)
    ranges = ranges_for(scheme, ranges)
    linears, reasons = linears_to_replace(model, scheme, include, exclude, ranges)
    chosen = [linear for linear, reason in zip(linears, reasons, strict=True) if reason is None]
    for linear in chosen:
        _quantized(linear, scheme, ranges)
    warn_if_little(linears, reasons)
    result = model
    for linear in chosen:
        module = _quantized(linear, scheme, ranges)
        result = put(linear, module, result)
        linear.module = module
    for linear, reason in zip(linears, reasons, strict=True):
        if reason is not None and not isinstance(linear.module, QLinear | QExperts):
            keep(linear, reason)
    leave_fast_path(result)
    tell(result)
    return result


def linears_to_replace(
    model: nn.Module,
    scheme: Scheme,
    include: Pattern | None = None,
    exclude: Pattern = (),
    ranges: Mapping[str, Range] | None = None,
) -> tuple[list[Layer], list[str | None]]:
    """Every linear of the model, and the experts of each layer, and why replace_linear would keep them; None where it
    would not.
    """
    ranges = ranges_for(scheme, ranges)
    linears = [*find_linears(model), *find_experts(model)]
    reasons = linear_reasons(model, linears, include, exclude)
    return linears, [
        reason or scheme_reason(linear, scheme, ranges) for linear, reason in zip(linears, reasons, strict=True)
    ]


def scheme_reason(layer: Layer, scheme: Scheme, ranges: Mapping[str, Range] | None) -> str | None:
    """Why the scheme cannot quantize this linear, embedding or these experts."""
    if has_experts(layer.module):
        return scheme_misfit(layer.module, scheme)
    if ranges is not None and not any(name in ranges for name in layer.names):
        return "not reached in calibration"
    width, widest = _in_features(layer.module), scheme.max_in_features
    if widest is not None and width > widest:
        return f"too wide: {scheme.name} takes up to {widest} in_features, not {width}"
    return None


def _in_features(module: Any) -> int:
    width: int = module.embedding_dim if type(module) in EMBEDDINGS else as_linear(module).in_features
    return width


def warn_if_little(linears: list[Layer], reasons: list[str | None]) -> None:
    """Says so where under half of the bytes that the caller wants quantized are. What was quantized before counts."""
    kept: Counter[str] = Counter()
    bytes_kept = bytes_done = 0
    for layer, reason in zip(linears, reasons, strict=True):
        if reason is None or isinstance(layer.module, QLinear | QExperts) or PREPARED in vars(layer.module):
            bytes_done += _float_bytes(layer.module)
        elif reason not in (EXCLUDED, NOT_INCLUDED):
            kept[reason] += 1
            bytes_kept += _float_bytes(layer.module)
    if linears and bytes_done >= bytes_kept:
        return
    why = "; ".join(f"{count} {reason}" for reason, count in kept.most_common(4)) or "it has no linears"
    warnings.warn(
        f"only {said_bytes(bytes_done)} of {said_bytes(bytes_done + bytes_kept)} of the model's linears are quantized: "
        f"{why}. See pyqkern.summary(model)",
        stacklevel=3,
    )


def _float_bytes(module: Any) -> int:
    if isinstance(module, QExperts):
        return sum(_float_bytes(linear) for _, linear in module.linears())
    if has_experts(module):
        return sum(parameter.numel() * parameter.itemsize for parameter in module.parameters(recurse=False))
    itemsize: int = (module if isinstance(module, QLinear) else module.weight).dtype.itemsize
    shape = (module.out_features, module.in_features) if isinstance(module, QLinear) else module.weight.shape
    return math.prod(shape) * itemsize


def leave_fast_path(model: nn.Module) -> None:
    """Nested tensors are for the fused path of an nn.TransformerEncoder's layers, which quantized ones do not take."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(one, QLinear) or PREPARED in vars(one) for one in module.modules()
        ):
            module.use_nested_tensor = False


def tell(model: nn.Module) -> None:
    for callback in replaced:
        callback(model)


def replace_embedding(
    model: nn.Module, scheme: str | Scheme = "int8", *, include: Pattern | None = None, exclude: Pattern = ()
) -> nn.Module:
    """Replaces each nn.Embedding and nn.EmbeddingBag of `model` by a quantized one, in place, and returns it; linears
    tied to them go along.

    scheme: "int8" (a scale per row), "nf4", "fp4", "int4", "int8-weight-only", or a scheme object.
    include, exclude: as in `replace_linear`, for the names of embeddings.

    A linear whose weight is the embedding's, as a language model's output head is, becomes a QLinear of the same
    scheme, and the embedding reads its rows from that module. Kept in float, with the reason in `summary`: what is
    excluded; subclasses; max_norm; a weight that something else shares.

    Raises as `replace_linear`. Every embedding is quantized before the first is replaced, so that after an error the
    model is as it was; the quantized copies are the extra memory.

    >>> import torch, pyqkern
    >>> pyqkern.replace_embedding(torch.nn.Sequential(torch.nn.Embedding(1000, 64)), "nf4")[0]
    QEmbedding(
      1000, 64, scheme=nf4
      (table): NF4Linear(in_features=64, out_features=1000, bias=False, scheme=nf4)
    )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    scheme = check_embedding_scheme(scheme)
    embeddings = find_layers(model, (*EMBEDDINGS, QEmbedding))
    reasons = [
        reason or scheme_reason(layer, scheme, None)
        for layer, reason in zip(embeddings, embedding_reasons(model, embeddings, include, exclude), strict=True)
    ]
    chosen = [layer for layer, reason in zip(embeddings, reasons, strict=True) if reason is None]
    plans = _plan_tables(model, chosen, scheme)
    for layer, reason in zip(embeddings, reasons, strict=True):
        if reason is not None and not isinstance(layer.module, QEmbedding):
            setattr(layer.module, KEPT, reason)
    result = model
    for layer, module in plans:
        result = put(layer, module, result)
    tell(result)
    return result


def _plan_tables(model: nn.Module, embeddings: list[Layer], scheme: Scheme) -> list[tuple[Layer, nn.Module]]:
    """What takes the place of what: the embeddings, and before them the linears tied to them."""
    linears = [layer for layer in find_layers(model, linear_types()) if not isinstance(layer.module, QLinear)]
    return quantized_tables(linears, embeddings, scheme)


def quantized_tables(
    linears: Sequence[Layer], embeddings: Sequence[Layer], scheme: Scheme
) -> list[tuple[Layer, nn.Module]]:
    """As `_plan_tables`. linears: those among which the tied ones are."""
    plans: list[tuple[Layer, nn.Module]] = []
    tables: dict[int, QLinear] = {}
    for layer in embeddings:
        weight = layer.module.weight
        if id(weight) not in tables:
            heads = [quantized_linear(head, scheme, None) for head in linears if head.module.weight is weight]
            plans += zip([head for head in linears if head.module.weight is weight], heads, strict=True)
            with named(layer):
                tables[id(weight)] = heads[0] if heads else quantized_table(layer.module, scheme)
        module = EMBEDDINGS[type(layer.module)].of_table(tables[id(weight)], layer.module)
        hand_over_hooks(layer.module, module)
        plans.append((layer, module))
    return plans


def put(layer: Layer, module: nn.Module, model: nn.Module) -> nn.Module:
    """Puts the module where the layer is; returns the model, which is the module where the model was the layer."""
    for parent, attribute in layer.places:
        if isinstance(layer.module, Projection) and is_folded(parent):
            unfold(parent)
        parent._modules[attribute] = module
        if isinstance(parent, nn.TransformerEncoderLayer):
            # Its fused path would multiply with the dequantized weights instead of calling the layers.
            parent.activation_relu_or_gelu = 0
    return module if layer.module is model else model


def _quantized(layer: Layer, scheme: Scheme, ranges: Mapping[str, Range] | None) -> nn.Module:
    """The quantized linear or experts, with the hooks of the float ones. Errors name the layer."""
    if not has_experts(layer.module):
        return quantized_linear(layer, scheme, ranges)
    with named(layer):
        module = QExperts.from_experts(layer.module, scheme)
    hand_over_hooks(layer.module, module)
    return module


def quantized_linear(layer: Layer, scheme: Scheme, ranges: Mapping[str, Range] | None) -> QLinear:
    with named(layer):
        module = QLinear.from_linear(as_linear(layer.module), scheme, ranges=range_of(ranges, layer.names))
    hand_over_hooks(layer.module, module)
    return module


def quantized_recurrent(layer: Layer, scheme: Scheme) -> QRecurrent:
    """The quantized recurrent layer, with the hooks of the float one. Errors name it."""
    with named(layer):
        module = QRecurrent.from_recurrent(layer.module, scheme)
    hand_over_hooks(layer.module, module)
    return module


@contextmanager
def named(layer: Layer) -> Iterator[None]:
    """Puts the layer's name before a TypeError's or ValueError's message."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name = layer.names[0]
        message = f"{name}: {error}; or leave it in float with exclude={[name]}" if name else str(error)
        raise (ValueError if isinstance(error, ValueError) else TypeError)(message) from error


def hand_over_hooks(old: nn.Module, new: nn.Module) -> None:
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    hook: Any
    for hook in new._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):  # torch's wrapper, which passes on the module that it knows
            hook.module = weakref.ref(new)


# ---- plans


@dataclass
class Planned:
    """A layer of the model, and what the plan says of it."""

    choice: Choice
    name: str
    layer: Layer


def planned_layers(model: nn.Module, plan: Plan) -> list[Planned]:
    """The layers that the plan quantizes and the model has in float.

    Raises ValueError for a plan of another model: where a layer is missing, of another kind or shape, is quantized in
    another scheme, or cannot be quantized.
    """
    layers = _layers_of_kinds(model)
    found = []
    for choice in plan.choices:
        for name, shape in choice.layers.items():
            layer, reason = layers.get(("linear" if choice.kind == "encoder layer" else choice.kind, name), (None, ""))
            if layer is None:
                raise ValueError(f"plan must be of this model, but it has no {choice.kind} {name!r}")
            scheme = getattr(layer.module, "scheme", None)
            if scheme is not None and scheme == choice.scheme:
                continue
            if scheme is None and shape_of(layer.module) != shape:
                got = list(shape_of(layer.module))
                raise ValueError(f"plan must be of this model, but the shape of {name!r} is {got}, not {list(shape)}")
            if choice.scheme is None:
                continue
            if reason is None and choice.kind != "recurrent layer":
                ranges = {name: Range(torch.tensor(0.0), torch.tensor(0.0))} if choice.scheme.needs_ranges else None
                reason = scheme_reason(layer, choice.scheme, ranges)
            if reason is not None:
                raise ValueError(
                    f"plan must be of this model, but {name!r} cannot become {choice.scheme.name}: {reason}"
                )
            found.append(Planned(choice, name, layer))
    return found


def _layers_of_kinds(model: nn.Module) -> dict[tuple[str, str], tuple[Layer, str | None]]:
    """By kind and each of its names: the layer, and why it cannot be quantized."""
    linears, experts = find_linears(model), find_experts(model)
    recurrent, embeddings = find_layers(model, RECURRENT), find_layers(model, (*EMBEDDINGS, QEmbedding))
    kinds = (
        ("linear", linears, linear_reasons(model, linears, None, ())),
        ("experts", experts, linear_reasons(model, experts, None, ())),
        ("recurrent layer", recurrent, recurrent_reasons(model, recurrent, None, ())),
        ("embedding", embeddings, embedding_reasons(model, embeddings, None, ())),
    )
    return {
        (kind, name): (layer, reason)
        for kind, layers, reasons in kinds
        for layer, reason in zip(layers, reasons, strict=True)
        for name in layer.names
    }


def _apply(model: nn.Module, plan: Plan) -> nn.Module:
    """What `replace_linear` does with a plan: all that it says but for fusing."""
    work = planned_layers(model, plan)
    for one in work:
        _made(model, one)
    taken, result = {name for one in work for name in one.layer.names}, model
    for (_, name), (layer, _) in _layers_of_kinds(model).items():
        if name not in taken and getattr(layer.module, "scheme", None) is None:
            keep(layer, "in float by the plan")
    for one in work:
        for layer, module in _made(model, one):
            result = put(layer, module, result)
            _mark(module, one)
    leave_fast_path(result)
    tell(result)
    return result


def _made(model: nn.Module, one: Planned) -> list[tuple[Layer, nn.Module]]:
    """What takes the place of what; nothing of the model is changed."""
    scheme, layer = one.choice.scheme, one.layer
    assert scheme is not None
    if one.choice.kind == "embedding":
        return _plan_tables(model, [layer], scheme)
    if one.choice.kind == "recurrent layer":
        return [(layer, quantized_recurrent(layer, scheme))]
    if one.choice.kind == "experts":
        return [(layer, _quantized(layer, scheme, None))]
    linear, ranges = _smoothed(one), None
    if scheme.needs_ranges:
        lo, hi = (torch.tensor(end, dtype=torch.float32) for end in one.choice.ranges[one.name])
        ranges = {name: Range(lo, hi) for name in layer.names}
    with named(layer):
        module = QLinear.from_linear(linear, scheme, ranges=range_of(ranges, layer.names))
    hand_over_hooks(layer.module, module)
    return [(layer, module)]


def _smoothed(one: Planned) -> nn.Linear:
    """The linear as `smooth` would leave it: itself where the plan does not smooth it."""
    linear = as_linear(one.layer.module)
    weight, bias = linear.weight.detach(), linear.bias
    for smoothing in one.choice.smoothing:
        if one.name in smoothing.after:
            weight = weight * _scale(smoothing.exponents).to(weight)
        if smoothing.before and one.name == smoothing.before:
            weight = weight / _scale(smoothing.exponents).to(weight)[:, None]
            if bias is not None:
                bias = nn.Parameter(bias.detach() / _scale(smoothing.exponents).to(bias), bias.requires_grad)
    if weight is linear.weight or not one.choice.smoothing:
        return linear
    smoothed = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta").train(linear.training)
    smoothed.weight, smoothed.bias = nn.Parameter(weight, requires_grad=False), bias
    return smoothed


def _scale(exponents: Sequence[int]) -> Tensor:
    return torch.exp2(torch.tensor(exponents, dtype=torch.float32, device="cpu"))


def _mark(module: nn.Module, one: Planned) -> None:
    """The factor in front of a smoothed layer whose input nothing before divides, and what `summary` looks for."""
    for smoothing in one.choice.smoothing:
        if one.name in smoothing.after and not smoothing.before:
            module.register_forward_pre_hook(InputScale(1 / _scale(smoothing.exponents)), with_kwargs=True)
        if one.name in smoothing.after:
            setattr(module, SMOOTHED, True)
