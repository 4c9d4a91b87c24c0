"""The linears, embeddings, experts and recurrent layers of a model: where they are, and why one cannot be replaced."""

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from pyqkern.nn.attention import INPUTS, OUTPUTS, Projection, is_folded, projections
from pyqkern.nn.embedding import EMBEDDINGS, QEmbedding
from pyqkern.nn.experts import QExperts, has_experts, unsupported
from pyqkern.nn.linear import QLinear
from pyqkern.nn.recurrent import QRecurrent

Pattern = str | type[nn.Module] | Iterable[str | type[nn.Module]] | Callable[[str, nn.Module], bool]

# Where the reason is left on a layer that was kept.
KEPT = "_pyqkern_kept"

# Reasons to keep a layer that are the caller's own.
EXCLUDED, NOT_INCLUDED = "excluded", "not included"

_ADAPTER = "an adapter of peft, which is trained"
_ROUTER = "a router: what it rounds could send a token to other experts, and it is small"
# What peft calls the modules that it wraps.
_WRAPPED = ("base_layer", "original_module", "base_model", "model")

# The recurrent layers and cells of torch, and those that are quantized already.
RECURRENT: tuple[type[nn.Module], ...] = (*QRecurrent._classes, QRecurrent)

# What the twins of `pyqkern.training.prepare` have: why they are kept.
PREPARED = "_pyqkern_prepared"

# What a plan leaves on a layer that was smoothed before it was quantized.
SMOOTHED = "_pyqkern_smoothed"

# Where optimize leaves the reason on an encoder layer that it did not fuse.
UNFUSED = "_pyqkern_unfused"


@dataclass
class Layer:
    """One linear, embedding, recurrent layer or the experts of one layer, and everywhere they are used."""

    module: Any
    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)


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
    """Every linear, and every projection of an nn.MultiheadAttention as one: see `Projection`."""
    found = []
    for layer in find_layers(model, (*linear_types(), nn.MultiheadAttention)):
        if is_folded(layer.module):
            found += _projections(layer)
        elif isinstance(layer.module, linear_types()) and not _is_projection(layer):
            found.append(layer)
    return found


def find_attentions(model: nn.Module) -> list[Any]:
    """Each nn.MultiheadAttention that replace_linear can quantize, once."""
    kept = kept_modules(model)
    layers = [layer for layer in find_layers(model, (nn.MultiheadAttention,)) if is_folded(layer.module)]
    return [layer.module for layer in layers if _attention_reason(layer.module, {}, kept) is None]


def _projections(layer: Layer) -> list[Layer]:
    attention = layer.module
    found = []
    for name, linear in projections(attention).items():
        names = [f"{path}.{name}" if path else name for path in layer.names]
        if KEPT in vars(attention):
            setattr(linear, KEPT, vars(attention)[KEPT])
        found.append(Layer(linear, names, [(attention, name)]))
    return found


def _is_projection(layer: Layer) -> bool:
    """Whether it is an out_proj that `_projections` gives."""
    return type(layer.module) in OUTPUTS and any(is_folded(parent) for parent, _ in layer.places)


def keep(layer: Layer, reason: str) -> None:
    """Leaves the reason why a layer stays in float where `summary` finds it."""
    module = layer.module
    if isinstance(module, Projection):
        attention, name = module.place
        module = attention if is_folded(attention) else attention._modules[name]
    setattr(module, KEPT, reason)


def find_experts(model: nn.Module) -> list[Layer]:
    """The experts of each layer, quantized or not; as of any library, not only such as can be quantized."""
    types: tuple[type[nn.Module], ...] = (
        QExperts,
        *{type(module) for module in model.modules() if has_experts(module)},
    )
    return [layer for layer in find_layers(model, types) if is_experts(layer.module)]


def is_experts(module: nn.Module) -> bool:
    return isinstance(module, QExperts) or has_experts(module)


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
    if isinstance(module, QEmbedding | QRecurrent | QExperts):
        return  # a table, or the weights of gates or experts, is no layer of the model
    for attribute, child in module._modules.items():
        if child is None or any(child is ancestor for ancestor in path):
            continue
        if isinstance(child, types):
            yield prefix + attribute, module, attribute, child
        yield from _walk(child, f"{prefix}{attribute}.", (*path, child), types)


# ---- which of them are replaced


