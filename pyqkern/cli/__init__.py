"""The command `pyqkern`: one file a command, with its arguments and what it runs."""

import argparse
import io
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version

from pyqkern.cli import analyze, auto, classify, completion, demo, embed, info, inspect, quantize
from pyqkern.cli.output import Output, close_stdout, complain

COMMANDS = (info, demo, quantize, inspect, analyze, auto, embed, classify, completion)


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands. A module with JSON = True has --json, and gives `Output.result` its findings."""
    parser = argparse.ArgumentParser(prog="pyqkern", description="Quantization kernels for PyTorch.")
    parser.add_argument("--version", action="version", version=f"pyqkern {version('pyqkern')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        subparser = commands.add_parser(name, help=command.HELP, description=command.HELP)
        command.add_arguments(subparser)
        if getattr(command, "JSON", False):
            subparser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        subparser.add_argument("--debug", action="store_true", help="show where an error comes from")
        subparser.set_defaults(run=command.run, json=False, parser=parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 1 for errors. Wrong usage exits with 2."""
    options = parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # whatever the locale is
    try:
        options.run(options, Output(as_json=options.json))
        sys.stdout.flush()
    except BrokenPipeError:
        close_stdout()
        return 128 + signal.SIGPIPE  # as a shell says it of a program that the signal ends
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        complain(f"pyqkern {options.command}: {_said(error)}")
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _said(error: Exception) -> str:
    known = isinstance(error, (ImportError, OSError, RuntimeError, TypeError, ValueError))
    return str(error) if known and str(error).strip() else f"{type(error).__name__}: {error}"
