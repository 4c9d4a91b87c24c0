"""`pyqkern embed`: a file or folder of texts in, a Parquet dataset of embeddings out."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyqkern import bulk
from pyqkern.bulk.settings import BATCH_TOKENS, FLOAT, PARTITION_ROWS
from pyqkern.bulk.values import DTYPES, POOLINGS
from pyqkern.cli.output import Output, complain, quiet
from pyqkern.progress import bar
from pyqkern.schemes import SCHEMES

HELP = "Embeddings of millions of texts, as a Parquet dataset; goes on where an earlier run ended."
JSON = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job_arguments(parser)
    add = parser.add_argument
    add("--pooling", choices=POOLINGS, help="default: what sentence-transformers' files in MODEL say, else mean")
    add("--no-normalize", action="store_true", help="leave the embeddings' lengths as they are")
    add("--dtype", choices=DTYPES, default="fp32", help="how they are stored: int8 and binary with a scale")


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """What `embed` and `classify` share."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a model with its tokenizer, in float or quantized")
    add("input", metavar="INPUT", type=Path, help="a .csv, .jsonl or .parquet file, or a folder of such")
    add("output", metavar="OUTPUT", type=Path, help="new folder, or that of the same job, which goes on")
    add("--column", default="text", metavar="NAME", help="column of the texts (default: text)")
    add("--keep", default="", metavar="NAMES", help="columns to copy, as in id,date")
    schemes = [name for name, scheme in SCHEMES.items() if not scheme.needs_ranges]
    add("--scheme", choices=[*schemes, FLOAT], help="for a MODEL in float (default: int8)")
    add("--max-length", type=int, metavar="TOKENS", help="cut texts there (default: what the model takes)")
    add("--batch-tokens", type=int, default=BATCH_TOKENS, metavar="N", help=f"of a batch (default: {BATCH_TOKENS})")
    add("--partition-rows", type=int, default=PARTITION_ROWS, metavar="N", help=f"default: {PARTITION_ROWS}")
    add("--workers", type=int, metavar="N", help="partitions computed at once (default: one for each core)")
    add("--threads", type=int, default=1, metavar="N", help="of each worker (default: 1)")
    add("--scheduler", metavar="ADDRESS", help="of a Dask cluster that computes, as in tcp://10.0.0.1:8786")


def run(options: argparse.Namespace, out: Output) -> None:
    """Prints what became of the rows."""
    more = {"pooling": options.pooling, "normalize": not options.no_normalize, "dtype": options.dtype}
    run_job(bulk.embed, options, out, more)


def run_job(job: Callable[..., Any], options: argparse.Namespace, out: Output, more: dict[str, Any]) -> None:
    """The job under a progress bar, and its report."""
    import transformers

    quiet(transformers)
    if options.scheduler is not None and options.workers is not None:
        raise ValueError("--workers must be left out with --scheduler, whose workers are counted there")
    names = ("column", "scheme", "max_length", "batch_tokens", "partition_rows", "workers", "threads", "scheduler")
    arguments = {name: getattr(options, name) for name in names} | more
    keep = [name for name in options.keep.split(",") if name]
    try:
        with bar(options.command, unit="texts") as work:

            def progress(state: bulk.State) -> None:
                work.reach(state.new_rows, state.new_rows_at_end)

            state = job(options.input, options.model, options.output, keep=keep, progress=progress, **arguments)
    except KeyboardInterrupt:
        complain(f"pyqkern {options.command}: interrupted; the same command goes on with {options.output}")
        raise
    report(state, options, out)


def report(state: bulk.State, options: argparse.Namespace, out: Output) -> None:
    resumed = state.rows - state.new_rows
    out.say(
        f"written: {options.output}: {state.rows:,} rows"
        + (f", {resumed:,} of them by an earlier run" if resumed else "")
        + (f"; {state.texts_per_second:,.0f} texts a second" if state.new_rows else "")
    )
    if state.bad:
        out.warn(f"{state.bad:,} rows are kept out; {options.output / '_errors'} says which and why")
    if state.truncated:
        out.warn(f"{state.truncated:,} texts are longer than the model reads, and were cut")
    if state.differs is not None:
        out.warn(
            f"rows may differ in their last bits with the batch that they are in: {state.differs}; "
            "with --batch-tokens 1 each is computed alone"
        )
    out.result({"output": str(options.output), **state.to_dict()})
