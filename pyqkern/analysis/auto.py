"""auto: the fastest, or smallest, mix of schemes for a model on this machine that keeps its score within a budget."""

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import nn

from pyqkern._C import isa
from pyqkern.analysis.choose import Candidate, Loss, Tried, frontier, search
from pyqkern.analysis.cost import costs, model_seconds, tensors_of, timed_batches, watch
from pyqkern.analysis.damage import Agreement, Damage, Output, first_guess, output_of
from pyqkern.analysis.tasks import Evaluate, ScoreFile, check_tools, fingerprint, run_tasks, score_of
from pyqkern.analysis.units import FLOAT, Option, Ranges, Unit, choice_of, find_units, options_of, own_copy
from pyqkern.calibration.calibrate import calibrate
from pyqkern.calibration.run import counted
from pyqkern.models.optimize import optimize
from pyqkern.models.plan import FUSED_KINDS, OBJECTIVES, Choice, Figures, Plan
from pyqkern.models.summary import summary
from pyqkern.schemes import SCHEMES, Scheme, check_type, get_scheme

EVALUATIONS = 6  # of the whole, the float model's included
DAMAGE_ROWS = 128  # rows of outputs, at least, over which damages are taken: so many batches, evenly spread
DAMAGE_VALUES = 1 << 26  # and numbers in these outputs, at most
COMPARED_BYTES = 1 << 30  # single schemes are measured as whole models where these take no more


