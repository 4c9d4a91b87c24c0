"""A whole pre-norm decoder layer as one operator, on CPU: INT8 or 4-bit linears, over a cache of keys and values.

    torch.ops.pyqkern.decoder_layer(x, mask, keys, values, past, cos, sin, weights, scales, biases, norms,
        heads, kv_heads, head_size, intermediate_size, scaling, eps, activation, gated, quant_type, symmetric, ...)

    h = x + output(attention(norm(x)));  y = h + down(activation(gate(norm(h))) * up(norm(h)))

Inputs
    x             [batch, length, hidden size], fp32, bf16 or fp16. Returns a new tensor like it.
    keys, values  the cache, [batch, kv_heads, capacity, head_size], floats of one dtype, of any strides by which no two
                  elements share a place, the last one 1. Rows [past, past + length) are written in place, keys after
                  rotary, rounded to the cache's dtype, and read back from there. Rows before are read where a query
                  sees them. Rows behind are neither read nor written.
    past          how many rows of the cache come before x. position: None, or int64 of one element that takes the place
                  of past, for caches whose length is a tensor; past is 0 then.
    mask          None: query i sees the keys up to its own, past + i; with window > 0 only the last `window` of them.
                  Or [batch or 1, heads or 1, length or 1, T], T being past + length or the capacity (what is behind
                  past + length is ignored), bool (true: seen) or floats added to the scores. A key whose float is -1e4
                  or less is masked, as if False. A mask says everything: causality is not added to it, window is 0.
    position_bias None, or floats added to the scores, in the shapes of a mask (ALiBi). Masks nothing.
    cos, sin      None: no rotary. Or floats [batch or 1, length, r], r even and at most head_size: of the first r
                  elements of each head, for i < r / 2, x[i] * cos[i] - x[i + r/2] * sin[i] and x[i + r/2] * cos[i +
                  r/2] + x[i] * sin[i + r/2] (rotate_half); the others stay.

The layer
    weights       linears in the order query, key, value, output, gate, up, down. One linear may stand for query, key
                  and value, with the rows [q; k; v], or with `interleaved` for each head its query, key and value (then
                  kv_heads is heads); one with the rows [gate; up] for gate and up. Not `gated`: no gate, and
                  activation(up). So there are 4 to 7. As int8_pack or pack_4bit make them.
    scales        fp32 [rows], or of 4 bits absmax as `Kernels.pack_scales` orders them.
    biases        floats [rows], or an empty tensor for none (torch.jit.trace knows no lists with None in them).
    norms         two weights: RMSNorm, x * (1 / sqrt(mean(x**2) + eps)) * (weight + norm_offset), norm_offset 1 for
                  Gemma. Four, weight and bias twice: LayerNorm. Before attention, then before the feed-forward.
    head_norms    none, or two weights [head_size]: RMSNorm, of the same eps and offset, of each head of query and key.
    scaling       of the scores.   activation: one of DECODER_ACTIVATIONS.
    quant_type    "int8", "int8-a7" (activations of 7 bits, symmetric False), "int8-weight-only", "nf4", "fp4", "int4".
    symmetric     how activations are quantized for "int8"; True for 4 bits, and not looked at for "int8-weight-only".
    compute       of 4 bits, "int8" or "auto" (rows quantized) or "fp32" or "bf16" (rows in fp32).
    blocksize     of 4 bits. Rows must be whole blocks, and 16 or more.
    nested        of 4 bits: nothing, or for each weight what its absmax, then uint8, stands for: fp32 absmax of blocks,
                  fp32 map [256], fp32 offset [].

Numerics
    Everything between x and y is in fp32 but for the quantized rows in front of a linear and the cache; y is rounded
    once to x's dtype. The linears have the bits of int8_linear, int8_linear_weight_only and linear_4bit of fp32 rows.
    Attention is in fp32: see `pyqkern.backends.reference.decoder`, which the C++ equals bit for bit but for activation
    "gelu". A query's result depends on the keys that it sees and on their places in the cache, and on nothing else: it
    has the same bits on every ISA, with any number of threads, alone or in any batch, and for a token decoded by itself
    or in a prefill. What a masked key holds, NaN included, does not matter. A query that sees no key gets zeros from
    attention, as torch's scaled_dot_product_attention gives for bool masks.
    A token with NaN or an infinity gives NaN, and makes NaN of the tokens that see its key. NaN in a float mask or in
    position_bias makes NaN of the queries it is added to.

Raises TypeError and ValueError before the cache is touched. Ctrl-C, or too little memory, in the middle of a call
leaves rows [past, past + length) of the cache undefined, and nothing else changed: the call may be made again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyqkern.backends import DECODER_ACTIVATIONS, QUANT_TYPES, DecoderForm, Kernels, cpu
from pyqkern.ops.checks import FLOATS
from pyqkern.ops.four_bit import check_format
from pyqkern.ops.layers import check_added, check_linear, check_vector, readable
from pyqkern.ops.registry import nobody_listens, operator
from pyqkern.schemes import COMPUTE

INT8_TYPES = ("int8", "int8-a7", "int8-weight-only")


class Parts(NamedTuple):
    """The tensors of a layer; an empty bias is none."""

    weights: Sequence[Tensor]
    scales: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    norms: Sequence[Tensor]
    nested: Sequence[Tensor] = ()
    head_norms: Sequence[Tensor] = ()


class Cache(NamedTuple):
    """Keys and values, [batch, kv_heads, capacity, head_size], and how many of their rows come before x."""

    keys: Tensor
    values: Tensor
    past: int


class Added(NamedTuple):
    """What is added to scores, and what queries and keys are rotated by."""

    mask: Tensor | None
    position_bias: Tensor | None
    cos: Tensor | None
    sin: Tensor | None


def _check_counts(parts: Parts) -> None:
    count = len(parts.weights)
    for name, tensors, allowed in (
        ("scales", parts.scales, (count,)),
        ("biases", parts.biases, (count,)),
        ("norms", parts.norms, (2, 4)),
        ("nested", parts.nested, (0, 3 * count)),
        ("head_norms", parts.head_norms, (0, 2)),
    ):
        if len(tensors) not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(str, allowed))}, got {len(tensors)}")
    for name, tensors in parts._asdict().items():
        for tensor in tensors:
            if tensor is not None and not (tensor.is_cpu and tensor.is_contiguous()):
                raise ValueError(f"{name} must be contiguous and on the CPU, got a tensor on {tensor.device}")


def _check_form(form: DecoderForm) -> None:
    if form.heads < 1 or form.kv_heads < 1 or form.heads % form.kv_heads:
        raise ValueError(f"kv_heads must divide heads={form.heads}, got {form.kv_heads}")
    if form.head_size < 1 or form.intermediate_size < 1:
        raise ValueError(
            f"head_size and intermediate_size must be positive, got {form.head_size} and {form.intermediate_size}"
        )
    if form.interleaved and form.heads != form.kv_heads:
        raise ValueError(f"kv_heads must be heads={form.heads} where rows are interleaved, got {form.kv_heads}")
    if form.activation not in DECODER_ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(DECODER_ACTIVATIONS)}, got {form.activation!r}")
    for name in ("scaling", "eps", "norm_offset"):
        if not isinstance(value := getattr(form, name), (int, float)):
            raise TypeError(f"{name} must be a float, got {value!r}")
    if form.window < 0:
        raise ValueError(f"window must be 0 for none, or positive, got {form.window}")
    if form.compute not in COMPUTE:
        raise ValueError(f"compute must be one of {', '.join(COMPUTE)}, got {form.compute!r}")
    if not form.is_int8:
        check_format(form.quant_type, form.blocksize)
        if not form.symmetric:
            raise ValueError("symmetric must be True for 4-bit linears, got False")
    elif form.quant_type not in INT8_TYPES:
        raise ValueError(f"quant_type must be one of {', '.join((*INT8_TYPES, *QUANT_TYPES))}, got {form.quant_type!r}")
    if form.quant_type == "int8-a7" and form.symmetric:
        raise ValueError("symmetric must be False for int8-a7, got True")


def check(parts: Parts, form: DecoderForm) -> None:
    """Checks all that does not depend on the input. Raises TypeError and ValueError."""
    _check_counts(parts)
    _check_form(form)
    first = parts.norms[0]
    hidden = first.shape[0] if first.dim() else 0
    for name, tensors, n in (("norms", parts.norms, hidden), ("head_norms", parts.head_norms, form.head_size)):
        for tensor in tensors:
            right = tensor.dtype in FLOATS and tensor.dtype is tensors[0].dtype
            check_vector(name, tensor, n, right, "floats of one dtype,")
    for i, (name, n, k) in enumerate(form.linears(len(parts.weights), hidden)):
        bias = parts.biases[i]
        if bias is not None:
            check_vector(f"the bias of {name}", bias, n, bias.dtype in FLOATS, "floats")
        nested = parts.nested[3 * i : 3 * i + 3]
        check_linear(name, parts.weights[i], parts.scales[i], n, k, form.quant_type, form.blocksize, nested)


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements may lie in one place."""
    extent = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride < extent:
            return True
        extent = stride * (size - 1) + extent
    return False


