"""The C++ kernels, behind the functions of `pyqkern.backends.Kernels`.

C++ takes plain tensors and checks all of them, dtypes, device, contiguity and shapes, before it releases the GIL: no
call of `pyqkern._C` reads or writes past a tensor. Only the linears, the encoder layer and recurrent layers do not ask
whether a storage was resized to less than its tensor. It uses torch's own OpenMP pool.

Memory is asked for by `new_empty`, or by name of the device: torch's default device may be another.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyqkern import _C
from pyqkern.backends import (
    ACTIVATIONS,
    GATES,
    OPTIMIZERS,
    PANEL,
    STRIP,
    DecoderForm,
    Shape,
    Sizes,
    StepNumbers,
    Weight4bit,
    Weight8bit,
)
from pyqkern.backends.reference.four_bit import CODEBOOKS, block_scales, nested_scales, plain, slice_nested
from pyqkern.backends.reference.four_bit import slice_4bit as slice_flat
from pyqkern.backends.reference.optimizer import map_lines
from pyqkern.schemes import COMPUTE

_exchange: Any = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # torch >= 2.10
READS_FAST: bool = _C.use_torch(Tensor, torch.nn.Parameter, torch._C._to_dlpack, torch.get_num_threads, _exchange)

ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def min_max(x: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    channels = sizes[1]
    lo, hi = x.new_empty((2, channels), dtype=torch.float32).unbind()
    _C.min_max(x, *sizes, lo, hi)
    return lo, hi


def quantize(
    x: Tensor, sizes: Sizes, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype, fused: bool, bits: int
) -> Tensor:
    q = torch.empty_like(x, dtype=dtype)
    _C.quantize(x, scale, zero_point, *sizes, fused, q, bits)
    return q


def dequantize(q: Tensor, sizes: Sizes, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = torch.empty_like(q, dtype=dtype)
    _C.dequantize(q, scale, zero_point, *sizes, y)
    return y


def int8_matmul(a: Tensor, w: Tensor) -> Tensor:
    y = a.new_empty((a.shape[0], w.shape[0]), dtype=torch.int32)
    _C.int8_matmul(a, w, y)
    return y


# ---- INT8


def packed_shape(n: int, k: int, split: bool = False) -> Shape:
    """[panel][k / 4][16 channels of 4 k]; the last lines of a panel hold what `reference.panels` says.

    split: with room for the excess of csrc's kernels.h behind all panels, where k is neither too small nor too large.
    """
    quads, segments = (k + 3) // 4, (k + 255) // 256
    lines = quads + 2 + (quads // 2 + 511) // 512
    if split and 256 <= k <= 4096:
        lines += 1 + (PANEL * segments + 2 * ((k // 2 + 320) // 4 * 4) + 63) // 64
    return ((n + PANEL - 1) // PANEL, lines, 4 * PANEL)


def splits() -> bool:
    return _C.splits()


def int8_pack(weight: Tensor, split: bool = False) -> Tensor:
    n, k = weight.shape
    packed = weight.new_empty(packed_shape(n, k, split))
    _C.pack_int8(weight, packed)
    return packed


def int8_unpack(packed: Tensor, n: int, k: int) -> Tensor:
    weight = packed.new_empty((n, k))
    _C.unpack_int8(packed, weight)
    return weight


def int8_rows(packed: Tensor, n: int, k: int, rows: Tensor) -> Tensor:
    codes = packed.new_empty((rows.numel(), k))
    _C.int8_gather(packed, n, rows, codes)
    return codes


def int8_slice(packed: Tensor, n: int, k: int, begin: int, end: int) -> Tensor:
    shape = packed_shape(n, k)  # what is behind these panels is the excess of a split one
    return packed.view(-1)[: math.prod(shape)].view(shape)[begin // PANEL : end // PANEL]


def int8_linear(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    symmetric: bool,
    bits: int = 8,
) -> Tensor:
    y = x.new_empty((*x.shape[:-1], weight_scale.shape[0]))
    _C.int8_linear(x, packed, weight_scale, bias, y, ACTIVATION_CODES[activation], symmetric, bits)
    return y


def int8_linear_static(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    input_scale: Tensor,
    input_zero_point: Tensor,
    bits: int = 8,
) -> Tensor:
    y = x.new_empty((*x.shape[:-1], weight_scale.shape[0]))
    code = ACTIVATION_CODES[activation]
    _C.int8_linear(x, packed, weight_scale, bias, y, code, False, bits, input_scale, input_zero_point)
    return y


def int8_linear_weight_only(x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    y = x.new_empty((*x.shape[:-1], weight_scale.shape[0]))
    _C.int8_linear_weight_only(x, packed, weight_scale, bias, y)
    return y


def int8_grad_input(grad: Tensor, packed: Tensor, weight_scale: Tensor, k: int) -> Tensor:
    y = grad.new_empty((*grad.shape[:-1], k))
    _C.int8_grad_input(grad, packed, weight_scale, y)
    return y


# ---- 4 bits

# "auto" multiplies integers: measured, that is the fastest way for every number of rows on every ISA.
AS_INT8 = ("int8", "auto")

_BOOKS: dict[str, int] = {name: _C.add_codebook(book.record) for name, book in CODEBOOKS.items()}


def in_panels(n: int, k: int, blocksize: int) -> bool:
    """Whether a weight [n, k] is stored in panels, which the integer kernels need: in_panels of the C++."""
    return n >= PANEL and k % blocksize == 0


def packed_shapes_4bit(n: int, k: int, blocksize: int) -> tuple[Shape, Shape]:
    """Flat ones have one dimension; those in panels, whose last rows are filled up, have two."""
    if not in_panels(n, k, blocksize):
        return ((n * k + 1) // 2,), (-(-n * k // blocksize),)
    panels = -(-n // PANEL)
    return (panels, PANEL * k // 2), (panels, PANEL * k // blocksize)


def pack_4bit(packed: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    if not in_panels(n, k, blocksize):
        return packed.clone()
    panels = packed.new_empty(packed_shapes_4bit(n, k, blocksize)[0])
    _C.pack_4bit(packed, n, k, panels)
    return panels


def unpack_4bit(packed: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    if not in_panels(n, k, blocksize):
        return packed.clone()
    flat = packed.new_empty(n * k // 2)
    _C.unpack_4bit(packed, n, k, flat)
    return flat


def pack_scales(absmax: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    """[n, k / blocksize], flat -> [strip][k / blocksize][panel][16]: csrc's kernels.h."""
    if not in_panels(n, k, blocksize):
        return absmax.clone()
    rows = functional.pad(absmax.view(n, k // blocksize), (0, 0, 0, -n % PANEL))
    strips = torch.cat([strip.t().reshape(-1) for strip in rows.split(STRIP)])
    return strips.view(packed_shapes_4bit(n, k, blocksize)[1])


def unpack_scales(absmax: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    if not in_panels(n, k, blocksize):
        return absmax.clone()
    blocks = k // blocksize
    if n % STRIP == 0:
        return absmax.view(n // STRIP, blocks, STRIP).transpose(1, 2).reshape(-1)
    strips = absmax.view(-1).split(blocks * STRIP)
    return torch.cat([strip.view(blocks, -1).t().reshape(-1) for strip in strips])[: n * blocks]


def quantize_4bit(x: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    numel = x.numel()
    packed = x.new_empty((numel + 1) // 2, dtype=torch.uint8)
    absmax = x.new_empty(-(-numel // blocksize), dtype=torch.float32)
    _C.quantize_4bit(x, blocksize, _BOOKS[quant_type], packed, absmax)
    return packed, absmax


def dequantize_4bit(weight: Weight4bit, dtype: torch.dtype) -> Tensor:
    y = weight.packed.new_empty(tuple(weight.shape), dtype=dtype)
    _C.dequantize_4bit(*weight[:5], weight.blocksize, _BOOKS[weight.quant_type], y)
    return y


def linear_4bit(x: Tensor, weight: Weight4bit, bias: Tensor | None, compute: str) -> Tensor:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    _C.linear_4bit(x, *weight[:5], bias, y, _BOOKS[weight.quant_type], weight.blocksize, compute in AS_INT8)
    return y


def grad_input_4bit(grad: Tensor, weight: Weight4bit) -> Tensor:
    y = grad.new_empty((*grad.shape[:-1], weight.shape[1]))
    _C.grad_input_4bit(grad, *weight[:5], y, _BOOKS[weight.quant_type], weight.blocksize)
    return y


def rows_4bit(weight: Weight4bit, rows: Tensor, dtype: torch.dtype) -> Tensor:
    n, k = weight.shape
    if in_panels(n, k, weight.blocksize):
        return dequantize_4bit(_gather_panels(weight, rows), dtype)
    y = weight.packed.new_empty((rows.numel(), k), dtype=dtype)
    book = _BOOKS[weight.quant_type]
    _C.dequantize_rows_4bit(weight.packed, block_scales(weight), n, weight.blocksize, book, rows, y)
    return y


def _gather_panels(weight: Weight4bit, rows: Tensor) -> Weight4bit:
    """weight[rows], flat."""
    (n, k), m = weight.shape, rows.numel()
    each = k // weight.blocksize
    codes = weight.packed.new_empty(m * k // 2)
    scales = weight.absmax.new_empty((m, each))
    _C.gather_4bit(weight.packed, weight.absmax, n, k, weight.blocksize, rows, codes, scales)
    if weight.nested_absmax is not None:
        blocks = rows.unsqueeze(1) * each + torch.arange(each, device=rows.device, dtype=torch.int64)
        scales = nested_scales(scales, blocks, weight)
    return plain(codes, scales.view(-1), weight, (m, k))


def slice_4bit(weight: Weight4bit, begin: int, end: int) -> Weight4bit:
    n, k = weight.shape
    if not in_panels(n, k, weight.blocksize):
        return slice_flat(weight, begin, end)
    panels = slice(begin // PANEL, end // PANEL)
    return slice_nested(weight, weight.packed[panels], weight.absmax[panels], begin, end)


# ---- the gate of experts

_GATE_CODES = {"silu": 5, "gelu": 1, "gelu_tanh": 6}  # Elementwise of csrc's kernels.h


def gate(h: Tensor, activation: str) -> Tensor:
    y = h.new_empty((h.shape[0], h.shape[1] // 2))
    _C.gate(_GATE_CODES[activation], h, y)
    return y


# ---- the encoder layer, which no other backend has


def encoder_layer(
    x: Tensor,
    mask: Tensor | None,
    position_bias: Tensor | None,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    nested: Sequence[Tensor],
    norms: Sequence[Tensor],
    factors: Sequence[Tensor],
    features: Sequence[int],
    heads: int,
    eps: Sequence[float],
    scaling: float,
    activation: str,
    symmetric: bool,
    bits: int,
    quant_type: str | None,
    blocksize: int,
) -> Tensor:
    """features: rows of the query's weight and of the feed-forward's. quant_type: None for INT8, blocksize then 0."""
    y = torch.empty_like(x)
    book = -1 if quant_type is None else _BOOKS[quant_type]
    _C.encoder_layer(
        x, mask, position_bias, *map(tuple, (weights, scales, biases, nested, norms, factors)), *features, heads, *eps,
        scaling, ACTIVATION_CODES[activation], symmetric, bits, book, blocksize, y,
    )  # fmt: skip
    return y


# ---- the decoder layer, which no other backend has

# Bits of the codes of activations, whether they stay in float, and the codebook: none for INT8.
_DECODER_ROWS = {"int8": (8, False, -1), "int8-a7": (7, False, -1), "int8-weight-only": (8, True, -1)}
_IN_FLOAT = {compute: compute not in AS_INT8 for compute in COMPUTE}
_DECODER_CODES = {"silu": 5, "relu": 7, "gelu": 1, "gelu_tanh": 6}  # Elementwise of csrc's kernels.h


def decoder_form(form: DecoderForm) -> Any:
    """The form as C++ takes it, which outlives calls."""
    bits, in_float, book = _DECODER_ROWS.get(form.quant_type) or (8, _IN_FLOAT[form.compute], _BOOKS[form.quant_type])
    return _C.DecoderForm(
        form.heads, form.kv_heads, form.head_size, form.intermediate_size, form.scaling, form.eps,
        _DECODER_CODES[form.activation], form.gated, form.symmetric, bits, in_float, book, form.blocksize,
        form.norm_offset, form.interleaved, form.window,
    )  # fmt: skip


def decoder_layer(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    past: int,
    mask: Tensor | None,
    position_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    parts: Sequence[Sequence[Tensor | None]],
    form: Any,
) -> Tensor:
    """parts: weights, scales, biases, norms, nested, head_norms, each a tuple. form: of `decoder_form`."""
    y = torch.empty_like(x)
    _C.decoder_layer(x, keys, values, past, mask, position_bias, cos, sin, *parts, form, y)
    return y


# ---- recurrent layers

CELL_CODES = {name: code for code, name in enumerate(GATES)}


def recurrent(
    x: Tensor,
    batch_sizes: Tensor,
    weights: Sequence[Weight8bit | Weight4bit],
    biases: Sequence[Tensor],
    h: Tensor,
    c: Tensor | None,
    cell: str,
    reverse: bool,
    symmetric: bool,
    bits: int,
    compute: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    y = x.new_empty((x.shape[0], h.shape[-1]))
    h, c = h.clone(), None if c is None else c.clone()
    book, blocksize, nested = -1, 0, []
    first = weights[0]
    if isinstance(first, Weight4bit):
        book, blocksize, symmetric, bits = _BOOKS[first.quant_type], first.blocksize, True, 8
        nested = [tensor for weight in weights for tensor in weight[2:5] if tensor is not None]
    _C.recurrent(
        x, batch_sizes, tuple(weight[0] for weight in weights), tuple(weight[1] for weight in weights), tuple(biases),
        tuple(nested), CELL_CODES[cell], reverse, symmetric, bits, compute in AS_INT8, book, blocksize, h, c, y,
    )  # fmt: skip
    return y, h, c


# ---- training


def fake_quantize(x: Tensor, size: int, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> Tensor:
    y = torch.empty_like(x)
    _C.fake_quantize(x, size, scale, zero_point, qmin, qmax, y)
    return y


def fake_quantize_backward(
    grad: Tensor, x: Tensor, size: int, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    by_x, rows = torch.empty_like(x), x.numel() // size
    by_scale, by_offset = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    _C.fake_quantize_backward(grad, x, size, scale, zero_point, qmin, qmax, by_x, by_scale, by_offset)
    return by_x, by_scale, by_offset


# ---- optimizers

_MAPS = torch.stack([map_lines(True), map_lines(False)])


def square_sum(tensors: Sequence[Tensor], scale: float) -> Tensor:
    return torch.tensor(_C.square_sum(list(tensors), scale), dtype=torch.float64, device="cpu")


def optimizer_step(
    optimizer: str,
    numbers: StepNumbers,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor],
) -> None:
    lists = (params, grads, state1, state2, absmax1, absmax2)
    _C.optimizer_step(OPTIMIZERS.index(optimizer), list(numbers), _MAPS, *map(list, lists))


# ---- the short way; what does not fit raises one of UNFIT: C++ says so, or new_empty (RuntimeError), or a table

UNFIT = (TypeError, ValueError, KeyError, IndexError, RuntimeError)


def _short_4bit(x: Tensor, weight: Weight4bit, bias: Tensor | None, compute: str) -> Tensor | None:
    """None where the operator says what is wrong."""
    packed, absmax, nested_absmax, nested_map, nested_offset, quant_type, blocksize, (n, k) = weight
    shape = x.shape
    if not shape or shape[-1] != k or compute not in COMPUTE:
        return None
    y = x.new_empty((*shape[:-1], n))
    _C.linear_4bit(
        x, packed, absmax, nested_absmax, nested_map, nested_offset, bias, y, _BOOKS[quant_type], blocksize,
        compute in AS_INT8,
    )  # fmt: skip
    return y


SHORT_WAY: dict[str, Callable[..., Tensor | None]] = (
    {
        "int8_linear": int8_linear,
        "int8_linear_static": int8_linear_static,
        "int8_linear_weight_only": int8_linear_weight_only,
        "linear_4bit": _short_4bit,
    }
    if READS_FAST
    else {}
)
