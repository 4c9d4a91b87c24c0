"""What each option of each unit costs on this machine: seconds, as it would run in the model, and bytes.

Units of one form share their measurement, and so do calls of one shape. All options of a form take turns, round after
round, so that a slow moment of the machine hits all of them; the median counts. What is called is what the model calls,
with the inputs that it is called with. A few units of the form take turns too, each with its own weights, so that these
come from the cache that they come from in the model.
"""

import functools
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyqkern.analysis.tasks import ScoreFile
from pyqkern.analysis.units import FREE, PLAIN, Option, Ranges, Unit, bytes_of, choice_of, replacements
from pyqkern.calibration.run import evaluated, evaluating, run_batch
from pyqkern.progress import tracked

ROUNDS = 7
COPIES, COPIED_BYTES = 4, 64e6  # units of a form that take turns: so many, of at most so many bytes together in float
WARM_SECONDS = 20e-3
SAMPLE_SECONDS = 1e-3  # a sample repeats its calls until it takes at least this long
TIMED_BATCHES = 3  # of those given


def clock() -> Callable[[], float]:
    """CPU time of this thread where it computes alone, which other processes disturb less; else the wall clock."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def timed_batches(batches: Sequence[Any], sizes: Sequence[tuple[int, int]] | None) -> list[Any]:
    """What times are taken of: a batch of each of the sizes, or TIMED_BATCHES of those given, evenly by their size."""
    by_size = sorted(batches, key=_numel)
    if sizes is not None:
        return [resized(by_size[-1], *size) for size in sizes]
    count = min(TIMED_BATCHES, len(by_size))
    return [by_size[(2 * i + 1) * len(by_size) // (2 * count)] for i in range(count)]


def tensors_of(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    parts = list(batch.values()) if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else []
    return [tensor for part in parts for tensor in tensors_of(part)]


def _numel(batch: Any) -> int:
    return max((tensor.numel() for tensor in tensors_of(batch)), default=0)


def resized(batch: Any, rows: int, length: int) -> Any:
    """The batch with so many rows of that length: repeated and cut in its tensors' first two dimensions.

    Tensors whose first dimension is not the batch's, or second not its length, keep theirs. Raises ValueError for a
    batch without a tensor [batch, length, ...].
    """
    shapes = [tensor.shape[:2] for tensor in tensors_of(batch) if tensor.dim() >= 2 and tensor.numel()]
    if not shapes:
        raise ValueError("sizes need batches with a tensor [batch, length, ...]; leave sizes out")
    first = shapes[0]

    def of(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {key: of(value) for key, value in part.items()}
        if isinstance(part, tuple | list):
            return tuple(of(value) for value in part)
        if not isinstance(part, Tensor):
            return part
        if part.dim() >= 1 and part.shape[0] == first[0]:
            part = part[torch.arange(rows) % first[0]]
            if part.dim() >= 2 and part.shape[1] == first[1]:
                part = part[:, torch.arange(length) % first[1]]
        return part

    return of(batch)


# ---- what the units are called with


@dataclass
class Calls:
    """Of one module: how often it is called with inputs of which shapes, and one such call of each form."""

    counts: Counter[str] = field(default_factory=Counter)
    inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)


def watch(model: nn.Module, units: Sequence[Unit], batches: Sequence[Any]) -> dict[int, Calls]:
    """Runs the batches; returns the calls of each of the units' modules, by its id."""
    calls: dict[int, Calls] = {}
    seen: dict[tuple[str, str], tuple[tuple[Any, ...], dict[str, Any]]] = {}  # one input for all units of a form

    def watcher(form: str) -> Callable[..., None]:
        def see(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            arguments = tuple(map(_kept, arguments))
            keywords = {name: _kept(value) for name, value in keywords.items()}
            shape = _shape((arguments, keywords))
            one = calls.setdefault(id(module), Calls())
            one.counts[shape] += 1
            one.inputs[shape] = seen.setdefault((form, shape), (arguments, keywords))

        return see

    with ExitStack() as stack:
        for unit in units:
            for layer in unit.called():
                handle = layer.module.register_forward_pre_hook(watcher(unit.form()), with_kwargs=True)
                stack.callback(handle.remove)
        for batch in batches:
            evaluated(model, batch)
    return calls


def _kept(given: Any) -> Any:
    """An argument of a call that is repeated: no cache of transformers, which would grow in each."""
    return None if type(given).__module__ == "transformers.cache_utils" else given


def _shape(part: Any) -> str:
    if isinstance(part, Tensor):
        return f"{part.dtype} {list(part.shape)}"
    if isinstance(part, Mapping):
        return " ".join(f"{key}={_shape(value)}" for key, value in part.items())
    return " ".join(map(_shape, part)) if isinstance(part, tuple | list) else type(part).__name__


# ---- the measurement


@dataclass(frozen=True)
class Cost:
    """Of one unit with one option: seconds of all its calls, as a mean over the timed batches, and bytes."""

    seconds: float
    bytes: int


def costs(
    units: Sequence[Unit],
    options: Sequence[Sequence[Option]],
    ranges: Ranges,
    calls: Mapping[int, Calls],
    batches: int,
    kept: ScoreFile,
    progress: bool,
) -> list[dict[Option, Cost]]:
    """Of each unit the costs of its options; those that cannot be built are left out."""
    forms: dict[str, list[int]] = {}
    for i, unit in enumerate(units):
        forms.setdefault(unit.form(), []).append(i)
    found: list[dict[Option, Cost]] = [{} for _ in units]
    with tracked(forms.items(), "time", show=progress) as each:
        for form, members in each:
            first = units[members[0]]
            size = max(1, bytes_of([(one, one.module) for one in first.called()]))
            copies = [units[i] for i in members[: max(1, min(COPIES, int(COPIED_BYTES // size)))]]
            built: dict[Option, list[list[nn.Module]]] = {}
            sizes: dict[Option, int] = {}
            for option in options[members[0]]:
                try:
                    made = [replacements(unit, choice_of(unit, option, ranges)) for unit in copies]
                except (TypeError, ValueError):  # a group that does not divide its rows, and the like
                    continue
                sizes[option] = bytes_of(made[0])
                if option.smoothing != FREE:  # which costs what PLAIN does
                    built[option] = [_as_called(unit, new) for unit, new in zip(copies, made, strict=True)]
            shapes = {
                (place, shape): one.inputs[shape]
                for i in members
                for place, layer in enumerate(units[i].called())
                if (one := calls.get(id(layer.module))) is not None
                for shape in one.counts
            }
            times = {key: _measured(form, key, call, built, kept) for key, call in shapes.items()}
            for i in members:
                for option, size in sizes.items():
                    timed = Option(option.scheme, PLAIN) if option.smoothing == FREE else option
                    seconds = 0.0
                    for place, layer in enumerate(units[i].called()):
                        of = calls.get(id(layer.module), Calls())
                        seconds += sum(count * times[place, shape][timed] for shape, count in of.counts.items())
                    found[i][option] = Cost(seconds / batches, size)
    return found


def _as_called(unit: Unit, new: Sequence[tuple[Any, nn.Module]]) -> list[nn.Module]:
    """The new modules in the order of `Unit.called`."""
    by_layer = {id(layer.module): module.eval() for layer, module in new}
    return [by_layer[id(layer.module)] for layer in unit.called()]


def _measured(
    form: str,
    key: tuple[int, str],
    call: tuple[tuple[Any, ...], dict[str, Any]],
    built: Mapping[Option, list[list[nn.Module]]],
    kept: ScoreFile,
) -> dict[Option, float]:
    """Seconds of one such call with each option."""
    place, shape = key
    arguments, keywords = call
    names = {option: f"seconds {option.title} | {shape} | {place} of {form}" for option in built}

    def runs(option: Option) -> list[Callable[[], object]]:
        modules = [modules[place] for modules in built[option]]
        return [functools.partial(module, *arguments, **keywords) for module in modules]

    if any(name not in kept.scores for name in names.values()):  # all of them, in turns
        for option, seconds in zip(built, interleaved([runs(option) for option in built], ROUNDS), strict=True):
            kept.add(names[option], seconds)
    return {option: kept.scores[names[option]] for option in built}


def interleaved(contenders: Sequence[Sequence[Callable[[], object]]], rounds: int) -> list[float]:
    """The median seconds of one of the calls of each contender; contenders take turns.

    A sample goes through a contender's calls, as far as they fit into WARM_SECONDS, once or several times. Where it is
    shorter than that, an untimed one before it brings what the other contenders have driven out of the caches.
    """
    now = clock()
    plans: list[tuple[Sequence[Callable[[], object]], bool, list[float]]] = []
    with torch.no_grad():
        for calls in contenders:
            calls[0]()
            start = now()
            calls[0]()
            once = max(now() - start, 1e-9)
            turns = calls[: max(1, math.ceil(WARM_SECONDS / once))]
            repeat = max(1, math.ceil(SAMPLE_SECONDS / (once * len(turns))))
            plans.append((list(turns) * repeat, once * len(turns) < WARM_SECONDS, []))
        for _ in range(rounds):
            for turns, warms, seconds in plans:
                for call in turns if warms else ():
                    call()
                start = now()
                for call in turns:
                    call()
                seconds.append((now() - start) / len(turns))
    return [statistics.median(seconds) for _, _, seconds in plans]


def model_seconds(models: Sequence[nn.Module], batches: Sequence[Any], rounds: int = ROUNDS) -> list[float]:
    """The mean seconds of a batch in each of the models, which take turns."""
    totals = [0.0] * len(models)
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        for batch in batches:
            runs = [[lambda model=model: run_batch(model, batch)] for model in models]  # noqa: B023  called in this turn
            for i, seconds in enumerate(interleaved(runs, rounds)):
                totals[i] += seconds / len(batches)
    return totals
