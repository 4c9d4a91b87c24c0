"""The safetensors files of a model's folder. Nothing else is ever opened: no pickle, no code."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Files(Mapping[str, Tensor]):
    """The tensors of a folder by key, each read when it is asked for. Use it in a `with`.

    Raises FileNotFoundError where there are no safetensors files, ValueError, which names the file, where one is not
    what it says: cut short, its header broken, or a key that the index promises not in it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.paths = files_of(self.folder)
        self._stack = ExitStack()
        self._where: dict[str, Any] = {}

    def __enter__(self) -> "Files":
        try:
            for path in self.paths:
                file = self._stack.enter_context(_open(path))
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

    def shape(self, key: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype, "I8" or "F32" for example, without reading the values."""
        part = self._where[key].get_slice(key)
        return tuple(part.get_shape()), str(part.get_dtype())

    def _check_index(self) -> None:
        if not (self.folder / INDEX).exists():
            return
        for key in index_of(self.folder):
            if key not in self._where:
                raise ValueError(f"{key} is in {INDEX}, but not in its file")


def files_of(folder: Path) -> list[Path]:
    """The files with the weights: one, or those that the index names."""
    if (folder / INDEX).exists():
        names = sorted(set(index_of(folder).values()))
        for name in names:
            if Path(name).name != name or not (folder / name).exists():
                raise ValueError(f"{INDEX} of {folder} names {name!r}, which is no file in the folder")
        return [folder / name for name in names]
    if not (folder / SINGLE).exists():
        raise FileNotFoundError(
            f"{folder} must hold {SINGLE} or {INDEX}; pickled weights are not read: save them as safetensors"
        )
    return [folder / SINGLE]


def index_of(folder: Path) -> dict[str, str]:
    """Key -> file name."""
    try:
        said = json.loads((folder / INDEX).read_text())["weight_map"]
        if not isinstance(said, dict) or not all(isinstance(name, str) for name in said.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{INDEX} of {folder} must hold a weight_map of keys to file names") from error
    return said


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
