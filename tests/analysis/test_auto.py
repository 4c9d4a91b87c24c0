"""auto: what it finds for small models, how its plans are kept, applied and refused, and what may go wrong."""

import concurrent.futures
import copy
import itertools
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from closeness import Net, X
from decoders import decoder, tokens
from hypothesis import given
from hypothesis import strategies as st
from tiny import IDS, bert, moe, output
from torch import Tensor, nn

import pyqkern
from pyqkern import Plan, auto, optimize, replace_linear, summary
from pyqkern.analysis import Interrupted, auto_report
from pyqkern.analysis.choose import Candidate, Loss, frontier, search
from pyqkern.analysis.damage import Damage, Output, changes, output_of
from pyqkern.analysis.units import Ranges, find_units, options_of, own_copy
from pyqkern.models.plan import Choice
from pyqkern.schemes import Int8, get_scheme

torch.set_num_threads(1)
FEW = ("int8", "nf4")


class Counted:
    """Minus the relative squared difference to the float model's output; counts how often it is asked."""

    def __init__(self, model: nn.Module, x: Any = X) -> None:
        self.x, self.calls = x, 0
        with torch.no_grad():
            self.expected = output_of(model, x).values

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        change = (output_of(model, self.x).values - self.expected).square().sum()
        return -float(change / self.expected.square().sum())


def quiet(model: nn.Module, batches: Any, **options: Any) -> Plan:
    return auto(model, batches, progress=False, **options)


def schemes_of(plan: Plan) -> dict[str, str]:
    return {choice.name: choice.title for choice in plan.choices}


def states(model: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


def classifier_batches(count: int = 2) -> list[dict[str, Tensor]]:
    ids = torch.randint(2, 99, (count, 8, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 1, 6:] = 0
    return [{"input_ids": one, "attention_mask": m} for one, m in zip(ids, mask, strict=True)]


# ---- what it finds


def test_it_keeps_the_budget_and_the_model() -> None:
    model = Net()
    before, evaluate = states(model), Counted(model)
    plan = quiet(model, [X], evaluate=evaluate, objective="bytes", budget=0.01, schemes=FEW)
    assert all(torch.equal(a, b) for a, b in zip(states(model), before, strict=True))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert 1 < evaluate.calls <= 6
    quantized = optimize(copy.deepcopy(model), plan)
    assert Counted(model)(quantized) == plan.figures.measured_score >= -0.01
    assert summary(quantized).bytes_after == plan.figures.bytes < summary(model).bytes_after
    assert {choice.name for choice in plan.choices} == {"first", "bad", "last"}


def test_a_weak_spot_is_smoothed_or_stays_in_float() -> None:
    """One channel of `bad`'s input is 3000 times the rest: plain int8 loses the layer."""
    plan = quiet(Net(), [X], objective="bytes", budget=0.01, schemes=("int8",))
    assert schemes_of(plan)["bad"] in ("int8, smoothed", "float") and plan.quantizes
    alone = Choice("bad", "linear", Int8(), {"bad": (24, 24)})
    model = own_copy(Net())
    damage = Damage(model, find_units(model), [X], [output_of(model, X)])
    assert damage(alone) > 0.01 >= plan.figures.damage


def test_a_budget_that_nothing_meets_leaves_float() -> None:
    calls = []

    def evaluate(model: nn.Module) -> float:
        calls.append(model)
        return 1.0 if summary(model).bytes_after == summary(Net()).bytes_after else 0.5

    plan = quiet(Net(), [X], evaluate=evaluate, objective="bytes", budget=0.1, schemes=FEW)
    assert not plan.quantizes and 1 < len(calls) <= 6
    assert "Nothing that was tried keeps the budget of 0.1" in plan.note and "float" in str(plan)
    assert plan.figures.measured_score == 1.0


def test_one_layer() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 32), torch.randn(16, 64)
    plan = quiet(linear, [x], objective="bytes", budget=0.001, schemes=FEW)
    assert [choice.name for choice in plan.choices] == [""] and plan.choices[0].scheme == Int8()
    quantized = replace_linear(copy.deepcopy(linear), plan)
    assert isinstance(quantized, pyqkern.Int8Linear)


def test_shared_layers_are_one_choice() -> None:
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, vocab_size=100,
        embedding_size=32, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.AlbertModel(config).eval()
    plan = quiet(model, classifier_batches(1), objective="bytes", budget=0.01, schemes=("int8",))
    layers = [choice for choice in plan.choices if choice.kind == "encoder layer"]
    assert len(layers) == 1 and layers[0].scheme == Int8()
    quantized = optimize(copy.deepcopy(model), plan)
    assert summary(quantized).bytes_after == plan.figures.bytes
    assert all(record.reason is None for record in summary(quantized).encoders)


def test_decoder_layers_are_one_choice_each() -> None:
    """Timed without a cache, which would grow in each of the repeated calls."""
    model = decoder("gpt2")  # whose layers take it by position
    batches = [{"input_ids": tokens(2, 9)}]
    plan = quiet(model, batches, objective="time", budget=0.5, schemes=("int8",))
    layers = [choice for choice in plan.choices if choice.kind == "decoder layer"]
    assert len(layers) == 2 and all(len(choice.layers) == 4 and not choice.smoothing for choice in layers)
    assert all(choice.float_seconds > 0 for choice in layers)
    plan = Plan.from_dict(plan.to_dict())
    quantized = optimize(copy.deepcopy(model), plan)
    assert summary(quantized).bytes_after == plan.figures.bytes
    fused = [record.reason is None for record in summary(quantized).decoders]
    assert len(fused) == sum(choice.scheme is not None for choice in layers)


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="experts are linears before 5")
def test_experts_recurrent_layers_and_tied_embeddings() -> None:
    model = moe("mixtral", tie_word_embeddings=True)
    plan = quiet(model, [{"input_ids": IDS}], objective="bytes", budget=0.5, schemes=("int8",))
    kinds = {choice.kind for choice in plan.choices if choice.scheme is not None}
    assert {"experts", "embedding", "linear"} <= kinds
    assert summary(optimize(copy.deepcopy(model), plan)).bytes_after == plan.figures.bytes
    torch.manual_seed(0)
    lstm = nn.Sequential(nn.LSTM(32, 32, batch_first=True))
    plan = quiet(lstm, [torch.randn(2, 5, 32)], objective="bytes", budget=0.1, schemes=("int8",))
    assert [(choice.kind, choice.scheme) for choice in plan.choices] == [("recurrent layer", Int8())]
    assert summary(replace_linear(lstm, plan)).bytes_after == plan.figures.bytes


