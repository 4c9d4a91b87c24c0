"""LSTM and GRU on CPU: against torch's quantize_dynamic and ONNX Runtime, in time and in the error of the last output.

Examples:
  python benchmarks/bench_recurrent.py                2 layers of 512, 50 steps, batch 1 and 32; a tagger
  python benchmarks/bench_recurrent.py --errors       the error of the last output, of random weights and of a character
                                                      model that is trained here (--data FILE: on that text)
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
from common import Job, Result
from shapes import DRY
from torch import Tensor, nn

import pyqkern

HIDDEN, STEPS = (16, 4) if DRY else (512, 50)
BATCHES = (1,) if DRY else (1, 32)
TAGGER = (8, 8, 4) if DRY else (300, 256, 20)  # embedding, hidden size, tokens
LARGEST_ERROR = 0.5 if DRY else 0.3  # relative to fp32; ONNX Runtime's is near 0.15
TRAINING = (2, 8, 16) if DRY else (300, 32, 64)  # steps, batch, characters
CHARACTERS, WIDTH = 96, 16 if DRY else 256

ORT = "onnxruntime"
PEERS = ("quantize_dynamic fbgemm", "quantize_dynamic onednn", ORT)


@dataclass(frozen=True)
class Case:
    kind: str  # "LSTM", "GRU" or "tagger"
    batch: int

    @property
    def label(self) -> str:
        if self.kind == "tagger":
            return f"tagger {TAGGER[0]}-{TAGGER[1]} bidirectional, {TAGGER[2]} tokens"
        return f"{self.kind} 2x{HIDDEN}, batch {self.batch}, {STEPS} steps"

    def model(self) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        if self.kind == "tagger":
            embedding, hidden, tokens = TAGGER
            return Tagger(embedding, hidden).eval(), torch.arange(tokens).view(1, tokens)
        module = Last(getattr(nn, self.kind)(HIDDEN, HIDDEN, 2)).eval()
        return module, torch.randn(STEPS, self.batch, HIDDEN)


class Last(nn.Module):
    """A layer whose outputs are all returned."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rnn(x)[0]
        return y


class Tagger(nn.Module):
    def __init__(self, embedding: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, embedding)
        self.rnn = nn.LSTM(embedding, hidden, bidirectional=True, batch_first=True)
        self.out = nn.Linear(2 * hidden, 20)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.out(self.rnn(self.embedding(ids))[0])
        return y


class Characters(nn.Module):
    """Predicts the next character."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, WIDTH // 4)
        self.rnn = getattr(nn, kind)(WIDTH // 4, WIDTH, 2)
        self.out = nn.Linear(WIDTH, CHARACTERS)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.out(self.rnn(self.embedding(ids))[0])
        return y


# ---- the contenders -------------------------------------------------------------------------------------------------


def converted(contender: str, model: nn.Module, x: Tensor, threads: int) -> tuple[Callable[[Tensor], Tensor], Any]:
    """What the contender makes of the model, and what has to be called before it runs."""
    name, *rest = contender.split()
    if name == "pyqkern":
        isa, scheme = rest
        before = common.use_isa(f"pyqkern {isa}")
        assert before is not None
        before()
        return pyqkern.quantize_dynamic(model, {kind: scheme for kind in (nn.LSTM, nn.GRU, nn.Linear)}), before
    if name == ORT:
        return _onnxruntime(model, x, threads), None
    if name == "torch":
        return model, None

    def engine() -> None:
        torch.backends.quantized.engine = rest[0]

    engine()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized: nn.Module = torch.ao.quantization.quantize_dynamic(model, dtype=torch.qint8)  # type: ignore[no-untyped-call]
    return quantized, engine


def _onnxruntime(model: nn.Module, x: Tensor, threads: int) -> Callable[[Tensor], Tensor]:
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported, quantized = (str(Path(folder) / name) for name in ("model.onnx", "quantized.onnx"))
        torch.onnx.export(model, (x,), exported, input_names=["x"], dynamo=False, opset_version=14)
        quantize_dynamic(exported, quantized, weight_type=QuantType.QInt8, per_channel=True)
        import onnx

        found = {node.op_type for node in onnx.load(quantized).graph.node}
        if "GRU" in found or "LSTM" in found:
            raise ValueError("its quantize_dynamic leaves GRU in float")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(quantized, options, providers=["CPUExecutionProvider"])
    return lambda rows: torch.from_numpy(session.run(None, {"x": rows.numpy()})[0])


def build(contender: str, case: Case, threads: int) -> Job:
    """Makes the contender's call, and checks its result before anything is timed."""
    model, x = case.model()
    with torch.inference_mode():
        expected = model(x)
        call, before = converted(contender, copy.deepcopy(model), x, threads)
        error = relative(call(x), expected)
    if not error <= LARGEST_ERROR:
        raise ValueError(f"relative error against fp32 must be at most {LARGEST_ERROR}, got {error:.4f}")
    return Job([lambda: call(x)], {"error": error}, before)


def relative(y: Tensor, expected: Tensor) -> float:
    return float((y - expected).norm() / expected.norm())


# ---- times ----------------------------------------------------------------------------------------------------------


