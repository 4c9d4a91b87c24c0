"""quantize_dynamic: torch's own calls give the layer types that torch's function gives, and the page of docs/ runs."""

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import bert, output
from torch import Tensor, nn

import pyqkern
from pyqkern import Int4, QEmbedding, QLinear, QRecurrent, quantize_dynamic, summary

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.ao import quantization as ao

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "quantize_dynamic.md").read_text()
CODE = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.gru = nn.GRU(16, 16)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.bag = nn.EmbeddingBag(30, 16)
        self.conv = nn.Conv1d(16, 16, 3)
        self.lstm = nn.LSTM(16, 16)
        self.rnn = nn.RNN(16, 16)
        self.cells = nn.ModuleList([nn.LSTMCell(16, 16), nn.GRUCell(16, 16), nn.RNNCell(16, 16)])
        self.blocks = nn.ModuleList([Block(), Block()])
        self.attention = nn.MultiheadAttention(16, 2)
        self.fc = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x, _ = self.lstm(self.embedding(ids))
        for block in self.blocks:
            x, _ = block.gru(block.linear(x))
        return self.fc(x)


def kinds(model: nn.Module, prefix: str = "") -> dict[str, str]:
    """Which of the layers are quantized, by name; of those that torch's function knows."""
    found = {}
    for name, module in model._modules.items():
        assert module is not None
        if "quantized" in type(module).__module__ or isinstance(module, QLinear | QEmbedding | QRecurrent):
            kind = type(module).__name__.removeprefix("Q")
            found[prefix + name] = "Linear" if isinstance(module, QLinear) else kind
        else:
            found |= kinds(module, f"{prefix}{name}.")
    return found


CALLS: dict[str, tuple[Any, ...]] = {
    "no arguments": (),
    "a set of types": ({nn.LSTM, nn.Linear}, torch.qint8),
    "one type": ({nn.Linear}, torch.qint8),
    "a type that is not there, and one that is not quantized": ({nn.Linear, nn.Bilinear, nn.Conv1d},),
    "names": ({"fc", "blocks.0"}, torch.qint8),
    "a name and a type": ({"lstm", nn.GRU},),
    "a type of the user's own": ({Block},),
    "an empty set": (set(),),
    "a dict of types": ({nn.Linear: ao.default_dynamic_qconfig, nn.LSTM: ao.per_channel_dynamic_qconfig},),
    "a dict of names": ({"fc": ao.default_dynamic_qconfig},),
    "None takes a part out": ({nn.Linear: ao.default_dynamic_qconfig, "blocks.1.linear": None},),
    "everything but a part": ({"": ao.default_dynamic_qconfig, "blocks": None, "embedding": None, "bag": None},),
    "a name before a type": ({"lstm": None, nn.LSTM: ao.default_dynamic_qconfig},),
    "embeddings by their dtype": ({nn.Embedding}, torch.quint8),
    "all embeddings": (None, torch.quint8),
    "bags": ({nn.EmbeddingBag}, torch.quint8),
    "bags of 4 bits": (None, torch.quint4x2),
    "embeddings by their qconfig": ({nn.Embedding: ao.float_qparams_weight_only_qconfig},),
    "cells": ({nn.LSTMCell, nn.GRUCell, nn.RNNCell},),
    "a part and what is in it": ({"blocks": ao.default_dynamic_qconfig, "blocks.0.linear": None},),
    "types in a part": ({"blocks": ao.default_dynamic_qconfig, nn.GRU: None},),
    "qconfigs of a part": ({"blocks": ao.default_dynamic_qconfig, "blocks.0": ao.per_channel_dynamic_qconfig},),
    "containers": ({nn.ModuleList},),
    "an attention": ({nn.MultiheadAttention},),
    "weights of 16 bits": (None, torch.float16),
    "types of 16 bits": ({nn.LSTM, nn.Linear}, torch.float16),
    "qconfigs of 16 bits": ({"fc": ao.float16_dynamic_qconfig, nn.GRU: ao.float16_dynamic_qconfig},),
}


# What torch leaves in float and pyqkern does not where a name or a type around it is given, and the other way round.
DIFFERENT = {
    "everything but a part": {"rnn": "RNN"} | {f"attention.{name}_proj": "Linear" for name in "qkv"},
    "an attention": {f"attention.{name}_proj": "Linear" for name in "qkv"},
}


def test_the_attention_that_torch_makes_cannot_be_called() -> None:
    """Its forward reads the weight of the output projection, which is a function there. Here it is quantized whole."""
    model, x = Model().eval(), torch.randn(3, 2, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = ao.quantize_dynamic(model, {nn.MultiheadAttention})
    with pytest.raises((AttributeError, TypeError)):
        theirs.attention(x, x, x)
    with torch.no_grad():
        expected = model.attention(x, x, x)[0]
        found = quantize_dynamic(model, {nn.MultiheadAttention}).attention(x, x, x)[0]
    assert (found - expected).norm() < 0.04 * expected.norm()


@pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS)
def test_calls_of_torch_give_the_layers_that_torchs_gives(arguments: tuple[Any, ...]) -> None:
    model = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = kinds(ao.quantize_dynamic(copy.deepcopy(model), *copy.deepcopy(arguments)))
    ours = kinds(quantize_dynamic(model, *arguments))
    name = next(name for name, one in CALLS.items() if one is arguments)
    for layer, kind in DIFFERENT.get(name, {}).items():
        assert ours.get(layer) == kind != theirs.get(layer)
        theirs.pop(layer, None)
        ours.pop(layer, None)
    assert ours == theirs
    assert kinds(model) == {}, "the model itself was changed"


