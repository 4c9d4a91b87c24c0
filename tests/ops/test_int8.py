"""The INT8 product, packed weight and linear: exact, the same bits on every ISA, in every batch, on any threads."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import EDGES, FINITE, FLOATS, INFINITE, NAN, floats, integers, seeds, sizes, strided, strides, with_ties
from torch import Tensor

from pyqkern import _C, choose_qparams_affine, int8_matmul, isas, quantize_affine
from pyqkern.backends import ACTIVATIONS, reference

ops = torch.ops.pyqkern
INTS = [torch.int8, torch.uint8]
HOW = [(False, 8), (True, 8), (False, 7)]  # activations: whether symmetric, bits
hows = st.sampled_from(HOW)


def exact(a: Tensor, w: Tensor) -> Tensor:
    return (a.long() @ w.long().T).int()


# ---- the product


@given(m=sizes, k=sizes, n=sizes, seed=seeds, dtype=st.sampled_from(INTS), how=st.tuples(strides, strides))
@example(m=0, k=5, n=3, seed=0, dtype=torch.int8, how=("contiguous", "contiguous"))
@example(m=3, k=0, n=3, seed=0, dtype=torch.int8, how=("contiguous", "contiguous"))
@example(m=3, k=5, n=0, seed=0, dtype=torch.int8, how=("contiguous", "contiguous"))
def test_matmul_is_exact(isa: str, m: int, k: int, n: int, seed: int, dtype: torch.dtype, how: tuple[str, str]) -> None:
    a = strided(integers((m, k), seed, dtype), how[0])
    w = strided(integers((n, k), seed + 1, torch.int8), how[1])
    y = int8_matmul(a, w)
    assert y.dtype is torch.int32 and y.is_contiguous() and torch.equal(y, exact(a, w))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 63, 64, 65, 128, 768, 3072])
@pytest.mark.parametrize("m, n", [(1, 1), (1, 17), (4, 64), (5, 33), (7, 48), (9, 100), (33, 65)])
def test_matmul_of_extremes(isa: str, m: int, k: int, n: int) -> None:
    """All elements at an end of the range: what saturating 16-bit sums get wrong."""
    for a_value, dtype in (
        (127, torch.int8),
        (-128, torch.int8),
        (-127, torch.int8),
        (255, torch.uint8),
        (1, torch.uint8),
    ):
        for w_value in (127, -128, -127):
            a, w = torch.full((m, k), a_value, dtype=dtype), torch.full((n, k), w_value, dtype=torch.int8)
            assert (int8_matmul(a, w) == a_value * w_value * k).all()


def test_matmul_of_batches(isa: str) -> None:
    a, w = integers((2, 3, 5, 40), 1, torch.int8), integers((7, 40), 2, torch.int8)
    assert torch.equal(int8_matmul(a, w), (a.long() @ w.long().T).int())
    assert int8_matmul(a[:, :0], w).shape == (2, 0, 5, 7)


@pytest.mark.parametrize("m, k, n", [(130, 768, 768), (3, 3072, 3000), (1000, 64, 70), (500, 2000, 20)])
def test_matmul_on_two_threads(isa: str, two_threads: None, m: int, k: int, n: int) -> None:
    a, w = integers((m, k), 1, torch.uint8), integers((n, k), 2, torch.int8)
    assert torch.equal(int8_matmul(a, w), (a.double() @ w.double().T).int())


# ---- the packed weight


@given(n=sizes, k=sizes, seed=seeds, how=strides)
def test_pack_has_the_documented_layout_and_unpacks(isa: str, n: int, k: int, seed: int, how: str) -> None:
    w = strided(integers((n, k), seed, torch.int8), how)
    packed = ops.int8_pack(w)
    assert torch.equal(packed, reference.panels(w))
    assert torch.equal(ops.int8_unpack(packed, n, k), w)


# ---- the linear


def arguments(
    m: int,
    k: int,
    n: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    bias_dtype: torch.dtype | None = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    x = floats((m, k), seed, dtype)
    w = integers((n, k), seed + 1, torch.int8)
    scale = torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 0.01 + 1e-4
    bias = None if bias_dtype is None else floats((n,), seed + 2, bias_dtype)
    return x, w, scale, bias


def linear(
    x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None, activation: str = "none",
    symmetric: bool = False, bits: int = 8,
) -> Tensor:  # fmt: skip
    return ops.int8_linear(x, ops.int8_pack(w), scale, bias, activation, symmetric, bits)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, except that one NaN is as good as another."""
    return a.dtype is b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


