"""QEncoderLayer: an encoder layer of transformers whose forward is one operator."""

from typing import Any

import torch
from torch import Tensor, nn

from pyqkern.nn.encoder_parts import EncoderParts, dtypes_reason, find_encoder_parts
from pyqkern.nn.fused import QFusedLayer
from pyqkern.ops.encoder import MAX_LENGTH, encoder_layer


class QEncoderLayer(QFusedLayer):
    """An encoder layer whose forward is one operator, `torch.ops.pyqkern.encoder_layer`, where that gives all it must.

    `optimize` makes one out of a layer of transformers by giving it a class that derives from both: the parts, their
    names and the state_dict stay. The layer goes its old way, through its QLinears, in training, where a gradient is
    asked for, under autocast, where attention weights are asked for, off the CPU, with a cache or a head mask, while a
    hook listens to one of its parts, and where a part is not transformers' own any more. `last_call` says why the last
    call did, "" if it was the operator, None before the first.

    Where the mask tells padding from tokens, the padding's outputs are zeros.
    """

    _compiles = True

    @classmethod
    def find(cls, layer: nn.Module) -> EncoderParts:
        return find_encoder_parts(layer, cls._family)

    def _reason(self, parts: EncoderParts, named: dict[str, Any], quiet: bool) -> str | None:
        if (why := super()._reason(parts, named, quiet)) is not None:
            return why
        if named[self._family.arguments[0]].shape[1] > MAX_LENGTH:
            return f"longer than {MAX_LENGTH} tokens"
        return dtypes_reason(parts.tensors(quiet)) if not quiet and torch.compiler.is_compiling() else None

    def _operator(self, parts: EncoderParts, named: dict[str, Any], quiet: bool) -> tuple[Tensor | None, str]:
        form, given = parts.format, parts.tensors(quiet)
        x, mask = self._family.arguments[:2]
        try:
            y = encoder_layer(
                named[x], named.get(mask), given.weights, given.scales, given.biases, given.norms, parts.heads,
                parts.scaling, given.eps, parts.activation, form.symmetric, form.quant_type, form.blocksize,
                given.features, given.nested, named.get(self._family.layout.position_bias), given.factors, quiet,
            )  # fmt: skip
        except (TypeError, ValueError):  # asked afterwards, since asking takes 2 us
            reason = dtypes_reason(given)
            if reason is None:
                raise
            return None, reason
        return y, ""
