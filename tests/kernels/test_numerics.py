"""The numbers of the Triton kernels, INT8 and affine, against pyqkern.backends.reference; see triton_device.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from require import available
from strategies import FINITE, FLOATS, INFINITE, NAN, floats, integers, seeds
from torch import Tensor
from torch.nn import functional
from triton_device import EPS, GPU, few, float_types, qtypes, require_device, rows, same, widths

from pyqkern.backends import QRANGE, cuda, reference

if available("triton"):
    from pyqkern.kernels import affine, device, int8, row_quantize, tuning


@pytest.fixture(scope="module", autouse=True)
def there_is_a_device() -> None:
    require_device()


# ---- affine


@few
@given(
    shape=st.sampled_from([(1, 1, 1), (1, 1, 4099), (2, 3, 5), (1, 70, 33), (5, 129, 1), (3, 2, 300)]),
    seed=seeds, dtype=float_types, qtype=qtypes, zero=st.booleans(),
)  # fmt: skip
def test_affine(shape: tuple[int, int, int], seed: int, dtype: torch.dtype, qtype: torch.dtype, zero: bool) -> None:
    channels, fused = shape[1], shape[1] == 1
    g = torch.Generator().manual_seed(seed)
    scale = 10.0 ** (torch.rand(channels, generator=g) * 6 - 4)
    low, high = QRANGE[qtype]
    zero_point = torch.randint(low, high + 1, (channels,), generator=g, dtype=torch.int32) if zero else None
    moved = None if zero_point is None else zero_point.to(GPU)
    x = floats(shape, seed, dtype, FINITE + INFINITE + NAN)
    q = affine.quantize(x.to(GPU), scale.to(GPU), moved, qtype, fused)
    same(q, reference.quantize(x, shape, scale, zero_point, qtype, fused))
    y = affine.dequantize(q, scale.to(GPU), moved, dtype)
    same(y, reference.dequantize(q.cpu(), shape, scale, zero_point, dtype))


def test_affine_at_ties() -> None:
    """Where one rounding (fma) and two differ: halfway between two codes."""
    scale, zero_point = torch.tensor([0.0314]), torch.tensor([7], dtype=torch.int32)
    x = ((torch.arange(-120, 120) + 0.5) * scale).view(1, 1, -1)
    wanted = [reference.quantize(x, (1, 1, 240), scale, zero_point, torch.int8, fused) for fused in (False, True)]
    assert not torch.equal(*wanted)
    for fused in (False, True):
        q = affine.quantize(x.to(GPU), scale.to(GPU), zero_point.to(GPU), torch.int8, fused)
        same(q, wanted[fused])


@few
@given(seed=seeds, dtype=float_types, extremes=st.sampled_from([FINITE, FINITE + INFINITE, FINITE + NAN]))
def test_min_max(seed: int, dtype: torch.dtype, extremes: list[float]) -> None:
    x = floats((3, 5, 7), seed, dtype, extremes)
    for ours, theirs in zip(affine.min_max(x.to(GPU)), reference.min_max(x, (3, 5, 7)), strict=True):
        same(ours, theirs)


# ---- rows


def unsigned(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels store, as the reference has it: codes in [0, 255]."""
    codes = (q.cpu().int() + 128).to(torch.uint8)
    zero = torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point
    return codes, scale.cpu(), zero.cpu() + 128


def check_rows(quantized: row_quantize.Rows, x: Tensor, symmetric: bool, bits: int = 8) -> None:
    for ours, theirs in zip(unsigned(*quantized), reference.int8_quantize_rows(x.cpu(), symmetric, bits), strict=True):
        same(ours, theirs)


hows = st.sampled_from([(False, 8), (True, 8), (False, 7)])  # whether symmetric, bits


@few
@given(m=rows, k=widths, seed=seeds, dtype=float_types, how=hows)
def test_quantize_rows(m: int, k: int, seed: int, dtype: torch.dtype, how: tuple[bool, int]) -> None:
    x = floats((m, k), seed, dtype, FINITE)
    x[0] = 0
    x[-1, 0] = [float("nan"), float("inf"), 3e38, 1e-45][seed % 4]
    check_rows(row_quantize.quantize_rows(x.to(GPU), *how), x, *how)


