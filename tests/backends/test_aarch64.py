"""csrc on aarch64: compiled for it, run in an emulator, and its results compared with those of this CPU, bit by bit."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from encoder_layer import Layer
from require import require
from strategies import FINITE, FLOATS, INFINITE, NAN, floats, generator, integers
from torch import Tensor

from pyqkern import _C
from pyqkern.backends import ACTIVATIONS, Weight4bit, Weight8bit, cpu
from pyqkern.backends.reference.four_bit import CODEBOOKS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "tests/backends/portable.cpp", ROOT / "csrc/kernels/isa_scalar.cpp", *(ROOT / "csrc").glob("*.cpp")]
# As setup.py compiles it, but for -O3, which takes three times as long. -O1 alone makes no fma of a product and a sum,
# so it could not tell whether -ffp-contract=off is needed.
FLAGS = ["-std=c++17", "-O1", "-fexpensive-optimizations", "-ffp-contract=off", "-I", str(ROOT / "csrc")]

M, N, K, BLOCK = 5, 40, 96, 32  # as in portable.cpp
HIDDEN = 48
SCALES, ZEROS = torch.tensor([0.05, 0.3, 1.0, 0.007, 2.0]), torch.tensor([3, 0, -5, 1, 17], dtype=torch.int32)
PROBABILITY_CODE = 2  # an Elementwise of kernels.h


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs portable.cpp on an emulated aarch64."""
    require("aarch64", "apt-get install g++-aarch64-linux-gnu qemu-user")
    folder = tmp_path_factory.mktemp("aarch64")

    def compiled(source: Path) -> str:
        made = str(folder / f"{source.stem}.o")
        subprocess.run(["aarch64-linux-gnu-g++", *FLAGS, "-c", str(source), "-o", made], check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, SOURCES))
    program = str(folder / "portable")
    subprocess.run(["aarch64-linux-gnu-g++", "-static", *objects, "-o", program], check=True, capture_output=True)
    return [str(shutil.which("qemu-aarch64")), program]


class Exchange:
    """What the program reads, and what it must write: each tensor with its name, in order."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[tuple[str, Tensor]] = []

    def give(self, *tensors: Tensor) -> None:
        self.inputs += tensors

    def expect(self, name: str, *tensors: Tensor) -> None:
        self.outputs += [(name, tensor) for tensor in tensors]

    def sent(self) -> bytes:
        return b"".join(raw(tensor) for tensor in self.inputs)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Equal bits, but for the bits of a NaN, which CPUs choose."""
    if not expected.is_floating_point():
        return torch.equal(actual, expected)
    bits = torch.int32 if expected.itemsize == 4 else torch.int16
    return bool(((actual.view(bits) == expected.view(bits)) | (actual.isnan() & expected.isnan())).all())


def rows(exchange: Exchange, dtype: torch.dtype, linear: Weight8bit, bias: Tensor, four: Weight4bit) -> None:
    """What `rows` of portable.cpp does."""
    x = floats((M, K), 3, dtype, FINITE)
    x[1, 5], x[2, 7] = NAN[0], INFINITE[0]
    g = floats((M, N), 4, dtype)
    exchange.give(x, g)
    scale, zero, what = SCALES[:1], ZEROS[:1], str(dtype)
    for codes in (torch.int8, torch.uint8):
        q = cpu.quantize(x, (1, 1, M * K), scale, zero, codes, True, 8)
        exchange.expect(f"quantize {what}", q)
        exchange.expect(f"dequantize {what}", cpu.dequantize(q, (1, 1, M * K), scale, zero, dtype))
    exchange.expect(f"min_max {what}", *cpu.min_max(x, (1, M, K)))
    exchange.expect(f"fake_quantize {what}", cpu.fake_quantize(x, K, SCALES, ZEROS, -127, 127))
    gradients = cpu.fake_quantize_backward(x, x, K, SCALES, ZEROS, -127, 127)
    exchange.expect(f"fake_quantize_backward {what}", *gradients)
    for activation in ACTIVATIONS:
        for symmetric in (False, True):
            y = cpu.int8_linear(x, *linear, bias, activation, symmetric)
            exchange.expect(f"int8_linear {what} {activation} {symmetric}", y)
    exchange.expect(f"int8_linear of 7 bits {what}", cpu.int8_linear(x, *linear, bias, "none", False, 7))
    exchange.expect(f"int8_linear_weight_only {what}", cpu.int8_linear_weight_only(x, *linear, bias))
    exchange.expect(f"int8_grad_input {what}", cpu.int8_grad_input(g, *linear, K))
    for compute in ("fp32", "int8"):
        exchange.expect(f"four_bit_linear {what} {compute}", cpu.linear_4bit(x, four, bias, compute))
    exchange.expect(f"four_bit_grad_input {what}", cpu.grad_input_4bit(g, four))
    exchange.expect(f"four_bit_quantize {what}", *cpu.quantize_4bit(x, "nf4", BLOCK))


