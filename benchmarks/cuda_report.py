"""What bench_cuda.py measured: the records, the tables, the goals, the JSON file and the plot."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

INT8_PEAK = 1979e12  # operations per second of an H100 or H200 SXM, dense


@dataclass
class Row:
    """One measurement. `us` is None where the contender could not run; `note` says why, or names its kernels."""

    table: str
    contender: str
    shape: tuple[int, ...]
    us: float | None
    quartiles: tuple[float, float] | None = None
    bytes: int = 0
    operations: int = 0
    note: str = ""


@dataclass
class Report:
    """Everything that was measured; what the JSON file holds."""

    machine: dict[str, str]
    limits: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    def find(self, table: str, contender: str, shape: Sequence[int]) -> float | None:
        found = (r.us for r in self.rows if (r.table, r.contender, tuple(r.shape)) == (table, contender, tuple(shape)))
        return next(found, None)


def number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def print_table(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    widths = [max(len(str(line[i])) for line in [heads, *lines]) for i in range(len(heads))]
    print(f"\n{title}")
    for line in [heads, ["-" * width for width in widths], *lines]:
        print("| " + " | ".join(str(cell).rjust(width) for cell, width in zip(line, widths, strict=True)) + " |")


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def show(report: Report) -> None:
    print("Machine: " + ", ".join(f"{key} {value}" for key, value in report.machine.items()))
    print("Measured limits: " + ", ".join(f"{key} {value:.0f}" for key, value in report.limits.items()))
    copy = report.limits.get("copy GB/s", math.nan)
    for table, title in (("int8", "INT8 linear, bf16 out"), ("nf4", "NF4 linear, bf16")):
        rows = [row for row in report.rows if row.table == table]
        contenders = list(dict.fromkeys(row.contender for row in rows))
        lines = []
        for shape in dict.fromkeys(tuple(row.shape) for row in rows):
            ours = next(row for row in rows if row.contender == "pyqkern" and tuple(row.shape) == shape)
            times = [report.find(table, contender, shape) for contender in contenders]
            fast = ours.us or math.nan
            lines.append(
                [" x ".join(map(str, shape)), *(number(t) for t in times), number(ours.operations / fast / 1e6, 0),
                 f"{ours.operations / fast * 1e6 / INT8_PEAK:.0%}" if table == "int8" else "",
                 f"{ours.bytes / fast / 1e3 / copy:.0%}",
                 number(ratio(report.find(table, "torch bf16", shape), ours.us), 2)]
            )  # fmt: skip
        heads = [
            "M x K x N, us",
            *contenders,
            "TOPS",
            "of 1979" if table == "int8" else "",
            "of copy",
            "bf16 / pyqkern",
        ]
        if lines:
            print_table(title, heads, lines)
        kernels = {(row.contender, row.note) for row in rows if row.note}
        for contender, note in sorted(kernels):
            print(f"  {contender}: {note}")
    memory = [row for row in report.rows if row.table == "memory"]
    lines = [
        [" x ".join(map(str, row.shape)), row.contender, number(row.us), f"{row.bytes / row.us / 1e3 / copy:.0%}"]
        if row.us else [" x ".join(map(str, row.shape)), row.contender, "-", row.note]
        for row in memory
    ]  # fmt: skip
    if lines:
        print_table("Memory-bound kernels, bf16", ["M x K", "kernel", "us", "of copy"], lines)
    lines = []
    for row in (row for row in report.rows if row.table == "bert"):
        faster = ratio(report.find("bert", "bf16", row.shape), row.us)
        error = report.errors.get(f"{row.contender} {row.shape[0]}x{row.shape[1]}")
        lines.append(
            [f"{row.shape[0]}x{row.shape[1]}", row.contender, number(row.us), number(faster, 2), number(error, 4)]
        )
    if lines:
        heads = ["batch x length", "linears", "us", "against bf16", "relative error of the last hidden state"]
        print_table("BERT-base encoder, random weights, in a CUDA graph", heads, lines)


def goals(report: Report) -> list[list[str]]:
    """What an H200 must show: the row, what is wanted, the least that was found."""

    def worst(shapes: Sequence[tuple[int, ...]], found: Callable[[tuple[int, ...]], float | None]) -> float | None:
        values = [found(shape) for shape in shapes]
        return None if not values or None in values else min(v for v in values if v is not None)

    def against(table: str, peer: str, ours: str = "pyqkern") -> Callable[[tuple[int, ...]], float | None]:
        return lambda shape: ratio(report.find(table, peer, shape), report.find(table, ours, shape))

    def tops(shape: tuple[int, ...]) -> float | None:
        us = report.find("int8", "pyqkern", shape)
        return None if us is None else 2 * math.prod(shape) / us / 1e6

    def bandwidth(shape: tuple[int, ...]) -> float | None:
        row = next(
            (r for r in report.rows if (r.table, r.contender, tuple(r.shape)) == ("nf4", "pyqkern", shape)), None
        )
        return None if row is None or row.us is None else row.bytes / row.us / 1e3 / report.limits["copy GB/s"]

    square = sorted(
        {tuple(r.shape) for r in report.rows if r.table == "int8" and r.shape[0] >= 4096 <= min(r.shape[1:])}
    )
    bert = sorted(
        {tuple(r.shape) for r in report.rows if r.table == "int8" and r.shape[0] >= 2048 and min(r.shape[1:]) < 4096}
    )
    wide = sorted(
        {tuple(r.shape) for r in report.rows if r.table == "int8" and r.shape[0] == 16384 and r.shape[1] == 768}
    )
    many = sorted({tuple(r.shape) for r in report.rows if r.table == "nf4" and r.shape[0] >= 4096})
    large = [shape for shape in many if shape[1:] == (8192, 8192)]
    rows = [
        ("INT8, M, K, N >= 4096, against bf16", 1.6, worst(square, against("int8", "torch bf16"))),
        ("the same, TOPS", 1200, worst(square, tops)),
        ("INT8, BERT shapes, M >= 2048, against torch._int_mm + tail", 2.0,
         worst(bert, against("int8", "torch._int_mm + tail"))),
        ("INT8 with dynamic quantization, M=16384, K=768, against bf16", 1.25,
         worst(wide, against("int8", "torch bf16", "pyqkern, dynamic"))),
        ("NF4, batch 1, 8192^2, share of the copy bandwidth", 0.55, worst([(1, 8192, 8192)], bandwidth)),
        ("the same, against bf16", 2.0, worst([(1, 8192, 8192)], against("nf4", "torch bf16"))),
        ("the same, against bitsandbytes", 1.5, worst([(1, 8192, 8192)], against("nf4", "bitsandbytes"))),
        ("NF4, batch 16, 8192^2, against bf16", 1.8, worst([(16, 8192, 8192)], against("nf4", "torch bf16"))),
        ("NF4, batch 64, 8192^2, against bf16", 1.2, worst([(64, 8192, 8192)], against("nf4", "torch bf16"))),
        ("NF4, M >= 4096, 8192^2, against bf16", 0.9, worst(large, against("nf4", "torch bf16"))),
        ("NF4, M >= 4096, every shape, against bf16", 0.9, worst(many, against("nf4", "torch bf16"))),
    ]  # fmt: skip
    return [
        [name, f"{wanted:g}", number(found, 2), "not measured" if found is None else "yes" if found >= wanted else "NO"]
        for name, wanted, found in rows
    ]


def plot(report: Report, path: Path) -> None:
    """Speed against bf16 over M, a panel for each shape."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        again = f"python {Path(__file__).with_name('bench_cuda.py').name} --plot-only {path.with_suffix('.json')}"
        print(f"No plot: matplotlib is missing. Where it is there: {again}")
        return
    shapes = list(dict.fromkeys(tuple(row.shape[1:]) for row in report.rows if row.table in ("int8", "nf4")))
    if not shapes:
        return
    figure = Figure(figsize=(4 * len(shapes), 6), layout="constrained")
    axes = figure.subplots(2, len(shapes), sharex=True, sharey="row", squeeze=False)
    for line, table in zip(axes, ("int8", "nf4"), strict=True):
        for axis, shape in zip(line, shapes, strict=True):
            rows = [row for row in report.rows if row.table == table and tuple(row.shape[1:]) == shape]
            for contender in dict.fromkeys(row.contender for row in rows if row.contender != "torch bf16"):
                points = [
                    (r.shape[0], ratio(report.find(table, "torch bf16", r.shape), r.us))
                    for r in rows
                    if r.contender == contender
                ]
                points = [(m, speed) for m, speed in points if speed is not None]
                axis.plot(*zip(*points, strict=True) if points else ([], []), marker="o", label=contender)
            axis.axhline(1, color="grey", linewidth=1)
            axis.set(xscale="log", title=f"{table}: K={shape[0]}, N={shape[1]}", xlabel="M")
        line[0].set_ylabel("times torch bf16")
        line[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    print(f"Plot: {path}")


def read(path: Path) -> Report:
    content = json.loads(path.read_text())
    rows = [Row(**row | {"shape": tuple(row["shape"])}) for row in content.pop("rows")]
    return Report(**content, rows=rows)
