"""QEncoderLayer: an encoder layer of transformers whose forward is one operator."""

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyqkern.backends import ACTIVATIONS, cpu
from pyqkern.nn.four_bit import NESTED, FP4Linear, Int4Linear, NF4Linear
from pyqkern.nn.int8 import Int8Linear
from pyqkern.ops import encoder as ops_encoder
from pyqkern.ops import registry
from pyqkern.ops.checks import FLOATS

Path = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Where a family of models keeps the parts of an encoder layer."""

    attention: Path
    linears: tuple[Path, ...]  # in the order of ops_encoder.LINEARS
    norms: tuple[Path, ...]
    activation: Path
    heads: str  # attribute of the attention
    position_bias: str = ""  # argument of forward that is added to the scores
    returns_tuple: bool | None = None  # None: as transformers' layers do, up to version 4


# transformers' names and torch's, for what the kernels call gelu, gelu_tanh and relu.
_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
}


# What a model may pass to its layers that changes nothing of the result.
_IGNORED = frozenset(
    {"position_ids", "cache_position", "output_hidden_states", "return_dict", "use_cache", "past_key_value"}
)


def part_of(module: nn.Module, path: Path) -> Any:
    for name in path:
        module = getattr(module, name)
    return module


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


@dataclass(frozen=True)
class _Format:
    """What the operator is told of how a linear is quantized."""

    symmetric: bool
    quant_type: str = "int8"
    blocksize: int = 0
    scale: str = "weight_scale"  # the linear's buffer of scales
    nested: tuple[str, ...] = ()  # and those that doubly quantized scales have


def _format(linear: Any) -> _Format:
    if type(linear) is Int8Linear:
        return _Format(linear.scheme.symmetric)
    return _Format(True, linear.quant_type, linear.blocksize, "absmax", NESTED if linear.double_quant else ())


def common_format(linears: Sequence[Any]) -> _Format | None:
    """The format of all of them, or None where they differ or the operator does not take one of them."""
    if any(unfit(linear) is not None for linear in linears):
        return None
    first, *others = (_format(linear) for linear in linears)
    return first if all(other == first for other in others) else None


def kernel_activation(function: Any) -> str | None:
    if type(function) is nn.GELU:
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    if function is nn.functional.gelu:
        return "gelu"
    return _ACTIVATIONS.get(type(function).__name__)


class QEncoderLayer(nn.Module):
    """An encoder layer whose forward is one operator, `torch.ops.pyqkern.encoder_layer`, where that gives all it must.

    `optimize` makes one out of a layer of transformers by giving it a class that derives from both: the parts, their
    names and the state_dict stay. The layer goes its old way, through its QLinears, in training, where a gradient is
    asked for, under autocast, where attention weights are asked for, off the CPU, with a cache or a head mask, and
    while a hook listens to one of its linears or norms.

    Where the mask tells padding from tokens, the padding's outputs are zeros.
    """

    is_fused = True

    _base: ClassVar[type[nn.Module]]
    _layout: ClassVar[Layout]
    _returns_tuple: ClassVar[bool]
    _arguments: ClassVar[tuple[str, ...]]  # of forward behind the mask
    _parts: "_Parts | None" = None
    _checked: tuple[list[int], ops_encoder.Prepared] | None = None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        named = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        position_bias = named.pop(self._layout.position_bias, None)
        parts = self._fusable(hidden_states, position_bias, named)
        if parts is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        linears, norms, heads, activation = parts.linears, parts.norms, parts.heads, parts.activation
        form = parts.format
        assert form is not None  # _fusable has seen to it
        weights = [linear._buffers["packed"] for linear in linears]  # read directly: see Int8Linear._linear
        scales = [linear._buffers[form.scale] for linear in linears]
        nested = [linear._buffers[name] for linear in linears for name in form.nested]
        biases = [linear._parameters["bias"] for linear in linears]
        vectors = [norm._parameters[name] for norm in norms for name in ("weight", "bias")]
        rest = (heads, parts.scaling, [norm.eps for norm in norms], activation, form.symmetric)
        features = [linears[0].out_features, linears[4].out_features]
        quantized = (form.quant_type, form.blocksize, features, nested)
        if registry.direct(hidden_states):
            # What was checked stays so while nothing moves: a tensor that changes its dtype changes its address.
            addresses = [0 if t is None else t.data_ptr() for t in (*weights, *scales, *biases, *vectors, *nested)]
            checked = self._checked
            if checked is None or checked[0] != addresses:
                given = (weights, scales, biases, vectors, heads, activation, form.symmetric)
                prepared = ops_encoder.prepare(*given, *quantized)
                self._checked = checked = (addresses, prepared)
            y = ops_encoder.run(hidden_states, attention_mask, checked[1], *rest, position_bias)
        else:
            y = torch.ops.pyqkern.encoder_layer.default(
                hidden_states, attention_mask, weights, scales, biases, vectors, *rest, *quantized, position_bias
            )
        return (y,) if self._returns_tuple else y

    def _fusable(self, x: Tensor, position_bias: Tensor | None, arguments: Mapping[str, Any]) -> "_Parts | None":
        """The parts for the operator, or None where the layer has to go its old way."""
        if self.training or not x.is_cpu or x.dim() != 3 or x.dtype not in FLOATS or torch.is_autocast_enabled("cpu"):
            return None
        for name, value in arguments.items():
            if value is not None and value is not False and name not in _IGNORED:
                return None
        parts = self._parts
        if torch.compiler.is_compiling():
            parts = _find_parts(self)
        elif parts is None or not parts.are_in(self):
            self._parts = parts = _find_parts(self)
        if parts.format is None or not all(linear._buffers["packed"].is_cpu for linear in parts.linears):
            return None
        if parts.activation not in ACTIVATIONS:
            return None
        for part in (*parts.linears, *parts.norms):
            if part._forward_hooks or part._forward_pre_hooks:
                return None
        if torch.is_grad_enabled():
            given = (x,) if position_bias is None else (x, position_bias)
            if any(t.requires_grad for t in (*given, *self.parameters())):
                return None
        if _setting(parts.config, "output_attentions"):
            return None
        return parts if _setting(parts.config, "_attn_implementation") in (None, "eager", "sdpa") else None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle and deepcopy: the class is made, not imported, and so is made again."""
        state = {name: value for name, value in self.__dict__.items() if name not in ("_parts", "_checked")}
        return _rebuild, (self._base, self._layout), state


