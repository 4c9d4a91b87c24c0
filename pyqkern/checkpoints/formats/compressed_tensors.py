"""The format of compressed-tensors, which vLLM serves: of it the 8-bit linears with dynamic activations, W8A8.

weight int8 [N, K], weight_scale [N, 1]; activations are quantized per token. "int-quantized" in config.json.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyqkern.checkpoints.formats.base import Format, expect, weight_and_bias
from pyqkern.checkpoints.layers import Group, groups_from
from pyqkern.nn.linear import QLinear
from pyqkern.ops.checks import FLOATS
from pyqkern.schemes import Int8, Scheme


class CompressedTensors(Format):
    """INT8 weights, symmetric, one scale per output channel; INT8 activations per token."""

    name = "compressed-tensors"
    schemes = ("int8",)
    marks = ("weight_scale",)

    def detect(self, config: Mapping[str, Any]) -> bool:
        if config.get("quant_method") != self.name:
            return False
        if config.get("format") != "int-quantized":
            said = config.get("format")
            raise ValueError(f"compressed-tensors must be 'int-quantized' to be read here, got {said!r}")
        return True

    def groups(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], scheme: Scheme | None) -> list[Group]:
        names = [key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")]
        return [Group(scheme or w8a8_scheme(config), names)] if names else []

    def stored(self, layer: Any) -> dict[str, Tensor]:
        scale = torch.empty(layer.out_features, 1, dtype=torch.float32, device="meta")
        return weight_and_bias(layer.state_dict()) | {"weight_scale": scale}

    def varies(self, layer: QLinear, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        return key == "weight_scale" and shape == (layer.out_features, 1) and dtype in FLOATS

    def differs(self, tensors: Mapping[str, Tensor]) -> bool:
        return "weight_scale" in tensors and tensors["weight_scale"].dim() == 2  # the layer's own has one dimension

    def decode(self, name: str, layer: QLinear, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        expect(name, "weight_scale", tensors["weight_scale"], (layer.out_features, 1), *FLOATS)
        return tensors | {"weight_scale": tensors["weight_scale"].reshape(-1).float()}

    def encode(self, layer: QLinear, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return weight_and_bias(state) | {"weight_scale": state["weight_scale"].unsqueeze(1)}

    def config(self, own: dict[str, Any]) -> dict[str, Any]:
        groups = groups_from(own["layers"])
        schemes = [group.scheme for group in groups if group.scheme is not None]
        symmetric = {scheme.symmetric for scheme in schemes if isinstance(scheme, Int8)}
        if len(symmetric) > 1:
            raise ValueError(
                "compressed-tensors has one kind of activations in a model here, got symmetric ones and others; "
                "use format='pyqkern'"
            )
        common = {"num_bits": 8, "type": "int"}
        weights = common | {"strategy": "channel", "symmetric": True, "dynamic": False}
        inputs = common | {"strategy": "token", "symmetric": True in symmetric, "dynamic": True, "observer": None}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
        return {
            "quant_method": self.name,
            "format": "int-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": [name for one in groups if one.scheme is None for name in one.linears],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


def w8a8_scheme(config: Mapping[str, Any]) -> Scheme:
    """The scheme of the one group that config.json has. ValueError where it is not 8-bit with dynamic activations."""
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1 or not isinstance(next(iter(groups.values())), dict):
        raise ValueError(f"config_groups must be one group to be read here, got {groups!r:.200}")
    group = next(iter(groups.values()))
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict):
        raise ValueError(f"weights must be 8-bit int, symmetric, per channel, to be read here, got {weights!r:.200}")
    told = {key: weights.get(key) for key in ("num_bits", "type", "strategy", "symmetric")}
    if told != {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}:
        raise ValueError(f"weights must be 8-bit int, symmetric, per channel, to be read here, got {told}")
    if not isinstance(inputs, dict):
        raise ValueError(f"input_activations must be 8-bit int, dynamic, per token; got {inputs!r:.200} (weights only)")
    if (inputs.get("num_bits"), inputs.get("strategy"), inputs.get("dynamic")) != (8, "token", True):
        raise ValueError(f"input_activations must be 8-bit int, dynamic, per token, got {inputs}")
    symmetric = inputs.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise ValueError(f"symmetric of input_activations must be true or false, got {symmetric!r}")
    return Int8(symmetric=symmetric)
