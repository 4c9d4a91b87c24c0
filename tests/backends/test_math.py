"""exp, GELU, SiLU, sigmoid, tanh and the softmax's 2**t: the functions of csrc/kernels/math.inl and encoder.inl."""

import pytest
import torch
from torch import Tensor

from pyqkern import _C


def elementwise(function: int, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    _C.elementwise(function, x, y)
    return y


def ulps(y: Tensor, exact: Tensor) -> Tensor:
    nearest = exact.float()
    ulp = torch.nextafter(nearest.abs(), torch.tensor(torch.inf)).double() - nearest.abs().double()
    return (y.double() - exact).abs() / ulp


def all_floats(least: float, greatest: float, step: int) -> list[Tensor]:
    """Every step-th fp32 number of [least, greatest], both > 0, in pieces."""
    first, last = (torch.tensor(v).view(torch.int32).item() for v in (least, greatest))
    piece = step << 22
    return [
        torch.arange(start, min(start + piece, int(last) + 1), step, dtype=torch.int32).view(torch.float32)
        for start in range(int(first), int(last) + 1, piece)
    ]


# Every step-th fp32 from 2**-6 on, and every 61st of those below, on the best ISA: the others have the same bits.
density = pytest.mark.parametrize("step", [61, pytest.param(1, marks=pytest.mark.long)])


@density
def test_exp_errs_by_two_ulp_at_most(step: int) -> None:
    for x in (*all_floats(2.0**-100, 2.0**-6, 61 * step), *all_floats(2.0**-6, 87.33654, step)):
        for signed in (x, -x):
            assert (ulps(elementwise(0, signed), torch.exp(signed.double())) <= 2).all()


@density
def test_gelu_errs_by_four_units_of_its_argument_at_most(step: int) -> None:
    """|error| <= 4 * 2**-24 * |x|: where that comes from stands at test_gelu_error in test_int8.py."""
    for x in (*all_floats(2.0**-100, 2.0**-6, 61 * step), *all_floats(2.0**-6, 7.0, step)):
        for signed in (x, -x):
            exact = torch.nn.functional.gelu(signed.double())
            assert ((elementwise(1, signed) - exact).abs() <= 4 * 2.0**-24 * x.double()).all()


@density
def test_sigmoid_and_tanh_err_by_three_ulp_at_most(step: int) -> None:
    """exp errs by one ulp, and sum, product and quotient by half of one each; sigmoid below 2**-126 loses its bits."""
    for x in (*all_floats(2.0**-126, 2.0**-6, 61 * step), *all_floats(2.0**-6, 87.3, step)):
        for signed in (x, -x):
            assert (ulps(elementwise(3, signed), torch.sigmoid(signed.double())) <= 3).all()
            assert (ulps(elementwise(4, signed), torch.tanh(signed.double())) <= 3).all()
    ends = torch.tensor([torch.inf, 3e38, 0.0, -0.0, -3e38, -torch.inf, torch.nan])
    assert elementwise(3, ends)[:4].tolist() == [1, 1, 0.5, 0.5] and (elementwise(3, ends)[4:6] < 3e-39).all()
    assert elementwise(4, ends)[:6].tolist() == [1, 1, 0, 0, -1, -1] and elementwise(4, ends)[3].signbit()
    assert elementwise(3, ends)[6].isnan() and elementwise(4, ends)[6].isnan()


@density
def test_silu_errs_by_three_ulp_at_most(step: int) -> None:
    """As the sigmoid: exp, sum and quotient."""
    for x in (*all_floats(2.0**-100, 2.0**-6, 61 * step), *all_floats(2.0**-6, 87.3, step)):
        for signed in (x, -x):
            assert (ulps(elementwise(5, signed), torch.nn.functional.silu(signed.double())) <= 3).all()
    assert (elementwise(5, torch.tensor([-88.0, -1e4])).abs() < 3e-35).all() and elementwise(5, torch.zeros(1)) == 0


def test_functions_have_the_same_bits_everywhere(isa: str) -> None:
    x = torch.cat(all_floats(2.0**-126, 3e38, 9973))
    x = torch.cat([x, -x, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45])])
    for function in (0, 1, 3, 4, 5, 6):
        y = elementwise(function, x)
        previous = _C.set_isa("scalar")
        assert torch.equal(y.view(torch.int32), elementwise(function, x).view(torch.int32))
        _C.set_isa(previous)
        if function < 5:
            assert (y[:-4].isfinite()).all()
        assert y[-2].isnan()
    ends = elementwise(1, torch.tensor([torch.inf, 3e38, 6.0, -6.0, -3e38]))
    assert torch.equal(ends, torch.tensor([torch.inf, 3e38, 6.0, 0.0, 0.0]))


def test_probability_codes(isa: str) -> None:
    """rint(255 * 2**t): off only where 255 * 2**t is within 255 * 2.6e-6 + 2**-16 of a tie, and then by one."""
    t = -torch.cat([torch.zeros(1), *all_floats(2.0**-30, 100.0, 997)])
    exact = 255 * torch.exp2(t.double())
    codes = elementwise(2, t).double()
    assert ((codes - exact).abs() <= 0.5 + 255 * 2.6e-6 + 2.0**-16).all() and codes[0] == 255
    assert elementwise(2, torch.tensor([float("nan"), float("-inf")])).tolist() == [0, 0]
