"""Public functions: a wrong type or dtype is a TypeError, a wrong value or shape a ValueError, and both name it."""

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import peft
import pytest
import torch
from torch import nn

import pyqkern
from pyqkern import analysis, convert, training
from pyqkern.calibration.smooth import Pair
from pyqkern.schemes import SCHEMES, Range

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
Q, S = torch.zeros(4, 64, dtype=torch.int8), torch.tensor(0.1)
NAN, BYTES = X * float("nan"), torch.zeros(2, dtype=torch.uint8)
FOUR = pyqkern.quantize_4bit(X)
PARTS = {one.name: getattr(FOUR, one.name) for one in fields(FOUR)}
PER_TENSOR = {"1": Range(torch.tensor(-1.0), torch.tensor(1.0))}
PER_CHANNEL = {"1": Range(-torch.ones(64), torch.ones(64))}

NO_TENSORS = (None, "x", 3, [1.0])
NO_MODULES = (None, "x", X, nn.Linear)
NO_NUMBERS = (None, "x", [1])
NO_INTS = (*NO_NUMBERS, 2.5)
NO_BOOLS = (None, "x", 1)
NO_SCHEMES = (None, 3, pyqkern.NF4)
NO_PATTERNS = (3, [3], ["1", 3])
NO_DTYPES = (None, "int8", X)


def model() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 8))


def quantized() -> nn.Module:
    return pyqkern.replace_linear(model())


def score(_: nn.Module) -> float:
    return 1.0


# function -> arguments that are right, and for each argument values of a wrong type or dtype, and wrong values. What is
# made anew for each call is a function of this file.
Row = tuple[Callable[..., Any], dict[str, Any], dict[str, tuple[Any, ...]], dict[str, tuple[Any, ...]]]
PATTERNS = {"include": NO_PATTERNS, "exclude": NO_PATTERNS}
NO_SUCH = {"include": ("nope",), "exclude": ("nope", ["1", "nope"])}
SIZES = {"in_features": NO_INTS, "out_features": NO_INTS}
FORWARD = {"input": (*NO_TENSORS, X.double(), X.long())}

