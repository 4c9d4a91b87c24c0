"""The checkpoint formats, one class and one file each. Adding one is its file and a line in FORMATS."""

from collections.abc import Mapping
from typing import Any

from pyqkern.checkpoints.formats.base import Format
from pyqkern.checkpoints.formats.bitsandbytes import BitsAndBytes
from pyqkern.checkpoints.formats.compressed_tensors import CompressedTensors
from pyqkern.checkpoints.formats.pyqkern import Pyqkern
from pyqkern.schemes import check_type

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Pyqkern(),
        BitsAndBytes(),
        CompressedTensors(),
    )
}


def get_format(name: str) -> Format:
    """The format of that name. ValueError for others, TypeError for what is no name."""
    check_type("format", name, str, "a name")
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def format_of(config: Mapping[str, Any]) -> Format:
    """The format that a folder's quantization_config speaks of. ValueError for one that is not read here."""
    for format in FORMATS.values():
        if format.detect(config):
            return format
    raise ValueError(f"quant_method must be one of {', '.join(FORMATS)}, got {config.get('quant_method')!r}")
