"""What every backend provides, and what all of them share: the types and the numbers.

A backend is a module with the functions of `Kernels`: `reference` in plain torch, `cpu` in C++, `cuda` in Triton.
`pyqkern.ops.registry` chooses between them. What a backend is given has been checked by `pyqkern.ops`: dtypes, device
and shapes; tensors are contiguous and none of them is empty.

A backend keeps the weights of linears in a form of its own, made by `int8_pack`, `pack_4bit` and `pack_scales`. The
shape of a packed tensor tells its form: two forms of one weight that differ have different shapes, so that a weight
packed for one device is never taken for that of another. Whoever changes the order inside of a form changes its shape.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# (outer, channels, inner): how a contiguous tensor of any shape is seen. Channel c has scale[c] and zero_point[c]. Per
# tensor is (1, 1, numel), per channel on axis 0 of [N, K] is (1, N, K), on axis 1 (N, K, 1).
Sizes = tuple[int, int, int]
Shape = tuple[int, ...]

# The range of each quantized type, [qmin, qmax].
QRANGE = {torch.int8: (-128, 127), torch.uint8: (0, 255)}


def qrange(dtype: torch.dtype, bits: int = 8) -> tuple[int, int]:
    """[qmin, qmax] of codes of 8 bits or less, which are kept one to an element of dtype."""
    qmin, qmax = QRANGE[dtype]
    return qmin >> (8 - bits), qmax >> (8 - bits)


# Bits of the activations' codes in an INT8 linear. Those of 7 bits are asymmetric, in [0, 127].
ACTIVATION_BITS = (8, 7)


# The activations that the linear's tail can apply; the position is the code that C++ takes.
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh")

# The activations of a decoder's feed-forward; the position is the code that C++ takes.
DECODER_ACTIVATIONS = ("silu", "relu", "gelu", "gelu_tanh")

# The activations that the gate of experts can apply.
GATE_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")

# The recurrent cells and how many gates each has; the position is the code that C++ takes.
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}

# The largest in_features for which 255 * 127 * K < 2**31, weights being in [-127, 127]: beyond it an int32 could wrap.
INT8_LINEAR_MAX_K = 66311

# The largest K for which 128 * 128 * K (int8) or 255 * 128 * K (uint8) is below 2**31: weights of -128 are allowed.
INT8_MATMUL_MAX_K = {torch.int8: 131071, torch.uint8: 65793}

# The formats of 4-bit weights, and those among them that bitsandbytes has and quantize_4bit makes.
QUANT_TYPES = ("nf4", "fp4", "int4")
BITSANDBYTES_TYPES = ("nf4", "fp4")

# How many absmax share one scale where they are quantized themselves.
NESTED_BLOCKSIZE = 256

# The rules of optimizers; the position is the code that C++ takes.
OPTIMIZERS = ("adam", "momentum", "lion")

# How many codes of an optimizer's moment share one absmax, and what scaled gradients must be below: the squares of a
# block of larger ones could not be added.
STATE_BLOCK = 256
LARGEST_GRADIENT = 2.0**59

FLT_MIN = 2.0**-126
PANEL = 16  # output channels that stand beside each other in the CPU's forms
STRIP = 64  # channels, of which each k / blocksize has its scales beside each other: csrc's kernels.h


class Weight8bit(NamedTuple):
    """An INT8 weight [N, K] in this backend's form, and its scales, fp32 [N]."""

    packed: Tensor
    scale: Tensor


class Weight4bit(NamedTuple):
    """A weight of 4 bits, [n, k] where it is that of a linear.

    packed: uint8, two codes to a byte. absmax: the scales of blocks of `blocksize` elements of the flattened weight,
    fp32 [blocks]; or, doubly quantized, uint8 [blocks], which stand for

        nested_map[absmax[i]] * nested_absmax[i // 256] + nested_offset

    with nested_absmax fp32 [ceil(blocks / 256)], nested_map fp32 [256] and nested_offset fp32 []. packed and absmax are
    flat, in row-major order, or in the form that `Kernels.pack_4bit` and `Kernels.pack_scales` make for a linear.

    A tuple and no dataclass: every call of a linear makes one, which takes a third of the time so, and torch.compile
    and pytree know tuples. The order is that of the operators' arguments.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_map: Tensor | None
    nested_offset: Tensor | None
    quant_type: str
    blocksize: int
    shape: Sequence[int]


class StepNumbers(NamedTuple):
    """The numbers of one step of an optimizer, each rounded to fp32; what stands for what: csrc's kernels.h, Step."""

    scale: float
    l2: float
    decay: float
    keep1: float
    add1: float
    keep2: float
    add2: float
    root: float
    eps: float
    size: float


