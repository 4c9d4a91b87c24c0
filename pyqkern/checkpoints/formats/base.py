"""What a checkpoint format is: the names and the bytes of a quantized layer's tensors in a file, one class each."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyqkern.checkpoints.layers import Group, module_of
from pyqkern.functional.four_bit import dynamic_map
from pyqkern.nn.linear import QLinear
from pyqkern.schemes import SCHEMES, Scheme


class Format(ABC):
    """How quantized layers stand in safetensors files and in config.json.

    A subclass names the format and the schemes that it can hold, and says what a layer's tensors are in its files.
    `read`, `check` and the class that lists the formats do the rest. Names of tensors are without the layer's.
    """

    name: ClassVar[str]
    schemes: ClassVar[tuple[str, ...]] = tuple(SCHEMES)
    linears_only: ClassVar[bool] = (
        True  # whether it has no quantized embeddings, recurrent layers, attentions and experts
    )
    marks: ClassVar[tuple[str, ...]]  # tensors that only quantized layers have

    @abstractmethod
    def detect(self, config: Mapping[str, Any]) -> bool:
        """Whether a folder's quantization_config is of this format. ValueError for a variant that is not read."""

    @abstractmethod
    def groups(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], scheme: Scheme | None) -> list[Group]:
        """The quantized layers of a folder, by scheme. tensors: those of its files.

        scheme: what INT8 weights are computed with, where the format does not say; None: what the format means.
        """

    @abstractmethod
    def stored(self, layer: Any) -> dict[str, Tensor]:
        """What a file holds of the layer, a QLinear, or a QRecurrent where it has these; tensors on the meta device."""

    def optional(self, layer: QLinear) -> tuple[str, ...]:
        """Those of `stored` that a file may lack."""
        return ()

    def varies(self, layer: QLinear, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether a file may hold `key` of `stored` as this instead; `decode` takes both."""
        return False

    def differs(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these tensors of a layer, as a state_dict may have them, are of the format, to be decoded."""
        return not tensors.keys().isdisjoint(self.marks)

    @abstractmethod
    def decode(self, name: str, layer: QLinear, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The layer's state_dict out of the tensors of a file. ValueError, which names the key, where it cannot be."""

    @abstractmethod
    def encode(self, layer: QLinear, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file out of the layer's state_dict."""

    @abstractmethod
    def config(self, own: dict[str, Any]) -> dict[str, Any]:
        """What config.json is to say. own: the quantization_config of pyqkern, with its layers."""

    def check(self, name: str, scheme: Scheme) -> None:
        """ValueError where the format cannot hold a layer of this scheme."""
        if scheme.name not in self.schemes:
            raise ValueError(
                f"{name}: {self.name} has {', '.join(self.schemes)}, not {scheme.name!r}; save with "
                "format='pyqkern' or quantize anew"
            )

    def read(self, name: str, layer: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`decode`, and every tensor of the result checked: shape, dtype and values that a quantized layer can have."""
        state = self.decode(name, layer, dict(tensors))
        problems = layer._load_problems({f"{name}.{key}": value for key, value in state.items()}, f"{name}.")
        if problems:
            raise ValueError(problems[0])
        for key, value in state.items():
            check_values(name, key, value)
        return state


def check_values(name: str, key: str, value: Tensor) -> None:
    """ValueError where a tensor of a layer's state_dict holds what no quantized layer has."""
    if value.is_meta or not value.numel():
        return
    if key.endswith("nested_map"):
        if not torch.equal(value.cpu(), dynamic_map()):
            raise ValueError(f"{name}.{key} must be the signed dynamic map of 8 bits, got other values")
    elif value.is_floating_point() and not key.startswith("bias"):
        ends = torch.stack(value.aminmax())
        positive, signed = key.endswith("_scale"), module_of(f"{name}.{key}") is not None
        if not ends.isfinite().all() or (ends[0] < 0 and not signed) or (positive and ends[0] == 0):
            rule = "finite" if signed else "finite and positive" if positive else "finite and not negative"
            raise ValueError(f"{name}.{key} must be {rule}, got values from {ends[0].item()} to {ends[1].item()}")


def expect(name: str, key: str, tensor: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """ValueError, which names the key, for another shape or dtype."""
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise ValueError(f"{name}.{key} must be {wanted} {list(shape)}, got {got}")


def weight_and_bias(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What all formats name alike."""
    return {key: state[key] for key in ("weight", "bias") if key in state}
