"""A training step of LoRA on quantized weights on CPU, and its peak memory: peft on pyqkern, bitsandbytes and floats.

    python benchmarks/bench_qlora.py                      BERT-base's shapes, LoRA r=16 on query and value, 8x128, nf4
    python benchmarks/bench_qlora.py --checkpointing      with gradient checkpointing, as large models are trained
    python benchmarks/bench_qlora.py --contenders pyqkern,pyqkern-fp32,bitsandbytes,float --threads 2

pyqkern-fp32 does not quantize activations, as bitsandbytes does not. Each contender has a process of its own; they take
turns. Times are CPU seconds of all threads together: other programs may run. Peak memory is that of the process from
its start to its end (ru_maxrss), with imports and the float model before it is quantized.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import common
import torch
from shapes import BERT, DRY
from torch import nn

CONTENDERS = ("pyqkern", "pyqkern-fp32", "bitsandbytes", "float")
BATCH, LENGTH = (2, 16) if DRY else (8, 128)
ROUNDS = 1 if DRY else 7


def quantize(name: str, model: nn.Module) -> None:
    """All linears but the classifier to NF4, in blocks of 64."""
    if name.startswith("pyqkern"):
        from pyqkern import NF4, replace_linear

        replace_linear(model, NF4(compute="fp32" if name == "pyqkern-fp32" else "auto"), exclude=["classifier"])
    elif name == "bitsandbytes":
        import bitsandbytes as bnb

        for module in list(model.modules()):
            for child_name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and child_name != "classifier":
                    new = bnb.nn.Linear4bit(
                        child.in_features, child.out_features, compute_dtype=torch.float32, quant_type="nf4"
                    )
                    new.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                    new.bias = child.bias
                    setattr(module, child_name, new.to("cpu"))


def build(name: str, checkpointing: bool) -> Callable[[], float]:
    """A step of training on random tokens, which returns its loss."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    model: Any = BertForSequenceClassification(BertConfig(**BERT))
    quantize(name, model)
    config = LoraConfig(r=16, lora_alpha=16, target_modules=["query", "value"])
    if name.startswith("pyqkern"):
        import pyqkern
        from pyqkern.training import prepare_for_training

        model = prepare_for_training(model, gradient_checkpointing=checkpointing)
        config = pyqkern.lora(config)
    else:
        model.is_loaded_in_4bit = name == "bitsandbytes"
        options = {"use_reentrant": False}
        model = prepare_model_for_kbit_training(model, checkpointing, options)
        if checkpointing and name == "float":
            model.gradient_checkpointing_enable(options)
            model.enable_input_require_grads()
    model = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids, labels = torch.randint(1000, 30000, (BATCH, LENGTH)), torch.randint(0, 2, (BATCH,))

    def step() -> float:
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def serve(pipe: Connection, name: str, threads: int, checkpointing: bool) -> None:
    """Takes a step whenever asked, and sends its CPU time; at last the peak of memory."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    try:
        step = build(name, checkpointing)
        step()
    except Exception as error:  # a peer that does not run here
        pipe.send(f"{type(error).__name__}: {str(error)[:200]}")
        return
    pipe.send(None)
    while pipe.recv():
        begin = time.process_time()
        step()
        pipe.send(time.process_time() - begin)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def measure(names: list[str], threads: int, rounds: int, checkpointing: bool) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name in names:
        pipes[name], there = context.Pipe()
        context.Process(target=serve, args=(there, name, threads, checkpointing), daemon=True).start()
        if (failed := pipes[name].recv()) is not None:
            print(f"{name} failed: {failed}")
            del pipes[name]
    times: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            times[name].append(pipe.recv())
    rows = []
    for name, pipe in pipes.items():
        pipe.send(False)
        peak = pipe.recv()
        rows.append({"contender": name, "threads": threads, "seconds": statistics.median(times[name]), "peak": peak})
    for row in rows:
        own, others = times[rows[0]["contender"]], times[row["contender"]]
        row["ratio"] = statistics.median(b / a for a, b in zip(own, others, strict=True))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--contenders", type=common.names, default=["pyqkern"] if DRY else list(CONTENDERS))
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--threads", type=common.numbers, default=[1], help="thread counts, e.g. 1,2 (default: 1)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"steps of each contender (default: {ROUNDS})")
    parser.add_argument("--json", type=Path, metavar="FILE")
    common.add_dry(parser)
    arguments = parser.parse_args()
    if unknown := set(arguments.contenders) - set(CONTENDERS):
        raise SystemExit(f"--contenders must be among {', '.join(CONTENDERS)}; got {', '.join(sorted(unknown))}")
    machine = common.machine()
    print(f"{machine['cpu']}, {machine['cores']} cores\n`{common.command()}`\n")
    found = []
    for threads in arguments.threads:
        rows = measure(arguments.contenders, threads, arguments.rounds, arguments.checkpointing)
        cells = [
            [row["contender"], f"{row['seconds']:.2f}", f"{row['ratio']:.2f}x", f"{row['peak'] / 1e6:.0f}"]
            for row in rows
        ]
        print(f"{BATCH}x{LENGTH} tokens, {common.threads_title(threads)}\n")
        print(common.table(["a step", "CPU, s", "to the first", "peak, MB"], cells), end="\n\n")
        found += rows
    if arguments.json:
        record = {"command": common.command(), "machine": machine, "versions": common.versions(), "rows": found}
        arguments.json.write_text(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
