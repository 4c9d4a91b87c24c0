"""The operators of fake quantization: every ISA against the reference, and against what quantizing and packing does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FINITE, FLOATS, INFINITE, NAN, floats, generator, seeds, strided, strides, with_ties
from torch import Tensor

from pyqkern.backends import cpu, reference
from pyqkern.functional.affine import choose_qparams_affine, dequantize_affine, quantize_affine

ops = torch.ops.pyqkern
RANGES = [(0, 255), (0, 127), (-127, 127), (-128, 127), (-8, 7)]
KINDS = [(torch.int8, True, 8), (torch.int8, True, 4), (torch.uint8, False, 8), (torch.uint8, True, 8)]
SIZES = [1, 3, 7, 8, 15, 16, 17, 31, 33, 96, 257, 384]

shapes = st.tuples(st.sampled_from([1, 2, 5, 40]), st.sampled_from(SIZES))


def same(a: Tensor, b: Tensor) -> None:
    """Bit for bit, but that any NaN equals any other."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def problem(
    shape: tuple[int, int], seed: int, dtype: torch.dtype, qmin: int, qmax: int, one: bool
) -> tuple[Tensor, ...]:
    """x with ties, extremes, NaN and infinities, a gradient, scale and zero point."""
    g, rows = generator(seed), 1 if one else shape[0]
    scale = 10.0 ** torch.randint(-3, 3, (rows,), generator=g) * (1 + torch.rand(rows, generator=g))
    zero = torch.randint(qmin, qmax + 1, (rows,), generator=g, dtype=torch.int32)
    x = with_ties(floats(shape, seed, torch.float32, FINITE + INFINITE + NAN), scale.view(-1, 1), seed).to(dtype)
    return x, floats(shape, seed + 1, dtype), scale, zero


@settings(max_examples=60)
@given(
    shape=shapes, seed=seeds, dtype=st.sampled_from(FLOATS), codes=st.sampled_from(RANGES), one=st.booleans(),
    has_zero=st.booleans(),
)  # fmt: skip
def test_both_passes_have_the_bits_of_the_reference(
    isa: str, shape: tuple[int, int], seed: int, dtype: torch.dtype, codes: tuple[int, int], one: bool, has_zero: bool
) -> None:
    x, grad, scale, zero = problem(shape, seed, dtype, *codes, one)
    how = (shape[1], scale, zero if has_zero else None, *codes)
    same(cpu.fake_quantize(x, *how), reference.fake_quantize(x, *how))
    for a, b in zip(
        cpu.fake_quantize_backward(grad, x, *how), reference.fake_quantize_backward(grad, x, *how), strict=True
    ):
        same(a, b)


def test_threads_give_the_same_bits(isa: str, two_threads: None) -> None:
    x, grad, scale, zero = problem((300, 257), 3, torch.float32, 0, 255, False)
    both = [
        ops.fake_quantize(x, 257, scale, zero, 0, 255),
        *ops.fake_quantize_backward(grad, x, 257, scale, zero, 0, 255),
    ]
    torch.set_num_threads(1)
    one = [
        ops.fake_quantize(x, 257, scale, zero, 0, 255),
        *ops.fake_quantize_backward(grad, x, 257, scale, zero, 0, 255),
    ]
    for a, b in zip(both, one, strict=True):
        same(a, b)


@settings(max_examples=60)
@given(
    shape=shapes, seed=seeds, dtype=st.sampled_from(FLOATS), how=strides,
    kind=st.sampled_from(KINDS),
)  # fmt: skip
def test_rows_are_what_quantize_and_dequantize_give(
    isa: str, shape: tuple[int, int], seed: int, dtype: torch.dtype, how: str, kind: tuple[torch.dtype, bool, int]
) -> None:
    of, symmetric, bits = kind
    x = strided(floats(shape, seed, dtype, FINITE[:-1] if dtype is torch.float32 else None), how)
    qparams = choose_qparams_affine(x, dtype=of, axis=0, symmetric=symmetric, bits=bits)
    codes = quantize_affine(x, *qparams, axis=0, dtype=of, bits=bits)
    same(
        ops.fake_quantize_rows(x, shape[1], of, symmetric, bits),
        dequantize_affine(codes, *qparams, axis=0, dtype=dtype),
    )


