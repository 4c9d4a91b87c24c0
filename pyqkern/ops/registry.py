"""The operators torch.ops.pyqkern.*: how they are defined, and which backend runs them.

This is the one place that chooses the device. An operator in the other modules of `pyqkern.ops` checks its arguments,
gives the backend contiguous tensors and shapes the result. Sizes of zero are answered there and reach no backend.
`Library.impl` is used because it costs the least per call of the ways that torch.compile, torch.export and autocast
understand.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyqkern.backends import Kernels, cpu, cuda, reference
from pyqkern.ops.checks import FLOATS

library = torch.library.Library("pyqkern", "DEF")

# A device without kernels of its own has the plain-torch ones. So has ROCm, whose devices are called "cuda" too.
BACKENDS: dict[str, Kernels] = {"cpu": cpu, "cuda": cuda if torch.version.hip is None else reference}
_KEYS = {"CPU": "cpu", "CUDA": "cuda", "XPU": "xpu", "MPS": "mps", "PrivateUse1": "privateuseone"}
_AUTOCAST = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}


def kernels_of(device: torch.device) -> Kernels:
    """The backend for a device. Raises RuntimeError for "mps", which has no float64 for the plain-torch kernels."""
    if device.type == "mps":
        raise RuntimeError("quantized layers do not run on mps, got a tensor there; keep the model on the CPU")
    return BACKENDS.get(device.type, reference)


def operator(
    schema: str,
    fake: Callable[..., Any],
    *,
    arguments: Callable[..., tuple[Any, ...]] | None = None,
    linear: bool = False,
    rowwise: bool = False,
    keys: tuple[str, ...] = tuple(_KEYS),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Defines `schema`, implemented by the decorated function of (kernels, *arguments), and its fake implementation.

    arguments: makes those of the function and of the fake implementation out of the schema's, which they are otherwise.
    linear: the first argument is taken in the autocast dtype, as nn.Linear does. rowwise: its rows do not depend on one
    another, so that vmap over it is one call. keys: the devices that have it.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def implementation(device: torch.device, *given: Any) -> Any:
            given = tuple(map(_plain, given))
            return function(kernels_of(device), *(arguments(*given) if arguments else given))

        def meta(*given: Any) -> Any:
            return fake(*(arguments(*given) if arguments else given))

        name = schema.split("(")[0]
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in keys:
            library.impl(name, partial(implementation, torch.device(_KEYS[key])), key)
        torch.library.register_fake(f"pyqkern::{name}", meta, lib=library)
        for device_type, dispatch_key in _AUTOCAST.items() if linear else ():
            library.impl(name, partial(_autocast, device_type, dispatch_key, name), dispatch_key.name)
        if rowwise:
            torch.library.register_vmap(f"pyqkern::{name}", partial(_vmap_rows, name), lib=library)
        return function

    return register


_PLAIN = (Tensor, torch.nn.Parameter)


def _plain(given: Any) -> Any:
    """A tensor, or a list of them, as C++ takes it: no subclass. One without memory does not come so far."""
    if isinstance(given, Tensor) and type(given) not in _PLAIN:
        with torch._C.DisableTorchFunctionSubclass():
            return given.as_subclass(Tensor)
    return [_plain(each) for each in given] if isinstance(given, list) else given


def _autocast(device_type: str, key: Any, name: str, x: Tensor, *rest: Any) -> Tensor:
    """As nn.Linear under autocast: x in the autocast dtype, and so the result. Other arguments stay as they are."""
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
        if x.dtype in FLOATS:
            x = x.to(torch.get_autocast_dtype(device_type))
        return getattr(torch.ops.pyqkern, name).default(x, *rest)


def in_autocast(x: Tensor) -> Tensor:
    """x in the autocast dtype, where autocast is on for its device."""
    device_type = x.device.type
    return x.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else x


def _vmap_rows(name: str, info: Any, in_dims: tuple[int | None, ...], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
    """vmap over rows is more rows; over anything else, one call after the other."""
    call = getattr(torch.ops.pyqkern, name).default
    if in_dims[0] is not None and not any(dim is not None for dim in in_dims[1:]):
        return call(x.movedim(in_dims[0], 0), *rest), 0
    given = list(zip((x, *rest), in_dims, strict=True))
    each = [[a if dim is None else a.select(dim, i) for a, dim in given] for i in range(info.batch_size)]
    return torch.stack([call(*one) for one in each]), 0


# ---- the short way


try:
    from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
    from torch._C._autograd import _profiler_enabled
    from torch._C._functorch import peek_interpreter_stack

    _can_ask = True
except ImportError:  # none of them is public
    _can_ask = False


def nobody_listens() -> bool:
    """Whether the dispatcher may be passed by: no torch.compile or export, no tracing, no transform of torch.func, no
    function or dispatch mode, no autocast, no profiler.
    """
    return (
        _can_ask
        and not torch.compiler.is_compiling()
        and not _len_torch_dispatch_stack()
        and not _len_torch_function_stack()
        and _get_tracing_state() is None
        and peek_interpreter_stack() is None
        and not torch.is_autocast_enabled("cpu")
        and not _profiler_enabled()
    )


def short_way(name: str, operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of the same arguments as `operator` that calls the C++ kernel of that name without the dispatcher.

    The dispatcher costs 3 us of the 7 that a one-token linear takes. The kernel checks that its arguments are plain CPU
    tensors that fit; what it does not take goes to the operator, which says what is wrong.
    """
    kernel = cpu.SHORT_WAY.get(name)
    if kernel is None:
        return operator

    def call(x: Tensor, *arguments: Any) -> Tensor:
        if nobody_listens() and type(x) in _PLAIN:
            try:
                y = kernel(x, *arguments)
            except cpu.UNFIT:
                y = None
            if y is not None:
                return y
        return operator(x, *arguments)

    return call
