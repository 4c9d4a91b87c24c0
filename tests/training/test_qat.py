"""The twins of quantization-aware training: what they compute is what they convert to, and their gradients."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FLOATS, floats, generator, seeds
from torch import Tensor, nn
from torch.nn import functional

import pyqkern
from pyqkern.schemes import FP4, NF4, Int4, Int8, Int8Static, Int8WeightOnly, Range, Scheme, get_scheme
from pyqkern.training import convert, prepare

EPS = 2.0**-24  # half an ulp of fp32, relative
SCHEMES: list[Scheme] = [
    Int8(), Int8(activation_bits=7), Int8(symmetric=True, clip_weights=True), Int8Static(),
    Int8Static(clip_weights=True, activation_bits=7), Int8WeightOnly(), Int8WeightOnly(clip_weights=True), NF4(),
    NF4(blocksize=32, double_quant=True), NF4(compute="fp32"), FP4(blocksize=256), Int4(group_size=32),
]  # fmt: skip
TABLES = [scheme for scheme in SCHEMES if scheme.embeds]
RECURRENT = [Int8(), Int8(activation_bits=7), NF4(), Int4(group_size=32)]


def ranges_of(scheme: Scheme) -> dict[str, Range] | None:
    return {"": Range(torch.tensor(-1.0), torch.tensor(2.0))} if scheme.needs_ranges else None


def linear_of(n: int, k: int, seed: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(floats((n, k), seed))
        if bias:
            linear.bias.copy_(floats((n,), seed + 1))
    return linear


def same_states(a: nn.Module, b: nn.Module) -> None:
    one, other = a.state_dict(), b.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# ---- codes and outputs


@settings(max_examples=40)
@given(
    n=st.sampled_from([1, 5, 16, 40]), k=st.sampled_from([32, 64, 96, 256]), m=st.sampled_from([1, 3, 33]), seed=seeds,
    scheme=st.sampled_from(SCHEMES), dtype=st.sampled_from(FLOATS), bias=st.booleans(),
)  # fmt: skip
def test_a_linear_has_the_codes_and_the_outputs_that_it_trains_with(
    isa: str, n: int, k: int, m: int, seed: int, scheme: Scheme, dtype: torch.dtype, bias: bool
) -> None:
    """Bit for bit: the forward pass of the twin is that of the quantized layer."""
    linear, x = linear_of(n, k, seed, dtype, bias), torch.randn(m, k, generator=generator(seed)).to(dtype)
    expected = pyqkern.replace_linear(copy.deepcopy(linear), scheme, ranges=ranges_of(scheme))
    twin: Any = prepare(copy.deepcopy(linear), scheme, ranges=ranges_of(scheme))
    assert isinstance(twin, nn.Linear) and torch.equal(twin.weight, linear.weight)
    in_training, in_eval = twin.train()(x), twin.eval()(x)
    converted = convert(twin)
    same_states(converted, expected)
    with torch.no_grad():
        assert torch.equal(converted(x), in_training) and torch.equal(in_eval, in_training)
    assert converted(x).dtype == dtype


@pytest.mark.parametrize("scheme", TABLES, ids=str)
@pytest.mark.parametrize("width", [32, 96])
def test_an_embedding(isa: str, scheme: Scheme, width: int) -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[3, 0, 7], [3, 3, 19]])
    for module, of in (
        (nn.Embedding(20, width, padding_idx=0), nn.Embedding),
        (nn.EmbeddingBag(20, width, mode="mean"), nn.EmbeddingBag),
        (nn.EmbeddingBag(20, width, mode="max", padding_idx=3), nn.EmbeddingBag),
    ):  # fmt: skip
        twin: Any = prepare(copy.deepcopy(module), scheme)
        assert isinstance(twin, of)
        y = twin(ids)
        y.sum().backward()
        reference = copy.deepcopy(module)
        if not getattr(scheme, "clip_weights", False):  # the mode "max" chooses by the quantized values
            reference.weight.data = pyqkern.replace_embedding(copy.deepcopy(module), scheme).weight.data
            reference(ids).sum().backward()
            assert torch.allclose(twin.weight.grad, reference.weight.grad, rtol=8 * EPS, atol=0)
        expected = pyqkern.replace_embedding(copy.deepcopy(module), scheme)
        converted = convert(twin)
        same_states(converted, expected)
        assert torch.equal(converted(ids), y)


# ---- gradients


class Through(torch.autograd.Function):
    """What quantizing gives, with the gradient of the identity: the straight-through rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor) -> Tensor:
        return quantized

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@settings(max_examples=25)
@given(
    n=st.sampled_from([1, 16, 40]), k=st.sampled_from([32, 96]), m=st.sampled_from([1, 5, 33]), seed=seeds,
    scheme=st.sampled_from([scheme for scheme in SCHEMES if not getattr(scheme, "clip_weights", False)]),
)  # fmt: skip
def test_the_gradients_are_those_of_the_straight_through_rule(
    isa: str, n: int, k: int, m: int, seed: int, scheme: Scheme
) -> None:
    """Against plain torch in fp64, which multiplies the dequantized x and weight."""
    g = generator(seed)
    linear, x = linear_of(n, k, seed), torch.randn(m, k, generator=g)
    with torch.no_grad():
        linear.weight.mul_(0.3 / linear.weight.abs().max())
    grad = torch.randn(m, n, generator=g)
    twin: Any = prepare(copy.deepcopy(linear), scheme, ranges=ranges_of(scheme))
    given_x = x.clone().requires_grad_()
    twin(given_x).backward(grad)

    quantized: Any = pyqkern.replace_linear(copy.deepcopy(linear), scheme, ranges=ranges_of(scheme))
    seen, inside = x, torch.ones_like(x, dtype=torch.bool)
    if isinstance(scheme, Int8Static):
        scale, zero = quantized.input_scale, quantized.input_zero_point
        code = (x * (1 / scale) + zero).round()
        inside = (code >= 0) & (code <= 255)
        seen = scale * (code.clamp(0, 255) - zero)
    elif isinstance(scheme, Int8) or (
        not isinstance(scheme, Int8WeightOnly) and scheme.compute != "fp32" and n >= 16 and k % scheme.blocksize == 0
    ):  # type: ignore[attr-defined]
        bits = getattr(scheme, "activation_bits", 8)
        symmetric = getattr(scheme, "symmetric", True)
        seen = torch.ops.pyqkern.fake_quantize_rows(x, k, torch.uint8, symmetric, bits)
    wide_x, wide_w = x.double().requires_grad_(), linear.weight.detach().double().requires_grad_()
    wide_b = linear.bias.detach().double().requires_grad_()
    product = functional.linear(
        Through.apply(wide_x, seen.double()), Through.apply(wide_w, quantized.weight.double()), wide_b
    )
    product.backward(grad.double())
    assert wide_x.grad is not None and wide_w.grad is not None and wide_b.grad is not None
    # A sum of K products in fp32 is within (K + 1) * EPS of the sum of their magnitudes.
    bound_x = (n + 1) * EPS * grad.abs().double() @ quantized.weight.double().abs()
    assert ((given_x.grad - wide_x.grad * inside).abs() <= bound_x).all()
    bound_w = (m + 1) * EPS * grad.abs().double().t() @ seen.double().abs()
    assert ((twin.weight.grad - wide_w.grad).abs() <= bound_w).all()
    assert ((twin.bias.grad - wide_b.grad).abs() <= (m + 1) * EPS * grad.abs().double().sum(0)).all()


