"""`pyqkern inspect`: what in a model's folder is quantized how, and the bytes."""

import argparse
from pathlib import Path

from pyqkern.checkpoints import convert
from pyqkern.cli.output import Output

HELP = "Says what in a model's folder is quantized how, and the bytes."
JSON = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=Path)


def run(options: argparse.Namespace, out: Output) -> None:
    found = convert.contents(options.folder)
    out.table(*found.rows(), left=2)
    out.result(found.to_dict())
