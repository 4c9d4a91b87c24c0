"""Quantization kernels for PyTorch: `pyqkern.replace_linear(model)` turns a model's linears into INT8 ones in place."""

import importlib
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  before _C, which runs on torch's OpenMP pool

from pyqkern._C import isa, isas
from pyqkern.calibration.calibrate import Ranges, calibrate
from pyqkern.calibration.smooth import smooth
from pyqkern.checkpoints import convert
from pyqkern.functional.affine import choose_qparams_affine, dequantize_affine, pack_int4, quantize_affine, unpack_int4
from pyqkern.functional.four_bit import Quantized4bit, dequantize_4bit, quantize_4bit
from pyqkern.functional.int8 import int8_matmul
from pyqkern.hf.register import register
from pyqkern.models.optimize import optimize
from pyqkern.models.plan import Plan
from pyqkern.models.quantize_dynamic import quantize_dynamic
from pyqkern.models.recurrent import replace_recurrent
from pyqkern.models.replace import replace_embedding, replace_linear
from pyqkern.models.summary import summary
from pyqkern.nn.attention import QMultiheadAttention
from pyqkern.nn.decoder import QDecoderLayer
from pyqkern.nn.embedding import QEmbedding, QEmbeddingBag
from pyqkern.nn.encoder import QEncoderLayer
from pyqkern.nn.experts import QExperts
from pyqkern.nn.float16 import Float16Linear
from pyqkern.nn.four_bit import FP4Linear, Int4Linear, NF4Linear
from pyqkern.nn.int8 import Int8Linear, Int8OutlierLinear, Int8StaticLinear, Int8WeightOnlyLinear
from pyqkern.nn.linear import QLinear
from pyqkern.nn.recurrent import QGRU, QLSTM, QRNN, QGRUCell, QLSTMCell, QRecurrent, QRNNCell
from pyqkern.schemes import FP4, NF4, Float16, Int4, Int8, Int8Outlier, Int8Static, Int8WeightOnly
from pyqkern.training import optim

__version__ = version("pyqkern")

register()
# Their public names: `from pyqkern.convert import quantize, inspect`, `from pyqkern.optim import AdamW8bit`
sys.modules["pyqkern.convert"] = convert
sys.modules["pyqkern.optim"] = optim


if TYPE_CHECKING:
    from pyqkern import analysis, bulk
    from pyqkern.analysis.auto import auto
    from pyqkern.hf.config import PyqkernConfig, checkpoint_config
    from pyqkern.hf.lora import lora
else:

    def __getattr__(name: str) -> Any:
        """What costs time to import, transformers and peft seconds of it, is imported when it is asked for."""
        if name in ("analysis", "bulk"):
            return importlib.import_module(f"pyqkern.{name}")
        if name == "auto":
            return importlib.import_module("pyqkern.analysis.auto").auto
        if name in ("PyqkernConfig", "checkpoint_config"):
            return getattr(importlib.import_module("pyqkern.hf.config"), name)
        if name == "lora":
            return importlib.import_module("pyqkern.hf.lora").lora
        raise AttributeError(f"module 'pyqkern' has no attribute {name!r}")


__all__ = [
    "FP4",
    "NF4",
    "QGRU",
    "QLSTM",
    "QRNN",
    "FP4Linear",
    "Float16",
    "Float16Linear",
    "Int4",
    "Int4Linear",
    "Int8",
    "Int8Linear",
    "Int8Outlier",
    "Int8OutlierLinear",
    "Int8Static",
    "Int8StaticLinear",
    "Int8WeightOnly",
    "Int8WeightOnlyLinear",
    "NF4Linear",
    "Plan",
    "PyqkernConfig",
    "QDecoderLayer",
    "QEmbedding",
    "QEmbeddingBag",
    "QEncoderLayer",
    "QExperts",
    "QGRUCell",
    "QLSTMCell",
    "QLinear",
    "QMultiheadAttention",
    "QRNNCell",
    "QRecurrent",
    "Quantized4bit",
    "Ranges",
    "analysis",
    "auto",
    "bulk",
    "calibrate",
    "checkpoint_config",
    "choose_qparams_affine",
    "convert",
    "dequantize_4bit",
    "dequantize_affine",
    "int8_matmul",
    "isa",
    "isas",
    "lora",
    "optim",
    "optimize",
    "pack_int4",
    "quantize_4bit",
    "quantize_affine",
    "quantize_dynamic",
    "replace_embedding",
    "replace_linear",
    "replace_recurrent",
    "smooth",
    "summary",
    "unpack_int4",
]
