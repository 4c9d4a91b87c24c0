"""nn.MultiheadAttention through replace_linear, summary, quantize_dynamic, calibrate and the analyses."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import pyqkern
from pyqkern import QLinear, QMultiheadAttention, quantize_dynamic, replace_linear, summary
from pyqkern.calibration.smooth import Pair

NAMES = ("q_proj", "k_proj", "v_proj", "out_proj")


class Model(nn.Module):
    """Two attentions, of which one is used twice, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.MultiheadAttention(32, 4, batch_first=True)
        self.second = nn.MultiheadAttention(32, 4, batch_first=True, bias=False)
        self.again = self.second
        self.fc = nn.Linear(32, 8)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.first(x, x, x)
        z, _ = self.second(y, x, x, need_weights=False)
        return self.fc(self.again(z, z, z)[0])


X = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))


def reasons(model: nn.Module) -> dict[str, str | None]:
    return {record.name: record.reason for record in summary(model).records}


def quantized(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QLinear)]


# ---- what is replaced


def test_its_projections_are_linears() -> None:
    model = Model()
    first, keys = model.first, list(model.state_dict())
    with torch.no_grad():
        expected = model(X)
    before = summary(model)
    assert [one.name for one in before.records] == [*(f"{a}.{n}" for a in ("first", "second") for n in NAMES), "fc"]
    assert before.records[4].aliases == ("again.q_proj",) and before.other_bytes == 0
    assert before.bytes_before == before.bytes_after == sum(p.numel() * 4 for p in model.parameters())
    assert {one.reason for one in before.records} == {"not replaced yet"} and list(model.state_dict()) == keys
    assert replace_linear(model) is model and model.first is first and isinstance(first, QMultiheadAttention)
    after = summary(model)
    assert all(one.scheme == "int8" for one in after.records) and after.bytes_before == before.bytes_before
    assert model.again is model.second and not list(first.parameters(recurse=False))
    with torch.no_grad():
        assert (model(X) - expected).norm() < 0.04 * expected.norm()
    assert replace_linear(model).first.q_proj is first.q_proj


def test_patterns_name_projections() -> None:
    model = replace_linear(Model(), exclude=["second.*", "first.out_proj"])
    assert quantized(model) == ["first.q_proj", "first.k_proj", "first.v_proj", "fc"]
    assert type(model.first.out_proj) is nn.Linear and type(model.second) is nn.MultiheadAttention
    assert {name for name, reason in reasons(model).items() if reason == "excluded"} == {
        "first.out_proj",
        *(f"second.{name}" for name in NAMES),
    }
    model = replace_linear(Model(), include=["*.q_proj"])
    assert quantized(model) == ["first.q_proj", "second.q_proj"] and reasons(model)["fc"] == "not included"
    # What stays in float has memory of its own, and is saved without the rest.
    assert model.first.k_proj.weight.untyped_storage().nbytes() == 32 * 32 * 4
    assert quantized(replace_linear(Model(), exclude=nn.MultiheadAttention)) == ["fc"]
    assert quantized(replace_linear(nn.MultiheadAttention(8, 2))) == [*NAMES]


class Mine(nn.MultiheadAttention):
    pass


class WithOtherWeights(nn.MultiheadAttention):
    """Keys and values of one head, as others have it: nothing of its own can be said of its weights."""

    def __init__(self) -> None:
        super().__init__(16, 2)
        self.in_proj_weight = nn.Parameter(torch.randn(32, 16))


class WithoutWeights(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(16, 2)
        del self.in_proj_weight, self.in_proj_bias
        self.query = nn.Linear(16, 16)


def test_subclasses_with_weights_of_their_own() -> None:
    model = nn.ModuleDict({"other": WithOtherWeights(), "none": WithoutWeights(), "fc": nn.Linear(16, 16)})
    replace_linear(model)
    assert quantized(model) == ["none.query", "fc"]
    assert "NonDynamicallyQuantizableLinear" in str(reasons(model)["other.out_proj"])
    pyqkern.calibrate(model["fc"], [torch.ones(1, 16)], progress=False)


def patched() -> nn.MultiheadAttention:
    attention = nn.MultiheadAttention(16, 2)
    attention.forward = lambda *_: None  # type: ignore[method-assign, assignment]
    return attention


def pruned() -> nn.MultiheadAttention:
    attention = nn.MultiheadAttention(16, 2)
    prune.l1_unstructured(attention, "in_proj_weight", 2)
    return attention


def with_another_output() -> nn.MultiheadAttention:
    attention = nn.MultiheadAttention(16, 2)
    attention.out_proj = type("Mine", (nn.Linear,), {})(16, 16)
    return attention


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (lambda: Mine(16, 2), "in a subclass of nn.MultiheadAttention: Mine, whose forward may be its own"),
        (patched, "patched: the forward of the attention was replaced"),
        (pruned, "parametrized: a weight of the attention is computed from other parameters"),
        (
            lambda: parametrizations.spectral_norm(nn.MultiheadAttention(16, 2), "in_proj_weight"),
            "parametrized: a weight of the attention is computed from other parameters",
        ),
        (with_another_output, "in an nn.MultiheadAttention whose out_proj is a Mine"),
    ],
)
def test_kept(attention: Any, reason: str) -> None:
    model = nn.ModuleDict({"kept": attention(), "other": nn.MultiheadAttention(16, 2)})
    kind, keys = type(model["kept"]), list(model["kept"].state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        replace_linear(model)
    found = reasons(model)
    assert {found[f"kept.{name}"] for name in NAMES[:3]} == {reason}
    assert all(found[f"other.{name}"] is None for name in NAMES)
    assert type(model["kept"]) is kind and list(model["kept"].state_dict()) == keys


def test_tied_to_an_embedding() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(48, 16), "attention": nn.MultiheadAttention(16, 2)})
    model["attention"].in_proj_weight = model["embedding"].weight
    with pytest.warns(UserWarning, match="tied to the embedding"):
        replace_linear(model)
    assert type(model["attention"]) is nn.MultiheadAttention
    assert reasons(model)["attention.k_proj"] == "tied to the embedding embedding.weight"
    assert summary(pyqkern.replace_embedding(model)).embeddings[0].reason == (
        "its weight is shared with attention.in_proj_weight"
    )


