"""The operators optimizer_step and square_sum: every ISA against the reference, and what they refuse."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FLOATS, floats, generator, seeds
from torch import Tensor

from pyqkern.backends import OPTIMIZERS, StepNumbers, cpu, reference
from pyqkern.backends.reference.optimizer import decode, dynamic_map, encode

ops = torch.ops.pyqkern
SIZES = [1, 7, 8, 31, 255, 256, 257, 300, 511, 512, 1000, 16384, 16385, 40000]
NUMBERS = StepNumbers(0.5, 0.0, 0.99, 0.9, 0.1, 0.999, 0.001, 1.7, 1e-8, -1e-2)

Lists = list[list[Tensor]]


def problem(sizes: list[int], seed: int, optimizer: str, has_codes: bool, dtype: torch.dtype, like: bool) -> Lists:
    """params, grads, state1, state2, absmax1 and absmax2 of a training that is under way; some values are 0."""
    g = generator(seed)

    def values(n: int, of: torch.dtype = torch.float32) -> Tensor:
        x = torch.randn(n, generator=g) * 10.0 ** torch.randint(-6, 1, (), generator=g)
        return torch.where(torch.rand(n, generator=g) < 0.1, 0.0, x).to(of)

    second = optimizer == "adam"
    lists: Lists = [[values(n, dtype) for n in sizes], [values(n, dtype if like else torch.float32) for n in sizes]]
    for i in range(2):
        moments = [values(n) if i == 0 else values(n).square() for n in sizes]
        if has_codes:
            moments = [torch.randint(0, 256, (n,), generator=g, dtype=torch.uint8) for n in sizes]
        lists.append(moments if i == 0 or second else [])
    for i in range(2):
        absmax = [values(-(-n // 256)).abs() for n in sizes]
        lists.append(absmax if has_codes and (i == 0 or second) else [])
    return lists


def cloned(lists: Lists) -> Lists:
    return [[t.clone() for t in each] for each in lists]


@settings(max_examples=60)
@given(
    sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=3), seed=seeds, optimizer=st.sampled_from(OPTIMIZERS),
    has_codes=st.booleans(), dtype=st.sampled_from(FLOATS), like=st.booleans(), l2=st.sampled_from([0.0, 0.1]),
    first=st.booleans(),
)  # fmt: skip
def test_a_step_has_the_bits_of_the_reference(
    isa: str, sizes: list[int], seed: int, optimizer: str, has_codes: bool, dtype: torch.dtype, like: bool, l2: float,
    first: bool,
) -> None:  # fmt: skip
    given_lists = problem(sizes, seed, optimizer, has_codes, dtype, like)
    ours, expected = cloned(given_lists), cloned(given_lists)
    numbers = NUMBERS._replace(l2=l2, keep1=0.0 if first else 0.9)
    ops.optimizer_step(optimizer, list(numbers), *ours)
    reference.optimizer_step(optimizer, numbers, *expected)
    for name, a, b in zip(("p", "grad", "state1", "state2", "absmax1", "absmax2"), ours, expected, strict=True):
        for one, other in zip(a, b, strict=True):
            assert torch.equal(one, other), name
    if dtype is torch.float32 and max(sizes) >= 300:  # every step but one of a few numbers or of few bits moves some
        assert not all(torch.equal(a, b) for a, b in zip(ours[0], given_lists[0], strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_threads_give_the_same_bits(isa: str, optimizer: str, two_threads: None) -> None:
    lists = problem([70000, 5, 300], 3, optimizer, True, torch.float32, True)
    one, two = cloned(lists), cloned(lists)
    ops.optimizer_step(optimizer, list(NUMBERS), *two)
    torch.set_num_threads(1)
    ops.optimizer_step(optimizer, list(NUMBERS), *one)
    assert all(torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))


@settings(max_examples=60)
@given(
    sizes=st.lists(st.sampled_from([*SIZES, 70000, 200000]), min_size=1, max_size=3), seed=seeds,
    dtype=st.sampled_from(FLOATS), scale=st.sampled_from([1.0, 0.125, -3.0]),
)  # fmt: skip
def test_the_sum_of_squares(isa: str, sizes: list[int], seed: int, dtype: torch.dtype, scale: float) -> None:
    tensors = [floats((n,), seed + i, dtype) for i, n in enumerate(sizes)]
    total = ops.square_sum(tensors, scale)
    assert torch.equal(total, reference.square_sum(tensors, scale))
    exact = sum(float((t.double() * scale).square().sum()) for t in tensors)
    # Seventeen roundings of 2**-24 to a sum of sixteen terms, and four that add sixteen sums; scale * x is rounded too.
    assert abs(float(total) - exact) <= 24 * 2.0**-24 * exact


LARGE = [(dtype, bad) for dtype in FLOATS for bad in (math.nan, math.inf, -math.inf)]  # fp16 has no 2**59
LARGE += [(dtype, bad) for dtype in FLOATS[:2] for bad in (2.0**59, -(2.0**60))]


@pytest.mark.parametrize("dtype, bad", LARGE)
@pytest.mark.parametrize("n, at", [(1, 0), (15, 14), (300, 256), (300, 299), (70000, 69999), (70000, 3)])
def test_a_gradient_that_is_too_large(isa: str, dtype: torch.dtype, bad: float, n: int, at: int) -> None:
    x = torch.ones(n, dtype=dtype)
    x[at] = bad
    for kernels in (cpu, reference):
        assert kernels.square_sum([torch.ones(5), x], 1.0).isnan()
        assert not kernels.square_sum([torch.ones(5), torch.ones(n)], 1.0).isnan()
    if math.isfinite(bad):
        assert cpu.square_sum([x], 0.25).isfinite()
    assert cpu.square_sum([torch.full((n,), 2.0**58)], 1.0).isfinite()


# ---- the maps


@pytest.mark.parametrize("signed", [True, False])
def test_the_values_are_those_of_the_map(signed: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values, expected = decode(codes, signed).double(), dynamic_map(signed).double()
    # At a decade's low end slope * x and offset, both rounded, are nine times the value; the map has four roundings.
    assert ((values - expected).abs() <= (9 + 4) * 2.0**-24 * expected.abs()).all()
    assert (values[127 if signed else 0] == 0) and values[255] == 1


@pytest.mark.parametrize("signed", [True, False])
def test_a_code_is_that_of_the_interval(isa: str, signed: bool) -> None:
    """Each value is its own code, and no value is farther from its code's than half of an interval."""
    values = decode(torch.arange(256, dtype=torch.uint8), signed).unsqueeze(0)
    codes, absmax = encode(values * 3, signed)
    assert torch.equal(codes[0], torch.arange(256, dtype=torch.uint8)) and absmax.item() == 3
    x = torch.linspace(-1 if signed else 0, 1, 400001).abs().pow(3).mul(torch.linspace(-1, 1, 400001).sign())
    x = torch.cat([x if signed else x.abs(), torch.tensor([1.0])])
    codes, absmax = encode(x.unsqueeze(0), signed)
    error = (decode(codes[0], signed) * absmax - x).abs()
    # A value below a decade by less than 2**-9 may be taken for one of it, and one below the first decade for 0 or for
    # its first value: the lines are raised by 2**-10 of an interval.
    decade = (x.abs() * (1 + 2.0**-9)).clamp(min=1.0001e-7).log10().ceil().clamp(max=0)
    width = 0.9 * 10**decade / 2 ** (decade + (6 if signed else 7))
    assert (error <= 0.5 * width * (1 + 2.0**-8) + 1e-7 * (x.abs() < 1.01e-7)).all()