def test_rows_of_7_bits_are_those_of_the_linear(isa: str) -> None:
    x = floats((40, 96), 5)
    codes, scale, zero = reference.int8_quantize_rows(x, False, 7)
    expected = scale[:, None] * (codes.float() - zero[:, None])
    assert torch.equal(ops.fake_quantize_rows(x, 96, torch.uint8, False, 7), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_becomes_nan_and_no_other(isa: str, bad: float) -> None:
    x = floats((5, 33), 1)
    x[2, 7] = bad
    y = ops.fake_quantize_rows(x, 33, torch.uint8, False)
    assert y[2].isnan().all() and y[[0, 1, 3, 4]].isfinite().all()


# ---- the backward pass, by torch's autograd


def round_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def lsq(x: Tensor, scale: Tensor, offset: Tensor, qmin: int, qmax: int) -> Tensor:
    """LSQ+ as its paper writes it, with a zero point that is an integer; the clamp passes gradients inside alone."""
    zero = (-offset / scale).round().detach()
    code = round_through((x - offset) / scale).detach()
    inside = ((x / scale + zero).round() >= qmin) & ((x / scale + zero).round() <= qmax)
    through = round_through(x / scale + zero.detach())
    q = torch.where(inside, through, code.clamp(qmin, qmax))
    # y = scale * q + offset; inside, its dependence on offset cancels.
    return torch.where(inside, scale * (q - zero), scale * q + offset + (-scale * zero - offset).detach())


@settings(max_examples=40)
@given(shape=shapes, seed=seeds, codes=st.sampled_from(RANGES[:2]))
def test_the_gradients_are_those_of_lsq(isa: str, shape: tuple[int, int], seed: int, codes: tuple[int, int]) -> None:
    g = generator(seed)
    x = (torch.randn(shape, generator=g) * 2).double().requires_grad_()
    scale = torch.tensor([3.0 / codes[1]], dtype=torch.float64, requires_grad=True)
    zero = torch.tensor([codes[1] // 3], dtype=torch.int32)
    offset = (-scale * zero).detach().requires_grad_()
    v = x.detach() / scale.detach() + zero
    grad = torch.randn(shape, generator=g) * ((v - v.round()).abs() < 0.49)  # none where fp32 may round otherwise
    lsq(x, scale, offset, *codes).backward(grad.double())
    by_x, by_scale, by_offset = ops.fake_quantize_backward(
        grad, x.detach().float(), shape[1], scale.detach().float(), zero, *codes
    )
    assert torch.allclose(by_x.double(), x.grad, rtol=1e-12, atol=0)  # scale * (1 / scale) there
    # A term has three roundings beside that of v, which is up to qmax and has two of 2**-24 relative; sums of fp32 of
    # `size` terms have as many roundings.
    terms = float((grad.abs().double() * torch.maximum(v.abs().clamp(max=codes[1]), torch.ones(()))).sum())
    bound = (shape[1] + 8) * 2.0**-24 * terms
    assert abs(float(by_scale) - float(scale.grad)) <= bound
    assert abs(float(by_offset) - float(offset.grad)) <= bound


def test_a_gradient_outside_of_the_range_is_stopped(isa: str) -> None:
    x = torch.tensor([[-10.0, -1.0, 0.0, 1.0, 254.4, 254.6, 300.0]])
    by_x, by_scale, by_offset = ops.fake_quantize_backward(
        torch.ones_like(x), x, 7, torch.ones(1), torch.ones(1, dtype=torch.int32), 0, 255
    )
    assert by_x.tolist() == [[0, 1, 1, 1, 1, 0, 0]]
    # Of 254.4: 255 - 255.4. Beyond: the codes 0, 255 and 255, and 1 each to the offset.
    assert by_scale.item() == pytest.approx(-0.4 + 510, abs=1e-4) and by_offset.item() == 3


def test_the_range_that_is_not_clipped_passes_gradcheck() -> None:
    """Where nothing rounds, y = x: on the grid of codes the backward pass is the derivative of a clamp."""
    x = torch.tensor([[-3.0, 2.0, 5.0, 9.0]], dtype=torch.float64, requires_grad=True)

    class Clamp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
            ctx.save_for_backward(x)
            return x.clamp(0, 7)

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
            (x,) = ctx.saved_tensors
            by_x = ops.fake_quantize_backward(grad.float(), x.float(), 4, torch.ones(1), None, 0, 7)[0]
            return by_x.double()  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(Clamp.apply, (x,))


# ---- packing with it


@settings(max_examples=40)
@given(
    n=st.sampled_from([1, 5, 16, 40]), k=st.sampled_from([1, 7, 64, 96, 384]), seed=seeds, dtype=st.sampled_from(FLOATS)
)
def test_a_weight_is_quantized_and_packed_in_one(isa: str, n: int, k: int, seed: int, dtype: torch.dtype) -> None:
    weight = floats((n, k), seed, dtype)
    packed, scale = ops.int8_quantize_weight(weight, None, False)
    expected, _ = choose_qparams_affine(weight, axis=0, symmetric=True)
    codes = quantize_affine(weight, expected, axis=0)
    assert torch.equal(scale, expected) and torch.equal(ops.int8_unpack(packed, n, k), codes)
    assert codes.min() >= -127
    assert torch.equal(
        ops.fake_quantize_rows(weight, k, torch.int8, True), dequantize_affine(codes, scale, axis=0, dtype=dtype)
    )


@pytest.mark.parametrize("name, argument", [("int8_quantize_weight", (None, False)), ("quantize_int4", (32,))])
def test_a_weight_that_is_not_finite_is_refused(name: str, argument: tuple[object, ...]) -> None:
    for bad in NAN + INFINITE:
        weight = torch.ones(4, 64)
        weight[2, 40] = bad
        with pytest.raises(ValueError, match=r"must be finite, got NaN or an infinity in (row 2|group 5)"):
            getattr(ops, name)(weight, *argument)


@pytest.mark.parametrize("change, error, message", [
    ({"size": 0}, ValueError, "size must divide"), ({"size": 5}, ValueError, "size must divide"),
    ({"qmin": -3}, ValueError, "qmin and qmax must"), ({"qmax": 256}, ValueError, "qmin and qmax must"),
    ({"scale": torch.ones(3)}, ValueError, "scale must have 1 or 4"),
    ({"scale": torch.ones(4).double()}, TypeError, "scale"),
    ({"zero_point": torch.ones(4)}, TypeError, "zero_point must be torch.int32"),
    ({"zero_point": torch.ones(1, dtype=torch.int32)}, ValueError, "zero_point must have"),
    ({"x": torch.ones(4, 6).double()}, TypeError, "x must be float32"),
])  # fmt: skip
def test_what_is_refused(change: dict[str, object], error: type[Exception], message: str) -> None:
    right = {"x": torch.ones(4, 6), "size": 6, "scale": torch.ones(4), "zero_point": None, "qmin": 0, "qmax": 255}
    with pytest.raises(error, match=message):
        ops.fake_quantize(**(right | change))
    with pytest.raises((error, ValueError)):
        ops.fake_quantize_backward(grad=torch.ones(4, 6), **(right | change))
