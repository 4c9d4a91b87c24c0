"""`weight` of a quantized layer: read like a tensor, never edited in vain, assigned and tied."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from pyqkern import QEmbedding, QLinear, replace_embedding, replace_linear
from pyqkern.backends import Kernels, cuda, reference
from pyqkern.schemes import NF4, Int8Outlier

SCHEMES = ["int8", "int8-weight-only", Int8Outlier(2.0), "nf4", NF4(double_quant=True), "int4"]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=repr)


def made(scheme: object, seed: int = 0, n: int = 20, k: int = 64) -> QLinear:
    torch.manual_seed(seed)
    return QLinear.from_linear(nn.Linear(k, n), scheme).requires_grad_(False)


def embedding() -> QEmbedding:
    return QEmbedding.from_embedding(nn.Embedding(20, 64), "int8")


EDITS: dict[str, Callable[[nn.Module], object]] = {
    "div_": lambda layer: layer.weight.div_(2),
    "data.zero_": lambda layer: layer.weight.data.zero_(),
    "detach().mul_": lambda layer: layer.weight.detach().mul_(3),
    "a view": lambda layer: layer.weight[0].fill_(1),
    "a transposed view": lambda layer: layer.weight.t()[:3].zero_(),
    "one of unbind": lambda layer: layer.weight.unbind()[1].zero_(),
    "an element": lambda layer: layer.weight.__setitem__((0, 0), 1.0),
    "+=": lambda layer: layer.weight.__iadd__(1),
    "data =": lambda layer: setattr(layer.weight, "data", torch.zeros(20, 64)),
    "copy_": lambda layer: layer.weight.copy_(torch.zeros(20, 64)),
    "init.normal_": lambda layer: nn.init.normal_(layer.weight),
    "init.xavier_uniform_": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "init.zeros_ of data": lambda layer: nn.init.zeros_(layer.weight.data),
    "init.kaiming_uniform_, named": lambda layer: nn.init.kaiming_uniform_(tensor=layer.weight, a=1),
    "out=": lambda layer: torch.add(torch.ones(20, 64), 1, out=layer.weight),
    "inplace=": lambda layer: nn.functional.relu(layer.weight, inplace=True),
    "foreach": lambda layer: torch._foreach_mul_([layer.weight], 2.0),
}


@pytest.mark.parametrize("how", EDITS)
@pytest.mark.parametrize("make", [made, lambda _: embedding()], ids=["linear", "embedding"])
def test_an_edit_in_place_raises_and_says_what_to_do(make: Callable[[object], nn.Module], how: str) -> None:
    layer = make("int8")
    before = layer.weight.clone()
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"is a dequantized copy, .* assign a whole one, layer.weight ="),
    ):
        EDITS[how](layer)
    assert torch.equal(layer.weight, before)


def test_numpy_is_read_only() -> None:
    array = made("int8").weight.numpy()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


@each_scheme
def test_it_reads_like_a_tensor(scheme: object) -> None:
    weight = made(scheme).weight
    plain = weight.clone()
    assert type(plain) is Tensor and torch.equal(plain, weight)
    for y in (weight + 1, weight.double(), weight @ weight.T, weight.abs().amax(1), torch.cat([weight, plain])):
        assert type(y) is Tensor
    plain.zero_()  # a copy is the caller's
    torch.empty(20, 64).copy_(weight)
    assert weight.requires_grad_(False).shape == (20, 64)
    assert type(copy.deepcopy(weight)) is Tensor
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), weight)


def test_a_parameter_made_of_it_is_its_makers() -> None:
    layer = nn.Linear(64, 20)
    layer.weight = nn.Parameter(made("int8").weight)
    before = layer.weight.detach().clone()
    layer(torch.ones(2, 64)).sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()
    assert not torch.equal(layer.weight, before)
    assert isinstance(copy.deepcopy(layer).weight, nn.Parameter)


@each_scheme
def test_floats_that_are_assigned_are_quantized(scheme: object) -> None:
    layer, other, x = made(scheme), nn.Linear(64, 20, bias=False), torch.randn(3, 64)
    layer.weight = other.weight.detach()
    expected = QLinear.from_linear(other, scheme)
    assert torch.equal(layer.weight, expected.weight)
    expected.bias = layer.bias
    assert torch.equal(layer(x), expected(x))
    with pytest.warns(UserWarning, match="the two are not tied"):
        layer.weight = other.weight


@each_scheme
def test_a_weight_that_is_assigned_ties_two_layers(scheme: object) -> None:
    """As denoising auto-encoders tie their decoder to the encoder."""
    encoder, decoder = made(scheme, 0), made(scheme, 1)
    decoder.weight = encoder.weight
    assert all(decoder._buffers[name] is encoder._buffers[name] for name in encoder._of_weight)
    assert torch.equal(decoder.weight, encoder.weight)
    head = replace_linear(nn.Sequential(nn.Linear(64, 20)))[0]
    table = replace_embedding(nn.Sequential(nn.Embedding(20, 64)))[0]
    head.weight = table.weight
    assert torch.equal(head.weight, table.weight)


def test_of_another_scheme_it_is_quantized() -> None:
    int8, nf4 = made("int8"), made("nf4", 1)
    nf4.weight = int8.weight
    assert torch.equal(nf4.weight, QLinear.from_linear(as_linear(int8.weight.clone()), "nf4").weight)


def as_linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


@pytest.mark.parametrize(
    "value, error, message",
    [
        (torch.zeros(20, 63), ValueError, r"weight must be \[out_features=20, in_features=64\], got \[20, 63\]"),
        (torch.zeros(20, 64, dtype=torch.float64), TypeError, "weight must be float32, bfloat16 or float16"),
        (torch.full((20, 64), float("nan")), ValueError, "weight must be finite"),
        (torch.zeros(20, 64, device="meta"), ValueError, "weight must hold values"),
        (None, TypeError, "weight must be a tensor, got NoneType"),
    ],
)
def test_what_cannot_be_assigned(value: object, error: type[Exception], message: str) -> None:
    layer = made("int8")
    before = layer.weight.clone()
    with pytest.raises(error, match=message):
        layer.weight = value
    assert torch.equal(layer.weight, before)


# ---- called in every way


def test_keywords() -> None:
    layer, table, x = made("int8"), embedding(), torch.randn(2, 64)
    assert torch.equal(layer(input=x), layer(x)) and torch.equal(layer(x=x), layer(x))
    assert torch.equal(table(input=torch.tensor([1])), table(torch.tensor([1])))
    with pytest.raises(TypeError, match="input must be a tensor"):
        layer()


@pytest.mark.parametrize("scheme", [*SCHEMES[:2], "nf4"], ids=repr)
def test_transforms_of_torch_func(scheme: object) -> None:
    """Derivatives are those of the linear with the dequantized weight."""
    layer = made(scheme).requires_grad_(True)
    x, w = torch.randn(5, 64), layer.weight.clone()
    expected = layer(x).detach()
    torch.testing.assert_close(torch.vmap(layer)(x), expected)
    torch.testing.assert_close(torch.vmap(layer, in_dims=1)(x.T.contiguous()), expected)
    torch.testing.assert_close(torch.func.grad(lambda t: layer(t).sum())(x[0]), w.sum(0))
    torch.testing.assert_close(torch.func.jacrev(layer)(x[0]), w)
    per_sample = torch.vmap(torch.func.grad(lambda t: layer(t).square().sum()))(x)
    torch.testing.assert_close(per_sample, 2 * expected @ w)

    bias = torch.ones(20)
    y = torch.func.functional_call(layer, {"bias": bias}, (x,))
    torch.testing.assert_close(y, expected - layer.bias + bias)
    grads = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).sum())({"bias": bias})
    assert torch.equal(grads["bias"], torch.full((20,), 5.0))
    biases = torch.stack([bias, 2 * bias])
    many = torch.vmap(lambda b: torch.func.functional_call(layer, {"bias": b}, (x,)))(biases)
    torch.testing.assert_close(many[1] - many[0], bias.expand(5, 20))


def test_functional_call_with_a_state_dict_leaves_the_layer_as_it_was() -> None:
    layer, other, x = made("int8"), made("int8", 1), torch.randn(3, 64)
    before = layer(x)
    assert torch.equal(torch.func.functional_call(layer, dict(other.state_dict()), (x,)), other(x))
    assert torch.equal(layer(x), before)


def test_traced_in_grad_mode() -> None:
    layer, x = made("int8").requires_grad_(True), torch.randn(3, 64)
    traced = torch.jit.trace(layer, x)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(x), layer(x).detach())


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_transformer_encoder_with_a_padding_mask(scheme: str) -> None:
    """torch's own fast way would hand nested tensors to the layers."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    padding = torch.tensor([[False] * 5 + [True] * 2, [False] * 7])
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
        y = replace_linear(encoder, scheme)(x, src_key_padding_mask=padding)
    assert (y[~padding] - expected[~padding]).norm() < {"int8": 0.05, "nf4": 0.2}[scheme] * expected[~padding].norm()


