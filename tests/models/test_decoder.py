"""optimize and QDecoderLayer on decoders of transformers: every family, generate, and what models are used for."""

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from decoders import (
    EXACT,
    FAMILIES,
    VOCABULARY,
    alike,
    calls,
    decoder,
    distance,
    layers,
    logits,
    pair,
    same_tokens,
    tokens,
)
from torch import Tensor

import pyqkern
from pyqkern import optimize, replace_linear, summary
from pyqkern.schemes import FP4, NF4, Int4, Int8

MAJOR = int(transformers.__version__.split(".")[0])
IMPLEMENTATIONS = ["sdpa", "eager"]


def padded(batch: int = 3, length: int = 9) -> tuple[Tensor, Tensor]:
    """Rows with 0, 2, 4 ... of padding on the left."""
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
    for i in range(batch):
        ids[i, : 2 * i] = mask[i, : 2 * i] = 0
    return ids, mask


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, implementation: str) -> None:
    models = pair(family, EXACT, implementation)
    assert len(layers(models[1])) == 2 and list(models[1].state_dict()) == list(models[0].state_dict())
    assert type(models[1]) is type(models[0])
    long = tokens(2, 24)  # behind the sliding windows of 16
    y = alike(models, lambda model: logits(model, long))
    first = alike(models, lambda model: logits(model, long[:, :23]))
    assert distance(first, y[:, :-1]) < 1e-5  # the next token changes nothing before it
    ids, mask = padded()
    seen = mask.bool()
    alike(models, lambda model: logits(model, ids, attention_mask=mask)[seen])
    alike(models, lambda model: logits(model, tokens(), use_cache=False))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_the_unfused_model(family: str, implementation: str) -> None:
    """With int8, whose codes a rounding can flip."""
    models = pair(family, "int8", implementation)
    count = 64 if implementation == "sdpa" else 20
    found = same_tokens(models, tokens(2, 5), count)
    steps = [int((found[0] == token).sum()) for token in found[0].unique()]
    assert max(steps) < count, "a model that repeats one token shows nothing"


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2", "mistral"])
def test_left_padding(family: str) -> None:
    """A row of a padded batch gives the tokens that it gives alone."""
    models = pair(family)
    ids, mask = padded()
    found = same_tokens(models, ids, 20, attention_mask=mask)
    for i in range(3):
        alone = same_tokens(models, ids[i : i + 1, 2 * i :], 20)
        assert torch.equal(found[i, 9:], alone[0, 9 - 2 * i :])


SCHEMES = ["int8", "int8-a7", Int8(symmetric=True), "nf4", NF4(double_quant=True, compute="fp32"), "int4"]


@pytest.mark.parametrize("scheme", [*SCHEMES, FP4(compute="bf16"), Int4(compute="fp32")])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_schemes(family: str, scheme: Any) -> None:
    """The fused model errs as the unfused one: a tenth of its error at most comes from flipped codes."""
    fp32 = decoder(family)
    unfused, fused = replace_linear(copy.deepcopy(fp32), scheme), optimize(copy.deepcopy(fp32), scheme)
    expected, before, after = (logits_of(model) for model in (fp32, unfused, fused))
    assert len(layers(fused)) == 2 and calls(fused) == ["", ""]
    assert distance(after, before) < 0.1 * distance(before, expected)
    assert torch.equal(logits_of(optimize(unfused, scheme)), after)  # of a model that is quantized already


def logits_of(model: Any, **options: Any) -> Tensor:
    with torch.inference_mode():
        return logits(model, tokens(), **options)


@pytest.mark.parametrize("family", ["llama", "gemma", "opt", "bloom"])
def test_bf16(family: str) -> None:
    """Everything between a layer's input and output is fp32 here, so the fused model is no further off than the other.

    Both round what they give to the next layer: 2**-9 of it in each of 2 layers, which a few linears make larger.
    """
    exact = logits_of(replace_linear(decoder(family), EXACT))
    unfused, fused = (model.bfloat16() for model in pair(family))
    y, old = logits_of(fused), logits_of(unfused)
    assert y.dtype == torch.bfloat16 and calls(fused) == ["", ""]
    assert distance(y, exact) < 1.2 * distance(old, exact) + 2**-8


