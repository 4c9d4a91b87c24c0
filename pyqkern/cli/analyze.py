"""The command `pyqkern analyze`: a classifier and a CSV in, the layers that hurt and an HTML report out."""

import argparse
import copy
import csv
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyqkern.analysis.compare import compare_samples, error_propagation, first_tensor
from pyqkern.analysis.ranges import range_report
from pyqkern.analysis.records import matplotlib_pyplot
from pyqkern.analysis.report import Finding, report
from pyqkern.analysis.sensitivity import fallback, sensitivity
from pyqkern.calibration.calibrate import calibrate
from pyqkern.calibration.run import evaluated
from pyqkern.cli.output import Output, quiet
from pyqkern.models.replace import replace_linear
from pyqkern.schemes import Int8Static, Scheme, get_scheme

HELP = "Finds the linears of a text classifier that quantization hurts, and what to do; writes an HTML report."
JSON = True
BATCH = 32
SCORE = "mean probability of the right answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_arguments(parser)
    add = parser.add_argument
    add("--scheme", default="int8", help='scheme by name (default: int8); "int8-static" is calibrated on the data')
    add("--tolerance", type=float, default=0.005, help="score that may be lost in the model found (default: 0.005)")
    add("--output", type=Path, default=Path("analysis.html"), help="the report (default: analysis.html)")
    add("--state", type=Path, metavar="FILE", help="keep finished evaluations there, and go on from them")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What `load` asks for."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a sequence classification model")
    add("--data", type=Path, required=True, metavar="FILE.csv", help="texts to run, with a header")
    add("--text-column", default="text", metavar="NAME", help="column of the texts (default: text)")
    add("--label-column", metavar="NAME", help="column of the labels; without it, agreement with float is measured")
    add("--limit", type=int, default=1000, metavar="N", help="use N texts, evenly spread; 0: all (default: 1000)")
    add("--max-length", type=int, default=128, metavar="TOKENS", help="cut texts there (default: 128)")


def run(options: argparse.Namespace, out: Output) -> None:
    """Prints the layers that lose most, and writes the report."""
    matplotlib_pyplot()  # before the work, not after it
    task = load(options, out)
    task.notes.append(f"The score is the {SCORE}; the target is that of the float model less {options.tolerance}.")
    scheme = scheme_of(options.scheme, task.network, task.batches)
    quantized = replace_linear(copy.deepcopy(task.network), scheme)
    losses = sensitivity(task.network, task.evaluate, scheme, file=options.state)
    accuracy = task.evaluate.accuracy(quantized)
    show_losses(out, task, scheme, accuracy, losses)
    found = fallback(task.network, task.evaluate, losses.float_score - options.tolerance, scheme, order=losses)
    kept_accuracy = task.evaluate.accuracy(found.model)
    show_fallback(out, task, found, kept_accuracy)
    advice = report(
        options.output,
        title=f"{Path(options.model).name}, {scheme.name}",
        notes=task.notes,
        sensitivity=losses,
        fallback=found,
        propagation=error_propagation(task.network, quantized, task.batches),
        samples=compare_samples(task.network, quantized, task.batches, task.texts),
        ranges=range_report(task.network, task.batches, scheme.carried_ranges()),
    )
    out.heading("what to do")
    for finding in advice:
        out.say(f"- {_marked(finding)}\n  {finding.advice}")
    out.say(f"\nwritten: {options.output}")
    out.result(
        {
            "output": str(options.output),
            "scheme": scheme.name,
            "metric": task.metric,
            "float": {"accuracy": task.accuracy, "score": losses.float_score},
            "quantized": {"accuracy": accuracy, "score": losses.quantized_score},
            "sensitivity": [{"name": record.name, "drop": record.drop} for record in losses],
            "fallback": {
                "accuracy": kept_accuracy,
                "score": found.score,
                "kept": found.kept,
                "kept_bytes": found.kept_bytes,
            },
            "advice": [asdict(finding) for finding in advice],
        }
    )


def _marked(finding: Finding) -> str:
    return f"note: {finding.text}" if finding.kind == "note" else finding.text


@dataclass
class Task:
    """A float classifier, texts in order of length, as batches, and how its answers are scored."""

    network: Any
    texts: list[str]
    batches: list[dict[str, Tensor]]
    evaluate: "Confidence"
    metric: str
    accuracy: float  # of the float model
    notes: list[str]


class Confidence:
    """evaluate for `sensitivity`: the mean probability that the model gives to the label. Pickles.

    Accuracy would move in steps of one text and miss a layer whose error changes no answer yet.
    """

    def __init__(self, batches: list[dict[str, Tensor]], labels: Tensor) -> None:
        self.batches, self.labels = batches, labels

    def logits(self, model: nn.Module) -> Tensor:
        return torch.cat([first_tensor(evaluated(model, batch)).float() for batch in self.batches])

    def __call__(self, model: nn.Module) -> float:
        return float(self.logits(model).softmax(-1).gather(1, self.labels[:, None]).double().mean())

    def accuracy(self, model: nn.Module) -> float:
        return float((self.logits(model).argmax(-1) == self.labels).double().mean())


