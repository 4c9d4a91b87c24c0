"""The experts of a mixture-of-experts layer as one operator: each token through those that were chosen for it.

    torch.ops.pyqkern.experts(x, index, weights, gate_up, down, experts, intermediate, activation, symmetric, bits,
                              quant_type, blocksize, compute)

x [tokens, hidden], fp32, bf16 or fp16. index int64 or int32 [tokens, k]: the experts of each token, in [0, experts];
`experts` is none of them, as transformers has it where the experts are spread over processes. weights: floats
[tokens, k]. gate_up, down: the weights of all experts, below each other, [experts * 2 * intermediate, hidden] and
[experts * hidden, intermediate]; each a list of packed and its scales, as for recurrent, and, doubly quantized, of
nested_absmax, nested_map and nested_offset. activation: one of GATE_ACTIVATIONS.

    h = gate_up[e] @ x;  g = activation(h[:intermediate]) * h[intermediate:];  y = sum of weights[j] * (down[e] @ g)

for e = index[j], in fp32, added to 0 with j ascending, each operation rounded, and once to x's dtype in the end. A
token's result has the same bits alone and in any batch, on every ISA, with any number of threads.

    torch.ops.pyqkern.experts_backward(grad, x, ...the same)

returns the gradients to x and to weights, straight through the quantizations.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pyqkern.backends import (
    GATE_ACTIVATIONS,
    INT8_LINEAR_MAX_K,
    NESTED_BLOCKSIZE,
    PANEL,
    STRIP,
    Kernels,
    Weight4bit,
    Weight8bit,
)
from pyqkern.ops.checks import check_float
from pyqkern.ops.four_bit import check_format, check_weight
from pyqkern.ops.int8 import check_bits, check_packed
from pyqkern.ops.registry import kernels_of, operator
from pyqkern.schemes import COMPUTE

Weight = Weight8bit | Weight4bit


class Form(NamedTuple):
    """How the weights are stored and computed with; blocksize and compute are those of 4 bits."""

    symmetric: bool = False
    bits: int = 8
    quant_type: str = "int8"
    blocksize: int = 0
    compute: str = "auto"


class Stack(NamedTuple):
    """The weights [n, k] of all experts, below each other."""

    weight: Weight
    n: int
    k: int

    def of(self, kernels: Kernels, expert: int) -> Weight:
        begin, end = expert * self.n, (expert + 1) * self.n
        if isinstance(self.weight, Weight4bit):
            return kernels.slice_4bit(self.weight, begin, end)
        packed, scale = self.weight
        rows = scale.shape[0]
        return Weight8bit(kernels.int8_slice(packed, rows, self.k, begin, end), scale[begin:end])


def misfit(n: int, k: int, blocksize: int = 0, double_quant: bool = False) -> str | None:
    """Why the weights [n, k] of experts cannot be slices of one packed weight; blocksize: that of 4 bits."""
    multiple = STRIP if blocksize else PANEL
    if n % multiple:
        return f"out_features of an expert must be a multiple of {multiple}, got {n}"
    if not blocksize:
        return f"in_features must be at most {INT8_LINEAR_MAX_K}, got {k}" if k > INT8_LINEAR_MAX_K else None
    if k % blocksize:
        return f"blocksize must divide in_features={k}, got {blocksize}"
    if double_quant and n * k % (blocksize * NESTED_BLOCKSIZE):
        return f"an expert must be whole groups of {NESTED_BLOCKSIZE} blocks for double_quant, got {n}x{k}"
    return None


# ---- checks


def _stack(
    name: str, tensors: Sequence[Tensor], experts: int, n: int, k: int, form: Form, device: torch.device
) -> Stack:
    is_int8 = form.quant_type == "int8"
    if len(tensors) not in ((2,) if is_int8 else (2, 5)):
        raise ValueError(f"{name} must be packed and scales, and five tensors doubly quantized, got {len(tensors)}")
    if reason := misfit(n, k, form.blocksize, len(tensors) == 5):
        raise ValueError(f"{name}: {reason}")
    kernels = kernels_of(device)
    if is_int8:
        if tensors[1].shape != (experts * n,):
            raise ValueError(f"scales of {name} must be float32 [{experts * n}], got {list(tensors[1].shape)}")
        packed, scale = tensors
        check_packed(kernels, packed, scale, k, device)
        return Stack(Weight8bit(packed.contiguous(), scale.contiguous()), n, k)
    shape = (experts * n, k)
    nested = tensors[2:] or (None, None, None)
    weight = Weight4bit._make((*tensors[:2], *nested, form.quant_type, form.blocksize, shape))
    check_weight(weight, kernels.packed_shapes_4bit(*shape, form.blocksize), device)
    contiguous = (tensor if tensor is None else tensor.contiguous() for tensor in weight[:5])
    return Stack(Weight4bit._make((*contiguous, *weight[5:])), n, k)


def _checked(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Sequence[Tensor], down: Sequence[Tensor], experts: int,
    intermediate: int, activation: str, *how: Any,
) -> tuple[Stack, Stack, Form]:  # fmt: skip
    """Checks everything but the values of index."""
    form = Form(*how)
    check_float("x", x.dtype)
    check_float("weights", weights.dtype)
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"index must be int64 or int32, got {index.dtype}")
    if x.dim() != 2 or index.dim() != 2 or index.shape[0] != x.shape[0] or weights.shape != index.shape:
        raise ValueError(
            f"x must be [tokens, hidden], index and weights [tokens, k], got {list(x.shape)}, {list(index.shape)} and "
            f"{list(weights.shape)}"
        )
    if index.device != x.device or weights.device != x.device:
        raise ValueError(f"index and weights must be on {x.device}, got {index.device} and {weights.device}")
    if activation not in GATE_ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(GATE_ACTIVATIONS)}, got {activation!r}")
    hidden = x.shape[1]
    if experts < 1 or intermediate < 1 or hidden < 1:
        raise ValueError(f"sizes must be positive, got {experts} experts of {hidden} and {intermediate}")
    check_bits(form.bits, form.symmetric)
    if form.quant_type != "int8":
        check_format(form.quant_type, form.blocksize)
        if form.compute not in COMPUTE:
            raise ValueError(f"compute must be one of {', '.join(COMPUTE)}, got {form.compute!r}")
    up = _stack("gate_up", gate_up, experts, 2 * intermediate, hidden, form, x.device)
    return up, _stack("down", down, experts, hidden, intermediate, form, x.device), form


# ---- the operator


def _linear(kernels: Kernels, x: Tensor, weight: Weight, form: Form) -> Tensor:
    if isinstance(weight, Weight4bit):
        return kernels.linear_4bit(x, weight, None, form.compute)
    return kernels.int8_linear(x, weight.packed, weight.scale, None, "none", form.symmetric, form.bits)


def _check_index(least: int, greatest: int, experts: int) -> None:
    if least < 0 or greatest > experts:
        raise IndexError(f"index must be within [0, {experts}], got {least if least < 0 else greatest}")


def _slots(index: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert that has tokens, and its elements of the flat index, ascending. IndexError for what is no expert."""
    flat = index.reshape(-1)
    least, greatest = flat.aminmax()
    _check_index(int(least), int(greatest), experts)
    counts = torch.bincount(flat, minlength=experts + 1).cpu().tolist()
    for expert, slots in enumerate(torch.argsort(flat, stable=True).split(counts)[:experts]):
        if slots.numel():
            yield expert, slots


