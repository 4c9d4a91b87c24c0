"""`pyqkern info`: what a bug report needs: versions, CPU, instruction sets, threads, memory and GPU."""

import argparse
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from pyqkern import _C
from pyqkern.cli.output import Output

HELP = "Versions, CPU, instruction sets, threads, memory and GPU: what a bug report needs."
JSON = True
# What pyqkern works with, or is compared with.
PACKAGES = (
    "transformers", "tokenizers", "safetensors", "accelerate", "peft", "numpy", "triton", "bitsandbytes",
    "compressed-tensors", "torchao", "onnxruntime", "openvino", "sentence-transformers", "distributed", "pyarrow",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(options: argparse.Namespace, out: Output) -> None:
    found = describe()
    out.fields(found)
    out.result(found)


def describe() -> dict[str, str]:
    """What `pyqkern info` prints, by name."""
    versions = {package: _version(package) for package in PACKAGES}
    return {
        "pyqkern": _version("pyqkern") or "not installed",
        "compiler": f"{_C.compiler} (of pyqkern's C++)",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()).strip() or "unknown",
        "torch": torch.__version__,
        **{package: version for package, version in versions.items() if version},
        "not installed": ", ".join(package for package, version in versions.items() if not version) or "-",
        "cpu": _cpu(),
        "isas": ", ".join(_C.isas()),
        "isa in use": _isa(),
        "threads": f"{_C.threads()} (torch.set_num_threads sets them), {_cpus()} of {os.cpu_count()} CPUs may be used",
        "openmp": _C.openmp() or "none: the kernels run on one thread",
        "memory": _memory(),
        "cuda": _cuda(),
    }


def _isa() -> str:
    forced = os.environ.get("PYQKERN_ISA")
    return f"{_C.isa()} (PYQKERN_ISA={forced})" if forced else f"{_C.isa()} (PYQKERN_ISA chooses another)"


def _cuda() -> str:
    if not torch.cuda.is_available():
        return f"not available; torch is built for {_built_for()}"
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    name = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    if torch.version.hip is not None:
        return f"{name}, with ROCm: plain torch instead of kernels"
    more = torch.cuda.device_count() - 1
    return (
        f"{name}, compute capability {properties.major}.{properties.minor}, CUDA {torch.version.cuda}"
        + f", and {more} more" * (more > 0)
    )


def _built_for() -> str:
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """The CPU's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cpus() -> int:
    """How many CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    """What the machine has, what is free, and what this container may take."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return "unknown"
    kib = {line.partition(":")[0]: int(line.split()[1]) for line in meminfo.read_text().splitlines()}
    said = f"{kib['MemTotal'] / 2**20:.1f} GiB, {kib.get('MemAvailable', 0) / 2**20:.1f} GiB available"
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.exists() else "max"
    return said if allowed == "max" else f"{said}, this container may take {int(allowed) / 2**30:.1f} GiB"
