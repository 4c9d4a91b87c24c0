"""Quantization kernels for PyTorch: `pyqkern.replace_linear(model)` turns a model's linears into INT8 ones in place."""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  before _C, which runs on torch's OpenMP pool

import pyqkern.ops_embedding
import pyqkern.ops_rows  # noqa: F401  registers its operators
from pyqkern._C import isa, isas
from pyqkern.affine import choose_qparams_affine, dequantize_affine, pack_int4, quantize_affine, unpack_int4
from pyqkern.calibrate import Ranges, calibrate
from pyqkern.encoder import QEncoderLayer, optimize
from pyqkern.nf4 import Quantized4bit, dequantize_4bit, quantize_4bit
from pyqkern.ops import int8_matmul
from pyqkern.qembedding import QEmbedding
from pyqkern.qlinear import QLinear
from pyqkern.qlinear_4bit import FP4Linear, Int4Linear, NF4Linear  # noqa: F401  registers them
from pyqkern.qlinear_int8 import Int8OutlierLinear, Int8StaticLinear, Int8WeightOnlyLinear  # noqa: F401  registers them
from pyqkern.register import register
from pyqkern.replace import replace_embedding, replace_linear
from pyqkern.smooth import smooth
from pyqkern.summary import summary

__version__ = version("pyqkern")

register()


if TYPE_CHECKING:
    from pyqkern.hf import PyqkernConfig, checkpoint_config
    from pyqkern.hf_lora import lora
else:

    def __getattr__(name: str) -> Any:
        """What needs transformers or peft, which take seconds to import, is imported when it is asked for."""
        if name in ("PyqkernConfig", "checkpoint_config"):
            return getattr(importlib.import_module("pyqkern.hf"), name)
        if name == "lora":
            return importlib.import_module("pyqkern.hf_lora").lora
        raise AttributeError(f"module 'pyqkern' has no attribute {name!r}")


__all__ = [
    "PyqkernConfig",
    "QEmbedding",
    "QEncoderLayer",
    "QLinear",
    "Quantized4bit",
    "Ranges",
    "calibrate",
    "checkpoint_config",
    "choose_qparams_affine",
    "dequantize_4bit",
    "dequantize_affine",
    "int8_matmul",
    "isa",
    "isas",
    "lora",
    "optimize",
    "pack_int4",
    "quantize_4bit",
    "quantize_affine",
    "replace_embedding",
    "replace_linear",
    "smooth",
    "summary",
    "unpack_int4",
]
