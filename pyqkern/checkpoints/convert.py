"""What the commands `quantize` and `inspect` do: a folder quantized into another, and what a folder holds."""

import glob
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pyqkern.checkpoints.config import CONFIG, check_float, groups_of, own_config, quantization_of
from pyqkern.checkpoints.files import Files, root_of
from pyqkern.checkpoints.formats import format_of, get_format
from pyqkern.checkpoints.layers import Group, module_of
from pyqkern.models.plan import Plan
from pyqkern.models.summary import said_bytes, table
from pyqkern.progress import bar
from pyqkern.schemes import check_type, get_scheme

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
_OTHER_RUNTIMES = ("onnx", "openvino")

# Called while weights are quantized as they are read, with how many are done and how many there are.
progress: list[Callable[[int, int], None]] = []


def quantize(
    model: str | Path,
    out: str | Path,
    scheme: str | Plan | None = None,
    *,
    exclude: Iterable[str] = (),
    embeddings: bool = False,
    recurrent: bool = False,
    format: str = "pyqkern",
) -> None:
    """Quantizes the folder `model`, or the hub's model of that name, into the new folder `out`.

    scheme: by default "int8"; or a plan of `auto`, which says for each layer what becomes of it. embeddings, recurrent:
    whether these layers are quantized too. A folder that is quantized already is only written anew in `format`; there
    scheme, exclude and these must be left out. Tokenizer and whatever else is in the folder are copied.

    The model is written to a temporary folder next to `out`, which is renamed when all is there. Raises ValueError or
    OSError, FileExistsError for an `out` that exists.
    """
    get_format(format)
    if isinstance(scheme, Plan):
        if list(exclude) or embeddings or recurrent:
            raise ValueError("exclude, embeddings and recurrent must be left out with a plan, which names its layers")
        if not scheme.quantizes:
            raise ValueError("plan must quantize something to be written as a quantized folder, got one all in float")
    elif scheme is not None:
        get_scheme(scheme)
    check_type("exclude", exclude, Iterable, "name patterns")
    check_type("embeddings", embeddings, bool, "a bool")
    out = Path(out)
    _check_out(out)
    folder = _local(model)
    said = quantization_of(folder)
    config = _config_of(folder)
    kind = _class_of(config)
    options: dict[str, Any] = {}
    with Files(folder) as files:  # looks whether they are whole, before the long work
        if said is None:
            check_float(files)
    others = _others(folder, out)
    if said is None:
        options["quantization_config"] = _wanted(scheme or "int8", list(exclude), embeddings, recurrent, format)
    elif scheme is not None or list(exclude) or embeddings or recurrent:
        raise ValueError(
            f"{folder} is quantized already; leave --scheme, --exclude, --embeddings and --recurrent out to convert it"
        )
    else:
        config.quantization_config = own_config(folder, said)
        options["config"] = config
    with _whole(out) as unfinished, _bar():
        loaded = kind.from_pretrained(folder, dtype="auto", trust_remote_code=False, **options)
        loaded.hf_quantizer.quantization_config.format = format
        loaded.save_pretrained(unfinished)
        _copy(others, folder, unfinished)


def _check_out(out: Path) -> None:
    """Errors for a place that cannot be written to, before the long work."""
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} must not exist yet; choose another name or remove it")
    parent = next(parent for parent in out.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{out} must be in a folder that can be written to, but {parent} cannot")


def _wanted(scheme: str | Plan, exclude: list[str], embeddings: bool, recurrent: bool, format: str) -> dict[str, Any]:
    """The quantization_config that asks for a model to be quantized as it is read."""
    if isinstance(scheme, Plan):
        return {"quant_method": "pyqkern", "plan": scheme.to_dict(), "format": format}
    more = {"embeddings": embeddings, "recurrent": recurrent, "format": format}
    return {"quant_method": "pyqkern", "scheme": get_scheme(scheme).to_dict(), "exclude": exclude} | more


def _local(model: str | Path) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(model), ignore_patterns=["*.bin", "*.h5", "*.msgpack", "*.onnx", "*.gguf"]))


