"""transformers' caches of keys and values, as the operator of a decoder layer reads and writes them: in place.

`open_rows` says where in a cache a layer's new rows go, or why it cannot be written in place; `Rows.close` tells the
cache of them. Known are DynamicCache and StaticCache, and of their layers DynamicLayer, DynamicSlidingWindowLayer and
StaticLayer, all of them very transformers' own.

A DynamicLayer holds exactly what it has seen, and its own update copies all of it for every token. Here its keys and
values are views into a `Buffer` with room behind them. A view is continued in place only where it ends where the
buffer's rows end, so that nobody else has written behind it: views that were cropped, or that another copy of the cache
has continued, are copied to a new buffer first, and so is whatever else was put into the cache.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyqkern.nn.fused_parts import is_of_transformers

_BUFFER = "_pyqkern_buffer"  # attribute of a DynamicLayer
_SPARE = 64  # rows of a buffer that has to grow, beside half of what it holds


class Buffer:
    """Keys and values [batch, heads, capacity, size], of which the rows before `end` are filled."""

    __slots__ = ("end", "keys", "values")

    def __init__(self, keys: Tensor, values: Tensor, end: int) -> None:
        self.keys, self.values, self.end = keys, values, end

    def __reduce__(self) -> Any:
        """A copy of a cache has none: its views are copied to a buffer of their own when they are continued."""
        return type(None), ()

    def start_of(self, keys: Tensor, values: Tensor) -> int | None:
        """The first row of these views; None where they are not of this buffer, or do not end where it does."""
        start = _row_of(keys, self.keys)
        if start is None or start + keys.shape[2] != self.end or _row_of(values, self.values) != start:
            return None
        if self.keys.is_inference() and not torch.is_inference_mode_enabled():
            return None
        return start


def _row_of(view: Tensor, whole: Tensor) -> int | None:
    """The row of `whole` in which a view of its rows begins; None where it is no such view."""
    row, offset = whole.stride(2) * whole.element_size(), view.data_ptr() - whole.data_ptr()
    alike = view.stride() == whole.stride() and view.shape[:2] == whole.shape[:2] and view.dtype is whole.dtype
    return offset // row if alike and row and offset >= 0 and offset % row == 0 else None


@dataclass
class Rows:
    """Where the operator reads and writes: keys, values [batch, heads, capacity, size], and how many rows come before.

    seen: how many keys transformers' own attention sees, past and the new ones, or the capacity of a static cache.
    """

    keys: Tensor
    values: Tensor
    past: int
    seen: int
    layer: Any = None
    buffer: Buffer | None = None
    start: int = 0  # the first row in the buffer that the layer keeps

    def close(self, length: int) -> None:
        """The operator has written `length` rows: the layer has them now."""
        layer, buffer = self.layer, self.buffer
        if layer is None:
            return
        if buffer is None:  # a StaticLayer
            if _counts(layer):
                layer.cumulative_length.add_(length)
            return
        if not layer.is_initialized:
            layer.dtype, layer.device, layer.is_initialized = buffer.keys.dtype, buffer.keys.device, True
            if "_sliding_window_tensor" in vars(layer):
                layer._sliding_window_tensor = layer._sliding_window_tensor.to(layer.device)
        buffer.end += length
        start, end = self.start, buffer.end
        if layer.is_sliding:
            layer.cumulative_length += length
            if not vars(layer).get("record_past", False):
                start = max(start, end - layer.sliding_window + 1)
        layer.keys, layer.values = buffer.keys[:, :, start:end], buffer.values[:, :, start:end]
        setattr(layer, _BUFFER, buffer)


@dataclass(frozen=True)
class Shape:
    """Of the rows that a layer adds."""

    batch: int
    heads: int
    length: int
    size: int
    dtype: torch.dtype


def without_cache(shape: Shape) -> Rows:
    """Rows that nobody keeps."""
    keys, values = (_empty(shape, shape.length) for _ in range(2))
    return Rows(keys, values, 0, shape.length)


def _empty(shape: Shape, capacity: int) -> Tensor:
    return torch.zeros(shape.batch, shape.heads, capacity, shape.size, dtype=shape.dtype, device="cpu")


def open_rows(cache: Any, index: int, shape: Shape, position: Any = None) -> Rows | str:
    """Where the rows of the layer `index` go, or why this cache has to be updated by itself.

    position: the argument cache_position of transformers 4, whose StaticLayers do not know how much they hold.
    """
    layer = _layer_of(cache, index)
    if isinstance(layer, str):
        return layer
    if type(layer).__name__ == "StaticLayer":
        return _open_static(layer, shape, position)
    return _open_dynamic(layer, shape)


_CACHES = ("DynamicCache", "StaticCache")
_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer")


def _layer_of(cache: Any, index: int) -> Any:
    """The layer of a cache that is known, or why it is not."""
    if not _is_known(cache, _CACHES):
        return f"the cache is no class that is known: {type(cache).__name__}"
    if cache.offloading:
        return "the cache is offloaded"
    new = cache.layer_class_to_replicate
    while len(cache.layers) <= index:
        if new is None or new.__name__ not in _LAYERS or not is_of_transformers(new):
            return f"the cache has {len(cache.layers)} layers"
        cache.layers.append(new())
    layer = cache.layers[index]
    return (
        layer
        if _is_known(layer, _LAYERS)
        else f"a layer of the cache is no class that is known: {type(layer).__name__}"
    )


def _is_known(given: Any, names: tuple[str, ...]) -> bool:
    """Whether it is of one of these classes of transformers.cache_utils, and its update the one that the file has."""
    kind = type(given)
    if kind.__name__ not in names or kind.__module__ != "transformers.cache_utils" or "update" in vars(given):
        return False
    return getattr(sys.modules[kind.__module__], kind.__name__) is kind and kind.update.__module__ == kind.__module__


def _open_dynamic(layer: Any, shape: Shape) -> Rows | str:
    keys, values = layer.keys, layer.values
    sliding = layer.sliding_window - 1 if layer.is_sliding else 0
    if layer.is_sliding and sliding < 1:
        return "the cache's window is a single token"
    if keys is None or not keys.numel():
        past = 0
    elif (why := _misfit(keys, values, shape)) is not None:
        return why
    else:
        past = keys.shape[2]
    seen = min(past, sliding) if sliding else past  # of those that transformers' own update returns
    buffer: Buffer | None = vars(layer).get(_BUFFER)
    start = None if buffer is None or not past else buffer.start_of(keys, values)
    if buffer is None or start is None or buffer.end + shape.length > buffer.keys.shape[2]:
        keeps = past if vars(layer).get("record_past", False) else seen
        buffer, start = _copied(keys, values, past, keeps, shape), 0
        past = keeps
    first = start + past - seen
    whole = (buffer.keys, buffer.values)
    keys, values = whole if first == 0 else (one[:, :, first:] for one in whole)
    return Rows(keys, values, seen, seen + shape.length, layer, buffer, start)


def _copied(keys: Tensor, values: Tensor, past: int, keeps: int, shape: Shape) -> Buffer:
    """A buffer that begins with the last `keeps` rows. A cache's first is exact: a prefill may be all that is asked."""
    needed = keeps + shape.length
    capacity = needed + needed // 2 + _SPARE if keeps else needed
    buffer = Buffer(_empty(shape, capacity), _empty(shape, capacity), keeps)
    if keeps:
        with torch.no_grad():
            buffer.keys[:, :, :keeps] = keys[:, :, past - keeps :]
            buffer.values[:, :, :keeps] = values[:, :, past - keeps :]
    return buffer


