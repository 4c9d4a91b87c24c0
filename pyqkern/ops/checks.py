"""Checks that several operators make, and how a tensor is cut into channels."""

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from pyqkern.backends import QRANGE, Sizes
from pyqkern.schemes import check_type

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INT = (int, torch.SymInt, Integral)  # an int of a shape under torch.compile, and of numpy, too


def check_float(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float32, bfloat16 or float16, got {short(dtype)}; convert it first, e.g. to float32"
        )


def check_ids(ids: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """ids of an embedding that is on `device` and returns `dtype`."""
    check_float("dtype", dtype)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids must be int64 or int32, got {ids.dtype}")
    if ids.device != device:
        raise ValueError(f"ids must be on {device}, where the embedding is, got {ids.device}")


def checked_rows(ids: Tensor, n: int) -> Tensor:
    """ids, flat and int64, checked to be rows of the embedding; not on CUDA, whose own indexing checks that."""
    if not ids.is_cuda and ids.numel():
        least, greatest = (int(end) for end in ids.aminmax())
        if least < 0 or greatest >= n:
            raise IndexError(f"ids must be within [0, {n}), got {least if least < 0 else greatest}")
    return ids.reshape(-1).long().contiguous()


def check_qtype(name: str, dtype: torch.dtype, bits: int = 8) -> None:
    check_type("bits", bits, INT, "an int")
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    if dtype not in QRANGE:
        raise TypeError(f"{name} must be torch.int8 or torch.uint8, got {short(dtype)}")


def check_shape(shape: Sequence[int]) -> None:
    check_type("shape", shape, Sequence, "several ints")
    for size in shape:
        check_type("shape", size, INT, "several ints")
        if size < 0:
            raise ValueError(f"shape must not be negative, got {tuple(shape)}")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cut(
    shape: Sequence[int], axis: Sequence[int] | None, group_size: int | None
) -> tuple[Sequence[int], tuple[int, ...]]:
    """(view, kept): the shape to look at the tensor in, and which of its dimensions keep their own scale, in order."""
    if axis is None and group_size is None:
        return shape, ()
    ndim = len(shape)
    axes = [] if axis is None else [_dimension(a, ndim) for a in axis]
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis must not name a dimension twice, got {tuple(axis or ())}")
    if group_size is None:
        return shape, tuple(axes)
    if len(axes) > 1:
        raise ValueError(f"axis must be one dimension when group_size is given, got {tuple(axes)}")
    along = axes[0] if axes else _dimension(-1, ndim)
    size = shape[along]
    if group_size < 1 or size % group_size:
        ways = ", ".join(str(d) for d in range(min(size, 512), 1, -1) if size % d == 0) or "1"
        raise ValueError(f"group_size must divide x.shape[{along}]={size}, got {group_size}; use one of {ways}")
    view = (*shape[:along], size // group_size, group_size, *shape[along + 1 :])
    return view, tuple(d for d in range(ndim + 1) if d != along + 1)


def _dimension(axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis must be within [-{ndim}, {ndim - 1}] for {ndim} dimensions, got {axis}")
    return axis % ndim


def to_channels(x: Tensor, view: Sequence[int], kept: tuple[int, ...]) -> tuple[Tensor, Sizes, tuple[int, ...] | None]:
    """x as a contiguous tensor that `sizes` = (outer, channels, inner) describes, and the permutation that it took.

    Kept dimensions that lie beside each other need no permutation, and a contiguous x then no copy.
    """
    if not kept:
        return x.contiguous(), (1, 1, x.numel()), None
    first, last = kept[0], kept[-1] + 1
    if kept == tuple(range(first, last)):
        sizes = (math.prod(view[:first]), math.prod(view[first:last]), math.prod(view[last:]))
        return x.contiguous(), sizes, None
    order = kept + tuple(d for d in range(len(view)) if d not in kept)
    x = x.reshape(view).permute(order).contiguous()
    channels = math.prod(x.shape[: len(kept)])
    return x, (1, channels, math.prod(x.shape[len(kept) :])), order


def from_channels(y: Tensor, shape: Sequence[int], order: tuple[int, ...] | None) -> Tensor:
    """Undoes `to_channels` for a result of the same number of elements."""
    if order is None:
        return y
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return y.permute(inverse).reshape(shape)
