"""`PyqkernConfig`, with which from_pretrained quantizes a model, and which config.json holds of a quantized one.

    model = AutoModel.from_pretrained(folder, quantization_config=pyqkern.PyqkernConfig("nf4"))
    model.save_pretrained(other)
    model = AutoModel.from_pretrained(other)      # the same bits

Weights are quantized as they are read. A folder holds the state_dict of the quantized modules in safetensors, and in
config.json, under quantization_config, which modules are quantized how. Works with transformers 5 and with 4.57, the
last of 4. `pyqkern.hf.register` tells transformers of it.
"""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from transformers.utils.quantization_config import QuantizationConfigMixin

from pyqkern.checkpoints.config import VERSION, check_own, own_config, quantization_of
from pyqkern.checkpoints.formats import get_format
from pyqkern.models.plan import Plan
from pyqkern.nn.embedding import check_embedding_scheme
from pyqkern.nn.recurrent import check_recurrent_scheme
from pyqkern.schemes import Scheme, check_type


def checkpoint_config(folder: str | Path, scheme: str | Scheme | None = None, **kwargs: Any) -> Any:
    """The config of a folder that bitsandbytes or compressed-tensors has quantized, so that pyqkern reads it.

        model = AutoModel.from_pretrained(folder, config=pyqkern.checkpoint_config(folder))

    Without it, transformers hands such a folder to bitsandbytes. save_pretrained writes the format that was read.
    scheme: what INT8 weights are computed with, say "int8"; by default what the format means, "int8-outlier" for
    LLM.int8. kwargs go to AutoConfig.from_pretrained. The folder is local; its weights are in safetensors.

    Raises ValueError, which names the key, for files that are not what they say.

    >>> import tempfile, pyqkern
    >>> from transformers import BertConfig, BertModel
    >>> folder = tempfile.mkdtemp()
    >>> config = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128)
    >>> BertModel(config).save_pretrained(f"{folder}/float")
    >>> pyqkern.convert.quantize(f"{folder}/float", f"{folder}/nf4", "nf4", format="bitsandbytes")
    >>> model = BertModel.from_pretrained(f"{folder}/nf4", config=pyqkern.checkpoint_config(f"{folder}/nf4"))
    >>> model.encoder.layer[0].output.dense
    NF4Linear(in_features=128, out_features=64, bias=True, scheme=nf4)
    """
    said = quantization_of(Path(folder))
    if said is None:
        raise ValueError(f"{folder} must hold a quantized model, but its config.json has no quantization_config")
    own = own_config(Path(folder), said, scheme)
    config = transformers.AutoConfig.from_pretrained(folder, **kwargs)
    config.quantization_config = PyqkernConfig.from_dict(own).own_dict()
    return config


class PyqkernConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How from_pretrained quantizes a model, or how a saved one is quantized.

    scheme: a name or a scheme object, as for `replace_linear`; for calibrated ranges, Int8Static(ranges). Or a plan
    of `auto`, beside which only `format` may be given; what it smooths, embeddings, recurrent layers and "int8-static"
    are quantized when all has been read, the rest as it is read.
    include, exclude: name patterns of linears, as for `replace_linear`. What that keeps in float by itself, as a head
    tied to an embedding, is kept whatever exclude says.
    embeddings: also the embeddings, by `replace_embedding`: True for the same scheme, or another one.
    recurrent: also the recurrent layers, by `replace_recurrent`: True for the same scheme, or another one.
    format: what save_pretrained writes: "pyqkern", "bitsandbytes" (nf4, fp4, int8) or "compressed-tensors" (int8).
    layers, input_scales: which modules are quantized how, and by what the inputs of smoothed ones are multiplied;
    written at saving, not for users. plan: `Plan.to_dict`, of a config that was written before the model was read.

    Raises ValueError or TypeError for values that do not exist.
    """

    def __init__(
        self,
        scheme: str | Scheme | Plan | dict[str, Any] = "int8",
        *,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] = (),
        embeddings: bool | str | Scheme | dict[str, Any] = False,
        recurrent: bool | str | Scheme | dict[str, Any] = False,
        format: str = "pyqkern",
        layers: list[dict[str, Any]] | None = None,
        plan: dict[str, Any] | None = None,
        input_scales: dict[str, list[float]] | None = None,
        version: int = VERSION,
        quant_method: str = "pyqkern",
    ) -> None:
        if version != VERSION:
            raise ValueError(f"version of the quantization_config must be {VERSION}, got {version!r}; update pyqkern")
        self.quant_method = "pyqkern"
        self.plan = scheme if isinstance(scheme, Plan) else None if plan is None else Plan.from_dict(plan)
        if self.plan is not None:
            if include is not None or exclude or embeddings or recurrent:
                raise ValueError("a plan names its layers: leave include, exclude, embeddings and recurrent out")
            scheme = next((one.scheme for one in self.plan.choices if one.scheme is not None), "int8")
        self.scheme = Scheme.from_dict(scheme)  # type: ignore[arg-type]
        self.include = _patterns("include", include)
        self.exclude = _patterns("exclude", exclude) or []
        self.embeddings = self.recurrent = None
        if embeddings:
            self.embeddings = check_embedding_scheme(
                self.scheme if embeddings is True else Scheme.from_dict(embeddings)
            )
        if recurrent:
            self.recurrent = check_recurrent_scheme(self.scheme if recurrent is True else Scheme.from_dict(recurrent))
        self.format = get_format(format).name
        check_type("layers", layers, (list, type(None)), "None or a list")
        self.layers = layers
        self.input_scales = input_scales or {}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """What config.json says. ValueError for what this class has not written."""
        check_own(config_dict)
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """What config.json says: in a foreign format, what that format's own reader expects."""
        own = self.own_dict()
        return own if self.layers is None else get_format(self.format).config(own)

    def own_dict(self) -> dict[str, Any]:
        """All of it, as the constructor takes it."""
        said = {
            "quant_method": "pyqkern",
            "version": VERSION,
            "scheme": self.scheme.to_dict(),
            "include": self.include,
            "exclude": self.exclude,
            "embeddings": False if self.embeddings is None else self.embeddings.to_dict(),
            "format": self.format,
            "layers": copy.deepcopy(self.layers),
        }
        if self.recurrent is not None:
            said["recurrent"] = self.recurrent.to_dict()
        if self.plan is not None and self.layers is None:
            said["plan"] = self.plan.to_dict()
        if self.input_scales:
            said["input_scales"] = copy.deepcopy(self.input_scales)
        return said


def _patterns(name: str, patterns: str | Iterable[str] | None) -> list[str] | None:
    if patterns is None:
        return None
    wanted = "name patterns here, which a file can hold"
    check_type(name, patterns, (str, Iterable), wanted)
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{name} must be {wanted}, got {patterns!r}")
    return patterns
