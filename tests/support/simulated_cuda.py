"""A CUDA device that is not there: tensors that say they are on it, and compute on the CPU.

What stands between a user's call and the Triton kernels (dispatch, packing, moving modules, checks of devices) runs on
it as on a GPU, and the kernels themselves in Triton's interpreter. What no test can see here is the GPU's own: that
memory is really elsewhere, streams, graphs, speed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

UNREADABLE = 1 << 60  # added to addresses: the CPU's kernels would crash on them, as they would on a GPU's
BETWEEN_DEVICES = ("aten::copy_", "aten::_to_copy")


class SimulatedTensor(Tensor):
    """A tensor on "cuda:0" whose values are those of `held`, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> SimulatedTensor:
        options = {"dtype": held.dtype, "strides": held.stride(), "storage_offset": held.storage_offset()}
        tensor = Tensor._make_wrapper_subclass(cls, held.shape, device=torch.device("cuda:0"), **options)
        tensor.held = held
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(operator, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.held.data_ptr() + UNREADABLE

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    # torch's own look for the guard of the device, which a build for CPUs does not have.
    def __getitem__(self, index: Any) -> Tensor:
        return SimulatedTensor(self.held[tree_map(held, index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.held[tree_map(held, index)] = held(value)

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return SimulatedTensor(self.held.new_tensor(data, **options))

    def contiguous(self) -> Tensor:
        return SimulatedTensor(self.held.contiguous())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            new = SimulatedTensor(self.held.detach().clone())
            memo[id(self)] = nn.Parameter(new, self.requires_grad) if isinstance(self, nn.Parameter) else new
        return memo[id(self)]

    def __int__(self) -> int:
        return int(self.held)

    def __float__(self) -> float:
        return float(self.held)

    def nonzero(self) -> Tensor:
        return SimulatedTensor(self.held.nonzero())

    def copy_(self, other: Tensor, non_blocking: bool = False) -> Tensor:
        self.held.copy_(held(other))
        return self

    def __repr__(self, **_: Any) -> str:
        return f"on cuda:0: {self.held!r}"


def held(value: Any) -> Any:
    return value.held if isinstance(value, SimulatedTensor) else value


def _run(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [isinstance(tensor, SimulatedTensor) for tensor in tensors]
    if any(there) and operator.namespace == "pyqkern":
        with _Device():
            return operator.redispatch(DispatchKeySet(DispatchKey.CUDA), *args, **kwargs)
    mixed = any(there) and any(not on and t.dim() for t, on in zip(tensors, there, strict=True))
    if mixed and operator._schema.name not in BETWEEN_DEVICES:
        raise RuntimeError(f"Expected all tensors to be on the same device: {operator._schema.name}")
    device = kwargs.get("device")
    on_cuda = any(there) if device is None else torch.device(device).type == "cuda"
    if device is not None and on_cuda:
        kwargs = kwargs | {"device": torch.device("cpu")}
    result = operator(*tree_map(held, args), **tree_map(held, kwargs))
    if operator._schema.is_mutable:
        return args[0] if isinstance(result, Tensor) else result
    return tree_map(lambda t: SimulatedTensor(t) if isinstance(t, Tensor) else t, result) if on_cuda else result


class _Device(TorchDispatchMode):
    """Sees to what names the device without having a tensor on it."""

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(operator, args, kwargs or {})


@contextlib.contextmanager
def simulated_cuda() -> Iterator[None]:
    """Inside it, "cuda" is a device; an H100, but for its four multiprocessors."""
    properties = SimpleNamespace(multi_processor_count=4, L2_cache_size=1 << 20)
    there: dict[str, Callable[..., object]] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device": lambda _: contextlib.nullcontext(),
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "simulated",
        "get_device_properties": lambda *_: properties,
    }
    with contextlib.ExitStack() as stack:
        for name, function in there.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        # Modules move by new parameters: a wrapper cannot be put into an old one.
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(_Device())
        yield
