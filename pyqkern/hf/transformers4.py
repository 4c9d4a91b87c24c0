"""What only transformers 4 asks for; 5 calls none of it."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyqkern.hf.slots import Slot, buffer_name, is_kept_in_fp32
from pyqkern.models.find import find_layers


class Transformers4:
    """The part of the quantizer that transformers 4 calls while it loads a model."""

    pre_quantized: bool
    quantize_weight: Callable[[Any, str, Tensor], bool]
    chosen: dict[str, Any]

    _calls = 0  # how often it has asked for the expected keys: the second time it reads the files
    _dtype: torch.dtype | None = None  # of the model, while transformers is kept from casting to it

    def create_quantized_param(self, model: Any, value: Tensor, name: str, device: Any, **kwargs: Any) -> None:
        """Called with what is to be quantized, and with what goes into a slot."""
        value, reading = value.to(device), self._calls > 1
        if name in self.chosen:
            if reading and self.quantize_weight(model, name, value):
                return
            self.chosen.pop(name, None)  # not in the files: the model initializes it, and it is quantized afterwards
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        new: Any = value if last in module._buffers else nn.Parameter(value, requires_grad=value.is_floating_point())
        new._is_hf_initialized = reading
        setattr(module, last, new)

    def update_expected_keys(self, model: Any, expected_keys: list[str], loaded_keys: list[str]) -> list[str]:
        """Called before what the files lack is initialized, and again before the files are read.

        transformers would then cast every float to the model's dtype, scales as well.
        """
        self._calls += 1
        if self.pre_quantized and getattr(model.config, "_pre_quantization_dtype", None) is not None:
            self._dtype = model.config._pre_quantization_dtype
            model.config._pre_quantization_dtype = None
        return expected_keys

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Raises ValueError for what a slot lacks, before transformers makes it up."""
        if not self.pre_quantized:
            return missing_keys
        missing = set(missing_keys)
        for layer in find_layers(model, (Slot,)):
            slot = layer.module
            for key in slot.tensors():
                names = [f"{name}.{buffer_name(key)}" for name in layer.names]
                if missing.issuperset(names) and key not in slot.optional():
                    raise ValueError(f"{layer.names[0]}.{key} is missing from the checkpoint")
                missing.difference_update(names)
        return sorted(missing)

    def give_back_dtype(self, model: Any) -> None:
        """Casts what `update_expected_keys` kept from being cast; slots are no parameters."""
        dtype = model.config._pre_quantization_dtype = self._dtype
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and dtype is not None and not is_kept_in_fp32(model, name, dtype):
                parameter.data = parameter.data.to(dtype)


def rename_for_slots(model: Any) -> None:
    """Has transformers read what has a point in its name in the file into the buffer of a slot."""
    renaming = model._get_key_renaming_mapping
    slots = {name: layer.module for layer in find_layers(model, (Slot,)) for name in layer.names}

    def renamed(name: str) -> str:
        for path, slot in slots.items():
            if name.startswith(f"{path}.") and name.removeprefix(f"{path}.") in slot.keys:
                return f"{path}.{buffer_name(name.removeprefix(f'{path}.'))}"
        return name

    model._get_key_renaming_mapping = lambda *arguments: {
        key: renamed(name) for key, name in renaming(*arguments).items()
    }


def tie_nothing(output_embeddings: nn.Module, input_embeddings: nn.Module) -> None:
    """In place of transformers' `_tie_or_clone_weights`, where the head is the table of the embedding."""


def _mapping(model: Any) -> dict[str, str]:
    """The patterns by which transformers renames the keys of vision language models, on reading."""
    from transformers.modeling_utils import VLMS

    names = [kind.__name__.lower() for kind in type(model).__mro__[:-1]]
    return dict(model._checkpoint_conversion_mapping) if any(vlm in name for vlm in VLMS for name in names) else {}


def in_model(model: Any, keys: Iterable[str], expected: Mapping[str, Any]) -> dict[str, str]:
    """As `names.in_model`. transformers adds or takes off the name of the base model where all keys ask for it."""
    mapping, prefix = _mapping(model), f"{model.base_model_prefix}."
    found: dict[str, str] = {}
    for key in keys:
        name, _ = model._fix_state_dict_key_on_load(key)
        for pattern, replacement in mapping.items():
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        for one in (name, prefix + name, name.removeprefix(prefix)):
            if one in expected:
                found[key] = one
                break
    return found


def in_files(model: Any, keys: list[str]) -> dict[str, str]:
    """The names under which save_pretrained writes the model's keys."""
    reverse = {replacement: pattern for pattern, replacement in _mapping(model).items()}
    names: dict[str, str] = {}
    for key in keys:
        name = key
        for pattern, replacement in reverse.items():
            name, count = re.subn(pattern, re.sub(r"\(.*\)", "", replacement.lstrip("^")), name)
            if count:
                break
        names[key] = name
    return names
