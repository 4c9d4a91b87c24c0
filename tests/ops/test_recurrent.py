"""torch.ops.pyqkern.recurrent: equal to the reference bit for bit, alone and in any batch, and near float."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import generator, seeds
from torch import Tensor

from pyqkern import _C, isas
from pyqkern.backends import GATES, Weight4bit, Weight8bit, reference
from pyqkern.nn.linear import QLinear
from pyqkern.schemes import NF4, Int4, Int8, Scheme

CELLS = list(GATES)
Result = tuple[Tensor, ...]


class Layer:
    """Random weights in both forms: as the CPU's kernels take them, and flat, as the reference does."""

    def __init__(
        self, seed: int = 0, k: int = 20, hidden: int = 24, projected: int = 0, cell: str = "lstm",
        reverse: bool = False, bias: bool = True, scheme: Scheme | None = None,
    ) -> None:  # fmt: skip
        g = generator(seed)
        self.cell, self.reverse, self.scheme = cell, reverse, scheme or Int8()
        self.k, self.hidden, self.p = k, hidden, projected or hidden
        n = GATES[cell] * hidden
        shapes = [(n, k), (n, self.p)] + [(self.p, hidden)] * bool(projected)
        self.linears: list[Any] = []
        for rows, columns in shapes:
            linear = torch.nn.Linear(columns, rows, bias=False)
            linear.weight = torch.nn.Parameter(torch.randn(rows, columns, generator=g) / columns**0.5 * 1.5)
            self.linears.append(QLinear.from_linear(linear, self.scheme))
        self.biases = [torch.randn(n, generator=g) for _ in range(2)] if bias else []

    def states(self, batch: int, seed: int = 1) -> tuple[Tensor, Tensor | None]:
        g = generator(seed)
        c = torch.randn(batch, self.hidden, generator=g) if self.cell == "lstm" else None
        return torch.randn(batch, self.p, generator=g).tanh(), c

    def __call__(self, x: Tensor, sizes: Tensor | None, h: Tensor, c: Tensor | None) -> Result:
        layers, scheme = self.linears, self.scheme
        weights = [layer.packed for layer in layers]
        given = (self.biases, h, c, self.cell, self.reverse)
        if isinstance(scheme, Int8):
            scales = [layer.weight_scale for layer in layers]
            how: tuple[Any, ...] = (scheme.symmetric, scheme.activation_bits)
        else:
            assert isinstance(scheme, NF4 | Int4)
            scales = [layer.absmax for layer in layers]
            names = ("nested_absmax", "nested_map", "nested_offset") if scheme.double_quant else ()
            nested = [getattr(layer, name) for layer in layers for name in names]
            how = (False, 8, scheme.name, scheme.blocksize, nested, scheme.compute)
        result: Result = torch.ops.pyqkern.recurrent(x, sizes, weights, scales, *given, *how)
        return result

    def reference(self, x: Tensor, sizes: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor | None, ...]:
        """x [rows, K]."""
        weights: list[Any] = []
        for layer in self.linears:
            if isinstance(self.scheme, Int8):
                weights.append(Weight8bit(layer._plain("weight"), layer.weight_scale))
            else:
                flat: Weight4bit = layer._weight4bit()
                plain = (layer._plain("weight").view(-1), layer._plain("absmax"))
                weights.append(Weight4bit(*plain, *flat[2:]))
        how: tuple[Any, ...]
        if isinstance(self.scheme, Int8):
            how = (self.scheme.symmetric, self.scheme.activation_bits, "auto")
        else:  # where the CPU's "auto" multiplies integers, the reference's is fp32
            how = (False, 8, vars(self.scheme)["compute"].replace("auto", "int8"))
        return reference.recurrent(x, sizes, weights, self.biases, h, c, self.cell, self.reverse, *how)


