"""The encoder layer as one operator, against its plain-torch specification; and the functions it is made of."""

import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_layer import Layer
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FLOATS, generator, seeds
from torch import Tensor

from pyqkern import _C, isas
from pyqkern.backends.reference import encoder
from pyqkern.backends.reference.encoder import attention, seen_keys
from pyqkern.ops import encoder as ops_encoder
from pyqkern.schemes import FP4, NF4, Int4, Scheme

encoder_layer = torch.ops.pyqkern.encoder_layer


def assert_close(y: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32, bits: int = 8) -> None:
    """Equal but for codes that a rounding of 2**-22 (softmax, GELU, the sums of LayerNorm) has moved by one.

    A code moves where its value lies within about 2**-14 of a step from a tie, one in ten thousand, and then by a step,
    1/255 of a row's range, about 3 % of its standard deviation; of few codes, as many as 16 may move. Two of the
    quantizations follow one another in the worst way: 2 * 0.03 * sqrt(1e-4 + 16 / codes) of the norm.
    Codes of 7 bits have steps of twice the size. bf16 and fp16 results are rounded by 2**-9 and 2**-12 more at the end.
    """
    tolerance = (
        2 ** (8 - bits) * 0.06 * (1e-4 + 16 / max(1, y.numel())) ** 0.5
        + {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    )
    error = (y.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    assert y.dtype == dtype and y.shape == expected.shape and error <= tolerance, float(error)


def padding(lengths: list[int], length: int, left: bool = False, dtype: torch.dtype = torch.bool) -> Tensor:
    """The 4-d mask of transformers for sentences of these lengths."""
    places = torch.arange(length)
    seen = torch.stack([places >= length - n if left else places < n for n in lengths])
    mask = seen[:, None, None, :].expand(-1, 1, length, -1)
    return mask.clone() if dtype is torch.bool else torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)


# ---- against the specification


@settings(max_examples=40)
@given(
    seed=seeds,
    batch=st.integers(1, 4),
    length=st.integers(1, 70),
    heads=st.integers(1, 4),
    head_size=st.sampled_from([1, 3, 8, 16, 20, 33, 64]),
    hidden=st.integers(1, 70),
    wide=st.integers(1, 140),
    dtype=st.sampled_from(FLOATS),
    activation=st.sampled_from(["none", "relu", "gelu", "gelu_tanh"]),
    how=st.sampled_from([(False, 8), (True, 8), (False, 7)]),
    bias=st.booleans(),
    data=st.data(),
)
def test_any_shape(
    isa: str, seed: int, batch: int, length: int, heads: int, head_size: int, hidden: int, wide: int,
    dtype: torch.dtype, activation: str, how: tuple[bool, int], bias: bool, data: Any,
) -> None:  # fmt: skip
    layer = Layer(seed, hidden, heads, head_size, wide, dtype, activation, how[0], bias, bits=how[1])
    x = layer.input(batch, length, seed)
    lengths = data.draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
    kind = data.draw(st.sampled_from(["none", "right", "left", "added", "causal"]))
    mask = {
        "none": None,
        "right": padding(lengths, length),
        "left": padding(lengths, length, left=True),
        "added": padding(lengths, length, dtype=dtype),
        "causal": torch.ones(length, length, dtype=torch.bool).tril()[None, None],
    }[kind]
    y = layer(x, mask)
    expected = layer.reference(x, mask)
    # A LayerNorm of few elements, or of a row that is nearly constant, blows one moved code up; 1 gives its bias.
    if hidden >= 16:
        assert_close(y, expected, dtype, how[1])
    if kind in ("right", "left", "added"):
        seen = seen_keys(mask, batch, length)
        assert seen is not None and (y[~seen] == 0).all()
    assert y.isfinite().all()


SCHEMES = [NF4(blocksize=32), NF4(double_quant=True), FP4(), NF4(blocksize=128), Int4(group_size=32)]


@settings(max_examples=15)
@given(
    seed=seeds,
    batch=st.integers(1, 3),
    length=st.integers(1, 70),
    heads=st.integers(1, 4),
    hidden=st.sampled_from([1, 2]),
    wide=st.sampled_from([1, 3]),
    scheme=st.sampled_from(SCHEMES),
    dtype=st.sampled_from(FLOATS),
    activation=st.sampled_from(["none", "relu", "gelu", "gelu_tanh"]),
    bias=st.booleans(),
)
def test_four_bits(
    isa: str, seed: int, batch: int, length: int, heads: int, hidden: int, wide: int, scheme: Scheme,
    dtype: torch.dtype, activation: str, bias: bool,
) -> None:  # fmt: skip
    """Sizes are whole blocks, and mostly no whole strips of 64."""
    size = scheme.group_size if isinstance(scheme, Int4) else scheme.blocksize
    layer = Layer(seed, hidden * size, heads, size, wide * size, dtype, activation, bias=bias, scheme=scheme)
    x = layer.input(batch, length, seed)
    mask = padding([length, *[length // 2] * (batch - 1)], length)
    assert_close(layer(x, mask), layer.reference(x, mask), dtype)


@pytest.mark.parametrize("scheme", [None, NF4(blocksize=32)])
def test_each_activation_is_the_one_asked_for(isa: str, scheme: Scheme | None) -> None:
    """The two GELUs differ by 5e-4 at most: of 1024 values a few have another code then, where roundings move none."""
    errors: dict[tuple[str, str], list[float]] = {}
    for seed in range(9):
        x = Layer(hidden=64).input(1, 1, seed)
        layers = {name: Layer(seed, 64, 2, 32, 1024, activation=name, scheme=scheme) for name in ("gelu", "gelu_tanh")}
        for name, layer in layers.items():
            for other, reference in layers.items():
                errors.setdefault((name, other), []).append(float((layer(x) - reference.reference(x)).norm()))
    for (name, other), found in errors.items():
        assert (statistics.median(found) < 1e-5) == (name == other), (name, other, found)


def test_small_probabilities_keep_their_sum(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One key with all of a code, 299 with 0.3 of it each: they have a quarter of the weight, and rounded away none."""
    tokens, share = 300, 299 * 0.3 / (255 + 299 * 0.3)
    key = torch.full((tokens, 1, 1), -math.log(255 / 0.3))
    key[0] = 0
    value = (key != 0).float()
    context = attention(torch.ones(tokens, 1, 1), key, value, 1.0, None)
    assert ((context - share).abs() <= 0.02).all()
    # And the operator does as the reference does: without it, it would be far off here.
    layer = Layer(5, heads=1, head_size=48)
    layer.scales[0] = layer.scales[0] * 3
    x = layer.input(1, 500)
    assert_close(layer(x), layer.reference(x))
    monkeypatch.setattr(encoder, "DITHER", torch.zeros(64))
    with pytest.raises(AssertionError):
        assert_close(layer(x), layer.reference(x))


@pytest.mark.parametrize("scheme", [None, NF4(blocksize=32, double_quant=True)])
def test_bits_are_equal_on_every_isa_and_number_of_threads(two_threads: None, scheme: Scheme | None) -> None:
    layer = Layer(3, 96, heads=5, head_size=32, wide=288, scheme=scheme)
    if scheme is None:
        layer = Layer(3, hidden=100, heads=5, head_size=20, wide=260)
    x = layer.input(6, 90)
    mask = padding([90, 1, 17, 64, 80, 33], 90)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for isa in isas():
            previous = _C.set_isa(isa)
            results.append(layer(x, mask))
            _C.set_isa(previous)
    assert all(torch.equal(result, results[0]) for result in results)


@settings(max_examples=20)
@given(
    seed=seeds,
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    left=st.booleans(),
    scheme=st.sampled_from([None, NF4()]),
)
def test_a_sentence_does_not_depend_on_its_neighbours(
    isa: str, seed: int, lengths: list[int], left: bool, scheme: Scheme | None
) -> None:
    layer, length = Layer(seed, 64, 2, 32, 128, scheme=scheme) if scheme else Layer(seed), max(lengths)
    x = layer.input(len(lengths), length, seed)
    together = layer(x, padding(lengths, length, left))
    for i, n in enumerate(lengths):
        own = slice(length - n, length) if left else slice(0, n)
        assert torch.equal(together[i, own], layer(x[i : i + 1, own])[0])


def test_masks_that_say_the_same_give_the_same_bits(isa: str) -> None:
    layer = Layer()
    x, lengths = layer.input(3, 40), [40, 7, 23]
    expected = layer(x, padding(lengths, 40))
    for dtype in FLOATS:
        assert torch.equal(layer(x, padding(lengths, 40, dtype=dtype)), expected)
    infinite = padding(lengths, 40, dtype=torch.float32).masked_fill(~padding(lengths, 40), float("-inf"))
    assert torch.equal(layer(x, infinite), expected)
    assert torch.equal(layer(x, padding(lengths, 40)[:, :, :1]), expected)
    assert torch.equal(layer(x, padding(lengths, 40).expand(-1, 3, -1, -1)), expected)
    strided = padding(lengths, 40)[..., None].expand(-1, -1, -1, -1, 2).contiguous()[..., 0]
    assert strided.stride(3) == 2 and torch.equal(layer(x, strided), expected)
    assert torch.equal(layer(x, torch.ones(1, 1, 40, 40, dtype=torch.bool)), layer(x))


def test_a_mask_with_holes_leaves_those_tokens_out(isa: str) -> None:
    layer = Layer()
    x = layer.input(1, 50)
    seen = torch.rand(50, generator=generator(5)) < 0.6
    y = layer(x, seen[None, None, None])
    assert torch.equal(y[:, seen], layer(x[:, seen])) and (y[:, ~seen] == 0).all()


def test_a_mask_of_each_head_and_query(isa: str) -> None:
    layer = Layer(wide=200)
    x = layer.input(2, 33)
    bias = torch.randn(2, 3, 33, 33, generator=generator(9)) * 3
    assert_close(layer(x, bias), layer.reference(x, bias))
    seen = torch.rand(2, 1, 33, 33, generator=generator(10)) < 0.5
    seen[0, 0, 4] = False  # a query without any key takes the mean of all
    assert_close(layer(x, seen), layer.reference(x, seen))
    causal = torch.ones(1, 1, 33, 33, dtype=torch.bool).tril()
    # What a token sees stays when later ones change (values are quantized over the sentence: to that accuracy).
    changed = torch.cat([x[:, :20], layer.input(2, 13, seed=77)], 1)
    near = (layer(x, causal) - layer(changed, causal))[:, :20]
    assert near.norm() / layer(x, causal)[:, :20].norm() < 0.02


def test_position_bias(isa: str) -> None:
    """With padding on either side, with holes, with a mask of every query; broadcast, strided, and in 16 bits."""
    layer = Layer(wide=200)
    x, g = layer.input(3, 33), generator(11)
    bias = torch.randn(1, 3, 33, 33, generator=g) * 3
    holes = torch.rand(3, 1, 1, 33, generator=g) < 0.6
    causal = torch.ones(1, 1, 33, 33, dtype=torch.bool).tril()
    for mask in (None, padding([33, 7, 20], 33), padding([33, 7, 20], 33, left=True), holes, causal):
        y = layer(x, mask, position_bias=bias)
        assert_close(y, layer.reference(x, mask, position_bias=bias))
        assert (y - layer(x, mask)).norm() > 0.05 * y.norm()
        for same in (bias.expand(3, -1, -1, -1), bias.transpose(2, 3).contiguous().transpose(2, 3)):
            assert torch.equal(layer(x, mask, position_bias=same), y)
        halved = bias.bfloat16()
        assert torch.equal(layer(x, mask, position_bias=halved), layer(x, mask, position_bias=halved.float()))
    assert_close(
        layer(x, position_bias=bias[:, :1]), layer.reference(x, position_bias=bias[:, :1].expand(-1, 3, -1, -1))
    )


def test_nan_in_a_position_bias_stays_in_its_rows(isa: str) -> None:
    layer = Layer()
    x, bias = layer.input(2, 20), torch.zeros(2, 3, 20, 20)
    expected = layer(x, position_bias=bias)
    bias[1, 2, 4, 5] = torch.nan
    y = layer(x, position_bias=bias)
    assert y[1, 4].isnan().all()
    y[1, 4] = expected[1, 4]
    assert torch.equal(y, expected)
    with pytest.raises(ValueError, match=r"position_bias must be \[2 or 1, 3 or 1, 20 or 1, 20\], got \(20, 20\)$"):
        layer(x, position_bias=bias[0, 0])
    with pytest.raises(TypeError, match="position_bias must be bool or a float added"):
        layer(x, position_bias=bias.double())


def test_all_padding(isa: str) -> None:
    layer = Layer()
    x = layer.input(3, 12)
    y = layer(x, padding([0, 12, 5], 12))
    assert (y[0] == 0).all() and torch.equal(y[1], layer(x[1:2])[0])
    assert (layer(x, padding([0, 0, 0], 12)) == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_sentence(isa: str, value: float) -> None:
    layer = Layer()
    x = layer.input(3, 40)
    expected = layer(x, padding([40, 30, 20], 40))
    x[1, 3, 5] = value
    y = layer(x, padding([40, 30, 20], 40))
    assert torch.equal(y[0], expected[0]) and torch.equal(y[2], expected[2])
    assert y[1, :30].isnan().all() and (y[1, 30:] == 0).all()
    x[1, 35] = value  # padding is not looked at
    assert torch.equal(layer(x, padding([40, 30, 20], 40))[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_product_that_overflows_is_nan(isa: str, part: int) -> None:
    """Queries, keys or values alone beyond fp32's range: no row has an answer."""
    layer = Layer()
    layer.scales[part] = torch.full_like(layer.scales[part], 3e38)
    assert layer(layer.input(1, 20)).isnan().all()


def test_constant_rows_and_zeros(isa: str) -> None:
    layer = Layer()
    for x in (torch.zeros(1, 9, 48), torch.full((1, 9, 48), 1e10), torch.full((2, 3, 48), 1e-40)):
        assert_close(layer(x), layer.reference(x))


def test_strides_of_x(isa: str) -> None:
    layer = Layer()
    x = layer.input(3, 20)
    assert torch.equal(layer(x.transpose(0, 1).contiguous().transpose(0, 1)), layer(x))


def test_nothing() -> None:
    layer = Layer()
    assert layer(torch.zeros(0, 5, 48)).shape == (0, 5, 48) and layer(torch.zeros(2, 0, 48)).shape == (2, 0, 48)


# ---- size


def test_memory_is_linear_in_the_length() -> None:
    """Scores of 8192 tokens are 268 MB a head: the layer must do with far less."""
    code = """
import resource, sys, torch
sys.path[:0] = sys.argv[1:]
from test_encoder import Layer
layer = Layer(hidden=32, heads=2, head_size=16, wide=32)
x = layer.input(1, 8192)
layer(x[:, :64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y = layer(x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, bool(y.isfinite().all()))
"""
    here = Path(__file__).parent
    command = [sys.executable, "-c", code, str(here), str(here.parent / "support")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    kilobytes, finite = done.stdout.split()
    assert int(kilobytes) < 40_000 and finite == "True"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[20, 20], [20, 7]])
def test_factors_reach_the_products_and_not_the_residuals(isa: str, dtype: torch.dtype, lengths: list[int]) -> None:
    layer = Layer(dtype=dtype)
    x, mask = layer.input(2, 20), padding(lengths, 20)
    factors = [torch.exp2(torch.randint(-3, 4, (48,), generator=generator(seed)).float()) for seed in (5, 6)]
    y = layer(x, mask, factors=factors)
    assert_close(y, layer.reference(x, mask, factors=factors), dtype)
    assert torch.equal(layer(x, mask, factors=[torch.ones(48)] * 2), layer(x, mask))
    for one in ([factors[0], torch.ones(48)], [torch.ones(48), factors[1]]):
        assert not torch.equal(layer(x, mask, factors=one), layer(x, mask))
        assert not torch.equal(layer(x, mask, factors=one), y)


@pytest.mark.parametrize("scheme", [None, NF4(blocksize=32), FP4(blocksize=32, double_quant=True)])
def test_the_operator_passes_opcheck(scheme: Scheme | None) -> None:
    layer = Layer(0, 64, 2, 32, 128, scheme=scheme) if scheme else Layer()
    arguments = (
        layer.input(2, 6),
        padding([6, 3], 6),
        layer.packed,
        layer.scales,
        layer.biases,
        layer.norms,
        *layer.rest,
    )
    torch.library.opcheck(encoder_layer.default, arguments)
    assert ops_encoder.LINEARS[0] == "query"
