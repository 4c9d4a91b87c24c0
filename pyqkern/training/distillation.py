"""Learning from the float model: a loss for quantization-aware training, beside that of the labels."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyqkern.schemes import check_type


def distillation_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    teacher: nn.Module,
    temperature: float = 2.0,
    weight: float = 0.5,
    hidden_weight: float = 0.0,
    return_outputs: bool = False,
) -> Any:
    """The loss of `model(**inputs)` beside what the float model `teacher` says of the same inputs.

    weight * temperature**2 * KL(teacher || model) of the softmax of logits / temperature (Hinton et al., "Distilling
    the knowledge in a neural network", 2015), plus (1 - weight) * the model's own loss where inputs have labels, plus
    hidden_weight * the mean squared difference of all hidden states. Where there is an attention_mask of their shape,
    logits and hidden states of masked tokens do not count.

    Both are models of transformers, or return objects with `logits` and, for hidden_weight, `hidden_states`. The
    teacher is put into eval mode and runs without gradients. return_outputs: (loss, the model's outputs), as
    `Trainer.compute_loss` returns them:

        def compute_loss(self, model, inputs, return_outputs=False, **_):
            return distillation_loss(model, inputs, teacher=self.teacher, return_outputs=return_outputs)

    Raises ValueError where the two disagree in the shape of logits or hidden states, and for numbers out of range.
    """
    check_type("model", model, nn.Module, "an nn.Module")
    check_type("teacher", teacher, nn.Module, "an nn.Module")
    check_type("inputs", inputs, Mapping, "a mapping of keywords")
    for name, value in (("temperature", temperature), ("weight", weight), ("hidden_weight", hidden_weight)):
        check_type(name, value, Real, "a number")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be within [0, 1], got {weight}")
    if not hidden_weight >= 0:
        raise ValueError(f"hidden_weight must not be negative, got {hidden_weight}")
    if teacher.training:
        teacher.eval()
    states = {"output_hidden_states": True} if hidden_weight else {}
    outputs = model(**{**inputs, **states})
    with torch.no_grad():
        expected = teacher(**{**{name: value for name, value in inputs.items() if name != "labels"}, **states})
    mask = inputs.get("attention_mask")
    loss = weight * _divergence(outputs.logits, expected.logits, float(temperature), mask)
    if getattr(outputs, "loss", None) is not None:
        loss = loss + (1 - weight) * outputs.loss
    if hidden_weight:
        pairs = zip(outputs.hidden_states, expected.hidden_states, strict=True)
        loss = loss + hidden_weight * torch.stack([_difference(a, b, mask) for a, b in pairs]).mean()
    return (loss, outputs) if return_outputs else loss


def _divergence(logits: Tensor, expected: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    """temperature**2 * KL(expected || logits), the mean over rows."""
    _check_shapes("logits", logits, expected)
    log_p, log_q = ((x.float() / temperature).log_softmax(-1) for x in (expected, logits))
    rows = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return temperature**2 * _mean(rows, mask)


def _difference(states: Tensor, expected: Tensor, mask: Tensor | None) -> Tensor:
    _check_shapes("hidden_states", states, expected)
    return _mean((states.float() - expected.float()).square().mean(-1), mask)


def _mean(rows: Tensor, mask: Tensor | None) -> Tensor:
    """The mean, without what an attention mask of the same shape hides."""
    if mask is None or mask.shape != rows.shape:
        return rows.mean()
    return (rows * mask).sum() / mask.sum().clamp(min=1)


def _check_shapes(name: str, given: Tensor, expected: Tensor) -> None:
    if given.shape != expected.shape:
        raise ValueError(
            f"{name} of model and teacher must have one shape, got {list(given.shape)} and {list(expected.shape)}"
        )