def same(found: Result, expected: tuple[Tensor | None, ...], of: slice = slice(None)) -> None:
    """Outputs and states; NaN equals NaN, and an empty c None."""
    for a, b in zip(found, expected, strict=True):
        if b is not None and b.numel():
            torch.testing.assert_close(a.reshape(b.shape), b, rtol=0, atol=0, equal_nan=True)
        else:
            assert a.numel() == 0


def descending(lengths: list[int]) -> Tensor:
    """batch_sizes of sequences of these lengths, sorted."""
    return torch.tensor([sum(length > t for length in lengths) for t in range(max(lengths))])


SCHEMES = [Int8(), Int8(symmetric=True), Int8(activation_bits=7)]
FOUR_BITS = [NF4(blocksize=32), NF4(double_quant=True), Int4(group_size=32)]
sizes = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 48, 63, 64, 65, 100]))


@settings(max_examples=60)
@given(
    seed=seeds,
    cell=st.sampled_from(CELLS),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    k=sizes,
    hidden=sizes,
    reverse=st.booleans(),
    bias=st.booleans(),
    scheme=st.sampled_from(SCHEMES),
    data=st.data(),
)
def test_any_shape(
    isa: str, seed: int, cell: str, lengths: list[int], k: int, hidden: int, reverse: bool, bias: bool,
    scheme: Scheme, data: Any,
) -> None:  # fmt: skip
    projected = data.draw(st.integers(0, hidden - 1)) if cell == "lstm" else 0
    layer = Layer(seed, k, hidden, projected, cell, reverse, bias, scheme)
    batch_sizes, batch = descending(lengths), len(lengths)
    x, states = torch.randn(sum(lengths), k, generator=generator(seed)) * 2, layer.states(batch, seed)
    same(layer(x, batch_sizes, *states), layer.reference(x, batch_sizes, *states))


@settings(max_examples=15)
@given(
    seed=seeds,
    cell=st.sampled_from(CELLS),
    batch=st.sampled_from([1, 2, 5, 17]),
    k=st.sampled_from([64, 192]),
    hidden=st.sampled_from([64, 128]),
    reverse=st.booleans(),
    scheme=st.sampled_from(FOUR_BITS),
)
def test_four_bits(
    isa: str, seed: int, cell: str, batch: int, k: int, hidden: int, reverse: bool, scheme: Scheme
) -> None:
    layer = Layer(seed, k, hidden, 64 if cell == "lstm" and hidden == 128 else 0, cell, reverse, True, scheme)
    x, states = torch.randn(4 * batch, k, generator=generator(seed)), layer.states(batch, seed)
    batch_sizes = torch.full((4,), batch)
    same(layer(x, batch_sizes, *states), layer.reference(x, batch_sizes, *states))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("scheme", [NF4(), NF4(compute="fp32")], ids=["flat", "fp32"])
def test_four_bits_in_fp32(isa: str, cell: str, scheme: NF4) -> None:
    """One step. A row of 40 is no whole block: such a weight is flat, and computed in fp32 whatever `compute` says.

    Two orders of a sum of n products differ by n * 2**-24 * sum |x w| at most. A state changes by less than four times
    what its gates do: 1/4 for each sigmoid, 1 for each tanh, |c| and |p_m| below 4.
    """
    size = 40 if scheme.compute == "auto" else 64
    layer = Layer(1, size, size, cell=cell, scheme=scheme)
    x, states = torch.randn(3, size, generator=generator(2)), layer.states(3)
    y, h, _ = layer(x, torch.tensor([3]), *states)
    expected, *_ = layer.reference(x, torch.tensor([3]), *states)
    terms = x.abs() @ layer.linears[0].weight.abs().T + states[0].abs() @ layer.linears[1].weight.abs().T
    assert expected is not None and ((y - expected).abs() <= 4 * 2 * size * 2.0**-24 * terms.max()).all()
    assert torch.equal(y, h)
    for row in range(3):
        alone = layer(x[row : row + 1], torch.tensor([1]), *(None if s is None else s[row : row + 1] for s in states))
        assert torch.equal(alone[0], y[row : row + 1])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("scheme", [Int8(), NF4()], ids=["int8", "nf4"])
