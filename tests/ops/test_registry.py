"""The operators as torch sees them: opcheck, fake tensors, torch.compile, torch.export, autocast and devices."""

import copy
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from calls import ABSMAX, BIAS, CALLS, PACKED, SCALE, WIDE, X4, Q, W, X
from strategies import FLOATS, floats
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import pyqkern
from pyqkern import QLinear, choose_qparams_affine, dequantize_affine, int8_matmul, quantize_affine, replace_linear
from pyqkern.backends import Kernels, cpu, cuda, reference
from pyqkern.ops import registry

ops = torch.ops.pyqkern

CHECKED_ELSEWHERE = {
    *("int8_embedding", "embedding_4bit"),  # test_embedding.py
    "encoder_layer",  # test_encoder.py
    "decoder_layer",  # test_decoder.py
    *("experts", "experts_backward"),  # test_experts.py
    *("recurrent", "recurrent_backward"),  # test_recurrent.py
    *("optimizer_step", "square_sum"),  # test_optimizer.py
}


def test_every_operator_is_checked_here() -> None:
    assert {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("pyqkern::")} == {
        f"pyqkern::{name}" for name in CALLS.keys() | CHECKED_ELSEWHERE
    }


@pytest.mark.parametrize("name, arguments", [(name, call) for name, calls in CALLS.items() for call in calls])
def test_opcheck(name: str, arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(getattr(ops, name).default, arguments)


@pytest.mark.parametrize("name, arguments", [(name, call) for name, calls in CALLS.items() for call in calls])
def test_fake_and_meta_agree_with_the_real(name: str, arguments: tuple[object, ...]) -> None:
    real = getattr(ops, name)(*arguments)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
        fake = getattr(ops, name)(*fakes)
    for r, f in zip(
        real if isinstance(real, tuple) else (real,), fake if isinstance(fake, tuple) else (fake,), strict=True
    ):
        assert (r.shape, r.dtype, r.stride(), r.device) == (f.shape, f.dtype, f.stride(), f.device)


@pytest.mark.parametrize("name, arguments", [(name, call) for name, calls in CALLS.items() for call in calls])
def test_a_device_without_kernels_gets_the_reference(
    monkeypatch: pytest.MonkeyPatch, name: str, arguments: tuple[Any, ...]
) -> None:
    """The plain-torch module has every function that the operators call, with the same results."""
    expected = getattr(ops, name)(*arguments)
    monkeypatch.setitem(registry.BACKENDS, "cpu", reference)
    result = getattr(ops, name)(*in_the_reference_form(name, arguments))
    if name in ("int8_pack", "pack_4bit"):  # a form of its own: the flat one
        assert torch.equal(result, arguments[0])
    elif name == "int8_quantize_weight":
        assert torch.equal(result[1], expected[1])
        assert not result[0].numel() or torch.equal(result[0], cpu.int8_unpack(expected[0], *arguments[0].shape))
    elif "gelu" in arguments:
        assert (result.float() - expected.float()).abs().max() <= 2.0**-8 * expected.float().abs().max()
    elif name == "linear_4bit" and arguments[-1] == "auto":  # fp32 there: the bound of test_cuda.py
        bound = 128 * float(X4.abs().max()) * float(ABSMAX.max()) * (2.0**-8 + 2 * 0.5 / 127)
        assert (result - expected).abs().max() <= bound
    else:
        pairs = zip(result, expected, strict=True) if isinstance(result, tuple) else [(result, expected)]
        assert all(torch.equal(a, b) for a, b in pairs)


def in_the_reference_form(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if name in ("int8_unpack", "int8_grad_input") or name.startswith("int8_linear"):
        position = 0 if name == "int8_unpack" else 1
        weight = W if arguments[position].shape == cpu.packed_shape(*W.shape) else WIDE
        return (*arguments[:position], weight, *arguments[position + 1 :])  # its packed form is the weight itself
    if name == "unpack_4bit":
        return (PACKED, *arguments[1:])
    packed_second = name in ("linear_4bit", "grad_input_4bit")
    return (arguments[0], PACKED, ABSMAX, *arguments[3:]) if packed_second else arguments


@pytest.mark.parametrize("kernels", [cpu, cuda, reference])
def test_every_backend_has_every_function(kernels: Kernels) -> None:
    """mypy checks the types."""
    names = [name for name, value in vars(Kernels).items() if callable(value) and not name.startswith("_")]
    assert len(names) > 15 and [name for name in names if not callable(getattr(kernels, name, None))] == []


def test_no_other_file_chooses_a_backend() -> None:
    """`kernels is cpu`, a device's type and the like stand in the registry alone."""
    package = Path(pyqkern.__file__).parent
    pattern = re.compile(r"kernels\w* is (not )?(cpu|cuda|reference)|device\.type [!=]= |\.(type|device) in \(")
    found = [
        f"{path.relative_to(package)}:{number}: {line.strip()}"
        for room in ("backends", "functional", "nn", "ops")
        for path in sorted((package / room).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line) and path.name != "registry.py"
    ]
    assert found == []


# ---- compiled and exported


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.up(x).relu())
        return y if y.dtype is self.down.weight.dtype else y.float()


@pytest.mark.parametrize("dtype", FLOATS)
def test_compile_gives_the_eager_bits(isa: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    model = replace_linear(Encoder().to(dtype))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for shape in ((2, 3, 32), (5, 32), (7, 32)):
            x = floats(shape, 1, dtype)
            assert torch.equal(compiled(x), model(x))


def test_compile_in_grad_mode() -> None:
    torch._dynamo.reset()
    model = replace_linear(Encoder())
    x = floats((4, 32), 1).requires_grad_()
    model(x).sum().backward()
    expected, x.grad = x.grad, None
    bias, model.up.bias.grad = model.up.bias.grad, None
    torch.compile(model, fullgraph=True)(x).sum().backward()
    # The same products, which the compiler may sum in another order: 64 terms, each 2**-24 of the sum of magnitudes.
    scale = model.down.weight.abs().sum(0) @ model.up.weight.abs()
    assert ((x.grad - expected).abs() <= 64 * 2.0**-23 * scale).all()
    assert torch.allclose(model.up.bias.grad, bias, rtol=1e-5, atol=1e-5)


def test_compile_under_autocast() -> None:
    torch._dynamo.reset()
    model = replace_linear(nn.Sequential(nn.Linear(32, 16)))
    x = floats((4, 32), 1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.compile(model, fullgraph=True)(x)
        assert y.dtype is torch.bfloat16 and torch.equal(y, model(x))


def test_compiled_affine_functions() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = choose_qparams_affine(x, axis=0)
        q = quantize_affine(x, scale, zero_point, axis=0)
        return dequantize_affine(q, scale, zero_point, axis=0), int8_matmul(q, q)

    torch._dynamo.reset()
    x = floats((5, 64), 1)
    for a, b in zip(torch.compile(function, fullgraph=True)(x), function(x), strict=True):
        assert torch.equal(a, b)
    scaled = torch.compile(lambda x: quantize_affine(x, 0.5, 3), fullgraph=True)
    assert torch.equal(scaled(x), quantize_affine(x, 0.5, 3))


def test_export_runs_in_a_process_that_only_imported_pyqkern() -> None:
    model = replace_linear(Encoder()).eval()
    x = floats((4, 32), 1)
    with torch.no_grad():
        expected = model(x)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file)
    code = """import io, sys, torch, pyqkern
program = torch.export.load(io.BytesIO(sys.stdin.buffer.read()))
print(program.module()(torch.ones(2, 32)).sum().item())
"""
    output = subprocess.run([sys.executable, "-c", code], input=file.getvalue(), capture_output=True, check=True)
    with torch.no_grad():
        assert float(output.stdout) == model(torch.ones(2, 32)).sum().item()
        assert torch.equal(program.module()(x), expected)


def test_two_models_do_not_share_operators_by_name() -> None:
    """deepcopy of a compiled model's original keeps working."""
    model = replace_linear(Encoder())
    again = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(torch.compile(again, fullgraph=True)(X[:, :32]), model(X[:, :32]))


# ---- devices


def test_cuda_without_triton_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("affine", "int8"):
        monkeypatch.delitem(sys.modules, f"pyqkern.kernels.{name}", raising=False)
    with pytest.raises(RuntimeError, match=r"CUDA tensors need triton.*pip install \"pyqkern\[cuda\]\""):
        cuda.int8_matmul(Q, W)


def mixed_calls() -> Iterator[tuple[str, tuple[object, ...], int]]:
    """Each operator's first call, and the position of one of its tensors."""
    for name, call in ((name, calls[0]) for name, calls in CALLS.items()):
        tensors = [i for i, argument in enumerate(call) if isinstance(argument, Tensor)]
        yield from ((name, call, i) for i in tensors if len(tensors) > 1)


@pytest.mark.parametrize("name, call, position", list(mixed_calls()))
def test_cpu_and_cuda_tensors_mixed_are_refused(name: str, call: tuple[object, ...], position: int) -> None:
    """One tensor after the other on CUDA, the rest on the CPU; fake tensors, which need no GPU."""
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in call]
        one = call[position]
        fakes[position] = torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="cuda")
        with pytest.raises(ValueError, match=r"must be .*on (cpu|cuda:0|one device).*, got .*(cpu|cuda:0)"):
            getattr(ops, name)(*fakes)


