"""optimize, which turns the encoder and decoder layers of a model into one operator each."""

from typing import Any

from torch import nn

from pyqkern.models.find import UNFUSED, Pattern
from pyqkern.models.layouts import layout_of, resembled_layout
from pyqkern.models.plan import Plan
from pyqkern.models.replace import replace_linear
from pyqkern.nn.decoder import QDecoderLayer
from pyqkern.nn.decoder_parts import DecoderLayout
from pyqkern.nn.encoder import QEncoderLayer
from pyqkern.nn.fused import QFusedLayer, fused_class
from pyqkern.nn.fused_parts import Layout
from pyqkern.schemes import Scheme


def optimize(
    model: nn.Module, scheme: str | Scheme | Plan = "int8", *, include: Pattern | None = None, exclude: Pattern = ()
) -> nn.Module:
    """Quantizes the linears of `model` as `replace_linear` does, and makes every layer it knows one operator.

    In place; returns the model. Known are, in transformers, the encoder layers of BERT, RoBERTa, XLM-R, CamemBERT,
    ELECTRA, ERNIE, Data2VecText, DistilBERT, ALBERT and MPNet, which become `QEncoderLayer`s, and the decoder layers of
    Llama, Mistral, Qwen2, Qwen3, Phi-3, Gemma, GPT-2, OPT and BLOOM, which become `QDecoderLayer`s. `summary` names
    them, and says why a layer was left as it was. What the model takes and returns stays, and so do the keys of its
    state_dict: they are those that replace_linear alone gives.

    scheme (or a plan of `auto`), include, exclude, errors: as for `replace_linear`. Linears that are quantized already,
    by it or as they were loaded, stay what they are. A layer is fused where all its linears have the same scheme:
    "int8", "int8-a7" (an encoder's attention keeps 8 bits), "nf4", "fp4" and "int4". An encoder's have to quantize
    activations per token: 4 bits with compute "auto" or "int8". A decoder's may be of any compute, or
    "int8-weight-only"; its attention is in fp32.

    >>> import torch, pyqkern
    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    >>> model = pyqkern.optimize(BertModel(config).eval())
    >>> [record.reason for record in pyqkern.summary(model).encoders]  # why a layer is not one operator
    [None, None]
    """
    model = replace_linear(model, scheme, include=include, exclude=exclude)
    for module in list(model.modules()):
        layout = None if isinstance(module, QFusedLayer) else resembled_layout(module)
        if layout is not None:
            _fuse(module, layout)
    return model


def _fuse(layer: nn.Module, layout: Layout) -> None:
    """Makes a layer that resembles those of this layout fused, or leaves the reason on it why that cannot be."""
    vars(layer).pop(UNFUSED, None)
    is_decoder = isinstance(layout, DecoderLayout)
    of, records = (QDecoderLayer, "decoders") if is_decoder else (QEncoderLayer, "encoders")
    if layout_of(layer) is None:
        setattr(layer, UNFUSED, (records, f"not a class of transformers that is known: {_class_name(layer)}"))
        return
    kind: Any = fused_class(of, type(layer), layout)
    parts = kind.find(layer)
    if parts.reason is not None:
        setattr(layer, UNFUSED, (records, parts.reason))
        return
    layer.__class__ = kind
    vars(layer)["_parts"] = parts


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