def with_patterns(
    layers: list[Layer],
    structural: Callable[[nn.Module], str | None],
    include: Pattern | None,
    exclude: Pattern,
    kind: str,
) -> list[str | None]:
    """Why each layer is kept: what it is, or else what the patterns say; None where it is to be replaced."""
    included = [True] * len(layers) if include is None else _matches("include", include, layers, kind)
    excluded = _matches("exclude", exclude, layers, kind)
    return [
        structural(layer.module) or (EXCLUDED if leave else None if take else NOT_INCLUDED)
        for layer, take, leave in zip(layers, included, excluded, strict=True)
    ]


def linear_reasons(
    model: nn.Module, linears: list[Layer], include: Pattern | None, exclude: Pattern, named: Pattern | None = None
) -> list[str | None]:
    """Why each linear, and the experts of each layer, are kept; None where they are to be replaced.

    named: patterns whose subclasses of nn.Linear are taken too, as those of include are.
    """
    owners, kept = weight_owners(model), kept_modules(model)
    types = {one for one in (*_listed(include), *_listed(named)) if isinstance(one, type)}
    shared = shared_parameters(model)

    def structural(module: nn.Module) -> str | None:
        if is_experts(module):
            return experts_reason(module, shared, kept)
        return structural_reason(module, owners, kept, types)

    return with_patterns(linears, structural, include, exclude, "a linear")


def embedding_reasons(
    model: nn.Module, embeddings: list[Layer], include: Pattern | None, exclude: Pattern
) -> list[str | None]:
    """Why each embedding is kept; None where it is to be replaced."""
    owners, kept = weight_owners(model, (*EMBEDDINGS, *linear_types())), kept_modules(model)
    for layer in find_linears(model):
        weight = layer.module._parameters.get("weight")
        if weight is not None and structural_reason(layer.module, {}) is not None:
            owners.setdefault(_key(weight), (f"{layer.names[0]}.weight", layer.module))
    structural = functools.partial(_embedding_structural_reason, owners=owners, kept=kept)
    return with_patterns(embeddings, structural, include, exclude, "an embedding")


def _embedding_structural_reason(
    module: Any, owners: dict[int, tuple[str, nn.Module]], kept: Mapping[nn.Module, str]
) -> str | None:
    if isinstance(module, QEmbedding):
        return "already quantized"
    if PREPARED in vars(module):
        return str(vars(module)[PREPARED])
    if module in kept:
        return kept[module]
    weight = module._parameters.get("weight")
    if parametrize.is_parametrized(module) or weight is None:
        return "parametrized: its weight is computed from other parameters"
    if type(module) not in EMBEDDINGS:
        return f"subclass of {_base_name(module)}: {type(module).__name__}, whose forward may be its own"
    if "forward" in vars(module):
        return "patched: its forward was replaced"
    if module.max_norm is not None:
        return "max_norm: it changes its weight as it runs"
    owner = owners.get(_key(weight)) if weight.numel() else None
    return f"its weight is shared with {owner[0]}" if owner is not None else None


def recurrent_reasons(
    model: nn.Module, layers: list[Layer], include: Pattern | None, exclude: Pattern
) -> list[str | None]:
    """Why each recurrent layer or cell is kept; None where it is to be replaced."""
    owners, kept = weight_owners(model, RECURRENT), kept_modules(model)
    structural = functools.partial(_recurrent_structural_reason, owners=owners, kept=kept)
    return with_patterns(layers, structural, include, exclude, "a recurrent layer")


def _recurrent_structural_reason(
    module: Any, owners: dict[int, tuple[str, nn.Module]], kept: Mapping[nn.Module, str]
) -> str | None:
    if isinstance(module, QRecurrent):
        return "already quantized"
    if PREPARED in vars(module):
        return str(vars(module)[PREPARED])
    if module in kept:
        return kept[module]
    of_cell = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if module.bias else ()))
    names = getattr(module, "_flat_weights_names", of_cell)
    if parametrize.is_parametrized(module) or any(module._parameters.get(name) is None for name in names):
        return "parametrized: a weight is computed from other parameters"
    if type(module) not in RECURRENT:
        return f"subclass of {_base_name(module)}: {type(module).__name__}, whose forward may be its own"
    if "forward" in vars(module):
        return "patched: its forward was replaced"
    keys = [_key(parameter) for parameter in module._parameters.values() if parameter is not None]
    shared = [owners[key][0] for key in keys if key in owners]
    return f"a weight is shared with {shared[0]}" if shared else None


def experts_reason(module: Any, shared: Set[int], kept: Mapping[nn.Module, str] | None = None) -> str | None:
    """Why these experts cannot be replaced. shared: as `shared_parameters` says; kept: as `kept_modules`."""
    if isinstance(module, QExperts):
        return "already quantized"
    if kept is not None and module in kept:
        return kept[module]
    parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
    if any(_key(parameter) in shared for parameter in parameters):
        return "a weight is shared with another module"
    return unsupported(module)


