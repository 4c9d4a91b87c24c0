"""What quantize and inspect do with folders that were not made by save_pretrained alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import bert, saved

from pyqkern import cli
from pyqkern.checkpoints.convert import inspect, quantize


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = saved(bert(num_hidden_layers=1), tmp_path / "model")
    (made / "vocab.txt").write_text("[PAD]\n")
    return made


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_code_of_a_folder_is_not_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it asked for on the terminal."""
    config = json.loads((folder / "config.json").read_text())
    changes: list[dict[str, Any]] = [
        {"auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}, "model_type": "evil"}
    ]
    changes += [{"auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}, {"architectures": ["system"]}]
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    for i, change in enumerate(changes):
        (folder / "config.json").write_text(json.dumps(config | change))
        run("quantize", folder, tmp_path / f"out{i}")
        run("inspect", folder)
        assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out0").exists() and not (tmp_path / "out2").exists()


@pytest.mark.parametrize("name", ["secret.txt", "model.safetensors", "config.json", "1_Pooling"])
def test_links_out_of_the_folder_are_not_followed(folder: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    if (folder / name).exists():
        (folder / name).rename(outside)
    else:
        outside.mkdir()
    (folder / name).symlink_to(outside)
    with pytest.raises(ValueError, match=f"{name} must be in its folder, but is a link out of it"):
        quantize(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "outside"]


def test_a_snapshot_of_the_hub_links_to_its_blobs(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(folder.iterdir()):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(i))
    quantize(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_text() == "[PAD]\n" and "7 quantized layers" in inspect(
        tmp_path / "out"
    )


def test_neither_pipes_nor_the_result_are_copied(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "sub").mkdir()
    (folder / "sub" / "out").mkdir()
    (folder / "sub" / "out" / "old").write_text("")
    quantize(folder, folder / "out")
    quantize(folder, folder / "sub" / "again")
    names = {path.name for path in (folder / "out").iterdir()}
    assert "pipe" not in names and "out" not in names and "vocab.txt" in names
    assert not (folder / "sub" / "again" / "sub" / "again").exists()


def test_what_a_killed_run_left_is_removed(folder: Path, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead, alive = (tmp_path / f".out.{pid}.unfinished" for pid in (process.pid, os.getppid()))
    for left in (dead, alive):
        left.mkdir()
    quantize(folder, tmp_path / "out")
    assert not dead.exists() and alive.exists() and (tmp_path / "out").is_dir()


def test_everything_is_looked_at_before_the_long_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr(transformers.BertModel, "from_pretrained", lambda *_, **__: pytest.fail("the work began"))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-10])
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        quantize(folder, tmp_path / "out")
    (folder / "model.safetensors").write_bytes(content)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="must be in a folder that can be written to"):
        quantize(folder, tmp_path / "file" / "out")
    with pytest.raises(ValueError, match="format must be one of"):
        quantize(folder, tmp_path / "out", format="gguf")


@pytest.mark.parametrize(
    "content", [b"[1]", b"{", b'{"a": "\xff"}', b'{"quantization_config": []}', b"[" * 100_000, b""], ids=range(6)
)
def test_a_config_that_is_none(
    folder: Path, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "config.json").write_bytes(content)
    for command in (("inspect", folder), ("quantize", folder, tmp_path / "out")):
        assert run(*command) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and str(folder / "config.json") in said


def test_names_are_written_in_utf8_whatever_the_locale(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    quantize(folder, tmp_path / "out")
    tensors, config = load_file(tmp_path / "out" / "model.safetensors"), tmp_path / "out" / "config.json"
    tensors = {key.replace("pooler", "größe"): value for key, value in tensors.items()}
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    config.write_text(config.read_text().replace("pooler", "größe"), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("pyqkern")), "inspect", str(tmp_path / "out")]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    result = subprocess.run(command, capture_output=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    assert "größe.dense" in result.stdout.decode("utf-8")


def test_a_full_disk_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    assert run("quantize", folder, tmp_path / "out") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pyqkern quantize: ")]
    assert len(lines) == 1 and "No space left on device" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_without_a_config_says_what_it_lacks(tmp_path: Path) -> None:
    for call in (lambda: inspect(tmp_path), lambda: quantize(tmp_path, tmp_path / "out")):
        with pytest.raises(FileNotFoundError, match=r"must hold config\.json, as save_pretrained writes it"):
            call()
