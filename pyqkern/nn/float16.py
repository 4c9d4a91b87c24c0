"""Float16Linear, whose weights are kept in fp16, as torch's quantize_dynamic with dtype=torch.float16 keeps them."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from pyqkern.backends import Kernels, Shape
from pyqkern.nn.linear import Buffers, QLinear
from pyqkern.ops.checks import FLOATS, check_float
from pyqkern.schemes import Float16, Scheme

MAX = torch.finfo(torch.float16).max


class Float16Linear(QLinear, scheme=Float16):
    """FP16 weights, dequantized in each call; x and the product stay in x's dtype.

    Buffer: packed fp16 [out_features, in_features], the weight (not saved). state_dict: weight fp16, bias.
    """

    packed: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scheme: str | Scheme | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, self._own_scheme(scheme), device, dtype)
        weight = torch.zeros(out_features, in_features, dtype=torch.float16, device=device)
        self.register_buffer("packed", weight, persistent=False)

    _of_weight: ClassVar[tuple[str, ...]] = ("packed",)
    _packed: ClassVar[dict[str, str]] = {"weight": "packed"}

    def _quantized(self, weight: Tensor) -> dict[str, Tensor | None]:
        return {"packed": weight.detach().float().clamp(-MAX, MAX).half()}

    def _dequantize(self, buffers: Buffers | None = None) -> Tensor:
        read: Any = buffers or self._buffers
        return read["packed"].to(self.dtype, copy=True)

    def rows(self, ids: Tensor) -> Tensor:
        return self.packed[ids].to(self.dtype)

    def _linear(self, x: Tensor, bias: Tensor | None, buffers: Buffers | None = None) -> Tensor:
        check_float("x", x.dtype)
        read: Any = buffers or self._buffers
        return functional.linear(x, read["packed"].to(x.dtype), None if bias is None else bias.to(x.dtype))

    def _times_weight(self, grad: Tensor) -> Tensor:
        return grad @ self.packed.to(grad.dtype)

    def _plain(self, key: str) -> Tensor:
        return self.packed

    def _pack(self, key: str, value: Tensor) -> Tensor:
        return value

    def _packed_shapes(self, key: str, kernels: Kernels) -> tuple[Shape, ...]:
        return ((self.out_features, self.in_features),)

    def _unpacked(self, key: str, kernels: Kernels, value: Tensor) -> Tensor:
        return value

    def _expected(self) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        return {
            "weight": ((self.out_features, self.in_features), (torch.float16,)),
            "bias": ((self.out_features,), FLOATS),
        }
