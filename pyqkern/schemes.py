"""The quantization schemes: one frozen dataclass each, options as fields, found by name.

A new scheme is a dataclass and a name here, and a subclass of `pyqkern.nn.linear.QLinear` that says `scheme=` it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pyqkern.calibrate import Range


BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
COMPUTE = ("auto", "fp32", "bf16", "int8")


@dataclass(frozen=True)
class Scheme:
    """How a linear is quantized. `name` is what summaries and error messages call it."""

    name: ClassVar[str]

    def reason_to_keep(self, names: Sequence[str]) -> str | None:
        """Why this scheme cannot quantize the linear of these names, which then stays in float; None where it can."""
        return None

    def for_layer(self, names: Sequence[str]) -> "Scheme":
        """The scheme of the one linear of these names."""
        return self


@dataclass(frozen=True)
class Int8(Scheme):
    """INT8 weights, one scale per output channel; INT8 activations, quantized per token inside the operator.

    symmetric: activations as int8 around zero instead of uint8 with a zero point. A little less exact (a row's range
    has to be centred on zero: GELU's output has next to nothing below it), and no faster.
    clip_weights: each output channel's range is cut where its squared error is least, instead of at its absmax.
    """

    name: ClassVar[str] = "int8"
    symmetric: bool = False
    clip_weights: bool = False


@dataclass(frozen=True)
class Int8Static(Scheme):
    """INT8 weights as in "int8"; activations with one scale and zero point per linear, from `pyqkern.calibrate`.

    ranges: what `calibrate` returned, per tensor. Without it a layer can be made empty and loaded into, not quantized.
    A linear that calibration did not reach stays in float.
    """

    name: ClassVar[str] = "int8-static"
    ranges: Mapping[str, "Range"] | None = field(default=None, compare=False, repr=False)
    clip_weights: bool = False

    def reason_to_keep(self, names: Sequence[str]) -> str | None:
        if self.ranges is None:
            raise ValueError(
                "int8-static needs the activations' ranges; use "
                "replace_linear(model, Int8Static(pyqkern.calibrate(model, batches)))"
            )
        return None if any(name in self.ranges for name in names) else "not reached in calibration"

    def for_layer(self, names: Sequence[str]) -> "Scheme":
        assert self.ranges is not None
        return replace(self, ranges={"": next(self.ranges[name] for name in names if name in self.ranges)})


@dataclass(frozen=True)
class Int8WeightOnly(Scheme):
    """INT8 weights as in "int8"; activations and arithmetic in float. For memory and exactness, not for speed."""

    name: ClassVar[str] = "int8-weight-only"
    clip_weights: bool = False


@dataclass(frozen=True)
class Int8Outlier(Scheme):
    """As "int8", except that input columns with a magnitude above the threshold go through float (LLM.int8).

    A column counts for the whole batch, so here, unlike in the other schemes, a row's result depends on its batch.
    """

    name: ClassVar[str] = "int8-outlier"
    threshold: float = 6.0
    symmetric: bool = False
    clip_weights: bool = False

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold must be > 0, got {self.threshold}; the default is 6.0")


class _FourBit(Scheme):
    """What NF4 and FP4 have in common: their options are checked when they are made."""

    blocksize: int
    compute: str

    def __post_init__(self) -> None:
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
    compute: "fp32" multiplies with the dequantized weight; "bf16" rounds both sides to bf16 first (from 5 rows on);
    "int8" quantizes the activations per token (symmetric) and rounds the codebook to 1/127, an error far below that of
    4-bit weights, and multiplies integers; "auto" is "int8": measured, the fastest for any number of rows on every
    ISA. A row that is no whole number of blocks, and a layer of less than 16 out_features, is computed in fp32.
    """

    name: ClassVar[str] = "nf4"
    blocksize: int = 64
    double_quant: bool = False
    compute: str = "auto"


@dataclass(frozen=True)
class FP4(_FourBit):
    """FP4 weights: as NF4, with the sixteen values of a float of two exponent bits and one mantissa bit."""

    name: ClassVar[str] = "fp4"
    blocksize: int = 64
    double_quant: bool = False
    compute: str = "auto"


@dataclass(frozen=True)
class Int4(Scheme):
    """Uniform int4 weights in [-7, 7], symmetric, one scale per group_size in_features; compute as for NF4.

    group_size: 32, 64 or 128, and a divisor of in_features. With compute="int8" the products are exact integers.
    """

    name: ClassVar[str] = "int4"
    group_size: int = 64
    compute: str = "auto"

    def __post_init__(self) -> None:
        if self.group_size not in (32, 64, 128):
            raise ValueError(f"group_size must be 32, 64 or 128, got {self.group_size}")
        _check_compute(self.compute)


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme for scheme in (Int8(), Int8Static(), Int8WeightOnly(), Int8Outlier(), NF4(), FP4(), Int4())
}


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
