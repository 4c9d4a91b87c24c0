"""`pyqkern inspect`: what in a model's folder is quantized how, and the bytes."""

import argparse
from pathlib import Path

from pyqkern.checkpoints import convert

HELP = "Says what in a model's folder is quantized how, and the bytes."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=Path)


def run(options: argparse.Namespace) -> None:
    print(convert.inspect(options.folder))