class WordLanguageModel(nn.Module):
    """That of the tutorial on dynamic quantization of an LSTM word language model."""

    def __init__(self, tokens: int = 50, inputs: int = 32, hidden: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.encoder = nn.Embedding(tokens, inputs)
        self.rnn = nn.LSTM(inputs, hidden, layers, dropout=0.5)
        self.decoder = nn.Linear(hidden, tokens)

    def forward(self, ids: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, hidden = self.rnn(self.drop(self.encoder(ids)), hidden)
        return self.decoder(self.drop(y)), hidden


def test_the_tutorial_of_a_word_language_model() -> None:
    torch.manual_seed(0)
    model, ids, zeros = WordLanguageModel().eval(), torch.arange(12).view(6, 2), torch.zeros(2, 2, 32)
    quantized = quantize_dynamic(model, {nn.LSTM, nn.Linear}, dtype=torch.qint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.quantization.quantize_dynamic(model, {nn.LSTM, nn.Linear}, dtype=torch.qint8)
    assert kinds(quantized) == kinds(theirs) == {"rnn": "LSTM", "decoder": "Linear"}
    with torch.no_grad():
        (expected, _), (found, state), (peer, _) = (one(ids, (zeros, zeros)) for one in (model, quantized, theirs))
        again, _ = quantized(ids, tuple(one.detach() for one in state))
    assert (found - expected).norm() < (peer - expected).norm() and again.shape == expected.shape


def test_the_tutorial_of_bert() -> None:
    model = bert("BertForSequenceClassification")
    quantized = quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert kinds(quantized) == kinds(theirs) and len(kinds(theirs)) == 2 * 6 + 2
    expected, found, peer = (output(one) for one in (model, quantized, theirs))
    assert (found - expected).norm() < (peer - expected).norm()


def test_a_copy_in_eval_mode_unless_inplace() -> None:
    torch.manual_seed(0)
    model, ids = Model(), torch.arange(12).view(6, 2)
    with torch.no_grad():
        expected = model.eval()(ids)
        model.train()
        found = quantize_dynamic(model)
        assert not found.training and model.training
        assert (found(ids) - expected).abs().max() <= 0.05 * expected.abs().max()
        assert quantize_dynamic(model, inplace=True) is model and isinstance(model.fc, QLinear) and not model.training
        assert torch.equal(model(ids), found(ids))


def test_schemes_by_name_and_object() -> None:
    spec = {nn.Linear: "nf4", "fc": None, nn.GRU: Int4(group_size=32), nn.Embedding: "int8"}
    model = nn.ModuleDict(
        {"a": nn.Linear(64, 64), "fc": nn.Linear(64, 2), "r": nn.GRU(32, 32), "e": nn.Embedding(9, 8)}
    )
    found = summary(quantize_dynamic(model, spec))
    layers = (*found.records, *found.embeddings, *found.recurrent)
    assert {one.name: one.scheme for one in layers} == {"a": "nf4", "fc": None, "r": "int4", "e": "int8"}


def test_a_qconfig_on_a_module_comes_first() -> None:
    model = Model()
    model.blocks[0].linear.qconfig = None
    model.rnn.qconfig = ao.default_dynamic_qconfig
    found = kinds(quantize_dynamic(model))
    assert "blocks.0.linear" not in found and "blocks.1.linear" in found and found["rnn"] == "RNN"


def test_the_model_may_be_a_layer() -> None:
    assert isinstance(quantize_dynamic(nn.Linear(8, 8)), QLinear)
    assert isinstance(quantize_dynamic(nn.GRU(8, 8)), QRecurrent)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": torch.float32}, ValueError, "dtype must be"),
        ({"mapping": {nn.Linear: nn.Linear}}, ValueError, "mapping must be None"),
        ({"qconfig_spec": {"nothing"}}, ValueError, "qconfig_spec must hold names of modules, got 'nothing'"),
        ({"qconfig_spec": [nn.Linear]}, TypeError, "qconfig_spec must be a set, a dict or None"),
        ({"qconfig_spec": {3}}, TypeError, "must hold types and names"),
        ({"qconfig_spec": {nn.Linear: 8}}, TypeError, "must be a scheme, a qconfig of torch or None"),
        ({"qconfig_spec": {nn.Linear: ao.default_qconfig}}, ValueError, "must be a dynamic qconfig"),
        ({"qconfig_spec": {nn.Linear: "int8-static"}}, ValueError, "needs the activations' ranges"),
        ({"model": "model"}, TypeError, "model must be an nn.Module"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_dynamic(**{"model": Model()} | arguments)


@pytest.mark.parametrize("code", CODE, ids=range(len(CODE)))
def test_the_page_runs(code: str) -> None:
    exec(compile(code, "quantize_dynamic.md", "exec"), {"model": Model(), "ids": torch.arange(12).view(6, 2)})


def test_the_page_names_what_there_is() -> None:
    assert len(CODE) >= 3 and all(hasattr(pyqkern, name) for name in re.findall(r"`pyqkern\.(\w+)", PAGE))
