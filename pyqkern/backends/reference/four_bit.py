"""The 4-bit kernels in plain torch: codebooks, quantization in blocks, the linear. See `pyqkern.backends.reference`.

A block of `blocksize` consecutive elements of the flattened tensor shares one scale, its absmax. Codes are packed two
to a byte, the first in the high four bits: the format of bitsandbytes, bit for bit.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from pyqkern.backends import NESTED_BLOCKSIZE, PANEL, Shape, Weight4bit
from pyqkern.backends.reference.affine import adds_in_order, chain, fma
from pyqkern.backends.reference.int8 import int8_quantize_rows

# The least absmax that a block is divided by; a short last block also stores it.
LEAST_ABSMAX = 1e-38

# How many k are summed before a scale is applied, at most.
STEP = 128


@dataclass(frozen=True, eq=False)
class Codebook:
    """What the sixteen codes stand for: values fp32 [16] in units of the scale, integers = rint(values * levels).

    Integers within [-32, 32]: then AVX2 without VNNI adds four products of a weight and an activation in int16. Next to
    127 levels that costs the logits of a fine-tuned MiniLM 0.1 dB in NF4 (25.3 to 25.2), and 0.6 dB in FP4 (22.5 to
    21.9), whose least value, 0.0052, becomes 0.
    """

    values: Tensor
    levels: float

    @cached_property
    def integers(self) -> Tensor:
        return (self.values * self.levels).round().to(torch.int8)

    @cached_property
    def order(self) -> Tensor:
        """The codes by ascending value; of FP4's two zeros, 0 comes before 8."""
        return torch.argsort(self.values, stable=True)

    @cached_property
    def bounds(self) -> Tensor:
        """The 15 midpoints between neighbouring values."""
        ascending = self.values[self.order]
        return (ascending[:-1] + ascending[1:]) / 2

    @cached_property
    def record(self) -> Tensor:
        """All of it as C++ takes it: struct Codebook of csrc/kernels/kernels.h."""
        parts = (
            self.values,
            self.bounds,
            self.order.float(),
            self.integers,
            torch.tensor([self.levels], dtype=torch.float32, device="cpu"),
        )
        return torch.cat([part.view(torch.uint8) for part in parts])


def _fp4() -> Tensor:
    positive = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=torch.float32, device="cpu") / 12
    return torch.cat([positive, -positive])


CODEBOOKS = {
    # Dettmers et al., "QLoRA", 2023, appendix E.
    "nf4": Codebook(
        torch.tensor([
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ], dtype=torch.float32, device="cpu"),
        32.0,
    ),
    "fp4": Codebook(_fp4(), 32.0),
    # Two's complement: the code is q & 15, its value q, the scale that of quantize_affine.
    "int4": Codebook(torch.tensor([*range(8), *range(-8, 0)], dtype=torch.float32, device="cpu"), 1.0),
}  # fmt: skip


# ---- packed codes


def pack(codes: Tensor) -> Tensor:
    """Codes in [0, 15], any shape -> uint8 [(numel + 1) // 2], an odd last one followed by four zero bits."""
    codes = functional.pad(codes.reshape(-1), (0, codes.numel() % 2))
    return codes[::2] << 4 | codes[1::2]


def unpack(packed: Tensor, numel: int) -> Tensor:
    """uint8 [(numel + 1) // 2] -> codes uint8 [numel]."""
    return torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], 1).reshape(-1)[:numel]


