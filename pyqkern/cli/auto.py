"""The command `pyqkern auto`: a classifier and a CSV in, the fastest or smallest mix of schemes for it out."""

import argparse
from pathlib import Path

from pyqkern.analysis.auto import auto
from pyqkern.analysis.auto_report import auto_report
from pyqkern.analysis.records import matplotlib_pyplot
from pyqkern.checkpoints import convert
from pyqkern.cli.analyze import add_data_arguments, load
from pyqkern.cli.output import Output
from pyqkern.models.plan import OBJECTIVES
from pyqkern.schemes import SCHEMES

HELP = "Chooses a scheme for each layer of a text classifier, within a budget of accuracy, by times taken here."
JSON = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_arguments(parser)
    add = parser.add_argument
    add("--budget", type=float, default=0.002, help="accuracy that may be lost (default: 0.002, 0.2 points)")
    add("--objective", choices=OBJECTIVES, default="time", help="what is to be small (default: time)")
    add("--schemes", type=lambda text: text.split(","), help=f"schemes to try (default: {','.join(SCHEMES)})")
    add("--sizes", type=_sizes, help="inputs whose time counts, e.g. 1x128,8x64 (default: those of the data)")
    add("--plan", type=Path, metavar="FILE.json", help="write the plan there")
    add("--output", type=Path, metavar="FOLDER", help="write the quantized model there, a new folder")
    add("--report", type=Path, metavar="FILE.html", help="write a page about it, with a picture")
    add("--state", type=Path, metavar="FILE", help="keep what is finished there, and go on from it")


def run(options: argparse.Namespace, out: Output) -> None:
    """Prints the plan, and writes what was asked for."""
    if options.report is not None:
        matplotlib_pyplot()  # before the work, not after it
    if options.output is not None and options.output.exists():
        raise FileExistsError(f"{options.output} must not exist yet; choose another name or remove it")
    task = load(options, out)
    plan = auto(
        task.network,
        task.batches,
        evaluate=task.evaluate.accuracy,
        budget=options.budget,
        objective=options.objective,
        schemes=options.schemes,
        sizes=options.sizes,
        file=options.state,
    )
    out.table(*plan.rows(), left=2)
    if plan.note:
        out.say(plan.note)
    if options.plan is not None:
        plan.save(options.plan)
        out.say(f"written: {options.plan}")
    if options.report is not None:
        notes = [*task.notes, f"The score is the {task.metric}."]
        auto_report(options.report, plan, title=f"{Path(options.model).name}: plan", notes=notes)
        out.say(f"written: {options.report}")
    if options.output is not None and plan.quantizes:
        convert.quantize(options.model, options.output, plan)
        out.say(f"written: {options.output}")
    elif options.output is not None:
        out.warn(f"not written: {options.output}, since everything stays in float")
    out.result(plan.to_dict())


def _sizes(text: str) -> list[tuple[int, int]]:
    try:
        sizes = [tuple(int(number) for number in one.split("x")) for one in text.split(",")]
    except ValueError:
        sizes = [()]
    if not all(len(size) == 2 and min(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"must be sizes like 1x128,8x64; got {text!r}")
    return [(size[0], size[1]) for size in sizes]