TABLE: dict[str, Row] = {
    "choose_qparams_affine": (
        pyqkern.choose_qparams_affine,
        {"x": X},
        {
            "x": (*NO_TENSORS, X.double(), X.long(), X.bool()),
            "dtype": (*NO_DTYPES, torch.int16, torch.float32),
            "axis": ("x", 2.5, (0, "a"), S, True),
            "group_size": ("x", 2.5, True),
            "symmetric": NO_BOOLS,
            "bits": NO_INTS,
        },
        {"x": (NAN,), "axis": (5, -3, [0, 0]), "group_size": (0, -1, 3, 65), "bits": (2, 16)},
    ),
    "quantize_affine": (
        pyqkern.quantize_affine,
        {"x": X, "scale": S},
        {
            "x": (*NO_TENSORS, X.double(), Q),
            "scale": (*NO_NUMBERS, 1j, True, torch.tensor(1)),
            "zero_point": ("x", [1], 2.5, 1e40, True, torch.tensor(0.5)),
            "dtype": (*NO_DTYPES, torch.int16),
            "axis": ("x", 1.5),
            "group_size": ("x", 1.5),
            "bits": ("x", 8.0),
        },
        {
            "scale": (0, -1.0, float("nan"), float("inf"), torch.ones(3)),
            "zero_point": (-129, 300, 2**31, -(2**70), torch.tensor([1, 2])),
            "axis": (7,),
            "group_size": (5,),
            "bits": (3,),
        },
    ),
    "dequantize_affine": (
        pyqkern.dequantize_affine,
        {"q": Q, "scale": S},
        {
            "q": (*NO_TENSORS, X, Q.short()),
            "scale": NO_NUMBERS,
            "zero_point": ("x", 2.5),
            "dtype": (None, "float32", torch.int8, torch.float64),
            "axis": ("x",),
            "group_size": ("x", 2.5),
        },
        {"scale": (0, torch.ones(2)), "zero_point": (500,), "axis": (9,), "group_size": (7,)},
    ),
    "pack_int4": (pyqkern.pack_int4, {"q": Q}, {"q": (*NO_TENSORS, X)}, {"q": (Q + 8, Q - 9)}),
    "unpack_int4": (
        pyqkern.unpack_int4,
        {"packed": BYTES, "shape": (4,)},
        {
            "packed": (*NO_TENSORS, BYTES.float()),
            "shape": (None, "x", 5, (4.0,), ("a",)),
            "dtype": (*NO_DTYPES, torch.float32),
        },
        {"packed": (BYTES[:1],), "shape": ((-4,), (-2, -2), (8,), (2,))},
    ),
    "int8_matmul": (
        pyqkern.int8_matmul,
        {"a": Q, "w": Q},
        {"a": (*NO_TENSORS, X), "w": (*NO_TENSORS, X, Q.to(torch.uint8))},
        {"a": (Q[0], Q[:, :3]), "w": (Q[0], Q[:, :3], Q.to("meta"))},
    ),
    "quantize_4bit": (
        pyqkern.quantize_4bit,
        {"w": X},
        {
            "w": (*NO_TENSORS, X.double(), X.long()),
            "quant_type": (None, 3, ["nf4"]),
            "blocksize": (None, "64", 64.0, True),
            "double_quant": NO_BOOLS,
        },
        {"w": (NAN,), "quant_type": ("int4", "x"), "blocksize": (63, 0, -64)},
    ),
    "dequantize_4bit": (
        pyqkern.dequantize_4bit,
        {"q": FOUR},
        {"q": (*NO_TENSORS, X), "dtype": ("x", torch.int8, torch.float64)},
        {},
    ),
    "Quantized4bit": (
        pyqkern.Quantized4bit,
        PARTS,
        {
            "packed": (*NO_TENSORS, X),
            "absmax": (*NO_TENSORS, FOUR.absmax.double()),
            "quant_type": (None, 3),
            "blocksize": (None, "64", 64.0),
            "dtype": (None, "x", torch.int8),
            "shape": (None, "x", 5, (4, 64.0)),
            "nested_absmax": ("x",),
        },
        {
            "packed": (FOUR.packed[1:],),
            "absmax": (FOUR.absmax[1:],),
            "quant_type": ("x",),
            "blocksize": (63, 32),
            "shape": ((-4, -64), (4, 63)),
            "nested_absmax": (X,),
        },
    ),
    "replace_linear": (
        pyqkern.replace_linear,
        {"model": model},
        {"model": NO_MODULES, "scheme": NO_SCHEMES, **PATTERNS, "ranges": ("x", 3, ["1"], {"1": 3}, {"1": (0, 1)})},
        {"scheme": ("x",), **NO_SUCH, "ranges": (PER_TENSOR,)},
    ),
    "optimize": (
        pyqkern.optimize,
        {"model": model},
        {"model": NO_MODULES, "scheme": NO_SCHEMES, **PATTERNS},
        {"scheme": ("x",), **NO_SUCH},
    ),
    "replace_embedding": (
        pyqkern.replace_embedding,
        {"model": nn.Sequential(nn.Embedding(9, 64))},
        {"model": NO_MODULES, "scheme": NO_SCHEMES, **PATTERNS},
        {"scheme": ("x", "int8-static", "int8-outlier"), **NO_SUCH},
    ),
    "replace_recurrent": (
        pyqkern.replace_recurrent,
        {"model": nn.Sequential(nn.LSTM(64, 8))},
        {"model": NO_MODULES, "scheme": NO_SCHEMES, **PATTERNS},
        {"scheme": ("x", "int8-static", "int8-outlier"), **NO_SUCH},
    ),
    "quantize_dynamic": (
        pyqkern.quantize_dynamic,
        {"model": model},
        {
            "model": NO_MODULES,
            "qconfig_spec": (3, "x", [nn.Linear], {3}, {nn.Linear: 3}),
            "dtype": (None, "x"),
            "inplace": NO_BOOLS,
        },
        # dtypes that torch's takes and this one does not are values
        {"qconfig_spec": ({"nope"},), "dtype": (torch.int8,), "mapping": ({},)},
    ),
    "summary": (pyqkern.summary, {"model": model}, {"model": NO_MODULES}, {}),
    "QLinear.from_linear": (
        pyqkern.QLinear.from_linear,
        {"linear": nn.Linear(64, 8)},
        {
            "linear": (*NO_MODULES, nn.Embedding(3, 4)),
            "scheme": NO_SCHEMES,
            "ranges": ("x", {"": 3}),
        },
        {"scheme": ("x",), "ranges": (PER_TENSOR,)},
    ),
    "QEmbedding.from_embedding": (
        pyqkern.QEmbedding.from_embedding,
        {"embedding": nn.Embedding(9, 64)},
        {"embedding": (*NO_MODULES, nn.EmbeddingBag(9, 64)), "scheme": NO_SCHEMES},
        {"scheme": ("x", "int8-outlier")},
    ),
    "QEmbeddingBag.from_embedding": (
        pyqkern.QEmbeddingBag.from_embedding,
        {"embedding": nn.EmbeddingBag(9, 64)},
        {"embedding": (*NO_MODULES, nn.Embedding(9, 64)), "scheme": NO_SCHEMES},
        {"scheme": ("x", "int8-outlier"), "embedding": (nn.EmbeddingBag(9, 64, max_norm=1.0),)},
    ),
    "QRecurrent.from_recurrent": (
        pyqkern.QRecurrent.from_recurrent,
        {"module": nn.LSTM(64, 8)},
        {"module": NO_MODULES, "scheme": NO_SCHEMES},
        {"scheme": ("x", "int8-outlier")},
    ),
    **{
        kind.__name__: (
            kind,
            {"in_features": 64, "out_features": 8},
            {**SIZES, "scheme": (3, pyqkern.NF4), "dtype": ("x", torch.int8, torch.float64)},
            {"in_features": (-64,), "out_features": (-1,), "scheme": ("x", other)},
        )
        for kind, other in (
            (pyqkern.Int8Linear, "nf4"),
            (pyqkern.Int8StaticLinear, "int8"),
            (pyqkern.Int8OutlierLinear, "int8"),
            (pyqkern.Int8WeightOnlyLinear, "int8"),
            (pyqkern.NF4Linear, "fp4"),
            (pyqkern.FP4Linear, "nf4"),
            (pyqkern.Float16Linear, "nf4"),
            (pyqkern.Int4Linear, "nf4"),
        )
    },
    **{
        f"a layer of {name}": (
            pyqkern.QLinear.from_linear(nn.Linear(64, 8), name, ranges={"": PER_TENSOR["1"]} if static else None),
            {"input": X},
            FORWARD,
            {"input": (X[:, :3], S)},
        )
        for name in SCHEMES
        for static in [SCHEMES[name].needs_ranges]
    },
    "a quantized embedding": (
        pyqkern.QEmbedding.from_embedding(nn.Embedding(9, 64)),
        {"input": torch.tensor([1])},
        {"input": (*NO_TENSORS, X)},
        {},
    ),
    "a quantized bag": (
        pyqkern.QEmbeddingBag.from_embedding(nn.EmbeddingBag(9, 64)),
        {"input": torch.tensor([[1]])},
        {"input": (*NO_TENSORS, X)},
        {},
    ),
    "a quantized LSTM": (
        pyqkern.QRecurrent.from_recurrent(nn.LSTM(64, 8)),
        {"input": torch.randn(3, 2, 64)},
        {**FORWARD, "hx": ("x", 3, torch.zeros(3), (torch.zeros(1, 2, 8),))},
        {"input": (X[:, :3], torch.randn(1, 2, 2, 64), torch.randn(0, 2, 64))},
    ),
    "a quantized cell": (
        pyqkern.QRecurrent.from_recurrent(nn.GRUCell(64, 8)),
        {"input": X},
        {**FORWARD, "hx": ("x", 3)},
        {"input": (X[:, :3],), "hx": (torch.zeros(3),)},
    ),
    "calibrate": (
        pyqkern.calibrate,
        {"model": model, "batches": [X], "progress": False},
        {"model": NO_MODULES, "batches": (None, 3), "observer": (None, 3), "per_channel": NO_BOOLS},
        {"model": (nn.ReLU(),), "batches": ([],), "observer": ("x",)},
    ),
    "smooth": (
        pyqkern.smooth,
        {"model": model, "ranges": PER_CHANNEL, "pairs": [Pair("0", ("1",))]},
        {
            "model": NO_MODULES,
            "ranges": (None, "x", 3),
            "alpha": NO_NUMBERS,
            "pairs": (3, "x", [3]),
            "shared": NO_BOOLS,
        },
        {"ranges": ({}, PER_TENSOR), "alpha": (2, -1, float("nan")), "pairs": ([],)},
    ),
    "sensitivity": (
        analysis.sensitivity,
        {"model": model, "evaluate": score, "progress": False},
        {"model": NO_MODULES, "evaluate": (None, 3), "scheme": NO_SCHEMES, "executor": ("x",)},
        {"model": (nn.ReLU(),), "evaluate": (lambda _: "x", lambda _: float("nan")), "scheme": ("x",)},
    ),
    "fallback": (
        analysis.fallback,
        {"model": model, "evaluate": score, "target": 0.5, "progress": False},
        {"model": NO_MODULES, "evaluate": (None, 3), "target": NO_NUMBERS, "scheme": NO_SCHEMES},
        {"target": (2.0, float("nan")), "scheme": ("x",)},
    ),
    "auto": (
        pyqkern.auto,
        {"model": model, "batches": [X], "schemes": ["int8"], "objective": "bytes", "progress": False},
        {
            "model": NO_MODULES,
            "batches": (None, 3),
            "evaluate": (3, "x"),
            "budget": NO_NUMBERS,
            "schemes": (3, [None]),
            "sizes": (3,),
            "executor": ("x",),
        },
        {
            "model": (pyqkern.replace_linear(model()), nn.ReLU()),
            "batches": ([], [NAN]),
            "evaluate": (lambda _: "x",),
            "budget": (-1, float("nan")),
            "objective": ("x", None),
            "schemes": ("x", []),
            "sizes": ([], [3], [(0, 1)]),
        },
    ),
    "error_propagation": (
        analysis.error_propagation,
        {"float_model": model, "quantized_model": quantized, "batches": [X], "progress": False},
        {"float_model": NO_MODULES, "quantized_model": NO_MODULES, "batches": (None, 3)},
        {"batches": ([],)},
    ),
    "compare_samples": (
        analysis.compare_samples,
        {"float_model": model, "quantized_model": quantized, "batches": [X], "progress": False},
        {"float_model": NO_MODULES, "quantized_model": NO_MODULES, "batches": (None, 3), "top": ("x", 2.5)},
        {"batches": ([],), "texts": (["a"],), "top": (0,)},
    ),
    "range_report": (
        analysis.range_report,
        {"model": model, "batches": [X], "progress": False},
        {"model": NO_MODULES, "batches": (None, 3), "ranges": ("x", 3, {"1": 3})},
        {"batches": ([],), "ranges": (PER_CHANNEL,)},
    ),
    "training.prepare": (
        training.prepare,
        {"model": model},
        {
            "model": NO_MODULES,
            **{"scheme": NO_SCHEMES, "ranges": (3, {"1": 3})},
            **dict.fromkeys(("learn_ranges", "relu"), NO_BOOLS),
            **PATTERNS,
        },
        {"scheme": ("x", "int8-outlier"), "ranges": (PER_TENSOR,), "learn_ranges": (True,), "relu": (True,), **NO_SUCH},
    ),
    "training.convert": (training.convert, {"model": model}, {"model": NO_MODULES}, {"model": (model(),)}),
    "training.freeze_ranges": (training.freeze_ranges, {"model": model}, {"model": NO_MODULES}, {"model": (model(),)}),
    "training.Schedule": (
        training.Schedule,
        {"model": training.prepare(model())},
        {"model": NO_MODULES, "start": NO_INTS, "freeze": ("x", 2.5)},
        {"model": (nn.Linear(3, 3),), "start": (-1,), "freeze": (-1,)},
    ),
    "training.distillation_loss": (
        training.distillation_loss,
        {"model": model, "inputs": {}, "teacher": nn.Identity()},
        {
            **{"model": NO_MODULES, "inputs": (None, X), "teacher": NO_MODULES},
            **dict.fromkeys(("temperature", "weight", "hidden_weight"), NO_NUMBERS),
        },
        {"temperature": (0, -1.0), "weight": (-0.1, 1.5, float("nan")), "hidden_weight": (-1, float("nan"))},
    ),
    "optim.param_groups": (
        pyqkern.optim.param_groups,
        {"model": model, "options": {"*.weight": {}}},
        {"model": NO_MODULES, "options": (None, "x", {3: {}})},
        {"options": ({"x": {}},)},
    ),
    **{
        f"optim.{kind.__name__}": (
            kind,
            {"params": [nn.Parameter(X)]},
            {
                "lr": NO_NUMBERS,
                "weight_decay": NO_NUMBERS,
                "maximize": NO_BOOLS,
                "bits": NO_INTS,
                "min_8bit_size": NO_INTS,
                "max_grad_norm": ("x", [1]),
                "params": ([nn.Parameter(X.double())],),
                **types,
            },
            {
                "lr": (-1.0, float("nan"), torch.ones(2)),
                "weight_decay": (-1, float("inf")),
                "bits": (4, 16),
                "min_8bit_size": (-1,),
                "max_grad_norm": (0, -1.0),
                **values,
            },
        )
        for kind, types, values in (
            (
                pyqkern.optim.AdamW8bit,
                {"betas": (None, 0.9, (0.9,)), "eps": NO_NUMBERS},
                {"betas": ((0.9, 1.0),), "eps": (0.0,)},
            ),
            (pyqkern.optim.Adam8bit, {"decoupled_weight_decay": ("x", 1)}, {"betas": ((-0.1, 0.9),), "eps": (-1,)}),
            (
                pyqkern.optim.SGD8bit,
                {"momentum": NO_NUMBERS, "nesterov": NO_BOOLS},
                {"momentum": (0, 1.0), "dampening": (-1,)},
            ),
            (pyqkern.optim.Lion8bit, {"betas": (None, "x")}, {"betas": ((0.9, 2),)}),
        )
    },
    "PyqkernConfig": (
        pyqkern.PyqkernConfig,
        {},
        {"scheme": NO_SCHEMES, "include": (3, [3]), "exclude": (3, [3]), "format": (None, 3), "layers": (3, "x")},
        {
            "scheme": ("x", {"name": "x"}),
            "embeddings": ("int8-outlier",),
            "format": ("x",),
            "version": ("x", 2),
        },
    ),
    "lora": (pyqkern.lora, {"config": peft.LoraConfig()}, {"config": (None, "x")}, {}),
    "convert.quantize": (
        convert.quantize,
        {"model": "nowhere", "out": "nowhere/else"},
        {"scheme": (3,), "format": (None, 3), "exclude": (3,), "embeddings": NO_BOOLS},
        {"scheme": ("x",), "format": ("x",)},
    ),
    **{
        type(scheme).__name__: (
            type(scheme),
            {},
            {
                one.name: {bool: NO_BOOLS, int: NO_INTS, float: NO_NUMBERS, str: (None, 3)}[type(one.default)]
                for one in fields(scheme)
            },
            {
                one.name: {
                    "activation_bits": (6, 9),
                    "threshold": (0, -1.0, float("nan")),
                    "blocksize": (63, 0),
                    "group_size": (63, 256),
                    "compute": ("x",),
                }[one.name]
                for one in fields(scheme)
                if type(one.default) is not bool
            },
        )
        for scheme in SCHEMES.values()
        if scheme.name != "int8-a7"
    },
}