def test_projections_of_attentions_are_linears() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(2, 6, 32)
    before = states(model)
    plan = quiet(model, [x], objective="bytes", budget=0.05, schemes=("int8",))
    assert {"self_attn.q_proj", "self_attn.out_proj", "linear1"} <= set(schemes_of(plan))
    assert type(model.self_attn) is nn.MultiheadAttention
    assert all(torch.equal(a, b) for a, b in zip(states(model), before, strict=True))
    assert summary(replace_linear(model, plan)).bytes_after == plan.figures.bytes


def test_what_no_batch_reaches_stays_in_float() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.warns(UserWarning, match="did not reach"):
        plan = quiet(Half(), [torch.randn(4, 64)], objective="bytes", budget=0.1, schemes=("int8",))
    assert schemes_of(plan) == {"used": "int8", "unused": "float: not reached by the batches"}
    assert "Not reached by the batches, and in float: unused." in plan.note


def test_time_is_no_slower_than_the_single_schemes_that_it_evaluated() -> None:
    model = bert("BertForSequenceClassification", num_labels=5)
    plan = quiet(model, classifier_batches(), budget=0.2, sizes=[(4, 16), (1, 8)], schemes=("int8", "int8-a7"))
    kept = [one for one in plan.compared if one.measured_score is not None and one.measured_score >= 0.8]
    assert plan.figures.measured_seconds == min(one.measured_seconds for one in kept)
    assert plan.figures in plan.compared and plan.objective == "time" and "1 thread" in plan.machine


def test_padding_is_no_output() -> None:
    model, batch = bert("BertModel"), classifier_batches(1)[0]
    assert output_of(model, batch).values.shape == (int(batch["attention_mask"].sum()), 64)
    plan = quiet(model, [batch], objective="bytes", budget=0.5, schemes=("int8",))  # whose padding becomes zeros
    assert 0 < plan.figures.damage < 0.01


