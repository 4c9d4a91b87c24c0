"""Modules that stand where quantized layers will be while transformers reads a quantized folder.

A slot has the tensors that the files have for its layer, so that transformers fills them in; then the layer, made of
them, takes its place.
"""

import copy
import importlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyqkern.checkpoints.files import Files
from pyqkern.checkpoints.formats.base import Format
from pyqkern.checkpoints.layers import Group
from pyqkern.models.find import RECURRENT, Layer, as_linear, find_experts, find_layers, linear_types
from pyqkern.models.replace import put
from pyqkern.nn.attention import exchange
from pyqkern.nn.embedding import EMBEDDINGS
from pyqkern.nn.experts import WEIGHTS, QExperts, stacked, unsupported
from pyqkern.nn.linear import QLinear
from pyqkern.nn.recurrent import QRecurrent
from pyqkern.schemes import Scheme

Find = Callable[[str], Layer | None]
Attentions = Sequence[tuple[Any, dict[str, Any]]]  # those that were unfolded, and their states before


def buffer_name(key: str) -> str:
    """The buffer for what the file calls `key`: a buffer's name has no point."""
    return key.replace(".", "_")


class Slot(nn.Module):
    """Where a quantized layer will be: buffers called as in the file, and biases, all empty until they are loaded."""

    _is_hf_initialized = True

    def __init__(
        self,
        module: nn.Module,
        layer: Any,
        format: Format,
        biases: Mapping[str, nn.Parameter | None] | None = None,
    ) -> None:
        super().__init__()
        for name, bias in (biases or {"bias": None}).items():
            self.register_parameter(name, bias)  # the float layer's own, which another module may share
        self.float_layer, self.layer = [module], [layer]  # in lists, so that they are no submodules
        self.initialized: list[nn.Module] = []  # the float layer, where the files have one of another size
        self.format = format
        self.keys = [key for key in format.stored(layer) if key not in self._parameters]
        for key in self.keys:
            self.register_buffer(buffer_name(key), format.stored(layer)[key])

    def buffer_names(self) -> dict[str, str]:
        """What the file calls a tensor -> its buffer."""
        return {key: buffer_name(key) for key in self.keys}

    def tensors(self) -> dict[str, Tensor]:
        """By the names of the file."""
        tensors: dict[str, Any] = {key: self._buffers[name] for key, name in self.buffer_names().items()}
        tensors |= self._parameters
        return {key: tensor for key, tensor in tensors.items() if tensor is not None}

    def loaded(self) -> dict[str, Tensor]:
        """Those that were read from a file, which are marked."""
        return {
            key: tensor
            for key, tensor in self.tensors().items()
            if not tensor.is_meta and getattr(tensor, "_is_hf_initialized", False)
        }

    def take_sizes(self, name: str, files: Files) -> None:
        """Gives the buffers the shapes and dtypes that the files have, where the format allows several."""
        for key in self.keys:
            if f"{name}.{key}" in files:
                shape, dtype = files.shape(f"{name}.{key}")
                if self.format.varies(self.layer[0], key, shape, dtype):
                    self.register_buffer(buffer_name(key), torch.empty(shape, dtype=dtype, device="meta"))

    def is_new(self) -> bool:
        """Whether transformers has made room for another size than the files have, to be initialized."""
        weight = next(buffer for name, buffer in self._buffers.items() if name.startswith("weight"))
        return weight is not None and not weight.is_meta and not getattr(weight, "_is_hf_initialized", False)

    def new_layer(self) -> nn.Module:
        """The float layer of the model's own size, on the CPU, its values to be initialized."""
        layer = self.float_layer[0]
        for name, parameter in layer.named_parameters():
            values = torch.empty_like(parameter, device="cpu")
            setattr(layer, name, nn.Parameter(values, requires_grad=parameter.requires_grad))
        return layer

    def optional(self) -> tuple[str, ...]:
        """What a file may lack."""
        return self.format.optional(self.layer[0])

    def fill(self, name: str) -> Any:
        """The layer, made of what was loaded. Raises ValueError, which names the key, where it does not fit."""
        (layer,) = self.layer
        loaded = self.loaded()
        for key in self.tensors():
            if key not in loaded and key not in self.optional():
                raise ValueError(f"{name}.{key} is missing from the checkpoint")
        layer.load_state_dict(self.format.read(name, layer, loaded), assign=True)
        return layer.train(self.training)


class EmbeddingSlot(nn.Module):
    """Where a QEmbedding will be. Its table's slot is in it as `table`, unless that has another name already."""

    _is_hf_initialized = True

    def __init__(self, embedding: nn.Module, slot: Slot, own: Slot | None) -> None:
        super().__init__()
        self.table = own
        self.float_layer, self.slot = [embedding], [slot]


