"""The commands `embed` and `classify`: what they write, say and leave behind."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from bulk_folders import TEXTS, classifier, embedding_model

import pyqkern
from pyqkern import bulk, cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedding_model(tmp_path_factory.mktemp("embed"))


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return path


def test_embed_says_what_became_of_the_rows(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = jsonl(tmp_path / "in.jsonl", TEXTS)
    source.write_text(source.read_text() + "{\n")
    arguments = ["embed", str(folder), str(source), str(tmp_path / "out"), "--keep", "id", "--dtype", "binary"]
    assert cli.main([*arguments, "--partition-rows", "9", "--scheme", "int8-a7", "--no-normalize"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"written: {tmp_path / 'out'}: 24 rows; ") and "texts a second" in said.out
    assert "1 rows are kept out" in said.err and "1 texts are longer" in said.err and "differ" not in said.err
    assert pq.read_schema(tmp_path / "out" / "part-00002.parquet").names == ["row", "id", "embedding", "scale"]
    assert cli.main([*arguments, "--partition-rows", "9", "--scheme", "int8-a7"]) == 1
    assert "was begun with normalize=False, got True" in capsys.readouterr().err


def test_classify_speaks_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, source = classifier(tmp_path / "model", num_labels=3), jsonl(tmp_path / "in.jsonl", TEXTS)
    arguments = ["classify", str(model), str(source), str(tmp_path / "out"), "--scheme", "float32", "--json"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["rows"] == found["new_rows"] == 24 and found["truncated"] == 1 and found["bad"] == 0
    assert found["output"] == str(tmp_path / "out") and "no layer" in found["differs"]
    assert "--batch-tokens 1" in said.err
    assert cli.main(arguments) == 0 and json.loads(capsys.readouterr().out)["new_rows"] == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--column", "words"], "no column 'words'; it has 'text', 'id'"),
        (["--workers", "2", "--scheduler", "inproc://x"], "--workers must be left out"),
        (["--max-length", "1"], "max_length must be at least 3"),
    ],
)
def test_errors_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    source = jsonl(tmp_path / "in.jsonl", TEXTS)
    assert cli.main(["embed", str(folder), str(source), str(tmp_path / "out"), *more]) == 1
    said = capsys.readouterr().err
    assert said.startswith("pyqkern embed: ") and message in said and said.count("\n") == 1


@pytest.mark.parametrize("package", ["pyarrow", "pandas", "dask", "distributed", "transformers"])
def test_it_is_imported_without_its_packages(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """So are the other commands, since `pyqkern.cli` imports it."""
    monkeypatch.setattr(pyqkern, "bulk", bulk)  # to be put back
    for name in [name for name in sys.modules if name.startswith("pyqkern.bulk")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    for name in ("pyqkern.bulk", "pyqkern.bulk.settings", "pyqkern.bulk.values"):
        importlib.import_module(name)


@pytest.mark.parametrize("package", ["pyarrow", "distributed"])
def test_a_missing_package_is_named_with_its_extra(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for name in [name for name in sys.modules if name.startswith(("pyqkern.bulk.job", "pyqkern.bulk.read"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    arguments = ["embed", str(folder), str(jsonl(tmp_path / "in.jsonl", TEXTS)), str(tmp_path / "out")]
    assert cli.main([*arguments, "--scheduler", "tcp://127.0.0.1:1"]) == 1
    assert 'pip install "pyqkern[bulk]"' in capsys.readouterr().err


INTERRUPTED = """
import os, signal, sys
from pyqkern import bulk, cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
embed = bulk.embed

def interrupted(*arguments, progress, **options):
    def also(state):
        progress(state)
        os.kill(os.getpid(), signal.SIGINT)
    return embed(*arguments, progress=also, **options)

bulk.embed = interrupted
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.long  # imports in a process of its own
def test_control_c_ends_cleanly_and_the_same_command_goes_on(folder: Path, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", TEXTS * 40)
    arguments = ["embed", str(folder), str(source), str(tmp_path / "out"), "--partition-rows", "32"]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 130 and "interrupted; the same command goes on" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    written = len(list((tmp_path / "out").glob("part-*")))
    assert 1 <= written < 30 and not list((tmp_path / "out").glob("*.unfinished"))
    state = bulk.embed(source, folder, tmp_path / "out", partition_rows=32)
    assert state.rows == 960 and state.new_rows == 960 - 32 * written
