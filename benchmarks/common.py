"""What every benchmark shares: its options, the interleaved measurement, Markdown tables and the JSON file.

A benchmark names contenders and cases and gives a function `build(contender, case, threads) -> Job`. `measure` times
all contenders of a case in turn, round after round, so that a slow minute of the machine hits all of them; the median
counts. With more than one thread each contender gets a process of its own: a pool that has nothing to do spins for a
while, and would slow whatever else runs in its process. The rounds still take turns.

Memory that has been freed is used again (`_keep_freed_memory`), so that no contender pays for page faults by chance.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import io
import json
import math
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import limits
import peers
import torch
from shapes import DRY
from tqdm import tqdm

SAMPLE_SECONDS = 1e-3  # a sample repeats its call until it takes at least this long
WARM_BELOW = 20e-3  # a sample shorter than this gets an untimed one before it: the others have taken the caches
# Untimed before a sample with threads: Linux may wake both on one core, and needs a while to see it.
SPREAD_SECONDS = 40e-3
SETTLE_SECONDS = 60e-3  # between two processes: libgomp's pool spins for 8 ms after the last call, ONNX Runtime's 35

PACKAGES = (
    "pyqkern", "torch", "transformers", "onnxruntime", "openvino", "nncf", "torchao", "bitsandbytes", "xllamacpp",
    "numpy",
)  # fmt: skip


@dataclass
class Job:
    """One contender's case: `calls` are timed, one after another; `facts` go into the result as they are."""

    calls: Sequence[Callable[[], object]]
    facts: dict[str, Any] = field(default_factory=dict)
    before: Callable[[], object] | None = None  # not timed, before each sample


class Case(Protocol):
    @property
    def label(self) -> str: ...


Build = Callable[[str, Any, int], Job]
Show = Callable[["list[Result]", int], list[dict[str, Any]]]


@dataclass(frozen=True)
class Result:
    """Seconds of one call: the median of `samples` and the quartiles around it. None: it failed."""

    case: str
    contender: str
    threads: int
    seconds: float | None
    quartiles: tuple[float, float] | None
    samples: list[float]
    facts: dict[str, Any]

    @property
    def spread(self) -> float:
        """The distance between the quartiles, as a share of the median."""
        return (self.quartiles[1] - self.quartiles[0]) / self.seconds if self.quartiles and self.seconds else math.nan

    def ratio(self, other: Result) -> float:
        """How many times this one's time the other takes: the median over the rounds, in each of which both ran.

        A slow phase of the machine is longer than a round and falls out of it; of the ratio of two medians it does not.
        """
        return statistics.median(theirs / own for own, theirs in zip(self.samples, other.samples, strict=True))


# ---- measuring ------------------------------------------------------------------------------------------------------


class Runner:
    """One contender in this process."""

    def __init__(self, build: Build, contender: str, threads: int) -> None:
        self.build, self.contender, self.threads = build, contender, threads
        self.job: Job | None = None
        peers.quiet()
        gc.disable()
        gc.freeze()  # gc.collect() in prepare need not go through all that was imported, which takes 0.2 s
        _keep_freed_memory()

    def prepare(self, case: Case) -> dict[str, Any]:
        """Builds the case and finds how often a sample must repeat it; a failure is a fact, not an exception."""
        self.job = None
        gc.collect()
        torch.set_num_threads(self.threads)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                self.job = self.build(self.contender, case, self.threads)
                self.once = min(self._time(1) for _ in range(3))
        except Exception as error:  # a peer may fail in any way; the table says how
            self.job = None
            return {"failed": _reason(error)}
        self.repeat = max(1, math.ceil(SAMPLE_SECONDS / self.once))
        return self.job.facts

    def sample(self) -> float:
        """Seconds of one call."""
        assert self.job is not None
        if self.threads > 1:
            self._time(math.ceil(SPREAD_SECONDS / self.once))
        elif self.once < WARM_BELOW:
            self._time(1)
        return self._time(self.repeat) / self.repeat / len(self.job.calls)

    def _time(self, repeat: int) -> float:
        assert self.job is not None
        if self.job.before:
            self.job.before()
        calls = self.job.calls
        with torch.inference_mode():
            start = time.perf_counter()
            for _ in range(repeat):
                for call in calls:
                    call()
            return time.perf_counter() - start

    def close(self) -> None:
        self.job = None


