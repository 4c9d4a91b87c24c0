"""prepare_for_training, which readies a quantized model for adapters: LoRA on quantized weights, "QLoRA"."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyqkern.models.find import is_of_peft
from pyqkern.nn.embedding import QEmbedding
from pyqkern.nn.encoder import QEncoderLayer
from pyqkern.nn.linear import QLinear
from pyqkern.schemes import check_type


def prepare_for_training(
    model: nn.Module,
    *,
    gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Readies a quantized model for the adapters of peft: call it before get_peft_model. In place; returns the model.

    All parameters are frozen. Norms (modules with "Norm" in the name of their class) have fp32 parameters and compute
    in fp32, and give the dtype that they gave before. Everything else keeps its dtype, quantized layers their codes.
    gradient_checkpointing: the model's own is switched on, non-reentrant unless the kwargs say otherwise, and the
    outputs of the input embeddings ask for gradients, which a reentrant one needs; the model is one of transformers'.

    It stands for peft's prepare_model_for_kbit_training, which knows other libraries' layers by name.

    Raises TypeError for what is no module, ValueError, and nothing is changed, for a model without a quantized layer,
    one that `optimize` has fused, one that has adapters already, and one without gradient checkpointing.

    >>> import torch, pyqkern
    >>> from pyqkern.training import prepare_for_training
    >>> model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 64)).bfloat16()
    >>> model = prepare_for_training(pyqkern.replace_linear(model, "nf4"), gradient_checkpointing=False)
    >>> model[0].weight.dtype, model(torch.randn(2, 64).bfloat16()).dtype
    (torch.float32, torch.bfloat16)
    """
    _check(model, gradient_checkpointing, gradient_checkpointing_kwargs)
    model.requires_grad_(False)
    for module in model.modules():
        if "Norm" in type(module).__name__:
            _compute_in_fp32(module)
    if gradient_checkpointing:
        transformer: Any = model
        kwargs = {"use_reentrant": False} | dict(gradient_checkpointing_kwargs or {})
        transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        transformer.enable_input_require_grads()
    return model


def _check(model: nn.Module, checkpointing: bool, kwargs: Mapping[str, Any] | None) -> None:
    check_type("model", model, nn.Module, "an nn.Module")
    check_type("gradient_checkpointing", checkpointing, bool, "a bool")
    if kwargs is not None:
        check_type("gradient_checkpointing_kwargs", kwargs, Mapping, "a dict")
    modules = list(model.modules())
    if not any(isinstance(module, QLinear | QEmbedding) for module in modules):
        raise ValueError("model must have quantized layers, got none; use pyqkern.replace_linear on it first")
    if any(isinstance(module, QEncoderLayer) for module in modules):
        raise ValueError(
            "model must not be fused by pyqkern.optimize, whose encoder layers have no gradient; quantize it with "
            "pyqkern.replace_linear, train, and optimize it after merge_and_unload"
        )
    if any(is_of_peft(module) for module in modules):
        raise ValueError("model must not have adapters yet, which would be frozen; call this before get_peft_model")
    if checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"model must support gradient checkpointing as transformers' do, got {type(model).__name__}; use "
            "gradient_checkpointing=False"
        )


def _compute_in_fp32(norm: nn.Module) -> None:
    """Its own parameters become fp32, its input too, and its output is rounded to the dtype that they had."""
    halves = [p for p in norm.parameters(recurse=False) if p.dtype in (torch.bfloat16, torch.float16)]
    if not halves:
        return
    dtype = halves[0].dtype
    for parameter in halves:
        parameter.data = parameter.data.float()
    norm.register_forward_pre_hook(_widen)
    norm.register_forward_hook(_Round(dtype))


def _widen(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(one.float() if isinstance(one, Tensor) and one.is_floating_point() else one for one in arguments)


class _Round:
    """A forward hook; a class and no closure, so that the model can be pickled."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        return output.to(self.dtype) if isinstance(output, Tensor) else output
