"""Quantization-aware training: accuracy that it wins back, how a converted model differs, and the time of a step.

    python benchmarks/bench_qat.py                                  MiniLM's training step, batch 32, one thread
    python benchmarks/bench_qat.py --peers                          and that of torchao's prepared model
    python benchmarks/bench_qat.py --data banking77                 one epoch for each of --cases, after fine-tuning
    python benchmarks/bench_qat.py --data banking77 --cases int4,outliers --rate 2e-4

Times are CPU seconds of the thread, contenders taking turns; other programs may run. The fine-tuned MiniLM is that of
bench_accuracy.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_accuracy as data
import common
import torch
from shapes import BERT, DRY
from torch import Tensor
from tqdm import tqdm

from pyqkern.schemes import FP4, Int4, Int8, Scheme
from pyqkern.training import convert, distillation_loss, prepare

ROUNDS = 1 if DRY else 11
FACTOR = 1000.0  # of the outliers
# MiniLM's, in place of BERT-base's.
SIZES: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536} | BERT
# Each: the scheme, and the factor of the outliers. All linears and embeddings are quantized.
CASES: dict[str, tuple[Scheme, float]] = {
    "int4": (Int4(group_size=128), 1.0),
    "fp4": (FP4(blocksize=4096), 1.0),
    "outliers": (Int8(), FACTOR),
}


# ---- accuracy


def logits_of(model: Any, batches: data.Batches) -> Tensor:
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(**batch).logits for batch in batches])


def trained(model: Any, teacher: Any, tokenizer: Any, rows: data.Texts, ids: dict[str, int], rate: float) -> None:
    """Each text once, on labels and on the teacher's logits."""
    shuffle = random.Random(1)
    torch.manual_seed(1)
    batches = data.shuffled(list(rows), shuffle)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.1 * len(batches))) * (len(batches) - step) / len(batches)
    )
    model.train()
    with tqdm(batches, desc="train") as bar:
        for batch in bar:
            inputs = data.tokens(tokenizer, [text for text, _ in batch])
            inputs["labels"] = torch.tensor([ids[label] for _, label in batch])
            loss = distillation_loss(model, inputs, teacher=teacher, weight=0.7)
            data.step(loss, model, optimizer, schedule)
            bar.set_postfix(loss=f"{loss.item():.3f}")


def accuracy(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    train, test = data.read(arguments.data, arguments.text_column, arguments.label_column)
    labels = sorted({label for _, label in train})
    folder = data.fine_tuned(train, labels, arguments.cache)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForSequenceClassification.from_pretrained(folder).float()
    ids = base.config.label2id
    test = sorted(test, key=lambda row: len(row[0]))
    truth = torch.tensor([ids[label] for _, label in test])
    batches = data.batched(tokenizer, test)

    def right(logits: Tensor) -> float:
        return float((logits.argmax(-1) == truth).double().mean())

    rows = []
    teacher = copy.deepcopy(base).eval()
    in_float = right(logits_of(teacher, batches))
    for name in arguments.cases:
        scheme, factor = CASES[name]
        model = data.add_outliers(copy.deepcopy(base), factor) if factor != 1 else copy.deepcopy(base)
        prepare(model, scheme)
        before = right(logits_of(model, batches))
        print(f"{name}: fp32 {in_float:.4f}, quantized after training {before:.4f}", flush=True)
        row: dict[str, Any] = {"case": name, "fp32": in_float, "ptq": before}
        rows.append(row)
        if arguments.only_ptq:
            continue
        chosen = random.Random(2).sample(train, min(arguments.texts or len(train), len(train)))
        trained(model, teacher, tokenizer, chosen, ids, arguments.rate)
        fake = logits_of(model, batches)
        real = logits_of(convert(model), batches)
        row |= {"qat": right(real), "difference": float((fake - real).abs().max() / fake.abs().max())}
        won = (row["qat"] - before) / (in_float - before) if in_float > before else float("nan")
        print(f"{name}: {row['qat']:.4f} after training with {len(chosen)} texts, {100 * won:.0f} % won back")
        print(f"{name}: converted, logits differ by {row['difference']:.1e}", flush=True)
    return rows


# ---- the time of a step


def minilm() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, num_labels=77)).train()


def contenders(peers: bool) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {
        "fp32": minilm,
        "pyqkern int8, linears": lambda: prepare(minilm(), "int8", exclude="*embeddings*"),
        "pyqkern int8": lambda: prepare(minilm(), "int8"),
    }
    for name in ("int8-weight-only", "nf4", "int4"):
        found[f"pyqkern {name}, linears"] = lambda name=name: prepare(minilm(), name, exclude="*embeddings*")
    if peers:
        # The nearest: int8 activations per token, int8 weights per channel; its int8 base config has no QAT.
        def torchao() -> Any:
            from torchao.quantization import quantize_
            from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

            model = minilm()
            activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
            weight = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
            quantize_(model, QATConfig(activation_config=activation, weight_config=weight, step="prepare"))
            return model

        found["torchao int8, linears"] = torchao
    return found


def times(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (arguments.batch, arguments.length), generator=generator)
    inputs = {"input_ids": ids, "labels": torch.arange(arguments.batch) % 77}
    steps: dict[str, Callable[[], None]] = {}
    for name, make in contenders(arguments.peers).items():
        try:
            model = make()
        except ImportError as error:
            print(f"{name} failed: {error}")
            continue
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step(model: Any = model, optimizer: Any = optimizer) -> None:
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        steps[name] = step
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            start = time.thread_time()
            step()
            samples[name].append(time.thread_time() - start)
    medians = {name: statistics.median(each) for name, each in samples.items()}
    rows = [
        {"contender": name, "cpu ms": 1e3 * each, "to fp32": each / medians["fp32"]} for name, each in medians.items()
    ]
    cells = [[r["contender"], f"{r['cpu ms']:.0f}", f"{r['to fp32']:.2f}"] for r in rows]
    print(f"a step with AdamW (fused), {arguments.batch} x {arguments.length} tokens\n")
    print(common.table(["", "CPU, ms", "to fp32"], cells))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="a CSV, or a folder with train.csv and test.csv: accuracy")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", help="by default label or category")
    parser.add_argument("--cases", type=common.names, default=["int4", "outliers"], help=f"among {', '.join(CASES)}")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate at its highest (default: 1e-4)")
    parser.add_argument("--texts", type=int, default=0, help="to train with, at random; 0: all, an epoch")
    parser.add_argument("--only-ptq", action="store_true", help="no training: accuracy before it")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "pyqkern", help="where models are kept")
    parser.add_argument("--batch", type=int, default=2 if DRY else 32)
    parser.add_argument("--length", type=int, default=4 if DRY else 24, help="tokens of a text (default: 24)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--peers", action="store_true", help="torchao's too")
    parser.add_argument("--json", type=Path, metavar="FILE")
    common.add_dry(parser)
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES):
        raise SystemExit(f"--cases must be among {', '.join(CASES)}; got {', '.join(sorted(unknown))}")
    torch.set_num_threads(arguments.threads)
    machine = common.machine()
    print(
        f"{machine['cpu']}, {machine['cores']} cores, {common.threads_title(arguments.threads)}\n`{common.command()}`\n"
    )
    rows = accuracy(arguments) if arguments.data else times(arguments)
    if arguments.json:
        record = {"command": common.command(), "machine": machine, "versions": common.versions(), "rows": rows}
        arguments.json.write_text(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
