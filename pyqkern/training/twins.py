"""The trainable twins of linears, embeddings and recurrent layers, which `prepare` puts into a model."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyqkern.backends import FLT_MIN, qrange, reference
from pyqkern.models.find import PREPARED, as_linear
from pyqkern.models.replace import hand_over_hooks
from pyqkern.nn.attention import Projection
from pyqkern.nn.embedding import bag_of
from pyqkern.nn.linear import QLinear
from pyqkern.nn.recurrent import QRecurrent
from pyqkern.ops.checks import check_float
from pyqkern.ops.registry import in_autocast
from pyqkern.schemes import FP4, NF4, Int4, Int8, Int8Static, Int8WeightOnly, Range, Scheme, check_type
from pyqkern.training.straight_through import BUFFERS, TrainedLinear, TrainedTable, is_row_by_row

# The schemes that have twins.
TRAINED: tuple[type[Scheme], ...] = (Int8, Int8Static, Int8WeightOnly, NF4, FP4, Int4)


# The Parameters that hold the range of a QATLinear's input.
RANGES = ("input_scale", "input_offset")


class Twin(nn.Module):
    """What the twins have in common: they are the float module with another forward, and share all that it has.

    scheme: what `convert` makes of it. quantizing: whether it computes as the quantized layer, or in float.
    """

    scheme: Scheme
    quantizing: bool
    float_type: type[nn.Module]

    @classmethod
    def of(cls, module: nn.Module, scheme: Scheme) -> Any:
        """The twin of a float module: the same Parameters, hooks and attributes."""
        twin = _shared(module, cls)
        twin.scheme, twin.quantizing, twin.float_type = scheme, True, type(module)
        setattr(twin, PREPARED, f"prepared for {scheme.name}: pyqkern.training.convert quantizes it")
        return twin

    def in_float(self) -> Any:
        """The float module, with the same Parameters, hooks and attributes."""
        module = _shared(self, self.float_type)
        for name in ("scheme", "quantizing", "float_type", "_layer", PREPARED):
            vars(module).pop(name, None)
        return module


def _shared(module: nn.Module, kind: type[nn.Module]) -> Any:
    """A module of that type with what `module` has."""
    new = kind.__new__(kind)
    vars(new).update(vars(module))
    for name in ("_parameters", "_buffers", "_modules"):
        vars(new)[name] = vars(module)[name].copy()
    hand_over_hooks(module, new)
    return new


def _layer_of(in_features: int, out_features: int, scheme: Scheme, dtype: torch.dtype) -> QLinear:
    """An empty quantized layer, for how it computes; without a bias, on the meta device."""
    return QLinear._classes[type(scheme)](in_features, out_features, False, scheme, "meta", dtype)


class QATLinear(Twin, nn.Linear):
    """The twin of an nn.Linear: weight and bias are the float ones, and the forward pass that of the quantized layer.

    x [..., in_features] -> [..., out_features] of x's dtype, or of the autocast dtype, as QLinear. state_dict: that of
    nn.Linear; for "int8-static" also input_scale and input_offset, fp32 [1]: codes of x are
    rint(x / input_scale) - rint(input_offset / input_scale), and input_offset is the value of code 0.

    Raises ValueError where the weight holds NaN or an infinity.
    """

    input_scale: nn.Parameter
    input_offset: nn.Parameter

    @classmethod
    def of(cls, module: Any, scheme: Scheme, bounds: Range | None = None, learn_range: bool = False) -> Any:
        linear = as_linear(module)
        if linear is not module:  # a Conv1D: its weight is transposed
            linear = _shared(linear, nn.Linear)
            linear.weight = nn.Parameter(linear.weight.contiguous(), module.weight.requires_grad)
            hand_over_hooks(module, linear)
        elif isinstance(module, Projection):  # a part of an attention's weight becomes a weight of its own
            linear, (_, name) = _shared(module, nn.Linear), module.place
            del linear.place
            if name != "out_proj":
                linear.weight = nn.Parameter(linear.weight.detach().clone(), linear.weight.requires_grad)
        twin = super().of(linear, scheme)
        vars(twin)["_layer"] = _layer_of(twin.in_features, twin.out_features, scheme, torch.float32)
        if bounds is not None:
            twin.set_range(bounds, learn_range)
        return twin

    def set_range(self, bounds: Range, learn: bool) -> None:
        """Takes over the range of x for "int8-static"; learn: whether it is trained from there on."""
        lo, hi = bounds.lo.reshape(1).float(), bounds.hi.reshape(1).float()
        scale, zero_point = reference.qparams_from_range(lo, hi, torch.uint8, False, self.activation_bits)
        values = {"input_scale": scale, "input_offset": -scale * zero_point}
        for name, value in values.items():
            setattr(self, name, nn.Parameter(value.to(self.weight.device), learn))

    @property
    def activation_bits(self) -> int:
        bits: int = self.scheme.activation_bits  # type: ignore[attr-defined]
        return bits

    def input_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of x as the kernels take them, fp32 and int32 [1]; a scale is at least 2**-126."""
        _, qmax = qrange(torch.uint8, self.activation_bits)
        scale = self.input_scale.detach().float().abs().clamp(min=FLT_MIN)
        zero_point = (-self.input_offset.detach().float() / scale).round().nan_to_num(0.0).clamp(0, qmax)
        return scale, zero_point.to(torch.int32)

    def forward(self, input: Tensor | None = None, *, x: Tensor | None = None) -> Tensor:
        """input: as nn.Linear calls it; x: as the Conv1D of transformers does."""
        x = input if x is None else x
        if not isinstance(x, Tensor):
            raise TypeError(f"input must be a tensor [..., in_features={self.in_features}], got {type(x).__name__}")
        if not self.quantizing:
            y = functional.linear(x, self.weight, self.bias)
            ranges = [p for p in (self._parameters.get(name) for name in RANGES) if p is not None and p.requires_grad]
            # Learned ranges get a gradient of zero: DDP waits for one of each parameter.
            return y + 0.0 * sum(ranges).to(y.dtype) if ranges else y  # type: ignore[union-attr]
        check_float("input", x.dtype)
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"input must be [..., in_features={self.in_features}], got shape {tuple(x.shape)}")
        x = in_autocast(x)
        layer: QLinear = vars(self)["_layer"]
        scale = offset = None
        with torch.no_grad():
            buffers = layer._quantized(self.weight.detach())
            if isinstance(self.scheme, Int8Static):
                buffers["input_scale"], buffers["input_zero_point"] = self.input_qparams()
                scale, offset = self.input_scale, self.input_offset
        tensors = [buffers.get(name) for name in BUFFERS]
        result: Tensor = TrainedLinear.apply(x, self.weight, self.bias, scale, offset, layer, *tensors)
        return result

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme.name}"