def test_sampling_is_that_of_the_unfused_model() -> None:
    def sampled(model: Any) -> Tensor:
        torch.manual_seed(3)
        return model.generate(tokens(), max_new_tokens=20, do_sample=True, top_k=5, temperature=1.3)

    unfused, fused = pair("qwen2")
    with torch.inference_mode():
        assert torch.equal(sampled(fused), sampled(unfused))
    assert calls(fused) == ["", ""]


@pytest.mark.parametrize("family", ["llama", "mistral", "bloom"])
def test_beams(family: str) -> None:
    unfused, fused = pair(family)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 20, "do_sample": False}
    with torch.inference_mode():
        found, expected = (model.generate(tokens(), **options) for model in (fused, unfused))
    assert torch.equal(found, expected) and calls(fused) == ["", ""]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", *(["mistral"] if MAJOR >= 5 else [])])
def test_assisted_decoding(family: str) -> None:
    """The cache is cropped where the assistant was wrong; the tokens are those of greedy decoding."""
    unfused, fused = pair(family)
    ids = tokens(1, 9)
    greedy = same_tokens((unfused, fused), ids, 24)
    torch.manual_seed(7)
    helper = decoder(family)
    for parameter in helper.parameters():  # right often enough, and wrong often enough
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    assistant = optimize(helper, EXACT)
    with torch.inference_mode():
        lookup = {"prompt_lookup_num_tokens": 3, "eos_token_id": VOCABULARY}  # which transformers 4 needs
        for options in ({"assistant_model": assistant}, lookup):
            found = fused.generate(ids, max_new_tokens=24, do_sample=False, **options)
            assert torch.equal(found, greedy) and calls(fused) == ["", ""]
    assert calls(assistant) == ["", ""]


@pytest.mark.parametrize("size", [1, 4, 9])
def test_prefill_in_chunks(size: int) -> None:
    models = pair("mistral")
    ids = tokens(2, 21)
    found = same_tokens(models, ids, 8, prefill_chunk_size=size)
    assert torch.equal(found, same_tokens(models, ids, 8))


def test_past_key_values_of_ones_own() -> None:
    models = pair("qwen2")
    ids = tokens(1, 20)
    expected = same_tokens(models, ids, 8)
    for model in models:
        with torch.inference_mode():
            cache = transformers.DynamicCache(config=model.config)
            model(ids[:, :15], past_key_values=cache)
            for _ in range(2):  # the prefix is used twice
                own = copy.deepcopy(cache)
                found = model.generate(ids, past_key_values=own, max_new_tokens=8, do_sample=False)
                assert torch.equal(found, expected) and own.get_seq_length() == 27
    assert calls(models[1]) == ["", ""]


def test_hidden_states() -> None:
    unfused, fused = pair("llama")
    with torch.inference_mode():
        found, expected = (model(tokens(), output_hidden_states=True).hidden_states for model in (fused, unfused))
    assert len(found) == len(expected) == 3 and calls(fused) == ["", ""]
    assert all(distance(one, other) < 1e-5 for one, other in zip(found, expected, strict=True))


# ---- copies and files


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "bloom"])
def test_copies(family: str) -> None:
    _, fused = pair(family)
    expected = logits_of(fused)
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(logits_of(copied), expected) and calls(copied) == ["", ""]
        with torch.no_grad():
            layers(copied)[0].get_submodule(".".join(layers(copied)[0]._family.layout.linears[-1])).weight_scale.mul_(2)
        assert not torch.equal(logits_of(copied), expected) and torch.equal(logits_of(fused), expected)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_save_and_load(family: str, tmp_path: Any) -> None:
    """A folder holds the quantized model; optimize fuses what was read."""
    _, fused = pair(family, "nf4")
    expected = logits_of(fused)
    fused.save_pretrained(tmp_path)
    read = type(decoder(family)).from_pretrained(tmp_path)
    assert not layers(read) and not summary(read).decoders
    again = optimize(read, "nf4")
    assert torch.equal(logits_of(again), expected) and calls(again) == ["", ""]