def test_below_an_adapter_of_peft_it_stays() -> None:
    import peft

    model = peft.get_peft_model(Model(), peft.LoraConfig(r=2, target_modules=["first"]))
    replace_linear(model)
    found = reasons(model)
    assert found["base_model.model.first.base_layer.q_proj"] == (
        "in an nn.MultiheadAttention that peft wraps, and into whose weights it writes"
    )
    assert found["base_model.model.fc"] is None and found["base_model.model.second.q_proj"] is None
    with torch.no_grad():
        assert model(X).isfinite().all()


def test_an_error_names_the_projection_and_changes_nothing() -> None:
    model = Model()
    model.second.in_proj_weight.data[40, 3] = torch.nan
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"second.k_proj: weight must be finite.*exclude=\['second.k_proj'\]"):
        replace_linear(model)
    assert quantized(model) == [] and list(model.state_dict()) == keys
    assert type(model.first) is nn.MultiheadAttention
    assert len(quantized(replace_linear(model, exclude=["second.k_proj"]))) == 8


def test_hooks_and_modes_carry_over() -> None:
    seen: list[str] = []
    model = Model().train()
    model.first.register_forward_hook(lambda *_: seen.append("attention"))
    replace_linear(model)
    model(X)
    assert seen == ["attention"] and model.first.training and model.first.q_proj.training


# ---- torch's layers around it


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[nn.Module]]:
    """The quantized linears in the order of their calls. Their weights are not dequantized."""
    found: list[nn.Module] = []
    linear = pyqkern.nn.int8.Int8Linear._linear
    monkeypatch.delattr(pyqkern.nn.int8.Int8Linear, "_dequantize")
    monkeypatch.setattr(pyqkern.nn.int8.Int8Linear, "_linear", lambda self, *a: found.append(self) or linear(self, *a))
    yield found


PADDING = torch.arange(6) >= torch.tensor([6, 4])[:, None]


