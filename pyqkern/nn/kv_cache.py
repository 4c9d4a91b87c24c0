"""transformers' caches of keys and values, as the operator of a decoder layer reads and writes them: in place.

`open_rows` says where in a cache a layer's new rows go, or why it cannot be written in place; `Rows.close` tells the
cache of them. Known are DynamicCache and StaticCache, and of their layers DynamicLayer, DynamicSlidingWindowLayer and
StaticLayer, all of them very transformers' own.

A DynamicLayer holds exactly what it has seen, and its own update copies all of it for every token. Here its keys and
values are views into a `Buffer` with room behind them. A view is continued in place only where it is the very tensor
that the buffer gave last, so that nobody else has written behind it: views that were cropped, or that another copy of
the cache has continued, are copied to a new buffer first, and so is whatever else was put into the cache.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyqkern.nn.fused_parts import is_of_transformers

_BUFFER = "_pyqkern_buffer"  # attribute of a DynamicLayer
_SPARE = 64  # rows of a buffer that has to grow, beside half of what it holds


class Shape(NamedTuple):
    """Of the rows that a layer adds."""

    batch: int
    heads: int
    length: int
    size: int
    dtype: torch.dtype


class Buffer:
    """Keys and values [batch, heads, capacity, size], of which the rows before `end` are filled.

    given: the views of keys and values, from row `start` to `end`, that the cache has.
    """

    __slots__ = ("capacity", "end", "given", "keys", "shape", "start", "strides", "values")

    def __init__(self, shape: Shape, capacity: int, end: int) -> None:
        self.keys, self.values = _zeros(shape, capacity), _zeros(shape, capacity)
        self.shape, self.strides = shape, self.keys.stride()
        self.capacity, self.start, self.end = capacity, 0, end
        self.given: tuple[Any, Any] = (None, None)

    def __reduce__(self) -> Any:
        """A copy of a cache has none: its views are copied to a buffer of their own when they are continued."""
        return type(None), ()

    def give(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Views of these rows; no row behind them is filled."""
        self.start, self.end = start, end
        batch, heads, _, size, _ = self.shape
        where = (batch, heads, end - start, size), self.strides, start * size
        # As narrow would, which takes half a microsecond more.
        self.given = self.keys.as_strided(*where), self.values.as_strided(*where)
        return self.given


def _zeros(shape: Shape, capacity: int) -> Tensor:
    return torch.zeros(shape.batch, shape.heads, capacity, shape.size, dtype=shape.dtype, device="cpu")


class Rows(NamedTuple):
    """Where the operator reads and writes: keys, values [batch, heads, capacity, size], and how many rows come before.

    seen: how many keys transformers' own attention sees, past and the new ones, or the capacity of a static cache.
    """

    keys: Tensor
    values: Tensor
    past: int
    seen: int
    layer: Any = None
    buffer: Buffer | None = None

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
        start, end = buffer.start, buffer.end + length
        if layer.is_sliding:
            layer.cumulative_length += length
            if not vars(layer).get("record_past", False):
                start = max(start, end - layer.sliding_window + 1)
        layer.keys, layer.values = buffer.give(start, end)
        setattr(layer, _BUFFER, buffer)


def without_cache(shape: Shape) -> Rows:
    """Rows that nobody keeps."""
    return Rows(_zeros(shape, shape.length), _zeros(shape, shape.length), 0, shape.length)


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


# The classes of transformers.cache_utils that are known.
_CACHES = ("DynamicCache", "StaticCache")
_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer")
_updates: dict[type, Any] = {}  # of those that were met, their update


def _layer_of(cache: Any, index: int) -> Any:
    """The layer of a cache that is known, or why it is not."""
    if not _is_known(cache, _CACHES):
        return f"the cache is no class that is known: {type(cache).__name__}"
    if cache.offloading:
        return "the cache is offloaded"
    layers = cache.layers
    while len(layers) <= index:
        new = cache.layer_class_to_replicate
        if new is None or new.__name__ not in _LAYERS or not is_of_transformers(new):
            return f"the cache has {len(layers)} layers"
        layers.append(new())
    layer = layers[index]
    if _is_known(layer, _LAYERS):
        return layer
    return f"a layer of the cache is no class that is known: {type(layer).__name__}"


def _is_known(given: Any, names: tuple[str, ...]) -> bool:
    """Whether it is of one of these classes of transformers.cache_utils, and its update the one that the file has."""
    kind = type(given)
    if kind.__name__ not in names or "update" in given.__dict__:
        return False
    if (update := _updates.get(kind)) is not None:
        return kind.update is update
    if kind.__module__ != "transformers.cache_utils" or not is_of_transformers(kind):
        return False
    if kind.update.__module__ != kind.__module__:
        return False
    _updates[kind] = kind.update
    return True


def _open_dynamic(layer: Any, shape: Shape) -> Rows | str:
    keys, values = layer.keys, layer.values
    window = 0
    if layer.is_sliding:
        window = layer.sliding_window - 1
        if window < 1:
            return "the cache's window is a single token"
    if keys is None or not keys.numel():
        past = 0
    elif (why := _misfit(keys, values, shape)) is not None:
        return why
    else:
        past = keys.shape[2]
    seen = min(past, window) if window else past  # of those that transformers' own update returns
    state = layer.__dict__
    buffer: Buffer | None = state.get(_BUFFER)
    if buffer is None or not past or not _continues(buffer, keys, values, shape.length):
        buffer = _copied(keys, values, past if state.get("record_past", False) else seen, shape)
    first = buffer.end - seen
    keys, values = buffer.keys, buffer.values
    if first:
        keys, values = keys[:, :, first:], values[:, :, first:]
    return Rows(keys, values, seen, seen + shape.length, layer, buffer)


def _continues(buffer: Buffer, keys: Tensor, values: Tensor, length: int) -> bool:
    """Whether the cache still has what the buffer gave, and there is room for so many rows behind it."""
    if keys is not buffer.given[0] or values is not buffer.given[1] or buffer.end + length > buffer.capacity:
        return False
    return torch.is_inference_mode_enabled() or not buffer.keys.is_inference()


def _copied(keys: Tensor, values: Tensor, keeps: int, shape: Shape) -> Buffer:
    """A buffer that begins with the last `keeps` rows. A cache's first is exact: a prefill may be all that is asked."""
    needed = keeps + shape.length
    buffer = Buffer(shape, needed + needed // 2 + _SPARE if keeps else needed, keeps)
    if keeps:
        with torch.no_grad():
            buffer.keys[:, :, :keeps] = keys[:, :, -keeps:]
            buffer.values[:, :, :keeps] = values[:, :, -keeps:]
    return buffer


def _misfit(keys: Any, values: Any, shape: Shape) -> str | None:
    """Why keys and values of a cache are not what the operator takes."""
    batch, heads, _, size, dtype = shape
    given = keys.shape
    wanted = (batch, heads, given[2] if len(given) == 4 else -1, size)
    for tensor in (keys, values):
        if type(tensor) is not Tensor or tensor.shape != wanted or tensor.dtype is not dtype or not tensor.is_cpu:
            return "what the cache holds does not fit"
        if tensor.requires_grad and torch.is_grad_enabled():
            return "the cache asks for a gradient"
    return None


def _open_static(layer: Any, shape: Shape, position: Any) -> Rows | str:
    past = _static_past(layer, shape.length, position)
    if isinstance(past, str):
        return past
    if past + shape.length > layer.max_cache_len:
        return f"the cache is full: {past} and {shape.length} tokens of {layer.max_cache_len}"
    if not layer.is_initialized:
        rows = _zeros(shape, 0)
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
