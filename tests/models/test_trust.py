"""optimize fuses only what it knows to be the stock computation; a call goes through the operator or says why not."""

import copy
import importlib
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tiny import BERT, IDS, bert
from torch import Tensor, nn

import pyqkern.nn.fused
from pyqkern import calibrate, optimize, replace_linear, smooth, summary

MODELING: Any = importlib.import_module("transformers.models.bert.modeling_bert")
DISTIL = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 100}


def states(model: nn.Module, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, **options).last_hidden_state


def calls(model: nn.Module) -> list[str | None]:
    return [record.last_call for record in summary(model).encoders]


def reasons(model: nn.Module) -> list[str | None]:
    return [record.reason for record in summary(model).encoders]


def albert() -> nn.Module:
    torch.manual_seed(0)
    return transformers.AlbertModel(transformers.AlbertConfig(**BERT, embedding_size=32)).eval()


def distilbert() -> nn.Module:
    torch.manual_seed(0)
    return transformers.DistilBertModel(transformers.DistilBertConfig(**DISTIL)).eval()


def mpnet() -> nn.Module:
    torch.manual_seed(0)
    return transformers.MPNetModel(transformers.MPNetConfig(**BERT)).eval()


def last_layer(model: nn.Module) -> Any:
    return model.get_submodule([record.name for record in summary(model).encoders][-1])


# ---- code of the user's own


class Plus(MODELING.BertOutput):
    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return super().forward(hidden_states, input_tensor) + 1


class Backwards(MODELING.BertSelfAttention):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states.flip(1), *args, **kwargs)


class Named(MODELING.BertLayer):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = super().forward(*args, **kwargs)
        return (y[0] * 2, *y[1:]) if isinstance(y, tuple) else y * 2


Named.__name__ = Named.__qualname__ = "BertLayer"  # as a user's own class is called


