"""QMultiheadAttention: what nn.MultiheadAttention takes and returns, against torch's with the dequantized weights."""

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pyqkern import QLinear, QMultiheadAttention, replace_linear
from pyqkern.nn.attention import INPUTS, fold, projections, unfold
from pyqkern.schemes import SCHEMES

EMBED, HEADS, BATCH, L, S = 64, 4, 3, 5, 7
OPTIONS: list[dict[str, Any]] = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"kdim": 32, "vdim": 96},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 32, "dropout": 0.5},
]


def made(seed: int = 0, **options: Any) -> nn.MultiheadAttention:
    """An attention whose biases are no zeros."""
    torch.manual_seed(seed)
    attention = nn.MultiheadAttention(EMBED, HEADS, **options).eval()
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return attention


def pair(**options: Any) -> tuple[nn.MultiheadAttention, QMultiheadAttention]:
    """A quantized attention whose activations are in float, and torch's of the weights that it has."""
    quantized: Any = replace_linear(made(**options), "int8-weight-only")
    reference = made(**options)
    unfold(reference)
    for name in (*INPUTS, "out_proj"):
        getattr(reference, name).weight.data = getattr(quantized, name).weight.clone()
    fold(reference)
    assert type(reference) is nn.MultiheadAttention and type(quantized) is QMultiheadAttention
    return reference, quantized