def _fake(x: Tensor, *rest: Any) -> Tensor:
    _checked(x, *rest)
    return x.new_empty(x.shape)


_ARGUMENTS = (
    "Tensor x, Tensor index, Tensor weights, Tensor[] gate_up, Tensor[] down, int experts, int intermediate,"
    ' str activation, bool symmetric=False, int bits=8, str quant_type="int8", int blocksize=0, str compute="auto"'
)


@operator(f"experts({_ARGUMENTS}) -> Tensor", _fake)
def _experts(kernels: Kernels, x: Tensor, index: Tensor, weights: Tensor, *rest: Any) -> Tensor:
    up, down, form = _checked(x, index, weights, *rest)
    experts, activation = rest[2], rest[4]
    if not index.numel():
        return x.new_zeros(x.shape)
    rows = x.float().contiguous()

    def through(expert: int, rows: Tensor) -> Tensor:
        h = _linear(kernels, rows, up.of(kernels, expert), form)
        return _linear(kernels, kernels.gate(h, activation), down.of(kernels, expert), form)

    of_choice = _of_one(through, rows, index, experts) if len(x) == 1 else _of_many(through, rows, index, experts)
    y = torch.zeros_like(rows)
    for of_expert, weight in zip(of_choice, weights.float().split(1, 1), strict=True):
        y = y + of_expert * weight
    return y.to(x.dtype)


