"""The parts of a layer of transformers that an operator stands for, and whether they still compute what it computes.

The operator of a whole layer stands for code that it never calls: transformers' own. So a layer is fused only where
that code is known to run: the layer and all that is inside have the classes that `Layout` and `Family` name, none of
them patched, and nobody listens to a part. `Parts` is what was found once; `unchanged`, `listener` and
`settings_reason` are the rules that say whether it holds. They take as long as a small layer. So what they have read is
noted, and they are asked again where something of it is another object: `Parts.see` and `Parts.as_seen`. What encoder
and decoder layers have of their own: encoder_parts.py and decoder_parts.py.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from pyqkern import _C
from pyqkern.backends import cpu
from pyqkern.nn.four_bit import NESTED, FP4Linear, Int4Linear, NF4Linear
from pyqkern.nn.int8 import Int8Linear, Int8WeightOnlyLinear

Path = tuple[str, ...]
Place = tuple[dict[Any, Any], Any, Any]  # a dictionary, a key, and what is there; ... where nothing is


@dataclass(frozen=True)
class Layout:
    """Where a family of models keeps the parts of a layer."""

    attention: Path
    linears: tuple[Path, ...]  # in the order of the operator
    norms: tuple[Path, ...]
    activation: Path
    heads: str  # attribute of the attention, "" where there is none
    containers: tuple[tuple[Path, tuple[str, ...]], ...]  # the modules between, and the names that their class may have
    returns_tuple: bool | None = None  # None: as transformers' layers do, up to version 4

    norm = ""  # the name of the norms' class, "" for nn.LayerNorm
    returns_weights = False  # whether the layer returns attention weights behind its output, None from us

    def known(self) -> set[Path]:
        """The parts that the operator stands for."""
        return {*self.linears, *self.norms, self.activation}

    def handled(self, arguments: Sequence[str]) -> set[str]:
        """Those arguments of the layer's forward that the operator takes."""
        raise NotImplementedError


def part_of(module: nn.Module, path: Path) -> Any:
    for name in path:
        module = getattr(module, name)
    return module


def is_of_transformers(kind: type) -> bool:
    """Whether the class is the very one that transformers has under its name, and not a user's of that name."""
    module = sys.modules.get(kind.__module__)
    return kind.__module__.startswith("transformers.") and getattr(module, kind.__name__, None) is kind


# ---- what a linear tells the operator


@dataclass(frozen=True)
class Format:
    """What an operator is told of how a linear is quantized. compute, blocksize and nested are those of 4 bits."""

    symmetric: bool
    quant_type: str = "int8"
    blocksize: int = 0
    nested: tuple[str, ...] = ()  # the linear's buffers that doubly quantized scales have
    compute: str = "int8"  # "int8" or "fp32"


def scales_of(found: Format) -> str:
    """The name of a linear's buffer of scales."""
    return "weight_scale" if found.quant_type.startswith("int8") else "absmax"


FOUR_BITS = (NF4Linear, FP4Linear, Int4Linear)


def is_four_bit(linear: nn.Module) -> bool:
    """Whether it has 4 bits, and is of no class of a user's own."""
    return isinstance(linear, FOUR_BITS) and type(linear) in FOUR_BITS


def kind_of(linear: nn.Module) -> str:
    """What a message calls the linear: its scheme, or its class."""
    return linear.scheme.name if hasattr(linear, "scheme") else type(linear).__name__  # type: ignore[union-attr,return-value]


def in_panels_reason(linear: Any) -> str | None:
    """Why the codes of a 4-bit linear are not in the form that operators of whole layers read."""
    if cpu.in_panels(linear.out_features, linear.in_features, linear.blocksize):
        return None
    return f"has rows of {linear.in_features}, no whole blocks of {linear.blocksize}, or less than 16 of them"


def _format(linear: Any) -> Format:
    if type(linear) in (Int8Linear, Int8WeightOnlyLinear):
        return Format(getattr(linear.scheme, "symmetric", True), linear.scheme.name)
    nested = NESTED if linear.double_quant else ()
    compute = "int8" if linear.scheme.compute in cpu.AS_INT8 else "fp32"
    return Format(True, linear.quant_type, linear.blocksize, nested, compute)


def common_format(linears: Sequence[Any]) -> Format | None:
    """The format of all of them, or None where they differ. The operator takes each of them."""
    first, *others = (_format(linear) for linear in linears)
    return first if all(other == first for other in others) else None


# transformers' names and torch's, for what the kernels call silu, gelu, gelu_tanh and relu.
_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "BloomGelu": "gelu_tanh",
    "SiLUActivation": "silu",
}


