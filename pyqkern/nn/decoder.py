"""QDecoderLayer: a decoder layer of transformers whose forward is one operator."""

from typing import Any

import torch
from torch import Tensor, nn

from pyqkern.nn.decoder_parts import MASK, ROTARY, DecoderParts, find_decoder_parts
from pyqkern.nn.fused import QFusedLayer, setting
from pyqkern.nn.kv_cache import Rows, Shape, open_rows, without_cache
from pyqkern.ops.decoder import Added, Cache, decoder_layer


class QDecoderLayer(QFusedLayer):
    """A decoder layer whose forward is one operator, `torch.ops.pyqkern.decoder_layer`, where that gives all it must.

    `optimize` makes one out of a layer of transformers by giving it a class that derives from both: the parts, their
    names and the state_dict stay. It writes into transformers' DynamicCache and StaticCache in place. The layer goes
    its old way, through its QLinears, in training, where a gradient is asked for, under autocast, torch.compile,
    torch.export and torch.jit.trace, where attention weights are asked for, off the CPU, with other caches, with a mask
    of another shape than transformers makes, while a hook listens to one of its parts, and where a part is not
    transformers' own any more. `last_call` says why the last call did, "" if it was the operator, None before the
    first.

    A query that its mask lets see no key, as padding on the left, gets zeros from attention.
    """

    @classmethod
    def find(cls, layer: nn.Module) -> DecoderParts:
        return find_decoder_parts(layer, cls._family)

    def _attempt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, str]:
        if torch.compiler.is_compiling():
            return None, "under torch.compile"
        return super()._attempt(args, kwargs)

    def _read_reason(self, named: dict[str, Any], count: int) -> str | None:
        if named.get("is_causal") is not None:  # False says something, too
            return "the argument is_causal"
        return super()._read_reason(named, count)

    def _operator(self, parts: DecoderParts, named: dict[str, Any]) -> tuple[Tensor | None, str]:
        layout, form = self._family.layout, parts.form
        assert form is not None  # there is no reason, so there is all else
        x, mask, cache = named[self._family.arguments[0]], named.get(MASK), named.get(layout.cache)
        operands = parts.tensors()
        if (why := _input_reason(x, operands)) is not None:
            return None, why
        shape = Shape(x.shape[0], form.kv_heads, x.shape[1], form.head_size, x.dtype)
        if cache is None:
            rows: Rows | str = without_cache(shape)
        else:
            rows = open_rows(cache, parts.index, shape, named.get("cache_position"))
        if isinstance(rows, str):
            return None, rows
        implementation = setting(parts.config, "_attn_implementation")
        if (why := _mask_reason(mask, rows, x, form.heads, implementation == "sdpa")) is not None:
            return None, why
        cos, sin = _rotary(named) if layout.rotary else (None, None)
        if layout.rotary and (cos is None or sin is None or cos.dtype is not x.dtype or sin.dtype is not x.dtype):
            return None, "its rotary positions are missing or of another dtype than the input"
        bias = named.get(layout.alibi) if layout.alibi else None
        if layout.alibi:
            if bias is None or bias.shape != (shape.batch * form.heads, 1, rows.seen) or bias.dtype is not x.dtype:
                return None, "its ALiBi is not as transformers makes it"
            bias = bias.view(shape.batch, form.heads, 1, rows.seen)
        try:
            y = decoder_layer(x, Cache(rows.keys, rows.values, rows.past), Added(mask, bias, cos, sin), operands, form)
        except (TypeError, ValueError) as error:  # before it has written anything
            return None, f"the operator does not take it: {error}"
        rows.close(shape.length)
        return y, ""

    def _result(self, y: Tensor) -> Any:
        return (y, None) if self._family.layout.returns_weights else super()._result(y)


def _rotary(named: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    cos, sin = named.get(ROTARY) or (None, None)
    return cos, sin


def _input_reason(x: Tensor, operands: Any) -> str | None:
    """Why the operator does not take this input, beside what all fused layers ask for."""
    if type(x) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return "the input is a tensor of a class of its own, or transformed by torch.func"
    if torch._C._get_tracing_state() is not None:
        return "under torch.jit.trace"
    if not x.numel():
        return "there are no tokens"
    for vector in (*operands.norms, *operands.head_norms):
        if vector.dtype is not x.dtype:
            return "its norms are of another dtype than the input"
    return None


def _mask_reason(mask: Any, rows: Rows, x: Tensor, heads: int, sdpa: bool) -> str | None:
    """Why this mask, or none, does not mean to transformers' own attention what it means to the operator."""
    batch, length = x.shape[:2]
    if mask is None:
        if sdpa and length > 1:  # causal, but aligned with the first key
            return None if rows.past == 0 else "there is a past and no mask"
        full = length == 1 and rows.past + 1 == rows.seen
        return None if full else "without a mask its attention looks ahead"
    if not isinstance(mask, Tensor) or mask.dim() != 4 or type(mask) is not Tensor:
        return "the mask is not as transformers makes it"
    if mask.shape[3] != rows.seen or any(
        size not in (1, full) for size, full in zip(mask.shape, (batch, heads, length), strict=False)
    ):
        return "the mask is not as transformers makes it"
    if mask.dtype is torch.bool:
        return None if sdpa else "a mask of bools, which is added to the scores"
    return None if mask.is_floating_point() and mask.is_cpu else "the mask is not as transformers makes it"
