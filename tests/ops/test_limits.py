"""Every documented limit: right at the limit, with the codes whose sums are the largest, and refused one beyond."""

from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_layer import Layer
from strategies import integers
from torch import Tensor, nn

from pyqkern import (
    QEmbedding,
    QLinear,
    choose_qparams_affine,
    dequantize_affine,
    int8_matmul,
    quantize_affine,
    replace_embedding,
    replace_linear,
    replace_recurrent,
    summary,
)
from pyqkern.backends import INT8_LINEAR_MAX_K, INT8_MATMUL_MAX_K, QRANGE, Weight4bit, cpu, reference
from pyqkern.backends.reference.encoder import encoder_layer as reference_layer
from pyqkern.backends.reference.four_bit import CODEBOOKS, pack
from pyqkern.checkpoints.files import DEEPEST, read_json
from pyqkern.nn.recurrent import QLSTM
from pyqkern.ops import encoder as ops_encoder
from pyqkern.schemes import SCHEMES

ops = torch.ops.pyqkern
ROWS = [1, 2, 4, 5, 9, 16]  # rows of every kernel: one, a few, a tile
WIDEST = INT8_LINEAR_MAX_K


def codes(k: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
    """[5, k]: all at the one end, all at the other, and alternating by ones, by twos and by fours."""
    at = torch.arange(k)
    rows = [torch.full((k,), low), torch.full((k,), high)]
    return torch.stack(rows + [torch.where(at // width % 2 == 0, low, high) for width in (1, 2, 4)]).to(dtype)


def exact(a: Tensor, w: Tensor) -> Tensor:
    return a.long() @ w.long().T


# ---- INT8: int32 sums


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_the_longest_product(isa: str, dtype: torch.dtype) -> None:
    k = INT8_MATMUL_MAX_K[dtype]
    low, high = QRANGE[dtype]
    assert max(-low, high) * 128 * k < 2**31 <= max(-low, high) * 128 * (k + 1)
    a, w = codes(k, low, high, dtype).repeat(4, 1), codes(k, -128, 127, torch.int8).repeat(4, 1)
    expected = exact(a[:5], w[:5]).repeat(4, 4)
    assert expected.abs().max() == max(-low, high) * 128 * k  # the sum that nearly fills an int32 is among them
    for m in ROWS:
        y = int8_matmul(a[:m], w)
        assert y.dtype is torch.int32 and torch.equal(y.long(), expected[:m])
    with pytest.raises(ValueError, match=f"K must be at most {k} for .* got {k + 1}; split K"):
        int8_matmul(torch.zeros(1, k + 1, dtype=dtype), torch.zeros(1, k + 1, dtype=torch.int8))


def inputs(k: int) -> Tensor:
    """Rows whose codes are all at the top, all at the bottom, and at both ends."""
    return torch.cat([torch.ones(1, k), -torch.ones(1, k), codes(k, -1, 1, torch.float32)[2:]])


@pytest.mark.parametrize("symmetric, bits", [(False, 8), (True, 8), (False, 7)])
@pytest.mark.parametrize("k, least", [(WIDEST, -127), (INT8_MATMUL_MAX_K[torch.uint8], -128)])
def test_the_widest_linear(isa: str, k: int, least: int, symmetric: bool, bits: int) -> None:
    """The tail is (sx * sw) * float(sum), of integers that are exact in int64."""
    x, w, sw = inputs(k).repeat(4, 1), codes(k, least, 127, torch.int8).repeat(4, 1), torch.linspace(0.5, 2, 20)
    sx, zero = choose_qparams_affine(x, dtype=torch.uint8, axis=0, symmetric=symmetric, bits=8)
    if bits == 7:
        q, sx, zero = reference.int8_quantize_rows(x, False, 7)
    else:
        q = quantize_affine(x, sx, zero, axis=0, dtype=torch.uint8)
    sums = exact(q.long() - zero.long()[:, None], w)
    assert q[0].eq(255 if bits == 8 else 127).all() and sums.abs().max() >= (2**bits // 2 - 1) * 127 * k
    expected = (sx[:, None] * sw) * sums.float()
    x, expected = x.repeat(4, 1), expected.repeat(4, 1)
    for packed in (ops.int8_pack(w), ops.int8_pack(w, True)):  # and as AVX2 splits it for many rows
        assert torch.equal(ops.int8_unpack(packed, *w.shape), w)
        for m in (*ROWS, 80):
            assert torch.equal(ops.int8_linear(x[:m], packed, sw, None, "none", symmetric, bits), expected[:m])


@pytest.mark.parametrize("bits", [8, 7])
@pytest.mark.parametrize("at_top", [False, True])
def test_the_widest_linear_of_given_ranges(isa: str, bits: int, at_top: bool) -> None:
    """Codes at one end and the zero point at the other: the products with the zero point are as large as the sums."""
    k, top = WIDEST, 2**bits - 1
    zero = top if at_top else 0
    q = codes(k, 0, top, torch.uint8).repeat(4, 1)
    w, sw = codes(k, -127, 127, torch.int8).repeat(4, 1), torch.linspace(0.5, 2, 20)
    sums = exact(q.long() - zero, w)
    assert sums.abs().max() == top * 127 * k
    expected = (0.25 * sw) * sums.float()
    given = torch.tensor([0.25]), torch.tensor([zero], dtype=torch.int32)
    for m in ROWS:
        x = (q[:m].float() - zero) * 0.25
        y = ops.int8_linear_static(x, ops.int8_pack(w), sw, None, "none", *given, bits)
        assert torch.equal(y, expected[:m])


@pytest.mark.parametrize("bits", [7, 8])
def test_bytes_that_are_no_packed_weight_give_some_numbers(isa: str, bits: int) -> None:
    """Their sums can be any int32; what is taken off is taken off modulo 2^32, which the sanitizer agrees to."""
    generator = torch.Generator().manual_seed(0)
    packed = ops.int8_pack(integers((40, 96), 1, torch.int8), True)
    packed = torch.randint(-128, 128, packed.shape, dtype=torch.int8, generator=generator)
    static = torch.tensor([0.02]), torch.tensor([90], dtype=torch.int32)
    for m in (*ROWS, 70):
        x = torch.randn(m, 96, generator=generator)
        for y in (
            ops.int8_linear(x, packed, torch.ones(40), None, "none", False, bits),
            ops.int8_linear_static(x, packed, torch.ones(40), None, "none", *static, bits),
        ):
            assert y.shape == (m, 40) and y.isfinite().all()


def test_a_linear_that_is_too_wide_is_refused() -> None:
    x, w, one = torch.ones(1, WIDEST + 1), torch.ones(1, WIDEST + 1, dtype=torch.int8), torch.ones(1)
    packed = ops.int8_pack(w)
    said = f"K must be at most {WIDEST} .* got {WIDEST + 1}"
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=said):
            ops.int8_linear(x.to(device), packed.to(device), one.to(device), None, "none", False)
    with pytest.raises(ValueError, match=said):
        ops.int8_linear_static(x, packed, one, None, "none", one, torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match=said):
        ops.int8_linear_outlier(x, packed, one, None, 6.0, False)


def test_codes_of_128_below_zero_are_packed_as_far_as_their_sums_fit() -> None:
    k = INT8_MATMUL_MAX_K[torch.uint8]
    assert 255 * 128 * k < 2**31 <= 255 * 128 * (k + 1)
    w = torch.full((1, k + 1), -127, dtype=torch.int8)
    assert torch.equal(ops.int8_unpack(ops.int8_pack(w), 1, k + 1), w)
    w[0, 7] = -128
    with pytest.raises(ValueError, match=rf"weight must be in \[-127, 127\] where K={k + 1} is above {k}.* got -128"):
        ops.int8_pack(w)


@pytest.mark.parametrize("name", [name for name, one in SCHEMES.items() if one.max_in_features])
def test_modules_are_as_wide_as_their_scheme_says(name: str) -> None:
    scheme = SCHEMES[name]
    assert scheme.max_in_features == WIDEST
    kind = QLinear._classes[type(scheme)]
    assert kind(WIDEST, 1, True, scheme, "meta").in_features == WIDEST
    with pytest.raises(ValueError, match=f"in_features must be at most {WIDEST} .* got {WIDEST + 1}"):
        kind(WIDEST + 1, 1, True, scheme, "meta")


def test_a_model_with_layers_at_the_limit_and_beyond() -> None:
    def model() -> nn.Module:
        return nn.ModuleDict({"at": nn.Linear(WIDEST, 1), "beyond": nn.Linear(WIDEST + 1, 1)})

    with pytest.warns(UserWarning, match="1 too wide"):
        made = replace_linear(model())
    assert isinstance(made["at"], QLinear) and type(made["beyond"]) is nn.Linear
    assert f"takes up to {WIDEST} in_features, not {WIDEST + 1}" in str(summary(made))
    assert all(isinstance(layer, QLinear) for layer in replace_linear(model(), "nf4").values())
    tables = nn.ModuleDict({"at": nn.Embedding(2, WIDEST), "beyond": nn.Embedding(2, WIDEST + 1)})
    made = replace_embedding(tables)
    assert isinstance(made["at"], QEmbedding) and type(made["beyond"]) is nn.Embedding


@pytest.mark.parametrize("k", [WIDEST, WIDEST + 1, INT8_MATMUL_MAX_K[torch.uint8]])
def test_rows_of_an_embedding_have_no_sums(isa: str, k: int) -> None:
    least = -128 if k == INT8_MATMUL_MAX_K[torch.uint8] else -127
    w, scale = codes(k, least, 127, torch.int8), torch.rand(5) + 0.1
    ids = torch.tensor([4, 0, 0, 3])
    rows = ops.int8_embedding(ids, ops.int8_pack(w), scale, k, torch.float32)
    assert torch.equal(rows, scale[ids, None] * w[ids].float())
    for bad in (-1, 5, 2**31, -(2**62)):
        with pytest.raises(IndexError, match=rf"ids must be within \[0, 5\), got {bad}"):
            ops.int8_embedding(torch.tensor([1, bad]), ops.int8_pack(w), scale, k, torch.float32)


# ---- 4 bits: sums of a block


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("blocksize, k", [(64, 66560), (512, 4096), (1024, 4096), (2048, 4096), (4096, 8192)])
def test_extreme_integers_of_4_bits(isa: str, quant_type: str, blocksize: int, k: int) -> None:
    """The longest blocks, and rows wider than INT8's limit: each block's sum is scaled by itself."""
    n, order = 18, CODEBOOKS[quant_type].order
    w = codes(k, int(order[0]), int(order[-1]), torch.uint8).repeat(4, 1)[:n]
    scales = torch.linspace(0.5, 2, n * k // blocksize)
    flat = Weight4bit(pack(w), scales, None, None, None, quant_type, blocksize, (n, k))
    sizes = (n, k, blocksize)
    in_panels = flat._replace(packed=cpu.pack_4bit(flat.packed, *sizes), absmax=cpu.pack_scales(scales, *sizes))
    for m in ROWS:
        x = inputs(k).repeat(4, 1)[:m]
        y = cpu.linear_4bit(x, in_panels, None, "int8")
        assert torch.equal(y, reference.linear_4bit(x, flat, None, "int8"))


# ---- recurrent layers


@pytest.mark.parametrize("symmetric, bits", [(False, 8), (True, 8), (False, 7)])
def test_the_widest_recurrent_layer(isa: str, symmetric: bool, bits: int) -> None:
    """With h = 0 and no bias a step of "rnn_relu" is relu of the linear."""

    def run(x: Tensor, w: Tensor) -> Tensor:
        n, zero = w.shape[0], torch.zeros(w.shape[0], w.shape[0], dtype=torch.int8)
        weights, scales = [ops.int8_pack(w), ops.int8_pack(zero)], [torch.linspace(0.5, 2, n), torch.ones(n)]
        h = torch.zeros(x.shape[1], n)
        return ops.recurrent(x, None, weights, scales, [], h, None, "rnn_relu", False, symmetric, bits)[0]

    x, w = inputs(WIDEST), codes(WIDEST, -127, 127, torch.int8)
    y = run(x.unsqueeze(0), w)
    linear = ops.int8_linear(x, ops.int8_pack(w), torch.linspace(0.5, 2, 5), None, "none", symmetric, bits)
    assert torch.equal(y[0], linear.relu()) and y.max() > 0.99 * 127 * WIDEST / 2
    with pytest.raises(ValueError, match=f"sizes must be at most {WIDEST} .* got {WIDEST + 1}"):
        run(torch.ones(1, 1, WIDEST + 1), torch.ones(1, WIDEST + 1, dtype=torch.int8))


def test_the_widest_projection(isa: str) -> None:
    """All hidden units alike, codes of 255 times 127: the projection is that of two units times half their number.

    Of y / (two / 2 * H), sum and product round once each in y, the product and the quotient in the rest: 4 * 2**-24.
    """

    def run(hidden: int) -> Tensor:
        shapes = ((4 * hidden, 1), (4 * hidden, 1), (1, hidden))
        weights = [ops.int8_pack(torch.full(shape, 127, dtype=torch.int8)) for shape in shapes]
        scales = [torch.full(shape[:1], 0.01) for shape in shapes]
        h, c = torch.zeros(1, 1), torch.zeros(1, hidden)
        y: Tensor = ops.recurrent(torch.ones(1, 1, 1), None, weights, scales, [], h, c, "lstm", False)[0]
        return y

    y, two = run(WIDEST).double(), run(2).double()
    assert two > 0.1 and (y / (two / 2 * WIDEST) - 1).abs() <= 4 * 2.0**-24
    with pytest.raises(ValueError, match=f"sizes must be at most {WIDEST} .* got {WIDEST + 1}"):
        run(WIDEST + 1)


@pytest.mark.parametrize("k, p, hidden", [(0, 2, 3), (1, 0, 3), (1, 2, 0)])
def test_a_recurrent_layer_has_no_size_of_zero(k: int, p: int, hidden: int) -> None:
    shapes = ((4 * hidden, k), (4 * hidden, p), (p, hidden))
    weights = [ops.int8_pack(torch.ones(shape, dtype=torch.int8)) for shape in shapes]
    scales, h, c = [torch.ones(shape[:1]) for shape in shapes], torch.zeros(1, p), torch.zeros(1, hidden)
    with pytest.raises(ValueError, match=f"sizes of x, h and c must be positive, got {k}, {p} and {hidden}"):
        ops.recurrent(torch.ones(1, 1, k), None, weights, scales, [], h, c, "lstm", False)


def test_a_recurrent_layer_that_is_too_wide_says_so() -> None:
    with pytest.raises(ValueError, match=f"at most {WIDEST} for int8 .* got {WIDEST + 1}.*exclude"):
        replace_recurrent(nn.ModuleDict({"rnn": nn.LSTM(WIDEST + 1, 1)}))
    assert isinstance(replace_recurrent(nn.ModuleDict({"rnn": nn.LSTM(WIDEST, 1)}))["rnn"], QLSTM)


# ---- encoder layers


class Wide:
    """Weights at the ends of their range; sizes: hidden, head size, wide. All of a wide vector is one value.

    So a linear of it has the codes 255, or 0 with the zero point 255, and sums as large as there are.
    """

    def __init__(self, hidden: int, head_size: int, wide: int) -> None:
        shapes = [(head_size, hidden)] * 3 + [(hidden, head_size), (wide, hidden), (hidden, wide)]
        self.codes = [
            torch.full((n, k), 127, dtype=torch.int8) if n > 8 else codes(k, -127, 127, torch.int8).repeat(2, 1)[:n]
            for n, k in shapes
        ]
        self.scales = [(torch.linspace(0.2, 1, n) if n <= 8 else torch.ones(n)) / 127 / k for n, k in shapes]
        self.norms = [torch.ones(hidden), torch.zeros(hidden)] * 2
        self.rest = (1, head_size**-0.5, [1e-5, 1e-5], "none", False)
        self.x = inputs(hidden)[None, 2:]  # the others would be nothing for LayerNorm

    def packed(self) -> list[Tensor]:
        return [ops.int8_pack(weight) for weight in self.codes]

    def __call__(self) -> Tensor:
        y: Tensor = ops.encoder_layer(
            self.x, None, self.packed(), self.scales, [torch.empty(0)] * 6, self.norms, *self.rest
        )
        return y


@pytest.mark.parametrize("sizes", [(WIDEST, 3, 2), (7, 3, WIDEST), (7, WIDEST, 3)])
def test_the_widest_encoder_layer(isa: str, sizes: tuple[int, int, int]) -> None:
    """LayerNorm sums `hidden` floats, which moves the mean and the variance by hidden * 2**-24 of them at most."""
    layer = Wide(*sizes)
    expected = reference_layer(layer.x, None, layer.codes, layer.scales, [None] * 6, layer.norms, *layer.rest)
    assert expected.isfinite().all() and expected.std() > 0.5
    assert ((layer() - expected).abs() <= max(sizes[0], 8) * 2.0**-24 * expected.abs().max()).all()


@pytest.mark.parametrize("sizes", [(WIDEST + 1, 3, 2), (7, 3, WIDEST + 1), (7, WIDEST + 1, 3)])
def test_an_encoder_layer_that_is_too_wide_is_refused(sizes: tuple[int, int, int]) -> None:
    layer = Wide(*sizes)
    with pytest.raises(ValueError, match=f"at most {WIDEST}, got {WIDEST + 1}"):
        layer()
    with pytest.raises(ValueError, match=f"at most {WIDEST}"):
        parts = (layer.packed(), layer.scales, [None] * 6, layer.norms, *layer.rest, ops_encoder.Form())
        ops_encoder._run(layer.x, None, *parts, None, ())


@pytest.mark.long
def test_the_longest_sentence(isa: str) -> None:
    """Equal keys have probabilities with codes of 255, equal values have codes of 127: 255 * 127 * 66311 < 2**31.

    A sentence of one token over and over is that token's own, up to roundings of its context by 5 * 2**-24, which
    move none of this layer's codes.
    """
    layer = Layer(hidden=16, heads=1, head_size=4, wide=16)
    token = layer.input(1, 1)
    y = layer(token.expand(1, WIDEST, 16))
    assert torch.equal(y, layer(token).expand_as(y))


# ---- affine


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("axis", [None, 0])
def test_zero_points_at_both_ends_and_beyond(isa: str, dtype: torch.dtype, bits: int, axis: int | None) -> None:
    low, high = (end >> (8 - bits) for end in QRANGE[dtype])
    x = torch.arange(-300.0, 300).repeat(2, 1)

    def qparams(zero: int) -> tuple[Tensor, Tensor]:
        shape = () if axis is None else (2,)
        return torch.ones(shape), torch.full(shape, zero)

    for zero in (low, high):
        scale, zero_point = qparams(zero)
        q = quantize_affine(x, scale, zero_point, axis=axis, dtype=dtype, bits=bits)
        assert torch.equal(q.long(), (x.long() + zero).clamp(low, high))
        assert torch.equal(dequantize_affine(q, scale, zero_point, axis=axis), q.float() - zero)
    for zero in (low - 1, high + 1):
        with pytest.raises(ValueError, match=rf"zero_point must be within \[{low}, {high}\].* got {zero}"):
            quantize_affine(x, *qparams(zero), axis=axis, dtype=dtype, bits=bits)


ENDS = [0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 0.5, -1.5, 127.5, 3e38, -3e38, float("inf"), float("-inf")]


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 2.0**-126, 0.1, 1.0, 1e30, 3.4e38])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
@pytest.mark.filterwarnings("ignore:.*quantize_per:UserWarning", "ignore:.*quantize_per:DeprecationWarning")
def test_one_element_is_torchs_bit_for_bit(isa: str, shape: tuple[int, ...], scale: float) -> None:
    """torch's loops over vectors and its loop over what is left of them agree with each other and with ours."""
    for dtype, torch_dtype in ((torch.int8, torch.qint8), (torch.uint8, torch.quint8)):
        low, high = QRANGE[dtype]
        for zero in (low, high, 0, 3):
            ties = [(code + 0.5 - zero) * scale for code in (low, -1, 2, 64)]
            for value in [*ENDS, *ties]:
                x = torch.tensor(value, dtype=torch.float32).expand(shape).clone()
                expected: Any = torch.quantize_per_tensor(x, scale, zero, torch_dtype)
                q = quantize_affine(x, scale, zero, dtype=dtype)
                if (x == 0).all() and scale < 2.0**-128:  # times an infinite reciprocal: NaN, and qmax for torch
                    assert q == zero
                    continue
                assert torch.equal(q, expected.int_repr()), (value, zero)
                assert torch.equal(dequantize_affine(q, scale, zero), expected.dequantize())
                if not shape:
                    continue
                each = torch.tensor([scale]), torch.tensor([zero])
                expected = torch.quantize_per_channel(x, *each, 0, torch_dtype)
                q = quantize_affine(x, *each, axis=0, dtype=dtype)
                assert torch.equal(q, expected.int_repr()), (value, zero)
                assert torch.equal(dequantize_affine(q, *each, axis=0), expected.dequantize())


# ---- files


def test_json_is_read_to_its_deepest_level(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for levels in (DEEPEST, DEEPEST + 1):
        file.write_text('{"a": ' * (levels - 1) + "{}" + "}" * (levels - 1))
        if levels > DEEPEST:
            with pytest.raises(ValueError, match=f"config.json must be JSON of at most {DEEPEST} levels"):
                read_json(file)
        else:
            assert list(read_json(file)) == ["a"]
