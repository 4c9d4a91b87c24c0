"""NF4 and FP4: `quantize_4bit` and `dequantize_4bit`, the numbers and the format of bitsandbytes.

A tensor is cut into blocks of `blocksize` consecutive elements of its row-major order; a block is divided by its
absmax, and each quotient becomes the index of the nearest of sixteen values (at a midpoint the lower one). Two codes to
a byte:

    packed[i] = code[2 * i] << 4 | code[2 * i + 1]

With double_quant the absmax are themselves quantized to 8 bits: their mean is taken off, and blocks of 256 of them are
coded by the signed dynamic map (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021).
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pyqkern.backends import BITSANDBYTES_TYPES, NESTED_BLOCKSIZE, Weight4bit
from pyqkern.ops import four_bit as ops_four_bit
from pyqkern.ops.checks import FLOATS, check_float, check_shape
from pyqkern.schemes import check_type


@dataclass(frozen=True, eq=False)
class Quantized4bit:
    """A tensor in 4 bits.

    packed: uint8, (numel + 1) // 2 elements of any shape. absmax: fp32 [ceil(numel / blocksize)], or, doubly quantized,
    uint8 with nested_absmax fp32 [ceil(absmax.numel() / 256)], nested_map fp32 [256] and nested_offset fp32 []:
    absmax = nested_map[code] * nested_absmax[i // 256] + nested_offset. dtype and shape are those of the tensor.

    Raises ValueError where these do not fit together, TypeError for their dtypes.
    """

    packed: Tensor
    absmax: Tensor
    quant_type: str
    blocksize: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    nested_absmax: Tensor | None = None
    nested_map: Tensor | None = None
    nested_offset: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("packed", "absmax"):
            check_type(name, getattr(self, name), Tensor, "a torch.Tensor")
        for name, nested in zip(("nested_absmax", "nested_map", "nested_offset"), self.nested, strict=True):
            check_type(name, nested, (Tensor, type(None)), "None or a torch.Tensor")
        check_shape(self.shape)
        ops_four_bit.check_format(self.quant_type, self.blocksize, BITSANDBYTES_TYPES)
        if self.dtype not in FLOATS:
            raise TypeError(f"dtype must be float32, bfloat16 or float16, got {self.dtype}")
        numel = math.prod(self.shape)
        if self.packed.dtype is not torch.uint8:
            raise TypeError(f"packed must be torch.uint8, got {self.packed.dtype}; view other storage dtypes as uint8")
        if self.packed.numel() != (numel + 1) // 2:
            raise ValueError(
                f"packed must be torch.uint8 of {(numel + 1) // 2} elements for shape {tuple(self.shape)}, "
                f"got {tuple(self.packed.shape)}"
            )
        shapes = ops_four_bit.flat_shapes(self.shape, self.blocksize)
        ops_four_bit.check_weight(self.weight, shapes, self.packed.device)

    @property
    def weight(self) -> Weight4bit:
        """The tensors and their format as one value, as operators take it."""
        return Weight4bit(
            self.packed.reshape(-1), self.absmax, *self.nested, self.quant_type, self.blocksize, self.shape
        )

    @property
    def nested(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """nested_absmax, nested_map and nested_offset: all of them None where absmax is fp32."""
        return self.nested_absmax, self.nested_map, self.nested_offset


def quantize_4bit(
    w: Tensor, quant_type: str = "nf4", *, blocksize: int = 64, double_quant: bool = False
) -> Quantized4bit:
    """w in 4 bits. w: fp32, bf16 or fp16, any shape and strides. quant_type: "nf4" or "fp4".

    blocksize: 32, 64, 128, 256, 512, 1024, 2048 or 4096. double_quant: the absmax in 8 bits too.

    Raises ValueError for other values and where w holds NaN or an infinity, TypeError for other dtypes.

    >>> import torch, pyqkern
    >>> q = pyqkern.quantize_4bit(torch.linspace(-1, 1, 64).view(8, 8))
    >>> q.packed.shape, q.absmax
    (torch.Size([32, 1]), tensor([1.]))
    """
    check_type("w", w, Tensor, "a torch.Tensor")
    check_float("w", w.dtype)
    ops_four_bit.check_format(quant_type, blocksize, BITSANDBYTES_TYPES)
    check_type("double_quant", double_quant, bool, "a bool")
    packed, absmax = torch.ops.pyqkern.quantize_4bit(w.detach(), quant_type, blocksize)
    nested: tuple[Tensor, ...] = ()
    if double_quant and absmax.numel():
        absmax, *rest = quantize_absmax(absmax)
        nested = tuple(rest)
    return Quantized4bit(packed.unsqueeze(1), absmax, quant_type, blocksize, w.dtype, tuple(w.shape), *nested)


def dequantize_4bit(q: Quantized4bit, dtype: torch.dtype | None = None) -> Tensor:
    """value[code] * absmax in fp32, rounded once to dtype (default: that of the tensor); contiguous, of q.shape.

    Raises TypeError for a q that is no Quantized4bit and for dtypes other than float32, bfloat16 and float16.

    >>> import torch, pyqkern
    >>> q = pyqkern.quantize_4bit(torch.tensor([2.0, -1.0, 0.0, 0.9]))
    >>> pyqkern.dequantize_4bit(q)
    tensor([ 2.0000, -1.0501,  0.0000,  0.8814])
    """
    check_type("q", q, Quantized4bit, "a Quantized4bit")
    dtype = q.dtype if dtype is None else dtype
    check_float("dtype", dtype)
    return ops_four_bit.dequantize_4bit(q.weight, dtype)


# ---- double quantization: one absmax per 64 weights, so plain torch will do


@cache
def dynamic_map() -> Tensor:
    """The signed dynamic map, 256 ascending fp32 values: sign, a decimal exponent in unary, and a linear fraction.

    For each decade 10^-6 ... 10^0 the interval [0.1, 1] is cut into 2^i equal parts, whose middles are the fractions.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        decade = 10.0 ** (i - 6) * ((ends[:-1] + ends[1:]) / 2.0)
        values += [decade, -decade]
    return torch.cat(values).sort().values


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """absmax fp32 [blocks] -> codes uint8 [blocks], nested_absmax fp32 [blocks / 256], map fp32 [256], offset []."""
    values = dynamic_map().to(absmax.device)
    # On the CPU: a GPU adds in another order.
    offset = absmax.cpu().mean().to(absmax.device)
    centred = absmax - offset
    padded = torch.nn.functional.pad(centred, (0, -centred.numel() % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    nested = padded.abs().amax(1)
    scaled = padded * (1.0 / nested).unsqueeze(1)
    # bitsandbytes looks the code up by the position among 65536 points of [-1, 1]; at times that is not the nearest.
    point = ((scaled + 1) * 32767.5 + 0.5).floor().clamp(0, 65535) / 32767.5 - 1
    codes = torch.bucketize(point, (values[:-1] + values[1:]) / 2)
    codes = torch.where(nested.unsqueeze(1) > 0, codes, 0).view(-1)[: absmax.numel()]
    return codes.to(torch.uint8), nested, values.clone(), offset