class DecoderForm(NamedTuple):
    """All of a decoder layer but its tensors: `pyqkern.ops.decoder` says what each means."""

    heads: int
    kv_heads: int
    head_size: int
    intermediate_size: int
    scaling: float
    eps: float
    activation: str
    gated: bool
    quant_type: str = "int8"
    symmetric: bool = False
    compute: str = "auto"
    blocksize: int = 0
    norm_offset: float = 0.0
    interleaved: bool = False
    window: int = 0

    @property
    def is_int8(self) -> bool:
        return self.quant_type.startswith("int8")

    def linears(self, count: int, hidden: int) -> list[tuple[str, int, int]]:
        """Name and sizes [n, k] of each of `count` linears, in their order."""
        query, key, wide = self.heads * self.head_size, self.kv_heads * self.head_size, self.intermediate_size
        one = [("query, key and value", query + 2 * key, hidden)]
        three = [("query", query, hidden), ("key", key, hidden), ("value", key, hidden)]
        up = [("gate and up", 2 * wide, hidden)] if self.gated else [("up", wide, hidden)]
        ways = [(one, up), (three, up)]
        if self.gated:
            two = [("gate", wide, hidden), ("up", wide, hidden)]
            ways += [(one, two), (three, two)]
        for inputs, first in ways:
            if len(inputs) + len(first) + 2 == count:
                return [*inputs, ("output", hidden, query), *first, ("down", hidden, wide)]
        wanted = "4 to 7" if self.gated else "4 or 6"
        raise ValueError(f"weights must be {wanted} where gated is {self.gated}, got {count}")


