"""Linears whose activations stay in float: INT8 weights, and 4 bits with compute "fp32" and "bf16".

Their sums are fp32 chains in an order that is written down: the reference's bits on every ISA, in every batch, on any
threads; and no call holds a dequantized weight.
"""

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FINITE, FLOATS, floats, integers, seeds
from torch import Tensor, nn

from pyqkern import QLinear
from pyqkern.backends import Weight4bit, cpu, reference
from pyqkern.functional.four_bit import dynamic_map, quantize_absmax
from pyqkern.schemes import FP4, NF4, Int4, Scheme, get_scheme

ops = torch.ops.pyqkern
ROWS = [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 18, 19]  # of the kernels for few rows, and of one tile, two and four
COLUMNS = [1, 3, 4, 15, 16, 17, 32, 33, 48, 63, 64, 65, 80, 130]  # either side of a quad, of a panel, of a strip
DEPTHS = [1, 2, 3, 4, 5, 7, 8, 31, 127, 128, 129, 131, 257]  # either side of a quad and of what is expanded at once
float_types = st.sampled_from(FLOATS)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN anywhere in the place of NaN."""
    return a.dtype is b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


# ---- INT8


@settings(max_examples=40)
@given(
    m=st.sampled_from(ROWS), n=st.sampled_from(COLUMNS), k=st.sampled_from(DEPTHS), seed=seeds, dtype=float_types,
    bias=st.sampled_from([None, *FLOATS]), split=st.booleans(), extremes=st.booleans(),
)  # fmt: skip
def test_int8_is_the_reference(
    isa: str, m: int, n: int, k: int, seed: int, dtype: torch.dtype, bias: torch.dtype | None, split: bool,
    extremes: bool,
) -> None:  # fmt: skip
    w, x = integers((n, k), seed, torch.int8), floats((m, k), seed, dtype, FINITE if extremes else None)
    scale, b = torch.rand(n) + 1e-3, None if bias is None else floats((n,), seed, bias)
    y = ops.int8_linear_weight_only(x, ops.int8_pack(w, split), scale, b)
    assert same(y, reference.int8_linear_weight_only(x, w, scale, b))
    alone = [ops.int8_linear_weight_only(row, ops.int8_pack(w), scale, b) for row in x.split(1)]
    assert same(torch.cat(alone), y)


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_is_the_product_with_the_dequantized_weight(isa: str, dtype: torch.dtype) -> None:
    """Nothing of the reference: fp64, with a bound."""
    k, n = 300, 70
    w, x = integers((n, k), 1, torch.int8), torch.randn(20, k).to(dtype)
    scale, bias = torch.rand(n) * 0.01, torch.randn(n)
    y = ops.int8_linear_weight_only(x, ops.int8_pack(w), scale, bias)
    values = w.double() * scale.double()[:, None]
    exact = x.double() @ values.T + bias.double()
    # k fma, the product with the scale and the bias: each rounds once, by 2^-24 of at most the sum of magnitudes; then
    # once to dtype.
    size = x.double().abs() @ values.abs().T + bias.abs()
    assert (
        (y.double() - exact).abs() <= (k + 2) * 2.0**-24 * size + torch.finfo(dtype).eps / 2 * exact.abs() * 1.01
    ).all()


# ---- 4 bits


def weight_4bit(
    n: int, k: int, blocksize: int, quant_type: str, nested: bool, seed: int
) -> tuple[Weight4bit, Weight4bit]:
    """A flat weight of random codes and scales, and the same as C++ takes it."""
    flat = integers(((n * k + 1) // 2,), seed, torch.uint8)
    absmax, rest = torch.rand(-(-n * k // blocksize), generator=torch.Generator().manual_seed(seed)) + 0.1, (None,) * 3
    if nested:
        absmax, *rest = quantize_absmax(absmax)  # type: ignore[assignment]
        assert torch.equal(rest[1], dynamic_map())  # type: ignore[arg-type]
    weight = Weight4bit(flat, absmax, *rest, quant_type, blocksize, (n, k))
    sizes = (n, k, blocksize)
    return weight, weight._replace(packed=cpu.pack_4bit(flat, *sizes), absmax=cpu.pack_scales(absmax, *sizes))


@settings(max_examples=40)
@given(
    m=st.sampled_from(ROWS), n=st.sampled_from([n for n in COLUMNS if n >= 16]), blocks=st.integers(1, 5),
    blocksize=st.sampled_from([32, 64, 128, 256]), seed=seeds, dtype=float_types, nested=st.booleans(),
    quant_type=st.sampled_from(["nf4", "fp4", "int4"]), bias=st.booleans(), compute=st.sampled_from(["fp32", "bf16"]),
)  # fmt: skip
def test_4bit_is_the_reference(
    isa: str, m: int, n: int, blocks: int, blocksize: int, seed: int, dtype: torch.dtype, nested: bool,
    quant_type: str, bias: bool, compute: str,
) -> None:  # fmt: skip
    flat, packed = weight_4bit(n, blocks * blocksize, blocksize, quant_type, nested, seed)
    x, b = floats((m, blocks * blocksize), seed, dtype), floats((n,), seed) if bias else None
    y = cpu.linear_4bit(x, packed, b, compute)
    assert same(y, reference.linear_4bit(x, flat, b, compute))
    assert same(torch.cat([cpu.linear_4bit(row, packed, b, compute) for row in x.split(1)]), y)


@pytest.mark.parametrize("n, k", [(5, 70), (40, 70), (17, 33), (1, 1)])
@pytest.mark.parametrize("nested", [False, True])
def test_a_row_of_a_flat_weight_does_not_depend_on_its_batch(isa: str, n: int, k: int, nested: bool) -> None:
    _, weight = weight_4bit(n, k, 64, "nf4", nested, 1)
    x = floats((300, k), 1, torch.bfloat16)
    y = cpu.linear_4bit(x, weight, None, "bf16")
    assert torch.equal(cpu.linear_4bit(x, weight, None, "fp32"), y)
    assert torch.equal(torch.cat([cpu.linear_4bit(row, weight, None, "bf16") for row in x.split(7)]), y)


# ---- both

SCHEMES: list[str | Scheme] = ["int8-weight-only", NF4(compute="fp32"), FP4(32, True, "bf16"), Int4(128, "bf16")]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def make(k: int, n: int, scheme: str | Scheme, bias: bool = True) -> QLinear:
    torch.manual_seed(k + n)
    return QLinear.from_linear(nn.Linear(k, n, bias=bias), scheme).requires_grad_(False)


@each_scheme
@pytest.mark.parametrize("m, k, n", [(1, 2048, 600), (3, 2048, 600), (7, 512, 600), (200, 256, 80), (700, 4096, 20)])
def test_threads_blocks_and_groups_of_rows_change_nothing(
    isa: str, two_threads: None, scheme: str | Scheme, m: int, k: int, n: int
) -> None:
    """From 193 rows on there are blocks of rows; of 4096 columns 512 rows make a group."""
    layer, x = make(k, n, scheme), floats((m, k), 1)
    y = layer(x)
    torch.set_num_threads(1)
    assert torch.equal(layer(x), y)
    some = range(0, m, max(1, m // 9))
    assert torch.equal(torch.cat([layer(x[i : i + 1]) for i in some]), y[:: max(1, m // 9)])
    assert torch.equal(layer(x[: m // 2 + 1]), y[: m // 2 + 1]) and torch.equal(layer(x[m // 2 :]), y[m // 2 :])


@each_scheme
@pytest.mark.parametrize("m", [1, 4, 7, 20])
def test_nan_and_infinities_stay_in_their_row(isa: str, scheme: str | Scheme, m: int) -> None:
    layer, x = make(256, 40, scheme), floats((m, 256), 1)
    for at, value in enumerate([float("nan"), float("inf"), -float("inf")]):
        bad, row = x.clone(), at % m
        bad[row, 7 * at + 1] = value
        y = layer(bad)
        others = torch.arange(m) != row
        # A column whose weight is 0 there is NaN; so is every one for NaN.
        assert torch.equal(y[others], layer(x)[others]) and not y[row].isfinite().any()
        assert at > 0 or y[row].isnan().all()


@each_scheme
def test_the_gradient_is_that_of_the_dequantized_weight(scheme: str | Scheme) -> None:
    """A chain of 70 fp32 additions of products that are rounded twice, and the rounding to the gradient's dtype."""
    layer = make(256, 70, scheme, bias=False)
    weight = layer.weight.double()
    for dtype in FLOATS:
        x, grad = floats((5, 256), 1, dtype).requires_grad_(), floats((5, 70), 2, dtype)
        layer(x).backward(grad)
        assert x.grad is not None and x.grad.dtype is dtype
        exact, magnitude = grad.double() @ weight, grad.double().abs() @ weight.abs()
        bound = (70 + 2) * 2.0**-24 * magnitude + torch.finfo(dtype).eps / 2 * exact.abs()
        assert ((x.grad.double() - exact).abs() <= bound).all()