@given(
    m=sizes, k=sizes, n=sizes, seed=seeds, dtype=st.sampled_from(FLOATS), how=strides,
    bias_dtype=st.sampled_from([None, *FLOATS]), activation=st.sampled_from(["none", "relu"]), rows=hows,
)  # fmt: skip
def test_linear_is_the_reference_bit_for_bit(
    isa: str, m: int, k: int, n: int, seed: int, dtype: torch.dtype, how: str, bias_dtype: torch.dtype | None,
    activation: str, rows: tuple[bool, int],
) -> None:  # fmt: skip
    x, w, scale, bias = arguments(m, k, n, seed, dtype, bias_dtype)
    y = linear(strided(x, how), w, scale, bias, activation, *rows)
    if m == 0 or n == 0 or k == 0:
        nothing = torch.zeros(m, n) if bias is None else torch.zeros(m, n) + bias
        assert same(y, reference.activate(nothing, activation).to(dtype))
    else:
        assert same(y, reference.int8_linear(x, w, scale, bias, activation, *rows))


@given(
    m=st.integers(1, 9),
    k=st.sampled_from(EDGES),
    n=st.sampled_from(EDGES),
    seed=seeds,
    dtype=st.sampled_from(FLOATS),
    how=hows,
)
def test_linear_of_extreme_rows_is_the_reference(
    isa: str, m: int, k: int, n: int, seed: int, dtype: torch.dtype, how: tuple[bool, int]
) -> None:
    x, w, scale, bias = arguments(m, k, n, seed, dtype)
    x = floats((m, k), seed, dtype, FINITE)
    x[seed % m] = floats((k,), seed, dtype, FINITE + INFINITE + NAN)
    assert same(linear(x, w, scale, bias, "none", *how), reference.int8_linear(x, w, scale, bias, "none", *how))


@given(seed=seeds, k=st.integers(3, 300), symmetric=st.booleans())
def test_rows_full_of_ties_are_the_reference(isa: str, seed: int, k: int, symmetric: bool) -> None:
    """Elements where the quantizer's rounding is decided, between a least and a greatest that fix the scale."""
    x = floats((5, k), seed)
    x[:, 0], x[:, 1] = -1 - seed % 7, 2 + seed % 5
    scale, _ = choose_qparams_affine(x[:, :2], dtype=torch.uint8, axis=0, symmetric=symmetric)
    x[:, 2:] = with_ties(x[:, 2:], scale[:, None], seed).clamp(x[:, :1], x[:, 1:2])
    _, w, w_scale, bias = arguments(1, k, 9, seed)
    assert same(
        linear(x, w, w_scale, bias, "none", symmetric), reference.int8_linear(x, w, w_scale, bias, "none", symmetric)
    )


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("m", [1, 4, 5, 40])
@pytest.mark.parametrize("k", [64, 765, 3072])
def test_linear_of_all_extremes(isa: str, m: int, k: int, how: tuple[bool, int]) -> None:
    """Codes of 255 and 0 (127 and -127, 127 and 0) against weights at both ends: the largest sums there are."""
    ones = torch.ones(m, k)
    for x in (ones, -ones, torch.where(torch.arange(k) % 2 == 0, 1.0, -1.0).expand(m, k)):
        for value in (127, -127, -128):
            w = torch.full((33, k), value, dtype=torch.int8)
            scale = torch.ones(33)
            y = linear(x, w, scale, None, "none", *how)
            assert same(y, reference.int8_linear(x, w, scale, None, "none", *how))
            # One code of x is one part in 127; the scale 1/255 or 1/127 is rounded to fp32, relative 2**-24, twice.
            # With a zero point between both signs, that is rounded by half of the step, which is 2 / levels.
            error = 1.001 / (2 ** how[1] - 1) if not how[0] and x.min() < 0 < x.max() else 2.0**-22
            assert ((y - x.sum(1, keepdim=True) * value).abs() <= k * 128 * error).all()


def test_linear_is_its_parts(isa: str) -> None:
    """The operators that the linear is made of, one behind the other, give the same bits."""
    x, w, scale, bias = arguments(9, 200, 70, 1)
    for symmetric in (False, True):
        x_scale, zero = choose_qparams_affine(x, dtype=torch.uint8, axis=0, symmetric=symmetric)
        q = quantize_affine(x, x_scale, zero, axis=0, dtype=torch.uint8)
        sums = int8_matmul(q, w) - zero[:, None] * w.sum(1, dtype=torch.int32)
        y = (x_scale[:, None] * scale) * sums.float() + bias
        assert torch.equal(linear(x, w, scale, bias, "none", symmetric), y)


