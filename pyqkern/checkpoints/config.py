"""The config.json of a folder, and what it says of quantized layers, in whatever format they are."""

import json
from pathlib import Path
from typing import Any

from pyqkern.checkpoints.files import Files
from pyqkern.checkpoints.formats import format_of
from pyqkern.checkpoints.layers import Group
from pyqkern.schemes import Scheme, get_scheme

CONFIG = "config.json"
VERSION = 1


def read_json(path: Path) -> dict[str, Any]:
    """A file with a JSON object. ValueError, which names the file, for anything else; OSError where it is not there."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path} must be JSON in UTF-8: {reason}") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(said).__name__}")
    return said


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """The quantization_config in a folder's config.json; None for a model in float. ValueError as `read_json`."""
    said = read_json(folder / CONFIG).get("quantization_config")
    if said is not None and not isinstance(said, dict):
        raise ValueError(f"quantization_config of {folder / CONFIG} must be an object, got {type(said).__name__}")
    return said


def groups_of(said: dict[str, Any], files: Files, scheme: Scheme | None = None) -> list[Group]:
    """The quantized layers of a folder. said: its quantization_config. scheme: as in `checkpoint_config`.

    Raises ValueError where the files hold none of the format that `said` speaks of.
    """
    format = format_of(said)
    groups = format.groups(said, files, scheme)
    if not any(group.modules() for group in groups):
        raise ValueError(f"the files of {files.folder} hold no layer in {format.name}'s format, whatever {CONFIG} says")
    return groups


def own_config(folder: Path, said: dict[str, Any], scheme: str | Scheme | None = None) -> dict[str, Any]:
    """The quantization_config of a folder as pyqkern writes its own, so that transformers hands it to pyqkern.

    said: what config.json has, in any format. scheme: what INT8 weights are computed with; None: what the format means.
    Raises ValueError, which names the key, for files that are not what they say.
    """
    format = format_of(said)
    if format.name == "pyqkern":
        return said
    with Files(folder) as files:
        groups = groups_of(said, files, None if scheme is None else get_scheme(scheme))
    return {
        "quant_method": "pyqkern",
        "version": VERSION,
        "scheme": groups[0].to_dict()["scheme"],
        "format": format.name,
        "layers": [group.to_dict() for group in groups],
    }
