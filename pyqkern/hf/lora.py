"""LoRA adapters of peft on quantized linears."""

import copy
import functools
import importlib
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, TaskType
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from pyqkern.hf.model import dequantize_heads
from pyqkern.hf.wrap import wrap
from pyqkern.models.find import find_layers
from pyqkern.models.replace import hand_over_hooks
from pyqkern.nn.fused_parts import InputScale
from pyqkern.nn.linear import QLinear
from pyqkern.schemes import check_type

# What peft trains as a whole, beside the adapters, by the last names of the modules.
HEADS = {
    TaskType.SEQ_CLS: {"classifier", "score"},
    TaskType.TOKEN_CLS: {"classifier", "score"},
    TaskType.QUESTION_ANS: {"qa_outputs"},
}

# Ways to start an adapter that leave the base's weight as it is; the others take from it what they give the adapter.
STARTS = (True, False, "gaussian", "eva", "orthogonal")


class LoraQLinear(Linear):  # type: ignore[misc]
    """A QLinear and its adapters: y = base(x) + scaling * B(A(x)). The base's weight is never changed.

    Merging puts a linear with the sum of the weights in the base's place, unmerging the base itself.
    """

    _before: tuple[QLinear, ...] = ()  # the base of merged adapters; in a tuple, so that it is no submodule

    def __init__(self, base_layer: nn.Module, adapter_name: str, *args: Any, requantize: bool, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, *args, **kwargs)
        self.requantize = requantize

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        quantized = self.quantized
        return quantized.qweight.device, quantized.dtype

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        self.fan_in_fan_out = False  # the weight of a QLinear is [out_features, in_features], that of a Conv1D too
        super().update_layer(*args, **kwargs)

    def resolve_lora_variant(self, **kwargs: Any) -> Any:
        found = super().resolve_lora_variant(**kwargs)
        return DoraQLinearVariant() if isinstance(found, DoraLinearVariant) else found

    @property
    def weight(self) -> Tensor:
        """The base's, dequantized, for code that reads the weight of a linear."""
        weight: Tensor = self.get_base_layer().weight
        return weight

    @property
    def quantized(self) -> QLinear:
        """The base as it was quantized, also while adapters are merged."""
        return self._before[0] if self._before else self.get_base_layer()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts a float linear in the base's place, or, with `requantize`, one of the base's scheme. All or nothing."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        base, factor = self.get_base_layer(), input_factor(self.get_base_layer())
        if hasattr(base, "_hf_hook"):
            raise ValueError("adapters of a layer that accelerate moves between devices cannot be merged; load the "
                             "model on one device")  # fmt: skip
        with torch.inference_mode(False), torch.no_grad():
            weight, bias = base.weight.clone().float() * factor, base.bias
            for name in names:
                variant = self.lora_variant.get(name)
                if variant is None:
                    weight += self.get_delta_weight(name)
                else:
                    weight = variant.merge_safe(self, name, weight)
                if self.lora_bias[name]:
                    if bias is None:
                        raise RuntimeError("lora_bias=True cannot be merged into a base layer without a bias")
                    bias = nn.Parameter(bias + self.lora_B[name].bias * self.scaling[name], bias.requires_grad)
                if safe_merge and not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
                    raise ValueError(f"merged weights must be finite, got NaN or an infinity from adapter {name!r}")
            merged = _requantized(base, weight / factor, bias) if self.requantize else _float(base, weight, bias)
        self._before, self.base_layer = (self.quantized,), merged
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Puts the base that was there before back: bit for bit, nothing is subtracted."""
        if not self.merged:
            warnings.warn("no adapter is merged, nothing is to be unmerged", stacklevel=2)
            return
        self.base_layer, self._before = self.quantized, ()
        self.merged_adapters.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoraQLinear":
        for base in self._before:
            base._apply(fn, recurse)
        return super()._apply(fn, recurse)


def input_factor(layer: nn.Module) -> Tensor | float:
    """What smoothing has x multiplied by on its way into the layer itself, but not into the adapters beside it."""
    return math.prod([hook.factor for hook in layer._forward_pre_hooks.values() if isinstance(hook, InputScale)])


def _float(base: nn.Module, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
    """An nn.Linear in the base's dtype, with its hooks; the weight has the input's factor in it."""
    dtype: Any = base.dtype if isinstance(base, QLinear) else base.weight.dtype
    linear: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta").train(base.training)
    linear.weight, linear.bias = nn.Parameter(weight.to(dtype), requires_grad=False), bias
    hand_over_hooks(base, linear)
    linear._forward_pre_hooks = OrderedDict(
        (key, hook) for key, hook in base._forward_pre_hooks.items() if not isinstance(hook, InputScale)
    )
    return linear


def _requantized(base: QLinear, weight: Tensor, bias: nn.Parameter | None) -> QLinear:
    """Another layer of the base's scheme, its ranges and its hooks."""
    layer: Any = copy.copy(base)
    layer._buffers, layer._parameters = dict(base._buffers), {"bias": bias}
    layer.weight = weight.to(base.dtype)
    return cast(QLinear, layer)