@pytest.mark.parametrize("symmetric", [False, True])
def test_quantize_rows_longer_than_a_block(monkeypatch: pytest.MonkeyPatch, symmetric: bool) -> None:
    monkeypatch.setattr(row_quantize, "MAX_BLOCK", 128)
    x = floats((3, 300), 1)
    x[1, 299], x[2, 130] = 1e9, float("inf")
    check_rows(row_quantize.quantize_rows(x.to(GPU), symmetric), x, symmetric)


@pytest.mark.parametrize("symmetric", [False, True])
def test_ranges_at_the_ends_of_fp32(symmetric: bool) -> None:
    x = torch.tensor(
        [[3e38, -3e38, 1.0], [3e38, 1.0, 2.0], [-3e38, -1.0, -2.0], [1e-40, -1e-45, 3e-39], [0.0, -0.0, 0.0]]
    )
    check_rows(row_quantize.quantize_rows(x.to(GPU), symmetric), x, symmetric)


@few
@given(
    m=rows, k=widths, seed=seeds, dtype=float_types, symmetric=st.booleans(),
    approximate=st.sampled_from(["none", "tanh"]),
)  # fmt: skip
def test_gelu_quantize_rows(m: int, k: int, seed: int, dtype: torch.dtype, symmetric: bool, approximate: str) -> None:
    x = (torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)
    u, scale, zero_point = unsigned(*row_quantize.gelu_quantize_rows(x.to(GPU), symmetric, approximate))
    y = functional.gelu(x.double(), approximate=approximate)
    # gelu in fp32 errs by 2**-20 of |x| at most (erf by 2 ulp of 1, exp by 2**-20), then is rounded to x's dtype.
    error = 2.0**-20 * x.double().abs() + torch.finfo(dtype).eps / 2 * y.abs() + torch.finfo(dtype).tiny
    exact_code = y / scale.double()[:, None] + zero_point[:, None]
    slack = 0.5 + 2.0**-14 + error / scale.double()[:, None]  # 2**-14: half an ulp of 255 in fp32, and of the product
    assert ((u.double() - exact_code.clamp(0, 255)).abs() <= slack).all()
    # the scale is no wider than the row needs
    assert (u.amax(1) == 255).logical_or(u.amin(1) <= 1).logical_or(scale == 1).all()