def test_rows_of_zeros_give_the_bias_and_bad_rows_nan(isa: str) -> None:
    x, w, scale, bias = arguments(6, 100, 50, 3)
    expected = linear(x, w, scale, bias)
    x[1] = 0
    x[3, 7], x[4, 99], x[5, 0] = float("nan"), float("inf"), float("-inf")
    for activation in ("none", "relu", "gelu", "gelu_tanh"):
        y = linear(x, w, scale, bias, activation)
        assert y[3:].isnan().all() and y[:3].isfinite().all()
        if activation == "none":
            assert torch.equal(y[1], bias) and torch.equal(y[[0, 2]], expected[[0, 2]])


@given(
    m=st.integers(1, 70),
    k=st.sampled_from(EDGES),
    n=st.sampled_from(EDGES),
    seed=seeds,
    dtype=st.sampled_from(FLOATS),
    activation=st.sampled_from(["none", "gelu", "gelu_tanh"]),
    how=hows,
)
def test_a_row_has_the_same_bits_in_every_batch(
    isa: str, m: int, k: int, n: int, seed: int, dtype: torch.dtype, activation: str, how: tuple[bool, int]
) -> None:
    x, w, scale, bias = arguments(m, k, n, seed, dtype)
    rest = (w, scale, bias, activation, *how)
    y, row = linear(x, *rest), seed % m
    assert same(linear(x[row : row + 1], *rest), y[row : row + 1])
    assert same(linear(x[row], *rest), y[row])
    assert same(linear(torch.cat([x, x]), *rest), torch.cat([y, y]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m, k, n", [(1, 768, 3072), (3, 3072, 768), (16, 768, 768), (130, 300, 770), (700, 96, 40)])
def test_every_isa_and_thread_count_gives_the_same_bits(
    two_threads: None, activation: str, how: tuple[bool, int], dtype: torch.dtype, m: int, k: int, n: int
) -> None:
    x, w, scale, bias = arguments(m, k, n, 11, dtype)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for isa in isas():
            previous = _C.set_isa(isa)
            results.append(linear(x, w, scale, bias, activation, *how))
            _C.set_isa(previous)
    assert all(same(result, results[0]) for result in results)


@given(n=st.sampled_from(EDGES), seed=seeds, tanh=st.booleans())
def test_gelu_error(isa: str, n: int, seed: int, tanh: bool) -> None:
    """Against fp64's GELU of the same fp32 sums.

    |error| <= 4 * 2**-24 * |v| for both. erf: y = fma(v, 1/2, |v| * E), E = erf(|v| / sqrt 2) / 2 <= 1/2; in units of
    2**-24 the polynomials of E err by 1.43, their last fma rounds by 0.25, the product by 0.5 and the fma by 1: 3.2.
    tanh: y = v / (1 + exp(-2u)); u errs by 3 * 2**-24, relative, which moves y by at most 0.224 * 3, exp errs by 1 ulp
    (0.25 * 2), sum and quotient round: 0.67 + 0.5 + 2 = 3.2.
    """
    x, w, scale, bias = arguments(5, 64, n, seed)
    v = linear(x, w, scale, bias)
    y = linear(x, w, scale, bias, "gelu_tanh" if tanh else "gelu")
    expected = torch.nn.functional.gelu(v.double(), approximate="tanh" if tanh else "none")
    assert ((y.double() - expected).abs() <= 4 * 2.0**-24 * v.abs().double() + 2.0**-126).all()


def test_gelu_everywhere(isa: str) -> None:
    """Every 1009th of all fp32 numbers as the value before GELU: the same bound, and the limits at both ends."""
    v = torch.arange(0, 2**32, 1009).to(torch.uint32).view(torch.float32)
    v = v[v.isfinite() & (v.abs() < 1e30)]
    n = v.numel()
    w = torch.zeros((n, 4), dtype=torch.int8)
    for activation, approximate in (("gelu", "none"), ("gelu_tanh", "tanh")):
        y = linear(torch.zeros(1, 4), w, torch.ones(n), v, activation)[0].double()
        expected = torch.nn.functional.gelu(v.double(), approximate=approximate)
        expected = torch.where(v < -40, 0.0, expected)  # fp64's tanh form has no bits left there
        assert ((y - expected).abs() <= 4 * 2.0**-24 * v.abs().double() + 2.0**-126).all()
        assert (y[v > 10] == v[v > 10]).all()


@given(seed=seeds, m=st.integers(1, 5), k=st.integers(1, 300), how=hows)
def test_linear_is_close_to_float(isa: str, seed: int, m: int, k: int, how: tuple[bool, int]) -> None:
    """|error| <= (half a step of x and its zero point's rounding) * sum |w| + half a step of w * sum |x| + both."""
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(m, k, generator=g), torch.randn(20, k, generator=g)
    scale, _ = choose_qparams_affine(weight, axis=0, symmetric=True)
    y = linear(x, quantize_affine(weight, scale, axis=0), scale, None, "none", *how)
    lo, hi = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    symmetric, bits = how
    x_step = (2 * torch.maximum(-lo, hi) / 254 if symmetric else (hi - lo) / (2**bits - 1)).double()
    x_error = x_step * (0.5 if symmetric else 1.0)
    w_error = scale.double() / 2
    x64, w64 = x.double(), weight.double()
    bound = x_error * w64.abs().sum(1) + x64.abs().sum(1, keepdim=True) * w_error + k * x_error * w_error
    assert ((y.double() - x64 @ w64.T).abs() <= bound * 1.0001).all()


# ---- activations of 7 bits, whose products are added in int16 where the marks of the packed weight allow it


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 16])
@pytest.mark.parametrize("k", [8, 16, 1000, 1024, 1040, 4096, 4104, 8200])
def test_sums_of_7_bits_are_exact_at_the_end_of_int16(isa: str, m: int, k: int) -> None:
    """Codes of 127 against four weights of a lane that sum to 258, which int16 holds 127 times, and to 259 or less."""
    x = torch.ones(m, k)
    for fours in ([127, 127, 4, 0], [127, 127, 5, 0], [-127, -127, -5, 0], [127, 127, 127, 127], [-128] * 4):
        for first in (0, 2):  # k of a lane: first + {0, 1, 4, 5}
            w = torch.zeros(33, k, dtype=torch.int8)
            for column in range(33):
                at = 8 * (column * 37 % (k // 8)) + first
                w[column, at : at + 2], w[column, at + 4 : at + 6] = torch.tensor(fours, dtype=torch.int8).view(2, 2)
            y = ops.int8_linear(x, ops.int8_pack(w), torch.full((33,), 127.0), None, "none", False, 7)
            assert (y.round() == sum(fours) * 127).all()


@given(m=st.integers(1, 9), k=st.sampled_from(EDGES), n=st.sampled_from(EDGES), seed=seeds, share=st.floats(0, 1))
def test_7_bits_with_any_weights_marked(isa: str, m: int, k: int, n: int, seed: int, share: float) -> None:
    """Weights at the ends of their range among small ones, rows at the ends of theirs: runs of marks of any length."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randint(-60, 61, (n, k), generator=g)
    w = torch.where(torch.rand(1, k, generator=g) < share, w.sign() * 127 - (w == 0) * 128, w).to(torch.int8)
    x = torch.randint(-1, 2, (m, k), generator=g).float()
    scale = torch.ones(n)
    assert same(linear(x, w, scale, None, "none", False, 7), reference.int8_linear(x, w, scale, None, "none", False, 7))


def test_marks_that_lie_are_not_read_past_the_weight(isa: str) -> None:
    """A packed tensor that int8_pack did not make: wrong numbers, but of this tensor."""
    for k in (8, 100, 1025):
        packed = torch.full_like(ops.int8_pack(torch.zeros(20, k, dtype=torch.int8)), -1)
        assert ops.int8_linear(torch.ones(7, k), packed, torch.ones(20), None, "none", False, 7).isfinite().all()


@given(
    m=sizes.filter(bool), k=sizes.filter(bool), n=sizes.filter(bool), seed=seeds, dtype=st.sampled_from(FLOATS),
    bits=st.sampled_from([8, 7]),
)  # fmt: skip
def test_static_linear_of_both_widths_is_the_reference(
    isa: str, m: int, k: int, n: int, seed: int, dtype: torch.dtype, bits: int
) -> None:
    x, w, scale, bias = arguments(m, k, n, seed, dtype)
    qparams = torch.tensor([0.01 + seed % 7 / 100]), torch.tensor([seed % 2**bits], dtype=torch.int32)
    y = ops.int8_linear_static(x, ops.int8_pack(w), scale, bias, "relu", *qparams, bits)
    assert same(y, reference.int8_linear_static(x, w, scale, bias, "relu", *qparams, bits))


# ---- bad input

A = torch.zeros(3, 8, dtype=torch.int8)
X, W, S = torch.zeros(3, 8), torch.zeros(5, 8, dtype=torch.int8), torch.ones(5)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: int8_matmul([1], A), TypeError, "a must be a torch.Tensor, got list"),
        (lambda: int8_matmul(A.float(), A), TypeError, "a must be torch.int8 or torch.uint8, got float32"),
        (lambda: int8_matmul(A, A.to(torch.uint8)), TypeError, "w must be torch.int8, got torch.uint8"),
        (lambda: int8_matmul(A[0], A), ValueError, r"a must be \[..., M, K\] and w \[N, K\], got shapes \(8,\)"),
        (lambda: int8_matmul(A, A[None]), ValueError, r"and \(1, 3, 8\)"),
        (lambda: int8_matmul(A, A.T), ValueError, "a and w must have the same K, got 8 in a .* and 3 in w"),
        (lambda: int8_matmul(A, A.to("meta")), ValueError, "a and w must be on one device, got cpu and meta"),
        (lambda: ops.int8_pack(A.float()), TypeError, "weight must be torch.int8"),
        (lambda: ops.int8_pack(A[0]), ValueError, r"weight must be \[N, K\]"),
        (lambda: ops.int8_unpack(A, 3, 8), ValueError, r"packed must be what int8_pack makes of \[3, 8\] on cpu"),
        (lambda: ops.int8_unpack(ops.int8_pack(A), 17, 8), ValueError, "packed must be"),
        (lambda: ops.int8_unpack(ops.int8_pack(A), -3, 8), ValueError, "packed must be"),
        (lambda: linear(X.double(), W, S, None), TypeError, "x must be float32, bfloat16 or float16, got float64"),
        (lambda: linear(torch.tensor(1.0), W, S, None), ValueError, "x must be .* got a 0-dim tensor"),
        (
            lambda: linear(torch.zeros(3, 88), W, S, None),
            ValueError,
            r"packed must be what int8_pack makes of \[5, 88\]",
        ),
        (lambda: linear(X, W, torch.ones(40), None), ValueError, r"of \[40, 8\]"),
        (lambda: linear(X, W, S.double(), None), TypeError, "weight_scale must be float32, got torch.float64"),
        (lambda: linear(X, W, S[None], None), ValueError, "weight_scale must be float32"),
        (lambda: linear(X, W, S, torch.ones(4)), ValueError, r"bias must have shape \(5,\), got \(4,\)"),
        (lambda: linear(X, W, S, S.double()), TypeError, "bias must be float32"),
        (
            lambda: linear(X, W, S, None, "swish"),
            ValueError,
            "activation must be one of none, relu, gelu, gelu_tanh, got 'swish'",
        ),
        (lambda: linear(X.to("meta"), W, S, None), ValueError, "must be on meta, got cpu and cpu"),
        (lambda: linear(X, W, S.to("meta"), None), ValueError, "must be on cpu, got cpu and meta"),
        (lambda: ops.int8_linear(X, W, S, None, "none", False), ValueError, "packed must be what int8_pack makes"),
        (lambda: linear(X, W, S, None, "none", False, 6), ValueError, "bits must be 8 or 7, got 6"),
        (lambda: linear(X, W, S, None, "none", True, 7), ValueError, "bits must be 8 for symmetric activations, got 7"),
    ],
)
def test_bad_input(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()


def test_k_of_many_sizes_and_odd_strides_of_the_packed_weight(isa: str) -> None:
    """A packed weight or a scale that is not contiguous is copied, not misread."""
    x, w, scale, bias = arguments(3, 70, 40, 5)
    packed = ops.int8_pack(w)
    wide = torch.stack([packed, packed + 1], -1)[..., 0]
    scales = torch.stack([scale, scale * 2], -1)[:, 0]
    biases = torch.stack([bias, bias * 2], -1)[:, 0]
    assert not wide.is_contiguous() and not scales.is_contiguous()
    assert torch.equal(ops.int8_linear(x, wide, scales, biases, "none", False), linear(x, w, scale, bias))
    assert math.prod(packed.shape) == packed.numel()
