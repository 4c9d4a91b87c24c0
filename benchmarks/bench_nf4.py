"""NF4 on CPU: the linear, quantize and dequantize, and BERT-base, against bitsandbytes, torch and the machine's limits.

Examples:
  python benchmarks/bench_nf4.py                     the linear, weights in cache: M = 1, 4, 16, 128, 1024
  python benchmarks/bench_nf4.py --cold              M = 1, weights from DRAM, as a share of the read bandwidth: the
                                                     module, and the operator alone (the module's own Python objects
                                                     have left the cache too, which costs some microseconds)
  python benchmarks/bench_nf4.py --cold --isa avx2   the same on AVX2, against torch's fp32 linear
  python benchmarks/bench_nf4.py --cold --m 1,128 --compute fp32 --kn 896x4864,2048x8192
  python benchmarks/bench_nf4.py --tensors           quantize_4bit and dequantize_4bit, 1 to 64 M elements, as a share
                                                     of a copy's bandwidth: bytes read and bytes written both count
  python benchmarks/bench_nf4.py --models            BERT-base (random weights), 1x128 and 8x128, by replace_linear
                                                     and by optimize
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import common
import peers
import shapes
import torch
from common import Job, Result
from limits import Limits
from torch import nn

COMPUTE = ("auto", "fp32", "bf16", "int8")
BITSANDBYTES = ("bitsandbytes fp32", "bitsandbytes bf16")  # the dtype that it computes in; the faster one counts
BYTES_PER_WEIGHT = 0.5625
LARGEST_ERROR = 0.15  # relative to fp32; NF4's own is near 0.09


@dataclass(frozen=True)
class Case:
    """One linear of [m, k] and [n, k], of which `copies` take turns."""

    m: int
    k: int
    n: int
    copies: int = 1

    @property
    def label(self) -> str:
        return f"{self.m}x{self.k}x{self.n}"

    @property
    def bytes(self) -> float:
        """What one call reads of the weight."""
        return self.k * self.n * BYTES_PER_WEIGHT


@dataclass(frozen=True)
class TensorCase:
    """A tensor of n elements that is quantized, or dequantized to fp32."""

    n: int
    inverse: bool

    @property
    def label(self) -> str:
        return f"{'dequantize' if self.inverse else 'quantize'} {self.n / (1 << 20):g} M"

    @property
    def bytes(self) -> float:
        """What one call reads and writes: fp32 and the 4-bit form."""
        return self.n * (4 + BYTES_PER_WEIGHT)


@dataclass(frozen=True)
class ModelCase:
    size: str

    @property
    def label(self) -> str:
        return f"BERT-base {self.size}"


# ---- what is timed --------------------------------------------------------------------------------------------------


def build(contender: str, case: Case | TensorCase | ModelCase, threads: int) -> Job:
    """Makes the contender's calls, and checks their result before anything is timed."""
    if isinstance(case, Case):
        return _linear(contender, case, threads)
    return _tensor(contender, case, threads) if isinstance(case, TensorCase) else _model(contender, case)


