"""The schemes beside "int8": static, weight-only and outlier linears, clipped weights, and smoothing."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FLOATS, INFINITE, NAN, floats, generator, seeds
from torch import Tensor, nn

import pyqkern
from pyqkern import _C, QLinear, calibrate, replace_linear, smooth
from pyqkern.backends import reference
from pyqkern.calibration.calibrate import Ranges
from pyqkern.calibration.smooth import Pair, find_pairs
from pyqkern.nn.int8 import Int8StaticLinear, least_error_scale
from pyqkern.schemes import Int8, Int8Outlier, Int8Static, Range, Scheme, get_scheme

NAMES = ["int8", "int8-static", "int8-weight-only", "int8-outlier"]


def static(linear: nn.Linear, lo: float, hi: float) -> QLinear:
    scheme = Int8Static({"": Range(torch.tensor(lo), torch.tensor(hi))})
    return QLinear.from_linear(linear, scheme)


def same(y: Tensor, expected: Tensor) -> bool:
    """Equal bits; NaN in the same places."""
    return torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.nan_to_num(0), expected.nan_to_num(0))


# ---- int8-static


@settings(max_examples=25)
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 40),
    k=st.sampled_from([1, 3, 4, 31, 63, 64, 65, 130, 257]),
    seed=seeds,
    dtype=st.sampled_from(FLOATS),
    extremes=st.booleans(),
    bounds=st.tuples(st.floats(-50, 0), st.floats(0, 50)),
)
def test_static_is_its_definition(
    isa: str, m: int, n: int, k: int, seed: int, dtype: torch.dtype, extremes: bool, bounds: tuple[float, float]
) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(k, n, dtype=dtype)
    layer = static(linear, *bounds)
    assert isinstance(layer, Int8StaticLinear)
    x = floats((m, k), seed, dtype, INFINITE + NAN + [3e38, -3e38] if extremes else None)
    with torch.no_grad():
        y = layer(x)
    scale, zero = reference.qparams_from_range(torch.tensor([bounds[0]]), torch.tensor([bounds[1]]), torch.uint8, False)
    assert torch.equal(layer.input_scale, scale) and torch.equal(layer.input_zero_point, zero)
    # By scalars of the contract: q = clamp(rint(x * (1/scale) + zero)), exact sum, three float operations.
    value = x.float() * (1 / scale) + zero
    q = torch.where(value.isnan(), 0.0, value.round().clamp(0, 255)).double() - zero
    product = (q @ layer.state_dict()["weight"].double().T).float()
    expected = (scale * layer.weight_scale) * product
    expected = torch.where(x.isfinite().all(1, keepdim=True), expected, torch.nan) + linear.bias.detach().float()
    assert y.dtype is dtype and same(y, expected.to(dtype))


def test_static_gives_the_same_bits_with_two_threads(isa: str, two_threads: None) -> None:
    torch.manual_seed(0)
    layer = static(nn.Linear(256, 512), -3, 3)
    x = torch.randn(300, 256)
    with torch.no_grad():
        y = layer(x)
        assert torch.equal(torch.cat([layer(x[i : i + 7]) for i in range(0, 300, 7)]), y)


def test_static_on_its_own_range_is_as_close_as_half_a_step() -> None:
    """|y - float| <= sum |w| * step/2 + sum |x| * weight_step/2 + both, for values within the range."""
    torch.manual_seed(1)
    linear = nn.Linear(70, 9).double()
    x = torch.randn(50, 70)
    layer = static(linear.float(), float(x.min()), float(x.max()))
    with torch.no_grad():
        error = (layer(x).double() - linear.double()(x.double())).abs()
    # The zero point is rounded, so an end of the range may lie half a step outside of the codes: a step in all.
    step, weight_step = layer.input_scale.double(), layer.weight_scale.double()
    bound = linear.weight.abs().sum(1) * step + (x.double().abs() + step).sum(1, keepdim=True) * weight_step / 2
    assert (error <= bound + 1e-5).all()


def test_static_saves_its_qparams_and_loads_them() -> None:
    layer = static(nn.Linear(70, 5), -2, 3)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert list(state) == ["weight", "bias", "weight_scale", "input_scale", "input_zero_point"]
    empty = Int8StaticLinear(70, 5)
    empty.load_state_dict(state)
    x = floats((3, 70), 1)
    with torch.no_grad():
        assert torch.equal(empty(x), layer(x))
    assert layer.half().input_scale.dtype is torch.float32


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("input_scale", torch.zeros(1), "input_scale must be one float32 > 0 and finite, got float32 .1. with 0.0"),
        ("input_scale", torch.ones(2), "input_scale must be one float32"),
        ("input_scale", torch.full((1,), float("nan")), "input_scale must be one float32 > 0 and finite"),
        (
            "input_zero_point",
            torch.full((1,), 256, dtype=torch.int32),
            r"must be one int32 within \[0, 255\], got .* 256",
        ),
        ("input_zero_point", torch.zeros(1), r"must be one int32 within \[0, 255\]"),
    ],
)
def test_static_refuses_wrong_qparams(key: str, value: Tensor, message: str) -> None:
    layer = static(nn.Linear(70, 5), -2, 3)
    state = {**copy.deepcopy(layer.state_dict()), key: value}
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), before.values(), strict=True))


# ---- weight-only


def test_weight_only_has_the_weights_of_int8() -> None:
    """The product: tests/ops/test_weight_only.py."""
    torch.manual_seed(0)
    linear = nn.Linear(70, 5)
    layer = QLinear.from_linear(linear, "int8-weight-only")
    assert torch.equal(layer.weight, QLinear.from_linear(linear, "int8").weight)


# ---- outliers


@settings(max_examples=25)
@given(
    m=st.integers(1, 20),
    seed=seeds,
    columns=st.sets(st.integers(0, 69), max_size=5),
    dtype=st.sampled_from(FLOATS),
    symmetric=st.booleans(),
)
def test_outlier_columns_go_through_float(
    m: int, seed: int, columns: set[int], dtype: torch.dtype, symmetric: bool
) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(70, 9, dtype=dtype)
    layer = QLinear.from_linear(linear, Int8Outlier(symmetric=symmetric))
    x = (torch.rand(m, 70, generator=generator(seed)) * 12 - 6).to(dtype).clamp(-6, 6)
    chosen = sorted(columns)
    x[0, chosen] = 100.0
    x[-1, chosen] = -100.0
    with torch.no_grad():
        y = layer(x)
        rest = x.float().clone()
        rest[:, chosen] = 0
        codes = layer.state_dict()["weight"]
        inner = reference.int8_linear(rest, codes, layer.weight_scale, linear.bias, "none", symmetric)
        weight = codes.float() * layer.weight_scale[:, None]
        expected = inner.double() + x[:, chosen].double() @ weight[:, chosen].double().T
    # A sum of at most 5 fp32 products and one more: 6 roundings; then one to dtype.
    size = inner.abs() + x[:, chosen].float().abs() @ weight[:, chosen].abs().T
    assert y.dtype is dtype
    eps = torch.finfo(dtype).eps
    assert ((y.double() - expected).abs() <= (6 * 2.0**-23 * size + eps * (expected.abs() + size * 2.0**-20))).all()
    if not chosen:
        with torch.no_grad():
            assert torch.equal(y, QLinear.from_linear(linear, Int8(symmetric=symmetric))(x))


def test_outlier_with_nan_and_infinity_touches_no_other_row() -> None:
    torch.manual_seed(0)
    layer = QLinear.from_linear(nn.Linear(70, 5), "int8-outlier")
    x = torch.randn(4, 70)
    x[1, 3], x[2, 5], x[3, 7] = float("nan"), float("inf"), 50.0
    with torch.no_grad():
        y = layer(x)
        x[1:3] = 0
        assert y[1:3].isnan().all() and torch.equal(y[[0, 3]], layer(x)[[0, 3]])


def test_outliers_do_not_cost_the_others_their_precision() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 64)
    x = torch.randn(32, 256)
    x[:, 17] *= 300
    with torch.no_grad():
        layers = {name: QLinear.from_linear(linear, name) for name in ("int8", "int8-outlier")}
        y = nn.functional.linear(x, layers["int8"].weight, linear.bias)  # without the weight's error, which both have
        errors = {name: float((layer(x) - y).norm()) for name, layer in layers.items()}
    # Per token the step grows from about 6/255 to 300/255 of a unit.
    assert errors["int8-outlier"] < errors["int8"] / 5


# ---- all of them


def scheme(name: str) -> Scheme:
    if name == "int8-static":
        return Int8Static({"": Range(torch.tensor(-4.0), torch.tensor(4.0))})
    return get_scheme(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_scheme_is_a_linear(name: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(70, 5)
    layer = QLinear.from_linear(linear, scheme(name))
    assert isinstance(layer, QLinear) and layer.scheme.name == name and f"scheme={name}" in repr(layer)
    x = floats((2, 3, 70), 1).clamp(-4, 4)
    with torch.no_grad():
        y = layer(x)
        error = (y - linear(x)).norm() / linear(x).norm()
        assert y.shape == (2, 3, 5) and error < 0.02
        assert layer(x[:, :0]).shape == (2, 0, 5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype is torch.bfloat16
        assert torch.equal(copy.deepcopy(layer)(x), y)
    x.requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand_as(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["int8-static", "int8-weight-only", "int8-outlier"])
def test_every_scheme_compiles_in_one_graph(name: str) -> None:
    layer = QLinear.from_linear(nn.Linear(70, 5), scheme(name)).requires_grad_(False)
    x = floats((3, 70), 1)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


@pytest.mark.parametrize("name", NAMES)
def test_clipped_weights(name: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(200, 6)
    with torch.no_grad():
        linear.weight[2, 3] = 20 * linear.weight.abs().max()
    plain = QLinear.from_linear(linear, scheme(name))
    kind = type(plain.scheme)
    clipped_scheme = kind(scheme(name).ranges, True) if kind is Int8Static else kind(clip_weights=True)
    clipped = QLinear.from_linear(linear, clipped_scheme)
    codes = clipped.state_dict()["weight"]
    assert codes.min() >= -127 and (clipped.weight_scale <= plain.weight_scale).all()
    before = (plain.weight - linear.weight).square().sum(1)
    after = (clipped.weight - linear.weight).square().sum(1)
    assert (after <= before * (1 + 1e-6)).all()


@given(seed=seeds, n=st.integers(1, 5), k=st.integers(1, 60))
def test_clipping_takes_the_candidate_of_least_error(seed: int, n: int, k: int) -> None:
    weight = floats((n, k), seed)
    scale = weight.abs().amax(1) / 127
    scale = torch.where(scale == 0, 1.0, scale).clamp(min=2.0**-126)
    chosen = least_error_scale(weight, scale)

    def error(s: Tensor) -> Tensor:
        q = (weight.double() / s.double()[:, None]).round().clamp(-127, 127)
        return (q * s.double()[:, None] - weight.double()).square().sum(1)

    candidates = torch.stack([error((scale * (p / 100)).clamp(min=2.0**-126)) for p in range(30, 101)])
    # The choice was made in fp32: k squares of errors, each rounded a few times.
    assert (error(chosen) <= candidates.min(0).values * (1 + (k + 100) * 2.0**-22) + 1e-30).all()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: QLinear.from_linear(nn.Linear(4, 4), "int8-static"),
            ValueError,
            "int8-static needs the activations' ranges",
        ),
        (
            lambda: replace_linear(nn.Linear(4, 4), "int8-static"),
            ValueError,
            "int8-static needs the activations' ranges",
        ),
        (
            lambda: QLinear.from_linear(nn.Linear(4, 4), Int8Static({"a": Range(torch.zeros(()), torch.ones(()))})),
            ValueError,
            "ranges must hold the one entry '' for a single linear, got .'a'.",
        ),
        (
            lambda: QLinear.from_linear(nn.Linear(4, 4), Int8Static({"": Range(torch.zeros(4), torch.ones(4))})),
            ValueError,
            "int8-static takes one range per tensor, got one per channel",
        ),
        (lambda: Int8Outlier(threshold=0), ValueError, "threshold must be > 0, got 0"),
        (lambda: Int8Outlier(threshold=float("nan")), ValueError, "threshold must be > 0, got nan"),
    ],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ---- smoothing


def encoder(kind: str) -> nn.Module:
    import transformers as t

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    small |= {"vocab_size": 100, "max_position_embeddings": 40}
    made = {
        "bert": lambda: t.BertModel(t.BertConfig(**small)),
        "roberta": lambda: t.RobertaModel(t.RobertaConfig(**small)),
        "electra": lambda: t.ElectraModel(t.ElectraConfig(embedding_size=16, **small)),
        "mpnet": lambda: t.MPNetModel(t.MPNetConfig(**small)),
        "distilbert": lambda: t.DistilBertModel(
            t.DistilBertConfig(vocab_size=100, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=40)
        ),
    }
    model = made[kind]().eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):  # channels of unlike sizes, as a trained model has them
            module.weight.data.mul_(torch.exp2(torch.randn_like(module.weight)))
    return model.requires_grad_(False)


IDS = torch.randint(4, 100, (3, 9), generator=generator(0))


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "mpnet", "distilbert"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothing_keeps_every_bit_of_the_float_model(kind: str, alpha: float) -> None:
    model = encoder(kind)
    ranges = calibrate(model, [IDS], "minmax", per_channel=True, progress=False)
    before = model(IDS, output_hidden_states=True)
    weights = copy.deepcopy(model.state_dict())
    pairs = smooth(model, ranges, alpha)
    assert len(pairs) == 2 * 3
    after = model(IDS, output_hidden_states=True)
    assert torch.equal(before.last_hidden_state, after.last_hidden_state)
    assert all(torch.equal(a, b) for a, b in zip(before.hidden_states, after.hidden_states, strict=True))
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, weights[key])]
    assert sum("value" in key or ".v" in key for key in changed) >= 2 and len(changed) >= (8 if alpha else 4)


def test_smoothing_undoes_outliers_made_in_v() -> None:
    model = encoder("bert")
    with torch.no_grad():
        for layer in model.encoder.layer:
            value, output = layer.attention.self.value, layer.attention.output.dense
            value.weight[::8] *= 300
            value.bias[::8] *= 300
            output.weight[:, ::8] /= 300
    expected = model(IDS).last_hidden_state
    ranges = calibrate(model, [IDS], "minmax", per_channel=True, progress=False)

    def error(m: nn.Module) -> float:
        return float((replace_linear(m)(IDS).last_hidden_state - expected).norm() / expected.norm())

    plain = error(copy.deepcopy(model))
    for shared in (False, True):
        smoothed = copy.deepcopy(model)
        smooth(smoothed, ranges, shared=shared)
        assert error(smoothed) < plain / 5
        hooks = sum(len(module._forward_pre_hooks) for module in smoothed.modules())
        assert hooks == (8 if shared else 0)


def test_smoothing_of_a_given_pair_folds_into_the_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8))
    with torch.no_grad():
        model[0].weight[3] = 100.0
        model[0].bias.normal_()
    x = torch.randn(20, 16)
    expected = model(x)
    ranges = calibrate(model, [x], "minmax", per_channel=True, progress=False)
    smooth(model, ranges, pairs=[Pair("0", ("1",))])
    assert torch.equal(model(x), expected) and not model[1]._forward_pre_hooks
    assert model[0].weight[3] <= 20


def test_smoothed_models_are_copied_quantized_and_calibrated() -> None:
    model = encoder("bert")
    smooth(model, calibrate(model, [IDS], "minmax", per_channel=True, progress=False))
    expected = model(IDS).last_hidden_state
    ranges = calibrate(model, [IDS], progress=False)
    for kind in ("int8", Int8Static(ranges)):
        quantized = replace_linear(copy.deepcopy(model), kind)
        file = io.BytesIO()
        torch.save(quantized, file)
        file.seek(0)
        y = torch.load(file, weights_only=False)(IDS).last_hidden_state
        assert torch.equal(y, quantized(IDS).last_hidden_state)
        assert (y - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, r: smooth(m, r, alpha=1.5), r"alpha must be within \[0, 1\], got 1.5"),
        (lambda m, r: smooth(nn.Sequential(nn.Linear(2, 2)), r), "pairs must name the layers of this model"),
        (lambda m, r: smooth(m, Ranges({}, "minmax")), "ranges must have 'encoder.layer.0.attention.self.query'"),
        (
            lambda m, r: smooth(m, calibrate(m, [IDS], "minmax", progress=False)),
            r"must be per channel \[32\], got \[\]",
        ),
        (
            lambda m, r: smooth(m, r, pairs=[Pair("nothing", ("pooler.dense",))]),
            "'nothing' must have a weight .* no such module",
        ),
        (lambda m, r: smooth(m, r, pairs=[Pair("pooler.dense", ("nothing",))]), "got no module of the name 'nothing'"),
        (
            lambda m, r: smooth(m, r, pairs=[Pair("embeddings.LayerNorm", ("encoder.layer.0.output.dense",))]),
            r"must have a weight \[48, ...\]",
        ),
        (
            lambda m, r: smooth(replace_linear(m), r),
            "a pair's linears must be nn.Linear in the model, got a Int8Linear",
        ),
    ],
)
def test_smoothing_refuses(call: Callable[[nn.Module, Ranges], object], message: str) -> None:
    model = encoder("bert")
    ranges = calibrate(model, [IDS], "minmax", per_channel=True, progress=False)
    before = {key: value.clone() for key, value in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        call(model, ranges)
    assert all(torch.equal(value, before[key]) for key, value in model.named_parameters())
    assert pyqkern.isa() == _C.isa() and len(find_pairs(encoder("bert"))) == 6
