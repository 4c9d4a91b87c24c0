"""replace_linear's rules, one test each, and summary."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

import pyqkern.nn.int8
from pyqkern import QLinear, replace_linear, summary
from pyqkern.schemes import Int8


class Block(nn.Module):
    def __init__(self, size: int = 24) -> None:
        super().__init__()
        self.query = nn.Linear(size, size)
        self.dense = nn.Linear(size, 2 * size, bias=False)
        self.out = nn.Linear(2 * size, size)
        self.norm = nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.out(torch.relu(self.dense(self.query(x)))))


class Model(nn.Module):
    """Embedding, two blocks, a head tied to the embedding, a classifier."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 24)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(24, 50, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.classifier = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 2))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x), self.classifier(x[:, 0])


IDS = torch.arange(30).view(3, 10)
LINEARS = [
    *(f"blocks.{i}.{name}" for i in (0, 1) for name in ("query", "dense", "out")),
    "head",
    "classifier.0",
    "classifier.2",
]


def quantized(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QLinear)]


def reasons(model: nn.Module) -> dict[str, str | None]:
    return {record.name: record.reason for record in summary(model).records}


def snapshot(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, Tensor], dict[str, Any]]:
    """What a model is: its modules (the objects), its tensors, and the attributes of its modules."""
    modules = dict(model.named_modules())
    attributes = {
        f"{name}.{key}": value
        for name, m in modules.items()
        for key, value in vars(m).items()
        if not key.startswith("_") or key == "_pyqkern_kept"
    }
    return modules, {key: value.clone() for key, value in model.state_dict().items()}, attributes


def assert_unchanged(model: nn.Module, before: tuple[dict[str, nn.Module], dict[str, Tensor], dict[str, Any]]) -> None:
    modules, tensors, attributes = snapshot(model)
    assert list(modules) == list(before[0]) and all(modules[name] is before[0][name] for name in modules)
    assert list(tensors) == list(before[1]) and all(torch.equal(tensors[key], before[1][key]) for key in tensors)
    assert attributes == before[2]


# ---- what is replaced


def test_replaces_in_place_and_returns_the_model() -> None:
    model = Model()
    with torch.no_grad():
        before = model(IDS)
        result = replace_linear(model)
        after = model(IDS)
    assert result is model
    assert quantized(model) == [name for name in LINEARS if name != "head"]
    for a, b in zip(before, after, strict=True):
        assert 0 < (a - b).norm() < 0.03 * a.norm()


def test_a_bare_linear_comes_back_as_a_qlinear() -> None:
    linear = nn.Linear(8, 4)
    layer = replace_linear(linear)
    assert isinstance(layer, QLinear) and torch.equal(layer.weight, QLinear.from_linear(linear).weight)
    assert isinstance(replace_linear(nn.Linear(8, 4), include="*"), QLinear)
    kept = replace_linear(linear, exclude=lambda name, module: module.out_features == 4)
    assert kept is linear


def test_a_scheme_object() -> None:
    model = replace_linear(nn.Sequential(nn.Linear(8, 4)), Int8(symmetric=True))
    assert model[0].scheme == Int8(symmetric=True)


@pytest.mark.parametrize(
    "include, exclude, expected",
    [
        (None, "classifier.*", LINEARS[:6]),
        (None, ["classifier.2", "blocks.1.*"], [*LINEARS[:3], "classifier.0"]),
        ("blocks.*", (), LINEARS[:6]),
        (["blocks.*", "classifier.0"], "*.dense", [n for n in [*LINEARS[:6], "classifier.0"] if "dense" not in n]),
        ("*.[0-9].query", (), ["blocks.0.query", "blocks.1.query"]),
        (lambda name, module: module.bias is None, (), ["blocks.0.dense", "blocks.1.dense"]),
        (None, lambda name, module: name.startswith("blocks"), ["classifier.0", "classifier.2"]),
        (None, lambda name, module: True, []),
        (None, iter(["classifier.*"]), LINEARS[:6]),
    ],
)
def test_include_and_exclude(include: Any, exclude: Any, expected: list[str]) -> None:
    model = replace_linear(Model(), include=include, exclude=exclude)
    assert quantized(model) == expected
    kept = {name: reason for name, reason in reasons(model).items() if reason is not None}
    assert set(kept) == set(LINEARS) - set(expected)
    assert set(kept.values()) <= {"excluded", "not included", "tied to the embedding embedding.weight"}


