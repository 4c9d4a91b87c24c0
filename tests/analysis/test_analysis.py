"""The analyses on small models with known weak spots, their files and pools, the HTML report and the command."""

import concurrent.futures
import copy
import csv
import json
import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from closeness import Closeness, Dying, Net, X, net_analyses
from require import require
from tiny import moe, output
from torch import Tensor, nn

import pyqkern
from pyqkern import QLinear, replace_linear
from pyqkern.analysis import (
    Interrupted,
    compare_samples,
    error_propagation,
    fallback,
    range_report,
    report,
    sensitivity,
)
from pyqkern.analysis.sensitivity import score_with
from pyqkern.cli import main
from pyqkern.cli.analyze import label_ids
from pyqkern.schemes import Int8, Int8Static, Range


def quiet_sensitivity(evaluate: Callable[[nn.Module], float], **options: Any) -> Any:
    return sensitivity(Net(), evaluate, progress=False, **options)


def scores(records: Any) -> list[tuple[str, float, float]]:
    return [(record.name, record.only, record.all_but) for record in records]


def test_sensitivity_names_the_layer_that_hurts() -> None:
    model, evaluate = Net(), Closeness()
    before = copy.deepcopy(model.state_dict())
    found = sensitivity(model, evaluate, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert evaluate.calls == 2 + 2 * 3
    assert found[0].name == "bad" and {record.name for record in found} == {
        "first",
        "bad",
        "last",
    }
    assert found[0].drop > 10 * max(abs(record.drop) for record in found[1:])
    for record in found:
        alone = replace_linear(Net(), include=record.name)
        others = replace_linear(Net(), exclude=record.name)
        assert record.only == Closeness()(alone) and record.all_but == Closeness()(others)
        assert record.drop == found.float_score - record.only and record.gain == record.all_but - found.quantized_score
        weight = dict(Net().named_modules())[record.name].weight
        assert 0 < record.float_bytes <= 3 * weight.numel() or record.name == "last"


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="experts are linears before 5")
def test_sensitivity_looks_at_experts() -> None:
    model = moe()
    expected = output(model)
    found = sensitivity(model, lambda one: -float((output(one) - expected).norm()), progress=False)
    names = {record.name for record in found.records}
    assert {
        f"model.layers.{i}.mlp.experts" for i in range(2)
    } < names and found.quantized_score < found.float_score == 0


def test_sensitivity_goes_on_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "state.jsonl"
    whole = quiet_sensitivity(Closeness())

    class Stopped(Closeness):
        def __call__(self, model: nn.Module) -> float:
            if self.calls == 4:
                raise KeyboardInterrupt
            return super().__call__(model)

    with pytest.raises(KeyboardInterrupt):
        quiet_sensitivity(Stopped(), file=file)
    assert len(file.read_text().splitlines()) == 1 + 4
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:3], "{torn", *lines[3:], '{"key": "only ba']))  # two lines torn
    rest = Closeness()
    again = quiet_sensitivity(rest, file=file)
    assert rest.calls == 8 - 4 and scores(again) == scores(whole)
    nothing = Closeness()
    assert scores(quiet_sensitivity(nothing, file=file)) == scores(whole) and nothing.calls == 0


@pytest.mark.parametrize("text", ["nonsense\n", '{"scheme": "other"}\n'])
def test_sensitivity_refuses_the_file_of_another_model(tmp_path: Path, text: str) -> None:
    (tmp_path / "state").write_text(text)
    with pytest.raises(ValueError, match="must be of this model and scheme"):
        quiet_sensitivity(Closeness(), file=tmp_path / "state")
    assert (tmp_path / "state").read_text() == text
    sensitivity(Net(), Closeness(), file=tmp_path / "mine", progress=False)
    with pytest.raises(ValueError, match=r"Int8\(symmetric=True"):
        sensitivity(Net(), Closeness(), Int8(symmetric=True), file=tmp_path / "mine", progress=False)


def pool() -> concurrent.futures.ProcessPoolExecutor:
    """Two processes that were not forked from this one, whose OpenMP pool runs."""
    return concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))


def test_sensitivity_on_threads_and_processes() -> None:
    expected = scores(quiet_sensitivity(Closeness()))
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        assert scores(quiet_sensitivity(Closeness(), executor=threads)) == expected
    with pool() as processes:
        assert scores(quiet_sensitivity(Closeness(), executor=processes)) == expected


def test_sensitivity_on_dask() -> None:
    require("distributed", "sensitivity runs on dask's executor")
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        assert scores(quiet_sensitivity(Closeness(), executor=client.get_executor())) == scores(
            quiet_sensitivity(Closeness())
        )


