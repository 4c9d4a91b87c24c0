"""The linear with integer products, as its user calls it (fp32 in and out, bias), and the bare product int8_matmul.

Weights are normal, as trained ones nearly are; activations are quantized per token, inside the call.

python benchmarks/bench_int8.py --peers --threads 1,2 --json int8.json --plot int8.png
python benchmarks/bench_int8.py --cold --m 1,16,128         weights come from DRAM, as in a model
python benchmarks/bench_int8.py --isa all --m 1024          one row of figures for each instruction set
python benchmarks/bench_int8.py --cold --m 1,128 --schemes int8-weight-only --peers fp32 --kn 896x4864,2048x8192
"""

from __future__ import annotations

import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import common
import peers
import shapes
import torch
from common import Job, Result
from limits import Limits, peaks_of
from torch import Tensor, nn

FASTEST_OF = ("fbgemm", "onednn", "ort")  # the peers whose best is the one to beat, at each shape
LARGEST_ERROR = {True: 0.03, False: 0.2}  # of int8 and of 4 bits, relative to fp32; they are near 0.01 and 0.1
COLD_ROWS = 4  # up to as many a product from DRAM is bound by the bandwidth, with more by its instructions
CHECKED_ROWS = 16
INT_MM = "torch._int_mm"


@dataclass(frozen=True)
class Case:
    """One product of a [m, k] activation and a [n, k] weight; `copies` weights take turns."""

    m: int
    k: int
    n: int
    copies: int = 1
    matmul: bool = False

    @property
    def label(self) -> str:
        return f"{self.m}x{self.k}x{self.n}"

    @property
    def operations(self) -> int:
        return 2 * self.m * self.k * self.n


# ---- what is timed --------------------------------------------------------------------------------------------------


def build(contender: str, case: Case, threads: int) -> Job:
    """Makes the contender's calls and checks their result before anything is timed."""
    if contender.startswith("limit: "):
        return _limit(contender.removeprefix("limit: "), case, threads)
    job = _matmul(contender, case) if case.matmul else _linear(contender, case, threads)
    job.before = common.use_isa(contender)
    return job


def _limit(name: str, case: Case, threads: int) -> Job:
    limits = Limits.load()
    work = limits.read(case.copies * case.k * case.n, threads) if name == "read" else limits.peak(name, threads)
    return Job([work], {"amount": work.amount})


@functools.lru_cache(maxsize=32)
def _modules(contender: str, k: int, n: int, copies: int, threads: int) -> tuple[nn.Linear, Sequence[peers.LinearCall]]:
    torch.manual_seed(0)
    linear = nn.Linear(k, n)
    nn.init.normal_(linear.weight, std=k**-0.5)
    ours = common.own(contender)
    make = (peers.own(ours.name, ours.scheme) if ours else peers.BY_NAME[contender]).linear
    assert make is not None
    return linear, make(linear, copies, threads)


def _linear(contender: str, case: Case, threads: int) -> Job:
    linear, modules = _modules(contender, case.k, case.n, case.copies, threads)
    x = torch.randn(case.m, case.k, generator=torch.Generator().manual_seed(1))
    if switch := common.use_isa(contender):
        switch()
    with torch.inference_mode():
        expected, result = linear(x), torch.as_tensor(modules[0](x))
    error = float((result - expected).norm() / expected.norm())
    facts = {"error": error}
    if ours := common.own(contender):
        _check(ours, modules[0], x, result, error)
        facts["bytes"] = sum(buffer.nbytes for buffer in modules[0].buffers())
    return Job([functools.partial(module, x) for module in modules], facts)


