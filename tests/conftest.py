# ruff: noqa: E402 -- the path is put right before anything is imported
"""What all tests share: the fixture `isa`, and PYQKERN_REQUIRE (see support/require.py)."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# The folder kernels/ in the repository's root must not hide PyPI's package of that name, which transformers imports.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

# Two processes share the cores: threads that wait for work must not spin. Processes that tests start do the same.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import HealthCheck, settings
from require import REQUIRED, available

import pyqkern
from pyqkern import _C

# No deadline: the machine may be busy. The fixtures here hold for a whole module, so examples may share them.
settings.register_profile("pyqkern", deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("sanitizer", settings.get_profile("pyqkern"), max_examples=20)  # .ci/run
settings.load_profile("pyqkern")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the whole suite; this one alone where files or tests are named."""
    return 2 if config.args_source is pytest.Config.ArgsSource.TESTPATHS else 0


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