def test_a_sequence_alone_and_in_a_batch(isa: str, cell: str, scheme: Scheme) -> None:
    """And padded and packed: in a batch of ten it runs through another product than alone."""
    lengths = [9, 9, 8, 6, 6, 4, 3, 3, 1, 1]
    for reverse in (False, True):
        layer = Layer(3, 64, 128, cell=cell, reverse=reverse, scheme=scheme)
        x = torch.randn(9, 10, 64, generator=generator(0))
        h, c = layer.states(10)
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths))
        y, *states = layer(packed.data, packed.batch_sizes, h, c)
        padded, _ = torch.nn.utils.rnn.pad_packed_sequence(packed._replace(data=y))
        for b, length in enumerate(lengths):
            own = (h[b : b + 1], None if c is None else c[b : b + 1])
            alone = layer(x[:length, b : b + 1], None, *own)
            same(alone, (padded[:length, b : b + 1], *(s[b : b + 1] for s in states if s.numel()), None)[:3])


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("hidden", [40, 1030])
def test_bits_are_equal_on_every_isa_and_number_of_threads(two_threads: None, cell: str, hidden: int) -> None:
    """Wide enough that a single sequence shares its columns, and long enough for several chunks."""
    for batch, steps in ((1, 5), (7, 40), (64, 6)):
        layer = Layer(2, 30, hidden, cell=cell)
        x, states = torch.randn(steps, batch, 30, generator=generator(1)), layer.states(batch)
        results = []
        for threads, isa in itertools.product((1, 2), isas() if hidden < 100 else isas()[:1]):
            torch.set_num_threads(threads)
            previous = _C.set_isa(isa)
            results.append(layer(x, None, *states))
            _C.set_isa(previous)
        for result in results:
            same(result, results[0])


def test_nan_stays_in_its_sequence_and_comes_no_earlier(isa: str) -> None:
    for cell, bad in itertools.product(CELLS, (torch.nan, torch.inf)):
        layer = Layer(4, cell=cell)
        x, states = torch.randn(5, 3, layer.k, generator=generator(2)), layer.states(3)
        clean = layer(x, None, *states)[0]
        x[2, 1, 5] = bad
        y = layer(x, None, *states)[0]
        assert y[2:, 1].isnan().all()
        assert torch.equal(y[:2], clean[:2]) and torch.equal(y[:, ::2], clean[:, ::2])


# ---- against float


