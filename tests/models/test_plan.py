"""Plans: what they make of a model, equal to the schemes by hand; their files; models and files they do not fit."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from closeness import Net, X
from tiny import bert
from torch import Tensor, nn

import pyqkern
from pyqkern import Plan, auto, optimize, replace_linear, summary
from pyqkern.analysis.units import ALL, FREE, Option, Ranges, choice_of, find_units, own_copy
from pyqkern.calibration.smooth import Pair, find_pairs
from pyqkern.models.plan import Choice, Smoothing
from pyqkern.schemes import Int8, get_scheme


def states(model: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


def classifier_batches(count: int = 2) -> list[dict[str, Tensor]]:
    ids = torch.randint(2, 99, (count, 8, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 1, 6:] = 0
    return [{"input_ids": one, "attention_mask": m} for one, m in zip(ids, mask, strict=True)]


@pytest.fixture(scope="module")
def classifier() -> Any:
    return bert("BertForSequenceClassification", num_labels=5)


@pytest.fixture(scope="module")
def mixed(classifier: Any) -> Plan:
    """One of everything: layers in two schemes, smoothed and not, static linears, an embedding."""
    own = own_copy(classifier)
    units = {unit.name: unit for unit in find_units(own)}
    batches = classifier_batches()
    channels = pyqkern.calibrate(own, batches, "minmax", per_channel=True, progress=False)
    ranges = Ranges(channels, pyqkern.calibrate(own, batches, progress=False))
    options = {
        "bert.encoder.layer.0": Option(get_scheme("int8-a7"), ALL),
        "bert.encoder.layer.1": Option(get_scheme("nf4"), FREE),
        "bert.pooler.dense": Option(get_scheme("int8-static")),
        "classifier": Option(get_scheme("int8"), ALL),
        "bert.embeddings.word_embeddings": Option(get_scheme("int4")),
    }
    return Plan(tuple(choice_of(units[name], option, ranges) for name, option in options.items()))


def by_hand(model: Any) -> Any:
    """The same as `mixed`, with smooth, replace_linear and replace_embedding."""
    batches = classifier_batches()
    ranges = pyqkern.calibrate(model, batches, progress=False)
    channels = pyqkern.calibrate(model, batches, "minmax", per_channel=True, progress=False)
    first = [pair for pair in find_pairs(model) if ".layer.0." in pair.after[0]]
    free = [pair for pair in find_pairs(model) if ".layer.1." in pair.after[0] and not pair.shared]
    pyqkern.smooth(model, channels, pairs=[*first, *free, Pair("", ("classifier",), shared=True)])
    replace_linear(model, "int8-a7", include="bert.encoder.layer.0.*")
    replace_linear(model, "nf4", include="bert.encoder.layer.1.*")
    replace_linear(model, "int8-static", ranges=ranges, include="bert.pooler.dense")
    replace_linear(model, "int8", include="classifier")
    return pyqkern.replace_embedding(model, "int4", include="*.word_embeddings")


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(**batch).logits for batch in classifier_batches()])


def test_a_plan_is_what_the_schemes_give_by_hand(classifier: Any, mixed: Plan) -> None:
    expected = logits(by_hand(copy.deepcopy(classifier)))
    planned = replace_linear(copy.deepcopy(classifier), mixed)
    assert torch.equal(logits(planned), expected)
    fused, hand = optimize(copy.deepcopy(classifier), mixed), by_hand(copy.deepcopy(classifier))
    assert torch.equal(logits(fused), logits(optimize(planned, mixed)))
    assert torch.equal(logits(fused), logits(optimize(hand, mixed)))
    assert [record.reason for record in summary(fused).encoders] == [None, None]
    assert all(layer.last_call == "" for layer in fused.bert.encoder.layer)
    smoothed = {record.name for record in summary(fused).records if record.smoothed}
    assert "classifier" in smoothed and "bert.encoder.layer.0.intermediate.dense" in smoothed
    assert "bert.encoder.layer.1.intermediate.dense" not in smoothed and "int8-a7, smoothed" in str(summary(fused))
    kept = {r.name: r.reason for r in [*summary(fused).records, *summary(fused).embeddings] if r.scheme is None}
    assert kept["bert.embeddings.position_embeddings"] == "in float by the plan"


def test_from_pretrained_takes_a_plan_and_folders_keep_it(classifier: Any, mixed: Plan, tmp_path: Path) -> None:
    kind = transformers.AutoModelForSequenceClassification
    classifier.save_pretrained(tmp_path / "float")
    expected = logits(replace_linear(copy.deepcopy(classifier), mixed))
    config = pyqkern.PyqkernConfig(mixed)
    assert pyqkern.PyqkernConfig.from_dict(config.to_dict()).plan == mixed
    loaded = kind.from_pretrained(tmp_path / "float", quantization_config=config)
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "quantized")
    said = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    assert "plan" not in said and set(said["input_scales"]) >= {"classifier"}
    again = kind.from_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(kind.from_pretrained(tmp_path / "again")), expected)
    pyqkern.convert.quantize(tmp_path / "float", tmp_path / "converted", mixed)
    assert torch.equal(logits(kind.from_pretrained(tmp_path / "converted")), expected)


def test_a_folder_whose_factors_do_not_fit_is_refused(classifier: Any, mixed: Plan, tmp_path: Path) -> None:
    replace_linear(copy.deepcopy(classifier), mixed).save_pretrained(tmp_path / "q")
    path = tmp_path / "q" / "config.json"
    good = json.loads(path.read_text())
    for name, scale, message in (
        ("classifier", [1.0], "must be one for each of its in_features"),
        ("classifier", ["a"], "must be a list of finite numbers"),
        ("nothing", [1.0], "it has no 'nothing'"),
    ):
        said = copy.deepcopy(good)
        said["quantization_config"]["input_scales"] = {name: scale}
        path.write_text(json.dumps(said))
        with pytest.raises(ValueError, match=message):
            transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "q")


def test_smoothed_models_are_refused_by_formats_without_a_place_for_it(classifier: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(classifier)
    pyqkern.smooth(model, pyqkern.calibrate(model, classifier_batches(), "minmax", per_channel=True, progress=False))
    replace_linear(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "own")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "own")
    assert torch.equal(logits(again), expected)
    again.hf_quantizer.quantization_config.format = "bitsandbytes"
    with pytest.raises(ValueError, match="has no place for what the input of"):
        again.save_pretrained(tmp_path / "foreign")


def test_a_plan_survives_its_file(mixed: Plan, tmp_path: Path) -> None:
    found = auto(Net(), [X], objective="bytes", budget=0.01, schemes=("int8", "nf4"), progress=False)
    for plan in (mixed, found):
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == plan
    assert not list(tmp_path.glob("*.part"))


def broken(path: tuple[Any, ...], value: Any) -> Any:
    def change(said: dict[str, Any]) -> None:
        at: Any = said
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (broken(("version",), 2), "version of the plan must be 1, got 2"),
        (broken(("extra",), 1), "plan must have entries of .*, got 'extra'"),
        (lambda said: said.pop("choices"), "plan must have 'choices', which is missing"),
        (broken(("choices", 1, "scheme"), {"name": "int9"}), r"scheme of choices\[1\]: scheme must be one of"),
        (broken(("choices", 1, "scheme"), {"name": "nf4", "blocksize": 3}), r"scheme of choices\[1\]: blocksize"),
        (broken(("choices", 0, "kind"), "layer"), r"kind of choices\[0\] must be one of"),
        (broken(("choices", 0, "layers"), {}), r"layers of choices\[0\] must name a layer"),
        (broken(("choices", 0, "seconds"), "fast"), r"seconds of choices\[0\] must be a finite number"),
        (broken(("choices", 0, "smoothing", 0, "exponents", 3), 99), "must be within -20 and 20, got 99"),
        (broken(("choices", 0, "smoothing", 0, "exponents"), [0]), "must be one for each in_features=64"),
        (broken(("choices", 0, "smoothing", 0, "after"), ["else"]), "must name its layers, got 'else'"),
        (broken(("choices", 2, "ranges"), {}), "must have 'bert.pooler.dense', which int8-static needs"),
        (broken(("choices", 2, "ranges", "bert.pooler.dense"), [1, 0]), "must be .lo, hi. with lo <= hi"),
        (lambda said: said["choices"].append(said["choices"][0]), "must name each layer once"),
    ],
)
def test_broken_plans_name_what_is_wrong(mixed: Plan, tmp_path: Path, change: Any, message: str) -> None:
    said = json.loads(json.dumps(mixed.to_dict()))
    change(said)
    (tmp_path / "plan.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=message) as error:
        Plan.load(tmp_path / "plan.json")
    assert "plan.json" in str(error.value)


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"version": 1, "choi')
    with pytest.raises(ValueError, match=r"plan\.json must hold a plan"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice("x", "linear", Int8(), {"x": (24, 16)}), "it has no linear 'x'"),
        (Choice("first", "linear", Int8(), {"first": (24, 17)}), r"the shape of 'first' is \[24, 16\], not \[24, 17\]"),
        (Choice("first", "embedding", Int8(), {"first": (24, 16)}), "it has no embedding 'first'"),
    ],
)
def test_a_plan_of_another_model_changes_nothing(choice: Choice, message: str) -> None:
    good = Choice("last", "linear", Int8(), {"last": (4, 24)}, (Smoothing("", ("last",), (1,) * 24),))
    model = Net()
    before = states(model)
    with pytest.raises(ValueError, match=f"plan must be of this model, but {message}"):
        optimize(model, Plan((good, choice)))
    assert all(torch.equal(a, b) for a, b in zip(states(model), before, strict=True))
    assert type(model.last) is nn.Linear and not model.last._forward_pre_hooks


def test_a_layer_that_cannot_be_quantized_changes_nothing() -> None:
    model = Net()
    model.bad.weight.data[0, 0] = torch.nan
    shapes = {"first": (24, 16), "bad": (24, 24)}
    plan = Plan(tuple(Choice(name, "linear", Int8(), {name: shape}) for name, shape in shapes.items()))
    with pytest.raises(ValueError, match="bad: weight must be finite"):
        replace_linear(model, plan)
    assert all(type(one) is nn.Linear for one in model.children())
    with pytest.raises(ValueError, match="include and exclude must be left out with a plan"):
        replace_linear(model, plan, exclude="bad")