def _check(ours: common.Own, module: Any, x: Tensor, result: Tensor, error: float) -> None:
    """The first rows are those of the specification, or for 4 bits of the kernels without vectors, bit for bit."""
    from pyqkern import _C
    from pyqkern.backends import reference

    int8 = ours.scheme.startswith("int8")
    if not error <= LARGEST_ERROR[int8]:
        raise ValueError(f"relative error against fp32 must be at most {LARGEST_ERROR[int8]}, got {error:.4f}")
    x, result = x[:CHECKED_ROWS], result[:CHECKED_ROWS]
    if int8:
        state, scheme = module.state_dict(), module.scheme
        weight, scale, bias = state["weight"], state["weight_scale"], state["bias"]
        if ours.scheme == "int8-weight-only":
            expected = reference.int8_linear_weight_only(x, weight, scale, bias)
        else:
            expected = reference.int8_linear(x, weight, scale, bias, "none", scheme.symmetric, scheme.activation_bits)
    else:
        _C.set_isa("scalar")
        with torch.inference_mode():
            expected = module(x)
        _C.set_isa(ours.isa)
    if not torch.equal(result, expected):
        raise ValueError(f"{int((result != expected).sum())} of {result.numel()} outputs differ from the reference")


def _matmul(contender: str, case: Case) -> Job:
    generator = torch.Generator().manual_seed(1)
    a = torch.randint(-128, 128, (case.m, case.k), dtype=torch.int8, generator=generator)
    w = torch.randint(-128, 128, (case.n, case.k), dtype=torch.int8, generator=generator)
    a[0], w[0] = -128, -128  # the largest sum there is
    multiply: Callable[[Tensor, Tensor], Tensor]
    if contender == INT_MM:
        multiply, right = torch._int_mm, w.t()
    else:
        import pyqkern

        multiply, right = pyqkern.int8_matmul, w
        if switch := common.use_isa(contender):
            switch()
    exact = (a.double() @ w.double().T).to(torch.int32)
    with torch.inference_mode():
        wrong = int((multiply(a, right) != exact).sum())
    if wrong:
        raise ValueError(f"{wrong} of {exact.numel()} sums are wrong")
    return Job([functools.partial(multiply, a, right)])


# ---- what is shown --------------------------------------------------------------------------------------------------


def _limits_of(contender: str, from_memory: bool) -> tuple[str, ...]:
    """What pyqkern's time is a share of: the read bandwidth, or the ISA's peaks for its scheme, of which the best."""
    ours = common.own(contender)
    if ours is None:
        return ()
    return ("limit: read",) if from_memory else tuple(f"limit: {peak}" for peak in peaks_of(ours.isa, ours.scheme))


def _from_memory(case: Case) -> bool:
    """Whether the bandwidth is what bounds the case."""
    return case.copies > 1 and case.m <= COLD_ROWS


def _rate(result: Result) -> float:
    """What a limit did in a second."""
    assert result.seconds
    return float(result.facts["amount"]) / result.seconds


def summarize(results: Sequence[Result], cases: Sequence[Case], threads: int) -> list[dict[str, Any]]:
    """One record for each case, ISA and scheme of pyqkern: time, rate, share of the limit, ratio to each peer."""
    records: list[dict[str, Any]] = []
    ours = list(dict.fromkeys(result.contender for result in results if result.contender.startswith("pyqkern")))
    for contender, case in itertools.product(ours, cases):
        get = functools.partial(common.find, results, case.label, threads=threads)
        own = get(contender=contender)
        if own is None or own.seconds is None:
            continue
        cold = _from_memory(case)
        rate = (own.facts["bytes"] if cold else case.operations) / own.seconds
        limits = [found for name in _limits_of(contender, cold) if (found := get(contender=name))]
        fma = get(contender="limit: fp32 fma ymm")
        peers = [
            result for result in results
            if result.case == case.label and result.threads == threads and result.seconds
            and not result.contender.startswith(("pyqkern", "limit"))
        ]  # fmt: skip
        others = {peer.contender: own.ratio(peer) for peer in peers}
        records.append({
            "contender": contender, "case": case.label, "threads": threads, "us": own.seconds * 1e6,
            "spread": own.spread, "giga": rate / 1e9, "unit": "GB/s" if cold else "GOP/s",
            "share": rate / max(map(_rate, limits)) if limits else None,
            "over_fp32_ymm": rate / _rate(fma) if fma and not cold else None, "ratios": others,
            "others_us": {peer.contender: peer.seconds * 1e6 for peer in peers if peer.seconds},
            "to_fastest": min((others[name] for name in FASTEST_OF if name in others), default=None),
        })  # fmt: skip
    return records


