# ruff: noqa: E402 -- the path is put right before anything is imported
"""What all tests share: the fixture `isa`, and PYQKERN_REQUIRE.

PYQKERN_REQUIRE=avx512vnni,cuda,triton names what this machine must have: an ISA, "cuda", or a Python package. What is
named and missing fails the run, so that a machine that should test something cannot pass by not having it.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# The folder kernels/ in the repository's root must not hide PyPI's package of that name, which transformers imports.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

import pytest
import torch
from hypothesis import HealthCheck, settings

import pyqkern
from pyqkern import _C

ISAS = ("avx512vnni", "avxvnni", "avx2", "scalar")
REQUIRED = [name for name in os.environ.get("PYQKERN_REQUIRE", "").split(",") if name]

# No deadline: the machine may be busy. The fixtures here hold for a whole module, so examples may share them.
settings.register_profile("pyqkern", deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("sanitizer", settings.get_profile("pyqkern"), max_examples=20)  # .ci/run
settings.load_profile("pyqkern")


def available(name: str) -> bool:
    """Whether this machine has an ISA, "cuda", or a package of that name."""
    if name in ISAS:
        return name in pyqkern.isas()
    if name == "cuda":
        return torch.cuda.is_available()
    return importlib.util.find_spec(name.replace("-", "_")) is not None


def require(name: str, reason: str) -> None:
    """Skips the test, saying so, where `name` is missing; fails it if PYQKERN_REQUIRE names it."""
    if available(name):
        return
    if name in REQUIRED:
        pytest.fail(f"PYQKERN_REQUIRE names {name}, which is missing: {reason}")
    pytest.skip(f"{name} is missing: {reason}")


def pytest_sessionstart() -> None:
    missing = [name for name in REQUIRED if not available(name)]
    if missing:
        raise pytest.UsageError(f"PYQKERN_REQUIRE names what this machine lacks: {', '.join(missing)}")


def pytest_report_header() -> str:
    cuda = "there" if torch.cuda.is_available() else "missing"
    return f"pyqkern {pyqkern.__version__}: isas {', '.join(pyqkern.isas())}; cuda is {cuda}"


@pytest.fixture(scope="module", params=pyqkern.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every ISA that this CPU runs, in use while the test runs."""
    previous = _C.set_isa(request.param)
    yield request.param
    _C.set_isa(previous)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """torch's pool with two threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