def test_damages_against_their_definition() -> None:
    x, y = torch.randn(5, 7), torch.randn(5, 7)
    p, q = x.double().softmax(-1), y.double().softmax(-1)
    change, size = changes(Output(x, True), Output(y, True))
    assert change == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-12) and size == 5
    change, size = changes(Output(x, False), Output(y, False))
    assert change == pytest.approx(float((x.double() - y.double()).square().sum()), rel=1e-12)
    assert size == pytest.approx(float(x.double().square().sum()), rel=1e-12)
    assert changes(Output(x, False), Output(y * torch.nan, False))[0] == float("inf")


# ---- the choice


units_of = st.lists(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=4), min_size=1, max_size=5
)


@given(units=units_of)
def test_the_frontier_against_brute_force(units: list[list[tuple[int, int]]]) -> None:
    every = [(sum(one[1] for one in chosen), sum(one[0] for one in chosen)) for chosen in itertools.product(*units)]
    expected = sorted({p for p in every if not any(o != p and o[0] <= p[0] and o[1] <= p[1] for o in every)})
    found = frontier(units)
    assert [(one.damage, one.cost) for one in found] == expected
    for one in found:
        chosen = [options[pick] for options, pick in zip(units, one.picks, strict=True)]
        assert (sum(c for c, _ in chosen), sum(d for _, d in chosen)) == (one.cost, one.damage)


def searched(truth: Any, candidates: list[Candidate], **options: Any) -> list[Any]:
    given = {"float_score": 1.0, "float_cost": 100.0, "budget": 0.01, "start": 1e-3, "evaluations": 5} | options
    return search(candidates, truth, loss=Loss.guessed(0.01, given["start"], 0.5), **given)


LINE = [Candidate((i,), 90.0 - i, 10 ** (-6 + i / 10)) for i in range(1, 70)]  # up to a damage of 8


@pytest.mark.parametrize("limit", [1e-5, 1e-3, 0.3, 100.0])
def test_the_search_comes_near_whatever_the_first_guess(limit: float) -> None:
    tried = searched(lambda one: 1 - 0.01 * (one.damage / limit) ** 0.5, LINE)
    kept = [one.candidate for one in tried if one.kept]
    possible = [one.cost for one in LINE if one.damage <= limit]
    assert len(tried) <= 5 and min(one.cost for one in kept) <= min(possible) + 5


def test_the_search_tightens_where_the_truth_is_worse_than_the_sum() -> None:
    tried = searched(lambda one: 0.5 if one.damage > 1e-5 else 1.0, LINE)
    damages = [one.candidate.damage for one in tried]
    failed = [one.candidate.damage for one in tried if not one.kept]
    assert failed and any(one.kept for one in tried)
    assert all(later < min(failed[: i + 1]) for i, later in enumerate(damages[1:]) if i < len(failed) - 1)


def test_the_last_evaluation_goes_to_a_single_scheme() -> None:
    """Also where mixes with less damage promise more: none may be left slower than a single scheme by chance."""
    single = Candidate((0,), 85.0, 1.1e-6, "int8")
    tried = searched(lambda one: 1.0 if one.single else 0.5, [*LINE, single], start=1.0, evaluations=3)
    assert [one.candidate.single for one in tried] == ["", "", "int8"] and tried[-1].kept
    worse = Candidate((0,), 5.0, 1.5, "int8")  # with more damage than what misses the budget
    tried = searched(lambda one: 0.5, [*LINE, worse], start=1.0, evaluations=3)
    assert [one.candidate.single for one in tried] == ["", "", ""]


# ---- what may go wrong


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"budget": -1}, ValueError, "budget must be a score that may be lost, at least 0, got -1"),
        ({"objective": "size"}, ValueError, "objective must be one of 'time', 'bytes', got 'size'"),
        ({"schemes": ["int9"]}, ValueError, "scheme must be one of"),
        ({"schemes": []}, ValueError, "schemes must name at least one scheme"),
        ({"sizes": [(1, 0)]}, ValueError, r"sizes must be \(batch, length\)"),
        ({"batches": []}, ValueError, "batches must hold at least one batch"),
        ({"evaluate": 3}, TypeError, "evaluate must be a function of a model"),
        ({"executor": 3}, TypeError, "executor must be None or a concurrent.futures.Executor"),
        ({"model": replace_linear(Net())}, ValueError, "model must be in float, but first is quantized already"),
        ({"model": nn.Identity()}, ValueError, "model must have layers that can be quantized, got none"),
        ({"batches": [X * torch.nan]}, ValueError, "batches must give finite outputs"),
        ({"evaluate": lambda model: "good"}, ValueError, "evaluate must return a finite number"),
    ],
)
def test_it_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"model": Net(), "batches": [X], "schemes": ("int8",)} | change
    with pytest.raises(error, match=message):
        quiet(given.pop("model"), given.pop("batches"), **given)


