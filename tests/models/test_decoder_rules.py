"""Where a decoder layer goes its old way: it gives the very bits of the unfused model then, and says why."""

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from decoders import alike, calls, decoder, distance, layers, logits, pair, tokens
from torch import Tensor, nn

import pyqkern
from pyqkern import optimize, replace_linear, summary
from pyqkern.nn.fused_parts import InputScale

MAJOR = int(transformers.__version__.split(".")[0])
IDS = tokens()


def reasons(model: nn.Module) -> list[str | None]:
    return [record.reason for record in summary(model).decoders]


def old_way(models: tuple[Any, Any], reason: str, run: Callable[[Any], Any] | None = None) -> None:
    run = run or (lambda model: logits(model, IDS))
    with torch.no_grad():
        expected, found = (run(model) for model in models)
    assert torch.equal(found, expected) and all(reason in str(call) for call in calls(models[1])), calls(models[1])


# ---- what is not fused


def test_why_not() -> None:
    assert all("of a kind that only runs by itself: int8-outlier" in str(r) for r in of("llama", "int8-outlier"))
    assert all("are quantized in different ways" in str(r) for r in reasons(optimize(mixed())))
    assert all("rows of 64, no whole blocks of 4096" in str(r) for r in of("llama", pyqkern.NF4(blocksize=4096)))
    assert all("no kernel for the activation" in str(r) for r in of("llama", "int8", hidden_act="mish"))
    assert all("norms come behind" in str(r) for r in of("opt", "int8", do_layer_norm_before=False))
    assert all("behind the norms" in str(r) for r in of("bloom", "int8", apply_residual_connection_post_layernorm=True))
    assert all("summed in slices" in str(r) for r in of("bloom", "int8", pretraining_tp=2, slow_but_exact=True))
    assert all("crossattention" in str(r) for r in of("gpt2", "int8", add_cross_attention=True))
    if MAJOR >= 5:
        assert all("looks ahead" in str(r) for r in of("gemma", "int8", use_bidirectional_attention=True))


def test_norms_without_weights() -> None:
    model = decoder("opt")
    for layer in model.model.decoder.layers:
        layer.final_layer_norm = nn.LayerNorm(64, elementwise_affine=False)
    assert all("norms have no weight" in str(reason) for reason in reasons(optimize(model)))


def of(family: str, scheme: Any, **changes: Any) -> list[str | None]:
    found = reasons(optimize(decoder(family, **changes), scheme))
    assert len(found) == 2
    return found


def mixed() -> nn.Module:
    return replace_linear(decoder(), pyqkern.Int8(symmetric=True), include="*q_proj")


def test_scalings_of_gpt2() -> None:
    """transformers 4 leaves the scaling to who computes the attention, and these differ."""
    changes = {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}
    if MAJOR >= 5:
        alike(pair("gpt2", **changes), lambda model: logits(model, IDS))
    else:
        assert all("scores are not scaled" in str(r) for r in of("gpt2", "int8", **changes))


def test_classes_of_a_users_own() -> None:
    from transformers.models.llama import modeling_llama as llama

    class Own(llama.LlamaDecoderLayer):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    class OwnNorm(llama.LlamaRMSNorm):
        pass

    model = decoder()
    model.model.layers[0].__class__ = Own
    model.model.layers[1].post_attention_layernorm.__class__ = OwnNorm
    found = reasons(optimize(model))
    assert "not a class of transformers" in str(found[0]) and "norms are no LlamaRMSNorms" in str(found[1])
    assert not layers(model)


@pytest.mark.parametrize("name", ["apply_rotary_pos_emb", "eager_attention_forward", "repeat_kv"])
def test_patched_functions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama as llama

    stock = getattr(llama, name)
    monkeypatch.setattr(llama, name, lambda *args, **kwargs: stock(*args, **kwargs))
    assert all("patched" in str(reason) for reason in of("llama", "int8"))


def test_patched_forwards() -> None:
    model = decoder()
    model.model.layers[0].forward = model.model.layers[0].forward
    model.model.layers[1].mlp.forward = lambda x: x
    assert all("patched" in str(reason) for reason in reasons(optimize(model)))


