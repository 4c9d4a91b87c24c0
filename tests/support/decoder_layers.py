"""Random decoder layers for the operator decoder_layer and for its specification."""

import torch
from strategies import generator
from torch import Tensor, nn

from pyqkern import QLinear, choose_qparams_affine, quantize_affine
from pyqkern.backends import DecoderForm
from pyqkern.backends.reference.decoder import decoder_layer as reference_layer
from pyqkern.ops import decoder
from pyqkern.schemes import FP4, NF4, Int4, Scheme

decoder_layer = torch.ops.pyqkern.decoder_layer

SCHEMES: dict[str, tuple[str | Scheme, bool, str]] = {
    "int8": ("int8", False, "auto"),
    "int8-symmetric": ("int8", True, "auto"),
    "int8-a7": ("int8-a7", False, "auto"),
    "int8-weight-only": ("int8-weight-only", False, "auto"),
    "nf4": (NF4(blocksize=32), True, "int8"),
    "nf4-nested": (NF4(blocksize=32, double_quant=True), True, "auto"),
    "fp4-fp32": (FP4(blocksize=32), True, "fp32"),
    "int4": (Int4(group_size=32), True, "int8"),
    "int4-fp32": (Int4(group_size=32), True, "fp32"),
}  # the scheme, symmetric, compute


class Layer:
    """Random parts of a layer, packed for the operator and plain for the reference."""

    def __init__(
        self,
        seed: int = 0,
        hidden: int = 64,
        heads: int = 4,
        kv_heads: int = 2,
        head_size: int = 16,
        wide: int = 96,
        scheme: str = "int8",
        *,
        dtype: torch.dtype = torch.float32,
        activation: str = "silu",
        gated: bool = True,
        fused: bool = False,
        interleaved: bool = False,
        bias: bool = False,
        layer_norm: bool = False,
        head_norms: bool = False,
        norm_offset: float = 0.0,
        window: int = 0,
    ) -> None:
        g = generator(seed)
        what, symmetric, compute = SCHEMES[scheme]
        quant_type, blocksize = (what, 0) if isinstance(what, str) else (what.name, what.blocksize)  # type: ignore[attr-defined]
        self.form = DecoderForm(
            heads, kv_heads, head_size, wide, head_size**-0.5, 1e-6, activation, gated, quant_type, symmetric, compute,
            blocksize, norm_offset, interleaved, window,
        )  # fmt: skip
        self.hidden, self.dtype = hidden, dtype
        inputs, first = (1 if fused or interleaved else 3), (1 if fused or not gated else 2)
        self.codes, self.packed, self.scales, self.flat_scales = [], [], [], []
        self.biases: list[Tensor] = []
        self.nested: list[Tensor] = []
        for _, n, k in self.form.linears(inputs + first + 2, hidden):
            weight = torch.randn(n, k, generator=g) * k**-0.5 * 2
            if isinstance(what, str):
                scale, _ = choose_qparams_affine(weight, axis=0, symmetric=True)
                codes = quantize_affine(weight, scale, axis=0)
                packed = torch.ops.pyqkern.int8_pack(codes, n % 32 == 0)
                self.flat_scales.append(scale)
            else:
                linear = nn.Linear(k, n)
                linear.weight.data = weight
                quantized = QLinear.from_linear(linear, what)
                codes, packed, scale = quantized._plain("weight").view(-1), quantized.packed, quantized.absmax
                self.flat_scales.append(quantized._plain("absmax"))
                self.nested += [t for t in quantized._weight4bit()[2:5] if t is not None]
            self.codes.append(codes)
            self.packed.append(packed)
            self.scales.append(scale)
            self.biases.append((torch.randn(n, generator=g) * 0.1).to(dtype) if bias else torch.empty(0))

        def vector(n: int) -> Tensor:
            return (1 - norm_offset + 0.1 * torch.randn(n, generator=g)).to(dtype)

        self.norms = [vector(hidden) for _ in range(4 if layer_norm else 2)]
        self.head_norms = [vector(head_size) for _ in range(2)] if head_norms else []

    def input(self, batch: int, length: int, seed: int = 1) -> Tensor:
        return torch.randn(batch, length, self.hidden, generator=generator(seed)).to(self.dtype)

    def cache(
        self, batch: int, capacity: int, seed: int = 2, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        shape = (2, batch, self.form.kv_heads, capacity, self.form.head_size)
        keys, values = torch.randn(shape, generator=generator(seed)).to(dtype or self.dtype)
        return keys, values

    def rotary(self, past: int, length: int, dims: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """cos and sin [1, length, dims] of positions past, past + 1, ..."""
        frequency = 10000.0 ** (-torch.arange(0, dims, 2) / dims)
        angle = torch.outer(torch.arange(past, past + length), frequency).repeat(1, 2)
        return angle.cos()[None].to(dtype), angle.sin()[None].to(dtype)

    def __call__(
        self, x: Tensor, keys: Tensor, values: Tensor, past: int = 0, mask: Tensor | None = None,
        cos: Tensor | None = None, sin: Tensor | None = None, position_bias: Tensor | None = None,
        position: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return decoder_layer(
            x, mask, keys, values, past, cos, sin, self.packed, self.scales, self.biases, self.norms,
            *self.form[:12], self.nested, position_bias, position, self.head_norms, *self.form[12:],
        )  # fmt: skip

    def layer(self) -> decoder.Layer:
        """For the short way."""
        biases = [bias if bias.numel() else None for bias in self.biases]
        parts = decoder.Parts(self.packed, self.scales, biases, self.norms, self.nested, self.head_norms)
        return decoder.layer_of(parts, self.form)

    def reference(
        self, x: Tensor, keys: Tensor, values: Tensor, past: int = 0, mask: Tensor | None = None,
        cos: Tensor | None = None, sin: Tensor | None = None, position_bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        biases = [bias if bias.numel() else None for bias in self.biases]
        return reference_layer(
            x, keys, values, past, mask, position_bias, cos, sin, self.codes, self.flat_scales, biases, self.norms,
            self.nested, self.head_norms, self.form,
        )  # fmt: skip