def _keep_freed_memory() -> None:
    """Large tensors come from the heap and go back to it, as with an allocator that caches. glibc only.

    By default glibc returns large blocks to the system, or does not, depending on what else lies on the heap; a call
    then costs the page faults of its output again, for one contender and not for the next.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, (1 << 31) - 1)


class IsolatedRunner:
    """The same in a process of its own. A process that dies is a failed contender."""

    def __init__(self, build: Build, contender: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, build, contender, threads), daemon=True)
        self.process.start()
        theirs.close()

    def prepare(self, case: Case) -> dict[str, Any]:
        try:
            self.pipe.send(case)
            facts: dict[str, Any] = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            return {"failed": f"its process ended with exit code {self.process.exitcode}"}
        time.sleep(SETTLE_SECONDS)
        return facts

    def sample(self) -> float:
        self.pipe.send("sample")
        seconds: float = self.pipe.recv()
        time.sleep(SETTLE_SECONDS)
        return seconds

    def close(self) -> None:
        self.pipe.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.terminate()


def _serve(pipe: Connection, build: Build, contender: str, threads: int) -> None:
    runner = Runner(build, contender, threads)
    with contextlib.suppress(EOFError):
        while True:
            request = pipe.recv()
            pipe.send(runner.sample() if request == "sample" else runner.prepare(request))


def measure(
    build: Build, contenders: Sequence[str], cases: Sequence[Case], *, threads: int, rounds: int, isolate: bool
) -> list[Result]:
    """Times every contender at every case; `rounds` samples each, the contenders taking turns."""
    runners: dict[str, Runner | IsolatedRunner] = {
        name: (IsolatedRunner if isolate else Runner)(build, name, threads) for name in contenders
    }
    results = []
    tqdm.monitor_interval = 0
    steps = len(cases) * len(contenders) * (rounds + 1)
    bar = tqdm(total=steps, desc=threads_title(threads), leave=False, disable=None)  # None: no bar in a file
    for case in cases:
        facts: dict[str, dict[str, Any]] = {}
        times: dict[str, list[float] | None] = {}
        for name, runner in runners.items():
            bar.set_postfix_str(f"{case.label} {name}")
            facts[name] = runner.prepare(case)
            times[name] = [] if "failed" not in facts[name] else None
            bar.update(1 if times[name] is not None else rounds + 1)
        for _ in range(rounds):
            for name, seconds in times.items():
                if seconds is None:
                    continue
                try:
                    seconds.append(runners[name].sample())
                except Exception as error:  # a peer that fails half-way, or whose process is gone
                    times[name], facts[name] = None, {"failed": _reason(error)}
                bar.update()
        for name, seconds in times.items():
            results.append(result_of(case.label, name, threads, seconds, facts[name]))
    bar.close()
    for runner in runners.values():
        runner.close()
    return results


def _reason(error: Exception) -> str:
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line}"[:200]


def result_of(case: str, name: str, threads: int, seconds: list[float] | None, facts: dict[str, Any]) -> Result:
    if not seconds:
        return Result(case, name, threads, None, None, [], facts)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (seconds[0],) * 3
    return Result(case, name, threads, statistics.median(seconds), (low, high), seconds, facts)


def find(results: Iterable[Result], case: str, contender: str, threads: int) -> Result | None:
    """The result of this contender at this case; None when it did not run or failed."""
    for result in results:
        if (result.case, result.contender, result.threads) == (case, contender, threads) and result.seconds:
            return result
    return None


def geometric_mean(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values) if values else math.nan


# ---- options --------------------------------------------------------------------------------------------------------


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def numbers(text: str) -> list[int]:
    try:
        found = [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers like 1,2; got {text!r}") from None
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"numbers must be at least 1, got {min(found)}")
    return found


def add_dry(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry", action="store_true", help="tiny shapes, one round: checks that the benchmark runs")


def options(description: str, *, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--peers", nargs="?", type=names, const=["all"], default=["torch"], metavar="NAMES",
        help="compare with all installed peers, or with some of: " + ", ".join(list(peers.BY_NAME)[1:])
        + "; without this option with torch's own",
    )  # fmt: skip
    parser.add_argument("--threads", type=numbers, default=[1], help="thread counts, e.g. 1,2 (default: 1)")
    isas = "pyqkern's instruction sets, e.g. avx2,avxvnni, or all (default: the best)"
    parser.add_argument("--isa", type=names, default=[], help=isas)
    rounds = 1 if DRY else rounds
    parser.add_argument("--rounds", type=int, default=rounds, help=f"samples of each contender (default: {rounds})")
    add_dry(parser)
    parser.add_argument(
        "--isolate", action=argparse.BooleanOptionalAction, default=None,
        help="a process of its own for each contender; by default with more than one thread",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every result there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the results there (needs matplotlib)")
    return parser


def measure_all(
    arguments: argparse.Namespace, build: Build, contenders: Sequence[str], cases: Sequence[Case], show: Show
) -> tuple[list[Result], list[dict[str, Any]]]:
    """`measure` for each number of threads. show(results, threads) prints what was measured and returns its records."""
    results: list[Result] = []
    records: list[dict[str, Any]] = []
    for threads in arguments.threads:
        isolate = threads > 1 if arguments.isolate is None else bool(arguments.isolate)
        measured = measure(build, contenders, cases, threads=threads, rounds=arguments.rounds, isolate=isolate)
        results += measured
        records += show(measured, threads)
    return results, records


class Own(NamedTuple):
    """What a contender "pyqkern ISA", or "pyqkern.optimize ISA SCHEME", says."""

    name: str
    isa: str
    scheme: str = "int8"


def own(contender: str) -> Own | None:
    return Own(*contender.split()[:3]) if contender.startswith("pyqkern") else None


#: What is measured where --schemes is not given: without VNNI the others are the faster ones.
SCHEMES_OF_ISA = {"avx2": ("int8", "int8-a7", "int4")}


def add_schemes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--schemes", type=names, default=[], help="pyqkern's, e.g. int8,nf4 (default: int8; on avx2 int8,int8-a7,int4)"
    )


def contenders(arguments: argparse.Namespace, kind: str) -> tuple[list[str], dict[str, str]]:
    """Names to measure, pyqkern first (once for each ISA asked for, and each scheme where there is a choice), and the
    peers that are not installed.
    """
    groups = {"all": tuple(peers.BY_NAME), "torch": peers.TORCH}
    ourselves = ("pyqkern.optimize", "pyqkern")
    wanted = [*ourselves, *(groups.get(",".join(arguments.peers), arguments.peers))]
    unknown = sorted(set(wanted) - set(peers.BY_NAME))
    if unknown:
        raise SystemExit(f"--peers must be among {', '.join(peers.BY_NAME)}; got {', '.join(unknown)}")
    found, missing = peers.choose(wanted, kind)
    isas, ours = _isas(arguments.isa), []
    for peer in found:
        if peer.name in ourselves:
            for isa in isas:
                schemes = (arguments.schemes or SCHEMES_OF_ISA.get(isa, ("int8",))) if "schemes" in arguments else [""]
                ours += [f"{peer.name} {isa} {scheme}".strip() for scheme in schemes]
    peers.hold(isas)
    return [*ours, *(peer.name for peer in found if peer.name not in ourselves)], missing


def _isas(wanted: list[str]) -> list[str]:
    import pyqkern

    here = list(pyqkern.isas())
    if not wanted:
        return [pyqkern.isa()]
    if wanted == ["all"]:
        return here
    if unknown := sorted(set(wanted) - set(here)):
        raise SystemExit(f"--isa must be among {', '.join(here)} on this CPU; got {', '.join(unknown)}")
    return wanted


def threads_title(threads: int) -> str:
    return f"{threads} thread{'s'[: threads - 1]}"


def title(contender: str) -> str:
    """What a table calls the contender."""
    return peers.BY_NAME[contender].title if contender in peers.BY_NAME else contender


def use_isa(contender: str) -> Callable[[], object] | None:
    """For one of pyqkern's contenders: a call that switches to its ISA."""
    ours = own(contender)
    if ours is None:
        return None
    from pyqkern import _C

    return lambda: _C.set_isa(ours.isa)


