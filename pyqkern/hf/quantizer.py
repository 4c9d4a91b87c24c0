"""What transformers calls while it loads and saves a quantized model.

Of a float folder, each linear's weight is quantized when it is read, and takes the linear's place when all are. Of a
quantized folder, a slot stands where a quantized layer will be, with the tensors that the files have for it.
"""

import copy
import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from pyqkern.checkpoints.config import check_agreement
from pyqkern.checkpoints.convert import progress
from pyqkern.checkpoints.files import Files
from pyqkern.checkpoints.formats import get_format
from pyqkern.checkpoints.formats.base import Format
from pyqkern.checkpoints.layers import Group, groups_from, renamed
from pyqkern.checkpoints.save import describe, input_scales, state_dict
from pyqkern.hf.checks import check_sizes, is_as_saved
from pyqkern.hf.config import PyqkernConfig
from pyqkern.hf.model import PLACEHOLDER, dequantize, equip, give_config, models_in, retie, untie
from pyqkern.hf.names import V4, in_files, in_model
from pyqkern.hf.slots import (
    Attentions,
    Find,
    Slot,
    fill_slots,
    initialize_around_slots,
    put_experts_slots,
    put_slots,
    taken,
    with_accelerate_hook,
)
from pyqkern.hf.transformers4 import Transformers4, rename_for_slots
from pyqkern.models.find import RECURRENT, Layer, find_layers, linear_types
from pyqkern.models.plan import FUSED_KINDS, Plan
from pyqkern.models.recurrent import replace_recurrent
from pyqkern.models.replace import (
    linears_to_replace,
    named,
    planned_layers,
    put,
    replace_embedding,
    replace_linear,
)
from pyqkern.nn.attention import Projection, is_folded, unfold
from pyqkern.nn.embedding import EMBEDDINGS
from pyqkern.nn.experts import WEIGHTS, QExperts, has_experts, stacked
from pyqkern.nn.fused_parts import InputScale
from pyqkern.nn.linear import QLinear
from pyqkern.schemes import Scheme, range_of


def attach(model: nn.Module) -> None:
    """Has save_pretrained of the models in `model` write what they are quantized to. replace_linear calls it."""
    for module in models_in(model):
        if getattr(module, "hf_quantizer", None) is None:
            module.hf_quantizer = PyqkernHfQuantizer(PyqkernConfig())
        equip(module)


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
            if name in self.quantizer.chosen and self.quantizer.quantize_weight(model, name, value):
                if missing_keys is not None:
                    missing_keys.discard(name)
            else:
                left[name] = value
        return left


