"""Makes pyqkern known to transformers, which then reads and writes quantized models with its own from_pretrained.

Importing transformers takes seconds, and most of pyqkern does without it; so where it is not imported yet, this waits
until it is. transformers' tables then hold stand-ins, which import `pyqkern.hf` when they are used: so nothing of it is
imported in the middle of an import of transformers, or of `pyqkern.hf` itself.
"""

import importlib.util
import inspect
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from pyqkern.checkpoints.config import check_config, check_float, quantization_of
from pyqkern.checkpoints.files import Files, files_of
from pyqkern.hf.wrap import wrap
from pyqkern.models.replace import replaced


class _Later:
    """Stands in a table of transformers for a class of pyqkern.hf, and imports it when it is called or asked."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(self._module), self._name)(*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(getattr(importlib.import_module(self._module), self._name), attribute)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the others find one module, and calls `then` with it when it has been imported."""

    def __init__(self, module: str, then: Callable[[ModuleType], None]) -> None:
        self.module, self._then = module, then

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_then(module: ModuleType) -> None:
            execute(module)
            self._then(module)

        spec.loader.exec_module = execute_and_then  # type: ignore[method-assign]
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


def _watch_reading(module: ModuleType) -> None:
    wrap(module.PretrainedConfig, "get_config_dict", _get_config_dict)


def _get_config_dict(original: Callable[..., Any], kind: type, name: Any, *args: Any, **kwargs: Any) -> Any:
    """ValueError, which names the file, for a config.json that is none, or whose quantization_config is none.

    transformers would fail with whatever its code runs into, or load the model in float.
    """
    try:
        found = original(kind, name, *args, **kwargs)
    except (AttributeError, RecursionError, TypeError) as error:
        raise ValueError(f"config.json of {name} is no config of transformers: {error}") from error
    check_config(found[0], f"config.json of {name}")
    if found[0].get("quantization_config", "") is None:
        del found[0]["quantization_config"]  # transformers 4 fails on null
    return found


def _watch_models(module: ModuleType) -> None:
    wrap(module.PreTrainedModel, "save_pretrained", _save_pretrained)
    wrap(module.PreTrainedModel, "from_pretrained", _from_pretrained)


def _from_pretrained(original: Callable[..., Any], kind: type, name: Any, *args: Any, **kwargs: Any) -> Any:
    """ValueError, which names config.json and a key, where a model in float was made of quantized layers' tensors.

    Without its quantization_config transformers would take codes for weights, or leave the layers as they were made.
    """
    is_path = isinstance(name, str | os.PathLike) and not kwargs.get("variant")
    folder = Path(name, kwargs.get("subfolder") or "") if is_path else None
    try:
        loaded = original(kind, name, *args, **kwargs)
    except RuntimeError:  # sizes that do not match, those of 4-bit codes among them
        _check_float(folder, kwargs)
        raise
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    tensors = itertools.chain(model.parameters(), model.buffers())
    if getattr(model, "hf_quantizer", None) is None and not any(t.dtype in (torch.int8, torch.uint8) for t in tensors):
        _check_float(folder, kwargs)
    return loaded


def _check_float(folder: Path | None, options: Mapping[str, Any]) -> None:
    """ValueError for a folder of a quantized model, where its config, or that given instead, does not say so."""
    if folder is None or not folder.is_dir() or options.get("quantization_config") is not None:
        return
    try:
        given = options.get("config")
        said = quantization_of(folder) if given is None else getattr(given, "quantization_config", None)
        paths = files_of(folder)
    except (OSError, ValueError):
        return  # transformers has read other files, or says what is wrong with them
    if said is None:
        with Files(folder, paths) as files:
            check_float(files)


def _save_pretrained(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """A model in float whose config is, or was made of, that of a quantized model does not say that it is quantized.

    The quantizer of a quantized one is told whether the files are to have names of their own, which transformers does
    not tell it.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None and getattr(model.config, "quantization_config", None) is not None:
        importlib.import_module("pyqkern.hf.model").say_float(model)
    elif hasattr(quantizer, "own_names"):
        asked = inspect.signature(original).bind(model, *args, **kwargs).arguments
        quantizer.own_names = not asked.get("save_original_format", True)
    return original(model, *args, **kwargs)


# Module of transformers -> what it defines last of what is needed here, and what is to be done with it.
_MODULES = {
    "transformers.configuration_utils": ("PretrainedConfig", _watch_reading),
    "transformers.quantizers.auto": ("AUTO_QUANTIZER_MAPPING", _fill_tables),  # from_pretrained needs it
    "transformers.modeling_utils": ("PreTrainedModel", _watch_models),
}


def register() -> None:
    """Now where transformers is there, else as soon as it is."""
    waiting = {finder.module for finder in sys.meta_path if isinstance(finder, _WhenImported)}
    for name, (defined, then) in _MODULES.items():
        module = sys.modules.get(name)
        if module is not None and hasattr(module, defined):
            then(module)
        elif name not in waiting:
            sys.meta_path.insert(0, _WhenImported(name, then))
