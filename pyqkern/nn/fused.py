"""QFusedLayer: a layer of transformers whose forward is one operator, where that gives all it must."""

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyqkern.nn.fused_parts import Family, Layout, Parts, family_of, listener
from pyqkern.ops.checks import FLOATS

_EXCHANGED = Parts("a part was exchanged, and torch.compile cannot look at it; call the model once without it")
GRADIENT = "a gradient is asked for, and the operator has none; use torch.inference_mode()"


class QFusedLayer(nn.Module):
    """What QEncoderLayer and QDecoderLayer have in common.

    `optimize` makes one out of a layer of transformers by giving it a class that derives from both: the parts, their
    names and the state_dict stay. Where the operator cannot stand for it, the layer goes its old way, through its
    QLinears. `last_call` says why the last call did, "" if it was the operator, None before the first.
    """

    is_fused = True

    _family: ClassVar[Family]
    _parts: Any = None
    last_call: str | None = None

    @classmethod
    def find(cls, layer: nn.Module) -> Any:
        """The parts of a layer of this family, or the reason why it cannot become one operator."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y, reason = self._attempt(args, kwargs)
        if not torch.compiler.is_compiling():
            self.__dict__["last_call"] = reason  # past nn.Module, whose own way takes a microsecond
            if reason is GRADIENT:
                _say_gradient()
        return super().forward(*args, **kwargs) if y is None else self._result(y)

    def _attempt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, str]:
        """What the operator gives, or None and why it was not called."""
        family = self._family
        named = {**dict(zip(family.arguments, args, strict=False)), **kwargs}
        parts = self._found()
        reason = self._read_reason(named, len(args)) or self._reason(parts, named)
        return self._operator(parts, named) if reason is None else (None, reason)

    def _operator(self, parts: Any, named: dict[str, Any]) -> tuple[Tensor | None, str]:
        raise NotImplementedError

    def _result(self, y: Tensor) -> Any:
        """As transformers' layer returns it."""
        return (y,) if self._family.returns_tuple else y

    def _found(self) -> Any:
        """The parts, found anew where one of them was exchanged."""
        parts = self._parts
        if parts is not None and parts.unchanged():
            return parts
        if torch.compiler.is_compiling():
            return _EXCHANGED
        self.__dict__["_parts"] = parts = self.find(self)
        return parts

    def unfused_reason(self) -> str | None:
        """Why no call can be the operator as the layer is now."""
        reason: str | None = self.find(self).reason
        return reason

    def _read_reason(self, named: dict[str, Any], count: int) -> str | None:
        """Why the arguments that the operator does not take need the old way: its code reads one of them."""
        family = self._family
        for name, value in named.items():
            if value is None or value is False or name in family.handled:
                continue
            if name in family.reads or not (family.takes_any or name in family.arguments):
                return f"the argument {name}"
        return "too many arguments" if count > len(family.arguments) else None

    def _reason(self, parts: Any, named: dict[str, Any]) -> str | None:
        """Why this call has to go the old way."""
        if parts.reason is not None:
            return str(parts.reason)
        if self.training:
            return "in training"
        x = named.get(self._family.arguments[0])
        if not isinstance(x, Tensor) or x.dim() != 3 or x.dtype not in FLOATS:
            return "the input is no floats [batch, length, hidden size]"
        if not x.is_cpu or not parts.linears[0]._buffers["packed"].is_cpu:
            return "not on the CPU"
        if torch.is_autocast_enabled("cpu"):
            return "under autocast"
        if (why := listener(parts)) is not None:
            return why
        if torch.is_grad_enabled():
            given = (named.get(name) for name in self._family.handled)
            tensors = [one for one in given if isinstance(one, Tensor)]
            if any(one.requires_grad for one in (*tensors, *self.parameters())):
                return GRADIENT
        if setting(parts.config, "output_attentions"):
            return "attention weights are asked for"
        if setting(parts.config, "_attn_implementation") not in (None, "eager", "sdpa"):
            return "another implementation of attention is asked for"
        return None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle and deepcopy: the class is made, not imported, and so is made again."""
        own = ("_parts", "last_call")
        state = {name: value for name, value in self.__dict__.items() if name not in own}
        kind = next(one for one in type(self).__mro__ if "find" in vars(one))
        return _rebuild, (kind, self._family.base, self._family.layout), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        parts = self.find(self)  # now, since torch.compile cannot look for them
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


# Where a config of transformers keeps what it gives under another name.
_STORED = {"_attn_implementation": "_attn_implementation_internal", "output_attentions": "_output_attentions"}


def setting(config: Any, name: str) -> Any:
    """An attribute of a config, past transformers' own __getattribute__, which costs several us; None without one."""
    if torch.compiler.is_compiling():
        return getattr(config, name, None)
    state = object.__getattribute__(config, "__dict__") if config is not None else {}
    return state[_STORED[name]] if _STORED[name] in state else getattr(config, name, None)


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def fused_class(kind: type[QFusedLayer], base: type[nn.Module], layout: Layout) -> type[nn.Module]:
    """The class that derives from `kind` and `base`, made once."""
    if base not in _classes:
        members = {"__module__": __name__, "__doc__": kind.__doc__, "_family": family_of(base, layout)}
        _classes[base] = type(f"Q{base.__name__}", (kind, base), members)
    return _classes[base]


def _rebuild(kind: type[QFusedLayer], base: type[nn.Module], layout: Layout) -> nn.Module:
    cls = fused_class(kind, base, layout)
    return cls.__new__(cls)