class PyqkernHfQuantizer(Transformers4, HfQuantizer):  # type: ignore[misc]
    """What transformers calls while it loads and saves a model."""

    requires_parameters_quantization = True
    required_packages = None
    quantization_config: PyqkernConfig

    def __init__(self, quantization_config: PyqkernConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.chosen: dict[str, Layer] = {}  # weight's name -> the float linear that waits for it
        self._experts: list[Layer] = []  # those of `chosen` that are no linears, but experts
        self._quantized: dict[str, QLinear] = {}  # weight's name -> what became of it
        self._count = 0  # how many there are to quantize
        self._schemes: dict[str, Scheme] = {}  # of each weight in `chosen`
        self._input_scales: list[tuple[str, list[float]]] = []  # linear in the model, what multiplies its input
        self._folder: Path | None = None  # of the files, for messages
        self.own_names = False  # whether files being saved have the model's names, as save_original_format=False asks

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if V4 and importlib.util.find_spec("accelerate") is None:
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
        if not self.pre_quantized:
            self._choose(model)
            initialize_around_slots(model)
            return model
        if self.quantization_config.layers is None:
            raise ValueError("quantization_config of the folder must name the quantized layers; it has none")
        groups, format = groups_from(self.quantization_config.layers), get_format(self.quantization_config.format)
        paths = _checkpoint_files(kwargs.get("checkpoint_files"), model.config)
        attentions = _unfold_attentions(model, [name for group in groups for name in group.names()])
        if not paths:
            self._put_slots(model, groups, format)
            initialize_around_slots(model, attentions=attentions)
            return model
        self._folder = paths[0].parent
        with Files(self._folder, paths) as files:
            check_agreement(groups, format, files)
            as_saved = is_as_saved(model, self._folder)
            names = in_model(model, list(files)) if as_saved else {}
            slots = self._put_slots(model, groups, format)
            for name, slot in slots.items():
                slot.take_sizes(name, files)
            check_sizes(model, slots if as_saved else {}, names, files)
        initialize_around_slots(model, set(names.values()) if as_saved else None, self._folder, attentions)
        return model

    def _choose(self, model: Any) -> None:
        """Which linears are to be quantized as their weights are read."""
        config = self.quantization_config
        if config.plan is None:
            linears, reasons = linears_to_replace(model, config.scheme, config.include, config.exclude)
            chosen = [linear for linear, reason in zip(linears, reasons, strict=True) if reason is None]
            schemes = [config.scheme] * len(chosen)
        else:
            chosen, schemes = _planned(model, config.plan)
        of_layer = {id(layer.module): scheme for layer, scheme in zip(chosen, schemes, strict=True)}
        # The files have no weights of projections: attentions are quantized when all has been read.
        chosen = [linear for linear in chosen if not isinstance(linear.module, Projection)]
        self._experts = [layer for layer in chosen if has_experts(layer.module)]
        for layer in chosen:
            keys = WEIGHTS if has_experts(layer.module) else ("weight",)
            self.chosen |= {f"{name}.{key}": layer for name in layer.names for key in keys}
            self._schemes |= {f"{name}.{key}": of_layer[id(layer.module)] for name in layer.names for key in keys}
        self._count = len(chosen) + len(self._experts)

    def _put_slots(self, model: Any, groups: list[Group], format: Format) -> dict[str, Slot]:
        names = [name for group in groups for name in group.names()]
        find = _finder(model, names)
        for name, scale in self.quantization_config.input_scales.items():
            if (layer := find(name)) is None:
                raise ValueError(f"input_scales must name linears of this model, but it has no {name!r}")
            self._input_scales.append((layer.names[0], scale))
        put_experts_slots(model, [name for group in groups for name in group.modules()], partial(in_model, model))
        slots = put_slots(model, groups, format, _finder(model, names))
        if not slots:
            raise ValueError("quantization_config must name layers of this model, but none of its names is one's")
        untie(model)
        if V4:
            rename_for_slots(model)
        return slots

    # ---- while they are read

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        path, _, _ = param_name.rpartition(".")
        return param_name in self.chosen or (V4 and isinstance(model.get_submodule(path), Slot))

    def quantize_weight(self, model: Any, name: str, value: Tensor) -> bool:
        """Quantizes a weight of a linear or of experts; False where it does not fit, which transformers then says."""
        layer, scheme, key = self.chosen[name], self._schemes[name], name.rpartition(".")[2]
        module = layer.module
        parameter = module._parameters[key]
        if value.shape != parameter.shape:
            del self.chosen[name]
            return False
        linear = nn.Linear(1, 1, bias=False, device="meta")
        if key in WEIGHTS:
            linear = stacked(value)
        elif isinstance(module, nn.Linear):
            linear.in_features, linear.out_features = module.in_features, module.out_features
        else:
            value = value.t()
            linear.out_features, linear.in_features = value.shape
        if key not in WEIGHTS:
            linear.weight, linear.bias = nn.Parameter(value, requires_grad=False), module.bias
        try:
            ranges = range_of(scheme.carried_ranges(), layer.names)
            self._quantized[name] = QLinear.from_linear(linear, scheme, ranges=ranges)
        except (TypeError, ValueError):  # left in float here: replace_linear, which follows, says what is wrong
            del self.chosen[name]
            return False
        for callback in progress:
            callback(len(self._quantized), self._count)
        setattr(module, key, taken(parameter))
        return True

    def get_quantize_ops(self) -> _QuantizeOnLoad:
        return _QuantizeOnLoad(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """After what transformers renames, what has a point in its name in the file goes into the buffer of a slot."""
        from transformers.core_model_loading import WeightRenaming

        slots = [layer.module for layer in find_layers(model, (Slot,))]
        buffers = {key: name for slot in slots for key, name in slot.buffer_names().items()}
        return weight_conversions + [WeightRenaming(key, name) for key, name in buffers.items() if key != name]

    # ---- after they are read

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        if self.pre_quantized:
            if V4:
                del model._get_key_renaming_mapping
                self.give_back_dtype(model)
            try:
                fill_slots(model)
            except ValueError as error:
                raise ValueError(f"{error}; in the files of {self._folder}") from error
            for name, scale in self._input_scales:
                _scale_input(model.get_submodule(name), name, scale)
        else:
            self._put_quantized(model)
            if config.plan is not None:
                replace_linear(model, config.plan)
            else:
                if config.embeddings is not None:
                    replace_embedding(model, config.embeddings)
                if config.recurrent is not None:
                    replace_recurrent(model, config.recurrent)
                replace_linear(model, config.scheme, include=config.include, exclude=config.exclude)
        attach(model)
        if not models_in(model):  # everything is in float, and so it is saved
            self.remove_quantization_config(model)
        return model

    def _put_quantized(self, model: Any) -> None:
        """Puts what was quantized as it was read in the places of the float linears."""
        for layer in find_layers(model, linear_types()):
            name = next((f"{name}.weight" for name in layer.names if f"{name}.weight" in self._quantized), None)
            if name is not None:
                module = self._quantized.pop(name).train(layer.module.training)
                module.bias = layer.module.bias
                put(layer, with_accelerate_hook(layer.module, module), model)
        for layer in self._experts:
            self._put_experts(layer, model)
        self.chosen.clear()
        self._experts.clear()

    def _put_experts(self, layer: Layer, model: Any) -> None:
        """Where one of the weights was not quantized, because it was not in the files, it is now."""
        names = {key: f"{name}.{key}" for name in layer.names for key in WEIGHTS if f"{name}.{key}" in self._quantized}
        if names:
            scheme = self._schemes[next(iter(names.values()))]
            with named(layer):
                gate_up_proj, down_proj = (
                    self._quantized.pop(names[key])
                    if key in names
                    else QLinear.from_linear(stacked(layer.module._parameters[key]), scheme)
                    for key in WEIGHTS
                )
            module = QExperts(gate_up_proj, down_proj, layer.module)
            put(layer, with_accelerate_hook(layer.module, module), model)

    # ---- saving and the rest

    def get_state_dict_and_metadata(self, model: Any, *args: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What the files will hold, and in the config which layers that is, by their names in the files."""
        format, groups = get_format(self.quantization_config.format), describe(model)
        if not any(group.modules() for group in groups):
            raise ValueError(f"no layer of this {type(model).__name__} is quantized; use its dequantize() to save it")
        tensors = state_dict(model, format)
        modules: dict[str, list[str]] = {name: [] for group in groups for name in group.modules()}
        for key in tensors:
            name = key.partition(".weight.")[0] if ".weight." in key else key.rpartition(".")[0]
            if name in modules:
                modules[name].append(key.removeprefix(f"{name}."))
        names = in_files(model, modules, [name for group in groups for name in group.names()], self.own_names)
        config = copy.copy(self.quantization_config)
        config.layers = [group.to_dict() for group in renamed(groups, names.__getitem__)]
        config.input_scales = {names[name]: scale for name, scale in input_scales(model).items()}
        if getattr(model.config, "quantization_config", None) is not self.quantization_config:
            give_config(model)
        model.config.quantization_config = self.quantization_config = config
        return tensors, {}

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
        dequantize(model)
        retie(model)
        model.__dict__.pop("resize_token_embeddings", None)
        model._parameters.pop(PLACEHOLDER, None)
        return model


def _planned(model: Any, plan: Plan) -> tuple[list[Layer], list[Scheme]]:
    """What a plan has quantized as it is read, and how: what it neither smooths nor needs the ranges of."""
    layers, schemes = [], []
    for one in planned_layers(model, plan):
        scheme = one.choice.scheme
        if scheme is None or scheme.needs_ranges or one.choice.smoothing:
            continue
        if one.choice.kind in ("linear", *FUSED_KINDS, "experts"):
            layers.append(one.layer)
            schemes.append(scheme)
    return layers, schemes


def _scale_input(module: nn.Module, name: str, scale: list[float]) -> None:
    if getattr(module, "in_features", None) != len(scale):
        raise ValueError(f"input_scales of {name!r} must be one for each of its in_features, got {len(scale)}")
    factor = torch.tensor(scale, dtype=torch.float32, device="cpu")
    module.register_forward_pre_hook(InputScale(factor), with_kwargs=True)


def _finder(model: Any, names: list[str]) -> Find:
    """The layer of a name in the files, as transformers finds its weight; None where the model has none."""
    kinds = (*linear_types(), *EMBEDDINGS, *RECURRENT)
    layers = {name: layer for layer in find_layers(model, kinds) for name in layer.names}
    keys = [*model.state_dict(), *(f"{name}.weight" for name in layers)]  # a recurrent layer has no key of that name
    found = in_model(model, [f"{name}.weight" for name in names], keys)

    def find(name: str) -> Layer | None:
        return layers.get(found.get(f"{name}.weight", "").removesuffix(".weight"))

    return find


def _unfold_attentions(model: Any, names: list[str]) -> Attentions:
    """Unfolds each nn.MultiheadAttention whose projections are among the `names` of layers in the files."""
    attentions = {
        f"{name}.q_proj.weight": layer.module
        for layer in find_layers(model, (nn.MultiheadAttention,))
        if is_folded(layer.module)
        for name in layer.names
    }
    found = in_model(model, [f"{name}.weight" for name in names], [*model.state_dict(), *attentions])
    chosen = {id(attentions[name]): attentions[name] for name in found.values() if name in attentions}
    return [(attention, unfold(attention)) for attention in chosen.values()]


def _checkpoint_files(files: list[str] | None, config: Any) -> list[Path]:
    """The files that transformers reads, which it says since 5. OSError for those that are pickled."""
    folder = Path(getattr(config, "_name_or_path", "") or "")
    if files is None and folder.is_dir():
        files = [str(path) for path in sorted(folder.glob("*.safetensors"))] or [str(folder)]
    for file in files or []:
        if not file.endswith(".safetensors"):
            raise OSError(f"a quantized model must be in safetensors files, got {file}; pickled weights are not read")
    return [Path(file) for file in files or []]
