"""The operators of optimizers: optimizer_step and square_sum."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyqkern.backends import OPTIMIZERS, STATE_BLOCK, Kernels, StepNumbers
from pyqkern.ops.checks import check_float, short
from pyqkern.ops.registry import operator


def _check_square_sum(tensors: Sequence[Tensor], scale: float) -> None:
    for tensor in tensors:
        check_float("tensors", tensor.dtype)
        if tensor.device != tensors[0].device:
            raise ValueError(f"tensors must be on one device, got {tensors[0].device} and {tensor.device}")


def _square_sum_fake(tensors: Sequence[Tensor], scale: float) -> Tensor:
    _check_square_sum(tensors, scale)
    return tensors[0].new_empty((), dtype=torch.float64)


@operator("square_sum(Tensor[] tensors, float scale) -> Tensor", _square_sum_fake)
def _square_sum(kernels: Kernels, tensors: Sequence[Tensor], scale: float) -> Tensor:
    _check_square_sum(tensors, scale)
    filled = [tensor.detach().contiguous() for tensor in tensors if tensor.numel()]
    return kernels.square_sum(filled, scale) if filled else tensors[0].new_zeros((), dtype=torch.float64)


def _check_step(
    optimizer: str,
    numbers: Sequence[float],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor],
) -> None:
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    if len(numbers) != len(StepNumbers._fields) or not all(map(math.isfinite, numbers)):
        raise ValueError(f"numbers must be {len(StepNumbers._fields)} finite ones, got {list(numbers)}")
    count, has_codes = len(params), bool(absmax1)
    second = count if optimizer == "adam" else 0
    lists = {"grads": grads, "state1": state1, "state2": state2, "absmax1": absmax1, "absmax2": absmax2}
    wanted = dict.fromkeys(("grads", "state1"), count) | {"state2": second}
    wanted |= {"absmax1": count * has_codes, "absmax2": second * has_codes}
    for name, given in lists.items():
        if len(given) != wanted[name]:
            raise ValueError(f"{name} must be {wanted[name]} tensors for {count} parameters, got {len(given)}")
    dtype = torch.uint8 if has_codes else torch.float32
    for i, p in enumerate(params):
        check_float("params", p.dtype)
        check_float("grads", grads[i].dtype)
        _check("grads", grads[i], grads[i].dtype, p.shape, p)
        blocks = (-(-p.numel() // STATE_BLOCK),)
        for name, states, kind, shape in (
            ("state1", state1, dtype, p.shape),
            ("state2", state2, dtype, p.shape),
            ("absmax1", absmax1, torch.float32, blocks),
            ("absmax2", absmax2, torch.float32, blocks),
        ):
            if states:
                _check(name, states[i], kind, shape, p)
                if not states[i].is_contiguous():
                    raise ValueError(f"{name} must be contiguous")


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int], p: Tensor) -> None:
    if tensor.dtype is not dtype:
        raise TypeError(f"{name} must be {short(dtype)}, got {short(tensor.dtype)}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must be of shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != p.device:
        raise ValueError(f"{name} must be on {p.device}, where its parameter is, got {tensor.device}")


@operator(
    "optimizer_step(str optimizer, float[] numbers, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state1, "
    "Tensor(c!)[] state2, Tensor(d!)[] absmax1, Tensor(e!)[] absmax2) -> ()",
    _check_step,
)
def _optimizer_step(
    kernels: Kernels,
    optimizer: str,
    numbers: Sequence[float],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor],
) -> None:
    _check_step(optimizer, numbers, params, grads, state1, state2, absmax1, absmax2)
    at = [i for i, p in enumerate(params) if p.numel()]
    if not at:
        return
    targets = [params[i].detach() for i in at]
    values = [p.contiguous() for p in targets]
    states = [[t[i] for i in at] if t else [] for t in (state1, state2, absmax1, absmax2)]
    gradients = [grads[i].detach().contiguous() for i in at]
    kernels.optimizer_step(optimizer, StepNumbers(*numbers), values, gradients, *states)
    for target, value in zip(targets, values, strict=True):
        if value is not target and value.data_ptr() != target.data_ptr():
            target.copy_(value)
