"""optimize, which turns the encoder layers of a model into one operator each."""

from typing import Any

from torch import nn

from pyqkern.models.find import UNFUSED, Pattern
from pyqkern.models.layouts import layout_of, resembles_one
from pyqkern.models.plan import Plan
from pyqkern.models.replace import replace_linear
from pyqkern.nn.encoder import QEncoderLayer, fused_class
from pyqkern.nn.encoder_parts import find_parts
from pyqkern.schemes import Scheme


def optimize(
    model: nn.Module, scheme: str | Scheme | Plan = "int8", *, include: Pattern | None = None, exclude: Pattern = ()
) -> nn.Module:
    """Quantizes the linears of `model` as `replace_linear` does, and makes every encoder layer it knows one operator.

    In place; returns the model. Known are the layers of BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, ERNIE, Data2VecText,
    DistilBERT, ALBERT and MPNet in transformers; they become `QEncoderLayer`s. `summary` names them, and says why a
    layer was left as it was. What the model takes and returns stays, and so do the keys of its state_dict: they are
    those that replace_linear alone gives.

    scheme (or a plan of `auto`), include, exclude, errors: as for `replace_linear`. Linears that are quantized already,
    by it or as they were loaded, stay what they are. A layer is fused where all six linears have the same
    scheme and it quantizes activations per token: "int8" or "int8-a7" (whose attention keeps 8 bits), or "nf4", "fp4"
    and "int4" with compute "auto" or "int8".

    >>> import torch, pyqkern
    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    >>> model = pyqkern.optimize(BertModel(config).eval())
    >>> [record.reason for record in pyqkern.summary(model).encoders]  # why a layer is not one operator
    [None, None]
    """
    model = replace_linear(model, scheme, include=include, exclude=exclude)
    for module in list(model.modules()):
        if not isinstance(module, QEncoderLayer) and resembles_one(module):
            _fuse(module)
    return model


def _fuse(layer: nn.Module) -> None:
    """Makes the layer a QEncoderLayer, or leaves the reason on it why that cannot be."""
    vars(layer).pop(UNFUSED, None)
    layout = layout_of(layer)
    if layout is None:
        setattr(layer, UNFUSED, f"not a class of transformers that is known: {_class_name(layer)}")
        return
    kind: Any = fused_class(type(layer), layout)
    parts = find_parts(layer, kind._family)
    if parts.reason is not None:
        setattr(layer, UNFUSED, parts.reason)
        return
    layer.__class__ = kind
    vars(layer)["_parts"] = parts


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
