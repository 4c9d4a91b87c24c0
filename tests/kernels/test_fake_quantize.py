"""The numbers of the Triton kernels of fake quantization against pyqkern.backends.reference; see triton_device.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FINITE, FLOATS, INFINITE, NAN, floats, generator, seeds, with_ties
from triton_device import GPU, require_device, same

from pyqkern.backends import cuda, reference


@pytest.fixture(scope="module", autouse=True)
def there_is_a_device() -> None:
    require_device()


@settings(max_examples=40)
@given(
    shape=st.tuples(st.sampled_from([1, 5, 17, 40]), st.sampled_from([1, 3, 16, 17, 96, 257])), seed=seeds,
    dtype=st.sampled_from(FLOATS), codes=st.sampled_from([(0, 255), (0, 127), (-127, 127), (-8, 7)]),
    one=st.booleans(), has_zero=st.booleans(),
)  # fmt: skip
def test_both_passes_have_the_bits_of_the_reference(
    shape: tuple[int, int], seed: int, dtype: torch.dtype, codes: tuple[int, int], one: bool, has_zero: bool
) -> None:
    g, rows = generator(seed), 1 if one else shape[0]
    scale = 10.0 ** torch.randint(-3, 3, (rows,), generator=g) * (1 + torch.rand(rows, generator=g))
    zero = torch.randint(codes[0], codes[1] + 1, (rows,), generator=g, dtype=torch.int32) if has_zero else None
    x = with_ties(floats(shape, seed, torch.float32, FINITE + INFINITE + NAN), scale.view(-1, 1), seed).to(dtype)
    grad = floats(shape, seed + 1, dtype)
    there = (shape[1], scale.to(GPU), None if zero is None else zero.to(GPU), *codes)
    same(cuda.fake_quantize(x.to(GPU), *there), reference.fake_quantize(x, shape[1], scale, zero, *codes))
    ours = cuda.fake_quantize_backward(grad.to(GPU), x.to(GPU), *there)
    expected = reference.fake_quantize_backward(grad, x, shape[1], scale, zero, *codes)
    for a, b in zip(ours, expected, strict=True):
        same(a, b)
