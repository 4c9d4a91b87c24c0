"""Random encoder layers for the operator encoder_layer and for its specification."""

from typing import Any

import torch
from strategies import generator
from torch import Tensor, nn

from pyqkern import QLinear, choose_qparams_affine, quantize_affine
from pyqkern.backends.reference.encoder import encoder_layer as reference_layer
from pyqkern.schemes import Scheme

encoder_layer = torch.ops.pyqkern.encoder_layer


class Layer:
    """Random parts of a layer, packed for the operator and plain for the reference."""

    def __init__(
        self,
        seed: int = 0,
        hidden: int = 48,
        heads: int = 3,
        head_size: int = 16,
        wide: int = 80,
        dtype: torch.dtype = torch.float32,
        activation: str = "gelu",
        symmetric: bool = False,
        bias: bool = True,
        scheme: Scheme | None = None,
        bits: int = 8,
    ) -> None:
        g, width = generator(seed), heads * head_size
        self.hidden, self.dtype, self.heads = hidden, dtype, heads
        self.codes, self.packed, self.scales = [], [], []
        self.flat_scales = self.scales if scheme is None else []
        self.biases: list[Tensor] = []
        four, nested = ("int8-a7",) * (bits == 7), []
        sizes = [(width, hidden)] * 3 + [(hidden, width), (wide, hidden), (hidden, wide)]
        for n, k in sizes:
            weight = torch.randn(n, k, generator=g) * k**-0.5 * 2
            if scheme is None:
                scale, _ = choose_qparams_affine(weight, axis=0, symmetric=True)
                codes = quantize_affine(weight, scale, axis=0)
                packed = torch.ops.pyqkern.int8_pack(codes)
            else:
                linear = nn.Linear(k, n)
                linear.weight.data = weight
                quantized = QLinear.from_linear(linear, scheme)
                codes, packed, scale = quantized._plain("weight").view(-1), quantized.packed, quantized.absmax
                self.flat_scales.append(quantized._plain("absmax"))
                nested += [t for t in quantized._weight4bit()[2:5] if t is not None]
                four = (quantized.quant_type, quantized.blocksize, [width, wide], nested)
            self.codes.append(codes)
            self.packed.append(packed)
            self.scales.append(scale)
            self.biases.append((torch.randn(n, generator=g) * 0.1).to(dtype) if bias else torch.empty(0))
        norms = [1 + 0.1 * torch.randn(hidden, generator=g), 0.1 * torch.randn(hidden, generator=g)]
        self.norms = [norm.to(dtype) for norm in (norms * 2)]
        self.rest = (heads, head_size**-0.5, [1e-12, 1e-5], activation, symmetric or scheme is not None, *four)

    def input(self, batch: int, length: int, seed: int = 1) -> Tensor:
        return torch.randn(batch, length, self.hidden, generator=generator(seed)).to(self.dtype)

    def __call__(self, x: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        return encoder_layer(x, mask, self.packed, self.scales, self.biases, self.norms, *self.rest, **options)

    def reference(self, x: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        biases = [bias if bias.numel() else None for bias in self.biases]
        parts = (self.codes, self.flat_scales, biases, self.norms)
        return reference_layer(x, mask, *parts, *self.rest, **options)