def pack_4bit(packed: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    """The form of flat packed codes of [n, k] that this module's `linear_4bit` takes: a copy."""
    return packed.clone()


def unpack_4bit(packed: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    """The flat packed codes out of `pack_4bit`."""
    return packed.clone()


def pack_scales(absmax: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    """The scales in the order that belongs to `pack_4bit`: here the flat one."""
    return absmax.clone()


def unpack_scales(absmax: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    """The flat scales out of `pack_scales`."""
    return absmax.clone()


def packed_shapes_4bit(n: int, k: int, blocksize: int) -> tuple[Shape, Shape]:
    """The shapes of what pack_4bit and pack_scales return."""
    return ((n * k + 1) // 2,), (-(-n * k // blocksize),)


# ---- quantize and dequantize


def quantize_4bit(x: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """x -> packed codes uint8 [(numel + 1) // 2], absmax fp32 [ceil(numel / blocksize)].

    v = clamp(x * (1/absmax), -1, 1), the nearest value of the codebook, the lower one at a midpoint. A last block that
    is not full is divided by its absmax instead. A block with NaN or an infinity has absmax NaN or infinity.
    """
    book = CODEBOOKS[quant_type]
    x = x.reshape(-1).float()
    full = x.numel() // blocksize * blocksize
    blocks = x[:full].view(-1, blocksize)
    absmax = blocks.abs().amax(1)
    v = (blocks * (1.0 / absmax.clamp(min=LEAST_ABSMAX)).unsqueeze(1)).reshape(-1)
    if full < x.numel():
        last = x[full:].abs().amax(0, keepdim=True).clamp(min=LEAST_ABSMAX)
        absmax, v = torch.cat([absmax, last]), torch.cat([v, x[full:] / last])
    v = functional.pad(v.clamp(-1, 1), (0, v.numel() % 2))
    codes = book.order.to(v.device)[torch.bucketize(v, book.bounds.to(v.device))].to(torch.uint8)
    return pack(codes), absmax


def nested_scales(codes: Tensor, blocks: Tensor, weight: Weight4bit) -> Tensor:
    """What absmax of 8 bits stand for: map[code] * nested_absmax[block // 256] + offset. blocks: their numbers."""
    assert weight.nested_absmax is not None and weight.nested_map is not None and weight.nested_offset is not None
    each = weight.nested_absmax[blocks // NESTED_BLOCKSIZE]
    return weight.nested_map[codes.long()] * each + weight.nested_offset


def block_scales(weight: Weight4bit) -> Tensor:
    """absmax of a flat weight, in fp32."""
    if weight.nested_absmax is None:
        return weight.absmax
    return nested_scales(weight.absmax, torch.arange(weight.absmax.numel(), device=weight.absmax.device), weight)


def plain(packed: Tensor, absmax: Tensor, like: Weight4bit, shape: Sequence[int]) -> Weight4bit:
    """A flat weight of fp32 scales, in the format of another."""
    return Weight4bit(packed, absmax, None, None, None, like.quant_type, like.blocksize, shape)


def dequantize_4bit(weight: Weight4bit, dtype: torch.dtype) -> Tensor:
    """value[code] * absmax of its block in fp32, rounded once to dtype."""
    numel = math.prod(weight.shape)
    scales = block_scales(weight).repeat_interleave(weight.blocksize)[:numel]
    values = CODEBOOKS[weight.quant_type].values.to(weight.packed.device)[unpack(weight.packed, numel).long()]
    return (values * scales).to(dtype).view(*weight.shape)


def slice_4bit(weight: Weight4bit, begin: int, end: int) -> Weight4bit:
    """weight[begin:end] of a flat weight."""
    k, blocksize = weight.shape[1], weight.blocksize
    codes, blocks = weight.packed.view(-1), weight.absmax.view(-1)
    codes, blocks = codes[begin * k // 2 : end * k // 2], blocks[begin * k // blocksize : end * k // blocksize]
    return slice_nested(weight, codes, blocks, begin, end)


def slice_nested(weight: Weight4bit, packed: Tensor, absmax: Tensor, begin: int, end: int) -> Weight4bit:
    """weight[begin:end], given its packed and absmax."""
    k, nested = weight.shape[1], weight.nested_absmax
    if nested is not None:
        group = weight.blocksize * NESTED_BLOCKSIZE
        nested = nested[begin * k // group : end * k // group]
    return weight._replace(packed=packed, absmax=absmax, nested_absmax=nested, shape=(end - begin, k))


def rows_4bit(weight: Weight4bit, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """weight[rows] dequantized."""
    return rows_of_flat(dequantize_4bit, weight, rows, dtype)


def rows_of_flat(
    dequantize: Callable[[Weight4bit, torch.dtype], Tensor], weight: Weight4bit, rows: Tensor, dtype: torch.dtype
) -> Tensor:
    """weight[rows] of a flat weight by the dequantize_4bit of a backend: all of it where blocks cross rows."""
    n, k = weight.shape
    if k % weight.blocksize:
        return dequantize(weight, dtype).index_select(0, rows)
    codes = weight.packed.view(n, k // 2).index_select(0, rows)
    scales = block_scales(weight).view(n, k // weight.blocksize).index_select(0, rows)
    return dequantize(plain(codes.view(-1), scales.view(-1), weight, (rows.numel(), k)), dtype)


# ---- the linear


def linear_4bit(x: Tensor, weight: Weight4bit, bias: Tensor | None, compute: str) -> Tensor:
    """x [..., K], a flat weight [n, K] -> [..., n] of x's dtype.

    compute="fp32": total[m, n] + bias[n] in fp32,
        total = the sum over steps of min(blocksize, 128) columns of absmax * (sum of x * value), by fma, ascending,
    where the inner sum is one chain too. Where blocks cross rows, below 16 of them, and on other devices than the CPU:
    x @ dequantized.T.
    "int8": rows of x as s8 codes q with scale s, and with W the integers of the codebook
        y[m, n] = total[m, n] * (s[m] * (1 / levels)) + bias[n],
        total = the same of absmax * (exact sum of q * W);
    it takes K of whole blocks. "auto" and "bf16" are "fp32": a device may round both sides to bf16 for "bf16".
    """
    k, n = x.shape[-1], weight.shape[0]
    rows = x.reshape(-1, k)
    if compute == "int8" and k % weight.blocksize == 0:
        y = _linear_int8(rows, weight)
    elif k % weight.blocksize == 0 and n >= PANEL and adds_in_order(x):
        y = _linear_fp32(rows.float(), weight)
    else:
        y = functional.linear(rows.float(), dequantize_4bit(weight, torch.float32))
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], n)


def grad_input_4bit(grad: Tensor, weight: Weight4bit) -> Tensor:
    """grad [..., n], a flat weight [n, K] -> [..., K] of grad's dtype.

    y[m, k] = sum_n grad[m,n] * w[n,k] in fp32, w as `dequantize_4bit` gives it, the sum as `affine.chain` adds it.
    """
    rows = grad.reshape(-1, grad.shape[-1]).float()
    y = chain(rows, dequantize_4bit(weight, torch.float32).T)
    return y.to(grad.dtype).view(*grad.shape[:-1], weight.shape[1])


def _step_scales(weight: Weight4bit) -> Tensor:
    """The scale of each step, [n, steps]."""
    n, k = weight.shape
    repeats = weight.blocksize // min(weight.blocksize, STEP)
    return block_scales(weight).view(n, k // weight.blocksize).repeat_interleave(repeats, 1)


def _linear_fp32(x: Tensor, weight: Weight4bit) -> Tensor:
    codes, scales = unpack(weight.packed, math.prod(weight.shape)).view(*weight.shape), _step_scales(weight)
    values = CODEBOOKS[weight.quant_type].values.to(x.device)[codes.long()]
    step = min(weight.blocksize, STEP)
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float32, device=x.device)
    for s, (of_x, of_w) in enumerate(zip(x.split(step, 1), values.split(step, 1), strict=True)):
        total = fma(chain(of_x, of_w), scales[:, s].expand_as(total), total)
    return total


def _linear_int8(x: Tensor, weight: Weight4bit) -> Tensor:
    book, step, (n, k) = CODEBOOKS[weight.quant_type], min(weight.blocksize, STEP), weight.shape
    q, scale, zero = int8_quantize_rows(x, True)
    q = (q.double() - zero.unsqueeze(1)).view(-1, k // step, step)
    w = book.integers.to(x.device)[unpack(weight.packed, n * k).long()].double().view(n, k // step, step)
    products = torch.einsum("msk,nsk->smn", q, w)
    scales = _step_scales(weight)
    total = torch.zeros(x.shape[0], n, dtype=torch.float32, device=x.device)
    for s in range(k // step):
        total = fma(products[s].float(), scales[:, s].expand_as(total), total)
    return total * (scale * scale.new_tensor(1.0 / book.levels)).unsqueeze(1)
