"""The folder that a job writes: partitions in Parquet, rows that were kept out, and what they were made with.

    OUTPUT/part-00000.parquet, ...    a partition each; readers of Parquet datasets take the folder
    OUTPUT/_errors/part-00000.jsonl   of each partition with rows that were kept out: {"row": 17, "reason": "..."}
    OUTPUT/_job.json                  model, settings and input, which a run that goes on has to share
    OUTPUT/_model/                    the quantized model, as long as the job runs

A file gets its name when all of it is on disk, so that whatever has a name is whole.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MANIFEST, ERRORS, MODEL, LOCK = "_job.json", "_errors", "_model", "_lock"
UNFINISHED = ".unfinished"
_COUNTS = b"pyqkern"  # key of a partition's metadata


class Output:
    """The folder of one job. `opened` makes one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / MODEL

    def counts(self, number: int) -> dict[str, int] | None:
        """rows, bad and truncated of a finished partition; None where it is not finished."""
        path = self._part(number)
        if not path.exists():
            return None
        try:
            found: dict[str, int] = json.loads(pq.read_schema(path).metadata[_COUNTS])
        except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no partition of this job: {error}; remove it to have it made again") from error
        return found

    def write(self, number: int, table: pa.Table, bad: Mapping[int, str], counts: Mapping[str, int]) -> None:
        """A partition; its errors before it. OSError leaves nothing of that name."""
        if bad:
            lines = "".join(json.dumps({"row": row, "reason": why}) + "\n" for row, why in sorted(bad.items()))
            _whole(self.folder / ERRORS / f"part-{number:05d}.jsonl", lambda path: _write_text(path, lines))
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), _COUNTS: json.dumps(counts)})
        _whole(self._part(number), lambda path: pq.write_table(table, path))

    def finish(self) -> None:
        shutil.rmtree(self.model, ignore_errors=True)

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.parquet"


@contextmanager
def opened(folder: Path, manifest: Mapping[str, Any]) -> Iterator[Output]:
    """The folder of a job, new or to be gone on with; for no other process while the block runs.

    manifest: plain data. Raises FileExistsError for a folder of something else, and ValueError, which names what
    differs, for that of a job with another manifest.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} must be a new folder or that of a job, but is a file")
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).exists() and not (folder / LOCK).exists():
        raise FileExistsError(f"{folder} must be a new folder or that of a job, but holds something else")
    (folder / ERRORS).mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"another process is at work on {folder}") from error
        _agree(folder, json.loads(json.dumps(manifest)))
        for left in (*folder.glob(f"*{UNFINISHED}"), *(folder / ERRORS).glob(f"*{UNFINISHED}")):
            left.unlink()
        yield Output(folder)


def _agree(folder: Path, manifest: dict[str, Any]) -> None:
    """Compares the manifest with that of the finished partitions; writes it where there are none."""
    path = folder / MANIFEST
    if not any(folder.glob("part-*.parquet")):
        text = json.dumps(manifest, indent=1)
        shutil.rmtree(folder / MODEL, ignore_errors=True)
        _whole(path, lambda unfinished: _write_text(unfinished, text))
        return
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; remove its folder to begin again") from error
    found = found if isinstance(found, dict) else {}
    for name in dict.fromkeys([*manifest, *found]):
        if found.get(name) != manifest.get(name):
            raise ValueError(
                f"{folder} was begun with {name}={found.get(name)!r:.200}, got {manifest.get(name)!r:.200}; "
                "give that, or another output"
            )


def _whole(path: Path, write: Callable[[Path], None]) -> None:
    """Has a file written under another name, and gives it its own when it is on disk."""
    unfinished = path.with_name(f"{path.name}{UNFINISHED}")
    try:
        write(unfinished)
        _sync(unfinished)
        unfinished.replace(path)
        _sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(folder: Path) -> str:
    """SHA-256 of the files of a model that its outputs depend on: configs, tokenizer, weights."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".txt", ".model", ".bin"):
            total.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    total.update(block)
    return total.hexdigest()
