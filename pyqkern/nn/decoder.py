"""QDecoderLayer: a decoder layer of transformers whose forward is one operator."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from pyqkern.nn.decoder_parts import MASK, ROTARY, DecoderLayout, DecoderParts, find_decoder_parts
from pyqkern.nn.fused import QFusedLayer
from pyqkern.nn.fused_parts import setting
from pyqkern.nn.kv_cache import Rows, Shape, open_rows, without_cache
from pyqkern.ops.decoder import Parts, decoder_layer


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

    _compiles = False
    _said_by_false = frozenset({"is_causal"})

    @classmethod
    def find(cls, layer: nn.Module) -> DecoderParts:
        return find_decoder_parts(layer, cls._family)

    def _operator(self, parts: DecoderParts, named: dict[str, Any], quiet: bool) -> tuple[Tensor | None, str]:
        family, form, layer = self._family, parts.form, parts.operands
        layout: DecoderLayout = family.layout
        assert form is not None  # there is no reason, so there is all else
        x, mask, cache = named[family.arguments[0]], named.get(MASK), named.get(layout.cache)
        if (why := _input_reason(x, layer.parts, quiet)) is not None:
            return None, why
        batch, length, _ = x.shape
        shape = Shape(batch, form.kv_heads, length, form.head_size, x.dtype)
        if cache is None:
            rows: Rows | str = without_cache(shape)
        else:
            rows = open_rows(cache, parts.index, shape, named.get("cache_position"))
        if isinstance(rows, str):
            return None, rows
        if (why := _mask_reason(mask, rows, batch, length, parts)) is not None:
            return None, why
        cos = sin = bias = None
        if layout.rotary:
            cos, sin = named.get(ROTARY) or (None, None)
            if cos is None or sin is None or cos.dtype is not x.dtype or sin.dtype is not x.dtype:
                return None, "its rotary positions are missing or of another dtype than the input"
        if layout.alibi:
            bias = named.get(layout.alibi)
            if bias is None or bias.shape != (batch * form.heads, 1, rows.seen) or bias.dtype is not x.dtype:
                return None, "its ALiBi is not as transformers makes it"
            bias = bias.view(batch, form.heads, 1, rows.seen)
        try:
            y = decoder_layer(x, rows.keys, rows.values, rows.past, mask, bias, cos, sin, layer, None, quiet)
        except (TypeError, ValueError) as error:  # before it has written anything
            return None, f"the operator does not take it: {error}"
        rows.close(length)
        return y, ""


def _input_reason(x: Tensor, given: Parts, quiet: bool) -> str | None:
    """Why the operator does not take this input, beside what all fused layers ask for."""
    if type(x) is not Tensor or is_functorch_wrapped_tensor(x):
        return "the input is a tensor of a class of its own, or transformed by torch.func"
    if not quiet and torch._C._get_tracing_state() is not None:
        return "under torch.jit.trace"
    if not x.numel():
        return "there are no tokens"
    dtype = x.dtype
    for vector in given.norms if not given.head_norms else (*given.norms, *given.head_norms):
        if vector.dtype is not dtype:
            return "its norms are of another dtype than the input"
    return None


def _mask_reason(mask: Any, rows: Rows, batch: int, length: int, parts: DecoderParts) -> str | None:
    """Why this mask, or none, does not mean to transformers' own attention what it means to the operator."""
    if mask is None:
        if length == 1 and rows.past + 1 == rows.seen:
            return None  # all is seen
        if not (length > 1 and _is_sdpa(parts)):
            return "without a mask its attention looks ahead"
        return None if rows.past == 0 else "there is a past and no mask"  # causal, but aligned with the first key
    if not isinstance(mask, Tensor) or mask.dim() != 4 or type(mask) is not Tensor:
        return "the mask is not as transformers makes it"
    assert parts.form is not None
    full = (batch, parts.form.heads, length)
    if mask.shape[3] != rows.seen or any(size not in (1, n) for size, n in zip(mask.shape, full, strict=False)):
        return "the mask is not as transformers makes it"
    if mask.dtype is torch.bool:
        return None if _is_sdpa(parts) else "a mask of bools, which is added to the scores"
    return None if mask.is_floating_point() and mask.is_cpu else "the mask is not as transformers makes it"


def _is_sdpa(parts: DecoderParts) -> bool:
    return bool(setting(parts.config, "_attn_implementation") == "sdpa")
