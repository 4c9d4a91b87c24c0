"""What this machine has, and PYQKERN_REQUIRE.

PYQKERN_REQUIRE=avx512vnni,cuda,triton names what this machine must have: an ISA, "cuda", "aarch64" (its compiler and an
emulator), or a Python package. What is named and missing fails the run, so that a machine that should test something
cannot pass by not having it.
"""

import importlib.util
import os
import shutil

import pytest
import torch

import pyqkern

ISAS = ("avx512vnni", "avxvnni", "avx2", "scalar")
REQUIRED = [name for name in os.environ.get("PYQKERN_REQUIRE", "").split(",") if name]


def available(name: str) -> bool:
    """Whether this machine has an ISA, "cuda", "aarch64", or a package of that name."""
    if name in ISAS:
        return name in pyqkern.isas()
    if name == "cuda":
        return torch.cuda.is_available()
    if name == "aarch64":
        return all(map(shutil.which, ("aarch64-linux-gnu-g++", "qemu-aarch64")))
    return importlib.util.find_spec(name.replace("-", "_")) is not None


def require(name: str, reason: str) -> None:
    """Skips the test, saying so, where `name` is missing; fails it if PYQKERN_REQUIRE names it."""
    if available(name):
        return
    if name in REQUIRED:
        pytest.fail(f"PYQKERN_REQUIRE names {name}, which is missing: {reason}")
    pytest.skip(f"{name} is missing: {reason}")
