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

    @classmethod
    def find(cls, layer: nn.Module) -> EncoderParts:
        return find_encoder_parts(layer, cls._family)

    def _reason(self, parts: EncoderParts, named: dict[str, Any]) -> str | None:
        if (why := super()._reason(parts, named)) is not None:
            return why
        if named[self._family.arguments[0]].shape[1] > MAX_LENGTH:
            return f"longer than {MAX_LENGTH} tokens"
        return dtypes_reason(*parts.tensors()) if torch.compiler.is_compiling() else None

    def _operator(self, parts: EncoderParts, named: dict[str, Any]) -> tuple[Tensor | None, str]:
        linears, norms, form = parts.linears, parts.norms, parts.format
        x, mask = self._family.arguments[:2]
        weights = [linear._buffers["packed"] for linear in linears]  # read directly: see Int8Linear._linear
        scales = [linear._scales() for linear in linears]
        nested = [linear._buffers[name] for linear in linears for name in form.nested]
        vectors, biases = parts.tensors()
        eps = [norm.eps for norm in norms]
        features = [linears[0].out_features, linears[4].out_features]
        try:
            y = encoder_layer(
                named[x], named.get(mask), weights, scales, biases, vectors, parts.heads, parts.scaling, eps,
                parts.activation, form.symmetric, form.quant_type, form.blocksize, features, nested,
                named.get(self._family.layout.position_bias), parts.factors(),
            )  # fmt: skip
        except (TypeError, ValueError):  # asked afterwards, since asking takes 2 us
            reason = dtypes_reason(vectors, biases)
            if reason is None:
                raise
            return None, reason
        return y, ""
