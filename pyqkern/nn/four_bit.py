"""The linears with 4-bit weights: NF4Linear, FP4Linear and Int4Linear, the schemes "nf4", "fp4" and "int4"."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from pyqkern.backends import NESTED_BLOCKSIZE, PANEL, Kernels, Shape, Weight4bit
from pyqkern.functional.four_bit import dynamic_map, quantize_absmax
from pyqkern.nn.linear import Buffers, QLinear
from pyqkern.ops import four_bit as ops_four_bit
from pyqkern.ops.checks import FLOATS, INT
from pyqkern.ops.gradient import grad_input_4bit
from pyqkern.ops.registry import kernels_of
from pyqkern.schemes import FP4, NF4, Int4, Scheme, check_type

NESTED = ("nested_absmax", "nested_map", "nested_offset")


class Linear4bit(QLinear):
    """What the three have in common. Codes and scales: `pyqkern.functional`.

    Buffers: packed and absmax, codes and scales as the device's kernels take them (not saved); with double quantization
    nested_absmax, nested_map and nested_offset.
    state_dict: weight uint8 [(numel + 1) // 2, 1] and absmax [ceil(numel / blocksize)], both in row-major order of the
    weight, the nested buffers, bias: the same on every ISA and device.

    The CPU's form is a permutation: rows of 16 channels, the last ones filled up. Where a row is no whole number of
    blocks, and below 16 channels, it is the flat one, and the layer computes in fp32 whatever `compute` says.
    """

    quant_type: ClassVar[str]
    scheme: NF4 | FP4
    packed: Tensor
    absmax: Tensor

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
        numel = in_features * out_features
        blocks = -(-numel // self.blocksize)
        codes = torch.zeros((numel + 1) // 2, dtype=torch.uint8, device=device)
        scales = torch.zeros(blocks, device=device, dtype=torch.uint8 if self.double_quant else torch.float32)
        nested: tuple[Tensor, ...] = ()
        if self.double_quant:
            groups = -(-blocks // NESTED_BLOCKSIZE)
            nested = (
                torch.zeros(groups, dtype=torch.float32, device=device),
                dynamic_map().to(device or "cpu"),
                torch.zeros((), dtype=torch.float32, device=device),
            )
        self._take(codes, scales, nested)

    @property
    def blocksize(self) -> int:
        return self.scheme.blocksize

    @property
    def double_quant(self) -> bool:
        return self.scheme.double_quant

    def _take(self, codes: Tensor, scales: Tensor, nested: tuple[Tensor, ...]) -> None:
        """Takes over flat codes and scales."""
        self.register_buffer("packed", self._pack("weight", codes), persistent=False)
        self.register_buffer("absmax", self._pack("absmax", scales), persistent=False)
        for name, buffer in zip(NESTED, nested or (None,) * 3, strict=True):
            self.register_buffer(name, buffer)

    def _quantized(self, weight: Tensor) -> dict[str, Tensor | None]:
        codes, scales, nested = self._flat(weight)
        packed = {"packed": self._pack("weight", codes), "absmax": self._pack("absmax", scales)}
        return {**packed, **dict(zip(NESTED, nested or (None,) * 3, strict=True))}

    def _flat(self, weight: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Flat codes and scales of a float weight, and what doubly quantized scales stand for."""
        packed, absmax = torch.ops.pyqkern.quantize_4bit(weight.detach(), self.quant_type, self.blocksize)
        nested: tuple[Tensor, ...] = ()
        if self.double_quant and absmax.numel():
            absmax, *rest = quantize_absmax(absmax)
            nested = tuple(rest)
        elif self.double_quant:
            absmax, nested = absmax.to(torch.uint8), (absmax, dynamic_map().to(absmax.device), absmax.new_zeros(()))
        return packed, absmax, nested

    def _scales(self) -> Tensor:
        buffers: Any = self._buffers
        absmax: Tensor = buffers["absmax"]
        if absmax.dim() == 1 and buffers["packed"].dim() == 2:  # torch.func.functional_call puts a state_dict's there
            fits = absmax.numel() == -(-self.out_features * self.in_features // self.blocksize)
            return self._pack("absmax", absmax) if fits else absmax
        return absmax

    def _weight4bit(self, buffers: Buffers | None = None) -> Weight4bit:
        read: Any = buffers or self._buffers  # read directly: nn.Module's own way costs half a microsecond a name
        nested = (read["nested_absmax"], read["nested_map"], read["nested_offset"])
        shape, scales = (self.out_features, self.in_features), self._scales() if buffers is None else read["absmax"]
        return Weight4bit(read["packed"], scales, *nested, self.quant_type, self.blocksize, shape)

    _of_weight: ClassVar[tuple[str, ...]] = ("packed", "absmax", *NESTED)

    def _dequantize(self, buffers: Buffers | None = None) -> Tensor:
        weight = self._weight4bit(buffers)
        ids = torch.arange(self.out_features, device=weight.packed.device)
        return ops_four_bit.embedding_4bit(ids, weight, self.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        return ops_four_bit.embedding_4bit(ids, self._weight4bit(), self.dtype)

    def _linear(self, x: Tensor, bias: Tensor | None, buffers: Buffers | None = None) -> Tensor:
        return ops_four_bit.linear_4bit(x, self._weight4bit(buffers), bias, self.scheme.compute)

    def _seen(self, x: Tensor, buffers: Buffers | None = None) -> Tensor:
        n, k = self.out_features, self.in_features
        as_integers = self.scheme.compute in ("int8", "auto") and n >= PANEL and k % self.blocksize == 0 and k > 0
        return torch.ops.pyqkern.fake_quantize_rows(x, k, torch.uint8, True) if as_integers else x

    def _times_weight(self, grad: Tensor) -> Tensor:
        return grad_input_4bit(grad, self._weight4bit())

    # absmax first: where functional_call puts things back, it reads the weight, for which absmax has to be right.
    _packed: ClassVar[dict[str, str]] = {"absmax": "absmax", "weight": "packed"}

    def _plain(self, key: str) -> Tensor:
        sizes = (self.out_features, self.in_features, self.blocksize)
        if key == "weight":
            return torch.ops.pyqkern.unpack_4bit(self.packed, *sizes).unsqueeze(1)
        return kernels_of(self.absmax.device).unpack_scales(self._scales(), *sizes)

    def _pack(self, key: str, value: Tensor) -> Tensor:
        sizes = (self.out_features, self.in_features, self.blocksize)
        if key == "weight":
            return torch.ops.pyqkern.pack_4bit(value.reshape(-1), *sizes)
        return kernels_of(value.device).pack_scales(value.reshape(-1), *sizes)

    def _packed_shapes(self, key: str, kernels: Kernels) -> tuple[Shape, ...]:
        packed, absmax = kernels.packed_shapes_4bit(self.out_features, self.in_features, self.blocksize)
        return (packed if key == "weight" else absmax,)

    def _unpacked(self, key: str, kernels: Kernels, value: Tensor) -> Tensor:
        unpack = kernels.unpack_4bit if key == "weight" else kernels.unpack_scales
        return unpack(value, self.out_features, self.in_features, self.blocksize)

    def _expected(self) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        numel = self.out_features * self.in_features
        blocks = -(-numel // self.blocksize)
        expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
            "weight": (((numel + 1) // 2, 1), (torch.uint8,)),
            "absmax": ((blocks,), (torch.uint8 if self.double_quant else torch.float32,)),
            "bias": ((self.out_features,), FLOATS),
        }
        if self.double_quant:
            expected["nested_absmax"] = ((-(-blocks // NESTED_BLOCKSIZE),), (torch.float32,))
            expected["nested_map"] = ((256,), (torch.float32,))
            expected["nested_offset"] = ((), (torch.float32,))
        return expected


class NF4Linear(Linear4bit, scheme=NF4):
    """NF4 weights with one absmax per block of the flattened weight; `weight` and absmax equal bitsandbytes'."""

    quant_type = "nf4"


class FP4Linear(Linear4bit, scheme=FP4):
    """FP4 weights with one absmax per block of the flattened weight; `weight` and absmax equal bitsandbytes'."""

    quant_type = "fp4"


class Int4Linear(Linear4bit, scheme=Int4):
    """Uniform int4 weights, symmetric, one scale per group of in_features: absmax holds the scales, absmax / 7."""

    quant_type = "int4"
    scheme: Int4  # type: ignore[assignment]

    @property
    def blocksize(self) -> int:
        return self.scheme.group_size

    @property
    def double_quant(self) -> bool:
        return False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scheme: str | Scheme | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        group_size = self._own_scheme(scheme).group_size
        check_type("in_features", in_features, INT, "an int")
        if in_features % group_size:
            ways = [str(size) for size in (32, 64, 128) if in_features % size == 0]
            way = f"use {' or '.join(ways)}" if ways else 'use "nf4", whose blocks cross rows'
            raise ValueError(f"group_size must divide in_features={in_features}, got {group_size}; {way}")
        super().__init__(in_features, out_features, bias, scheme, device, dtype)

    def _flat(self, weight: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        return *torch.ops.pyqkern.quantize_int4(weight.detach(), self.blocksize), ()
