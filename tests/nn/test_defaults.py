"""torch's default dtype and device have no influence: on import, on quantizing, on loading, on a call."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import pyqkern
from pyqkern import QEmbedding, QLinear
from pyqkern.schemes import NF4, Int8Static

SCHEMES = [
    "int8",
    "int8-weight-only",
    "int8-outlier",
    "nf4",
    NF4(double_quant=True),
    NF4(compute="bf16"),
    "fp4",
    "int4",
]
CPU32 = {"dtype": torch.float32, "device": "cpu"}
torch.manual_seed(0)
LINEAR, TABLE, X = nn.Linear(128, 40, **CPU32), nn.Embedding(20, 64, **CPU32), torch.randn(6, 128, **CPU32)
RANGES = pyqkern.calibrate(LINEAR, [X], progress=False)


def everything() -> list[Tensor]:
    found: list[Tensor] = []
    for scheme in (*SCHEMES, Int8Static()):
        ranges = {"": RANGES[""]} if isinstance(scheme, Int8Static) else None
        layer = QLinear.from_linear(LINEAR, scheme, ranges=ranges)
        other = QLinear.from_linear(LINEAR, scheme, ranges=ranges)
        other.load_state_dict(layer.state_dict())
        x = X.clone().requires_grad_()
        y = other(x)
        y.sum().backward()
        found += [y.detach(), x.grad, layer.weight.clone(), *layer.state_dict().values()]
    for scheme in ("int8", "nf4"):
        found.append(QEmbedding.from_embedding(TABLE, scheme)(torch.tensor([1, 2], device="cpu")))
    scale, zero_point = pyqkern.choose_qparams_affine(X, axis=0)
    codes = pyqkern.quantize_affine(X, scale, zero_point, axis=0)
    found += [scale, zero_point, codes, pyqkern.dequantize_affine(codes, scale, zero_point, axis=0)]
    found += [pyqkern.quantize_affine(X, 0.1, 3), pyqkern.int8_matmul(codes, codes)]
    q = pyqkern.quantize_4bit(X, double_quant=True)
    return [*found, q.packed, q.absmax, *q.nested, pyqkern.dequantize_4bit(q)]


@contextmanager
def default(value: torch.dtype | str) -> Iterator[None]:
    if isinstance(value, str):
        torch.set_default_device(value)
    else:
        torch.set_default_dtype(value)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("value", [torch.bfloat16, torch.float16, torch.float64, "meta"], ids=str)
def test_a_default_has_no_influence(value: torch.dtype | str) -> None:
    expected = everything()
    with default(value):
        found = everything()
    assert all(torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("line", ["torch.set_default_dtype(torch.bfloat16)", 'torch.set_default_device("meta")'])
def test_nor_at_import(line: str) -> None:
    code = f"""import torch
{line}
from pyqkern.backends.reference.four_bit import CODEBOOKS
from pyqkern.backends.reference.encoder import DITHER
for book in CODEBOOKS.values():
    print(book.values.dtype, book.values.device, book.record.tolist())
print(DITHER.dtype, DITHER.device)"""
    plain = code.replace(line, "")
    printed = [subprocess.run([sys.executable, "-c", c], capture_output=True, check=True).stdout for c in (code, plain)]
    assert printed[0] == printed[1]