def shared_parameters(model: nn.Module) -> set[int]:
    """The keys of parameters that more than one module has."""
    parameters = [p for module in model.modules() for p in module._parameters.values() if p is not None and p.numel()]
    counts = Counter(map(_key, parameters))
    return {key for key, count in counts.items() if count > 1}


def _base_name(module: nn.Module) -> str:
    return next(f"nn.{kind.__name__}" for kind in (*RECURRENT, *EMBEDDINGS) if isinstance(module, kind))


def _matches(argument: str, pattern: Pattern, linears: list[Layer], kind: str) -> list[bool]:
    """Which linears a pattern picks. A pattern that picks none is a mistake and raises."""
    if callable(pattern) and not isinstance(pattern, type):
        return [any(pattern(name, linear.module) for name in linear.names) for linear in linears]
    picked, patterns = [False] * len(linears), _listed(pattern)
    for one in patterns:
        if not isinstance(one, str | type):
            raise TypeError(f"{argument} must be name patterns, types or a predicate (name, module), got {one!r}")
    for one in patterns:
        picks = [_picks(one, linear) for linear in linears]
        if not any(picks):
            raise ValueError(f"{argument} must match {_wanted(one, kind)}, got {one!r}; {_hint(one, linears, kind)}")
        picked = [a or b for a, b in zip(picked, picks, strict=True)]
    return picked


def _listed(pattern: Pattern | None) -> list[Any]:
    """The patterns by themselves; a predicate is none."""
    if pattern is None or (callable(pattern) and not isinstance(pattern, type)):
        return []
    return [pattern] if isinstance(pattern, str | type) or not isinstance(pattern, Iterable) else list(pattern)


def _picks(pattern: str | type, layer: Layer) -> bool:
    if isinstance(pattern, type):
        return any(isinstance(module, pattern) for module in (layer.module, *getattr(layer.module, "place", ())))
    return any(fnmatchcase(name, pattern) for name in layer.names)


def _wanted(pattern: str | type, kind: str) -> str:
    return f"the type of {kind}" if isinstance(pattern, type) else f"the name of {kind}"


def _hint(pattern: str | type, layers: list[Layer], kind: str) -> str:
    names = [name for layer in layers for name in layer.names]
    if isinstance(pattern, type):
        return f"their types are {_some(sorted({type(layer.module).__name__ for layer in layers}))}"
    if any(name.startswith(pattern + ".") for name in names):
        return f"use {pattern + '.*'!r} for what is inside of it"
    return f"the {kind.split()[1]}s are {_some(names)}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"


def kept_modules(model: nn.Module) -> dict[nn.Module, str]:
    """The modules that stay in float because of what they are in, and why."""
    routers, adapters = dict.fromkeys(_routers(model), _ROUTER), dict.fromkeys(_adapters(model), _ADAPTER)
    return routers | _attentions_of_peft(model) | adapters | _in_float_files(model)


def _is_of_peft(module: nn.Module) -> bool:
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)


def _attentions_of_peft(model: nn.Module) -> dict[nn.Module, str]:
    """What is in an nn.MultiheadAttention that peft wraps: it writes into its weights in every call."""
    children = [child for module in model.modules() if _is_of_peft(module) for child in module.children()]
    wrapped = [child for child in children if isinstance(child, nn.MultiheadAttention)]
    reason = "in an nn.MultiheadAttention that peft wraps, and into whose weights it writes"
    return dict.fromkeys((one for attention in wrapped for one in attention.modules()), reason)


def _routers(model: nn.Module) -> set[nn.Module]:
    """The linears that choose experts: beside these, as many outputs as there are experts.

    A router may be in a module of its own. One with several linears is none, but an expert that all tokens share.
    """
    found: set[nn.Module] = set()
    for module in model.modules():
        children = list(module.children())
        counts = {child.num_experts for child in children if isinstance(child, QExperts)}
        counts |= {len(child.down_proj) for child in children if has_experts(child)}  # type: ignore[arg-type]
        for child in children if counts else ():
            linears = [one for one in child.modules() if isinstance(one, nn.Linear)]
            if len(linears) == 1 and linears[0].out_features in counts:
                found.add(linears[0])
    return found


