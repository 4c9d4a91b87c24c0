"""Whether the files of a quantized folder fit the model that is made of its config, before they are read."""

from pathlib import Path
from typing import Any

from torch import Tensor

from pyqkern.checkpoints.files import Files
from pyqkern.hf.slots import SLOTS, Slot

# What from_pretrained sets itself, or may be told, without another model coming of it.
_NOT_THE_MODEL = ("dtype", "torch_dtype", "quantization_config", "architectures", "transformers_version")


def is_as_saved(model: Any, folder: Path) -> bool:
    """Whether the model is of the class and the config that the folder was saved with.

    Where it is another, say with more labels, what is missing or of another size is for transformers to judge, which
    knows whether ignore_mismatched_sizes was asked for.
    """
    if type(model).__name__ not in (model.config.architectures or ()):
        return False
    try:
        said = type(model.config).from_pretrained(folder).to_dict()
    except (OSError, TypeError, ValueError):
        return False
    return _of_the_model(said) == _of_the_model(model.config.to_dict())


def _of_the_model(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _of_the_model(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _NOT_THE_MODEL and not str(key).startswith("_")
    }


def check_sizes(model: Any, slots: dict[str, Slot], names: dict[str, str], files: Files) -> None:
    """ValueError, which names file and key, for a tensor of another size than the model's, and in a slot, dtype.

    slots: by the layer's name in the files. names: key in the files -> key in the model.
    """
    for layer, slot in slots.items():
        for key, tensor in slot.tensors().items():
            if f"{layer}.{key}" in files:
                _check(files, f"{layer}.{key}", tensor, exact=key != "bias")
    expected = model.state_dict()
    for key, name in names.items():
        if name in expected and not isinstance(model.get_submodule(name.rpartition(".")[0]), SLOTS):
            _check(files, key, expected[name], exact=False)


def _check(files: Files, key: str, expected: Tensor, exact: bool) -> None:
    """exact: whether the dtype must be that of `expected`; otherwise floats are cast to one another."""
    shape, dtype = files.shape(key)
    fits = dtype is expected.dtype or (not exact and dtype.is_floating_point and expected.is_floating_point())
    if not fits or shape != tuple(expected.shape):
        wanted = str(expected.dtype).removeprefix("torch.") if exact or not expected.is_floating_point() else "float"
        got = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
        where = f"{files.file_of(key)} of {files.folder}"
        raise ValueError(f"{key} must be {wanted} {list(expected.shape)}, got {got} in {where}")
