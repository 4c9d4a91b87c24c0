"""One direction of a recurrent layer as one operator: LSTM, GRU and RNN of INT8 or of 4-bit weights.

    torch.ops.pyqkern.recurrent(x, batch_sizes, weights, scales, biases, h, c, cell, reverse, symmetric, bits,
                                quant_type, blocksize, nested, compute)

x fp32 [steps, batch, K] with batch_sizes None; or, as in a PackedSequence, [rows, K] with batch_sizes int64 [steps] on
the CPU: how many of the sequences, sorted by length, have each step. h fp32 [batch, P]; c fp32 [batch, H] for an LSTM,
else None. cell: "lstm", "gru", "rnn_tanh" or "rnn_relu", with the order of gates that torch has.
weights: of the input [gates * H, K], of the hidden state [gates * H, P] and, only where an LSTM projects it, of the
projection [P, H]; as int8_pack makes them, and their scales fp32; biases: fp32 of the first two, or none.
quant_type "nf4", "fp4" or "int4": weights as pack_4bit makes them, scales: absmax in the order of
`Kernels.pack_scales`; nested: nothing, or for each weight what its absmax, then uint8, stands for: fp32 absmax of
blocks, fp32 map [256], fp32 offset []; compute: "auto" and "int8", or "fp32".

Returns the outputs [.., P] in x's shape, and h and c after the last step of each sequence; an empty c without one.
A sequence's result has the same bits alone and in any batch, padded and packed, on every ISA, with any number of
threads. A sequence that meets NaN or an infinity is NaN from there on.

    torch.ops.pyqkern.recurrent_backward(grad_y, grad_h, grad_c, y, values, ...the same)

returns the gradients to x, h, c and the two biases, straight through, and what those to the weights are made of:
`reference.recurrent.backward`. y: the outputs, values: the dequantized weights.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyqkern.backends import GATES, INT8_LINEAR_MAX_K, Kernels, Weight4bit, Weight8bit
from pyqkern.backends.reference.recurrent import backward, linears
from pyqkern.ops.four_bit import check_format, check_weight
from pyqkern.ops.int8 import check_bits, check_packed
from pyqkern.ops.registry import kernels_of, operator


def _check_fp32(name: str, tensor: Tensor, shape: Sequence[int], device: torch.device) -> None:
    if tensor.dtype is not torch.float32:
        raise TypeError(f"{name} must be float32, got {tensor.dtype}; convert it with .float()")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, where x is, got {tensor.device}")


def _checked(
    x: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    h: Tensor,
    c: Tensor | None,
    cell: str,
    symmetric: bool,
    bits: int,
    quant_type: str,
    blocksize: int,
    nested: Sequence[Tensor],
    compute: str,
) -> list[Weight8bit] | list[Weight4bit]:
    """Checks everything but the values of batch_sizes; returns the weights."""
    if cell not in GATES:
        raise ValueError(f"cell must be one of {', '.join(GATES)}, got {cell!r}")
    if x.dim() != (3 if batch_sizes is None else 2):
        raise ValueError(
            f"x must be [steps, batch, K], or [rows, K] with batch_sizes, got shape {list(x.shape)}"
            + ("" if batch_sizes is None else " with batch_sizes")
        )
    if h.dim() != 2 or (cell == "lstm") != (c is not None) or (c is not None and c.dim() != 2):
        raise ValueError('h must be [batch, P], and c [batch, H] for "lstm" and None for others')
    batch, p = h.shape
    hidden = p if c is None else c.shape[1]
    if batch_sizes is not None and (
        batch_sizes.dtype is not torch.int64 or batch_sizes.dim() != 1 or not batch_sizes.is_cpu
    ):
        raise ValueError(
            f"batch_sizes must be int64 [steps] on the CPU, got {batch_sizes.dtype} {list(batch_sizes.shape)}"
        )
    _check_fp32("x", x, x.shape if batch_sizes is not None else (x.shape[0], batch, x.shape[2]), x.device)
    _check_fp32("h", h, h.shape, x.device)
    if c is not None:
        _check_fp32("c", c, (batch, hidden), x.device)
    k, n = x.shape[-1], GATES[cell] * hidden
    if not k or not p or not hidden:
        raise ValueError(f"sizes of x, h and c must be positive, got {k}, {p} and {hidden}")
    shapes = ((n, k), (n, p), (p, hidden))[: 3 if p != hidden else 2]
    for name, tensors, count in (
        ("weights", weights, len(shapes)),
        ("scales", scales, len(shapes)),
        ("biases", biases, 2 if biases else 0),
        ("nested", nested, 3 * len(shapes) if nested else 0),
    ):
        if len(tensors) != count:
            raise ValueError(f"{name} must be {count}, got {len(tensors)}")
    for bias in biases:
        _check_fp32("bias", bias, (n,), x.device)
    kernels = kernels_of(x.device)
    check_bits(bits, symmetric)
    if quant_type == "int8":
        for packed, scale, (rows, columns) in zip(weights, scales, shapes, strict=True):
            if columns > INT8_LINEAR_MAX_K:
                raise ValueError(f"sizes must be at most {INT8_LINEAR_MAX_K} (255 * 127 * K < 2**31), got {columns}")
            if scale.shape != (rows,):
                raise ValueError(f"scales must be float32 [{rows}], got {list(scale.shape)}")
            check_packed(kernels, packed, scale, columns, x.device)
        return [Weight8bit(*both) for both in zip(weights, scales, strict=True)]
    check_format(quant_type, blocksize)
    if compute not in ("auto", "int8", "fp32"):
        raise ValueError(f'compute must be "auto", "int8" or "fp32" for recurrent layers, got {compute!r}')
    found = []
    for i, shape in enumerate(shapes):
        of_absmax = tuple(nested[3 * i : 3 * i + 3]) or (None, None, None)
        weight = Weight4bit._make((weights[i], scales[i], *of_absmax, quant_type, blocksize, shape))
        check_weight(weight, kernels.packed_shapes_4bit(*shape, blocksize), x.device)
        found.append(weight)
    return found


def _check_batch_sizes(sizes: list[int], rows: int, batch: int) -> None:
    descending = all(a >= b for a, b in zip([batch, *sizes], [*sizes, 1], strict=True)) if sizes else True
    if not descending or sum(sizes) != rows or (sizes and sizes[0] != batch):
        raise ValueError(
            f"batch_sizes must descend from the {batch} rows of h to 1 or more, and add up to the {rows} rows of x, "
            f"got {sizes[:8]}"
        )


def _contiguous(weight: Weight8bit | Weight4bit) -> Weight8bit | Weight4bit:
    kind: Any = type(weight)
    made: Weight8bit | Weight4bit = kind._make(t.contiguous() if isinstance(t, Tensor) else t for t in weight)
    return made


def _results(x: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    states = [h.new_empty((0,) if s is None else s.shape) for s in (h, c)]
    return x.new_empty((*x.shape[:-1], h.shape[-1])), states[0], states[1]


def _fake(
    x: Tensor, batch_sizes: Tensor | None, weights: Any, scales: Any, biases: Any, h: Tensor, c: Tensor | None,
    cell: str, reverse: bool, *how: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _checked(x, batch_sizes, weights, scales, biases, h, c, cell, *_filled(how))
    return _results(x, h, c)


def _filled(how: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments behind `reverse`, with the schema's defaults."""
    defaults: tuple[Any, ...] = (False, 8, "int8", 0, (), "auto")
    symmetric, bits, quant_type, blocksize, nested, compute = (*how, *defaults[len(how) :])
    return symmetric, bits, quant_type, blocksize, nested or (), compute