def show(records: list[dict[str, Any]], results: Sequence[Result]) -> None:
    """A table for each ISA and scheme: pyqkern's own figures, then each peer's time and how many times pyqkern's."""
    for contender in dict.fromkeys(record["contender"] for record in records):
        own = [record for record in records if record["contender"] == contender]
        others = list(dict.fromkeys(name for record in own for name in record["ratios"]))
        beaten = any(record["to_fastest"] for record in own)
        columns = ["M x K x N", f"{contender}, us", "spread", "rate", "of the limit", *map(common.title, others)]
        columns += ["to fastest"] if beaten else []
        rows = []
        for record in own:
            row = [
                record["case"],
                _number(record["us"]),
                f"{record['spread']:.0%}",
                f"{record['giga']:.1f} {record['unit']}",
            ]
            row.append(f"{record['share']:.0%}" if record["share"] else "")
            for name in others:
                ratio = record["ratios"].get(name)
                row.append(f"{_number(record['others_us'][name])} ({ratio:.2f}x)" if ratio else "failed")
            rows.append(row + ([f"{record['to_fastest']:.2f}x" if record["to_fastest"] else ""] if beaten else []))
        means = [_mean([record["ratios"].get(name) for record in own]) for name in others]
        means += [_mean([record["to_fastest"] for record in own])] if beaten else []
        if others:
            rows.append(["geometric mean", "", "", "", "", *means])
        print(f"{common.threads_title(own[0]['threads'])}:\n\n{common.table(columns, rows)}")
        fp32 = [record["over_fp32_ymm"] for record in own if record["over_fp32_ymm"]]
        if fp32 and " avx2" in contender:
            print(f"\nrate over the fp32 ymm fma peak: {', '.join(f'{value:.2f}x' for value in fp32)}")
        print()
    errors = [[common.title(name), f"{error:.4f}"] for name, error in _errors(results).items()]
    if errors:
        print(common.table(["relative error against fp32", "largest"], errors), end="\n\n")


def show_scaling(records: list[dict[str, Any]]) -> None:
    """How many times faster than with one thread."""
    one = {(r["contender"], r["case"]): r["us"] for r in records if r["threads"] == 1}
    more = [r for r in records if r["threads"] > 1 and (r["contender"], r["case"]) in one]
    rows = []
    for r in more:
        faster = one[r["contender"], r["case"]] / r["us"]
        rows.append([f"{r['contender']} {r['case']}", str(r["threads"]), _number(r["us"]), f"{faster:.2f}x"])
    if rows:
        print(common.table(["scaling", "threads", "us", "against one thread"], rows), end="\n\n")


def _errors(results: Sequence[Result]) -> dict[str, float]:
    errors: dict[str, float] = {}
    for result in results:
        if "error" in result.facts:
            errors[result.contender] = max(errors.get(result.contender, 0.0), result.facts["error"])
    return errors


def _number(us: float) -> str:
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"


def _mean(ratios: list[float | None]) -> str:
    there = [ratio for ratio in ratios if ratio]
    return f"{common.geometric_mean(there):.2f}x" if there else ""


