"""docs/bulk.md: its commands and its Python run; Ray's where it is installed, Spark's is looked at alone."""

import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from bulk_folders import TEXTS, classifier, embedding_model
from require import require

from pyqkern.bulk import Embedder
from pyqkern.cli import main

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "bulk.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^    (pyqkern .+)", PAGE, re.MULTILINE)


@pytest.fixture(autouse=True)
def in_a_folder_with_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [f'"{text}",{i}\n' for i, text in enumerate(TEXTS) if text]
    Path("texts.csv").write_text("".join(["text,id\n", *rows]), encoding="utf-8")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs(command: str) -> None:
    name, arguments = command.split()[1], shlex.split(re.sub(r"[][]", "", command))[1:]
    model = embedding_model(Path("model")) if name == "embed" else classifier(Path("model"))
    words = {"MODEL": str(model), "INPUT": "texts.csv", "OUTPUT": "out"}
    assert main([words.get(word, word) for word in arguments]) == 0
    assert pq.read_table("out")["id"].to_pylist() == [str(i) for i, text in enumerate(TEXTS) if text]


def test_the_python_of_files_and_of_dask_runs() -> None:
    names = {"folder": str(embedding_model(Path("model")))}
    for code in BLOCKS:
        if not re.search("^import ray|^from pyspark", code, re.MULTILINE):
            exec(compile(code, "docs/bulk.md", "exec"), names)
    wanted = Embedder(Path("model"))([text for text in TEXTS if text])["embedding"]
    assert (np.stack(pq.read_table("from_dask")["embedding"].to_pylist()).astype(np.float32) == wanted).all()
    assert pq.read_table("embeddings").schema.names == ["row", "id", "embedding", "scale"]


@pytest.mark.long
def test_ray_gives_the_same_rows(tmp_path: Path) -> None:
    require("ray", "the page's job for Ray Data runs there")
    (code,) = (code for code in BLOCKS if code.startswith("import ray"))
    model = embedding_model(tmp_path / "model")
    import ray

    try:
        # Another module's class would be looked up by name in the workers, where it is not.
        exec(compile(code.replace("from_ray", str(tmp_path / "from_ray")), "docs/bulk.md", "exec"), {
            "folder": str(model), "__name__": "__main__",
        })  # fmt: skip
    finally:
        ray.shutdown()
    table = pq.read_table(tmp_path / "from_ray").sort_by("id")
    wanted = Embedder(model, dtype="int8")([text for text in TEXTS if text])
    assert (np.stack(table["embedding"].to_numpy()) == wanted["embedding"]).all()
    assert table["scale"].to_pylist() == wanted["scale"].tolist()


def test_the_python_of_spark_is_python() -> None:
    (code,) = (code for code in BLOCKS if "pyspark" in code)
    compile(code, "docs/bulk.md", "exec")
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
