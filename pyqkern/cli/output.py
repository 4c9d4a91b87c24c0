"""How commands speak: text and tables on stdout, or one JSON object there; warnings and errors on stderr.

Progress bars are those of `pyqkern.progress`. Colours and rules are for terminals; files and pipes get plain lines of
any width.
"""

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pyqkern.models.summary import table
from pyqkern.progress import is_terminal

if TYPE_CHECKING:
    from rich.console import Console

Row = Sequence[str]


class Output:
    """What a command says. With as_json, text and tables are left out, and `result` is printed as one object."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json

    def say(self, text: str = "") -> None:
        """A line or more of text."""
        if not self.as_json:
            print(text)

    def heading(self, text: str) -> None:
        """The title of what follows, behind an empty line."""
        if self.as_json:
            return
        if is_terminal(sys.stdout):
            _console().print(f"\n{text}", style="bold", soft_wrap=True)
        else:
            print(f"\n{text}")

    def table(self, header: Row, rows: Sequence[Row], totals: Sequence[Row] = (), *, left: int = 1) -> None:
        """Rows under a header, then totals. The first `left` columns are texts, the others numbers, to the right."""
        if self.as_json:
            return
        if is_terminal(sys.stdout):
            _draw(header, rows, totals, left)
        else:
            print("\n".join(aligned(header, rows, totals, left)))

    def fields(self, values: Mapping[str, str]) -> None:
        """Names and values, one a line."""
        if self.as_json:
            return
        width = max(map(len, values))
        if is_terminal(sys.stdout):
            from rich.text import Text

            for name, value in values.items():
                _console().print(Text(name.ljust(width), "bold") + Text(f"  {value}"), soft_wrap=True)
        else:
            print("\n".join(f"{name.ljust(width)}  {value}" for name, value in values.items()))

    def result(self, values: Mapping[str, Any]) -> None:
        """What the command found, for programs. Printed as JSON, where that was asked for; NaN and inf are null."""
        if self.as_json:
            print(json.dumps(_finite(values), indent=2, ensure_ascii=False, allow_nan=False))

    def warn(self, text: str) -> None:
        """One line on stderr, which JSON does not hold back."""
        complain(f"warning: {text}")


def complain(text: str) -> None:
    """One line on stderr, whatever lines the text has."""
    print(" ".join(text.split()), file=sys.stderr)


def aligned(header: Row, rows: Sequence[Row], totals: Sequence[Row] = (), left: int = 1) -> list[str]:
    """The lines of a plain table; no cell is cut or folded. Without totals there is no rule for them."""
    lines = [line.rstrip() for line in table([header, *rows], totals, left).split("\n")]
    return lines if totals else lines[:-1]


def _draw(header: Row, rows: Sequence[Row], totals: Sequence[Row], left: int) -> None:
    """The table for a terminal. A narrow one folds the texts; numbers are left whole."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < left else "right", no_wrap=i >= left, overflow="fold")
    for row in rows:
        table.add_row(*row)
    if totals:
        table.add_section()
    for row in totals:
        table.add_row(*row, style="bold")
    _console().print(table)


def _console() -> "Console":
    from rich.console import Console

    # Names may look like rich's markup and emoji, as in "layer[0]"; they are printed as they are.
    return Console(markup=False, emoji=False, highlight=False, force_terminal=True, force_jupyter=False)


def _finite(value: Any) -> Any:
    """The value with None in the place of floats that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def quiet(transformers: Any) -> None:
    """No bars of transformers beside ours; those of downloads from the hub only on a terminal."""
    transformers.logging.disable_progress_bar()
    if not is_terminal(sys.stderr):
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()


def close_stdout() -> None:
    """Nothing more goes to stdout, whose reader has gone; else Python complains of it when it ends."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
