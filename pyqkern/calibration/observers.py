"""Observers: each watches batches of one tensor and answers with a range.

Those that need a distribution keep a histogram whose bins are a power of two wide and start at a multiple of it. When
the range grows, the width doubles and neighbours are added: integer counts, in fixed memory, and the same for every
order of the batches and on every device.
"""

import math

import torch
from torch import Tensor

BINS = 4096  # on either side of zero, for a range of a whole tensor
CHANNEL_BINS = 512  # the same for each channel
LEVELS = 255  # steps of the uint8 grid
STEPS = 64  # positions of a clipping bound that "mse" tries, evenly between zero and the extreme
ENTROPY_LEVELS = 128  # of the magnitudes: int8 without its sign
ENTROPY_SMOOTHING = 1e-4  # probability given to a bin that the quantized distribution leaves empty
_LEAST_EXPONENT = -100


class Observer:
    """Watches batches of one tensor, x [rows, channels], and answers with a range. Subclasses say which.

    per_channel: lo and hi are [channels], else [].
    """

    def __init__(self, per_channel: bool = False) -> None:
        self.per_channel = per_channel
        self.lo: Tensor | None = None
        self.hi: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """x: floats [rows, channels], finite."""
        x = x.float()
        lo, hi = x.aminmax(dim=0) if self.per_channel else x.aminmax()
        self._extend(lo.cpu(), hi.cpu())
        self._count(x)

    def range(self) -> tuple[Tensor, Tensor]:
        """lo and hi, fp32 on the CPU."""
        if self.lo is None or self.hi is None:
            raise ValueError("an observer must have seen a batch before it has a range, got none")
        return self.lo, self.hi

    def _extend(self, lo: Tensor, hi: Tensor) -> None:
        self.lo = lo if self.lo is None else torch.minimum(self.lo, lo)
        self.hi = hi if self.hi is None else torch.maximum(self.hi, hi)

    def _count(self, x: Tensor) -> None:
        pass


class MinMax(Observer):
    """The least and the greatest value."""


class MovingAverage(Observer):
    """lo and hi of the batches, averaged: lo += averaging * (batch_lo - lo). Depends on the order of the batches."""

    averaging = 0.01

    def _extend(self, lo: Tensor, hi: Tensor) -> None:
        self.lo = lo if self.lo is None else self.lo + self.averaging * (lo - self.lo)
        self.hi = hi if self.hi is None else self.hi + self.averaging * (hi - self.hi)


class Histogram(Observer):
    """Counts int64 [channels or 1, 2 * bins]; bin i of a channel is [i - bins, i - bins + 1) * 2**exponent / bins."""

    def __init__(self, per_channel: bool = False) -> None:
        super().__init__(per_channel)
        self.bins = CHANNEL_BINS if per_channel else BINS
        self.counts = torch.zeros(0, dtype=torch.int64, device="cpu")
        self.exponent = torch.zeros(0, dtype=torch.int64, device="cpu")

    @property
    def width(self) -> Tensor:
        """Of a bin, float64 [channels or 1]."""
        return torch.exp2(self.exponent.double()) / self.bins

    @property
    def centers(self) -> Tensor:
        """float64 [channels or 1, 2 * bins]."""
        return (self._bin_starts().double() + 0.5) * self.width[:, None]

    def _bin_starts(self) -> Tensor:
        """In bins from zero, int64 [2 * bins]; on the CPU, whatever torch's default device and dtype are."""
        return torch.arange(-self.bins, self.bins, device="cpu")

    def _count(self, x: Tensor) -> None:
        assert self.lo is not None and self.hi is not None
        # absmax < 2**exponent, so that every value has a bin
        exponent = torch.frexp(torch.maximum(-self.lo, self.hi).reshape(-1).double())[1].long().clamp(_LEAST_EXPONENT)
        channels = exponent.numel()
        if self.counts.numel() == 0:
            self.counts, self.exponent = torch.zeros(channels, 2 * self.bins, dtype=torch.int64, device="cpu"), exponent
        if not torch.equal(exponent, self.exponent):
            self._widen(exponent)
        # By a power of two: exact in fp32, but for what underflows, whose bin is that beside zero on x's side.
        scaled = x * (1 / self.width).float().to(x.device)
        index = scaled.floor().long() - ((x < 0) & (scaled == 0)).long() + self.bins
        if self.per_channel:
            index += torch.arange(channels, device=x.device) * (2 * self.bins)
        self.counts += torch.bincount(index.view(-1), minlength=self.counts.numel()).view_as(self.counts).cpu()

    def _widen(self, exponent: Tensor) -> None:
        shift = (exponent - self.exponent)[:, None]
        place = (self._bin_starts()[None] >> shift.clamp(max=40)) + self.bins
        self.counts, self.exponent = torch.zeros_like(self.counts).scatter_add_(1, place, self.counts), exponent

    def range(self) -> tuple[Tensor, Tensor]:
        lo, hi = super().range()
        rows = [
            self._row_range(i, float(a), float(b))
            for i, (a, b) in enumerate(zip(lo.view(-1), hi.view(-1), strict=True))
        ]
        ends = torch.tensor(rows, dtype=torch.float64, device="cpu").float().view(*lo.shape, 2)
        # a bound between the extremes, whatever the bins' edges are
        return ends[..., 0].maximum(lo), ends[..., 1].minimum(hi)

    def _row_range(self, row: int, lo: float, hi: float) -> tuple[float, float]:
        raise NotImplementedError


