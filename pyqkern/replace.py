"""replace_linear and replace_embedding, which quantize a model in place."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from pyqkern.qembedding import QEmbedding, check_embedding_scheme
from pyqkern.qlinear import QLinear
from pyqkern.schemes import Scheme, get_scheme

Pattern = str | Iterable[str] | Callable[[str, nn.Module], bool]

# Where the reason is left on a layer that was kept.
KEPT = "_pyqkern_kept"

# Where optimize leaves the reason on an encoder layer that it did not fuse.
UNFUSED = "_pyqkern_unfused"

# What hooks on a module are made of. The quantized layer takes over the very dicts, so that handles stay valid.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass
class Layer:
    """One linear or embedding of a model, and everywhere it is used."""

    module: Any
    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)


def replace_linear(
    model: nn.Module,
    scheme: str | Scheme = "int8",
    *,
    include: Pattern | None = None,
    exclude: Pattern = (),
) -> nn.Module:
    """Replaces the linears of `model` by quantized ones, in place, and returns it; a bare nn.Linear gives a QLinear.

    A linear is an nn.Linear, or a Conv1D of transformers, which is one with a transposed weight.

    scheme: a name, or a scheme object where its defaults do not do (see `pyqkern.schemes`).
    include, exclude: which linears, as name patterns (fnmatch on the qualified name, "encoder.*.dense") or a predicate
    (name, module) -> bool. exclude wins. A linear with several names is one module, and any of its names counts.

    Kept in float, with the reason in `summary`: what is excluded; a weight shared with an embedding or another module;
    a parametrized or patched layer; a subclass of nn.Linear (nn.MultiheadAttention reads the weight of its own). A
    linear used in two places stays one shared module. Hooks, train mode and the bias's requires_grad carry over.

    Raises ValueError for a scheme that does not exist, a pattern that matches no linear, NaN or infinite weights, or a
    layer too wide for the scheme, and TypeError for dtypes, each naming the layer. Every layer is quantized once on
    trial before the first is changed, so that after such an error the model is as it was. What is left to stop the
    second pass is an interrupt or the lack of memory; the model then works with the layers done so far quantized, and
    calling again completes it. Extra memory: about one layer, since each float weight is dropped as its layer is done.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    scheme = get_scheme(scheme)
    linears, reasons = linears_to_replace(model, scheme, include, exclude)
    chosen = [linear for linear, reason in zip(linears, reasons, strict=True) if reason is None]
    for linear in chosen:
        _quantized(linear, scheme)
    for linear, reason in zip(linears, reasons, strict=True):
        if reason is not None and not isinstance(linear.module, QLinear):
            setattr(linear.module, KEPT, reason)
    result = model
    for linear in chosen:
        module = _quantized(linear, scheme)
        result = put(linear, module, result)
        linear.module = module
    _attach(result)
    return result


def linears_to_replace(
    model: nn.Module, scheme: Scheme, include: Pattern | None = None, exclude: Pattern = ()
) -> tuple[list[Layer], list[str | None]]:
    """Every linear of the model, and why replace_linear would keep it; None where it would not."""
    linears = find_linears(model)
    reasons = _reasons(model, linears, include, exclude)
    return linears, [
        reason if reason is not None else scheme.reason_to_keep(linear.names)
        for linear, reason in zip(linears, reasons, strict=True)
    ]


def _attach(model: nn.Module) -> None:
    """So that save_pretrained writes how the model is quantized, if it is one of transformers."""
    hf = sys.modules.get("pyqkern.hf")
    if hf is not None:
        hf.attach(model)


