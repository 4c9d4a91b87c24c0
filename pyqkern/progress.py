"""The one kind of progress bar, on stderr, of the commands and of functions with `progress=True`.

It is drawn on a terminal, and in a notebook that has ipywidgets; logs and pipes get none.
"""

import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


class Bar:
    """What a piece of work tells about itself; nothing comes of it where no bar is drawn."""

    def __init__(
        self, progress: "Progress | None", *, title: str = "", total: int | None = None, done: int = 0
    ) -> None:
        self._progress = progress
        self._task = None if progress is None else progress.add_task(title, total=total, completed=done)

    def advance(self, count: int = 1) -> None:
        """`count` more are done."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, count)

    def reach(self, done: int, total: int) -> None:
        """`done` of `total` are done."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=total)


@contextmanager
def bar(title: str, total: int | None = None, *, done: int = 0, unit: str = "", show: bool = True) -> Iterator[Bar]:
    """A progress bar while the block runs; it vanishes at the block's end.

    total: how many there are, None where that is not known. done: how many of them an earlier run has finished.
    unit: the plural of what is counted; with it, the bar tells how many there are a second. show: False for no bar.

    >>> with bar("embed", total=100, unit="texts") as work:
    ...     work.advance(32)
    """
    console = _console() if show else None
    if console is None:
        yield Bar(None)
        return
    from rich.progress import Progress

    # What is printed to stderr appears above the bar. stdout may be a file: it stays as it is, unless both are one
    # terminal.
    progress = Progress(
        *_columns(unit), console=console, transient=True, redirect_stdout=is_terminal(sys.stdout), redirect_stderr=True
    )
    with progress:
        yield Bar(progress, title=title, total=total, done=done)


@contextmanager
def tracked(items: Iterable[Any], title: str, *, show: bool = True) -> Iterator[Iterator[Any]]:
    """The items, counted by a progress bar; within a block, so that an error takes the bar away at once."""
    total = len(items) if isinstance(items, Sized) else None
    with bar(title, total, show=show) as work:

        def each() -> Iterator[Any]:
            for item in items:
                yield item
                work.advance()

        yield each()


def is_terminal(stream: Any) -> bool:
    """Whether a person reads the stream as it is written. FORCE_COLOR does not count: logs are run with it."""
    return getattr(stream, "isatty", bool)() and os.environ.get("TERM") not in ("dumb", "unknown")


def _console() -> "Console | None":
    """Where a bar can be drawn; None where it can not."""
    terminal = is_terminal(sys.stderr)
    if not terminal and "ipykernel" not in sys.modules:
        return None
    from rich.console import Console

    console = Console(stderr=True, highlight=False, force_terminal=terminal or None)
    widgets = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    return console if terminal or widgets else None


def _columns(unit: str) -> list[Any]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:,.1f} {unit}/s", style="progress.data.speed")

    rate = [Rate()] if unit else []
    text = TextColumn("{task.description}", markup=False)
    return [text, BarColumn(), MofNCompleteColumn(), *rate, TimeElapsedColumn(), TimeRemainingColumn()]
