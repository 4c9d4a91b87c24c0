"""Which tile sizes a matrix kernel runs with: a short table, and what `tune` measured to be better.

`choose` looks in the file of tuned configurations (environment variable PYQKERN_TUNED, default
~/.cache/pyqkern/tuned.json), then in the table. Nothing is measured unless `tune` is called.
"""

import functools
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources

from . import device as devices


@dataclass(frozen=True)
class Config:
    """How a kernel cuts its problem; a program computes a tile of block_m x block_n, block_k of K at a time.

    split_k programs share one tile's K; 0 in the table stands for as many as fill the device.
    tma: the tiles come through the tensor memory accelerator (compute capability 9.0 and newer).
    persistent: that many programs per multiprocessor take tile after tile; 0 is one program per tile.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    split_k: int = 1
    tma: bool = False
    persistent: int = 0


Table = dict[int, tuple[Config, ...]]  # the largest M of a bucket -> its configurations, the first the usual one

LARGE = 1 << 62

GEMV_WARPS = 6  # a matrix-vector kernel has enough warps if each multiprocessor has as many

Problem = TypeVar("Problem")  # the tensors that a kernel is timed on

# Up to M = 16 tensor cores take M as 16 rows, and reading the weight is all that counts: K is split until every
# multiprocessor has loads in flight. From 64 rows on, wgmma wants block_m a multiple of 64.
_INT8_SMALL: Table = {
    16: (
        Config(16, 64, 128, 4, 5, split_k=0),
        Config(16, 32, 256, 4, 5, split_k=0),
        Config(16, 32, 512, 4, 3, split_k=0),
    ),
    64: (
        Config(64, 64, 128, 4, 4, split_k=0),
        Config(64, 128, 128, 4, 3, split_k=0),
        Config(64, 32, 256, 4, 3, split_k=0),
    ),
}
# Measured at M = 1 on an H200: few warps to a program, which waits at barriers less, as long as there are enough.
_FOUR_BIT_GEMV: Table = {
    m: (Config(m, 16, 256, 2, 3), Config(m, 16, 512, 4, 3), Config(m, 4, 256, 1, 3)) for m in (1, 2, 4)
}
_FOUR_BIT_DOT: Table = {
    16: (
        Config(16, 64, 64, 2, 3, split_k=0),
        Config(16, 64, 128, 4, 3, split_k=0),
        Config(16, 32, 128, 4, 3, split_k=0),
    ),
    32: (Config(32, 64, 128, 4, 3, split_k=0), Config(32, 32, 128, 4, 3, split_k=0)),
    64: (Config(64, 64, 128, 4, 3, split_k=0), Config(64, 128, 64, 4, 2, split_k=0)),
}

CONFIGS: dict[str, dict[str, Table]] = {
    "int8_matmul": {
        "80": _INT8_SMALL
        | {LARGE: (Config(128, 256, 64, 8, 4), Config(128, 128, 64, 4, 4), Config(64, 128, 64, 4, 4))},
        "89": {
            16: (Config(16, 64, 128, 4, 4, split_k=0), Config(16, 32, 256, 4, 4, split_k=0)),
            64: (Config(64, 64, 128, 4, 3, split_k=0), Config(64, 32, 128, 4, 3, split_k=0)),
            LARGE: (Config(128, 256, 64, 8, 3), Config(128, 128, 64, 4, 3), Config(64, 128, 64, 4, 3)),
        },
        "90": _INT8_SMALL
        | {
            # Triton waits for each int8 wgmma before it issues the next (it overlaps those with fp32 sums only), so two
            # programs share a multiprocessor: one multiplies while the other waits. One with larger tiles is slower.
            LARGE: (
                Config(128, 128, 128, 4, 3, tma=True, persistent=2),
                Config(64, 128, 128, 4, 4, tma=True, persistent=2),
                Config(64, 64, 128, 4, 4, tma=True, persistent=3),
            )
        },
        "100": _INT8_SMALL
        | {
            LARGE: (
                Config(128, 256, 128, 8, 3, tma=True, persistent=1),
                Config(128, 128, 128, 4, 3, tma=True, persistent=2),
                Config(64, 128, 128, 4, 4, tma=True, persistent=2),
            )
        },
    },
    "four_bit_gemv": dict.fromkeys(("80", "89", "90", "100"), _FOUR_BIT_GEMV),
    "four_bit_dot": dict.fromkeys(("80", "89", "90", "100"), _FOUR_BIT_DOT),
}


def family(capability: int) -> str:
    """The table's key: 89 stands for the devices with 99 KiB of shared memory (8.6, 8.9 and 12.x)."""
    if capability >= 120 or capability in (86, 89):
        return "89"
    return "100" if capability >= 100 else "90" if capability >= 90 else "80"


def candidates(kernel: str, capability: int, m: int) -> tuple[Config, ...]:
    """The table's configurations for M rows."""
    table = CONFIGS[kernel][family(capability)]
    return next(configs for largest, configs in table.items() if m <= largest)