def _misfit(keys: Any, values: Any, shape: Shape) -> str | None:
    """Why keys and values of a cache are not what the operator takes."""
    for tensor in (keys, values):
        plain = type(tensor) is Tensor and tensor.dim() == 4 and tensor.dtype is shape.dtype and tensor.is_cpu
        if not plain or tensor.shape[:2] != (shape.batch, shape.heads) or tensor.shape[3] != shape.size:
            return "what the cache holds does not fit"
        if tensor.requires_grad and torch.is_grad_enabled():
            return "the cache asks for a gradient"
    return None if keys.shape == values.shape else "what the cache holds does not fit"


def _open_static(layer: Any, shape: Shape, position: Any) -> Rows | str:
    past = _static_past(layer, shape.length, position)
    if isinstance(past, str):
        return past
    if past + shape.length > layer.max_cache_len:
        return f"the cache is full: {past} and {shape.length} tokens of {layer.max_cache_len}"
    if not layer.is_initialized:
        rows = _empty(shape, 0)
        layer.lazy_initialization(*([rows, rows] if _counts(layer) else [rows]))
    if (why := _misfit(layer.keys, layer.values, shape)) is not None:
        return why
    return Rows(layer.keys, layer.values, past, layer.max_cache_len, layer)


def _static_past(layer: Any, length: int, position: Any) -> int | str:
    if _counts(layer):
        return int(layer.cumulative_length)
    if position is None:
        return 0
    if not isinstance(position, Tensor) or position.dim() != 1 or position.shape[0] != length:
        return "the argument cache_position"
    first = int(position[0])
    if length > 1 and not torch.equal(position, torch.arange(first, first + length)):
        return "the argument cache_position"
    return first


def _counts(layer: Any) -> bool:
    """Whether a StaticLayer knows how many rows it holds, as from transformers 5 on."""
    return "cumulative_length" in vars(layer)