def test_no_gradient_where_weights_are_clipped() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 16)
    with torch.no_grad():
        linear.weight[:, 5] = 20.0  # far beyond the rest: the range with the least error leaves it out or keeps it
        linear.weight[3, 5] = 1.0
    twin: Any = prepare(copy.deepcopy(linear), Int8WeightOnly(clip_weights=True))
    twin(torch.ones(2, 64)).sum().backward()
    scale = pyqkern.replace_linear(linear, Int8WeightOnly(clip_weights=True)).weight_scale
    outside = (linear_codes(twin.weight, scale).abs() > 127).detach()
    assert torch.equal(twin.weight.grad == 0, outside) and (twin.weight.grad[~outside] == 2).all()


def linear_codes(weight: Tensor, scale: Any) -> Tensor:
    return (weight * (1 / scale)[:, None]).round()


@pytest.mark.parametrize("scheme", [Int8Static(), Int8Static(activation_bits=7)], ids=str)
def test_learned_ranges_get_the_gradients_of_lsq(scheme: Int8Static) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 16), torch.randn(8, 64) * 2
    twin: Any = prepare(copy.deepcopy(linear), scheme, ranges=ranges_of(scheme), learn_ranges=True)
    twin(x).sum().backward()
    qmax = 255 if scheme.activation_bits == 8 else 127
    weight = pyqkern.replace_linear(linear, scheme, ranges=ranges_of(scheme)).weight
    scale, zero = twin.input_qparams()
    to_x = torch.ones(8, 16) @ weight
    _, by_scale, by_offset = torch.ops.pyqkern.fake_quantize_backward(to_x, x, 64, scale, zero, 0, qmax)
    factor = (64 * qmax) ** -0.5
    assert torch.allclose(twin.input_scale.grad, by_scale * factor, rtol=1e-4)
    assert torch.allclose(twin.input_offset.grad, by_offset * factor, rtol=1e-4)
    assert twin.input_scale.grad.abs() > 0 and twin.input_offset.grad.abs() > 0


def test_a_learned_range_finds_its_place() -> None:
    """A range ten times too wide, of which the output is to be that of the float layer, narrows; codes follow it."""
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 16), torch.randn(64, 64)
    wide = {"": Range(torch.tensor(-30.0), torch.tensor(30.0))}
    twin: Any = prepare(copy.deepcopy(linear), "int8-static", ranges=wide, learn_ranges=True)
    losses = []
    for step in range(60):
        loss = (twin(x) - linear(x).detach()).square().mean()
        losses.append(loss.item())
        loss.backward()
        with torch.no_grad():
            for parameter in (twin.input_scale, twin.input_offset):
                parameter -= 6e-3 * (1 - step / 60) * parameter.grad.sign()
                parameter.grad = None
    assert losses[-1] < losses[0] / 3
    before = twin(x)
    converted: Any = convert(twin)
    assert converted.input_scale < 0.6 * 60 / 255
    assert torch.equal(converted(x), before)


