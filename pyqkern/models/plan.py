"""Plan: which layer of a model gets which scheme. `pyqkern.auto` makes one; docs/auto.md describes its file.

`replace_linear`, `optimize` and `PyqkernConfig` take a plan where they take a scheme.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pyqkern.models.summary import said_bytes, table
from pyqkern.schemes import Scheme

VERSION = 1
FUSED_KINDS = ("encoder layer", "decoder layer")
KINDS = (*FUSED_KINDS, "linear", "experts", "recurrent layer", "embedding")
OBJECTIVES = ("time", "bytes")
MAX_EXPONENT = 20  # what `smooth` keeps to


@dataclass(frozen=True)
class Smoothing:
    """One pair of `smooth` as data: columns j of the linears `after` are multiplied by 2**exponents[j].

    before: the linear whose output channel j is divided by it; "": their input is, in front of each of them.
    """

    before: str
    after: tuple[str, ...]
    exponents: tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """What becomes of one layer, or of one encoder or decoder layer as a whole.

    layers: the linear, embedding, recurrent layer or experts, or the linears of an encoder or decoder layer, and the
    shapes of their weights as `summary` has them. scheme: None: it stays in float, and `reason` may say why.
    smoothing: what is done before it is quantized. ranges: for "int8-static" lo and hi of each linear's input.
    seconds, bytes: as chosen, of all its calls in one pass; float_seconds, float_bytes: in float. damage: the change of
    the model's outputs with this alone quantized.
    """

    name: str
    kind: str
    scheme: Scheme | None
    layers: Mapping[str, tuple[int, ...]]
    smoothing: tuple[Smoothing, ...] = ()
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    seconds: float = 0.0
    float_seconds: float = 0.0
    bytes: int = 0
    float_bytes: int = 0
    damage: float = 0.0
    reason: str = ""

    @property
    def title(self) -> str:
        """What a table calls the scheme."""
        if self.scheme is None:
            return f"float: {self.reason}" if self.reason else "float"
        return self.scheme.name + (", smoothed" if self.smoothing else "")


@dataclass(frozen=True)
class Figures:
    """A whole model in numbers: float, one in a single scheme, or one that was tried. None: not measured.

    seconds, score: predicted from the layers'. bytes: exact. damage: the sum of the layers'.
    """

    name: str
    seconds: float
    bytes: int
    damage: float
    score: float | None = None
    measured_seconds: float | None = None
    measured_score: float | None = None


@dataclass(frozen=True)
class Plan:
    """The choices for a model, and how they came about.

    figures: of the plan itself. compared: of float, of single schemes and of what else was tried. note: what was found,
    in words. machine: what the times are of.
    """

    choices: tuple[Choice, ...]
    objective: str = "time"
    budget: float = 0.0
    figures: Figures | None = None
    compared: tuple[Figures, ...] = ()
    note: str = ""
    machine: str = ""

    @property
    def quantizes(self) -> bool:
        """Whether anything is not in float."""
        return any(choice.scheme is not None for choice in self.choices)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as docs/auto.md describes it."""
        choices = []
        for choice in self.choices:
            said = asdict(choice)
            said["scheme"] = None if choice.scheme is None else choice.scheme.to_dict()
            choices.append({key: value for key, value in said.items() if value not in ((), {}, "")})
        return {
            "version": VERSION,
            "objective": self.objective,
            "budget": self.budget,
            "note": self.note,
            "machine": self.machine,
            "figures": None if self.figures is None else asdict(self.figures),
            "compared": [asdict(figures) for figures in self.compared],
            "choices": choices,
        }

    @classmethod
    def from_dict(cls, said: Any) -> "Plan":
        """The inverse of to_dict. ValueError, which names the entry, for anything else."""
        read = _Reader("plan", said, ("version", "choices"), tuple(_PLAN))
        version = read("version", _whole)
        if version != VERSION:
            raise ValueError(f"version of the plan must be {VERSION}, got {version}; make it anew, or update pyqkern")
        values = {key: read(key, check) for key, check in _PLAN.items() if key in said and key != "version"}
        names = [name for choice in values["choices"] for name in choice.layers]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"choices of the plan must name each layer once, got {twice!r} twice")
        return cls(**values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON; an interruption leaves the file that was there."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        part.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Reads what `save` wrote. ValueError, which names file and entry, for anything else."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (UnicodeDecodeError, RecursionError, ValueError) as error:  # JSON's own is a ValueError
            raise ValueError(f"{path} must hold a plan as Plan.save writes it: {error}") from error

    def __str__(self) -> str:
        header, rows, totals = self.rows()
        return "\n".join([table([header, *rows], totals, left=2), *([self.note] if self.note else [])])

    def rows(self) -> tuple[Sequence[str], Sequence[Sequence[str]], Sequence[Sequence[str]]]:
        """Header, layers and totals of the plan as a table; the first two columns are texts."""
        rows = []
        for choice in self.choices:
            cells = (f"{choice.damage:.3g}", f"{1e3 * choice.seconds:.3f}", said_bytes(choice.bytes))
            rows.append((choice.name or "(the model)", choice.title, *cells))
        totals = [("the model", "predicted or measured", "damage", "ms", "bytes")]
        shown = [*self.compared, *([] if self.figures is None else [replace(self.figures, name="this plan")])]
        for one in shown:
            score = one.measured_score if one.measured_score is not None else one.score
            known = (
                "" if score is None else f"score {score:.4f}" + ("" if one.measured_score is not None else " (pred.)")
            )
            seconds = one.seconds if one.measured_seconds is None else one.measured_seconds
            time = f"{1e3 * seconds:.3f}" + ("" if one.measured_seconds is not None else " (pred.)")
            totals.append((one.name, known, f"{one.damage:.3g}", time, said_bytes(one.bytes)))
        return ("layer", "what it becomes", "damage", "ms", "bytes"), rows, totals if shown else []


# ---- reading


class _Reader:
    """The entries of a JSON object, each checked; errors name them."""

    def __init__(self, where: str, said: Any, needed: tuple[str, ...], known: tuple[str, ...]) -> None:
        if not isinstance(said, dict):
            raise ValueError(f"{where} must be an object, got {type(said).__name__}")
        if unknown := [key for key in said if key not in known]:
            raise ValueError(f"{where} must have entries of {', '.join(known)}, got {unknown[0]!r:.80}")
        if missing := [key for key in needed if key not in said]:
            raise ValueError(f"{where} must have {missing[0]!r}, which is missing")
        self.where, self.said = where, said

    def __call__(self, key: str, check: Callable[[str, Any], Any]) -> Any:
        return check(f"{key} of {self.where}", self.said[key])


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be text, got {value!r:.80}")
    return value


def _one_of(*names: str) -> Callable[[str, Any], str]:
    def check(where: str, value: Any) -> str:
        if value not in names:
            raise ValueError(f"{where} must be one of {', '.join(names)}, got {value!r:.80}")
        return str(value)

    return check


def _number(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {value!r:.80}")
    return float(value)


def _number_or_none(where: str, value: Any) -> float | None:
    return None if value is None else _number(where, value)


def _whole(where: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where} must be a whole number, got {value!r:.80}")
    return value


def _items(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where} must be a list, got {type(value).__name__}")
    return list(value)


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, got {type(value).__name__}")
    return value


def _scheme(where: str, value: Any) -> Scheme | None:
    if value is None:
        return None
    try:
        return Scheme.from_dict({"name": value} if isinstance(value, str) else _object(where, value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _shapes(where: str, value: Any) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name, shape in _object(where, value).items():
        shapes[name] = tuple(_whole(f"{where}, {name!r},", size) for size in _items(f"{where}, {name!r},", shape))
    if not shapes:
        raise ValueError(f"{where} must name a layer, got none")
    return shapes


def _ranges(where: str, value: Any) -> dict[str, tuple[float, float]]:
    found = {}
    for name, ends in _object(where, value).items():
        numbers = [_number(f"{where}, {name!r},", end) for end in _items(f"{where}, {name!r},", ends)]
        if len(numbers) != 2 or numbers[0] > numbers[1]:
            raise ValueError(f"{where}, {name!r}, must be [lo, hi] with lo <= hi, got {numbers!r:.80}")
        found[name] = (numbers[0], numbers[1])
    return found


def _smoothings(where: str, value: Any) -> tuple[Smoothing, ...]:
    found = []
    for i, said in enumerate(_items(where, value)):
        read = _Reader(f"{where}[{i}]", said, tuple(_SMOOTHING), tuple(_SMOOTHING))
        found.append(Smoothing(**{key: read(key, check) for key, check in _SMOOTHING.items()}))
    return tuple(found)


def _names(where: str, value: Any) -> tuple[str, ...]:
    return tuple(_text(where, name) for name in _items(where, value))


def _exponents(where: str, value: Any) -> tuple[int, ...]:
    exponents = tuple(_whole(where, exponent) for exponent in _items(where, value))
    if any(abs(exponent) > MAX_EXPONENT for exponent in exponents):
        raise ValueError(f"{where} must be within {-MAX_EXPONENT} and {MAX_EXPONENT}, got {max(exponents, key=abs)}")
    return exponents


def _figures(where: str, value: Any) -> Figures:
    read = _Reader(where, value, ("name", "seconds", "bytes", "damage"), tuple(_FIGURES))
    return Figures(**{key: read(key, check) for key, check in _FIGURES.items() if key in value})


def _compared(where: str, value: Any) -> tuple[Figures, ...]:
    return tuple(_figures(f"{where}[{i}]", one) for i, one in enumerate(_items(where, value)))


def _choices(where: str, value: Any) -> tuple[Choice, ...]:
    choices = []
    for i, said in enumerate(_items(where, value)):
        read = _Reader(f"choices[{i}]", said, ("name", "kind", "scheme", "layers"), tuple(_CHOICE))
        choice = Choice(**{key: read(key, check) for key, check in _CHOICE.items() if key in said})
        _check_choice(f"choices[{i}]", choice)
        choices.append(choice)
    return tuple(choices)


def _check_choice(where: str, choice: Choice) -> None:
    for smoothing in choice.smoothing:
        names = [*smoothing.after, *([smoothing.before] if smoothing.before else [])]
        if not smoothing.after or (unknown := [name for name in names if name not in choice.layers]):
            raise ValueError(f"smoothing of {where} must name its layers, got {(unknown or ['none'])[0]!r}")
        for name in smoothing.after:
            if choice.layers[name][-1] != len(smoothing.exponents):
                raise ValueError(
                    f"exponents of {where} must be one for each in_features={choice.layers[name][-1]} of {name}, got "
                    f"{len(smoothing.exponents)}"
                )
        if smoothing.before and choice.layers[smoothing.before][0] != len(smoothing.exponents):
            raise ValueError(f"exponents of {where} must be one for each of the out_features of {smoothing.before}")
    scheme = choice.scheme
    missing = [name for name in choice.layers if name not in choice.ranges]
    if scheme is not None and scheme.needs_ranges and missing:
        raise ValueError(f"ranges of {where} must have {missing[0]!r}, which {scheme.name} needs")


_SMOOTHING: dict[str, Callable[[str, Any], Any]] = {"before": _text, "after": _names, "exponents": _exponents}
_FIGURES: dict[str, Callable[[str, Any], Any]] = {
    "name": _text, "seconds": _number, "bytes": _whole, "damage": _number, "score": _number_or_none,
    "measured_seconds": _number_or_none, "measured_score": _number_or_none,
}  # fmt: skip
_CHOICE: dict[str, Callable[[str, Any], Any]] = {
    "name": _text, "kind": _one_of(*KINDS), "scheme": _scheme, "layers": _shapes, "smoothing": _smoothings,
    "ranges": _ranges, "seconds": _number, "float_seconds": _number, "bytes": _whole, "float_bytes": _whole,
    "damage": _number, "reason": _text,
}  # fmt: skip
_PLAN: dict[str, Callable[[str, Any], Any]] = {
    "version": _whole, "choices": _choices, "objective": _one_of(*OBJECTIVES), "budget": _number,
    "figures": lambda where, value: None if value is None else _figures(where, value), "compared": _compared,
    "note": _text, "machine": _text,
}  # fmt: skip
