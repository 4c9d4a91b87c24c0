"""LoRA adapters of peft on quantized linears."""

import importlib
import warnings
from collections.abc import Callable
from typing import Any

from peft import LoraConfig, PeftConfig, TaskType
from peft.tuners.lora.layer import Linear
from torch import nn

from pyqkern.hf.model import dequantize_heads
from pyqkern.hf.wrap import wrap
from pyqkern.models.find import find_layers
from pyqkern.nn.linear import QLinear
from pyqkern.schemes import check_type

# What peft trains as a whole, beside the adapters, by the last names of the modules.
HEADS = {
    TaskType.SEQ_CLS: {"classifier", "score"},
    TaskType.TOKEN_CLS: {"classifier", "score"},
    TaskType.QUESTION_ANS: {"qa_outputs"},
}


class LoraQLinear(Linear):  # type: ignore[misc]
    """A QLinear and its adapters: y = base(x) + scaling * B(A(x)). The base's weight is never changed."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "adapters cannot be merged into quantized weights; keep them apart, or merge them into the float model"
        )


def lora(config: LoraConfig) -> LoraConfig:
    """`config`, with which peft puts adapters on quantized linears; it knows only its own kinds otherwise.

    model = get_peft_model(model, pyqkern.lora(LoraConfig(target_modules=["query", "value"])))
    model = PeftModel.from_pretrained(model, folder, config=pyqkern.lora(LoraConfig.from_pretrained(folder)))

    target_modules="all-linear" finds the quantized linears too. A quantized head that is to be trained as a whole, as
    task_type="SEQ_CLS" and modules_to_save ask for, is put back into float, with a warning: of a quantized linear only
    the bias could be trained.

    >>> import torch, pyqkern
    >>> from peft import LoraConfig, get_peft_model
    >>> model = pyqkern.replace_linear(torch.nn.Sequential(torch.nn.Linear(64, 64)))
    >>> model = get_peft_model(model, pyqkern.lora(LoraConfig(r=4, target_modules=["0"])))
    >>> type(model.base_model.model[0]).__name__
    'LoraQLinear'
    """
    check_type("config", config, LoraConfig, "a peft.LoraConfig")
    config._register_custom_module({QLinear: LoraQLinear})
    wrap(importlib.import_module("peft.tuners.tuners_utils"), "_maybe_include_all_linear_layers", _include_quantized)
    return config


def _include_quantized(original: Callable[..., Any], peft_config: PeftConfig, model: nn.Module) -> PeftConfig:
    """What peft calls before it puts adapters into a model: here it looks at quantized linears too."""
    _free_heads(peft_config, model)
    if str(getattr(peft_config, "target_modules", None)).lower() != "all-linear":
        return original(peft_config, model)
    found = original(peft_config, model)
    found.target_modules = set(found.target_modules) | _quantized_linears(peft_config, model)
    return found


def _free_heads(config: PeftConfig, model: nn.Module) -> None:
    """Puts quantized heads that are to be trained as a whole back into float."""
    names = HEADS.get(config.task_type, set()) | set(getattr(config, "modules_to_save", None) or ())
    if freed := dequantize_heads(model, names):
        warnings.warn(
            f"{', '.join(freed)} is to be trained as a whole and was put back into float; quantized it could only be "
            "trained in its bias. Leave it out with exclude= when you quantize the model",
            stacklevel=2,
        )


def _quantized_linears(config: PeftConfig, model: Any) -> set[str]:
    """As peft chooses float ones: all but the output head, and no part of another adapter."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name
        for layer in find_layers(model, (QLinear,))
        for name in layer.names
        if layer.module is not head and ".base_layer" not in f".{name}"
    }
