"""The split form of a packed INT8 weight: what is in it, and that every product takes it and gives the same bits."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import floats, integers
from torch import Tensor

import pyqkern
from pyqkern import _C
from pyqkern.backends import cpu, reference

ops = torch.ops.pyqkern
LINE, ROWS = 64, 16  # bytes of a line, rows of a panel
KINDS = ["gaussian", "uniform", "extreme", "one panel", "alternating"]


def weight(kind: str, n: int, k: int, seed: int = 0) -> Tensor:
    """int8 [n, k]. Of "one panel" only the first panel finds no room for its excess."""
    g = torch.Generator().manual_seed(seed)
    gaussian = (torch.randn(n, k, generator=g) * 34).round().clamp(-127, 127).to(torch.int8)
    if kind == "uniform":
        return integers((n, k), seed, torch.int8)
    if kind == "extreme" and n >= ROWS:
        return torch.full((n, k), -128 if seed % 2 else 127, dtype=torch.int8)
    if kind == "one panel":
        gaussian[:ROWS, k // 2 :] = 127
    if kind == "alternating":
        return torch.tensor([127, 127, -127, -127, -128], dtype=torch.int8).repeat(n, k // 5 + 1)[:, :k].contiguous()
    return gaussian


def parts(packed: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The panels [panels, lines, 64] and the bytes of their excess [panels, bytes]: views of the packed weight."""
    panels, lines = packed.shape[0], cpu.packed_shape(1, k)[1]
    flat = packed.view(-1)
    split = panels * lines * LINE
    return flat[:split].view(panels, lines, LINE), flat[split:].view(panels, -1)


