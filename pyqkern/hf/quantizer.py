"""What transformers calls while it loads and saves a quantized model.

Of a float folder, each linear's weight is quantized when it is read, and takes the linear's place when all are. Of a
quantized folder, a `_Slot` stands where a quantized layer will be, with the tensors that the files have for it.
transformers 4 and 5 ask for this in different ways; the parts that only one of them calls say so.
"""

import copy
import importlib.util
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from pyqkern.checkpoints import formats
from pyqkern.hf.config import PyqkernConfig, describe, state_dict
from pyqkern.models.find import Layer, as_linear, find_layers, linear_types
from pyqkern.models.replace import linears_to_replace, put, replace_embedding, replace_linear, replaced
from pyqkern.nn.embedding import QEmbedding
from pyqkern.nn.linear import QLinear
from pyqkern.schemes import Scheme, range_of


def attach(model: nn.Module) -> None:
    """Has save_pretrained of the models in `model` write what they are quantized to. See `models.replace.replaced`."""
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            untie(module)
            if getattr(module, "hf_quantizer", None) is None:
                module.hf_quantizer = PyqkernHfQuantizer(PyqkernConfig())


replaced.append(attach)

_V4 = int(transformers.__version__.split(".")[0]) < 5


class _Slot(nn.Module):
    """Where a quantized layer will be: buffers named as in the file, and the bias, all empty until they are loaded."""

    _is_hf_initialized = True

    def __init__(self, layer: QLinear, format: str, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.register_parameter("bias", bias)  # the linear's own, which another module may share
        self.layer = [layer]  # in a list, so that it is no submodule
        self.format = format
        for name, tensor in formats.stored_tensors(format, layer).items():
            if name != "bias":
                self.register_buffer(name, tensor)

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in (*self._buffers.items(), *self._parameters.items()) if value is not None}

    def missing(self) -> list[str]:
        """The names, as in the file, of what has not been loaded. transformers 5 marks what has."""

        def loaded(value: Tensor) -> bool:
            return not value.is_meta if _V4 else getattr(value, "_is_hf_initialized", False)

        return [formats.file_name(name) for name, value in self.tensors().items() if not loaded(value)]

    def fill(self, name: str) -> QLinear:
        """The layer, made of what was loaded. Raises ValueError, which names the key, where it does not fit."""
        (layer,) = self.layer
        if missing := self.missing():
            raise ValueError(f"{name}.{missing[0]} is missing from the checkpoint")
        state = formats.decode(self.format, name, layer, self.tensors())
        layer.load_state_dict(state, assign=True)
        return layer.train(self.training)


class _EmbeddingSlot(nn.Module):
    """Where a QEmbedding will be. Its table's slot is in it as `table`, unless that has another name already."""

    _is_hf_initialized = True

    def __init__(self, slot: _Slot, own: _Slot | None, padding_idx: int | None) -> None:
        super().__init__()
        self.table = own
        self.slot = [slot]
        self.padding_idx = padding_idx
        # For models that initialize the weight of an embedding that they hold.
        self.weight = torch.empty(0, device="meta", dtype=torch.float32)
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]


class _HeadSlot(nn.Module):
    """Where a linear will be that is tied to a quantized embedding: its bias, if it has one."""

    _is_hf_initialized = True

    def __init__(self, slot: _Slot, linear: nn.Linear) -> None:
        super().__init__()
        self.register_parameter("bias", linear.bias)
        self.slot = [slot]
        self.weight = torch.empty(linear.out_features, 0, device="meta")  # transformers asks for the number of rows


class _QuantizeOnLoad:
    """What transformers 5 calls with a weight that is to be quantized."""

    def __init__(self, quantizer: "PyqkernHfQuantizer") -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, missing_keys: set[str] | None = None, **_: Any
    ) -> dict[str, Any]:
        left = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            if self.quantizer.quantize_weight(model, name, value):
                if missing_keys is not None:
                    missing_keys.discard(name)
            else:
                left[name] = value
        return left


