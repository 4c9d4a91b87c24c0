"""calibrate: each observer against its definition in plain torch, and against torch.ao's and ONNX Runtime's where they
define the same. "entropy" and "mse" are not the same elsewhere: ONNX Runtime's entropy bins either sign by itself, and
torch.ao's HistogramObserver searches other candidates."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from require import require
from strategies import FINITE, floats, generator, seeds
from torch import Tensor, nn

import pyqkern
from pyqkern import Ranges, calibrate
from pyqkern.calibration.observers import (
    BINS,
    ENTROPY_LEVELS,
    ENTROPY_SMOOTHING,
    OBSERVERS,
    STEPS,
    Entropy,
    Histogram,
    MeanSquare,
    Observer,
    Percentile,
    quantization_error,
)
from pyqkern.schemes import Range

# Sizes of batches [rows, channels] of one tensor; values of any magnitude, outliers included.
batch_sizes = st.lists(st.integers(1, 12), min_size=1, max_size=5)


def batches(sizes: list[int], seed: int, channels: int = 7) -> list[Tensor]:
    g = generator(seed)
    scales = 10.0 ** torch.randint(-3, 4, (len(sizes),), generator=g)
    made = [torch.randn(n, channels, generator=g) * s for n, s in zip(sizes, scales, strict=True)]
    if seed % 3 == 0:
        made = [x.relu() for x in made]
    return made


def observed(observer: Observer, values: list[Tensor]) -> Observer:
    for x in values:
        observer.observe(x)
    return observer


@given(sizes=batch_sizes, seed=seeds, per_channel=st.booleans())
def test_minmax(sizes: list[int], seed: int, per_channel: bool) -> None:
    values = batches(sizes, seed)
    lo, hi = observed(OBSERVERS["minmax"](per_channel), values).range()
    x = torch.cat(values)
    expected = (x.amin(0), x.amax(0)) if per_channel else (x.min(), x.max())
    assert torch.equal(lo, expected[0]) and torch.equal(hi, expected[1])


@given(sizes=batch_sizes, seed=seeds, per_channel=st.booleans())
def test_moving_average_is_that_of_torch(sizes: list[int], seed: int, per_channel: bool) -> None:
    values = batches(sizes, seed)
    lo, hi = observed(OBSERVERS["moving_average"](per_channel), values).range()
    ao = torch.ao.quantization.observer
    theirs = (
        ao.MovingAveragePerChannelMinMaxObserver(averaging_constant=0.01, ch_axis=1)
        if per_channel
        else ao.MovingAverageMinMaxObserver(averaging_constant=0.01)
    )
    for x in values:
        theirs(x)
    assert torch.equal(lo, theirs.min_val) and torch.equal(hi, theirs.max_val)


@given(sizes=batch_sizes, seed=seeds, per_channel=st.booleans())
def test_minmax_is_that_of_torch(sizes: list[int], seed: int, per_channel: bool) -> None:
    values = batches(sizes, seed)
    lo, hi = observed(OBSERVERS["minmax"](per_channel), values).range()
    ao = torch.ao.quantization.observer
    theirs = ao.PerChannelMinMaxObserver(ch_axis=1) if per_channel else ao.MinMaxObserver()
    for x in values:
        theirs(x)
    assert torch.equal(lo, theirs.min_val) and torch.equal(hi, theirs.max_val)


def onnxruntime_ranges(values: list[Tensor], folder: Path, **options: Any) -> tuple[Tensor, Tensor]:
    """lo and hi from ONNX Runtime's MinMaxCalibrater, which watches the input of a model that passes it on."""
    import onnx
    from onnxruntime import quantization

    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, values[0].shape[1]]) for name in "xy"
    ]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "pass", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    calibrator = quantization.create_calibrator(
        folder / "model.onnx", augmented_model_path=str(folder / "augmented.onnx"), extra_options=options
    )
    inputs = [{"x": x.numpy()} for x in values]
    for part in [[one] for one in inputs] if options["moving_average"] else [inputs]:  # it averages between calls
        calibrator.collect_data(reader_of(part))
    lo, hi = calibrator.compute_data().data["x"].range_value
    return torch.as_tensor(lo), torch.as_tensor(hi)