def random_linear(exchange: Exchange, n: int, k: int, seed: int) -> tuple[Weight8bit, Tensor]:
    codes, g = integers((n, k), seed, torch.int8).clamp(min=-127), generator(seed)
    scale, bias = torch.rand(n, generator=g) * 0.01, torch.randn(n, generator=g)
    exchange.give(codes, scale, bias)
    return Weight8bit(cpu.int8_pack(codes), scale), bias


def encoder(exchange: Exchange) -> None:
    layer = Layer()
    for codes, scale, bias in zip(layer.codes, layer.scales, layer.biases, strict=True):
        exchange.give(codes, scale, bias)
    x = layer.input(2, 5)
    exchange.give(*layer.norms, x)
    exchange.expect("encoder_layer", layer(x))


def lstm(exchange: Exchange) -> None:
    linears = [random_linear(exchange, 4 * HIDDEN, k, 5 + i) for i, k in enumerate((K, HIDDEN))]
    weights, biases = zip(*linears, strict=True)
    x = floats((M, K), 7)
    exchange.give(x)
    states = torch.zeros(2, 3, HIDDEN).unbind()
    y, h, c = cpu.recurrent(x, torch.tensor([3, 2]), weights, biases, *states, "lstm", False, False, 8, "auto")
    exchange.expect("lstm", h, c, y)


def everything() -> Exchange:
    exchange = Exchange()
    linear, bias = random_linear(exchange, N, K, 1)
    flat, absmax = cpu.quantize_4bit(floats((N, K), 2), "nf4", BLOCK)
    lines, scales = cpu.pack_4bit(flat, N, K, BLOCK), cpu.pack_scales(absmax, N, K, BLOCK)
    exchange.give(CODEBOOKS["nf4"].record, flat, scales, SCALES, ZEROS)
    exchange.expect("int8_pack and int8_unpack", cpu.int8_unpack(linear[0], N, K))
    exchange.expect("four_bit_pack", lines)
    four = Weight4bit(lines, scales, None, None, None, "nf4", BLOCK, (N, K))
    for dtype in FLOATS:
        rows(exchange, dtype, linear, bias, four)
    sweep = torch.cat([torch.linspace(-120, 120, 4077), torch.tensor(FINITE + INFINITE + NAN)])
    below_zero = -sweep.abs()
    exchange.give(sweep, below_zero)
    for function in range(8):
        y = torch.empty_like(sweep)
        _C.elementwise(function, below_zero if function == PROBABILITY_CODE else sweep, y)
        exchange.expect(f"elementwise {function}", y)
    encoder(exchange)
    lstm(exchange)
    return exchange


@pytest.mark.long
def test_aarch64_gives_the_same_bits(program: list[str]) -> None:
    exchange = everything()
    written = subprocess.run(program, input=exchange.sent(), capture_output=True, check=True, timeout=300).stdout
    assert len(written) == sum(tensor.numel() * tensor.itemsize for _, tensor in exchange.outputs)
    differing, at = [], 0
    for name, expected in exchange.outputs:
        size = expected.numel() * expected.itemsize
        part = torch.frombuffer(bytearray(written[at : at + size]), dtype=expected.dtype).view(expected.shape)
        if not same_bits(part, expected):
            differing.append(name)
        at += size
    assert differing == []
