"""What the commands `quantize` and `inspect` do: a folder quantized into another, and what a folder holds."""

import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pyqkern.checkpoints.config import groups_of, own_config, quantization_of
from pyqkern.checkpoints.files import Files, files_of
from pyqkern.checkpoints.formats import format_of, get_format
from pyqkern.checkpoints.layers import Group
from pyqkern.models.summary import said_bytes, table
from pyqkern.schemes import get_scheme

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
_OTHER_RUNTIMES = ("onnx", "openvino")
_BYTES = {"BOOL": 1, "I8": 1, "U8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8}

# Called while weights are quantized as they are read, with how many are done and how many there are.
progress: list[Callable[[int, int], None]] = []


def quantize(
    model: str | Path,
    out: str | Path,
    scheme: str | None = None,
    *,
    exclude: Iterable[str] = (),
    embeddings: bool = False,
    format: str = "pyqkern",
) -> None:
    """Quantizes the folder `model`, or the hub's model of that name, into the new folder `out`.

    scheme: by default "int8". A folder that is quantized already is only written anew in `format`; there scheme,
    exclude and embeddings must be left out. Tokenizer and whatever else is in the folder are copied.

    The model is written to a temporary folder next to `out`, which is renamed when all is there. Raises ValueError or
    OSError, FileExistsError for an `out` that exists.
    """
    import transformers

    get_format(format)
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} must not exist yet; choose another name or remove it")
    folder = _local(model)
    said = quantization_of(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    files_of(folder)
    options: dict[str, Any] = {}
    if said is None:
        options["quantization_config"] = _wanted(scheme or "int8", list(exclude), embeddings, format)
    elif scheme is not None or list(exclude) or embeddings:
        raise ValueError(f"{folder} is quantized already; leave --scheme, --exclude and --embeddings out to convert it")
    else:
        config.quantization_config = own_config(folder, said)
        options["config"] = config
    with _whole(out) as unfinished, _bar():
        loaded = _class_of(config).from_pretrained(folder, dtype="auto", **options)
        loaded.hf_quantizer.quantization_config.format = format
        loaded.save_pretrained(unfinished)
        _copy_the_rest(folder, unfinished)


def _wanted(scheme: str, exclude: list[str], embeddings: bool, format: str) -> dict[str, Any]:
    """The quantization_config that asks for a model to be quantized as it is read."""
    said = get_scheme(scheme).to_dict()
    return {"quant_method": "pyqkern", "scheme": said, "exclude": exclude, "embeddings": embeddings, "format": format}


def _local(model: str | Path) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(model), ignore_patterns=["*.bin", "*.h5", "*.msgpack", "*.onnx", "*.gguf"]))


def _class_of(config: Any) -> Any:
    """The class that the model was saved from; AutoModel where the config does not say."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
        raise ValueError(f"architectures must be a class of transformers, got {name!r}; quantize your own in Python")
    return transformers.AutoModel


@contextmanager
def _bar() -> Iterator[None]:
    """A progress bar on stderr while weights are quantized."""
    with tqdm(desc="Quantizing", unit="weight", file=sys.stderr) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        progress.append(show)
        try:
            yield
        finally:
            progress.remove(show)


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder to write into that gets the name `out` at the end, or is removed."""
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.unfinished")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _copy_the_rest(folder: Path, out: Path) -> None:
    for path in folder.iterdir():
        if path.name.endswith(_WEIGHTS) or path.name.startswith(".") or (out / path.name).exists():
            continue
        if path.is_file():
            shutil.copyfile(path, out / path.name)
        elif path.name not in _OTHER_RUNTIMES:
            shutil.copytree(path, out / path.name)


@dataclass(frozen=True)
class Stored:
    """A quantized layer of a folder: its scheme, how many values it has, and their bytes in the files."""

    name: str
    scheme: str
    values: int
    bytes: int


def inspect(folder: str | Path) -> str:
    """What of a folder is quantized how, and its bytes, as a table. Reads no weights."""
    folder = Path(folder)
    said = quantization_of(folder)
    with Files(folder) as files:
        sizes = {key: files.shape(key) for key in files}
        groups = [] if said is None else groups_of(said, files)
    stored = list(_stored(groups, sizes))
    total = sum(_size(*size) for size in sizes.values())
    quantized = sum(layer.bytes for layer in stored)
    rows = [("layer", "scheme", "values", "bytes")]
    rows += [(layer.name, layer.scheme, f"{layer.values:,}", said_bytes(layer.bytes)) for layer in stored]
    values = f"{sum(layer.values for layer in stored):,}"
    format = "" if said is None else format_of(said).name
    totals = [
        (f"{len(stored)} quantized layers", format, values, said_bytes(quantized)),
        ("everything else, in float", "", "", said_bytes(total - quantized)),
        (f"{len(sizes)} tensors in {len(files.paths)} file(s)", "", "", said_bytes(total)),
    ]
    return table(rows, totals, left=2)


def _stored(groups: list[Group], sizes: dict[str, tuple[tuple[int, ...], str]]) -> Iterator[Stored]:
    of: dict[str, list[str]] = {}
    for key in sizes:
        for name in (key.rpartition(".")[0], key.partition(".weight.")[0]):
            of.setdefault(name, []).append(key)
    for group in groups:
        if group.scheme is None:
            continue
        for name in group.modules():
            keys = set(of.get(name, []))
            if f"{name}.weight" not in keys:
                raise ValueError(f"{name}.weight is missing from the files, though config.json names it")
            shape, kind = sizes[f"{name}.weight"]
            values = math.prod(shape) * group.scheme.values_per_byte * _BYTES[kind]
            total = sum(_size(*sizes[key]) for key in keys)
            yield Stored(name.removesuffix(".table"), group.scheme.name, values, total)


def _size(shape: tuple[int, ...], kind: str) -> int:
    if kind not in _BYTES:
        raise ValueError(f"dtype of a tensor must be one of {', '.join(_BYTES)}, got {kind}")
    return math.prod(shape) * _BYTES[kind]
