"""range_report: the distributions that are quantized, and whether one outlier sets the step for everything else."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyqkern.analysis.records import Records, barh
from pyqkern.calibration.observers import BINS, LEVELS, Histogram, MinMax
from pyqkern.calibration.run import in_float64, linears_of, see_inputs
from pyqkern.models.find import as_linear
from pyqkern.nn.linear import QLinear
from pyqkern.schemes import Range, check_ranges

SHOWN_BINS = 64
COARSE_STEP = 0.25  # of the spread: the step's noise, step / sqrt(12), is then 7 % of a typical value, or 23 dB


@dataclass(frozen=True)
class RangeRecord:
    """Weight and input of one linear, and the bounds between which they are quantized.

    spread: the median over channels of the channel's root mean square, which an outlier channel does not move.
    step: (hi - lo) / 255 of the input as one tensor. coarseness: step / spread, the share of a typical value that one
    step is. outlier_ratio: absmax of the input over its spread; worst_channel: where it is.
    clipped: share of the input's values beyond [lo, hi]. weight_outlier_ratio: the greatest over the output channels of
    absmax / root mean square: per-channel weights suffer from no other channel.
    """

    name: str
    lo: float
    hi: float
    clipped: float
    step: float
    spread: float
    coarseness: float
    outlier_ratio: float
    worst_channel: int
    weight_absmax: float
    weight_outlier_ratio: float
    outlier_driven: bool
    input_edges: list[float] = field(metadata={"table": False})
    input_counts: list[int] = field(metadata={"table": False})
    weight_edges: list[float] = field(metadata={"table": False})
    weight_counts: list[int] = field(metadata={"table": False})


class _Watch:
    """What is kept of a linear's inputs: a histogram of the tensor, and per channel extremes and sums of squares."""

    def __init__(self) -> None:
        self.histogram = Histogram()
        self.channels = MinMax(per_channel=True)
        self.squares: Tensor | None = None
        self.rows = 0

    def observe(self, x: Tensor) -> None:
        self.histogram.observe(x)
        self.channels.observe(x)
        squares = in_float64(x).square().sum(0).cpu()
        self.squares = squares if self.squares is None else self.squares + squares
        self.rows += x.shape[0]


def range_report(
    model: nn.Module,
    batches: Iterable[Any],
    ranges: Mapping[str, Range] | None = None,
    *,
    progress: bool = True,
) -> Records[RangeRecord]:
    """Histograms of each linear's weight and input with the bounds of quantization, the coarsest input first.

    model: float or quantized. batches: as `pyqkern.calibrate` takes them. ranges: the bounds, as `calibrate` returns
    them per tensor; by default the extremes. A linear is outlier-driven if a step is more than COARSE_STEP of the
    spread. Raises ValueError without batches and for NaN or an infinity in an input; linears not reached are left out.
    """
    linears = linears_of(model)
    check_ranges(ranges)
    watches: dict[str, _Watch] = {}

    def see(name: str, x: Tensor) -> None:
        watches.setdefault(name, _Watch()).observe(x)

    see_inputs(model, batches, see, title="range report", progress=progress)
    records = [
        _record(name, linears[name], seen, None if ranges is None else ranges.get(name))
        for name, seen in watches.items()
    ]
    records.sort(key=lambda record: -record.coarseness)
    title = "Step of the input over its spread (red: outlier-driven)"
    return Records(RangeRecord, records, _draw_coarseness, title, lambda record: record.coarseness)


def _record(name: str, module: nn.Module, seen: _Watch, bounds: Range | None) -> RangeRecord:
    assert seen.histogram.lo is not None and seen.histogram.hi is not None and seen.squares is not None
    low, high = float(seen.histogram.lo), float(seen.histogram.hi)
    if bounds is not None and bounds.lo.numel() != 1:
        raise ValueError(
            f"ranges[{name!r}] must be per tensor, got {bounds.lo.numel()} channels; use per_channel=False"
        )
    lo, hi = (low, high) if bounds is None else (float(bounds.lo), float(bounds.hi))
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    counts, centers = seen.histogram.counts[0], seen.histogram.centers[0]
    beyond = (centers < lo) | (centers > hi)
    if bounds is None:
        beyond = torch.zeros_like(beyond)
    channel_lo, channel_hi = seen.channels.range()
    absmax = torch.maximum(-channel_lo, channel_hi)
    spread = float((seen.squares / seen.rows).sqrt().median())
    step = (hi - lo) / LEVELS
    weight = (module if isinstance(module, QLinear) else as_linear(module)).weight.detach().float()
    rms = weight.square().mean(1).sqrt().clamp(min=1e-30)
    edges, shown = _fold(counts, float(seen.histogram.width[0]), low, high)
    weight_counts, weight_edges = torch.histogram(weight.cpu().flatten(), SHOWN_BINS)
    coarseness = step / spread if spread > 0 else math.inf if step > 0 else 0.0
    return RangeRecord(
        name, lo, hi, int(counts[beyond].sum()) / int(counts.sum()), step, spread, coarseness,
        float(absmax.max()) / spread if spread > 0 else math.inf, int(absmax.argmax()),
        float(weight.abs().max()), float((weight.abs().amax(1) / rms).max()), coarseness > COARSE_STEP,
        edges, shown, weight_edges.tolist(), weight_counts.long().tolist(),
    )  # fmt: skip


def _fold(counts: Tensor, width: float, low: float, high: float) -> tuple[list[float], list[int]]:
    """The bins from the one of `low` to the one of `high` as SHOWN_BINS or fewer, each of a whole number of bins."""
    first, last = math.floor(low / width) + BINS, math.floor(high / width) + BINS
    each = max(1, math.ceil((last - first + 1) / SHOWN_BINS))
    parts = counts[first : last + 1].split(each)
    edges = [(first + i * each - BINS) * width for i in range(len(parts) + 1)]
    return edges, [int(part.sum()) for part in parts]


def _draw_coarseness(records: Sequence[RangeRecord], axes: Any) -> None:
    colors = ["#c1121f" if record.outlier_driven else "#1d3557" for record in records]
    top = 2 * max((record.coarseness for record in records if math.isfinite(record.coarseness)), default=COARSE_STEP)
    values = [min(record.coarseness, top) for record in records]  # infinite where most channels are zero
    barh(axes, [record.name for record in records], values, "step / spread", colors)
    axes.set_xscale("symlog", linthresh=COARSE_STEP / 10)  # one outlier would hide all the others
    axes.axvline(COARSE_STEP, color="#c1121f", linewidth=1)


def draw_histograms(record: RangeRecord, axes: Sequence[Any]) -> None:
    """Input and weight of one linear into two matplotlib axes: log counts, and lines at the bounds."""
    for axis, edges, counts, title in (
        (axes[0], record.input_edges, record.input_counts, "input"),
        (axes[1], record.weight_edges, record.weight_counts, "weight"),
    ):
        axis.stairs(counts, edges, fill=True, color="#457b9d")
        axis.set_yscale("symlog", linthresh=1)
        axis.set_title(f"{record.name}: {title}", fontsize=8, parse_math=False)
        axis.tick_params(labelsize=7)
    for bound in (record.lo, record.hi):
        axes[0].axvline(bound, color="#c1121f", linewidth=1)
    axes[0].axvspan(-record.spread, record.spread, color="#f4a261", alpha=0.4, label="spread")
    axes[0].legend(fontsize=7)
