"""QEncoderLayer: an encoder layer of transformers whose forward is one operator."""

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyqkern.nn.encoder_parts import Family, Layout, Parts, dtypes_reason, family_of, find_parts, listener
from pyqkern.ops.checks import FLOATS
from pyqkern.ops.encoder import MAX_LENGTH, encoder_layer

_EXCHANGED = Parts("a part was exchanged, and torch.compile cannot look at it; call the model once without it")
GRADIENT = "a gradient is asked for, and the operator has none; use torch.inference_mode()"


class QEncoderLayer(nn.Module):
    """An encoder layer whose forward is one operator, `torch.ops.pyqkern.encoder_layer`, where that gives all it must.

    `optimize` makes one out of a layer of transformers by giving it a class that derives from both: the parts, their
    names and the state_dict stay. The layer goes its old way, through its QLinears, in training, where a gradient is
    asked for, under autocast, where attention weights are asked for, off the CPU, with a cache or a head mask, while a
    hook listens to one of its parts, and where a part is not transformers' own any more. `last_call` says why the last
    call did, "" if it was the operator, None before the first.

    Where the mask tells padding from tokens, the padding's outputs are zeros.
    """

    is_fused = True

    _family: ClassVar[Family]
    _parts: Parts | None = None
    last_call: str | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        family = self._family
        named = {**dict(zip(family.arguments, args, strict=False)), **kwargs}
        x, mask = (named.pop(name, None) for name in family.arguments[:2])
        position_bias = named.pop(family.layout.position_bias, None)
        parts = self._found()
        reason = self._read_reason(named, len(args)) or self._reason(parts, x, position_bias)
        y = None
        if reason is None:
            try:
                y = self._operator(parts, x, mask, position_bias)
            except (TypeError, ValueError):  # said afterwards, since asking takes 2 us
                reason = dtypes_reason(*parts.tensors())
                if reason is None:
                    raise
        if not torch.compiler.is_compiling():
            self.__dict__["last_call"] = reason or ""  # past nn.Module, whose own way takes a microsecond
            if reason is GRADIENT:
                _say_gradient()
        if y is None:
            return super().forward(*args, **kwargs)
        return (y,) if family.returns_tuple else y

    def _found(self) -> Parts:
        """The parts, found anew where one of them was exchanged."""
        parts = self._parts
        if parts is not None and parts.unchanged():
            return parts
        if torch.compiler.is_compiling():
            return _EXCHANGED
        self.__dict__["_parts"] = parts = find_parts(self, self._family)
        return parts

    def unfused_reason(self) -> str | None:
        """Why no call can be the operator as the layer is now."""
        return find_parts(self, self._family).reason

    def _read_reason(self, named: dict[str, Any], count: int) -> str | None:
        """Why the arguments beside input, mask and position bias need the old way: its code reads one of them."""
        family = self._family
        for name, value in named.items():
            if value is None or value is False:
                continue
            if name in family.reads or not (family.takes_any or name in family.arguments):
                return f"the argument {name}"
        return "too many arguments" if count > len(family.arguments) else None

    def _reason(self, parts: Parts, x: Any, position_bias: Tensor | None) -> str | None:
        """Why this call has to go the old way."""
        if parts.reason is not None:
            return parts.reason
        if self.training:
            return "in training"
        if not isinstance(x, Tensor) or x.dim() != 3 or x.dtype not in FLOATS:
            return "the input is no floats [batch, length, hidden size]"
        if x.shape[1] > MAX_LENGTH:
            return f"longer than {MAX_LENGTH} tokens"
        if not x.is_cpu or not parts.linears[0]._buffers["packed"].is_cpu:
            return "not on the CPU"
        if torch.is_autocast_enabled("cpu"):
            return "under autocast"
        if (why := listener(parts)) is not None:
            return why
        if torch.is_grad_enabled():
            given = (x,) if position_bias is None else (x, position_bias)
            if any(t.requires_grad for t in (*given, *self.parameters())):
                return GRADIENT
        if _setting(parts.config, "output_attentions"):
            return "attention weights are asked for"
        if _setting(parts.config, "_attn_implementation") not in (None, "eager", "sdpa"):
            return "another implementation of attention is asked for"
        return dtypes_reason(*parts.tensors()) if torch.compiler.is_compiling() else None

    def _operator(self, parts: Parts, x: Tensor, mask: Tensor | None, position_bias: Tensor | None) -> Tensor:
        linears, norms, form = parts.linears, parts.norms, parts.format
        weights = [linear._buffers["packed"] for linear in linears]  # read directly: see Int8Linear._linear
        scales = [linear._scales() for linear in linears]
        nested = [linear._buffers[name] for linear in linears for name in form.nested]
        vectors, biases = parts.tensors()
        eps = [norm.eps for norm in norms]
        features = [linears[0].out_features, linears[4].out_features]
        return encoder_layer(
            x, mask, weights, scales, biases, vectors, parts.heads, parts.scaling, eps, parts.activation,
            form.symmetric, form.quant_type, form.blocksize, features, nested, position_bias, parts.factors(),
        )  # fmt: skip

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle and deepcopy: the class is made, not imported, and so is made again."""
        own = ("_parts", "last_call")
        state = {name: value for name, value in self.__dict__.items() if name not in own}
        return _rebuild, (self._family.base, self._family.layout), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        parts = find_parts(self, self._family)  # now, since torch.compile cannot look for them
        if parts.reason is None:
            self.__dict__["_parts"] = parts


_said_gradient = False


def _say_gradient() -> None:
    """Once: the model is right but slow, and nothing else would tell."""
    global _said_gradient
    if not _said_gradient:
        _said_gradient = True
        warnings.warn(
            "an optimized model went its old way, layer by layer: gradients are enabled and its parameters ask for "
            "them. Call it under torch.inference_mode() or torch.no_grad(), or model.requires_grad_(False)",
            stacklevel=2,
        )


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
        members = {"__module__": __name__, "__doc__": QEncoderLayer.__doc__, "_family": family_of(base, layout)}
        _classes[base] = type(f"Q{base.__name__}", (QEncoderLayer, base), members)
    return _classes[base]


def _rebuild(base: type[nn.Module], layout: Layout) -> nn.Module:
    cls = fused_class(base, layout)
    return cls.__new__(cls)
