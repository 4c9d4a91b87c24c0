"""The numbers of the Triton kernels, against pyqkern.reference and bitsandbytes.

Where there is a GPU the tests run on it. Everywhere, `test_under_the_interpreter` runs this file once more in a process
of its own with TRITON_INTERPRET=1, where the kernels run in numpy on the CPU; there, a kernel that no test runs is a
failure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo
from conftest import available, require
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FINITE, FLOATS, INFINITE, NAN, floats, integers, seeds
from torch import Tensor
from torch.nn import functional

from pyqkern import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EPS = 2.0**-24  # half an ulp of fp32, relative

if available("triton"):
    from pyqkern.kernels import affine, device, int8, nf4, row_quantize, tuning

    KERNELS = {
        name: kernel
        for module in (affine, int8, nf4, row_quantize)
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    }

if INTERPRETED:
    from triton.runtime import interpreter

    RAN: set[str] = set()

    class RightArithmetic(interpreter.InterpreterBuilder):
        """Triton's interpreter rounds fp32 to bf16 half up and drops a carry, takes bf16 denormals for zero, multiplies
        bf16 matrices as if their bits were integers, and before 3.9 rounds an fma twice."""

        def cast_impl(self, src, dst_type):  # type: ignore[no-untyped-def]
            types = src.dtype.scalar, dst_type.scalar
            if types == (interpreter.tl.float32, interpreter.tl.bfloat16):
                rounded = torch.from_numpy(src.data.copy()).to(torch.bfloat16).view(torch.int16).numpy()
                return interpreter.TensorHandle(rounded.view("uint16"), interpreter.tl.bfloat16)
            if types == (interpreter.tl.bfloat16, interpreter.tl.float32):
                widened = (src.data.astype("uint32") << 16).view("float32")
                return interpreter.TensorHandle(widened, interpreter.tl.float32)
            return super().cast_impl(src, dst_type)

        create_fp_trunc = create_fp_ext = cast_impl

        def create_dot(self, a, b, d, *options):  # type: ignore[no-untyped-def]
            bf16 = interpreter.tl.bfloat16
            operands = [self.cast_impl(t, interpreter.tl.float32) if t.dtype.scalar == bf16 else t for t in (a, b)]
            return super().create_dot(*operands, d, *options)

        def create_fma(self, x, y, z):  # type: ignore[no-untyped-def]
            operands = torch.broadcast_tensors(*(torch.as_tensor(t.data) for t in (x, y, z)))
            return interpreter.TensorHandle(reference.fma(*operands).numpy(), z.dtype.scalar)

    interpreter.interpreter_builder.__class__ = RightArithmetic
    run = interpreter.InterpretedFunction.run

    def recorded(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        RAN.add(self.fn.__name__)
        return run(self, *args, **kwargs)

    interpreter.InterpretedFunction.run = recorded


def test_under_the_interpreter(tmp_path: Path) -> None:
    if INTERPRETED:
        return
    require("triton", "the kernels' numbers are not checked")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    ran = tmp_path / "ran.json"
    environment |= {"TRITON_INTERPRET": "1", "PYQKERN_RAN": str(ran), "CUDA_VISIBLE_DEVICES": "", "PYQKERN_REQUIRE": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert set(json.loads(ran.read_text())) == set(KERNELS), "a kernel that no test runs, or one that is not listed"


@pytest.fixture(scope="module", autouse=True)
def report() -> Iterator[None]:
    yield
    if INTERPRETED and "PYQKERN_RAN" in os.environ:
        Path(os.environ["PYQKERN_RAN"]).write_text(json.dumps(sorted(RAN & set(KERNELS))))


@pytest.fixture(scope="module", autouse=True)
def gpu(request: pytest.FixtureRequest) -> str:
    """The device of the tests: the GPU, or the CPU under the interpreter."""
    if INTERPRETED:
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "none"


@pytest.fixture(scope="module")
def gpu_only(gpu: str) -> str:
    if gpu == "none":
        require("triton", "the kernels' numbers are not checked")
        require("cuda", "test_under_the_interpreter ran this test on the CPU")
    return gpu


few = settings(max_examples=50)
rows = st.sampled_from([1, 2, 3, 5, 16, 17, 33])
widths = st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 200, 257]))
float_types = st.sampled_from(FLOATS)
qtypes = st.sampled_from(list(reference.QRANGE))


def same(a: Tensor, b: Tensor) -> None:
    """Bit for bit, but that any NaN equals any other."""
    assert a.dtype == b.dtype and a.shape == b.shape
    torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0, equal_nan=True)


# ---- affine


@few
@given(
    shape=st.sampled_from([(1, 1, 1), (1, 1, 4099), (2, 3, 5), (1, 70, 33), (5, 129, 1), (3, 2, 300)]),
    seed=seeds, dtype=float_types, qtype=qtypes, zero=st.booleans(),
)  # fmt: skip
def test_affine(
    gpu_only: str, shape: tuple[int, int, int], seed: int, dtype: torch.dtype, qtype: torch.dtype, zero: bool
) -> None:
    channels, fused = shape[1], shape[1] == 1
    g = torch.Generator().manual_seed(seed)
    scale = 10.0 ** (torch.rand(channels, generator=g) * 6 - 4)
    low, high = reference.QRANGE[qtype]
    zero_point = torch.randint(low, high + 1, (channels,), generator=g, dtype=torch.int32) if zero else None
    moved = None if zero_point is None else zero_point.to(gpu_only)
    x = floats(shape, seed, dtype, FINITE + INFINITE + NAN)
    q = affine.quantize(x.to(gpu_only), scale.to(gpu_only), moved, qtype, fused)
    same(q, reference.quantize(x, shape, scale, zero_point, qtype, fused))
    y = affine.dequantize(q, scale.to(gpu_only), moved, dtype)
    same(y, reference.dequantize(q.cpu(), shape, scale, zero_point, dtype))


def test_affine_at_ties(gpu_only: str) -> None:
    """Where one rounding (fma) and two differ: halfway between two codes."""
    scale, zero_point = torch.tensor([0.0314]), torch.tensor([7], dtype=torch.int32)
    x = ((torch.arange(-120, 120) + 0.5) * scale).view(1, 1, -1)
    wanted = [reference.quantize(x, (1, 1, 240), scale, zero_point, torch.int8, fused) for fused in (False, True)]
    assert not torch.equal(*wanted)
    for fused in (False, True):
        q = affine.quantize(x.to(gpu_only), scale.to(gpu_only), zero_point.to(gpu_only), torch.int8, fused)
        same(q, wanted[fused])


@few
@given(seed=seeds, dtype=float_types, extremes=st.sampled_from([FINITE, FINITE + INFINITE, FINITE + NAN]))
def test_min_max(gpu_only: str, seed: int, dtype: torch.dtype, extremes: list[float]) -> None:
    x = floats((3, 5, 7), seed, dtype, extremes)
    for ours, theirs in zip(affine.min_max(x.to(gpu_only)), reference.min_max(x, (3, 5, 7)), strict=True):
        same(ours, theirs)


# ---- rows


def unsigned(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels store, as the reference has it: codes in [0, 255]."""
    codes = (q.cpu().int() + 128).to(torch.uint8)
    zero = torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point
    return codes, scale.cpu(), zero.cpu() + 128


