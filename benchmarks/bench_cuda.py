"""The CUDA kernels: first whether they are right, then how fast they are, beside torch's and bitsandbytes'.

    python benchmarks/bench_cuda.py [--tune] [--only int8,nf4] [--out bench_cuda.json]

Needs this repository (not installed), torch, triton and one GPU; bitsandbytes and matplotlib are used if present. Takes
less than 8 minutes. Every call is timed in a CUDA graph that runs it on one set of random data after another, more of
them than the L2 cache holds; what counts is the median of the replays, and the quartiles are kept in the JSON file.
`--tune` measures each kernel's configurations first and keeps the fastest in the file that pyqkern reads (see
kernels/tuning.py). `--dry` runs everything once, at toy sizes, in Triton's interpreter on the CPU: it checks this
script and says nothing about speed.
"""

import argparse
import functools
import importlib
import importlib.util
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import cuda_bert
import torch
from cuda_report import Report, Row, goals, plot, print_table, read, show
from torch import Tensor
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent

SHAPES = ((768, 768), (768, 2304), (768, 3072), (3072, 768), (4096, 4096), (8192, 8192))  # (K, N)
ROWS = (1, 4, 16, 64, 512, 2048, 16384)  # M
OURS = ("memory", "bert")  # tables of our own kernels; in the others a peer may refuse a shape
NAMED = (1, 64, 2048)  # where the peers' kernels are named

Call = Callable[[], object]


# ---- the kernels, without an installed package


