"""prepare and convert on whole models: what gets a twin, what stays and why, hooks, tied weights, errors."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import pyqkern
from pyqkern.schemes import Int8Static
from pyqkern.training import QATEmbedding, QATLinear, convert, prepare


def mlp() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 16))


def reasons(model: nn.Module) -> dict[str, str | None]:
    found = pyqkern.summary(model)
    return {one.name: one.reason for one in [*found.records, *found.embeddings, *found.recurrent, *found.experts]}


def undropped(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


X = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
PREPARED = "prepared for int8: pyqkern.training.convert quantizes it"


# ---- what is prepared


def test_a_bert_with_its_embeddings() -> None:
    model = undropped(tiny.bert("BertForSequenceClassification"))
    expected = pyqkern.replace_embedding(pyqkern.replace_linear(copy.deepcopy(model)))
    parameters = dict(model.named_parameters())
    assert prepare(model) is model
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert set(reasons(model).values()) == {PREPARED}
    logits = model(tiny.IDS, labels=torch.tensor([0, 1]))
    logits.loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters())
    convert(model)
    assert torch.equal(model(tiny.IDS).logits, logits.logits)
    one, other = model.state_dict(), expected.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_gpt2_whose_head_is_tied_to_its_embedding() -> None:
    """Its linears are Conv1D."""
    model = undropped(tiny.gpt2())
    prepare(model)
    assert isinstance(model.lm_head, QATLinear) and isinstance(model.transformer.wte, QATEmbedding)
    assert model.lm_head.weight is model.transformer.wte.weight
    out = model(tiny.IDS, labels=tiny.IDS)
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    convert(model)
    assert model.lm_head is model.transformer.wte.table
    assert torch.equal(model(tiny.IDS).logits, out.logits)
    expected = pyqkern.replace_linear(pyqkern.replace_embedding(tiny.gpt2()))
    assert torch.equal(expected(tiny.IDS).logits, out.logits)


@pytest.mark.parametrize("kept", ["lm_head", "transformer.wte"])
def test_what_is_tied_stays_where_its_partner_stays(kept: str) -> None:
    model = prepare(tiny.gpt2(), exclude=kept)
    found = reasons(model)
    assert found["transformer.wpe"] == PREPARED
    assert "tied to the embedding" in str(found["lm_head"])
    assert found["transformer.wte"] in ("excluded", "its weight is shared with lm_head, which is kept")
    converted: Any = convert(model)
    assert type(converted.lm_head) is nn.Linear and type(converted.transformer.wte) is nn.Embedding


def test_the_projections_of_an_attention() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2)
    expected = pyqkern.replace_linear(copy.deepcopy(model)).eval()
    prepare(model)
    x = torch.randn(2, 5, 64)
    y = model.train()(x)
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model.eval()(x), y)  # no fast path
        assert torch.equal(convert(model)(x), expected(x))


@pytest.mark.parametrize("scheme", ["int8-static", "int8-weight-only"])
def test_kinds_that_a_scheme_does_not_have_stay(scheme: str) -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(20, 64), "lstm": nn.LSTM(64, 32), "linear": nn.Linear(64, 64)})
    ranges = pyqkern.calibrate(model["linear"], [X], progress=False) if scheme == "int8-static" else None
    given = None if ranges is None else {"linear": ranges[""]}
    prepare(model, scheme, ranges=given)
    found = reasons(model)
    assert found["lstm"] == f"{scheme} is no scheme of recurrent layers"
    if scheme == "int8-static":
        assert found["embedding"] == "int8-static is no scheme of embeddings"
    assert found["linear"] == PREPARED.replace("int8", scheme, 1)


def test_what_replace_linear_keeps_is_kept_for_the_same_reasons() -> None:
    class Mine(nn.Linear):
        pass

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.ModuleDict({
            "plain": nn.Linear(256, 256), "mine": Mine(64, 64), "patched": nn.Linear(64, 64),
            "parametrized": nn.Linear(64, 64), "excluded": nn.Linear(64, 64),
            "max_norm": nn.Embedding(9, 64, max_norm=1.0),
        })  # fmt: skip
        model["patched"].forward = model["plain"].forward  # type: ignore[method-assign]
        parametrize.register_parametrization(model["parametrized"], "weight", nn.Identity())
        return model

    prepared, replaced = prepare(build(), exclude="excluded"), pyqkern.replace_linear(build(), exclude="excluded")
    pyqkern.replace_embedding(replaced)
    found, expected = reasons(prepared), reasons(replaced)
    assert found.pop("plain") == PREPARED and expected.pop("plain") is None
    assert found == expected and len(found) == 5
    vouched = prepare(build(), include=[nn.Linear, Mine])
    assert reasons(vouched)["mine"] == PREPARED
    assert isinstance(convert(vouched)["mine"], pyqkern.QLinear)  # type: ignore[index]


def test_experts_stay() -> None:
    with pytest.warns(UserWarning, match="2 experts have no trainable twins"):
        found = reasons(prepare(tiny.moe()))
    assert found["model.layers.0.mlp.experts"] == "experts have no trainable twins"


def test_two_schemes_for_two_parts() -> None:
    model = prepare(prepare(mlp(), "int8", include="0"), "nf4", include="2")
    y = model(X)
    converted: Any = convert(model)
    assert [converted[0].scheme.name, converted[2].scheme.name] == ["int8", "nf4"]
    assert torch.equal(converted(X), y)


def test_replace_linear_leaves_twins_alone() -> None:
    model = prepare(mlp(), include="0")
    pyqkern.replace_linear(model)
    assert isinstance(model[0], QATLinear) and isinstance(model[2], pyqkern.QLinear)  # type: ignore[index]
    assert reasons(model) == {"0": PREPARED, "2": None}
    assert isinstance(convert(model)[0], pyqkern.QLinear)  # type: ignore[index]


def test_a_bare_layer() -> None:
    linear = nn.Linear(64, 16)
    twin = prepare(linear)
    assert isinstance(twin, QATLinear) and isinstance(convert(twin), pyqkern.QLinear)
    assert isinstance(prepare(nn.Embedding(9, 64)), QATEmbedding)


# ---- what carries over


def test_hooks_modes_attributes_and_frozen_parameters() -> None:
    model, seen = mlp(), []
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    handle = model[2].register_forward_pre_hook(lambda *_: seen.append("gone"))
    model[0].bias.requires_grad_(False)
    model[0].note = "mine"
    model.eval()
    prepare(model)
    handle.remove()
    model(X)
    assert seen == ["forward"] and not model[0].training and model[0].note == "mine"
    assert not model[0].bias.requires_grad and model[0].weight.requires_grad
    convert(model)(X)
    assert seen == ["forward"] * 2 and not model[0].training


def test_the_state_dict_is_that_of_the_float_model() -> None:
    model, trained = mlp(), prepare(mlp())
    assert trained.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        trained[0].weight.mul_(0.5)
    model.load_state_dict(trained.state_dict())
    assert torch.equal(model[0].weight, trained[0].weight)


def test_learned_ranges_are_saved_and_loaded() -> None:
    def build() -> Any:
        model = mlp()
        return prepare(model, "int8-static", ranges=pyqkern.calibrate(model, [X], progress=False), learn_ranges=True)

    model, other = build(), build()
    with torch.no_grad():
        model[0].input_scale.mul_(0.7)
        model[2].input_offset.sub_(0.3)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(X), model(X))
    first, second = convert(model), convert(other)
    assert torch.equal(first(X), second(X)) and torch.equal(first[0].input_scale, second[0].input_scale)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("scheme", ["int8", "nf4", "int4"])
def test_copies(how: Callable[[nn.Module], nn.Module], scheme: str) -> None:
    model = prepare(nn.ModuleList([mlp(), nn.Embedding(9, 64), nn.GRU(64, 64)]), scheme)
    copied: Any = how(model)
    y = copied[0](X)
    y.sum().backward()
    assert torch.equal(y, model[0](X)) and model[0][0].weight.grad is None  # type: ignore[index]
    converted = convert(copied)
    assert torch.equal(converted[0](X), y) and isinstance(model[0][0], QATLinear)  # type: ignore[index]
    assert isinstance(converted[2], pyqkern.QGRU)  # type: ignore[index]


def test_gradient_checkpointing() -> None:
    models = [prepare(undropped(tiny.bert("BertForSequenceClassification"))) for _ in range(2)]
    models[1].gradient_checkpointing_enable()
    for model in models:
        model(tiny.IDS, labels=torch.tensor([0, 1])).loss.backward()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("scheme", ["int8", "int8-static", "nf4", "int4"])
def test_compile(scheme: str) -> None:
    torch._dynamo.reset()
    ranges = pyqkern.calibrate(mlp(), [X], progress=False) if scheme == "int8-static" else None
    model = prepare(mlp(), scheme, ranges=ranges, learn_ranges=ranges is not None)
    y = model(X)
    y.square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    z = compiled(X)
    z.square().sum().backward()
    assert torch.equal(y, z)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-5, atol=1e-5 * float(expected[name].abs().max())
        )


def test_functional_call() -> None:
    model = prepare(mlp())
    weights = {name: value.detach() * 0.5 for name, value in model.named_parameters()}
    y = torch.func.functional_call(model, weights, (X,))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    assert torch.equal(y, model(X))


# ---- errors, which change nothing


def state_of(model: nn.Module) -> tuple[Any, ...]:
    return [type(module) for module in model.modules()], {name: t.clone() for name, t in model.state_dict().items()}


def unchanged(
    model: nn.Module, before: tuple[Any, ...], error: type[Exception], message: str, call: Callable[[], Any]
) -> None:
    with pytest.raises(error, match=message):
        call()
    after = state_of(model)
    assert after[0] == before[0] and after[1].keys() == before[1].keys()
    assert all(torch.equal(after[1][name], value) or value.isnan().any() for name, value in before[1].items())


@pytest.mark.parametrize("arguments, message", [
    ({"scheme": "int8-outlier"}, "scheme of quantization-aware training must be one of 'int8', .* got 'int8-outlier'"),
    ({"scheme": "float16"}, "got 'float16'"), ({"scheme": "int8-static"}, "int8-static needs the activations' ranges"),
    ({"learn_ranges": True}, "learn_ranges must be False for int8, got True"),
    ({"include": "nope"}, "include must match the name of a layer, got 'nope'; the layers are 0, 2"),
    ({"scheme": "int4", "include": "0"}, "0: .*must be finite"), ({}, "0: weight must be finite"),
])  # fmt: skip
def test_what_prepare_refuses(arguments: dict[str, Any], message: str) -> None:
    model = mlp()
    if "finite" in message:
        model[0].weight.data[3, 5] = float("nan")
    unchanged(model, state_of(model), ValueError, message, lambda: prepare(model, **arguments))


def test_int4_groups_that_do_not_fit_and_a_model_without_gelu() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 40), nn.Linear(40, 64))
    unchanged(
        model, state_of(model), ValueError, "2: group_size must divide in_features=40", lambda: prepare(model, "int4")
    )
    unchanged(
        model, state_of(model), ValueError, "relu must be False for a model without", lambda: prepare(model, relu=True)
    )


def test_a_model_is_prepared_once() -> None:
    model = prepare(mlp())
    message = "model must not be prepared twice, but 0 is prepared for int8"
    unchanged(model, state_of(model), ValueError, message, lambda: prepare(model, "nf4"))


def test_convert_wants_a_prepared_model() -> None:
    for model in (mlp(), pyqkern.replace_linear(mlp())):
        unchanged(model, state_of(model), ValueError, "model must be prepared", lambda model=model: convert(model))


@pytest.mark.parametrize("scheme", ["int8", "nf4", "int4", "int8-weight-only"])
def test_a_training_that_diverged(scheme: str) -> None:
    model = prepare(mlp(), scheme)
    with torch.no_grad():
        model[2].weight[3, 5] = float("nan")
    unchanged(model, state_of(model), ValueError, "2: weight must be finite", lambda: convert(model))
    with pytest.raises(ValueError, match="must be finite, got NaN or an infinity"):
        model(X)


def test_a_range_that_diverged() -> None:
    model = prepare(mlp(), "int8-static", ranges=pyqkern.calibrate(mlp(), [X], progress=False), learn_ranges=True)
    with torch.no_grad():
        model[2].input_scale.fill_(float("nan"))
    assert model(X).isnan().all()
    unchanged(model, state_of(model), ValueError, "2: input_scale must be finite, got nan", lambda: convert(model))


def test_nan_in_the_input_or_the_gradient_stays_in_its_row() -> None:
    model = prepare(nn.Linear(64, 16))
    x = X.clone()
    x[3, 7] = float("nan")
    y = model(x)
    assert y[3].isnan().all() and y[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()
    x = X.clone().requires_grad_()
    grad = torch.ones(8, 16)
    grad[3, 2] = float("nan")
    model(x).backward(grad)
    given: Any = x.grad
    assert given[3].isnan().all() and given[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()


def test_what_a_twin_is_called_with() -> None:
    model: Any = prepare(nn.Linear(64, 16))
    with pytest.raises(ValueError, match=r"input must be \[..., in_features=64\], got shape \(2, 3\)"):
        model(torch.ones(2, 3))
    with pytest.raises(TypeError, match="input must be a tensor"):
        model("x")
    with pytest.raises(TypeError, match="input must be float32"):
        model(torch.ones(2, 64).double())
    assert model(torch.ones(0, 64)).shape == (0, 16) and model(x=X).shape == (8, 16)


def test_the_static_scheme_needs_every_layer_reached() -> None:
    model = mlp()
    ranges = {"0": pyqkern.calibrate(model, [X], progress=False)["0"]}
    prepare(model, Int8Static(), ranges=ranges)
    assert reasons(model)["2"] == "not reached in calibration"
    assert isinstance(convert(model)[0], pyqkern.QLinear)  # type: ignore[index]


def test_tensors_of_other_kinds() -> None:
    twin: Any = prepare(nn.Linear(64, 16))
    strided: Tensor = torch.randn(64, 8).t()
    assert torch.equal(twin(strided), twin(strided.contiguous()))
