"""torch.func.functional_call with whole layers: what is given takes effect or raises, and the layer stays as it was."""

from typing import Any

import pytest
import torch
from tiny import IDS, SCHEMES, bert
from torch import Tensor, nn
from torch.func import functional_call

from pyqkern import QEmbedding, QEmbeddingBag, QLinear, QRecurrent, optimize
from pyqkern.schemes import NF4, Int4, Int8Static, Range, Scheme

X, IDS_OF_ROWS = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 0, 8])
ALL = [*SCHEMES, "int4", Int8Static({"": Range(torch.tensor(-3.0), torch.tensor(3.0))})]


def made(scheme: Any, seed: int, n: int = 40) -> QLinear:
    torch.manual_seed(seed)
    return QLinear.from_linear(nn.Linear(128, n), scheme)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def check(module: nn.Module, given: dict[str, Tensor], args: Any, expected: Tensor) -> None:
    """The result with the given tensors, and that the module is the same afterwards, in attributes too."""
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with torch.no_grad():
        own, attributes = first(module(*args)), set(vars(module))
        for _ in range(3):  # torch puts what it reads of the module into `given`
            y = first(functional_call(module, given, args))
            assert torch.equal(y, expected) and not torch.equal(y, own)
            assert torch.equal(first(module(*args)), own)
    now = module.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in now)
    assert set(vars(module)) == attributes


def first(y: Any) -> Tensor:
    return y if isinstance(y, Tensor) else y[0]


@pytest.mark.parametrize("scheme", ALL, ids=repr)
@pytest.mark.parametrize("n", [40, 5])  # in panels and flat
def test_a_linear(scheme: Any, n: int) -> None:
    layer, other = made(scheme, 0, n), made(scheme, 1, n)
    with torch.no_grad():
        expected = other(X)
    check(layer, dict(other.state_dict()), (X,), expected)
    check(layer, dict(reversed(other.state_dict().items())), (X,), expected)
    check(layer, tensors(other), (X,), expected)
    for key in other.state_dict():
        loaded = made(scheme, 0, n)
        loaded.load_state_dict({**layer.state_dict(), key: other.state_dict()[key]})
        with torch.no_grad():
            if not torch.equal(loaded(X), layer(X)):  # a code map is the same in all
                check(layer, {key: other.state_dict()[key]}, (X,), loaded(X))


@pytest.mark.parametrize("scheme", ALL, ids=repr)
def test_a_float_weight_is_quantized(scheme: Any) -> None:
    layer, weight = made(scheme, 0), torch.randn(40, 128)
    loaded = made(scheme, 0)
    loaded.weight = weight
    with torch.no_grad():
        check(layer, {"weight": weight}, (X,), loaded(X))
        check(layer, {"weight": loaded.weight}, (X,), loaded(X))


@pytest.mark.parametrize("scheme", ALL, ids=repr)
def test_a_weight_that_is_transformed_raises(scheme: Any) -> None:
    """Its gradient would be zero, without a word."""
    layer, weight = made(scheme, 0), torch.randn(40, 128)
    with torch.no_grad():
        before = layer(X)
    message = "weight of a quantized layer must be values, .* transform the float layer"
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda w: functional_call(layer, {"weight": w}, (X,)).sum())(weight)
    with pytest.raises(RuntimeError, match=message):
        torch.vmap(lambda w: functional_call(layer, {"weight": w}, (X,)))(weight[None])
    with torch.no_grad():
        assert torch.equal(layer(X), before)


def test_a_weight_with_a_gradient_says_that_none_reaches_it() -> None:
    layer, weight = made("int8", 0), torch.randn(40, 128, requires_grad=True)
    with pytest.warns(UserWarning, match="no gradient reaches the Parameter"):
        layer.weight = weight * 2


@pytest.mark.parametrize("key", ["absmax", "weight"])
def test_what_does_not_fit_raises_and_changes_nothing(key: str) -> None:
    layer = made("nf4", 0)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for given in ({key: before[key][1:]}, {**before, key: before[key][1:]}):
        with pytest.raises(ValueError, match=f"{key} must be"), torch.no_grad():
            functional_call(layer, given, (X,))
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("scheme", ["int8", "nf4", NF4(double_quant=True), Int4(group_size=32)], ids=repr)
def test_recurrent_layers(scheme: str | Scheme) -> None:
    def layer(seed: int) -> QRecurrent:
        torch.manual_seed(seed)
        return QRecurrent.from_recurrent(nn.LSTM(64, 32, num_layers=2, bidirectional=True), scheme)

    x, one, other = torch.randn(5, 2, 64), layer(0), layer(1)
    with torch.no_grad():
        expected = other(x)[0]
    check(one, dict(other.state_dict()), (x,), expected)
    check(one, tensors(other), (x,), expected)
    loaded, key = layer(0), "weight_hh_l1_reverse"
    setattr(loaded, key, getattr(other, key))
    with torch.no_grad():
        check(one, {key: getattr(other, key)}, (x,), loaded(x)[0])
        bias = {"bias_ih_l0": other.bias_ih_l0}
        loaded = layer(0)
        loaded.load_state_dict({**loaded.state_dict(), **bias})
        check(one, bias, (x,), loaded(x)[0])


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("kind", [QEmbedding, QEmbeddingBag])
def test_embeddings(scheme: str, kind: type[QEmbedding]) -> None:
    float_kind: Any = nn.Embedding if kind is QEmbedding else nn.EmbeddingBag
    one, other = (kind.from_embedding(float_kind(9, 64), scheme) for _ in range(2))
    ids = IDS_OF_ROWS if kind is QEmbedding else IDS_OF_ROWS[None]
    expected = other(ids)
    for given in (dict(other.state_dict()), {"weight": other.weight}, {"table.weight": other.weight}):
        check(one, given, (ids,), expected)


@pytest.mark.parametrize("scheme", ["int8", "int8-a7", "nf4", NF4(double_quant=True), "int4"], ids=repr)
def test_optimized_encoder_layers(scheme: Any) -> None:
    """Through the operator, with the given tensors, LayerNorms and biases among them."""

    def layer(factor: float) -> Any:
        model = bert(intermediate_size=192).requires_grad_(False)
        for parameter in model.parameters():
            parameter.data += (factor - 1) * parameter.data.flip(0)
        return optimize(model, scheme).encoder.layer[0]

    one, other, x = layer(1.0), layer(1.1), torch.randn(1, 12, 64)
    expected = first(other(x))
    for given in (dict(other.state_dict()), tensors(other)):
        check(one, given, (x,), expected)
        assert one.last_call == ""
    for key in ("output.LayerNorm.weight", "intermediate.dense.weight", "attention.self.key.bias"):
        loaded = layer(1.0)
        owner, _, name = key.rpartition(".")
        value = getattr(other.get_submodule(owner), name)
        setattr(loaded.get_submodule(owner), name, value)
        check(one, {key: value}, (x,), first(loaded(x)))


def test_a_model_of_4_bits() -> None:
    one, other = (optimize(bert(), "nf4") for _ in range(2))
    for module in other.modules():
        if isinstance(module, QLinear):
            module.weight = module.weight.flip(0).clone()
    with torch.inference_mode():
        check(one, dict(other.state_dict()), (IDS,), first(other(IDS)))
