"""Folders of models with recurrent layers: save_pretrained, from_pretrained, and the commands."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import saved
from torch import Tensor, nn

import pyqkern
from pyqkern import QGRU, QLSTM, PyqkernConfig, QLinear, QRNNCell, replace_linear, replace_recurrent, summary
from pyqkern.cli import main
from pyqkern.schemes import NF4

SOUND = torch.linspace(-1, 1, 2 * 640).sin().view(2, 1, 640)


class Config(transformers.PretrainedConfig):  # type: ignore[misc]
    model_type = "recurrent-of-the-tests"


class Tagger(transformers.PreTrainedModel):  # type: ignore[misc]
    """Of every kind one: directions and projections, no biases, and a cell."""

    config_class = Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lstm = nn.LSTM(32, 64, 2, bidirectional=True, proj_size=32, batch_first=True)
        self.gru = nn.GRU(64, 64, bias=False, batch_first=True)
        self.cell = nn.RNNCell(64, 32, nonlinearity="relu")
        self.out = nn.Linear(32, 8)
        self.post_init()

    def forward(self, x: Tensor) -> Tensor:
        y = self.gru(self.lstm(x)[0])[0]
        return self.out(self.cell(y[:, -1]))


class Aliased(Tagger):
    """One layer under two names, which transformers saves only where it is quantized."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.again = self.gru


X = torch.linspace(-1, 1, 2 * 5 * 32).sin().view(2, 5, 32)


def tagger(kind: Any = Tagger) -> Any:
    torch.manual_seed(0)
    model = kind(Config())
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.2, 0.2)
    return model.eval()