def kernel_activation(function: Any) -> str | None:
    """The kernels' name for an activation of torch or transformers; None where they have none."""
    kind = type(function)
    if kind is nn.GELU:
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    if kind is nn.ReLU:
        return "relu"
    if kind is nn.SiLU or function is nn.functional.silu:
        return "silu"
    if function is nn.functional.gelu:
        return "gelu"
    return _ACTIVATIONS.get(kind.__name__) if is_of_transformers(kind) else None


# ---- a family: the stock code


@dataclass(frozen=True, eq=False)
class Family:
    """A class of layers of transformers, and the code that the operator stands for. Made once for each class."""

    base: type[nn.Module]
    layout: Any  # a Layout
    stock: Mapping[type[nn.Module], Any]  # each class that may be inside, and its forward
    containers: Mapping[Path, tuple[type[nn.Module], ...]]
    arguments: tuple[str, ...]  # of the layer's forward
    handled: frozenset[str]  # those that the operator takes
    ignored: frozenset[str]  # those, and the ones that say nothing
    takes_any: bool  # whether it takes other keywords too
    reads: frozenset[str]  # the arguments that its code reads beside those
    behind: tuple[None, ...] | None  # what the layer returns in a tuple behind its output; None: no tuple
    norm: type[nn.Module]


# Read by an attention function out of its keywords, under no name in its signature.
_READ = {"softcap"}
# In a signature, but of no influence on the result.
_IGNORED = {"position_ids", "cache_position", "output_hidden_states", "return_dict", "use_cache"}


def family_of(base: type[nn.Module], layout: Layout) -> Family:
    module = sys.modules[base.__module__]
    containers = {
        path: tuple(kind for name in names if isinstance(kind := getattr(module, name, None), type))
        for path, names in layout.containers
    }
    norm: Any = getattr(module, layout.norm) if layout.norm else nn.LayerNorm
    kinds: list[Any] = [base, *(kind for several in containers.values() for kind in several)]
    signature = inspect.signature(base.forward).parameters
    names = tuple(signature)[1:]
    inside: set[str] = {name for kind in kinds for name in inspect.signature(kind.forward).parameters}
    for function in _attention_functions(module):
        inside |= set(inspect.signature(function).parameters)
    package = sys.modules.get(base.__module__.split(".")[0])
    major = getattr(package, "__version__", "5").split(".")[0]
    handled = layout.handled(names)
    reads = (inside | _READ) - _IGNORED - {"self"} - handled
    returns_tuple = int(major) < 5 if layout.returns_tuple is None else layout.returns_tuple
    return Family(
        base,
        layout,
        {kind: kind.forward for kind in (*kinds, norm, nn.Dropout)},
        containers,
        tuple(name for name in names if signature[name].kind is not inspect.Parameter.VAR_KEYWORD),
        frozenset(handled),
        frozenset({*handled, *names} - reads),
        any(one.kind is inspect.Parameter.VAR_KEYWORD for one in signature.values()),
        frozenset(reads),
        (None,) if layout.returns_weights else () if returns_tuple else None,
        norm,
    )


def _attention_functions(module: Any) -> Iterator[Callable[..., Any]]:
    """What computes the attention of a family, where that is a function of its own."""
    sdpa = sys.modules.get("transformers.integrations.sdpa_attention")
    for function in (getattr(module, "eager_attention_forward", None), getattr(sdpa, "sdpa_attention_forward", None)):
        if function is not None:
            yield function


def patched(kind: type[nn.Module]) -> bool:
    """Whether the class's forward is not the one that its file defines."""
    forward: Any = kind.forward
    owner = next(one for one in kind.__mro__ if "forward" in vars(one))
    return bool(forward.__module__ != owner.__module__ or forward.__qualname__ != f"{owner.__qualname__}.forward")


def replaced_forward(module: nn.Module) -> bool:
    """Whether it has a forward of its own. transformers 4 leaves a module its class's, when it has captured outputs."""
    forward = vars(module).get("forward")
    if forward is None:
        return False
    return getattr(forward, "__self__", None) is not module or forward.__func__ is not type(module).forward


# Functions beside those of the attention that the code of layers calls.
_CALLED = ("apply_rotary_pos_emb", "rotate_half", "repeat_kv", "dropout_add", "bloom_gelu_forward")


def _patched_function(module: Any) -> bool:
    """Whether a function that the layer calls is not transformers' own any more."""
    functions: Any = sys.modules.get("transformers.modeling_utils")
    registered = getattr(functions, "ALL_ATTENTION_FUNCTIONS", {}).get("sdpa")
    found = [*_attention_functions(module), *([] if registered is None else [registered])]
    found += [getattr(module, name) for name in _CALLED if hasattr(module, name)]
    return any(not str(function.__module__).startswith("transformers.") for function in found)


# ---- the parts of one layer