_ARGUMENTS = (
    "Tensor x, Tensor? batch_sizes, Tensor[] weights, Tensor[] scales, Tensor[] biases, Tensor h, Tensor? c, str cell,"
    ' bool reverse, bool symmetric=False, int bits=8, str quant_type="int8", int blocksize=0, Tensor[]? nested=None,'
    ' str compute="auto"'
)


def _sizes(x: Tensor, batch_sizes: Tensor | None, h: Tensor) -> Tensor:
    """batch_sizes, checked, and those of a padded x."""
    if batch_sizes is None:
        return torch.full((x.shape[0],), h.shape[0], dtype=torch.int64, device="cpu")
    _check_batch_sizes(batch_sizes.tolist(), x.shape[0], h.shape[0])
    return batch_sizes.contiguous()


@operator(f"recurrent({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _fake)
def _recurrent(
    kernels: Kernels, x: Tensor, batch_sizes: Tensor | None, weights: Sequence[Tensor], scales: Sequence[Tensor],
    biases: Sequence[Tensor], h: Tensor, c: Tensor | None, cell: str, reverse: bool, *how: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    symmetric, bits, *_, compute = _filled(how)
    checked = _checked(x, batch_sizes, weights, scales, biases, h, c, cell, *_filled(how))
    sizes = _sizes(x, batch_sizes, h)
    if not x.numel():
        y, _, no_c = _results(x, h, c)
        return y, h.clone(), no_c if c is None else c.clone()
    y, h_n, c_n = kernels.recurrent(
        x.reshape(-1, x.shape[-1]).contiguous(), sizes, [_contiguous(weight) for weight in checked],
        [bias.contiguous() for bias in biases], h.contiguous(), None if c is None else c.contiguous(), cell, reverse,
        symmetric, bits, compute,
    )  # fmt: skip
    return y.view(*x.shape[:-1], h.shape[-1]), h_n, h.new_empty(0) if c_n is None else c_n


def _check_gradients(
    grads: tuple[Tensor, Tensor, Tensor], y: Tensor, values: Sequence[Tensor], x: Tensor, h: Tensor, c: Tensor | None,
    cell: str,
) -> None:  # fmt: skip
    """What recurrent_backward takes beside the arguments of recurrent."""
    p, hidden = h.shape[1], (h if c is None else c).shape[1]
    n = GATES[cell] * hidden
    shapes = ((n, x.shape[-1]), (n, p), (p, hidden))[: 3 if p != hidden else 2]
    if len(values) != len(shapes):
        raise ValueError(f"values must be {len(shapes)}, got {len(values)}")
    for value, shape in zip(values, shapes, strict=True):
        _check_fp32("values", value, shape, x.device)
    for name, tensor in (("y", y), ("grad_y", grads[0])):
        _check_fp32(name, tensor, (*x.shape[:-1], p), x.device)
    _check_fp32("grad_h", grads[1], h.shape, x.device)
    if c is not None:
        _check_fp32("grad_c", grads[2], c.shape, x.device)


def _backward_fake(
    grad_y: Tensor, grad_h: Tensor, grad_c: Tensor, y: Tensor, values: Any, x: Tensor, batch_sizes: Tensor | None,
    weights: Any, scales: Any, biases: Any, h: Tensor, c: Tensor | None, cell: str, reverse: bool, *how: Any,
) -> tuple[Any, ...]:  # fmt: skip
    _checked(x, batch_sizes, weights, scales, biases, h, c, cell, *_filled(how))
    _check_gradients((grad_y, grad_h, grad_c), y, values, x, h, c, cell)
    hidden, rows = (h if c is None else c).shape[-1], math.prod(x.shape[:-1])
    n = GATES[cell] * hidden
    c = h.new_empty(0) if c is None else c
    widths = (n, n, h.shape[1]) + ((h.shape[1], hidden) if len(values) == 3 else ())
    of_weights = [x.new_empty((rows, width)) for width in widths]
    return torch.empty_like(x), torch.empty_like(h), torch.empty_like(c), x.new_empty(n), x.new_empty(n), of_weights


@operator(
    "recurrent_backward(Tensor grad_y, Tensor grad_h, Tensor grad_c, Tensor y, Tensor[] values, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
    _backward_fake,
)
def _backward(
    kernels: Kernels, grad_y: Tensor, grad_h: Tensor, grad_c: Tensor, y: Tensor, values: Sequence[Tensor], x: Tensor,
    batch_sizes: Tensor | None, weights: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor],
    h: Tensor, c: Tensor | None, cell: str, reverse: bool, *how: Any,
) -> tuple[Any, ...]:  # fmt: skip
    symmetric, bits, *_, compute = _filled(how)
    checked = _checked(x, batch_sizes, weights, scales, biases, h, c, cell, *_filled(how))
    _check_gradients((grad_y, grad_h, grad_c), y, values, x, h, c, cell)
    if not x.numel():
        *to_states, to_bias, to_bias_h, of_weights = _backward_fake(
            grad_y, grad_h, grad_c, y, values, x, batch_sizes, weights, scales, biases, h, c, cell, reverse, *how
        )
        return to_states[0], grad_h.clone(), grad_c.clone(), to_bias.zero_(), to_bias_h.zero_(), of_weights
    linear = linears(
        kernels.int8_linear, kernels.linear_4bit, [_contiguous(weight) for weight in checked],
        [bias.contiguous() for bias in biases], symmetric, bits, compute,
    )  # fmt: skip
    flat_x, flat_y, to_y = (t.reshape(-1, t.shape[-1]).contiguous() for t in (x, y, grad_y))
    to_x, to_h, to_c, *rest = backward(
        (to_y, grad_h, None if c is None else grad_c), linear, values, flat_x, flat_y, _sizes(x, batch_sizes, h),
        h.contiguous(), None if c is None else c.contiguous(), cell, reverse,
    )  # fmt: skip
    return to_x.view(x.shape), to_h, h.new_empty(0) if to_c is None else to_c, *rest
