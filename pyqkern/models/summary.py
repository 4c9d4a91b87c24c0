"""summary: what became of a model: of its linears, embeddings, experts, recurrent, encoder and decoder layers."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from pyqkern.models.find import (
    KEPT,
    RECURRENT,
    SMOOTHED,
    UNFUSED,
    Layer,
    as_linear,
    embedding_reasons,
    experts_reason,
    find_experts,
    find_layers,
    find_linears,
    kept_modules,
    linear_types,
    recurrent_reasons,
    shared_parameters,
    structural_reason,
    weight_owners,
)
from pyqkern.nn.attention import PACKED, Projection
from pyqkern.nn.decoder import QDecoderLayer
from pyqkern.nn.embedding import EMBEDDINGS, QEmbedding
from pyqkern.nn.experts import QExperts, has_experts
from pyqkern.nn.fused import QFusedLayer
from pyqkern.nn.fused_parts import InputScale
from pyqkern.nn.linear import QLinear
from pyqkern.nn.recurrent import QRecurrent


@dataclass(frozen=True)
class LayerRecord:
    """One linear, embedding or recurrent layer, or the experts of one layer: names (several where they are shared),
    bytes in float and as they are.

    shape: of the weight; of a recurrent layer [hidden_size, input_size]; of experts that of down_proj, [experts,
    hidden_size, intermediate_size]. smoothed: whether a plan smoothed it before it was quantized, or `smooth` left a
    factor in front of it.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    scheme: str | None
    reason: str | None
    bytes_before: int
    bytes_after: int
    smoothed: bool = False


@dataclass(frozen=True)
class FusedRecord:
    """One encoder or decoder layer that `optimize` has seen.

    reason: None where it is one operator, else why it is not, as the layer is now. last_call: why its last call did not
    go through the operator; "" if it did, None before the first call.
    """

    name: str
    reason: str | None
    last_call: str | None = None


@dataclass(frozen=True)
class Summary:
    """The linears (`records`), embeddings, experts and recurrent layers of a model, one record each, and the totals;
    prints.

    encoders, decoders: the layers that `optimize` fused, or did not.

    Bytes are counted from the tensors themselves, each once: a head tied to an embedding has all of them.
    `bytes_before` is what the same layers take in float, in the model's dtype. `other_bytes` is everything else.
    """

    records: list[LayerRecord]
    other_bytes: int
    embeddings: list[LayerRecord] = field(default_factory=list)
    encoders: list[FusedRecord] = field(default_factory=list)
    recurrent: list[LayerRecord] = field(default_factory=list)
    experts: list[LayerRecord] = field(default_factory=list)
    decoders: list[FusedRecord] = field(default_factory=list)

    def _layers(self) -> list[LayerRecord]:
        return [*self.records, *self.embeddings, *self.recurrent, *self.experts]

    @property
    def bytes_before(self) -> int:
        """The whole model with every layer in float."""
        return self.other_bytes + sum(record.bytes_before for record in self._layers())

    @property
    def bytes_after(self) -> int:
        """The whole model as it is."""
        return self.other_bytes + sum(record.bytes_after for record in self._layers())

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON or a data frame."""
        return {
            "records": [asdict(record) for record in self.records],
            "embeddings": [asdict(record) for record in self.embeddings],
            "recurrent": [asdict(record) for record in self.recurrent],
            "experts": [asdict(record) for record in self.experts],
            "encoders": [asdict(record) for record in self.encoders],
            "decoders": [asdict(record) for record in self.decoders],
            "other_bytes": self.other_bytes,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def __str__(self) -> str:
        rows = [("layer", "shape", "scheme", "before", "after")]
        for record in self._layers():
            name = record.name or "(the model)"
            if record.aliases:
                name += f" (= {', '.join(record.aliases)})"
            shape = "x".join(str(size) for size in record.shape)
            what = record.scheme or f"kept: {record.reason}"
            what += ", smoothed" if record.smoothed else ""
            rows.append((name, shape, what, said_bytes(record.bytes_before), said_bytes(record.bytes_after)))
        totals = [("linears", self.records)]
        others = (
            ("embeddings", self.embeddings),
            ("recurrent layers", self.recurrent),
            ("layers' experts", self.experts),
        )
        totals += [one for one in others if one[1]]
        for kind, records in totals:
            quantized = sum(record.scheme is not None for record in records)
            before, after = sum(r.bytes_before for r in records), sum(r.bytes_after for r in records)
            rows.append(
                (f"{quantized} of {len(records)} {kind} quantized", "", "", said_bytes(before), said_bytes(after))
            )
        rows.append(("everything else", "", "", said_bytes(self.other_bytes), said_bytes(self.other_bytes)))
        rows.append(("the model", "", "", said_bytes(self.bytes_before), said_bytes(self.bytes_after)))
        count = len(totals) + 2
        fused = [*_fused_lines("encoder", self.encoders), *_fused_lines("decoder", self.decoders)]
        return "\n".join([table(rows[:-count], rows[-count:], left=3), *fused])


def _fused_lines(kind: str, records: Sequence[FusedRecord]) -> list[str]:
    if not records:
        return []
    fused = sum(record.reason is None for record in records)
    kept = [f"{record.name} not fused: {record.reason}" for record in records if record.reason is not None]
    calls = Counter(r.last_call for r in records if r.reason is None and r.last_call is not None)
    said = [
        f"the last call of {count} of them went " + (f"its old way: {why}" if why else "through the operator")
        for why, count in calls.items()
    ]
    return [f"{fused} of {len(records)} {kind} layers are one operator each", *said, *kept]


def table(rows: Sequence[Sequence[str]], totals: Sequence[Sequence[str]], left: int) -> str:
    """Rows under their header, and totals, between rules; `left` columns to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, *totals, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(cells))

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:]), rule, *map(line, totals)])