def output(model: Any, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model(x)


# ---- a folder and back


@pytest.mark.parametrize("scheme", ["int8", "int8-a7", "nf4", NF4(blocksize=32, double_quant=True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path: Path, scheme: Any, dtype: torch.dtype) -> None:
    model = replace_recurrent(replace_linear(tagger().to(dtype), scheme), scheme)
    expected = output(model, X.to(dtype))
    again = Tagger.from_pretrained(saved(model, tmp_path), dtype=dtype)
    assert isinstance(again.lstm, QLSTM) and isinstance(again.gru, QGRU) and isinstance(again.cell, QRNNCell)
    assert again.lstm.scheme == model.lstm.scheme and again.lstm.dtype is dtype
    assert torch.equal(output(again, X.to(dtype)), expected)
    state, other = model.state_dict(), again.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(other[key], value) for key, value in state.items())
    assert all(other[key].dtype is value.dtype for key, value in state.items())
    assert summary(again).bytes_after == summary(model).bytes_after == again.get_memory_footprint()
    assert [one.requires_grad for one in again.parameters()] == [one.requires_grad for one in model.parameters()]


def test_one_layer_under_two_names(tmp_path: Path) -> None:
    model = replace_recurrent(tagger(Aliased))
    again = Aliased.from_pretrained(saved(model, tmp_path))
    assert again.again is again.gru and isinstance(again.gru, QGRU) and torch.equal(output(again), output(model))


def test_recurrent_layers_alone_and_linears_alone(tmp_path: Path) -> None:
    model = replace_recurrent(tagger(), "nf4", include=["gru"])
    again = Tagger.from_pretrained(saved(model, tmp_path / "recurrent"))
    assert torch.equal(output(again), output(model))
    assert isinstance(again.gru, QGRU) and type(again.lstm) is nn.LSTM and type(again.out) is nn.Linear
    model = replace_linear(tagger())
    again = Tagger.from_pretrained(saved(model, tmp_path / "linears"))
    assert torch.equal(output(again), output(model)) and type(again.gru) is nn.GRU
    layers = json.loads((tmp_path / "linears" / "config.json").read_text())["quantization_config"]["layers"]
    assert all("recurrent" not in group for group in layers), "what older versions read stays as it was"


def test_quantized_as_they_are_read_and_back_in_float(tmp_path: Path) -> None:
    folder = saved(tagger(), tmp_path / "float")
    model = Tagger.from_pretrained(folder, quantization_config=PyqkernConfig("int8", recurrent=True))
    expected = replace_recurrent(replace_linear(tagger()))
    assert torch.equal(output(model), output(expected))
    assert type(Tagger.from_pretrained(folder, quantization_config=PyqkernConfig()).gru) is nn.GRU
    mixed = Tagger.from_pretrained(folder, quantization_config=PyqkernConfig("int8", recurrent="nf4"))
    assert mixed.gru.scheme.name == "nf4" and mixed.out.scheme.name == "int8"
    again = Tagger.from_pretrained(saved(mixed, tmp_path / "mixed"))
    assert torch.equal(output(again), output(mixed)) and again.config.quantization_config.recurrent.name == "nf4"
    weight = model.lstm.weight_hh_l1_reverse
    back = model.dequantize()
    assert type(back.lstm) is nn.LSTM and torch.equal(back.lstm.weight_hh_l1_reverse, weight)
    once_more = Tagger.from_pretrained(saved(back, tmp_path / "back"))
    assert torch.equal(output(once_more), output(back))
    assert (output(back) - output(tagger())).norm() < 0.05 * output(back).norm()
    with pytest.raises(ValueError, match="scheme of a recurrent layer"):
        PyqkernConfig("int8-outlier", recurrent=True)


def encodec() -> Any:
    torch.manual_seed(0)
    options = {"num_filters": 4, "hidden_size": 16, "upsampling_ratios": [2], "num_lstm_layers": 1}
    return transformers.EncodecModel(transformers.EncodecConfig(**options, codebook_size=16, codebook_dim=16)).eval()


def test_a_model_of_transformers_and_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = encodec()
    lstms = [name for name, module in model.named_modules() if isinstance(module, nn.LSTM)]
    folder = saved(model, tmp_path / "float")
    main(["quantize", str(folder), str(tmp_path / "out"), "--recurrent"])
    capsys.readouterr()
    main(["inspect", str(tmp_path / "out")])
    table = capsys.readouterr().out
    assert len(lstms) == 2 and all(name in table for name in lstms)
    values = sum(p.numel() for name, p in model.named_parameters() if "lstm.weight" in name)
    assert f"{values:,}" in table and "2 quantized layers" in table
    again = transformers.EncodecModel.from_pretrained(tmp_path / "out")
    expected = replace_recurrent(encodec())
    with torch.no_grad():
        sounds = [one.decoder(one.encoder(SOUND)) for one in (again, expected)]
    assert torch.equal(*sounds)
    assert main(["quantize", str(tmp_path / "out"), str(tmp_path / "twice"), "--recurrent"]) != 0
    assert "leave --scheme, --exclude, --embeddings and --recurrent out" in capsys.readouterr().err


# ---- what does not fit


@pytest.mark.parametrize("format", ["bitsandbytes", "compressed-tensors"])
def test_other_formats_refuse_them(tmp_path: Path, format: str) -> None:
    model = replace_recurrent(replace_linear(tagger()))
    model.hf_quantizer.quantization_config.format = format
    with pytest.raises(ValueError, match=f"{format} has quantized linears alone, but lstm is a QLSTM"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: t.pop("lstm.weight_hh_l0_scale"), r"lstm\.weight_hh_l0_scale is missing"),
        (lambda t, c: [t.pop(key) for key in list(t) if key.startswith("cell.weight")], r"cell\.weight is missing"),
        (lambda t, c: t.update({"gru.weight_ih_l0": t["gru.weight_ih_l0"][:8]}), r"gru\.weight_ih_l0 must be int8 \["),
        (
            lambda t, c: t.update({"gru.weight_ih_l0_scale": -t["gru.weight_ih_l0_scale"]}),
            "must be finite and positive",
        ),
        (lambda t, c: c[0]["recurrent"].remove("gru"), r"gru\.weight_.h_l0 in model.safetensors .* none such"),
        (lambda t, c: c[0].update(recurrent="gru"), "recurrent must be a list of names"),
        (lambda t, c: c[0]["recurrent"].append("nothing"), r"nothing\.weight is missing from the files"),
    ],
)
def test_damaged_folders(tmp_path: Path, change: Any, message: str) -> None:
    folder = saved(replace_recurrent(tagger()), tmp_path)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"]["layers"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        Tagger.from_pretrained(folder)


def test_another_class_leaves_what_it_lacks_alone(tmp_path: Path) -> None:
    class Small(Tagger):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.cell = self.out = nn.Identity()

    small = Small.from_pretrained(saved(replace_recurrent(replace_linear(tagger())), tmp_path))
    assert isinstance(small.lstm, QLSTM) and not any(isinstance(one, QLinear) for one in (small.cell, small.out))
    assert pyqkern.summary(small).recurrent[0].scheme == "int8"
