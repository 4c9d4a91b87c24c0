"""How much the outputs of a model change: what `auto` adds up, and by what it scores a model that has no labels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyqkern.analysis.compare import first_tensor
from pyqkern.analysis.units import Unit, replaced, replacements
from pyqkern.calibration.run import evaluated
from pyqkern.models.plan import Choice


@dataclass(frozen=True)
class Output:
    """What a model says to a batch: float32 [rows, channels] on the CPU; rows behind the attention mask are left out.

    logits: whether they are such: what the model returns as `logits` or under a name that ends so, with two channels
    or more.
    """

    values: Tensor
    logits: bool


def output_of(model: nn.Module, batch: Any) -> Output:
    """The model's output for one batch. Raises ValueError for one without a tensor of floats."""
    result = evaluated(model, batch)
    values, logits = _main_tensor(result)
    if not values.is_floating_point() or values.dim() == 0:
        raise ValueError(f"model must return floats [batch, ...], got {values.dtype} {list(values.shape)}")
    mask = _mask(batch)
    values = values.detach().float().cpu()
    if values.dim() == 1:
        values = values[:, None]
    if mask is not None and values.dim() == 3 and mask.shape == values.shape[:2]:
        values = values[mask.cpu() != 0]
    elif values.dim() > 2:
        values = values.flatten(0, -2) if logits else values.flatten(1)
    return Output(values, logits and values.shape[-1] > 1)


def _main_tensor(result: Any) -> tuple[Tensor, bool]:
    if isinstance(result, Mapping):
        for name, value in result.items():
            if isinstance(value, Tensor) and str(name).endswith("logits"):
                return value, True
        if isinstance(result.get("sentence_embedding"), Tensor):
            return result["sentence_embedding"], False
    return first_tensor(result), False


def _mask(batch: Any) -> Tensor | None:
    """The attention mask among the arguments, [batch, length]."""
    arguments = [batch] if isinstance(batch, Mapping) else list(batch) if isinstance(batch, tuple | list) else []
    for one in arguments:
        mask = one.get("attention_mask") if isinstance(one, Mapping) else None
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask
    return None


def changes(expected: Output, actual: Output) -> tuple[float, float]:
    """Summed over the rows: KL(float || quantized) of logits and the number of rows, or else the squared difference and
    the squared norm of the float model's. Infinite where the quantized model gives NaN.
    """
    x, y = expected.values.double(), actual.values.double()
    if x.shape != y.shape:
        raise ValueError(f"outputs must have one shape, got {list(x.shape)} and {list(y.shape)}")
    if not expected.logits:
        change, size = float((x - y).square().sum()), float(x.square().sum())
    else:
        p, q = x.log_softmax(-1), y.log_softmax(-1)
        change, size = float((p.exp() * (p - q)).sum()), float(len(x))
    return (max(0.0, change) if math.isfinite(change) else math.inf), size


class Damage:
    """The task of `run_tasks`: the change of the outputs, per row or per squared norm, with one unit quantized.

    The model is its own: for the while of a task the unit's modules are exchanged.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit], batches: Sequence[Any], expected: Sequence[Output]):
        self.model, self.batches, self.expected = model, batches, expected
        self.units = {unit.name: unit for unit in units}

    def __call__(self, choice: Choice) -> float:
        with replaced(self.model, replacements(self.units[choice.name], choice)) as model:
            found = [
                changes(expected, output_of(model, batch))
                for batch, expected in zip(self.batches, self.expected, strict=True)
            ]
        size = sum(one[1] for one in found)
        return sum(one[0] for one in found) / size if size else 0.0


class Agreement:
    """The score of a model without labels: the share of rows with the float model's greatest logit, or, where outputs
    are no logits, 1 - |float - quantized|**2 / |float|**2. The float model has 1.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        self.batches = batches
        self.expected: list[Any] = []
        for batch in batches:
            output = output_of(model, batch)
            self.expected.append(output.values.argmax(-1) if output.logits else output)

    def __call__(self, model: nn.Module) -> float:
        good = size = 0.0
        for batch, expected in zip(self.batches, self.expected, strict=True):
            actual = output_of(model, batch)
            if isinstance(expected, Output):
                change, norm = changes(expected, actual)
                good, size = good + norm - change, size + norm
            else:
                good, size = good + float((actual.values.argmax(-1) == expected).sum()), size + len(expected)
        return good / size if size else 1.0


def first_guess(expected: Sequence[Output], budget: float) -> float:
    """The damage at which about the budget is lost, before anything has been measured.

    Of logits: noise of variance v on each logit changes the KL by v / 2 * (1 - sum p**2) and the answer of a row with
    the probability Phi(-margin / sqrt(2 v)); the answers that change are at most what a score of answers loses.
    Otherwise the budget itself: it is what `Agreement` loses.
    """
    if not expected[0].logits:
        return max(budget, 1e-6)
    logits = torch.cat([output.values for output in expected]).double()
    top = logits.topk(2).values
    margins = top[:, 0] - top[:, 1]
    spread = float((1 - logits.softmax(-1).square().sum(-1)).mean())
    low, high = 1e-6, 1e3  # the standard deviation
    for _ in range(60):
        middle = math.sqrt(low * high)
        changed = float(torch.special.ndtr(-margins / (math.sqrt(2) * middle)).mean())
        low, high = (middle, high) if changed < max(budget, 1e-4) else (low, middle)
    return max(low * low / 2 * spread, 1e-12)
