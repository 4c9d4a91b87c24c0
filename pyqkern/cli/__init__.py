"""The command `pyqkern`: one file a command, with its arguments and what it runs."""

import argparse
import io
import sys
import traceback
from collections.abc import Sequence

from pyqkern.cli import analyze, auto, demo, info, inspect, quantize

COMMANDS = (info, demo, quantize, inspect, analyze, auto)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="pyqkern", description="Quantization kernels for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        subparser = commands.add_parser(name, help=command.HELP, description=command.HELP)
        command.add_arguments(subparser)
        subparser.add_argument("--debug", action="store_true", help="show where an error comes from")
        subparser.set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # whatever the locale is
    try:
        options.run(options)
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        print(f"pyqkern {options.command}: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    known = isinstance(error, (ImportError, OSError, RuntimeError, TypeError, ValueError))
    return text if known and text else f"{type(error).__name__}: {text}"