# Without an argument that could be wrong, or tested by name elsewhere: files and their errors (checkpoints/, hf/,
# bulk/), the constructors of recurrent layers, which from_recurrent calls (nn/test_recurrent.py).
NOT_HERE = {"analysis", "bulk", "convert", "isa", "isas", "checkpoint_config", "Ranges", "Plan", "QEncoderLayer"}
NOT_HERE |= {"QMultiheadAttention", "QExperts", "QDecoderLayer"}
NOT_HERE |= {name for name in pyqkern.__all__ if name in ("QLSTM", "QGRU", "QRNN") or name.endswith("Cell")}


def test_every_public_function_is_in_the_table() -> None:
    here = {name.partition(".")[0] for name in TABLE}
    assert set(pyqkern.__all__) - here - NOT_HERE == set()
    assert {"Records", "Fallback", "Interrupted", "report", "auto_report"} == set(analysis.__all__) - here


# What messages call an argument whose name is torch's, or has another part of pyqkern for its value.
NAMES = {
    "input": ["input", "x must be", "ids"],
    "linear": ["linear", "weight"],
    "embedding": ["embedding", "max_norm"],
    "embeddings": ["embedding"],
    "schemes": ["scheme"],
}


def cases() -> Iterator[Any]:
    for name, (function, right, types, values) in TABLE.items():
        for error, wrongs in ((TypeError, types), (ValueError, values)):
            for argument, each in wrongs.items():
                yield pytest.param(function, right, argument, each, error, id=f"{name}-{argument}-{error.__name__}")


@pytest.mark.filterwarnings("ignore:only 0 B")
@pytest.mark.parametrize("function, right, argument, wrong, error", cases())
def test_the_kind_of_error_and_its_message(
    function: Any, right: dict[str, Any], argument: str, wrong: tuple[Any, ...], error: type[Exception]
) -> None:
    for value in wrong:
        made = {key: one() if one in (model, quantized) else one for key, one in right.items()}
        with pytest.raises(error) as caught:
            function(**{**made, argument: value})
        assert caught.type is error, value
        said = str(caught.value)
        assert any(name in said for name in NAMES.get(argument, [argument])), (value, said)