def _check_cache(cache: Cache, batch: int, length: int, form: DecoderForm) -> None:
    keys, values, past = cache
    wanted = f"floats [{batch}, {form.kv_heads}, capacity, {form.head_size}] of one dtype"
    for name, tensor in (("keys", keys), ("values", values)):
        got = f"got {tensor.dtype} {tuple(tensor.shape)}"
        if tensor.dtype not in FLOATS or tensor.dtype is not keys.dtype:
            raise TypeError(f"{name} must be {wanted}, {got}")
        shape = (batch, form.kv_heads, keys.shape[2] if keys.dim() == 4 else 0, form.head_size)
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {wanted}, {got}")
        if not tensor.is_cpu or (tensor.stride(-1) != 1 and form.head_size > 1) or _overlaps(tensor):
            raise ValueError(
                f"{name} must be on the CPU, with elements of a head beside each other and none in one place, got "
                f"strides {tensor.stride()} on {tensor.device}"
            )
    if past < 0 or past + length > keys.shape[2]:
        raise ValueError(
            f"past must leave room for {length} rows in a cache of capacity {keys.shape[2]}, got {past}; make a larger "
            "cache"
        )


def _check_rotary(added: Added, batch: int, length: int, head_size: int) -> None:
    cos, sin = added.cos, added.sin
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise ValueError("cos and sin must be given together, or neither of them")
    for name, tensor in (("cos", cos), ("sin", sin)):
        wanted = f"floats [{batch} or 1, {length}, an even number up to {head_size}]"
        got = f"got {tensor.dtype} {tuple(tensor.shape)}"
        if tensor.dtype not in FLOATS or tensor.dtype is not cos.dtype:
            raise TypeError(f"{name} must be {wanted}, both of one dtype, {got}")
        if (
            tensor.dim() != 3
            or tensor.shape != cos.shape
            or tensor.shape[0] not in (1, batch)
            or tensor.shape[1] != length
            or not 0 < tensor.shape[2] <= head_size
            or tensor.shape[2] % 2
            or not tensor.is_cpu
        ):
            raise ValueError(f"{name} must be {wanted}, both of one shape, on the CPU, {got}")