class DoraQLinearVariant(DoraLinearVariant):  # type: ignore[misc]
    """DoRA on a QLinear: the norms of the weight's rows are taken piece by piece, and no product is with a copy."""

    @staticmethod
    def init(module: LoraQLinear, adapter_name: str, **kwargs: Any) -> None:
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        layer = DoraQLinearLayer(fan_in_fan_out=False)
        norm = weight_norm(module, adapter_name)
        layer.weight = nn.Parameter(norm.to(module.lora_A[adapter_name].weight.dtype))
        module.lora_magnitude_vector[adapter_name] = layer

    @staticmethod
    def merge_safe(module: LoraQLinear, active_adapter: str, orig_weight: Tensor) -> Tensor:
        factor = module.lora_magnitude_vector[active_adapter].weight / weight_norm(module, active_adapter)
        return factor.view(-1, 1) * (orig_weight + module.get_delta_weight(active_adapter))

    @staticmethod
    def forward(module: LoraQLinear, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """result + (factor - 1) * base(x) + factor * scaling * B(A(x)), factor = magnitude / norm; the norm counts as
        a constant (section 4.3 of the paper), and base is without its bias."""
        bias, dropout = module.get_base_layer().bias, module.lora_dropout[active_adapter]
        base = result
        if module.training and not isinstance(dropout, nn.Identity):
            x = dropout(x)
            base = module.base_layer(x.to(result.dtype))
        base = base if bias is None else base - bias
        factor = module.lora_magnitude_vector[active_adapter].weight / weight_norm(module, active_adapter)
        product = module.lora_B[active_adapter](module.lora_A[active_adapter](x)) * module.scaling[active_adapter]
        return result + (factor - 1) * base + factor * product


class DoraQLinearLayer(DoraLinearLayer):  # type: ignore[misc]
    """The magnitudes of one adapter, fp32 [out_features]; under the name that peft has for them in files."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError("the magnitudes are applied by DoraQLinearVariant")


@torch.no_grad()
def weight_norm(module: LoraQLinear, adapter: str) -> Tensor:
    """The norm of each row of W + scaling * B @ A, fp32 [out_features], W that of the quantized base."""
    a, b = module.lora_A[adapter].weight.float(), module.lora_B[adapter].weight.float() * module.scaling[adapter]
    factor = input_factor(module.quantized)
    with torch.autocast(a.device.type, enabled=False):
        pieces = module.quantized.pieces()
        norms = [(piece * factor + b[begin:end] @ a).norm(dim=1) for begin, end, piece in pieces]
    return torch.cat([b.new_empty(0), *norms])


def lora(config: LoraConfig, *, requantize: bool = False) -> LoraConfig:
    """`config`, with which peft puts adapters on quantized linears; it knows only its own kinds otherwise.

    model = get_peft_model(model, pyqkern.lora(LoraConfig(target_modules=["query", "value"])))
    model = PeftModel.from_pretrained(model, folder, config=pyqkern.lora(LoraConfig.from_pretrained(folder)))

    requantize: whether merge_and_unload and merge_adapter quantize the sum of base and adapter again, in the base's
    scheme. By default they give float linears in the base's dtype, and the layers without an adapter stay quantized.

    target_modules="all-linear" finds the quantized linears too. A quantized head that is to be trained as a whole, as
    task_type="SEQ_CLS" and modules_to_save ask for, is put back into float, with a warning: of a quantized linear only
    the bias could be trained.

    Raises ValueError for what would write into the base's weight: KaSA, and init_lora_weights "pissa", "olora", "loftq"
    and the like.

    >>> import torch, pyqkern
    >>> from peft import LoraConfig, get_peft_model
    >>> model = pyqkern.replace_linear(torch.nn.Sequential(torch.nn.Linear(64, 64)))
    >>> model = get_peft_model(model, pyqkern.lora(LoraConfig(r=4, target_modules=["0"])))
    >>> type(model.base_model.model[0]).__name__
    'LoraQLinear'
    """
    check_type("config", config, LoraConfig, "a peft.LoraConfig")
    check_type("requantize", requantize, bool, "a bool")
    start = config.init_lora_weights
    if start not in STARTS:
        raise ValueError(
            f"init_lora_weights must be one of {', '.join(map(repr, STARTS))} on quantized layers, got {start!r}, "
            "which takes a part out of the base's weight; start on the float model, and quantize what is left"
        )
    if getattr(config, "kasa_config", None) is not None:
        raise ValueError("kasa_config must be None on quantized layers: KaSA truncates the base's weight; use LoRA")
    config._register_custom_module({QLinear: functools.partial(LoraQLinear, requantize=requantize)})
    wrap(importlib.import_module("peft.tuners.tuners_utils"), "_maybe_include_all_linear_layers", _include_quantized)
    return config


def _include_quantized(original: Callable[..., Any], peft_config: PeftConfig, model: nn.Module) -> PeftConfig:
    """What peft calls before it puts adapters into a model: here it looks at quantized linears too."""
    if next(model.parameters(), None) is None:
        raise ValueError(
            "model must have a parameter, which peft asks for the device, got quantized layers without biases alone; "
            "leave one layer in float with exclude="
        )
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
