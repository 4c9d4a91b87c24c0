"""report: one HTML file, nothing beside it, with what was found, what to do about it, the figures and the tables."""

import base64
import html
import io
import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyqkern.analysis.compare import ErrorRecord, SampleRecord
from pyqkern.analysis.ranges import RangeRecord, draw_histograms
from pyqkern.analysis.records import Records, matplotlib_pyplot, without_glyph_warnings
from pyqkern.analysis.sensitivity import Fallback, Sensitivity
from pyqkern.models.summary import summary

LOW_SQNR = 20.0  # dB at the output: below it, answers begin to change
LOSS = 0.003  # of the score: less counts as nothing lost
HISTOGRAMS = 6  # linears whose histograms are drawn
ROWS = 40  # of a table that are shown; the rest is in the records


@dataclass(frozen=True)
class Finding:
    """What was seen, and what to do about it.

    kind: "warning", something to be done; "note", good to know, and nothing to be done; "good", all is well.
    """

    text: str
    advice: str
    kind: str = "warning"


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; max-width: 1060px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 2px 12px 2px 0; border-bottom: 1px solid #eee; vertical-align: top; }
td { white-space: nowrap; }
img { max-width: 100%; min-width: 640px; }
.warning, .note, .good { border-left: 4px solid; padding: .5em 1em; margin: .7em 0; overflow-wrap: anywhere; }
.warning { background: #fff6e5; border-color: #f4a261; } .note { background: #f1f5f9; border-color: #8d99ae; }
.good { background: #edf7ee; border-color: #2a9d8f; } .scroll { overflow-x: auto; } code { background: #f3f3f3; }
"""


def findings(
    sensitivity: Sensitivity | None = None,
    fallback: Fallback | None = None,
    propagation: Records[ErrorRecord] | None = None,
    samples: Records[SampleRecord] | None = None,
    ranges: Records[RangeRecord] | None = None,
) -> list[Finding]:
    """What the records say: what is to be done first, then what is only good to know.

    Where the scores say that nothing is lost, outliers and falls of precision are notes: they cost nothing here.
    """
    found: list[Finding] = []
    if sensitivity is not None:
        found += _from_sensitivity(sensitivity)
    if fallback is not None:
        found.append(_from_fallback(fallback))
    causes: list[Finding] = []
    if ranges is not None:
        causes += _from_ranges(ranges)
    if propagation is not None and len(propagation):
        causes += _from_propagation(propagation)
    if samples is not None and len(samples):
        causes += _from_samples(samples)
    if _nothing_lost(sensitivity, fallback):
        causes = [_as_note(finding) for finding in causes]
    found += causes
    return sorted(found, key=lambda finding: finding.kind == "note")


def _nothing_lost(sensitivity: Sensitivity | None, fallback: Fallback | None) -> bool:
    """Whether scores are known, and the model with every layer quantized has that of the float model."""
    if sensitivity is not None:
        return sensitivity.float_score - sensitivity.quantized_score <= LOSS
    return fallback is not None and not fallback.kept and fallback.float_score - fallback.score <= LOSS


def _as_note(finding: Finding) -> Finding:
    return replace(
        finding, advice="The score loses nothing by it here. If other data do: " + finding.advice, kind="note"
    )


def _from_fallback(fallback: Fallback) -> Finding:
    reached = f"the score is {fallback.score:.4g} (target {fallback.target:.4g}, float {fallback.float_score:.4g})"
    if not fallback.kept:
        return Finding(
            f"With all layers quantized {reached}.", f"The plain scheme meets the target: {_calls(fallback)}.", "good"
        )
    return Finding(
        f"With {', '.join(fallback.kept)} in float {reached}, for {fallback.kept_bytes / 1e6:.2f} MB more.",
        f"{_calls(fallback)} gives this model.",
    )


def _from_ranges(ranges: Records[RangeRecord]) -> list[Finding]:
    driven = [
        Finding(
            f"{record.name}: channel {record.worst_channel} of its input reaches {record.outlier_ratio:.0f} "
            f"times the spread, so that one step is {_share(record.coarseness)} a typical value.",
            "An outlier sets the scale. Smooth the model before quantizing (pyqkern.smooth), or use "
            '"int8-outlier", or keep this layer in float.',
        )
        for record in [record for record in ranges if record.outlier_driven][:5]
    ]
    clipped = [
        Finding(
            f"{record.name}: {record.clipped:.1%} of its input lies beyond [{record.lo:.3g}, {record.hi:.3g}].",
            'The range is too narrow. Calibrate with more data, or with observer="mse" or "minmax".',
        )
        for record in [record for record in ranges if record.clipped > 0.01][:3]
    ]
    return driven + clipped


def _from_samples(samples: Records[SampleRecord]) -> list[Finding]:
    changed = sum(record.changed for record in samples)
    if not changed:
        return []
    return [
        Finding(
            f"{changed} of the {len(samples)} inputs that move most have another answer.",
            "Look at them below: where both answers are plausible, the model was undecided in float too.",
        )
    ]


def _calls(fallback: Fallback) -> str:
    """What makes the model that was found."""
    found = summary(fallback.model)
    calls = []
    for function, records in (("replace_linear", found.records), ("replace_recurrent", found.recurrent)):
        names = [record.name for record in records]
        kept = [name for name in fallback.kept if name in names]
        if names:
            calls.append(f"{function}(model, exclude={kept})" if kept else f"{function}(model)")
    return " and ".join(calls)


def _share(x: float) -> str:
    return f"{x:.0%} of" if x < 2 else f"{x:.0f} times" if math.isfinite(x) else "infinitely larger than"


def _from_sensitivity(records: Sensitivity) -> list[Finding]:
    lost = records.float_score - records.quantized_score
    scores = f"All layers quantized score {records.quantized_score:.4g}, in float {records.float_score:.4g}"
    if lost <= LOSS:
        return [Finding(f"{scores}: nothing lost.", "Nothing needs to be done.", "good")]
    found = [Finding(f"{scores}: {lost:.4g} lost.", "The next findings say which layers lose it.")]
    worst = [record for record in records if record.drop > max(0.005, 0.25 * lost)][:5]
    for record in worst:
        found.append(
            Finding(
                f"{record.name} alone loses {record.drop:.4g}; all but it quantized brings back {record.gain:.4g}.",
                f"Keep it in float for {record.float_bytes / 1e6:.2f} MB, or see below what its range looks like.",
            )
        )
    if not worst:
        found.append(
            Finding(
                "No single layer loses much: the loss is the sum of many small ones.",
                "Smooth the model, or calibrate with another observer; fallback() finds the fewest layers to keep.",
            )
        )
    return found


def _from_propagation(records: Records[ErrorRecord]) -> list[Finding]:
    output = records[-1]
    found = []
    if output.sqnr < LOW_SQNR:
        found.append(
            Finding(
                f"The model's output has {output.sqnr:.1f} dB: below {LOW_SQNR:.0f} dB answers change.",
                "Look for the layer where the curve falls, not for the one where it is lowest.",
            )
        )
    pairs = [(a, b) for a, b in itertools.pairwise(records) if math.isfinite(a.sqnr)]
    drops = [(before.sqnr - after.sqnr, after) for before, after in pairs]
    drop, layer = max(drops, key=lambda pair: pair[0], default=(0.0, output))
    if drop > 6:
        found.append(
            Finding(
                f"The largest fall from one layer to the next, {drop:.1f} dB, is at {layer.name}.",
                "Its input or weight is where precision is lost: see its histogram.",
            )
        )
    return found


def report(
    path: str | os.PathLike[str],
    *,
    title: str = "Quantization report",
    sensitivity: Sensitivity | None = None,
    fallback: Fallback | None = None,
    propagation: Records[ErrorRecord] | None = None,
    samples: Records[SampleRecord] | None = None,
    ranges: Records[RangeRecord] | None = None,
    notes: Sequence[str] = (),
) -> list[Finding]:
    """Writes one HTML file with pictures and tables inside, of whatever analyses are given; returns its findings.

    notes: lines that go under the title. Raises ValueError if nothing is given, RuntimeError without matplotlib. An
    interruption leaves the file that was there.
    """
    parts: list[tuple[str, Records[Any] | None]] = [
        ("Sensitivity", sensitivity), ("Ranges", ranges), ("Error along depth", propagation), ("Samples", samples),
    ]  # fmt: skip
    if fallback is None and all(records is None for _, records in parts):
        raise ValueError("a report must have at least one analysis, got none; give sensitivity=, ranges=, ...")
    found = findings(sensitivity, fallback, propagation, samples, ranges)
    body = ["<h2>Findings</h2>", *map(said, found)]
    if not found:
        body.append('<div class="good">Nothing stands out.</div>')
    for heading, records in parts:
        if records is None:
            continue
        body.append(f"<h2>{escaped(heading)}</h2>")
        if len(records):
            body.append(image(records.plot(), f"{heading}: figure"))
        if records is ranges and ranges is not None and len(ranges):
            body.append(image(_histograms(ranges[:HISTOGRAMS]), "histograms"))
        body.append(table(records))
    write_page(path, title, notes, body)
    return found


def write_page(path: str | os.PathLike[str], title: str, notes: Sequence[str], body: Sequence[str]) -> None:
    """One HTML file: the title and the notes, which are text, and the body, which is HTML. Appears when complete."""
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escaped(title)}</h1>{''.join(f'<p>{escaped(note)}</p>' for note in notes)}"
        f"{''.join(body)}</body></html>\n"
    )
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def escaped(text: str) -> str:
    """Text for HTML, also in attributes. What no HTML may hold, control characters and halves of a surrogate pair,
    becomes U+FFFD.
    """
    return html.escape(re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text))


def said(finding: Finding) -> str:
    """A finding as HTML."""
    return f'<div class="{finding.kind}"><b>{escaped(finding.text)}</b><br>{escaped(finding.advice)}</div>'


def _histograms(records: Sequence[RangeRecord]) -> Any:
    pyplot = matplotlib_pyplot()
    figure, axes = pyplot.subplots(len(records), 2, figsize=(9, 1.9 * len(records)), squeeze=False)
    pyplot.close(figure)
    for record, row in zip(records, axes, strict=True):
        draw_histograms(record, row)
    figure.tight_layout()
    return figure


def image(figure: Any, alternative: str) -> str:
    """A matplotlib figure as HTML, the picture inside of it."""
    data = io.BytesIO()
    with without_glyph_warnings():
        figure.savefig(data, format="png", dpi=110)
    source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return f'<div class="scroll"><img alt="{escaped(alternative)}" src="{source}"></div>'


def table(records: Records[Any]) -> str:
    """The first ROWS records as HTML."""
    rows = records.rows()
    more = f"<p>and {len(rows) - ROWS} more</p>" if len(rows) > ROWS else ""
    return html_table(records.columns, rows[:ROWS]) + more


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns and cells, which are text, as HTML that scrolls where it is too wide."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escaped(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f'<div class="scroll"><table>{line(columns, "th")}{"".join(line(row, "td") for row in rows)}</table></div>'
