"""The command `pyqkern`: info, demo, quantize, inspect and analyze."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pyqkern.cli.info import describe


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="pyqkern", description="Quantization kernels for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=help, description=help)
        subparser.set_defaults(run=run)
        return subparser

    command("info", _info, "Versions, instruction sets, threads and CUDA, as pyqkern sees them.")
    command("demo", _demo, "Sizes, latency, error and sentence similarity of quantized BERTs, against torch's own.")
    text = "Finds the linears of a text classifier that quantization hurts, and what to do; writes an HTML report."
    parser_of_analyze = command("analyze", _analyze, text)
    parser_of_analyze.add_argument("model", metavar="MODEL", help="folder of a sequence classification model")
    add = parser_of_analyze.add_argument
    add("--data", type=Path, required=True, metavar="FILE.csv", help="texts to run, with a header")
    add("--text-column", default="text", metavar="NAME", help="column of the texts (default: text)")
    add("--label-column", metavar="NAME", help="column of the labels; without it, agreement with float is measured")
    add("--scheme", default="int8", help='scheme by name (default: int8); "int8-static" is calibrated on the data')
    add("--limit", type=int, default=1000, metavar="N", help="use N texts, evenly spread; 0: all (default: 1000)")
    add("--max-length", type=int, default=128, metavar="TOKENS", help="cut texts there (default: 128)")
    add("--tolerance", type=float, default=0.005, help="score that may be lost in the model found (default: 0.005)")
    add("--output", type=Path, default=Path("analysis.html"), help="the report (default: analysis.html)")
    add("--state", type=Path, metavar="FILE", help="keep finished evaluations there, and go on from them")
    parser_of_quantize = command(
        "quantize", _quantize, "Quantizes a model's folder into a new one, or converts its format."
    )
    parser_of_quantize.add_argument("model", metavar="MODEL", help="folder with safetensors, or a name on the hub")
    parser_of_quantize.add_argument("out", metavar="OUT", type=Path, help="new folder; it appears when it is complete")
    add = parser_of_quantize.add_argument
    add("--scheme", help='"int8" (default), "nf4", "fp4", "int4", "int8-weight-only" or "int8-outlier"')
    add("--exclude", action="append", default=[], metavar="PATTERN", help="linears to leave in float; may be repeated")
    add("--embeddings", action="store_true", help="the embeddings too, and heads tied to them")
    formats = ("pyqkern", "bitsandbytes", "compressed-tensors")
    add("--format", choices=formats, default="pyqkern", help="whose checkpoint it is to be (default: pyqkern)")
    parser_of_inspect = command("inspect", _inspect, "Says what in a model's folder is quantized how, and the bytes.")
    parser_of_inspect.add_argument("folder", metavar="FOLDER", type=Path)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"pyqkern {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _info(options: argparse.Namespace) -> None:
    for name, value in describe().items():
        print(f"{name:14} {value}")


def _demo(options: argparse.Namespace) -> None:
    from pyqkern.cli import demo  # transformers takes seconds to import, and only the demo needs it

    demo.run()


def _analyze(options: argparse.Namespace) -> None:
    from pyqkern.cli.analyze import analyze as run  # matplotlib and transformers, which only this needs

    run(
        options.model,
        options.data,
        options.text_column,
        options.label_column,
        options.scheme,
        options.output,
        limit=options.limit,
        max_length=options.max_length,
        tolerance=options.tolerance,
        state=options.state,
    )


def _quantize(options: argparse.Namespace) -> None:
    from pyqkern.checkpoints.convert import quantize as run  # transformers, which only these two need

    run(
        options.model,
        options.out,
        options.scheme,
        exclude=options.exclude,
        embeddings=options.embeddings,
        format=options.format,
    )


def _inspect(options: argparse.Namespace) -> None:
    from pyqkern.checkpoints.convert import inspect as run

    print(run(options.folder))


if __name__ == "__main__":
    sys.exit(main())