def reader_of(inputs: list[dict[str, Any]]) -> Any:
    """What ONNX Runtime calls a CalibrationDataReader."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            return inputs.pop(0) if inputs else None

    return Reader()


@pytest.mark.parametrize("name, per_channel", [("minmax", False), ("minmax", True), ("moving_average", False)])
@settings(max_examples=10)
@given(sizes=batch_sizes, seed=seeds)
def test_ranges_are_those_of_onnxruntime(
    tmp_path_factory: pytest.TempPathFactory, name: str, per_channel: bool, sizes: list[int], seed: int
) -> None:
    require("onnxruntime", "ranges are not compared with its calibrators'")
    require("onnx", "onnxruntime's calibrators need it")
    values = batches(sizes, seed)
    lo, hi = observed(OBSERVERS[name](per_channel), values).range()
    folder = tmp_path_factory.mktemp("onnx")
    moving = name == "moving_average"
    theirs = onnxruntime_ranges(values, folder, per_channel=per_channel, moving_average=moving)
    assert torch.equal(lo.flatten(), theirs[0].flatten()) and torch.equal(hi.flatten(), theirs[1].flatten())


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(20, 200), min_size=1, max_size=3), seed=seeds)
def test_percentiles_are_those_of_onnxruntime_within_a_bin_of_each(sizes: list[int], seed: int) -> None:
    require("onnxruntime", "percentiles are not compared with its calibrator's")
    from onnxruntime.quantization.calibrate import HistogramCollector

    x = torch.cat(batches(sizes, seed))
    assume(x.numel() % 1000)  # else the rank is a whole number, which its sum of floats can miss
    observer = Percentile()
    lo, hi = observed(observer, [x]).range()
    percentile = Percentile.upper - Percentile.lower  # so much in the middle, the rest halved
    collector = HistogramCollector("percentile", False, 2048, 128, percentile, None)
    collector.collect({"x": x.numpy()})
    theirs = [float(end) for end in collector.compute_collection_result()["x"][:2]]
    # Both take an edge of the bin that holds the percentile: we the outer one, they the left one.
    slack = float(observer.width[0]) + 2 * float(x.abs().max()) / 2048
    slack += 2.0**-22 * float(x.abs().max())  # their edges are rounded to fp32
    assert abs(float(lo) - theirs[0]) <= slack and abs(float(hi) - theirs[1]) <= slack


@given(
    sizes=batch_sizes, seed=seeds, per_channel=st.booleans(), extremes=st.sampled_from([[], [1e-45, -1e-45], FINITE])
)
def test_histogram_counts_every_value_in_its_bin(
    sizes: list[int], seed: int, per_channel: bool, extremes: list[float]
) -> None:
    values = (
        [floats((n, 7), seed + i, extremes=extremes) for i, n in enumerate(sizes)] if extremes else batches(sizes, seed)
    )
    histogram = Histogram(per_channel)
    observed(histogram, values)
    x = torch.cat(values).double()
    for channel, counts in enumerate(histogram.counts):
        column = x[:, channel] if per_channel else x.flatten()
        absmax = column.abs().max()
        width = 2.0 ** max(-100, math.frexp(float(absmax))[1]) / histogram.bins
        assert float(histogram.width[channel]) == width
        bins = (column / width).floor().long() + histogram.bins
        assert torch.equal(counts, torch.bincount(bins, minlength=2 * histogram.bins))


@pytest.mark.parametrize("name", ["minmax", "percentile", "mse", "entropy"])
@settings(max_examples=5)
@given(sizes=batch_sizes, seed=seeds, order=st.randoms())
def test_the_order_of_the_batches_changes_nothing(name: str, sizes: list[int], seed: int, order: Any) -> None:
    values = batches(sizes, seed)
    first = observed(OBSERVERS[name](), values).range()
    joined = observed(OBSERVERS[name](), [torch.cat(values)]).range()
    order.shuffle(values)
    again = observed(OBSERVERS[name](), values).range()
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, joined, strict=True))


@given(sizes=st.lists(st.integers(20, 200), min_size=1, max_size=3), seed=seeds)
def test_percentile_encloses_the_quantiles_within_a_bin(sizes: list[int], seed: int) -> None:
    values = batches(sizes, seed)
    observer = Percentile()
    lo, hi = observed(observer, values).range()
    x = torch.cat(values).flatten().double().sort().values
    width = float(observer.width[0])
    low = float(x[math.ceil(len(x) * 0.001) - 1])
    high = float(x[math.ceil(len(x) * 0.999) - 1])
    # The rank's value lies in the bin whose outer edge is taken; fp32 rounds the edge once.
    slack = 2.0**-24 * float(x.abs().max())
    assert low - width - slack <= float(lo) <= low + slack
    assert high - slack <= float(hi) <= high + width + slack


def plain_error(x: Tensor, lo: float, hi: float) -> float:
    """The squared error of uint8 quantization, by torch.fake_quantize's formula in float64."""
    scale = (hi - lo) / 255 or 1.0
    zero = round(-lo / scale)
    q = ((x / scale).add(zero).round().clamp(0, 255) - zero) * scale
    return float((q - x).square().sum())