@each_scheme
def test_in_graphs_vmap_and_autocast(scheme: str | Scheme) -> None:
    layer, x = make(256, 40, scheme), floats((6, 256), 1)
    y = layer(x)
    torch.compiler.reset()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), y)
    torch.compiler.reset()
    assert torch.equal(torch.vmap(layer)(x), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(x)
    assert half.dtype is torch.bfloat16 and torch.equal(half, layer(x.bfloat16()))
    assert torch.equal(layer(x.t().contiguous().t()), y) and layer(x[:0]).shape == (0, 40)


def test_opcheck_and_what_is_refused() -> None:
    packed, scale = ops.int8_pack(integers((20, 30), 1, torch.int8)), torch.rand(20)
    good = (torch.rand(3, 30), packed, scale, torch.rand(20))
    torch.library.opcheck(ops.int8_linear_weight_only.default, good, test_utils=("test_schema", "test_faketensor"))
    bad: list[tuple[int, Any, type[Exception], str]] = [
        (0, torch.rand(3, 33), ValueError, "packed must be what int8_pack makes of"),
        (0, torch.rand(3, 30).double(), TypeError, "x must be float32"),
        (0, torch.tensor(1.0), ValueError, r"x must be \[..., K\]"),
        (1, packed[:1], ValueError, "packed must be what int8_pack makes of"),
        (2, scale[:19], ValueError, "bias must have shape|packed must be"),
        (2, scale.double(), TypeError, "weight_scale must be float32"),
        (3, torch.rand(19), ValueError, "bias must have shape"),
    ]
    for position, value, error, message in bad:
        with pytest.raises(error, match=message):
            ops.int8_linear_weight_only(*(value if i == position else each for i, each in enumerate(good)))


MEMORY = """
import sys, torch
import pyqkern
from pyqkern.schemes import *

def peak():
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1])

k, n, grad = 2048, 8192, sys.argv[1] == "gradient"
for scheme in map(eval, sys.argv[2:]):
    layer = pyqkern.QLinear._classes[type(scheme)](k, n, scheme=scheme)
    rows = [torch.randn(m, k, requires_grad=grad) for m in (1, 32)]
    small = type(layer)(k, 64, scheme=scheme)
    small.rows(torch.arange(4))
    y = small(rows[1])
    if grad:  # what torch imports and keeps
        y.backward(torch.randn(y.shape))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is what is resident now
    before = peak()
    for x in rows:
        y = layer(x)
        if grad:
            y.backward(torch.randn(y.shape))
    print(peak() - before)
"""


@pytest.mark.parametrize("what, most", [("product", 6_000), ("gradient", 60_000)])
def test_no_call_holds_a_dequantized_weight(what: str, most: int) -> None:
    """It would be 64 MB in fp32, and 32 in bf16."""
    schemes = [repr(get_scheme(scheme)) for scheme in SCHEMES]
    done = subprocess.run([sys.executable, "-c", MEMORY, what, *schemes], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    kilobytes = [int(line) for line in done.stdout.split()]
    assert len(kilobytes) == len(SCHEMES) and max(kilobytes) < most, kilobytes