# ---- read on another device


def in_the_form_of(kernels: Kernels, layer: QLinear) -> QLinear:
    """As a layer pickled on another device is when map_location has moved its buffers here."""
    other = copy.deepcopy(layer)
    n, k = layer.out_features, layer.in_features
    for key, name in layer._packed.items():
        plain = layer._plain(key).view(-1) if layer.scheme.bits == 4 else layer._plain(key)
        shape = layer._packed_shapes(key, kernels)[0]
        if plain.dim() == 2:
            packed = plain.new_zeros(shape)
            packed[:n, :k] = plain
            plain = packed
        other._buffers[name] = plain.view(shape)
    return other


@each_scheme
@pytest.mark.parametrize("kernels", [reference, cuda], ids=["reference", "cuda"])
def test_a_module_pickled_on_another_device_is_packed_anew(scheme: object, kernels: Kernels) -> None:
    layer, x = made(scheme), torch.randn(3, 64)
    there = in_the_form_of(kernels, layer)
    assert there.packed.shape != layer.packed.shape
    with pytest.raises(ValueError, match=r"must be .* got .*\.to\(\)|must be what int8_pack makes of"):
        there(x)
    file = io.BytesIO()
    torch.save(there, file)
    file.seek(0)
    here = torch.load(file, weights_only=False)
    assert torch.equal(here(x), layer(x)) and torch.equal(here.packed, layer.packed)


def test_an_unknown_form_is_refused() -> None:
    layer = made("nf4")
    layer.packed = layer.packed.view(1, -1)
    with pytest.raises(ValueError, match="save the state_dict instead"):
        copy.deepcopy(layer)


@each_scheme
def test_a_weight_read_in_a_graph_is_a_plain_tensor(scheme: object) -> None:
    """Graphs know no subclass whose writes raise; what they compute is what is computed outside of them."""
    layer, x = made(scheme), torch.randn(3, 64)

    def product(x: Tensor) -> Tensor:
        return x @ layer.weight.t()

    with torch.no_grad():
        expected = product(x)
        assert torch.equal(torch.compile(product, backend="eager", fullgraph=True)(x), expected)
        assert torch.equal(torch.jit.trace(product, x)(x), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        layer._apply(mode.from_tensor)
        assert type(layer.weight) is FakeTensor
