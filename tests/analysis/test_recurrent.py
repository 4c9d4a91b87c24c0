"""The analyses and calibration of a model with a recurrent layer."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pyqkern
from pyqkern import QLinear, replace_linear
from pyqkern.analysis import fallback, report, sensitivity
from pyqkern.analysis.sensitivity import score_with
from pyqkern.schemes import Int8


class Recurrent(nn.Module):
    """A linear, a GRU whose weights have an outlier in a channel of the state, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.gru, self.last = nn.Linear(16, 32), nn.GRU(32, 32, batch_first=True), nn.Linear(32, 4)
        with torch.no_grad():
            self.gru.weight_ih_l0[:, 5] *= 300
            self.first.weight[5], self.first.bias[5] = 0.0, 0.01
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gru(self.first(x))[0])


STEPS = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1))


def closeness(model: nn.Module) -> float:
    with torch.no_grad():
        return -(model(STEPS) - Recurrent()(STEPS)).square().mean().item()


def test_sensitivity_and_fallback_know_recurrent_layers(tmp_path: Path) -> None:
    found = sensitivity(Recurrent(), closeness, progress=False)
    assert found[0].name == "gru" and {record.name for record in found} == {"first", "gru", "last"}
    assert found[0].drop > 10 * found[1].drop and found[0].float_bytes > 2 * Recurrent().gru.weight_ih_l0.numel()
    only = score_with(Recurrent(), closeness, Int8(), ["gru"])
    assert only == closeness(pyqkern.replace_recurrent(Recurrent())) == found[0].only
    kept = fallback(Recurrent(), closeness, 0.5 * found[0].all_but, order=found, progress=False)
    assert "gru" in kept.kept and type(kept.model.gru) is nn.GRU
    kept = fallback(Recurrent(), closeness, 1.01 * found[0].all_but, order=found, progress=False)
    assert kept.kept == ("gru",) and isinstance(kept.model.first, QLinear)
    advice = [one.advice for one in report(tmp_path / "report.html", fallback=kept)]
    assert advice == ["replace_linear(model) and replace_recurrent(model, exclude=['gru']) gives this model."]
    linears = sensitivity(Recurrent(), closeness, "int8-weight-only", progress=False)
    assert {record.name for record in linears} == {"first", "last"}, "a scheme that no recurrent layer has"
    alone = sensitivity(nn.GRU(8, 8), lambda m: -float(m(torch.ones(2, 8))[0].sum()), progress=False)
    assert [record.name for record in alone] == [""]


def test_calibration_leaves_recurrent_layers_out() -> None:
    ranges = pyqkern.calibrate(Recurrent(), [STEPS], progress=False)
    assert list(ranges) == ["first", "last"] and not ranges.not_reached
    model = replace_linear(Recurrent(), "int8-static", ranges=ranges)
    with pytest.raises(ValueError, match="got 'int8-static'; it takes the range of each step as it comes"):
        pyqkern.replace_recurrent(model, "int8-static")
    pyqkern.replace_recurrent(model)
    assert {one.scheme for one in pyqkern.summary(model).records} == {"int8-static"} and closeness(model) > -0.1
    with pytest.raises(ValueError, match="got none in GRU, but 1 recurrent layers, which need no ranges"):
        pyqkern.calibrate(nn.GRU(8, 8), [torch.ones(2, 8)], progress=False)
