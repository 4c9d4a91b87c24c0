"""Quantized models in transformers: `PyqkernConfig` for from_pretrained, and what save_pretrained writes.

    model = AutoModel.from_pretrained(folder, quantization_config=pyqkern.PyqkernConfig("nf4"))
    model.save_pretrained(other)
    model = AutoModel.from_pretrained(other)      # the same bits

Weights are quantized as they are read. A folder holds the state_dict of the quantized modules in safetensors, and in
config.json, under quantization_config, which modules are quantized how. Works with transformers 5 and with 4.57, the
last of 4. `pyqkern.register` imports this module once transformers is there.
"""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from pyqkern.checkpoints import formats
from pyqkern.checkpoints.files import Files
from pyqkern.models.find import find_layers, linear_types
from pyqkern.nn.embedding import QEmbedding, check_embedding_scheme
from pyqkern.nn.linear import QLinear
from pyqkern.schemes import Scheme, get_scheme


def checkpoint_config(folder: str | Path, scheme: str | Scheme | None = None, **kwargs: Any) -> Any:
    """The config of a folder that bitsandbytes or compressed-tensors has quantized, so that pyqkern reads it.

        model = AutoModel.from_pretrained(folder, config=pyqkern.checkpoint_config(folder))

    Without it, transformers hands such a folder to bitsandbytes. save_pretrained writes the format that was read.
    scheme: what INT8 weights are computed with, say "int8"; by default what the format means, "int8-outlier" for
    LLM.int8. kwargs go to AutoConfig.from_pretrained. The folder is local; its weights are in safetensors.

    Raises ValueError, which names the key, for files that are not what they say.
    """
    config = transformers.AutoConfig.from_pretrained(folder, **kwargs)
    said = getattr(config, "quantization_config", None)
    if said is None:
        raise ValueError(f"{folder} must hold a quantized model, but its config.json has no quantization_config")
    said = said if isinstance(said, dict) else said.to_dict()
    format = formats.foreign_format(said)
    if format is None:
        return config
    with Files(folder) as files:
        layers = formats.read_layers(format, said, files, None if scheme is None else get_scheme(scheme))
    for entry in layers:
        entry["scheme"] = entry["scheme"].to_dict()
    made = PyqkernConfig(layers[0]["scheme"], format=format, layers=layers)
    config.quantization_config = made.own_dict()
    return config


VERSION = 1


@register_quantization_config("pyqkern")
class PyqkernConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How from_pretrained quantizes a model, or how a saved one is quantized.

    scheme: a name or a scheme object, as for `replace_linear`; for calibrated ranges, Int8Static(ranges).
    include, exclude: name patterns of linears, as for `replace_linear`. What that keeps in float by itself, as a head
    tied to an embedding, is kept whatever exclude says.
    embeddings: also the embeddings, by `replace_embedding`: True for the same scheme, or another one.
    format: what save_pretrained writes: "pyqkern", "bitsandbytes" (nf4, fp4, int8) or "compressed-tensors" (int8).
    layers: which modules are quantized how; written at saving, not for users.

    Raises ValueError or TypeError for values that do not exist.
    """

    def __init__(
        self,
        scheme: str | Scheme | dict[str, Any] = "int8",
        *,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] = (),
        embeddings: bool | str | Scheme | dict[str, Any] = False,
        format: str = "pyqkern",
        layers: list[dict[str, Any]] | None = None,
        version: int = VERSION,
        quant_method: str = "pyqkern",
    ) -> None:
        if version != VERSION:
            raise ValueError(f"version of the quantization_config must be {VERSION}, got {version!r}; update pyqkern")
        self.quant_method = "pyqkern"
        self.scheme = Scheme.from_dict(scheme)
        self.include = _patterns("include", include)
        self.exclude = _patterns("exclude", exclude) or []
        self.embeddings = None
        if embeddings:
            self.embeddings = check_embedding_scheme(
                self.scheme if embeddings is True else Scheme.from_dict(embeddings)
            )
        self.format = formats.check_format(format)
        self.layers = layers

    def to_dict(self) -> dict[str, Any]:
        """What config.json says: in a foreign format, what that format's own reader expects."""
        if self.format != "pyqkern" and self.layers is not None:
            return formats.foreign_config(self.format, self.layers)
        return self.own_dict()

    def own_dict(self) -> dict[str, Any]:
        """All of it, as the constructor takes it."""
        return {
            "quant_method": "pyqkern",
            "version": VERSION,
            "scheme": self.scheme.to_dict(),
            "include": self.include,
            "exclude": self.exclude,
            "embeddings": False if self.embeddings is None else self.embeddings.to_dict(),
            "format": self.format,
            "layers": copy.deepcopy(self.layers),
        }


def _patterns(name: str, patterns: str | Iterable[str] | None) -> list[str] | None:
    if patterns is None:
        return None
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{name} must be name patterns here, which a file can hold, got {patterns!r}")
    return patterns


# ---- which modules are quantized how, as config.json has it


def describe(model: nn.Module) -> list[dict[str, Any]]:
    """One entry per scheme: its linears, its embeddings and the linears tied to them, each with the name of its table.

    The last entry, without a scheme, names the linears that are not quantized.
    """
    entries: dict[str, dict[str, Any]] = {}

    def entry(scheme: Scheme) -> dict[str, Any]:
        said = scheme.to_dict()
        return entries.setdefault(repr(said), {"scheme": said, "linears": [], "embeddings": {}, "heads": {}})

    tables: dict[int, str] = {}
    for layer in find_layers(model, (QEmbedding,)):
        table, name = layer.module.table, layer.names[0]
        entry(table.scheme)["embeddings"][name] = tables.setdefault(id(table), f"{name}.table")
    kept = []
    for layer in find_layers(model, linear_types()):
        name, module = layer.names[0], layer.module
        if id(module) in tables:
            entry(module.scheme)["heads"][name] = tables[id(module)]
        elif isinstance(module, QLinear):
            entry(module.scheme)["linears"].append(name)
        else:
            kept.append(name)
    return [*entries.values(), {"scheme": None, "linears": kept, "embeddings": {}, "heads": {}}]


def state_dict(model: nn.Module, format: str) -> dict[str, Tensor]:
    """The model's state_dict with the quantized layers in a format; what an embedding and its head share, once."""
    tensors = dict(model.state_dict())

    def drop(prefix: str, *but: str) -> None:
        for key in [key for key in tensors if key.startswith(prefix) and key.removeprefix(prefix) not in but]:
            del tensors[key]

    tables: set[int] = set()
    for layer in find_layers(model, (QEmbedding,)):
        if format != "pyqkern":
            raise ValueError(f"{format} has no quantized embeddings, as {layer.names[0]} is; use format='pyqkern'")
        first = layer.names[0]
        for name in layer.names:
            if name != first or id(layer.module.table) in tables:
                drop(f"{name}.table.")
        tensors.pop(f"{first}.table.bias", None)
        tables.add(id(layer.module.table))
    for layer in find_layers(model, (QLinear,)):
        for name in layer.names:
            if id(layer.module) in tables:
                drop(f"{name}.", "bias")
            elif format != "pyqkern":
                prefix = f"{name}."
                own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                drop(prefix)
                encoded = formats.encode(format, name, layer.module, own)
                tensors |= {prefix + key: value for key, value in encoded.items()}
    return tensors
