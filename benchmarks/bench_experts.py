"""A mixture-of-experts layer on CPU: Mixtral's block with quantized experts, against transformers' own code in fp32.

python benchmarks/bench_experts.py                  8 experts of 1024x3584, two for a token; 1 and 64 tokens
python benchmarks/bench_experts.py --m 1,16,256 --schemes int8,nf4
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import common
import torch
from common import Job, Result
from shapes import DRY
from torch import Tensor, nn

import pyqkern

HIDDEN, INTERMEDIATE, EXPERTS, TOP = (64, 64, 4, 2) if DRY else (1024, 3584, 8, 2)
LARGEST_ERROR = {True: 0.06, False: 0.3}  # of int8 and of 4 bits, relative to fp32; they are near 0.03 and 0.16

# transformers' implementations. "batched_mm" copies the weights of each token's experts, and takes ten times as long.
FLOATS = ("eager", "grouped_mm")


@dataclass(frozen=True)
class Case:
    m: int

    @property
    def label(self) -> str:
        return f"{self.m} token{'s'[: self.m - 1]}, {TOP} of {EXPERTS} experts of {HIDDEN}x{INTERMEDIATE}"


@functools.cache
def block() -> nn.Module:
    """Mixtral's router and experts, with normal weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS, num_experts_per_tok=TOP
    )
    torch.manual_seed(0)
    module: nn.Module = MixtralSparseMoeBlock(config).eval().requires_grad_(False)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module


def quantized(scheme: str) -> nn.Module:
    """The same router and quantized experts."""
    module: Any = copy.copy(block())
    module._modules = dict(module._modules)
    module.experts = pyqkern.QExperts.from_experts(module.experts, scheme)
    return module  # type: ignore[no-any-return]


def build(contender: str, case: Case, threads: int) -> Job:
    """Makes the contender's call, and checks its result before anything is timed."""
    x = torch.randn(1, case.m, HIDDEN, generator=torch.Generator().manual_seed(case.m))
    exact: Any = block()
    own = common.own(contender)

    def implementation() -> None:
        exact.experts.config._experts_implementation = "eager" if own else contender.split()[1]

    implementation()
    with torch.inference_mode():
        expected: Tensor = exact(x)
        if own is None:
            return Job([lambda: exact(x)], before=implementation)
        before = common.use_isa(contender)
        assert before is not None
        before()
        module = quantized(own.scheme)
        error = float((module(x) - expected).norm() / expected.norm())
    largest = LARGEST_ERROR[own.scheme.startswith("int8")]
    if not error <= largest:
        raise ValueError(f"relative error against fp32 must be at most {largest}, got {error:.4f}")
    return Job([lambda: module(x)], {"error": error}, before)


def show(results: Sequence[Result], cases: Sequence[Case], contenders: Sequence[str], threads: int) -> list[Any]:
    """Milliseconds, and how much faster than the fastest of transformers' implementations pyqkern's schemes are."""
    records, rows = [], []
    for case in cases:
        found = {name: common.find(results, case.label, name, threads) for name in contenders}
        seconds = {name: result.seconds for name, result in found.items() if result and result.seconds}
        floats = min((seconds[name] for name in seconds if not name.startswith("pyqkern")), default=None)
        ratios = {name: floats / seconds[name] for name in seconds if name.startswith("pyqkern")} if floats else {}
        records.append({"case": case.label, "seconds": seconds, "to fp32": ratios})
        cells = [f"{seconds[name] * 1e3:.2f}" if name in seconds else "-" for name in contenders]
        rows.append([case.label, *cells, " ".join(f"{ratio:.2f}" for ratio in ratios.values())])
    print(f"{common.threads_title(threads)}; the ratios are those of pyqkern's columns, in their order:\n")
    print(common.table(["ms", *contenders, "to the fastest fp32"], rows), end="\n\n")
    return records


def main() -> int:
    parser = common.options(__doc__.splitlines()[0] if __doc__ else "", rounds=15)
    parser.add_argument("--m", type=common.numbers, default=[1, 3] if DRY else [1, 64], help="tokens (default: 1,64)")
    parser.add_argument(
        "--schemes", type=common.names, default=["int8", "int8-a7", "nf4", "int4"],
        help="default: int8,int8-a7,nf4,int4",
    )  # fmt: skip
    arguments = parser.parse_args()
    isas = common.contenders(argparse.Namespace(peers=["torch"], isa=arguments.isa), "linear")[0]
    own = [f"{isa} {scheme}" for isa in isas if isa.startswith("pyqkern ") for scheme in arguments.schemes]
    contenders = [*own, *(f"transformers {name}" for name in FLOATS)]
    found = common.header({}, arguments.threads)
    cases = [Case(m) for m in arguments.m]
    results, records = common.measure_all(
        arguments, build, contenders, cases, lambda measured, threads: show(measured, cases, contenders, threads)
    )
    failed = common.failures(results)
    common.write_json(arguments.json, found=found, missing={}, results=results, summary=records)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