def split(config: Config, processors: int, m: int, n: int, k: int) -> Config:
    """The configuration with split_k filled in: eight warps per multiprocessor, each with two steps of K or more."""
    if config.split_k:
        return config
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    programs = 8 // config.num_warps * processors
    return replace(config, split_k=max(1, min(programs // tiles, k // (2 * config.block_k), 16)))


def _cost(config: Config, processors: int, m: int, n: int) -> float:
    """A product's time in some unit: how often each multiprocessor is filled, times the work on it then.

    A tile's work is its area, and the more per area the smaller it is: operands are read from shared memory. 24 is from
    128 x 128 and 64 x 128 at 4096^3 on an H200.
    """
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    together = max(1, config.persistent)
    work = config.block_m * config.block_n * (1 + 24 / config.block_m + 24 / config.block_n)
    return triton.cdiv(tiles, together * processors) * together * work


@functools.lru_cache(4096)
def choose(kernel: str, device: torch.device, m: int, n: int, k: int) -> Config:
    """The tuned configuration for the shape, or else the one of the table that fills the device best."""
    tuned = _read().get(devices.name(device), {}).get(_key(kernel, m, n, k))
    if tuned is not None:
        return tuned
    processors = devices.processors(device)
    first, *others = candidates(kernel, devices.capability(device), m)
    if first.split_k == 0:  # fills the device by itself
        return split(first, processors, m, n, k)
    if kernel == "four_bit_gemv":
        enough = (c for c in (first, *others) if triton.cdiv(n, c.block_n) * c.num_warps >= GEMV_WARPS * processors)
        return next(enough, others[-1])
    return min((first, *others), key=lambda config: _cost(config, processors, m, n))


def tune(
    kernel: str,
    device: torch.device,
    m: int,
    n: int,
    k: int,
    problem: Callable[[], Problem],
    run: Callable[[Config, Problem], object],
    size: int,
) -> dict[Config, float]:
    """Times run(config, problem()) for each candidate, keeps the fastest in the file, returns the milliseconds of each.

    size: the bytes of a problem; the runs go round so many that none finds its own in the L2 cache. Configurations that
    do not fit the device are left out. Raises RuntimeError inside a CUDA graph capture.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tune() times kernels and cannot run inside a CUDA graph capture; call it before that")
    processors = devices.processors(device)
    problems = itertools.cycle([problem() for _ in range(max(1, min(100, devices.l2_bytes(device) * 3 // (2 * size))))])
    times: dict[Config, float] = {}
    for base in candidates(kernel, devices.capability(device), m):
        auto = split(base, processors, m, n, k)
        splits = {1, auto.split_k, 2 * auto.split_k} if base.split_k == 0 else {auto.split_k}
        for config in (replace(auto, split_k=split_k) for split_k in sorted(splits)):
            try:
                times[config] = _time(functools.partial(_run_next, run, config, problems))
            except OutOfResources:
                continue
    if times:
        _write(devices.name(device), _key(kernel, m, n, k), min(times, key=lambda config: times[config]))
        choose.cache_clear()
    return times


def _run_next(run: Callable[[Config, Problem], object], config: Config, problems: Iterator[Problem]) -> object:
    return run(config, next(problems))


def _time(run: Callable[[], object]) -> float:
    """Milliseconds of one run, the median of many in a CUDA graph."""
    return float(triton.testing.do_bench_cudagraph(run, rep=20, return_mode="median"))


def path() -> Path:
    """Where the tuned configurations are kept."""
    return Path(os.environ.get("PYQKERN_TUNED") or Path.home() / ".cache" / "pyqkern" / "tuned.json")


def _key(kernel: str, m: int, n: int, k: int) -> str:
    """M counts as the next power of two, so that one measurement serves the sizes around it."""
    return f"{kernel} m{triton.next_power_of_2(m)} n{n} k{k}"


def _read() -> dict[str, dict[str, Config]]:
    """The file, or nothing where there is none; a file that is damaged is reported and not used."""
    try:
        content = json.loads(path().read_text())
        return {name: {key: _config(value) for key, value in entries.items()} for name, entries in content.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError, OSError) as error:
        warnings.warn(
            f"{path()} is no file of tuned configurations ({error}); delete it or set PYQKERN_TUNED", stacklevel=2
        )
        return {}


def _config(value: dict[str, int]) -> Config:
    if not all(isinstance(number, int) for number in value.values()):
        raise TypeError(f"a configuration is made of integers, got {value}")
    return Config(**value)  # type: ignore[arg-type]


def _write(device_name: str, key: str, config: Config) -> None:
    """Adds one entry; the new file replaces the old one at once, so that an interruption leaves no half file."""
    entries = _read()
    entries.setdefault(device_name, {})[key] = config
    content = {name: {k: asdict(c) for k, c in sorted(configs.items())} for name, configs in sorted(entries.items())}
    path().parent.mkdir(parents=True, exist_ok=True)
    temporary = path().with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path())
