"""`int8_matmul`, the exact integer product."""

import torch
from torch import Tensor

from pyqkern.schemes import check_type


def int8_matmul(a: Tensor, w: Tensor) -> Tensor:
    """The exact integer product a @ w.T, on every ISA and device.

    a: int8 or uint8 [..., M, K], w: int8 [N, K]; every value, -128 and 255 included, any strides, sizes from 0.
    Returns int32 [..., M, N].

    Raises ValueError for shapes, devices, and K past 131071 (int8) or 65793 (uint8), where an int32 sum could wrap;
    TypeError for dtypes.

    >>> import torch, pyqkern
    >>> a = torch.full((1, 70), 255, dtype=torch.uint8)
    >>> w = torch.full((2, 70), -128, dtype=torch.int8)
    >>> pyqkern.int8_matmul(a, w)
    tensor([[-2284800, -2284800]], dtype=torch.int32)
    """
    for name, tensor in (("a", a), ("w", w)):
        check_type(name, tensor, Tensor, "a torch.Tensor")
    return torch.ops.pyqkern.int8_matmul(a, w)
