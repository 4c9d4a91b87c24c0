"""What the operator encoder_layer refuses, and what it says."""

from typing import Any

import pytest
import torch
from encoder_layer import Layer
from torch import Tensor

from pyqkern.ops import encoder as ops_encoder
from pyqkern.schemes import NF4


def test_bad_masks() -> None:
    layer = Layer()
    x = layer.input(2, 8)
    nan = torch.zeros(2, 1, 8, 8)
    nan[1, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="attention_mask must not hold NaN"):
        layer(x, nan)
    for shape in ((2, 8), (2, 1, 8, 7), (3, 1, 8, 8), (2, 2, 8, 8), (2, 1, 2, 8)):
        with pytest.raises(ValueError, match=r"attention_mask must be \[2 or 1, 3 or 1, 8 or 1, 8\], got"):
            layer(x, torch.ones(shape, dtype=torch.bool))
    with pytest.raises(TypeError, match="attention_mask must be bool or a float"):
        layer(x, torch.ones(2, 1, 8, 8, dtype=torch.int64))


def test_a_sentence_is_as_long_as_exact_sums_may_be() -> None:
    """255 * 127 * 66311 < 2**31; sums of that length are tested with the linear, whose kernel it is."""
    layer = Layer()
    assert ops_encoder.MAX_LENGTH == 66311 and 255 * 127 * 66311 < 2**31 <= 255 * 127 * 66312
    x = torch.zeros(1, 1, 48).expand(1, 66312, 48)
    with pytest.raises(ValueError, match=r"length must be at most 66311, .*, got 66312"):
        layer(x)
    with pytest.raises(ValueError, match=r"of at most 66311 tokens, got \[1, 66312, 48\]"):
        form = ops_encoder.Form()
        parts = (layer.packed, layer.scales, layer.biases, layer.norms, *layer.rest[:5], form)
        ops_encoder._run(x, None, *parts, None, ())


FOUR = ("int8", 0, [], None)


def test_bad_parts() -> None:
    def call(x: Tensor | None = None, **changed: Any) -> Tensor:
        layer = Layer()
        for name, value in changed.items():
            setattr(layer, name, value(getattr(layer, name)))
        return layer(layer.input(2, 8) if x is None else x)

    for message, x, changed in (
        (r"x must be fp32, bf16 or fp16 \[batch, length, 48\]", torch.zeros(2, 8, 47), {}),
        (r"x must be fp32, bf16 or fp16", torch.zeros(2, 48), {}),
        ("weights must be 6, got 5", None, {"packed": lambda p: p[:5]}),
        ("factors must be 2, got 1", None, {"rest": lambda r: (*r, *FOUR, None, [torch.ones(48)])}),
        (r"factors must be float32 \[48\]", None, {"rest": lambda r: (*r, *FOUR, None, [torch.ones(47)] * 2)}),
        ("norms must be 4, got 3", None, {"norms": lambda p: p[:3]}),
        ("the weight of query must be what int8_pack makes of", None, {"packed": lambda p: [p[4], *p[1:]]}),
        ("the bias of up must be floats", None, {"biases": lambda p: [*p[:4], p[4][1:], p[5]]}),
        ("norms must be floats", None, {"norms": lambda p: [p[0][1:], *p[1:]]}),
        ("heads must divide the 48 rows", None, {"rest": lambda r: (5, *r[1:])}),
        ("heads must divide the 48 rows", None, {"rest": lambda r: (0, *r[1:])}),
        ("eps must be two numbers", None, {"rest": lambda r: (*r[:2], [1e-5], *r[3:])}),
        ("activation must be one of none, relu", None, {"rest": lambda r: (*r[:3], "silu", r[4])}),
    ):
        with pytest.raises(ValueError, match=message):
            call(x, **changed)
    for message, x, changed in (
        (r"x must be fp32, bf16 or fp16", torch.zeros(2, 8, 48, dtype=torch.float64), {}),
        ("the scale of key must be float32", None, {"scales": lambda p: [p[0], p[1].double(), *p[2:]]}),
        ("norms must be floats", None, {"norms": lambda p: [p[0], p[1].half(), *p[2:]]}),
        ("the weight of down must be int8", None, {"packed": lambda p: [*p[:5], p[5].to(torch.uint8)]}),
        ("the bias of up must be floats", None, {"biases": lambda p: [*p[:4], p[4].double(), p[5]]}),
        (r"factors must be float32 \[48\]", None, {"rest": lambda r: (*r, *FOUR, None, [torch.ones(48).half()] * 2)}),
    ):
        with pytest.raises(TypeError, match=message):
            call(x, **changed)


def test_bad_parts_of_four_bits() -> None:
    def call(**changed: Any) -> Tensor:
        layer = Layer(0, 64, 2, 32, 128, scheme=NF4(blocksize=32, double_quant=True))
        for name, value in changed.items():
            setattr(layer, name, value(getattr(layer, name)))
        return layer(layer.input(2, 8))

    assert call().isfinite().all()
    for message, changed in (
        ("symmetric must be True for 4-bit linears", {"rest": lambda r: (*r[:4], False, *r[5:])}),
        ("quant_type must be one of .*, got 'nf5'", {"rest": lambda r: (*r[:5], "nf5", *r[6:])}),
        ("blocksize must be .*, got 48", {"rest": lambda r: (*r[:6], 48, *r[7:])}),
        ("rows of query must be whole blocks of 128", {"rest": lambda r: (*r[:6], 128, *r[7:])}),
        (r"features must be \[width, wide\] .*, got \[64\]", {"rest": lambda r: (*r[:7], [64], r[8])}),
        ("the bias of up must be floats \\[96\\]", {"rest": lambda r: (*r[:7], [64, 96], r[8])}),
        ("heads must divide the 65 rows", {"rest": lambda r: (*r[:7], [65, 128], r[8])}),
        ("nested must be 18, got 17", {"rest": lambda r: (*r[:8], r[8][:17])}),
        ("query: absmax must be torch.float32, got torch.uint8", {"rest": lambda r: (*r[:8], [])}),
        (r"query: nested_map must be .*\[256\]", {"rest": lambda r: (*r[:8], [r[8][0], r[8][0], *r[8][2:]])}),
        ("query: packed must be ", {"packed": lambda p: [p[0][1:], *p[1:]]}),
        ("key: absmax must be torch.uint8, got torch.float32", {"scales": lambda s: [s[0], s[1].float(), *s[2:]]}),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call(**changed)
