"""Rows of CSV, JSONL and Parquet files, in partitions. A row that cannot be used is named, and kept out."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = {".csv": "CSV", ".jsonl": "JSONL", ".ndjson": "JSONL", ".parquet": "Parquet"}


@dataclass
class Partition:
    """Rows of the input that are computed and written together.

    number: from 0. rows: numbers in the input, from 0, of the rows that can be used; texts and kept belong to them,
    kept by column. bad: number of a row that cannot be used -> why. done: share of the input that was read when it
    ended.
    """

    number: int
    rows: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    kept: dict[str, list[Any]] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)
    done: float = 1.0

    def __len__(self) -> int:
        return len(self.rows) + len(self.bad)


@dataclass(frozen=True)
class Source:
    """A file, or a folder of files of one kind, in the order of their names; and the columns that are wanted.

    Text files are UTF-8. Raises FileNotFoundError, and ValueError for another kind, a folder without files, and columns
    that are not there.
    """

    path: Path
    column: str
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for file in self.files():
            if self.kind() != "JSONL":
                self._check_columns(file, self._columns(file))

    def files(self) -> list[Path]:
        """The files, of which there is one at least."""
        if not self.path.exists():
            raise FileNotFoundError(f"the input {self.path} does not exist")
        if not self.path.is_dir():
            self._kind_of(self.path)
            return [self.path]
        visible = [path for path in sorted(self.path.rglob("*")) if not self._is_hidden(path) and path.is_file()]
        files = [path for path in visible if path.suffix.lower() in SUFFIXES]
        kinds = sorted({self._kind_of(path) for path in files})
        if len(kinds) != 1:
            raise ValueError(f"{self.path} must hold files of one kind of {', '.join(SUFFIXES)}, got {kinds or 'none'}")
        return files

    def kind(self) -> str:
        return self._kind_of(self.files()[0])

    def schema(self) -> pa.Schema:
        """The types of the columns that are kept. Those of text files are strings."""
        if self.kind() != "Parquet":
            return pa.schema([(name, pa.string()) for name in self.keep])
        found = pq.read_schema(self.files()[0])
        return pa.schema([found.field(name).remove_metadata() for name in self.keep])

    def identity(self) -> list[list[Any]]:
        """Name, size and time of change, in nanoseconds, of each file."""
        stats = [(file.name, file.stat()) for file in self.files()]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]

    def partitions(self, size: int) -> Iterator[Partition]:
        """Partitions of `size` rows, good and bad ones; one without rows where there are none."""
        part, number = Partition(0, kept={name: [] for name in self.keep}), 0
        for values, reason, done in self._rows():
            if len(part) == size:
                yield self._checked(part)
                part = Partition(part.number + 1, kept={name: [] for name in self.keep})
            reason = reason or why_bad(self.column, values[0])
            if reason is None:
                part.rows.append(number)
                part.texts.append(values[0])
                for name, value in zip(self.keep, values[1:], strict=True):
                    part.kept[name].append(value)
            else:
                part.bad[number] = reason
            part.done, number = done, number + 1
        yield self._checked(part)

    def _checked(self, part: Partition) -> Partition:
        """ValueError for JSONL whose first partition has the column nowhere: it is a wrong name."""
        missing = f"has no column {self.column!r}"
        reasons = list(part.bad.values())
        if part.number == 0 and not part.rows and any(missing in reason for reason in reasons):
            raise ValueError(f"{self.path} {next(reason for reason in reasons if missing in reason)}")
        return part

    def _rows(self) -> Iterator[tuple[Sequence[Any], str | None, float]]:
        """For each row the text and what is kept, or why it cannot be used, and the share of the input behind it."""
        files = self.files()
        read = {"CSV": self._csv, "JSONL": self._jsonl, "Parquet": self._parquet}[self.kind()]
        sizes = [max(1, file.stat().st_size) for file in files]
        for i, file in enumerate(files):
            before, total = sum(sizes[:i]), sum(sizes)
            for values, reason, share in read(file):
                yield values, reason, (before + share * sizes[i]) / total

    def _csv(self, path: Path) -> Iterator[tuple[Sequence[Any], str | None, float]]:
        lines = _Lines(path)
        with lines:
            reader = csv.reader(lines, strict=True)
            header = next(reader)
            places = [header.index(name) for name in (self.column, *self.keep)]
            while True:
                start = lines.number + 1
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield (), f"line {start}: {error}", lines.share()
                    continue
                if not row:
                    continue
                values = [row[place] for place in places] if len(row) == len(header) else []
                reason = None if values else f"line {start}: {len(row)} fields instead of {len(header)}"
                yield values, reason or _undecoded(values, start), lines.share()

    def _jsonl(self, path: Path) -> Iterator[tuple[Sequence[Any], str | None, float]]:
        with _Lines(path) as lines:
            for line in lines:
                if line.strip():
                    values, reason = self._json_row(line)
                    reason = None if reason is None else f"line {lines.number} {reason}"
                    yield values, reason or _undecoded(values, lines.number), lines.share()

    def _json_row(self, line: str) -> tuple[Sequence[Any], str | None]:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            return (), f"is no JSON: {error}"
        if not isinstance(found, dict):
            return (), f"must be a JSON object, got {type(found).__name__}"
        for name in (self.column, *self.keep):
            if name not in found:
                return (), f"has no column {name!r}; it has {', '.join(map(repr, found)) or 'none'}"
        kept = [found[name] for name in self.keep]
        texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in kept]
        return [found[self.column], *texts], None

    def _parquet(self, path: Path) -> Iterator[tuple[Sequence[Any], str | None, float]]:
        names = [self.column, *self.keep]
        with pq.ParquetFile(path) as file:
            read, total = 0, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=1024, columns=names):
                read += len(batch)
                columns = [_values_of(batch.column(batch.schema.get_field_index(name))) for name in names]
                for values in zip(*columns, strict=True):
                    yield values, None, read / total

    def _columns(self, path: Path) -> list[str]:
        if self.kind() == "CSV":
            with _Lines(path) as lines:
                try:
                    return next(csv.reader(lines, strict=True), [])
                except csv.Error as error:
                    raise ValueError(f"{path} must begin with the names of its columns: {error}") from error
        try:
            schema = pq.read_schema(path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is no Parquet file: {error}") from error
        if self.column in schema.names and not _is_text(schema.field(self.column).type):
            raise ValueError(
                f"{self.column} of {path} must be a column of strings, got {schema.field(self.column).type}"
            )
        return list(schema.names)

    def _check_columns(self, path: Path, columns: list[str]) -> None:
        for name in (self.column, *self.keep):
            if columns.count(name) != 1:
                how = "no column" if name not in columns else f"{columns.count(name)} columns"
                raise ValueError(f"{path} has {how} {name!r}; it has {', '.join(map(repr, columns)) or 'none'}")

    def _is_hidden(self, path: Path) -> bool:
        return any(part.startswith((".", "_")) for part in path.relative_to(self.path).parts)

    def _kind_of(self, path: Path) -> str:
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"the input must be a file or folder of {', '.join(SUFFIXES)}, got {path}")
        return SUFFIXES[path.suffix.lower()]


class _Lines:
    """The lines of a text file, each as UTF-8 with other bytes as surrogates, and how much of the file is read."""

    def __init__(self, path: Path) -> None:
        self._size = max(1, path.stat().st_size)
        self._file = path.open("rb")
        self.number = self._read = 0

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._file)
        self._read += len(line)
        self.number += 1
        text = line.decode("utf-8", "surrogateescape")
        return text.removeprefix("\ufeff") if self.number == 1 else text

    def share(self) -> float:
        return self._read / self._size


def why_bad(column: str, text: Any) -> str | None:
    """Why a text cannot be used; None where it can."""
    if not isinstance(text, str):
        return f"{column} must be a string, got {'null' if text is None else type(text).__name__}"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"{column} is not UTF-8"
    return None


def _undecoded(values: Iterable[Any], line: int) -> str | None:
    """Why a row is bad that holds bytes that are no UTF-8, or half of a UTF-16 pair."""
    try:
        "".join(value for value in values if isinstance(value, str)).encode()
    except UnicodeEncodeError:
        return f"line {line} is not UTF-8"
    return None


def _values_of(column: pa.Array) -> list[Any]:
    """The values; bytes where those of a string are no UTF-8, which writers of Parquet need not check."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        column = column.cast(pa.large_binary())
        return [value if value is None or not _is_utf8(value) else value.decode() for value in column.to_pylist()]


def _is_utf8(value: bytes) -> bool:
    try:
        return value.decode() is not None
    except UnicodeDecodeError:
        return False


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