def test_smoothed_linears() -> None:
    fp32 = decoder()
    linear = fp32.model.layers[0].mlp.down_proj
    linear.register_forward_pre_hook(InputScale(torch.full((128,), 2.0)))
    found = reasons(optimize(fp32))
    assert "mlp.down_proj is smoothed" in str(found[0]) and found[1] is None


# ---- what changes after optimize


def test_hooks_are_called() -> None:
    unfused, fused = pair()
    seen = []
    handle = fused.model.layers[1].mlp.up_proj.register_forward_hook(lambda *args: seen.append(1))
    with torch.no_grad():
        found = logits(fused, IDS)
        assert seen == [1] and calls(fused) == ["", "a hook listens to a part of it"]
        handle.remove()
        assert distance(logits(fused, IDS), found) < 1e-5 and calls(fused) == ["", ""]
    layer = fused.model.layers[0].register_forward_hook(lambda *args: seen.append(2))  # on the layer itself: it is run
    alike((unfused, fused), lambda model: logits(model, IDS))
    assert seen[1:] == [2]
    layer.remove()


def test_parts_that_are_exchanged_are_used() -> None:
    unfused, fused = pair()
    other = replace_linear(decoder("llama", intermediate_size=128).model.layers[1], "int8").mlp.up_proj
    for model in (unfused, fused):
        model.model.layers[0].mlp.up_proj = other
    with torch.no_grad():
        assert distance(logits(fused, IDS), logits(unfused, IDS)) < 1e-5
    assert "in different ways" in str(calls(fused)[0]) and calls(fused)[1] == ""
    unfused, fused = pair()
    before = logits_of(fused)
    for model in (unfused, fused):
        layer = model.model.layers[0]
        layer.input_layernorm.weight.data = layer.input_layernorm.weight.data * 2  # in the same Parameter
        layer.self_attn.o_proj.bias = nn.Parameter(torch.ones(64))
        layer.mlp.down_proj.weight_scale = layer.mlp.down_proj.weight_scale * 2
        layer.input_layernorm.variance_epsilon = layer.post_attention_layernorm.variance_epsilon = 0.1
        layer.self_attn.scaling = 0.5
    y = alike((unfused, fused), lambda model: logits(model, IDS))
    assert distance(before, y) > 0.01
    fused.model.layers[0].input_layernorm.variance_epsilon = 0.2
    logits_of(fused)
    assert "different eps" in str(calls(fused)[0]) and "different eps" in str(summary(fused))


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return logits(model, IDS)


LATER: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], str]] = {
    "in training": (lambda layer: layer.train(), lambda layer: layer.eval(), "in training"),
    "a part in training": (lambda layer: layer.mlp.train(), lambda layer: layer.eval(), "a part of it is in training"),
    "a norm of another dtype, in the same Parameter": (
        lambda layer: cast(layer.input_layernorm.weight, torch.float64),
        lambda layer: cast(layer.input_layernorm.weight, torch.float32),
        "norms are of another dtype than the input",
    ),
    "another config": (
        lambda layer: setattr(layer.self_attn.config, "_attn_implementation", "flash"),
        lambda layer: setattr(layer.self_attn.config, "_attn_implementation", "sdpa"),
        "another implementation of attention is asked for",
    ),
    "attention weights": (
        lambda layer: setattr(layer.self_attn.config, "_output_attentions", True),
        lambda layer: setattr(layer.self_attn.config, "_output_attentions", False),
        "attention weights are asked for",
    ),
    "a hook": (
        lambda layer: layer.mlp._forward_hooks.update({7: lambda *_: None}),
        lambda layer: layer.mlp._forward_hooks.clear(),
        "a hook listens to a part of it",
    ),
    "a forward": (
        lambda layer: setattr(layer.mlp, "forward", lambda x: x),
        lambda layer: delattr(layer.mlp, "forward"),
        "the forward of a part was replaced",
    ),
}


