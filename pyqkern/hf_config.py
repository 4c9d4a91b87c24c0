"""PyqkernConfig, what config.json says of a quantized model, and what of a model goes into it."""

import copy
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from pyqkern import formats
from pyqkern.qembedding import QEmbedding, check_embedding_scheme
from pyqkern.qlinear import QLinear
from pyqkern.replace import find_layers, linear_types
from pyqkern.schemes import SCHEMES, Scheme, get_scheme

VERSION = 1


def scheme_to_dict(scheme: Scheme) -> dict[str, Any]:
    """As JSON has it: the name, and the options that are not the default. Calibrated ranges are in the layers."""
    default = SCHEMES[scheme.name]
    options = {one.name: getattr(scheme, one.name) for one in fields(scheme) if one.name != "ranges"}
    return {"name": scheme.name} | {key: value for key, value in options.items() if value != getattr(default, key)}


def scheme_from_dict(scheme: Any) -> Scheme:
    if not isinstance(scheme, dict):
        return get_scheme(scheme)
    options = dict(scheme)
    default = get_scheme(options.pop("name", None))
    known = [one.name for one in fields(default) if one.name != "ranges"]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"options of the scheme {default.name!r} must be among {known}, got {unknown[0]!r}")
    return replace(default, **options)


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
        self.scheme = scheme_from_dict(scheme)
        self.include = _patterns("include", include)
        self.exclude = _patterns("exclude", exclude) or []
        self.embeddings = None
        if embeddings:
            self.embeddings = check_embedding_scheme(
                self.scheme if embeddings is True else scheme_from_dict(embeddings)
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
            "scheme": scheme_to_dict(self.scheme),
            "include": self.include,
            "exclude": self.exclude,
            "embeddings": False if self.embeddings is None else scheme_to_dict(self.embeddings),
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
        said = scheme_to_dict(scheme)
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
