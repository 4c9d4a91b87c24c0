"""What the operator decoder_layer refuses, what it says, and that the cache is as before then."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoder_layers import Layer
from torch import Tensor

from pyqkern.ops import decoder as ops_decoder

Change = Callable[[Any], Any]


def refuses(error: type[Exception], message: str, layer: Layer | None = None, **changed: Any) -> None:
    """The operator raises, the short way too, and the cache keeps its values."""
    layer = layer or Layer(bias=True)
    cos, sin = layer.rotary(2, 3, 16)
    given: dict[str, Any] = {"x": layer.input(2, 3), "past": 2, "mask": None, "cos": cos, "sin": sin}
    given["keys"], given["values"] = layer.cache(2, 8)
    given["position_bias"] = given["position"] = None
    given |= {name: value(given[name]) if callable(value) else value for name, value in changed.items()}
    caches = [given[name] for name in ("keys", "values") if given[name].numel()]
    before = [cache.clone() for cache in caches]
    with pytest.raises(error, match=message):
        layer(**given)
    arguments = [given[name] for name in ("x", "keys", "values", "past", "mask", "position_bias", "cos", "sin")]
    with pytest.raises(error, match=message):
        ops_decoder.decoder_layer(*arguments, layer.layer(), given["position"])
    assert all(torch.equal(a, b) for a, b in zip(caches, before, strict=True))


@pytest.mark.parametrize(
    "error, message, changed",
    [
        (TypeError, r"x must be fp32, bf16 or fp16 \[batch, length, 64\], got torch.float64", {"x": Tensor.double}),
        (ValueError, r"x must be fp32, bf16 or fp16 \[batch, length, 64\], got", {"x": lambda x: x[0]}),
        (ValueError, r"x must be fp32, .* got torch.float32 \(2, 3, 63\)", {"x": lambda x: x[..., 1:]}),
        (TypeError, r"keys must be floats \[2, 2, capacity, 16\] of one dtype, got torch.int8", {"keys": Tensor.char}),
        (TypeError, r"values must be floats \[2, 2, capacity, 16\] of one dtype", {"values": Tensor.half}),
        (ValueError, r"values must be floats \[2, 2, capacity, 16\]", {"values": lambda v: v[:, :, 1:]}),
        (ValueError, r"keys must be floats \[2, 2, capacity, 16\]", {"keys": lambda k: k[:1]}),
        (ValueError, r"keys must be floats \[2, 2, capacity, 16\]", {"keys": lambda k: k[0]}),
        (ValueError, "keys must be on the CPU, with elements of a head beside each other",
         {"keys": lambda k: k.transpose(2, 3).contiguous().transpose(2, 3)}),
        (ValueError, "and none in one place", {"values": lambda v: v[:1].expand(2, -1, -1, -1)}),
        (ValueError, "and none in one place", {"values": lambda v: v.as_strided(v.shape, (256, 128, 8, 1))}),
        (ValueError, "past must leave room for 3 rows in a cache of capacity 8, got 6; make a larger", {"past": 6}),
        (ValueError, "past must leave room for 3 rows in a cache of capacity 8, got -1", {"past": -1}),
        (ValueError, r"mask must be \[2 or 1, 4 or 1, 3 or 1, 5 or 8\], got \(2, 1, 3, 6\)",
         {"mask": torch.ones(2, 1, 3, 6, dtype=torch.bool)}),
        (ValueError, r"mask must be \[2 or 1, 4 or 1, 3 or 1, 5 or 8\], got \(2, 5\)", {"mask": torch.ones(2, 5)}),
        (ValueError, r"mask must be", {"mask": torch.ones(1, 2, 3, 5)}),
        (TypeError, "mask must be bool or a float added to the scores, got torch.int64",
         {"mask": torch.ones(1, 1, 3, 5, dtype=torch.int64)}),
        (TypeError, "position_bias must be a float added to the scores, got torch.bool",
         {"position_bias": torch.ones(1, 4, 1, 5, dtype=torch.bool)}),
        (ValueError, "cos and sin must be given together", {"sin": None}),
        (TypeError, "sin must be floats .* both of one dtype", {"sin": Tensor.half}),
        (ValueError, r"cos must be floats \[2 or 1, 3, an even number up to 16\]", {"cos": lambda c: c[:, 1:]}),
        (ValueError, "both of one shape", {"sin": lambda s: s[..., :8]}),
        (ValueError, "an even number up to 16", {"cos": lambda c: c[..., :5], "sin": lambda s: s[..., :5]}),
        (TypeError, "position must be int64 of one element, got torch.int32",
         {"position": torch.tensor(2, dtype=torch.int32), "past": 0}),
        (ValueError, "position must be one element on the CPU, and past 0 beside it", {"position": torch.tensor(2)}),
        (ValueError, "past must leave room for 3 rows", {"position": torch.tensor(7), "past": 0}),
    ],
)  # fmt: skip
def test_inputs(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    refuses(error, message, **changed)


@pytest.mark.parametrize(
    "error, message, part, change",
    [
        (ValueError, "scales must be 3, got 7", "packed", lambda p: p[:3]),
        (ValueError, "scales must be 7, got 6", "scales", lambda p: p[:6]),
        (ValueError, "biases must be 7, got 8", "biases", lambda p: [*p, p[0]]),
        (ValueError, "norms must be 2 or 4, got 3", "norms", lambda p: [*p, p[0]]),
        (ValueError, "head_norms must be 0 or 2, got 1", "head_norms", lambda p: [torch.ones(16)]),
        (ValueError, r"head_norms must be floats of one dtype, \[16\]", "head_norms", lambda p: [torch.ones(15)] * 2),
        (TypeError, r"norms must be floats of one dtype, \[64\]", "norms", lambda p: [p[0], p[1].half()]),
        (ValueError, r"norms must be floats of one dtype, \[64\]", "norms", lambda p: [p[0], p[1][1:]]),
        (ValueError, "the weight of key must be what int8_pack makes of", "packed", lambda p: [p[0], p[0], *p[2:]]),
        (TypeError, "the weight of down must be int8", "packed", lambda p: [*p[:6], p[6].float()]),
        (ValueError, r"the scale of gate must be float32 \[96\]", "scales", lambda p: [*p[:4], p[3], *p[5:]]),
        (TypeError, r"the scale of up must be float32 \[96\]", "scales", lambda p: [*p[:5], p[5].half(), p[6]]),
        (TypeError, r"the bias of output must be floats \[64\]", "biases", lambda p: [*p[:3], p[3].int(), *p[4:]]),
        (ValueError, r"the bias of output must be floats \[64\]", "biases", lambda p: [*p[:3], p[3][1:], *p[4:]]),
        (ValueError, "weights must be contiguous", "packed", lambda p: [p[0].transpose(0, 1), *p[1:]]),
        (ValueError, "nested must be 0 or 21, got 3", "nested", lambda p: [torch.ones(1)] * 3),
    ],
)
def test_parts(error: type[Exception], message: str, part: str, change: Change) -> None:
    layer = Layer(bias=True)
    setattr(layer, part, change(getattr(layer, part)))
    refuses(error, message, layer)


@pytest.mark.parametrize(
    "error, message, scheme, changed",
    [
        (ValueError, "kv_heads must divide heads=4, got 3", "int8", {"kv_heads": 3}),
        (ValueError, "head_size and intermediate_size must be positive, got 0 and 96", "int8", {"head_size": 0}),
        (ValueError, "kv_heads must be heads=4 where rows are interleaved, got 2", "int8", {"interleaved": True}),
        (ValueError, "activation must be one of silu, relu, .*, got 'tanh'", "int8", {"activation": "tanh"}),
        (ValueError, "window must be 0 for none, or positive, got -1", "int8", {"window": -1}),
        (ValueError, "compute must be one of auto, fp32, bf16, int8, got 'fp64'", "nf4", {"compute": "fp64"}),
        (ValueError, "symmetric must be True for 4-bit linears, got False", "nf4", {"symmetric": False}),
        (ValueError, "symmetric must be False for int8-a7, got True", "int8-a7", {"symmetric": True}),
        (ValueError, "quant_type must be one of .*, got 'int9'", "int8", {"quant_type": "int9"}),
        (ValueError, "blocksize must be one of .*, got 48", "nf4", {"blocksize": 48}),
        (ValueError, "weights must be 4 or 6 where gated is False, got 7", "int8", {"gated": False}),
        (ValueError, "the rows of .* must be whole blocks of 128", "nf4", {"blocksize": 128}),
    ],
)  # fmt: skip
def test_forms(error: type[Exception], message: str, scheme: str, changed: dict[str, Any]) -> None:
    layer = Layer(scheme=scheme, head_size=32 if scheme == "nf4" else 16)
    layer.form = layer.form._replace(**changed)
    refuses(error, message, layer, cos=None, sin=None)


def test_a_window_and_a_mask_together() -> None:
    message = "window must be 0 where a mask is given, got 3; put the window into the mask"
    refuses(ValueError, message, Layer(window=3), mask=torch.ones(1, 1, 1, 5, dtype=torch.bool))