def test_a_pool_that_dies_keeps_what_was_finished(tmp_path: Path) -> None:
    file = tmp_path / "state.jsonl"
    with (
        pool() as processes,
        pytest.raises(Interrupted, match=r"the executor failed with . of 8 .* BrokenProcessPool") as e,
    ):
        quiet_sensitivity(Dying(), file=file, executor=processes)
    kept = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert e.value.scores == {entry["key"]: entry["score"] for entry in kept} and "only bad" not in e.value.scores
    rest = Closeness()
    again = quiet_sensitivity(rest, file=file)
    assert rest.calls == 8 - len(kept) and scores(again) == scores(quiet_sensitivity(Closeness()))


@pytest.mark.parametrize("answer", [None, "0.9", float("nan"), float("inf"), True, torch.zeros(2), [1.0]])
def test_evaluate_must_return_a_number(answer: object) -> None:
    with pytest.raises(ValueError, match="evaluate must return a finite number, the higher the better, got"):
        quiet_sensitivity(lambda model: answer)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("answer", [1, 0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5).numpy()])
def test_evaluate_may_return_any_number(answer: Any) -> None:
    assert score_with(Net(), lambda model: answer, Int8(), ()) == float(answer)


def test_sensitivity_without_linears() -> None:
    with pytest.raises(ValueError, match="model must have linears that int8 quantizes, got none"):
        sensitivity(nn.Sequential(nn.ReLU()), lambda model: 1.0, progress=False)


# ---- fallback


def test_fallback_keeps_the_layer_that_hurts() -> None:
    evaluate = Closeness()
    only_bad = evaluate(replace_linear(Net(), exclude="bad"))
    found = fallback(Net(), evaluate, only_bad, progress=False)
    assert found.kept == ("bad",) and found.score == only_bad == evaluate(found.model)
    kinds = {name: isinstance(module, QLinear) for name, module in found.model.named_children()}
    assert kinds == {"first": True, "bad": False, "last": True}
    assert found.to_dict()["kept"] == ("bad",) and "model" not in found.to_dict()
    assert (
        pyqkern.summary(found.model).bytes_after
        == found.kept_bytes + pyqkern.summary(replace_linear(Net())).bytes_after
    )


def test_fallback_with_an_easy_and_a_hard_target() -> None:
    assert fallback(Net(), Closeness(), -math.inf, progress=False).kept == ()
    everything = fallback(Net(), Closeness(), 0.0, progress=False)
    assert set(everything.kept) == {"first", "bad", "last"} and everything.score == 0
    with pytest.raises(ValueError, match=r"target must be within reach of the float model, which has .*, got 1"):
        fallback(Net(), Closeness(), 1.0, progress=False)


def test_fallback_gives_back_what_it_did_not_need() -> None:
    """`last` comes first in this order, though keeping it helps nothing: it is quantized again at the end."""
    evaluate = Closeness()
    order = sensitivity(Net(), evaluate, progress=False)
    order.records.sort(key=lambda record: ["last", "bad", "first"].index(record.name))
    target = evaluate(replace_linear(Net(), exclude="bad"))
    assert fallback(Net(), evaluate, target, order=order, progress=False).kept == ("bad",)


def test_fallback_needs_an_evaluate_that_repeats_itself() -> None:
    class Falling(Closeness):
        def __call__(self, model: nn.Module) -> float:
            return super().__call__(model) - 1e-3 * self.calls

    evaluate = Falling()
    order = sensitivity(Net(), evaluate, progress=False)
    with pytest.raises(ValueError, match="evaluate must give the same score for the same model"):
        fallback(Net(), evaluate, order.quantized_score, order=order, progress=False)


# ---- comparisons


def test_error_propagation_is_its_definition() -> None:
    model, quantized = Net(), replace_linear(Net())
    found = error_propagation(model, quantized, [X[:40], X[40:]], progress=False)
    assert [record.name for record in found] == ["first", "bad", "last", "output"]
    with torch.no_grad():
        x, y = model(X).double().flatten(), quantized(X).double().flatten()
    last = found[-1]
    assert math.isclose(last.mse, float((x - y).square().mean()), rel_tol=1e-9)
    assert math.isclose(last.cosine, float(x @ y / (x.norm() * y.norm())), rel_tol=1e-9)
    assert math.isclose(last.sqnr, float(10 * torch.log10(x.square().sum() / (x - y).square().sum())), rel_tol=1e-9)
    assert found[0].sqnr > 30 and found[1].sqnr < 20
    same = error_propagation(model, model, [X], progress=False)
    assert all(record.mse == 0 and record.sqnr == math.inf for record in same)
    assert all(m.training and not m._forward_hooks for m in (*model.modules(), *quantized.modules()))