def replace_embedding(
    model: nn.Module, scheme: str | Scheme = "int8", *, include: Pattern | None = None, exclude: Pattern = ()
) -> nn.Module:
    """Replaces the embeddings of `model` by quantized ones, in place, and returns it; linears tied to them go along.

    scheme: "int8" (a scale per row), "nf4", "fp4", "int4", "int8-weight-only", or a scheme object.
    include, exclude: as in `replace_linear`, for the names of embeddings.

    A linear whose weight is the embedding's, as a language model's output head is, becomes a QLinear of the same
    scheme, and the embedding reads its rows from that module. Kept in float, with the reason in `summary`: what is
    excluded; subclasses of nn.Embedding; max_norm; a weight that something else shares.

    Raises as `replace_linear`. Every embedding is quantized before the first is replaced, so that after an error the
    model is as it was; the quantized copies are the extra memory.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    scheme = check_embedding_scheme(scheme)
    embeddings = find_layers(model, (nn.Embedding, QEmbedding))
    reasons = embedding_reasons(model, embeddings, include, exclude)
    chosen = [layer for layer, reason in zip(embeddings, reasons, strict=True) if reason is None]
    plans = _plan_tables(model, chosen, scheme)
    for layer, reason in zip(embeddings, reasons, strict=True):
        if reason is not None and not isinstance(layer.module, QEmbedding):
            setattr(layer.module, KEPT, reason)
    result = model
    for layer, module in plans:
        result = put(layer, module, result)
    _attach(result)
    return result


def _plan_tables(model: nn.Module, embeddings: list[Layer], scheme: Scheme) -> list[tuple[Layer, nn.Module]]:
    """What takes the place of what: the embeddings, and before them the linears tied to them."""
    linears = [layer for layer in find_layers(model, linear_types()) if not isinstance(layer.module, QLinear)]
    plans: list[tuple[Layer, nn.Module]] = []
    tables: dict[int, QLinear] = {}
    for layer in embeddings:
        weight = layer.module.weight
        if id(weight) not in tables:
            heads = [_quantized(head, scheme) for head in linears if head.module.weight is weight]
            plans += zip([head for head in linears if head.module.weight is weight], heads, strict=True)
            with _named(layer):
                tables[id(weight)] = heads[0] if heads else QEmbedding.from_embedding(layer.module, scheme).table
        module = QEmbedding(tables[id(weight)], layer.module.padding_idx).train(layer.module.training)
        _hand_over_hooks(layer.module, module)
        plans.append((layer, module))
    return plans


def put(layer: Layer, module: nn.Module, model: nn.Module) -> nn.Module:
    """Puts the module where the layer is; returns the model, which is the module where the model was the layer."""
    for parent, attribute in layer.places:
        parent._modules[attribute] = module
        if isinstance(parent, nn.TransformerEncoderLayer):
            # Its fused path would multiply with the dequantized weights instead of calling the layers.
            parent.activation_relu_or_gelu = 0
    return module if layer.module is model else model


def _quantized(layer: Layer, scheme: Scheme) -> QLinear:
    """The quantized linear, with the hooks of the float one. Errors name the layer."""
    with _named(layer):
        module = QLinear.from_linear(as_linear(layer.module), scheme.for_layer(layer.names))
    _hand_over_hooks(layer.module, module)
    return module


@contextmanager
def _named(layer: Layer) -> Iterator[None]:
    """Puts the layer's name before a TypeError's or ValueError's message."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name = layer.names[0]
        message = f"{name}: {error}; or leave it in float with exclude={[name]}" if name else str(error)
        raise (ValueError if isinstance(error, ValueError) else TypeError)(message) from error


def _hand_over_hooks(old: nn.Module, new: nn.Module) -> None:
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))


# ---- what there is to replace


def conv1d() -> type | None:
    """The Conv1D of transformers, which GPT-2 has for linears; None where no model can have one yet."""
    module = sys.modules.get("transformers.pytorch_utils")
    return getattr(module, "Conv1D", None)


def linear_types() -> tuple[type[nn.Module], ...]:
    return tuple(kind for kind in (nn.Linear, QLinear, conv1d()) if kind is not None)


def as_linear(module: Any) -> nn.Linear:
    """The module itself, or an nn.Linear that shares the parameters of a Conv1D."""
    if isinstance(module, nn.Linear):
        return module
    in_features, out_features = module.weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta").train(module.training)
    linear.weight = nn.Parameter(module.weight.detach().t(), requires_grad=False)
    linear.bias = module.bias
    return linear


def find_linears(model: nn.Module) -> list[Layer]:
    return find_layers(model, linear_types())


def find_layers(model: nn.Module, types: tuple[type[nn.Module], ...]) -> list[Layer]:
    """Every module of these types, each once, in the order of their first names."""
    found: dict[int, Layer] = {}
    for name, parent, attribute, module in _walk(model, "", (model,), types):
        layer = found.setdefault(id(module), Layer(module))
        layer.names.append(name)
        if (parent, attribute) not in layer.places:
            layer.places.append((parent, attribute))
    if isinstance(model, types):
        found.setdefault(id(model), Layer(model, [""]))
    return list(found.values())


def _walk(
    module: nn.Module, prefix: str, path: tuple[nn.Module, ...], types: tuple[type[nn.Module], ...]
) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """(qualified name, parent, attribute, module) under every name; modules that hold themselves are not followed."""
    if isinstance(module, QEmbedding):
        return  # its table is no layer of the model
    for attribute, child in module._modules.items():
        if child is None or any(child is ancestor for ancestor in path):
            continue
        if isinstance(child, types):
            yield prefix + attribute, module, attribute, child
        yield from _walk(child, f"{prefix}{attribute}.", (*path, child), types)


# ---- which of them are replaced


