"""A job: files to a Parquet dataset, partition by partition, and on from where an earlier run ended."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from pyqkern.bulk.model import Rows, text_model
from pyqkern.bulk.output import Output, digest, opened
from pyqkern.bulk.read import Partition, Source
from pyqkern.bulk.settings import PARTITION_ROWS, Settings, checked
from pyqkern.bulk.state import State
from pyqkern.checkpoints import convert
from pyqkern.schemes import Scheme

ROW = "row"  # the column with a row's number in the input

Progress = Callable[[State], None]


def run(
    source: Source,
    output: str | Path,
    settings: Settings,
    *,
    partition_rows: int = PARTITION_ROWS,
    workers: int | None = None,
    scheduler: str | None = None,
    progress: Progress | None = None,
) -> State:
    """The job: reads here, computes in the workers, writes here. What it raises leaves finished partitions behind."""
    settings = checked(settings)
    for name, number in (("partition_rows", partition_rows), ("workers", 1 if workers is None else workers)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {number!r}")
    settings = replace(settings, digest=digest(Path(settings.model)))
    manifest = _manifest(source, settings, partition_rows)
    with opened(Path(output), manifest) as out:
        settings = _quantized(settings, out)
        local = text_model(settings)  # what is wrong with it is said here, before the work
        columns = _schema(source, local)
        state = State(differs=local.differs)
        with _pool(workers, settings.threads or 1, scheduler) as pool:
            for part, rows in _computed(source.partitions(partition_rows), pool, settings, out, state):
                bad = part.bad | {part.rows[place]: why for place, why in rows.bad.items()}
                table = _table(part, rows, columns)
                counts = {"rows": len(table), "bad": len(bad), "truncated": rows.truncated}
                out.write(part.number, table, bad, counts)
                _count(state, counts, new=len(table))
                if progress is not None:
                    progress(state)
        out.finish()
    return state


def _manifest(source: Source, settings: Settings, partition_rows: int) -> dict[str, Any]:
    """What a row, and the partition that it is in, depend on."""
    own = {
        name: value
        for name, value in asdict(settings).items()
        if name not in ("batch_tokens", "threads", "model", "digest")
    }
    scheme = settings.scheme.to_dict() if isinstance(settings.scheme, Scheme) else settings.scheme
    read = {"column": source.column, "keep": list(source.keep), "partition_rows": partition_rows}
    return own | {"scheme": scheme, "model": settings.digest, **read, "input": source.identity()}


def _quantized(settings: Settings, out: Output) -> Settings:
    """The settings with the quantized model in the output's folder, which is made there once for all workers."""
    if not isinstance(settings.scheme, Scheme):
        return settings
    if not out.model.exists():
        convert.quantize(settings.model, out.model, settings.scheme)  # type: ignore[arg-type]
    return replace(settings, model=str(out.model.resolve()), scheme=None, digest=digest(out.model))


def _schema(source: Source, local: Any) -> pa.Schema:
    """The columns of the output; the labels of a classifier are in its metadata."""
    made = {name: array(values).type for name, values in local.empty().items()}
    if taken := [name for name in source.keep if name in (ROW, *made)]:
        raise ValueError(f"keep must not have {taken[0]!r}, a column of the output's own")
    fields = [pa.field(ROW, pa.int64()), *source.schema(), *(pa.field(name, kind) for name, kind in made.items())]
    return pa.schema(fields, {"labels": json.dumps(local.labels)} if hasattr(local, "labels") else None)


def array(values: Any) -> pa.Array:
    """A column of numbers [rows], or [rows, width] as lists of one length, or strings."""
    if values.dtype == object:
        return pa.array(values, pa.string())
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _table(part: Partition, rows: Rows, schema: pa.Schema) -> pa.Table:
    good = [place for place in range(len(part.rows)) if place not in rows.bad]
    kept = {name: [values[place] for place in good] for name, values in part.kept.items()}
    columns = {ROW: [part.rows[place] for place in good], **kept}
    columns |= {name: array(values) for name, values in rows.columns.items()}
    return pa.table(columns, schema)


def _computed(
    partitions: Iterator[Partition], pool: "Pool", settings: Settings, out: Output, state: State
) -> Iterator[tuple[Partition, Rows]]:
    """The partitions that are not finished yet, as they become so; two for each worker are on their way."""
    start = time.perf_counter()
    unfinished = (part for part in partitions if not _is_finished(part, out, state))
    waiting: dict[Future[Rows], Partition] = {}

    def submit(part: Partition) -> None:
        waiting[pool.executor.submit(pool.compute, settings, part.texts)] = part

    for part in islice(unfinished, 2 * pool.slots):
        submit(part)
    while waiting:
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            part, rows = waiting.pop(future), future.result()
            for another in islice(unfinished, 1):
                submit(another)
            state.seconds, state.share = time.perf_counter() - start, max(state.share, part.done)
            yield part, rows


def _is_finished(part: Partition, out: Output, state: State) -> bool:
    counts = out.counts(part.number)
    if counts is None:
        return False
    _count(state, counts, new=0)
    if not state.new_rows:
        state.share = state.from_share = part.done
    return True


def _count(state: State, counts: dict[str, int], *, new: int) -> None:
    state.rows += counts["rows"]
    state.bad += counts["bad"]
    state.truncated += counts["truncated"]
    state.partitions += 1
    state.new_rows += new


# ---- workers


def compute(settings: Settings, texts: Sequence[str], stopped: Callable[[], bool] = bool) -> Rows:
    """What a worker does."""
    return text_model(settings).run(texts, stopped)


@dataclass(frozen=True)
class Pool:
    """Where partitions are computed, and how many at once."""

    executor: Executor
    slots: int
    compute: Callable[[Settings, Sequence[str]], Rows] = compute


@contextmanager
def _pool(workers: int | None, threads: int, scheduler: str | None) -> Iterator[Pool]:
    """Threads of this process, or the workers of a Dask cluster. At the end of the block nothing runs on.

    Threads share the model, and each runs torch on `threads` threads: kernels hold no GIL, and a text's own products
    are too small to be shared out well.
    """
    if scheduler is not None:
        with _client(scheduler) as client:
            yield Pool(client.get_executor(), max(1, sum(client.nthreads().values())))
        return
    slots = workers or max(1, _cores() // threads)
    before, stopped = torch.get_num_threads(), threading.Event()
    executor = ThreadPoolExecutor(slots, thread_name_prefix="pyqkern-bulk")
    try:
        yield Pool(executor, slots, partial(compute, stopped=stopped.is_set))
    finally:
        stopped.set()
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _client(scheduler: str) -> Any:
    try:
        from distributed import Client
    except ModuleNotFoundError as error:
        raise RuntimeError('scheduler needs Dask: pip install "pyqkern[bulk]"') from error
    return Client(scheduler)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
