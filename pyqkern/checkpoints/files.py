"""The files of a model's folder: JSON and safetensors. Nothing else is ever opened: no pickle, no code."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """A file with a JSON object. ValueError, which names the file, for anything else; OSError where it is not there."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path} must be JSON in UTF-8: {reason}") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(said).__name__}")
    check_depth(said, path)
    return said


DEEPEST = 100  # JSON in JSON; a config has 5


def check_depth(said: Any, where: object) -> None:
    """ValueError for JSON that whoever copies or prints it would fail on, because Python's stack ends."""
    inside = [said]
    for _ in range(DEEPEST):
        inside = [
            value
            for one in inside
            if isinstance(one, dict | list)
            for value in (one.values() if isinstance(one, dict) else one)
        ]
        if not inside:
            return
    raise ValueError(f"{where} must be JSON of at most {DEEPEST} levels: it is nested too deep")


def root_of(folder: Path) -> Path:
    """Where the files of a folder may be: in it, or, of a snapshot in the hub's cache, among the blobs it links to."""
    folder = folder.resolve()
    cache = folder.parent.parent
    return cache if folder.parent.name == "snapshots" and (cache / "blobs").is_dir() else folder


def check_inside(path: Path, root: Path) -> Path:
    """The path, if it is a regular file within `root`, links followed. ValueError, which names it, if not."""
    if not path.resolve().is_relative_to(root):
        raise ValueError(f"{path} must be in its folder, but is a link out of it, to {path.resolve()}")
    if not path.is_file():
        raise ValueError(f"{path} must be a regular file")
    return path


# Names of dtypes in safetensors; others are not in models that are quantized here.
DTYPES = {
    "BOOL": torch.bool,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class Files(Mapping[str, Tensor]):
    """The tensors of a folder by key, each read when it is asked for. Use it in a `with`.

    Raises FileNotFoundError where there are no safetensors files, ValueError, which names the file, where one is not
    what it says: cut short, its header broken, or a key that the index promises not in it.
    """

    def __init__(self, folder: str | Path, paths: list[Path] | None = None) -> None:
        """paths: which files; by default those that are there by their usual names."""
        self.folder = Path(folder)
        self.paths = files_of(self.folder) if paths is None else paths
        self._stack = ExitStack()
        self._where: dict[str, Any] = {}
        self._names: dict[int, str] = {}

    def __enter__(self) -> "Files":
        try:
            for path in self.paths:
                file = self._stack.enter_context(_open(path))
                self._names[id(file)] = path.name
                for key in file.keys():  # noqa: SIM118  the file is no mapping
                    if key in self._where:
                        raise ValueError(f"{key} must be in one file of {self.folder}, got it in {path.name} again")
                    self._where[key] = file
            self._check_index()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def __getitem__(self, key: str) -> Tensor:
        try:
            tensor: Tensor = self._where[key].get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{key} cannot be read from {self.folder}: {error}") from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def shape(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype, without reading the values."""
        part = self._where[key].get_slice(key)
        if part.get_dtype() not in DTYPES:
            raise ValueError(f"{key} in {self.file_of(key)} must be of {', '.join(DTYPES)}, got {part.get_dtype()}")
        return tuple(part.get_shape()), DTYPES[part.get_dtype()]

    def file_of(self, key: str) -> str:
        """The name of the file that holds the key, for messages."""
        return self._names[id(self._where[key])]

    def _check_index(self) -> None:
        if not (self.folder / INDEX).exists():
            return
        said = index_of(self.folder)
        for key, name in said.items():
            if key not in self._where or self.file_of(key) != name:
                raise ValueError(f"{key} is in {INDEX} of {self.folder}, but not in its file, {name}")
        for key in self._where:
            if key not in said:
                raise ValueError(f"{key} is in {self.file_of(key)} of {self.folder}, but not in {INDEX}")


def files_of(folder: Path) -> list[Path]:
    """The files with the weights: one, or those that the index names."""
    root = root_of(folder)
    if (folder / INDEX).exists():
        names = sorted(set(index_of(folder).values()))
        for name in names:
            if Path(name).name != name or not (folder / name).exists():
                raise ValueError(f"{INDEX} of {folder} names {name!r}, which is no file in the folder")
        return [check_inside(folder / name, root) for name in names]
    if not (folder / SINGLE).exists():
        raise FileNotFoundError(
            f"{folder} must hold {SINGLE} or {INDEX}; pickled weights are not read: save them as safetensors"
        )
    return [check_inside(folder / SINGLE, root)]


def index_of(folder: Path) -> dict[str, str]:
    """Key -> file name."""
    said = read_json(check_inside(folder / INDEX, root_of(folder))).get("weight_map")
    if not isinstance(said, dict) or not all(isinstance(name, str) for name in said.values()):
        raise ValueError(f"{INDEX} of {folder} must hold a weight_map of keys to file names")
    return said


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
