"""The optimizers' step in plain torch: the specification of csrc/kernels/optimizer.inl. See
`pyqkern.backends.reference`.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from pyqkern.backends import LARGEST_GRADIENT, STATE_BLOCK, StepNumbers
from pyqkern.backends.reference.affine import fma

DECADES = 7
_LOW_DECADES = 3
_LEAST_UNIT = 2.0**-100  # what a moment is divided by at least, so that the steepest line stays finite
_NUDGE = 2.0**-10  # of an interval: so that a block's greatest value, divided by itself, is 1 in spite of the rounding


def dynamic_map(signed: bool) -> Tensor:
    """bitsandbytes' dynamic map: the 256 values that the codes of a moment stand for, ascending, fp32 on the CPU.

    Zero, 1, and the middles of the 2**i equal intervals (twice as many without sign) of [10**(i-7), 10**(i-6)] for i
    from 0 to 6, with both signs where there is one.
    """
    values = [0.0, 1.0]
    for i in range(DECADES):
        count = 2**i if signed else 2 ** (i + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float32, device="cpu")
        middles = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*middles.tolist(), *(-middles if signed else middles[:0]).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


@functools.cache
def map_lines(signed: bool) -> Tensor:
    """What C++ calls a DynamicMap, fp32 [31]: the lines that give a code's value, eight slopes and eight offsets by the
    low three bits of an exponent, and those that give a value's code, seven slopes and seven offsets; and `low`.
    """
    slopes, offsets, code_slopes, code_offsets = [0.0] * 8, [0.0] * 8, [], []
    for i in range(DECADES):
        first = 2**i if signed else 2 ** (i + 1)  # the least |x| of this decade, and how many intervals it has
        low, width = 10.0 ** (i - 7), 0.9 * 10.0 ** (i - 6) / first
        slot = (first.bit_length() - 1 + 127) % 8
        slopes[slot], offsets[slot] = width, low + width / 2 - width * first
        code_slopes.append(1 / width)
        code_offsets.append((first if signed else first - 1) - low / width + _NUDGE)
    if signed:  # |x| = 128 stands for 1
        slopes[6] = 1 / 128
    else:  # x = 1 stands for 0, x = 256 for 1
        slopes[7], offsets[7] = 1 / 255, -1 / 255
    # A little above the decade's edge, where rounding cannot make a lower line the least.
    low = 10.0 ** (_LOW_DECADES - 7) * 1.01
    return torch.tensor([*slopes, *offsets, *code_slopes, *code_offsets, low], dtype=torch.float32, device="cpu")


def decode(codes: Tensor, signed: bool) -> Tensor:
    """The values of codes, fp32, within 2**-20 of `dynamic_map`'s, relative."""
    slopes, offsets = (line.to(codes.device) for line in map_lines(signed)[:16].view(2, 8))
    x = codes.int() + (-127 if signed else 1)
    x = x.float()
    slot = ((x.view(torch.int32) >> 23) & 7).long()
    offset = offsets[slot] * (x.clamp(-1, 1) if signed else 1.0)
    return fma(slopes[slot], x, offset)


