"""QLSTM, QGRU, QRNN and the cells: forms of input, state_dict, copies, compilation, gradients."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

from pyqkern import NF4, QGRU, QLSTM, QRNN, Int4, Int8, QLSTMCell, QRecurrent
from pyqkern.nn.linear import QLinear

K, H = 12, 20
LAYERS: list[tuple[Any, dict[str, Any]]] = [
    (nn.LSTM, {}), (nn.LSTM, {"proj_size": 9}), (nn.GRU, {}), (nn.RNN, {}), (nn.RNN, {"nonlinearity": "relu"}),
]  # fmt: skip
CELLS: list[tuple[Any, dict[str, Any]]] = [
    (nn.LSTMCell, {}), (nn.GRUCell, {}), (nn.RNNCell, {}), (nn.RNNCell, {"nonlinearity": "relu"}),
]  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"bias": False, "num_layers": 3},
]  # fmt: skip
layers = pytest.mark.parametrize(("kind", "how"), LAYERS, ids=lambda v: getattr(v, "__name__", str(v)))
cells = pytest.mark.parametrize(("kind", "how"), CELLS, ids=lambda v: getattr(v, "__name__", str(v)))


def made(kind: Any, how: dict[str, Any], scheme: Any = "int8", **options: Any) -> tuple[nn.Module, QRecurrent]:
    """A quantized layer, and one of torch with its dequantized weights."""
    torch.manual_seed(0)
    module = kind(K, H, **how, **options)
    quantized = QRecurrent.from_recurrent(module, scheme)
    module = copy.deepcopy(module)
    for name, parameter in module.named_parameters():
        if name.startswith("weight"):
            parameter.data = getattr(quantized, name).clone()
    return module, quantized


def states(module: Any, batch: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Any:
    g = torch.Generator().manual_seed(seed)
    rows = module.num_layers * (1 + module.bidirectional)
    h = torch.randn(rows, batch, getattr(module, "proj_size", 0) or H, generator=g).tanh().to(dtype)
    c = torch.randn(rows, batch, H, generator=g).to(dtype)
    return (h, c) if isinstance(module, nn.LSTM) else h


def close(found: Any, expected: Any, tolerance: float = 0.03) -> None:
    """The same structure and shapes, and values as near as activations of 8 bits bring it: 1/255 of a row's range for
    each product, of which a few steps and layers add up."""
    a, b = tree_leaves(found), tree_leaves(expected)
    assert len(a) == len(b) and all(type(x) is type(y) for x, y in zip(a, b, strict=True))
    for x, y in zip(a, b, strict=True):
        if isinstance(x, Tensor):
            assert x.shape == y.shape and x.dtype == y.dtype
            greatest = float(y.detach().abs().max()) if y.numel() else 0.0
            assert ((x.double() - y.double()).abs() <= tolerance * max(1.0, greatest)).all()


def same(found: Any, expected: Any) -> None:
    a, b = tree_leaves(found), tree_leaves(expected)
    assert len(a) == len(b)
    assert all(torch.equal(x, y) if isinstance(x, Tensor) else x is y for x, y in zip(a, b, strict=True))


@layers
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_takes_and_returns_what_the_layer_of_torch_does(
    isa: str, kind: Any, how: dict[str, Any], options: dict[str, Any]
) -> None:
    module, quantized = made(kind, how, **options)
    assert type(quantized).__name__ == f"Q{kind.__name__}"
    x = torch.randn(3, 5, K)
    batch = 3 if module.batch_first else 5
    lengths = torch.tensor([2, 5, 1])
    packed = pack_padded_sequence(torch.randn(3, 5, K), lengths, batch_first=True, enforce_sorted=False)
    with torch.no_grad():
        for hx in (None, states(module, batch)):
            close(quantized(x, hx), module(x, hx))
        close(quantized(x.bfloat16()), [y.bfloat16() for y in tree_leaves(module(x))], 0.04)
        close(quantized(x[0]), module(x[0]))
        assert quantized(x.half())[0].dtype == torch.float16
        for hx in (None, states(module, 3)):
            found, expected = quantized(packed, hx), module(packed, hx)
            assert isinstance(found[0], PackedSequence)
            close(found, expected)


@layers
def test_a_sequence_has_the_same_bits_in_any_company(kind: Any, how: dict[str, Any]) -> None:
    _, quantized = made(kind, how, num_layers=2, bidirectional=True)
    sequences = [torch.randn(length, K) for length in (4, 9, 1, 6)]
    with torch.no_grad():
        y, h = quantized(pack_sequence(sequences, enforce_sorted=False))
        padded, lengths = pad_packed_sequence(y)
        for i, sequence in enumerate(sequences):
            alone, h_alone = quantized(sequence)
            assert torch.equal(alone, padded[: lengths[i], i])
            for whole, own in zip(tree_leaves(h), tree_leaves(h_alone), strict=True):
                assert torch.equal(whole[:, i], own)


@cells
def test_cells(isa: str, kind: Any, how: dict[str, Any]) -> None:
    for bias in (True, False):
        module, quantized = made(kind, how, bias=bias)
        x, h, c = torch.randn(3, K), torch.randn(3, H).tanh(), torch.randn(3, H)
        hx: Any = (h, c) if kind is nn.LSTMCell else h
        with torch.no_grad():
            close(quantized(x), module(x))
            close(quantized(x, hx), module(x, hx))
            one = tuple(s[0] for s in hx) if isinstance(hx, tuple) else hx[0]
            close(quantized(x[0], one), module(x[0], one))
            same(quantized(x[0], one), [y[0] for y in tree_leaves(quantized(x, hx))])
            close(quantized(x.bfloat16(), hx), [y.bfloat16() for y in tree_leaves(module(x, hx))], 0.04)


@pytest.mark.parametrize(("kind", "how"), [one for one in LAYERS if "proj_size" not in one[1]])
def test_a_layer_is_its_cell_step_by_step(kind: Any, how: dict[str, Any]) -> None:
    module, quantized = made(kind, how)
    cell = getattr(nn, kind.__name__ + "Cell")(K, H, **how)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(cell, name).data = getattr(module, f"{name}_l0").data
    stepped = QRecurrent.from_recurrent(cell)
    x, state, outputs = torch.randn(6, 2, K), None, []
    with torch.no_grad():
        for rows in x:
            state = stepped(rows, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        assert torch.equal(quantized(x)[0], torch.stack(outputs))


def test_dropout_between_layers_in_training_only() -> None:
    _, quantized = made(nn.LSTM, {}, num_layers=2, dropout=0.5)
    x = torch.randn(4, 2, K)
    with torch.no_grad():
        quantized.eval()
        same(quantized(x), quantized(x))
        quantized.train()
        assert not torch.equal(quantized(x)[0], quantized(x)[0])


def test_wrong_input() -> None:
    lstm, gru, cell = QLSTM(K, H), QGRU(K, H), QLSTMCell(K, H)
    bad: list[tuple[Any, tuple[Any, ...], type[Exception], str]] = [
        (lstm, (torch.randn(0, 2, K),), ValueError, "at least one step"),
        (lstm, (torch.randn(3, 2, K + 1),), ValueError, "input must be"),
        (lstm, (torch.randn(3, 2, 1, K),), ValueError, "input must be"),
        (lstm, (torch.ones(3, 2, K, dtype=torch.int64),), TypeError, "input must be float32"),
        (lstm, (torch.randn(3, 2, K), torch.randn(1, 2, H)), TypeError, r"hx must be a pair"),
        (lstm, (torch.randn(3, 2, K), (torch.randn(1, 2, H), torch.randn(1, 3, H))), ValueError, r"c_0 must be \[1, 2"),
        (gru, (torch.randn(3, 2, K), (torch.randn(1, 2, H),) * 2), TypeError, "hx must be a tensor"),
        (gru, (torch.randn(3, K), torch.randn(1, 1, H)), ValueError, r"h_0 must be \[1, 20\]"),
        (cell, (torch.randn(2, 3, K),), ValueError, "input must be"),
        (cell, (torch.randn(2, K), torch.randn(2, H)), TypeError, "hx must be a pair"),
        (cell, (torch.randn(2, K), (torch.randn(2, H), torch.randn(3, H))), ValueError, "hx must be"),
    ]
    for module, given, error, message in bad:
        with pytest.raises(error, match=message):
            module(*given)
    y, (h, c) = lstm(torch.randn(3, 0, K))
    assert y.shape == (3, 0, H) and h.shape == c.shape == (1, 0, H)
    assert cell(torch.randn(0, K))[0].shape == (0, H)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: QLSTM(0, 4), ValueError, "input_size must be positive"),
        (lambda: QLSTM(4, 4, proj_size=4), ValueError, "proj_size must be within"),
        (lambda: QRNN(4, 4, nonlinearity="gelu"), ValueError, "nonlinearity must be"),
        (lambda: QGRU(4, 4, scheme="int8-static"), ValueError, "scheme of a recurrent layer must be one of 'int8',"),
        (lambda: QGRU(4, 4, scheme=NF4(compute="bf16")), ValueError, "compute must be"),
        (lambda: QRecurrent.from_recurrent(nn.Linear(3, 4)), TypeError, "module must be one of LSTM, GRU"),
    ],
)
def test_wrong_options(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_weight_that_is_not_finite_is_refused() -> None:
    module = nn.GRU(K, H)
    module.weight_hh_l0.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match="weight must be finite"):
        QRecurrent.from_recurrent(module)


# ---- state_dict and copies

SCHEMES = ["int8", "int8-a7", Int8(symmetric=True, clip_weights=True), "nf4", NF4(double_quant=True), "fp4"]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRUCell])
def test_saved_and_loaded(kind: Any, scheme: Any) -> None:
    module, quantized = made(kind, {}, scheme)
    x = torch.randn(3, K)
    parent = nn.ModuleDict({"rnn": quantized})
    file = io.BytesIO()
    torch.save(parent.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    names = {name for name, _ in module.named_parameters()}
    assert {key.removeprefix("rnn.") for key in state} >= names
    weight = "rnn.weight_ih_l0" if kind is nn.LSTM else "rnn.weight_ih"
    assert state[weight].dtype == (torch.int8 if "int8" in str(scheme).lower() else torch.uint8)
    extra = {key.removeprefix("rnn.") for key in state} - names
    assert extra and all(key.startswith("weight_") for key in extra)
    empty = nn.ModuleDict({"rnn": type(quantized)(K, H, scheme=scheme)})
    empty.load_state_dict(state)
    on_meta = nn.ModuleDict({"rnn": type(quantized)(K, H, scheme=scheme, device="meta")})
    on_meta.load_state_dict(state, assign=True)
    with torch.no_grad():
        expected = quantized(x)
        for other in (empty["rnn"], on_meta["rnn"], copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
            same(other(x), expected)
    with pytest.raises(RuntimeError, match="must be int8" if "int8" in str(scheme).lower() else "must be uint8"):
        empty.load_state_dict({f"rnn.{key}": value for key, value in module.state_dict().items()})
    del state[weight]
    with pytest.raises(RuntimeError, match="Missing key"):
        empty.load_state_dict(state)


def test_state_dict_has_torchs_names() -> None:
    _, quantized = made(nn.LSTM, {"proj_size": 9}, num_layers=2, bidirectional=True)
    module = nn.LSTM(K, H, 2, bidirectional=True, proj_size=9)
    weights = [name for name in module.state_dict() if name.startswith("weight")]
    assert set(quantized.state_dict()) == {*module.state_dict(), *(f"{name}_scale" for name in weights)}
    assert quantized.state_dict()["weight_hh_l1_reverse"].dtype is torch.int8
    assert torch.equal(quantized.bias_ih_l0, quantized.state_dict()["bias_ih_l0"])
    assert quantized.weight_hr_l1.shape == (9, H) and not hasattr(quantized, "weight_ih_l2")
    quantized.flatten_parameters()


def test_moved_to_another_dtype() -> None:
    _, quantized = made(nn.GRU, {})
    expected = quantized(torch.ones(2, 1, K))[0]
    quantized.bfloat16()
    assert quantized.dtype is quantized.bias_ih_l0.dtype is quantized.weight_ih_l0.dtype is torch.bfloat16
    assert quantized.ih_l0.weight_scale.dtype is torch.float32
    close(quantized(torch.ones(2, 1, K, dtype=torch.bfloat16))[0], expected.bfloat16())


def test_autocast_leaves_the_arithmetic_alone() -> None:
    _, quantized = made(nn.LSTM, {})
    x = torch.randn(3, 2, K)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inside = quantized(x)
    with torch.no_grad():
        same(inside, quantized(x))


@pytest.mark.parametrize("scheme", ["int8", NF4(double_quant=True)], ids=["int8", "nf4"])
def test_compiled_and_exported(scheme: Any) -> None:
    for kind, options in ((nn.LSTM, OPTIONS[1]), (nn.GRU, {}), (nn.RNN, {})):
        torch._dynamo.reset()
        _, quantized = made(kind, {}, scheme, **options)
        x = torch.randn(4, 3, K)
        with torch.no_grad():
            expected = quantized(x)
            same(torch.compile(quantized, fullgraph=True, backend="aot_eager")(x), expected)
            same(torch.export.export(quantized, (x,)).module()(x), expected)
        given = x.clone().requires_grad_(), x.clone().requires_grad_()
        torch.compile(quantized, fullgraph=True, backend="aot_eager")(given[0])[0].sum().backward()
        quantized(given[1])[0].sum().backward()
        assert torch.equal(given[0].grad, given[1].grad)


# ---- gradients


@pytest.mark.parametrize("is_packed", [False, True])
@layers
def test_gradients_are_those_of_the_dequantized_layer(kind: Any, how: dict[str, Any], is_packed: bool) -> None:
    """Taken where the quantized states are: within a few hundredths of those of the float layer. Of ReLU only in size:
    a state on the other side of zero changes a gradient as a whole."""
    for options in OPTIONS[:2]:
        module, quantized = made(kind, how, **options)
        g = torch.Generator().manual_seed(3)
        x, hx = torch.randn(5, 5, K, generator=g), states(module, 5)
        found = []
        for layer in (module, quantized):
            given = [t.detach().clone().requires_grad_() for t in (x, *(hx if isinstance(hx, tuple) else (hx,)))]
            start: Any = tuple(given[1:]) if kind is nn.LSTM else given[1]
            inputs: Any = given[0]
            if is_packed:
                inputs = pack_padded_sequence(inputs, torch.tensor([3, 5, 1, 2, 5]), enforce_sorted=False)
            outputs = [y for y in tree_leaves(layer(inputs, start)) if isinstance(y, Tensor) and y.requires_grad]
            g.manual_seed(4)
            sum((y * torch.randn(y.shape, generator=g)).sum() for y in outputs).backward()
            biases = [getattr(layer, name) for name, _ in module.named_parameters() if name.startswith("bias")]
            found.append([t.grad for t in (*given, *biases)])
        for expected, grad in zip(*found, strict=True):
            assert (grad - expected).norm() <= (0.3 if "nonlinearity" in how else 0.03) * expected.norm()


def test_a_gradient_of_one_step_is_exact() -> None:
    """One step of an RNN from zero: grad_x = (grad * (1 - y**2)) @ W."""
    for scheme in ("int8", Int4(group_size=32)):
        layer = QRecurrent.from_recurrent(nn.RNN(32, 32), scheme)
        x = torch.randn(1, 4, 32, requires_grad=True)
        y, _ = layer(x)
        grad = torch.randn_like(y)
        y.backward(grad)
        expected = (grad[0] * (1 - y[0] ** 2)) @ layer.weight_ih_l0
        torch.testing.assert_close(x.grad[0], expected.detach(), rtol=1e-5, atol=1e-5)


def test_the_weights_are_linears_that_nobody_calls() -> None:
    """So they carry the packing, and no hook of theirs runs."""
    _, quantized = made(nn.LSTM, {})
    called: list[int] = []
    for module in quantized.modules():
        if isinstance(module, QLinear):
            module.register_forward_hook(lambda *_: called.append(1))
    quantized(torch.randn(2, 2, K))
    assert not called and len(list(quantized.parameters())) == 2
