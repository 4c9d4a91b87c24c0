"""torch.ops.pyqkern.experts and its backward, against plain torch; how modules use them is in tests/nn."""

from typing import Any

import pytest
import torch
from strategies import integers
from torch import Tensor
from torch.nn import functional

from pyqkern import _C, quantize_4bit
from pyqkern.backends import cpu, cuda, reference
from pyqkern.ops import registry

EXPERTS, HIDDEN, WIDE = 5, 64, 32
ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda a: functional.gelu(a, approximate="tanh"),
}
SIZES = [(2 * WIDE, HIDDEN), (HIDDEN, WIDE)]


def floats(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def given(form: str = "int8", tokens: int = 7, k: int = 2, **changes: Any) -> dict[str, Any]:
    """Arguments of the operator, packed for the backend in use."""
    ops, stacks = torch.ops.pyqkern, []
    for i, (n, columns) in enumerate(SIZES):
        rows = EXPERTS * n
        if form == "int8":
            stacks.append([ops.int8_pack(integers((rows, columns), i, torch.int8)), floats((rows,), i).abs() * 0.01])
        else:
            codes = quantize_4bit(floats((rows, columns), i) * 0.2, form, blocksize=32)
            flat = (codes.packed.reshape(-1), rows, columns, 32)
            scales = registry.kernels_of(codes.packed.device).pack_scales(codes.absmax, rows, columns, 32)
            stacks.append([ops.pack_4bit(*flat), scales])
    generator = torch.Generator().manual_seed(3)
    index = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :k]
    how = {"quant_type": form, "blocksize": 32} if form != "int8" else {}
    return {
        "x": floats((tokens, HIDDEN), 5), "index": index, "weights": floats((tokens, k), 6).softmax(-1),
        "gate_up": stacks[0], "down": stacks[1], "experts": EXPERTS, "intermediate": WIDE, "activation": "silu",
    } | how | changes  # fmt: skip


def experts(arguments: dict[str, Any]) -> Tensor:
    result: Tensor = torch.ops.pyqkern.experts(**arguments)
    return result


def token_by_token(arguments: dict[str, Any]) -> Tensor:
    """The formula of the operator's docstring over linears of one expert, packed on its own, and of one token."""
    a, ops = arguments, torch.ops.pyqkern
    codes = [ops.int8_unpack(a[key][0], EXPERTS * n, k) for key, (n, k) in zip(("gate_up", "down"), SIZES, strict=True)]
    rows = []
    for x, chosen, weights in zip(a["x"], a["index"].tolist(), a["weights"], strict=True):
        y = torch.zeros(HIDDEN)
        for expert, weight in zip(chosen, weights, strict=True):

            def linear(x: Tensor, i: int, key: str, expert: int = expert) -> Tensor:
                part = slice(expert * SIZES[i][0], (expert + 1) * SIZES[i][0])
                packed = ops.int8_pack(codes[i][part])
                return ops.int8_linear(x, packed, a[key][1][part], None, "none", False)  # type: ignore[no-any-return]

            h = reference.gate(linear(x.unsqueeze(0).float(), 0, "gate_up"), a["activation"])
            y = y + linear(h, 1, "down")[0] * weight
        rows.append(y)
    return torch.stack(rows).to(a["x"].dtype)


def test_it_is_its_formula_bit_for_bit(isa: str) -> None:
    for tokens, k in ((1, 2), (2, 1), (7, 4), (1, 4)):
        arguments = given(tokens=tokens, k=k)
        assert torch.equal(experts(arguments), token_by_token(arguments))


