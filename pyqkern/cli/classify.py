"""`pyqkern classify`: a file or folder of texts in, a Parquet dataset of labels with probabilities out."""

import argparse

from pyqkern import bulk
from pyqkern.cli.embed import add_job_arguments, run_job
from pyqkern.cli.output import Output

HELP = "Labels of millions of texts with probabilities, as a Parquet dataset; goes on where an earlier run ended."
JSON = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job_arguments(parser)


def run(options: argparse.Namespace, out: Output) -> None:
    """Prints what became of the rows."""
    run_job(bulk.classify, options, out, {})