def pool() -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def test_an_executor_finds_the_same(tmp_path: Path) -> None:
    options = {"objective": "bytes", "budget": 0.01, "schemes": FEW}
    expected = quiet(Net(), [X], **options)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        assert schemes_of(quiet(Net(), [X], executor=threads, **options)) == schemes_of(expected)
    with pool() as processes:
        found = quiet(Net(), [X], executor=processes, **options)
    assert schemes_of(found) == schemes_of(expected) and found.figures.damage == expected.figures.damage


def test_a_pool_that_dies_and_an_interrupted_run_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state.jsonl"
    options = {"objective": "bytes", "budget": 0.01, "schemes": FEW, "file": file}
    whole = quiet(Net(), [X], **(options | {"file": None}))

    class Dead(concurrent.futures.Executor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            raise concurrent.futures.process.BrokenProcessPool("dead")

    with pytest.raises(Interrupted, match=r"the executor failed with 0 of .* BrokenProcessPool"):
        quiet(Net(), [X], executor=Dead(), **options)
    timed = len(file.read_text().splitlines())
    assert timed > 1  # the times are kept
    calls = 0
    damage = Damage.__call__

    def interrupted(self: Damage, choice: Choice) -> float:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return damage(self, choice)

    monkeypatch.setattr(Damage, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quiet(Net(), [X], **options)
    assert len(file.read_text().splitlines()) == timed + 3
    again = quiet(Net(), [X], **options)
    total = calls
    assert schemes_of(again) == schemes_of(whole) and total > 4
    evaluate = Counted(Net())
    assert quiet(Net(), [X], **options).choices == again.choices and calls == total and evaluate.calls == 0
    with pytest.raises(ValueError, match="must be of this model, these batches and options"):
        quiet(Net(), [X + 1], **options)


def test_a_dead_worker_leaves_the_model_of_a_thread_whole() -> None:
    """A task that fails puts the unit's modules back."""
    model = own_copy(Net())
    units = find_units(model)
    damage = Damage(model, units, [X], [output_of(model, X)])
    wrong = Damage(model, units, [X[:, :3]], [output_of(model, X)])
    choice = Choice("first", "linear", Int8(), {"first": (24, 16)})
    with pytest.raises((RuntimeError, ValueError)):
        wrong(choice)
    assert all(type(one) is nn.Linear for one in model.children())
    assert damage(choice) == damage(choice) > 0


def test_options_that_do_not_fit_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(48, 8), nn.Embedding(10, 48))
    linear, embedding = find_units(own_copy(model))
    schemes = [get_scheme(name) for name in ("int8", "int8-a7", "int8-static", "int8-outlier", "int4")]
    found = [option.scheme for option in options_of(linear, schemes, Ranges())]
    assert get_scheme("int8-static") not in found and get_scheme("int8-outlier") in found
    names = [option.scheme.name for option in options_of(embedding, schemes, Ranges()) if option.scheme]
    assert names == ["int8", "int4"]
    plan = quiet(nn.Linear(48, 8), [torch.randn(4, 48)], objective="bytes", budget=0.5, schemes=("int4", "int8"))
    assert plan.choices[0].scheme == Int8()  # groups of 64 do not divide 48


# ---- the page


def test_the_page_draws_and_escapes(tmp_path: Path) -> None:
    plan = quiet(Net(), [X], objective="bytes", budget=0.01, schemes=FEW)
    auto_report(tmp_path / "a.html", plan, title="<b>&", notes=["1 < 2"])
    text = (tmp_path / "a.html").read_text()
    assert "<h1>&lt;b&gt;&amp;</h1>" in text and "1 &lt; 2" in text and text.count("<img ") == 1
    for name in ("first", "bad", "last", "int8", "nf4", "this plan"):
        assert name in text
    with pytest.raises(ValueError, match="plan must have figures"):
        auto_report(tmp_path / "b.html", Plan(plan.choices))
    assert not (tmp_path / "b.html").exists()


def test_output_of_a_model_with_one_label_is_no_logits() -> None:
    model = bert("BertForSequenceClassification", num_labels=1)
    assert not output_of(model, classifier_batches(1)[0]).logits
    assert output(model).shape == (2, 1)