@pytest.mark.parametrize("form", ["int8", "nf4", "fp4"])
def test_the_plain_torch_backend_has_the_same_bits(form: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = "auto" if form == "int8" else "int8"
    ours = experts(given(form, compute=compute))
    monkeypatch.setitem(registry.BACKENDS, "cpu", reference)
    assert torch.equal(experts(given(form, compute=compute)), ours)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gate(activation: str, isa: str) -> None:
    h = floats((9, 2 * 37), 0) * 4
    y = cpu.gate(h, activation)
    exact = (ACTIVATIONS[activation](h[:, :37].double()) * h[:, 37:].double()).float()
    # What the activations err by in csrc/kernels/math.inl, 4 * 2**-24 of their argument at most, and a rounding.
    assert ((y - exact).abs() <= 5 * 2.0**-24 * (h[:, :37] * h[:, 37:]).abs()).all()
    for row in range(9):
        assert torch.equal(cpu.gate(h[row : row + 1], activation)[0], y[row])
    previous = _C.set_isa("scalar")
    assert torch.equal(cpu.gate(h, activation), y)
    _C.set_isa(previous)
    if activation == "silu":
        assert torch.equal(reference.gate(h, activation), y)


def test_slices_of_a_packed_weight() -> None:
    """Of every backend's form: what is packed of a slice alone."""
    codes = integers((192, 512), 0, torch.int8)
    for kernels in (cpu, reference):
        for split in (False, True):
            part = kernels.int8_slice(kernels.int8_pack(codes, split), 192, 512, 64, 128)
            assert torch.equal(kernels.int8_pack(codes[64:128].contiguous()), part)
    rows = (cpu.packed_shape(192, 64), reference.packed_shape(192, 64), cuda.packed_shape(192, 64))
    assert len({*rows}) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_rounds_once_in_the_end(form: str, dtype: torch.dtype) -> None:
    arguments = given(form)
    narrow = arguments["x"].to(dtype)
    expected = experts(arguments | {"x": narrow.float()}).to(dtype)
    assert torch.equal(experts(arguments | {"x": narrow}), expected)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_a_tokens_bits_do_not_depend_on_the_others(form: str, isa: str) -> None:
    arguments = given(form, tokens=40)
    whole, before = experts(arguments), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for part in (slice(0, 40), slice(3, 4), slice(5, 22), slice(39, 40)):
                some = arguments | {key: arguments[key][part] for key in ("x", "index", "weights")}
                assert torch.equal(experts(some), whole[part])
    finally:
        torch.set_num_threads(before)
    turned = arguments | {key: arguments[key].flip(0) for key in ("x", "index", "weights")}
    assert torch.equal(experts(turned).flip(0), whole)


def test_experts_without_tokens_and_tokens_without_experts() -> None:
    arguments = given()
    for one in range(EXPERTS):
        only = arguments | {"index": torch.full((7, 1), one), "weights": torch.ones(7, 1)}
        assert torch.equal(experts(only), token_by_token(only))
    none = arguments | {"index": torch.full((7, 2), EXPERTS)}
    assert torch.equal(experts(none), torch.zeros(7, HIDDEN))
    half = arguments["index"].clone()
    half[:, 1] = EXPERTS
    first = arguments | {"index": half[:, :1], "weights": arguments["weights"][:, :1]}
    for part in (slice(0, 7), slice(0, 1)):
        some = {key: arguments[key][part] for key in ("x", "weights")} | {"index": half[part]}
        assert torch.equal(experts(arguments | some), experts(first)[part])
    assert experts(given(tokens=0)).shape == (0, HIDDEN)
    assert torch.equal(experts(given(k=0)), torch.zeros(7, HIDDEN))


def test_nan_stays_with_its_token() -> None:
    arguments = given()
    x = arguments["x"].clone()
    x[2, 5], x[4, 0] = torch.nan, torch.inf
    y, clean = experts(arguments | {"x": x}), experts(arguments)
    assert y[[2, 4]].isnan().all() and torch.equal(y[[0, 1, 3, 5, 6]], clean[[0, 1, 3, 5, 6]])


@pytest.mark.parametrize("form", ["int8", "nf4"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_the_dequantized_experts(form: str, activation: str) -> None:
    """Up to the quantization of activations, which counts as the identity: within a few percent of the norm."""
    arguments = given(form, activation=activation)
    kernels = registry.kernels_of(arguments["x"].device)
    values = []
    for key, (n, k) in zip(("gate_up", "down"), SIZES, strict=True):
        packed, scale = arguments[key]
        rows = torch.arange(EXPERTS * n)
        if form == "int8":
            values.append(kernels.int8_rows(packed, EXPERTS * n, k, rows).float() * scale[:, None])
        else:
            weight = cpu.Weight4bit(packed, scale, None, None, None, form, 32, (EXPERTS * n, k))
            values.append(kernels.rows_4bit(weight, rows, torch.float32))
    x, weights = (arguments[key].clone().requires_grad_() for key in ("x", "weights"))
    up, down = (value.unflatten(0, (EXPERTS, -1)) for value in values)
    h = torch.einsum("tjnk,tk->tjn", up[arguments["index"]], x)
    h = ACTIVATIONS[activation](h[..., :WIDE]) * h[..., WIDE:]
    y = (torch.einsum("tjnk,tjk->tjn", down[arguments["index"]], h) * weights[..., None]).sum(1)
    grad = floats((7, HIDDEN), 8)
    y.backward(grad)
    to_x, to_weights = torch.ops.pyqkern.experts_backward(grad, **arguments)
    for ours, exact in ((to_x, x.grad), (to_weights, weights.grad), (experts(arguments), y.detach())):
        assert exact is not None and (ours - exact).norm() <= 0.05 * exact.norm()


def test_opcheck() -> None:
    for form in ("int8", "nf4"):
        arguments = given(form)
        torch.library.opcheck(
            torch.ops.pyqkern.experts.default, tuple(arguments.values())[:8], dict([*arguments.items()][8:])
        )
        grad = torch.randn(7, HIDDEN)
        torch.library.opcheck(
            torch.ops.pyqkern.experts_backward.default, (grad, *arguments.values())[:9], dict([*arguments.items()][8:])
        )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.randn(7, HIDDEN).double()}, TypeError, "x must be float32, bfloat16 or float16"),
        ({"x": torch.randn(7, 60)}, ValueError, "packed must be what int8_pack makes|out_features"),
        ({"x": torch.randn(6, HIDDEN)}, ValueError, r"x must be \[tokens, hidden\]"),
        ({"x": torch.randn(1, 7, HIDDEN)}, ValueError, r"x must be \[tokens, hidden\]"),
        ({"index": torch.zeros(7, 2)}, TypeError, "index must be int64 or int32"),
        ({"index": torch.full((7, 2), EXPERTS + 1)}, IndexError, r"index must be within \[0, 5\], got 6"),
        ({"index": torch.full((7, 2), -1)}, IndexError, "got -1"),
        ({"weights": torch.rand(7, 3)}, ValueError, r"weights \[tokens, k\]"),
        ({"weights": torch.ones(7, 2, dtype=torch.int64)}, TypeError, "weights must be float32"),
        ({"experts": 4}, ValueError, "scales of gate_up must be float32"),
        ({"experts": 0}, ValueError, "sizes must be positive"),
        ({"intermediate": 20}, ValueError, "out_features of an expert must be a multiple of 16, got 40"),
        ({"activation": "relu"}, ValueError, "activation must be one of silu, gelu, gelu_tanh"),
        ({"bits": 6}, ValueError, "bits must be 8 or 7"),
        ({"gate_up": [torch.zeros(1)]}, ValueError, "gate_up must be packed and scales"),
        ({"quant_type": "nf4", "blocksize": 48}, ValueError, "blocksize must be one of"),
        ({"quant_type": "nf4", "blocksize": 32, "compute": "int4"}, ValueError, "compute must be one of"),
        ({"quant_type": "int2"}, ValueError, "quant_type must be one of"),
    ],
)  # fmt: skip
def test_what_it_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        experts(given(**changes))
    if "index" in changes and error is IndexError:
        one = {key: given(**changes)[key][:1] for key in ("x", "index", "weights")}
        with pytest.raises(error, match=message):
            experts(given() | one)


def test_what_its_backward_refuses() -> None:
    for grad in (torch.randn(7, 60), torch.ones(7, HIDDEN, dtype=torch.int64)):
        with pytest.raises(ValueError, match="grad must be floats"):
            torch.ops.pyqkern.experts_backward(grad, **given())
