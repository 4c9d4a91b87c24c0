"""What hypothesis draws: sizes around the edges of every tile, tensors with extreme values, and strides."""

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATS = [torch.float32, torch.bfloat16, torch.float16]

# Small ones, and those on either side of a vector, a panel, a tile or a block.
EDGES = [31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 192, 193, 255, 256, 257, 300]
sizes = st.one_of(st.integers(0, 20), st.sampled_from(EDGES))
seeds = st.integers(0, 2**31)

FINITE = [0.0, -0.0, 3e38, -3e38, 1e-45, -1e-45, 1e-40, 2.0**-126, 0.5, -0.5, 1.5, 127.5, 1e9, -1e9, 65504.0, 448.0]
INFINITE = [float("inf"), float("-inf")]
NAN = [float("nan")]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def floats(
    shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, extremes: list[float] | None = None
) -> Tensor:
    """Normal values of one magnitude, some of them multiples of a half (so that ties occur), extremes strewn in."""
    g = generator(seed)
    x = torch.randn(shape, generator=g) * 10.0 ** float(torch.randint(-3, 4, (), generator=g))
    halves = torch.randint(-300, 300, shape, generator=g) / 2
    x = torch.where(torch.rand(shape, generator=g) < 0.2, halves, x)
    if extremes:
        picks = torch.tensor(extremes)[torch.randint(len(extremes), shape, generator=g)]
        x = torch.where(torch.rand(shape, generator=g) < 0.1, picks, x)
    return x.to(dtype)


def with_ties(x: Tensor, scale: Tensor | float, seed: int) -> Tensor:
    """Half of the elements moved to where rounding is decided: (k + 1/2) * scale, as near as x's dtype comes."""
    g = generator(seed)
    ties = (torch.randint(-260, 260, x.shape, generator=g) + 0.5) * scale
    return torch.where(torch.rand(x.shape, generator=g) < 0.5, ties.to(x.dtype), x)


def integers(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """All codes of dtype, the two extremes more often than the rest."""
    low, high = (0, 255) if dtype is torch.uint8 else (-128, 127)
    g = generator(seed)
    x = torch.randint(low, high + 1, shape, generator=g)
    ends = torch.where(torch.rand(shape, generator=g) < 0.5, low, high)
    return torch.where(torch.rand(shape, generator=g) < 0.3, ends, x).to(dtype)


def strided(x: Tensor, how: str) -> Tensor:
    """The same values with other strides."""
    if x.dim() == 0 or how == "contiguous":
        return x
    if how == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "every second":
        wide = torch.stack([x, torch.full_like(x, 77)], -1)
        return wide[..., 0]
    assert how == "offset"
    return torch.cat([torch.full_like(x[:1], 77), x])[1:] if x.shape[0] else x


strides = st.sampled_from(["contiguous", "transposed", "every second", "offset"])