def _config_of(folder: Path) -> Any:
    """The config of transformers, without code of the folder, which is never run. ValueError for what is none."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (AttributeError, KeyError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG} is no config of transformers: {error}") from error


def _class_of(config: Any) -> Any:
    """The class that the model was saved from; AutoModel where the config does not say."""
    import transformers

    names = getattr(config, "architectures", None) or ["AutoModel"]
    kind = getattr(transformers, names[0], None) if isinstance(names[0], str) else None
    if names[0] != "AutoModel" and not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"architectures must be a class of transformers, got {names[0]!r}; quantize it in Python")
    return kind


@contextmanager
def _bar() -> Iterator[None]:
    """A progress bar while weights are quantized."""
    with bar("quantize", unit="weights") as work:
        progress.append(work.reach)
        try:
            yield
        finally:
            progress.remove(work.reach)


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder to write into that gets the name `out` at the end, or is removed.

    What a killed run of the same `out` has left is removed first.
    """
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.unfinished"):
        if not _runs(left.name.split(".")[-2]):
            shutil.rmtree(left, ignore_errors=True)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.unfinished")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _runs(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _others(folder: Path, out: Path) -> list[Path]:
    """What else is to be copied, by names within the folder: regular files that lie in it, no weights, not `out`.

    ValueError for a link that leads out of the folder; pipes, sockets and devices are left out.
    """
    root, others = root_of(folder), []
    for at, folders, names in os.walk(folder):
        top = Path(at) == folder
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not (top and name in _OTHER_RUNTIMES) and not _is_same(Path(at, name), out)
        ]
        for name in [*names, *(name for name in folders if Path(at, name).is_symlink())]:
            path = Path(at, name)
            if name.startswith(".") or (top and name.endswith(_WEIGHTS)):
                continue
            if not path.resolve().is_relative_to(root):
                raise ValueError(f"{path} must be in its folder, but is a link out of it, to {path.resolve()}")
            if path.is_file():
                others.append(path.relative_to(folder))
    return others


def _is_same(path: Path, out: Path) -> bool:
    return path.resolve() == out.resolve()


def _copy(others: list[Path], folder: Path, out: Path) -> None:
    for path in others:
        if not (out / path).exists():
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / path, out / path)


@dataclass(frozen=True)
class Stored:
    """A quantized layer of a folder: its scheme, how many values it has, and their bytes in the files."""

    name: str
    scheme: str
    values: int
    bytes: int


@dataclass(frozen=True)
class Contents:
    """A folder's quantized layers, and what all its files hold: tensors and bytes. format: None for a float model."""

    format: str | None
    layers: tuple[Stored, ...]
    files: int
    tensors: int
    bytes: int

    @property
    def quantized_bytes(self) -> int:
        """The part of `bytes` that the quantized layers take."""
        return sum(layer.bytes for layer in self.layers)

    def rows(self) -> tuple[Sequence[str], Sequence[Sequence[str]], Sequence[Sequence[str]]]:
        """Header, layers and totals of the table that `inspect` makes; the first two columns are texts."""
        layers = [(one.name, one.scheme, f"{one.values:,}", said_bytes(one.bytes)) for one in self.layers]
        values = f"{sum(one.values for one in self.layers):,}"
        totals = [
            (f"{len(self.layers)} quantized layers", self.format or "", values, said_bytes(self.quantized_bytes)),
            ("everything else, in float", "", "", said_bytes(self.bytes - self.quantized_bytes)),
            (f"{self.tensors} tensors in {self.files} file(s)", "", "", said_bytes(self.bytes)),
        ]
        return ("layer", "scheme", "values", "bytes"), layers, totals

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "quantized_bytes": self.quantized_bytes}


def inspect(folder: str | Path) -> str:
    """What of a folder is quantized how, and its bytes, as a table. Reads no weights."""
    header, layers, totals = contents(folder).rows()
    return table([header, *layers], totals, left=2)


def contents(folder: str | Path) -> Contents:
    """What of a folder is quantized how, and its bytes. Reads no weights."""
    folder = Path(folder)
    said = quantization_of(folder)
    with Files(folder) as files:
        sizes = {key: files.shape(key) for key in files}
        if said is None:
            check_float(files)
        groups = [] if said is None else groups_of(said, files)
        count = len(files.paths)
    format = None if said is None else format_of(said).name
    stored = tuple(_stored(groups, sizes))
    return Contents(format, stored, count, len(sizes), sum(_size(*size) for size in sizes.values()))


def _stored(groups: list[Group], sizes: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> Iterator[Stored]:
    of: dict[str, list[str]] = {}
    for key in sizes:
        for name in (key.rpartition(".")[0], key.partition(".weight.")[0]):
            of.setdefault(name, []).append(key)
    for group in groups:
        if group.scheme is None:
            continue
        for name in group.modules():
            keys = set(of.get(name, []))
            codes = [_size(*sizes[key]) for key in keys if module_of(key) == name]
            if not codes:
                raise ValueError(f"{name}.weight is missing from the files, though config.json names it")
            values = sum(codes) * 8 // group.scheme.bits
            total = sum(_size(*sizes[key]) for key in keys)
            yield Stored(name.removesuffix(".table"), group.scheme.name, values, total)


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
