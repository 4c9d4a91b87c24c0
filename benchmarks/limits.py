"""The machine's own limits, measured in the run that quotes them: instruction peaks and memory bandwidth.

`python benchmarks/limits.py` prints them. The benchmarks time them side by side with the contenders ("limit: ...").
limits.cpp is compiled on the spot by the system's C++ compiler (CXX, or c++); without one, `Limits.load` says so.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from shapes import DRY, MIB

#: Instruction peaks by name; GOP/s (or GFLOP/s), a multiply-add counting as two operations.
PEAKS = (
    "vpdpbusd zmm", "vpdpbusd ymm", "vpmaddwd ymm", "winograd ymm", "vpmaddubsw ymm", "vpmaddubsw ymm in twos",
    "vpmaddubsw ymm in eights", "fp32 fma zmm", "fp32 fma ymm", "bf16 dot zmm",
)  # fmt: skip

#: The peaks that bound a scheme's product on AVX2 without VNNI, by how its products may be added up; the best counts.
#: int8's products are added in twos where the weight is split, from 32 rows on, and else by Winograd's inner product.
PEAKS_OF_AVX2 = {
    "int8": ("vpmaddwd ymm", "winograd ymm", "vpmaddubsw ymm in twos"),
    "int8-a7": ("vpmaddubsw ymm in twos",),
    "nf4": ("vpmaddubsw ymm in twos",),
    "int4": ("vpmaddubsw ymm in eights",),
}
PEAKS_OF_VNNI = {"avx512vnni": ("vpdpbusd zmm",), "avxvnni": ("vpdpbusd ymm",)}
PEAKS_OF_FLOATS = {"avx512vnni": ("fp32 fma zmm",), "avxvnni": ("fp32 fma ymm",), "avx2": ("fp32 fma ymm",)}

READ_SIZES = (16 << 10,) if DRY else (16 << 10, 512 << 10, 1 * MIB, 8 * MIB, 24 * MIB, 64 * MIB, 256 * MIB)
MOVED = MIB if DRY else 320 * MIB
LINE = 64
FLAGS = ("-std=c++17", "-O2", "-march=native", "-shared", "-fPIC")


class LimitsUnavailable(RuntimeError):
    """limits.cpp could not be compiled here."""


def peaks_of(isa: str, scheme: str) -> tuple[str, ...]:
    """The peaks that bound the product of a scheme; none for an ISA without vectors."""
    if scheme == "int8-weight-only":
        return PEAKS_OF_FLOATS.get(isa, ())
    return PEAKS_OF_AVX2.get(scheme, ()) if isa == "avx2" else PEAKS_OF_VNNI.get(isa, ())


@dataclass(frozen=True)
class Work:
    """What is timed for one limit: a call does `amount` operations or moves `amount` bytes."""

    run: Callable[[], object]
    amount: int
    memory: tuple[object, ...] = ()  # what `run` has the addresses of

    def __call__(self) -> None:
        self.run()


class Limits:
    """The compiled loops. Every method returns a `Work`; `threads` of them run side by side, each on its own memory."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._peak = library.peak
        self._peak.argtypes = [ctypes.c_char_p, ctypes.c_long]
        self._read = library.read_memory
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long, ctypes.c_int, ctypes.c_int]
        self._read.restype = ctypes.c_uint64
        self._move = library.move_memory
        self._move.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_size_t, ctypes.c_long] + [ctypes.c_int] * 3

    @staticmethod
    @functools.cache
    def load() -> Limits:
        source = Path(__file__).with_name("limits.cpp")
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "limits.so"
            command = [*compiler, *FLAGS, str(source), "-o", str(library)]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                reason = getattr(error, "stderr", None) or str(error)
                raise LimitsUnavailable(f"{shlex.join(command)}: {reason.strip().splitlines()[0]}") from error
            return Limits(ctypes.CDLL(str(library)))

    def peaks(self) -> list[str]:
        """The peaks that this CPU has the instruction for."""
        return [name for name in PEAKS if self._peak(name.encode(), 1)]

    def peak(self, name: str, threads: int = 1, loops: int = 1000 if DRY else 2_000_000) -> Work:
        operations = self._peak(name.encode(), 1)
        if not operations:
            raise LimitsUnavailable(f"this CPU has no {name}")
        return _side_by_side([lambda: self._peak(name.encode(), loops)] * threads, operations * loops * threads)

    def read(self, size: int, threads: int = 1, at_least: int = 16 * MIB) -> Work:
        """Reads `size` bytes in all, again and again until `at_least` have passed; in one or in four places at once,
        with the CPU's own prefetchers or by asking ahead, whichever is fastest here.
        """
        lines = max(1, size // LINE // threads)
        repeats = max(1, at_least // (lines * LINE * threads))
        memory = [_aligned(lines * LINE) for _ in range(threads)]
        ways = []
        for ask, places in itertools.product((0, 1), (1, 4)):
            calls = [functools.partial(self._read, address, lines, repeats, ask, places) for _, address in memory]
            ways.append(_side_by_side(calls, lines * LINE * threads * repeats, memory))
        return max(ways, key=functools.partial(rate, samples=3))

    def move(self, size: int, reads: int, writes: int, non_temporal: bool, threads: int = 1) -> Work:
        """Moves `size` bytes in all, `reads` read for `writes` written. Non-temporal stores pass the caches by."""
        units = max(1, size // (reads + writes) // LINE // threads)
        moved = units * (reads + writes) * LINE * threads
        repeats = max(1, 16 * MIB // moved)
        source = [_aligned(units * reads * LINE) for _ in range(threads)]
        target = [_aligned(units * writes * LINE) for _ in range(threads)]
        calls = [
            functools.partial(self._move, to, from_, units, repeats, reads, writes, int(non_temporal))
            for (_, to), (_, from_) in zip(target, source, strict=True)
        ]
        return _side_by_side(calls, moved * repeats, source, target)


def _aligned(size: int) -> tuple[torch.Tensor, int]:
    """Memory of the kind that the contenders use (torch's), written once: zeros may be one page for all."""
    tensor = torch.empty(size + LINE, dtype=torch.uint8).fill_(1)
    return tensor, (tensor.data_ptr() + LINE - 1) // LINE * LINE


def _side_by_side(calls: Sequence[Callable[[], object]], amount: int, *memory: object) -> Work:
    if len(calls) == 1:
        return Work(calls[0], amount, memory)
    pool = ThreadPoolExecutor(len(calls))  # ctypes releases the GIL, so Python's threads do

    def run() -> None:
        for future in [pool.submit(call) for call in calls]:
            future.result()

    return Work(run, amount, memory)


def rate(work: Work, samples: int = 7) -> float:
    """The best of `samples` runs, in amount per second."""
    work()
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return work.amount / min(times)


def overview(threads: int) -> dict[str, float]:
    """Every limit by name, in GOP/s or GB/s."""
    limits = Limits.load()
    found = {f"{name}, GOP/s": rate(limits.peak(name, threads)) / 1e9 for name in limits.peaks()}
    for size in READ_SIZES:
        found[f"read {size_name(size)}, GB/s"] = rate(limits.read(size, threads)) / 1e9
    for reads, writes in ((4, 1), (1, 4)):
        for non_temporal in (False, True):
            stores = ", non-temporal" if non_temporal else ""
            name = f"{reads} bytes read, {writes} written{stores}, {size_name(MOVED)}, GB/s"
            found[name] = rate(limits.move(MOVED, reads, writes, non_temporal, threads), 5) / 1e9
    return found


def size_name(size: float) -> str:
    """Bytes as people write them: 64 B, 16 KiB, 8 MiB."""
    for unit in ("B", "KiB"):
        if size < 1024:
            return f"{size:g} {unit}"
        size /= 1024
    return f"{size:g} MiB"


if __name__ == "__main__":
    for limit, value in overview(threads=1).items():
        print(f"{limit}: {value:.0f}")
