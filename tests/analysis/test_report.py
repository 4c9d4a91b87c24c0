"""The HTML report: one valid file, every text escaped; it urges only where something is lost; figures stay readable."""

import copy
import math
import re
import string
import warnings
from pathlib import Path
from typing import Any

import html5lib
import pytest
from closeness import Closeness, Net, X, net_analyses
from hypothesis import given, settings
from hypothesis import strategies as st
from require import require
from torch import Tensor, nn

from pyqkern import replace_linear
from pyqkern.analysis import compare_samples, error_propagation, fallback, range_report, report, sensitivity
from pyqkern.analysis.compare import ErrorRecord
from pyqkern.analysis.ranges import RangeRecord
from pyqkern.analysis.records import BARS, Records, block_of
from pyqkern.analysis.report import escaped, findings
from pyqkern.analysis.sensitivity import Sensitivity, SensitivityRecord


def valid(text: str) -> None:
    """Raises html5lib's ParseError at the first breach of the HTML standard."""
    html5lib.HTMLParser(strict=True).parse(text)


def test_report_is_one_file_that_says_what_to_do(tmp_path: Path) -> None:
    require("matplotlib", "the report draws with it")
    path = tmp_path / "report.html"
    found = report(path, title="A & B", **net_analyses())
    text = path.read_text(encoding="utf-8")
    valid(text)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert text.count("data:image/png;base64,") == 5 and not re.search(r'(src|href)="(?!data:)', text)
    assert "A &amp; B" in text and "<script>" not in text and "&lt;script&gt;" in text
    said = " ".join(f"{finding.text} {finding.advice}" for finding in found)
    assert "bad alone loses" in said and "channel 5 of its input" in said and "exclude=['bad']" in said
    assert "pyqkern.smooth" in said and "With bad in float" in said
    assert 'class="warning"' in text and 'class="note"' not in text


HOSTILE = "</td></table>\"'<script>alert(1)</script>&nbsp;$x$ \x00\x1b[31m \ud800 \u6f22\u5b57 \\(a\\) $\\frac{"


def test_every_text_is_escaped(tmp_path: Path) -> None:
    require("matplotlib", "the report draws with it")
    model = nn.ModuleDict({"<img src=x>$^{": nn.Linear(16, 4)})
    model.forward = lambda x: model["<img src=x>$^{"](x)
    texts = [HOSTILE] * 64
    quantized = replace_linear(copy.deepcopy(model))
    quantized.forward = lambda x: quantized["<img src=x>$^{"](x)
    path = tmp_path / "report.html"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # letters that the font lacks are no warnings
        report(
            path,
            title=HOSTILE,
            notes=[HOSTILE],
            samples=compare_samples(model, quantized, [X], texts, progress=False),
            propagation=error_propagation(model, quantized, [X], progress=False),
            ranges=range_report(model, [X], progress=False),
        )
    text = path.read_text(encoding="utf-8")
    valid(text)
    assert "<script" not in text and "<img src=x" not in text and "&lt;img src=x&gt;" in text
    assert not set(text) & {"\x00", "\x1b"}


