"""The quantization schemes: one frozen dataclass each, options as fields, found by name.

A scheme is a description. Data that quantizing needs beside it, the ranges of activations, are an argument of
`replace_linear` and `QLinear.from_linear`. What differs between schemes is asked of the scheme (`bits`, `needs_ranges`,
`embeds`, `max_in_features`), never of its name.

A new scheme is a dataclass and a name here, and a subclass of `pyqkern.nn.linear.QLinear` that says `scheme=` it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

Kinds = type | tuple[type, ...]


def check_type(name: str, value: object, kinds: Kinds, wanted: str) -> None:
    """TypeError unless the value is of one of these types; a bool is no number."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")


BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
COMPUTE = ("auto", "fp32", "bf16", "int8")


@dataclass(frozen=True)
class Range:
    """lo and hi of the input of one linear: fp32 on the CPU, shape [] or, per channel, [in_features]."""

    lo: Tensor
    hi: Tensor

    @property
    def absmax(self) -> Tensor:
        return torch.maximum(-self.lo, self.hi)


@dataclass(frozen=True)
class Scheme:
    """How a linear is quantized.

    name: what summaries, files and error messages call it. bits: of a stored weight. needs_ranges: whether quantizing
    takes the ranges of activations from `calibrate`. embeds: whether the table of an embedding can be quantized so.
    recurs: whether a recurrent layer can be. max_in_features: the widest linear, None without a limit.
    """

    name: ClassVar[str]
    bits: ClassVar[int]
    needs_ranges: ClassVar[bool] = False
    embeds: ClassVar[bool] = True
    recurs: ClassVar[bool] = False
    max_in_features: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        """Raises TypeError for options of another type than their default, ValueError for values."""
        for one in fields(self):
            wanted = type(one.default)
            kinds = (float, int) if wanted is float else wanted
            check_type(f"{one.name} of {self.name}", getattr(self, one.name), kinds, wanted.__name__)

    def carried_ranges(self) -> Mapping[str, Range] | None:
        """The ranges that were handed over with the scheme, for those that can carry them: see Int8Static."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: the name, and the options that are not the default."""
        default = SCHEMES[self.name]
        options = {one.name: getattr(self, one.name) for one in fields(self)}
        return {"name": self.name} | {key: value for key, value in options.items() if value != getattr(default, key)}

    @staticmethod
    def from_dict(data: "str | Scheme | Mapping[str, Any]") -> "Scheme":
        """The inverse of to_dict; also takes what `get_scheme` takes. Raises ValueError naming an unknown option."""
        if not isinstance(data, Mapping):
            return get_scheme(data)
        options = dict(data)
        default = get_scheme(options.pop("name", None))
        known = [one.name for one in fields(default)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ValueError(f"options of the scheme {default.name!r} must be among {known}, got {unknown[0]!r}")
        return replace(default, **options)


def check_ranges(ranges: Mapping[str, Range] | None) -> None:
    if ranges is not None:
        check_type("ranges", ranges, Mapping, "a mapping of names to Range, as calibrate returns it")
        for name, one in ranges.items():
            check_type(f"ranges[{name!r}]", one, Range, "a Range, as calibrate returns it")


def ranges_for(scheme: Scheme, ranges: Mapping[str, Range] | None) -> Mapping[str, Range] | None:
    """The ranges to quantize with: those given, or else those that the scheme carries; None for a scheme without.

    Raises ValueError for a scheme that needs ranges and has none, and for ranges given to a scheme that takes none;
    TypeError for other ranges.
    """
    found = ranges if ranges is not None else scheme.carried_ranges()
    check_ranges(found)
    if scheme.needs_ranges and found is None:
        raise ValueError(
            f"{scheme.name} needs the activations' ranges; use "
            f'replace_linear(model, "{scheme.name}", ranges=pyqkern.calibrate(model, batches))'
        )
    if not scheme.needs_ranges and found is not None:
        raise ValueError(f"ranges must be None for {scheme.name}, which takes the range of activations in each call")
    return found


def range_of(ranges: Mapping[str, Range] | None, names: Sequence[str]) -> Mapping[str, Range] | None:
    """The range of the one linear of these names, as `QLinear.from_linear` takes it: under the name ""."""
    return None if ranges is None else {"": next(ranges[name] for name in names if name in ranges)}


class _Int8(Scheme):
    """What the schemes of 8-bit weights have in common. An int32 sum holds in_features products of u8 and s8."""

    bits = 8
    max_in_features = (2**31 - 1) // (255 * 127)


def _check_activation_bits(bits: int) -> None:
    if bits not in (8, 7):
        raise ValueError(f"activation_bits must be 8 or 7, got {bits!r}")


@dataclass(frozen=True)
class Int8(_Int8):
    """INT8 weights, one scale per output channel; INT8 activations, quantized per token inside the operator.

    symmetric: activations as int8 around zero instead of uint8 with a zero point. A little less exact (a row's range
    has to be centred on zero: GELU's output has next to nothing below it), and no faster.
    clip_weights: each output channel's range is cut where its squared error is least, instead of at its absmax.
    activation_bits: 8, or 7, the scheme "int8-a7": activations in [0, 127], which CPUs with AVX2 and without VNNI
    multiply faster, as exactly; their rounding is twice as coarse, and with VNNI or on CUDA they are no faster.

    >>> import torch, pyqkern
    >>> pyqkern.replace_linear(torch.nn.Linear(64, 32), pyqkern.Int8(symmetric=True)).scheme
    Int8(symmetric=True, clip_weights=False, activation_bits=8)
    """

    name: ClassVar[str] = "int8"
    recurs: ClassVar[bool] = True
    symmetric: bool = False
    clip_weights: bool = False
    activation_bits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_activation_bits(self.activation_bits)
        if self.activation_bits == 7:
            if self.symmetric:
                raise ValueError("symmetric must be False for activation_bits=7, got True; use activation_bits=8")
            object.__setattr__(self, "name", "int8-a7")


@dataclass(frozen=True)
class Int8Static(_Int8):
    """INT8 weights as in "int8"; activations with one scale and zero point per linear, from `pyqkern.calibrate`.

    ranges: what `calibrate` returned, per tensor, so that `replace_linear(model, Int8Static(ranges))` is
    `replace_linear(model, "int8-static", ranges=ranges)`. It is carried, no field: it is neither compared, printed nor
    saved, and layers drop it. Without ranges a layer can be made empty and loaded into, not quantized.
    A linear that calibration did not reach stays in float. activation_bits: as for Int8.

    >>> import torch, pyqkern
    >>> linear = torch.nn.Linear(64, 32)
    >>> ranges = pyqkern.calibrate(linear, [torch.randn(8, 64)], progress=False)
    >>> pyqkern.replace_linear(linear, pyqkern.Int8Static(ranges)).scheme
    Int8Static(clip_weights=False, activation_bits=8)
    """

    name: ClassVar[str] = "int8-static"
    needs_ranges: ClassVar[bool] = True
    embeds: ClassVar[bool] = False
    ranges: InitVar[Mapping[str, Range] | None] = None
    clip_weights: bool = False
    activation_bits: int = 8

    def __post_init__(self, ranges: Mapping[str, Range] | None) -> None:
        super().__post_init__()
        check_ranges(ranges)
        _check_activation_bits(self.activation_bits)
        if ranges is not None:
            object.__setattr__(self, "ranges", ranges)

    def carried_ranges(self) -> Mapping[str, Range] | None:
        ranges: Mapping[str, Range] | None = vars(self).get("ranges")
        return ranges


@dataclass(frozen=True)
class Int8WeightOnly(_Int8):
    """INT8 weights as in "int8"; activations are not quantized, and sums are in fp32. A token is faster than in fp32,
    since a quarter of the bytes is read; many tokens take as long.

    >>> import torch, pyqkern
    >>> pyqkern.replace_linear(torch.nn.Linear(64, 32), "int8-weight-only").scheme
    Int8WeightOnly(clip_weights=False)
    """

    name: ClassVar[str] = "int8-weight-only"
    clip_weights: bool = False


@dataclass(frozen=True)
class Int8Outlier(_Int8):
    """As "int8", except that input columns with a magnitude above the threshold go through float (LLM.int8).

    A column counts for the whole batch, so here, unlike in the other schemes, a row's result depends on its batch.

    >>> import torch, pyqkern
    >>> pyqkern.replace_linear(torch.nn.Linear(64, 32), pyqkern.Int8Outlier(threshold=3.0)).scheme.threshold
    3.0
    """

    name: ClassVar[str] = "int8-outlier"
    embeds: ClassVar[bool] = False
    threshold: float = 6.0
    symmetric: bool = False
    clip_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.threshold > 0:
            raise ValueError(f"threshold must be > 0, got {self.threshold}; the default is 6.0")


class _FourBit(Scheme):
    """What NF4 and FP4 have in common: their options are checked when they are made."""

    bits = 4
    recurs = True
    blocksize: int
    compute: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {self.blocksize}")
        _check_compute(self.compute)


def _check_compute(compute: str) -> None:
    if compute not in COMPUTE:
        raise ValueError(f"compute must be one of {', '.join(COMPUTE)}, got {compute!r}")


@dataclass(frozen=True)
class NF4(_FourBit):
    """NF4 weights in blocks of the flattened weight, as bitsandbytes has them; any shape.

    blocksize: 32, 64, ... 4096. double_quant: the blocks' absmax in 8 bits too, 0.516 bytes a weight instead of 0.563.
    compute: "fp32" multiplies with the dequantized weight; "bf16" does so too, and lets CUDA round both sides to bf16
    from 3 rows on; "int8" quantizes the activations per token (symmetric) and rounds the codebook to integers, an error
    far below that of 4-bit weights, and multiplies integers; "auto" is "int8": measured, the fastest for any number of
    rows on every ISA. A row that is no whole number of blocks, and a layer of less than 16 out_features, is computed in
    fp32.

    >>> import torch, pyqkern
    >>> pyqkern.replace_linear(torch.nn.Linear(64, 32), pyqkern.NF4(blocksize=32, double_quant=True)).scheme
    NF4(blocksize=32, double_quant=True, compute='auto')
    """

    name: ClassVar[str] = "nf4"
    blocksize: int = 64
    double_quant: bool = False
    compute: str = "auto"


@dataclass(frozen=True)
class FP4(_FourBit):
    """FP4 weights: as NF4, with the sixteen values of a float of two exponent bits and one mantissa bit.

    >>> import torch, pyqkern
    >>> pyqkern.replace_linear(torch.nn.Linear(64, 32), "fp4").scheme
    FP4(blocksize=64, double_quant=False, compute='auto')
    """

    name: ClassVar[str] = "fp4"
    blocksize: int = 64
    double_quant: bool = False
    compute: str = "auto"


@dataclass(frozen=True)
class Int4(Scheme):
    """Uniform int4 weights in [-7, 7], symmetric, one scale per group_size in_features; compute as for NF4.

    group_size: 32, 64 or 128, and a divisor of in_features. With compute="int8" the products are exact integers.

    >>> import torch, pyqkern
    >>> pyqkern.replace_linear(torch.nn.Linear(64, 32), pyqkern.Int4(group_size=32)).scheme
    Int4(group_size=32, compute='auto')
    """

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4
    recurs: ClassVar[bool] = True
    double_quant: ClassVar[bool] = False
    group_size: int = 64
    compute: str = "auto"

    @property
    def blocksize(self) -> int:
        """The group size, under the name that NF4 and FP4 have for it."""
        return self.group_size

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size not in (32, 64, 128):
            raise ValueError(f"group_size must be 32, 64 or 128, got {self.group_size}")
        _check_compute(self.compute)


@dataclass(frozen=True)
class Float16(Scheme):
    """FP16 weights, dequantized in each call; x and the product stay in x's dtype. Beyond +-65504 they saturate.

    What torch's quantize_dynamic does with dtype=torch.float16: for memory, not for speed. Recurrent layers are then
    computed by torch's own, of which a result may depend on its batch, and which torch.compile does not trace.

    >>> import torch, pyqkern
    >>> pyqkern.replace_linear(torch.nn.Linear(64, 32), "float16").scheme
    Float16()
    """

    name: ClassVar[str] = "float16"
    bits: ClassVar[int] = 16
    embeds: ClassVar[bool] = False
    recurs: ClassVar[bool] = True


_ALL = (Int8(), Int8(activation_bits=7), Int8Static(), Int8WeightOnly(), Int8Outlier(), NF4(), FP4(), Int4(), Float16())
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _ALL}


def get_scheme(scheme: str | Scheme) -> Scheme:
    """The scheme of that name, or the scheme object itself. Raises ValueError or TypeError for anything else."""
    if isinstance(scheme, Scheme):
        return scheme
    names = ", ".join(repr(name) for name in SCHEMES)
    if not isinstance(scheme, str):
        raise TypeError(f"scheme must be a name ({names}) or a scheme object, got {type(scheme).__name__}")
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {names}, got {scheme!r}")
    return SCHEMES[scheme]