@register_quantizer("pyqkern")
class PyqkernHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers calls while it loads and saves a model."""

    requires_parameters_quantization = True
    required_packages = None
    quantization_config: PyqkernConfig
    bar: ClassVar[Any] = None  # a tqdm that counts the weights as they are quantized

    def __init__(self, quantization_config: PyqkernConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._chosen: dict[str, Layer] = {}  # weight's name -> the float linear that waits for it
        self._quantized: dict[str, QLinear] = {}  # weight's name -> what became of it
        self._asked = self._reading = False  # how far transformers 4 is

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if _V4 and importlib.util.find_spec("accelerate") is None:
            raise ImportError("transformers 4 loads quantized models with accelerate: pip install accelerate")
        if isinstance(device_map, dict):
            places = {str(place) for place in device_map.values()}
            if "disk" in places or ("cpu" in places and len(places) > 1):
                raise ValueError(
                    f"device_map must keep a quantized model on one CPU or on GPUs, got {sorted(places)}; "
                    "pyqkern's layers cannot be offloaded"
                )

    # ---- before the weights are read

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        if self.pre_quantized:
            _refuse_pickle(kwargs.get("checkpoint_files"), model.config)
            if config.layers is None:
                raise ValueError("quantization_config of the folder must name the quantized layers; it has none")
            self._put_slots(model)
        else:
            linears, reasons = linears_to_replace(model, config.scheme, config.include, config.exclude)
            chosen = [linear for linear, reason in zip(linears, reasons, strict=True) if reason is None]
            for linear in chosen:
                self._chosen |= {f"{name}.weight": linear for name in linear.names}
            if self.bar is not None:
                self.bar.reset(total=len(chosen))
        return model

    def _put_slots(self, model: Any) -> None:
        config, entries = self.quantization_config, self.quantization_config.layers or []
        slots: dict[str, _Slot] = {}
        by_name = {name: layer for layer in find_layers(model, (*linear_types(), nn.Embedding)) for name in layer.names}
        prefix = model.base_model_prefix + "."

        def find(name: str) -> Any:
            """None for what only the model with a head has, where the base model is loaded, or the other way round."""
            return next((by_name[n] for n in (name, prefix + name, name.removeprefix(prefix)) if n in by_name), None)

        for entry in entries:
            if entry["scheme"] is None:
                continue
            scheme = Scheme.from_dict(entry["scheme"])
            for name in entry["linears"]:
                layer = find(name)
                if layer is not None and isinstance(layer.module, linear_types()):
                    linear = as_linear(layer.module)
                    empty = _empty(linear, linear.bias is not None, scheme)
                    slots[name] = _Slot(empty, config.format, linear.bias)
                    put(layer, slots[name], model)
            # The embedding that a table is called after comes first.
            for name, table in sorted(entry["embeddings"].items(), key=lambda item: item[1] != f"{item[0]}.table"):
                layer = find(name)
                if layer is None or not isinstance(layer.module, nn.Embedding):
                    continue
                own = None
                if table == f"{name}.table":
                    linear = nn.Linear(layer.module.embedding_dim, layer.module.num_embeddings, device="meta")
                    linear.weight = layer.module.weight
                    own = slots[table] = _Slot(_empty(linear, False, scheme), config.format)
                put(layer, _EmbeddingSlot(slots[table], own, layer.module.padding_idx), model)
            for name, table in entry["heads"].items():
                layer = find(name)
                if layer is not None and table in slots:
                    put(layer, _HeadSlot(slots[table], layer.module), model)
        if not slots:
            raise ValueError("quantization_config must name layers of this model, but none of its names is one's")
        untie(model)
        if _V4:
            renaming = model._get_key_renaming_mapping
            model._get_key_renaming_mapping = lambda *arguments: {
                key: _renamed(name) for key, name in renaming(*arguments).items()
            }

    # ---- while they are read

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        path, _, _ = param_name.rpartition(".")
        return param_name in self._chosen or isinstance(model.get_submodule(path), _Slot)

    def quantize_weight(self, model: Any, name: str, value: Tensor) -> bool:
        """Quantizes the weight of a linear; False where it does not fit the linear, which transformers then says."""
        layer = self._chosen[name]
        module = layer.module
        if value.shape != module.weight.shape:
            del self._chosen[name]
            return False
        linear = nn.Linear(1, 1, bias=False, device="meta")
        if isinstance(module, nn.Linear):
            linear.in_features, linear.out_features = module.in_features, module.out_features
        else:
            value = value.t()
            linear.out_features, linear.in_features = value.shape
        linear.weight, linear.bias = nn.Parameter(value, requires_grad=False), module.bias
        try:
            scheme = self.quantization_config.scheme
            ranges = range_of(scheme.carried_ranges(), layer.names)
            self._quantized[name] = QLinear.from_linear(linear, scheme, ranges=ranges)
        except (TypeError, ValueError):  # left in float here: replace_linear, which follows, says what is wrong
            del self._chosen[name]
            return False
        if self.bar is not None:
            self.bar.update()
        done: Any = nn.Parameter(torch.empty(0, dtype=value.dtype), requires_grad=False)
        done._is_hf_initialized = True
        module.weight = done
        return True

    def get_quantize_ops(self) -> _QuantizeOnLoad:
        return _QuantizeOnLoad(self)

    def get_weight_conversions(self) -> list[Any]:
        from transformers.core_model_loading import WeightRenaming

        if not self.pre_quantized or self.quantization_config.format != "bitsandbytes":
            return []
        return [WeightRenaming(name, short) for name, short in formats.RENAMED.items()]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Floats are not cast to integers, where a 4-bit weight is stored as bfloat16 is."""
        new: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return new if new is not None and new.is_floating_point else None

    def create_quantized_param(self, model: Any, value: Tensor, name: str, device: Any, **kwargs: Any) -> None:
        """What transformers 4 calls, with what is to be quantized and with what goes into a slot."""
        value = value.to(device)
        if name in self._chosen:
            if self._reading and self.quantize_weight(model, name, value):
                return
            self._chosen.pop(name, None)  # not in the files: the model initializes it, and it is quantized afterwards
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        new: Any = value if last in module._buffers else nn.Parameter(value, requires_grad=value.is_floating_point())
        new._is_hf_initialized = self._reading
        setattr(module, last, new)

    def update_expected_keys(self, model: Any, expected_keys: list[str], loaded_keys: list[str]) -> list[str]:
        """transformers 4 calls this twice: before it initializes what the files lack, and before it reads the files.

        It would then cast every float to the model's dtype, scales as well.
        """
        self._reading = self._asked
        self._asked = True
        if self.pre_quantized and getattr(model.config, "_pre_quantization_dtype", None) is not None:
            self._dtype = model.config._pre_quantization_dtype
            model.config._pre_quantization_dtype = None
        return expected_keys

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        if not self.pre_quantized:
            return missing_keys
        missing = set(missing_keys)
        for layer in find_layers(model, (_Slot,)):
            for key in layer.module.tensors():
                names = [f"{name}.{key}" for name in layer.names]
                if missing.issuperset(names):
                    raise ValueError(f"{layer.names[0]}.{formats.file_name(key)} is missing from the checkpoint")
                missing.difference_update(names)
        return sorted(missing)

    # ---- after they are read

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        if self.pre_quantized:
            self._fill_slots(model)
        else:
            for layer in find_layers(model, linear_types()):
                name = next((f"{name}.weight" for name in layer.names if f"{name}.weight" in self._quantized), None)
                if name is not None:
                    module = self._quantized.pop(name).train(layer.module.training)
                    module.bias = layer.module.bias
                    put(layer, _with_accelerate_hook(layer.module, module), model)
            self._chosen.clear()
            if config.embeddings is not None:
                replace_embedding(model, config.embeddings)
            replace_linear(model, config.scheme, include=config.include, exclude=config.exclude)
        untie(model)
        config.layers = describe(model)
        return model

    def _fill_slots(self, model: Any) -> None:
        if _V4:
            del model._get_key_renaming_mapping
            dtype = model.config._pre_quantization_dtype = self._dtype
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
        filled: dict[int, QLinear] = {}
        for layer in find_layers(model, (_Slot,)):
            filled[id(layer.module)] = layer.module.fill(layer.names[0])
            put(layer, _with_accelerate_hook(layer.module, filled[id(layer.module)]), model)
        for layer in find_layers(model, (_EmbeddingSlot,)):
            (slot,), padding_idx = layer.module.slot, layer.module.padding_idx
            if id(slot) not in filled:
                filled[id(slot)] = slot.fill(f"{layer.names[0]}.table")
            put(layer, QEmbedding(filled[id(slot)], padding_idx).train(model.training), model)
        for layer in find_layers(model, (_HeadSlot,)):
            (slot,) = layer.module.slot
            filled[id(slot)].bias = layer.module.bias
            put(layer, filled[id(slot)], model)

    # ---- saving and the rest

    def get_state_dict_and_metadata(self, model: Any, *args: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        config = copy.copy(self.quantization_config)
        config.layers = describe(model)
        model.config.quantization_config = self.quantization_config = config
        return state_dict(model, config.format), {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of the quantized layers are: gradients pass through them."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Without it the Trainer refuses even to evaluate a model. Biases and norms can be trained, weights cannot."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for layer in find_layers(model, (QLinear, QEmbedding)):
            put(layer, _dequantized(layer.module), model)
        return model


def _refuse_pickle(files: list[str] | None, config: Any) -> None:
    """files: None with transformers 4, which does not say them."""
    folder = Path(getattr(config, "_name_or_path", "") or "")
    if files is None and folder.is_dir():
        files = [] if any(folder.glob("*.safetensors")) else [str(folder)]
    for file in files or []:
        if not file.endswith(".safetensors"):
            raise OSError(f"a quantized model must be in safetensors files, got {file}; pickled weights are not read")


def _dequantized(module: QLinear | QEmbedding) -> nn.Module:
    weight = nn.Parameter(module.weight)
    if isinstance(module, QEmbedding):
        return nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=module.padding_idx)
    linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta").train(module.training)
    linear.weight, linear.bias = weight, module.bias  # type: ignore[assignment]
    return linear


def _renamed(name: str) -> str:
    """The name of a slot's buffer for a key in the file."""
    for long, short in formats.RENAMED.items():
        if name.endswith(f".{long}"):
            return name.removesuffix(long) + short
    return name


def _empty(linear: nn.Linear, bias: bool, scheme: Scheme) -> QLinear:
    subclass: Any = QLinear._classes[type(scheme)]
    layer: QLinear = subclass(linear.in_features, linear.out_features, bias, scheme, "meta", linear.weight.dtype)
    return layer


def _with_accelerate_hook(old: nn.Module, new: nn.Module) -> nn.Module:
    """The hook that moves inputs to the layer's device, where a model is spread over several."""
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        hooks = importlib.import_module("accelerate.hooks")
        hooks.remove_hook_from_module(old)
        hooks.add_hook_to_module(new, hook)
    return new


def untie(model: Any) -> None:
    """Takes quantized layers off the list of weights that transformers ties: there is no Parameter to set any more."""

    def quantized(name: str) -> bool:
        path = name.rpartition(".")[0]
        try:
            return isinstance(model.get_submodule(path), QLinear | QEmbedding | _Slot | _EmbeddingSlot | _HeadSlot)
        except AttributeError:
            return False

    for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
        tied = getattr(model, attribute, None)
        if isinstance(tied, dict):
            left = {
                target: source for target, source in tied.items() if not quantized(target) or target.endswith("bias")
            }
            if len(left) < len(tied):
                setattr(model, attribute, left)
    if _V4 and find_layers(model, (QEmbedding, _EmbeddingSlot)):
        model._tie_or_clone_weights = _tie_nothing


def _tie_nothing(output_embeddings: nn.Module, input_embeddings: nn.Module) -> None:
    """In place of transformers 4's method of that name."""
