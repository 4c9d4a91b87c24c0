"""The float and the quantized model side by side: layer by layer, and input by input."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pyqkern.analysis.records import Records, barh
from pyqkern.calibration.run import counted, evaluated, in_float64
from pyqkern.models.find import RECURRENT, find_attentions, find_layers, linear_types
from pyqkern.nn.attention import unfolded
from pyqkern.nn.embedding import EMBEDDINGS, QEmbedding
from pyqkern.schemes import check_type


@dataclass(frozen=True)
class ErrorRecord:
    """The output of one layer, quantized model against float model, over all batches.

    mse: mean squared difference; cosine: of the outputs as one vector; sqnr: 10 log10(mean(float^2) / mse), in dB.
    """

    name: str
    kind: str
    mse: float
    cosine: float
    sqnr: float


class _Sums:
    """What the three figures are made of, in float64, so that batches add up."""

    def __init__(self) -> None:
        self.count, self.error, self.xx, self.yy, self.xy = 0, 0.0, 0.0, 0.0, 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        x, y = in_float64(x), in_float64(y)
        self.count += x.numel()
        self.error += float((x - y).square().sum())
        self.xx += float(x.square().sum())
        self.yy += float(y.square().sum())
        self.xy += float((x * y).sum())

    def record(self, name: str, kind: str) -> ErrorRecord:
        norms = math.sqrt(self.xx * self.yy)
        cosine = self.xy / norms if norms > 0 else (1.0 if self.xx == self.yy else 0.0)
        return ErrorRecord(name, kind, self.error / max(1, self.count), cosine, sqnr(self.xx, self.error))


def sqnr(signal: float, error: float) -> float:
    """Signal to quantization noise in dB; inf without noise."""
    if error == 0:
        return math.inf
    return 10 * math.log10(signal / error) if signal > 0 else -math.inf


def error_propagation(
    float_model: nn.Module, quantized_model: nn.Module, batches: Iterable[Any], *, progress: bool = True
) -> Records[ErrorRecord]:
    """The error at the output of each linear, norm and quantized embedding, in the order in which they run, and at the
    model's own output.

    Each batch goes through both models, one after the other, and is compared at once: memory for one batch's outputs.
    batches: as `pyqkern.calibrate` takes them. A layer that runs several times in a forward is one record.

    Raises ValueError without batches, for models whose layers do not have the same names, and for outputs of another
    shape or with NaN.
    """
    _check_models(float_model, quantized_model)
    sums: dict[str, _Sums] = {}
    with unfolded(find_attentions(float_model)), unfolded(find_attentions(quantized_model)):
        kinds = _add_errors(sums, float_model, quantized_model, batches, progress)
    records = [s.record(name, kinds.get(name, "output")) for name, s in sums.items()]
    for record in records:
        if math.isnan(record.mse):
            raise ValueError(f"{record.name}: outputs must be finite, got NaN or an infinity; look at the batches")
    title = "SQNR along depth: first layer on top, output at the bottom"
    return Records(ErrorRecord, records, _draw_errors, title, lambda record: -record.sqnr)


def _add_errors(
    sums: dict[str, _Sums], float_model: nn.Module, quantized_model: nn.Module, batches: Iterable[Any], progress: bool
) -> dict[str, str]:
    """Adds up the errors by the names of the layers; returns what these are in the quantized model."""
    names, others = _watched(float_model), _watched(quantized_model)
    for name in [name for name, module in names.items() if type(module) is type(others.get(name)) in EMBEDDINGS]:
        del names[name], others[name]  # the same table in both
    if set(names) != set(others):
        differing = sorted(set(names) ^ set(others))
        raise ValueError(f"both models must have the same layers, but only one has {', '.join(differing[:4])}")
    with counted(batches, "error propagation", progress) as each:
        for batch in each:
            expected = _outputs(float_model, names, batch)
            actual = _outputs(quantized_model, others, batch)
            for name, outputs in expected.items():
                for x, y in zip(outputs, actual.get(name, []), strict=True):
                    if x.shape != y.shape:
                        raise ValueError(
                            f"{name}: outputs must have one shape, got {tuple(x.shape)} and {tuple(y.shape)}"
                        )
                    sums.setdefault(name, _Sums()).add(x, y)
    return {name: type(module).__name__ for name, module in others.items()}


def _check_models(float_model: nn.Module, quantized_model: nn.Module) -> None:
    for name, model in (("float_model", float_model), ("quantized_model", quantized_model)):
        check_type(name, model, nn.Module, "an nn.Module")


def _draw_errors(records: Sequence[ErrorRecord], axes: Any) -> None:
    finite = [record.sqnr for record in records if math.isfinite(record.sqnr)]
    top = max(finite, default=60.0) + 5  # where there is no error at all the bar ends here
    values = [min(record.sqnr, top) for record in records]
    colors = ["#c1121f" if value < 20 else "#f4a261" if value < 30 else "#1d3557" for value in values]
    barh(axes, [record.name for record in records], values, "SQNR, dB (red below 20, orange below 30)", colors)


def _watched(model: nn.Module) -> dict[str, nn.Module]:
    """Linears, norms, embeddings and recurrent layers by their first names; what is inside of one belongs to it."""
    kinds = (*linear_types(), nn.LayerNorm, *EMBEDDINGS, QEmbedding, *RECURRENT)
    return {layer.names[0]: layer.module for layer in find_layers(model, kinds) if layer.names[0]}


def _outputs(model: nn.Module, watched: Mapping[str, nn.Module], batch: Any) -> dict[str, list[Tensor]]:
    """Every output of the watched layers in the order of the calls; the model's own is the last, under "output"."""
    found: dict[str, list[Tensor]] = {}

    def watch(name: str, module: nn.Module) -> Any:
        return module.register_forward_hook(lambda _, __, y: found.setdefault(name, []).append(_output(y).detach()))

    handles = [watch(name, module) for name, module in watched.items()]
    try:
        result = first_tensor(evaluated(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    found["output"] = [result]
    return found


def _output(y: Any) -> Tensor:
    """The tensor itself, or the outputs of a recurrent layer, which are the first of what it returns, packed or not."""
    while not isinstance(y, Tensor):
        y = y[0]
    return y


def first_tensor(output: Any) -> Tensor:
    """The tensor itself, or the logits, or else the first tensor of what the model returned."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    values = list(output.values()) if isinstance(output, Mapping) else list(output)
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise ValueError(f"a model must return a tensor or something that holds one, got {type(output).__name__}")


@dataclass(frozen=True)
class SampleRecord:
    """One input, counted through all batches, with both models' outputs.

    float_answer, quantized_answer: the index of the greatest output; changed: whether they differ.
    """

    index: int
    text: str
    changed: bool
    mse: float
    cosine: float
    float_answer: int
    quantized_answer: int
    float_output: list[float] = field(metadata={"table": False})
    quantized_output: list[float] = field(metadata={"table": False})


def compare_samples(
    float_model: nn.Module,
    quantized_model: nn.Module,
    batches: Iterable[Any],
    texts: Sequence[str] | None = None,
    *,
    top: int = 20,
    progress: bool = True,
) -> Records[SampleRecord]:
    """The `top` inputs whose output changes most, by mean squared difference, those with another answer first.

    The output is the logits or the model's first tensor, [batch, ...]; each sample's is flattened. texts: what to call
    the samples, in the order of the batches. Raises ValueError without batches, or if texts are fewer than samples.
    """
    _check_models(float_model, quantized_model)
    check_type("top", top, int, "an int")
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    found: list[SampleRecord] = []
    index = 0
    with counted(batches, "compare samples", progress) as each:
        for batch in each:
            x, y = (first_tensor(evaluated(model, batch)).float().cpu() for model in (float_model, quantized_model))
            if x.shape != y.shape or x.dim() == 0:
                raise ValueError(
                    f"outputs must be [batch, ...] of one shape, got {tuple(x.shape)} and {tuple(y.shape)}"
                )
            for a, b in zip(
                x.flatten(1) if x.dim() > 1 else x[:, None], y.flatten(1) if y.dim() > 1 else y[:, None], strict=True
            ):
                if texts is not None and index >= len(texts):
                    raise ValueError(f"texts must name every sample, got {len(texts)} for more samples than that")
                sums = _Sums()
                sums.add(a, b)
                record = sums.record("", "")
                answers = int(a.argmax()), int(b.argmax())
                text = "" if texts is None else str(texts[index])
                found.append(
                    SampleRecord(
                        index,
                        text,
                        answers[0] != answers[1],
                        record.mse,
                        record.cosine,
                        *answers,
                        a.tolist(),
                        b.tolist(),
                    )
                )
                index += 1
            found = sorted(found, key=lambda r: (not r.changed, -r.mse))[:top]
    return Records(SampleRecord, found, _draw_samples, "Inputs whose output changes most (red: another answer)")


def _draw_samples(records: Sequence[SampleRecord], axes: Any) -> None:
    names = [record.text[:50] or f"sample {record.index}" for record in records]
    colors = ["#c1121f" if record.changed else "#1d3557" for record in records]
    barh(axes, names, [record.mse for record in records], "mean squared difference of the output", colors)