@settings(max_examples=20)
@given(sizes=batch_sizes, seed=seeds, outlier=st.sampled_from([1.0, 10.0, 300.0]))
def test_mse_cannot_be_bettered_by_moving_one_end(sizes: list[int], seed: int, outlier: float) -> None:
    values = batches(sizes, seed)
    values[0][0, 0] *= outlier
    observer = MeanSquare()
    lo, hi = (float(v) for v in observed(observer, values).range())
    x = torch.cat(values).flatten().double()
    low, high = float(x.min()), float(x.max())
    counts, centers = observer.counts[0].double(), observer.centers[0].clamp(low, high)
    low, high = min(low, 0.0), max(high, 0.0)
    lo, hi = min(lo, 0.0), max(hi, 0.0)

    def error(a: float, b: float) -> float:
        ends = torch.tensor([[a], [b]], dtype=torch.float64)
        return float(quantization_error(centers, counts, ends[0], ends[1])[0])

    least = error(lo, hi) * (1 + 1e-5) + 1e-30  # lo and hi were rounded to fp32
    for step in range(1, STEPS + 1):
        assert least >= error(lo, hi) and error(low * step / STEPS, hi) * (1 + 1e-5) >= error(lo, hi) * (1 - 1e-4)
        assert error(lo, high * step / STEPS) * (1 + 1e-5) >= error(lo, hi) * (1 - 1e-4)
    assert error(lo, hi) <= error(low, high) * (1 + 1e-4) + 1e-30


@given(seed=seeds, lo=st.floats(-100, 0), hi=st.floats(0, 100))
def test_quantization_error_is_that_of_the_values(seed: int, lo: float, hi: float) -> None:
    x = floats((50,), seed).double().clamp(-200, 200)
    ends = torch.tensor([[lo], [hi]], dtype=torch.float64)
    assert math.isclose(
        float(quantization_error(x, torch.ones(50, dtype=torch.float64), ends[0], ends[1])[0]),
        plain_error(x, lo, hi),
        rel_tol=1e-9,
        abs_tol=1e-12,
    )