def _check_input(x: Tensor, cache: Cache, added: Added, hidden: int, form: DecoderForm) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be fp32, bf16 or fp16 [batch, length, {hidden}], got {x.dtype} {tuple(x.shape)}")
    if x.dim() != 3 or x.shape[2] != hidden:
        raise ValueError(f"x must be fp32, bf16 or fp16 [batch, length, {hidden}], got {x.dtype} {tuple(x.shape)}")
    batch, length = x.shape[:2]
    _check_cache(cache, batch, length, form)
    _check_rotary(added, batch, length, form.head_size)
    keys = (cache.past + length, cache.keys.shape[2])
    check_added("mask", added.mask, batch, form.heads, length, keys)
    check_added("position_bias", added.position_bias, batch, form.heads, length, keys, may_be_bool=False)
    if added.mask is not None and form.window:
        raise ValueError(f"window must be 0 where a mask is given, got {form.window}; put the window into the mask")


def _past(past: int, position: Tensor | None) -> int:
    if position is None:
        return past
    if position.dtype is not torch.int64:
        raise TypeError(f"position must be int64 of one element, got {position.dtype} {tuple(position.shape)}")
    if position.numel() != 1 or not position.is_cpu or past:
        raise ValueError(
            f"position must be one element on the CPU, and past 0 beside it, got {tuple(position.shape)} and {past}"
        )
    return int(position)


class Layer(NamedTuple):
    """A layer as `decoder_layer` takes it: made once by `layer_of` and good for all calls with these tensors."""

    parts: Parts
    form: DecoderForm
    form_in_cpp: Any


