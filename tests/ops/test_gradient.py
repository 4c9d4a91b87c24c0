"""The gradient of a linear's input from the packed weight: int8_grad_input and grad_input_4bit.

One fp32 chain in the order of the output channels: the reference's bits on every ISA, in every batch, on any threads.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FLOATS, floats, integers, seeds
from torch import nn

from pyqkern import QLinear
from pyqkern.backends import Weight4bit, cpu, reference
from pyqkern.functional.four_bit import quantize_absmax
from pyqkern.schemes import FP4, NF4, Int4, Scheme

ops = torch.ops.pyqkern
ROWS = [1, 2, 5, 6, 7, 13, 18]  # of one tile, two and three
CHANNELS = [1, 3, 15, 16, 17, 64, 65, 127, 128, 131, 257]  # either side of a panel, of a strip and of what is expanded
COLUMNS = [1, 3, 4, 5, 15, 17, 33, 63, 64, 65, 130]
float_types = st.sampled_from(FLOATS)


@settings(max_examples=40)
@given(
    m=st.sampled_from(ROWS), n=st.sampled_from(CHANNELS), k=st.sampled_from(COLUMNS), seed=seeds, dtype=float_types,
    split=st.booleans(),
)  # fmt: skip
def test_int8_is_the_reference(isa: str, m: int, n: int, k: int, seed: int, dtype: torch.dtype, split: bool) -> None:
    w, grad = integers((n, k), seed, torch.int8), floats((m, n), seed, dtype)
    scale = torch.rand(n) + 1e-3
    y = ops.int8_grad_input(grad, ops.int8_pack(w, split), scale, k)
    assert torch.equal(y, reference.int8_grad_input(grad, w, scale, k)) and y.dtype is dtype
    packed = ops.int8_pack(w)
    assert torch.equal(torch.cat([ops.int8_grad_input(row, packed, scale, k) for row in grad.split(1)]), y)


@settings(max_examples=40)
@given(
    m=st.sampled_from(ROWS), n=st.sampled_from(CHANNELS), k=st.sampled_from([1, 33, 64, 70, 128, 160, 320]),
    blocksize=st.sampled_from([32, 64, 128]), seed=seeds, dtype=float_types, nested=st.booleans(),
    quant_type=st.sampled_from(["nf4", "fp4", "int4"]),
)  # fmt: skip
def test_4bit_is_the_reference(
    isa: str, m: int, n: int, k: int, blocksize: int, seed: int, dtype: torch.dtype, nested: bool, quant_type: str
) -> None:
    """In panels, and flat where blocks cross rows or there are few channels."""
    codes = integers(((n * k + 1) // 2,), seed, torch.uint8)
    absmax, rest = torch.rand(-(-n * k // blocksize), generator=torch.Generator().manual_seed(seed)) + 0.1, (None,) * 3
    if nested:
        absmax, *rest = quantize_absmax(absmax)  # type: ignore[assignment]
    flat = Weight4bit(codes, absmax, *rest, quant_type, blocksize, (n, k))
    sizes = (n, k, blocksize)
    weight = flat._replace(packed=cpu.pack_4bit(codes, *sizes), absmax=cpu.pack_scales(absmax, *sizes))
    grad = floats((m, n), seed, dtype)
    y = cpu.grad_input_4bit(grad, weight)
    assert torch.equal(y, reference.grad_input_4bit(grad, flat)) and y.dtype is dtype
    assert torch.equal(torch.cat([cpu.grad_input_4bit(row, weight) for row in grad.split(1)]), y)


SCHEMES: list[str | Scheme] = [
    "int8", "int8-weight-only", "nf4", NF4(double_quant=True), FP4(blocksize=32), Int4(group_size=128),
]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_is_the_product_with_the_dequantized_weight(scheme: str | Scheme) -> None:
    """Nothing of the reference: fp64, with a bound, and the same bits with two threads."""
    torch.manual_seed(0)
    layer = QLinear.from_linear(nn.Linear(256, 300), scheme)
    grad = torch.randn(400, 300)
    y, exact = layer._times_weight(grad), grad.double() @ layer.weight.double()
    # 300 fma round once each, by 2^-24 of at most the sum of magnitudes.
    assert ((y - exact).abs() <= 300 * 2.0**-24 * (grad.double().abs() @ layer.weight.double().abs())).all()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - before if before < 3 else 1)
        assert torch.equal(layer._times_weight(grad), y)
    finally:
        torch.set_num_threads(before)


def test_what_does_not_fit_is_refused() -> None:
    layer = QLinear.from_linear(nn.Linear(64, 40), "int8")
    for grad, wrong in ((torch.ones(2, 41), ValueError), (torch.ones(2, 40).double(), TypeError)):
        with pytest.raises(wrong, match="grad must be"):
            layer._times_weight(grad)
    with pytest.raises(ValueError, match="packed must be"):
        ops.int8_grad_input(torch.ones(2, 40), layer.packed, layer.weight_scale, 80)
    four = QLinear.from_linear(nn.Linear(64, 40), "nf4")
    with pytest.raises(ValueError, match="packed must be"):
        ops.grad_input_4bit(torch.ones(2, 70), four.packed, four.absmax, None, None, None, "nf4", 64, 64)
