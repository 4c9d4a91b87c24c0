"""The encoder layer in plain torch: the specification of csrc/encoder.cpp, and the oracle of its tests.

Integer sums are exact there and here. Three things may differ by a rounding, and then move a code by one: 2**t in the
softmax, GELU, and the order of LayerNorm's sums.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyqkern.backends import FLT_MIN, Weight4bit, reference

LOG2_E = 1.44269504

# Of key j of a sentence: many small probabilities keep their sum, where rounding each for itself would lose them all.
DITHER = (torch.arange(64, dtype=torch.float32, device="cpu") * 39 % 64 + 0.5) / 64 - 0.5


def seen_keys(mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """bool [batch, length], the tokens that are no padding; None where the mask is more than padding.

    mask: [batch or 1, heads or 1, length or 1, length], bool (true: seen) or added to the scores (0, or -1e4 and less).
    """
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device="cpu")
    seen = mask if mask.dtype == torch.bool else mask == 0
    whole = seen if mask.dtype == torch.bool else seen | (mask <= -1e4)
    keys = seen[:, 0, 0]
    if not (seen == keys[:, None, None]).all() or (mask.dtype != torch.bool and not whole.all()):
        return None
    return keys.expand(batch, length)


def attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """One sentence: query, key, value fp32 [tokens, heads, d] -> [tokens, heads * d].

    Queries and keys are symmetric int8 per token and head, values symmetric int8 per head and channel, probabilities
    rint(255 * 2**(score - greatest) + DITHER), divided by their own sum. mask fp32 [1 or heads, tokens, tokens] is
    added.
    """
    tokens, heads, d = query.shape
    rows = tokens * heads
    q, q_scale, _ = reference.int8_quantize_rows(query.reshape(rows, d), True)
    k, k_scale, _ = reference.int8_quantize_rows(key.reshape(rows, d), True)
    q, k = (codes.double().view(tokens, heads, d).transpose(0, 1) - 128 for codes in (q, k))
    q_scale, k_scale = (scale.view(tokens, heads).T for scale in (q_scale, k_scale))
    scores = (q_scale[:, :, None] * (k_scale * (scaling * LOG2_E))[:, None]) * (q @ k.transpose(1, 2)).float()
    if mask is not None:
        scores = (scores + mask * LOG2_E).clamp(min=torch.finfo(torch.float32).min)
    probabilities = 255 * torch.exp2((scores - scores.amax(2, keepdim=True)).clamp(min=-30))
    codes = torch.round(probabilities + DITHER[torch.arange(tokens, device="cpu") % 64])
    absmax = value.abs().amax(0)  # [heads, d]
    v_scale = torch.where(absmax == 0, 1.0, (absmax / 127).clamp(min=FLT_MIN))
    v = torch.round(value * (1 / v_scale)).clamp(-127, 127)
    sums = (codes.double() @ v.transpose(0, 1).double()).float()
    context = (1 / codes.sum(2, keepdim=True) * v_scale[:, None]) * sums
    return context.transpose(0, 1).reshape(tokens, heads * d)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    z = x + residual
    z = z - z.mean(-1, keepdim=True)
    return z * (1 / torch.sqrt(z.square().mean(-1, keepdim=True) + eps)) * weight + bias


def encoder_layer(
    x: Tensor,
    mask: Tensor | None,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norms: Sequence[Tensor],
    heads: int,
    scaling: float,
    eps: Sequence[float],
    activation: str,
    symmetric: bool,
    quant_type: str = "int8",
    blocksize: int = 0,
    features: Sequence[int] = (),
    nested: Sequence[Tensor] | None = None,
    position_bias: Tensor | None = None,
    factors: Sequence[Tensor] | None = None,
) -> Tensor:
    """As torch.ops.pyqkern.encoder_layer, with weights int8 [N, K], or flat codes of 4 bits and their absmax."""

    def linear(i: int, rows: Tensor, act: str = "none") -> Tensor:
        if quant_type not in ("int8", "int8-a7"):
            n = features[0] if i < 3 else features[1] if i == 4 else x.shape[-1]
            of_absmax = nested[3 * i : 3 * i + 3] if nested else (None,) * 3
            shape = (n, rows.shape[-1])
            weight = Weight4bit._make((weights[i], scales[i], *of_absmax, quant_type, blocksize, shape))
            return reference.activate(reference.linear_4bit(rows, weight, biases[i], "int8"), act)
        return reference.int8_linear(
            rows, weights[i], scales[i], biases[i], act, symmetric, 7 if quant_type == "int8-a7" else 8
        )

    batch, length, _ = x.shape
    seen = seen_keys(mask, batch, length)
    general = None
    if seen is None:
        assert mask is not None
        lowest = torch.finfo(torch.float32).min
        general = torch.where(mask, 0.0, lowest) if mask.dtype == torch.bool else mask.float()
        general = general.expand(batch, mask.shape[1], length, length)
        seen = torch.ones(batch, length, dtype=torch.bool, device="cpu")
    norms = [norm.float() for norm in norms]
    y = torch.zeros_like(x)
    for b in range(batch):
        rows = x[b, seen[b]].float()
        if not len(rows):
            continue
        into, into_up = factors or (1.0, 1.0)
        query, key, value = (linear(i, rows * into).view(len(rows), heads, -1) for i in range(3))
        added = None if general is None else general[b]
        if position_bias is not None:
            bias = position_bias.expand(batch, -1, length, length)[b].float()[:, seen[b]][:, :, seen[b]]
            added = bias if added is None else added + bias
        context = attention(query, key, value, scaling, added)
        hidden = add_layer_norm(linear(3, context), rows, norms[0], norms[1], eps[0])
        wide = linear(4, hidden * into_up, activation)
        y[b, seen[b]] = add_layer_norm(linear(5, wide), hidden, norms[2], norms[3], eps[1]).to(x.dtype)
    return y
