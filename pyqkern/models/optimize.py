"""optimize, which turns the encoder layers of a model into one operator each."""

from torch import nn

from pyqkern.models.find import UNFUSED, Pattern
from pyqkern.models.layouts import layout_of, resembles_one
from pyqkern.models.replace import replace_linear
from pyqkern.nn.encoder import Layout, QEncoderLayer, common_format, fused_class, kernel_activation, part_of, unfit
from pyqkern.schemes import Scheme


def optimize(
    model: nn.Module, scheme: str | Scheme = "int8", *, include: Pattern | None = None, exclude: Pattern = ()
) -> nn.Module:
    """Quantizes the linears of `model` as `replace_linear` does, and makes every encoder layer it knows one operator.

    In place; returns the model. Known are the layers of BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, ERNIE, Data2VecText,
    DistilBERT, ALBERT and MPNet in transformers; they become `QEncoderLayer`s. `summary` names them, and says why a
    layer was left as it was. What the model takes and returns stays, and so do the keys of its state_dict: they are
    those that replace_linear alone gives.

    scheme, include, exclude, errors: as for `replace_linear`. Linears that are quantized already, by it or as they were
    loaded, stay what they are. A layer is fused where all six linears have the same
    scheme and it quantizes activations per token: "int8", or "nf4", "fp4" and "int4" with compute "auto" or "int8".

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
    elif (reason := _reason(layer, layout)) is not None:
        setattr(layer, UNFUSED, reason)
    else:
        layer.__class__ = fused_class(type(layer), layout)


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _reason(layer: nn.Module, layout: Layout) -> str | None:
    """Why this layer cannot become one operator."""
    try:
        attention = part_of(layer, layout.attention)
        linears = [part_of(layer, path) for path in layout.linears]
        norms = [part_of(layer, path) for path in layout.norms]
        heads = getattr(attention, layout.heads)
        activation = part_of(layer, layout.activation)
    except AttributeError as error:
        return f"not the {type(layer).__name__} that is known: {error}"
    if getattr(layer, "is_decoder", False) or getattr(layer, "add_cross_attention", False):
        return "a decoder layer"
    if getattr(attention, "position_embedding_type", "absolute") not in ("absolute", None):
        return f"its scores have a term of their own: {attention.position_embedding_type}"
    if "forward" in vars(layer):
        return "patched: its forward was replaced"
    for path, linear in zip(layout.linears, linears, strict=True):
        if (why := unfit(linear)) is not None:
            return f"{'.'.join(path)} {why}"
    if common_format(linears) is None:
        return "its linears are quantized in different ways"
    hidden, width = linears[0].in_features, linears[0].out_features
    if any(type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None for norm in norms):
        return "its norms are no LayerNorms with weight and bias"
    if heads < 1 or width % heads:
        return f"{heads} heads do not divide {width} features"
    shapes = [(linear.out_features, linear.in_features) for linear in linears]
    wide = linears[4].out_features
    if shapes != [(width, hidden)] * 3 + [(hidden, width), (wide, hidden), (hidden, wide)]:
        return f"its linears do not fit together: {shapes}"
    if kernel_activation(activation) is None:
        return f"no kernel for the activation {getattr(activation, '__name__', type(activation).__name__)}"
    return None