Through = Callable[[int, Tensor], Tensor]


def _of_one(through: Through, rows: Tensor, index: Tensor, experts: int) -> Sequence[Tensor]:
    """What each choice of a single token gives. Sorting it would take as long as the products of a small layer."""
    chosen = index.reshape(-1).cpu().tolist()
    _check_index(min(chosen), max(chosen), experts)
    return [through(expert, rows) if expert < experts else torch.zeros_like(rows) for expert in chosen]


def _of_many(through: Through, rows: Tensor, index: Tensor, experts: int) -> Sequence[Tensor]:
    """What the first choice of each token gives, what the second, and so on: one product an expert."""
    k, hidden = index.shape[1], rows.shape[1]
    y = rows.new_zeros((index.numel(), hidden))
    for expert, slots in _slots(index, experts):
        y.index_copy_(0, slots, through(expert, rows.index_select(0, slots // k)))
    return y.view(-1, k, hidden).unbind(1)


# ---- its gradients


def _values(kernels: Kernels, weight: Weight, n: int, k: int) -> Tensor:
    """The dequantized weight of one expert, fp32 [n, k]."""
    rows = torch.arange(n, device=weight[0].device)
    if isinstance(weight, Weight4bit):
        return kernels.rows_4bit(weight, rows, torch.float32)
    return kernels.int8_rows(weight.packed, n, k, rows).float() * weight.scale.unsqueeze(1)


def _activate_backward(grad: Tensor, a: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, a)
    return torch.ops.aten.gelu_backward(grad, a, approximate="tanh" if activation == "gelu_tanh" else "none")


_TORCHS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda a: functional.gelu(a, approximate="tanh"),
}


def _backward_fake(grad: Tensor, x: Tensor, index: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _checked(x, index, weights, *rest)
    if grad.shape != x.shape or grad.device != x.device or not grad.is_floating_point():
        raise ValueError(f"grad must be floats {list(x.shape)} on {x.device}, got {grad.dtype} {list(grad.shape)}")
    return x.new_empty(x.shape), weights.new_empty(weights.shape)


@operator(f"experts_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor)", _backward_fake)
def _backward(
    kernels: Kernels, grad: Tensor, x: Tensor, index: Tensor, weights: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    _backward_fake(grad, x, index, weights, *rest)
    up, down, form = _checked(x, index, weights, *rest)
    experts, activation = rest[2], rest[4]
    k, rows, grad = index.shape[1], x.float(), grad.float()
    to_rows = x.new_zeros((index.numel(), x.shape[1]), dtype=torch.float32)
    to_weights = weights.new_zeros(index.numel(), dtype=torch.float32)
    for expert, slots in _slots(index, experts) if index.numel() else ():
        tokens, of_up, of_down = slots // k, up.of(kernels, expert), down.of(kernels, expert)
        h = _linear(kernels, rows.index_select(0, tokens), of_up, form)
        to_y = grad.index_select(0, tokens)
        to_weights[slots] = (to_y * _linear(kernels, kernels.gate(h, activation), of_down, form)).sum(1)
        to_y = to_y * weights.reshape(-1)[slots].float().unsqueeze(1)
        to_gate = to_y @ _values(kernels, of_down, down.n, down.k)
        a, b = h.chunk(2, 1)
        to_a, to_b = _activate_backward(to_gate * b, a, activation), to_gate * _TORCHS[activation](a)
        to_rows[slots] = torch.cat([to_a, to_b], 1) @ _values(kernels, of_up, up.n, up.k)
    to_x = to_rows.view(x.shape[0], k, x.shape[1]).sum(1)
    return to_x.to(x.dtype), to_weights.view(weights.shape).to(weights.dtype)
