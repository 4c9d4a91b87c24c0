"""The parts of an encoder layer of transformers, and whether they compute what the operator computes.

The operator stands for code that it never calls: transformers' own. So a layer is fused only where that code is known
to run: the layer and all that is inside have the classes that `Layout` and `Family` name, none of them patched, and
nobody listens to a part. `Parts` is what was found once; `unchanged` and `listener` say for each call whether it holds.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from pyqkern.backends import cpu
from pyqkern.nn.four_bit import NESTED, FP4Linear, Int4Linear, NF4Linear
from pyqkern.nn.int8 import Int8Linear
from pyqkern.ops.checks import FLOATS

Path = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Where a family of models keeps the parts of an encoder layer."""

    attention: Path
    linears: tuple[Path, ...]  # in the order of pyqkern.ops.encoder.LINEARS
    norms: tuple[Path, ...]
    activation: Path
    heads: str  # attribute of the attention
    containers: tuple[tuple[Path, tuple[str, ...]], ...]  # the modules between, and the names that their class may have
    position_bias: str = ""  # argument of forward that is added to the scores
    returns_tuple: bool | None = None  # None: as transformers' layers do, up to version 4


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
    """What the operator is told of how a linear is quantized."""

    symmetric: bool
    quant_type: str = "int8"
    blocksize: int = 0
    nested: tuple[str, ...] = ()  # the linear's buffers that doubly quantized scales have


_FOUR_BITS = (NF4Linear, FP4Linear, Int4Linear)


def unfit(linear: nn.Module) -> str | None:
    """Why the operator cannot take this linear."""
    if type(linear) is Int8Linear:
        return None
    if not isinstance(linear, _FOUR_BITS) or type(linear) not in _FOUR_BITS:
        kind = linear.scheme.name if hasattr(linear, "scheme") else type(linear).__name__  # type: ignore[union-attr]
        return f"is no linear with activations quantized per token: {kind}"
    if linear.scheme.compute not in cpu.AS_INT8:
        return f"computes in {linear.scheme.compute}, which only single linears do"
    if not cpu.in_panels(linear.out_features, linear.in_features, linear.blocksize):
        return f"has rows of {linear.in_features}, no whole blocks of {linear.blocksize}, or less than 16 of them"
    return None


def _format(linear: Any) -> Format:
    if type(linear) is Int8Linear:
        return Format(linear.scheme.symmetric, linear.scheme.name)
    return Format(True, linear.quant_type, linear.blocksize, NESTED if linear.double_quant else ())


def common_format(linears: Sequence[Any]) -> Format | None:
    """The format of all of them, or None where they differ or the operator does not take one of them."""
    if any(unfit(linear) is not None for linear in linears):
        return None
    first, *others = (_format(linear) for linear in linears)
    return first if all(other == first for other in others) else None


# transformers' names and torch's, for what the kernels call gelu, gelu_tanh and relu.
_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
}


def kernel_activation(function: Any) -> str | None:
    """The kernels' name for an activation of torch or transformers; None where they have none."""
    kind = type(function)
    if kind is nn.GELU:
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    if kind is nn.ReLU:
        return "relu"
    if function is nn.functional.gelu:
        return "gelu"
    return _ACTIVATIONS.get(kind.__name__) if is_of_transformers(kind) else None


# ---- a family: the stock code


