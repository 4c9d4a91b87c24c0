"""Rows of an INT8 weight by number, dequantized: the operator int8_embedding. That of 4 bits is in `four_bit`.

The weight is in the form that the linear of its scheme takes, so that an embedding and the output head tied to it are
one tensor. Only the rows asked for are read.
"""

import torch
from torch import Tensor

from pyqkern.backends import Kernels
from pyqkern.ops.checks import check_ids, checked_rows
from pyqkern.ops.int8 import check_packed
from pyqkern.ops.registry import kernels_of, operator


def _fake(ids: Tensor, packed: Tensor, weight_scale: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    check_ids(ids, packed.device, dtype)
    check_packed(kernels_of(packed.device), packed, weight_scale, k, packed.device)
    return packed.new_empty((*ids.shape, k), dtype=dtype)


@operator("int8_embedding(Tensor ids, Tensor packed, Tensor weight_scale, int k, ScalarType dtype) -> Tensor", _fake)
def _embedding(
    kernels: Kernels, ids: Tensor, packed: Tensor, weight_scale: Tensor, k: int, dtype: torch.dtype
) -> Tensor:
    y = _fake(ids, packed, weight_scale, k, dtype)
    n = weight_scale.shape[0]
    rows = checked_rows(ids, n)
    if not y.numel():
        return y
    codes = kernels.int8_rows(packed.contiguous(), n, k, rows)
    scale = weight_scale.index_select(0, rows)
    return kernels.dequantize(codes, (1, rows.numel(), k), scale, None, dtype).view(y.shape)
