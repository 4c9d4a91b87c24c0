"""A small model with a weak spot, and scores for it, in a module that processes started by a test can import."""

import os
from typing import Any

import torch
from torch import Tensor, nn

from pyqkern import QLinear, replace_linear
from pyqkern.analysis import compare_samples, error_propagation, fallback, range_report, sensitivity


class Net(nn.Module):
    """Three linears; the input of `bad` has one channel that is 3000 times the rest, and columns that undo it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.bad, self.last = nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 4)
        with torch.no_grad():
            self.first.weight[5] *= 3000
            self.bad.weight[:, 5] /= 3000

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.bad(self.first(x))))


X = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))


class Closeness:
    """Minus the mean squared difference to the float model: 0 at best."""

    def __init__(self) -> None:
        with torch.no_grad():
            self.expected = Net()(X)
        self.calls = 0

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        with torch.no_grad():
            return -float((model(X) - self.expected).square().mean())


class Dying(Closeness):
    """Takes its process with it when the layer `bad` is the only quantized one."""

    def __call__(self, model: nn.Module) -> float:
        quantized = [name for name, module in model.named_modules() if isinstance(module, QLinear)]
        if quantized == ["bad"]:
            os._exit(1)
        return super().__call__(model)


def net_analyses() -> dict[str, Any]:
    """Every analysis of Net, under the names that `report` has for them; the texts of the samples are HTML."""
    model, quantized = Net(), replace_linear(Net())
    order = sensitivity(model, Closeness(), progress=False)
    texts = [f"<script>{i}</script>" for i in range(64)]
    return {
        "sensitivity": order,
        "fallback": fallback(model, Closeness(), order[0].all_but, order=order, progress=False),
        "propagation": error_propagation(model, quantized, [X], progress=False),
        "samples": compare_samples(model, quantized, [X], texts, progress=False),
        "ranges": range_report(model, [X], progress=False),
    }