def _bitsandbytes(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Every nn.Linear of it as bitsandbytes' NF4 linear that computes in dtype."""
    import bitsandbytes

    for name, child in list(module.named_children()):
        if not isinstance(child, nn.Linear):
            _bitsandbytes(child, dtype)
            continue
        new: Any = bitsandbytes.nn.Linear4bit(
            child.in_features, child.out_features, child.bias is not None, compute_dtype=dtype, quant_type="nf4"
        )
        new.weight = bitsandbytes.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
        new.bias = child.bias
        setattr(module, name, new.to("cpu").eval())
    return module


def _converted(contender: str, module: nn.Module) -> nn.Module:
    """The module as the contender has it: "pyqkern ISA COMPUTE [optimize]", "bitsandbytes DTYPE" or "torch DTYPE"."""
    name, *rest = contender.split()
    if name == "pyqkern":
        import pyqkern
        from pyqkern.schemes import NF4

        convert = pyqkern.optimize if "optimize" in rest else pyqkern.replace_linear
        return convert(module, NF4(compute=rest[1]))
    dtype = torch.bfloat16 if rest[0] == "bf16" else torch.float32
    return _bitsandbytes(module, dtype) if name == "bitsandbytes" else module.to(dtype)


def _switch(contender: str) -> Callable[[], object] | None:
    name, *rest = contender.split()
    return common.use_isa(f"pyqkern {rest[0]}") if name == "pyqkern" else None


def _linear(contender: str, case: Case, threads: int) -> Job:
    if contender == "limit: read":
        work = Limits.load().read(int(case.copies * case.bytes), threads)
        return Job([work], {"amount": work.amount})
    torch.manual_seed(0)
    linear = nn.Linear(case.k, case.n)
    x = torch.randn(case.m, case.k, generator=torch.Generator().manual_seed(1))
    switch = _switch(contender)
    if switch:
        switch()
    with torch.inference_mode():
        expected = linear(x)
        modules = [_converted(contender, nn.Sequential(copy.deepcopy(linear)))[0] for _ in range(case.copies)]  # type: ignore[index]
        if contender == "torch bf16":
            x = x.bfloat16()
        error = float((modules[0](x).float() - expected).norm() / expected.norm())
    if not error <= LARGEST_ERROR:
        raise ValueError(f"relative error against fp32 must be at most {LARGEST_ERROR}, got {error:.4f}")
    calls: list[Callable[[], object]] = [functools.partial(module, x) for module in modules]
    if contender.endswith(" operator"):
        calls = [_operator(module, x) for module in modules]
    return Job(calls, {"error": error}, switch)


def _operator(layer: Any, x: torch.Tensor) -> Callable[[], object]:
    """The layer's operator with its tensors, as the layer calls it."""
    from pyqkern.backends import Weight4bit
    from pyqkern.ops import four_bit

    tensors = (layer.packed, layer.absmax, layer.nested_absmax, layer.nested_map, layer.nested_offset)
    shape = (layer.out_features, layer.in_features)
    weight = Weight4bit(*tensors, layer.quant_type, layer.blocksize, shape)
    return functools.partial(four_bit.linear_4bit, x, weight, layer.bias, layer.scheme.compute)


def _tensor(contender: str, case: TensorCase, threads: int) -> Job:
    if contender.startswith("limit"):  # 4 bytes on one side and 1 on the other: the nearest that there is to 4 : 0.5625
        reads, writes = (1, 4) if case.inverse else (4, 1)
        work = Limits.load().move(int(case.bytes), reads, writes, contender.endswith("non-temporal"), threads)
        return Job([work], {"amount": work.amount})
    w = torch.randn(case.n, generator=torch.Generator().manual_seed(0))
    call: Callable[[], object]
    if contender.startswith("pyqkern"):
        import pyqkern

        q = pyqkern.quantize_4bit(w)
        call = (lambda: pyqkern.dequantize_4bit(q)) if case.inverse else (lambda: pyqkern.quantize_4bit(w))
    else:
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(w, quant_type="nf4")
        inverse = functools.partial(functional.dequantize_4bit, packed, state)
        call = inverse if case.inverse else functools.partial(functional.quantize_4bit, w, quant_type="nf4")
    return Job([call], {}, _switch(contender))


def _model(contender: str, case: ModelCase) -> Job:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model: Any = BertModel(BertConfig(**shapes.BERT), add_pooling_layer=False).eval()
    ids, mask = shapes.model_inputs(case.size)
    switch = _switch(contender)
    if switch:
        switch()
    model = _converted(contender, model)
    return Job([lambda: model(input_ids=ids, attention_mask=mask)], {}, switch)


# ---- what is shown --------------------------------------------------------------------------------------------------


def show(
    results: Sequence[Result], cases: Sequence[Any], contenders: Sequence[str], threads: int
) -> list[dict[str, Any]]:
    """Times of all; for pyqkern the ratios to the faster bitsandbytes and to torch fp32, and the share of the limit."""
    records = []
    columns = ["us", *contenders, "to bitsandbytes", "to torch fp32", "of the limit"]
    rows = []
    for case in cases:
        found = {name: common.find(results, case.label, name, threads) for name in contenders}
        seconds = {name: _of_case(result, case) for name, result in found.items() if result and result.seconds}
        own = {name: value for name, value in seconds.items() if name.startswith("pyqkern")}
        theirs = min((value for name, value in seconds.items() if name.startswith("bitsandbytes")), default=None)
        limit = min((value for name, value in seconds.items() if name.startswith("limit")), default=None)
        ratios = {
            "to bitsandbytes": {name: theirs / value for name, value in own.items()} if theirs else {},
            "to torch fp32": {n: seconds["torch fp32"] / v for n, v in own.items()} if "torch fp32" in seconds else {},
            "of the limit": {n: limit / v for n, v in own.items()} if limit else {},
        }
        records.append({"case": case.label, "threads": threads, "seconds": seconds, **ratios})
        cells = [" ".join(f"{value:.2f}" for value in ratio.values()) for ratio in ratios.values()]
        rows.append(
            [case.label, *(f"{seconds[n] * 1e6:.1f}" if n in seconds else "failed" for n in contenders), *cells]
        )
    print(f"{common.threads_title(threads)}; the ratios are those of pyqkern's columns, in their order:\n")
    print(common.table(columns, rows), end="\n\n")
    return records


def _of_case(result: Result, case: Any) -> float:
    """Seconds of one call; of a limit, of as many bytes as one call moves."""
    assert result.seconds is not None
    return result.seconds * (case.bytes / result.facts["amount"] if "amount" in result.facts else 1)


# ---- the command ----------------------------------------------------------------------------------------------------


def main() -> int:
    parser = common.options(__doc__.splitlines()[0] if __doc__ else "", rounds=15)
    parser.add_argument("--m", type=common.numbers, help="rows (default: 1,4,16,128,1024; with --cold 1)")
    shapes.add_linears(parser)
    parser.add_argument(
        "--compute", type=common.names, default=["auto"], help="e.g. auto,fp32,bf16,int8 (default: auto)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--cold", action="store_true", help="weights rotate over 96 MiB, so that they come from DRAM")
    what.add_argument("--tensors", action="store_true", help="quantize_4bit and dequantize_4bit")
    what.add_argument("--models", action="store_true", help="BERT-base end to end")
    arguments = parser.parse_args()
    if unknown := set(arguments.compute) - set(COMPUTE):
        raise SystemExit(f"--compute must be among {', '.join(COMPUTE)}; got {', '.join(sorted(unknown))}")

    cases = _cases(arguments)
    isas = common.contenders(argparse.Namespace(peers=["torch"], isa=arguments.isa), "linear")[0]
    own = [f"{isa} {compute}" for isa in isas if isa.startswith("pyqkern") for compute in arguments.compute]
    if arguments.cold:
        own += [f"{name} operator" for name in own]
    if arguments.models:
        own += [f"{name} optimize" for name in own]
    missing = peers.choose(["bnb-nf4"], "linear")[1]
    theirs = [] if missing else [BITSANDBYTES[0]] if arguments.tensors else [*BITSANDBYTES]
    others = [] if arguments.tensors else ["torch fp32"]
    found = common.header(missing, arguments.threads)
    copy = ["limit: copy", "limit: copy, non-temporal"]  # the faster one counts
    limit = (["limit: read"] if arguments.cold else copy if arguments.tensors else []) if found else []
    chosen = [*own, *theirs, *others, *limit]
    results, records = common.measure_all(
        arguments, build, chosen, cases, lambda measured, threads: show(measured, cases, chosen, threads)
    )
    failed = common.failures(results)
    common.write_json(arguments.json, found=found, missing=missing, results=results, summary=records)
    return 1 if failed else 0


def _cases(arguments: argparse.Namespace) -> list[Any]:
    if arguments.models:
        return [ModelCase(size) for size in (shapes.MODEL_SIZES[0], shapes.MODEL_SIZES[-1])]
    if arguments.tensors:
        return [TensorCase(n, inverse) for inverse in (False, True) for n in shapes.FOUR_BIT_SIZES]
    copies = {kn: max(1, int(shapes.COLD_BYTES / (kn[0] * kn[1] * BYTES_PER_WEIGHT))) for kn in arguments.kn}
    return [
        Case(m, k, n, copies[k, n] if arguments.cold else 1)
        for m in arguments.m or ([1] if arguments.cold else shapes.ROWS_4BIT)
        for k, n in arguments.kn
    ]


if __name__ == "__main__":
    sys.exit(main())