def check_rows(quantized: row_quantize.Rows, x: Tensor, symmetric: bool) -> None:
    for ours, theirs in zip(unsigned(*quantized), reference.int8_quantize_rows(x.cpu(), symmetric), strict=True):
        same(ours, theirs)


@few
@given(m=rows, k=widths, seed=seeds, dtype=float_types, symmetric=st.booleans())
def test_quantize_rows(gpu_only: str, m: int, k: int, seed: int, dtype: torch.dtype, symmetric: bool) -> None:
    x = floats((m, k), seed, dtype, FINITE)
    x[0] = 0
    x[-1, 0] = [float("nan"), float("inf"), 3e38, 1e-45][seed % 4]
    check_rows(row_quantize.quantize_rows(x.to(gpu_only), symmetric), x, symmetric)


@pytest.mark.parametrize("symmetric", [False, True])
def test_quantize_rows_longer_than_a_block(gpu_only: str, monkeypatch: pytest.MonkeyPatch, symmetric: bool) -> None:
    monkeypatch.setattr(row_quantize, "MAX_BLOCK", 128)
    x = floats((3, 300), 1)
    x[1, 299], x[2, 130] = 1e9, float("inf")
    check_rows(row_quantize.quantize_rows(x.to(gpu_only), symmetric), x, symmetric)


