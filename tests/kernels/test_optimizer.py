"""The numbers of the Triton kernel of optimizers against pyqkern.backends.reference; see triton_device.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FLOATS, generator, seeds
from torch import Tensor
from triton_device import GPU, require_device, same

from pyqkern.backends import OPTIMIZERS, StepNumbers, cuda, reference

NUMBERS = StepNumbers(0.5, 0.0, 0.99, 0.9, 0.1, 0.999, 0.001, 1.7, 1e-8, -1e-2)


@pytest.fixture(scope="module", autouse=True)
def there_is_a_device() -> None:
    require_device()


def problem(sizes: list[int], seed: int, optimizer: str, has_codes: bool, dtype: torch.dtype) -> list[list[Tensor]]:
    g, second = generator(seed), optimizer == "adam"

    def values(n: int, of: torch.dtype = torch.float32) -> Tensor:
        x = torch.randn(n, generator=g) * 10.0 ** torch.randint(-4, 1, (), generator=g)
        return torch.where(torch.rand(n, generator=g) < 0.1, 0.0, x).to(of)

    def codes(n: int) -> Tensor:
        return torch.randint(0, 256, (n,), generator=g, dtype=torch.uint8)

    lists = [[values(n, dtype) for n in sizes] for _ in range(2)]
    for wanted in (True, second):
        lists.append([(codes(n) if has_codes else values(n).square()) for n in sizes] if wanted else [])
    for wanted in (has_codes, has_codes and second):
        lists.append([values(-(-n // 256)).abs() for n in sizes] if wanted else [])
    return lists


@settings(max_examples=40)
@given(
    sizes=st.lists(st.sampled_from([1, 255, 256, 257, 2048, 2049, 5000]), min_size=1, max_size=2), seed=seeds,
    optimizer=st.sampled_from(OPTIMIZERS), has_codes=st.booleans(), dtype=st.sampled_from(FLOATS),
    l2=st.sampled_from([0.0, 0.1]),
)  # fmt: skip
def test_a_step_has_the_bits_of_the_reference(
    sizes: list[int], seed: int, optimizer: str, has_codes: bool, dtype: torch.dtype, l2: float
) -> None:
    expected = problem(sizes, seed, optimizer, has_codes, dtype)
    ours = [[t.clone().to(GPU) for t in each] for each in expected]
    numbers = NUMBERS._replace(l2=l2)
    cuda.optimizer_step(optimizer, numbers, *ours)
    reference.optimizer_step(optimizer, numbers, *expected)
    for a, b in zip(ours, expected, strict=True):
        for one, other in zip(a, b, strict=True):
            same(one, other)


def test_the_sum_of_squares() -> None:
    """fp64 sums of fp32 squares that are exact there: within the reference's roundings to fp32."""
    tensors = [torch.randn(300), torch.randn(70000).bfloat16()]
    there = [t.to(GPU) for t in tensors]
    total = float(cuda.square_sum(there, 0.5))
    assert abs(total - float(reference.square_sum(tensors, 0.5))) <= 24 * 2.0**-24 * total
    for bad in (float("nan"), float("inf"), 2.0**59):
        there[0][7] = bad
        assert cuda.square_sum(there, 1.0).isnan()