def _adapters(model: nn.Module) -> set[nn.Module]:
    """The modules that peft has added to the model: they are trained, and stay in float.

    They are inside of modules of peft's, beside what those wrap.
    """
    added: set[nn.Module] = set()
    wrapped: set[nn.Module] = set()
    waiting = [(model, False)]
    while waiting:
        module, is_added = waiting.pop()
        seen = added if is_added else wrapped
        if module not in seen:
            seen.add(module)
            is_peft = _is_of_peft(module)
            children = module.named_children()
            waiting += [(child, is_added or (is_peft and name not in _WRAPPED)) for name, child in children]
    return added - wrapped


def _in_float_files(model: nn.Module) -> dict[nn.Module, str]:
    """What modules of sentence_transformers, as Dense, write into files of their own, and read into float layers.

    The models of transformers in them have files that know quantized layers.
    """
    found: dict[nn.Module, str] = {}
    seen: set[nn.Module] = set()
    waiting = [(model, "")]
    while waiting:
        module, owner = waiting.pop()
        bases = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(module).__mro__}
        if module in seen or ("transformers", "PreTrainedModel") in bases:
            continue
        seen.add(module)
        if ("sentence_transformers", "Module") in bases:
            owner = type(module).__name__
        elif owner:
            found[module] = f"in a {owner} of sentence_transformers, whose own file holds float layers"
        waiting += [(child, owner) for child in module.children()]
    return found


def _key(tensor: Tensor) -> int:
    """The same for tensors that share memory; on the meta device, where there is none, the tensor itself."""
    return id(tensor) if tensor.is_meta else tensor.data_ptr()


def weight_owners(model: nn.Module, but: tuple[type[nn.Module], ...] | None = None) -> dict[int, tuple[str, nn.Module]]:
    """Each parameter of a module that is not of the types `but` -> its name and the module.

    but: by default linears, and attentions, whose projections are linears.
    """
    return {
        _key(parameter): (f"{name}.{key}" if name else key, module)
        for name, module in model.named_modules()
        if not isinstance(module, but or (*linear_types(), nn.MultiheadAttention))
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.numel()
    }


def structural_reason(
    module: nn.Module,
    owners: dict[int, tuple[str, nn.Module]],
    kept: Mapping[nn.Module, str] | None = None,
    named: Set[type] = frozenset(),
) -> str | None:
    """Why this linear cannot be replaced, whatever the patterns say.

    kept: as `kept_modules` says. named: the types that the patterns name.
    """
    if isinstance(module, QLinear):
        return "already quantized"
    if PREPARED in vars(module):
        return str(vars(module)[PREPARED])
    if kept is not None and module in kept:
        return kept[module]
    if isinstance(module, Projection) and (reason := _attention_reason(module.place[0], owners, kept)):
        return reason
    weight = module._parameters.get("weight")
    if parametrize.is_parametrized(module) or weight is None:
        return "parametrized: its weight is computed from other parameters"
    if "bias" not in module._parameters:
        return "pruned: its bias is computed from other parameters"
    if type(module) not in (nn.Linear, Projection, conv1d(), *named):
        kind = type(module).__name__
        way = f"include=[nn.Linear, {kind}], the types, takes it"
        return f"subclass of nn.Linear: {kind}, whose owner may read its weight; {way}"
    if "forward" in vars(module):
        return "patched: its forward was replaced"
    owner = owners.get(_key(weight)) if weight.numel() else None
    return None if owner is None else _tied(*owner)


def _tied(name: str, holder: nn.Module) -> str:
    return f"tied to {'the embedding ' if isinstance(holder, (*EMBEDDINGS,)) else ''}{name}"


def _attention_reason(
    attention: Any, owners: dict[int, tuple[str, nn.Module]], kept: Mapping[nn.Module, str] | None
) -> str | None:
    """Why no projection of this nn.MultiheadAttention can be replaced."""
    if kept is not None and attention in kept:
        return kept[attention]
    if type(attention) is not nn.MultiheadAttention and not parametrize.is_parametrized(attention):
        kind = type(attention).__name__
        return f"in a subclass of nn.MultiheadAttention: {kind}, whose forward may be its own"
    names = ["in_proj_weight"] if attention._qkv_same_embed_dim else [f"{name}_weight" for name in INPUTS]
    weights = [attention._parameters.get(name) for name in names]
    if any(one is None for one in weights) or "in_proj_bias" not in attention._parameters:
        return "parametrized: a weight of the attention is computed from other parameters"
    if type(attention.out_proj) not in OUTPUTS:
        return f"in an nn.MultiheadAttention whose out_proj is a {type(attention.out_proj).__name__}"
    if "forward" in vars(attention):
        return "patched: the forward of the attention was replaced"
    owner = next((owners[_key(one)] for one in weights if one is not None and _key(one) in owners), None)
    return None if owner is None else _tied(*owner)
