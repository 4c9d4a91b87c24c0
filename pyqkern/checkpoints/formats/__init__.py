"""Checkpoint formats: how a quantized linear's tensors are named and stored in a safetensors file.

    pyqkern             weight, weight_scale or absmax, ...: the layer's state_dict
    bitsandbytes        4-bit: weight, weight.absmax, weight.quant_map, weight.nested_*,
                        weight.quant_state.bitsandbytes__nf4 (JSON as bytes).
                        LLM.int8: weight, SCB (absmax of a row), weight_format
    compressed-tensors  "int-quantized" W8A8: weight int8 [N, K], weight_scale [N, 1]; activations per token

`encode` and `decode` turn one layer's tensors from the first into the others and back. What a file says is checked: an
error names the key.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyqkern.backends import NESTED_BLOCKSIZE
from pyqkern.backends.reference.four_bit import CODEBOOKS
from pyqkern.nn.four_bit import NESTED, Linear4bit
from pyqkern.nn.linear import QLinear
from pyqkern.ops.checks import FLOATS
from pyqkern.schemes import FP4, NF4, Int8, Int8Outlier, Scheme

FORMATS = ("pyqkern", "bitsandbytes", "compressed-tensors")
_PREFIX = "weight.quant_state.bitsandbytes__"
_LLM_INT8 = ("int8", "int8-weight-only", "int8-outlier")  # the schemes that bitsandbytes' INT8 format can hold

# What has a point in its file name cannot be a buffer of that name.
RENAMED = {
    "weight.absmax": "weight_absmax",
    "weight.quant_map": "weight_quant_map",
    "weight.nested_absmax": "weight_nested_absmax",
    "weight.nested_quant_map": "weight_nested_quant_map",
    f"{_PREFIX}nf4": "weight_quant_state_nf4",
    f"{_PREFIX}fp4": "weight_quant_state_fp4",
}


_FILE_NAMES = {short: name for name, short in RENAMED.items()}


def check_format(format: str) -> str:
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    return format


def file_name(name: str) -> str:
    """The name in the file of what `stored_tensors` calls `name`."""
    return _FILE_NAMES.get(name, name)


def stored_tensors(format: str, layer: QLinear) -> dict[str, Tensor]:
    """What a file holds of the layer, as tensors on the meta device. A file's may differ and still decode."""
    own = dict(layer.state_dict())
    if format == "pyqkern":
        return own
    stored = {"weight": own["weight"]}
    meta: Any = {"device": "meta"}
    if format == "compressed-tensors":
        stored["weight_scale"] = torch.empty(layer.out_features, 1, **meta)
    elif isinstance(layer, Linear4bit):
        stored["weight_absmax"] = own["absmax"]
        stored["weight_quant_map"] = torch.empty(16, **meta)
        stored[f"weight_quant_state_{layer.quant_type}"] = torch.empty(0, dtype=torch.uint8, **meta)
        if layer.double_quant:
            stored["weight_nested_absmax"] = own["nested_absmax"]
            stored["weight_nested_quant_map"] = own["nested_map"]
    else:
        stored["SCB"] = own["weight_scale"]
        stored["weight_format"] = torch.empty((), dtype=torch.uint8, **meta)
    if "bias" in own:
        stored["bias"] = own["bias"]
    return stored


