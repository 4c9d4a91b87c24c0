"""The examples in docstrings are run, and what users call has one."""

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest

import pyqkern
from pyqkern import schemes

MODULES = ["pyqkern", *(module.name for module in pkgutil.walk_packages(pyqkern.__path__, "pyqkern."))]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

FUNCTIONS = [name for name in pyqkern.__all__ if name.islower() and callable(getattr(pyqkern, name))]
FUNCTIONS = [name for name in FUNCTIONS if name not in ("isa", "isas")]  # those are C++
SCHEMES = [type(scheme).__name__ for scheme in schemes.SCHEMES.values()]


def failures(module: ModuleType) -> str:
    """What differs from the examples in a module's docstrings; "" if nothing does."""
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        runner.run(test, out=report.append)
    return "".join(report)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module(name: str) -> None:
    report = failures(importlib.import_module(name))
    assert report == "", report


@pytest.mark.parametrize("name", [*FUNCTIONS, "QLinear", *SCHEMES])
def test_what_users_call_has_an_example(name: str) -> None:
    thing = getattr(schemes if name in SCHEMES else pyqkern, name)
    assert ">>> " in (thing.__doc__ or ""), f"an example is missing from the docstring of {name}"


def test_a_wrong_example_is_reported() -> None:
    module = ModuleType("wrong", "An example.\n\n>>> 1 + 1\n2\n>>> 2 + 2\n5\n")
    assert "Failed example:\n    2 + 2\nExpected:\n    5\nGot:\n    4" in failures(module)
