"""`pyqkern quantize`: a model's folder quantized into a new one, or converted to another format."""

import argparse
from pathlib import Path

from pyqkern.checkpoints import convert
from pyqkern.checkpoints.formats import FORMATS
from pyqkern.cli.output import Output, quiet
from pyqkern.models.summary import said_bytes
from pyqkern.schemes import SCHEMES

HELP = "Quantizes a model's folder into a new one, or converts its format."
JSON = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder with safetensors, or a name on the hub")
    add("out", metavar="OUT", type=Path, help="new folder; it appears when it is complete")
    add("--scheme", help=f"{', '.join(SCHEMES)} (default: int8)")
    add("--exclude", action="append", default=[], metavar="PATTERN", help="linears to leave in float; may be repeated")
    add("--embeddings", action="store_true", help="the embeddings too, and heads tied to them")
    add("--recurrent", action="store_true", help="the LSTMs, GRUs and RNNs too")
    add("--format", choices=list(FORMATS), default="pyqkern", help="whose checkpoint it is to be (default: pyqkern)")


def run(options: argparse.Namespace, out: Output) -> None:
    import transformers

    quiet(transformers)
    convert.quantize(
        options.model,
        options.out,
        options.scheme,
        exclude=options.exclude,
        embeddings=options.embeddings,
        recurrent=options.recurrent,
        format=options.format,
    )
    found = convert.contents(options.out)
    out.say(
        f"written: {options.out}: {len(found.layers)} quantized layers with {said_bytes(found.quantized_bytes)} of "
        f"{said_bytes(found.bytes)}; `pyqkern inspect {options.out}` lists them"
    )
    out.result({"output": str(options.out), **found.to_dict()})
