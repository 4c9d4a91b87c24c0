"""The scheme "float16": against torch's quantize_dynamic with dtype=torch.float16, and against the rounded weights."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import bert, output, saved
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import pyqkern
from pyqkern import QGRU, QLSTM, Float16Linear, PyqkernConfig, QLinear, QLSTMCell, quantize_dynamic, replace_linear

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.ao import quantization as ao


def rounded(module: nn.Module) -> Any:
    """A copy whose weights are those of fp16."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "bias" not in name:
                parameter.copy_(parameter.half())
    return module


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(24, 32, 2, bidirectional=True)
        self.gru, self.cell, self.fc = nn.GRU(64, 32), nn.LSTMCell(32, 32), nn.Linear(32, 8)
        self.eval()

    def forward(self, x: Any) -> Any:
        return self.fc(self.cell(self.gru(self.lstm(x)[0])[0][-1])[0])


X = torch.randn(7, 3, 24, generator=torch.Generator().manual_seed(1))


def test_quantize_dynamic_is_torchs() -> None:
    model = Model()
    quantized = quantize_dynamic(model, dtype=torch.float16)
    kinds = {name: type(module) for name, module in quantized.named_children()}
    assert kinds == {"lstm": QLSTM, "gru": QGRU, "cell": QLSTMCell, "fc": Float16Linear}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = ao.quantize_dynamic(model, dtype=torch.float16)
        by_qconfig = quantize_dynamic(model, {nn.Linear: ao.float16_dynamic_qconfig})
    assert isinstance(by_qconfig.fc, Float16Linear) and type(by_qconfig.gru) is nn.GRU
    with torch.no_grad():
        found = quantized(X)
        assert torch.equal(found, rounded(model)(X))
        torch.testing.assert_close(found, theirs(X), rtol=1e-5, atol=1e-6)  # sums of 64 products in another order
        assert 0 < (found - model(X)).abs().max() < 2**-10
    assert pyqkern.summary(quantized).bytes_after < 0.52 * pyqkern.summary(quantized).bytes_before


def test_linear() -> None:
    linear = nn.Linear(48, 16)
    with torch.no_grad():
        linear.weight[0, 0], linear.weight[0, 1] = 1e6, 1e-9
    layer = QLinear.from_linear(linear, "float16")
    assert layer.weight[0, 0] == 65504 and layer.weight[0, 1] == 0
    x = torch.randn(5, 48, requires_grad=True)
    expected = nn.functional.linear(x, layer.weight, linear.bias)
    assert torch.equal(layer(x), expected)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(5, -1))
    assert layer.state_dict()["weight"].dtype is torch.float16
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype is torch.bfloat16 and layer.packed.dtype is torch.float16
    big = nn.Linear(2, 2, dtype=torch.bfloat16)
    nn.init.constant_(big.weight, 65504)
    assert QLinear.from_linear(big, "float16").packed.isfinite().all()
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x.bfloat16())
        assert torch.equal(compiled, layer(x.bfloat16()))


def test_recurrent_layers_take_what_torchs_do() -> None:
    model = Model()
    lstm = QLSTM.from_recurrent(model.lstm, "float16")
    reference = rounded(model.lstm)
    packed = pack_padded_sequence(X, [7, 4, 2])
    hx = (torch.randn(4, 3, 32), torch.randn(4, 3, 32))
    for given in ((X,), (X, hx), (packed, hx), (X[:, 0],)):
        found, expected = lstm(*given), reference(*given)
        pairs = zip((*found[1], *found[0][:1]), (*expected[1], *expected[0][:1]), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    x = X.clone().requires_grad_()
    lstm(x)[0].sum().backward()
    assert x.grad is not None and x.grad.norm() > 0 and model.lstm.bias_ih_l1.grad is not None


def test_it_is_saved_and_pickled(tmp_path: Path) -> None:
    model = quantize_dynamic(Model(), dtype=torch.float16)
    other = quantize_dynamic(Model(), dtype=torch.float16)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        other.load_state_dict(model.state_dict())
        for one in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(one(X), model(X))
    network = replace_linear(bert("BertForSequenceClassification"), "float16")
    again = type(network).from_pretrained(saved(network, tmp_path / "q"))
    assert torch.equal(output(again), output(network)) and again.classifier.scheme.name == "float16"
    again = type(network).from_pretrained(saved(network, tmp_path / "q"), dtype=torch.bfloat16)
    assert again.classifier.packed.dtype is torch.float16
    folder = saved(bert("BertForSequenceClassification"), tmp_path / "f")
    on_load = type(network).from_pretrained(folder, quantization_config=PyqkernConfig("float16"))
    assert torch.equal(output(on_load), output(network))
    assert "float16" in pyqkern.convert.inspect(tmp_path / "q")


def test_no_other_layers() -> None:
    with pytest.raises(ValueError, match="scheme of an embedding"):
        pyqkern.replace_embedding(nn.Sequential(nn.Embedding(8, 8)), "float16")
    model = pyqkern.optimize(bert(), "float16")
    assert all(record.reason for record in pyqkern.summary(model).encoders)
    assert output(model).isfinite().all()
