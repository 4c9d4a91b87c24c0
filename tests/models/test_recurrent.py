"""replace_recurrent: what is replaced, what is kept and why, and that an error changes nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import pyqkern
from pyqkern import QGRU, QLSTM, QRNN, QGRUCell, replace_linear, replace_recurrent, summary


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        self.lstm = nn.LSTM(24, 16, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(32, 32)
        self.out = nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.gru(self.lstm(self.embedding(ids))[0])[0])


def test_replaced_and_summed_up() -> None:
    torch.manual_seed(0)
    model, ids = Tagger().eval(), torch.arange(24).view(3, 8)
    expected = model(ids).detach()
    replace_linear(replace_recurrent(model))
    with torch.no_grad():
        assert (model(ids) - expected).abs().max() <= 0.03 * expected.abs().max()
    found = summary(model)
    assert [(one.name, one.scheme, one.shape) for one in found.recurrent] == [
        ("lstm", "int8", (16, 24)), ("gru", "int8", (32, 32)),
    ]  # fmt: skip
    assert [one.name for one in found.records] == ["out"]  # the weights of gates are no linears of the model
    floats = Tagger()
    assert found.bytes_before == sum(p.numel() * 4 for p in floats.parameters()) and found.other_bytes == 0
    lstm = sum(p.numel() * 4 for p in floats.lstm.parameters())
    assert found.recurrent[0].bytes_before == lstm > 2 * found.recurrent[0].bytes_after
    assert "2 of 2 recurrent layers quantized" in str(found)
    assert len(found.to_dict()["recurrent"]) == 2


def test_kept_with_a_reason() -> None:
    class Mine(nn.GRU):
        pass

    tied, owner = nn.LSTMCell(8, 8), nn.Module()
    owner.weight = tied.weight_hh
    patched = nn.RNNCell(8, 8)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    parts: dict[str, Any] = {
        "mine": Mine(8, 8), "owner": owner, "tied": tied, "patched": patched,
        "normed": parametrizations.weight_norm(nn.GRU(8, 8), "weight_hh_l0"), "no": nn.GRU(8, 8),
        "done": QGRU(8, 8), "plain": nn.GRUCell(8, 8, bias=False),
    }  # fmt: skip
    model = nn.ModuleDict(parts)
    replace_recurrent(model, exclude="no")
    reasons = {one.name: one.reason for one in summary(model).recurrent}
    assert reasons == {
        "mine": "subclass of nn.GRU: Mine, whose forward may be its own",
        "tied": "a weight is shared with owner.weight",
        "patched": "patched: its forward was replaced",
        "normed": "parametrized: a weight is computed from other parameters",
        "no": "excluded",
        "done": None,
        "plain": None,
    }
    assert isinstance(model["plain"], QGRUCell) and type(model["tied"]) is nn.LSTMCell


def test_used_twice_stays_one_layer_and_hooks_carry_over() -> None:
    gru, seen = nn.GRU(8, 8), []
    gru.register_forward_hook(lambda *_: seen.append(1))
    model = nn.ModuleList([gru, gru])
    replace_recurrent(model)
    assert model[0] is model[1] and isinstance(model[0], QGRU)
    model[0](torch.randn(2, 1, 8))
    assert seen == [1] and "0.weight_ih_l0" in model.state_dict()


def test_the_model_itself_and_training_mode() -> None:
    layer = replace_recurrent(nn.RNN(8, 8, nonlinearity="relu").eval())
    assert isinstance(layer, QRNN) and not layer.training and layer.mode == "rnn_relu"


def test_an_error_names_the_layer_and_changes_nothing() -> None:
    model = nn.ModuleDict({"good": nn.LSTM(32, 32), "bad": nn.LSTM(32, 32)})
    model["bad"].weight_hh_l0.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="bad: weight must be finite"):
        replace_recurrent(model)
    assert type(model["good"]) is nn.LSTM
    replace_recurrent(model, exclude=["bad"])
    assert isinstance(model["good"], QLSTM)
    with pytest.raises(ValueError, match="must match the name of a recurrent layer"):
        replace_recurrent(model, include="nothing")
    with pytest.raises(ValueError, match="scheme of a recurrent layer"):
        replace_recurrent(model, "int8-outlier")


def test_the_errors_of_its_outputs_are_measured() -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.GRUCell(24, 16)).eval()
    batches = [torch.randn(4, 24)]
    quantized = replace_recurrent(nn.Sequential(model[0], nn.GRUCell(24, 16)).eval())
    records = pyqkern.analysis.error_propagation(model, quantized, batches)
    assert "1" in {record.name for record in records}