def read_csv(path: Path, text_column: str, label_column: str | None) -> tuple[list[str], list[str] | None]:
    """Texts and labels. Raises ValueError for a column that is not there, and for a file without rows."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        columns = reader.fieldnames or []
    for column in (text_column, label_column):
        if column is not None and column not in columns:
            raise ValueError(f"{path} must have a column {column!r}, got {', '.join(map(repr, columns)) or 'none'}")
    if not rows:
        raise ValueError(f"{path} must have rows, got none")
    if any(row[text_column] is None or (label_column is not None and row[label_column] is None) for row in rows):
        raise ValueError(f"{path} must have text and label in every row, got a shorter one")
    return [row[text_column] for row in rows], None if label_column is None else [row[label_column] for row in rows]


def label_ids(labels: list[str], label2id: Mapping[str, int]) -> Tensor:
    """Labels as the model counts them: by its config's names, or whole numbers, or their places in sorted order."""
    by_name = {str(name): int(number) for name, number in label2id.items()}
    kinds = sorted(set(labels))
    if all(label in by_name for label in kinds):
        return torch.tensor([by_name[label] for label in labels])
    if all(label.strip().isdecimal() and int(label) < len(by_name) for label in kinds):
        return torch.tensor([int(label) for label in labels])
    if len(kinds) == len(by_name):
        places = {label: place for place, label in enumerate(kinds)}
        return torch.tensor([places[label] for label in labels])
    unknown = next(label for label in kinds if label not in by_name)
    raise ValueError(
        f"labels must be names in the model's config.label2id ({', '.join(list(by_name)[:4])}, ...) or numbers below "
        f"{len(by_name)}, got {unknown!r}; without --label-column the answers are compared with the float model's"
    )


def scheme_of(name: str, model: nn.Module, batches: list[dict[str, Tensor]]) -> Scheme:
    """The scheme of that name, calibrated on the batches where it needs that."""
    scheme = get_scheme(name)
    return Int8Static(calibrate(model, batches)) if scheme.needs_ranges else scheme


def load(options: argparse.Namespace, out: Output) -> Task:
    """Reads the model and the data, and looks whether they fit each other."""
    texts, labels = chosen_rows(options)
    network, tokenizer = read_model(options.model)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # by length, so that there is little padding
    texts = [texts[i] for i in order]
    cut = {"padding": True, "truncation": True, "max_length": options.max_length, "return_tensors": "pt"}
    batches = [dict(tokenizer(texts[i : i + BATCH], **cut)) for i in range(0, len(texts), BATCH)]
    if labels is None:
        truth = torch.cat([first_tensor(evaluated(network, batch)).argmax(-1) for batch in batches])
    else:
        truth = label_ids(labels, network.config.label2id)[torch.tensor(order)]
    evaluate = Confidence(batches, truth)
    accuracy = evaluate.accuracy(network)
    metric = "accuracy" if labels is not None else "agreement with the float model"
    notes = [f"{len(texts)} texts of {options.data.name}."]
    if accuracy <= 1 / network.config.num_labels:
        notes.append(
            f"The float model is right on {accuracy:.1%} of the texts, no more than guessing one of "
            f"{network.config.num_labels} labels: they may be counted in another order than the model's. "
            "Name them in its config.label2id, or leave out --label-column."
        )
        out.warn(notes[-1])
    return Task(network, texts, batches, evaluate, metric, accuracy, notes)


def chosen_rows(options: argparse.Namespace) -> tuple[list[str], list[str] | None]:
    """Texts and labels of the CSV, at most --limit of them, evenly over the file, which may be sorted by label."""
    texts, labels = read_csv(options.data, options.text_column, options.label_column)
    if not options.limit or len(texts) <= options.limit:
        return texts, labels
    chosen = [i * len(texts) // options.limit for i in range(options.limit)]
    return [texts[i] for i in chosen], None if labels is None else [labels[i] for i in chosen]


def read_model(model: str) -> tuple[Any, Any]:
    """The classifier, in float32, and its tokenizer. Runs no code of the folder."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise RuntimeError('pyqkern analyze needs transformers: pip install "pyqkern[hf,analysis]"') from error
    if not Path(model).is_dir():
        raise ValueError(f"MODEL must be a folder as save_pretrained writes it, got {model!r}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()
    quiet(transformers)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    auto = transformers.AutoModelForSequenceClassification
    network = auto.from_pretrained(model, trust_remote_code=False).float().eval()
    if network.config.num_labels < 2:
        raise ValueError(f"MODEL must be a classifier with 2 labels or more, got {network.config.num_labels}")
    return network, tokenizer


def show_losses(out: Output, task: Task, scheme: Scheme, accuracy: float, losses: Any) -> None:
    out.table(
        ("", "float", scheme.name),
        [
            (task.metric, f"{task.accuracy:.4f}", f"{accuracy:.4f}"),
            (SCORE, f"{losses.float_score:.4f}", f"{losses.quantized_score:.4f}"),
        ],
    )
    out.heading(f"what it loses when one linear alone is quantized, of the {SCORE}")
    out.table(("linear", "lost"), [(record.name, f"{record.drop:+.4f}") for record in losses[:10]])


def show_fallback(out: Output, task: Task, found: Any, accuracy: float) -> None:
    extra = f"{len(found.kept)} linears in float ({found.kept_bytes / 1e6:.2f} MB more)"
    out.heading(f"with {extra}: {task.metric} {accuracy:.4f}, {SCORE} {found.score:.4f}")
    for name in found.kept:
        out.say(f"  {name}")
