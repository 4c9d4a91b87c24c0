"""Many independent evaluations: here or on an executor, kept in a file as they finish, and gone on with from there."""

import hashlib
import json
import math
import numbers
import os
import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, as_completed
from pathlib import Path
from typing import Any

from torch import nn

from pyqkern.calibration.run import in_float64
from pyqkern.progress import bar
from pyqkern.schemes import check_type

Evaluate = Callable[[nn.Module], float]

SHIPMENTS = 32  # how often at most an executor is sent the model: more tasks than that go in parcels


class Interrupted(RuntimeError):
    """A run that stopped half-way. `scores` holds what was finished, and so does the file, if given."""

    def __init__(self, message: str, scores: dict[str, float]) -> None:
        super().__init__(message)
        self.scores = scores


def check_tools(evaluate: Any, executor: Any) -> None:
    """TypeError for what is no function, or no executor."""
    check_type("evaluate", evaluate, Callable, "a function of a model")  # type: ignore[arg-type]
    check_type("executor", executor, (Executor, type(None)), "None or a concurrent.futures.Executor")


def score_of(evaluate: Evaluate, model: nn.Module) -> float:
    """evaluate(model), which must be a finite number."""
    score: Any = evaluate(model)
    if hasattr(score, "item") and getattr(score, "numel", lambda: getattr(score, "size", 0))() == 1:
        score = score.item()
    if isinstance(score, bool) or not isinstance(score, numbers.Real) or not math.isfinite(score):
        raise ValueError(f"evaluate must return a finite number, the higher the better, got {score!r:.80}")
    return float(score)


def run_tasks(
    tasks: Mapping[str, Any],
    work: Callable[[Any], float],
    kept: "ScoreFile",
    *,
    executor: Executor | None,
    title: str,
    progress: bool,
) -> dict[str, float]:
    """work(task) for each of the tasks that the file does not have yet; returns all scores by the tasks' keys.

    On an executor, `work` is pickled and unpickled once in each thread of a worker, whose own it then is.
    Raises Interrupted, with the finished scores, if the executor or a worker dies. A ValueError or TypeError is passed
    on, the other tasks being cancelled.
    """
    scores = {key: score for key, score in kept.scores.items() if key in tasks}
    waiting = {key: task for key, task in tasks.items() if key not in scores}
    with bar(title, len(tasks), done=len(scores), show=progress) as shown:

        def done(key: str, score: float) -> None:
            scores[key] = score
            kept.add(key, score)
            shown.advance()

        if executor is None:
            for key, task in waiting.items():
                done(key, work(task))
        elif waiting:
            _run_on(executor, pickle.dumps(work), waiting, done, scores, len(tasks))
    return scores


def _run_on(
    executor: Executor,
    work: bytes,
    waiting: dict[str, Any],
    done: Callable[[str, float], None],
    scores: dict[str, float],
    total: int,
) -> None:
    """All that waits, on the executor. A ValueError or TypeError is the user's; anything else an interruption."""
    futures: dict[Future[list[float]], list[str]] = {}
    problem: BaseException | None = None
    keys = list(waiting)
    size = math.ceil(len(keys) / SHIPMENTS)
    try:
        for parcel in (keys[i : i + size] for i in range(0, len(keys), size)):
            futures[executor.submit(_scores_pickled, work, [waiting[key] for key in parcel])] = parcel
    except RuntimeError as error:  # a pool that is broken or shut down takes nothing more
        problem = error
    for future in as_completed(futures):
        try:
            for key, score in zip(futures[future], future.result(), strict=True):
                done(key, score)
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


_unpickled = threading.local()


def _scores_pickled(work: bytes, parcel: list[Any]) -> list[float]:
    """A thread has a work of its own, since it may change and restore its model for each task."""
    if getattr(_unpickled, "source", None) != work:
        _unpickled.work, _unpickled.source = pickle.loads(work), work
    return [_unpickled.work(task) for task in parcel]


def fingerprint(model: nn.Module) -> str:
    """Tells models apart by names, shapes and the sums of their tensors."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {float(in_float64(tensor).sum()):.12g}\n".encode())
    return digest.hexdigest()[:16]


class ScoreFile:
    """Finished scores: a first line that says of what, and one line for each. A torn last line is dropped.

    what: how an error calls what the file must be of.
    """

    def __init__(self, path: str | os.PathLike[str] | None, header: dict[str, Any], what: str) -> None:
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
            raise ValueError(f"{self.path} must be of {what}; give another file")
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

    def get(self, key: str, measure: Callable[[], float]) -> float:
        """The score of this key, measured and kept where there is none yet."""
        if key not in self.scores:
            self.add(key, measure())
        return self.scores[key]
