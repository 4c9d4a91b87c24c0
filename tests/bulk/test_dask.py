"""The same rows by threads of this process, in other partitions, and on Dask; a dask.dataframe stays one."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from bulk_folders import TEXTS, classifier, embedding_model
from distributed import Client, LocalCluster

import pyqkern
from pyqkern.bulk import classify, embed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedding_model(tmp_path_factory.mktemp("embed"))


PROCESSES = [pytest.param(False, id="threads"), pytest.param(True, id="processes", marks=pytest.mark.long)]


@pytest.fixture(scope="module", params=PROCESSES)
def cluster(request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    """Two workers, of this process or of their own, under nannies."""
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=request.param, dashboard_address=None) as cluster:
        yield cluster


def table_of(folder: Path) -> Any:
    return pq.read_table(folder).replace_schema_metadata(None)


def test_three_ways_give_the_same_bits(folder: Path, tmp_path: Path, cluster: LocalCluster) -> None:
    texts = [f"{text} {i}" for i in range(5) for text in TEXTS]
    source = tmp_path / "in.csv"
    pd.DataFrame({"text": texts, "id": range(len(texts))}).to_csv(source, index=False)
    embed(source, folder, tmp_path / "1", workers=1, threads=2)
    embed(source, folder, tmp_path / "2", workers=2, partition_rows=13, batch_tokens=70)
    address = cluster.scheduler_address
    state = embed(source, folder, tmp_path / "3", partition_rows=31, batch_tokens=300, scheduler=address)
    assert state.rows == len(texts) and state.differs is None
    assert table_of(tmp_path / "1") == table_of(tmp_path / "2") == table_of(tmp_path / "3")
    with Client(cluster):
        frame = embed(dd.from_pandas(pd.DataFrame({"text": texts}), npartitions=3), folder).compute()
    wanted = table_of(tmp_path / "1")["embedding"].to_pylist()
    assert (np.stack(frame["embedding"]) == np.array(wanted, np.float32)).all()


def test_labels_on_a_cluster(tmp_path: Path, cluster: LocalCluster) -> None:
    model, source = classifier(tmp_path / "model", num_labels=5), tmp_path / "in.csv"
    pd.DataFrame({"text": TEXTS}).to_csv(source, index=False)
    pyqkern.convert.quantize(model, tmp_path / "quantized")
    classify(source, model, tmp_path / "1")
    classify(source, tmp_path / "quantized", tmp_path / "2", scheduler=cluster.scheduler_address, partition_rows=9)
    assert table_of(tmp_path / "1") == table_of(tmp_path / "2")


def test_a_frame_is_computed_when_it_is_asked_for(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["card", None, "money", "card " * 99]
    source = dd.from_pandas(pd.DataFrame({"words": texts, "n": range(4)}, index=[5, 6, 7, 8]), npartitions=2)
    made = embed(source, folder, column="words", keep=["n"], dtype="int8")
    assert list(made.columns) == ["n", "embedding", "scale"] and not caplog.records
    with caplog.at_level(logging.WARNING, "pyqkern.bulk"):
        frame = made.compute(scheduler="synchronous")
    assert frame.index.tolist() == [5, 7, 8] and frame["n"].tolist() == [0, 2, 3]
    assert frame.dtypes.to_dict() == made.dtypes.to_dict()
    assert "1 of 2 rows are kept out, by their index: 6: words must be a string" in caplog.text
    assert "1 of 2 texts are longer" in caplog.text
    made.to_parquet(tmp_path / "out", schema=None)  # Dask infers none for vectors
    assert dd.read_parquet(tmp_path / "out")["scale"].compute().tolist() == frame["scale"].tolist()


def test_wrong_frames(folder: Path, tmp_path: Path) -> None:
    source = dd.from_pandas(pd.DataFrame({"text": ["a"]}), npartitions=1)
    with pytest.raises(ValueError, match="no column 'words'; it has 'text'"):
        embed(source, folder, column="words")
    with pytest.raises(ValueError, match="must be left out for a"):
        embed(source, folder, tmp_path / "out")
    with pytest.raises(ValueError, match="must be left out for a"):
        classify(source, folder, workers=1)


def test_a_dataset_is_read_by_dask(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text\na\nb\n\xff\n", encoding="latin-1")
    embed(tmp_path / "in.csv", folder, tmp_path / "out", partition_rows=1)
    assert len(dd.read_parquet(tmp_path / "out")) == 2
