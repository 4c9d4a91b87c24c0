"""Whole jobs: files to a Parquet dataset, what is kept out, what goes on, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bulk_folders import TEXTS, classifier, embedding_model

from pyqkern.bulk import Embedder, classify, embed, job, output
from pyqkern.bulk.job import State


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedding_model(tmp_path_factory.mktemp("embed"))


def csv_file(path: Path, texts: list[str] = TEXTS) -> Path:
    rows = ['"{}",{}'.format(text.replace('"', '""'), i) for i, text in enumerate(texts)]
    path.write_text("\n".join(["text,id", *rows]) + "\n", encoding="utf-8")
    return path


def errors(folder: Path) -> dict[int, str]:
    lines = [line for path in sorted((folder / "_errors").iterdir()) for line in path.read_text().splitlines()]
    return {row["row"]: row["reason"] for row in map(json.loads, lines)}


def rows(folder: Path, name: str = "embedding") -> Any:
    return np.array(pq.read_table(folder).column(name).to_pylist(), dtype=np.float32)


def test_a_csv_becomes_a_dataset(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, float | None]] = []
    state = embed(
        csv_file(tmp_path / "in.csv"), folder, tmp_path / "out", keep=["id"], partition_rows=7,
        progress=lambda state: seen.append((state.rows, state.seconds_left)),
    )  # fmt: skip
    table = pq.read_table(tmp_path / "out")
    assert table.schema.names == ["row", "id", "embedding"] and table.schema.field("id").type == pa.string()
    assert table["row"].to_pylist() == list(range(24)) == [int(i) for i in table["id"].to_pylist()]
    assert (rows(tmp_path / "out") == Embedder(folder)(TEXTS)["embedding"]).all()
    assert (state.rows, state.new_rows, state.bad, state.truncated, state.partitions) == (24, 24, 0, 1, 4)
    assert state.differs is None and state.texts_per_second > 0
    assert len(seen) == 4 and seen[-1] == (24, 0.0) and all(left is not None for _, left in seen)
    assert not (tmp_path / "out" / "_model").exists() and errors(tmp_path / "out") == {}


def test_every_kind_of_file_gives_the_same_rows(folder: Path, tmp_path: Path) -> None:
    table = pa.table({"text": TEXTS, "n": list(range(len(TEXTS)))})
    (tmp_path / "parquet").mkdir()
    pq.write_table(table[:9], tmp_path / "parquet" / "a.parquet", row_group_size=4)
    pq.write_table(table[9:], tmp_path / "parquet" / "b.parquet")
    lines = [json.dumps({"text": text, "n": {"of": i}}) for i, text in enumerate(TEXTS)]
    (tmp_path / "in.jsonl").write_text("\n\n".join(lines))
    embed(csv_file(tmp_path / "in.csv"), folder, tmp_path / "1")
    embed(tmp_path / "in.jsonl", folder, tmp_path / "2", keep=["n"], partition_rows=10)
    embed(tmp_path / "parquet", folder, tmp_path / "3", keep=["n"], partition_rows=10, workers=1)
    assert (rows(tmp_path / "1") == rows(tmp_path / "2")).all() and (rows(tmp_path / "1") == rows(tmp_path / "3")).all()
    assert pq.read_table(tmp_path / "2")["n"].to_pylist() == [json.dumps({"of": i}) for i in range(24)]
    assert pq.read_table(tmp_path / "3")["n"].to_pylist() == list(range(24))
    assert pq.read_schema(tmp_path / "3" / "part-00000.parquet").field("n").type == pa.int64()


def test_labels(tmp_path: Path) -> None:
    state = classify(csv_file(tmp_path / "in.csv"), classifier(tmp_path / "model", num_labels=3), tmp_path / "out")
    table = pq.read_table(tmp_path / "out")
    assert state.rows == 24 and table.schema.names == ["row", "label", "probability", "probabilities"]
    names = json.loads(table.schema.metadata[b"labels"])
    assert names == ["LABEL_0", "LABEL_1", "LABEL_2"]
    values = rows(tmp_path / "out", "probabilities")
    assert [names[i] for i in values.argmax(1)] == table["label"].to_pylist()
    assert values.max(1).tolist() == table["probability"].to_pylist()


BAD = {
    "csv": (
        b'\xef\xbb\xbftext,id\ngood,1\nshort\n\nlong,2,3\n"quoted,\nover lines",4\nbytes \xff,5\n"a"b,6\ngood,7\n'
        b'"open,8\n',
        ["good", "quoted,\nover lines", "good"],
        {
            1: "line 3: 1 fields", 2: "line 5: 3 fields", 4: "not UTF-8", 5: "line 9: ',' expected",
            7: "line 11: unexpected",
        },
    ),
    "jsonl": (
        b'{"text": "good"}\n{"text": null}\n{"text": 5}\n[1]\n{"id": 1}\n{"text"\n{"text": "\\ud800"}\n\xff\n'
        + b"[" * 99999
        + b'\n{"text": "good"}',
        ["good", "good"],
        {
            1: "must be a string, got null", 2: "got int", 3: "must be a JSON object, got list",
            4: "no column 'text'; it has 'id'", 5: "line 6 is no JSON", 6: "not UTF-8", 7: "no JSON", 8: "no JSON",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_rows_are_named_and_kept_out(folder: Path, tmp_path: Path, kind: str) -> None:
    content, texts, reasons = BAD[kind]
    (tmp_path / f"in.{kind}").write_bytes(content)
    state = embed(tmp_path / f"in.{kind}", folder, tmp_path / "out", partition_rows=3)
    found = errors(tmp_path / "out")
    assert found.keys() == reasons.keys() and state.bad == len(reasons)
    for row, reason in reasons.items():
        assert reason in found[row]
    assert (rows(tmp_path / "out") == Embedder(folder)(texts)["embedding"]).all()
    good = [row for row in range(state.rows + state.bad) if row not in reasons]
    assert pq.read_table(tmp_path / "out")["row"].to_pylist() == good


def test_bad_rows_of_parquet(folder: Path, tmp_path: Path) -> None:
    damaged = pa.array([b"good", None, b"\xff", "é".encode()]).view(pa.string())
    pq.write_table(pa.table({"text": damaged}), tmp_path / "in.parquet")
    state = embed(tmp_path / "in.parquet", folder, tmp_path / "out")
    assert state.rows == 2 and errors(tmp_path / "out") == {
        1: "text must be a string, got null", 2: "text must be a string, got bytes",
    }  # fmt: skip


def test_a_model_that_gives_nan_loses_that_row_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_bad(*arguments: Any) -> Any:
        rows = job.compute(*arguments)
        return type(rows)({name: column[1:] for name, column in rows.columns.items()}, {0: "not finite"}, 0)

    monkeypatch.setattr(job, "partial", lambda *_, **__: one_bad)
    state = embed(csv_file(tmp_path / "in.csv"), folder, tmp_path / "out", partition_rows=12)
    assert state.rows == 22 and errors(tmp_path / "out") == {0: "not finite", 12: "not finite"}


def test_another_model_under_the_same_name_is_read_anew(folder: Path, tmp_path: Path) -> None:
    source, model = csv_file(tmp_path / "in.csv"), embedding_model(tmp_path / "model")
    for scheme in ("int8", "float32"):
        for make, out in ((classifier, tmp_path / f"{scheme}.1"), (embedding_model, tmp_path / f"{scheme}.1")):
            for old in (model, out):
                shutil.rmtree(old, ignore_errors=True)
            embed(source, make(model), out, scheme=scheme)
        embed(source, folder, tmp_path / f"{scheme}.2", scheme=scheme)
        assert (rows(tmp_path / f"{scheme}.1") == rows(tmp_path / f"{scheme}.2")).all()


# ---- going on


def stop_after(partitions: int, error: BaseException) -> Any:
    def progress(state: State) -> None:
        if state.partitions == partitions:
            raise error

    return progress


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_job_goes_on(folder: Path, tmp_path: Path, error: BaseException) -> None:
    source = csv_file(tmp_path / "in.csv", TEXTS * 3)
    with pytest.raises(type(error)):
        embed(source, folder, tmp_path / "out", partition_rows=8, progress=stop_after(2, error))
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")}
    assert len(written) == 2
    state = embed(source, folder, tmp_path / "out", partition_rows=8, batch_tokens=100, workers=1)
    assert (state.rows, state.new_rows, state.truncated, state.partitions) == (72, 56, 3, 9)
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    assert (rows(tmp_path / "out") == Embedder(folder)(TEXTS * 3)["embedding"]).all()
    again = embed(source, folder, tmp_path / "out", partition_rows=8)
    assert (again.rows, again.new_rows) == (72, 0)


def test_a_full_disk_leaves_no_half_partition(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(table: pa.Table, path: Path) -> None:
        path.write_bytes(b"PAR1 and no more")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        embed(csv_file(tmp_path / "in.csv"), folder, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"_errors", "_job.json", "_lock", "_model"}
    monkeypatch.undo()
    assert embed(tmp_path / "in.csv", folder, tmp_path / "out").rows == 24


def test_other_settings_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    source = csv_file(tmp_path / "in.csv")
    with pytest.raises(KeyboardInterrupt):
        embed(source, folder, tmp_path / "out", progress=stop_after(1, KeyboardInterrupt()))
    for options, name in (
        ({"scheme": "nf4"}, "scheme={'name': 'int8'}"),
        ({"dtype": "int8"}, "dtype='fp32'"),
        ({"pooling": "cls"}, "pooling='mean'"),
        ({"keep": ["id"]}, r"keep=\[\]"),
        ({"max_length": 9}, "max_length=None"),
        ({"partition_rows": 5}, "partition_rows=2048"),
    ):
        with pytest.raises(ValueError, match=f"was begun with {name}"):
            embed(source, folder, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="was begun with model="):
        embed(source, classifier(tmp_path / "other"), tmp_path / "out")
    csv_file(source, TEXTS[1:])
    with pytest.raises(ValueError, match="was begun with input="):
        embed(source, folder, tmp_path / "out")


def test_outputs_that_are_not_ours(folder: Path, tmp_path: Path) -> None:
    source = csv_file(tmp_path / "in.csv")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").touch()
    for name, message in (("theirs", "holds something else"), ("in.csv", "is a file")):
        with pytest.raises(FileExistsError, match=message):
            embed(source, folder, tmp_path / name)
    with output.opened(tmp_path / "busy", {}), pytest.raises(FileExistsError, match="another process"):
        embed(source, folder, tmp_path / "busy")
    embed(source, folder, tmp_path / "out")
    (tmp_path / "out" / "part-00000.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match="is no partition of this job"):
        embed(source, folder, tmp_path / "out")
    (tmp_path / "out" / "_job.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        embed(source, folder, tmp_path / "out")


# ---- sources


def test_small_inputs(folder: Path, tmp_path: Path) -> None:
    for name, content, count in (
        ("header.csv", "text\n", 0),
        ("empty.jsonl", "", 0),
        ("one.csv", "text\na", 1),
        ("one.jsonl", '{"text": "a"}', 1),
    ):
        (tmp_path / name).write_text(content)
        state = embed(tmp_path / name, folder, tmp_path / f"{name}.out", dtype="int8")
        table = pq.read_table(tmp_path / f"{name}.out")
        assert state.rows == len(table) == count and table.schema.names == ["row", "embedding", "scale"]
        assert table.schema.field("embedding").type == pa.list_(pa.int8(), 64)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.csv", b"", "no column 'text'; it has none"),
        ("in.csv", b"words,id\na,1\n", "no column 'text'; it has 'words', 'id'"),
        ("in.csv", b"text,text\na,b\n", "2 columns 'text'"),
        ("in.csv", b'"text\n', "must begin with the names of its columns"),
        ("in.jsonl", b'{"words": "a"}\n', "no column 'text'; it has 'words'"),
        ("in.parquet", b"PAR1", "no Parquet file"),
        ("in.txt", b"text\n", "must be a file or folder of .csv"),
    ],
)
def test_sources_without_the_column(folder: Path, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        embed(tmp_path / name, folder, tmp_path / "out")


def test_wrong_sources_and_arguments(folder: Path, tmp_path: Path) -> None:
    source = csv_file(tmp_path / "in.csv")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    (tmp_path / "empty").mkdir()
    wrong: list[tuple[Any, type[Exception], str]] = [
        ((tmp_path / "nowhere.csv", folder, tmp_path / "out"), FileNotFoundError, "does not exist"),
        ((tmp_path / "numbers.parquet", folder, tmp_path / "out"), ValueError, "column of strings, got int64"),
        ((tmp_path / "empty", folder, tmp_path / "out"), ValueError, "files of one kind"),
        ((source, folder), TypeError, "output must be"),
        ((5, folder, tmp_path / "out"), TypeError, "source must be"),
        ((source, 5, tmp_path / "out"), TypeError, "model must be"),
    ]
    for arguments, error, message in wrong:
        with pytest.raises(error, match=message):
            embed(*arguments)
    options: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"keep": "id"}, TypeError, "keep must be"),
        ({"keep": ["row"]}, ValueError, "no column 'row'"),
        ({"column": 5}, TypeError, "column must be"),
        ({"partition_rows": 0}, ValueError, "partition_rows must be"),
        ({"workers": 0}, ValueError, "workers must be"),
        ({"wrong": 1}, TypeError, "wrong"),
    ]
    for one, error, message in options:
        with pytest.raises(error, match=message):
            embed(source, folder, tmp_path / "out", **one)
    csv_file(source).write_text("text,row\na,1\n")
    with pytest.raises(ValueError, match="keep must not have 'row'"):
        embed(source, folder, tmp_path / "out", keep=["row"])
    assert embed(source, folder, tmp_path / "out").rows == 1  # what never began leaves no settings behind
