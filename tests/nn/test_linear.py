"""QLinear as a module: made, called, moved, saved, loaded, differentiated."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOATS, floats, seeds
from torch import Tensor, nn

from pyqkern import _C, QLinear, isas, replace_linear, summary
from pyqkern.backends import INT8_LINEAR_MAX_K, reference
from pyqkern.nn.int8 import Int8Linear
from pyqkern.schemes import Int8, Scheme


def make(
    n: int = 5,
    k: int = 70,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    scheme: str | Scheme = "int8",
) -> tuple[nn.Linear, QLinear]:
    torch.manual_seed(seed)
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    return linear, QLinear.from_linear(linear, scheme)


LINEAR, LAYER = make()


@given(n=st.integers(0, 40), k=st.integers(0, 300), seed=seeds, dtype=st.sampled_from(FLOATS))
def test_weight_is_symmetric_per_output_channel(n: int, k: int, seed: int, dtype: torch.dtype) -> None:
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = nn.Parameter(floats((n, k), seed, dtype))
    linear.in_features, linear.out_features = k, n
    layer = QLinear.from_linear(linear)
    w = linear.weight.detach().float()
    absmax = w.abs().amax(1) if k else torch.zeros(n)
    assert torch.equal(layer.weight_scale, torch.where(absmax == 0, 1.0, absmax / 127).clamp(min=2.0**-126))
    q = layer.state_dict()["weight"]
    assert q.dtype is torch.int8 and q.shape == (n, k) and (q >= -127).all()
    assert torch.equal(q.float(), (w * (1 / layer.weight_scale)[:, None]).round())
    assert layer.weight.dtype is dtype and torch.equal(
        layer.weight, (layer.weight_scale[:, None] * q.float()).to(dtype)
    )
    # Half a step, and three roundings of fp32 of numbers up to 127; then one to dtype.
    error = (layer.weight.double() - w.double()).abs()
    assert (
        error <= layer.weight_scale.double()[:, None] * (0.5 + 127 * 2.0**-22) + w.abs() * torch.finfo(dtype).eps
    ).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(70,), (3, 70), (2, 3, 70), (0, 70), (2, 0, 70)])
def test_forward(isa: str, dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    linear, layer = make(bias=bias, dtype=dtype)
    x = floats(shape, 1, dtype)
    with torch.no_grad():
        y = layer(x)
        assert y.dtype is dtype and y.shape == linear(x).shape
        if y.numel():
            expected = reference.int8_linear(
                x.view(-1, 70), layer.state_dict()["weight"], layer.weight_scale, linear.bias, "none", False
            )
            assert torch.equal(y, expected.view(y.shape))


def test_symmetric_scheme() -> None:
    _, layer = make(scheme=Int8(symmetric=True))
    x = floats((4, 70), 1)
    with torch.no_grad():
        expected = reference.int8_linear(x, layer.state_dict()["weight"], layer.weight_scale, layer.bias, "none", True)
        assert torch.equal(layer(x), expected)


def test_looks_like_a_linear() -> None:
    linear, layer = make(n=3, k=4, dtype=torch.bfloat16)
    assert isinstance(layer, QLinear) and type(layer) is Int8Linear
    assert (layer.in_features, layer.out_features, layer.dtype) == (4, 3, torch.bfloat16)
    assert layer.bias is linear.bias and layer.weight.device == linear.weight.device
    assert repr(layer) == "Int8Linear(in_features=4, out_features=3, bias=True, scheme=int8)"
    assert list(layer.state_dict()) == ["weight", "bias", "weight_scale"]
    assert {name for name, _ in layer.named_parameters()} == {"bias"}
    linear.bias.requires_grad_(False)
    assert QLinear.from_linear(linear.eval()).bias.requires_grad is False and not QLinear.from_linear(linear).training


def test_no_float_copy_of_the_weight_stays() -> None:
    _, layer = make(n=64, k=256)
    tensors = [*layer.parameters(), *layer.buffers()]
    assert (
        sum(t.numel() * t.element_size() for t in tensors) == 64 * (256 + 12) + 4 * 64 + 4 * 64
    )  # weight, its two sums and its marks, scale, bias


# ---- moved and copied


@pytest.mark.parametrize("dtype", FLOATS)
def test_to_dtype_keeps_scales_and_codes(dtype: torch.dtype) -> None:
    _, layer = make()
    scale, packed = layer.weight_scale.clone(), layer.packed.clone()
    layer = layer.to(dtype)
    assert layer.dtype is dtype and layer.weight.dtype is dtype and layer.bias.dtype is dtype
    assert torch.equal(layer.weight_scale, scale) and layer.weight_scale.dtype is torch.float32
    assert torch.equal(layer.packed, packed)
    assert layer.half().float().dtype is torch.float32 and torch.equal(layer.weight_scale, scale)
    assert nn.Sequential(layer).type(dtype)[0].packed.dtype is torch.int8 and torch.equal(layer.weight_scale, scale)


def test_through_the_meta_device() -> None:
    _, layer = make(n=33, k=130)
    state = layer.state_dict()
    empty = Int8Linear(130, 33, device="meta")
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers())) and empty.weight.is_meta
    assert empty(torch.empty(3, 130, device="meta")).shape == (3, 33)
    for loaded in (copy.deepcopy(empty).to_empty(device="cpu"), empty):
        loaded.load_state_dict(state, assign=loaded is empty)
        assert torch.equal(loaded.packed, layer.packed) and torch.equal(loaded.weight, layer.weight)
        with torch.no_grad():
            assert torch.equal(loaded(torch.ones(2, 130)), layer(torch.ones(2, 130)))


def by_deepcopy(layer: QLinear) -> QLinear:
    return copy.deepcopy(layer)


def by_pickle(layer: QLinear) -> QLinear:
    return pickle.loads(pickle.dumps(layer))


def by_torch_save(layer: QLinear) -> QLinear:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_state_dict(layer: QLinear) -> QLinear:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    empty = type(layer)(layer.in_features, layer.out_features, layer.bias is not None, layer.scheme, dtype=layer.dtype)
    assert str(empty.load_state_dict(torch.load(file, weights_only=True))) == "<All keys matched successfully>"
    return empty


@pytest.mark.parametrize("copied", [by_deepcopy, by_pickle, by_torch_save, by_state_dict])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("other", isas())
def test_copies_give_the_same_bits_on_every_isa(
    isa: str, copied: Callable[[QLinear], QLinear], bias: bool, other: str
) -> None:
    """Made and saved on one ISA, used on another."""
    _, layer = make(n=33, k=130, bias=bias, dtype=torch.bfloat16)
    x = floats((3, 130), 2, torch.bfloat16)
    with torch.no_grad():
        y = layer(x)
        previous = _C.set_isa(other)
        again = copied(layer)
        z = again(x)
        _C.set_isa(previous)
    assert torch.equal(y, z) and again.dtype is torch.bfloat16 and torch.equal(again.weight, layer.weight)
    assert (again.bias is None) == (not bias)
    first, second = layer.state_dict(), again.state_dict()
    assert list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


def test_forward_leaves_the_state_dict_alone() -> None:
    _, layer = make()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer(floats((4, 70), 1))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


# ---- loaded


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("weight", torch.zeros(5, 71, dtype=torch.int8), r"layer.weight must be int8 \[5, 70\], got int8 \[5, 71\]"),
        (
            "weight",
            torch.zeros(5, 70),
            r"layer.weight must be int8 \[5, 70\], got float32 .* float checkpoint is loaded before",
        ),
        ("weight", torch.zeros(350, dtype=torch.int8), r"layer.weight must be int8"),
        ("weight_scale", torch.ones(4), r"layer.weight_scale must be float32 \[5\], got float32 \[4\]"),
        ("weight_scale", torch.ones(5, dtype=torch.float16), r"layer.weight_scale must be float32 \[5\], got float16"),
        ("bias", torch.ones(6), r"layer.bias must be .* \[5\], got float32 \[6\]"),
        ("bias", torch.ones(5, dtype=torch.int8), r"layer.bias must be float32 or bfloat16 or float16 \[5\], got int8"),
        ("weight_scale", None, r'Missing key\(s\) in state_dict: "layer.weight_scale"'),
        ("weight", None, r'Missing key\(s\) in state_dict: "layer.weight"'),
        ("weigth", torch.ones(5), r'Unexpected key\(s\) in state_dict: "layer.weigth"'),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_load_names_the_wrong_key(key: str, value: Tensor | None, message: str, assign: bool) -> None:
    model = nn.ModuleDict({"layer": make()[1]})
    before = copy.deepcopy(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if value is None:
        del state["layer." + key]
    else:
        state["layer." + key] = value
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, assign=assign)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )


def test_made_in_inference_mode_loads_and_trains() -> None:
    with torch.inference_mode():
        layer = QLinear.from_linear(LINEAR)
    layer.load_state_dict(LAYER.state_dict())
    layer(floats((3, 70), 1).requires_grad_()).sum().backward()
    assert layer.bias.grad is not None


def test_load_not_strict_keeps_what_is_missing() -> None:
    _, layer = make()
    packed = layer.packed.clone()
    result = layer.load_state_dict({"bias": torch.ones(5), "other": torch.ones(1)}, strict=False)
    assert set(result.missing_keys) == {"weight", "weight_scale"} and result.unexpected_keys == ["other"]
    assert torch.equal(layer.packed, packed) and (layer.bias == 1).all()


# ---- in grad mode


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient_is_grad_times_dequantized_weight(dtype: torch.dtype) -> None:
    """A chain of 5 fp32 additions of products that are rounded twice, and the rounding to the gradient's dtype."""
    _, layer = make(dtype=dtype)
    weight = layer.state_dict()["weight"].double() * layer.weight_scale.double()[:, None]
    x = floats((2, 3, 70), 1, dtype).requires_grad_()
    grad = floats((2, 3, 5), 2, dtype)
    layer(x).backward(grad)
    exact, magnitude = grad.double() @ weight, grad.double().abs() @ weight.abs()
    bound = (5 + 2) * 2.0**-24 * magnitude + torch.finfo(dtype).eps / 2 * exact.abs()
    assert x.grad.dtype is dtype and ((x.grad.double() - exact).abs() <= bound).all()
    assert layer.bias.grad.dtype is dtype and torch.equal(layer.bias.grad, grad.reshape(-1, 5).sum(0))


