# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""One step of an optimizer, in place: the numbers of pyqkern.backends.reference.optimizer.

A program takes blocks of 256 elements, whose codes share one absmax: it decodes the moments, updates them and the
parameter, and encodes them again. Moments without absmax are fp32 and stay so.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import check_device, launch

BLOCK = 256  # elements that share one absmax
ROWS = 8  # blocks of a program: 2048 elements, 16 to a thread
LINES = 7  # of a map, for codes
LARGEST_GRADIENT = 2.0**59


@triton.jit
def _decode(codes, map_ptr, SIGNED: tl.constexpr):
    """The values of codes; the lines stand in a map of 31 numbers."""
    x = (codes.to(tl.int32) + (-127 if SIGNED else 1)).to(tl.float32)
    slot = (x.to(tl.int32, bitcast=True) >> 23) & 7
    offset = tl.load(map_ptr + 8 + slot)
    if SIGNED:
        offset = offset * tl.minimum(tl.maximum(x, -1.0), 1.0)
    return tl.fma(tl.load(map_ptr + slot), x, offset)


@triton.jit
def _encode(x, map_ptr, SIGNED: tl.constexpr, LINES: tl.constexpr):
    """Codes, and the greatest |x| of each row."""
    a = tl.abs(x)
    absmax = tl.max(a, axis=1)
    inverse = tl.div_rn(1.0, tl.maximum(absmax, 7.888609052210118e-31))[:, None]
    u = a * 0.0 + 1024.0
    for i in tl.static_range(LINES):
        line = tl.load(map_ptr + 16 + i) * inverse
        u = tl.minimum(tl.fma(a, line, tl.load(map_ptr + 16 + LINES + i)), u)
    index = u.to(tl.int32)
    if SIGNED:
        index = tl.where(x.to(tl.int32, bitcast=True) < 0, -index, index) + 127
    return tl.minimum(tl.maximum(index, 0), 255).to(tl.uint8), absmax


@triton.jit
def optimizer_kernel(
    p_ptr, g_ptr, state1_ptr, state2_ptr, absmax1_ptr, absmax2_ptr, maps_ptr,
    n, scale, l2, decay, keep1, add1, keep2, add2, root, eps, size,
    OPTIMIZER: tl.constexpr, CODES: tl.constexpr, HAS_L2: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask, row_mask = at < n, row * BLOCK < n
    p = tl.load(p_ptr + at, mask=mask, other=0.0).to(tl.float32)
    g = scale * tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_L2:
        g = tl.fma(l2 + tl.zeros_like(p), p, g)
    if CODES:
        m = _decode(tl.load(state1_ptr + at, mask=mask, other=127), maps_ptr, True)
        m = m * tl.load(absmax1_ptr + row, mask=row_mask, other=0.0)[:, None]
    else:
        m = tl.load(state1_ptr + at, mask=mask, other=0.0)
    if OPTIMIZER == "adam":
        if CODES:
            v = _decode(tl.load(state2_ptr + at, mask=mask, other=0), maps_ptr + 31, False)
            v = v * tl.load(absmax2_ptr + row, mask=row_mask, other=0.0)[:, None]
        else:
            v = tl.load(state2_ptr + at, mask=mask, other=0.0)
        m = tl.fma(add1 + tl.zeros_like(g), g, keep1 * m)
        v = tl.fma(add2 * g, g, keep2 * v)
        below = tl.fma(tl.sqrt_rn(v), root + tl.zeros_like(v), eps + tl.zeros_like(v))
        p = tl.fma(decay + tl.zeros_like(p), p, tl.div_rn(size * m, below))
        if CODES:
            codes2, absmax2 = _encode(v, maps_ptr + 31, False, LINES)
            tl.store(state2_ptr + at, codes2, mask=mask)
            tl.store(absmax2_ptr + row, absmax2, mask=row_mask)
        else:
            tl.store(state2_ptr + at, v, mask=mask)
    elif OPTIMIZER == "momentum":
        m = tl.fma(add1 + tl.zeros_like(g), g, keep1 * m)
        p = tl.fma(size + tl.zeros_like(p), tl.fma(keep2 + tl.zeros_like(m), m, add2 * g), p)
    else:
        direction = tl.fma(add1 + tl.zeros_like(g), g, keep1 * m)
        move = tl.where(direction > 0.0, size, tl.where(direction < 0.0, -size, 0.0))
        p = tl.fma(decay + tl.zeros_like(p), p, move)
        m = tl.fma(add2 + tl.zeros_like(g), g, keep2 * m)
    tl.store(p_ptr + at, p.to(p_ptr.dtype.element_ty), mask=mask)
    if CODES:
        codes1, absmax1 = _encode(m, maps_ptr, True, LINES)
        tl.store(state1_ptr + at, codes1, mask=mask)
        tl.store(absmax1_ptr + row, absmax1, mask=row_mask)
    else:
        tl.store(state1_ptr + at, m, mask=mask)


def optimizer_step(
    optimizer: str, numbers: Sequence[float], maps: Tensor,
    p: Tensor, g: Tensor, state1: Tensor, state2: Tensor | None, absmax1: Tensor | None, absmax2: Tensor | None,
) -> None:  # fmt: skip
    """One step of "adam", "momentum" or "lion" with the ten StepNumbers; all tensors but maps and g are changed.

    p and g: fp32, bf16 or fp16, of any shape, contiguous, n elements. state1, and state2 for "adam": uint8 with
    absmax1 and absmax2 fp32 [ceil(n / 256)], or fp32 without. maps: fp32 [2, 31], `map_lines` of both moments.
    """
    tensors = {"state1": state1, "state2": state2, "absmax1": absmax1, "absmax2": absmax2}
    device = check_device(p=p, g=g, maps=maps, **tensors)
    launch(
        optimizer_kernel, triton.cdiv(p.numel(), ROWS * BLOCK), device,
        p, g, state1, state2, absmax1, absmax2, maps, p.numel(), *numbers,
        OPTIMIZER=optimizer, CODES=absmax1 is not None, HAS_L2=numbers[1] != 0, ROWS=ROWS, BLOCK=BLOCK, LINES=LINES,
    )  # fmt: skip


def square_sum(tensors: Sequence[Tensor], scale: float) -> Tensor:
    """The sum of (scale * x)**2, fp64 []; NaN where one is not below 2**59. torch's own reductions, in fp64."""
    check_device(tensor=tensors[0])
    total = tensors[0].new_zeros((), dtype=torch.float64)
    for x in tensors:
        scaled = x.float() * scale
        bad = torch.where((scaled.abs() < LARGEST_GRADIENT).all(), 0.0, torch.nan)
        total = total + scaled.double().square().sum() + bad
    return total
