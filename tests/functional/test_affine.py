"""Affine quantization: against torch's own, against the reference, on every ISA."""

import math
import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import FINITE, FLOATS, INFINITE, NAN, floats, integers, seeds, sizes, strided, strides, with_ties
from torch import Tensor

from pyqkern import choose_qparams_affine, dequantize_affine, quantize_affine
from pyqkern.backends import QRANGE, reference
from pyqkern.ops.checks import cut

QTYPES = list(QRANGE)
TORCH_QTYPES = {torch.int8: torch.qint8, torch.uint8: torch.quint8}

# (shape, axis, group_size), scale's shape by the documentation
CUTS = [
    ((), None, None, ()),
    ((7,), None, None, ()),
    ((3, 70), None, None, ()),
    ((7,), 0, None, (7,)),
    ((3, 70), 0, None, (3,)),
    ((3, 70), -1, None, (70,)),
    ((2, 5, 33), 1, None, (5,)),
    ((2, 5, 33), (0, 1), None, (2, 5)),
    ((2, 5, 33), (0, 2), None, (2, 33)),
    ((2, 5, 33), (2, 0), None, (33, 2)),
    ((2, 5, 33), (0, 1, 2), None, (2, 5, 33)),
    ((2, 3, 4, 5), 1, None, (3,)),
    ((3, 64), None, 32, (3, 2)),
    ((3, 64), 1, 1, (3, 64)),
    ((6, 5), 0, 3, (2, 5)),
    ((2, 6, 5), -2, 2, (2, 3, 5)),
    ((0, 64), None, 32, (0, 2)),
    ((4, 0), 0, None, (4,)),
    ((0, 4), 1, None, (4,)),
]


def expanded(values: Tensor, shape: tuple[int, ...], axis: object, group_size: int | None) -> Tensor:
    """Scale or zero point, one for each element of x: the documentation's meaning of axis and group_size, spelt out."""
    axes = [] if axis is None else [a % len(shape) for a in ([axis] if isinstance(axis, int) else axis)]  # type: ignore[union-attr]
    if group_size is not None:
        return values.repeat_interleave(group_size, dim=axes[0] if axes else -1)
    index = [torch.arange(shape[a]).view([-1 if d == a else 1 for d in range(len(shape))]) for a in axes]
    return values[tuple(index)].expand(shape) if axes else values.expand(shape)


