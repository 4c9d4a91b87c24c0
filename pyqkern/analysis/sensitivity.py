"""sensitivity: what each layer costs when quantized. fallback: which to keep in float so that a target is met."""

import copy
import hashlib
import json
import math
import numbers
import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from pyqkern.analysis.records import Records, barh
from pyqkern.calibration.run import in_float64
from pyqkern.models.find import RECURRENT, find_experts, find_layers, find_linears
from pyqkern.models.recurrent import replace_recurrent
from pyqkern.models.replace import replace_linear
from pyqkern.models.summary import summary
from pyqkern.nn.recurrent import is_recurrent_scheme
from pyqkern.schemes import Scheme, check_type, get_scheme

Evaluate = Callable[[nn.Module], float]

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


class Interrupted(RuntimeError):
    """A sensitivity run that stopped half-way. `scores` holds what was finished, and so does the file, if given."""

    def __init__(self, message: str, scores: dict[str, float]) -> None:
        super().__init__(message)
        self.scores = scores


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
    check_type("evaluate", evaluate, Callable, "a function of a model")  # type: ignore[arg-type]
    check_type("executor", executor, (Executor, type(None)), "None or a concurrent.futures.Executor")
    found = summary(_quantized(model, scheme))
    layers = [record for record in (*found.records, *found.recurrent, *found.experts) if record.scheme is not None]
    sizes = {record.name: record.bytes_before - record.bytes_after for record in layers}
    if not sizes:
        raise ValueError(f"model must have linears that {scheme.name} quantizes, got none; see pyqkern.summary(model)")
    tasks = {"float": (), "quantized": tuple(sizes)}
    for name in sizes:
        tasks[f"{ONLY} {name}"] = (name,)
        tasks[f"{ALL_BUT} {name}"] = tuple(other for other in sizes if other != name)
    kept = _File(file, {"scheme": repr(scheme), "model": _fingerprint(model), "linears": list(sizes)})
    scores = {key: score for key, score in kept.scores.items() if key in tasks}
    waiting = {key: names for key, names in tasks.items() if key not in scores}
    with tqdm(total=len(tasks), initial=len(scores), desc="sensitivity", disable=not progress) as bar:

        def done(key: str, score: float) -> None:
            scores[key] = score
            kept.add(key, score)
            bar.update()

        if executor is None:
            for key, names in waiting.items():
                done(key, score_with(model, evaluate, scheme, names))
        else:
            _run_on(executor, pickle.dumps((model, evaluate, scheme)), waiting, done, scores, len(tasks))
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


def score_with(model: nn.Module, evaluate: Evaluate, scheme: Scheme, names: Sequence[str]) -> float:
    """evaluate() of a copy of the model in which the named layers are quantized; what it returns is checked."""
    score = evaluate(_quantized(model, scheme, names))
    if hasattr(score, "item") and getattr(score, "numel", lambda: getattr(score, "size", 0))() == 1:
        score = score.item()
    if isinstance(score, bool) or not isinstance(score, numbers.Real) or not math.isfinite(score):
        raise ValueError(f"evaluate must return a finite number, the higher the better, got {score!r:.80}")
    return float(score)


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


def _run_on(
    executor: Executor,
    work: bytes,
    waiting: dict[str, tuple[str, ...]],
    done: Callable[[str, float], None],
    scores: dict[str, float],
    total: int,
) -> None:
    """All that waits, on the executor. A ValueError or TypeError is the user's; anything else an interruption."""
    futures: dict[Future[float], str] = {}
    problem: BaseException | None = None
    try:
        for key, names in waiting.items():
            futures[executor.submit(_score_pickled, work, names)] = key
    except RuntimeError as error:  # a pool that is broken or shut down takes nothing more
        problem = error
    for future in as_completed(futures):
        try:
            done(futures[future], future.result())
        except (ValueError, TypeError):
            for other in futures:
                other.cancel()
            raise
        except Exception as error:  # a worker died; what others have finished is still to be had
            problem = error
    if problem is not None:
        raise Interrupted(
            f"the executor failed with {len(scores)} of {total} evaluations finished: "
            f"{type(problem).__name__}: {problem}; "
            "with file=... a new call goes on from there",
            dict(scores),
        ) from problem


@lru_cache(maxsize=1)
def _unpickled(work: bytes) -> Any:
    return pickle.loads(work)


def _score_pickled(work: bytes, names: tuple[str, ...]) -> float:
    model, evaluate, scheme = _unpickled(work)
    return score_with(model, evaluate, scheme, names)


def _fingerprint(model: nn.Module) -> str:
    """Tells models apart by names, shapes and the sums of their tensors."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {float(in_float64(tensor).sum()):.12g}\n".encode())
    return digest.hexdigest()[:16]


class _File:
    """Finished scores: a first line that says of what, and one line for each. A torn last line is dropped."""

    def __init__(self, path: str | os.PathLike[str] | None, header: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.scores: dict[str, float] = {}
        if self.path is None:
            return
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        if not lines:
            self._write([header])
            return
        try:
            found = json.loads(lines[0])
        except json.JSONDecodeError:
            found = None
        if found != header:
            raise ValueError(f"{self.path} must be of this model and scheme ({header['scheme']}); give another file")
        for line in lines[1:]:
            try:
                entry = json.loads(line)
                self.scores[str(entry["key"])] = float(entry["score"])
            except (json.JSONDecodeError, KeyError, TypeError, ValueError):
                continue
        self._write([header, *({"key": key, "score": score} for key, score in self.scores.items())])

    def _write(self, entries: Sequence[dict[str, Any]]) -> None:
        assert self.path is not None
        part = self.path.with_name(self.path.name + ".part")
        part.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        part.replace(self.path)

    def add(self, key: str, score: float) -> None:
        self.scores[key] = score
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, "score": score}) + "\n")


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
    with tqdm(desc="fallback", disable=not progress) as bar:
        reached = order.quantized_score >= target
        while not reached and len(kept) < len(names):
            kept.append(names[len(kept)])
            reached = score(kept) >= target
            bar.update()
        for name in sorted(kept, key=lambda name: -sizes[name]):
            fewer = [other for other in kept if other != name]
            if name != kept[-1] and score(fewer) >= target:
                kept = fewer
            bar.update()
    result = _quantized(model, scheme, [name for name in names if name not in kept])
    verified = score_with(result, evaluate, scheme, ())
    if verified < target:
        raise ValueError(
            f"evaluate must give the same score for the same model, got {verified} < {target} for a model that met it; "
            "fix its seed or its data"
        )
    return Fallback(result, tuple(kept), verified, order.float_score, target, sum(sizes[name] for name in kept))
