"""bitsandbytes' format, which has NF4, FP4 and LLM.int8.

4-bit     weight uint8 [(numel + 1) // 2, 1], or the same bytes as another dtype; weight.absmax, weight.quant_map,
          weight.nested_absmax, weight.nested_quant_map; weight.quant_state.bitsandbytes__nf4, JSON as bytes
LLM.int8  weight int8 [N, K], SCB fp32 [N], a row's absmax; weight_format, 0 where it is there
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyqkern.backends import NESTED_BLOCKSIZE
from pyqkern.backends.reference.four_bit import CODEBOOKS
from pyqkern.checkpoints.formats.base import Format, expect, weight_and_bias
from pyqkern.checkpoints.layers import Group, groups_from
from pyqkern.nn.four_bit import Linear4bit
from pyqkern.nn.linear import QLinear
from pyqkern.schemes import FP4, NF4, Int8, Int8Outlier, Scheme

STATE = "weight.quant_state.bitsandbytes__"
INT8 = ("int8", "int8-weight-only", "int8-outlier")  # the schemes whose weights LLM.int8 can hold
PARTS = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
ROW_MAJOR = 0  # what weight_format says


class BitsAndBytes(Format):
    """What transformers reads and writes with bitsandbytes."""

    name = "bitsandbytes"
    schemes = ("nf4", "fp4", *INT8)
    marks = ("SCB", "weight_format", *PARTS, *(f"{STATE}{quant_type}" for quant_type in ("nf4", "fp4")))

    def detect(self, config: Mapping[str, Any]) -> bool:
        return bool(
            config.get("quant_method") == "bitsandbytes" or config.get("load_in_8bit") or config.get("load_in_4bit")
        )

    def groups(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], scheme: Scheme | None) -> list[Group]:
        found: dict[Scheme, Group] = {}
        for key in tensors:
            layer, state, quant_type = key.rpartition(f".{STATE}")
            if state:
                one = _scheme_4bit(key, quant_type, tensors[key])
            elif key.endswith(".SCB"):
                layer, one = key.removesuffix(".SCB"), scheme or _int8_scheme(config)
            else:
                continue
            found.setdefault(one, Group(one)).linears.append(layer)
        return list(found.values())

    def stored(self, layer: Any) -> dict[str, Tensor]:
        own, meta = layer.state_dict(), torch.device("meta")
        stored = weight_and_bias(own)
        if not isinstance(layer, Linear4bit):
            weight_format = torch.empty((), dtype=torch.uint8, device=meta)
            return stored | {"SCB": own["weight_scale"], "weight_format": weight_format}
        stored["weight.absmax"] = own["absmax"]
        stored["weight.quant_map"] = torch.empty(16, dtype=torch.float32, device=meta)
        stored[f"{STATE}{layer.quant_type}"] = torch.empty(0, dtype=torch.uint8, device=meta)
        if layer.double_quant:
            stored["weight.nested_absmax"] = own["nested_absmax"]
            stored["weight.nested_quant_map"] = own["nested_map"]
        return stored

    def optional(self, layer: QLinear) -> tuple[str, ...]:
        return () if isinstance(layer, Linear4bit) else ("weight_format",)  # files of 2023 have none

    def varies(self, layer: QLinear, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        if key == "weight" and isinstance(layer, Linear4bit):  # the bytes as bnb_4bit_quant_storage
            return math.prod(shape) * dtype.itemsize == (layer.out_features * layer.in_features + 1) // 2
        return key.startswith(STATE)  # as long as its JSON

    def decode(self, name: str, layer: QLinear, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if isinstance(layer, Linear4bit):
            return _decode_4bit(name, layer, tensors)
        return _decode_int8(name, layer, tensors)

    def encode(self, layer: QLinear, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if isinstance(layer, Linear4bit):
            return _encode_4bit(layer, state)
        weight_format = torch.tensor(ROW_MAJOR, dtype=torch.uint8, device="cpu")
        return weight_and_bias(state) | {"SCB": state["weight_scale"] * 127, "weight_format": weight_format}

    def config(self, own: dict[str, Any]) -> dict[str, Any]:
        groups = groups_from(own["layers"])
        schemes = [group.scheme for group in groups if group.scheme is not None]
        names = {scheme.name for scheme in schemes}
        if not names <= set(INT8) and len(names) > 1:
            said = ", ".join(sorted(names))
            raise ValueError(f"bitsandbytes has one scheme in a model, got {said}; use format='pyqkern'")
        common = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": _skipped(groups)}
        if names & {"nf4", "fp4"}:
            return common | {
                "load_in_4bit": True,
                "load_in_8bit": False,
                "bnb_4bit_quant_type": next(iter(names)),
                "bnb_4bit_use_double_quant": any(getattr(scheme, "double_quant", False) for scheme in schemes),
                "bnb_4bit_compute_dtype": "float32",
                "bnb_4bit_quant_storage": "uint8",
            }
        threshold = next((scheme.threshold for scheme in schemes if isinstance(scheme, Int8Outlier)), 6.0)
        return common | {"load_in_4bit": False, "load_in_8bit": True, "llm_int8_threshold": threshold}


def _skipped(groups: list[Group]) -> list[str]:
    """The linears in float; transformers takes each as a regular expression of a name's start, and as its end."""
    kept = [name for group in groups if group.scheme is None for name in group.linears]
    quantized = [name for group in groups if group.scheme is not None for name in group.linears]
    return [f"^{name}$" if any(one != name and one.endswith(name) for one in quantized) else name for name in kept]