class Bottleneck(nn.Module):
    """An adapter, as libraries put them into `output`."""

    def __init__(self, output: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.output, self.down, self.up = output, nn.Linear(64, 8), nn.Linear(8, 64)
        self.dense, self.LayerNorm, self.dropout = output.dense, output.LayerNorm, output.dropout

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        y = self.output(hidden_states, input_tensor)
        return y + self.up(torch.relu(self.down(y)))


def patched_forward(layer: Any) -> None:
    forward = layer.attention.self.forward
    layer.attention.self.forward = lambda *args, **kwargs: tuple(
        part * 2 if isinstance(part, Tensor) else part for part in forward(*args, **kwargs)
    )


CHANGES: dict[str, Callable[[Any], None]] = {
    "a subclass of a part": lambda layer: setattr(layer.output, "__class__", Plus),
    "a subclass of the attention": lambda layer: setattr(layer.attention.self, "__class__", Backwards),
    "a subclass of the layer": lambda layer: setattr(layer, "__class__", Named),
    "a patched forward inside": patched_forward,
    "an adapter in a part's place": lambda layer: setattr(layer, "output", Bottleneck(layer.output)),
    "a norm of another class": lambda layer: setattr(
        layer.output, "LayerNorm", type("Norm", (nn.LayerNorm,), {"forward": lambda self, x: x})(64)
    ),
    "another activation of a known name": lambda layer: setattr(
        layer.intermediate, "intermediate_act_fn", type("GELUActivation", (nn.Module,), {"forward": lambda s, x: x})()
    ),
    "a dropout of another class": lambda layer: setattr(
        layer.output, "dropout", type("Noise", (nn.Dropout,), {"forward": lambda self, x: x + 1})()
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_code_is_not_passed_by(change: str) -> None:
    """Changed before or after optimize, the layer gives what replace_linear alone gives, and summary says why."""
    before, after, plain = (bert() for _ in range(3))
    for model in (before, plain):
        CHANGES[change](model.encoder.layer[0])
    replace_linear(plain)
    optimize(before)
    optimize(after)
    states(after)
    if change != "a subclass of the layer":  # which would undo the fusing itself
        CHANGES[change](after.encoder.layer[0])
        replace_linear(after)
        assert torch.equal(first_layer(after), first_layer(plain))
        assert reasons(after)[0] is not None and reasons(after)[1] is None
        assert calls(after)[0]
    assert torch.equal(first_layer(before), first_layer(plain))
    assert reasons(before)[0] is not None and reasons(before)[1] is None
    assert "not fused" in str(summary(before))


def first_layer(model: nn.Module) -> Tensor:
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    with torch.no_grad():
        y = model.encoder.layer[0](x)
    return y[0] if isinstance(y, tuple) else y


def test_a_class_whose_code_was_replaced_is_not_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    optimized = optimize(bert())
    states(optimized)
    assert calls(optimized) == ["", ""]
    monkeypatch.setattr(MODELING.BertOutput, "forward", Plus.forward)
    late = optimize(bert())
    assert all("the code of BertOutput was replaced" in str(reason) for reason in (*reasons(late), *reasons(optimized)))


def test_a_class_of_a_known_name_is_not_taken_for_it() -> None:
    layer = Named(transformers.BertConfig(**BERT, attn_implementation="eager")).eval()
    optimized = optimize(nn.Sequential(layer))
    assert type(layer) is Named and "not a class of transformers that is known" in str(reasons(optimized)[0])


def test_decoders_are_not_fused() -> None:
    model = optimize(bert(is_decoder=True, add_cross_attention=True))
    assert reasons(model) == ["a decoder layer"] * 2


# ---- who listens


def parts_of(layer: nn.Module) -> list[str]:
    return [name for name, _ in layer.named_modules() if name]


PARTS = parts_of(bert().encoder.layer[0])


@pytest.mark.parametrize("kind", ["forward", "forward_kwargs", "pre", "pre_kwargs", "backward", "backward_pre"])
@pytest.mark.parametrize("part", PARTS)
def test_a_hook_on_any_part_takes_the_old_way(part: str, kind: str) -> None:
    model = OPTIMIZED
    module = model.encoder.layer[0].get_submodule(part)
    seen: list[Any] = []

    def hook(*arguments: Any) -> None:
        seen.append(arguments)

    handle = {
        "forward": lambda: module.register_forward_hook(hook),
        "forward_kwargs": lambda: module.register_forward_hook(hook, with_kwargs=True),
        "pre": lambda: module.register_forward_pre_hook(hook),
        "pre_kwargs": lambda: module.register_forward_pre_hook(hook, with_kwargs=True),
        "backward": lambda: module.register_full_backward_hook(hook),
        "backward_pre": lambda: module.register_full_backward_pre_hook(hook),
    }[kind]()
    states(model)
    handle.remove()
    assert calls(model) == ["a hook listens to a part of it", ""]
    is_called = part != "attention.self.dropout"  # of which sdpa reads the probability alone
    assert bool(seen) == (is_called and not kind.startswith("backward"))
    states(model)
    assert calls(model) == ["", ""]


OPTIMIZED = optimize(bert())


def test_global_hooks_take_the_old_way() -> None:
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    states(OPTIMIZED)
    handle.remove()
    assert seen.count("BertSelfOutput") == 2 and calls(OPTIMIZED) == ["a hook listens to a part of it"] * 2


@pytest.mark.parametrize("make", [bert, albert, distilbert, mpnet])
def test_steering_has_its_effect_in_every_family(make: Callable[[], nn.Module]) -> None:
    optimized, plain = optimize(make()), replace_linear(make())
    for model in (optimized, plain):
        attention = (
            last_layer(optimized).attention
            if model is optimized
            else model.get_submodule([record.name for record in summary(optimized).encoders][-1]).attention
        )
        attention.register_forward_hook(lambda _, __, out: (out[0] + 1, *out[1:]))
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    name = [record.name for record in summary(optimized).encoders][-1]
    with torch.no_grad():
        new, old = (
            model.get_submodule(name)(x, torch.zeros(1, 1, 1, 5) if make is not distilbert else None)
            for model in (optimized, plain)
        )
    new, old = (y[0] if isinstance(y, tuple) else y for y in (new, old))
    assert torch.equal(new, old)


def test_what_transformers_leaves_behind_is_no_listener() -> None:
    """Its hooks stay on the attentions once something was captured; they count only while that is asked for."""
    model = optimize(bert(attn_implementation="eager"))
    expected = states(model)
    with torch.no_grad():
        attentions = model(IDS, output_attentions=True).attentions
    assert len(attentions) == 2 and all(calls(model))
    assert torch.equal(states(model), expected) and calls(model) == ["", ""]
    with torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states
    assert calls(model) == ["", ""] and torch.equal(hidden[-1], expected)


# ---- modes and dtypes


@pytest.mark.parametrize("part", ["attention.self.dropout", "output.dropout", "attention.output", "intermediate"])
def test_a_part_in_training_takes_the_old_way(part: str) -> None:
    model, plain = optimize(bert(hidden_dropout_prob=0.5)), replace_linear(bert(hidden_dropout_prob=0.5))
    for one in (model, plain):
        one.encoder.layer[1].get_submodule(part).train()
    outputs = []
    for one in (model, plain):
        torch.manual_seed(0)
        states(one)
        x = torch.randn(1, 5, 64)
        with torch.no_grad():
            y = one.encoder.layer[1](x)
        outputs.append(y[0] if isinstance(y, tuple) else y)
    assert torch.equal(*outputs) and calls(model)[1] == "a part of it is in training"


def test_layer_norms_of_two_dtypes_take_the_old_way() -> None:
    model, plain = optimize(bert()).bfloat16(), replace_linear(bert()).bfloat16()
    for one in (model, plain):
        one.encoder.layer[0].output.LayerNorm.float()
    assert torch.equal(first_layer(model), first_layer(plain))
    assert calls(model)[0] == "its LayerNorms do not have one dtype of fp32, bf16 and fp16"


def test_gradients_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyqkern.nn.fused, "_said_gradient", False)
    model = optimize(bert())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model(IDS)
        model(IDS)
    assert len([one for one in said if "torch.inference_mode()" in str(one.message)]) == 1
    assert all("torch.inference_mode()" in str(call) for call in calls(model))
    assert "its old way: a gradient is asked for" in str(summary(model))
    with torch.inference_mode():
        model(IDS)
    assert calls(model) == ["", ""] and "2 of them went through the operator" in str(summary(model))
    model.requires_grad_(False)(IDS)
    assert calls(model) == ["", ""]


# ---- arguments


@pytest.mark.parametrize("make", [bert, albert, distilbert, mpnet])
def test_arguments_that_are_not_read_change_nothing(make: Callable[[], nn.Module]) -> None:
    """As sentence-transformers leaves them in the dict of features: they reach the layers as keywords."""
    model = optimize(make())
    layer = last_layer(model)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = layer(x)
        try:
            found = layer(x, sentence_embedding=torch.ones(3), text=["a", "b"])
        except TypeError:  # transformers 4, whose layers do not take them
            assert int(transformers.__version__.split(".")[0]) < 5
            return
    assert layer.last_call == ""
    expected, found = (y[0] if isinstance(y, tuple) else y for y in (expected, found))
    assert torch.equal(found, expected)


def test_arguments_that_are_read_take_the_old_way() -> None:
    model, plain = optimize(bert()), replace_linear(bert())
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    names = ["is_causal"] if int(transformers.__version__.split(".")[0]) >= 5 else []
    for name in names:
        with torch.no_grad():
            assert torch.equal(model.encoder.layer[0](x, **{name: True}), plain.encoder.layer[0](x, **{name: True}))
        assert calls(model)[0] == f"the argument {name}"


def test_the_input_by_keyword() -> None:
    model = optimize(distilbert())
    layer, x = last_layer(model), torch.randn(1, 4, 64)
    name = layer._family.arguments[0]
    with torch.no_grad():
        by_place, by_name = layer(x), layer(**{name: x})
    assert layer.last_call == ""
    by_place, by_name = (y[0] if isinstance(y, tuple) else y for y in (by_place, by_name))
    assert torch.equal(by_place, by_name)


# ---- smooth, trace, copies


def smoothed(make: Callable[[], nn.Module], **options: Any) -> nn.Module:
    model = make()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight[::7] *= 8
    smooth(model, calibrate(model, [IDS], "minmax", per_channel=True, progress=False), **options)
    return model


@pytest.mark.parametrize("make", [bert, albert, distilbert, mpnet])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_smoothed_model_goes_through_the_operator(make: Callable[[], nn.Module], shared: bool, scheme: str) -> None:
    fp32 = smoothed(make, shared=shared)
    optimized = optimize(copy.deepcopy(fp32), scheme)
    quantized, expected = states(replace_linear(copy.deepcopy(fp32), scheme)), states(fp32)
    found = states(optimized)
    assert all(call == "" for call in calls(optimized)) and not any(reasons(optimized))
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < 1.5 * (quantized - expected).norm() / expected.norm() + 1e-3
    again = pickle.loads(pickle.dumps(optimized))
    assert torch.equal(states(again), found) and calls(again) == calls(optimized)


def test_the_factors_of_smooth_are_those_of_the_hooks() -> None:
    """Without its hooks the model is wrong, so it is not right by chance; taken off, the parts are looked for anew."""
    model = optimize(smoothed(bert))
    expected = states(model)
    for module in model.modules():
        module._forward_pre_hooks.clear()
    assert (states(model) - expected).norm() > 0.1 * expected.norm() and calls(model) == ["", ""]


def test_a_hook_beside_that_of_smooth_is_called() -> None:
    model, seen = optimize(smoothed(bert)), []
    states(model)
    model.encoder.layer[0].attention.self.query.register_forward_pre_hook(lambda *_: seen.append(1))
    states(model)
    assert seen == [1] and calls(model) == ["a hook listens to a part of it", ""]


@pytest.mark.parametrize("make", [bert, distilbert])
def test_a_smoothed_model_compiles(make: Callable[[], nn.Module]) -> None:
    torch._dynamo.reset()
    model = optimize(smoothed(make))
    layer, x = last_layer(model), torch.randn(2, 7, 64)
    with torch.no_grad():
        new, old = torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)
    new, old = (y[0] if isinstance(y, tuple) else y for y in (new, old))
    assert torch.equal(new, old)


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("bias", [True, False])
def test_trace(scheme: str, bias: bool) -> None:
    model = bert()
    if not bias:
        model.encoder.layer[0].output.dense.bias = None
    model = optimize(model, scheme).requires_grad_(False)
    model.config.return_dict = False
    with torch.no_grad():
        traced = torch.jit.trace(model, IDS)
        assert "pyqkern::encoder_layer" in str(traced.inlined_graph)
        assert torch.equal(traced(IDS)[0], model(IDS)[0])
