"""sensitivity: what each layer costs when quantized. fallback: which to keep in float so that a target is met."""

import copy
import numbers
import os
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from torch import nn

from pyqkern.analysis.records import Records, barh
from pyqkern.analysis.tasks import Evaluate, ScoreFile, check_tools, fingerprint, run_tasks, score_of
from pyqkern.models.find import RECURRENT, find_experts, find_layers, find_linears
from pyqkern.models.recurrent import replace_recurrent
from pyqkern.models.replace import replace_linear
from pyqkern.models.summary import summary
from pyqkern.nn.recurrent import is_recurrent_scheme
from pyqkern.progress import bar
from pyqkern.schemes import Scheme, check_type, get_scheme

ONLY, ALL_BUT = "only", "all but"


@dataclass(frozen=True)
class SensitivityRecord:
    """One linear or recurrent layer. The scores are what `evaluate` returned, the higher the better.

    only, all_but: the score with this layer alone quantized, and with all but this one.
    drop: float score - only. gain: all_but - score with all quantized. float_bytes: what float costs more.
    """

    name: str
    drop: float
    gain: float
    only: float
    all_but: float
    float_bytes: int


class Sensitivity(Records[SensitivityRecord]):
    """The records, that of the largest drop first, and the two ends: the score in float and with all quantized."""

    def __init__(self, records: Sequence[SensitivityRecord], float_score: float, quantized_score: float) -> None:
        title = "Score lost with this layer alone quantized"
        super().__init__(SensitivityRecord, records, _draw, title, lambda record: record.drop)
        self.float_score, self.quantized_score = float_score, quantized_score


def _draw(records: Sequence[SensitivityRecord], axes: Any) -> None:
    barh(axes, [record.name for record in records], [record.drop for record in records], "float score - score")


