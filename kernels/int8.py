# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The INT8 product and linear on tensor cores.

    S[m, n] = sum_k a[m, k] * w[n, k] - zero_point[m] * sum_k w[n, k]                       exact, int32
    y[m, n] = activation((row_scale[m] * weight_scale[n]) * float(S[m, n]) + bias[n])       each operation rounded

a is int8 [M, K], w int8 [N, K], both with rows of a multiple of 16 bytes. One kernel computes tiles of S and applies
the tail before anything is stored; where K is split among programs, it stores partial sums, and a second kernel adds
them (integers: in any order) and applies the same tail. Results equal those on CPU bit for bit unless a GELU is fused.

Source of the tile shapes and of the order of the tiles: Triton's tutorials 03 and 09, and the measured peers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning
from .device import capability, check_device, launch, processors
from .numerics import activate
from .row_quantize import quantize_rows, quantize_rows_static


@triton.jit
def _tail(
    total, row, column, y_mask, y_ptr, row_scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr,
    M, N, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Stores total [rows, columns] after the tail; without a weight_scale the int32 sums themselves."""
    row_mask, column_mask = row < M, column < N
    if zero_point_ptr is not None:
        zero_point = tl.load(zero_point_ptr + row, mask=row_mask, other=0)
        column_sum = tl.load(column_sum_ptr + column, mask=column_mask, other=0)
        total -= zero_point[:, None] * column_sum[None, :]
    offset = row.to(tl.int64)[:, None] * N + column[None, :]
    if weight_scale_ptr is None:
        tl.store(y_ptr + offset, total, mask=y_mask)
    else:
        row_scale = tl.load(row_scale_ptr + row, mask=row_mask, other=0.0)
        weight_scale = tl.load(weight_scale_ptr + column, mask=column_mask, other=0.0)
        y = (row_scale[:, None] * weight_scale[None, :]) * total.to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + offset, activate(y, ACTIVATION).to(y_ptr.dtype.element_ty), mask=y_mask)


@triton.jit
def _tail_in_parts(
    total, row, n, y_ptr, row_scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr,
    M, N, ACTIVATION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The tail, on one PARTS-th of the columns after the other, where the whole would not fit the registers."""
    ROWS: tl.constexpr = total.shape[0]
    COLUMNS: tl.constexpr = total.shape[1]
    if PARTS == 1:
        column = n + tl.arange(0, COLUMNS)
        mask = (row < M)[:, None] & (column < N)[None, :]
        _tail(
            total, row, column, mask, y_ptr, row_scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr,
            M, N, ACTIVATION,
        )  # fmt: skip
    else:
        left, right = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        _tail_in_parts(
            left, row, n, y_ptr, row_scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr,
            M, N, ACTIVATION, PARTS // 2,
        )  # fmt: skip
        _tail_in_parts(
            right, row, n + COLUMNS // 2, y_ptr, row_scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr,
            bias_ptr, M, N, ACTIVATION, PARTS // 2,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def int8_matmul_kernel(
    a, w, y_ptr, row_scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr,
    M, N, K, stride_a, stride_w,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr, TMA: tl.constexpr, PERSISTENT: tl.constexpr, PARTS: tl.constexpr,
    GROUP_M: tl.constexpr = 8,
):  # fmt: skip
    """a and w are pointers, or tensor descriptors with tiles of [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K] if TMA.

    GROUP_M rows of tiles are taken column by column, so that their operands stay in L2.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for work in tl.range(tl.program_id(0), tiles_m * tiles_n * SPLIT_K, tl.num_programs(0), flatten=PERSISTENT):
        part, tile = work % SPLIT_K, work // SPLIT_K
        first_m = tile // (GROUP_M * tiles_n) * GROUP_M
        group_m = tl.minimum(tiles_m - first_m, GROUP_M)
        m = (first_m + tile % (GROUP_M * tiles_n) % group_m) * BLOCK_M
        n = tile % (GROUP_M * tiles_n) // group_m * BLOCK_N
        row, column, k_offset = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        if TMA:
            for k in range(part * BLOCK_K, K, SPLIT_K * BLOCK_K):
                total = tl.dot(a.load([m, k]), w.load([n, k]).T, total, out_dtype=tl.int32)
        else:
            # Rows past the end read another row, and their results are not stored: no mask in the inner loop.
            a_ptr = a + (row % M).to(tl.int64)[:, None] * stride_a + k_offset[None, :]
            w_ptr = w + (column % N).to(tl.int64)[:, None] * stride_w + k_offset[None, :]
            for k in range(part * BLOCK_K, K, SPLIT_K * BLOCK_K):
                inside = (k + k_offset < K)[None, :]
                a_tile = tl.load(a_ptr + k, mask=inside, other=0)
                w_tile = tl.load(w_ptr + k, mask=inside, other=0)
                total = tl.dot(a_tile, w_tile.T, total, out_dtype=tl.int32)
        out_ptr = y_ptr + tl.cast(part, tl.int64) * M * N if SPLIT_K > 1 else y_ptr
        _tail_in_parts(
            total, row, n, out_ptr, row_scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr,
            M, N, ACTIVATION, PARTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def int8_split_k_kernel(
    part_ptr, y_ptr, row_scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr,
    M, N,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums [SPLIT_K, M, N] and applies the tail, one row and BLOCK_N columns to a program."""
    blocks = tl.cdiv(N, BLOCK_N)
    row = tl.program_id(0) // blocks + tl.arange(0, 1)
    column = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (column < N)[None, :]
    offset = row.to(tl.int64)[:, None] * N + column[None, :]
    total = tl.zeros((1, BLOCK_N), tl.int32)
    for part in tl.static_range(SPLIT_K):
        total += tl.load(part_ptr + tl.cast(part, tl.int64) * M * N + offset, mask=mask, other=0)
    _tail(
        total, row, column, mask, y_ptr, row_scale_ptr, zero_point_ptr, weight_scale_ptr, column_sum_ptr, bias_ptr,
        M, N, ACTIVATION,
    )  # fmt: skip


def _parts(config: tuning.Config, device: torch.device, activation: str) -> int:
    """In how many parts a tile is stored: each costs time (a fifth in all at K = 768 on an H200).

    A GELU needs registers, and so do sums that come from tensor memory, from compute capability 10.0 on. A larger tile
    needs shared memory.
    """
    if activation.startswith("gelu") or capability(device) >= 100:
        return 4
    return max(1, config.block_m * config.block_n >> 14)


def matmul(
    a: Tensor,
    w: Tensor,
    y: Tensor,
    row_scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    weight_scale: Tensor | None = None,
    column_sum: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    config: tuning.Config | None = None,
) -> Tensor:
    """Fills y [M, N] from a [M, K] and w [N, K], both int8, as at the head of this file.

    Without weight_scale y is int32, and the sums themselves are stored.
    """
    a, w = _aligned(a), _aligned(w)
    device, (m, k), n = a.device, a.shape, w.shape[0]
    config = config or tuning.choose("int8_matmul", device, m, n, k)
    tail = (row_scale, zero_point, weight_scale, column_sum, bias)
    splits = config.split_k > 1
    out, out_tail = (y.new_empty((config.split_k, m, n), dtype=torch.int32), (None,) * 5) if splits else (y, tail)
    work = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n) * config.split_k
    programs = min(work, config.persistent * processors(device)) if config.persistent else work
    operands: tuple[Tensor | TensorDescriptor, ...] = (a, w)
    if config.tma:
        blocks = (config.block_m, config.block_n)
        operands = tuple(
            TensorDescriptor(t, list(t.shape), list(t.stride()), [block, config.block_k])
            for t, block in zip((a, w), blocks, strict=True)
        )
    launch(
        int8_matmul_kernel, programs, device,
        *operands, out, *out_tail, m, n, k, a.stride(0), w.stride(0),
        ACTIVATION="none" if splits else activation,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, SPLIT_K=config.split_k,
        TMA=config.tma, PERSISTENT=config.persistent > 0,
        PARTS=_parts(config, device, activation),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits:
        block_n = min(512, triton.next_power_of_2(n))
        launch(
            int8_split_k_kernel, m * triton.cdiv(n, block_n), device, out, y, *tail, m, n,
            ACTIVATION=activation, BLOCK_N=block_n, SPLIT_K=config.split_k,
        )  # fmt: skip
    return y


def _aligned(t: Tensor) -> Tensor:
    """int8 [rows, K] -> the same, zero-filled to K a multiple of 16, at an address that is one: itself where it can."""
    if t.shape[1] % 16 == 0 and t.data_ptr() % 16 == 0:
        return t
    return functional.pad(t, (0, -t.shape[1] % 16)) if t.shape[1] % 16 else t.clone()


def int8_matmul(a: Tensor, w: Tensor) -> Tensor:
    """a int8 or uint8 [M, K], w int8 [N, K], contiguous -> a @ w.T, int32 [M, N], exact while no sum wraps."""
    check_device(a=a, w=w)
    y = a.new_empty((a.shape[0], w.shape[0]), dtype=torch.int32)
    if a.dtype == torch.int8:
        return matmul(a, w, y)
    # uint8 as int8: a - 128, which is a zero point of -128 in every row
    centered = (a ^ 128).view(torch.int8)
    zero_point = a.new_full((a.shape[0],), -128, dtype=torch.int32)
    return matmul(centered, w, y, zero_point=zero_point, column_sum=w.sum(1, dtype=torch.int32))


def int8_pack(weight: Tensor) -> Tensor:
    """weight int8 [N, K] -> int8 [N + ceil(4 * N / Kp), Kp], Kp = K rounded up to 16.

    Rows 0 to N - 1 are the weight, zero-filled, so that every row loads in 16-byte pieces. The rows behind it hold the
    N sums over k as int32, which the zero points are multiplied with.
    """
    check_device(weight=weight)
    n, k = weight.shape
    row = max(16, -(-k // 16) * 16)
    packed = weight.new_zeros((n - (-4 * n // row), row))
    packed[:n, :k] = weight
    _column_sum(packed, n).copy_(weight.sum(1, dtype=torch.int32))
    return packed


def _column_sum(packed: Tensor, n: int) -> Tensor:
    start = n * packed.shape[1]
    return packed.view(-1)[start : start + 4 * n].view(torch.int32)


def int8_scaled_matmul(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    config: tuning.Config | None = None,
) -> Tensor:
    """The linear for rows that are quantized already, by one of the functions of `row_quantize`.

    q int8 [M, K], scale fp32 [M], zero_point int32 [M] or None, packed from `int8_pack`, weight_scale fp32 [N],
    bias [N] -> y [M, N] of `dtype`.
    """
    check_device(q=q, scale=scale, zero_point=zero_point, packed=packed, weight_scale=weight_scale, bias=bias)
    m, n, row = q.shape[0], weight_scale.shape[0], packed.shape[1]
    a = q if q.shape[1] == row else _with_padding(q, row)
    y = torch.empty((m, n), dtype=dtype, device=q.device)
    column_sum = None if zero_point is None else _column_sum(packed, n)
    return matmul(a, packed[:n], y, scale, zero_point, weight_scale, column_sum, bias, activation, config)


def int8_linear(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    symmetric: bool,
    bits: int = 8,
) -> Tensor:
    """x [M, K] contiguous fp32/bf16/fp16, packed from `int8_pack`, weight_scale fp32 [N], bias [N] or None.

    Returns y [M, N] of x's dtype: activations quantized per token, product, scales, bias and activation.
    """
    check_device(x=x, packed=packed, weight_scale=weight_scale, bias=bias)
    return int8_scaled_matmul(*quantize_rows(x, symmetric, bits), packed, weight_scale, bias, activation, x.dtype)


def int8_linear_static(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    input_scale: Tensor,
    input_zero_point: Tensor,
    bits: int = 8,
) -> Tensor:
    """`int8_linear` with one given scale fp32 [] and zero point int32 [], in [0, 2**bits - 1], for all of x."""
    check_device(x=x, packed=packed, weight_scale=weight_scale, bias=bias, input_scale=input_scale)
    rows = quantize_rows_static(x, input_scale, input_zero_point, bits)
    return int8_scaled_matmul(*rows, packed, weight_scale, bias, activation, x.dtype)


def _with_padding(q: Tensor, row: int) -> Tensor:
    """q [M, K] with the bytes between its rows, [M, row], as `row_quantize` stores it; a copy where there are none."""
    m = q.shape[0]
    room = q.untyped_storage().nbytes() - q.storage_offset()
    if q.stride(1) == 1 and (m == 1 or q.stride(0) == row) and room >= m * row:
        return q.as_strided((m, row), (row, 1))
    return functional.pad(q, (0, row - q.shape[1]))


def tune(
    m: int, n: int, k: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> dict[tuning.Config, float]:
    """Measures the configurations for one shape on random data and keeps the fastest; see tuning.tune."""
    weight_scale = torch.ones(n, device=device)

    def problem() -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        return *quantize_rows(torch.randn(m, k, device=device), False), int8_pack(weight)

    def run(config: tuning.Config, rows: tuple[Tensor, Tensor, Tensor | None, Tensor]) -> Tensor:
        return int8_scaled_matmul(*rows, weight_scale, None, "none", dtype, config)

    return tuning.tune("int8_matmul", device, m, n, -(-k // 16) * 16, problem, run, n * k)
