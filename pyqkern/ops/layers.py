"""What the operators of whole layers, encoder_layer and decoder_layer, check alike."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyqkern.backends import INT8_LINEAR_MAX_K, Weight4bit, cpu
from pyqkern.ops.checks import FLOATS
from pyqkern.ops.four_bit import check_weight


def check_vector(name: str, tensor: Tensor, n: int, is_right: bool, wanted: str) -> None:
    """A vector [n] of the wanted dtype."""
    message = f"{name} must be {wanted} [{n}], got {tensor.dtype} {tuple(tensor.shape)}"
    if not is_right:
        raise TypeError(message)
    if tensor.shape != (n,):
        raise ValueError(message)


def check_linear(
    name: str, packed: Tensor, scale: Tensor, n: int, k: int, quant_type: str, blocksize: int, nested: Sequence[Tensor]
) -> None:
    """The weight [n, k] of a linear and its scales; quant_type "int8..." or one of QUANT_TYPES."""
    if quant_type.startswith("int8"):
        return _check_int8(name, packed, scale, n, k)
    return _check_4bit(
        name, Weight4bit._make((packed, scale, *(tuple(nested) or (None, None, None)), quant_type, blocksize, (n, k)))
    )


def _check_int8(name: str, packed: Tensor, scale: Tensor, n: int, k: int) -> None:
    if k > INT8_LINEAR_MAX_K:
        raise ValueError(f"in_features must be at most {INT8_LINEAR_MAX_K}, got {k} in {name}")
    if packed.dtype is not torch.int8:
        raise TypeError(f"the weight of {name} must be int8, got {packed.dtype}")
    if packed.shape not in (cpu.packed_shape(n, k), cpu.packed_shape(n, k, True)):
        raise ValueError(
            f"the weight of {name} must be what int8_pack makes of [{n}, {k}], got shape {tuple(packed.shape)}"
        )
    check_vector(f"the scale of {name}", scale, n, scale.dtype is torch.float32, "float32")


def _check_4bit(name: str, weight: Weight4bit) -> None:
    (n, k), blocksize = weight.shape, weight.blocksize
    if not cpu.in_panels(n, k, blocksize):
        raise ValueError(f"the rows of {name} must be whole blocks of {blocksize}, and 16 or more, got [{n}, {k}]")
    try:
        check_weight(weight, cpu.packed_shapes_4bit(n, k, blocksize), weight.packed.device)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def readable(mask: Tensor | None) -> Tensor | None:
    """A mask or a bias with its keys beside each other, bool or fp32."""
    if mask is not None and mask.dim() and mask.stride(-1) != 1:
        mask = mask.contiguous()
    return mask.float() if mask is not None and mask.dtype in (torch.bfloat16, torch.float16) else mask


def check_added(
    name: str, mask: Tensor | None, batch: int, heads: int, length: int, keys: Sequence[int], may_be_bool: bool = True
) -> None:
    """A mask or a position bias of so many queries, whose last dimension is one of `keys`."""
    if mask is None:
        return
    allowed = ((1, batch), (1, heads), (1, length), keys)
    if mask.dim() != 4 or any(size not in sizes for size, sizes in zip(mask.shape, allowed, strict=True)):
        way = "; give the model its usual mask, [batch, length] with 1 for tokens and 0 for padding"
        wanted = " or ".join(str(size) for size in dict.fromkeys(keys))
        raise ValueError(
            f"{name} must be [{batch} or 1, {heads} or 1, {length} or 1, {wanted}], got {tuple(mask.shape)}"
            + way * (name == "attention_mask")
        )
    if mask.dtype not in FLOATS and not (may_be_bool and mask.dtype is torch.bool):
        raise TypeError(f"{name} must be {'bool or ' * may_be_bool}a float added to the scores, got {mask.dtype}")
    if not mask.is_cpu:
        raise ValueError(f"{name} must be on the CPU, where x is, got {mask.device}")