def test_gradient_only_where_asked_for() -> None:
    _, layer = make()
    x = floats((3, 70), 1)
    y = layer(x)
    assert y.requires_grad and torch.equal(y, layer.requires_grad_(False)(x))
    assert not layer(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(layer(x), y)
    frozen = layer(x.requires_grad_())
    frozen.sum().backward()
    assert layer.bias.grad is None and x.grad is not None


def test_an_adapter_on_top_trains() -> None:
    torch.manual_seed(0)
    _, layer = make(n=16, k=16)
    layer.requires_grad_(False)
    adapter = nn.Linear(16, 16)
    x, target = torch.randn(64, 16), torch.randn(64, 16) * 0.1
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.03)
    losses = []
    for _ in range(60):
        loss = (layer(x + adapter(x)) - target).pow(2).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


# ---- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_a_linear(dtype: torch.dtype) -> None:
    linear, layer = make()
    x = floats((3, 70), 1)
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        y = layer(x)
        assert y.dtype is linear(x).dtype is dtype
    with torch.no_grad():
        assert torch.equal(y, layer(x.to(dtype)))
    x.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        layer(x).sum().backward()
    assert x.grad.dtype is torch.float32 and layer.bias.grad.dtype is torch.float32


# ---- other schemes


@dataclass(frozen=True)
class Rounded(Scheme):
    name = "rounded"
    step: float = 0.5


