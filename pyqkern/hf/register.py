"""Makes pyqkern known to transformers, which then reads and writes quantized models with its own from_pretrained.

Importing transformers takes seconds, and most of pyqkern does without it; so where it is not imported yet, this waits
until it is. `pyqkern.hf.quantizer` does the registering when it is imported.
"""

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

_TRIGGER = "transformers.quantizers.auto"  # holds the tables of quantizers; from_pretrained needs it


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the others find the trigger, and has `pyqkern.hf.quantizer` imported after it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _import_hf()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _import_hf() -> None:
    """A version of transformers that pyqkern does not fit must still work without it."""
    try:
        importlib.import_module("pyqkern.hf.quantizer")
    except ImportError as error:
        warnings.warn(f"pyqkern cannot be used by transformers' from_pretrained: {error}", stacklevel=2)


def register() -> None:
    """Now where transformers is there, else as soon as it is."""
    if _TRIGGER in sys.modules:
        _import_hf()
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())