def float_steps(layer: Layer, x: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """The outputs with dequantized weights in fp64, and by how much those of INT8 may be off, [steps, batch, hidden].

    A row v is quantized with the scale s = range / 255 and is off by s / 2 (and as much again where the zero point's
    rounding cuts the range's end off), so that a product is off by s * sum |w|. Beyond that the errors before it pass
    through: |sigmoid'| <= 1/4, |tanh'| <= 1; products of two errors are kept. fp32 itself adds 2**-19 to a gate of
    magnitude 8: a dozen roundings.
    """
    weights = [linear.weight.double() for linear in layer.linears]
    biases = [bias.double() for bias in layer.biases]
    h, c = h.double(), None if c is None else c.double()
    e_h, e_c = torch.zeros_like(h), torch.zeros_like(h)
    outputs, errors = [], []

    def product(i: int, v: Tensor, e_v: Tensor) -> tuple[Tensor, Tensor]:
        span = v.clamp(min=0).amax(1) - v.clamp(max=0).amin(1) + 2 * e_v.amax(1)
        error = (span / 255)[:, None] * weights[i].abs().sum(1) + e_v @ weights[i].abs().T
        return v @ weights[i].T + biases[i], error + 2.0**-19

    for rows in x.double():
        a, e_a = product(0, rows, torch.zeros_like(rows))
        b, e_b = product(1, h, e_h)
        if layer.cell == "lstm":
            assert c is not None
            i, f, g, o = (a + b).chunk(4, 1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            e_i, e_f, e_g, e_o = (e_a + e_b).chunk(4, 1)
            e_i, e_f, e_o = e_i / 4, e_f / 4, e_o / 4
            e_c = f * e_c + c.abs() * e_f + e_f * e_c + i * e_g + g.abs() * e_i + e_i * e_g
            c = f * c + i * g
            h, e_h = o * c.tanh(), o * e_c + c.tanh().abs() * e_o + e_o * e_c
        elif layer.cell == "gru":
            (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3, 1), b.chunk(3, 1)
            (ea_r, ea_z, ea_n), (eb_r, eb_z, eb_n) = e_a.chunk(3, 1), e_b.chunk(3, 1)
            r, z, e_r, e_z = (a_r + b_r).sigmoid(), (a_z + b_z).sigmoid(), (ea_r + eb_r) / 4, (ea_z + eb_z) / 4
            n, e_n = (a_n + r * b_n).tanh(), ea_n + r * eb_n + b_n.abs() * e_r + e_r * eb_n
            e_h = z * e_h + (1 - z) * e_n + (h - n).abs() * e_z + e_z * (e_h + e_n)
            h = z * h + (1 - z) * n
        else:
            h, e_h = a + b, e_a + e_b
            h = h.tanh() if layer.cell == "rnn_tanh" else h.relu()
        outputs.append(h)
        errors.append(e_h + 2.0**-20)
    return torch.stack(outputs), torch.stack(errors)


@pytest.mark.parametrize("cell", CELLS)
def test_near_float(isa: str, cell: str) -> None:
    for seed in range(5):
        layer = Layer(seed, 48, 32, cell=cell)
        x, states = torch.randn(4, 3, 48, generator=generator(seed)), layer.states(3)
        y = layer(x, None, *states)[0]
        exact, bound = float_steps(layer, x, *states)
        assert ((y - exact).abs() <= bound).all()
        assert bound[0].mean() < 0.4  # the bound says something: outputs are within [-1, 1]


# ---- the operator


def arguments(**changes: Any) -> dict[str, Any]:
    layer = Layer()
    h, c = layer.states(2)
    given = {
        "x": torch.randn(3, 2, layer.k), "batch_sizes": None, "weights": [one.packed for one in layer.linears],
        "scales": [one.weight_scale for one in layer.linears], "biases": layer.biases, "h": h, "c": c, "cell": "lstm",
        "reverse": False,
    }  # fmt: skip
    return given | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cell": "tanh"}, ValueError, "cell must be one of"),
        ({"x": torch.randn(3, 2, 20).bfloat16()}, TypeError, "x must be float32"),
        ({"x": torch.randn(6, 20)}, ValueError, r"x must be \[steps, batch, K\]"),
        ({"x": torch.randn(3, 4, 20)}, ValueError, r"x must be \[3, 2, 20\]"),
        ({"x": torch.randn(3, 2, 21)}, ValueError, "packed must be what int8_pack makes"),
        ({"c": None}, ValueError, "c \\[batch, H\\]"),
        ({"c": torch.randn(2, 23)}, ValueError, "weights must be 3"),
        ({"h": torch.randn(2, 24).half()}, TypeError, "h must be float32"),
        ({"biases": [torch.randn(96)]}, ValueError, "biases must be 2"),
        ({"biases": [torch.randn(95)] * 2}, ValueError, r"bias must be \[96\]"),
        ({"scales": [torch.ones(95)] * 2}, ValueError, "scales must be"),
        ({"bits": 6}, ValueError, "bits must be 8 or 7"),
        ({"quant_type": "int2"}, ValueError, "quant_type must be one of"),
        ({"quant_type": "nf4", "blocksize": 64, "compute": "bf16"}, ValueError, "compute must be"),
        ({"x": torch.randn(5, 20), "batch_sizes": torch.tensor([2, 2])}, ValueError, "add up to the 5 rows"),
        ({"x": torch.randn(3, 20), "batch_sizes": torch.tensor([1, 2])}, ValueError, "must descend"),
        ({"x": torch.randn(3, 20), "batch_sizes": torch.tensor([2, 1, 0])}, ValueError, "must descend"),
        ({"x": torch.randn(3, 20), "batch_sizes": torch.tensor([3])}, ValueError, "must descend"),
        ({"x": torch.randn(3, 20), "batch_sizes": torch.tensor([2.0, 1.0])}, ValueError, "batch_sizes must be int64"),
    ],
)
def test_what_it_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        torch.ops.pyqkern.recurrent(**arguments(**changes))