class HeadSlot(nn.Module):
    """Where a linear will be that is tied to a quantized embedding: its bias, if it has one."""

    _is_hf_initialized = True

    def __init__(self, slot: Slot, linear: nn.Linear) -> None:
        super().__init__()
        self.register_parameter("bias", linear.bias)
        self.float_layer, self.slot = [linear], [slot]
        self.weight = torch.empty(linear.out_features, 0, device="meta")  # transformers asks for the number of rows


class ExpertsSlot(nn.Module):
    """Where QExperts will be: its linears, in whose places slots are put."""

    _is_hf_initialized = True

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.float_layer = [experts]
        for name in WEIGHTS:
            self.add_module(name, stacked(experts._parameters[name]))

    def fill(self, name: str) -> QExperts:
        """The experts, made of the linears that have taken the places of slots. ValueError where one has not."""
        for key, linear in self._modules.items():
            if not isinstance(linear, QLinear):
                raise ValueError(
                    f"{name}.{key} must be of the model's size in the files; experts cannot be initialized"
                )
        linears: Any = self._modules
        return QExperts(linears["gate_up_proj"], linears["down_proj"], self.float_layer[0])


SLOTS = (Slot, EmbeddingSlot, HeadSlot, ExpertsSlot)


def put_experts_slots(model: Any, names: list[str], to_model: Callable[[list[str], list[str]], dict[str, str]]) -> None:
    """Puts slots in the places of the experts whose linears are among `names`, which are those in the files.

    to_model: `names.in_model` of this model, of keys in the files and the names that the model has for them.
    """
    layers = {
        f"{name}.{key}.weight": layer
        for layer in find_experts(model)
        for name in layer.names
        for key in WEIGHTS
        if unsupported(layer.module) is None
    }
    found = set(to_model([f"{name}.weight" for name in names], list(layers)).values()) if layers else set()
    for layer in {id(layers[name]): layers[name] for name in found}.values():
        put(layer, ExpertsSlot(layer.module), model)


def put_slots(model: Any, groups: list[Group], format: Format, find: Find) -> dict[str, Slot]:
    """Puts a slot in the place of each layer of the groups that the model has; returns the slots by name in the files.

    find: the layer of a name in the files, None where the model has none.
    """
    slots: dict[str, Slot] = {}
    for group in groups:
        if group.scheme is None:
            continue
        for name in group.linears:
            layer = find(name)
            if layer is not None and isinstance(layer.module, linear_types()):
                linear = as_linear(layer.module)
                empty = _empty(linear, linear.bias is not None, group.scheme, _dtype(model, layer))
                slots[name] = Slot(layer.module, empty, format, {"bias": linear.bias})
                put(layer, slots[name], model)
        for name in group.recurrent:
            layer = find(name)
            if layer is not None and isinstance(layer.module, RECURRENT):
                like = QRecurrent.like(layer.module, group.scheme, _dtype(model, layer))
                biases = {key: one for key, one in layer.module.named_parameters() if key.startswith("bias")}
                slots[name] = Slot(layer.module, like, format, biases)
                put(layer, slots[name], model)
        # The embedding that a table is called after comes first.
        for name, table in sorted(group.embeddings.items(), key=lambda item: item[1] != f"{item[0]}.table"):
            layer = find(name)
            if layer is None or type(layer.module) not in EMBEDDINGS:
                continue
            own = None
            if table == f"{name}.table":
                linear = _as_table(layer.module)
                own = slots[table] = Slot(linear, _empty(linear, False, group.scheme, _dtype(model, layer)), format)
            put(layer, EmbeddingSlot(layer.module, slots[table], own), model)
        for name, table in group.heads.items():
            layer = find(name)
            if layer is not None and table in slots:
                put(layer, HeadSlot(slots[table], layer.module), model)
    return slots


def _as_table(embedding: Any) -> nn.Linear:
    linear = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, device="meta")
    linear.weight = embedding.weight
    return linear


def _empty(linear: nn.Linear, bias: bool, scheme: Scheme, dtype: torch.dtype) -> QLinear:
    subclass: Any = QLinear._classes[type(scheme)]
    layer: QLinear = subclass(linear.in_features, linear.out_features, bias, scheme, "meta", dtype)
    return layer


def _dtype(model: Any, layer: Layer) -> torch.dtype:
    """The dtype of a layer's weight: the model's, but for what the model keeps in fp32, as T5 its `wo`."""
    dtype: torch.dtype = next(layer.module.parameters()).dtype
    return torch.float32 if is_kept_in_fp32(model, layer.names[0], dtype) else dtype


def is_kept_in_fp32(model: Any, name: str, dtype: torch.dtype | None) -> bool:
    """Whether transformers loads the parameters of a module in fp32 where the model is in `dtype`."""
    kept: set[str] = set()
    if dtype is torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    if dtype in (torch.float16, torch.bfloat16):
        kept |= set(model._keep_in_fp32_modules_strict or ())
    return any(re.search(rf"(^|\.){pattern}($|\.)", name) for pattern in kept)


