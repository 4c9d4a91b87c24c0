"""embed and classify, which take files or a dask.dataframe."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyqkern.bulk.settings import BATCH_TOKENS, Settings
from pyqkern.schemes import Scheme, check_type


def embed(
    source: Any,
    model: str | Path,
    output: str | Path | None = None,
    *,
    column: str = "text",
    keep: Sequence[str] = (),
    scheme: str | Scheme | None = None,
    pooling: str | None = None,
    normalize: bool = True,
    dtype: str = "fp32",
    max_length: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    threads: int = 1,
    **job: Any,
) -> Any:
    """Embeddings of a column of texts.

    source: a file or folder of CSV (with a header), JSONL or Parquet; or a dask.dataframe.
    output: a new folder, or that of a job with the same settings, whose finished partitions stay. It gets a Parquet
    dataset with the columns row (int64: the row's number in the source, from 0), those of `keep`, embedding and, unless
    dtype is "fp32", scale: see `Embedder`, as for the other arguments. Columns kept from CSV and JSONL are strings.
    job: partition_rows (2048); workers, how many partitions are computed at once (by default cores / threads);
    scheduler, the address of a Dask scheduler instead, whose workers reach the model's folder and, where that is in
    float, output's under the same names; progress, called with a `State` after each partition.

    Returns the `State` at the end; for a dask.dataframe another one, which is computed when it is asked for, with
    `keep` and the columns of the embedding, under the index of the source; output and job must be left out then.

    A row whose text is null, no string or malformed is kept out, and named in output/_errors, or in the log of a Dask
    worker. The same row has the same bits in any batch, partition and worker where `State.differs` is None; it says why
    it may not.

    Raises TypeError and ValueError for arguments, ValueError for a source without the column, OSError, and
    FileExistsError for an output of something else; RuntimeError where a package is missing.
    """
    options = (scheme, pooling, normalize, dtype, max_length, batch_tokens, threads)
    return _run(source, Settings(_name(model), "embed", *options), output, column, keep, job)


def classify(
    source: Any,
    model: str | Path,
    output: str | Path | None = None,
    *,
    column: str = "text",
    keep: Sequence[str] = (),
    scheme: str | Scheme | None = None,
    max_length: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    threads: int = 1,
    **job: Any,
) -> Any:
    """Labels of a column of texts, by a model for sequence classification.

    The columns are label (string), probability (float32: the label's) and probabilities (float32 [labels], in the order
    of the schema's metadata "labels"). Everything else is as for `embed`.
    """
    options: dict[str, Any] = {"max_length": max_length, "batch_tokens": batch_tokens, "threads": threads}
    return _run(source, Settings(_name(model), "classify", scheme, **options), output, column, keep, job)


def _name(model: str | Path) -> str:
    check_type("model", model, (str, Path), "a folder's name")
    return str(model)


def _run(
    source: Any, settings: Settings, output: str | Path | None, column: str, keep: Sequence[str], job: dict[str, Any]
) -> Any:
    check_type("column", column, str, "a column's name")
    if isinstance(keep, str) or not all(isinstance(name, str) for name in keep):
        raise TypeError(f"keep must be names of columns, got {keep!r:.100}")
    if hasattr(source, "map_partitions"):
        from pyqkern.bulk.frame import run_frame

        if output is not None or job:
            raise ValueError(
                "output and the options of a job must be left out for a dask.dataframe; use its to_parquet"
            )
        return run_frame(source, settings, column, tuple(keep))
    check_type("source", source, (str, Path), "a file's or folder's name, or a dask.dataframe")
    check_type("output", output, (str, Path), "a folder's name")
    try:
        from pyqkern.bulk.job import run
        from pyqkern.bulk.read import Source
    except ModuleNotFoundError as error:
        raise RuntimeError('pyqkern.bulk needs pyarrow: pip install "pyqkern[bulk]"') from error
    return run(Source(Path(source), column, tuple(keep)), str(output), settings, **job)
