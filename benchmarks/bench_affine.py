"""quantize_affine (fp32 to int8) and dequantize_affine against torch, from one element to 256 MiB of fp32.

    python benchmarks/bench_affine.py --peers --threads 1,2 --json affine.json --plot affine.png

GB/s counts what must be read and written: 5 bytes an element. The limit moves the same bytes in the same mix and does
nothing else, with ordinary or with non-temporal stores, whichever is faster at that size.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import common
import peers
import shapes
import torch
from common import Job, Result
from limits import Limits, size_name

BYTES = 5  # an element: 4 of fp32, 1 of int8
MODES: dict[str, int | None] = {"tensor": None, "channel, axis 0": 0, "channel, axis 1": 1}
LIMITS = ("limit: read", "limit: copy", "limit: copy, non-temporal")
SHARES_FROM = shapes.MIB  # bytes of fp32; below, the time is that of the call, not of the memory


@dataclass(frozen=True)
class Case:
    size: int  # elements
    inverse: bool  # dequantize
    mode: str

    @property
    def label(self) -> str:
        return f"{'dequantize' if self.inverse else 'quantize'} per {self.mode}, {size_name(4 * self.size)}"


# ---- what is timed --------------------------------------------------------------------------------------------------


def build(contender: str, case: Case, threads: int) -> Job:
    """Makes the contender's call and compares its result with the specification, element for element."""
    if contender in LIMITS:
        return _limit(contender, case, threads)
    problem = _problem(case.size, case.inverse, case.mode)
    make = peers.BY_NAME[contender.split()[0]].affine
    assert make is not None
    switch = common.use_isa(contender)
    if switch:
        switch()
    with torch.inference_mode():
        call = make(problem, threads)
        result = call()
        result = torch.as_tensor(result.int_repr() if getattr(result, "is_quantized", False) else result)
        expected = _dequantized(problem) if case.inverse else problem.q
        wrong = int((result != expected).sum())
    if wrong and contender.startswith("pyqkern"):
        raise ValueError(f"{wrong} of {result.numel()} elements differ from torch.quantize_per_*")
    return Job([call], {"differ": wrong}, switch)


