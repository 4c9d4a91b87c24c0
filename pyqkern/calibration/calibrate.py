"""calibrate: what ranges the inputs of a model's linears take, by one of several observers."""

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyqkern.calibration.observers import OBSERVERS, Observer
from pyqkern.calibration.run import linears_of, see_inputs
from pyqkern.models.find import RECURRENT, find_layers
from pyqkern.schemes import Range, check_type


class Ranges(Mapping[str, Range]):
    """The ranges of a model's linears by qualified name, the observer that chose them, and what was not reached."""

    def __init__(self, ranges: Mapping[str, Range], observer: str, not_reached: Iterable[str] = ()) -> None:
        self._ranges = dict(ranges)
        self.observer = observer
        self.not_reached = tuple(not_reached)

    def __getitem__(self, name: str) -> Range:
        return self._ranges[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranges)

    def __len__(self) -> int:
        return len(self._ranges)

    def __repr__(self) -> str:
        return f"Ranges({len(self)} linears, observer={self.observer!r}, not_reached={list(self.not_reached)})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON. An fp32 value survives the way through decimal."""
        ranges = {name: {"lo": r.lo.tolist(), "hi": r.hi.tolist()} for name, r in self.items()}
        return {"observer": self.observer, "not_reached": list(self.not_reached), "ranges": ranges}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Ranges":
        """The inverse of to_dict. Raises ValueError naming the entry that is wrong."""
        if not isinstance(data, Mapping) or not isinstance(data.get("ranges"), Mapping):
            raise ValueError('ranges must be an object with "observer" and "ranges", as Ranges.to_dict makes it')
        ranges = {}
        for name, entry in data["ranges"].items():
            try:
                bounds = Range(*(torch.tensor(entry[key], dtype=torch.float32, device="cpu") for key in ("lo", "hi")))
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"ranges[{name!r}] must hold numbers lo and hi, got {entry!r:.80}") from error
            fits = bounds.lo.shape == bounds.hi.shape and bounds.lo.dim() <= 1
            if not fits or not (bounds.lo <= bounds.hi).all() or not bounds.absmax.isfinite().all():
                raise ValueError(f"ranges[{name!r}] must have finite lo <= hi of one shape, got {entry!r:.80}")
            ranges[name] = bounds
        return cls(ranges, str(data.get("observer", "")), [str(name) for name in data.get("not_reached", ())])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON; an interruption leaves the file that was there."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(self.to_dict()) + "\n")
        part.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Ranges":
        """Reads what `save` wrote. Raises ValueError for anything else."""
        try:
            data = json.loads(Path(path).read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} must be JSON as Ranges.save writes it: {error}") from error
        return cls.from_dict(data)


def calibrate(
    model: nn.Module, batches: Iterable[Any], observer: str = "mse", *, per_channel: bool = False, progress: bool = True
) -> Ranges:
    """Runs the batches through the model and returns the range of each linear's input, as the observer chooses it.

    batches: any iterable of what the model takes: dicts (keywords), tuples (arguments) or single tensors.
    observer: "minmax", "moving_average", "percentile" (0.1 and 99.9), "mse" or "entropy".
    per_channel: a range for each input feature (what `smooth` takes), else one for the tensor (what int8-static takes).

    The model runs in eval mode without gradients and is left as it was. Recurrent layers are left out: quantized, they
    take the range of each step as it comes, and "int8-static" is no scheme of theirs. Linears that no batch reached are
    in `ranges.not_reached`, and a warning names them. Raises ValueError for an unknown observer, no batches, a model
    without linears, and for NaN or an infinity in a linear's input, naming batch and layer.

    >>> import torch, pyqkern
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> ranges = pyqkern.calibrate(model, [torch.tensor([[-1.0, 0.0, 1.0, 3.0]])], "minmax", progress=False)
    >>> ranges["0"].lo, ranges["0"].hi
    (tensor(-1.), tensor(3.))
    >>> pyqkern.replace_linear(model, "int8-static", ranges=ranges)[0].scheme.name
    'int8-static'
    """
    check_type("observer", observer, str, "a name")
    check_type("per_channel", per_channel, bool, "a bool")
    if observer not in OBSERVERS:
        raise ValueError(f"observer must be one of {', '.join(map(repr, OBSERVERS))}, got {observer!r}")
    linears = linears_of(model)
    if not linears:
        recurrent = len(find_layers(model, RECURRENT))
        why = f", but {recurrent} recurrent layers, which need no ranges" if recurrent else ""
        raise ValueError(f"model must have linears to calibrate, got none in {type(model).__name__}{why}")
    observers: dict[str, Observer] = {}

    def see(name: str, x: Tensor) -> None:
        observers.setdefault(name, OBSERVERS[observer](per_channel)).observe(x)

    see_inputs(model, batches, see, title=f"calibrate {observer}", progress=progress)
    missed = [name for name in linears if name not in observers]
    if missed:
        some = ", ".join(missed[:4]) + (", ..." if len(missed) > 4 else "")
        warnings.warn(f"calibration did not reach {len(missed)} linears, which have no range: {some}", stacklevel=2)
    return Ranges({name: Range(*observers[name].range()) for name in linears if name in observers}, observer, missed)