def test_compare_samples_finds_those_that_change_most() -> None:
    model, quantized = Net(), replace_linear(Net())
    texts = [f"text {i}" for i in range(64)]
    found = compare_samples(model, quantized, [X[:40], X[40:]], texts, top=5, progress=False)
    with torch.no_grad():
        a, b = model(X), quantized(X)
    changed = a.argmax(1) != b.argmax(1)
    mse = (a - b).square().mean(1)
    expected = sorted(range(64), key=lambda i: (not changed[i], -mse[i]))[:5]
    assert [record.index for record in found] == expected
    assert [record.text for record in found] == [texts[i] for i in expected]
    assert found[0].float_output == a[expected[0]].tolist() and found[0].quantized_output == b[expected[0]].tolist()
    assert [record.changed for record in found] == changed[expected].tolist()


def test_another_answer_comes_before_a_larger_error() -> None:
    class Table(nn.Module):
        def __init__(self, rows: list[list[float]]) -> None:
            super().__init__()
            self.rows = torch.tensor(rows)

        def forward(self, x: Tensor) -> Tensor:
            return self.rows

    found = compare_samples(Table([[9.0, 0.0], [0.1, 0.0]]), Table([[5.0, 0.0], [0.0, 0.1]]), [X], progress=False)
    assert [(record.index, record.changed) for record in found] == [(1, True), (0, False)]


def test_range_report_sees_the_outlier() -> None:
    found = range_report(Net(), [X[:40], X[40:]], progress=False)
    worst = found[0]
    with torch.no_grad():
        inputs = Net().first(X)
    assert worst.name == "bad" and worst.outlier_driven and worst.worst_channel == 5 and worst.outlier_ratio > 1000
    assert (worst.lo, worst.hi) == (inputs.min(), inputs.max()) and worst.step == (worst.hi - worst.lo) / 255
    assert not any(record.outlier_driven for record in found[1:]) and worst.clipped == 0
    for record in found:
        assert sum(record.input_counts) == 64 * dict(Net().named_modules())[record.name].in_features
        assert len(record.input_edges) == len(record.input_counts) + 1 <= 65
    narrow = pyqkern.calibrate(Net(), [X], "percentile", progress=False)
    clipped = {record.name: record.clipped for record in range_report(Net(), [X], narrow, progress=False)}
    values = X.flatten()
    share = float(((values < narrow["first"].lo) | (values > narrow["first"].hi)).double().mean())
    # Whole bins of 1/1024 of a unit are counted: values in the two bins of the bounds may be on either side.
    assert abs(clipped["first"] - share) <= 4 / 1024


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: error_propagation(Net(), Net(), []), ValueError, "batches must hold at least one batch, got none"),
        (lambda: compare_samples(Net(), Net(), []), ValueError, "batches must hold at least one batch"),
        (lambda: range_report(Net(), []), ValueError, "batches must hold at least one batch"),
        (
            lambda: error_propagation(Net(), nn.Sequential(nn.Linear(16, 4)), [X]),
            ValueError,
            "must have the same layers",
        ),
        (lambda: error_propagation(Net(), Net(), [X * math.nan]), ValueError, "first: outputs must be finite"),
        (lambda: range_report(Net(), [X * math.nan]), ValueError, "NaN or an infinity at the input of first"),
        (lambda: compare_samples(Net(), Net(), [X], ["one"]), ValueError, "texts must name every sample, got 1"),
        (lambda: compare_samples(Net(), Net(), [X], top=0), ValueError, "top must be at least 1"),
        (lambda: report("nothing.html"), ValueError, "a report must have at least one analysis"),
    ],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
    assert not Path("nothing.html").exists()


# ---- records and the report


def test_records_are_plain_data(tmp_path: Path) -> None:
    for name, records in net_analyses().items():
        if name == "fallback":
            continue
        assert json.loads(json.dumps(records.to_dict())) and str(records).splitlines()[0].split()
        records.to_csv(tmp_path / "records.csv")
        with (tmp_path / "records.csv").open() as file:
            rows = list(csv.reader(file))
        assert rows[0] == records.columns and len(rows) == 1 + len(records)


def test_drawing_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    records = error_propagation(Net(), Net(), [X], progress=False)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match=r'drawing needs matplotlib: pip install "pyqkern\[analysis\]"'):
        records.plot()


