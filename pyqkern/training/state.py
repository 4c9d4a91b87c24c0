"""The state of 8-bit optimizers as bitsandbytes keeps it, and its checks.

Of each parameter: "step", an int; "state1" and, for Adam, "state2": the moments, in the parameter's shape, uint8 codes
or fp32; and where they are codes "absmax1" and "absmax2", fp32 [ceil(numel / 256)], the greatest magnitude of each 256
elements of the flattened moment, and "qmap1" and "qmap2", fp32 [256], what the codes stand for, in units of absmax. In
a state_dict the tensors stand in a dict of their own under WRAPPED, so that FSDP does not gather them.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pyqkern.backends import STATE_BLOCK
from pyqkern.backends.reference.optimizer import dynamic_map
from pyqkern.ops.checks import short

WRAPPED = "__bnb_optimizer_quant_state__"
_MAP_ERROR = 1e-6  # relative: maps of other machines differ in their last bits


@functools.cache
def qmap(moment: int, device: torch.device) -> Tensor:
    """The map of the first or second moment, one tensor for all parameters of a device."""
    return dynamic_map(signed=moment == 1).to(device)


def new_state(p: Tensor, moments: int, has_codes: bool) -> dict[str, Any]:
    """Of a parameter that was not stepped yet: all zero."""
    state: dict[str, Any] = {"step": 0}
    dtype = torch.uint8 if has_codes else torch.float32
    for i in range(1, moments + 1):
        state[f"state{i}"] = torch.zeros(p.shape, dtype=dtype, device=p.device)
        if has_codes:
            blocks = -(-p.numel() // STATE_BLOCK)
            state[f"qmap{i}"] = qmap(i, p.device)
            state[f"absmax{i}"] = torch.zeros(blocks, dtype=torch.float32, device=p.device)
    return state


def wrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of one parameter as it stands in a state_dict."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in state.items() if name not in tensors}
    return rest | {WRAPPED: tensors} if tensors else rest


def loaded(saved: Mapping[str, Any], p: Tensor, moments: int, where: str) -> dict[str, Any]:
    """The checked state of one parameter out of a state_dict's, wrapped or not; copies, on the parameter's device.

    Raises ValueError or TypeError where it is not the state of such a parameter and optimizer.
    """
    given = {**saved, **saved.get(WRAPPED, {})}
    step = given.get("step")
    if isinstance(step, Tensor) and step.numel() == 1:
        step = step.item()
    if not isinstance(step, (int, float)) or isinstance(step, bool) or step != int(step) or step < 0:
        raise ValueError(f"{where}: step must be a whole number, got {step!r}")
    state: dict[str, Any] = {"step": int(step)}
    for name, shape, dtypes in _wanted(given, p, moments):
        tensor = given.get(name)
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{where}: {name} is missing; the state must be of this optimizer or bitsandbytes' own")
        if tensor.shape != shape:
            raise ValueError(f"{where}: {name} must be of shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype not in dtypes:
            raise TypeError(f"{where}: {name} must be {' or '.join(map(short, dtypes))}, got {short(tensor.dtype)}")
        if name.startswith("absmax") and not bool(((tensor >= 0) & tensor.isfinite()).all()):
            raise ValueError(f"{where}: {name} must be finite and not negative")
        state[name] = tensor.to(p.device).contiguous().clone()
    if f"state{moments + 1}" in given:
        raise ValueError(f"{where}: state{moments + 1} must not be there: this optimizer has {moments} moment")
    for i in range(1, moments + 1):
        if f"qmap{i}" in state:
            ours = qmap(i, p.device)
            if not torch.allclose(state[f"qmap{i}"], ours, rtol=_MAP_ERROR, atol=0):
                raise ValueError(f"{where}: qmap{i} must be bitsandbytes' dynamic map, got another one")
            state[f"qmap{i}"] = ours
    return state


def _wanted(
    given: Mapping[str, Any], p: Tensor, moments: int
) -> Iterator[tuple[str, tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Names, shapes and dtypes of the tensors that a state must have: one dtype for all of its moments."""
    first = given.get("state1")
    has_codes = isinstance(first, Tensor) and first.dtype is torch.uint8
    dtypes = (torch.uint8,) if has_codes else (torch.float32,)
    for i in range(1, moments + 1):
        yield f"state{i}", tuple(p.shape), dtypes if i > 1 else (torch.uint8, torch.float32)
        if has_codes:
            yield f"absmax{i}", (-(-p.numel() // STATE_BLOCK),), (torch.float32,)
            yield f"qmap{i}", (256,), (torch.float32,)