# ---- what is printed and written ------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What a reader needs to know about where this ran."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    memory = 0
    with contextlib.suppress(AttributeError, ValueError, OSError):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model, "cores": os.cpu_count(), "memory_gib": round(memory / (1 << 30), 1),
        "system": platform.platform(), "python": platform.python_version(),
    }  # fmt: skip


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def command() -> str:
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def header(missing: dict[str, str], threads: Sequence[int]) -> dict[str, dict[str, float]]:
    """Prints machine, versions, what is missing and the machine's limits; returns the limits by thread count."""
    here = machine()
    print(f"{here['cpu']}, {here['cores']} cores, {here['memory_gib']} GiB, {here['system']}, Python {here['python']}")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"`{command()}`\n")
    for name, reason in missing.items():
        print(f"{name}: {reason}")
    try:
        found = {str(count): limits.overview(count) for count in threads}
    except limits.LimitsUnavailable as error:
        print(f"the machine's limits are not measured, and no share of them is given: {error}")
        return {}
    columns = ["limit of this machine", *map(threads_title, threads)]
    rows = [[name, *(f"{found[str(count)][name]:.0f}" for count in threads)] for name in found[str(threads[0])]]
    print(table(columns, rows), end="\n\n")
    return found


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned for the terminal too."""
    columns, rows = list(columns), [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([cells[0].ljust(widths[0]), *numbers])} |"

    return "\n".join(map(line, [columns, rule, *rows]))


def failures(results: Iterable[Result]) -> int:
    """Prints each contender that failed, and returns how many of them are pyqkern's own."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for result in results:
        if "failed" in result.facts:
            reasons.setdefault((title(result.contender), result.facts["failed"]), []).append(result.case)
    for (name, reason), cases in reasons.items():
        print(f"{name} failed at {', '.join(dict.fromkeys(cases))}: {reason}")
    return sum(name.startswith("pyqkern") for name, _ in reasons)


def write_json(
    path: Path | None, *, found: dict[str, Any], missing: dict[str, str], results: Sequence[Result], summary: Any
) -> None:
    """Everything that was measured, with what is needed to read it later."""
    if path is None:
        return
    record = {
        "command": command(), "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(), "versions": versions(), "limits": found, "not_installed": missing,
        "summary": summary, "results": [asdict(result) for result in results],
    }  # fmt: skip
    path.write_text(json.dumps(record) + "\n")
    print(f"written: {path}")


_OWN = ("#c1121f", "#e76f51", "#f4a261", "#f2cc8f")
_OTHERS = ("#1d3557", "#457b9d", "#8ecae6", "#2a9d8f", "#90be6d", "#6d597a", "#b5838d", "#adb5bd", "#6c757d")


def color(contender: str, shown: Sequence[str]) -> str:
    """Warm colours for pyqkern, cold ones for everybody else; the same for all plots of one run."""
    own = contender.startswith("pyqkern")
    same_kind = [name for name in shown if name.startswith("pyqkern") == own]
    palette = _OWN if own else _OTHERS
    return palette[same_kind.index(contender) % len(palette)]


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    print(f"written: {path}")