def test_the_packed_shape_on_cuda() -> None:
    """What kernels/int8.py documents: rows of K rounded up to 16, and rows for N int32 sums."""
    assert cuda.packed_shape(40, 96) == (40 + 2, 96)
    assert cuda.packed_shape(3, 17) == (3 + 1, 32)
    assert cuda.packed_shape(0, 0) == (0, 16)


def test_mixed_devices_raise() -> None:
    with pytest.raises(ValueError, match="must be on"):
        int8_matmul(Q, W.to("meta"))
    with pytest.raises(ValueError, match="must be on"):
        quantize_affine(X, torch.ones((), device="meta"))
    with pytest.raises(ValueError, match="must be on"):
        ops.int8_linear(X, ops.int8_pack(W), SCALE, BIAS.to("meta"), "none", False)


def test_public_names() -> None:
    assert all(getattr(pyqkern, name).__doc__ for name in pyqkern.__all__)
    assert issubclass(QLinear, nn.Module)


# ---- the shortest way, where nobody listens


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_whoever_listens_to_operators_sees_ours() -> None:
    """The layer calls its kernel directly otherwise; with a listener, it goes through the dispatcher."""
    layer = replace_linear(nn.Linear(32, 16)).requires_grad_(False)
    x = X[:, :32]
    expected = layer(x)
    name = "pyqkern.int8_linear"
    with Seen() as seen:
        assert torch.equal(layer(x), expected)
    assert f"{name}.default" in seen.names
    assert name in make_fx(layer)(x).code
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    assert "pyqkern::int8_linear" in {event.key for event in profile.key_averages()}
    assert "pyqkern::int8_linear" in str(torch.jit.trace(layer, x).graph)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert isinstance(layer(mode.from_tensor(x)), FakeTensor)
    assert torch.equal(torch.vmap(layer)(x[None]), expected[None])


def test_a_subclass_of_tensor_sees_ours() -> None:
    class Mine(Tensor):
        seen: ClassVar[list[str]] = []

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.seen.append(str(function))
            return super().__torch_function__(function, types, args, kwargs or {})

    layer = replace_linear(nn.Linear(32, 16)).requires_grad_(False)
    y = layer(X[:, :32].as_subclass(Mine))
    assert isinstance(y, Mine) and "pyqkern.int8_linear.default" in Mine.seen
    assert torch.equal(y.as_subclass(Tensor), layer(X[:, :32]))