def test_nothing_to_do() -> None:
    y, h, c = torch.ops.pyqkern.recurrent(**arguments(x=torch.randn(0, 2, 20)))
    given = arguments()
    assert y.shape == (0, 2, 24) and h.shape == c.shape == (2, 24)
    given = arguments(x=torch.randn(3, 0, 20), h=torch.randn(0, 24), c=torch.randn(0, 24))
    y, h, c = torch.ops.pyqkern.recurrent(**given)
    assert y.shape == (3, 0, 24) and h.shape == c.shape == (0, 24)


def test_given_tensors_stay_as_they_are() -> None:
    given = arguments()
    h, c = given["h"].clone(), given["c"].clone()
    torch.ops.pyqkern.recurrent(**given)
    assert torch.equal(given["h"], h) and torch.equal(given["c"], c)


def test_opcheck() -> None:
    for cell in ("lstm", "gru"):
        layer = Layer(cell=cell)
        h, c = layer.states(2)
        values = [linear.weight.clone() for linear in layer.linears]
        weights, scales = [one.packed for one in layer.linears], [one.weight_scale for one in layer.linears]
        rest = (weights, scales, layer.biases, h, c, cell, True)
        torch.library.opcheck(torch.ops.pyqkern.recurrent.default, (torch.randn(3, 2, 20), None, *rest))
        no_c = torch.empty(0) if c is None else torch.randn(2, 24)
        grads = (torch.randn(3, 2, 24), torch.randn(2, 24), no_c, torch.randn(3, 2, 24), values)
        torch.library.opcheck(
            torch.ops.pyqkern.recurrent_backward.default, (*grads, torch.randn(3, 2, 20), None, *rest)
        )
        packed = (torch.randn(3, 20), torch.tensor([2, 1]))
        torch.library.opcheck(torch.ops.pyqkern.recurrent.default, (*packed, *rest))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"y": torch.randn(3, 2, 23)}, ValueError, r"y must be \[3, 2, 24\]"),
        ({"y": torch.randn(3, 2, 24).double()}, TypeError, "y must be float32"),
        ({"grad_y": torch.randn(3, 1, 24)}, ValueError, "grad_y must be"),
        ({"grad_h": torch.randn(2, 23)}, ValueError, "grad_h must be"),
        ({"grad_c": torch.randn(1, 24)}, ValueError, "grad_c must be"),
        ({"values": [torch.randn(96, 20)]}, ValueError, "values must be 2"),
        ({"values": [torch.randn(96, 20), torch.randn(96, 25)]}, ValueError, r"values must be \[96, 24\]"),
    ],
)
def test_what_its_backward_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    of_y = {
        "grad_y": torch.randn(3, 2, 24), "grad_h": torch.randn(2, 24), "grad_c": torch.randn(2, 24),
        "y": torch.randn(3, 2, 24), "values": [torch.randn(96, 20), torch.randn(96, 24)],
    }  # fmt: skip
    with pytest.raises(error, match=message):
        torch.ops.pyqkern.recurrent_backward(**(of_y | arguments() | changes))