class QATEmbedding(Twin, nn.Embedding):
    """The twin of an nn.Embedding: looks up dequantized rows of its float weight, which gets the gradient."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.quantizing:
            return super().forward(input)
        check_type("input", input, Tensor, "a tensor of ids")
        return _looked_up(self, input, self.padding_idx)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme.name}"


class QATEmbeddingBag(Twin, nn.EmbeddingBag):
    """The twin of an nn.EmbeddingBag: reduces dequantized rows of its float weight, which gets the gradient."""

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        if not self.quantizing:
            return super().forward(input, offsets, per_sample_weights)
        check_type("input", input, Tensor, "a tensor of ids")
        return bag_of(self, _looked_up(self, input.reshape(-1), None), input, offsets, per_sample_weights)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme.name}"


def _looked_up(embedding: Any, ids: Tensor, padding_idx: int | None) -> Tensor:
    """Dequantized rows, [*ids.shape, embedding_dim]."""
    how = {"padding_idx": padding_idx, "scale_grad_by_freq": embedding.scale_grad_by_freq, "sparse": embedding.sparse}
    weight, scheme = embedding.weight, embedding.scheme
    if not is_row_by_row(scheme, weight.shape[1]):
        table: Tensor = TrainedTable.apply(weight, scheme)
        return functional.embedding(ids, table, **how)
    rows = functional.embedding(ids, weight, **how)
    flat: Tensor = TrainedTable.apply(rows.reshape(-1, weight.shape[1]), scheme)
    return flat.view(rows.shape)


class QATRecurrent(Twin):
    """What the twins of recurrent layers and cells have in common: the forward pass of `pyqkern.QRecurrent`."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        if not self.quantizing:
            return super().forward(input, hx)
        layer = QRecurrent.from_recurrent(self, self.scheme)
        for name, linear in layer._linears():
            vars(linear)["trained"] = getattr(self, f"weight_{name}")
        return layer(input, hx)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme.name}"


class QATLSTM(QATRecurrent, nn.LSTM):
    """The twin of an nn.LSTM."""


class QATGRU(QATRecurrent, nn.GRU):
    """The twin of an nn.GRU."""


class QATRNN(QATRecurrent, nn.RNN):
    """The twin of an nn.RNN."""


class QATLSTMCell(QATRecurrent, nn.LSTMCell):
    """The twin of an nn.LSTMCell."""


class QATGRUCell(QATRecurrent, nn.GRUCell):
    """The twin of an nn.GRUCell."""


class QATRNNCell(QATRecurrent, nn.RNNCell):
    """The twin of an nn.RNNCell."""


# Layers of torch, and their twins.
TWINS: dict[type[nn.Module], type[Twin]] = {
    nn.Embedding: QATEmbedding, nn.EmbeddingBag: QATEmbeddingBag, nn.LSTM: QATLSTM, nn.GRU: QATGRU, nn.RNN: QATRNN,
    nn.LSTMCell: QATLSTMCell, nn.GRUCell: QATGRUCell, nn.RNNCell: QATRNNCell,
}  # fmt: skip