class RoundedLinear(QLinear, scheme=Rounded):
    def _quantize(self, weight: Tensor) -> None:
        self.register_buffer("steps", (weight / self.scheme.step).round())

    _of_weight = ("steps",)

    def _dequantize(self) -> Tensor:
        return self.steps.to(self.dtype) * self.scheme.step

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, self._dequantize(), bias)


def test_a_scheme_is_a_dataclass_and_a_subclass() -> None:
    """What the base class brings: from_linear, gradients, .to, replace_linear and summary."""
    model = replace_linear(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), Rounded(step=0.25), exclude="1")
    layer = model[0]
    assert type(layer) is RoundedLinear and isinstance(model[1], nn.Linear) and "scheme=rounded" in repr(layer)
    assert [record.scheme for record in summary(model).records] == ["rounded", None]
    x = torch.ones(3, 6, requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(x.grad, layer.weight.sum(0).expand(3, 6)) and torch.equal(layer.bias.grad, torch.full((4,), 3.0))
    assert layer.to(torch.bfloat16).weight.dtype is torch.bfloat16 and layer.steps.dtype is torch.float32


# ---- bad input


def with_weight(values: Tensor) -> nn.Linear:
    linear = nn.Linear(values.shape[1], values.shape[0])
    linear.weight = nn.Parameter(values, requires_grad=False)
    return linear


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: QLinear.from_linear(nn.Conv2d(1, 1, 1)), TypeError, "linear must be an nn.Linear, got Conv2d"),
        (lambda: QLinear.from_linear(LINEAR, "int3"), ValueError, "scheme must be one of 'int8', .*got 'int3'"),
        (
            lambda: QLinear.from_linear(LINEAR, 8),
            TypeError,
            r"scheme must be a name \('int8', .*\) or a scheme object, got int",
        ),
        (
            lambda: QLinear.from_linear(nn.Linear(4, 4).double()),
            TypeError,
            "weight must be float32, bfloat16 or float16, got torch.float64",
        ),
        (lambda: QLinear.from_linear(nn.Linear(4, 4, device="meta")), ValueError, "weight must hold values"),
        (
            lambda: QLinear.from_linear(with_weight(torch.tensor([[1.0, float("nan")]]))),
            ValueError,
            "weight must be finite, got NaN or an infinity",
        ),
        (
            lambda: QLinear.from_linear(with_weight(torch.tensor([[1.0], [float("-inf")]]))),
            ValueError,
            "weight must be finite",
        ),
        (
            lambda: QLinear.from_linear(nn.Linear(INT8_LINEAR_MAX_K + 1, 1)),
            ValueError,
            f"in_features must be at most {INT8_LINEAR_MAX_K} .* got {INT8_LINEAR_MAX_K + 1}",
        ),
        (lambda: LAYER(torch.zeros(3, 71)), ValueError, r"x must be \[..., in_features=70\], got shape \(3, 71\)"),
        (lambda: LAYER(torch.zeros(3, 69)), ValueError, r"got shape \(3, 69\)"),
        (lambda: LAYER(torch.tensor(1.0)), ValueError, r"got shape \(\)"),
        (lambda: LAYER(torch.zeros(3, 70).double()), TypeError, "x must be float32"),
        (lambda: LAYER(torch.zeros(3, 70).int()), TypeError, "got int32"),
        (lambda: LAYER(torch.zeros(3, 70, device="meta")), ValueError, "must be on meta, got cpu"),
    ],
)
def test_bad_input(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()
