"""Rows of a quantized weight by number, dequantized: the operators int8_embedding and embedding_4bit.

The weight is in the form that the linear of its scheme takes, so that an embedding and the output head tied to it are
one tensor. Only the rows asked for are read.
"""

from typing import Any

import torch
from torch import Tensor

from pyqkern import _C
from pyqkern.backends import cpu, reference
from pyqkern.backends.cpu import DTYPE_CODES
from pyqkern.backends.reference.four_bit import CODEBOOKS, NESTED_BLOCKSIZE
from pyqkern.ops.checks import check_float
from pyqkern.ops.four_bit import _kernels, _linear_fake
from pyqkern.ops.int8 import _check_packed
from pyqkern.ops.registry import _kernels_of, _operator


def _rows(ids: Tensor, n: int) -> Tensor:
    """ids, flat and int64, on CPU checked to be rows of the weight. CUDA's own indexing checks there."""
    if ids.is_cpu and ids.numel():
        least, greatest = (int(end) for end in ids.aminmax())
        if least < 0 or greatest >= n:
            raise IndexError(f"ids must be within [0, {n}), got {least if least < 0 else greatest}")
    return ids.reshape(-1).long().contiguous()


def _check_ids(ids: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    check_float("dtype", dtype)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids must be int64 or int32, got {ids.dtype}")
    if ids.device != weight.device:
        raise ValueError(f"ids must be on {weight.device}, where the embedding is, got {ids.device}")


# ---- int8


def _int8_fake(ids: Tensor, weight: Tensor, weight_scale: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    _check_ids(ids, weight, dtype)
    _check_packed(_kernels_of(ids.device), weight, weight_scale.shape[0], k)
    return weight_scale.new_empty((*ids.shape, k), dtype=dtype)


@_operator(
    "int8_embedding(Tensor ids, Tensor weight, Tensor weight_scale, int k, ScalarType dtype) -> Tensor", _int8_fake
)
def _int8(kernels: Any, ids: Tensor, weight: Tensor, weight_scale: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    y = _int8_fake(ids, weight, weight_scale, k, dtype)
    rows = _rows(ids, weight_scale.shape[0])
    if not y.numel():
        return y
    scale = weight_scale.index_select(0, rows)
    if kernels is cpu:
        codes = torch.empty((rows.numel(), k), dtype=torch.int8)
        weight = weight.contiguous()
        _C.int8_gather(weight.data_ptr(), k, rows.data_ptr(), rows.numel(), codes.data_ptr())
    else:
        codes = weight.index_select(0, rows)[:, :k].contiguous()
    return kernels.dequantize(codes, (1, rows.numel(), k), scale, None, dtype).view(y.shape)


# ---- 4-bit


def _4bit_fake(
    ids: Tensor,
    lines: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    _check_ids(ids, lines, dtype)
    row = lines.new_empty((1, k), dtype=torch.float32)
    _linear_fake(row, lines, absmax, nested_absmax, nested_map, offset, None, quant_type, blocksize, n, "auto")
    return lines.new_empty((*ids.shape, k), dtype=dtype)


@_operator(
    "embedding_4bit(Tensor ids, Tensor weight, Tensor absmax, Tensor? nested_absmax, Tensor? nested_map, "
    "Tensor? offset, str quant_type, int blocksize, int n, int k, ScalarType dtype) -> Tensor",
    _4bit_fake,
)
def _4bit(
    kernels: Any,
    ids: Tensor,
    lines: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    nested = (nested_absmax, nested_map, offset)
    y = _4bit_fake(ids, lines, absmax, *nested, quant_type, blocksize, n, k, dtype)
    rows = _rows(ids, n)
    if not y.numel():
        return y
    kernels_4bit = _kernels(kernels)
    lines, absmax = lines.contiguous(), absmax.contiguous()
    if kernels is cpu and cpu.in_panels(n, k, blocksize):
        codes, scales = _gather_panels(lines, absmax, rows, n, k, blocksize)
    else:
        codes, scales = (
            kernels_4bit.unpack_4bit(lines, n, k, blocksize),
            kernels_4bit.unpack_scales(absmax, n, k, blocksize),
        )
        if k % blocksize:  # blocks cross rows
            scales = reference.block_scales(scales, *nested)
            return _dequantize_rows(kernels_4bit, codes, scales, rows, quant_type, blocksize, n, k, dtype).view(y.shape)
        codes = codes.view(n, k // 2).index_select(0, rows)
        scales = scales.view(n, k // blocksize).index_select(0, rows)
    if nested_absmax is not None and nested_map is not None and offset is not None:
        blocks = rows.unsqueeze(1) * (k // blocksize) + torch.arange(k // blocksize, device=rows.device)
        scales = nested_map[scales.long()] * nested_absmax[blocks // NESTED_BLOCKSIZE] + offset
    shape = (rows.numel(), k)
    scales = scales.reshape(-1)
    return kernels_4bit.dequantize_4bit(
        codes.reshape(-1), scales, None, None, None, quant_type, blocksize, shape, dtype
    ).view(y.shape)


def _gather_panels(
    lines: Tensor, absmax: Tensor, rows: Tensor, n: int, k: int, blocksize: int
) -> tuple[Tensor, Tensor]:
    """Codes [rows, k / 2] in flat order and scales [rows, k / blocksize]."""
    codes = torch.empty((rows.numel(), k // 2), dtype=torch.uint8)
    scales = torch.empty((rows.numel(), k // blocksize), dtype=absmax.dtype)
    _C.gather_4bit(
        lines.data_ptr(), absmax.data_ptr(), absmax.element_size(), n, k, blocksize, rows.data_ptr(), rows.numel(),
        codes.data_ptr(), scales.data_ptr(),
    )  # fmt: skip
    return codes, scales


def _dequantize_rows(
    kernels_4bit: Any,
    packed: Tensor,
    absmax: Tensor,
    rows: Tensor,
    quant_type: str,
    blocksize: int,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of a flat weight whose blocks cross rows."""
    if kernels_4bit is not cpu:
        shape = (n, k)
        all_rows = kernels_4bit.dequantize_4bit(packed, absmax, None, None, None, quant_type, blocksize, shape, dtype)
        return all_rows.index_select(0, rows)
    y = torch.empty((rows.numel(), k), dtype=dtype)
    book = CODEBOOKS[quant_type].record
    _C.dequantize_rows_4bit(
        packed.data_ptr(), absmax.data_ptr(), k, blocksize, book.data_ptr(), rows.data_ptr(), rows.numel(),
        y.data_ptr(), DTYPE_CODES[dtype],
    )  # fmt: skip
    return y
