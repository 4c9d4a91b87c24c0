"""replace_linear on mixture-of-experts models: what becomes a QExperts, what is kept and why, and the summary."""

import ast
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import IDS, MOE_FAMILIES, MOE_SCHEMES, moe, output
from torch import nn

from pyqkern import NF4, QExperts, QLinear, calibrate, quantize_dynamic, replace_linear, summary

pytestmark = pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="experts are linears before 5")


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_families(family: str) -> None:
    model = moe(family)
    expected = output(model)
    before = summary(model).bytes_after
    replace_linear(model)
    assert (output(model) - expected).norm() <= 0.05 * expected.norm()
    found = summary(model)
    names = [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert [(one.name, one.scheme, one.reason) for one in found.experts] == [(name, "int8", None) for name in names]
    assert found.experts[0].shape in ((6, 64, 64), (6, 64, 128))
    assert found.bytes_before == before and found.experts[0].bytes_before > 3 * found.experts[0].bytes_after
    assert found.bytes_after == model.get_memory_footprint()
    assert not any("experts" in record.name for record in found.records)
    assert "2 of 2 layers' experts quantized" in str(found) and len(found.to_dict()["experts"]) == 2
    assert type(model.model.layers[0].mlp.gate).__name__.endswith("Router")  # float, and no linear


@pytest.mark.parametrize("scheme", MOE_SCHEMES, ids=repr)
def test_sentences_have_the_same_bits_alone(scheme: Any) -> None:
    """The experts; float attention is torch's, so that the experts alone are looked at."""
    model = replace_linear(moe("qwen3_moe"), scheme)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    calls: list[tuple[Any, Any]] = []
    experts.register_forward_hook(lambda module, given, result: calls.append((given, result)))
    output(model)
    (given, result), *_ = calls
    for row in range(len(result)):
        assert torch.equal(experts(*(one[row : row + 1] for one in given))[0], result[row])


def test_patterns_hold_for_experts() -> None:
    model = replace_linear(moe(), exclude="*.0.mlp.experts")
    assert [record.reason for record in summary(model).experts] == ["excluded", None]
    replace_linear(model, "nf4", include="*.experts")
    assert [record.scheme for record in summary(model).experts] == ["nf4", "int8"]
    model = replace_linear(moe(), include=lambda name, module: name.endswith("o_proj"))
    assert {record.reason for record in summary(model).experts} == {"not included"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = replace_linear(moe(), include=nn.Linear)
    assert {record.reason for record in summary(model).experts} == {"not included"}
    with pytest.raises(ValueError, match="the linears are experts"):
        replace_linear(moe().model.layers[0].mlp, include="nothing")
    with pytest.raises(ValueError, match="must match the name of a linear"):
        replace_linear(replace_linear(moe()), include="*.gate_up_proj")


def test_what_the_scheme_does_not_take_is_kept() -> None:
    model = moe()
    ranges = calibrate(model, [IDS], progress=False)  # which does not look at experts
    assert not any("experts" in name for name in (*ranges, *ranges.not_reached))
    with pytest.warns(UserWarning, match="not to 'int8-static'"):
        replace_linear(model, "int8-static", ranges=ranges)
    assert "not to 'int8-static'" in (summary(model).experts[0].reason or "")
    assert summary(model).experts[0].bytes_before == summary(model).experts[0].bytes_after
    with pytest.warns(UserWarning, match="out_features of an expert must be a multiple of 64, got 96"):
        model = replace_linear(moe(hidden_size=96), NF4(blocksize=32))
    assert summary(model).experts[0].scheme is None
    replace_linear(model, "int8")
    assert summary(model).experts[0].scheme == "int8"


def test_calibrating_a_quantized_model_misses_nothing() -> None:
    model = replace_linear(moe(), include="*.experts")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(model, [IDS], progress=False)


def test_a_linear_that_chooses_experts_is_kept() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = moe().model.layers[0].mlp.experts
            self.router = nn.Linear(64, 6)
            self.projection = nn.Linear(64, 64)
            self.wrapped = nn.Sequential(nn.Linear(64, 6))
            self.shared = nn.Sequential(nn.Linear(64, 6), nn.Linear(6, 64))

    model = nn.ModuleDict({"block": Block(), "classifier": nn.Linear(64, 6)})
    replace_linear(model)
    kept = {record.name: record.reason for record in summary(model).records if record.reason}
    assert set(kept) == {"block.router", "block.wrapped.0"}
    assert all("router" in (reason or "") for reason in kept.values())
    assert isinstance(replace_linear(model)["block"].experts, QExperts)  # type: ignore[index]
    assert type(model["block"].router) is nn.Linear


def test_bare_experts_and_hooks() -> None:
    module = moe().model.layers[0].mlp.experts.train()
    called: list[str] = []
    module.register_forward_hook(lambda *_: called.append("hook"))
    experts = replace_linear(module)
    assert isinstance(experts, QExperts) and experts.training
    experts(torch.randn(3, 64), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2))
    assert called == ["hook"]


def test_a_shared_weight_and_a_subclass_are_kept() -> None:
    model = moe()
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.down_proj = first.down_proj
    with pytest.warns(UserWarning, match="a weight is shared"):
        replace_linear(model)
    assert {record.reason for record in summary(model).experts} == {"a weight is shared with another module"}
    model = moe()
    model.model.layers[0].mlp.experts.__class__ = type("Mine", (type(first),), {})
    replace_linear(model)
    assert "Mine is no class that declares" in (summary(model).experts[0].reason or "")
    assert summary(model).experts[1].scheme == "int8"


def test_an_error_changes_nothing() -> None:
    model = moe()
    model.model.layers[1].mlp.experts.down_proj.data[0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.experts: weight must be finite"):
        replace_linear(model)
    assert not any(isinstance(module, QLinear | QExperts) for module in model.modules())


def test_quantize_dynamic_takes_layers_of_torch_alone() -> None:
    model = quantize_dynamic(moe())
    assert summary(model).experts[0].reason == "not included"


def test_every_class_of_transformers_that_is_taken_multiplies_alike() -> None:
    """Those that declare nothing special and have no gate of their own have the code of Mixtral's."""
    folder = Path(transformers.__file__).parent / "models"
    forwards: dict[str, str] = {}
    for path in folder.glob("*/modeling_*.py"):
        text = path.read_text()
        if "@use_experts_implementation" not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and "use_experts_implementation" in map(ast.unparse, node.decorator_list):
                methods = {one.name: ast.unparse(one) for one in node.body if isinstance(one, ast.FunctionDef)}
                if "_apply_gate" not in methods:
                    forwards[node.name] = methods["forward"]
    assert len(forwards) >= 40 and set(forwards.values()) == {forwards["MixtralExperts"]}