# ---- what is kept, and why


def test_tied_to_an_embedding() -> None:
    model = replace_linear(Model())
    assert model.head.weight is model.embedding.weight
    assert reasons(model)["head"] == "tied to the embedding embedding.weight"
    # Two Parameters on one storage are tied, too.
    model = Model(tied=False)
    model.head.weight.data = model.embedding.weight.data
    assert "head" not in quantized(replace_linear(model))
    assert "head" in quantized(replace_linear(Model(tied=False)))


def test_tied_to_another_module() -> None:
    class Reader(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.table = weight

    linear = nn.Linear(4, 4)
    model = replace_linear(nn.Sequential(linear, Reader(linear.weight), nn.Linear(4, 4)))
    assert quantized(model) == ["2"] and reasons(model)["0"] == "tied to 1.table"


def test_parametrized() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 4)), nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4)
    )
    prune.random_unstructured(model[2], "weight", 0.5)
    before = snapshot(model)
    replace_linear(model)
    assert quantized(model) == [] and before[0].keys() == dict(model.named_modules()).keys()
    assert all(reasons(model)[name].startswith("parametrized") for name in "012")


def test_subclasses_are_left_to_their_owners() -> None:
    class Mine(nn.Linear):
        pass

    model = nn.ModuleDict({"mine": Mine(4, 4), "plain": nn.Linear(4, 4)})
    replace_linear(model)
    assert quantized(model) == ["plain"]
    assert "Mine" in reasons(model)["mine"]


def test_patched_forward() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].forward = lambda x: x
    assert quantized(replace_linear(model)) == ["1"] and reasons(model)["0"].startswith("patched")


def test_already_quantized() -> None:
    model = replace_linear(Model(), include="blocks.0.*")
    layers = [model.get_submodule(name) for name in quantized(model)]
    replace_linear(model, include="blocks.*")
    assert quantized(model) == LINEARS[:6]
    assert all(model.get_submodule(name) is layer for name, layer in zip(LINEARS, layers, strict=False))
    assert replace_linear(layers[0]) is layers[0]


# ---- what stays as it was


def test_a_shared_linear_stays_one_module() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.Sequential(nn.ReLU(), shared), nn.Linear(8, 8), shared)
    replace_linear(model)
    assert isinstance(model[0], QLinear) and model[0] is model[1][1] is model[3] and model[2] is not model[0]
    first, second = summary(model).records
    assert (first.name, first.aliases, second.name) == ("0", ("1.1", "3"), "2")
    assert first.bytes_after == second.bytes_after


def test_every_name_of_a_shared_linear_counts() -> None:
    shared = nn.Linear(8, 8)
    assert quantized(replace_linear(nn.Sequential(shared, shared), exclude="1")) == []
    assert isinstance(replace_linear(nn.Sequential(shared, shared), include="1")[0], QLinear)


def test_a_shared_block_is_replaced_once() -> None:
    """ALBERT's way: one layer under several names."""
    block = Block()
    model = nn.ModuleList([block, block])
    replace_linear(model)
    assert model[0] is model[1] is block and [r.aliases for r in summary(model).records] == [
        ("1.query",),
        ("1.dense",),
        ("1.out",),
    ]


def test_a_module_that_holds_its_parent() -> None:
    model = Model()
    model.blocks[0].parent = model
    assert len(quantized(replace_linear(model))) == len(LINEARS) - 1


