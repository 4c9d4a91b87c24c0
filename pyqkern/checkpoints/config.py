"""The config.json of a folder, and what it says of quantized layers, in whatever format they are."""

import math
from pathlib import Path
from typing import Any

import torch

from pyqkern.checkpoints.files import Files, check_depth, check_inside, read_json, root_of
from pyqkern.checkpoints.formats import FORMATS, format_of
from pyqkern.checkpoints.formats.base import Format
from pyqkern.checkpoints.layers import Group, groups_from, module_of, scheme_from
from pyqkern.models.plan import Plan
from pyqkern.schemes import Scheme, get_scheme

CONFIG = "config.json"
VERSION = 1


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """The quantization_config in a folder's config.json; None for a model in float. ValueError as `read_json`."""
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(f"{folder} must hold {CONFIG}, as save_pretrained writes it")
    config = read_json(check_inside(folder / CONFIG, root_of(folder)))
    check_config(config, str(folder / CONFIG))
    return config.get("quantization_config")


def check_config(config: Any, where: str) -> None:
    """ValueError, which names `where`, for a config.json that is no object, or whose quantization_config is none."""
    if not isinstance(config, dict):
        raise ValueError(f"{where} must hold a JSON object, got {type(config).__name__}")
    check_depth(config, where)
    for key, value in config.items():
        if key != "quantization_config" and isinstance(value, dict) and value.get("quant_method") == "pyqkern":
            raise ValueError(f"{where} must call what pyqkern has written quantization_config, got {key!r}")
    said = config.get("quantization_config")
    if said is None:
        return
    if not isinstance(said, dict):
        raise ValueError(f"quantization_config of {where} must be an object, got {type(said).__name__}")
    method = said.get("quant_method")
    if method is None and (said.get("load_in_8bit") or said.get("load_in_4bit")):
        return  # bitsandbytes, in files of 2023
    if not isinstance(method, str) or (method != "pyqkern" and {"scheme", "layers"} <= said.keys()):
        raise ValueError(f"quant_method in {where} must name the library that wrote the options, got {method!r:.200}")
    if method == "pyqkern":
        try:
            check_own(said)
            groups_from(said.get("layers"))
        except ValueError as error:
            raise ValueError(f"quantization_config of {where}: {error}") from error


def groups_of(said: dict[str, Any], files: Files, scheme: Scheme | None = None) -> list[Group]:
    """The quantized layers of a folder. said: its quantization_config. scheme: as in `checkpoint_config`.

    Raises ValueError where the files hold none of the format that `said` speaks of.
    """
    try:
        format = format_of(said)
        groups = format.groups(said, files, scheme)
    except ValueError as error:
        raise ValueError(f"{error}; in {CONFIG} or the files of {files.folder}") from error
    if not any(group.modules() for group in groups):
        raise ValueError(f"the files of {files.folder} hold no layer in {format.name}'s format, whatever {CONFIG} says")
    check_agreement(groups, format, files)
    return groups


def check_agreement(groups: list[Group], format: Format, files: Files) -> None:
    """ValueError, which names file and key, where the files lack a layer of config.json, or have one that it lacks."""
    modules = dict.fromkeys(name for group in groups for name in group.modules())
    found = {module_of(key) for key in files}
    for name in modules:
        if name not in found:
            raise ValueError(f"{name}.weight is missing from the files of {files.folder}, though {CONFIG} names it")
    marks = tuple(f".{mark}" for mark in format.marks)
    for key in files:
        mark = next((mark for mark in marks if key.endswith(mark)), None)
        module = module_of(key) if mark is None else key.removesuffix(mark)
        is_quantized = mark is not None or (module is not None and files.shape(key)[1] in (torch.int8, torch.uint8))
        if is_quantized and module not in modules:
            raise ValueError(
                f"{key} in {files.file_of(key)} of {files.folder} is of a quantized layer, but {CONFIG} or the other "
                f"tensors of {format.name}'s format name none such"
            )


def check_float(files: Files) -> None:
    """For a folder whose config.json says nothing of quantization: ValueError, naming a key of a quantized layer."""
    marks = {mark for format in FORMATS.values() for mark in format.marks}
    for key in files:
        if module_of(key) is None or files.shape(key)[1] not in (torch.int8, torch.uint8):
            continue
        name = key.rpartition(".")[0]
        beside = [f"{key}_scale", f"{key}_absmax"]  # of a recurrent layer
        beside += [f"{one}.{mark}" for one in (name, key) for mark in marks]
        if any(one in files for one in beside):
            raise ValueError(
                f"{CONFIG} of {files.folder}, or the config given instead, must have the quantization_config that the "
                f"model was saved with: {key} in {files.file_of(key)} is of a quantized layer"
            )


def own_config(folder: Path, said: dict[str, Any], scheme: str | Scheme | None = None) -> dict[str, Any]:
    """The quantization_config of a folder as pyqkern writes its own, so that transformers hands it to pyqkern.

    said: what `quantization_of` returned, in any format. scheme: what INT8 weights are computed with; None: what the
    format means.
    Raises ValueError, which names the key, for files that are not what they say.
    """
    with Files(folder) as files:
        groups = groups_of(said, files, None if scheme is None else get_scheme(scheme))
    format = format_of(said)
    if format.name == "pyqkern":
        return said
    return {
        "quant_method": "pyqkern",
        "version": VERSION,
        "scheme": groups[0].to_dict()["scheme"],
        "format": format.name,
        "layers": [group.to_dict() for group in groups],
    }


def check_own(said: dict[str, Any]) -> None:
    """ValueError for a quantization_config that pyqkern would not write: options unknown or of another type."""
    known = (
        "quant_method", "version", "scheme", "include", "exclude", "embeddings", "recurrent", "format", "layers",
        "plan", "input_scales",
    )  # fmt: skip
    if unknown := [key for key in said if key not in known]:
        raise ValueError(f"quantization_config must have options of {', '.join(known)}, got {unknown[0]!r}")
    if said.get("version", VERSION) != VERSION or isinstance(said.get("version"), bool):
        raise ValueError(f"version must be {VERSION}, got {said['version']!r}; update pyqkern")
    for name in ("include", "exclude"):
        patterns = said.get(name)
        patterns = [] if patterns is None else patterns
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            raise ValueError(f"{name} must be a list of name patterns, got {patterns!r:.200}")
    if said.get("format", "pyqkern") not in tuple(FORMATS):
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {said['format']!r}")
    for name in ("embeddings", "recurrent"):
        if not isinstance(said.get(name, False), bool):
            scheme_from(said[name])
    scheme_from(said.get("scheme", "int8"))
    if said.get("layers") is not None:
        groups_from(said["layers"])
    if said.get("plan") is not None:
        Plan.from_dict(said["plan"])
    _check_input_scales(said.get("input_scales"))


def _check_input_scales(said: Any) -> None:
    """name of a linear -> by what its input is multiplied, a number for each of its channels."""
    if said is None:
        return
    if not isinstance(said, dict):
        raise ValueError(f"input_scales must map names to lists of numbers, got {said!r:.200}")
    for name, scale in said.items():
        numbers = scale if isinstance(scale, list) else []
        good = all(isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one) for one in numbers)
        if not numbers or not good:
            raise ValueError(f"input_scales of {name!r} must be a list of finite numbers, got {scale!r:.200}")