class InputScale:
    """A forward pre-hook: multiplies the input by a vector. It stays on the layer when replace_linear quantizes it."""

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor  # fp32 [in_features]

    def __call__(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any] | None = None
    ) -> tuple[Any, ...]:
        if not arguments and keywords:
            name, x = next(iter(keywords.items()))
            return (), keywords | {name: self._scaled(x)}
        scaled = (self._scaled(arguments[0]), *arguments[1:])
        return scaled if keywords is None else (scaled, keywords)

    def _scaled(self, x: Tensor) -> Tensor:
        if self.factor.device != x.device:
            self.factor = self.factor.to(x.device)
        return x * self.factor.to(x.dtype)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = [
    getattr(nn_module, name)
    for name in (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    )
]


@dataclass(eq=False)
class Parts:
    """What the operator needs of a layer, found once; or the reason why it cannot have it."""

    reason: str | None = None
    linears: list[Any] = field(default_factory=list)
    norms: list[Any] = field(default_factory=list)
    format: Format = Format(False)
    activation: str = ""
    config: Any = None
    holders: list[dict[str, Any]] = field(default_factory=list)  # where parts were found: in which attributes
    names: list[str] = field(default_factory=list)  # under which name
    found: list[Any] = field(default_factory=list)  # and what was there
    modules: list[nn.Module] = field(default_factory=list)  # all inside the layer
    kinds: list[type] = field(default_factory=list)  # and their classes
    states: list[dict[str, Any]] = field(default_factory=list)  # and their attributes
    hooks: list[Any] = field(default_factory=list)  # the dictionaries of their hooks, and of the global ones
    scaled: list[tuple[dict[int, Any], InputScale]] = field(default_factory=list)  # hooks that the operator stands for
    slots: list[tuple[dict[str, Any], str]] = field(default_factory=list)  # where the operator's tensors are
    operands: Any = None  # what `_gather` made of them when `see` noted the rest
    seen: tuple[tuple[Any, ...], ...] = ()  # the arguments of _C.unchanged; empty where all has to be asked
    idle: list[Any] = field(default_factory=list)  # hooks that are there but want nothing, as long as `_is_idle`

    def watch(self, layer: nn.Module, places: Sequence[Place]) -> None:
        """Notes what `unchanged` and `listener` look at: all that is in the layer, and these places."""
        inside = list(layer.modules())[1:]
        stands_for = {id(hooks) for hooks, _ in self.scaled}
        all_places = [*_children(layer), *places]
        self.holders = [attributes for attributes, _, _ in all_places]
        self.names, self.found = [name for _, name, _ in all_places], [part for _, _, part in all_places]
        self.modules, self.kinds = inside, [type(module) for module in inside]
        self.states = [vars(module) for module in inside]
        self.hooks = [*GLOBAL_HOOKS, *(hooks for hooks in _hooks_of(inside) if id(hooks) not in stands_for)]

    def unchanged(self) -> bool:
        """Whether each part is where it was, and of the class it was of."""
        for attributes, name, part in zip(self.holders, self.names, self.found, strict=True):
            if attributes.get(name) is not part:
                return False
        for hooks, scale in self.scaled:
            if len(hooks) != 1 or next(iter(hooks.values())) is not scale:
                return False
        return all(type(module) is kind for module, kind in zip(self.modules, self.kinds, strict=True))

    def see(self) -> None:
        """Notes all that `unchanged`, `listener` and `settings_reason` have read, who had no objection."""
        self.operands = self._gather()
        settings = [] if self.config is None else [_place_of(self.config, name) for name in _STORED]
        if not all(settings) or any(linear._scales() is not scales for linear, scales in self._scales()):
            self.seen = ()  # what is computed may be something else each time
            return
        hooks = [*self.hooks, *(hooks for hooks, _ in self.scaled)]
        places: list[Place] = [
            *zip(self.holders, self.names, self.found, strict=True),
            *((state, "training", state["training"]) for state in self.states),
            *((state, "forward", state.get("forward", ...)) for state in self.states),
            *((each, key, hook) for each in hooks for key, hook in each.items()),
            *(place for place in settings if place),
            *((holder, name, holder.get(name, ...)) for holder, name in self.slots),
        ]
        kinds, sizes = zip(self.modules, self.kinds, strict=True), ((each, len(each)) for each in hooks)
        self.seen = tuple(tuple(chain.from_iterable(each)) for each in (places, kinds, sizes))
        self.idle = [hook for each in self.hooks for hook in each.values()]

    def _scales(self) -> Iterator[tuple[Any, Tensor]]:
        """Each linear, and the scales that are in it."""
        for linear in self.linears:
            yield linear, linear._buffers[scales_of(self.format)]

    def as_seen(self) -> bool:
        """Whether all that `see` noted is there, the very same objects, and nobody wants what an idle hook captures."""
        if not self.seen or not _C.unchanged(*self.seen):
            return False
        return not self.idle or all(map(_is_idle, self.idle))

    def _gather(self) -> Any:
        """The layer's tensors as they are now, as the operator takes them."""
        raise NotImplementedError