def _reasons(model: nn.Module, linears: list[Layer], include: Pattern | None, exclude: Pattern) -> list[str | None]:
    """Why each linear is kept; None where it is to be replaced."""
    included = [True] * len(linears) if include is None else _matches("include", include, linears)
    excluded = _matches("exclude", exclude, linears)
    owners = weight_owners(model)
    reasons: list[str | None] = []
    for linear, take, leave in zip(linears, included, excluded, strict=True):
        reason = structural_reason(linear.module, owners)
        if reason is None and leave:
            reason = "excluded"
        if reason is None and not take:
            reason = "not included"
        reasons.append(reason)
    return reasons


def embedding_reasons(
    model: nn.Module, embeddings: list[Layer], include: Pattern | None, exclude: Pattern
) -> list[str | None]:
    """Why each embedding is kept; None where it is to be replaced."""
    included = [True] * len(embeddings) if include is None else _matches("include", include, embeddings, "an embedding")
    excluded = _matches("exclude", exclude, embeddings, "an embedding")
    owners = weight_owners(model, (nn.Embedding, *linear_types()))
    for layer in find_linears(model):
        weight = layer.module._parameters.get("weight")
        if weight is not None and structural_reason(layer.module, {}) is not None:
            owners.setdefault(_key(weight), (f"{layer.names[0]}.weight", layer.module))
    return [
        _embedding_structural_reason(layer.module, owners)
        or ("excluded" if leave else None if take else "not included")
        for layer, take, leave in zip(embeddings, included, excluded, strict=True)
    ]


def _embedding_structural_reason(module: Any, owners: dict[int, tuple[str, nn.Module]]) -> str | None:
    if isinstance(module, QEmbedding):
        return "already quantized"
    weight = module._parameters.get("weight")
    if parametrize.is_parametrized(module) or weight is None:
        return "parametrized: its weight is computed from other parameters"
    if type(module) is not nn.Embedding:
        return f"subclass of nn.Embedding: {type(module).__name__}, whose forward may be its own"
    if "forward" in vars(module):
        return "patched: its forward was replaced"
    if module.max_norm is not None:
        return "max_norm: it changes its weight as it runs"
    owner = owners.get(_key(weight)) if weight.numel() else None
    return f"its weight is shared with {owner[0]}" if owner is not None else None


def _matches(argument: str, pattern: Pattern, linears: list[Layer], kind: str = "a linear") -> list[bool]:
    """Which linears a pattern picks. A pattern that picks none is a mistake and raises."""
    if callable(pattern):
        return [any(pattern(name, linear.module) for name in linear.names) for linear in linears]
    patterns = [pattern] if isinstance(pattern, str) or not isinstance(pattern, Iterable) else list(pattern)
    names = [name for linear in linears for name in linear.names]
    for one in patterns:
        if not isinstance(one, str):
            raise TypeError(f"{argument} must be name patterns or a predicate (name, module), got {one!r}")
        if not any(fnmatchcase(name, one) for name in names):
            inside = any(name.startswith(one + ".") for name in names)
            kinds = kind.split()[1] + "s"
            hint = f"use {one + '.*'!r} for what is inside of it" if inside else f"the {kinds} are {_some(names)}"
            raise ValueError(f"{argument} must match the name of {kind}, got {one!r}; {hint}")
    return [any(fnmatchcase(name, one) for name in linear.names for one in patterns) for linear in linears]


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"


def _key(tensor: Tensor) -> int:
    """The same for tensors that share memory; on the meta device, where there is none, the tensor itself."""
    return id(tensor) if tensor.is_meta else tensor.data_ptr()


def weight_owners(model: nn.Module, but: tuple[type[nn.Module], ...] | None = None) -> dict[int, tuple[str, nn.Module]]:
    """Each parameter of a module that is not of the types `but`, by default linears, -> its name and the module."""
    return {
        _key(parameter): (f"{name}.{key}" if name else key, module)
        for name, module in model.named_modules()
        if not isinstance(module, but or linear_types())
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.numel()
    }


def structural_reason(module: nn.Module, owners: dict[int, tuple[str, nn.Module]]) -> str | None:
    """Why this linear cannot be replaced, whatever the patterns say."""
    if isinstance(module, QLinear):
        return "already quantized"
    weight = module._parameters.get("weight")
    if parametrize.is_parametrized(module) or weight is None:
        return "parametrized: its weight is computed from other parameters"
    if type(module) is not nn.Linear and type(module) is not conv1d():
        return f"subclass of nn.Linear: {type(module).__name__}, whose owner may read its weight"
    if "forward" in vars(module):
        return "patched: its forward was replaced"
    owner = owners.get(_key(weight)) if weight.numel() else None
    if owner is not None:
        name, holder = owner
        return f"tied to {'the embedding ' if isinstance(holder, nn.Embedding) else ''}{name}"
    return None