class Percentile(Histogram):
    """Outer edges of the bins of the `lower` and the `upper` percentile: lower % of the values lie below lo or in its
    bin, upper % below hi."""

    lower, upper = 0.1, 99.9

    def _row_range(self, row: int, lo: float, hi: float) -> tuple[float, float]:
        cumulated = self.counts[row].cumsum(0)
        total, width = int(cumulated[-1]), float(self.width[row])
        ranks = [max(1, math.ceil(total * p / 100)) for p in (self.lower, self.upper)]
        first, last = torch.searchsorted(cumulated, torch.tensor(ranks, device="cpu")).tolist()
        return (first - self.bins) * width, (last + 1 - self.bins) * width


class MeanSquare(Histogram):
    """The bounds whose uint8 quantization has the least squared error.

    Candidates are lo * i / STEPS and hi * j / STEPS. From the best with i = j, one end and then the other moves to its
    best place until neither does: no candidate that differs in one end has a smaller error.
    """

    def _row_range(self, row: int, lo: float, hi: float) -> tuple[float, float]:
        used = self.counts[row] > 0
        x, counts = self.centers[row][used], self.counts[row][used].double()
        x = x.clamp(lo, hi)
        lo, hi = min(lo, 0.0), max(hi, 0.0)
        steps = torch.arange(1, STEPS + 1, dtype=torch.float64, device="cpu") / STEPS

        def best(los: Tensor, his: Tensor) -> int:
            return int(quantization_error(x, counts, los, his).flip(0).argmin().mul(-1).add(STEPS - 1))

        i = j = best(lo * steps, hi * steps)
        while True:
            before = i, j
            j = best((lo * steps[i]).expand(STEPS), hi * steps) if hi > 0 else j
            i = best(lo * steps, (hi * steps[j]).expand(STEPS)) if lo < 0 else i
            if (i, j) == before:
                return lo * float(steps[i]), hi * float(steps[j])


def quantization_error(x: Tensor, counts: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """sum(counts * (x - quantized x)^2) for each range [lo[c], hi[c]] on the uint8 grid; float64 [candidates].

    x, counts: float64 [values]; lo <= 0 <= hi: float64 [candidates].
    """
    scale = ((hi - lo) / LEVELS)[:, None]
    scale = torch.where(scale == 0, 1.0, scale)
    zero = (-lo[:, None] / scale).round()
    codes = (x / scale + zero).round().clamp(0, LEVELS)
    return ((codes - zero) * scale - x).square() @ counts


class Entropy(Histogram):
    """The magnitude T for which the int8 distribution is nearest to the float one by Kullback-Leibler; [-T, T].

    As in NVIDIA's "8-bit inference with TensorRT" (Migacz, 2017): P is the histogram of magnitudes cut at T, what is
    beyond it added to the last bin; Q the same bins without that, merged into 128 levels, each spread evenly over those
    of its bins that are not empty. The range is cut to [lo, hi] of the data.
    """

    def _row_range(self, row: int, lo: float, hi: float) -> tuple[float, float]:
        negative, positive = self.counts[row].double().split(self.bins)
        counts = negative.flip(0) + positive
        width, total = float(self.width[row]), counts.sum()
        used = int(counts.nonzero()[-1]) + 1
        stops = sorted({used, *range(min(ENTROPY_LEVELS, used), used, max(1, self.bins // 256))})
        threshold = min(stops, key=lambda stop: kl_divergence(counts, stop, float(total))) * width
        return max(lo, -threshold), min(hi, threshold)


def kl_divergence(counts: Tensor, stop: int, total: float) -> float:
    """KL(P || Q) of Entropy for magnitudes cut behind bin `stop`. counts: float64 [bins]."""
    kept = counts[:stop]
    p = kept.clone()
    p[-1] += total - kept.sum()
    level = torch.arange(stop, device="cpu") * ENTROPY_LEVELS // max(stop, ENTROPY_LEVELS)
    filled = (kept > 0).double()
    sums = torch.zeros(ENTROPY_LEVELS, dtype=torch.float64, device="cpu").index_add_(0, level, kept)
    sizes = torch.zeros(ENTROPY_LEVELS, dtype=torch.float64, device="cpu").index_add_(0, level, filled)
    q = (sums / sizes.clamp(min=1))[level] * filled
    some = p > 0
    p, q = p[some] / total, q[some] / q.sum().clamp(min=1)
    return float((p * (p / q.clamp(min=ENTROPY_SMOOTHING)).log()).sum())


OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "mse": MeanSquare,
    "entropy": Entropy,
}