class Kernels(Protocol):
    """The functions of a backend. Formulas and roundings: `pyqkern.backends.reference`."""

    # ---- affine; x and q are contiguous, of any shape

    def min_max(self, x: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
        """The least and greatest of each channel, fp32 [channels]; NaN in both where one is NaN or infinite."""

    def quantize(
        self,
        x: Tensor,
        sizes: Sizes,
        scale: Tensor,
        zero_point: Tensor | None,
        dtype: torch.dtype,
        fused: bool,
        bits: int,
    ) -> Tensor:
        """Codes of x in dtype, int8 or uint8. fused: product and sum are one fma. bits: 8 or 4."""

    def dequantize(
        self, q: Tensor, sizes: Sizes, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """scale * (q - zero_point), rounded once to dtype."""

    # ---- INT8

    def int8_matmul(self, a: Tensor, w: Tensor) -> Tensor:
        """a int8 or uint8 [M, K], w int8 [N, K] -> a @ w.T, int32 [M, N]."""

    def splits(self) -> bool:
        """Whether many rows of 8 bits are multiplied faster with a weight packed with split=True."""

    def packed_shape(self, n: int, k: int, split: bool = False) -> Shape:
        """The shape of int8_pack's result."""

    def int8_pack(self, weight: Tensor, split: bool = False) -> Tensor:
        """weight int8 [N, K] in the form that this backend's int8_linear takes; split: with what `splits` asks for.
        Every function takes both forms."""

    def int8_unpack(self, packed: Tensor, n: int, k: int) -> Tensor:
        """The weight [n, k] out of int8_pack."""

    def int8_rows(self, packed: Tensor, n: int, k: int, rows: Tensor) -> Tensor:
        """weight[rows] int8 [M, k]; rows int64 [M] within [0, n)."""

    def int8_slice(self, packed: Tensor, n: int, k: int, begin: int, end: int) -> Tensor:
        """int8_pack of weight[begin:end]; begin and end multiples of PANEL."""

    def int8_linear(
        self,
        x: Tensor,
        packed: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        activation: str,
        symmetric: bool,
        bits: int,
    ) -> Tensor:
        """x [..., K] -> [..., N] of x's dtype; weight_scale fp32 [N], bias floats [N]. bits: of x's codes, 8 or 7."""

    def int8_linear_static(
        self,
        x: Tensor,
        packed: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        activation: str,
        input_scale: Tensor,
        input_zero_point: Tensor,
        bits: int,
    ) -> Tensor:
        """int8_linear with one scale, fp32, and one zero point, int32, for all of x."""

    def int8_linear_weight_only(self, x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K], not quantized -> [..., N] of x's dtype; weight_scale fp32 [N], bias floats [N]."""

    def int8_grad_input(self, grad: Tensor, packed: Tensor, weight_scale: Tensor, k: int) -> Tensor:
        """grad [..., N] -> grad @ the dequantized weight, [..., k] of grad's dtype."""

    # ---- 4 bits; the packed and absmax of a linear's weight are in this backend's form

    def packed_shapes_4bit(self, n: int, k: int, blocksize: int) -> tuple[Shape, Shape]:
        """The shapes of what pack_4bit and pack_scales return."""

    def pack_4bit(self, packed: Tensor, n: int, k: int, blocksize: int) -> Tensor:
        """Flat packed codes [(n * k + 1) // 2] in the form that linear_4bit takes."""

    def unpack_4bit(self, packed: Tensor, n: int, k: int, blocksize: int) -> Tensor:
        """The flat packed codes out of pack_4bit."""

    def pack_scales(self, absmax: Tensor, n: int, k: int, blocksize: int) -> Tensor:
        """Flat scales [ceil(n * k / blocksize)], fp32 or uint8, in the order that belongs to pack_4bit."""

    def unpack_scales(self, absmax: Tensor, n: int, k: int, blocksize: int) -> Tensor:
        """The flat scales out of pack_scales."""

    def quantize_4bit(self, x: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
        """x of any shape -> flat packed codes and absmax, "nf4" or "fp4"; an absmax is not finite where x is not."""

    def dequantize_4bit(self, weight: Weight4bit, dtype: torch.dtype) -> Tensor:
        """A flat weight -> its values in dtype, [*weight.shape]."""

    def linear_4bit(self, x: Tensor, weight: Weight4bit, bias: Tensor | None, compute: str) -> Tensor:
        """x [..., K] -> [..., N] of x's dtype."""

    def grad_input_4bit(self, grad: Tensor, weight: Weight4bit) -> Tensor:
        """grad [..., N] -> grad @ the dequantized weight, [..., K] of grad's dtype."""

    def rows_4bit(self, weight: Weight4bit, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """weight[rows] dequantized, [M, k]; rows int64 [M] within [0, n)."""

    def slice_4bit(self, weight: Weight4bit, begin: int, end: int) -> Weight4bit:
        """weight[begin:end], [end - begin, k]: begin and end multiples of STRIP, its rows whole blocks and, doubly
        quantized, the slice whole groups of NESTED_BLOCKSIZE blocks.
        """

    # ---- experts

    def gate(self, h: Tensor, activation: str) -> Tensor:
        """h fp32 [M, 2 * N] -> activation(h[:, :N]) * h[:, N:], fp32 [M, N]; one of GATE_ACTIVATIONS."""

    # ---- recurrent layers

    def recurrent(
        self,
        x: Tensor,
        batch_sizes: Tensor,
        weights: Sequence[Weight8bit | Weight4bit],
        biases: Sequence[Tensor],
        h: Tensor,
        c: Tensor | None,
        cell: str,
        reverse: bool,
        symmetric: bool,
        bits: int,
        compute: str,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One direction of a layer, all in fp32: y [rows, P], and h and c after the last step of each sequence.

        x [rows, K]: the rows of a step behind those of the one before, batch_sizes[t] of them, int64 on the CPU,
        descending: a sequence keeps its row. weights: of the input, of the hidden state and, for an LSTM that projects
        it, of the projection; biases: of the first two, or none. h [batch, P]; c [batch, H] for an LSTM.
        cell: one of GATES, whose order is torch's. INT8: symmetric and bits as for int8_linear; 4 bits: compute.
        """

    # ---- training

    def fake_quantize(
        self, x: Tensor, size: int, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int
    ) -> Tensor:
        """x quantized to codes in [qmin, qmax] and dequantized, in its dtype: rows of `size` elements; scale fp32 and
        zero_point int32 (None: 0) of each row, or one of all.
        """

    def fake_quantize_backward(
        self, grad: Tensor, x: Tensor, size: int, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients to x, of its dtype, which is grad's too, and of each row to the scale and the offset, fp32."""

    # ---- optimizers

    def square_sum(self, tensors: Sequence[Tensor], scale: float) -> Tensor:
        """The sum of (scale * x)**2 of all elements, fp64 []; NaN where a scale * x is not below LARGEST_GRADIENT."""

    def optimizer_step(
        self,
        optimizer: str,
        numbers: StepNumbers,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        state1: Sequence[Tensor],
        state2: Sequence[Tensor],
        absmax1: Sequence[Tensor],
        absmax2: Sequence[Tensor],
    ) -> None:
        """One step of one of OPTIMIZERS, in place. Moments are uint8 codes with absmax fp32 [ceil(n / STATE_BLOCK)], or
        fp32 and without absmax; state2 is empty but for "adam".
        """
