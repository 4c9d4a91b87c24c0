"""calibrate, smooth and the analyses on models that are unlike the usual: Conv1D, keywords, quantized embeddings; and
under torch's default dtype and device, which change nothing."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import IDS, bert, gpt2, output
from torch import Tensor, nn

from pyqkern import calibrate, replace_embedding, replace_linear, smooth
from pyqkern.analysis import error_propagation, range_report
from pyqkern.calibration.observers import OBSERVERS
from pyqkern.calibration.smooth import Pair
from pyqkern.schemes import Int8Static

G = torch.Generator().manual_seed(3)
NORMAL = torch.randn(2000, 16, generator=G)
X = NORMAL * NORMAL.abs()  # with tails, so that each observer cuts elsewhere


class Keywords(nn.Module):
    """Calls what it holds by keyword."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.first, self.second = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(input=self.first(input=self.norm(input=x)))


def test_linears_called_by_keyword_are_calibrated_and_reported() -> None:
    ranges = calibrate(Keywords(), [X], "minmax", progress=False)
    assert list(ranges) == ["first", "second"]
    assert [record.name for record in range_report(Keywords(), [X], ranges, progress=False)]


def test_linears_called_by_keyword_are_smoothed() -> None:
    model = Keywords()
    ranges = calibrate(model, [X], "minmax", per_channel=True, progress=False)
    with torch.no_grad():
        expected = model(X)
        smooth(model, ranges, pairs=[Pair("", ("first",), shared=True), Pair("first", ("second",))])
        assert model.first._forward_pre_hooks and torch.equal(model(X), expected)


@pytest.fixture
def default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


def fp32_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8, dtype=torch.float32, device="cpu"))


RANGES = {
    (observer, per_channel): calibrate(
        fp32_model(), [X[:900], X[900:]], observer, per_channel=per_channel, progress=False
    )
    for observer in OBSERVERS
    for per_channel in (False, True)
}


@pytest.mark.parametrize("default_dtype", [torch.bfloat16, torch.float16, torch.float64], indirect=True)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_the_default_dtype_changes_no_range(default_dtype: None, observer: str, per_channel: bool) -> None:
    found = calibrate(fp32_model(), [X[:900], X[900:]], observer, per_channel=per_channel, progress=False)["0"]
    expected = RANGES[observer, per_channel]["0"]
    assert torch.equal(found.lo, expected.lo) and torch.equal(found.hi, expected.hi)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_the_default_device_changes_no_range(observer: str) -> None:
    model = fp32_model()
    with torch.device("meta"):
        found = calibrate(model, [X[:900], X[900:]], observer, progress=False)
        assert found.from_dict(found.to_dict())["0"].lo.device.type == "cpu"
        assert replace_linear(copy.deepcopy(model), Int8Static(found))[0].input_scale.device.type == "cpu"
    assert torch.equal(found["0"].hi, RANGES[observer, False]["0"].hi)


@pytest.mark.parametrize("default_dtype", [torch.bfloat16], indirect=True)
def test_the_default_dtype_changes_no_smoothing_and_no_report(default_dtype: None) -> None:
    def run() -> tuple[Tensor, Any]:
        model = fp32_model()
        report = range_report(model, [X], RANGES["percentile", False], progress=False)
        smooth(model, RANGES["minmax", True], pairs=[Pair("", ("0",), shared=True)])
        return model[0].weight, report.to_dict()

    here = run()
    torch.set_default_dtype(torch.float32)
    there = run()
    assert torch.equal(here[0], there[0]) and here[1] == there[1]


def test_gpt2_is_calibrated_and_smoothed() -> None:
    model = gpt2()
    ranges = calibrate(model, [IDS], progress=False)
    assert {"transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"} <= set(ranges)
    quantized = replace_linear(copy.deepcopy(model), Int8Static(ranges))
    expected = output(model)
    assert (output(quantized) - expected).norm() < 0.1 * expected.norm()
    model.transformer.h[0].ln_2.weight.data[::8] = 32
    expected = output(model)
    channels = calibrate(model, [IDS], "minmax", per_channel=True, progress=False)
    pairs = [Pair("transformer.h.0.ln_2", ("transformer.h.0.mlp.c_fc",))]
    before = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    smooth(model, channels, pairs=pairs)
    assert not torch.equal(model.transformer.h[0].mlp.c_fc.weight, before)
    assert torch.equal(output(model), expected)


def test_errors_of_gpt2_are_propagated() -> None:
    model = gpt2()
    quantized = replace_linear(replace_embedding(copy.deepcopy(model)))
    records = {record.name: record for record in error_propagation(model, quantized, [IDS], progress=False)}
    assert records["transformer.h.0.attn.c_attn"].kind == "Int8Linear"
    assert records["transformer.wte"].kind == "QEmbedding" and 20 < records["transformer.wte"].sqnr < 60
    assert records["lm_head"].kind == "Int8Linear"
    assert len(range_report(model, [IDS], progress=False)) == 2 * 4 + 1


def test_errors_of_a_bert_with_quantized_embeddings_are_propagated() -> None:
    model = bert()
    quantized = replace_linear(replace_embedding(copy.deepcopy(model), include="*word_embeddings"))
    records = error_propagation(model, quantized, [{"input_ids": IDS}], progress=False)
    names = [record.name for record in records]
    assert names[0] == "embeddings.word_embeddings" and "embeddings.position_embeddings" not in names
    plain = error_propagation(model, replace_linear(copy.deepcopy(model)), [{"input_ids": IDS}], progress=False)
    assert [record.name for record in plain] == names[1:]