@functools.lru_cache(maxsize=1)
def _problem(size: int, inverse: bool, mode: str) -> peers.Affine:
    """Random fp32 values, parameters that fit them, and the int8 values that torch's own quantization gives."""
    generator = torch.Generator().manual_seed(0)
    columns = min(size, shapes.AFFINE_COLUMNS)
    x = torch.randn(size // columns, columns, generator=generator)
    axis = MODES[mode]
    channels = 1 if axis is None else x.shape[axis]
    scale = 0.02 + 0.02 * torch.rand(channels, generator=generator)
    zero_point = torch.randint(-20, 21, (channels,), dtype=torch.int32, generator=generator)
    if axis is None:
        q = torch.quantize_per_tensor(x, float(scale), int(zero_point), torch.qint8)
    else:
        q = torch.quantize_per_channel(x, scale, zero_point, axis, torch.qint8)
    return peers.Affine(x, q.int_repr(), scale, zero_point, axis, inverse)


def _dequantized(problem: peers.Affine) -> torch.Tensor:
    along = (1, 1) if problem.axis is None else (-1, 1) if problem.axis == 0 else (1, -1)
    return problem.scale.view(along) * (problem.q.int() - problem.zero_point.view(along)).float()


def _limit(name: str, case: Case, threads: int) -> Job:
    limits, size = Limits.load(), BYTES * case.size
    if name == "limit: read":
        work = limits.read(size, threads)
    else:
        reads, writes = (1, 4) if case.inverse else (4, 1)
        work = limits.move(size, reads, writes, name.endswith("non-temporal"), threads)
    return Job([work], {"amount": work.amount})


# ---- what is shown --------------------------------------------------------------------------------------------------


def summarize(
    results: Sequence[Result], cases: Sequence[Case], shown: Sequence[str], threads: int
) -> list[dict[str, Any]]:
    """One record for each case: every contender's seconds, the first one's rate and its shares of the limits."""
    records: list[dict[str, Any]] = []
    for case in cases:
        found = {name: common.find(results, case.label, name, threads) for name in (*shown, *LIMITS)}
        times = {name: r.seconds * 1e6 for name, r in found.items() if r and r.seconds and name in shown}
        rates = {name: _rate(r, case.size) for name, r in found.items() if r}
        if (own := found[shown[0]]) is None:
            continue
        large = LIMITS[0] in rates and 4 * case.size >= SHARES_FROM
        rate = rates[shown[0]]
        records.append({
            "case": case.label, "threads": threads, "contender": shown[0], "us": times,
            "spread": own.spread, "gigabytes": rate / 1e9,
            "of_copy": rate / max(rates[name] for name in LIMITS[1:]) if large else None,
            "of_read": rate / rates[LIMITS[0]] if large else None,
        })  # fmt: skip
    return records


def show(records: Sequence[dict[str, Any]], shown: Sequence[str], threads: int) -> None:
    columns = [
        "operation, size of the fp32 tensor",
        f"{common.title(shown[0])}, us",
        "spread",
        "GB/s",
        "of copy",
        "of read",
    ]
    rows = []
    for record in records:
        own = record["us"][shown[0]]
        row = [record["case"], f"{own:.1f}", f"{record['spread']:.0%}", f"{record['gigabytes']:.1f}"]
        row += [f"{record[share]:.0%}" if record[share] else "" for share in ("of_copy", "of_read")]
        times = [record["us"].get(name) for name in shown[1:]]
        rows.append(row + [f"{time:.1f} ({time / own:.2f}x)" if time else "failed" for time in times])
    print(f"{common.threads_title(threads)}:\n\n{common.table([*columns, *map(common.title, shown[1:])], rows)}\n")


def plot(
    path: Any, results: Sequence[Result], cases: Sequence[Case], shown: Sequence[str], threads: Sequence[int]
) -> None:
    """GB/s against size: one panel for each operation, one line for each contender, the limits dashed."""
    from matplotlib import pyplot

    rows = [(count, inverse) for count in threads for inverse in (False, True)]
    size = (4.2 * len(MODES), 3.4 * len(rows))
    figure, axes = pyplot.subplots(len(rows), len(MODES), figsize=size, sharex=True, sharey=True, squeeze=False)
    for ((count, inverse), mode), ax in zip(itertools.product(rows, MODES), axes.flat, strict=True):
        here = [case for case in cases if (case.inverse, case.mode) == (inverse, mode)]
        for name in (*shown, *LIMITS):
            found = {case.size: common.find(results, case.label, name, count) for case in here}
            rates = {4 * size: _rate(result, size) / 1e9 for size, result in found.items() if result}
            if name in LIMITS:
                rates = {size: rate for size, rate in rates.items() if size >= SHARES_FROM}
            ax.plot(list(rates), list(rates.values()), label=common.title(name), **_style(name, shown))
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_title(
            f"{'dequantize' if inverse else 'quantize'} per {mode}, {common.threads_title(count)}", fontsize=10
        )
        ticks = [4 * case.size for case in here]
        ax.set_xticks(ticks, [size_name(tick) for tick in ticks], rotation=40, ha="right", fontsize=8)
        ax.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("GB/s read and written")
    axes[0, 0].legend(fontsize=8)
    common.save(figure, path)


def _style(name: str, shown: Sequence[str]) -> dict[str, Any]:
    if name in LIMITS:
        return {"color": "0.35", "linestyle": (0, (1 + 2 * LIMITS.index(name), 2)), "linewidth": 1}
    return {"color": common.color(name, shown), "marker": ".", "linewidth": 2 if name == shown[0] else 1.2}


def _rate(result: Result, size: int) -> float:
    """Bytes in a second; a limit knows how many it moved."""
    assert result.seconds
    return float(result.facts.get("amount", BYTES * size)) / result.seconds


# ---- the command ----------------------------------------------------------------------------------------------------


def main() -> int:
    parser = common.options(__doc__.splitlines()[0] if __doc__ else "", rounds=15)
    parser.add_argument(
        "--sizes",
        type=common.numbers,
        default=list(shapes.AFFINE_SIZES),
        help="elements, e.g. 1024,1048576 (default: 1 to 67108864)",
    )
    arguments = parser.parse_args()
    for size in arguments.sizes:
        if size > shapes.AFFINE_COLUMNS and size % shapes.AFFINE_COLUMNS:
            parser.error(f"a size above {shapes.AFFINE_COLUMNS} must be a multiple of it, got {size}")

    chosen, missing = common.contenders(arguments, "affine")
    cases = [
        Case(size, inverse, mode)
        for inverse in (False, True) for mode in MODES for size in arguments.sizes
    ]  # fmt: skip
    found = common.header(missing, arguments.threads)

    def shown(measured: list[Result], threads: int) -> list[dict[str, Any]]:
        show(new := summarize(measured, cases, chosen, threads), chosen, threads)
        return new

    everyone = [*chosen, *(LIMITS if found else ())]
    results, records = common.measure_all(arguments, build, everyone, cases, shown)
    failed = common.failures(results)
    common.write_json(arguments.json, found=found, missing=missing, results=results, summary=records)
    if arguments.plot:
        plot(arguments.plot, results, cases, chosen, arguments.threads)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