def show(results: Sequence[Result], cases: Sequence[Case], contenders: Sequence[str], threads: int) -> list[Any]:
    """Milliseconds, and how much faster pyqkern's schemes are than the fastest quantized peer and than fp32."""
    records, rows = [], []
    for case in cases:
        found = {name: common.find(results, case.label, name, threads) for name in contenders}
        seconds = {name: result.seconds for name, result in found.items() if result and result.seconds}
        own = [name for name in seconds if name.startswith("pyqkern")]
        peer = min((value for name, value in seconds.items() if name in PEERS), default=None)
        to_peer = {name: peer / seconds[name] for name in own} if peer else {}
        to_fp32 = {name: seconds["torch fp32"] / seconds[name] for name in own} if "torch fp32" in seconds else {}
        records.append({"case": case.label, "seconds": seconds, "to peers": to_peer, "to fp32": to_fp32})
        cells = [f"{seconds[name] * 1e3:.2f}" if name in seconds else "-" for name in contenders]
        ratios = [" ".join(f"{value:.2f}" for value in ratio.values()) for ratio in (to_peer, to_fp32)]
        rows.append([case.label, *cells, *ratios])
    print(f"{common.threads_title(threads)}; the ratios are those of pyqkern's columns, in their order:\n")
    print(common.table(["ms", *contenders, "to the fastest peer", "to fp32"], rows), end="\n\n")
    return records


# ---- errors ---------------------------------------------------------------------------------------------------------


def trained(kind: str, text: str) -> tuple[nn.Module, Tensor]:
    """A character model after some hundred steps of Adam, and characters that it has not seen."""
    steps, batch, length = TRAINING
    ids = torch.tensor([min(max(ord(character) - 31, 0), CHARACTERS - 1) for character in text])
    torch.manual_seed(0)
    model, held_back = Characters(kind), len(ids) * 9 // 10
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        starts = torch.randint(held_back - length - 1, (batch,))
        rows = torch.stack([ids[start : start + length + 1] for start in starts]).t()
        loss = nn.functional.cross_entropy(model(rows[:-1]).flatten(0, 1), rows[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    starts = torch.linspace(held_back, len(ids) - length - 1, batch).long()
    print(f"{kind} of characters: loss {loss.item():.2f} after {steps} steps")
    return model.eval(), torch.stack([ids[start : start + length] for start in starts]).t().contiguous()


def errors(contenders: Sequence[str], text: str) -> list[dict[str, Any]]:
    """The relative error of the last step's output against fp32."""
    models = [(f"{kind} 2x{HIDDEN}, random", *Case(kind, BATCHES[-1]).model()) for kind in ("LSTM", "GRU")]
    models += [(f"{kind} 2x{WIDTH}, trained", *trained(kind, text)) for kind in ("LSTM", "GRU")]
    records, rows = [], []
    for label, model, x in models:
        found: dict[str, float | str] = {}
        with torch.inference_mode():
            expected = model(x)[-1]
            for name in contenders:
                try:
                    call, _ = converted(name, copy.deepcopy(model), x, 1)
                    found[name] = relative(call(x)[-1], expected)
                except Exception as error:  # a peer may fail in any way
                    if name.startswith("pyqkern"):
                        raise
                    found[name] = f"{type(error).__name__}: {error}"[:200]
        records.append({"model": label, "errors": found})
        rows.append([label, *(f"{e:.4f}" if isinstance(e := found[name], float) else "-" for name in contenders)])
    print()
    print(common.table(["relative error of the last output", *contenders], rows), end="\n\n")
    return records


# ---- the command ----------------------------------------------------------------------------------------------------


def main() -> int:
    parser = common.options(__doc__.splitlines()[0] if __doc__ else "", rounds=15)
    parser.add_argument("--errors", action="store_true", help="errors instead of times")
    parser.add_argument("--schemes", type=common.names, default=["int8", "int8-a7"], help="default: int8,int8-a7")
    parser.add_argument(
        "--data", type=Path, default=Path(argparse.__file__), metavar="FILE",
        help="a text to train the character model on (default: a module of Python's library)",
    )  # fmt: skip
    arguments = parser.parse_args()
    isas = common.contenders(argparse.Namespace(peers=["torch"], isa=arguments.isa), "linear")[0]
    own = [f"{isa} {scheme}" for isa in isas if isa.startswith("pyqkern ") for scheme in arguments.schemes]
    engines = torch.backends.quantized.supported_engines
    theirs = [peer for peer in PEERS if peer != ORT and peer.split()[1] in engines]
    missing = {} if arguments.peers == ["torch"] or _installed() else {ORT: "onnxruntime and onnx are not installed"}
    if arguments.peers != ["torch"] and not missing:
        theirs.append(ORT)
    found = common.header(missing, arguments.threads)
    results: list[Result] = []
    records: list[dict[str, Any]] = []
    if arguments.errors:
        records = errors([*own, *theirs], arguments.data.read_text(errors="replace"))
    else:
        cases = [*(Case(kind, batch) for kind in ("LSTM", "GRU") for batch in BATCHES), Case("tagger", 1)]
        chosen = [*own, *theirs, "torch fp32"]
        results, records = common.measure_all(
            arguments, build, chosen, cases, lambda measured, threads: show(measured, cases, chosen, threads)
        )
    failed = common.failures(results)
    common.write_json(arguments.json, found=found, missing=missing, results=results, summary=records)
    return 1 if failed else 0


def _installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnx"))


if __name__ == "__main__":
    sys.exit(main())
