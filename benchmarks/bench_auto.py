"""What `pyqkern.auto` finds for the classifier of bench_accuracy.py, plain and with outliers.

    python benchmarks/bench_auto.py --data banking77

The damages are taken over 128 of 256 texts of the training part, the times over three batches of these; `evaluate` is
the accuracy on the whole test part. Afterwards the plan, "int8", "int8-outlier" and every single scheme are timed in
turns on three batches of the test part, and the single schemes that are faster than the plan evaluated.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
import torch
from bench_accuracy import add_outliers, batched, fine_tuned, read
from shapes import DRY
from torch import Tensor, nn

import pyqkern
from pyqkern.analysis import auto_report
from pyqkern.analysis.cost import model_seconds, timed_batches
from pyqkern.cli.analyze import label_ids

DAMAGE_TEXTS = 4 if DRY else 256
ROUNDS = 1 if DRY else 15  # of the times
# Factor of the outliers, objective, budget.
CASES = (
    [(30, "time", 0.05)]
    if DRY
    else [(1, "time", 0.002), (30, "time", 0.002), (1000, "time", 0.003), (1, "bytes", 0.005)]
)
SINGLES = ("int8", "int8-a7", "nf4", "fp4", "int4")


class Accuracy:
    """The share of right answers; counts how often it is asked."""

    def __init__(self, batches: list[dict[str, Tensor]], truth: Tensor) -> None:
        self.batches, self.truth, self.calls = batches, truth, 0

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        answers = torch.cat([model(**batch).logits.argmax(-1) for batch in self.batches])
        return float((answers == self.truth).double().mean())


def others() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """What the plan is compared with; each takes a float model over."""
    found: dict[str, Callable[[nn.Module], nn.Module]] = {
        "float32": lambda model: model,
        "int8, linears alone": pyqkern.replace_linear,
        "int8, linears alone, and embeddings": lambda model: pyqkern.replace_embedding(pyqkern.replace_linear(model)),
        "int8-outlier": lambda model: pyqkern.replace_linear(model, "int8-outlier"),
    }
    for name in SINGLES:
        found[f"{name}, optimized"] = lambda model, name=name: pyqkern.optimize(model, name)
    return found


def measured(base: nn.Module, factor: int, objective: str, budget: float, data: dict[str, Any], options: Any) -> dict:
    """One row: the plan, its figures, and those of what it is compared with."""
    model = add_outliers(copy.deepcopy(base), factor)
    evaluate = Accuracy(data["test"], data["truth"])
    start = time.perf_counter()
    plan = pyqkern.auto(model, data["train"], evaluate=evaluate, budget=budget, objective=objective)
    seconds = time.perf_counter() - start
    calls = evaluate.calls
    print(f"\n## outliers x{factor}, {objective}, budget {budget}: {seconds:.0f} s, {calls} evaluations\n\n{plan}\n")
    figures = plan.figures
    assert figures is not None and figures.measured_seconds is not None and figures.measured_score is not None
    ratio, floats = figures.seconds / figures.measured_seconds, plan.compared[0].measured_score or 0.0
    print(
        f"lost {100 * (floats - figures.measured_score):+.2f} points; predicted / measured time {ratio:.2f}\n",
        flush=True,
    )
    models = {"the plan": pyqkern.optimize(copy.deepcopy(model), plan)}
    models |= {name: build(copy.deepcopy(model)) for name, build in others().items()}
    times = model_seconds(list(models.values()), timed_batches(data["test"], None), ROUNDS)
    rows: dict[str, dict[str, Any]] = {}
    for (name, one), took in zip(models.items(), times, strict=True):
        # Of the single schemes only those could be better than the plan that are faster.
        asked = name == "the plan" or (name.endswith("optimized") and took < times[0])
        rows[name] = {
            "ms": 1e3 * took,
            "accuracy": evaluate(one) if asked else None,
            "bytes": pyqkern.summary(one).bytes_after,
        }
    ours = rows["the plan"]
    columns = ["", "accuracy", "ms", "MB", "the plan is faster by", "bytes of the plan"]
    print(common.table(columns, [
        [name, "" if row["accuracy"] is None else f"{row['accuracy']:.4f}", f"{row['ms']:.1f}",
         f"{row['bytes'] / 1e6:.2f}", f"{row['ms'] / ours['ms']:.2f}x", f"{ours['bytes'] / row['bytes']:.2f}"]
        for name, row in rows.items()
    ]), flush=True)  # fmt: skip
    if options.report:
        options.report.mkdir(parents=True, exist_ok=True)
        auto_report(options.report / f"x{factor}-{objective}.html", plan, title=f"outliers x{factor}, {objective}")
    return {"factor": factor, "objective": objective, "budget": budget, "seconds": seconds, "evaluations": calls,
            "rows": rows, "predicted_over_measured": ratio, "figures": asdict(figures)}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a CSV, or a folder with train.csv and test.csv")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", help="by default label or category")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "pyqkern", help="where the model is")
    parser.add_argument("--model", type=Path, help="a folder with a fine-tuned BERT instead")
    parser.add_argument("--cases", type=common.numbers, default=list(range(1, len(CASES) + 1)), help="which rows: 1,3")
    parser.add_argument("--limit", type=int, default=0, help="test texts; 0: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write a page for each row there")
    common.add_dry(parser)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    train, test = read(options.data, options.text_column, options.label_column)
    labels = sorted({label for _, label in train})
    folder = options.model or fine_tuned(train, labels, options.cache)
    torch.set_grad_enabled(False)
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForSequenceClassification.from_pretrained(folder).float().eval()
    test = sorted(test[: options.limit or None], key=lambda row: len(row[0]))
    chosen = sorted(random.Random(0).sample(train, min(DAMAGE_TEXTS, len(train))), key=lambda row: len(row[0]))

    truth = label_ids([label for _, label in test], base.config.label2id)
    data = {"train": batched(tokenizer, chosen), "test": batched(tokenizer, test), "truth": truth}
    machine = common.machine()
    print(f"{machine['cpu']}, {len(test)} test texts, {options.threads} threads\n`{common.command()}`", flush=True)
    found = [measured(base, *CASES[i - 1], data, options) for i in options.cases]
    if options.json:
        said = {"command": common.command(), "machine": machine, "versions": common.versions(), "rows": found}
        options.json.write_text(json.dumps(said) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
