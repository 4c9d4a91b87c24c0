"""The decoder layer in plain torch: the specification of csrc/decoder.cpp and csrc/kernels/decoder.inl.

Every line of arithmetic is one rounding to fp32, and `fma` is one for both, so that the C++ has the same bits; only of
"gelu" it has a polynomial of its own. Where sums run, and in which order, is written down:

    sum64    norms, the sum of a softmax: 64 partial sums, element i in the (i % 64)th, then added by halves
    dot16    a score: sixteen chains of fma, element i in the (i % 16)th, then added by halves
    values   the context: one chain of fma over the keys that a query sees, by ascending position
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pyqkern.backends import DecoderForm, Weight4bit
from pyqkern.backends.reference.affine import fma
from pyqkern.backends.reference.four_bit import linear_4bit
from pyqkern.backends.reference.int8 import activate, int8_linear, int8_linear_weight_only
from pyqkern.backends.reference.recurrent import exp

# A float of the mask that is not above this masks its key.
MASKED = -1e4


def _halves(sums: Tensor) -> Tensor:
    """The sum over the last dimension, a power of two: the second half added to the first until one is left."""
    while sums.shape[-1] > 1:
        sums = sums[..., : sums.shape[-1] // 2] + sums[..., sums.shape[-1] // 2 :]
    return sums.squeeze(-1)


def sum64(x: Tensor) -> Tensor:
    """The sum over the last dimension, in 64 partial sums."""
    parts = x.new_zeros((*x.shape[:-1], 64))
    for part in functional.pad(x, (0, -x.shape[-1] % 64)).split(64, -1):
        parts = parts + part
    return _halves(parts)


def dot16(a: Tensor, b: Tensor) -> Tensor:
    """a [M, d], b [N, d] -> a @ b.T, [M, N], in sixteen chains of fma."""
    d = a.shape[-1]
    a, b = (functional.pad(t, (0, -d % 16)) for t in (a, b))
    total = a.new_zeros((a.shape[0], b.shape[0], 16))
    for of_a, of_b in zip(a.split(16, 1), b.split(16, 1), strict=True):
        total = fma(of_a.unsqueeze(1), of_b.unsqueeze(0), total)
    return _halves(total)


def _sqrt(x: Tensor) -> Tensor:
    """The correctly rounded one: torch's of fp32 errs by an ulp on some CPUs."""
    return x.double().sqrt().float()


