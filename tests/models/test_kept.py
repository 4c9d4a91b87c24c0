"""What replace_linear keeps in float, and what it says of it; what survives a replacement."""

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers
from tiny import BERT, bert
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from pyqkern import QEmbedding, QLinear, replace_embedding, replace_linear, summary

WIDEST = 66311


def reasons(model: nn.Module) -> dict[str, str | None]:
    return {record.name: record.reason for record in summary(model).records}


def said(function: Any, *arguments: Any, **options: Any) -> list[str]:
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*arguments, **options)
    return [str(one.message) for one in caught if one.category is UserWarning]


# ---- adapters


def with_adapters(**options: Any) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=4, target_modules=["query", "word_embeddings"], **options)
    return peft.get_peft_model(bert("BertForSequenceClassification"), config)


def test_adapters_stay_in_float_and_are_trained() -> None:
    model = with_adapters(modules_to_save=["classifier"])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    replace_linear(model)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    found = reasons(model)
    kept = {name for name, reason in found.items() if reason == "an adapter of peft, which is trained"}
    assert len(kept) == 2 * 2 + 1 and all("lora_" in name or "modules_to_save" in name for name in kept)
    assert all(reason is None for name, reason in found.items() if name not in kept)
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    assert isinstance(layer.base_layer, QLinear) and layer.base_layer.scheme.name == "int8"
    loss = model(input_ids=torch.arange(2, 26).view(2, 12)).logits.square().sum()
    loss.backward()
    assert layer.lora_B["default"].weight.grad.norm() > 0


def test_the_embedding_below_an_adapter_is_quantized_and_the_adapter_is_not() -> None:
    model = with_adapters()
    replace_embedding(model)
    embedding = model.base_model.model.bert.embeddings.word_embeddings
    assert isinstance(embedding.base_layer, QEmbedding)
    assert all(parameter.is_floating_point() for parameter in embedding.lora_embedding_A.values())


def test_a_prompt_encoder_stays_in_float() -> None:
    import peft

    config = peft.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=3, encoder_hidden_size=16)
    model = replace_linear(peft.get_peft_model(bert("BertForSequenceClassification"), config))
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert any("prompt_encoder" in name for name in linears)
    assert all("prompt_encoder" in name or "modules_to_save" in name for name in linears)
    assert isinstance(model.base_model.bert.pooler.dense, QLinear)


# ---- layers whose parameters are computed