@dataclass(frozen=True)
class _Parts:
    """What the operator needs of a layer, found once; `places` tells when a part was exchanged for another since."""

    linears: list[Any]
    format: _Format | None  # None: the operator does not take them
    norms: list[Any]
    activation: str  # or what no kernel is there for
    heads: int
    scaling: float
    config: Any
    places: list[tuple[dict[str, nn.Module | None], str, nn.Module]]

    def are_in(self, layer: QEncoderLayer) -> bool:
        return all(modules[name] is module for modules, name, module in self.places)


def _find_parts(layer: QEncoderLayer) -> _Parts:
    layout = layer._layout
    places: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []

    def walk(path: Path) -> Any:
        module: nn.Module = layer
        for name in path:
            modules, child = module._modules, module._modules[name]
            assert child is not None
            if not any(modules is seen and name == other for seen, other, _ in places):
                places.append((modules, name, child))
            module = child
        return module

    attention, linears = walk(layout.attention), [walk(path) for path in layout.linears]
    heads = getattr(attention, layout.heads)
    activation = kernel_activation(part_of(layer, layout.activation)) or "unknown"
    scaling = (linears[0].out_features // heads) ** -0.5
    norms = [walk(path) for path in layout.norms]
    config = getattr(attention, "config", None)
    return _Parts(linears, common_format(linears), norms, activation, heads, scaling, config, places)


def _setting(config: Any, name: str) -> Any:
    """An attribute of a config, past transformers' own __getattribute__, which costs 2 us; None without one."""
    if torch.compiler.is_compiling():
        return getattr(config, name, None)
    try:
        return object.__getattribute__(config, name)
    except AttributeError:
        return None


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def fused_class(base: type[nn.Module], layout: Layout) -> type[nn.Module]:
    """The class that derives from QEncoderLayer and `base`, made once."""
    if base not in _classes:
        package = sys.modules.get(base.__module__.split(".")[0])
        major = getattr(package, "__version__", "5").split(".")[0]
        members = {
            "__module__": __name__,
            "__doc__": QEncoderLayer.__doc__,
            "_base": base,
            "_layout": layout,
            "_returns_tuple": int(major) < 5 if layout.returns_tuple is None else layout.returns_tuple,
            "_arguments": tuple(inspect.signature(base.forward).parameters)[3:],
        }
        _classes[base] = type(f"Q{base.__name__}", (QEncoderLayer, base), members)
    return _classes[base]


def _rebuild(base: type[nn.Module], layout: Layout) -> nn.Module:
    cls = fused_class(base, layout)
    return cls.__new__(cls)
