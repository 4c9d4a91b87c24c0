"""The decoder layer as one operator: its specification's bits, and what a query's result may depend on."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_layers import SCHEMES, Layer
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FLOATS, generator, seeds
from torch import Tensor
from torch.nn import functional

from pyqkern.ops import decoder as ops_decoder
from pyqkern.ops.decoder import Added

each_scheme = pytest.mark.parametrize("scheme", SCHEMES)
float_types = st.sampled_from(FLOATS)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN anywhere in the place of NaN."""
    return a.dtype is b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def causal(past: int, length: int) -> Tensor:
    return torch.ones(1, 1, length, past + length, dtype=torch.bool).tril(past)


def strided_cache(layer: Layer, batch: int, capacity: int, seed: int, dtype: torch.dtype, how: str) -> list[Tensor]:
    """keys and values in a storage of another order, or in a larger one."""
    caches = layer.cache(batch, capacity, seed, dtype)
    if how == "rows first":
        return [c.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for c in caches]
    if how == "inside":
        return [functional.pad(c, (1, 2, 0, 3))[..., :capacity, 1 : 1 + c.shape[-1]] for c in caches]
    return list(caches)


def mask_of(kind: str, batch: int, heads: int, past: int, length: int, capacity: int, seed: int) -> Tensor | None:
    seen, total, g = causal(past, length), past + length, generator(seed)
    if kind == "none":
        return None
    if kind == "causal":
        return seen
    if kind == "left":  # the first sentence wholly padding
        pad = torch.tensor([total, *[total // 2] * (batch - 1)])[:, None, None, None]
        return seen & (torch.arange(total) >= pad)
    if kind == "lowest":
        return torch.where(seen, 0.0, torch.finfo(torch.bfloat16).min).to(torch.bfloat16)
    if kind == "holes":  # of every query and head their own
        return torch.rand(batch, heads, length, total, generator=g) < 0.5
    if kind == "floats":
        return torch.where(torch.rand(1, heads, 1, total, generator=g) < 0.3, -math.inf, torch.randn(1, 1, 1, total))
    return functional.pad(seen.expand(batch, 1, -1, -1), (0, capacity - total), value=True)  # "static"


# ---- against the specification


@settings(max_examples=60)
@given(
    seed=seeds, scheme=st.sampled_from(list(SCHEMES)), batch=st.integers(1, 3), past=st.sampled_from([0, 1, 5, 63, 64]),
    length=st.sampled_from([1, 1, 2, 3, 7, 17, 33]), kv_heads=st.integers(1, 3), group=st.integers(1, 4),
    head_size=st.sampled_from([1, 5, 8, 16, 33, 64]), room=st.sampled_from([0, 1, 9]), dtype=float_types,
    cache_dtype=float_types, how=st.sampled_from(["plain", "rows first", "inside"]),
    mask=st.sampled_from(["none", "causal", "left", "lowest", "holes", "floats", "static"]),
    activation=st.sampled_from(["silu", "relu", "gelu_tanh"]), gated=st.booleans(), fused=st.booleans(),
    interleaved=st.booleans(), bias=st.booleans(), layer_norm=st.booleans(), head_norms=st.booleans(),
    norm_offset=st.sampled_from([0.0, 1.0]), window=st.sampled_from([0, 1, 3, 70]), alibi=st.booleans(),
    rotary=st.sampled_from([0, 1, 3]),
)  # fmt: skip
def test_is_the_reference(
    isa: str, seed: int, scheme: str, batch: int, past: int, length: int, kv_heads: int, group: int, head_size: int,
    room: int, dtype: torch.dtype, cache_dtype: torch.dtype, how: str, mask: str, activation: str, gated: bool,
    fused: bool, interleaved: bool, bias: bool, layer_norm: bool, head_norms: bool, norm_offset: float, window: int,
    alibi: bool, rotary: int,
) -> None:  # fmt: skip
    hidden, wide = 10 + seed % 70, 1 + seed % 90
    if not scheme.startswith("int8"):  # rows of whole blocks, and 16 of them
        head_size, hidden, wide = 32, 64, 96
    heads = kv_heads * (1 if interleaved else group)
    layer = Layer(
        seed, hidden, heads, kv_heads, head_size, wide, scheme, dtype=dtype, activation=activation, gated=gated,
        fused=fused, interleaved=interleaved, bias=bias, layer_norm=layer_norm, head_norms=head_norms,
        norm_offset=norm_offset, window=window if mask == "none" else 0,
    )  # fmt: skip
    x, total = layer.input(batch, length, seed), past + length
    keys, values = strided_cache(layer, batch, total + room, seed, cache_dtype, how)
    more: dict[str, Any] = {"mask": mask_of(mask, batch, heads, past, length, total + room, seed)}
    if alibi:
        more["position_bias"] = torch.randn(1, heads, 1, total, generator=generator(seed)).to(dtype)
    dims = min(rotary * 2, head_size // 2 * 2)
    if dims:
        more["cos"], more["sin"] = layer.rotary(past, length, dims, dtype)
    expected_keys, expected_values = keys.clone(), values.clone()
    expected = layer.reference(x, expected_keys, expected_values, past, **more)
    assert same(layer(x, keys, values, past, **more), expected)
    assert same(keys, expected_keys) and same(values, expected_values)


def test_gelu(isa: str) -> None:
    """A polynomial errs by 4 * 2^-24 of its argument, torch's GELU by as much; the weights add 96 of such errors."""
    layer = Layer(scheme="int8-weight-only", activation="gelu")
    x, caches, again = layer.input(2, 9), layer.cache(2, 9), layer.cache(2, 9)
    y, expected = layer(x, *caches), layer.reference(x, *again)
    assert torch.allclose(y, expected, rtol=0, atol=float(96 * 8 * 2.0**-24 * expected.abs().max()))


def test_is_what_torch_computes(isa: str) -> None:
    """Nothing of the reference: fp64, with a bound."""
    layer, past, length = Layer(scheme="int8-weight-only", head_norms=True, norm_offset=1.0), 70, 6
    form = layer.form
    x, (keys, values) = layer.input(2, length), layer.cache(2, past + length)
    k, v = keys.double(), values.double()
    cos, sin = layer.rotary(past, length, 16)
    y = layer(x, keys, values, past, None, cos, sin)
    query, key, value, output, gate, up, down = (
        (codes.double() * scale.double()[:, None]).T for codes, scale in zip(layer.codes, layer.scales, strict=True)
    )

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight.double() + 1, form.eps)

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        x = norm(x.unflatten(-1, (-1, 16)), weight).transpose(1, 2)
        rotated = torch.cat([-x[..., 8:], x[..., :8]], -1)
        return x * cos.double() + rotated * sin.double()

    h = x.double()
    rows = norm(h, layer.norms[0])
    k[:, :, past:] = turned(rows @ key, layer.head_norms[1])
    v[:, :, past:] = (rows @ value).unflatten(-1, (2, 16)).transpose(1, 2)
    context = functional.scaled_dot_product_attention(
        turned(rows @ query, layer.head_norms[0]), k, v, causal(past, length), scale=form.scaling, enable_gqa=True
    )
    h = h + context.transpose(1, 2).flatten(2) @ output
    rows = norm(h, layer.norms[1])
    h = h + (functional.silu(rows @ gate) * (rows @ up)) @ down
    # About 500 roundings lie on the longest way from x to y, each of 2^-24; they add up as a sum of squares, mostly.
    assert (y - h).norm() / h.norm() < 500 * 2.0**-24
    assert (keys - k).norm() / k.norm() < 500 * 2.0**-24


# ---- what a result depends on


@each_scheme
def test_a_token_decoded_alone_is_the_same_as_in_a_prefill(isa: str, scheme: str) -> None:
    layer = Layer(1, 64, 4, 2, 32, 96, scheme, dtype=torch.bfloat16)
    batch, length = 2, 70
    x, (cos, sin) = layer.input(batch, length), layer.rotary(0, length, 32)
    keys, values = layer.cache(batch, length)
    whole = layer(x, keys, values, 0, None, cos, sin)
    for sizes in ([1] * length, [5, 60, 1, 4], [33, 37]):
        again = layer.cache(batch, length, 3)
        pieces, past = [], 0
        for n in sizes:
            part = slice(past, past + n)
            pieces.append(layer(x[:, part], *again, past, None, cos[:, part], sin[:, part]))
            past += n
        assert same(torch.cat(pieces, 1), whole)
        assert same(again[0], keys) and same(again[1], values)


@pytest.mark.parametrize("scheme", ["int8", "int8-a7", "int8-weight-only", "nf4", "fp4-fp32"])
def test_many_tokens(scheme: str, two_threads: None) -> None:
    """Groups of tokens, blocks of a product and its split form, and two threads: the last tokens by themselves."""
    hidden, length, last = 256, 300, 5
    layer = Layer(2, hidden, 4, 2, 64, 288, scheme)
    x, (keys, values) = layer.input(2, length), layer.cache(2, length)
    whole = layer(x, keys, values)
    for b in range(2):
        alone = [cache[b : b + 1].clone() for cache in (keys, values)]
        for start in (0, 126, length - last):
            y = layer(x[b : b + 1, start : start + last], *alone, start)
            assert same(y[0], whole[b, start : start + last])
        assert same(alone[0][0], keys[b])
    torch.set_num_threads(1)
    again = layer.cache(2, length, 5)
    assert same(layer(x, *again), whole) and same(again[0], keys) and same(again[1], values)


@each_scheme
def test_a_sentence_is_the_same_in_any_batch(isa: str, scheme: str) -> None:
    """Of its own length and padded on the left, with the same places in the cache."""
    layer = Layer(3, 64, 4, 1, 32, 96, scheme)
    batch, length = 3, 20
    x = layer.input(batch, length)
    pad = torch.tensor([0, 3, 11])[:, None, None, None]
    mask = causal(0, length) & (torch.arange(length) >= pad)
    keys, values = layer.cache(batch, length)
    y = layer(x, keys, values, 0, mask)
    for b in range(batch):
        alone = layer.cache(1, length)
        assert same(layer(x[b : b + 1], *alone, 0, mask[b : b + 1])[0], y[b])
        first = int(pad[b])  # what padding holds does not matter
        noise = x[b : b + 1].clone()
        noise[:, :first] = torch.nan
        assert same(layer(noise, *alone, 0, mask[b : b + 1])[0, first:], y[b, first:])


@each_scheme
def test_a_token_of_a_wide_layer_is_the_same_on_every_isa_and_thread_count(scheme: str, two_threads: None) -> None:
    """Wide enough for a second thread, and panels and strips are left over behind those that are read side by side."""
    from pyqkern import _C

    layer = Layer(5, 512, 8, 2, 64, 1120, scheme)  # 1120: 70 panels, which are 17 strips and a half
    x, before, results = layer.input(1, 1), _C.isa(), []
    for isa in _C.isas():
        _C.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            caches = layer.cache(1, 200)
            results.append((layer(x, *caches, 199), *caches))
    _C.set_isa(before)
    for result in results[1:]:
        assert all(same(a, b) for a, b in zip(result, results[0], strict=True))


@each_scheme
def test_all_isas_agree(scheme: str) -> None:
    from pyqkern import _C

    layer = Layer(4, 64, 6, 2, 32, 96, scheme, layer_norm=True, bias=True)
    x, before, results = layer.input(2, 40), _C.isa(), []
    for isa in _C.isas():
        _C.set_isa(isa)
        caches = layer.cache(2, 140, dtype=torch.float16)
        results.append((layer(x, *caches, 100), *caches))
    _C.set_isa(before)
    for result in results[1:]:
        assert all(same(a, b) for a, b in zip(result, results[0], strict=True))


@each_scheme
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_reaches_those_that_see_it(isa: str, scheme: str, bad: float) -> None:
    layer = Layer(5, 64, 4, 2, 32, 96, scheme)
    x, length = layer.input(2, 9), 9
    y = layer(x, *layer.cache(2, length))
    x[1, 4, 7] = bad
    z = layer(x, *layer.cache(2, length))
    assert same(z[0], y[0]) and same(z[1, :4], y[1, :4]) and z[1, 4:].isnan().all()


def test_masked_keys_may_hold_anything(isa: str) -> None:
    layer = Layer(6, scheme="int8")
    x, past = layer.input(1, 3), 70
    keys, values = layer.cache(1, past + 3)
    mask = causal(past, 3)
    mask[..., 10:66] = False
    y = layer(x, keys, values, past, mask)
    keys[:, :, 10:66] = values[:, :, 10:66] = torch.nan
    assert same(layer(x, keys, values, past, mask), y)
    assert same(layer(x, keys, values, past, torch.where(mask, 0.0, -1e4)), y)
    keys[:, :, 66:68] = torch.nan
    assert layer(x, keys, values, past, mask).isnan().all()
    bias = torch.zeros(1, 1, 3, past + 3)
    bias[:, :, 1, 68] = torch.nan
    keys[:, :, 66:68] = 0
    assert layer(x, keys, values, past, mask, position_bias=bias).isnan().any(-1).tolist() == [[False, True, False]]


def test_a_window_is_the_mask_that_says_it(isa: str) -> None:
    for window in (1, 5, 64, 200):
        x, past = Layer().input(2, 66), 80
        results = []
        for layer, mask in (
            (Layer(window=window), None),
            (Layer(), causal(past, 66) & ~causal(past, 66).roll(window, 2).tril(past - window)),
        ):
            results.append(layer(x, *layer.cache(2, 150), past, mask))
        assert same(*results)


# ---- the operator


def test_the_short_way_and_the_operator_agree() -> None:
    layer = Layer(bias=True, dtype=torch.bfloat16)
    x, added = layer.input(2, 3), Added(None, None, *layer.rotary(4, 3, 16))
    keys, values = layer.cache(2, 8)
    y = layer(x, keys, values, 4, None, *added[2:])
    again = layer.cache(2, 8)
    assert same(ops_decoder.decoder_layer(x, *again, 4, *added, layer.layer()), y)
    assert same(again[0], keys) and same(again[1], values)
    again = layer.cache(2, 8)
    four = torch.tensor(4)
    assert same(ops_decoder.decoder_layer(x, *again, 0, *added, layer.layer(), four), y)
    assert same(again[0], keys)
    with pytest.raises(ValueError, match="past must leave room for 3 rows in a cache of capacity 8, got 6"):
        ops_decoder.decoder_layer(x, *again, 6, *added, layer.layer())


@pytest.mark.parametrize("scheme", ["int8", "nf4-nested"])
def test_opcheck(scheme: str) -> None:
    layer = Layer(scheme=scheme, head_size=32, bias=True, head_norms=True)
    x, (keys, values), (cos, sin) = layer.input(2, 3), layer.cache(2, 8), layer.rotary(2, 3, 16)
    for mask, past, position in ((None, 2, None), (causal(2, 3), 0, torch.tensor([2]))):
        arguments = (
            x, mask, keys, values, past, cos, sin, layer.packed, layer.scales, layer.biases, layer.norms,
            *layer.form[:12], layer.nested, None, position, layer.head_norms, *layer.form[12:],
        )  # fmt: skip
        torch.library.opcheck(torch.ops.pyqkern.decoder_layer.default, arguments)


def test_compiled_decoding_does_not_recompile_for_each_token() -> None:
    layer = Layer()
    x, (keys, values) = layer.input(1, 6), layer.cache(1, 6)
    expected_caches = [keys.clone(), values.clone()]
    count = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal count
        count += 1
        return graph

    step = torch.compile(
        lambda x, keys, values, past: layer(x, keys, values, past) + 1, fullgraph=True, backend=backend
    )
    for past in range(6):
        row = x[:, past : past + 1]
        assert same(step(row, keys, values, past), layer(row, *expected_caches, past) + 1)
    assert same(keys, expected_caches[0]) and count <= 3


def test_an_empty_input() -> None:
    layer = Layer()
    for batch, length in ((2, 0), (0, 3)):
        x, (keys, values) = layer.input(batch, length), layer.cache(batch, 4)
        assert layer(x, keys, values).shape == (batch, length, 64)


def test_memory_is_linear_in_the_length() -> None:
    """Scores of 8192 tokens are 268 MB a head: the layer must do with far less."""
    code = """
import resource, sys
sys.path[:0] = sys.argv[1:]
from decoder_layers import Layer
layer = Layer(hidden=32, heads=2, kv_heads=1, head_size=16, wide=32)
x, caches = layer.input(1, 8192), layer.cache(1, 8192)
layer(x[:, :64], *caches)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y = layer(x, *caches)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, bool(y.isfinite().all()))
"""
    command = [sys.executable, "-c", code, str(Path(__file__).parent.parent / "support")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    kilobytes, finite = done.stdout.split()
    assert int(kilobytes) < 40_000 and finite == "True"