def plot(path: Any, results: Sequence[Result], cases: Sequence[Case], threads: Sequence[int]) -> None:
    """Bars of GOP/s (few rows from DRAM: GB/s): a panel for each number of rows and of threads; the limits dashed."""
    from matplotlib import pyplot

    shown = list(dict.fromkeys(r.contender for r in results if not r.contender.startswith("limit") and r.seconds))
    rows = list(dict.fromkeys(case.m for case in cases))
    size = (max(6.0, 3.6 * len(rows)), 3.4 * len(threads))
    figure, axes = pyplot.subplots(len(threads), len(rows), figsize=size, squeeze=False)
    for (count, m), ax in zip(itertools.product(threads, rows), axes.flat, strict=True):
        here = [case for case in cases if case.m == m]
        cold = _from_memory(here[0])
        width = 0.85 / max(1, len(shown))
        for i, contender in enumerate(shown):
            heights = []
            for case in here:
                found = common.find(results, case.label, contender, count)
                work = case.k * case.n if cold else case.operations
                heights.append(work / found.seconds / 1e9 if found and found.seconds else 0.0)
            positions = [x + (i - (len(shown) - 1) / 2) * width for x in range(len(here))]
            ax.bar(positions, heights, width, label=common.title(contender), color=common.color(contender, shown))
        if cold or m >= 16:  # with fewer rows hot, memory and the call are the limit, far below the peak
            for name in dict.fromkeys(itertools.chain(*(_limits_of(contender, cold) for contender in shown))):
                rates = [_rate(r) / 1e9 for case in here if (r := common.find(results, case.label, name, count))]
                if rates:
                    ax.axhline(statistics.median(rates), color="black", linewidth=1, linestyle="--")
                    ax.annotate(
                        name,
                        (0.01, statistics.median(rates)),
                        xycoords=("axes fraction", "data"),
                        va="bottom",
                        fontsize=7,
                    )
        ax.set_xticks(range(len(here)), [f"{case.k}x{case.n}" for case in here], fontsize=8)
        ax.set_title(f"{m} row{'s'[: m - 1]}, {common.threads_title(count)}", fontsize=9)
        ax.margins(y=0.12)
        ax.set_ylabel("GB/s of 8-bit weights" if cold else "GOP/s")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=min(5, len(shown)), fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    common.save(figure, path)


# ---- the command ----------------------------------------------------------------------------------------------------


def main() -> int:
    parser = common.options(__doc__.splitlines()[0] if __doc__ else "", rounds=25)
    parser.add_argument(
        "--m", type=common.numbers, help="rows of the activation (default: 1,16,128,1024, with --cold 1)"
    )
    shapes.add_linears(parser)
    what = parser.add_mutually_exclusive_group()
    common.add_schemes(parser)
    what.add_argument("--cold", action="store_true", help="weights rotate over 96 MiB, so that they come from DRAM")
    what.add_argument("--matmul", action="store_true", help="the bare product int8_matmul against torch._int_mm")
    arguments = parser.parse_args()

    chosen, missing = common.contenders(arguments, "linear")
    if arguments.matmul:
        chosen = [name for name in chosen if (ours := common.own(name)) and ours.scheme == "int8"] + [INT_MM]
    cases = [
        Case(m, k, n, max(1, shapes.COLD_BYTES // (k * n)) if arguments.cold else 1, arguments.matmul)
        for k, n in arguments.kn
        for m in arguments.m or ((1,) if arguments.cold else shapes.ROWS)
    ]
    found = common.header(missing, arguments.threads)
    if found:
        kinds = {_from_memory(case) for case in cases}
        bounds = set(itertools.chain(*(_limits_of(name, kind) for name in chosen for kind in kinds)))
        avx2 = any((ours := common.own(name)) and ours.isa == "avx2" for name in chosen)
        chosen += sorted(bounds | ({"limit: fp32 fma ymm"} if avx2 else set()))

    def shown(measured: list[Result], threads: int) -> list[dict[str, Any]]:
        show(new := summarize(measured, cases, threads), measured)
        return new

    results, records = common.measure_all(arguments, build, chosen, cases, shown)
    show_scaling(records)
    failed = common.failures(results)
    common.write_json(arguments.json, found=found, missing=missing, results=results, summary=records)
    if arguments.plot:
        plot(arguments.plot, results, cases, arguments.threads)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
