"""QFusedLayer: a layer of transformers whose forward is one operator, where that gives all it must."""

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyqkern.nn.fused_parts import Family, Layout, Parts, family_of, listener, settings_reason
from pyqkern.ops.checks import FLOATS
from pyqkern.ops.registry import nobody_listens

_EXCHANGED = Parts("a part was exchanged, and torch.compile cannot look at it; call the model once without it")
GRADIENT = "a gradient is asked for, and the operator has none; use torch.inference_mode()"


class QFusedLayer(nn.Module):
    """What QEncoderLayer and QDecoderLayer have in common.

    `optimize` makes one out of a layer of transformers by giving it a class that derives from both: the parts, their
    names and the state_dict stay. Where the operator cannot stand for it, the layer goes its old way, through its
    QLinears. `last_call` says why the last call did, "" if it was the operator, None before the first.
    """

    is_fused = True

    _compiles: ClassVar[bool]  # whether torch.compile, and what is like it, may look into a call
    _said_by_false: ClassVar[frozenset[str]] = frozenset()  # arguments of which False says something, too
    _family: ClassVar[Family]
    _parts: Any = None
    last_call: str | None = None

    @classmethod
    def find(cls, layer: nn.Module) -> Any:
        """The parts of a layer of this family, or the reason why it cannot become one operator."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        quiet = nobody_listens()
        y, reason = self._attempt(args, kwargs, quiet)
        if quiet or not torch.compiler.is_compiling():
            self.__dict__["last_call"] = reason  # past nn.Module, whose own way takes a microsecond
            if reason is GRADIENT:
                _say_gradient()
        if y is None:
            return super().forward(*args, **kwargs)
        behind = self._family.behind
        return y if behind is None else (y, *behind)

    def _attempt(self, args: tuple[Any, ...], kwargs: dict[str, Any], quiet: bool) -> tuple[Tensor | None, str]:
        """What the operator gives, or None and why it was not called. quiet: what `nobody_listens` says."""
        if not (quiet or self._compiles) and torch.compiler.is_compiling():
            return None, "under torch.compile"
        named = dict(zip(self._family.arguments, args, strict=False), **kwargs)
        parts, reason = self._ready(quiet)
        reason = reason or self._read_reason(named, len(args)) or self._reason(parts, named, quiet)
        return self._operator(parts, named, quiet) if reason is None else (None, reason)

    def _operator(self, parts: Any, named: dict[str, Any], quiet: bool) -> tuple[Tensor | None, str]:
        raise NotImplementedError

    def _ready(self, quiet: bool) -> tuple[Any, str | None]:
        """The parts, and why no call can be the operator as they are now; asked anew where something has changed."""
        parts, compiling = self._parts, not quiet and torch.compiler.is_compiling()
        if not compiling and parts is not None and not self.training and parts.as_seen():
            return parts, None
        parts = self._found(parts)
        in_training = "in training" if self.training else None
        reason = parts.reason or in_training or listener(parts) or settings_reason(parts)
        if reason is None and not compiling:
            try:
                parts.see()
            except (TypeError, ValueError) as error:
                reason = f"the operator does not take it: {error}"
        return parts, reason

    def _found(self, parts: Any) -> Any:
        """The parts, found anew where one of them was exchanged."""
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
            if name in family.ignored or value is None or (value is False and name not in self._said_by_false):
                continue
            if name in family.reads or name in self._said_by_false or not family.takes_any:
                return f"the argument {name}"
        return "too many arguments" if count > len(family.arguments) else None

    def _reason(self, parts: Any, named: dict[str, Any], quiet: bool) -> str | None:
        """Why this call has to go the old way."""
        x = named.get(self._family.arguments[0])
        if not isinstance(x, Tensor) or x.dim() != 3 or x.dtype not in FLOATS:
            return "the input is no floats [batch, length, hidden size]"
        if not x.is_cpu or not parts.linears[0]._buffers["packed"].is_cpu:
            return "not on the CPU"
        if not quiet and torch.is_autocast_enabled("cpu"):
            return "under autocast"
        if torch.is_grad_enabled():
            given = (named.get(name) for name in self._family.handled)
            tensors = [one for one in given if isinstance(one, Tensor)]
            if any(one.requires_grad for one in (*tensors, *self.parameters())):
                return GRADIENT
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