def plain_entropy(x: Tensor, width: float) -> float:
    """The threshold of least KL divergence, by loops."""
    index = [int(v) for v in torch.where(x < 0, -(x / width).floor() - 1, (x / width).floor())]
    counts = [0.0] * BINS
    for i in index:
        counts[i] += 1
    used = max(i for i in range(BINS) if counts[i]) + 1
    best, threshold = math.inf, 0.0
    for stop in sorted({used, *range(min(ENTROPY_LEVELS, used), used, max(1, BINS // 256))}):
        p = counts[:stop]
        p[-1] += sum(counts[stop:])
        levels: dict[int, list[int]] = {}
        for i in range(stop):
            levels.setdefault(i * ENTROPY_LEVELS // max(stop, ENTROPY_LEVELS), []).append(i)
        q = [0.0] * stop
        for members in levels.values():
            filled = [i for i in members if counts[i]]
            for i in filled:
                q[i] = sum(counts[j] for j in filled) / len(filled)
        total_p, total_q = sum(p), max(1.0, sum(q))
        divergence = sum(
            a / total_p * math.log((a / total_p) / max(b / total_q, ENTROPY_SMOOTHING))
            for a, b in zip(p, q, strict=True)
            if a
        )
        if divergence < best - 1e-12:
            best, threshold = divergence, stop * width
    return threshold


@settings(max_examples=5)
@given(seed=seeds, outlier=st.sampled_from([1.0, 5.0, 40.0]))
def test_entropy_is_its_definition(seed: int, outlier: float) -> None:
    x = torch.randn(1, 3000, generator=generator(seed))
    x[0, 0] *= outlier
    observer = Entropy()
    lo, hi = observed(observer, [x]).range()
    threshold = plain_entropy(x.flatten().double(), float(observer.width[0]))
    assert float(lo) == max(float(x.min()), -threshold) and float(hi) == min(float(x.max()), threshold)


@pytest.mark.parametrize("name", OBSERVERS)
def test_per_channel_is_each_channel_alone(name: str) -> None:
    x = floats((40, 3), 5)
    lo, hi = observed(OBSERVERS[name](per_channel=True), [x[:25], x[25:]]).range()
    for channel in range(3):
        alone = OBSERVERS[name](per_channel=True)
        one = observed(alone, [x[:25, channel : channel + 1], x[25:, channel : channel + 1]]).range()
        assert torch.equal(lo[channel : channel + 1], one[0]) and torch.equal(hi[channel : channel + 1], one[1])


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("values", [torch.zeros(3, 4), torch.full((3, 4), 2.5), torch.full((2, 4), -1e-42)])
@pytest.mark.parametrize("per_channel", [False, True])
def test_constant_tensors_have_a_range_around_the_value(name: str, values: Tensor, per_channel: bool) -> None:
    lo, hi = observed(OBSERVERS[name](per_channel), [values]).range()
    assert (lo <= hi).all() and (lo >= values.min()).all() and (hi <= values.max()).all()


def test_memory_does_not_grow_with_the_batches() -> None:
    observer = MeanSquare()
    for i in range(50):
        observer.observe(torch.randn(4, 8) * (i + 1))
    assert observer.counts.shape == (1, 2 * BINS) and int(observer.counts.sum()) == 50 * 32


# ---- a model


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.GELU(), nn.Dropout(0.5)), nn.Linear(8, 3))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_ranges_are_those_of_the_inputs() -> None:
    model = network()
    model.train()
    data = [torch.randn(5, 6) for _ in range(3)]
    ranges = calibrate(model, data, "minmax", progress=False)
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    x = torch.cat(data)
    model.eval()  # as calibrate runs it: without dropout
    hidden = model[1](model[0](x))
    assert list(ranges) == ["0", "2"] and ranges.observer == "minmax" and ranges.not_reached == ()
    assert (ranges["0"].lo, ranges["0"].hi) == (x.min(), x.max())
    assert (ranges["2"].lo, ranges["2"].hi) == (hidden.min(), hidden.max())


@pytest.mark.parametrize(
    "shape", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"input": x}, lambda x: x.view(5, 1, 6)]
)
def test_batches_may_be_tensors_tuples_or_dicts(shape: Callable[[Tensor], Any]) -> None:
    x = torch.randn(5, 6)
    assert calibrate(network(), iter([shape(x)]), "minmax", progress=False)["0"].hi == x.max()


@given(seed=seeds, per_channel=st.booleans())
def test_json_gives_back_the_same_bits(seed: int, per_channel: bool) -> None:
    lo, hi = floats((2, 5) if per_channel else (2,), seed).sort(0).values
    ranges = Ranges({"a.b": Range(lo, hi)}, "mse", ["c"])
    again = Ranges.from_dict(json.loads(json.dumps(ranges.to_dict())))
    assert torch.equal(again["a.b"].lo, lo) and torch.equal(again["a.b"].hi, hi)
    assert (again.observer, again.not_reached) == ("mse", ("c",)) and again["a.b"].lo.dtype is torch.float32


def test_saved_and_loaded(tmp_path: Path) -> None:
    ranges = calibrate(network(), [torch.randn(5, 6)], progress=False)
    ranges.save(tmp_path / "ranges.json")
    again = Ranges.load(tmp_path / "ranges.json")
    assert again.to_dict() == ranges.to_dict() and [p.name for p in tmp_path.iterdir()] == ["ranges.json"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("nonsense", "must be JSON"),
        ("[]", 'must be an object with "observer" and "ranges"'),
        ('{"ranges": {"a": {"lo": 0}}}', r"ranges\['a'\] must hold numbers lo and hi"),
        ('{"ranges": {"a": {"lo": "x", "hi": 1}}}', r"ranges\['a'\] must hold numbers"),
        ('{"ranges": {"a": {"lo": 2, "hi": 1}}}', r"ranges\['a'\] must have finite lo <= hi"),
        ('{"ranges": {"a": {"lo": NaN, "hi": 1}}}', r"ranges\['a'\] must have finite lo <= hi"),
        ('{"ranges": {"a": {"lo": [0, 0], "hi": [1]}}}', r"ranges\['a'\] must have finite lo <= hi of one shape"),
    ],
)
def test_loading_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "ranges.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Ranges.load(tmp_path / "ranges.json")