@dataclass(frozen=True, eq=False)
class Family:
    """A class of layers of transformers, and the code that the operator stands for. Made once for each class."""

    base: type[nn.Module]
    layout: Layout
    stock: Mapping[type[nn.Module], Any]  # each class that may be inside, and its forward
    containers: Mapping[Path, tuple[type[nn.Module], ...]]
    arguments: tuple[str, ...]  # of the layer's forward
    takes_any: bool  # whether it takes other keywords too
    reads: frozenset[str]  # the arguments that its code reads, beside input, mask and position bias
    returns_tuple: bool


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
    kinds: list[Any] = [base, *(kind for several in containers.values() for kind in several)]
    signature = inspect.signature(base.forward).parameters
    names = tuple(signature)[1:]
    inside: set[str] = {name for kind in kinds for name in inspect.signature(kind.forward).parameters}
    for function in _attention_functions(module):
        inside |= set(inspect.signature(function).parameters)
    package = sys.modules.get(base.__module__.split(".")[0])
    major = getattr(package, "__version__", "5").split(".")[0]
    return Family(
        base,
        layout,
        {kind: kind.forward for kind in (*kinds, nn.LayerNorm, nn.Dropout)},
        containers,
        tuple(name for name in names if signature[name].kind is not inspect.Parameter.VAR_KEYWORD),
        any(one.kind is inspect.Parameter.VAR_KEYWORD for one in signature.values()),
        frozenset((inside | _READ) - _IGNORED - {"self", *names[:2], layout.position_bias}),
        int(major) < 5 if layout.returns_tuple is None else layout.returns_tuple,
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


def _patched_attention(module: Any) -> bool:
    """Whether one of the attention functions is not transformers' own any more."""
    functions: Any = sys.modules.get("transformers.modeling_utils")
    registered = getattr(functions, "ALL_ATTENTION_FUNCTIONS", {}).get("sdpa")
    found = [*_attention_functions(module), *([] if registered is None else [registered])]
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
_GLOBAL_HOOKS = [
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
    heads: int = 0
    scaling: float = 0.0
    config: Any = None
    places: list[tuple[dict[str, Any], str]] = field(default_factory=list)  # where parts were found
    found: list[Any] = field(default_factory=list)  # and what was there
    modules: list[nn.Module] = field(default_factory=list)  # all inside the layer
    kinds: list[type] = field(default_factory=list)  # and their classes
    states: list[dict[str, Any]] = field(default_factory=list)  # and their attributes
    hooks: list[Any] = field(default_factory=list)  # the dictionaries of their hooks, and of the global ones
    scaled: list[tuple[dict[int, Any], InputScale]] = field(default_factory=list)  # hooks that the operator stands for
    input_scale: InputScale | None = None
    up_scale: InputScale | None = None

    def __post_init__(self) -> None:
        self.of_linears = [linear._parameters for linear in self.linears]
        self.of_norms = [norm._parameters for norm in self.norms]

    def unchanged(self) -> bool:
        """Whether each part is where it was, and of the class it was of."""
        if torch.compiler.is_compiling():  # which knows no other way to compare modules
            for (attributes, name), part in zip(self.places, self.found, strict=True):
                if attributes.get(name) is not part:
                    return False
            kinds = all(type(module) is kind for module, kind in zip(self.modules, self.kinds, strict=True))
        else:  # lists compare their items by identity first, in a third of the time
            places = [attributes.get(name) for attributes, name in self.places] == self.found
            kinds = places and list(map(type, self.modules)) == self.kinds
        for hooks, scale in self.scaled:
            if len(hooks) != 1 or next(iter(hooks.values())) is not scale:
                return False
        return kinds

    def tensors(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """The LayerNorms' weights and biases, and the biases of the linears, as they are now."""
        vectors = [parameters[name] for parameters in self.of_norms for name in ("weight", "bias")]
        return vectors, [parameters["bias"] for parameters in self.of_linears]

    def factors(self) -> list[Tensor]:
        """What the inputs of query, key and value, and of up, are multiplied by; empty where nothing is."""
        if self.input_scale is None or self.up_scale is None or not self.scaled:
            return []
        return [self.input_scale.factor.cpu(), self.up_scale.factor.cpu()]


def find_parts(layer: nn.Module, family: Family) -> Parts:
    """The parts of a layer, or the reason why it cannot become one operator."""
    try:
        return _find(layer, family)
    except AttributeError as error:
        return Parts(f"not the {family.base.__name__} that is known: {error}")


def _find(layer: nn.Module, family: Family) -> Parts:
    layout = family.layout
    attention: Any = part_of(layer, layout.attention)
    linears = [part_of(layer, path) for path in layout.linears]
    norms = [part_of(layer, path) for path in layout.norms]
    function = part_of(layer, layout.activation)
    heads = getattr(attention, layout.heads)
    reason = (
        _decoder_reason(layer, attention)
        or _stock_reason(layer, family)
        or _linears_reason(layout, linears, heads)
        or _norms_reason(norms, linears[0].in_features)
    )
    activation = kernel_activation(function)
    if reason is None and activation is None:
        reason = f"no kernel for the activation {getattr(function, '__name__', type(function).__name__)}"
    if reason is not None:
        return Parts(reason)
    form = common_format(linears)
    assert form is not None and activation is not None  # _linears_reason has seen to it
    inside = list(layer.modules())[1:]
    places = list(_places(layer, attention, layout))
    scales = _input_scales(linears)
    stands_for = {id(hooks) for hooks, _ in scales[0]}
    scaling = getattr(attention, "scaling", None) or (linears[0].out_features // heads) ** -0.5
    return Parts(
        None, linears, norms, form, activation, heads, scaling, getattr(attention, "config", None),
        [place[:2] for place in places], [place[2] for place in places],
        inside, [type(module) for module in inside], [vars(module) for module in inside],
        [*_GLOBAL_HOOKS, *(hooks for hooks in _hooks_of(inside) if id(hooks) not in stands_for)],
        *scales,
    )  # fmt: skip


def _hooks_of(modules: Sequence[nn.Module]) -> Iterator[Any]:
    for module in modules:
        for name in _HOOKS:
            yield vars(module)[name]


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


def _places(layer: nn.Module, attention: nn.Module, layout: Layout) -> Iterator[tuple[dict[str, Any], str, Any]]:
    for module in layer.modules():
        for name, child in module._modules.items():
            yield module._modules, name, child
    for name in (layout.heads, "scaling", "config"):
        if name in vars(attention):
            yield vars(attention), name, vars(attention)[name]
    holder = part_of(layer, layout.activation[:-1])
    if layout.activation[-1] in vars(holder):  # a function, and no module
        yield vars(holder), layout.activation[-1], vars(holder)[layout.activation[-1]]


def _decoder_reason(layer: Any, attention: Any) -> str | None:
    if getattr(layer, "is_decoder", False) or getattr(layer, "add_cross_attention", False):
        return "a decoder layer"
    if getattr(attention, "is_causal", False) or getattr(attention, "is_decoder", False):
        return "a decoder layer"
    embedding = getattr(attention, "position_embedding_type", "absolute")
    return None if embedding in ("absolute", None) else f"its scores have a term of their own: {embedding}"


def _stock_reason(layer: nn.Module, family: Family) -> str | None:
    """Why it is not, or not only, the code of transformers that runs in this layer."""
    if "forward" in vars(layer):
        return "patched: its forward was replaced"
    if patched(family.base) or _patched_attention(sys.modules[family.base.__module__]):
        return f"patched: the code of {family.base.__name__} was replaced"
    layout = family.layout
    known = {*layout.linears, *layout.norms, layout.activation}
    for name, module in list(layer.named_modules())[1:]:
        path, kind = tuple(name.split(".")), type(module)
        if "forward" in vars(module):
            return f"{name} is patched: its forward was replaced"
        if path in family.containers:
            if kind not in family.containers[path] or not is_of_transformers(kind):
                return f"{name} is no class that is known: {kind.__module__}.{kind.__qualname__}"
        elif kind is not nn.Dropout and not any(path[: len(one)] == one for one in known):
            return f"{name} is a part that is not known: {kind.__module__}.{kind.__qualname__}"
        if kind in family.stock and (patched(kind) or kind.forward is not family.stock[kind]):
            return f"patched: the code of {kind.__name__} was replaced"
    return None


def _linears_reason(layout: Layout, linears: Sequence[Any], heads: int) -> str | None:
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


# ---- who listens


def listener(parts: Parts) -> str | None:
    """Why this call cannot pass the parts by: one is in training, patched, or has a hook that wants to be called."""
    for state in parts.states:
        if state["training"]:
            return "a part of it is in training"
        if "forward" in state:
            return "the forward of a part was replaced"
    if any(parts.hooks) and _wants_to_be_called(parts):
        return "a hook listens to a part of it"
    return None


def _wants_to_be_called(parts: Parts) -> bool:
    if any(_GLOBAL_HOOKS):
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


def dtypes_reason(vectors: Sequence[Tensor], biases: Sequence[Tensor | None]) -> str | None:
    """Why the operator does not take the LayerNorms' vectors and the biases of linears as they are now."""
    dtypes = [vector.dtype for vector in vectors]
    if dtypes[0] not in FLOATS or dtypes.count(dtypes[0]) != len(dtypes):
        return "its LayerNorms do not have one dtype of fp32, bf16 and fp16"
    for bias in biases:
        if bias is not None and bias.dtype not in FLOATS:
            return "a bias is not in fp32, bf16 or fp16"
    return None
