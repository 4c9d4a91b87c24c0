"""Quantized models in transformers: `PyqkernConfig` for from_pretrained, and what save_pretrained writes.

    model = AutoModel.from_pretrained(folder, quantization_config=pyqkern.PyqkernConfig("nf4"))
    model.save_pretrained(other)
    model = AutoModel.from_pretrained(other)      # the same bits

Weights are quantized as they are read. A folder holds the state_dict of the quantized modules in safetensors, and in
config.json, under quantization_config, which modules are quantized how. Works with transformers 5 and with 4.57, the
last of 4. `pyqkern.register` imports this module once transformers is there.
"""

from pathlib import Path
from typing import Any

import transformers
from torch import nn

from pyqkern import formats
from pyqkern.files import Files
from pyqkern.hf_config import PyqkernConfig, scheme_from_dict, scheme_to_dict
from pyqkern.hf_quantizer import PyqkernHfQuantizer, untie
from pyqkern.schemes import Scheme, get_scheme

__all__ = ["PyqkernConfig", "PyqkernHfQuantizer", "attach", "checkpoint_config", "scheme_from_dict"]


def attach(model: nn.Module) -> None:
    """Has save_pretrained of the models in `model` write what they are quantized to. replace_linear calls it."""
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            untie(module)
            if getattr(module, "hf_quantizer", None) is None:
                module.hf_quantizer = PyqkernHfQuantizer(PyqkernConfig())


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
        entry["scheme"] = scheme_to_dict(entry["scheme"])
    made = PyqkernConfig(layers[0]["scheme"], format=format, layers=layers)
    config.quantization_config = made.own_dict()
    return config
