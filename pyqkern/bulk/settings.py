"""Settings: which model, and what becomes of a text."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from pyqkern.bulk.values import DTYPES, POOLINGS
from pyqkern.checkpoints.config import quantization_of
from pyqkern.checkpoints.files import read_json
from pyqkern.schemes import Scheme, get_scheme

FLOAT = "float32"  # the name of no scheme: the model as it is
BATCH_TOKENS = 2048
PARTITION_ROWS = 2048


@dataclass(frozen=True)
class Settings:
    """What a row depends on, and how it is computed. `checked` says what is allowed.

    model: a folder as save_pretrained writes it. scheme: that its linears are quantized with as they are read, if they
    are not yet; FLOAT: none. task: "embed" or "classify"; the three behind it are of "embed". batch_tokens, threads:
    change no bit of a row where `differs` is None. digest: of the model's files; a process reads the model
    again where they have changed.
    """

    model: str
    task: str
    scheme: Scheme | str | None = None
    pooling: str | None = None
    normalize: bool = True
    dtype: str = "fp32"
    max_length: int | None = None
    batch_tokens: int = BATCH_TOKENS
    threads: int | None = None
    digest: str = ""


def checked(settings: Settings) -> Settings:
    """The settings with what is by default filled in. Raises TypeError and ValueError."""
    folder = Path(settings.model)
    if not folder.is_dir():
        raise ValueError(f"model must be a folder as save_pretrained writes it, got {settings.model!r}")
    _check_numbers(settings)
    if settings.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {settings.dtype!r}")
    if settings.pooling not in (None, *POOLINGS):
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {settings.pooling!r}")
    if not isinstance(settings.normalize, bool):
        raise TypeError(f"normalize must be a bool, got {type(settings.normalize).__name__}")
    settings = replace(settings, model=str(folder.resolve()), scheme=_scheme(folder, settings.scheme))
    if settings.task == "embed":
        settings = replace(settings, pooling=settings.pooling or _pooling(folder))
    return settings


def _check_numbers(settings: Settings) -> None:
    for name in ("max_length", "batch_tokens", "threads"):
        value = getattr(settings, name)
        if name != "batch_tokens" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        least = 3 if name == "max_length" else 1  # two tokens are special ones
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _scheme(folder: Path, scheme: Scheme | str | None) -> Scheme | str | None:
    """None for a folder that is quantized already, else a scheme, by default "int8", or FLOAT."""
    if quantization_of(folder) is not None:
        if scheme is not None:
            raise ValueError(f"scheme must be left out for {folder}, which is quantized already, got {scheme!r}")
        return None
    if scheme is None or scheme == FLOAT:
        return scheme or get_scheme("int8")
    found = get_scheme(scheme)
    if found.needs_ranges:
        raise ValueError(
            f"scheme must need no calibration, got {found.name!r}; calibrate, save_pretrained and give that"
        )
    return found


def _pooling(folder: Path) -> str:
    """What sentence-transformers' files say of the pooling; "mean" without them. ValueError for any other."""
    modules = json.loads((folder / "modules.json").read_text()) if (folder / "modules.json").exists() else []
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules if isinstance(module, dict)]
    if other := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise ValueError(f"{folder} must have no modules beside Transformer, Pooling and Normalize, got {other[0]}")
    file = folder / "1_Pooling" / "config.json"
    said = read_json(file) if file.exists() else {}
    modes = [
        key.removeprefix("pooling_mode_") for key, value in said.items() if key.startswith("pooling_mode_") and value
    ]
    modes = [said["pooling_mode"]] if "pooling_mode" in said else modes or ["mean_tokens"]
    names = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"}
    if len(modes) != 1 or modes[0] not in names:
        raise ValueError(
            f"{file} must ask for mean or CLS pooling, got {', '.join(map(str, modes))}; give pooling yourself"
        )
    return names[modes[0]]
