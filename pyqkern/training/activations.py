"""Replacing GELU by ReLU: below zero a GELU has a short, shallow range, which takes codes and carries little."""

import re
import sys
from typing import Any

from torch import nn
from torch.nn import functional

# What a config of transformers calls its activation.
_NAMES = (
    "hidden_act", "activation_function", "hidden_activation", "activation", "feed_forward_proj", "dense_act_fn",
)  # fmt: skip


def _gelu_types() -> tuple[type[nn.Module], ...]:
    """nn.GELU, and those of transformers where it is loaded."""
    activations: Any = sys.modules.get("transformers.activations")
    found: list[type[nn.Module]] = [nn.GELU]
    for name, kind in vars(activations).items() if activations is not None else ():
        if isinstance(kind, type) and issubclass(kind, nn.Module) and "gelu" in name.lower():
            found.append(kind)
    return tuple(found)


def gelus(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Each (module, attribute) that holds a GELU: a module, or the function of an nn.TransformerEncoderLayer."""
    types = _gelu_types()
    found = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, types)
    ]
    layers = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    found += [
        (module, "activation")
        for module in model.modules()
        if isinstance(module, layers) and vars(module).get("activation") is functional.gelu
    ]
    return found


def replace_gelu(model: nn.Module) -> None:
    """Puts a ReLU where each GELU is, and says so in configs of transformers, with which a model is loaded again."""
    for parent, name in gelus(model):
        setattr(parent, name, nn.ReLU() if name in parent._modules else functional.relu)
    for config in {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }.values():
        for name in _NAMES:
            value = getattr(config, name, None)
            if isinstance(value, str) and "gelu" in value:
                setattr(config, name, re.sub(r"\w*gelu\w*", "relu", value))