def _int8_scheme(config: Mapping[str, Any]) -> Scheme:
    """What LLM.int8 computes with: activations as int8 around zero, but for columns above the threshold; 0: none."""
    threshold = config.get("llm_int8_threshold", 6.0)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < float("inf"):
        raise ValueError(f"llm_int8_threshold must be a number >= 0, got {threshold!r}")
    return Int8Outlier(threshold=float(threshold)) if threshold else Int8(symmetric=True)


# ---- 4 bits


def _scheme_4bit(key: str, quant_type: str, stored: Tensor) -> Scheme:
    said = quant_state(key, stored)
    schemes: dict[str, type[NF4] | type[FP4]] = {"nf4": NF4, "fp4": FP4}
    if quant_type not in schemes:
        raise ValueError(f"{key} must be nf4 or fp4, got {quant_type!r}")
    try:
        return schemes[quant_type](blocksize=said.get("blocksize", 64), double_quant="nested_offset" in said)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key}: {error}") from error


def quant_state(key: str, stored: Tensor) -> dict[str, Any]:
    """What bitsandbytes says of a weight in JSON, stored as bytes."""
    try:
        said = json.loads(bytes(stored.cpu().tolist()).decode())
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{key} must be JSON as uint8, got {stored.dtype!s} {list(stored.shape)}") from error
    if not isinstance(said, dict):
        raise ValueError(f"{key} must be a JSON object, got {type(said).__name__}")
    return said


def _decode_4bit(name: str, layer: Linear4bit, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    key = f"{STATE}{layer.quant_type}"
    said = quant_state(f"{name}.{key}", stored[key])
    shape = [layer.out_features, layer.in_features]
    for what, value in {"quant_type": layer.quant_type, "blocksize": layer.blocksize, "shape": shape}.items():
        if said.get(what) != value:
            raise ValueError(f"{name}.{key} must say {what} {value}, which fits the layer, got {said.get(what)!r}")
    expect(name, "weight.quant_map", stored["weight.quant_map"], (16,), torch.float32)
    if not torch.equal(stored["weight.quant_map"].cpu(), CODEBOOKS[layer.quant_type].values):
        raise ValueError(f"{name}.weight.quant_map must be the values of {layer.quant_type}, got others")
    state = {"weight": _as_bytes(name, layer, stored["weight"]), "absmax": stored["weight.absmax"]}
    if layer.double_quant:
        if said.get("nested_blocksize") != NESTED_BLOCKSIZE or not isinstance(said.get("nested_offset"), float):
            raise ValueError(
                f"{name}.{key} must say nested_blocksize {NESTED_BLOCKSIZE} and a nested_offset, "
                f"got {said.get('nested_blocksize')!r} and {said.get('nested_offset')!r}"
            )
        state["nested_absmax"], state["nested_map"] = stored["weight.nested_absmax"], stored["weight.nested_quant_map"]
        state["nested_offset"] = torch.tensor(said["nested_offset"], dtype=torch.float32, device=state["weight"].device)
    return state | ({"bias": stored["bias"]} if "bias" in stored else {})


def _as_bytes(name: str, layer: Linear4bit, weight: Tensor) -> Tensor:
    """The packed codes as uint8 [(numel + 1) // 2, 1], whatever dtype bnb_4bit_quant_storage gave them."""
    count = (layer.out_features * layer.in_features + 1) // 2
    if weight.dtype is torch.uint8 or weight.numel() * weight.element_size() != count:
        expect(name, "weight", weight, (count, 1), torch.uint8)
    return weight.contiguous().view(torch.uint8).view(-1, 1)


def _encode_4bit(layer: Linear4bit, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    said: dict[str, Any] = {
        "quant_type": layer.quant_type,
        "blocksize": layer.blocksize,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "shape": [layer.out_features, layer.in_features],
    }
    stored = weight_and_bias(state)
    stored["weight.absmax"] = state["absmax"]
    stored["weight.quant_map"] = CODEBOOKS[layer.quant_type].values.clone()
    if layer.double_quant:
        stored["weight.nested_absmax"] = state["nested_absmax"]
        stored["weight.nested_quant_map"] = state["nested_map"]
        offset = state["nested_offset"].item()
        said |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": offset}
    stored[f"{STATE}{layer.quant_type}"] = torch.tensor(
        list(json.dumps(said).encode()), dtype=torch.uint8, device="cpu"
    )
    return stored


# ---- LLM.int8


def _decode_int8(name: str, layer: QLinear, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    absmax, weight_format = stored.pop("SCB"), stored.pop("weight_format", None)
    expect(name, "SCB", absmax, (layer.out_features,), torch.float32)
    if absmax.numel() and not (absmax.isfinite().all() and absmax.min() >= 0):
        raise ValueError(f"{name}.SCB must be finite and not negative, got values from {absmax.min().item()}")
    if weight_format is not None and (weight_format.numel() != 1 or int(weight_format) != ROW_MAJOR):
        raise ValueError(f"{name}.weight_format must be 0, row-major, got {weight_format.tolist()}")
    return stored | {"weight_scale": torch.where(absmax > 0, absmax / 127, 1.0)}