def test_static_schemes_are_analyzed_with_their_ranges() -> None:
    ranges = pyqkern.calibrate(Net(), [X], "minmax", progress=False)
    found = sensitivity(Net(), Closeness(), Int8Static(ranges), progress=False)
    assert found[0].name == "bad" and len(found) == 3


# ---- the command


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("classifier")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(
        vocab_file=str(folder / "vocab.txt"), vocab={w: i for i, w in enumerate(words)}
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1},
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    lines = [
        "text,category",
        *(f'"{" ".join("abcdefghij"[i % 10 : i % 10 + 4])}",{"yes" if i % 2 else "no"}' for i in range(30)),
    ]
    (folder / "data.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("options", [["--label-column", "category"], ["--scheme", "int8-static"]])
def test_analyze(classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    require("matplotlib", "the report draws with it")
    output = tmp_path / "out.html"
    arguments = ["analyze", str(classifier), "--data", str(classifier / "data.csv"), "--limit", "20", *options]
    assert main([*arguments, "--output", str(output), "--tolerance", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "what it loses when one linear alone is quantized" in text and f"written: {output}" in text
    rows = [line.rsplit(maxsplit=2) for line in text.splitlines()]  # of the first table: metric, float, quantized
    assert (
        (rows[2][0] == "accuracy")
        if "--label-column" in options
        else (rows[2][:2] == ["agreement with the float model", "1.0000"])
    )
    assert "with 0 linears in float" in text and "base64" in output.read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere", "--data", "DATA"], "MODEL must be a folder as save_pretrained writes it, got 'nowhere'"),
        (["MODEL", "--data", "nowhere.csv"], "nowhere.csv"),
        (
            ["MODEL", "--data", "DATA", "--text-column", "sentence"],
            "must have a column 'sentence', got 'text', 'category'",
        ),
        (["MODEL", "--data", "DATA", "--label-column", "text"], "labels must be names in the model's config.label2id"),
        (["MODEL", "--data", "DATA", "--scheme", "int3"], "scheme must be one of"),
    ],
)
def test_analyze_says_what_is_wrong(
    classifier: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    places = {"MODEL": str(classifier), "DATA": str(classifier / "data.csv")}
    assert main(["analyze", *(places.get(argument, argument) for argument in arguments)]) == 1
    assert message in capsys.readouterr().err


def test_analyze_suspects_labels_that_the_float_model_never_gives(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require("matplotlib", "the report draws with it")
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([100.0, -100.0]))  # always "no"
    model.save_pretrained(tmp_path / "model")
    for file in classifier.glob("*tokenizer*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    for answer, said in (("yes", True), ("no", False)):
        (tmp_path / "data.csv").write_text(f"text,category\na b,{answer}\n")
        arguments = ["analyze", str(tmp_path / "model"), "--data", str(tmp_path / "data.csv")]
        assert main([*arguments, "--label-column", "category", "--output", str(tmp_path / "out.html")]) == 0
        warning = "The float model is right on 0.0% of the texts, no more than guessing one of 2 labels"
        assert (warning in capsys.readouterr().err) == said == (warning in (tmp_path / "out.html").read_text())


def test_range_report_at_its_thresholds() -> None:
    """An outlier of 100 times the rest: the step is 200 / 255 of the spread. And a range that cuts only the top."""
    x = torch.ones(64, 8)
    x[::2] = -1
    x[:, 3] *= 100
    linear = nn.Sequential(nn.Linear(8, 8))
    whole = range_report(linear, [x], progress=False)[0]
    assert whole.outlier_driven and math.isclose(whole.coarseness, 200 / 255, rel_tol=1e-6) and whole.clipped == 0
    x[:, 3] = x[:, 2] * 20
    assert not range_report(linear, [x], progress=False)[0].outlier_driven  # 40 / 255
    ranges = pyqkern.Ranges({"0": Range(torch.tensor(-20.0), torch.tensor(10.0))}, "minmax")
    assert range_report(linear, [x], ranges, progress=False)[0].clipped == 32 / (64 * 8)


@pytest.mark.parametrize(
    "labels, names, expected",
    [
        (["b", "a"], {"a": 0, "b": 1}, [1, 0]),
        (["1", "0"], {"LABEL_0": 0, "LABEL_1": 1}, [1, 0]),
        (["y", "x", "y"], {"LABEL_0": 0, "LABEL_1": 1}, [1, 0, 1]),
    ],
)
def test_labels(labels: list[str], names: dict[str, int], expected: list[int]) -> None:
    assert label_ids(labels, names).tolist() == expected