def test_a_layer_never_reached_is_kept_in_float_and_said_so() -> None:
    model = Unused()
    with pytest.warns(UserWarning, match="did not reach 1 linears, which have no range: unused"):
        ranges = calibrate(model, [torch.randn(2, 4)], progress=False)
    assert ranges.not_reached == ("unused",) and list(ranges) == ["used"]
    pyqkern.replace_linear(model, pyqkern.schemes.Int8Static(ranges))
    reasons = {record.name: (record.scheme, record.reason) for record in pyqkern.summary(model).records}
    assert reasons == {"used": ("int8-static", None), "unused": (None, "not reached in calibration")}


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m: calibrate(m, []), ValueError, "batches must hold at least one batch, got none"),
        (lambda m: calibrate(m, iter(())), ValueError, "batches must hold at least one batch"),
        (
            lambda m: calibrate(m, [torch.randn(2, 6)], "max"),
            ValueError,
            "observer must be one of 'minmax', .* got 'max'",
        ),
        (
            lambda m: calibrate(m, [torch.randn(2, 6), torch.full((2, 6), float("nan"))]),
            ValueError,
            "batch 1 must give finite values, got NaN or an infinity at the input of 0",
        ),
        (lambda m: calibrate(m, [torch.full((2, 6), float("inf"))]), ValueError, "batch 0 must give finite values"),
        (
            lambda m: calibrate(nn.ReLU(), [torch.randn(2)]),
            ValueError,
            "model must have linears to calibrate, got none in",
        ),
        (lambda m: calibrate("model", [torch.randn(2)]), TypeError, "model must be an nn.Module, got str"),
    ],
)
def test_bad_input(call: Callable[[nn.Module], object], error: type[Exception], message: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        call(model)
    assert all(not module._forward_pre_hooks for module in model.modules()) and model.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