def cast(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    parameter.data = parameter.data.to(dtype)


@pytest.mark.parametrize("what", LATER)
def test_what_changes_between_two_calls_is_seen_at_once(what: str) -> None:
    change, back, reason = LATER[what]
    _, fused = pair()
    layer = fused.model.layers[0]
    x = torch.randn(2, 9, 64)
    position = fused.model.rotary_emb(x, torch.arange(9)[None])
    with torch.no_grad():
        for _ in range(2):
            expected = layer(x, position_embeddings=position)
            assert layer.last_call == ""
            change(layer)
            with contextlib.suppress(Exception):  # the old way may not be able to
                layer(x, position_embeddings=position)
            assert reason in str(layer.last_call)
            back(layer)
            assert torch.equal(layer(x, position_embeddings=position), expected) and layer.last_call == ""


def test_scales_in_a_state_dicts_form_are_packed_in_each_call() -> None:
    """As torch.func.functional_call puts them there; they may change in place."""
    _, fused = pair("llama", pyqkern.NF4(blocksize=32))
    linear = fused.model.layers[0].mlp.down_proj
    before, packed = logits_of(fused), linear.absmax
    linear._buffers["absmax"] = flat = linear._plain("absmax").clone()
    assert torch.equal(logits_of(fused), before)
    flat *= 2
    changed = logits_of(fused)
    linear._buffers["absmax"] = packed * 2
    assert torch.equal(logits_of(fused), changed) and not torch.equal(before, changed)
    assert calls(fused) == ["", ""]


def test_a_fused_model_is_freed() -> None:
    _, fused = copy.deepcopy(pair())
    logits_of(fused)
    assert calls(fused) == ["", ""]
    layer, weight = (weakref.ref(one) for one in (fused.model.layers[0], fused.model.layers[0].mlp.up_proj.packed))
    del fused, _
    gc.collect()
    assert layer() is None and weight() is None


def test_code_that_is_patched_later_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In an object it is seen in each call, in a class when a summary is asked for."""
    unfused, fused = pair()
    for model in (unfused, fused):
        mlp = model.model.layers[0].mlp
        monkeypatch.setattr(mlp, "forward", lambda x: x * 2, raising=False)
    with torch.no_grad():
        assert distance(logits(fused, IDS), logits(unfused, IDS)) < 1e-5
    assert calls(fused) == ["the forward of a part was replaced", ""]


def test_a_scaling_that_the_operator_cannot_take() -> None:
    """None is the default of torch's attention."""
    unfused, fused = pair()
    for model in (unfused, fused):
        model.model.layers[0].self_attn.scaling = None
    with torch.no_grad():
        assert distance(logits(fused, IDS), logits(unfused, IDS)) < 1e-5
    assert calls(fused) == ["the operator does not take it: scaling must be a float, got None", ""]


def test_norms_of_another_dtype() -> None:
    models = pair()
    for model in models:
        model.bfloat16()
        for layer in model.model.layers:
            layer.input_layernorm.float()
    old_way(models, "norms are of another dtype than the input")


def test_modes() -> None:
    models = pair()
    with torch.autocast("cpu", torch.bfloat16):
        old_way(models, "under autocast")
    for model in models:
        model.model.layers[0].mlp.train()
    with torch.no_grad():
        assert distance(logits(models[1], IDS), logits(models[0], IDS)) < 1e-5
    assert calls(models[1]) == ["a part of it is in training", ""]


# ---- what is asked for in a call


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_attention_weights(family: str) -> None:
    models = pair(family, implementation="eager")

    def weights(model: Any) -> Tensor:
        found = model(IDS, output_attentions=True)
        assert len(found.attentions) == 2
        return torch.stack(found.attentions)

    with torch.no_grad():
        expected, found = (weights(model) for model in models)
    assert torch.equal(found, expected) and "" not in calls(models[1])
    alike(models, lambda model: logits(model, IDS))


def custom(*shape: int) -> Tensor:
    """A mask of floats in which each token sees some of the others, itself and the first."""
    torch.manual_seed(5)
    seen = torch.rand(shape) < 0.6
    seen |= torch.eye(9, dtype=torch.bool)
    seen[..., 0] = True
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("shape", [(2, 1, 9, 9), (1, 1, 9, 9), (2, 4, 9, 9)])
def test_masks_of_a_users_own(shape: tuple[int, ...]) -> None:
    """Also where they look ahead."""
    models = pair(implementation="eager")
    y = alike(models, lambda model: logits(model, IDS, attention_mask=custom(*shape)))
    assert distance(y, logits_of(models[1])) > 0.1
    seen = custom(*shape) == 0
    models = pair(implementation="sdpa")
    assert distance(alike(models, lambda model: logits(model, IDS, attention_mask=seen)), y) < 1e-5


def run_layer(model: Any, **options: Any) -> Tensor:
    layer = model.model.layers[0]
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    position = model.model.rotary_emb(x, torch.arange(9)[None])
    y = layer(x, position_embeddings=position, **options)
    return y[0] if isinstance(y, tuple) else y


def first_goes_the_old_way(models: tuple[Any, Any], reason: str, **options: Any) -> None:
    with torch.no_grad():
        assert torch.equal(*(run_layer(model, **options) for model in models))
    assert reason in str(calls(models[1])[0])


def test_masks_that_mean_something_else() -> None:
    eager, sdpa = pair(implementation="eager"), pair(implementation="sdpa")
    ones = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    first_goes_the_old_way(eager, "looks ahead")  # no mask: all is seen
    first_goes_the_old_way(eager, "a mask of bools", attention_mask=ones)
    first_goes_the_old_way(sdpa, "not as transformers makes it", attention_mask=torch.zeros(9, 9))
    if MAJOR >= 5:
        first_goes_the_old_way(sdpa, "the argument is_causal", is_causal=False)
        first_goes_the_old_way(sdpa, "the argument is_causal", is_causal=True)
    with torch.no_grad():
        run_layer(sdpa[1])
        assert calls(sdpa[1])[0] == ""
        run_layer(sdpa[1], sentence_embedding=torch.ones(3))  # read by nobody
        assert calls(sdpa[1])[0] == ""


def test_a_past_without_a_mask() -> None:
    """scaled_dot_product_attention aligns causality with the first key then."""

    def run(model: Any) -> Tensor:
        cache = transformers.DynamicCache()
        first = run_layer(model, past_key_values=cache)
        return torch.cat([first, run_layer(model, past_key_values=cache)], 1)

    models = pair()
    with torch.no_grad():
        expected, found = (run(model) for model in models)
    assert distance(found, expected) < 1e-5 and calls(models[1])[0] == "there is a past and no mask"


def test_another_implementation_of_attention() -> None:
    def own(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
        return query.transpose(1, 2) * 2, None

    transformers.AttentionInterface.register("own", own)
    models = pair()
    for model in models:
        model.config._attn_implementation = "own"
    first_goes_the_old_way(models, "another implementation of attention is asked for")


def test_no_tokens() -> None:
    """As transformers does it."""
    models = pair()
    x = torch.zeros(0, 9, 64)
    position = models[0].model.rotary_emb(x, torch.arange(9)[None])
    for model in models:
        with torch.no_grad(), pytest.raises(RuntimeError, match="0 elements"):
            model.model.layers[0](x, position_embeddings=position)
    assert calls(models[1])[0] == "there are no tokens"


def test_trace() -> None:
    _, fused = pair()
    x = torch.randn(2, 9, 64)
    position = fused.model.rotary_emb(x, torch.arange(9)[None])
    layer = fused.model.layers[0].requires_grad_(False)
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: layer(x, position_embeddings=position), x)
        assert "decoder_layer" not in str(traced.graph)
        assert distance(traced(x), layer(x, position_embeddings=position)) < 1e-5 and layer.last_call == ""


def test_vmap() -> None:
    _, fused = pair()
    x = torch.randn(3, 2, 9, 64)
    position = fused.model.rotary_emb(x[0], torch.arange(9)[None])
    layer = fused.model.layers[0].requires_grad_(False)
    with torch.no_grad():
        found = torch.vmap(lambda one: layer(one, position_embeddings=position))(x)
        assert "torch.func" in str(layer.last_call)
        expected = torch.stack([layer(one, position_embeddings=position) for one in x])
    assert layer.last_call == "" and distance(found, expected) < 1e-5