def _hooks_of(modules: Sequence[nn.Module]) -> Iterator[Any]:
    for module in modules:
        for name in _HOOKS:
            yield vars(module)[name]


def _children(layer: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    for module in layer.modules():
        for name, child in module._modules.items():
            yield module._modules, name, child


def attributes(module: nn.Module, names: Sequence[str]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """The places of those attributes that the module has and that are no modules."""
    for name in names:
        if name in vars(module):
            yield vars(module), name, vars(module)[name]


def slots_of(linears: Sequence[Any], norms: Sequence[Any], found: Format) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the tensors of linears and norms are."""
    for linear in linears:
        for name in ("packed", scales_of(found), *found.nested):
            yield linear._buffers, name
        yield linear._parameters, "bias"
    for norm in norms:
        for name in ("weight", "bias"):
            if name in norm._parameters:
                yield norm._parameters, name


def activation_of(layer: nn.Module, layout: Layout) -> tuple[Any, list[tuple[dict[str, Any], str, Any]]]:
    """The activation, and its place where it is a function and no module."""
    holder, name = part_of(layer, layout.activation[:-1]), layout.activation[-1]
    return getattr(holder, name), list(attributes(holder, [name]))


def stock_reason(layer: nn.Module, family: Family) -> str | None:
    """Why it is not, or not only, the code of transformers that runs in this layer."""
    if "forward" in vars(layer) and (type(layer) is family.base or replaced_forward(layer)):
        return "patched: its forward was replaced"
    if patched(family.base) or _patched_function(sys.modules[family.base.__module__]):
        return f"patched: the code of {family.base.__name__} was replaced"
    layout = family.layout
    known = layout.known()
    for name, module in list(layer.named_modules())[1:]:
        path, kind = tuple(name.split(".")), type(module)
        if replaced_forward(module):
            return f"{name} is patched: its forward was replaced"
        if path in family.containers:
            if kind not in family.containers[path] or not is_of_transformers(kind):
                return f"{name} is no class that is known: {kind.__module__}.{kind.__qualname__}"
        elif kind is not nn.Dropout and not any(path[: len(one)] == one for one in known):
            return f"{name} is a part that is not known: {kind.__module__}.{kind.__qualname__}"
        if kind in family.stock and (patched(kind) or kind.forward is not family.stock[kind]):
            return f"patched: the code of {kind.__name__} was replaced"
    return None


def activation_reason(function: Any) -> str:
    return f"no kernel for the activation {getattr(function, '__name__', type(function).__name__)}"


# ---- who listens, and what the config asks for


def listener(parts: Parts) -> str | None:
    """Why this call cannot pass the parts by: one is in training, patched, or has a hook that wants to be called."""
    if any([state["training"] for state in parts.states]):  # lists, since torch.compile knows no generators here
        return "a part of it is in training"
    states = zip(parts.states, parts.modules, strict=True)
    if any(["forward" in state and replaced_forward(module) for state, module in states]):
        return "the forward of a part was replaced"
    if any(parts.hooks) and _wants_to_be_called(parts):
        return "a hook listens to a part of it"
    return None


def _wants_to_be_called(parts: Parts) -> bool:
    if any(GLOBAL_HOOKS):
        return True
    return any(not _is_idle(hook) for hooks in parts.hooks for hook in hooks.values())


def _is_idle(hook: Any) -> bool:
    """Whether it is one of the hooks that transformers leaves on attentions, and nobody asks for what it captures."""
    if getattr(hook, "__module__", None) != "transformers.utils.output_capturing":
        return False
    collected = hook.__globals__["_active_collector"].get()
    if collected is None:
        return True
    names = dict(zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=True))
    return "key" in names and names["key"].cell_contents not in collected


# Where a config of transformers keeps what it gives under another name.
_STORED = {"_attn_implementation": "_attn_implementation_internal", "output_attentions": "_output_attentions"}


def _place_of(config: Any, name: str) -> Place | None:
    """Where a config keeps an attribute; None where it computes it."""
    state = object.__getattribute__(config, "__dict__")
    return (state, _STORED[name], state[_STORED[name]]) if _STORED[name] in state else None


def setting(config: Any, name: str) -> Any:
    """An attribute of a config, past transformers' own __getattribute__, which costs several us; None without one."""
    if config is None or torch.compiler.is_compiling():
        return getattr(config, name, None)
    place = _place_of(config, name)
    return getattr(config, name, None) if place is None else place[2]


def settings_reason(parts: Parts) -> str | None:
    """Why the config asks for what the operator does not do."""
    if setting(parts.config, "output_attentions"):
        return "attention weights are asked for"
    if setting(parts.config, "_attn_implementation") not in (None, "eager", "sdpa"):
        return "another implementation of attention is asked for"
    return None