def test_state_dicts_interchange() -> None:
    unfused, fused = pair("qwen3", "int8")
    expected = logits_of(fused)
    other = optimize(decoder("qwen3"))
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(unfused.state_dict())
    assert torch.equal(logits_of(other), expected)
    unfused.load_state_dict(fused.state_dict(), assign=True)
    fused.load_state_dict(unfused.state_dict(), assign=True)
    assert torch.equal(logits_of(fused), expected) and calls(fused) == ["", ""]


def test_summary_says_which_layers_are_fused() -> None:
    fused = optimize(decoder("llama"), exclude="model.layers.1.mlp.up_proj")
    found = summary(fused)
    assert found.encoders == [] and [record.name for record in found.decoders] == ["model.layers.0", "model.layers.1"]
    assert found.decoders[0].reason is None and "mlp.up_proj is of a kind" in str(found.decoders[1].reason)
    assert "1 of 2 decoder layers are one operator each" in str(found)
    logits_of(fused)
    assert "the last call of 1 of them went through the operator" in str(summary(fused))
    assert summary(fused).to_dict()["decoders"][0]["last_call"] == ""


# ---- other ways of running a model


def test_compile() -> None:
    """Inside a graph the layers go their old way; a static cache is written and read all the same."""
    torch._dynamo.reset()
    unfused, fused = pair("llama")
    ids = tokens(1, 6)
    with torch.inference_mode():
        expected = logits(unfused, ids)
        compiled = torch.compile(fused, backend="aot_eager")
        assert distance(logits(compiled, ids, use_cache=False), expected) < 1e-5
        cache = transformers.StaticCache(config=fused.config, max_cache_len=16)
        begun = logits(fused, ids[:, :5], past_key_values=cache)
        assert calls(fused) == ["", ""] and distance(begun, expected[:, :5]) < 1e-5
        position = {"cache_position": torch.tensor([5])} if MAJOR < 5 else {}
        step = logits(compiled, ids[:, 5:], past_key_values=cache, **position)
        assert distance(step, expected[:, 5:]) < 1e-5


def test_export() -> None:
    _, fused = pair("qwen2")
    fused.config.use_cache = False
    ids = tokens(1, 6)
    with torch.no_grad():
        expected = logits(fused, ids)
        assert calls(fused) == ["", ""]
        exported = torch.export.export(fused, (ids,), {"use_cache": False}).module()
        assert distance(exported(ids, use_cache=False).logits, expected) < 1e-5


def test_training_goes_the_old_way() -> None:
    unfused, fused = pair("llama")
    for model in (unfused, fused):
        model.train()
        model(tokens(), labels=tokens()).loss.backward()
    assert calls(fused) == ["in training"] * 2
    name = "model.layers.0.input_layernorm.weight"
    assert torch.equal(fused.get_parameter(name).grad, unfused.get_parameter(name).grad)
    fused.eval()
    fused(tokens(), labels=tokens()).loss.backward()
    assert "gradient" in str(calls(fused)[0])


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["int8", "int8-a7", EXACT, "nf4", "fp4", "int4", NF4(compute="fp32")])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_sweep(family: str, implementation: str, scheme: Any) -> None:
    models = pair(family, scheme, implementation)
    same_tokens(models, tokens(2, 30), 128)
    ids, mask = padded()
    same_tokens(models, ids, 40, attention_mask=mask)
    assert pyqkern.summary(models[1]).decoders[0].reason is None
