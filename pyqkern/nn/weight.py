"""DequantizedWeight, which `weight` of a quantized layer is: a copy, in which an edit in place would be lost."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_HARMLESS = frozenset({"requires_grad_", "share_memory_", "rename_", "detach_"})  # what they change belongs to the copy
_WAY = (
    "weight of a quantized layer is a dequantized copy, in which {} would be lost; assign a whole one, "
    "layer.weight = values, which quantizes it, edit the weight before replace_linear, or edit layer.weight.clone()"
)


class DequantizedWeight(Tensor):
    """Values like those of any tensor: what is computed from it is a plain tensor. Writing to it, or to a view of it,
    raises RuntimeError, in nn.init as elsewhere.

    form, buffers: how the layer that it was read from is quantized, and its buffers, which a layer of the same form
    takes over when this is assigned to its weight. nn.Parameter(weight) is its maker's, and can be written to.
    """

    form: tuple[Any, ...] | None = None
    buffers: dict[str, Tensor | None]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        guarded = [t for t in _tensors((*args, *kwargs.values())) if isinstance(t, cls) and not _is_parameter(t)]
        if guarded and _writes(func, args, kwargs, guarded):
            raise RuntimeError(_WAY.format(f"what {getattr(func, '__name__', 'an operation')} writes"))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            if func is Tensor.numpy:
                result.setflags(write=not guarded)
            if isinstance(result, (Tensor, tuple, list)) and guarded:
                return _with_views(result, guarded)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return _unguarded(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unguarded(self).__reduce_ex__(protocol)


def read_from(values: Tensor, form: tuple[Any, ...], buffers: dict[str, Tensor | None]) -> Tensor:
    """The values as a DequantizedWeight; other tensors than plain ones, fake ones among them, as they are."""
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if traced or type(values) is not Tensor:
        return values
    weight = values.as_subclass(DequantizedWeight)
    weight.form, weight.buffers = form, buffers
    return weight


def _is_parameter(tensor: Tensor) -> bool:
    return "_is_param" in tensor.__dict__


def _unguarded(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, tensor.requires_grad) if _is_parameter(tensor) else copy


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], guarded: Sequence[Tensor]) -> bool:
    """Whether it writes to one of them: its first argument, or those named `out`."""
    name = getattr(func, "__name__", "")
    targets = list(_tensors([kwargs.get("out")]))
    in_place = name.endswith("_") and not name.endswith("__") and name not in _HARMLESS
    assigned = name == "__setitem__" or func == Tensor.data.__set__  # type: ignore[attr-defined]
    if in_place or assigned or name.startswith("__i") or kwargs.get("inplace"):
        targets += _tensors(args[:1] or list(kwargs.values())[:1])
    return any(target is one for target in targets for one in guarded)


def _with_views(result: Any, guarded: Sequence[Tensor]) -> Any:
    """The result, in which what shares memory with one of them is guarded too."""
    if isinstance(result, (tuple, list)):
        parts = [_with_views(part, guarded) for part in result]
        return type(result)(parts) if type(result) in (tuple, list) else result
    if not isinstance(result, Tensor) or isinstance(result, DequantizedWeight):
        return result
    addresses = {tensor.untyped_storage().data_ptr() for tensor in guarded}
    if result.layout is torch.strided and result.numel() and result.untyped_storage().data_ptr() in addresses:
        return result.as_subclass(DequantizedWeight)
    return result