def inputs(attention: nn.MultiheadAttention, batched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    batch = (BATCH,) if batched else ()
    shapes = ((L, *batch, EMBED), (S, *batch, attention.kdim), (S, *batch, attention.vdim))
    q, k, v = (torch.randn(shape) for shape in shapes)
    return tuple(x.transpose(0, 1) if batched and attention.batch_first else x for x in (q, k, v))  # type: ignore[return-value]


def same(found: Any, expected: Any) -> None:
    """Outputs and weights. Sums of up to 96 products, in another order: 96 * 2**-24 of their magnitudes, about 10."""
    for x, y in zip(found, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.shape == y.shape and x.dtype is y.dtype
            torch.testing.assert_close(x, y, rtol=1e-5, atol=96 * 2**-24 * 10)


MASKS = {
    "none": None,
    "bool": torch.arange(L)[:, None] + 2 < torch.arange(S),
    "float": torch.linspace(-2, 1, L * S).view(L, S),
    "per head": (torch.arange(BATCH * HEADS * L * S).view(BATCH * HEADS, L, S) % 5 == 0),
}


# ---- what it computes


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_equals_torchs_with_the_dequantized_weights(options: dict[str, Any], mask: str) -> None:
    reference, quantized = pair(**options)
    padding = torch.arange(S) >= torch.tensor([7, 3, 5])[:, None]
    x = inputs(reference)
    for need, average, padded in itertools.product((True, False), repeat=3):
        given: dict[str, Any] = {"need_weights": need, "average_attn_weights": average, "attn_mask": MASKS[mask]}
        if padded:
            floats = mask == "float"
            given["key_padding_mask"] = torch.zeros(padding.shape).masked_fill(padding, -1e9) if floats else padding
        with torch.no_grad():
            same(quantized(*x, **given), reference(*x, **given))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_without_a_batch(options: dict[str, Any]) -> None:
    reference, quantized = pair(**options)
    x = inputs(reference, batched=False)
    for given in (
        {},
        {"need_weights": False},
        {"key_padding_mask": torch.arange(S) > 4, "average_attn_weights": False},
    ):
        same(quantized(*x, **given), reference(*x, **given))


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_causal_mask_and_its_hint(batch_first: bool) -> None:
    reference, quantized = pair(batch_first=batch_first)
    x = inputs(reference)[0]
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    for need in (True, False):
        expected = reference(x, x, x, attn_mask=mask, need_weights=need)
        for hint in (True, False):
            same(quantized(x, x, x, attn_mask=mask, is_causal=hint, need_weights=need), expected)
    with pytest.raises(ValueError, match="attn_mask must be given with is_causal=True"):
        quantized(x, x, x, is_causal=True)


def test_the_hint_hides_nothing_that_the_mask_shows() -> None:
    """bias_k stands behind the keys, where the mask has no column: every query sees it."""
    _, quantized = pair(add_bias_kv=True)
    x = inputs(quantized)[0]
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    expected = quantized(x, x, x, attn_mask=mask, need_weights=True)[0]
    found = quantized(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("need", [True, False])
def test_dropout_in_training(need: bool) -> None:
    reference, quantized = pair(dropout=0.5)
    x = inputs(reference)
    calm = quantized(*x)[0]
    reference.train(), quantized.train()
    torch.manual_seed(1)
    expected = reference(*x, need_weights=need)
    torch.manual_seed(1)
    found = quantized(*x, need_weights=need)
    same(found, expected)
    assert (found[0] - calm).abs().max() > 0.01


@pytest.mark.parametrize("scheme", [name for name, one in SCHEMES.items() if not one.needs_ranges])
@pytest.mark.parametrize("options", [{}, {"kdim": 128, "vdim": 64}], ids=str)
def test_schemes(scheme: str, options: dict[str, Any]) -> None:
    attention = made(**options)
    x = inputs(attention)
    with torch.no_grad():
        expected = attention(*x)[0]
        quantized: Any = replace_linear(attention, scheme)
        found = quantized(*x)[0]
    assert all(getattr(quantized, name).scheme.name == scheme for name in (*INPUTS, "out_proj"))
    share = 0.2 if SCHEMES[scheme].bits == 4 else 0.03
    assert 0 < (found - expected).norm() < share * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    attention = made()
    x = inputs(attention)
    expected = attention(*x)[0]
    found = replace_linear(attention).to(dtype)(*(one.to(dtype) for one in x), attn_mask=MASKS["bool"])
    assert found[0].dtype is found[1].dtype is dtype
    found = attention(*(one.to(dtype) for one in x))[0]
    assert (found.float() - expected).norm() < 0.05 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        found = replace_linear(made())(*x, attn_mask=MASKS["float"], need_weights=False)[0]
    assert found.dtype is torch.bfloat16


def test_gradients_go_to_the_inputs_the_biases_and_bias_kv() -> None:
    reference, quantized = pair(add_bias_kv=True)
    grads = []
    for attention in (reference, quantized):
        torch.manual_seed(2)
        x = [one.requires_grad_() for one in inputs(reference)]
        y, weights = attention(*x, attn_mask=MASKS["bool"])
        (y.square().sum() + weights.square().sum()).backward()
        bias = attention.in_proj_bias.grad if attention is reference else None
        if bias is None:
            bias = torch.cat([getattr(attention, name).bias.grad for name in INPUTS])
        grads.append([*(one.grad for one in x), bias, attention.bias_k.grad, attention.bias_v.grad])
    for found, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ---- errors


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((5, 3, 64), (7, 3, 64), (6, 3, 64)), {}, "key and value one length"),
        (((5, 2, 64), (7, 3, 64), (7, 3, 64)), {}, "must have one batch size"),
        (((5, 3, 64), (7, 3, 64), (7, 3, 64)), {"attn_mask": torch.zeros(5, 6)}, r"attn_mask must be \[5, 7\] or"),
        (((5, 3, 64), (7, 3, 64), (7, 3, 64)), {"attn_mask": torch.zeros(3, 5, 7)}, r"or \[12, 5, 7\], got"),
        (((5, 3, 64), (7, 3, 64), (7, 3, 64)), {"key_padding_mask": torch.zeros(3, 6)}, r"must be \[3, 7\], got"),
        (((5, 3, 60), (7, 3, 64), (7, 3, 64)), {}, r"x must be \[..., in_features=64\]"),
    ],
)  # fmt: skip
def test_wrong_shapes(shapes: tuple[tuple[int, ...], ...], options: dict[str, Any], message: str) -> None:
    quantized = replace_linear(made())
    with pytest.raises(ValueError, match=message):
        quantized(*(torch.zeros(shape) for shape in shapes), **options)


def test_nested_tensors_are_refused() -> None:
    quantized = replace_linear(made(batch_first=True))
    x = torch.nested.nested_tensor([torch.randn(3, EMBED), torch.randn(5, EMBED)])
    with torch.no_grad(), pytest.raises(ValueError, match=r"got a nested one; use x.to_padded_tensor\(0.0\)"):
        quantized(x, x, x)