@few
@given(m=rows, k=st.integers(2, 257), seed=seeds, dtype=float_types, residual=st.booleans(), bias=st.booleans())
def test_layer_norm_quantize_rows(m: int, k: int, seed: int, dtype: torch.dtype, residual: bool, bias: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    x, other = torch.randn(m, k, generator=g).to(dtype), torch.randn(m, k, generator=g).to(dtype) if residual else None
    weight, shift = torch.randn(k, generator=g), torch.randn(k, generator=g) if bias else None
    moved = [None if t is None else t.to(GPU) for t in (x, weight, shift, other)]
    y, *quantized = row_quantize.layer_norm_quantize_rows(*moved[:3], 1e-5, seed % 2 == 0, moved[3])
    check_rows(tuple(quantized), y, seed % 2 == 0)
    total = (x if other is None else x + other).double()
    exact = functional.layer_norm(total, (k,), weight.double(), None if shift is None else shift.double(), 1e-5)
    # The mean of k numbers errs by k ulp of the largest; that, over the deviation, times the weight, is y's error.
    deviation = (total.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    spread = total.abs().amax(1, keepdim=True) / deviation
    bound = (2 * k + 16) * EPS * (spread + exact.abs()) * weight.abs().clamp(min=1)
    bound += torch.finfo(dtype).eps * exact.abs()
    assert ((y.cpu().double() - exact).abs() <= bound + torch.finfo(dtype).tiny).all()


def test_layer_norm_of_long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_quantize, "MAX_BLOCK", 64)
    x, weight = floats((2, 100), 3).to(GPU), torch.ones(100, device=GPU)
    y, *quantized = row_quantize.layer_norm_quantize_rows(x, weight, None, 1e-5, False, x)
    same(y, functional.layer_norm(x + x, (100,), weight, None, 1e-5))
    check_rows(tuple(quantized), y, False)


# ---- INT8


def configs() -> list[tuning.Config]:
    """Small tiles, so that small shapes have many: plain, split, and persistent with tensor descriptors."""
    return [
        tuning.Config(16, 32, 32, 4, 2),
        tuning.Config(16, 16, 32, 4, 2, split_k=3),
        tuning.Config(64, 32, 32, 4, 2, tma=True, persistent=1),
    ]


@few
@given(m=rows, k=widths, n=st.one_of(st.integers(1, 40), st.just(130)), seed=seeds, qtype=qtypes)
def test_int8_matmul(m: int, k: int, n: int, seed: int, qtype: torch.dtype) -> None:
    a, w = integers((m, k), seed, qtype), integers((n, k), seed + 1, torch.int8)
    same(int8.int8_matmul(a.to(GPU), w.to(GPU)), reference.int8_matmul(a, w))


@pytest.mark.parametrize("dtype, value, k", [(torch.int8, -128, 131071), (torch.uint8, 255, 65793)])
def test_int8_matmul_at_the_limit_of_int32(dtype: torch.dtype, value: int, k: int) -> None:
    a, w = torch.full((2, k), value, dtype=dtype), torch.full((3, k), -128, dtype=torch.int8)
    expected = torch.full((2, 3), value * -128 * k, dtype=torch.int32)
    same(int8.int8_matmul(a.to(GPU), w.to(GPU)), expected)


@few
@given(m=rows, k=widths, n=st.integers(1, 70), seed=seeds, config=st.integers(0, 2), offset=st.sampled_from([0, 1, 16]))
def test_int8_configurations(m: int, k: int, n: int, seed: int, config: int, offset: int) -> None:
    """Every way of cutting the problem, also for a matrix at an address that is no multiple of 16."""
    a, w = integers((m * k + offset,), seed, torch.int8), integers((n, k), seed + 1, torch.int8).to(GPU)
    a = a.to(GPU)[offset:].view(m, k)
    y = torch.empty((m, n), dtype=torch.int32, device=GPU)
    same(int8.matmul(a, w, y, config=configs()[config]), reference.int8_matmul(a, w))


TABLE = {
    config
    for families in tuning.CONFIGS["int8_matmul"].values()
    for configs in families.values()
    for config in configs
} if available("triton") else set()  # fmt: skip


@pytest.mark.parametrize("config", sorted(TABLE, key=repr), ids=repr)
def test_every_int8_configuration_of_the_table(config: tuning.Config) -> None:
    """Tiles as large as they come, whose tail runs in parts; several in M and N, ragged at every edge, K split."""
    m, n, k = 150, 270, 600
    x, w = floats((m, k), 1), integers((n, k), 2, torch.int8).clamp(min=-127)
    scale, bias = torch.rand(n) + 0.1, torch.randn(n)
    rows = row_quantize.quantize_rows(x.to(GPU), False)
    config = tuning.replace(config, split_k=3) if config.split_k == 0 else config
    weight = int8.int8_pack(w.to(GPU)), scale.to(GPU), bias.to(GPU)
    y = int8.int8_scaled_matmul(*rows, *weight, "none", torch.float32, config)
    same(y, reference.int8_linear(x, w, scale, bias, "none", False))


@few
@given(
    m=rows, k=widths, n=st.integers(1, 70), seed=seeds, dtype=float_types, how=hows,
    bias=st.sampled_from([None, *FLOATS]), activation=st.sampled_from(["none", "relu"]), old=st.booleans(),
)  # fmt: skip
def test_int8_linear(
    m: int, k: int, n: int, seed: int, dtype: torch.dtype, how: tuple[bool, int],
    bias: torch.dtype | None, activation: str, old: bool,
) -> None:  # fmt: skip
    x = floats((m, k), seed, dtype)
    x[0] = 0
    x[-1, -1] = [1.0, float("nan"), float("inf")][seed % 3]
    w, scale = integers((n, k), seed, torch.int8).clamp(min=-127), torch.rand(n) + 0.1
    b = None if bias is None else floats((n,), seed, bias)
    packed = int8.int8_pack(w.to(GPU))
    same(cuda.int8_unpack(packed, n, k), w)
    moved = None if b is None else b.to(GPU)
    with pytest.MonkeyPatch.context() as patch:
        if old:  # the configurations of devices without a tensor memory accelerator
            patch.setattr(device, "capability", lambda _: 80)
            tuning.choose.cache_clear()
        y = int8.int8_linear(x.to(GPU), packed, scale.to(GPU), moved, activation, *how)
        tuning.choose.cache_clear()
    same(y, reference.int8_linear(x, w, scale, b, activation, *how))


@few
@given(
    m=rows, k=widths, seed=seeds, dtype=float_types, symmetric=st.booleans(),
    copy=st.sampled_from(["no", "contiguous", "without the last row's padding"]),
)  # fmt: skip
def test_int8_linear_in_two_steps(m: int, k: int, seed: int, dtype: torch.dtype, symmetric: bool, copy: str) -> None:
    """Rows quantized before; also where their codes were copied and lost the bytes between the rows."""
    x, w, scale = floats((m, k), seed, dtype), integers((9, k), seed, torch.int8), torch.rand(9) + 0.1
    packed = int8.int8_pack(w.to(GPU))
    q, *qparams = row_quantize.quantize_rows(x.to(GPU), symmetric)
    if copy == "contiguous":
        q = q.contiguous().clone()
    elif copy != "no":
        row = q.stride(0)
        short = torch.empty((m - 1) * row + k, dtype=torch.int8, device=GPU).as_strided((m, k), (row, 1))
        q = short.copy_(q)
    y = int8.int8_scaled_matmul(q, *qparams, packed, scale.to(GPU), None, "none", dtype)
    same(y, reference.int8_linear(x, w, scale, None, "none", symmetric))


@few
@given(m=rows, k=widths, seed=seeds, dtype=float_types, zero=st.sampled_from([0, 3, 127, 128, 255]))
def test_int8_linear_static(m: int, k: int, seed: int, dtype: torch.dtype, zero: int) -> None:
    x, w, scale = floats((m, k), seed, dtype), integers((9, k), seed, torch.int8), torch.rand(9) + 0.1
    x[-1, -1] = [1.0, float("nan"), float("inf")][seed % 3]
    bits = 7 if zero < 128 else 8
    arguments = (scale, None, "none", torch.tensor(0.03), torch.tensor(zero, dtype=torch.int32), bits)
    there = [t.to(GPU) if isinstance(t, Tensor) else t for t in arguments]
    y = int8.int8_linear_static(x.to(GPU), int8.int8_pack(w.to(GPU)), *there)
    same(y, reference.int8_linear_static(x, w, *arguments))


@pytest.mark.parametrize("m", [3, 130])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_int8_linear_gelu(m: int, activation: str) -> None:
    x, w, scale = floats((m, 64), 5), integers((70, 64), 6, torch.int8), torch.full((70,), 1e-5)
    bias = torch.linspace(-6, 6, 70)
    packed = int8.int8_pack(w.to(GPU))
    y = int8.int8_linear(x.to(GPU), packed, scale.to(GPU), bias.to(GPU), activation, False)
    before = reference.int8_linear(x, w, scale, bias, "none", False).double()
    exact = functional.gelu(before, approximate="tanh" if activation == "gelu_tanh" else "none")
    # 2**-20 of |x|: erf and exp as in test_gelu_quantize_rows
    assert ((y.cpu().double() - exact).abs() <= 2.0**-20 * before.abs()).all()


def test_a_row_does_not_depend_on_its_batch() -> None:
    x, w, scale = floats((70, 200), 7).to(GPU), integers((30, 200), 8, torch.int8), torch.rand(30, device=GPU)
    packed = int8.int8_pack(w.to(GPU))
    whole = int8.int8_linear(x, packed, scale, None, "none", False)
    for m in (1, 17):
        same(int8.int8_linear(x[:m].contiguous(), packed, scale, None, "none", False), whole[:m])