def sensitivity(
    model: nn.Module,
    evaluate: Evaluate,
    scheme: str | Scheme = "int8",
    *,
    file: str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Quantizes one layer at a time, and all but one, and returns what each costs, the costliest first.

    Layers are the linears and, where the scheme quantizes them, the recurrent layers and the experts of each layer.
    model: the float model, which is not changed. evaluate: model -> score, the higher the better.
    file: finished evaluations are kept there, one JSON line each; a run of the same model and scheme goes on from it.
    executor: any concurrent.futures.Executor (threads, processes, dask.distributed's client.get_executor()); model,
    evaluate and scheme must then pickle.

    Raises ValueError if evaluate returns no finite number, the scheme quantizes nothing, or the file is of another
    model or scheme; Interrupted, with the finished scores, if the executor or a worker dies: call again to go on.
    """
    scheme = get_scheme(scheme)
    check_type("model", model, nn.Module, "an nn.Module")
    check_tools(evaluate, executor)
    found = summary(_quantized(model, scheme))
    layers = [record for record in (*found.records, *found.recurrent, *found.experts) if record.scheme is not None]
    sizes = {record.name: record.bytes_before - record.bytes_after for record in layers}
    if not sizes:
        raise ValueError(f"model must have linears that {scheme.name} quantizes, got none; see pyqkern.summary(model)")
    tasks = {"float": (), "quantized": tuple(sizes)}
    for name in sizes:
        tasks[f"{ONLY} {name}"] = (name,)
        tasks[f"{ALL_BUT} {name}"] = tuple(other for other in sizes if other != name)
    header = {"scheme": repr(scheme), "model": fingerprint(model), "linears": list(sizes)}
    kept = ScoreFile(file, header, f"this model and scheme ({scheme!r})")
    work = _Scored(model, evaluate, scheme)
    scores = run_tasks(tasks, work, kept, executor=executor, title="sensitivity", progress=progress)
    records = [
        SensitivityRecord(
            name,
            scores["float"] - scores[f"{ONLY} {name}"],
            scores[f"{ALL_BUT} {name}"] - scores["quantized"],
            scores[f"{ONLY} {name}"],
            scores[f"{ALL_BUT} {name}"],
            size,
        )
        for name, size in sizes.items()
    ]
    records.sort(key=lambda record: (-record.drop, -record.gain, record.float_bytes))
    return Sensitivity(records, scores["float"], scores["quantized"])


class _Scored:
    """The task of `run_tasks`: the score with the layers of these names quantized. Pickles."""

    def __init__(self, model: nn.Module, evaluate: Evaluate, scheme: Scheme) -> None:
        self.model, self.evaluate, self.scheme = model, evaluate, scheme

    def __call__(self, names: Sequence[str]) -> float:
        return score_with(self.model, self.evaluate, self.scheme, names)


def score_with(model: nn.Module, evaluate: Evaluate, scheme: Scheme, names: Sequence[str]) -> float:
    """evaluate() of a copy of the model in which the named layers are quantized; what it returns is checked."""
    return score_of(evaluate, _quantized(model, scheme, names))


def _quantized(model: nn.Module, scheme: Scheme, names: Sequence[str] | None = None) -> nn.Module:
    """A copy of the model in which the layers of these names are quantized; None: all."""
    changed = copy.deepcopy(model)
    for replace, layers in (
        (replace_linear, [*find_linears(changed), *find_experts(changed)]),
        (replace_recurrent, find_layers(changed, RECURRENT) if is_recurrent_scheme(scheme) else []),
    ):
        wanted = {name for layer in layers for name in layer.names if names is None or name in names}
        if wanted:
            changed = replace(changed, scheme, include=lambda name, _, wanted=wanted: name in wanted)
    return changed


@dataclass(frozen=True)
class Fallback:
    """What `fallback` found: the quantized model, the layers kept in float, its score, and that of the float model."""

    model: nn.Module
    kept: tuple[str, ...]
    score: float
    float_score: float
    target: float
    kept_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model."""
        return {key: value for key, value in vars(self).items() if key != "model"}


def fallback(
    model: nn.Module,
    evaluate: Evaluate,
    target: float,
    scheme: str | Scheme = "int8",
    *,
    order: Sensitivity | None = None,
    progress: bool = True,
) -> Fallback:
    """Keeps as few bytes in float as meet `evaluate(model) >= target`, and returns the model and the list.

    Greedy: layers, as `sensitivity` has them, go to float in its order (`order`, measured here if not given) until the
    target is met; then each of them, from the largest, is quantized again where the target still holds without it. The
    score of the very model that is returned is measured at the end. `model` itself is not changed.

    Raises ValueError if even the float model misses the target, with both numbers.
    """
    scheme = get_scheme(scheme)
    check_type("target", target, numbers.Real, "a number")
    if order is None:
        order = sensitivity(model, evaluate, scheme, progress=progress)
    if not order.float_score >= target:
        raise ValueError(f"target must be within reach of the float model, which has {order.float_score}, got {target}")
    sizes = {record.name: record.float_bytes for record in order}
    names = list(sizes)

    def score(kept: Sequence[str]) -> float:
        return score_with(model, evaluate, scheme, [name for name in names if name not in kept])

    kept: list[str] = []
    with bar("fallback", show=progress) as work:
        reached = order.quantized_score >= target
        while not reached and len(kept) < len(names):
            kept.append(names[len(kept)])
            reached = score(kept) >= target
            work.advance()
        for name in sorted(kept, key=lambda name: -sizes[name]):
            fewer = [other for other in kept if other != name]
            if name != kept[-1] and score(fewer) >= target:
                kept = fewer
            work.advance()
    result = _quantized(model, scheme, [name for name in names if name not in kept])
    verified = score_with(result, evaluate, scheme, ())
    if verified < target:
        raise ValueError(
            f"evaluate must give the same score for the same model, got {verified} < {target} for a model that met it; "
            "fix its seed or its data"
        )
    return Fallback(result, tuple(kept), verified, order.float_score, target, sum(sizes[name] for name in kept))
