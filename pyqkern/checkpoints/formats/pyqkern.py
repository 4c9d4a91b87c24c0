"""pyqkern's own format: a layer's state_dict. It holds every scheme and every kind of layer."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyqkern.checkpoints.formats.base import Format
from pyqkern.checkpoints.layers import Group, groups_from
from pyqkern.nn.four_bit import NESTED
from pyqkern.nn.linear import QLinear
from pyqkern.schemes import Scheme


class Pyqkern(Format):
    """weight, weight_scale or absmax, ...: the names of the state_dict. config.json lists the layers."""

    name = "pyqkern"
    linears_only = False
    marks = ("weight_scale", "input_scale", "input_zero_point", "absmax", *NESTED)

    def detect(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "pyqkern"

    def groups(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], scheme: Scheme | None) -> list[Group]:
        return groups_from(config.get("layers"))

    def stored(self, layer: Any) -> dict[str, Tensor]:
        return dict(layer.state_dict())

    def differs(self, tensors: Mapping[str, Tensor]) -> bool:
        return False  # the format is the state_dict

    def decode(self, name: str, layer: QLinear, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors

    def encode(self, layer: QLinear, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(state)

    def config(self, own: dict[str, Any]) -> dict[str, Any]:
        return own
