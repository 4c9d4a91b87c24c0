"""auto_report: one HTML page of a plan, with a picture of cost against score, the single schemes on it."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pyqkern.analysis.records import matplotlib_pyplot
from pyqkern.analysis.report import html_table, image, write_page
from pyqkern.models.plan import Choice, Figures, Plan
from pyqkern.models.summary import said_bytes

OURS, OTHERS = "#c1121f", "#1d3557"


def auto_report(path: str | os.PathLike[str], plan: Plan, *, title: str = "Plan", notes: Sequence[str] = ()) -> None:
    """Writes one HTML file, nothing beside it. notes: lines that go under the title.

    Raises ValueError for a plan without figures, as one written by hand, RuntimeError without matplotlib. An
    interruption leaves the file that was there.
    """
    if plan.figures is None:
        raise ValueError("plan must have figures, as pyqkern.auto gives them, got none; there is nothing to draw")
    lines = [*notes, plan.note, f"Times: {plan.machine}. Empty marks and numbers in brackets are predicted."]
    shown = [*plan.compared, replace(plan.figures, name="this plan")]
    body = [
        f"<h2>{'Time' if plan.objective == 'time' else 'Bytes'} against score</h2>",
        image(draw(plan), "cost against score of the plan, float and single schemes"),
        html_table(["", "ms", "MB", "damage", "score"], [_figures_row(one) for one in shown]),
        "<h2>Layers</h2>",
        html_table(
            ["layer", "becomes", "ms", "in float", "bytes", "in float", "damage"],
            [_choice_row(choice) for choice in plan.choices],
        ),
    ]
    write_page(path, title, [line for line in lines if line], body)


def draw(plan: Plan) -> Any:
    """The picture: each model's cost against its score, full marks where both were measured, and the budget."""
    assert plan.figures is not None
    pyplot = matplotlib_pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 5))
    pyplot.close(figure)
    points = [(one, OURS if one == plan.figures else OTHERS) for one in plan.compared if one.score is not None]
    float_score = next((_score(one) for one, _ in points if one.name == "float"), 0.0)
    # What lies far below is drawn at the edge.
    lowest = min(_score(one) for one, _ in points)
    bottom = min(max(lowest, float_score - max(10 * plan.budget, 0.02)), float_score - 1.2 * plan.budget)
    space = max(float_score - bottom, 1e-6)
    for one, color in points:
        place = _cost(plan, one), max(_score(one), bottom)
        shape = {"marker": "o" if _score(one) >= bottom else "v", "s": 60, "color": color, "zorder": 3}
        axes.scatter(*place, **shape, facecolor=color if one.measured_score is not None else "none")
        name = f"the plan ({one.name})" if color == OURS and one.name != "float" else one.name
        axes.annotate(name, place, xytext=(6, 4), textcoords="offset points", fontsize=8, color=color)
    axes.axhline(float_score - plan.budget, color="#2a9d8f", linestyle="--", linewidth=1)
    axes.annotate(
        f"float less the budget of {plan.budget:g}", (1, float_score - plan.budget), fontsize=8, color="#2a9d8f",
        xycoords=("axes fraction", "data"), xytext=(-4, -10), textcoords="offset points", ha="right",
    )  # fmt: skip
    axes.set_ylim(bottom - 0.15 * space, float_score + 0.25 * space)
    axes.set_xlabel("ms per batch" if plan.objective == "time" else "MB")
    axes.set_ylabel("score")
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    figure.tight_layout()
    return figure


def _cost(plan: Plan, one: Figures) -> float:
    if plan.objective == "bytes":
        return one.bytes / 1e6
    return 1e3 * (one.seconds if one.measured_seconds is None else one.measured_seconds)


def _score(one: Figures) -> float:
    score = one.score if one.measured_score is None else one.measured_score
    return 0.0 if score is None else score


def _figures_row(one: Figures) -> list[str]:
    def both(measured: float | None, predicted: float | None, form: str) -> str:
        said = "" if predicted is None else f"({predicted:{form}})"
        return said if measured is None else f"{measured:{form}} {said}"

    ms = None if one.measured_seconds is None else 1e3 * one.measured_seconds
    return [
        one.name, both(ms, 1e3 * one.seconds, ".2f"), f"{one.bytes / 1e6:.2f}", f"{one.damage:.3g}",
        both(one.measured_score, one.score, ".4f"),
    ]  # fmt: skip


def _choice_row(choice: Choice) -> list[str]:
    times = [f"{1e3 * seconds:.3f}" for seconds in (choice.seconds, choice.float_seconds)]
    sizes = [said_bytes(size) for size in (choice.bytes, choice.float_bytes)]
    return [choice.name or "(the model)", choice.title, *times, *sizes, f"{choice.damage:.3g}"]