def test_it_has_no_constructor() -> None:
    with pytest.raises(TypeError, match=r"made of an nn\.MultiheadAttention, by replace_linear"):
        QMultiheadAttention(EMBED, HEADS)


# ---- other people's code reads the weights of an attention


def test_the_packed_weights_are_dequantized_copies() -> None:
    quantized: Any = replace_linear(made())
    x = inputs(quantized)[0]
    arguments = (EMBED, HEADS, quantized.in_proj_weight, quantized.in_proj_bias, None, None, False, 0.0)
    out = (quantized.out_proj.weight, quantized.out_proj.bias)
    with torch.no_grad():
        found = functional.multi_head_attention_forward(x, x, x, *arguments, *out, training=False)[0]
        expected = quantized(x, x, x)[0]
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert torch.equal(quantized.in_proj_weight[EMBED : 2 * EMBED], quantized.k_proj_weight)
    assert torch.equal(quantized.in_proj_bias[EMBED : 2 * EMBED], quantized.k_proj.bias)
    with pytest.raises(RuntimeError, match="dequantized copy"):
        quantized.in_proj_weight.data = torch.zeros(1)
    with pytest.raises(RuntimeError, match="dequantized copy"):
        nn.init.zeros_(quantized.in_proj_weight)
    with pytest.raises(
        AttributeError, match="in_proj_weight of a quantized attention is a dequantized copy; assign q_"
    ):
        quantized.in_proj_weight = nn.Parameter(torch.zeros(3 * EMBED, EMBED))
    other: Any = replace_linear(made(kdim=32, bias=False))
    assert other.in_proj_weight is None and other.in_proj_bias is None and other.k_proj_weight.shape == (EMBED, 32)


# ---- modules around it


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_dict_copies_and_pickles(options: dict[str, Any]) -> None:
    quantized, other = (replace_linear(made(seed, **options)) for seed in (0, 1))
    x = inputs(quantized)
    expected = quantized(*x)[0]
    assert not torch.equal(other(*x)[0], expected)
    other.load_state_dict(quantized.state_dict())
    file = io.BytesIO()
    torch.save(quantized, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for one in (other, copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized)), loaded):
        assert torch.equal(one(*x)[0], expected) and type(one) is QMultiheadAttention


@pytest.mark.parametrize("options", [{}, {"kdim": 32, "vdim": 96}, {"bias": False}], ids=str)
def test_unfolding_and_folding_changes_nothing(options: dict[str, Any]) -> None:
    attention = made(**options)
    for name, parameter in attention.named_parameters():
        parameter.requires_grad_("bias" in name)
    x, before = inputs(attention), {key: value.clone() for key, value in attention.state_dict().items()}
    expected, trained = attention(*x), {name: one.requires_grad for name, one in attention.named_parameters()}
    unfold(attention)
    assert type(attention) is QMultiheadAttention and all(type(one) is nn.Linear for one in attention.children())
    same(attention(*x), expected)
    fold(attention)
    after = attention.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert {name: one.requires_grad for name, one in attention.named_parameters()} == trained
    same(attention(*x), expected)


def test_projections_share_the_memory_of_the_weights() -> None:
    attention = made()
    before = attention.in_proj_weight.clone()
    with torch.no_grad():
        projections(attention)["k_proj"].weight.mul_(2)
    assert torch.equal(attention.in_proj_weight[EMBED : 2 * EMBED], 2 * before[EMBED : 2 * EMBED])


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_compile_and_export(scheme: str) -> None:
    quantized = replace_linear(made(batch_first=True), scheme)
    x = inputs(quantized)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = quantized

        def forward(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
            y, weights = self.attention(q, k, v, padding)
            return y + self.attention(y, y, y, need_weights=False)[0] + weights.sum()

    model, padding = Around().eval(), torch.arange(S) >= torch.tensor([7, 3, 5])[:, None]
    with torch.no_grad():
        expected = model(*x, padding)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(*x, padding)
        exported = torch.export.export(model, (*x, padding)).module()(*x, padding)
    for found in (compiled, exported):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    graph = str(torch.export.export(model, (*x, padding)).graph)
    assert graph.count("linear") >= 8 and isinstance(quantized.q_proj, QLinear)
