"""The operators torch.ops.pyqkern.*: where they are defined, and which kernels run them.

This is the one place that chooses the device. An operator in the other modules of `pyqkern.ops` checks its arguments,
gives the kernels contiguous tensors and shapes the result. Sizes of zero are answered there and reach no kernel.
`Library.impl` is used because it costs the least per call of the ways that torch.compile, torch.export and autocast
understand.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyqkern.backends import cpu, cuda, reference

_lib = torch.library.Library("pyqkern", "DEF")
_KERNELS: dict[str, Any] = {"cpu": cpu, "cuda": cuda}


def _kernels_of(device: torch.device) -> Any:
    """The kernels for a device; a device without any, such as "meta", has the plain-torch ones."""
    return _KERNELS.get(device.type, reference)


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Defines `schema`, implemented by the decorated function of (kernels, *arguments), and its fake implementation."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.split("(")[0]
        _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _lib.impl(name, partial(function, cpu), "CPU")
        _lib.impl(name, partial(function, cuda), "CUDA")
        for key in ("XPU", "MPS", "PrivateUse1"):
            _lib.impl(name, partial(function, reference), key)
        torch.library.register_fake(f"pyqkern::{name}", fake, lib=_lib)
        return function

    return register


def direct(x: Tensor) -> bool:
    """Whether a kernel may be called without the dispatcher, which costs 3 us of the 7 that a one-token linear takes.

    So where x is a plain CPU tensor, and nobody listens to operators: no torch.compile or export, no tracing, vmap or
    dispatch mode, no autocast, no profiler. What the operator does is the same either way.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) in _PLAIN
        and x.is_cpu
        and x.layout is torch.strided
        and not x.is_neg()
        and not x._is_zerotensor()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._autograd._profiler_enabled()
    )


_PLAIN = (Tensor, torch.nn.Parameter)