@pytest.mark.parametrize("symmetric", [False, True])
def test_ranges_at_the_ends_of_fp32(gpu_only: str, symmetric: bool) -> None:
    x = torch.tensor(
        [[3e38, -3e38, 1.0], [3e38, 1.0, 2.0], [-3e38, -1.0, -2.0], [1e-40, -1e-45, 3e-39], [0.0, -0.0, 0.0]]
    )
    check_rows(row_quantize.quantize_rows(x.to(gpu_only), symmetric), x, symmetric)


@few
@given(
    m=rows, k=widths, seed=seeds, dtype=float_types, symmetric=st.booleans(),
    approximate=st.sampled_from(["none", "tanh"]),
)  # fmt: skip
def test_gelu_quantize_rows(
    gpu_only: str, m: int, k: int, seed: int, dtype: torch.dtype, symmetric: bool, approximate: str
) -> None:
    x = (torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)
    u, scale, zero_point = unsigned(*row_quantize.gelu_quantize_rows(x.to(gpu_only), symmetric, approximate))
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
def test_layer_norm_quantize_rows(
    gpu_only: str, m: int, k: int, seed: int, dtype: torch.dtype, residual: bool, bias: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    x, other = torch.randn(m, k, generator=g).to(dtype), torch.randn(m, k, generator=g).to(dtype) if residual else None
    weight, shift = torch.randn(k, generator=g), torch.randn(k, generator=g) if bias else None
    moved = [None if t is None else t.to(gpu_only) for t in (x, weight, shift, other)]
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


def test_layer_norm_of_long_rows(gpu_only: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_quantize, "MAX_BLOCK", 64)
    x, weight = floats((2, 100), 3).to(gpu_only), torch.ones(100, device=gpu_only)
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
def test_int8_matmul(gpu_only: str, m: int, k: int, n: int, seed: int, qtype: torch.dtype) -> None:
    a, w = integers((m, k), seed, qtype), integers((n, k), seed + 1, torch.int8)
    same(int8.int8_matmul(a.to(gpu_only), w.to(gpu_only)), reference.int8_matmul(a, w))


@pytest.mark.parametrize("dtype, value, k", [(torch.int8, -128, 131071), (torch.uint8, 255, 65793)])
def test_int8_matmul_at_the_limit_of_int32(gpu_only: str, dtype: torch.dtype, value: int, k: int) -> None:
    a, w = torch.full((2, k), value, dtype=dtype), torch.full((3, k), -128, dtype=torch.int8)
    expected = torch.full((2, 3), value * -128 * k, dtype=torch.int32)
    same(int8.int8_matmul(a.to(gpu_only), w.to(gpu_only)), expected)


@few
@given(m=rows, k=widths, n=st.integers(1, 70), seed=seeds, config=st.integers(0, 2), offset=st.sampled_from([0, 1, 16]))
def test_int8_configurations(gpu_only: str, m: int, k: int, n: int, seed: int, config: int, offset: int) -> None:
    """Every way of cutting the problem, also for a matrix at an address that is no multiple of 16."""
    a, w = integers((m * k + offset,), seed, torch.int8), integers((n, k), seed + 1, torch.int8).to(gpu_only)
    a = a.to(gpu_only)[offset:].view(m, k)
    y = torch.empty((m, n), dtype=torch.int32, device=gpu_only)
    same(int8.matmul(a, w, y, config=configs()[config]), reference.int8_matmul(a, w))


@few
@given(
    m=rows, k=widths, n=st.integers(1, 70), seed=seeds, dtype=float_types, symmetric=st.booleans(),
    bias=st.sampled_from([None, *FLOATS]), activation=st.sampled_from(["none", "relu"]), old=st.booleans(),
)  # fmt: skip
def test_int8_linear(
    gpu_only: str, m: int, k: int, n: int, seed: int, dtype: torch.dtype, symmetric: bool,
    bias: torch.dtype | None, activation: str, old: bool,
) -> None:  # fmt: skip
    x = floats((m, k), seed, dtype)
    x[0] = 0
    x[-1, -1] = [1.0, float("nan"), float("inf")][seed % 3]
    w, scale = integers((n, k), seed, torch.int8).clamp(min=-127), torch.rand(n) + 0.1
    b = None if bias is None else floats((n,), seed, bias)
    packed = int8.int8_pack(w.to(gpu_only))
    same(int8.int8_unpack(packed, n, k), w)
    moved = None if b is None else b.to(gpu_only)
    with pytest.MonkeyPatch.context() as patch:
        if old:  # the configurations of devices without a tensor memory accelerator
            patch.setattr(device, "capability", lambda _: 80)
            tuning.choose.cache_clear()
        y = int8.int8_linear(x.to(gpu_only), packed, scale.to(gpu_only), moved, activation, symmetric)
        tuning.choose.cache_clear()
    same(y, reference.int8_linear(x, w, scale, b, activation, symmetric))


@pytest.mark.parametrize("m", [3, 130])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_int8_linear_gelu(gpu_only: str, m: int, activation: str) -> None:
    x, w, scale = floats((m, 64), 5), integers((70, 64), 6, torch.int8), torch.full((70,), 1e-5)
    bias = torch.linspace(-6, 6, 70)
    packed = int8.int8_pack(w.to(gpu_only))
    y = int8.int8_linear(x.to(gpu_only), packed, scale.to(gpu_only), bias.to(gpu_only), activation, False)
    before = reference.int8_linear(x, w, scale, bias, "none", False).double()
    exact = functional.gelu(before, approximate="tanh" if activation == "gelu_tanh" else "none")
    # 2**-20 of |x|: erf and exp as in test_gelu_quantize_rows
    assert ((y.cpu().double() - exact).abs() <= 2.0**-20 * before.abs()).all()


def test_a_row_does_not_depend_on_its_batch(gpu_only: str) -> None:
    x, w, scale = floats((70, 200), 7).to(gpu_only), integers((30, 200), 8, torch.int8), torch.rand(30, device=gpu_only)
    packed = int8.int8_pack(w.to(gpu_only))
    whole = int8.int8_linear(x, packed, scale, None, "none", False)
    for m in (1, 17):
        same(int8.int8_linear(x[:m].contiguous(), packed, scale, None, "none", False), whole[:m])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_operators_give_the_bits_of_the_cpu(gpu_only: str, dtype: torch.dtype, symmetric: bool) -> None:
    """torch.ops.pyqkern.*; under the interpreter the operators' own functions, told to use the Triton kernels."""
    from pyqkern import ops

    def on_gpu(name: str, *arguments: object) -> Tensor:
        if gpu_only == "cuda":
            moved = [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
            return getattr(torch.ops.pyqkern, name)(*moved)
        return getattr(ops, IMPLEMENTATIONS[name])(ops._Triton, *arguments)

    x, w = floats((2, 3, 70), 11, dtype), integers((33, 70), 12, torch.int8).clamp(min=-127)
    scale, bias = torch.rand(33) + 0.1, torch.randn(33)
    packed = on_gpu("int8_pack", w)
    same(on_gpu("int8_unpack", packed, 33, 70), w)
    how = (scale, bias, "relu", symmetric)
    on_cpu = torch.ops.pyqkern.int8_linear(x, torch.ops.pyqkern.int8_pack(w), *how)
    same(on_gpu("int8_linear", x, packed, *how), on_cpu)
    same(on_gpu("int8_matmul", w, w), torch.ops.pyqkern.int8_matmul(w, w))
    for axis, group_size in ((None, None), ((0, 1), None), ((2,), None), ((2,), 35)):
        how = (axis, group_size)
        qparams = torch.ops.pyqkern.choose_qparams_affine(x, torch.int8, *how, symmetric)
        for ours, theirs in zip(on_gpu("choose_qparams_affine", x, torch.int8, *how, symmetric), qparams, strict=True):
            same(ours, theirs)
        q = torch.ops.pyqkern.quantize_affine(x, *qparams, *how, torch.int8)
        same(on_gpu("quantize_affine", x, *qparams, *how, torch.int8), q)
        y = torch.ops.pyqkern.dequantize_affine(q, *qparams, *how, dtype)
        same(on_gpu("dequantize_affine", q, *qparams, *how, dtype), y)


IMPLEMENTATIONS = {
    "int8_pack": "_pack", "int8_unpack": "_unpack", "int8_linear": "_linear", "int8_matmul": "_matmul",
    "choose_qparams_affine": "_choose_qparams", "quantize_affine": "_quantize", "dequantize_affine": "_dequantize",
}  # fmt: skip


# ---- 4 bits

quant_types = st.sampled_from(["nf4", "fp4"])
blocksizes = st.sampled_from([32, 64, 128, 1024, 4096])


def levels(quant_type: str) -> Tensor:
    return torch.tensor(getattr(nf4, f"{quant_type.upper()}_LEVELS").value)


def dequantized(packed: Tensor, absmax: Tensor, numel: int, quant_type: str, blocksize: int) -> Tensor:
    """The format spelt out in fp32, flat."""
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1)[:numel].long()
    return levels(quant_type)[codes] * absmax.repeat_interleave(blocksize)[:numel]


def weights(numel: int, seed: int, dtype: torch.dtype, blocksize: int) -> Tensor:
    """Random, with a block of zeros, midpoints between levels, and a tiny block."""
    w = torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)
    w[:blocksize] = 0
    ends = torch.tensor([*nf4.NF4_BOUNDS.value, *nf4.FP4_BOUNDS.value, 1.0, -1.0, 0.0, -0.0])
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
    gpu_only: str, numel: int, seed: int, dtype: torch.dtype, quant_type: str, blocksize: int
) -> None:
    require("bitsandbytes", "codes are not compared with its")
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    w = weights(numel, seed, dtype, blocksize)
    packed, absmax = nf4.quantize_4bit(w.to(gpu_only), quant_type, blocksize)
    theirs, state = quantize_4bit(w, blocksize=blocksize, quant_type=quant_type)
    same(packed, theirs.view(-1))
    same(absmax, state.absmax)
    ours = nf4.dequantize_4bit(packed, absmax, None, None, None, quant_type, blocksize, (numel,), dtype)
    same(ours, dequantized(theirs, state.absmax, numel, quant_type, blocksize).to(dtype))
    with torch._dynamo.config.patch(disable=True):  # else bitsandbytes compiles this anew for every numel
        same(ours, dequantize_4bit(theirs, state).view(-1))


