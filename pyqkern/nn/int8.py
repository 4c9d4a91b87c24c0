"""The linears with INT8 weights: Int8Linear, and those with static, float or partly float activations."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from pyqkern.backends import FLT_MIN, INT8_LINEAR_MAX_K, Kernels, Shape, qrange, reference
from pyqkern.nn.linear import Buffers, QLinear
from pyqkern.ops import int8 as ops_int8
from pyqkern.ops.checks import FLOATS, INT
from pyqkern.ops.registry import kernels_of
from pyqkern.schemes import Int8, Int8Outlier, Int8Static, Int8WeightOnly, Range, check_type

TALLEST_SPLIT = 16  # rows to a column


def least_error_scale(weight: Tensor, scale: Tensor) -> Tensor:
    """Of scale * 1.00, 0.99, ... 0.30, for each output channel that whose quantization errs least, in squares summed.

    weight [out_features, in_features], scale fp32 [out_features] = absmax / 127. Ties go to the greater scale.
    """
    best, least = scale, torch.full_like(scale, torch.inf)
    for percent in range(100, 29, -1):
        candidate = (scale * (percent / 100)).clamp(min=FLT_MIN)
        codes = (weight.float() * (1 / candidate)[:, None]).round().clamp(-127, 127)
        error = (codes * candidate[:, None] - weight.float()).square().sum(1)
        best, least = torch.where(error < least, candidate, best), torch.minimum(error, least)
    return best


class Int8Linear(QLinear, scheme=Int8):
    """INT8 weights with one scale per output channel, INT8 activations quantized per token inside the operator.

    weight = weight_scale[n] * q[n, k], q = rint(w / scale) in [-127, 127], scale = absmax / 127 (1 for a row of zeros).

    Buffers: packed, the q as the device's kernels take them (not saved); weight_scale fp32 [out_features].
    state_dict: weight int8 [out_features, in_features], weight_scale, bias: the same on every ISA and device.
    """

    scheme: Int8
    packed: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scheme: str | Int8 | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        own = self._own_scheme(scheme)
        check_type("in_features", in_features, INT, "an int")
        if in_features > INT8_LINEAR_MAX_K:
            raise ValueError(
                f"in_features must be at most {INT8_LINEAR_MAX_K} for int8 (255 * 127 * in_features < 2**31), "
                f"got {in_features}; keep the layer in float"
            )
        super().__init__(in_features, out_features, bias, own, device, dtype)
        weight = torch.zeros((out_features, in_features), dtype=torch.int8, device=device)
        self.register_buffer("packed", self._pack("weight", weight), persistent=False)
        self.register_buffer("weight_scale", torch.ones(out_features, device=device, dtype=torch.float32))

    def _quantized(self, weight: Tensor) -> dict[str, Tensor | None]:
        # Operators, not functions: this and _dequantize run inside of compiled graphs.
        scale = None
        if self.scheme.clip_weights:
            absmax, _ = torch.ops.pyqkern.choose_qparams_affine(weight, torch.int8, (0,), None, True)
            scale = least_error_scale(weight, absmax)
        packed, scale = torch.ops.pyqkern.int8_quantize_weight(weight, scale, self._may_split)
        return {"packed": packed, "weight_scale": scale}

    _of_weight: ClassVar[tuple[str, ...]] = ("packed", "weight_scale")

    def _dequantize(self, buffers: Buffers | None = None) -> Tensor:
        read: Any = buffers or self._buffers
        codes = torch.ops.pyqkern.int8_unpack(read["packed"], self.out_features, self.in_features)
        return torch.ops.pyqkern.dequantize_affine(codes, read["weight_scale"], None, (0,), None, self.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        return torch.ops.pyqkern.int8_embedding(ids, self.packed, self.weight_scale, self.in_features, self.dtype)

    def _scales(self) -> Tensor:
        return cast(Tensor, self._buffers["weight_scale"])

    def _linear(self, x: Tensor, bias: Tensor | None, buffers: Buffers | None = None) -> Tensor:
        read: Any = buffers or self._buffers  # read directly: nn.Module's own way costs half a microsecond a name
        how = (self.scheme.symmetric, self.scheme.activation_bits)
        return ops_int8.int8_linear(x, read["packed"], read["weight_scale"], bias, "none", *how)

    def _seen(self, x: Tensor, buffers: Buffers | None = None) -> Tensor:
        scheme = self.scheme
        how = (self.in_features, torch.uint8, scheme.symmetric, scheme.activation_bits)
        return torch.ops.pyqkern.fake_quantize_rows(x, *how) if self.in_features else x

    def _times_weight(self, grad: Tensor) -> Tensor:
        return torch.ops.pyqkern.int8_grad_input.default(grad, self.packed, self.weight_scale, self.in_features)

    _packed: ClassVar[dict[str, str]] = {"weight": "packed"}

    def _plain(self, key: str) -> Tensor:
        return torch.ops.pyqkern.int8_unpack(self.packed, self.out_features, self.in_features)

    def _pack(self, key: str, value: Tensor) -> Tensor:
        return torch.ops.pyqkern.int8_pack(value, self._may_split and kernels_of(value.device).splits())

    @property
    def _may_split(self) -> bool:
        """Whether the packed weight may take an eighth more memory, which the product of many rows of 8 bits repays.

        The table of an embedding is much taller than it is wide: without a product nothing is repaid.
        """
        bits = getattr(self.scheme, "activation_bits", 8)
        return bits == 8 and self.out_features <= TALLEST_SPLIT * self.in_features

    def _packed_shapes(self, key: str, kernels: Kernels) -> tuple[Shape, ...]:
        return tuple(kernels.packed_shape(self.out_features, self.in_features, split) for split in (False, True))

    def _unpacked(self, key: str, kernels: Kernels, value: Tensor) -> Tensor:
        return kernels.int8_unpack(value, self.out_features, self.in_features)

    def _expected(self) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        return {
            "weight": ((self.out_features, self.in_features), (torch.int8,)),
            "weight_scale": ((self.out_features,), (torch.float32,)),
            "bias": ((self.out_features,), FLOATS),
        }


class Int8StaticLinear(Int8Linear, scheme=Int8Static):
    """Int8Linear whose activations all have one scale and zero point, known beforehand: no pass for their range.

    Buffers beside those of Int8Linear, both saved: input_scale fp32 [1], input_zero_point int32 [1].
    Values beyond the calibrated range saturate.
    """

    scheme: Int8Static  # type: ignore[assignment]
    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scheme: str | Int8Static | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        described = replace(self._own_scheme(scheme), ranges=None)
        super().__init__(in_features, out_features, bias, described, device, dtype)
        self.register_buffer("input_scale", torch.ones(1, dtype=torch.float32, device=device))
        self.register_buffer("input_zero_point", torch.zeros(1, dtype=torch.int32, device=device))

    def _calibrate(self, ranges: Mapping[str, Range]) -> None:
        if list(ranges) != [""]:
            raise ValueError(
                f"ranges must hold the one entry '' for a single linear, got {list(ranges)[:4]}; "
                'use ranges={"": ranges[name]}, or replace_linear on the model'
            )
        bounds = ranges[""]
        if bounds.lo.numel() != 1:
            raise ValueError(
                f"int8-static takes one range per tensor, got one per channel ({bounds.lo.numel()}); "
                "calibrate with per_channel=False"
            )
        lo, hi = bounds.lo.reshape(1), bounds.hi.reshape(1)
        scale, zero_point = reference.qparams_from_range(lo, hi, torch.uint8, False, self.scheme.activation_bits)
        device = self.packed.device
        self.input_scale, self.input_zero_point = scale.to(device), zero_point.to(device)

    def _linear(self, x: Tensor, bias: Tensor | None, buffers: Buffers | None = None) -> Tensor:
        read: Any = buffers or self._buffers
        weight = (read["packed"], read["weight_scale"], bias)
        how = (read["input_scale"], read["input_zero_point"], self.scheme.activation_bits)
        return ops_int8.int8_linear_static(x, *weight, "none", *how)

    def _seen(self, x: Tensor, buffers: Buffers | None = None) -> Tensor:
        read: Any = buffers or self._buffers
        how = (read["input_scale"], read["input_zero_point"], *qrange(torch.uint8, self.scheme.activation_bits))
        return torch.ops.pyqkern.fake_quantize(x, self.in_features, *how) if self.in_features else x

    def _load_problems(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        problems = super()._load_problems(state_dict, prefix)
        scale, zero = (state_dict.get(prefix + name) for name in ("input_scale", "input_zero_point"))
        if scale is not None:
            fits = tuple(scale.shape) == (1,) and scale.dtype is torch.float32
            if not fits or (not scale.is_meta and not 0 < scale.item() < float("inf")):
                problems.append(f"{prefix}input_scale must be one float32 > 0 and finite, got {_said(scale)}")
        if zero is not None:
            fits = tuple(zero.shape) == (1,) and zero.dtype is torch.int32
            _, top = qrange(torch.uint8, self.scheme.activation_bits)
            if not fits or (not zero.is_meta and not 0 <= zero.item() <= top):
                problems.append(f"{prefix}input_zero_point must be one int32 within [0, {top}], got {_said(zero)}")
        return problems


def _said(tensor: Tensor) -> str:
    what = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    return what if tensor.numel() != 1 or tensor.is_meta else f"{what} with {tensor.item()}"


class Int8WeightOnlyLinear(Int8Linear, scheme=Int8WeightOnly):
    """INT8 weights, which are expanded piece by piece in the product; x is not quantized.

    y = (x @ q.T) * weight_scale + bias in fp32, rounded to x's dtype once. On CUDA torch's product in x's dtype, with a
    dequantized copy of the weight.
    """

    scheme: Int8WeightOnly  # type: ignore[assignment]
    _may_split = False

    def _linear(self, x: Tensor, bias: Tensor | None, buffers: Buffers | None = None) -> Tensor:
        read: Any = buffers or self._buffers
        return ops_int8.int8_linear_weight_only(x, read["packed"], read["weight_scale"], bias)

    def _seen(self, x: Tensor, buffers: Buffers | None = None) -> Tensor:
        return x


class Int8OutlierLinear(Int8Linear, scheme=Int8Outlier):
    """Int8Linear except for the input columns that hold a magnitude above the threshold, which go through float."""

    scheme: Int8Outlier  # type: ignore[assignment]

    def _linear(self, x: Tensor, bias: Tensor | None, buffers: Buffers | None = None) -> Tensor:
        read: Any = buffers or self._buffers
        how = (self.scheme.threshold, self.scheme.symmetric)
        return torch.ops.pyqkern.int8_linear_outlier.default(x, read["packed"], read["weight_scale"], bias, *how)