def encode(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """x fp32 [blocks, n] -> uint8 codes of x / absmax and absmax, fp32 [blocks]: that of the interval x is in."""
    lines = map_lines(signed)[16:30].view(2, DECADES).to(x.device)
    absmax = x.abs().amax(1)
    inverse = (1.0 / absmax.clamp(min=_LEAST_UNIT)).unsqueeze(1)
    a, u = x.abs(), None
    for slope, offset in zip(*lines, strict=True):
        line = fma(a, slope * inverse, offset)
        u = line if u is None else torch.minimum(line, u)
    assert u is not None
    index = u.trunc().int()
    codes = (torch.where(x.signbit(), -index, index) + 127) if signed else index
    return codes.clamp(0, 255).to(torch.uint8), absmax


def square_sum(tensors: Sequence[Tensor], scale: float) -> Tensor:
    """The sum of (scale * x)**2 of all elements, fp64 []; NaN where a scale * x is not below 2**59.

    For each 256 elements sixteen sums in fp32, one for each i % 16, by fma from zero, added in halves. The sums of 256
    blocks are added in fp64 one after another, then those of all.
    """
    pieces, bad = [], False
    for tensor in tensors:
        x = tensor.reshape(-1).float() * scale
        bad |= not bool((x.abs() < LARGEST_GRADIENT).all())
        x = torch.nn.functional.pad(x, (0, -x.numel() % (256 * STATE_BLOCK))).view(-1, 256, 16, 16)
        sums = torch.zeros_like(x[:, :, 0])
        for row in x.unbind(2):
            sums = fma(row, row, sums)
        while sums.shape[2] > 1:
            half = sums.shape[2] // 2
            sums = sums[:, :, :half] + sums[:, :, half:]
        pieces.append(sums[:, :, 0].double().cumsum(1)[:, -1])
    total = torch.cat(pieces).cumsum(0)[-1]
    return torch.full_like(total, torch.nan) if bad else total


def optimizer_step(
    optimizer: str,
    numbers: StepNumbers,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor],
) -> None:
    """One step, in place. Moments are decoded, times absmax; the rules stand in `_rule`."""
    second = optimizer == "adam"
    for i, p in enumerate(params):
        codes = [state1[i], *state2[i : i + 1]]
        absmax = [absmax1[i], *absmax2[i : i + 1]] if absmax1 else []
        moments = [_blocks(t) if not absmax else _decoded(t, a, j == 0) for j, (t, a) in _pairs(codes, absmax)]
        grad, value = _blocks(grads[i].float()), _blocks(p.float())
        moved, new = _rule(optimizer, numbers, value, grad, moments)
        p.copy_(_flat(moved, p).to(p.dtype))
        for j, moment in enumerate(new[: 1 + second]):
            if absmax:
                _encode_into(moment, codes[j], absmax[j], j == 0)
            else:
                codes[j].copy_(_flat(moment, p))


def _rule(
    optimizer: str, numbers: StepNumbers, p: Tensor, grad: Tensor, moments: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    scale, l2, decay, keep1, add1, keep2, add2, root, eps, size = (p.new_tensor(number) for number in numbers)
    g, m = scale * grad, moments[0]
    if numbers.l2:
        g = fma(l2, p, g)
    if optimizer == "adam":
        m = fma(add1, g, keep1 * m)
        v = fma(add2 * g, g, keep2 * moments[1])
        # torch's fp32 sqrt errs by an ulp on some CPUs; fp64's, rounded, is the correctly rounded one.
        below = fma(v.double().sqrt().float(), root, eps)
        return fma(decay, p, (size * m) / below), [m, v]
    if optimizer == "momentum":
        m = fma(add1, g, keep1 * m)
        return fma(size, fma(keep2, m, add2 * g), p), [m]
    direction = fma(add1, g, keep1 * m)
    return fma(decay, p, size * direction.sign()), [fma(add2, g, keep2 * m)]


def _pairs(codes: list[Tensor], absmax: list[Tensor]) -> list[tuple[int, tuple[Tensor, Tensor]]]:
    return list(enumerate(zip(codes, absmax or codes, strict=True)))


def _blocks(t: Tensor) -> Tensor:
    """[blocks, STATE_BLOCK], filled up with zeros."""
    return torch.nn.functional.pad(t.reshape(-1), (0, -t.numel() % STATE_BLOCK)).view(-1, STATE_BLOCK)


def _flat(t: Tensor, like: Tensor) -> Tensor:
    return t.reshape(-1)[: like.numel()].view(like.shape)


def _decoded(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    flat = decode(codes.reshape(-1), signed)
    return _blocks(flat) * absmax.unsqueeze(1)


def _encode_into(moment: Tensor, codes: Tensor, absmax: Tensor, signed: bool) -> None:
    new, greatest = encode(moment, signed)
    codes.copy_(_flat(new, codes))
    absmax.copy_(greatest)