def layer_of(parts: Parts, form: DecoderForm) -> Layer:
    """Raises TypeError and ValueError where C++ cannot be told the form. All else is checked in each call."""
    try:
        return Layer(Parts._make(map(tuple, parts)), form, cpu.decoder_form(form))
    except cpu.UNFIT:
        check(parts, form)  # says what is wrong
        raise


def _run(
    x: Tensor, keys: Tensor, values: Tensor, past: int, mask: Tensor | None, position_bias: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, layer: Layer,
) -> Tensor:  # fmt: skip
    """The C++ kernel, which checks what it is given once more."""
    if mask is not None:
        mask = readable(mask)
    if position_bias is not None:
        position_bias = readable(position_bias)
    if cos is not None and sin is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    return cpu.decoder_layer(
        x.contiguous(), keys, values, past, mask, position_bias, cos, sin, layer.parts, layer.form_in_cpp
    )


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator(
    "decoder_layer(Tensor x, Tensor? mask, Tensor(a!) keys, Tensor(b!) values, SymInt past, Tensor? cos, Tensor? sin,"
    " Tensor[] weights, Tensor[] scales, Tensor[] biases, Tensor[] norms, int heads, int kv_heads, int head_size,"
    " int intermediate_size, float scaling, float eps, str activation, bool gated,"
    ' str quant_type="int8", bool symmetric=False, str compute="auto", int blocksize=0, Tensor[]? nested=None,'
    " Tensor? position_bias=None, Tensor? position=None, Tensor[]? head_norms=None, float norm_offset=0.0,"
    " bool interleaved=False, int window=0) -> Tensor",
    _fake,
    keys=("CPU",),
)
def _decoder_layer(
    kernels: Kernels,
    x: Tensor,
    mask: Tensor | None,
    keys: Tensor,
    values: Tensor,
    past: int,
    cos: Tensor | None,
    sin: Tensor | None,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norms: Sequence[Tensor],
    heads: int,
    kv_heads: int,
    head_size: int,
    intermediate_size: int,
    scaling: float,
    eps: float,
    activation: str,
    gated: bool,
    quant_type: str = "int8",
    symmetric: bool = False,
    compute: str = "auto",
    blocksize: int = 0,
    nested: Sequence[Tensor] | None = None,
    position_bias: Tensor | None = None,
    position: Tensor | None = None,
    head_norms: Sequence[Tensor] | None = None,
    norm_offset: float = 0.0,
    interleaved: bool = False,
    window: int = 0,
) -> Tensor:
    biases = [bias if bias is not None and bias.numel() else None for bias in biases]
    parts = Parts(weights, scales, biases, norms, nested or (), head_norms or ())
    form = DecoderForm(
        heads, kv_heads, head_size, intermediate_size, scaling, eps, activation, gated, quant_type, symmetric, compute,
        blocksize, norm_offset, interleaved, window,
    )  # fmt: skip
    cache, added = Cache(keys, values, _past(past, position)), Added(mask, position_bias, cos, sin)
    layer = layer_of(parts, form)
    try:
        if x.numel():
            return _run(x, *cache, *added, layer)
    except cpu.UNFIT:  # the checks below, which take as long as a small layer, say what is wrong
        check(parts, form)
        _check_input(x, cache, added, norms[0].shape[0], form)
        raise
    check(parts, form)
    _check_input(x, cache, added, norms[0].shape[0], form)
    return _fake(x)


def decoder_layer(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    past: int,
    mask: Tensor | None,
    position_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    layer: Layer,
    position: Tensor | None = None,
    quiet: bool | None = None,
) -> Tensor:
    """torch.ops.pyqkern.decoder_layer by the shortest way; a bias may be None.

    quiet: what nobody_listens says, if the caller has asked. C++ checks that its arguments are plain CPU tensors that
    fit; what it does not take goes to the operator, which says what is wrong.
    """
    if position is None and cpu.READS_FAST and (nobody_listens() if quiet is None else quiet):
        try:
            return _run(x, keys, values, past, mask, position_bias, cos, sin, layer)
        except (*cpu.UNFIT, AttributeError):
            pass
    parts, form = layer.parts, layer.form
    biases = [x.new_empty(0) if bias is None else bias for bias in parts.biases]
    return torch.ops.pyqkern.decoder_layer.default(
        x, mask, keys, values, past, cos, sin, parts.weights, parts.scales, biases, parts.norms, *form[:12],
        parts.nested, position_bias, position, parts.head_norms, *form[12:],
    )  # fmt: skip
