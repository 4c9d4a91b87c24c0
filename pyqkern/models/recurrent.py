"""replace_recurrent, which quantizes the LSTMs, GRUs and RNNs of a model in place."""

from torch import nn

from pyqkern.models.find import KEPT, RECURRENT, Pattern, find_layers, recurrent_reasons
from pyqkern.models.replace import put, quantized_recurrent, tell
from pyqkern.nn.recurrent import QRecurrent, check_recurrent_scheme
from pyqkern.schemes import Scheme


def replace_recurrent(
    model: nn.Module, scheme: str | Scheme = "int8", *, include: Pattern | None = None, exclude: Pattern = ()
) -> nn.Module:
    """Replaces nn.LSTM, nn.GRU, nn.RNN and their cells by quantized ones, in place, and returns the model.

    scheme: "int8" (weights per output channel, inputs and hidden states per token), "int8-a7", "nf4", "fp4", "int4",
    "float16", or a scheme object of these. include, exclude: as in `replace_linear`, for the names of recurrent layers.

    What a layer takes and returns stays: PackedSequence, input without a batch, batch_first, directions, projections,
    dropout in training. A sequence's result does not depend on its batch. Kept in float, with the reason in `summary`:
    what is excluded; subclasses; a parametrized, pruned or patched layer; a weight that something else shares.

    Raises as `replace_linear`. Every layer is quantized before the first is replaced, so that after an error the model
    is as it was; the quantized copies are the extra memory.

    >>> import torch, pyqkern
    >>> pyqkern.replace_recurrent(torch.nn.Sequential(torch.nn.GRUCell(64, 32)))[0]
    QGRUCell(
      input_size=64, hidden_size=32, bias=True, scheme=int8
      (ih): Int8Linear(in_features=64, out_features=96, bias=True, scheme=int8)
      (hh): Int8Linear(in_features=32, out_features=96, bias=True, scheme=int8)
    )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    scheme = check_recurrent_scheme(scheme)
    layers = find_layers(model, RECURRENT)
    reasons = recurrent_reasons(model, layers, include, exclude)
    plans = [
        (layer, quantized_recurrent(layer, scheme))
        for layer, reason in zip(layers, reasons, strict=True)
        if reason is None
    ]
    for layer, reason in zip(layers, reasons, strict=True):
        if reason is not None and not isinstance(layer.module, QRecurrent):
            setattr(layer.module, KEPT, reason)
    result = model
    for layer, module in plans:
        result = put(layer, module, result)
    tell(result)
    return result
