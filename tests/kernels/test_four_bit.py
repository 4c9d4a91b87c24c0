"""The numbers of the Triton kernels for 4 bits, against bitsandbytes, the format spelt out, and pyqkern's reference."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from hypothesis import given
from hypothesis import strategies as st
from require import available, require
from strategies import FINITE, FLOATS, INFINITE, NAN, floats, seeds
from torch import Tensor
from torch.nn import functional
from triton_device import EPS, GPU, few, float_types, require_device, same

from pyqkern.backends import reference

if available("triton"):
    from pyqkern.kernels import four_bit, tuning


@pytest.fixture(scope="module", autouse=True)
def there_is_a_device() -> None:
    require_device()


quant_types = st.sampled_from(["nf4", "fp4"])
blocksizes = st.sampled_from([32, 64, 128, 1024, 4096])


def levels(quant_type: str) -> Tensor:
    return torch.tensor(getattr(four_bit, f"{quant_type.upper()}_LEVELS").value)


def dequantized(packed: Tensor, absmax: Tensor, numel: int, quant_type: str, blocksize: int) -> Tensor:
    """The format spelt out in fp32, flat."""
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1)[:numel].long()
    return levels(quant_type)[codes] * absmax.repeat_interleave(blocksize)[:numel]


def weights(numel: int, seed: int, dtype: torch.dtype, blocksize: int) -> Tensor:
    """Random, with a block of zeros, midpoints between levels, and a tiny block."""
    w = torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)
    w[:blocksize] = 0
    ends = torch.tensor([*four_bit.NF4_BOUNDS.value, *four_bit.FP4_BOUNDS.value, 1.0, -1.0, 0.0, -0.0])
    ends = ends[: max(0, numel - blocksize)]
    w[blocksize : blocksize + ends.numel()] = ends.to(dtype)
    w[3 * blocksize :] *= 1e-20
    return w


@few
@given(
    numel=st.one_of(st.integers(1, 5000), st.just(8192)), seed=seeds, dtype=float_types, quant_type=quant_types,
    blocksize=blocksizes,
)  # fmt: skip
def test_quantize_and_dequantize_4bit(
    numel: int, seed: int, dtype: torch.dtype, quant_type: str, blocksize: int
) -> None:
    require("bitsandbytes", "codes are not compared with its")
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    w = weights(numel, seed, dtype, blocksize)
    packed, absmax = four_bit.quantize_4bit(w.to(GPU), quant_type, blocksize)
    theirs, state = quantize_4bit(w, blocksize=blocksize, quant_type=quant_type)
    same(packed, theirs.view(-1))
    same(absmax, state.absmax)
    ours = four_bit.dequantize_4bit(packed, absmax, None, None, None, quant_type, blocksize, (numel,), dtype)
    same(ours, dequantized(theirs, state.absmax, numel, quant_type, blocksize).to(dtype))
    with torch._dynamo.config.patch(disable=True):  # else bitsandbytes compiles this anew for every numel
        same(ours, dequantize_4bit(theirs, state).view(-1))


def test_the_ragged_block_is_divided() -> None:
    """bitsandbytes multiplies full blocks by 1/absmax but divides the last one: the codes at midpoints show it."""
    require("bitsandbytes", "codes are not compared with its")
    from bitsandbytes.functional import quantize_4bit

    differ = 0
    for absmax in torch.linspace(0.1, 9, 50):
        full = torch.cat([torch.tensor(four_bit.NF4_BOUNDS.value) * absmax, absmax.view(1), torch.zeros(48)])
        ragged, _ = four_bit.quantize_4bit(full[:16].to(GPU), "nf4", 64)
        same(ragged, quantize_4bit(full[:16], blocksize=64, quant_type="nf4")[0].view(-1))
        whole, _ = four_bit.quantize_4bit(full.to(GPU), "nf4", 64)
        same(whole, quantize_4bit(full, blocksize=64, quant_type="nf4")[0].view(-1))
        differ += int((whole[:8] != ragged).sum())
    assert differ > 0


def nested_of(absmax: Tensor) -> tuple[Tensor, ...]:
    """absmax doubly quantized: (uint8, nested_absmax, a made-up map, offset), and the fp32 that it stands for."""
    offset, table = absmax.mean(), torch.linspace(-1, 1, 256)
    groups = functional.pad(absmax - offset, (0, -absmax.numel() % 256)).view(-1, 256)
    top = groups.abs().amax(1).clamp(min=1e-6)
    codes = ((groups / top[:, None] + 1) * 127.5).round().to(torch.uint8).view(-1)[: absmax.numel()]
    again = table[codes.long()] * top.repeat_interleave(256)[: absmax.numel()] + offset
    return codes, top, table, offset, again


def random_weight(n: int, k: int, quant_type: str, blocksize: int, seed: int, gpu: str) -> tuple[Tensor, Tensor]:
    """Packed codes and absmax of [n, k], on the CPU."""
    g = torch.Generator().manual_seed(seed)
    if quant_type == "int4":
        blocks = -(-n * k // blocksize)
        return torch.randint(0, 256, ((n * k + 1) // 2,), generator=g, dtype=torch.uint8), torch.rand(
            blocks, generator=g
        )
    packed, absmax = four_bit.quantize_4bit(torch.randn(n, k, generator=g).to(gpu), quant_type, blocksize)
    return packed.cpu(), absmax.cpu()


@few
@given(
    m=st.sampled_from([1, 2, 3, 4, 5, 16, 17, 33, 64, 65]), k=st.sampled_from([32, 64, 96, 192, 320, 50, 33]),
    n=st.integers(1, 40), seed=seeds, dtypes=st.tuples(float_types, st.sampled_from([None, *FLOATS])),
    form=st.tuples(st.sampled_from(["nf4", "fp4", "int4"]), st.sampled_from([32, 64, 128, 4096])), nested=st.booleans(),
    compute=st.sampled_from(["auto", "fp32", "bf16", "int8"]),
)  # fmt: skip
def test_linear_4bit(
    m: int, k: int, n: int, seed: int, dtypes: tuple[torch.dtype, torch.dtype | None],
    form: tuple[str, int], nested: bool, compute: str,
) -> None:  # fmt: skip
    dtype, bias_dtype = dtypes
    g = torch.Generator().manual_seed(seed)
    x, b = torch.randn(m, k, generator=g).to(dtype), torch.randn(n, generator=g).to(bias_dtype or torch.float32)
    b = b * (bias_dtype is not None)
    packed, absmax = random_weight(n, k, *form, seed, GPU)
    *scales, absmax = nested_of(absmax) if nested else (absmax, None, None, None, absmax)
    weight = [t if t is None else t.to(GPU) for t in (packed, *scales)]
    y = four_bit.linear_4bit(x.to(GPU), *weight, None if bias_dtype is None else b.to(GPU), *form, n, compute)

    w = dequantized(packed, absmax, n * k, *form).view(n, k)
    same(four_bit.dequantize_4bit(*weight, *form, (n, k), torch.float32), w)
    few = m <= 2 and k % 32 == 0
    inner = torch.float32 if few or compute == "fp32" else torch.bfloat16 if compute == "bf16" else dtype
    gemv = k % 32 == 0 and m <= 4 and inner is torch.float32
    w, x = w.to(inner).double(), x.to(inner).double()
    exact = x @ w.T + b.double()
    # A sum of k products of fp32 numbers in any order: k roundings of the sum of magnitudes, twice that on tensor
    # cores, which truncate, and three more for scale, bias and product. Then y is rounded to its dtype. Where torch
    # multiplies, y and the bias are rounded to the inner one as well, and cuBLAS may round partial sums to it.
    magnitude = x.abs() @ w.T.abs() + b.double().abs()
    by_torch = k % 32 != 0 or m > (4 if inner is torch.float32 else 64)
    eps = torch.finfo(dtype).eps / 2 + (0 if gemv else torch.finfo(inner).eps / 2)
    bound = (2 * k + 3) * EPS * magnitude + eps * (exact.abs() + b.double().abs()) * (1 + 2.0**-7)
    bound += by_torch * (GPU == "cuda") * torch.finfo(inner).eps * magnitude
    assert y.dtype == dtype
    assert ((y.cpu().double() - exact).abs() <= bound + torch.finfo(dtype).tiny).all()


@few
@given(numel=st.integers(1, 700), seed=seeds, dtype=float_types, quant_type=quant_types)
def test_4bit_is_the_reference(numel: int, seed: int, dtype: torch.dtype, quant_type: str) -> None:
    """Blocks with NaN and infinities too: the operator finds them by their absmax."""
    x = floats((numel,), seed, dtype, FINITE if seed % 2 else FINITE + INFINITE + NAN)
    packed, absmax = four_bit.quantize_4bit(x.to(GPU), quant_type, 64)
    packed_there, absmax_there = reference.quantize_4bit(x, quant_type, 64)
    same(absmax, absmax_there)
    if absmax_there.isfinite().all():
        same(packed, packed_there)


def test_nested_absmax_of_many_blocks() -> None:
    packed, absmax = (t.cpu() for t in four_bit.quantize_4bit(torch.randn(600, 32).to(GPU), "fp4", 32))
    *scales, again = nested_of(absmax * torch.linspace(0.1, 9, 600))
    weight = [t.to(GPU) for t in (packed, *scales)]
    w = four_bit.dequantize_4bit(*weight, "fp4", 32, (600, 32), torch.float32)
    same(w, dequantized(packed, again, 600 * 32, "fp4", 32).view(600, 32))


def test_4bit_splits_and_tiles() -> None:
    """More than one tile in M and N, K split three ways and no whole number of steps, bytes at an odd address, and
    NaN behind the scales, which nothing may read."""
    x, w, bias = torch.randn(40, 352).bfloat16(), torch.randn(50, 352), torch.randn(50)
    packed, absmax = four_bit.quantize_4bit(w.to(GPU), "nf4", 32)
    buffer = torch.empty(packed.numel() + 1, dtype=torch.uint8, device=GPU)
    buffer[1:] = packed
    scales = torch.full((absmax.numel() + 64,), torch.nan, device=GPU)
    scales[: absmax.numel()] = absmax
    rounded = dequantized(packed.cpu(), absmax.cpu(), w.numel(), "nf4", 32).view(50, 352).bfloat16()
    exact = x.double() @ rounded.double().T + bias.double()
    config = tuning.Config(16, 16, 64, 4, 2, split_k=3)
    weight = (buffer[1:], scales[: absmax.numel()], None, None, None)
    y = four_bit.linear_4bit(x.to(GPU), *weight, bias.to(GPU), "nf4", 32, 50, "auto", config)
    bound = 355 * EPS * (x.double().abs() @ w.double().abs().T * 1.5 + bias.abs()) + 2.0**-8 * exact.abs()
    assert ((y.cpu().double() - exact).abs() <= bound).all()


def dot_and_gemv() -> list[tuple[str, int, tuning.Config]]:
    if not available("triton"):
        return []
    return sorted(
        {
            (kernel, min(largest, 64), config)
            for kernel in ("four_bit_gemv", "four_bit_dot")
            for families in tuning.CONFIGS[kernel].values()
            for largest, configs in families.items()
            for config in configs
        },
        key=repr,
    )


@pytest.mark.parametrize("kernel, m, config", dot_and_gemv(), ids=repr)
def test_every_4bit_configuration_of_the_table(kernel: str, m: int, config: tuning.Config) -> None:
    x, w = torch.randn(m, 1312), torch.randn(70, 1312)
    packed, absmax = four_bit.quantize_4bit(w.to(GPU), "fp4", 32)
    x = x.bfloat16() if kernel == "four_bit_dot" else x
    rounded = dequantized(packed.cpu(), absmax.cpu(), w.numel(), "fp4", 32).view(70, 1312).to(x.dtype)
    exact = x.double() @ rounded.double().T
    config = tuning.replace(config, split_k=3) if config.split_k == 0 else config
    y = four_bit.linear_4bit(x.to(GPU), packed, absmax, None, None, None, None, "fp4", 32, 70, "auto", config)
    bound = 1315 * EPS * (x.double().abs() @ rounded.double().abs().T) + torch.finfo(x.dtype).eps / 2 * exact.abs()
    assert ((y.cpu().double() - exact).abs() <= bound * 1.01).all()