@pytest.mark.parametrize("scheme", RECURRENT, ids=str)
@pytest.mark.parametrize(
    "kind, options",
    [
        (nn.LSTM, {"proj_size": 32, "bidirectional": True}),
        (nn.LSTM, {"num_layers": 2}),
        (nn.GRU, {"bias": False}),
        (nn.RNN, {}),
    ],
)
def test_a_recurrent_layer(scheme: Scheme, kind: type[nn.Module], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer: Any = kind(64, 64, **options)
    x = torch.randn(5, 3, 64)
    expected: Any = pyqkern.replace_recurrent(copy.deepcopy(layer), scheme)
    twin: Any = prepare(copy.deepcopy(layer), scheme)
    y, _ = twin(x)
    y.square().sum().backward()
    quantized, _ = expected(x)
    assert torch.equal(quantized, y)
    # The same gradients as of the float layer, but for what quantizing its weights changes: an angle.
    float_y, _ = layer(x)
    float_y.square().sum().backward()
    cosine = 0.998 if scheme.bits == 8 else 0.9
    for (name, a), b in zip(twin.named_parameters(), layer.parameters(), strict=True):
        assert torch.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0) > cosine, name
    converted: Any = convert(twin)
    same_states(converted, expected)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_the_gradients_to_recurrent_weights(cell: str) -> None:
    """Against steps written out in plain torch, in fp64, with the straight-through rule."""
    torch.manual_seed(0)
    kind: Any = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[cell]
    layer, x = kind(32, 32), torch.randn(4, 2, 32)
    twin: Any = prepare(copy.deepcopy(layer), "int8")
    y, _ = twin(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    quantized: Any = pyqkern.replace_recurrent(copy.deepcopy(layer), "int8")
    weights = [getattr(layer, f"weight_{name}_l0").detach().double().requires_grad_() for name in ("ih", "hh")]
    w_ih, w_hh = (
        Through.apply(w, getattr(quantized, f"weight_{name}_l0").double())
        for w, name in zip(weights, ("ih", "hh"), strict=True)
    )
    b_ih, b_hh = (getattr(layer, f"bias_{name}_l0").detach().double() for name in ("ih", "hh"))

    def seen(v: Tensor) -> Tensor:
        rows = torch.ops.pyqkern.fake_quantize_rows(v.detach().float(), 32, torch.uint8, False)
        return Through.apply(v, rows.double())  # type: ignore[no-any-return]

    h = c = torch.zeros(2, 32, dtype=torch.float64)
    outputs = []
    for t, step in enumerate(x.double()):
        of_x, of_h = functional.linear(seen(step), w_ih, b_ih), functional.linear(seen(h), w_hh, b_hh)
        if cell == "lstm":
            i, f, g, o = (of_x + of_h).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        elif cell == "gru":
            (r, z, n), (r_h, z_h, n_h) = of_x.chunk(3, 1), of_h.chunk(3, 1)
            fresh = (n + (r + r_h).sigmoid() * n_h).tanh()
            h = fresh + (z + z_h).sigmoid() * (h - fresh)
        else:
            h = (of_x + of_h).tanh()
        h = Through.apply(h, y[t].detach().double())  # the very outputs, so that the codes of h are the same
        outputs.append(h)
    torch.stack(outputs).backward(grad.double())
    for name, wide in zip(("ih", "hh"), weights, strict=True):
        assert wide.grad is not None
        difference = (getattr(twin, f"weight_{name}_l0").grad - wide.grad).abs().max()
        assert difference <= 1e-4 * wide.grad.abs().max(), name  # fp32 through four steps and 2 * 32 products


# ---- dtypes


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(scheme: Scheme, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    twin: Any = prepare(nn.Linear(64, 16), scheme, ranges=ranges_of(scheme))
    x = torch.randn(4, 64, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = twin(x)
        y.float().sum().backward()
        converted = convert(copy.deepcopy(twin))
        assert y.dtype is dtype and torch.equal(converted(x), y)
    assert twin.weight.grad.dtype is torch.float32 and x.grad is not None and x.grad.dtype is torch.float32


def test_a_model_that_becomes_bf16() -> None:
    twin: Any = prepare(nn.Linear(64, 16), "int8").bfloat16()
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    y = twin(x)
    y.sum().backward()
    assert twin.weight.grad.dtype is torch.bfloat16 and torch.equal(convert(twin)(x), y)


def test_the_twins_are_of_these_schemes() -> None:
    for name in ("int8", "int8-a7", "int8-weight-only", "nf4", "fp4", "int4"):
        assert isinstance(prepare(nn.Linear(64, 16), name), pyqkern.training.QATLinear)
        assert get_scheme(name).name == name