@settings(max_examples=100)
@given(
    seed=seeds, size=st.sampled_from([1, 255, 256, 5000]), spread=st.sampled_from([0.0, 1.0, 3.0, 12.0]),
    middle=st.sampled_from([0, -19, -39, -43]),
)  # fmt: skip
def test_codes_of_every_magnitude(isa: str, seed: int, size: int, spread: float, middle: int) -> None:
    """By Adam with keep = 0: the moments are the gradient's, from denormals on."""
    g = generator(seed)
    grad = torch.randn(size, generator=g)
    grad = (grad.double() * 10.0 ** (middle + torch.randn(size, generator=g) * spread).clamp(-45, 15).double()).float()
    numbers = NUMBERS._replace(scale=1.0, keep1=0.0, keep2=0.0, add1=1.0, add2=1.0)
    blocks = -(-size // 256)
    lists = [[t] for t in (torch.zeros(size), grad)]
    lists += [[torch.zeros(size, dtype=torch.uint8)] for _ in range(2)] + [[torch.ones(blocks)] for _ in range(2)]
    ops.optimizer_step("adam", list(numbers), *lists)
    for moment, signed, codes, absmax in ((grad, True, lists[2], lists[4]), (grad * grad, False, lists[3], lists[5])):
        padded = torch.nn.functional.pad(moment, (0, -size % 256)).view(-1, 256)
        expected, greatest = encode(padded, signed)
        assert torch.equal(absmax[0], greatest)
        assert torch.equal(codes[0], expected.reshape(-1)[:size])


# ---- what is refused


def calls() -> dict[str, tuple[Any, ...]]:
    p, g = torch.ones(300), torch.ones(300)
    codes, absmax = torch.zeros(300, dtype=torch.uint8), torch.zeros(2)
    return {
        "adam": ("adam", list(NUMBERS), [p], [g], [codes], [codes.clone()], [absmax], [absmax.clone()]),
        "lion": ("lion", list(NUMBERS), [p], [g], [codes], [], [absmax], []),
        "fp32": ("adam", list(NUMBERS), [p], [g], [p.clone()], [p.clone()], [], []),
    }


@pytest.mark.parametrize(
    "name, position, wrong, error, message",
    [
        ("adam", 0, "x", ValueError, "optimizer must be one of adam, momentum, lion, got 'x'"),
        ("adam", 1, [1.0] * 9, ValueError, "numbers must be 10 finite ones"),
        ("adam", 1, [math.nan] * 10, ValueError, "numbers must be 10 finite ones"),
        ("adam", 2, [torch.ones(300).double()], TypeError, "params must be float32, bfloat16 or float16"),
        ("adam", 3, [torch.ones(299)], ValueError, r"grads must be of shape \(300,\), got \(299,\)"),
        ("adam", 3, [], ValueError, "grads must be 1 tensors for 1 parameters, got 0"),
        ("adam", 3, [torch.ones(300, device="meta")], ValueError, "grads must be on cpu"),
        ("adam", 4, [torch.ones(300)], TypeError, "state1 must be uint8, got float32"),
        ("adam", 5, [], ValueError, "state2 must be 1 tensors"),
        ("adam", 6, [torch.ones(3)], ValueError, r"absmax1 must be of shape \(2,\), got \(3,\)"),
        ("adam", 7, [torch.ones(2).half()], TypeError, "absmax2 must be float32"),
        ("lion", 5, [torch.zeros(300, dtype=torch.uint8)], ValueError, "state2 must be 0 tensors"),
        ("fp32", 4, [torch.zeros(300, dtype=torch.uint8)], TypeError, "state1 must be float32, got uint8"),
        ("fp32", 4, [torch.zeros(300, 2)[:, 0]], ValueError, "state1 must be contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(
    name: str, position: int, wrong: object, error: type[Exception], message: str
) -> None:
    arguments = list(calls()[name])
    arguments[position] = wrong
    before = [t.clone() for t in arguments[2]]
    with pytest.raises(error, match=message):
        ops.optimizer_step(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments[2], before, strict=True))


def test_nothing_to_do() -> None:
    empty = torch.empty(0)
    ops.optimizer_step("lion", list(NUMBERS), [empty], [empty], [empty], [], [], [])
    assert ops.square_sum([empty], 1.0) == 0
    with pytest.raises(TypeError, match="tensors must be float32"):
        ops.square_sum([torch.ones(3).double()], 1.0)
    with pytest.raises(ValueError, match="tensors must be on one device"):
        ops.square_sum([torch.ones(3), torch.ones(3, device="meta")], 1.0)


def test_opcheck() -> None:
    for call in calls().values():
        torch.library.opcheck(ops.optimizer_step.default, call, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(ops.square_sum.default, ([torch.ones(3), torch.ones(300).half()], 0.5))
