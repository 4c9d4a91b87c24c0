"""8-bit optimizers on CPU: time and memory of a step against torch's and bitsandbytes', and accuracy after fine-tuning.

    python benchmarks/bench_training.py                      BERT-base's parameters, AdamW, one thread
    python benchmarks/bench_training.py --threads 1,2 --optimizers AdamW,SGD,Lion
    python benchmarks/bench_training.py --data banking77     MiniLM fine-tuned with torch's AdamW and with AdamW8bit

Times are CPU seconds of all threads together, and beside them those of the clock: other programs may run. Contenders
take turns, on the same parameters and gradients. `limit` does nothing but move as many bytes as AdamW8bit does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from limits import Limits, LimitsUnavailable
from shapes import BERT, DRY
from torch import nn

import pyqkern

ROUNDS = 1 if DRY else 15
NAMES = {"AdamW": "AdamW8bit", "SGD": "SGD8bit", "Lion": "Lion8bit"}

Step = Callable[[], object]


def parameters() -> list[nn.Parameter]:
    """Those of BERT-base, 110 M, with normal values and gradients."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        shapes = [p.shape for p in BertModel(BertConfig(**BERT)).parameters()]
    g = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=g) * 0.02) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=g) * 1e-3
    return params


def contenders(name: str, peers: bool) -> dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    """How each makes the optimizer; names of pyqkern's first."""
    arguments: dict[str, Any] = {"momentum": 0.9} if name == "SGD" else {}
    found: dict[str, Any] = {
        f"pyqkern {NAMES[name]}": lambda params: getattr(pyqkern.optim, NAMES[name])(params, lr=1e-4, **arguments),
        f"pyqkern {NAMES[name]}, fp32": lambda params: getattr(pyqkern.optim, NAMES[name])(
            params, lr=1e-4, bits=32, **arguments
        ),
    }
    if name != "Lion":
        found[f"torch {name}, fused"] = lambda params: getattr(torch.optim, name)(
            params, lr=1e-4, fused=True, **arguments
        )
        found[f"torch {name}"] = lambda params: getattr(torch.optim, name)(params, lr=1e-4, **arguments)
    if peers:

        def bitsandbytes(params: list[nn.Parameter]) -> torch.optim.Optimizer:
            import bitsandbytes as bnb

            optimizer: torch.optim.Optimizer = getattr(bnb.optim, NAMES[name])(params, lr=1e-4, **arguments)
            return optimizer

        found[f"bitsandbytes {NAMES[name]}"] = bitsandbytes
    return found


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the moments and their scales; the maps are shared by all parameters."""
    tensors = (t for state in optimizer.state.values() for name, t in state.items() if not name.startswith("qmap"))
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def timed(step: Step) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return time.process_time() - cpu, time.perf_counter() - wall


def measure(name: str, threads: int, peers: bool, rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    steps: dict[str, Step] = {}
    sizes: dict[str, float] = {}
    params = parameters()
    count = sum(p.numel() for p in params)
    for contender, make in contenders(name, peers).items():
        try:
            optimizer = make(params)
            optimizer.step()
        except (ImportError, RuntimeError, ValueError, TypeError) as error:  # a peer that does not run here
            print(f"{contender} failed: {type(error).__name__}: {str(error)[:150]}")
            continue
        steps[contender], sizes[contender] = optimizer.step, state_bytes(optimizer) / count
    try:
        # 4 of p, 4 of g and 2 of the state are read, and what is not g written: near 2:1, which limits.cpp has.
        steps["limit"] = Limits.load().move(16 * count, 2, 1, False, threads)
    except LimitsUnavailable as error:
        print(f"the memory's limit is not measured: {error}")
    times: dict[str, list[tuple[float, float]]] = {contender: [] for contender in steps}
    for _ in range(rounds):
        for contender, step in steps.items():
            times[contender].append(timed(step))
    ours = statistics.median(cpu for cpu, _ in times[f"pyqkern {NAMES[name]}"])
    rows = []
    for contender, samples in times.items():
        cpu, wall = (statistics.median(each) for each in zip(*samples, strict=True))
        rows.append(
            {
                "threads": threads, "contender": contender, "cpu ms": 1e3 * cpu, "wall ms": 1e3 * wall,
                "ratio": cpu / ours, "state bytes": sizes.get(contender),
            }
        )  # fmt: skip
    cells = [
        [r["contender"], f"{r['cpu ms']:.1f}", f"{r['wall ms']:.1f}", f"{r['ratio']:.2f}",
         f"{r['state bytes']:.2f}" if r["state bytes"] else ""]
        for r in rows
    ]  # fmt: skip
    print(f"{count / 1e6:.0f} M parameters, {common.threads_title(threads)}; time against that of pyqkern's 8 bits\n")
    columns = ["a step", "CPU, ms", "clock, ms", "to ours", "state, bytes an element"]
    print(common.table(columns, cells), end="\n\n")
    return rows


def accuracy(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """MiniLM fine-tuned with both optimizers on the same batches, for each seed."""
    import bench_accuracy as data
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    train, test = data.read(arguments.data, arguments.text_column, arguments.label_column)
    labels = sorted({label for _, label in train})
    ids = {label: i for i, label in enumerate(labels)}
    test = sorted(test, key=lambda row: len(row[0]))
    truth = torch.tensor([ids[label] for _, label in test])
    rows = []
    for seed in range(arguments.seeds):
        for name, make in (("torch AdamW", torch.optim.AdamW), ("AdamW8bit", pyqkern.optim.AdamW8bit)):
            folder = data.fine_tuned(train, labels, arguments.cache, make, seed)
            model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
            tokenizer = AutoTokenizer.from_pretrained(folder)
            with torch.inference_mode():
                batches = data.batched(tokenizer, test)
                answers = torch.cat([model(**batch).logits.argmax(-1) for batch in batches])
            found = float((answers == truth).float().mean())
            rows.append({"optimizer": name, "seed": seed, "accuracy": found})
            print(f"{name}, seed {seed}: {rows[-1]['accuracy']:.4f}", flush=True)
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        mean = statistics.mean(row["accuracy"] for row in rows if row["optimizer"] == name)
        print(f"{name}: {mean:.4f}, mean of {arguments.seeds} seeds")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--optimizers", type=common.names, default=["AdamW"], help="among AdamW, SGD, Lion")
    parser.add_argument("--threads", type=common.numbers, default=[1], help="thread counts, e.g. 1,2 (default: 1)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"steps of each contender (default: {ROUNDS})")
    parser.add_argument("--peers", action="store_true", help="bitsandbytes' too")
    parser.add_argument("--data", type=Path, help="a CSV, or a folder with train.csv and test.csv: fine-tune MiniLM")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", help="by default label or category")
    parser.add_argument("--seeds", type=int, default=1 if DRY else 3)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "pyqkern", help="where models are kept")
    parser.add_argument("--json", type=Path, metavar="FILE")
    common.add_dry(parser)
    arguments = parser.parse_args()
    if unknown := set(arguments.optimizers) - set(NAMES):
        raise SystemExit(f"--optimizers must be among {', '.join(NAMES)}; got {', '.join(sorted(unknown))}")
    machine = common.machine()
    print(f"{machine['cpu']}, {machine['cores']} cores\n`{common.command()}`\n")
    if arguments.data:
        torch.set_num_threads(max(arguments.threads))
        rows = accuracy(arguments)
    else:
        pairs = [(name, threads) for name in arguments.optimizers for threads in arguments.threads]
        rows = [row for pair in pairs for row in measure(*pair, arguments.peers, arguments.rounds)]
    if arguments.json:
        record = {"command": common.command(), "machine": machine, "versions": common.versions(), "rows": rows}
        arguments.json.write_text(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
