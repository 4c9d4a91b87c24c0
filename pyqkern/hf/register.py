"""Makes pyqkern known to transformers, which then reads and writes quantized models with its own from_pretrained.

Importing transformers takes seconds, and most of pyqkern does without it; so where it is not imported yet, this waits
until it is. transformers' tables then hold stand-ins, which import `pyqkern.hf` when they are used: so nothing of it is
imported in the middle of an import of transformers, or of `pyqkern.hf` itself.
"""

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import nn

from pyqkern.models.replace import replaced

_TRIGGER = "transformers.quantizers.auto"  # holds the tables of quantizers; from_pretrained needs it


class _Later:
    """Stands in a table of transformers for a class of pyqkern.hf, and imports it when it is called or asked."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(self._module), self._name)(*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(getattr(importlib.import_module(self._module), self._name), attribute)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the others find the trigger, and fills its tables when it has been imported."""

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

        def execute_and_fill(module: ModuleType) -> None:
            execute(module)
            _fill_tables(module)

        spec.loader.exec_module = execute_and_fill  # type: ignore[method-assign]
        return spec


def _fill_tables(module: ModuleType) -> None:
    """A version of transformers that pyqkern does not fit must still work without it."""
    try:
        module.AUTO_QUANTIZATION_CONFIG_MAPPING["pyqkern"] = _Later("pyqkern.hf.config", "PyqkernConfig")
        module.AUTO_QUANTIZER_MAPPING["pyqkern"] = _Later("pyqkern.hf.quantizer", "PyqkernHfQuantizer")
    except AttributeError as error:
        warnings.warn(f"pyqkern cannot be used by transformers' from_pretrained: {error}", stacklevel=2)
    else:
        if _attach not in replaced:
            replaced.append(_attach)


def _attach(model: nn.Module) -> None:
    """So that save_pretrained writes how the model is quantized, if it is one of transformers."""
    try:
        quantizer = importlib.import_module("pyqkern.hf.quantizer")
    except ImportError as error:
        warnings.warn(f"save_pretrained cannot write what pyqkern quantized: {error}", stacklevel=2)
    else:
        quantizer.attach(model)


def register() -> None:
    """Now where transformers is there, else as soon as it is."""
    module = sys.modules.get(_TRIGGER)
    if module is not None and hasattr(module, "AUTO_QUANTIZER_MAPPING"):
        _fill_tables(module)
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())