def excess_of(packed: Tensor, k: int) -> tuple[list[int], bool, Tensor]:
    """What csrc's kernels.h describes, read anew: pairs of lines per panel, whether it pays, the excess [n, k]."""
    segments, capacity = -(-k // 256), (k // 2 + 320) // 4 * 4
    pairs, behind = [], parts(packed, k)[1]
    excess = torch.zeros((len(behind) * ROWS, segments * 256), dtype=torch.int64)
    for p, part in enumerate(behind):
        pairs.append(int(part[:4].clone().view(torch.int32)))
        fours = part[LINE:][: ROWS * segments].view(torch.uint8).view(ROWS, segments).tolist()
        low = part[LINE + ROWS * segments :][:capacity].view(torch.uint8).tolist()
        value = part[LINE + ROWS * segments + capacity :][:capacity].tolist()
        i = 0
        for n in range(ROWS):
            for s in range(segments):
                for _ in range(4 * fours[n][s]):
                    assert abs(value[i]) <= 64
                    excess[p * ROWS + n, 256 * s + low[i]] += value[i]
                    i += 1
        assert i <= capacity
    return pairs, bool(behind[0, 4]), excess


@given(kind=st.sampled_from(KINDS), n=st.integers(1, 40), k=st.integers(256, 1100), seed=st.integers(0, 9))
def test_main_and_excess_are_the_weight_and_four_products_of_main_fit_int16(
    kind: str, n: int, k: int, seed: int
) -> None:
    w = weight(kind, n, k, seed)
    packed = ops.int8_pack(w, True)
    assert packed.shape == cpu.packed_shape(n, k, True)
    assert torch.equal(parts(packed, k)[0], reference.panels(w))
    pairs, pays, excess = excess_of(packed, k)
    everything = -(-k // 8)
    assert pays == (10 * sum(pairs) >= 9 * everything * packed.shape[0])
    padded = torch.zeros((packed.shape[0] * ROWS, 8 * everything), dtype=torch.int64)
    padded[:n, :k] = w
    assert not excess[:, 8 * everything :].any()
    main = padded - excess[:, : 8 * everything]
    for p, split in enumerate(pairs):
        rows, last = slice(p * ROWS, (p + 1) * ROWS), 8 * split
        assert not excess[rows, last:].any()
        # [row, pair of lines, line, half, 2] -> the four whose products are added
        four = main[rows, :last].view(ROWS, split, 2, 2, 2).transpose(2, 3)
        for sign in (1, -1):
            assert (255 * (sign * four).clamp(min=0).sum((-2, -1)) < 2**15).all()
    if kind == "gaussian":
        assert pays
    if kind == "extreme" and n >= ROWS:
        assert not pays


@given(
    kind=st.sampled_from(KINDS), m=st.integers(30, 140), n=st.integers(1, 70), k=st.integers(256, 700),
    seed=st.integers(0, 9), symmetric=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_the_linear_has_the_same_bits_with_either_form(
    isa: str, kind: str, m: int, n: int, k: int, seed: int, symmetric: bool, dtype: torch.dtype
) -> None:
    w, x = weight(kind, n, k, seed), floats((m, k), seed, dtype)
    scale, bias = torch.rand(n) * 0.01 + 1e-4, floats((n,), seed, dtype)
    split = ops.int8_linear(x, ops.int8_pack(w, True), scale, bias, "relu", symmetric, 8)
    expected = reference.int8_linear(x, w, scale, bias, "relu", symmetric)
    assert ((split == expected) | (split.isnan() & expected.isnan())).all()
    how = (scale, bias, "relu", torch.tensor([0.02]), torch.tensor([100], dtype=torch.int32))
    static = ops.int8_linear_static(x, ops.int8_pack(w, True), *how)
    expected = reference.int8_linear_static(x, w, *how)
    assert ((static == expected) | (static.isnan() & expected.isnan())).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [256, 257, 259, 2050, 4095, 4096])
def test_extreme_codes(isa: str, kind: str, k: int) -> None:
    """Rows of codes 0, 255, both in turn, and a single one: every sum that the folds can come to."""
    w = weight(kind, 33, k)
    codes = torch.zeros((32, k))
    codes[1:] = 255
    codes[2, ::2] = 0
    codes[3, 1::2] = 0
    codes[4:20, :] = 255.0 * (torch.rand(16, k, generator=torch.Generator().manual_seed(k)) < 0.5)
    codes[20:, : k - 1] = 0
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    for packed in (ops.int8_pack(w, True), ops.int8_pack(w)):
        y = ops.int8_linear_static(codes, packed, torch.ones(33), None, "none", one, zero)
        assert torch.equal(y, (codes.double() @ w.double().T).float())


def test_every_thread_and_block_of_rows_gives_the_same_bits(isa: str, two_threads: None) -> None:
    x, w, scale = floats((700, 520), 1, torch.float32), weight("one panel", 200, 520), torch.rand(200)
    packed = ops.int8_pack(w, True)
    torch.set_num_threads(1)
    one = ops.int8_linear(x, packed, scale, None, "gelu", False, 8)
    torch.set_num_threads(2)
    assert torch.equal(ops.int8_linear(x, packed, scale, None, "gelu", False, 8), one)
    rows = [ops.int8_linear(x[i : i + 1], packed, scale, None, "gelu", False, 8) for i in range(0, 700, 35)]
    assert torch.equal(torch.cat(rows), one[::35])


@given(seed=st.integers(0, 10**6), k=st.sampled_from([256, 258, 4096]))
def test_no_excess_leads_out_of_the_buffers(isa: str, seed: int, k: int) -> None:
    """Whatever a packed tensor holds, the product ends and has its shape; the sanitizers watch."""
    packed = ops.int8_pack(weight("gaussian", 20, k), True)
    behind = parts(packed, k)[1]
    behind[:] = integers(tuple(behind.shape), seed, torch.int8)
    if seed % 3 == 0:
        behind[:, :LINE] = -1
    behind[0, 4] = 1
    y = ops.int8_linear(torch.randn(40, k), packed, torch.ones(20), None, "none", False, 8)
    assert y.shape == (40, 20)


# ---- the modules


def layer(scheme: str, in_features: int = 256, out_features: int = 64) -> pyqkern.QLinear:
    torch.manual_seed(0)
    linear = torch.nn.Linear(in_features, out_features)
    torch.nn.init.normal_(linear.weight)
    return pyqkern.QLinear.from_linear(linear, scheme)


def test_only_linears_that_it_serves_take_the_memory(isa: str) -> None:
    def is_split(layer: pyqkern.QLinear) -> bool:
        n, k = layer.out_features, layer.in_features
        return layer.packed.shape != cpu.packed_shape(n, k)  # type: ignore[union-attr]

    split = isa == "avx2"
    assert is_split(layer("int8")) is split
    assert is_split(layer("int8-outlier")) is split
    assert not is_split(layer("int8-a7")) and not is_split(layer("int8-weight-only"))
    assert not is_split(layer("int8", 255)) and not is_split(layer("int8", 4097))
    assert is_split(layer("int8", 256, 16 * 256)) is split and not is_split(layer("int8", 256, 16 * 256 + 1))
    memory = layer("int8", 768, 768).packed.numel() / 768**2  # type: ignore[union-attr]
    assert memory < (1.15 if split else 1.02)


@pytest.mark.skipif("avx2" not in pyqkern.isas(), reason="needs the ISA that splits")
def test_a_layer_packed_for_one_cpu_is_read_on_another() -> None:
    x, results = torch.randn(40, 256), []
    for first, second in (("avx2", "scalar"), ("scalar", "avx2")):
        previous = _C.set_isa(first)
        saved = pickle.dumps(layer("int8"))
        _C.set_isa(second)
        read = pickle.loads(saved)
        results.append(read(x))
        read.load_state_dict(layer("int8").state_dict())
        results.append(read(x))
        tied = layer("int8")
        tied.weight = read.weight
        results.append(copy.deepcopy(tied)(x))
        file = io.BytesIO()
        torch.save(read, file)
        results.append(torch.load(io.BytesIO(file.getvalue()), weights_only=False)(x))
        _C.set_isa(previous)
    assert all(torch.equal(result, results[0]) for result in results)


@torch.inference_mode()
def test_an_encoder_layer_has_the_same_bits_with_either_form() -> None:
    """Three sentences of 50 tokens, one of them short: blocks of more and of fewer rows than the split form is for."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4, vocab_size=100
    )
    model, results = transformers.BertModel(config).eval(), []
    ids, mask = torch.randint(0, 100, (3, 50)), torch.ones(3, 50, dtype=torch.long)
    mask[1, 7:] = 0
    for isa in pyqkern.isas():
        previous = _C.set_isa(isa)
        fused = pyqkern.optimize(copy.deepcopy(model), "int8")
        results.append(fused(ids, mask).last_hidden_state[mask.bool()])
        results.append(fused(ids[1:2, :7]).last_hidden_state[0])
        _C.set_isa(previous)
    assert all(torch.equal(result, results[i % 2]) for i, result in enumerate(results))
    assert torch.equal(results[0][50:57], results[1])
