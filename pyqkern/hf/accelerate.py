"""accelerate's load_checkpoint_in_model with a device_map, which sets tensor after tensor by name.

What a quantized layer packs for its device, the codes for example, is no buffer of the name that the file has, and
accelerate refuses it. It knows the layers of bitsandbytes by name; here it learns of QLinear.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyqkern.hf.wrap import wrap
from pyqkern.nn.linear import QLinear


def teach() -> None:
    """Has accelerate set what a QLinear packs; once."""
    wrap(importlib.import_module("accelerate.utils.modeling"), "set_module_tensor_to_device", _set_tensor)


def _set_tensor(
    original: Callable[..., Any],
    module: nn.Module,
    tensor_name: str,
    device: Any,
    value: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    path, _, name = tensor_name.rpartition(".")
    layer = module.get_submodule(path)
    if isinstance(layer, QLinear) and name in layer._packed and value is not None:
        return set_packed(layer, name, tensor_name, device, value)
    return original(module, tensor_name, device, value, *args, **kwargs)


def set_packed(layer: QLinear, name: str, tensor_name: str, device: Any, value: Tensor) -> None:
    """Packs the tensor of a file into the layer, on the device. ValueError where it does not fit."""
    if problems := layer._load_problems({name: value}, ""):
        raise ValueError(f"{tensor_name}: {problems[0]}")
    with torch.no_grad():
        layer._buffers[layer._packed[name]] = layer._pack(name, value.to(device))
