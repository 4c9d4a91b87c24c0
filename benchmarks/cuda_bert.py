"""BERT's encoder in plain torch and with pyqkern's kernels, for bench_cuda.py, which needs no transformers."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Linear(nn.Module):
    """nn.Linear's arithmetic by one of pyqkern's kernels."""

    def __init__(self, kernels: SimpleNamespace, linear: nn.Linear, scheme: str) -> None:
        super().__init__()
        self.kernels, self.scheme, self.bias, self.n = kernels, scheme, linear.bias, linear.out_features
        weight = linear.weight.detach()
        if scheme == "nf4":
            self.packed, self.scale = self.kernels.four_bit.quantize_4bit(weight, "nf4", 64)
        else:
            self.scale = weight.float().abs().amax(1) / 127
            self.packed = self.kernels.int8.int8_pack((weight.float() / self.scale[:, None]).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if self.scheme == "nf4":
            weight = (self.packed, self.scale, None, None, None)
            y = self.kernels.four_bit.linear_4bit(flat, *weight, self.bias, "nf4", 64, self.n, "auto")
        else:
            y = self.kernels.int8.int8_linear(flat, self.packed, self.scale, self.bias, "none", False)
        return y.view(*x.shape[:-1], self.n)

    def quantized(self, rows: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
        """The same from rows that are quantized already."""
        return self.kernels.int8.int8_scaled_matmul(*rows, self.packed, self.scale, self.bias, "none", self.bias.dtype)


class Layer(nn.Module):
    """One encoder layer of BERT, post-LayerNorm."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, shape: tuple[int, int]) -> Tensor:
        q, k, v = (t.view(*shape, self.heads, -1).transpose(1, 2) for t in (query, key, value))
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*shape, -1)

    def forward(self, x: Tensor) -> Tensor:
        attention = self.attend(self.query(x), self.key(x), self.value(x), (x.shape[0], x.shape[1]))
        x = self.norm1(x + self.out(attention))
        return self.norm2(x + self.down(functional.gelu(self.up(x))))


class FusedLayer(nn.Module):
    """The same with INT8 linears whose inputs are quantized by the LayerNorm or GELU before them."""

    def __init__(self, layer: Layer, kernels: SimpleNamespace) -> None:
        super().__init__()
        self.layer, self.rows = layer, kernels.row_quantize

    def norm(self, norm: nn.LayerNorm, x: Tensor, residual: Tensor) -> tuple[Tensor, Any]:
        y, *rows = self.rows.layer_norm_quantize_rows(x, norm.weight, norm.bias, norm.eps, False, residual)
        return y, tuple(rows)

    def forward(self, state: tuple[Tensor, Any, tuple[int, int]]) -> tuple[Tensor, Any, tuple[int, int]]:
        (x, rows, shape), layer = state, self.layer
        query, key, value = (linear.quantized(rows) for linear in (layer.query, layer.key, layer.value))
        attention = layer.attend(query, key, value, shape).view(x.shape)
        x, rows = self.norm(layer.norm1, layer.out(attention), x)
        rows = self.rows.gelu_quantize_rows(layer.up.quantized(rows), False)
        x, rows = self.norm(layer.norm2, layer.down.quantized(rows), x)
        return x, rows, shape


SCHEMES = ("bf16", "int8", "int8, fused", "nf4")


class Encoder(nn.Module):
    """Layers with random weights, all linears by the scheme, one of SCHEMES; [batch, length, hidden] -> the same."""

    def __init__(
        self, kernels: SimpleNamespace, scheme: str, hidden: int, heads: int, layers: int,
        device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kernels, self.fused = kernels, scheme == "int8, fused"
        self.layers = nn.ModuleList(Layer(hidden, heads) for _ in range(layers)).to(device, dtype)
        for layer in self.layers if scheme != "bf16" else ():
            for name, module in list(layer.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(layer, name, Linear(kernels, module, scheme.removesuffix(", fused")))
        if self.fused:
            self.layers = nn.ModuleList(FusedLayer(layer, kernels) for layer in self.layers)

    def forward(self, x: Tensor) -> Tensor:
        if not self.fused:
            for layer in self.layers:
                x = layer(x)
            return x
        flat = x.view(-1, x.shape[-1])
        state = (flat, self.kernels.row_quantize.quantize_rows(flat, False), x.shape[:2])
        for layer in self.layers:
            state = layer(state)
        return state[0].view(x.shape)