def rms_norm(x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    """x * (1 / sqrt(mean(x**2) + eps)) * (weight + offset) over the last dimension."""
    inverse = 1 / _sqrt(sum64(x * x) / x.new_tensor(x.shape[-1]) + x.new_tensor(eps))
    return (x * inverse.unsqueeze(-1)) * (weight.float() + x.new_tensor(offset))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """((x - mean) * (1 / sqrt(variance + eps))) * weight + bias, the last two by fma."""
    n = x.new_tensor(x.shape[-1])
    centered = x - (sum64(x) / n).unsqueeze(-1)
    inverse = 1 / _sqrt(sum64(centered * centered) / n + x.new_tensor(eps))
    return fma(centered * inverse.unsqueeze(-1), weight.float(), bias.float())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [batch, length, heads, d], cos and sin [batch or 1, length, r] -> x with its first r elements rotated."""
    half = cos.shape[-1] // 2
    c, s = cos.float().unsqueeze(2), sin.float().unsqueeze(2)
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = (
        first * c[..., :half] - second * s[..., :half],
        second * c[..., half:] + first * s[..., half:],
    )
    return torch.cat([*turned, x[..., 2 * half :]], -1)


def activated(x: Tensor, activation: str) -> Tensor:
    """One of DECODER_ACTIVATIONS."""
    if activation == "silu":
        return x / (exp(-x) + 1)
    if activation != "gelu_tanh":
        return activate(x, activation)
    slope = x.new_tensor(0.79788456)
    u = x * fma(x * x, slope * x.new_tensor(0.044715), slope)
    return x / (exp(u * -2) + 1)


def attention(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, seen: Tensor, added: Sequence[Tensor]
) -> Tensor:
    """query [M, d], keys and values [T, d], seen bool and each of `added` fp32, [M, T] -> [M, d].

    score = query . key * scaling + added; p = e**(score - greatest), 0 of a key that is not seen; sum of p * value,
    times 1 / (sum of p). A row that sees no key is 0.
    """
    scores = dot16(query, keys) * query.new_tensor(scaling)
    for each in added:
        scores = scores + each
    scores = torch.where(seen, scores, -torch.inf)
    greatest = torch.where(scores.isnan(), -torch.inf, scores).amax(1, keepdim=True)
    p = torch.where(scores == -torch.inf, 0.0, exp(scores - greatest))
    context = torch.zeros_like(query)
    for j, value in enumerate(values):
        weight = p[:, j : j + 1].expand_as(context)
        context = torch.where(weight != 0, fma(weight, value.expand_as(context), context), context)
    total = sum64(p)
    return context * torch.where(total == 0, 0.0, 1 / total).unsqueeze(1)


def _seen(mask: Tensor | None, past: int, length: int, window: int) -> Tensor:
    """bool, [batch or 1, heads or 1, length, past + length]."""
    total = past + length
    if mask is not None:
        seen = mask if mask.dtype is torch.bool else ~(mask.float() <= MASKED)
        return seen[..., :total].expand(-1, -1, length, -1)
    key = torch.arange(total, device="cpu")
    query = torch.arange(past, total, device="cpu").unsqueeze(1)
    return ((key <= query) & (key > query - (window or total)))[None, None]


def _heads(query: Tensor, key: Tensor, value: Tensor, form: DecoderForm) -> tuple[Tensor, Tensor, Tensor]:
    heads = ((query, form.heads), (key, form.kv_heads), (value, form.kv_heads))
    query, key, value = (x.unflatten(-1, (n, form.head_size)) for x, n in heads)
    return query, key, value


def _inputs(rows: Tensor, form: DecoderForm, linear: Callable[[int, Tensor], Tensor], count: int) -> tuple[Tensor, ...]:
    """Query, key and value, [batch, length, heads, head_size], of `count` linears."""
    if count == 3:
        return _heads(linear(0, rows), linear(1, rows), linear(2, rows), form)
    fused = linear(0, rows)
    if form.interleaved:
        return fused.unflatten(-1, (form.heads, 3, form.head_size)).unbind(-2)
    key = form.kv_heads * form.head_size
    of_query, of_key, of_value = fused.split([form.heads * form.head_size, key, key], -1)
    return _heads(of_query, of_key, of_value, form)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, added: Sequence[Tensor], form: DecoderForm
) -> Tensor:
    """query [batch, length, heads, d], keys and values [batch, kv_heads, T, d] -> [batch, length, heads * d]."""
    context = torch.empty_like(query)
    shape = (query.shape[0], form.heads, query.shape[1], keys.shape[2])
    seen, added = seen.expand(shape), [each.expand(shape) for each in added]
    for b in range(query.shape[0]):
        for h in range(form.heads):
            kv = h * form.kv_heads // form.heads
            row, of_keys = query[b, :, h], (keys[b, kv].float(), values[b, kv].float())
            context[b, :, h] = attention(row, *of_keys, form.scaling, seen[b, h], [each[b, h] for each in added])
    return context.flatten(2)


def decoder_layer(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    past: int,
    mask: Tensor | None,
    position_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norms: Sequence[Tensor],
    nested: Sequence[Tensor],
    head_norms: Sequence[Tensor],
    form: DecoderForm,
) -> Tensor:
    """torch.ops.pyqkern.decoder_layer, with weights int8 [N, K], or flat codes of 4 bits and their absmax."""
    sizes = form.linears(len(weights), x.shape[-1])
    names = [name for name, _, _ in sizes]

    def linear(i: int, rows: Tensor) -> Tensor:
        if form.quant_type == "int8-weight-only":
            return int8_linear_weight_only(rows, weights[i], scales[i], biases[i])
        if form.is_int8:
            bits = 7 if form.quant_type == "int8-a7" else 8
            return int8_linear(rows, weights[i], scales[i], biases[i], "none", form.symmetric, bits)
        of_absmax = nested[3 * i : 3 * i + 3] or (None,) * 3
        weight = Weight4bit._make((weights[i], scales[i], *of_absmax, form.quant_type, form.blocksize, sizes[i][1:]))
        return linear_4bit(rows, weight, biases[i], "int8" if form.compute == "auto" else form.compute)

    def norm(i: int, rows: Tensor) -> Tensor:
        if len(norms) == 2:
            return rms_norm(rows, norms[i], form.norm_offset, form.eps)
        return layer_norm(rows, norms[2 * i], norms[2 * i + 1], form.eps)

    length, at = x.shape[1], names.index("output")
    hidden = x.float()
    query, key, value = _inputs(norm(0, hidden), form, linear, at)
    if head_norms:
        query, key = (rms_norm(x, w, form.norm_offset, form.eps) for x, w in zip((query, key), head_norms, strict=True))
    if cos is not None and sin is not None:
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    total = past + length
    keys[:, :, past:total] = key.transpose(1, 2)
    values[:, :, past:total] = value.transpose(1, 2)
    floats = [each for each in (position_bias, mask) if each is not None and each.dtype is not torch.bool]
    added = [each[..., :total].float() for each in floats]
    seen = _seen(mask, past, length, form.window)
    context = _attend(query, keys[:, :, :total], values[:, :, :total], seen, added, form)
    hidden = hidden + linear(at, context)
    rows = norm(1, hidden)
    if not form.gated:
        wide = activated(linear(at + 1, rows), form.activation)
    else:
        fused = len(names) - at == 3
        gate, up = linear(at + 1, rows).chunk(2, -1) if fused else (linear(at + 1, rows), linear(at + 2, rows))
        wide = activated(gate, form.activation) * up
    return (hidden + linear(len(names) - 1, wide)).to(x.dtype)