@given(st.text())
@settings(max_examples=50)
def test_escaped_text_is_the_text(text: str) -> None:
    tree = html5lib.HTMLParser(strict=True).parse(
        f'<!doctype html><html lang="en"><head><title>t</title></head><body><p>{escaped(text)}</p></body></html>'
    )
    shown = "".join(tree.find(".//{*}p").itertext())
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # as HTML reads them
    assert shown == re.sub("[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


# ---- nothing lost


class Forgiving(Closeness):
    """A score that no quantization loses."""

    def __call__(self, model: nn.Module) -> float:
        return 1.0


def test_where_nothing_is_lost_outliers_are_notes(tmp_path: Path) -> None:
    require("matplotlib", "the report draws with it")
    model, quantized = Net(), replace_linear(Net())
    order = sensitivity(model, Forgiving(), progress=False)
    analyses: dict[str, Any] = {
        "sensitivity": order,
        "fallback": fallback(model, Forgiving(), 0.99, order=order, progress=False),
        "propagation": error_propagation(model, quantized, [X], progress=False),
        "samples": compare_samples(model, quantized, [X], progress=False),
        "ranges": range_report(model, [X], progress=False),
    }
    found = report(tmp_path / "report.html", **analyses)
    kinds = [finding.kind for finding in found]
    assert kinds[:2] == ["good", "good"] and set(kinds[2:]) == {"note"}
    assert "nothing lost" in found[0].text and found[0].advice == "Nothing needs to be done."
    outlier = next(finding for finding in found if "channel 5 of its input" in finding.text)
    assert outlier.advice.startswith("The score loses nothing by it here. If other data do: ")
    assert 'class="warning"' not in (tmp_path / "report.html").read_text(encoding="utf-8")
    # Without a score nobody knows what the outlier costs.
    assert [finding.kind for finding in findings(ranges=analyses["ranges"])] == ["warning"]
    assert {finding.kind for finding in findings(fallback=analyses["fallback"], ranges=analyses["ranges"])} == {
        "good",
        "note",
    }


@pytest.mark.parametrize("lost, kinds", [(0.0029, {"good"}), (0.0031, {"warning"}), (-0.1, {"good"})])
def test_the_loss_that_counts(lost: float, kinds: set[str]) -> None:
    record = SensitivityRecord("layer", 0.5, 0.5, 0.0, 0.0, 4)  # alone it loses much, whatever all together lose
    found = findings(Sensitivity([record], 0.75, 0.75 - lost))
    assert {finding.kind for finding in found} == kinds


# ---- many layers

KINDS = ("attention.query", "attention.key", "attention.value", "attention.output", "up", "down")
NAMES = [f"encoder.layer.{i}.{kind}" for i in range(24) for kind in KINDS] + ["pooler", "classifier"]


@pytest.mark.parametrize(
    "name, block",
    [
        ("encoder.layer.3.output.dense", "encoder.layer.3"),
        ("encoder.block.0.layer.1.DenseReluDense.wo", "encoder.block.0"),
        ("model.layers.12.mlp.experts.7.w1", "model.layers.12"),
        ("0", "0"),
        ("0.1", "0"),
        ("conv1d.weight", "conv1d.weight"),
        ("a.b2.c", "a.b2.c"),
        ("classifier", "classifier"),
        ("", ""),
    ],
)
def test_blocks(name: str, block: str) -> None:
    assert block_of(name) == block


def drawn(records: Records[Any]) -> tuple[list[str], Any]:
    figure = records.plot()
    (axes,) = figure.axes
    return [label.get_text() for label in axes.get_yticklabels()], figure


def many(kind: str, values: dict[str, float]) -> Records[Any]:
    """Records of one analysis, made the way the analysis itself makes them."""
    if kind == "sensitivity":
        records = [SensitivityRecord(name, value, 0.0, 0.0, 0.0, 4) for name, value in values.items()]
        return Sensitivity(records, 1.0, 0.5)
    model, batch = Many(list(values)), [X]
    if kind == "ranges":
        found: Records[Any] = range_report(model, batch, progress=False)
        badness = {name: value for name, value in values.items()}
        found.records = [replace_field(r, coarseness=badness[r.name]) for r in found]
    else:
        found = error_propagation(model, replace_linear(copy.deepcopy(model)), batch, progress=False)
        found.records = [replace_field(r, sqnr=-values[r.name]) if r.name in values else r for r in found]
    return found


def replace_field(record: RangeRecord | ErrorRecord, **changes: float) -> Any:
    return type(record)(**{**vars(record), **changes})


class Many(nn.Module):
    """A linear of each of these names, one after the other."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.order = names
        for name in names:
            *path, last = name.split(".")
            parent: nn.Module = self
            for part in path:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = self.get_submodule(name)(x)
        return x


@pytest.mark.parametrize("kind", ["sensitivity", "ranges", "propagation"])
def test_many_layers_are_drawn_by_block(kind: str) -> None:
    require("matplotlib", "figures are drawn with it")
    values = {name: 0.01 * (1 + i % 5) for i, name in enumerate(NAMES)}
    values["encoder.layer.7.attention.value"] = 0.5
    labels, figure = drawn(many(kind, values))
    assert "encoder.layer.7.attention.value" in labels and "encoder.layer.7.up" not in labels
    blocks = [block_of(label) for label in labels]
    assert len(set(blocks)) == len(blocks) and len(labels) == 26 + (kind == "propagation")  # and the output's bar
    assert "the worst layer of each block" in figure.axes[0].get_title()
    heights = figure.get_size_inches()[1] / len(labels)
    assert 0.2 <= heights <= 0.3  # inches a bar: letters of 7 points are 0.1 high


def test_few_layers_are_drawn_one_by_one() -> None:
    require("matplotlib", "figures are drawn with it")
    values = {name: 0.01 for name in NAMES[:BARS]}
    labels, figure = drawn(many("sensitivity", values))
    assert labels == list(values) and "block" not in figure.axes[0].get_title()


def test_a_figure_can_be_drawn_of_what_is_not_finite() -> None:
    require("matplotlib", "figures are drawn with it")
    values = {name: math.inf if name.endswith("key") else 1.0 for name in NAMES}
    labels, _ = drawn(many("ranges", values))
    assert all(label.endswith("key") for label in labels if "layer" in label)


def test_names_are_no_formulas() -> None:
    require("matplotlib", "figures are drawn with it")
    names = [f"${letter}^{{" for letter in string.ascii_lowercase]
    labels, figure = drawn(many("sensitivity", dict.fromkeys(names, 1.0)))
    figure.canvas.draw()
    assert labels == names