def test_the_ragged_block_is_divided(gpu_only: str) -> None:
    """bitsandbytes multiplies full blocks by 1/absmax but divides the last one: the codes at midpoints show it."""
    require("bitsandbytes", "codes are not compared with its")
    from bitsandbytes.functional import quantize_4bit

    differ = 0
    for absmax in torch.linspace(0.1, 9, 50):
        full = torch.cat([torch.tensor(nf4.NF4_BOUNDS.value) * absmax, absmax.view(1), torch.zeros(48)])
        ragged, _ = nf4.quantize_4bit(full[:16].to(gpu_only), "nf4", 64)
        same(ragged, quantize_4bit(full[:16], blocksize=64, quant_type="nf4")[0].view(-1))
        whole, _ = nf4.quantize_4bit(full.to(gpu_only), "nf4", 64)
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
    packed, absmax = nf4.quantize_4bit(torch.randn(n, k, generator=g).to(gpu), quant_type, blocksize)
    return packed.cpu(), absmax.cpu()


@few
@given(
    m=st.sampled_from([1, 2, 3, 4, 5, 16, 17, 33, 64, 65]), k=st.sampled_from([32, 64, 96, 192, 320, 50, 33]),
    n=st.integers(1, 40), seed=seeds, dtypes=st.tuples(float_types, st.sampled_from([None, *FLOATS])),
    form=st.tuples(st.sampled_from(["nf4", "fp4", "int4"]), st.sampled_from([32, 64, 128, 4096])), nested=st.booleans(),
    compute=st.sampled_from(["auto", "fp32", "bf16", "int8"]),
)  # fmt: skip
def test_linear_4bit(
    gpu_only: str, m: int, k: int, n: int, seed: int, dtypes: tuple[torch.dtype, torch.dtype | None],
    form: tuple[str, int], nested: bool, compute: str,
) -> None:  # fmt: skip
    dtype, bias_dtype = dtypes
    g = torch.Generator().manual_seed(seed)
    x, b = torch.randn(m, k, generator=g).to(dtype), torch.randn(n, generator=g).to(bias_dtype or torch.float32)
    b = b * (bias_dtype is not None)
    packed, absmax = random_weight(n, k, *form, seed, gpu_only)
    *scales, absmax = nested_of(absmax) if nested else (absmax, None, None, None, absmax)
    weight = [t if t is None else t.to(gpu_only) for t in (packed, *scales)]
    y = nf4.linear_4bit(x.to(gpu_only), *weight, None if bias_dtype is None else b.to(gpu_only), *form, n, compute)

    w = dequantized(packed, absmax, n * k, *form).view(n, k)
    same(nf4.dequantize_4bit(*weight, *form, (n, k), torch.float32), w)
    gemv = m <= 4 and k % 32 == 0
    inner = torch.float32 if gemv or compute == "fp32" else torch.bfloat16 if compute == "bf16" else dtype
    w, x = w.to(inner).double(), x.to(inner).double()
    exact = x @ w.T + b.double()
    # A sum of k products of fp32 numbers in any order: k roundings of the sum of magnitudes, twice that on tensor
    # cores, which truncate, and three more for scale, bias and product. Then y is rounded to its dtype. Where torch
    # multiplies, y and the bias are rounded to the inner one as well, and cuBLAS may round partial sums to it.
    magnitude = x.abs() @ w.T.abs() + b.double().abs()
    by_torch = k % 32 != 0 or m > (4 if inner is torch.float32 else 64)
    eps = torch.finfo(dtype).eps / 2 + (0 if gemv else torch.finfo(inner).eps / 2)
    bound = (2 * k + 3) * EPS * magnitude + eps * (exact.abs() + b.double().abs()) * (1 + 2.0**-7)
    bound += by_torch * (gpu_only == "cuda") * torch.finfo(inner).eps * magnitude
    assert y.dtype == dtype
    assert ((y.cpu().double() - exact).abs() <= bound + torch.finfo(dtype).tiny).all()