def qparams(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    scale = 10.0 ** (torch.rand(shape, generator=g) * 6 - 4)
    low, high = QRANGE[dtype]
    return scale, torch.randint(low, high + 1, shape, generator=g, dtype=torch.int32)


@pytest.mark.parametrize("shape, axis, group_size, expected", CUTS)
@pytest.mark.parametrize("dtype", QTYPES)
def test_every_granularity_is_the_formula_elementwise(
    isa: str,
    shape: tuple[int, ...],
    axis: object,
    group_size: int | None,
    expected: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    x = floats(shape, 1, extremes=FINITE + INFINITE + NAN)
    scale, zero_point = qparams(expected, 2, dtype)
    q = quantize_affine(x, scale, zero_point, axis=axis, group_size=group_size, dtype=dtype)  # type: ignore[arg-type]
    s, z = expanded(scale, shape, axis, group_size), expanded(zero_point, shape, axis, group_size)
    inverse, z32 = 1 / s, z.float()
    value = reference.fma(x, inverse, z32) if not expected else x * inverse + z32
    low, high = QRANGE[dtype]
    assert torch.equal(q, torch.where(value.isnan(), z32, value.round().clamp(low, high)).to(dtype))
    y = dequantize_affine(q, scale, zero_point, axis=axis, group_size=group_size)  # type: ignore[arg-type]
    assert torch.equal(y, s * (q.int() - z).float())
    chosen, zero = choose_qparams_affine(x.nan_to_num(1, 2, -3), axis=axis, group_size=group_size, dtype=dtype)  # type: ignore[arg-type]
    assert chosen.shape == zero.shape == expected and zero.dtype is torch.int32 and chosen.dtype is torch.float32


@given(
    n=sizes,
    seed=seeds,
    how=strides,
    log_scale=st.floats(-8, 8),
    qtype=st.sampled_from(QTYPES),
    zero=st.integers(0, 255),
)
@example(n=1, seed=0, how="contiguous", log_scale=0.0, qtype=torch.int8, zero=129)  # 0.5 at an odd zero point
def test_per_tensor_is_torch_quantize_per_tensor(
    isa: str, n: int, seed: int, how: str, log_scale: float, qtype: torch.dtype, zero: int
) -> None:
    scale, zero_point = 10.0**log_scale, zero + QRANGE[qtype][0]
    x = strided(with_ties(floats((n, 50), seed, extremes=FINITE + INFINITE), scale, seed), how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of these functions
        expected = torch.quantize_per_tensor(x, scale, zero_point, TORCH_QTYPES[qtype])
    q = quantize_affine(x, scale, zero_point, dtype=qtype)
    assert torch.equal(q, expected.int_repr())
    assert torch.equal(dequantize_affine(q, scale, zero_point), expected.dequantize())


def test_one_element_is_rounded_like_many(isa: str) -> None:
    """The sum is one fma, 42.5000035 here, which two roundings take for 42.5."""
    x, scale = torch.tensor([-12.738507270812988]), 0.09990986436605453
    for n in (1, 2, 9, 40):
        q = quantize_affine(x.expand(n), scale, 170, dtype=torch.uint8)
        assert q.tolist() == [43] * n
    assert int(quantize_affine(x[0], scale, 170, dtype=torch.uint8)) == 43


@given(
    shape=st.tuples(sizes, st.integers(1, 9), st.integers(1, 40)),
    seed=seeds,
    how=strides,
    axis=st.integers(0, 2),
    qtype=st.sampled_from(QTYPES),
)
def test_per_channel_is_torch_quantize_per_channel(
    isa: str, shape: tuple[int, int, int], seed: int, how: str, axis: int, qtype: torch.dtype
) -> None:
    scale, zero_point = qparams((shape[axis],), seed, qtype)
    ties = scale.view([-1 if d == axis else 1 for d in range(3)])
    x = strided(with_ties(floats(shape, seed, extremes=FINITE + INFINITE), ties, seed), how)
    if shape[0] == 0:
        assert quantize_affine(x, scale, zero_point, axis=axis, dtype=qtype).shape == shape
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch.quantize_per_channel(x, scale, zero_point, axis, TORCH_QTYPES[qtype])
    q = quantize_affine(x, scale, zero_point, axis=axis, dtype=qtype)
    assert torch.equal(q, expected.int_repr())
    assert torch.equal(dequantize_affine(q, scale, zero_point, axis=axis), expected.dequantize())


@given(
    shape=st.tuples(sizes, sizes),
    seed=seeds,
    how=strides,
    dtype=st.sampled_from(FLOATS),
    qtype=st.sampled_from(QTYPES),
    per=st.sampled_from([None, 0, 1]),
)
def test_every_dtype_is_the_reference(
    isa: str, shape: tuple[int, int], seed: int, how: str, dtype: torch.dtype, qtype: torch.dtype, per: int | None
) -> None:
    scale, zero_point = qparams(() if per is None else (shape[per],), seed, qtype)
    ties = scale.view(-1, 1) if per == 0 else scale
    x = strided(with_ties(floats(shape, seed, dtype, FINITE + INFINITE + NAN), ties, seed), how)
    cuts = {None: (1, 1, x.numel()), 0: (1, *shape), 1: (*shape, 1)}[per]
    q = quantize_affine(x, scale, zero_point, axis=per, dtype=qtype)
    assert q.is_contiguous() and q.dtype is qtype
    assert torch.equal(q, reference.quantize(x.contiguous(), cuts, scale, zero_point, qtype, per is None))
    y = dequantize_affine(strided(q, how), scale, zero_point, axis=per, dtype=dtype)
    assert y.dtype is dtype and torch.equal(y, reference.dequantize(q, cuts, scale, zero_point, dtype))


@given(
    shape=st.tuples(sizes, sizes),
    seed=seeds,
    dtype=st.sampled_from(FLOATS),
    qtype=st.sampled_from(QTYPES),
    symmetric=st.booleans(),
    per=st.sampled_from([None, 0, 1]),
)
def test_qparams_are_the_reference_and_cover_the_range(
    isa: str,
    shape: tuple[int, int],
    seed: int,
    dtype: torch.dtype,
    qtype: torch.dtype,
    symmetric: bool,
    per: int | None,
) -> None:
    x = floats(shape, seed, dtype, FINITE).nan_to_num(posinf=1e4, neginf=-1e4)  # 3e38 is infinite in fp16
    scale, zero_point = choose_qparams_affine(x, dtype=qtype, axis=per, symmetric=symmetric)
    cuts = {None: (1, 1, x.numel()), 0: (1, *shape), 1: (*shape, 1)}[per]
    expected = reference.qparams_from_range(*reference.min_max(x, cuts), qtype, symmetric)
    assert torch.equal(scale.flatten(), expected[0]) and torch.equal(zero_point.flatten(), expected[1])
    assert (scale >= 2.0**-126).all()
    low, high = QRANGE[qtype]
    assert ((low <= zero_point) & (zero_point <= high)).all()
    if symmetric:
        assert (zero_point == (0 if low < 0 else 128)).all()
    q = quantize_affine(x, scale, zero_point, axis=per, dtype=qtype)
    error = (dequantize_affine(q, scale, zero_point, axis=per).double() - x.double()).abs()
    # Half a step from rounding. At the ends another half, since lo and hi move to multiples of the step with the zero
    # point's rounding; roundings of fp32 on the way, in units of the result and of the 255 steps.
    step = expanded(scale, shape, per, None).double()
    assert (error <= step * (1 + 255 * 2.0**-22)).all()


def test_zero_is_exact_and_a_range_of_zero_has_scale_one(isa: str) -> None:
    x = torch.tensor([[0.0, 0.0], [0.0, 3.0], [-1e-45, 0.0], [5.0, 7.0], [-3e38, 3e38]])
    scale, zero_point = choose_qparams_affine(x, axis=0)
    assert scale[0] == 1 and scale[2] == 2.0**-126 and scale.isfinite().all()
    q = quantize_affine(torch.zeros(5, 1), scale, zero_point, axis=0)
    assert (dequantize_affine(q, scale, zero_point, axis=0) == 0).all()
    assert choose_qparams_affine(torch.empty(0))[0] == 1


def test_multiplies_with_the_reciprocal(isa: str) -> None:
    x, scale = torch.tensor(0.273939937), 0.00214854861
    assert quantize_affine(x, scale, dtype=torch.uint8) == 128  # x / scale rounds to 127


@pytest.mark.parametrize("per", [None, 0, 1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_large_tensors(isa: str, two_threads: None, per: int | None, dtype: torch.dtype) -> None:
    """Past the sizes where a second thread joins and where stores bypass the cache: what single rows give."""
    shape = (4099, 4101)
    x = floats((41, shape[1]), 5, dtype, FINITE + INFINITE + NAN).repeat(100, 1)[: shape[0]].contiguous()
    scale, zero_point = qparams(() if per is None else (shape[per],), 6, torch.uint8)
    q = quantize_affine(x, scale, zero_point, axis=per, dtype=torch.uint8)
    y = dequantize_affine(q, scale, zero_point, axis=per, dtype=dtype)
    torch.set_num_threads(1)
    assert torch.equal(q, quantize_affine(x, scale, zero_point, axis=per, dtype=torch.uint8))
    assert torch.equal(y, dequantize_affine(q, scale, zero_point, axis=per, dtype=dtype))
    rows = torch.arange(0, shape[0], 97)
    part = (scale, zero_point) if per != 0 else (scale[rows], zero_point[rows])
    assert torch.equal(q[rows], quantize_affine(x[rows], *part, axis=per, dtype=torch.uint8))
    assert torch.equal(y[rows], dequantize_affine(q[rows], *part, axis=per, dtype=dtype))
    x = x.nan_to_num(0, 1, -1)
    torch.set_num_threads(2)
    chosen, _ = choose_qparams_affine(x, axis=per, dtype=torch.uint8)
    cuts = {None: (1, 1, x.numel()), 0: (1, *shape), 1: (*shape, 1)}[per]
    assert torch.equal(
        chosen.flatten(), reference.qparams_from_range(*reference.min_max(x, cuts), torch.uint8, False)[0]
    )


def test_group_is_per_channel_of_the_reshaped(isa: str) -> None:
    x = floats((6, 96), 3)
    scale, zero_point = choose_qparams_affine(x, group_size=32)
    flat, flat_zero = choose_qparams_affine(x.view(18, 32), axis=0)
    assert torch.equal(scale.flatten(), flat) and torch.equal(zero_point.flatten(), flat_zero)
    q = quantize_affine(x, scale, zero_point, group_size=32)
    assert torch.equal(q.view(18, 32), quantize_affine(x.view(18, 32), flat, flat_zero, axis=0))


def test_integer_dtypes_of_zero_point_and_float_dtypes_of_scale() -> None:
    x = floats((9,), 4)
    expected = quantize_affine(x, 0.5, 3)
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int64):
        assert torch.equal(quantize_affine(x, torch.tensor(0.5), torch.tensor(3, dtype=dtype)), expected)
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(quantize_affine(x, torch.tensor(0.5, dtype=dtype), 3), expected)


X = torch.ones(4, 6)
NAN_SCALE, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: quantize_affine([1.0], 1.0), TypeError, "x must be a torch.Tensor, got list"),
        (lambda: quantize_affine(X.double(), 1.0), TypeError, "x must be float32, bfloat16 or float16, got float64"),
        (lambda: quantize_affine(X.int(), 1.0), TypeError, "got int32"),
        (
            lambda: quantize_affine(X, 1.0, dtype=torch.int16),
            TypeError,
            "dtype must be torch.int8 or torch.uint8, got int16",
        ),
        (lambda: quantize_affine(X, 0.0), ValueError, r"scale must be finite and > 0 in fp32, got 0.0"),
        (lambda: quantize_affine(X, -1.0), ValueError, "got -1.0"),
        (lambda: quantize_affine(X, NAN_SCALE), ValueError, "got nan"),
        (lambda: quantize_affine(X, INF), ValueError, "got inf"),
        (lambda: quantize_affine(X, 1e-60), ValueError, "got 0.0"),
        (lambda: quantize_affine(X, torch.tensor([1.0, 1.0, INF, 1.0]), axis=0), ValueError, "got inf"),
        (lambda: quantize_affine(X, torch.tensor([1.0, NAN_SCALE, 1.0, 1.0]), axis=0), ValueError, "got nan"),
        (lambda: quantize_affine(X, torch.ones(4)), ValueError, r"scale must have shape \(\) .* got \(4,\)"),
        (lambda: quantize_affine(X, torch.ones(6), axis=0), ValueError, r"scale must have shape \(4,\)"),
        (
            lambda: quantize_affine(X, torch.ones(4, dtype=torch.int32), axis=0),
            TypeError,
            "scale must be a floating dtype",
        ),
        (lambda: quantize_affine(X, 1.0, 128), ValueError, r"zero_point must be within \[-128, 127\].* got 128"),
        (lambda: quantize_affine(X, 1.0, -1, dtype=torch.uint8), ValueError, r"within \[0, 255\].* got -1"),
        (lambda: quantize_affine(X, 1.0, 2**32), ValueError, "got 4294967296"),
        (lambda: quantize_affine(X, 1.0, torch.tensor(0.0)), TypeError, "zero_point must be an integer dtype"),
        (lambda: quantize_affine(X, 1.0, torch.zeros(4, dtype=torch.int32)), ValueError, "zero_point must have shape"),
        (
            lambda: quantize_affine(X, torch.ones(4), axis=2),
            ValueError,
            r"axis must be within \[-2, 1\] for 2 dimensions, got 2",
        ),
        (lambda: quantize_affine(X, torch.ones(4, 4), axis=(0, 0)), ValueError, "axis must not name a dimension twice"),
        (
            lambda: quantize_affine(X, torch.ones(4, 2), group_size=4),
            ValueError,
            r"group_size must divide .*=6, got 4; use one of 6, 3, 2",
        ),
        (lambda: quantize_affine(X, torch.ones(4, 2), group_size=0), ValueError, "got 0"),
        (
            lambda: quantize_affine(X, torch.ones(4, 2), group_size=3, axis=(0, 1)),
            ValueError,
            "axis must be one dimension",
        ),
        (lambda: quantize_affine(torch.tensor(1.0), 1.0, group_size=1), ValueError, "axis must be within"),
        (lambda: quantize_affine(X, torch.ones((), device="meta")), ValueError, "scale must be on cpu, .* got meta"),
        (lambda: dequantize_affine(X, 1.0), TypeError, "q must be torch.int8 or torch.uint8, got float32"),
        (lambda: dequantize_affine(X.to(torch.int8), 1.0, dtype=torch.float64), TypeError, "dtype must be float32"),
        (lambda: dequantize_affine(X.to(torch.int8), 1.0, 200), ValueError, "got 200"),
        (lambda: choose_qparams_affine(torch.tensor([1.0, NAN_SCALE])), ValueError, "x must be finite"),
        (lambda: choose_qparams_affine(torch.tensor([1.0, -INF])), ValueError, "x must be finite"),
        (lambda: choose_qparams_affine(X, dtype=torch.int32), TypeError, "dtype must be"),
    ],
)
def test_bad_input(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()


def test_codes_survive_a_round_trip(isa: str) -> None:
    """Every code comes back from its own value: the quantizer inverts the dequantizer."""
    for qtype in QTYPES:
        q = integers((300,), 1, qtype)
        scale, zero_point = qparams((300,), 2, qtype)
        y = dequantize_affine(q, scale, zero_point, axis=0)
        assert torch.equal(quantize_affine(y, scale, zero_point, axis=0, dtype=qtype), q)


def nearest_fp32(exact: Fraction) -> float:
    """The fp32 number nearest to a rational, ties to even, by the definition."""
    guess = torch.tensor(float(exact), dtype=torch.float32)
    ends = [torch.nextafter(guess, torch.tensor(end)) for end in (-INF, INF)]
    return min((guess, *ends), key=lambda f: (abs(Fraction(f.item()) - exact), f.view(torch.int32).item() % 2)).item()


def test_the_reference_fma_rounds_once() -> None:
    """Against rationals, where rounding to fp64 first would hide on which side of an fp32 tie the sum lies.

    A * B = 2**47 + r with 24-bit A and B and a small r: A * B * 2**-71 is half an ulp of 1, and 2**-71 * r besides.
    """
    cases = [(torch.rand(()).item(), torch.randn(()).item(), float(torch.randint(-99, 99, ()))) for _ in range(200)]
    for a in range(2**23 + 1, 2**24, 8191):
        b = round(Fraction(2**47, a))
        if 0 < abs(a * b - 2**47) < 2**17 and b < 2**24:
            cases += [(sign * a * 2.0**-35, b * 2.0**-36, c) for sign in (1, -1) for c in (1.0, 1 + 2.0**-23, -1.0)]
    assert len(cases) > 300
    a, b, c = torch.tensor(cases, dtype=torch.float32).unbind(1)
    exact = [
        Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    assert reference.fma(a, b, c).tolist() == [nearest_fp32(value) for value in exact]


def test_cut_names_what_keeps_its_scale() -> None:
    assert cut((2, 6), None, None) == ((2, 6), ())
    assert cut((2, 6), (-1,), None) == ((2, 6), (1,))
    assert cut((2, 6), None, 3) == ((2, 2, 3), (0, 1))
    assert math.prod(cut((4, 6, 5), (1,), 2)[0]) == 120