@pytest.mark.parametrize("exclude", [(), "*.linear?", "*_proj"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padding", [None, PADDING])
def test_an_encoder_calls_its_linears(
    exclude: str, norm_first: bool, padding: Tensor | None, calls: list[nn.Module]
) -> None:
    """Neither its fused layers nor its nested tensors, which both read the weights, are used."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.TransformerEncoder(layer, 2).eval()
    with torch.no_grad():
        expected = model(X, src_key_padding_mask=padding)
        replace_linear(model, exclude=exclude)
        found = model(X, src_key_padding_mask=padding)
    names = [*(f"self_attn.{name}" for name in NAMES), "linear1", "linear2"]
    assert len(quantized(model)) == 2 * {(): 6, "*.linear?": 4, "*_proj": 2}[exclude]
    wanted = [f"layers.{i}.{name}" for i in (0, 1) for name in names]
    assert calls == [model.get_submodule(name) for name in wanted if name in quantized(model)]
    tokens = slice(None) if padding is None else ~padding
    assert 0 < (found[tokens] - expected[tokens]).norm() < 0.04 * expected[tokens].norm()


def test_an_encoder_layer_refuses_nested_tensors() -> None:
    layer = replace_linear(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval())
    with torch.no_grad(), pytest.raises(ValueError, match="got a nested one"):
        layer(torch.nested.nested_tensor([torch.randn(3, 32), torch.randn(5, 32)]))


def test_a_transformer_with_a_decoder(calls: list[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(32, 4, 1, 1, 64, batch_first=True).eval()
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    with torch.no_grad():
        expected = model(X, X, tgt_mask=mask, tgt_is_causal=True)
        replace_linear(model)
        found = model(X, X, tgt_mask=mask, tgt_is_causal=True)
    assert len(calls) == len(quantized(model)) == 4 + 2 + 8 + 2
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()


# ---- quantize_dynamic


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, ["fc"]),
        ({nn.Linear}, ["fc"]),
        ({nn.MultiheadAttention}, [f"{a}.{n}" for a in ("first", "second") for n in NAMES]),
        ({"first"}, [f"first.{n}" for n in NAMES]),
        ({"first.out_proj"}, ["first.out_proj"]),
        ({nn.MultiheadAttention: "int8", "second": None, "again": None}, [f"first.{n}" for n in NAMES]),
        (
            {"": "int8", "second": None, "again": None, "first.out_proj": None},
            [*(f"first.{n}" for n in NAMES[:3]), "fc"],
        ),
    ],
)
def test_quantize_dynamic(spec: Any, expected: list[str]) -> None:
    model = Model()
    found = quantize_dynamic(model, spec)
    assert sorted(quantized(found)) == sorted(expected) and quantized(model) == []
    with torch.no_grad():
        assert (found(X) - model(X)).norm() < 0.04 * model(X).norm()


def test_quantize_dynamic_of_an_attention_itself() -> None:
    assert quantized(quantize_dynamic(nn.MultiheadAttention(8, 2), {nn.MultiheadAttention: "int8"})) == [*NAMES]


# ---- calibration and analysis


def test_calibrate_sees_what_the_projections_are_called_with() -> None:
    model = Model()
    before, outputs = copy.deepcopy(model), {}
    handle = model.first.register_forward_hook(lambda _, __, y: outputs.update(first=y[0]))
    ranges = pyqkern.calibrate(model, [X], "minmax", progress=False)
    handle.remove()
    assert list(ranges) == [record.name for record in summary(model).records] and not ranges.not_reached
    assert float(ranges["first.q_proj"].hi) == float(ranges["second.v_proj"].hi) == float(X.max())
    assert float(ranges["second.q_proj"].lo) <= float(outputs["first"].min())
    assert type(model.first) is nn.MultiheadAttention and model.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    with torch.no_grad():
        expected = model(X)
        replace_linear(model, "int8-static", ranges=ranges)
        assert all(one.scheme == "int8-static" for one in summary(model).records)
        assert (model(X) - expected).norm() < 0.06 * expected.norm()


def test_a_model_stays_as_it_was_where_calibration_fails() -> None:
    model = Model()
    with pytest.raises(ValueError, match=r"NaN or an infinity at the input of first\.q_proj"):
        pyqkern.calibrate(model, [X * torch.inf], progress=False)
    assert type(model.first) is nn.MultiheadAttention and not model.first._forward_pre_hooks
    assert [name for name, _ in model.first.named_parameters()] == [
        "in_proj_weight",
        "in_proj_bias",
        "out_proj.weight",
        "out_proj.bias",
    ]


def test_smooth_takes_projections_and_changes_no_output() -> None:
    model, x = Model(), X * torch.ones(32).index_fill(0, torch.tensor(3), 30.0)
    ranges = pyqkern.calibrate(model, [x], "minmax", per_channel=True, progress=False)
    inputs = ("first.q_proj", "first.k_proj", "first.v_proj")
    with torch.no_grad():
        expected = model(x)
        pyqkern.smooth(model, ranges, pairs=[Pair("", inputs, shared=True), Pair("first.v_proj", ("first.out_proj",))])
        assert type(model.second) is nn.MultiheadAttention and type(model.first.q_proj) is nn.Linear
        assert (model.first.k_proj.weight / Model().first.in_proj_weight[32:64])[:, 3].min() >= 4
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        assert (replace_linear(model)(x) - expected).norm() < 0.04 * expected.norm()
    with pytest.raises(ValueError, match=r"got no module of the name 'first\.nothing'"):
        pyqkern.smooth(Model(), ranges, pairs=[Pair("", ("first.nothing",), shared=True)])


def test_analyses() -> None:
    model = Model()
    other = replace_linear(copy.deepcopy(model), exclude="first.*")
    errors = pyqkern.analysis.error_propagation(model, other, [X], progress=False)
    assert {f"second.{name}" for name in NAMES} < {record.name for record in errors}
    assert all(record.mse < 1e-12 for record in errors if record.name.startswith("first"))
    found = pyqkern.analysis.sensitivity(
        model, lambda m: -(m(X) - model(X)).square().mean().item(), "int8", progress=False
    )
    assert {record.name for record in found} == {record.name for record in summary(model).records}
    assert all(record.drop > 0 for record in found)
    report = pyqkern.analysis.range_report(model, [X], progress=False)
    assert "first.k_proj" in {record.name for record in report} and type(model.first) is nn.MultiheadAttention