def load(name: str, path: Path, folder: Path | None = None) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        name, path, submodule_search_locations=None if folder is None else [str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_kernels() -> SimpleNamespace:
    load("pyqkern_kernels", ROOT / "kernels" / "__init__.py", ROOT / "kernels")
    names = ("affine", "device", "int8", "four_bit", "row_quantize", "tuning")
    modules = {name: importlib.import_module(f"pyqkern_kernels.{name}") for name in names}
    # The reference is plain torch: its package is found without running the one above it, which needs the C++.
    package = ModuleType("pyqkern")
    package.__path__ = [str(ROOT / "pyqkern")]
    sys.modules.setdefault("pyqkern", package)
    return SimpleNamespace(reference=importlib.import_module("pyqkern.backends.reference"), **modules)


# ---- time


class Gpu:
    """Measures calls on the current CUDA device."""

    device, dtype = torch.device("cuda"), torch.bfloat16
    sets = 100  # of data, at most

    def __init__(self) -> None:
        self.l2 = torch.cuda.get_device_properties(self.device).L2_cache_size

    def seconds(self, calls: Sequence[Call]) -> tuple[float, tuple[float, float]]:
        """The median and quartiles of one call, from replays of a CUDA graph of all of them."""
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
            run: Call = graph.replay
        except RuntimeError:  # not everything of the peers can be captured
            torch.cuda.synchronize()
            run = functools.partial(run_all, calls)
        run()
        once = self._sample(run)
        samples = [self._sample(run) for _ in range(max(7, min(50, int(0.06 / once))))]
        low, middle, high = statistics.quantiles(samples, n=4)
        return middle / len(calls), (low / len(calls), high / len(calls))

    def _sample(self, run: Call) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def kernel_names(self, call: Call) -> str:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return ", ".join(sorted({event.name.split("(")[0][:70] for event in on_device if "Mem" not in event.name}))

    def machine(self) -> dict[str, str]:
        major, minor = torch.cuda.get_device_capability()
        return {"device": torch.cuda.get_device_name(), "capability": f"{major}.{minor}"}


class Interpreter:
    """The dry run: everything once, on the CPU; fp16, because the interpreter rounds bf16 wrongly."""

    device, dtype = torch.device("cpu"), torch.float16
    sets, l2 = 2, 1 << 14

    def seconds(self, calls: Sequence[Call]) -> tuple[float, tuple[float, float]]:
        start = time.perf_counter()
        run_all(calls)
        each = (time.perf_counter() - start) / len(calls)
        return each, (each, each)

    def kernel_names(self, call: Call) -> str:
        return ""

    def machine(self) -> dict[str, str]:
        return {"device": "Triton's interpreter, a dry run"}


def run_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


class Bench:
    """Measures contenders, collects rows."""

    def __init__(self, timer: Gpu | Interpreter, kernels: SimpleNamespace) -> None:
        self.timer, self.device, self.dtype, self.kernels = timer, timer.device, timer.dtype, kernels
        versions = {name: sys.modules[name].__version__ for name in ("torch", "triton")}
        self.report = Report({**timer.machine(), **versions, "date": time.strftime("%Y-%m-%d")})

    def row(
        self, table: str, contender: str, shape: tuple[int, ...], make: Callable[[], Call],
        *, each: int, moved: int = 0, operations: int = 0, names: bool = False,
    ) -> None:  # fmt: skip
        """Measures one contender. make() gives a call with data of its own, `each` bytes of it."""
        try:
            count = max(1, min(self.timer.sets, math.ceil(1.5 * self.timer.l2 / each)))
            calls = [make() for _ in range(count)]
            median, (low, high) = self.timer.seconds(calls)
            note = self.timer.kernel_names(calls[0]) if names else ""
            row = Row(table, contender, shape, median * 1e6, (low * 1e6, high * 1e6), moved, operations, note)
        except Exception as error:  # a peer that refuses a shape is a result too
            row = Row(
                table, contender, shape, None, note=f"{type(error).__name__}: {str(error).splitlines()[:1]}"[:200]
            )
        self.report.rows.append(row)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def codes(self, *shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, device=self.device, dtype=torch.int8)


# ---- correctness


def check(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(f"WRONG: {what}")


def correctness(bench: Bench, shapes: Sequence[tuple[int, int, int]]) -> None:
    """INT8 against the reference on the CPU, NF4 against plain torch; a gap in a result would be NaN."""
    k_, device, reference = bench.kernels, bench.device, bench.kernels.reference
    warnings.simplefilter("ignore")  # what is not deterministic does not matter here
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh tensors with NaN
    for m, k, n in shapes:
        label = f"M={m} K={k} N={n}"
        x, w = bench.normal(m, k), bench.codes(n, k)
        scale, bias = torch.rand(n, device=device) + 0.01, bench.normal(n)
        on_cpu = [t.cpu() for t in (x, w, scale, bias)]
        for symmetric in (False, True):
            got = k_.int8.int8_linear(x, k_.int8.int8_pack(w), scale, bias, "relu", symmetric)
            wanted = reference.int8_linear(*on_cpu, "relu", symmetric)
            check(torch.equal(got.cpu(), wanted), f"int8_linear {label} symmetric={symmetric}")
        check(
            torch.equal(k_.int8.int8_matmul(w, w).cpu(), reference.int8_matmul(on_cpu[1], on_cpu[1])),
            f"product {label}",
        )
        sizes = (1, m, k)
        for dtype in (torch.int8, torch.uint8):
            qparams = reference.qparams_from_range(*reference.min_max(on_cpu[0], sizes), dtype, False)
            there = [t.to(device) for t in qparams]
            q = k_.affine.quantize(x.view(sizes), *there, dtype, False).cpu()
            check(
                torch.equal(q, reference.quantize(on_cpu[0].view(sizes), sizes, *qparams, dtype, False)), f"q {label}"
            )
            y = k_.affine.dequantize(q.to(device), *there, bench.dtype).cpu()
            check(torch.equal(y, reference.dequantize(q, sizes, *qparams, bench.dtype)), f"dequantize {label}")
        for quant_type in ("nf4", "fp4"):
            weight = bench.normal(n, k)
            packed, absmax = k_.four_bit.quantize_4bit(weight, quant_type, 64)
            levels = torch.tensor(getattr(k_.four_bit, f"{quant_type.upper()}_LEVELS").value, device=device)
            codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1)[: n * k].int()
            plain = (levels[codes] * absmax.repeat_interleave(64)[: n * k]).view(n, k)
            blocks = functional.pad(weight.float().view(-1), (0, -n * k % 64)).view(-1, 64).abs().amax(1)
            check(torch.equal(absmax, blocks), f"{quant_type} absmax {label}")
            nearest = (plain - weight.float()).abs() <= 0.18 * absmax.repeat_interleave(64)[: n * k].view(n, k)
            check(bool(nearest.all()), f"{quant_type} codes {label}")  # levels are 0.34 apart at most
            again = k_.four_bit.dequantize_4bit(packed, absmax, None, None, None, quant_type, 64, (n, k), bench.dtype)
            check(torch.equal(again, plain.to(bench.dtype)), f"{quant_type} dequantize {label}")
            for rows in (1, 3, 16, 64, m):
                a = bench.normal(rows, k)
                weight = (packed, absmax, None, None, None)
                got = k_.four_bit.linear_4bit(a, *weight, bias, quant_type, 64, n, "auto").double()
                exact = a.double() @ plain.double().T + bias.double()
                magnitude = a.double().abs() @ plain.double().abs().T + bias.double().abs()
                # k + 3 roundings to fp32, weights rounded to bf16, the result too
                bound = ((k + 3) * 2.0**-24 + 2.0**-8) * magnitude + 2.0**-8 * exact.abs()
                check(bool(((got - exact).abs() <= bound).all()), f"{quant_type} linear M={rows} K={k} N={n}")
    torch.use_deterministic_algorithms(False)
    warnings.resetwarnings()
    print(f"Correct: int8_linear, int8_matmul, affine, NF4 and FP4 at {len(shapes)} shapes, ragged ones too.\n")


# ---- the machine's limits


def measure_limits(bench: Bench, size: int) -> None:
    source = torch.randn(size, size, device=bench.device)
    target = torch.empty_like(source)
    # A kernel that reads and writes: in a graph, copy_ is a copy of the driver's, at 0.65 of its speed on an H200.
    seconds, _ = bench.timer.seconds([lambda: torch.mul(source, 2, out=target)])
    bench.report.limits["copy GB/s"] = 2 * source.nbytes / seconds / 1e9
    a, b = bench.normal(size // 2, size // 2), bench.normal(size // 2, size // 2)
    seconds, _ = bench.timer.seconds([lambda: a @ b])
    bench.report.limits["bf16 TFLOP/s"] = 2 * (size // 2) ** 3 / seconds / 1e12


# ---- INT8


def int8_calls(bench: Bench, m: int, k: int, n: int) -> Iterator[tuple[str, str, Callable[[], Call], int, bool]]:
    """(table, contender, make, bytes moved, whether to name the kernels)."""
    int8, out = bench.kernels.int8, 2 * m * n

    def ours() -> Call:
        q, scale, zero = bench.kernels.row_quantize.quantize_rows(bench.normal(m, k), False)
        packed, weight_scale, bias = (
            int8.int8_pack(bench.codes(n, k)),
            torch.rand(n, device=bench.device),
            bench.normal(n),
        )
        return lambda: int8.int8_scaled_matmul(q, scale, zero, packed, weight_scale, bias, "none", bench.dtype)

    def dynamic() -> Call:
        x, packed = bench.normal(m, k), int8.int8_pack(bench.codes(n, k))
        weight_scale, bias = torch.rand(n, device=bench.device), bench.normal(n)
        return lambda: int8.int8_linear(x, packed, weight_scale, bias, "none", False)

    def bf16() -> Call:
        x, w, bias = bench.normal(m, k), bench.normal(n, k), bench.normal(n)
        return lambda: functional.linear(x, w, bias)

    def int_mm(tail: bool) -> Call:
        a, w = bench.codes(m, k), bench.codes(n, k).t()
        row, column = torch.rand(m, 1, device=bench.device), torch.rand(n, device=bench.device)
        bias = bench.normal(n).float()
        if not tail:
            return lambda: torch._int_mm(a, w)
        return lambda: (torch._int_mm(a, w) * column).mul_(row).add_(bias).to(bench.dtype)

    def fp8() -> Call:
        a, w = (bench.normal(rows, k).to(torch.float8_e4m3fn) for rows in (m, n))
        row, column = torch.rand(m, 1, device=bench.device), torch.rand(1, n, device=bench.device)
        bias = bench.normal(n)
        return lambda: torch._scaled_mm(a, w.t(), scale_a=row, scale_b=column, bias=bias, out_dtype=bench.dtype)

    one = m * k + n * k + out
    yield "int8", "pyqkern", ours, one, False
    yield "int8", "torch bf16", bf16, 2 * (m * k + n * k) + out, True
    yield "int8", "torch._int_mm", functools.partial(int_mm, False), m * k + n * k + 2 * out, True
    yield "int8", "torch._int_mm + tail", functools.partial(int_mm, True), m * k + n * k + 2 * out, False
    yield "int8", "torch._scaled_mm fp8", fp8, one, True
    yield "int8", "pyqkern, dynamic", dynamic, 2 * m * k + n * k + out, False


def bench_int8(bench: Bench, shapes: Sequence[tuple[int, int]], rows: Sequence[int]) -> None:
    for k, n in shapes:
        for m in rows:
            for table, contender, make, moved, names in int8_calls(bench, m, k, n):
                bench.row(
                    table, contender, (m, k, n), make,
                    each=n * k + m * k, moved=moved, operations=2 * m * k * n, names=names and m in NAMED,
                )  # fmt: skip


# ---- NF4


def bench_nf4(bench: Bench, shapes: Sequence[tuple[int, int]], rows: Sequence[int]) -> None:
    nf4 = bench.kernels.four_bit

    def ours(m: int, k: int, n: int, nested: bool = False) -> Call:
        x = bench.normal(m, k)
        packed, absmax = nf4.quantize_4bit(bench.normal(n, k), "nf4", 64)
        scales: tuple[Tensor | None, ...] = (absmax, None, None, None)
        if nested:
            absmax8 = torch.randint(0, 256, absmax.shape, dtype=torch.uint8, device=bench.device)
            groups = torch.rand(math.ceil(absmax.numel() / 256), device=bench.device)
            scales = (absmax8, groups, torch.linspace(-1, 1, 256, device=bench.device), absmax.mean())
        return lambda: nf4.linear_4bit(x, packed, *scales, None, "nf4", 64, n, "auto")

    def bf16(m: int, k: int, n: int) -> Call:
        x, w = bench.normal(m, k), bench.normal(n, k)
        return lambda: functional.linear(x, w)

    def bitsandbytes(m: int, k: int, n: int) -> Call:
        import bitsandbytes as bnb

        x = bench.normal(m, k)
        packed, state = bnb.functional.quantize_4bit(bench.normal(n, k), blocksize=64, quant_type="nf4")
        return lambda: bnb.matmul_4bit(x, packed.t(), quant_state=state)

    for k, n in shapes:
        small = n * k // 2 + n * k // 16
        for m in rows:
            x_and_y = 2 * m * (k + n)
            for contender, make, moved, names in (
                ("pyqkern", ours, small + x_and_y, False),
                ("pyqkern, nested", functools.partial(ours, nested=True), small - 3 * n * k // 64 + x_and_y, False),
                ("torch bf16", bf16, 2 * n * k + x_and_y, False),
                ("bitsandbytes", bitsandbytes, small + x_and_y, True),
            ):
                call = functools.partial(make, m, k, n)
                bench.row(
                    "nf4", contender, (m, k, n), call,
                    each=small + m * k, moved=moved, operations=2 * m * k * n, names=names and m in NAMED,
                )  # fmt: skip


# ---- kernels that only move memory


def bench_memory(bench: Bench, shapes: Sequence[tuple[int, int]]) -> None:
    affine, rows, nf4 = bench.kernels.affine, bench.kernels.row_quantize, bench.kernels.four_bit
    one = torch.ones(1, device=bench.device)

    for m, k in shapes:
        size = m * k
        weight, bias = torch.ones(k, device=bench.device), torch.zeros(k, device=bench.device)

        def x(m: int = m, k: int = k) -> Tensor:
            return bench.normal(m, k)

        def q(m: int = m, k: int = k) -> Tensor:
            return bench.codes(1, 1, m * k)

        def layer_norm(m: int = m, k: int = k, weight: Tensor = weight, bias: Tensor = bias) -> Call:
            return functools.partial(rows.layer_norm_quantize_rows, x(m, k), weight, bias, 1e-5, False, x(m, k))

        def dequantize_4bit(m: int = m, k: int = k) -> Call:
            packed, absmax = nf4.quantize_4bit(x(m, k), "nf4", 64)
            return functools.partial(
                nf4.dequantize_4bit, packed, absmax, None, None, None, "nf4", 64, (m, k), bench.dtype
            )

        contenders: dict[str, tuple[Callable[[], Call], float]] = {
            "quantize, per tensor": (
                lambda: functools.partial(affine.quantize, x().view(1, 1, -1), one, None, torch.int8, True),
                3,
            ),
            "dequantize, per tensor": (lambda: functools.partial(affine.dequantize, q(), one, None, bench.dtype), 3),
            "quantize rows": (lambda: functools.partial(rows.quantize_rows, x(), False), 3),
            "GELU, quantize rows": (lambda: functools.partial(rows.gelu_quantize_rows, x(), False), 3),
            "residual, LayerNorm, quantize rows": (layer_norm, 7),
            "quantize to NF4": (lambda: functools.partial(nf4.quantize_4bit, x(), "nf4", 64), 2.5625),
            "dequantize from NF4": (dequantize_4bit, 2.5625),
            "torch: GELU": (lambda: functools.partial(functional.gelu, x()), 4),
        }
        for contender, (make, width) in contenders.items():
            bench.row("memory", contender, (m, k), make, each=2 * size, moved=int(width * size))


# ---- BERT-base


def bench_bert(bench: Bench, hidden: int, heads: int, layers: int, batches: Sequence[int], length: int) -> None:
    def encoder(scheme: str) -> cuda_bert.Encoder:
        torch.manual_seed(0)
        return cuda_bert.Encoder(bench.kernels, scheme, hidden, heads, layers, bench.device, bench.dtype)

    models = {scheme: encoder(scheme) for scheme in cuda_bert.SCHEMES}
    for batch in batches:
        x = bench.normal(batch, length, hidden)
        exact = encoder("bf16").float()(x.float())
        for scheme, model in models.items():
            call = functools.partial(model, x)
            bench.row("bert", scheme, (batch, length), functools.partial(lambda call: call, call), each=1 << 40)
            error = (call().float() - exact).norm() / exact.norm()
            bench.report.errors[f"{scheme} {batch}x{length}"] = float(error)


# ---- the command


def tune(bench: Bench, shapes: Sequence[tuple[int, int]], rows: Sequence[int]) -> None:
    """Measures every configuration at every shape; prints them, and pyqkern keeps the fastest."""
    for k, n in shapes:
        for m in rows:
            for kernel, module in (("int8", bench.kernels.int8), ("nf4", bench.kernels.four_bit)):
                if kernel == "nf4" and m > 64:
                    continue
                times = module.tune(m, n, k, bench.device)
                best, *others = sorted(times.items(), key=lambda item: item[1])
                print(f"{kernel} M={m} K={k} N={n}: {best[1] * 1e3:.1f} us {best[0]}")
                for config, milliseconds in others:
                    print(f"    {milliseconds * 1e3:.1f} us {config}")
    print(f"Kept in {bench.kernels.tuning.path()}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench_cuda.json"), help="JSON file; the plot goes beside it")
    parser.add_argument("--only", default="int8,nf4,memory,bert", help="parts to measure (default: all)")
    parser.add_argument(
        "--tune", action="store_true", help="measure the kernels' configurations first, keep the fastest"
    )
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU, to check this script")
    parser.add_argument(
        "--plot-only", type=Path, metavar="JSON", help="show and plot an earlier result, measure nothing"
    )
    options = parser.parse_args(arguments)
    parts = options.only.split(",")
    if unknown := set(parts) - {"int8", "nf4", "memory", "bert"}:
        parser.error(f"--only takes int8, nf4, memory and bert, got {', '.join(sorted(unknown))}")
    if options.plot_only:
        report = read(options.plot_only)
        show(report)
        plot(report, options.plot_only.with_suffix(".png"))
        return 0
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    elif not torch.cuda.is_available():
        print(f"{parser.prog}: no CUDA device; --dry checks the script without one", file=sys.stderr)
        return 2
    start = time.monotonic()
    torch.manual_seed(0)
    timer: Gpu | Interpreter = Interpreter() if options.dry else Gpu()
    bench = Bench(timer, load_kernels())
    toy = options.dry
    shapes, rows = (((96, 64),), (1, 16, 80)) if toy else (SHAPES, ROWS)
    with torch.inference_mode():
        ragged = [(5, 70, 33), (130, 96, 64)]
        correctness(bench, ragged if toy else [*ragged, (1, 768, 768), (100, 3072, 768), (4100, 768, 2304)])
        measure_limits(bench, 64 if toy else 16384)
        if options.tune and not toy:
            tune(bench, shapes, rows)
        if "int8" in parts:
            bench_int8(bench, shapes, rows if toy else (*rows[:-1], 4096, rows[-1]))
        if "nf4" in parts:
            bench_nf4(bench, shapes, rows if toy else (*rows[:-1], 4096))
        if "memory" in parts:
            bench_memory(bench, [(32, 64)] if toy else [(16384, 768), (16384, 3072)])
        if "bert" in parts:
            bench_bert(bench, *(64, 2, 1, [1], 8) if toy else (768, 12, 12, [1, 64], 128))
    show(bench.report)
    print_table("What an H200 must show", ["", "at least", "measured", "reached"], goals(bench.report))
    options.out.write_text(json.dumps(asdict(bench.report), indent=1))
    print(f"\nJSON: {options.out}")
    plot(bench.report, options.out.with_suffix(".png"))
    print(f"{time.monotonic() - start:.0f} s")
    failed = [
        row
        for row in bench.report.rows
        if row.us is None and (row.table in OURS or row.contender.startswith("pyqkern"))
    ]
    for row in failed:
        print(f"FAILED: {row.table}, {row.contender}, {row.shape}: {row.note}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
