"""Uniform 4-bit: quantize_affine(bits=4), pack_int4 and the scheme "int4"."""

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOATS, floats, seeds, strided, strides
from torch import nn

import pyqkern
from pyqkern import QLinear, choose_qparams_affine, dequantize_affine, pack_int4, quantize_affine, unpack_int4
from pyqkern.backends import Weight4bit, reference
from pyqkern.nn.four_bit import Int4Linear
from pyqkern.schemes import Int4

INTS = [torch.int8, torch.uint8]
RANGE = {torch.int8: (-8, 7), torch.uint8: (0, 15)}


@given(
    n=st.integers(1, 20), groups=st.integers(1, 5), group_size=st.sampled_from([2, 7, 32, 64]), seed=seeds,
    dtype=st.sampled_from(FLOATS), qtype=st.sampled_from(INTS), symmetric=st.booleans(), how=strides,
)  # fmt: skip
def test_quantize_per_group(
    isa: str,
    n: int,
    groups: int,
    group_size: int,
    seed: int,
    dtype: torch.dtype,
    qtype: torch.dtype,
    symmetric: bool,
    how: str,
) -> None:
    x = strided(floats((n, groups * group_size), seed, dtype), how)
    scale, zero_point = choose_qparams_affine(x, dtype=qtype, group_size=group_size, symmetric=symmetric, bits=4)
    q = quantize_affine(x, scale, zero_point, group_size=group_size, dtype=qtype, bits=4)
    qmin, qmax = RANGE[qtype]
    assert q.dtype is qtype and qmin <= q.min() and q.max() <= qmax
    if symmetric:
        assert (zero_point == (0 if qtype is torch.int8 else 8)).all()
        absmax = x.float().view(n, groups, group_size).abs().amax(-1)
        assert torch.equal(scale, torch.where(absmax == 0, 1.0, (absmax / 7).clamp(min=2.0**-126)))
    inverse, zero = (1 / scale).repeat_interleave(group_size, 1), zero_point.repeat_interleave(group_size, 1)
    expected = (x.float() * inverse + zero.float()).round().clamp(qmin, qmax)
    assert torch.equal(q.float(), expected)
    y = dequantize_affine(q, scale, zero_point, group_size=group_size)
    assert torch.equal(y, scale.repeat_interleave(group_size, 1) * (q.float() - zero))
    assert torch.equal(unpack_int4(pack_int4(q), q.shape, qtype), q)


def test_quantize_per_tensor_keeps_the_range() -> None:
    q = quantize_affine(torch.tensor([-1e9, -7.5, 0.5, 6.5, 1e9, float("nan")]), 1.0, bits=4)
    assert q.tolist() == [-8, -8, 0, 6, 7, 0]


def test_pack_layout() -> None:
    assert pack_int4(torch.tensor([1, -1, 7, -8, 3], dtype=torch.int8)).tolist() == [0x1F, 0x78, 0x30]
    assert pack_int4(torch.tensor([[1, 15], [7, 8]], dtype=torch.uint8)).tolist() == [0x1F, 0x78]
    assert pack_int4(torch.zeros(0, dtype=torch.int8)).shape == (0,)
    every = torch.arange(-8, 8, dtype=torch.int8)
    assert torch.equal(unpack_int4(pack_int4(every), (4, 4)), every.view(4, 4))


# ---- the scheme


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("n", [5, 16, 100])
def test_linear(isa: str, group_size: int, n: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(384, n)
    layer = QLinear.from_linear(linear, Int4(group_size=group_size, compute="int8"))
    assert type(layer) is Int4Linear
    scale, _ = choose_qparams_affine(linear.weight, group_size=group_size, symmetric=True, bits=4)
    q = quantize_affine(linear.weight, scale, group_size=group_size, bits=4)
    assert torch.equal(layer.weight, dequantize_affine(q, scale, group_size=group_size))
    state = layer.state_dict()
    assert torch.equal(unpack_int4(state["weight"], (n, 384)), q) and torch.equal(state["absmax"], scale.flatten())
    for m in (1, 4, 7, 50):
        x = floats((m, 384), m)
        with torch.no_grad():
            y = layer(x)
        if n >= 16:
            weight = Weight4bit(state["weight"], state["absmax"], None, None, None, "int4", group_size, (n, 384))
            assert torch.equal(y, reference.linear_4bit(x, weight, layer.bias, "int8"))


def test_products_of_integers_are_exact(isa: str) -> None:
    """Activations that are codes already, and scales of one: every sum is the integer."""
    linear = nn.Linear(256, 32, bias=False)
    g = torch.Generator().manual_seed(0)
    w = torch.randint(-7, 8, (32, 256), generator=g).float()
    w[:, ::32] = 7  # so that every scale is 1
    linear.weight = nn.Parameter(w)
    layer = QLinear.from_linear(linear, Int4(group_size=64, compute="int8"))
    x = torch.randint(-127, 128, (9, 256), generator=g).float()
    x[:, 0] = 127
    with torch.no_grad():
        assert torch.equal(layer(x), x @ w.T)


def test_saved_and_loaded_and_counted() -> None:
    model = nn.Sequential(nn.Linear(768, 768, bias=False))
    pyqkern.replace_linear(model, Int4(group_size=128))
    assert pyqkern.summary(model).records[0].bytes_after == 768 * 768 // 2 + 768 * 6 * 4
    x = floats((3, 768), 1)
    with torch.no_grad():
        y = model(x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    empty = nn.Sequential(Int4Linear(768, 768, bias=False, scheme=Int4(group_size=128)))
    empty.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        assert torch.equal(empty(x), y)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: Int4(group_size=48), ValueError, "group_size must be 32, 64 or 128, got 48"),
        (lambda: Int4(compute="int4"), ValueError, "compute must be one of"),
        (
            lambda: QLinear.from_linear(nn.Linear(96, 4), "int4"),
            ValueError,
            "must divide in_features=96, got 64; use 32",
        ),
        (
            lambda: QLinear.from_linear(nn.Linear(70, 4), "int4"),
            ValueError,
            'got 64; use "nf4", whose blocks cross rows',
        ),
        (lambda: pack_int4(torch.tensor([8], dtype=torch.int8)), ValueError, r"q must be within \[-8, 7\], got 8"),
        (lambda: pack_int4(torch.tensor([16], dtype=torch.uint8)), ValueError, r"within \[0, 15\], got 16"),
        (lambda: pack_int4(torch.zeros(2)), TypeError, "q must be torch.int8 or torch.uint8"),
        (lambda: unpack_int4(torch.zeros(2, dtype=torch.uint8), (5,)), ValueError, "packed must have 3 elements"),
        (lambda: unpack_int4(torch.zeros(2, dtype=torch.int8), (4,)), TypeError, "packed must be torch.uint8"),
        (lambda: quantize_affine(torch.ones(2), 1.0, bits=5), ValueError, "bits must be 4 or 8, got 5"),
        (lambda: quantize_affine(torch.ones(2), 1.0, 8, bits=4), ValueError, r"zero_point must be within \[-8, 7\]"),
    ],
)
def test_bad_input(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()
