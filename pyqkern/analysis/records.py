"""Records: what every analysis returns."""

import csv
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

Record = TypeVar("Record")

BARS = 40  # that are told apart in a figure as they are; more layers are drawn by block


class Records(Sequence[Record], Generic[Record]):
    """A list of dataclass records of one kind: prints as a table, becomes plain data, CSV or a matplotlib figure."""

    def __init__(
        self,
        kind: type[Record],
        records: Sequence[Record],
        draw: Callable[[Sequence[Record], Any], None],
        title: str,
        badness: Callable[[Record], float] | None = None,
    ) -> None:
        """badness: of a layer's record, by which the worst stands for its block in a figure. None: not of layers."""
        self.kind, self.records, self.title = kind, list(records), title
        self._draw, self._badness = draw, badness

    def __getitem__(self, index: Any) -> Any:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    @property
    def columns(self) -> list[str]:
        """The fields that fit into a table: numbers and text."""
        return [field.name for field in fields(self.kind) if field.metadata.get("table", True)]  # type: ignore[arg-type]

    def to_dict(self) -> list[dict[str, Any]]:
        """One plain dict for each record, as JSON or a data frame takes them."""
        return [asdict(record) for record in self.records]  # type: ignore[call-overload]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the table's columns, with a header."""
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows([getattr(record, name) for name in self.columns] for record in self.records)

    def rows(self) -> list[list[str]]:
        """The table as text, the numbers short."""
        return [[_short(getattr(record, name)) for name in self.columns] for record in self.records]

    def plot(self, axes: Any = None) -> Any:
        """Draws into the matplotlib axes, or a figure of its own; returns the figure.

        Of more than BARS layers the worst of each block is drawn: of "encoder.layer.3.output.dense" and its like, one.
        """
        shown = self._drawn()
        if axes is None:
            pyplot = matplotlib_pyplot()
            figure, axes = pyplot.subplots(figsize=(9, min(40, max(3, 0.22 * len(shown) + 1.2))))
            pyplot.close(figure)  # shown by whoever gets it, and not kept by pyplot
        self._draw(shown, axes)
        axes.set_title(self.title if len(shown) == len(self) else f"{self.title}\nthe worst layer of each block")
        with without_glyph_warnings():
            axes.figure.tight_layout()
        return axes.figure

    def _drawn(self) -> list[Record]:
        if self._badness is None or len(self) <= BARS:
            return self.records
        worst: dict[str, Record] = {}  # in the order of the first layer of each block
        for record in self.records:
            block = block_of(record.name)  # type: ignore[attr-defined]
            if block not in worst or self._badness(record) > self._badness(worst[block]):
                worst[block] = record
        return list(worst.values())

    def __str__(self) -> str:
        rows = [self.columns, *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    def __repr__(self) -> str:
        return f"<{self.title}: {len(self)} records of {self.kind.__name__}>"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def block_of(name: str) -> str:
    """The block that a layer is in: its name up to the first number, "encoder.layer.3"; else the name itself."""
    found = re.match(r"(?:.*?\.)??\d+(?=\.|$)", name)
    return found.group() if found else name


def matplotlib_pyplot() -> Any:
    """matplotlib.pyplot, or an error that says how to get it."""
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise RuntimeError('drawing needs matplotlib: pip install "pyqkern[analysis]"') from error
    return pyplot


@contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Names and texts may be in scripts that matplotlib's font lacks; a box stands for each letter then."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def barh(axes: Any, names: Sequence[str], values: Sequence[float], label: str, colors: Any = "#1d3557") -> None:
    """Horizontal bars, the first on top. Names are text as it stands: a $ begins no formula."""
    places = range(len(names))
    axes.barh(places, values, color=colors)
    axes.set_yticks(places, [" ".join(name.split()) for name in names], fontsize=7, parse_math=False)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