def said_bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 10_000 else f"{count} B"


def summary(model: nn.Module) -> Summary:
    """Every linear, embedding, recurrent layer and layer's experts: name, shape, scheme or why it is kept, bytes before
    and after.

    >>> import torch, pyqkern
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 2))
    >>> model = pyqkern.replace_linear(model, exclude="1")
    >>> [(record.name, record.scheme, record.reason) for record in pyqkern.summary(model).records]
    [('0', 'int8', None), ('1', None, 'excluded')]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    counted: set[tuple[int, int]] = set()
    linears, owners, kept = find_linears(model), weight_owners(model), kept_modules(model)
    reasons = [structural_reason(layer.module, owners, kept) for layer in linears]
    records = [_record(layer, reason, counted) for layer, reason in zip(linears, reasons, strict=True)]
    for attention in {layer.module.place[0] for layer in linears if isinstance(layer.module, Projection)}:
        count_tensors([attention._parameters.get(name) for name in PACKED], counted)  # its projections have them
    embeddings = find_layers(model, (*EMBEDDINGS, QEmbedding))
    reasons = embedding_reasons(model, embeddings, None, ())
    recurrent = find_layers(model, RECURRENT)
    why = recurrent_reasons(model, recurrent, None, ())
    experts, shared = find_experts(model), shared_parameters(model)
    return Summary(
        records,
        embeddings=[_record(layer, reason, counted) for layer, reason in zip(embeddings, reasons, strict=True)],
        recurrent=[_record(layer, reason, counted) for layer, reason in zip(recurrent, why, strict=True)],
        experts=[_record(layer, experts_reason(layer.module, shared), counted) for layer in experts],
        other_bytes=sum(_count(module, counted) for module in model.modules()),
        **_fused_records(model),
    )


def _fused_records(model: nn.Module) -> dict[str, list[FusedRecord]]:
    """The encoder and the decoder layers that `optimize` has seen."""
    found: dict[str, list[FusedRecord]] = {"encoders": [], "decoders": []}
    for name, module in model.named_modules():
        if isinstance(module, QFusedLayer):
            kind = "decoders" if isinstance(module, QDecoderLayer) else "encoders"
            found[kind].append(FusedRecord(name, module.unfused_reason(), module.last_call))
        elif UNFUSED in vars(module):
            kind, reason = vars(module)[UNFUSED]
            found[kind].append(FusedRecord(name, reason))
    return found


def _record(layer: Layer, reason: str | None, counted: set[tuple[int, int]]) -> LayerRecord:
    module, tied = layer.module, False
    shape: tuple[int, ...]
    scheme: str | None
    if isinstance(module, QEmbedding):
        module = module.table
        packed: Any = module.packed
        tied = (packed.data_ptr(), packed.numel()) in counted
    after = sum(_count(part, counted) for part in module.modules())
    if isinstance(module, QRecurrent):
        shape, scheme, reason = (module.hidden_size, module.input_size), module.scheme.name, None
        before = sum(_float_bytes(linear) for _, linear in module._linears())
    elif isinstance(module, RECURRENT):
        shape, scheme, before = shape_of(module), None, after
        reason = reason or getattr(module, KEPT, "not replaced yet")
    elif isinstance(module, QExperts):
        sizes = (module.num_experts, module.hidden_dim, module.intermediate_dim)
        shape, scheme, reason = sizes, module.scheme.name, None
        before = sum(_float_bytes(linear) for _, linear in module.linears())
    elif has_experts(module):
        shape, scheme, before = shape_of(module), None, after
        reason = reason or getattr(module, KEPT, "not replaced yet")
    elif isinstance(module, QLinear):
        shape, scheme, reason = (module.out_features, module.in_features), module.scheme.name, None
        before = 0 if tied else _float_bytes(module)
    else:
        shape, scheme, before = shape_of(module), None, after
        reason = reason or getattr(module, KEPT, "not replaced yet")
    smoothed = SMOOTHED in vars(module) or any(type(one) is InputScale for one in module._forward_pre_hooks.values())
    return LayerRecord(layer.names[0], tuple(layer.names[1:]), shape, scheme, reason, before, after, smoothed)


def shape_of(module: Any) -> tuple[int, ...]:
    """The shape of a linear, embedding, recurrent layer or experts in float, as records have it."""
    sizes: Any = module
    if isinstance(module, RECURRENT):
        return (sizes.hidden_size, sizes.input_size)
    if has_experts(module):
        return tuple(module.down_proj.shape)
    weight: Any = as_linear(module).weight if isinstance(module, linear_types()) else module.weight
    return (int(weight.shape[0]), int(weight.shape[1]))


def _float_bytes(linear: QLinear) -> int:
    bias = 0 if linear.bias is None else linear.bias.numel() * linear.bias.element_size()
    return linear.out_features * linear.in_features * linear.dtype.itemsize + bias


def _count(module: nn.Module, counted: set[tuple[int, int]]) -> int:
    """Bytes of the module's own tensors, those that have been counted already left out."""
    return count_tensors((*module._parameters.values(), *module._buffers.values()), counted)


def count_tensors(tensors: Iterable[Tensor | None], counted: set[tuple[int, int]]) -> int:
    total = 0
    for tensor in tensors:
        if tensor is None:
            continue
        key = (id(tensor), 0) if tensor.is_meta or not tensor.numel() else (tensor.data_ptr(), tensor.numel())
        if key not in counted:
            counted.add(key)
            total += tensor.numel() * tensor.element_size()
    return total