@few
@given(numel=st.integers(1, 700), seed=seeds, dtype=float_types, quant_type=quant_types)
def test_4bit_is_the_reference(gpu_only: str, numel: int, seed: int, dtype: torch.dtype, quant_type: str) -> None:
    """Blocks with NaN and infinities too: the operator finds them by their absmax."""
    from pyqkern import reference_4bit

    x = floats((numel,), seed, dtype, FINITE if seed % 2 else FINITE + INFINITE + NAN)
    packed, absmax = nf4.quantize_4bit(x.to(gpu_only), quant_type, 64)
    packed_there, absmax_there = reference_4bit.quantize_4bit(x, quant_type, 64)
    same(absmax, absmax_there)
    if absmax_there.isfinite().all():
        same(packed, packed_there)
    assert nf4.packed_sizes(numel, 3, 64) == reference_4bit.packed_sizes(numel, 3, 64)
    for ours in (nf4.pack_4bit, nf4.unpack_4bit):
        same(ours(packed, numel, 1, 64), packed)
    for ours in (nf4.pack_scales, nf4.unpack_scales):
        same(ours(absmax, numel, 1, 64), absmax)


def test_nested_absmax_of_many_blocks(gpu_only: str) -> None:
    packed, absmax = (t.cpu() for t in nf4.quantize_4bit(torch.randn(600, 32).to(gpu_only), "fp4", 32))
    *scales, again = nested_of(absmax * torch.linspace(0.1, 9, 600))
    weight = [t.to(gpu_only) for t in (packed, *scales)]
    w = nf4.dequantize_4bit(*weight, "fp4", 32, (600, 32), torch.float32)
    same(w, dequantized(packed, again, 600 * 32, "fp4", 32).view(600, 32))


def test_4bit_splits_and_tiles(gpu_only: str) -> None:
    """More than one tile in M and N, K split three ways, and bytes at an address that is no multiple of 16."""
    x, w = torch.randn(40, 320).bfloat16(), torch.randn(50, 320)
    packed, absmax = nf4.quantize_4bit(w.to(gpu_only), "nf4", 64)
    buffer = torch.empty(packed.numel() + 1, dtype=torch.uint8, device=gpu_only)
    buffer[1:] = packed
    rounded = dequantized(packed.cpu(), absmax.cpu(), w.numel(), "nf4", 64).view(50, 320).bfloat16()
    exact = x.double() @ rounded.double().T
    config = tuning.Config(16, 16, 64, 4, 2, split_k=3)
    weight = (buffer[1:], absmax, None, None, None)
    y = nf4.linear_4bit(x.to(gpu_only), *weight, None, "nf4", 64, 50, "auto", config)
    bound = 323 * EPS * (x.double().abs() @ w.double().abs().T * 1.5) + 2.0**-8 * exact.abs()
    assert ((y.cpu().double() - exact).abs() <= bound).all()