def test_hooks_train_mode_and_requires_grad_carry_over() -> None:
    linear = nn.Linear(8, 4).eval()
    linear.bias.requires_grad_(False)
    seen: list[str] = []
    handle = linear.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    linear.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs), with_kwargs=True)
    layer = replace_linear(nn.Sequential(linear))[0]
    assert not layer.training and not layer.bias.requires_grad and layer.bias is linear.bias
    layer(torch.zeros(1, 8))
    assert seen == ["Int8Linear"]
    handle.remove()
    layer(torch.zeros(1, 8))
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_model_stays_half(dtype: torch.dtype) -> None:
    model = replace_linear(Model().to(dtype))
    logits, classes = model(IDS)
    assert logits.dtype is classes.dtype is dtype and model.blocks[0].query.weight.dtype is dtype


# ---- what goes wrong


def poisoned(value: float) -> Model:
    model = Model()
    with torch.no_grad():
        model.blocks[1].out.weight[3, 5] = value
    return model


def doubled() -> Model:
    model = Model()
    model.classifier[2].double()
    return model


def on_meta() -> Model:
    model = Model()
    model.classifier[2].to("meta")
    return model


@pytest.mark.parametrize(
    "make, arguments, error, message",
    [
        (Model, {"scheme": "int9"}, ValueError, "scheme must be one of 'int8', .*got 'int9'"),
        (Model, {"scheme": None}, TypeError, "scheme must be a name"),
        (
            Model,
            {"exclude": ["clasifier.*"]},
            ValueError,
            "exclude must match the name of a linear, got 'clasifier.*'; the linears are blocks.0.query",
        ),
        (Model, {"include": "encoder.*"}, ValueError, "include must match the name of a linear, got 'encoder.*'"),
        (
            Model,
            {"exclude": ["classifier"]},
            ValueError,
            r"got 'classifier'; use 'classifier.\*' for what is inside of it",
        ),
        (Model, {"exclude": ["embedding"]}, ValueError, "got 'embedding'"),
        (Model, {"exclude": [3]}, TypeError, "exclude must be name patterns, types or a predicate"),
        (Model, {"include": 3}, TypeError, "include must be name patterns, types or a predicate"),
        (
            lambda: poisoned(float("nan")),
            {},
            ValueError,
            r"blocks.1.out: weight must be finite.*exclude=\['blocks.1.out'\]",
        ),
        (lambda: poisoned(float("inf")), {}, ValueError, "blocks.1.out: weight must be finite"),
        (doubled, {}, TypeError, "classifier.2: weight must be float32, bfloat16 or float16, got torch.float64"),
        (on_meta, {}, ValueError, "classifier.2: weight must hold values"),
    ],
)
def test_an_error_names_the_layer_and_changes_nothing(
    make: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make()
    with torch.no_grad():
        before = snapshot(model)
        with pytest.raises(error, match=message):
            replace_linear(model, **arguments)
        modules, _, attributes = snapshot(model)
    assert all(modules[name] is before[0][name] for name in before[0]) and attributes == before[2]
    for key, value in model.state_dict().items():
        if not value.is_meta:
            assert torch.equal(value.nan_to_num(7), before[1][key].nan_to_num(7))
    if "message" not in arguments and make is not Model:
        replace_linear(model, exclude=["blocks.1.out", "classifier.*"])
        assert len(quantized(model)) == 5


@pytest.mark.parametrize("failing", range(1, 9))
def test_an_exception_in_the_middle_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """Whichever layer it is: all are quantized on trial before the first is changed."""
    model = Model()
    before = snapshot(model)
    calls = 0
    quantize = pyqkern.nn.int8.Int8Linear._quantize

    def fails(self: pyqkern.nn.int8.Int8Linear, weight: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise MemoryError("no memory left")
        quantize(self, weight)

    monkeypatch.setattr(pyqkern.nn.int8.Int8Linear, "_quantize", fails)
    with pytest.raises(MemoryError):
        replace_linear(model)
    assert_unchanged(model, before)
    monkeypatch.setattr(pyqkern.nn.int8.Int8Linear, "_quantize", quantize)
    assert len(quantized(replace_linear(model))) == 8


def test_a_predicate_that_raises_leaves_the_model_as_it_was() -> None:
    model = Model()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        replace_linear(model, include=lambda name, module: 1 // ("classifier" not in name))
    assert_unchanged(model, before)


def test_only_modules() -> None:
    for function in (replace_linear, summary):
        with pytest.raises(TypeError, match=r"model must be an nn.Module, got list"):
            function([nn.Linear(2, 2)])  # type: ignore[arg-type]


# ---- memory


class LiveBytes(TorchDispatchMode):
    """The greatest number of bytes alive in tensors, looked at after every operator."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.record(list(model.parameters()))

    def record(self, tensors: Any) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.storages.values()))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.record([t for t in (result if isinstance(result, tuple | list) else [result]) if isinstance(t, Tensor)])
        return result


def test_extra_memory_is_about_one_layer() -> None:
    size, count = 256, 12
    model = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(count)))
    weights = [StorageWeakRef(layer.weight.untyped_storage()) for layer in model]
    float_bytes = summary(model).bytes_after
    with LiveBytes(model) as live:
        replace_linear(model)
    assert float_bytes < live.peak < float_bytes + float_bytes / count
    assert all(weight.expired() for weight in weights)  # no float weight outlives its layer
    # A byte for four, column sums and scales, and, on an ISA that splits weights, an excess: most for so short rows.
    assert summary(model).bytes_after < 0.34 * float_bytes


def test_no_reference_to_a_float_weight_survives_its_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    """When layer i is quantized for good, the weights of the layers before it are gone already."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)))
    weights = [StorageWeakRef(layer.weight.untyped_storage()) for layer in model]
    alive: list[int] = []
    quantize = pyqkern.nn.int8.Int8Linear._quantize

    def counting(self: pyqkern.nn.int8.Int8Linear, weight: Tensor) -> None:
        alive.append(sum(not ref.expired() for ref in weights))
        quantize(self, weight)

    monkeypatch.setattr(pyqkern.nn.int8.Int8Linear, "_quantize", counting)
    replace_linear(model)
    assert alive == [5, 5, 5, 5, 5, 5, 4, 3, 2, 1]


# ---- summary


def test_summary_counts_the_tensors() -> None:
    model = Model()
    before = summary(model)
    assert [record.name for record in before.records] == LINEARS
    assert {record.reason for record in before.records} == {
        "not replaced yet",
        "tied to the embedding embedding.weight",
    }
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    assert before.bytes_before == before.bytes_after == total
    replace_linear(model, exclude="classifier.2")
    after = summary(model)
    tensors = [*model.parameters(), *model.buffers()]
    assert after.bytes_before == total
    assert after.bytes_after == sum(t.numel() * t.element_size() for t in tensors) < total
    query, classifier = after.records[0], after.records[-1]
    assert (query.name, query.shape, query.scheme, query.reason) == ("blocks.0.query", (24, 24), "int8", None)
    assert query.bytes_before == 4 * (24 * 24 + 24)
    assert query.bytes_after == 2 * (24 // 4 + 3) * 64 + 4 * 24 + 4 * 24  # two panels, scales, bias
    assert (classifier.scheme, classifier.reason, classifier.bytes_after) == (None, "excluded", 4 * (24 * 2 + 2))


def test_summary_prints_and_becomes_plain_data() -> None:
    result = summary(replace_linear(Model(), exclude="classifier.2"))
    text = str(result)
    assert "7 of 9 linears quantized" in text and "kept: excluded" in text and "tied to the embedding" in text
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[0].split() == [
        "layer",
        "shape",
        "scheme",
        "before",
        "after",
    ]
    data = json.loads(json.dumps(result.to_dict()))
    assert data["bytes_after"] == result.bytes_after and data["records"][0]["name"] == "blocks.0.query"
    assert str(summary(nn.ReLU())).count("0 of 0 linears quantized") == 1


def test_summary_of_what_was_loaded_copied_and_cast() -> None:
    model = copy.deepcopy(replace_linear(Model(), exclude="classifier.2")).to(torch.bfloat16)
    assert reasons(model)["classifier.2"] == "excluded"
    assert summary(model).records[0].bytes_before == 2 * (24 * 24 + 24)


def test_summary_of_a_meta_model() -> None:
    with torch.device("meta"):
        model = Model()
    assert summary(model).bytes_after == sum(p.numel() * 4 for p in model.parameters())