def decode(format: str, name: str, layer: QLinear, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layer's state_dict out of the tensors of a file. ValueError where they do not fit."""
    state = dict(tensors)
    if format == "bitsandbytes" and isinstance(layer, Linear4bit):
        state = _decode_bnb_4bit(name, layer, state)
    elif format == "bitsandbytes":
        state = _decode_bnb_int8(name, layer, state)
    elif format == "compressed-tensors":
        _expect(name, "weight_scale", state["weight_scale"], (layer.out_features, 1), FLOATS)
        state["weight_scale"] = state["weight_scale"].reshape(-1).float()
    problems: list[str] = layer._load_problems({f"{name}.{key}": value for key, value in state.items()}, f"{name}.")
    if problems:
        raise ValueError(problems[0])
    for key in ("weight_scale", "absmax", *NESTED):
        value = state.get(key)
        if value is not None and value.is_floating_point() and value.numel():
            least = value.min()
            if not value.isfinite().all() or (key in ("weight_scale", "absmax", "nested_absmax") and least < 0):
                raise ValueError(f"{name}.{key} must be finite and not negative, got {value.min().item()}")
    return state


def _expect(
    name: str, key: str, tensor: Tensor, shape: tuple[int, ...] | None, dtypes: tuple[torch.dtype, ...]
) -> None:
    if (shape is not None and tuple(tensor.shape) != shape) or tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise ValueError(f"{name}.{key} must be {wanted} {list(shape) if shape is not None else ''}, got {got}")


# ---- bitsandbytes


def _decode_bnb_4bit(name: str, layer: Linear4bit, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    key = f"{_PREFIX}{layer.quant_type}"
    said = quant_state(f"{name}.{key}", stored[f"weight_quant_state_{layer.quant_type}"])
    shape = [layer.out_features, layer.in_features]
    expected = {"quant_type": layer.quant_type, "blocksize": layer.blocksize, "shape": shape}
    for what, value in expected.items():
        if said.get(what) != value:
            raise ValueError(f"{name}.{key} must say {what} {value}, which fits the layer, got {said.get(what)!r}")
    _expect(name, "weight.quant_map", stored["weight_quant_map"], (16,), FLOATS)
    values = CODEBOOKS[layer.quant_type].values
    if not torch.allclose(stored["weight_quant_map"].float().cpu(), values, atol=1e-5):
        raise ValueError(f"{name}.weight.quant_map must be the values of {layer.quant_type}, got others")
    weight = stored["weight"]
    if weight.dtype is not torch.uint8:
        if weight.numel() * weight.element_size() != (layer.out_features * layer.in_features + 1) // 2:
            _expect(name, "weight", weight, ((layer.out_features * layer.in_features + 1) // 2, 1), (torch.uint8,))
        weight = weight.contiguous().view(torch.uint8).view(-1, 1)
    state = {"weight": weight, "absmax": stored["weight_absmax"]}
    if layer.double_quant:
        if said.get("nested_blocksize") != NESTED_BLOCKSIZE or not isinstance(said.get("nested_offset"), float):
            raise ValueError(
                f"{name}.{key} must say nested_blocksize {NESTED_BLOCKSIZE} and a nested_offset, "
                f"got {said.get('nested_blocksize')!r} and {said.get('nested_offset')!r}"
            )
        state["nested_absmax"], state["nested_map"] = stored["weight_nested_absmax"], stored["weight_nested_quant_map"]
        state["nested_offset"] = torch.tensor(said["nested_offset"], device=weight.device)
    return state | ({"bias": stored["bias"]} if "bias" in stored else {})


def quant_state(key: str, stored: Tensor) -> dict[str, Any]:
    """What bitsandbytes says of a weight in JSON, stored as bytes."""
    try:
        said = json.loads(bytes(stored.cpu().tolist()).decode())
    except (ValueError, TypeError) as error:
        raise ValueError(f"{key} must be JSON as uint8, got {stored.dtype!s} {list(stored.shape)}") from error
    if not isinstance(said, dict):
        raise ValueError(f"{key} must be a JSON object, got {type(said).__name__}")
    return said


def _decode_bnb_int8(name: str, layer: QLinear, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    _expect(name, "SCB", stored["SCB"], (layer.out_features,), (torch.float32,))
    if stored["weight_format"].numel() != 1 or int(stored["weight_format"]) != 0:
        raise ValueError(f"{name}.weight_format must be 0, row-major, got {stored['weight_format'].tolist()}")
    absmax = stored.pop("SCB")
    del stored["weight_format"]
    return stored | {"weight_scale": torch.where(absmax > 0, absmax / 127, 1.0)}


def encode(format: str, name: str, layer: QLinear, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors out of the layer's state_dict, `own`. ValueError where the format has no such."""
    check_encodable(format, name, layer.scheme)
    stored = {"weight": own["weight"]} | ({"bias": own["bias"]} if "bias" in own else {})
    if format == "compressed-tensors":
        return stored | {"weight_scale": own["weight_scale"].unsqueeze(1)}
    if not isinstance(layer, Linear4bit):
        return stored | {"SCB": own["weight_scale"] * 127, "weight_format": torch.zeros((), dtype=torch.uint8)}
    said: dict[str, Any] = {
        "quant_type": layer.quant_type,
        "blocksize": layer.blocksize,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "shape": [layer.out_features, layer.in_features],
    }
    stored["weight.absmax"] = own["absmax"]
    stored["weight.quant_map"] = CODEBOOKS[layer.quant_type].values.clone()
    if layer.double_quant:
        stored["weight.nested_absmax"], stored["weight.nested_quant_map"] = own["nested_absmax"], own["nested_map"]
        said |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": own["nested_offset"].item(),
        }
    stored[f"{_PREFIX}{layer.quant_type}"] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    return stored


def check_encodable(format: str, name: str, scheme: Scheme) -> None:
    able = {"bitsandbytes": ("nf4", "fp4", *_LLM_INT8), "compressed-tensors": ("int8",)}.get(format)
    if able is not None and scheme.name not in able:
        raise ValueError(
            f"{name}: {format} has {', '.join(able)}, not {scheme.name!r}; save with format='pyqkern' or quantize anew"
        )


# ---- config.json


def foreign_config(format: str, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The quantization_config of a folder in bitsandbytes' or compressed-tensors' format."""
    schemes = [entry["scheme"] for entry in layers if entry["scheme"] is not None]
    kept = [name for entry in layers if entry["scheme"] is None for name in entry["linears"]]
    names = {scheme["name"] for scheme in schemes}
    if format == "compressed-tensors":
        symmetric = all(scheme.get("symmetric", False) for scheme in schemes)
        return _compressed_tensors_config(symmetric, kept)
    if not names <= set(_LLM_INT8) and len(names) > 1:
        raise ValueError(
            f"bitsandbytes has one scheme in a model, got {', '.join(sorted(names))}; use format='pyqkern'"
        )
    quantized = [name for entry in layers if entry["scheme"] is not None for name in entry["linears"]]
    # transformers takes each as a regular expression for the start of a name, and as a suffix.
    skip = [f"^{name}$" if any(one != name and one.endswith(name) for one in quantized) else name for name in kept]
    common = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": skip}
    if names & {"nf4", "fp4"}:
        return common | {
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": next(iter(names)),
            "bnb_4bit_use_double_quant": any(scheme.get("double_quant", False) for scheme in schemes),
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8",
        }
    threshold = next((scheme["threshold"] for scheme in schemes if "threshold" in scheme), Int8Outlier().threshold)
    return common | {"load_in_4bit": False, "load_in_8bit": True, "llm_int8_threshold": threshold}


def _compressed_tensors_config(symmetric: bool, kept: list[str]) -> dict[str, Any]:
    common = {"num_bits": 8, "type": "int"}
    weights = common | {"strategy": "channel", "symmetric": True, "dynamic": False}
    inputs = common | {"strategy": "token", "symmetric": symmetric, "dynamic": True, "observer": None}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": kept,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def foreign_format(config: Mapping[str, Any]) -> str | None:
    """The format that a folder's quantization_config speaks of; None for pyqkern's own. ValueError for others."""
    method = config.get("quant_method")
    if config.get("load_in_8bit") or config.get("load_in_4bit"):
        method = "bitsandbytes"
    if method == "pyqkern":
        return None
    if method == "compressed-tensors":
        if config.get("format") != "int-quantized":
            raise ValueError(
                f"compressed-tensors must be 'int-quantized' to be read here, got {config.get('format')!r}"
            )
    elif method != "bitsandbytes":
        raise ValueError(f"quant_method must be pyqkern, bitsandbytes or compressed-tensors, got {method!r}")
    return str(method)


def read_layers(
    format: str, config: Mapping[str, Any], tensors: "Mapping[str, Any]", scheme: Scheme | None
) -> list[dict[str, Any]]:
    """Which linears of a checkpoint are quantized how, as (scheme, names). tensors: the files' tensors by key.

    scheme: what INT8 weights are computed with; None: what the format means.
    """
    found: dict[Scheme, list[str]] = {}
    for key in tensors:
        name, _, last = key.rpartition(f".{_PREFIX}")
        if name and format == "bitsandbytes":
            found.setdefault(_4bit_scheme(key, last, tensors[key]), []).append(name)
        elif key.endswith(".SCB") and format == "bitsandbytes":
            default = Int8Outlier(threshold=float(config.get("llm_int8_threshold") or 6.0))
            found.setdefault(scheme or default, []).append(key.removesuffix(".SCB"))
        elif key.endswith(".weight_scale") and format == "compressed-tensors":
            found.setdefault(scheme or _w8a8_scheme(config), []).append(key.removesuffix(".weight_scale"))
    if not found:
        raise ValueError(f"the files hold no layer in {format}'s format, whatever config.json says")
    return [{"scheme": one, "linears": names, "embeddings": {}, "heads": {}} for one, names in found.items()]


def _4bit_scheme(key: str, quant_type: str, stored: Tensor) -> Scheme:
    said = quant_state(key, stored)
    schemes: dict[str, type[NF4] | type[FP4]] = {"nf4": NF4, "fp4": FP4}
    if quant_type not in schemes:
        raise ValueError(f"{key} must be nf4 or fp4, got {quant_type!r}")
    try:
        return schemes[quant_type](blocksize=said.get("blocksize", 64), double_quant="nested_offset" in said)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key}: {error}") from error


def _w8a8_scheme(config: Mapping[str, Any]) -> Scheme:
    groups = list((config.get("config_groups") or {}).values())
    if len(groups) != 1:
        raise ValueError(f"config_groups must be one group to be read here, got {len(groups)}")
    weights, inputs = groups[0].get("weights") or {}, groups[0].get("input_activations")
    told = {key: weights.get(key) for key in ("num_bits", "type", "strategy", "symmetric")}
    if told != {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}:
        raise ValueError(f"weights must be 8-bit int, symmetric, per channel, to be read here, got {told}")
    if inputs is None:
        raise ValueError("input_activations must be 8-bit int, dynamic, per token; got none (weights only)")
    if (inputs.get("num_bits"), inputs.get("strategy"), inputs.get("dynamic")) != (8, "token", True):
        raise ValueError(f"input_activations must be 8-bit int, dynamic, per token, got {inputs}")
    return Int8(symmetric=bool(inputs.get("symmetric", True)))
