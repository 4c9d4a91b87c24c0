"""NF4 and FP4: bitsandbytes' numbers bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from require import require
from strategies import FLOATS, floats, seeds, strided, strides
from torch import Tensor

from pyqkern import Quantized4bit, dequantize_4bit, quantize_4bit
from pyqkern.backends import reference
from pyqkern.backends.reference.four_bit import CODEBOOKS, unpack
from pyqkern.schemes import BLOCKSIZES

TYPES = ["nf4", "fp4"]
SHAPES = [(1,), (5,), (64,), (7, 9), (3, 64), (33, 97), (64, 768), (2, 3, 70)]


def weights(shape: tuple[int, ...], quant_type: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal values, a block of zeros, and exact midpoints between the codebook's values (where absmax is 1)."""
    w = floats(shape, seed, dtype).flatten()
    if w.numel() >= 4096:
        w[1000:1200] = 0
        w[2048:2304] = CODEBOOKS[quant_type].bounds.to(dtype).repeat(18)[:256]
        w[2048:2304:32] = 1
    return w.view(shape)


# ---- quantize and dequantize


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_equals_bitsandbytes(isa: str, quant_type: str, blocksize: int) -> None:
    """Codes, absmax and dequantized values; blocks that cross rows, a ragged last block, odd numels."""
    require("bitsandbytes", "the numbers are compared with its own")
    from bitsandbytes import functional as theirs

    for shape in SHAPES:
        for dtype in FLOATS:
            w = weights(shape, quant_type, dtype)
            q = quantize_4bit(w, quant_type, blocksize=blocksize)
            packed, state = theirs.quantize_4bit(w, quant_type=quant_type, blocksize=blocksize)
            assert torch.equal(q.packed, packed) and torch.equal(q.absmax, state.absmax)
            # Its own CPU kernels are wrong where a row is no multiple of the blocksize, hence its plain one.
            code = theirs.get_4bit_type(quant_type, device="cpu")
            values = code[unpack(packed, w.numel()).long()]
            expected = (values * state.absmax.repeat_interleave(blocksize)[: w.numel()]).to(dtype).view(shape)
            assert torch.equal(dequantize_4bit(q), expected)
            if len(shape) == 2 and shape[1] % blocksize == 0:
                assert torch.equal(dequantize_4bit(q), theirs.dequantize_4bit(packed, state))


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_double_quantization_equals_bitsandbytes(quant_type: str, shape: tuple[int, ...]) -> None:
    require("bitsandbytes", "the numbers are compared with its own")
    from bitsandbytes import functional as theirs

    w = weights(shape, quant_type, torch.float32)
    q = quantize_4bit(w, quant_type, double_quant=True)
    _, state = theirs.quantize_4bit(w, quant_type=quant_type, compress_statistics=True)
    assert torch.equal(q.absmax, state.absmax) and torch.equal(q.nested_absmax, state.state2.absmax)
    assert torch.equal(q.nested_map, state.state2.code) and torch.equal(q.nested_offset, state.offset)
    absmax = theirs.dequantize_blockwise(state.absmax, state.state2) + state.offset
    plain = Quantized4bit(q.packed, absmax, quant_type, 64, q.dtype, q.shape)
    assert torch.equal(dequantize_4bit(q), dequantize_4bit(plain))


@given(
    n=st.integers(0, 40), k=st.integers(0, 300), seed=seeds, dtype=st.sampled_from(FLOATS), how=strides,
    quant_type=st.sampled_from(TYPES), blocksize=st.sampled_from(BLOCKSIZES), double_quant=st.booleans(),
)  # fmt: skip
def test_equals_the_reference(
    isa: str,
    n: int,
    k: int,
    seed: int,
    dtype: torch.dtype,
    how: str,
    quant_type: str,
    blocksize: int,
    double_quant: bool,
) -> None:
    w = strided(floats((n, k), seed, dtype, [0.0, -0.0, 1e-40, 65504.0]), how)
    q = quantize_4bit(w, quant_type, blocksize=blocksize, double_quant=double_quant)
    if w.numel():
        packed, absmax = reference.quantize_4bit(w, quant_type, blocksize)
        assert torch.equal(q.packed.flatten(), packed)
        assert double_quant or torch.equal(q.absmax, absmax)
    for out in FLOATS:
        expected = reference.dequantize_4bit(q.weight, out)
        got = dequantize_4bit(q, out)
        assert got.dtype is out and torch.equal(got, expected)


def test_real_weights_and_threads(isa: str, two_threads: None) -> None:
    """Large enough for more than one thread and for stores past the cache."""
    w = torch.randn(1504, 3000, generator=torch.Generator().manual_seed(0))
    q = quantize_4bit(w)
    packed, absmax = reference.quantize_4bit(w, "nf4", 64)
    assert torch.equal(q.packed.flatten(), packed) and torch.equal(q.absmax, absmax)
    expected = reference.dequantize_4bit(q.weight, torch.float32)
    assert torch.equal(dequantize_4bit(q), expected)
    twice = Quantized4bit(torch.cat([packed, packed]), torch.cat([absmax, absmax]), "nf4", 64, w.dtype, (3008, 3000))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(dequantize_4bit(twice, dtype), expected.to(dtype).repeat(2, 1))
    # Half the widest gap of NF4 (0.1519 between -1 and -0.6962), and the roundings of the quotient.
    assert ((expected - w).abs() <= absmax.repeat_interleave(64)[: w.numel()].view(w.shape) * (0.15191 + 2**-20)).all()


def test_zero_block_and_midpoints() -> None:
    assert (quantize_4bit(torch.zeros(64)).packed == 0x77).all() and quantize_4bit(torch.zeros(64)).absmax.item() == 0
    book = CODEBOOKS["nf4"]
    w = torch.cat([book.bounds, torch.ones(17)])
    assert torch.equal(unpack(quantize_4bit(w, blocksize=32).packed, 15), torch.arange(15, dtype=torch.uint8))