@pytest.mark.parametrize("name", ["bias", "weight"])
def test_pruned_layers_stay(name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    prune.l1_unstructured(model[0], name, 2)
    x = torch.randn(2, 8)
    with torch.no_grad():
        first = model[0](x)
        replace_linear(model)
        assert torch.equal(model[0](x), first)
    found = reasons(model)
    assert f"its {name} is computed from other parameters" in str(found["0"])
    assert [type(layer) is nn.Linear for layer in model] == [True, False, False]


def test_a_parametrized_bias_stays() -> None:
    class Half(nn.Module):
        def forward(self, bias: Tensor) -> Tensor:
            return bias / 2

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    parametrize.register_parametrization(model[0], "bias", Half())
    replace_linear(model)
    assert "parametrized" in str(reasons(model)["0"]) and isinstance(model[1], QLinear)


# ---- subclasses that the caller vouches for


class Casting(nn.Linear):
    """As Whisper's: the weight follows the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Same(nn.Linear):
    """Only a name."""


def test_named_subclasses_are_quantized() -> None:
    model = nn.Sequential(Casting(8, 8), Same(8, 8), nn.Linear(8, 8))
    replace_linear(copied := copy.deepcopy(model))
    assert [isinstance(layer, QLinear) for layer in copied] == [False, False, True]
    assert "include=[nn.Linear, Casting], the types, takes it" in str(reasons(copied)["0"])
    replace_linear(copied := copy.deepcopy(model), include=Same)
    assert [isinstance(layer, QLinear) for layer in copied] == [False, True, False]
    assert reasons(copied)["2"] == "not included"
    replace_linear(copied := copy.deepcopy(model), include=[nn.Linear, Casting], exclude="2")
    assert [isinstance(layer, QLinear) for layer in copied] == [True, False, False]
    replace_linear(copied := copy.deepcopy(model), include=["*", Casting, Same])
    assert all(isinstance(layer, QLinear) for layer in copied)
    with pytest.raises(ValueError, match=r"include must match the type of a linear, got .*Conv1d.*types are Casting"):
        replace_linear(model, include=nn.Conv1d)


def test_falcon() -> None:
    config = transformers.FalconConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    model = transformers.FalconModel(config).eval()
    ids = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        before = model(ids).last_hidden_state
        assert any("FalconLinear" in message for message in said(replace_linear, model))
        kind = transformers.models.falcon.modeling_falcon.FalconLinear
        assert not said(replace_linear, model, include=[kind])
        after = model(ids).last_hidden_state
    assert all(reason is None for reason in reasons(model).values())
    assert 0 < (after - before).norm() < 0.05 * before.norm()


# ---- what is said


def test_a_warning_where_little_was_quantized() -> None:
    (message,) = said(replace_linear, nn.Sequential(Same(8, 8), Same(8, 8), nn.Linear(8, 4)))
    assert "only 128 B of 640 B of the model's linears are quantized: 2 subclass of nn.Linear: Same" in message
    (message,) = said(replace_linear, nn.Sequential(nn.ReLU()))
    assert "it has no linears" in message
    tied = transformers.BertForMaskedLM(transformers.BertConfig(**(BERT | {"vocab_size": 5000})))
    (message,) = said(replace_linear, tied)
    assert "1 tied to the embedding" in message


def test_no_warning_where_it_is_the_callers_wish_or_enough() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    assert not said(replace_linear, copy.deepcopy(model), exclude="*")
    assert not said(replace_linear, copy.deepcopy(model), include="1")
    assert not said(replace_linear, model)
    assert not said(replace_linear, model)  # quantized before
    assert not said(replace_linear, bert("BertForMaskedLM"))


def test_a_layer_that_is_too_wide_is_kept() -> None:
    model = nn.Sequential(nn.Linear(WIDEST, 2), nn.Linear(WIDEST + 1, 2), nn.Linear(2, 2))
    replace_linear(model)
    assert isinstance(model[0], QLinear) and isinstance(model[2], QLinear) and type(model[1]) is nn.Linear
    assert reasons(model)["1"] == f"too wide: int8 takes up to {WIDEST} in_features, not {WIDEST + 1}"
    replace_linear(model, "nf4")
    assert model[1].scheme.name == "nf4"


def test_an_embedding_that_is_too_wide_is_kept() -> None:
    model = nn.Sequential(nn.Embedding(2, WIDEST + 1), nn.Linear(WIDEST + 1, 2))
    replace_embedding(model)
    assert type(model[0]) is nn.Embedding and "too wide" in str(summary(model).embeddings[0].reason)


# ---- hooks


def test_all_hooks_survive() -> None:
    linear, seen = nn.Linear(8, 4), []
    model = nn.Sequential(linear)
    linear.register_full_backward_hook(lambda module, into, out: seen.append(("backward", type(module).__name__)))
    linear.register_full_backward_pre_hook(lambda module, out: seen.append(("backward_pre", type(module).__name__)))
    linear.register_forward_hook(lambda *a, **k: seen.append(("forward", "")), with_kwargs=True)
    linear.register_state_dict_pre_hook(lambda *a: seen.append(("state_pre", "")))
    linear.register_state_dict_post_hook(lambda *a: seen.append(("state_post", "")))
    linear.register_load_state_dict_pre_hook(lambda module, *a: seen.append(("load_pre", type(module).__name__)))
    linear.register_load_state_dict_post_hook(lambda module, keys: seen.append(("load_post", type(module).__name__)))
    replace_linear(model)
    del linear
    model(torch.randn(3, 8, requires_grad=True)).sum().backward()
    model.load_state_dict(model.state_dict())
    assert seen == [
        ("forward", ""),
        ("backward_pre", "Int8Linear"),
        ("backward", "Int8Linear"),
        ("state_pre", ""),
        ("state_post", ""),
        ("load_pre", "Int8Linear"),
        ("load_post", "Int8Linear"),
    ]