def auto(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    evaluate: Evaluate | None = None,
    budget: float = 0.002,
    objective: str = "time",
    schemes: Iterable[str | Scheme] | None = None,
    sizes: Iterable[tuple[int, int]] | None = None,
    executor: Executor | None = None,
    file: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Plan:
    """The plan of the least time or bytes whose score is at least that of the float model less the budget.

    model: in float; it is not changed. batches: as `pyqkern.calibrate` takes them: what damages are taken over (about
    128 rows of outputs, evenly spread), and what times are of.
    evaluate: model -> score, the higher the better, called six times at most. By default the agreement with the
    float model on all batches: the share of the same greatest logits, or for other outputs, say embeddings,
    `1 - |difference|**2 / |float|**2`.
    objective: "time" or "bytes". schemes: which are tried; by default all, smoothed and not. sizes: (batch, length) of
    the inputs whose time counts; by default three of the batches.
    executor: any concurrent.futures.Executor, for the damages; times are taken and models evaluated here.
    file: what is finished is kept there, one JSON line each; a run of the same model and batches goes on from it, with
    the same `evaluate`.

    Times are those of torch.get_num_threads() threads of this machine; with one thread its CPU time. The plan's score
    was measured. Where nothing keeps the budget, or is cheaper than float, all choices are float, and `note` says so.

    Raises ValueError for a model that is quantized already or has nothing to quantize, outputs with NaN, and values out
    of range; Interrupted, if the executor or a worker dies: with `file` a new call goes on.

    >>> import torch, pyqkern
    >>> model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8))
    >>> plan = pyqkern.auto(model, [torch.randn(64, 256)], objective="bytes", budget=0.01, progress=False)
    >>> plan.figures.measured_score >= 0.99
    True
    >>> model = pyqkern.optimize(model, plan)
    """
    search_ = _Auto(model, batches, evaluate, budget, objective, schemes, sizes, executor, file, progress)
    return search_.plan()


def _checked_sizes(sizes: Iterable[tuple[int, int]] | None) -> list[tuple[int, int]] | None:
    if sizes is None:
        return None
    check_type("sizes", sizes, Iterable, "None or several (batch, length)")
    found = [tuple(size) if isinstance(size, tuple | list) else (size,) for size in sizes]
    for size in found:
        if len(size) != 2 or not all(isinstance(one, int) and one > 0 for one in size):
            raise ValueError(f"sizes must be (batch, length) of positive whole numbers, got {size!r:.80}")
    if not found:
        raise ValueError("sizes must hold at least one (batch, length), got none")
    return [(size[0], size[1]) for size in found]


class _Auto:
    """One search: what was asked for, and what is found on the way."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        evaluate: Evaluate | None,
        budget: float,
        objective: str,
        schemes: Iterable[str | Scheme] | None,
        sizes: Iterable[tuple[int, int]] | None,
        executor: Executor | None,
        file: str | os.PathLike[str] | None,
        progress: bool,
    ) -> None:
        check_type("model", model, nn.Module, "an nn.Module")
        check_tools(len if evaluate is None else evaluate, executor)
        check_type("budget", budget, Real, "a number")
        if not 0 <= budget < float("inf"):
            raise ValueError(f"budget must be a score that may be lost, at least 0, got {budget}")
        if objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(map(repr, OBJECTIVES))}, got {objective!r}")
        self.objective, self.budget, self.executor, self.progress = objective, float(budget), executor, progress
        self.schemes = [get_scheme(one) for one in (SCHEMES if schemes is None else _listed(schemes))]
        if not self.schemes:
            raise ValueError("schemes must name at least one scheme, got none")
        self.model = model
        with counted(batches, "batches", False) as each:
            self.batches = list(each)
        self.sizes = _checked_sizes(sizes)
        self.own = own_copy(model)
        self.units = find_units(self.own)
        self.timed = timed_batches(self.batches, self.sizes)
        self.kept = ScoreFile(file, self._header(evaluate), "this model, these batches and options")
        chosen = _damage_batches(self.own, self.batches)
        self.damage_batches = [self.batches[i] for i in chosen]
        self.expected = [output_of(self.own, batch) for batch in self.damage_batches]
        _check_finite(self.expected)
        self.agrees = evaluate is None
        self.evaluate: Evaluate = Agreement(self.own, self.batches) if evaluate is None else evaluate
        self.cost_of = (lambda cost: cost.seconds) if objective == "time" else (lambda cost: float(cost.bytes))

    def _header(self, evaluate: Evaluate | None) -> dict[str, Any]:
        """What a file must be of, beside `evaluate`, which cannot be compared."""
        digest = hashlib.sha256()
        for batch in self.batches:
            for tensor in tensors_of(batch):
                digest.update(f"{tensor.dtype} {list(tensor.shape)} {float(tensor.double().sum()):.12g}\n".encode())
        return {
            "auto": fingerprint(self.model),
            "batches": digest.hexdigest()[:16],
            "sizes": None if self.sizes is None else [list(size) for size in self.sizes],
            "agreement": evaluate is None,
            "machine": self._machine(),
        }

    def _machine(self) -> str:
        threads = torch.get_num_threads()
        return f"{isa()}, {threads} thread{'s'[: threads - 1]}"

    # ---- options, costs, damages

    def plan(self) -> Plan:
        self.ranges = self._ranges()
        options = [options_of(unit, self.schemes, self.ranges) for unit in self.units]
        calls = watch(self.own, self.units, [*self.timed])
        reached = watch(self.own, self.units, self.damage_batches)
        self.costs = costs(self.units, options, self.ranges, calls, len(self.timed), self.kept, self.progress)
        self.options: list[list[Option]] = []
        singles = self._cheap_singles()
        self.unreached = [unit.name for unit in self.units if id(unit.layer.module) not in reached]
        for unit, cost in zip(self.units, self.costs, strict=True):
            useful = [
                one
                for one in cost
                if one.scheme is not None
                and (self.cost_of(cost[one]) < self.cost_of(cost[FLOAT]) or (_is_single(unit) and one in singles))
            ]
            self.options.append([FLOAT, *(useful if unit.name not in self.unreached else [])])
        self.damages = self._damages()
        tried = self._search()
        return self._result(tried)

    def _ranges(self) -> Ranges:
        """Of the linears' inputs, for smoothing and for int8-static."""
        if not any(unit.kind in ("linear", *FUSED_KINDS) for unit in self.units):
            return Ranges()
        ranges = Ranges(calibrate(self.own, self.damage_batches, "minmax", per_channel=True, progress=False))
        if any(scheme.needs_ranges and scheme.carried_ranges() is None for scheme in self.schemes):
            ranges.tensors = calibrate(self.own, self.damage_batches, progress=False)
        return ranges

    def _damages(self) -> list[dict[Option, float]]:
        tasks = {
            f"damage {option.title} | {unit.name}": choice_of(unit, option, self.ranges)
            for unit, options in zip(self.units, self.options, strict=True)
            for option in options
            if option.scheme is not None
        }
        work = Damage(self.own, self.units, self.damage_batches, self.expected)
        scores = run_tasks(tasks, work, self.kept, executor=self.executor, title="damage", progress=self.progress)
        return [
            {option: scores.get(f"damage {option.title} | {unit.name}", 0.0) for option in options}
            for unit, options in zip(self.units, self.options, strict=True)
        ]

    # ---- the search

    def _candidate(self, picks: Sequence[int], single: str = "") -> Candidate:
        chosen = [options[pick] for options, pick in zip(self.options, picks, strict=True)]
        cost = sum(self.cost_of(costs[one]) for costs, one in zip(self.costs, chosen, strict=True))
        damage = sum(damages[one] for damages, one in zip(self.damages, chosen, strict=True))
        return Candidate(tuple(picks), cost, damage, single)

    def _cheap_singles(self) -> list[Option]:
        """The schemes, not smoothed, that cost less than float where all units take them that can."""
        found = []
        for option in map(Option, self.schemes):
            costs = [
                cost for cost, unit in zip(self.costs, self.units, strict=True) if option in cost and _is_single(unit)
            ]
            if sum(self.cost_of(cost[option]) - self.cost_of(cost[FLOAT]) for cost in costs) < 0:
                found.append(option)
        return found

    def _singles(self) -> list[Candidate]:
        """Each scheme alone that costs less than float, as `optimize` has it where it fits."""
        found = []
        for wanted in self._cheap_singles():
            picks = [
                options.index(wanted) if wanted in options and _is_single(unit) else 0
                for unit, options in zip(self.units, self.options, strict=True)
            ]
            single = self._candidate(picks, "" if wanted.scheme is None else wanted.scheme.name)
            if any(picks) and math.isfinite(single.damage):
                found.append(single)
        return found

    def _search(self) -> list[Tried]:
        self.float_score = 1.0 if self.agrees else self.kept.get("score float", lambda: self._score(self.model))
        items = [
            [(self.cost_of(costs[one]), damages[one]) for one in options]
            for options, costs, damages in zip(self.options, self.costs, self.damages, strict=True)
        ]
        self.singles = self._singles()
        singles = {one.picks for one in self.singles}
        mixed = [one for one in frontier(items) if one.picks not in singles and any(one.picks)]
        start = first_guess(self.expected, self.budget)
        self.loss = Loss.guessed(self.budget, start, 0.5 if self.expected[0].logits else 1.0)
        return search(
            [*self.singles, *mixed],
            self._score_of_candidate,
            float_score=self.float_score,
            float_cost=self._candidate([0] * len(self.units)).cost,
            budget=self.budget,
            start=start,
            loss=self.loss,
            evaluations=EVALUATIONS - (not self.agrees),
        )

    def _score(self, model: nn.Module) -> float:
        return score_of(self.evaluate, model)

    def _choices(self, candidate: Candidate) -> list[Choice]:
        choices = []
        of_units = zip(self.units, self.options, self.costs, self.damages, candidate.picks, strict=True)
        for unit, options, cost, damages, pick in of_units:
            option = options[pick]
            choices.append(
                replace(
                    choice_of(unit, option, self.ranges),
                    seconds=cost[option].seconds,
                    float_seconds=cost[FLOAT].seconds,
                    bytes=cost[option].bytes,
                    float_bytes=cost[FLOAT].bytes,
                    damage=damages[option],
                    reason="not reached by the batches" if unit.name in self.unreached else "",
                )
            )
        return choices

    def _built(self, candidate: Candidate) -> nn.Module:
        return optimize(copy.deepcopy(self.model), Plan(tuple(self._choices(candidate))))

    def _score_of_candidate(self, candidate: Candidate) -> float:
        choices = [replace(one, seconds=0.0, float_seconds=0.0, damage=0.0) for one in self._choices(candidate)]
        said = json.dumps(Plan(tuple(choices)).to_dict())
        key = f"score {hashlib.sha256(said.encode()).hexdigest()[:16]}"
        return self.kept.get(key, lambda: self._score(self._built(candidate)))

    # ---- what comes of it

    def _result(self, tried: list[Tried]) -> Plan:
        """The best of what kept the budget, with the figures of everything that it is compared with."""
        nothing = self._candidate([0] * len(self.units))
        measured = self._measured(nothing, [one.candidate for one in tried if one.kept])

        def cost(one: Candidate) -> float:
            return measured.get(one.picks, math.inf) if self.objective == "time" else one.cost

        best = min([nothing, *(one.candidate for one in tried if one.kept)], key=cost)
        while (single := self._overlooked(best, tried, cost)) is not None:
            score = self._score_of_candidate(single)
            kept = score >= self.float_score - self.budget
            tried.append(Tried(single, self.float_score - self.loss.of(single.damage), score, kept))
            best = single if kept else best
        compared = {nothing.picks: "float"} | {one.picks: one.single for one in self.singles}
        mixes = [one.candidate for one in tried if one.candidate.picks not in compared]
        compared |= {one.picks: f"mix {i + 1}" for i, one in enumerate(mixes)}
        candidates = {one.picks: one for one in (nothing, *self.singles, *mixes)}
        rest = self._rest(measured)
        shown = {
            picks: self._figures(name, candidates[picks], rest, tried, measured.get(picks))
            for picks, name in compared.items()
        }
        return Plan(
            tuple(self._choices(best)),
            self.objective,
            self.budget,
            shown[best.picks],
            tuple(shown.values()),
            self._note(best, tried),
            self._machine(),
        )

    def _overlooked(
        self, best: Candidate, tried: Sequence[Tried], cost: Callable[[Candidate], float]
    ) -> Candidate | None:
        """A single scheme that is measured to cost less than the best, and that no evaluation has spoken against."""
        if len(tried) + (not self.agrees) >= EVALUATIONS:
            return None
        failed = min((one.candidate.damage for one in tried if not one.kept), default=math.inf)
        done = {one.candidate.picks for one in tried}
        left = [one for one in self.singles if one.picks not in done and one.damage < failed and cost(one) < cost(best)]
        return min(left, key=cost, default=None)

    def _measured(self, nothing: Candidate, kept: Sequence[Candidate]) -> dict[tuple[int, ...], float]:
        """Seconds of whole models, which take turns: float, what kept the budget, and single schemes.

        Where these would take more than COMPARED_BYTES, only one of them, from which all times are predicted.
        """
        singles = self._references()
        if summary(self.model).bytes_before * len(singles) > COMPARED_BYTES:
            singles = singles[:1]
        wanted = {one.picks: one for one in (nothing, *singles, *kept)}
        models = [self._built(one) if any(one.picks) else self.model for one in wanted.values()]
        return dict(zip(wanted, model_seconds(models, self.timed), strict=True))

    def _references(self) -> list[Candidate]:
        """The single schemes; first "int8", if it is one of them, from which all times are predicted."""
        return sorted(self.singles, key=lambda one: one.single != "int8")

    def _rest(self, measured: dict[tuple[int, ...], float]) -> float:
        """What one whole model took, "int8" if there is one, beside its units: what is left is the same in all."""
        nothing = self._candidate([0] * len(self.units))
        base = next((one for one in self._references() if one.picks in measured), nothing)
        return measured[base.picks] - self._seconds(base)

    def _seconds(self, candidate: Candidate) -> float:
        """The sum over the units."""
        chosen = zip(self.costs, self.options, candidate.picks, strict=True)
        return sum(costs[options[pick]].seconds for costs, options, pick in chosen)

    def _figures(
        self, name: str, candidate: Candidate, rest: float, tried: Sequence[Tried], measured: float | None
    ) -> Figures:
        seconds = max(0.0, rest + self._seconds(candidate))
        saved = sum(one.float_bytes - one.bytes for one in self._choices(candidate))
        bytes_ = summary(self.own).bytes_before - saved
        if not any(candidate.picks):
            return Figures(name, seconds, bytes_, 0.0, self.float_score, measured, self.float_score)
        found = next((one for one in tried if one.candidate.picks == candidate.picks), None)
        score = self.float_score - self.loss.of(candidate.damage) if found is None else found.predicted
        return Figures(name, seconds, bytes_, candidate.damage, score, measured, None if found is None else found.score)

    def _note(self, best: Candidate, tried: list[Tried]) -> str:
        """What was found, in words."""
        count = f"{len(tried) + (not self.agrees)} evaluations"
        unreached = f" Not reached by the batches, and in float: {', '.join(self.unreached)}." if self.unreached else ""
        if any(best.picks):
            found = next(one for one in tried if one.candidate.picks == best.picks)
            scores = f"Score {found.score:.4f} (float {self.float_score:.4f}, budget {self.budget:g})"
            return f"{scores}, after {count}.{unreached}"
        if any(one.kept for one in tried):
            return f"What keeps the budget of {self.budget:g} is no faster than float: all stays in float.{unreached}"
        if not tried:
            return f"No scheme is cheaper than float on any layer: all stays in float.{unreached}"
        least = max(one.score for one in tried)
        return (
            f"Nothing that was tried keeps the budget of {self.budget:g}: the best of {count} scored {least:.4f}, "
            f"float {self.float_score:.4f}. All stays in float.{unreached}"
        )


def _is_single(unit: Unit) -> bool:
    """Whether `optimize` quantizes it when it is given a scheme."""
    return unit.kind not in ("embedding", "recurrent layer")


def _listed(schemes: Any) -> list[Any]:
    if isinstance(schemes, str | Scheme):
        return [schemes]
    check_type("schemes", schemes, Iterable, "None or several schemes")
    return list(schemes)


def _damage_batches(model: nn.Module, batches: Sequence[Any]) -> list[int]:
    """Which batches damages are taken over: evenly spread, of DAMAGE_ROWS rows and at most DAMAGE_VALUES numbers."""
    first = output_of(model, batches[len(batches) // 2]).values
    rows = max(1, min(DAMAGE_ROWS, DAMAGE_VALUES // max(1, first.shape[-1])))
    count = min(len(batches), max(1, -(-rows // max(1, len(first)))))
    return [(2 * i + 1) * len(batches) // (2 * count) for i in range(count)]


def _check_finite(outputs: Sequence[Output]) -> None:
    if not all(output.values.isfinite().all() for output in outputs):
        raise ValueError("batches must give finite outputs in float, got NaN or an infinity; look at the batches")
