# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""4-bit weights: quantize, dequantize, and the linear without a dequantized copy for few rows.

    w[i] = level[code[i]] * absmax[i // blocksize]      i runs over the flattened row-major weight [N, K]

Two codes to a byte, high nibble first: bitsandbytes' format of NF4 and FP4, and plain int4. absmax is fp32, or, doubly
quantized, uint8 with absmax[b] = nested_map[absmax8[b]] * nested_absmax[b // 256] + offset, computed where it is read.
Results are those of pyqkern.backends.reference; tensors are contiguous, codes and scales flat.

The matrix kernels read eight codes as one int32 word and look all codes of a tile up at once (tl.gather keeps the
16 levels in 16 banks of shared memory, so that no lookup waits for another). Per weight that is a shift, a mask, a
lookup and the multiply-add: issuing instructions is as scarce here as bandwidth.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from . import tuning
from .device import check_device, launch

# The tensors of a weight: codes, absmax and, doubly quantized, what absmax stands for.
WEIGHT = ("packed", "absmax", "nested_absmax", "nested_map", "offset")
Weight = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
Constants = dict[str, int | str]

FEW_ROWS = 2  # which never round; from 3 on, tensor cores are faster than one more multiply-add a row, on an H200

# fmt: off
NF4_LEVELS = tl.constexpr((
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
))
FP4_LEVELS = tl.constexpr((
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
    0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
))
INT4_LEVELS = tl.constexpr((0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0))
# Halfway between neighbouring levels, ascending. An exact midpoint belongs to the lower one.
NF4_BOUNDS = tl.constexpr((
    -0.8480963706970215, -0.6106328964233398, -0.4599952697753906, -0.33967941999435425, -0.23460739850997925,
    -0.13791173696517944, -0.045525018125772476, 0.03979014977812767, 0.120255246758461, 0.2035212516784668,
    0.2920137643814087, 0.3893125355243683, 0.5016634464263916, 0.6427869200706482, 0.8614784479141235,
))
FP4_BOUNDS = tl.constexpr((
    -0.8333333730697632, -0.5833333730697632, -0.4166666865348816, -0.2916666865348816, -0.2083333432674408,
    -0.0859375, -0.0026041667442768812, 0.0, 0.0026041667442768812, 0.0859375,
    0.2083333432674408, 0.2916666865348816, 0.4166666865348816, 0.5833333730697632, 0.8333333730697632,
))
FP4_ORDER = tl.constexpr((11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3))  # the codes by ascending level
# fmt: on


@triton.jit
def _levels(QUANT_TYPE: tl.constexpr):
    """The 16 levels, fp32 [16]."""
    code = tl.arange(0, 16)
    levels = tl.zeros((16,), tl.float32)
    for i in tl.static_range(16):
        if QUANT_TYPE == "nf4":
            levels = tl.where(code == i, NF4_LEVELS[i], levels)
        elif QUANT_TYPE == "fp4":
            levels = tl.where(code == i, FP4_LEVELS[i], levels)
        else:
            levels = tl.where(code == i, INT4_LEVELS[i], levels)
    return levels


@triton.jit
def _look_up(levels, codes):
    """levels[codes], in the shape of codes."""
    return tl.reshape(tl.gather(levels, tl.reshape(codes, [codes.numel]), 0), codes.shape)


@triton.jit
def _load_absmax(absmax_ptr, nested_absmax_ptr, nested_map_ptr, offset_ptr, block, mask):
    absmax = tl.load(absmax_ptr + block, mask=mask, other=0)
    if nested_absmax_ptr is not None:
        level = tl.load(nested_map_ptr + absmax.to(tl.int32), mask=mask, other=0.0)
        absmax = level * tl.load(nested_absmax_ptr + block // 256, mask=mask, other=0.0) + tl.load(offset_ptr)
    return absmax


@triton.jit
def _unpack(words, levels):
    """int32 words [...] of eight codes -> their levels [..., 2, 2, 2], in the order of the weights."""
    even = tl.join(tl.join((words >> 4) & 15, (words >> 20) & 15), tl.join((words >> 12) & 15, (words >> 28) & 15))
    odd = tl.join(tl.join(words & 15, (words >> 16) & 15), tl.join((words >> 8) & 15, (words >> 24) & 15))
    return _look_up(levels, tl.join(even, odd))


@triton.jit
def _split8(t):
    """[..., 2, 2, 2] -> eight tensors [...]; nothing leaves its register."""
    even, odd = tl.split(t)
    even0, even1 = tl.split(even)
    odd0, odd1 = tl.split(odd)
    t0, t4 = tl.split(even0)
    t2, t6 = tl.split(even1)
    t1, t5 = tl.split(odd0)
    t3, t7 = tl.split(odd1)
    return t0, t1, t2, t3, t4, t5, t6, t7


@triton.jit
def quantize_4bit_kernel(
    w_ptr, packed_ptr, absmax_ptr, numel, packed_numel,
    QUANT_TYPE: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    w = tl.load(w_ptr + element, mask=element < numel, other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(w), 1)
    ragged = (block + 1) * BLOCKSIZE > numel
    divisor = tl.maximum(absmax, tl.full((BLOCKS,), 1e-38, tl.float32))
    absmax = tl.where(ragged, divisor, absmax)
    absmax = tl.where(tl.max((w != w).to(tl.int32), 1) > 0, float("nan"), absmax)
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCKSIZE < numel)
    # bitsandbytes multiplies by the reciprocal, but divides in a last block that is not full
    value = tl.where(ragged[:, None], tl.div_rn(w, divisor[:, None]), w * tl.div_rn(1.0, divisor)[:, None])
    value = tl.minimum(tl.maximum(value, -1.0), 1.0)
    code = tl.zeros_like(value).to(tl.int32)
    for i in tl.static_range(15):
        code += (value > (NF4_BOUNDS[i] if QUANT_TYPE == "nf4" else FP4_BOUNDS[i])).to(tl.int32)
    if QUANT_TYPE == "fp4":
        order = code
        for i in tl.static_range(16):
            code = tl.where(order == i, FP4_ORDER[i], code)
    high, low = tl.split(tl.reshape(code, (BLOCKS, BLOCKSIZE // 2, 2)))
    byte = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(packed_ptr + byte, ((high << 4) | low).to(tl.uint8), mask=byte < packed_numel)


@triton.jit
def dequantize_4bit_kernel(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_map_ptr, offset_ptr, w_ptr, numel, packed_numel,
    QUANT_TYPE: tl.constexpr, BLOCKSIZE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One program: GROUPS groups of 32 weights, all of a group in one block."""
    levels = _levels(QUANT_TYPE)
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    byte = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    packed = tl.load(packed_ptr + byte, mask=byte < packed_numel, other=0).to(tl.int32)
    absmax = _load_absmax(
        absmax_ptr, nested_absmax_ptr, nested_map_ptr, offset_ptr, group * 32 // BLOCKSIZE, group * 32 < numel
    )
    w = _look_up(levels, tl.join(packed >> 4, packed & 15)) * absmax[:, None, None]
    w = tl.reshape(w, (GROUPS, 32))
    element = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(w_ptr + element, w.to(w_ptr.dtype.element_ty), mask=element < numel)


@triton.jit(do_not_specialize=["M"])
def gemv_4bit_kernel(
    x_ptr, words_ptr, absmax_ptr, nested_absmax_ptr, nested_map_ptr, offset_ptr, bias_ptr, y_ptr,
    M, N, K32,
    QUANT_TYPE: tl.constexpr, BLOCKSIZE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """y [M, N] for M <= BLOCK_M: a program's threads share the K of BLOCK_N outputs.

    K32 is K / 32, so that the compiler knows 32 to divide K. GROUP (32 or 64) weights have one absmax.
    """
    WORDS: tl.constexpr = GROUP // 8
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    levels = _levels(QUANT_TYPE)
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n.to(tl.int64)
    groups = K32 * 32 // GROUP
    total = tl.zeros((BLOCK_M, BLOCK_N, GROUPS, WORDS), tl.float32)
    for first in tl.range(0, groups, GROUPS, num_stages=NUM_STAGES):
        group = first + tl.arange(0, GROUPS)
        word = group[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
        inside = group < groups
        words = tl.load(
            words_ptr + row[:, None, None] * (K32 * 4) + word[None, :, :],
            mask=(n < N)[:, None, None] & inside[None, :, None], other=0,
        )  # fmt: skip
        block = (row[:, None] * (K32 * 32) + group[None, :] * GROUP) // BLOCKSIZE
        mask = (n < N)[:, None] & inside[None, :]
        absmax = _load_absmax(absmax_ptr, nested_absmax_ptr, nested_map_ptr, offset_ptr, block, mask)
        x_offset = m[:, None, None, None] * (K32 * 32) + (word[:, :, None] * 8 + tl.arange(0, 8)[None, None, :])[None]
        x = tl.load(x_ptr + x_offset, mask=(m < M)[:, None, None, None] & inside[None, :, None, None], other=0.0)
        x0, x1, x2, x3, x4, x5, x6, x7 = _split8(tl.reshape(x.to(tl.float32), (BLOCK_M, GROUPS, WORDS, 2, 2, 2)))
        w0, w1, w2, w3, w4, w5, w6, w7 = _split8(_unpack(words, levels))
        dot = w0[None] * x0[:, None]
        dot = tl.fma(w1[None], x1[:, None], dot)
        dot = tl.fma(w2[None], x2[:, None], dot)
        dot = tl.fma(w3[None], x3[:, None], dot)
        dot = tl.fma(w4[None], x4[:, None], dot)
        dot = tl.fma(w5[None], x5[:, None], dot)
        dot = tl.fma(w6[None], x6[:, None], dot)
        dot = tl.fma(w7[None], x7[:, None], dot)
        total = tl.fma(dot, absmax[None, :, :, None], total)  # the scale once per eight weights
    y = tl.sum(tl.sum(total, 3), 2)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y_ptr + m.to(tl.int64)[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def dot_4bit_kernel(
    x_ptr, words_ptr, absmax_ptr, nested_absmax_ptr, nested_map_ptr, offset_ptr, bias_ptr, y_ptr,
    M, N, K32,
    QUANT_TYPE: tl.constexpr, BLOCKSIZE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """y [M, N], or fp32 partial sums [SPLIT_K, M, N], on tensor cores, the weights rounded to x's dtype."""
    WORDS: tl.constexpr = GROUP // 8
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    levels = _levels(QUANT_TYPE)
    part, tile = tl.program_id(0) % SPLIT_K, tl.program_id(0) // SPLIT_K
    m = tile // tl.cdiv(N, BLOCK_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % tl.cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n.to(tl.int64)
    K = K32 * 32
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(part * BLOCK_K, K, SPLIT_K * BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + m.to(tl.int64)[:, None] * K + column[None, :],
            mask=(m < M)[:, None] & (column < K)[None, :], other=0.0,
        )  # fmt: skip
        group = k // GROUP + tl.arange(0, GROUPS)
        word = group[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
        mask = (n < N)[:, None] & (group * GROUP < K)[None, :]
        words = tl.load(words_ptr + row[:, None, None] * (K32 * 4) + word[None, :, :], mask=mask[:, :, None], other=0)
        block = (row[:, None] * K + group[None, :] * GROUP) // BLOCKSIZE
        absmax = _load_absmax(absmax_ptr, nested_absmax_ptr, nested_map_ptr, offset_ptr, block, mask)
        # Rounded behind the reshape: a reshape right before the product breaks Triton 3.6 where GROUP is 32.
        w = tl.reshape(_unpack(words, levels) * absmax[:, :, None, None, None, None], (BLOCK_N, BLOCK_K))
        total = tl.dot(x, w.to(x_ptr.dtype.element_ty).T, total)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y_mask = (m < M)[:, None] & (n < N)[None, :]
    out = y_ptr + tl.cast(part, tl.int64) * M * N + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, total.to(y_ptr.dtype.element_ty), mask=y_mask)


@triton.jit(do_not_specialize=["M"])
def sum_split_k_kernel(part_ptr, bias_ptr, y_ptr, M, N, BLOCK: tl.constexpr, SPLIT_K: tl.constexpr):
    """y [M, N] = the sum of the partial sums [SPLIT_K, M, N], in their order, + bias."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < M * N
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLIT_K):
        total += tl.load(part_ptr + tl.cast(part, tl.int64) * M * N + element, mask=mask, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + element % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + element, total.to(y_ptr.dtype.element_ty), mask=mask)


def _check_type(quant_type: str, quant_types: tuple[str, ...]) -> None:
    if quant_type not in quant_types:
        raise ValueError(f"quant_type must be one of {', '.join(quant_types)}, got {quant_type!r}")


def _check_weight(packed: Tensor, absmax: Tensor, numel: int, blocksize: int) -> None:
    if blocksize not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise ValueError(f"blocksize must be 32, 64, 128, 256, 512, 1024, 2048 or 4096, got {blocksize}")
    if packed.dtype != torch.uint8 or packed.numel() != (numel + 1) // 2:
        raise ValueError(f"packed must be {(numel + 1) // 2} of uint8, got {packed.numel()} of {packed.dtype}")
    if absmax.numel() != triton.cdiv(numel, blocksize):
        raise ValueError(f"absmax must have {triton.cdiv(numel, blocksize)} elements, got {absmax.numel()}")


def quantize_4bit(x: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """x of any shape, fp32/bf16/fp16 -> (packed codes uint8 [ceil(numel / 2)], absmax fp32 [ceil(numel / blocksize)]).

    Codes and absmax are those that bitsandbytes computes on CPU. A block with NaN has absmax NaN, with inf inf.
    """
    _check_type(quant_type, ("nf4", "fp4"))
    device, numel = check_device(x=x), x.numel()
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(triton.cdiv(numel, blocksize), dtype=torch.float32, device=x.device)
    _check_weight(packed, absmax, numel, blocksize)
    blocks = 4096 // blocksize
    launch(
        quantize_4bit_kernel, triton.cdiv(absmax.numel(), blocks), device, x, packed, absmax, numel, packed.numel(),
        QUANT_TYPE=quant_type, BLOCKSIZE=blocksize, BLOCKS=blocks,
    )  # fmt: skip
    return packed, absmax


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """level * absmax in fp32, rounded once to `dtype`, in `shape`."""
    _check_type(quant_type, ("nf4", "fp4", "int4"))
    weight = (packed, absmax, nested_absmax, nested_map, offset)
    device = check_device(**dict(zip(WEIGHT, weight, strict=True)))
    w = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    _check_weight(packed, absmax, w.numel(), blocksize)
    launch(
        dequantize_4bit_kernel, triton.cdiv(w.numel(), 4096), device, *weight, w, w.numel(), packed.numel(),
        QUANT_TYPE=quant_type, BLOCKSIZE=blocksize, GROUPS=128,
    )  # fmt: skip
    return w


def linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    quant_type: str,
    blocksize: int,
    n: int,
    compute: str,
    config: tuning.Config | None = None,
) -> Tensor:
    """x [..., K] fp32/bf16/fp16, a weight [n, K] -> [..., n] of x's dtype.

    Up to 2 rows, 4 of fp32: a matrix-vector kernel, in which the weights stay fp32. Up to 64 of bf16 or fp16: tensor
    cores, the weights in x's dtype. Else, and where 32 does not divide K: dequantize, then torch's matmul.
    compute="fp32" never rounds x or the weights, "bf16" rounds both to bf16 from 3 rows on; "auto" and "int8" go by x's
    dtype.
    """
    _check_type(quant_type, ("nf4", "fp4", "int4"))
    weight = (packed, absmax, nested_absmax, nested_map, offset)
    device = check_device(x=x, bias=bias, **dict(zip(WEIGHT, weight, strict=True)))
    k = x.shape[-1]
    rows = x.reshape(-1, k)
    m = rows.shape[0]
    _check_weight(packed, absmax, n * k, blocksize)
    if m > FEW_ROWS or k % 32:
        rows = rows.to({"fp32": torch.float32, "bf16": torch.bfloat16}.get(compute, x.dtype))
    if k % 32 or m > (4 if rows.dtype == torch.float32 else 64):
        w = dequantize_4bit(*weight, quant_type, blocksize, (n, k), rows.dtype)
        y = functional.linear(rows, w, None if bias is None else bias.to(rows.dtype)).to(x.dtype)
    else:
        kernel = _kernel_for(m, rows.dtype)
        config = config or tuning.choose(kernel, device, m, n, k)
        y = x.new_empty((m, n))
        constants: Constants = {
            "QUANT_TYPE": quant_type, "BLOCKSIZE": blocksize, "GROUP": 32 if k % 64 else min(64, blocksize),
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
            "num_warps": config.num_warps,
        }  # fmt: skip
        run = _gemv if kernel == "four_bit_gemv" else _dot
        run(rows, (_words(packed), *weight[1:]), bias, y, config, constants)
    return y.view(*x.shape[:-1], n)


def _kernel_for(m: int, dtype: torch.dtype) -> str:
    return "four_bit_gemv" if m <= FEW_ROWS or dtype == torch.float32 else "four_bit_dot"


def _gemv(
    x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor, config: tuning.Config, constants: Constants
) -> None:
    (m, k), n = x.shape, y.shape[1]
    launch(
        gemv_4bit_kernel, triton.cdiv(n, config.block_n), x.device, x, *weight, bias, y, m, n, k // 32,
        NUM_STAGES=config.num_stages, maxnreg=None, **constants,  # waits for memory: occupancy counts
    )  # fmt: skip


def _dot(
    x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor, config: tuning.Config, constants: Constants
) -> None:
    (m, k), n, splits = x.shape, y.shape[1], config.split_k
    out, out_bias = (y, bias) if splits == 1 else (y.new_empty((splits, m, n), dtype=torch.float32), None)
    launch(
        dot_4bit_kernel, triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n) * splits, x.device,
        x, *weight, out_bias, out, m, n, k // 32,
        SPLIT_K=splits, num_stages=config.num_stages, **constants,
    )  # fmt: skip
    if splits > 1:
        launch(sum_split_k_kernel, triton.cdiv(m * n, 512), x.device, out, bias, y, m, n, BLOCK=512, SPLIT_K=splits)


def _words(packed: Tensor) -> Tensor:
    """The bytes as int32, the first byte lowest; a copy only where their address is no multiple of 16."""
    packed = packed.view(-1)
    return (packed if packed.data_ptr() % 16 == 0 else packed.clone()).view(torch.int32)


def tune(
    m: int, n: int, k: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> dict[tuning.Config, float]:
    """Measures the configurations for one shape, M up to 64, on random data and keeps the fastest; see tuning.tune."""

    def problem() -> tuple[Tensor, Tensor, Tensor]:
        weight = torch.randn(n, k, dtype=dtype, device=device)
        return torch.randn(m, k, dtype=dtype, device=device), *quantize_4bit(weight, "nf4", 64)

    def run(config: tuning.Config, tensors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return linear_4bit(*tensors, None, None, None, None, "nf4", 64, n, "auto", config)

    return tuning.tune(_kernel_for(m, dtype), device, m, n, k, problem, run, n * k // 2)
