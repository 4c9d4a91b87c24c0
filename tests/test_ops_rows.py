"""The operators for chains of INT8 linears on the CPU, in plain torch; on CUDA see test_triton_cuda.py."""

import pytest
import torch
from strategies import FLOATS, floats, integers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import pyqkern.ops_rows  # noqa: F401  registers them

ops = torch.ops.pyqkern


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m, k", [(3, 70), (1, 1), (5, 16)])
def test_two_steps_are_one(m: int, k: int, dtype: torch.dtype, symmetric: bool) -> None:
    x, w, scale, bias = floats((m, k), 1, dtype), integers((9, k), 2, torch.int8), torch.rand(9) + 0.1, torch.randn(9)
    weight = ops.int8_pack(w)
    rows = ops.int8_quantize_rows(x, symmetric)
    y = ops.int8_linear_rows(*rows, weight, scale, bias, "relu", dtype)
    torch.testing.assert_close(y, ops.int8_linear(x, weight, scale, bias, "relu", symmetric), rtol=0, atol=0)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_what_comes_before(approximate: str) -> None:
    x, residual, weight, bias = floats((4, 33), 3), floats((4, 33), 4), torch.randn(33), torch.randn(33)
    for ours, theirs in zip(
        ops.gelu_quantize_rows(x, approximate, False),
        ops.int8_quantize_rows(functional.gelu(x, approximate=approximate), False),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    y, *rows = ops.layer_norm_quantize_rows(x, residual, weight, bias, 1e-5, True)
    assert torch.equal(y, functional.layer_norm(x + residual, (33,), weight, bias, 1e-5))
    assert all(torch.equal(a, b) for a, b in zip(rows, ops.int8_quantize_rows(y, True), strict=True))


def samples() -> dict[str, tuple[object, ...]]:
    x, w, scale = floats((4, 33), 5), integers((9, 33), 6, torch.int8), torch.rand(9)
    rows = ops.int8_quantize_rows(x, False)
    return {
        "int8_quantize_rows": (x, False),
        "gelu_quantize_rows": (x, "none", True),
        "layer_norm_quantize_rows": (x, x.clone(), torch.ones(33), None, 1e-5, False),
        "int8_linear_rows": (*rows, ops.int8_pack(w), scale, None, "none", torch.bfloat16),
    }


@pytest.mark.parametrize("name", list(samples()))
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(ops, name).default, samples()[name])


@pytest.mark.parametrize("k, row", [(33, 48), (32, 32), (1, 16)])
def test_rows_on_cuda_are_whole_pieces_of_16_bytes(k: int, row: int) -> None:
    """What a compiled graph is told, on fake tensors; the real ones are looked at in test_triton_cuda.py."""
    with FakeTensorMode():
        x = torch.empty(4, k, device="cuda")
        normal = ops.layer_norm_quantize_rows(x, None, torch.empty(k, device="cuda"), None, 1e-5, False)
        for q in (ops.int8_quantize_rows(x, False)[0], ops.gelu_quantize_rows(x, "none", False)[0], normal[1]):
            assert q.shape == (4, k) and q.stride() == (row, 1)


@pytest.mark.parametrize("m, k, n", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_nothing(m: int, k: int, n: int) -> None:
    rows = ops.int8_quantize_rows(torch.zeros(m, k), False)
    weight = ops.int8_pack(torch.zeros(n, k, dtype=torch.int8))
    y = ops.int8_linear_rows(*rows, weight, torch.ones(n), torch.full((n,), 2.0), "none", torch.float32)
    assert torch.equal(y, torch.full((m, n), 2.0))
    assert ops.gelu_quantize_rows(torch.zeros(m, k), "tanh", False)[0].shape == (m, k)


X, W8 = torch.zeros(2, 5), torch.zeros(3, 5, dtype=torch.int8)
Q = (torch.zeros(2, 5, dtype=torch.int8), torch.ones(2), torch.zeros(2, dtype=torch.int32))


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("int8_quantize_rows", (torch.zeros(5), False), r"x must be \[M, K\], got shape \(5,\); flatten it"),
        ("int8_quantize_rows", (torch.zeros(1, 66312), False), "K must be at most 66311 .*, got 66312"),
        ("gelu_quantize_rows", (X, "erf", False), "approximate must be 'none' or 'tanh', got 'erf'"),
        ("layer_norm_quantize_rows", (X, X[:1], X[0], None, 1e-5, False), "residual must be torch.float32 .2, 5. as x"),
        (
            "layer_norm_quantize_rows",
            (X, None, X[0, :4], None, 1e-5, False),
            r"weight must have shape \(5,\), got \(4,\)",
        ),
        ("layer_norm_quantize_rows", (X, None, X[0].to("meta"), None, 1e-5, False), "weight must be on cpu"),
        ("int8_linear_rows", (Q[0].float(), *Q[1:], "w", torch.ones(3), None, "none"), r"q must be int8 \[M, K\]"),
        (
            "int8_linear_rows",
            (*Q[:2], Q[2][:1], "w", torch.ones(3), None, "none"),
            r"zero_point must be torch.int32 \(2,\)",
        ),
        (
            "int8_linear_rows",
            (*Q, "w", torch.ones(20), None, "none"),
            "packed must be what int8_pack makes of",
        ),
        (
            "int8_linear_rows",
            (*Q, "w", torch.ones(3), torch.ones(2), "none"),
            r"bias must have shape \(3,\), got \(2,\)",
        ),
        ("int8_linear_rows", (*Q, "w", torch.ones(3), None, "silu"), "activation must be one of .*, got 'silu'"),
    ],
)
def test_bad_input(name: str, arguments: tuple[object, ...], message: str) -> None:
    if name == "int8_linear_rows":
        arguments = (
            *(ops.int8_pack(W8) if a == "w" and not isinstance(a, Tensor) else a for a in arguments),
            torch.float32,
        )
    with pytest.raises(ValueError, match=message):
        getattr(ops, name)(*arguments)
