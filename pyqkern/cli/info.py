"""`pyqkern info`: versions, instruction sets, threads and CUDA, as pyqkern sees them."""

import argparse
import importlib.metadata
import platform
from pathlib import Path

import torch

from pyqkern import _C

HELP = "Versions, instruction sets, threads and CUDA, as pyqkern sees them."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(options: argparse.Namespace) -> None:
    for name, value in describe().items():
        print(f"{name:14} {value}")


def describe() -> dict[str, str]:
    """What `pyqkern info` prints, by name."""
    return {
        "pyqkern": _version("pyqkern"),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "isas": ", ".join(_C.isas()),
        "isa in use": f"{_C.isa()} (PYQKERN_ISA chooses another)",
        "threads": f"{_C.threads()} (torch.set_num_threads sets them)",
        "openmp": _C.openmp() or "none: the kernels run on one thread",
        "cuda": _cuda(),
    }


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "not available"
    name = torch.cuda.get_device_name()
    return name if torch.version.hip is None else f"{name}, with ROCm: plain torch instead of kernels"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    """The CPU's name where the system tells it, and how many this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    return name
