"""The commands quantize and inspect."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import bert, output, saved
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from pyqkern import QEmbedding, checkpoint_config, cli, replace_embedding, replace_linear, summary
from pyqkern.checkpoints import convert


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = saved(bert("BertForSequenceClassification"), tmp_path_factory.mktemp("source"))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("no")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "onnx").mkdir()
    return folder


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, **options)


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("scheme", [None, "nf4"])
def test_quantize(source: Path, tmp_path: Path, scheme: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "folder" / "out"
    arguments = (
        ["--scheme", scheme, "--exclude", "*.query", "--exclude", "classifier", "--embeddings"] if scheme else []
    )
    assert run("quantize", source, out, *arguments) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"written: {out}: ") and "%" not in said.err  # no bar where there is no terminal
    model = load(source)
    if scheme:
        replace_embedding(model, scheme)
    replace_linear(model, scheme or "int8", exclude=["*.query", "classifier"] if scheme else [])
    loaded = load(out)
    assert torch.equal(output(loaded), output(model))
    assert isinstance(loaded.bert.embeddings.word_embeddings, QEmbedding) is bool(scheme)
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "1_Pooling"}
    assert (out / "1_Pooling" / "config.json").exists() and [path.name for path in out.parent.iterdir()] == ["out"]


def test_quantize_into_other_formats_and_back(source: Path, tmp_path: Path) -> None:
    expected = output(replace_linear(load(source), "nf4"))
    assert run("quantize", source, tmp_path / "bnb", "--scheme", "nf4", "--format", "bitsandbytes") == 0
    assert torch.equal(output(load(tmp_path / "bnb", config=checkpoint_config(tmp_path / "bnb"))), expected)
    assert run("quantize", tmp_path / "bnb", tmp_path / "ours") == 0
    assert torch.equal(output(load(tmp_path / "ours")), expected)
    assert run("quantize", source, tmp_path / "w8a8", "--format", "compressed-tensors") == 0
    config = json.loads((tmp_path / "w8a8" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "int-quantized"


def test_the_class_that_was_saved_is_kept(tmp_path: Path) -> None:
    folder = saved(bert("BertForMaskedLM"), tmp_path / "float")
    assert run("quantize", folder, tmp_path / "out", "--embeddings") == 0
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert model.get_output_embeddings() is model.get_input_embeddings().table


def failing(self: object, *arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


def test_an_interruption_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "_copy", failing)
    assert run("quantize", source, tmp_path / "out") == 130
    assert list(tmp_path.iterdir()) == [] and convert.progress == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exclude", "nothing"], "exclude must match the name of a linear, got 'nothing'"),
        (["--scheme", "int9"], "scheme must be one of"),
        (["--scheme", "int4", "--format", "bitsandbytes"], "bitsandbytes has nf4, fp4"),
        (["--scheme", "int8-static"], "needs the activations' ranges"),
    ],
)
def test_errors_leave_nothing(
    source: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("quantize", source, tmp_path / "out", *arguments) == 1
    said = capsys.readouterr().err
    assert "pyqkern quantize: " in said and message in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_quantized(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quantize", source, source) == 1 and "must not exist yet" in capsys.readouterr().err
    assert run("quantize", source, tmp_path / "once") == 0
    assert run("quantize", tmp_path / "once", tmp_path / "twice", "--scheme", "nf4") == 1
    assert "is quantized already; leave --scheme" in capsys.readouterr().err
    pickled = saved(bert(), tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert run("quantize", pickled, tmp_path / "out") == 1
    assert "pickled weights are not read" in capsys.readouterr().err


def test_inspect(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("quantize", source, tmp_path / "q", "--scheme", "nf4", "--embeddings", "--exclude", "classifier")
    capsys.readouterr()
    assert run("inspect", tmp_path / "q") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines}
    # Flat codes and scales; in memory some layers have rows of 16 channels filled up.
    assert rows["bert.pooler.dense"][1:] == ["nf4", "4,096", f"{2048 + 256 + 256}", "B"]
    assert rows["bert.embeddings.word_embeddings"][1:3] == ["nf4", "6,400"] and "classifier" not in rows
    assert rows["16"][1:3] == ["quantized", "layers"]
    model = load(tmp_path / "q")
    total = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert lines[-1].split()[-2:] == f"{total / 1e6:.2f} MB".split()
    assert len(summary(model).records) == 14


def test_inspect_of_other_folders(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", source) == 0 and "0 quantized layers" in capsys.readouterr().out
    for format, scheme in (("bitsandbytes", "nf4"), ("compressed-tensors", "int8")):
        run("quantize", source, tmp_path / format, "--format", format, "--scheme", scheme)
        capsys.readouterr()
        assert run("inspect", tmp_path / format) == 0
        text = capsys.readouterr().out
        row = next(line.split() for line in text.splitlines() if line.startswith("bert.pooler.dense"))
        assert row[1:3] == [scheme, "4,096"]
        assert next(line.split()[3] for line in text.splitlines() if line.startswith("14 quantized layers")) == format
    assert run("inspect", tmp_path) == 1 and "config.json" in capsys.readouterr().err


def test_the_command_in_a_process_of_its_own(source: Path, tmp_path: Path) -> None:
    pyqkern = str(Path(sys.executable).with_name("pyqkern"))
    command = [pyqkern, "quantize", str(source), str(tmp_path / "out"), "--scheme", "nf4"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "" and result.stdout.startswith(f"written: {tmp_path / 'out'}: 14 quantized layers")
    assert torch.equal(output(load(tmp_path / "out")), output(replace_linear(load(source), "nf4")))


def test_a_class_that_is_not_of_transformers() -> None:
    config = transformers.BertConfig(architectures=["Student"])
    with pytest.raises(ValueError, match="architectures must be a class of transformers, got 'Student'"):
        convert._class_of(config)