def fill_slots(model: Any) -> None:
    """Puts each quantized layer, made of what was loaded, in the place of its slot. ValueError where it cannot be."""
    filled: dict[int, Any] = {}
    for layer in find_layers(model, (Slot,)):
        if layer.module.initialized:
            put(layer, layer.module.initialized[0], model)
            continue
        filled[id(layer.module)] = layer.module.fill(layer.names[0])
        put(layer, with_accelerate_hook(layer.module, filled[id(layer.module)]), model)
    for layer in find_layers(model, (ExpertsSlot,)):
        put(layer, with_accelerate_hook(layer.module, layer.module.fill(layer.names[0])), model)
    for layer in find_layers(model, (EmbeddingSlot,)):
        (slot,), (embedding,) = layer.module.slot, layer.module.float_layer
        if id(slot) not in filled:
            filled[id(slot)] = slot.fill(f"{layer.names[0]}.table")
        module = EMBEDDINGS[type(embedding)].of_table(filled[id(slot)], embedding)
        put(layer, module.train(model.training), model)
    for layer in find_layers(model, (HeadSlot,)):
        (slot,) = layer.module.slot
        filled[id(slot)].bias = layer.module.bias
        put(layer, filled[id(slot)], model)


def with_accelerate_hook(old: nn.Module, new: nn.Module) -> nn.Module:
    """The hook that moves inputs to the layer's device, where a model is spread over several."""
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        hooks = importlib.import_module("accelerate.hooks")
        hooks.remove_hook_from_module(old)
        hooks.add_hook_to_module(new, hook)
    return new


def initialize_around_slots(
    model: Any,
    present: Collection[str] | None = None,
    folder: Path | None = None,
    attentions: Attentions = (),
) -> None:
    """Keeps transformers' initialization of what the files lack away from slots and from weights already quantized.

    A module may initialize the linears that it holds by their weights and sizes. While it does, the float layers of the
    model, on the meta device and marked as initialized, are in their places again. A slot whose tensors are of another
    size in the files, which ignore_mismatched_sizes allows, becomes a float layer, which transformers initializes.

    present: what the files, which are in `folder`, have for the model. Where it is given, a parameter that they lack
    raises ValueError, which names it. attentions: those that were unfolded.
    """
    initialize = model.initialize_weights

    def initialize_weights(*args: Any, **kwargs: Any) -> None:
        del model.initialize_weights
        if present is not None:
            _check_present(model, present, folder)
        layers = [layer for layer in find_layers(model, (*SLOTS, *linear_types())) if _waits(layer.module)]
        for layer in layers:
            put(layer, _stand_in(layer.module), model)
        folded = [(attention, exchange(attention, _initialized(state))) for attention, state in attentions]
        try:
            initialize(*args, **kwargs)
        finally:
            for attention, state in folded:
                exchange(attention, state)
            for layer in layers:
                put(layer, layer.module, model)

    model.initialize_weights = initialize_weights


def _initialized(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an attention on the meta device whose parameters are marked, so that they are left alone."""
    for parameter in state["_parameters"].values():
        if parameter is not None:
            parameter._is_hf_initialized = True
    return state


def _check_present(model: Any, present: Collection[str], folder: Path | None) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not getattr(parameter, "_is_hf_initialized", False):
            names.setdefault(id(parameter), []).append(name)
    may_be_missing = [*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())]
    for missing in names.values():
        known = any(re.search(pattern, name) for pattern in may_be_missing for name in missing)
        if not known and not any(name in present for name in missing):
            raise ValueError(f"{missing[0]} must be in the files of {folder}, but is missing")


def taken(weight: nn.Parameter) -> nn.Parameter:
    """What a linear has for its weight after it was quantized: nothing, of the same dtype, and the meta tensor."""
    empty = nn.Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=False)
    empty._is_hf_initialized = True  # type: ignore[attr-defined]
    empty._float = weight  # type: ignore[attr-defined]
    return empty


def _waits(module: Any) -> bool:
    return isinstance(module, SLOTS) or hasattr(module.weight, "_float")


def _stand_in(module: Any) -> nn.Module:
    """The float layer that a slot stands for, or one like the linear whose weight was taken, with its bias."""
    if isinstance(module, Slot) and module.is_new():
        module.initialized = [module.new_layer()]
        return module.initialized[0]
    if isinstance(module, SLOTS):
        layer: Any = module.float_layer[0]
        layer._is_hf_initialized = True
    else:
        layer = copy.copy(module)
        layer._parameters = module._parameters | {"weight": module.weight._float}
    for parameter in layer.parameters() if isinstance(module, SLOTS) else [layer.weight]:
        parameter._is_hf_initialized = True
    return layer
