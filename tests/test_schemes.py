"""Schemes are descriptions: equal by their options, plain data for JSON, and without the data that quantizing takes."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from pyqkern import QLinear, calibrate, replace_linear
from pyqkern.schemes import FP4, NF4, SCHEMES, Int4, Int8, Int8Outlier, Int8Static, Range, Scheme

RANGES = {"": Range(torch.tensor(-4.0), torch.tensor(4.0))}
OPTIONS = [NF4(blocksize=128, double_quant=True), FP4(compute="bf16"), Int4(group_size=32), Int8(symmetric=True)]
OPTIONS += [Int8(activation_bits=7, clip_weights=True), Int8Static(activation_bits=7)]


@pytest.mark.parametrize("scheme", [*SCHEMES.values(), *OPTIONS, Int8Outlier(3.0), Int8Static(clip_weights=True)])
def test_a_scheme_survives_its_dict(scheme: Scheme) -> None:
    data = scheme.to_dict()
    assert data["name"] == scheme.name and Scheme.from_dict(data) == scheme
    assert (len(data) == 1) == (scheme == SCHEMES[scheme.name])  # only what is not the default


def test_wrong_dicts_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"options of the scheme 'nf4' must be among .*, got 'group_size'"):
        Scheme.from_dict({"name": "nf4", "group_size": 32})
    with pytest.raises(ValueError, match=r"options of the scheme 'int8-static' must be among .*, got 'ranges'"):
        Scheme.from_dict({"name": "int8-static", "ranges": {}})
    with pytest.raises(TypeError, match="scheme must be a name"):
        Scheme.from_dict({"blocksize": 32})


def test_activations_of_7_bits() -> None:
    scheme = Int8(activation_bits=7)
    assert scheme == SCHEMES["int8-a7"] and scheme.name == "int8-a7" and Int8().name == "int8"
    assert scheme == Scheme.from_dict({"name": "int8", "activation_bits": 7}) and scheme.to_dict() == {
        "name": "int8-a7"
    }
    assert [copy.deepcopy(scheme).name, pickle.loads(pickle.dumps(scheme)).name] == ["int8-a7"] * 2
    assert replace(scheme, activation_bits=8).name == "int8"
    with pytest.raises(ValueError, match="activation_bits must be 8 or 7, got 6"):
        Int8(activation_bits=6)
    with pytest.raises(ValueError, match="activation_bits must be 8 or 7, got 4"):
        Int8Static(activation_bits=4)
    with pytest.raises(ValueError, match="symmetric must be False for activation_bits=7, got True"):
        Int8(symmetric=True, activation_bits=7)
    layer = QLinear.from_linear(nn.Linear(4, 4), Int8Static(activation_bits=7), ranges=RANGES)
    assert torch.equal(layer.input_scale, torch.tensor([8.0 / 127])) and layer.input_zero_point == 64
    with pytest.raises(
        RuntimeError, match=r"input_zero_point must be one int32 within \[0, 127\], got int32 \[1\] with 128"
    ):
        layer.load_state_dict(layer.state_dict() | {"input_zero_point": torch.tensor([128], dtype=torch.int32)})


def test_what_schemes_say_of_themselves() -> None:
    assert {name: scheme.bits for name, scheme in SCHEMES.items()} == {
        name: 16 if name == "float16" else 8 if "int8" in name else 4 for name in SCHEMES
    }
    assert [name for name, scheme in SCHEMES.items() if scheme.needs_ranges] == ["int8-static"]
    assert [name for name, scheme in SCHEMES.items() if not scheme.embeds] == ["int8-static", "int8-outlier", "float16"]


def test_ranges_are_carried_and_are_no_option() -> None:
    scheme = Int8Static(RANGES)
    assert scheme == Int8Static() and repr(scheme) == repr(Int8Static()) and hash(scheme) == hash(Int8Static())
    assert scheme.to_dict() == {"name": "int8-static"}
    for one in (scheme, copy.deepcopy(scheme), pickle.loads(pickle.dumps(scheme))):
        assert one.carried_ranges().keys() == RANGES.keys()
    assert QLinear.from_linear(nn.Linear(4, 4), scheme).scheme.carried_ranges() is None


def test_ranges_beside_the_scheme_and_carried_by_it_are_the_same() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4)), torch.randn(8, 16)
    ranges = calibrate(model, [x], progress=False)
    carried = replace_linear(copy.deepcopy(model), Int8Static(ranges, clip_weights=True))
    beside = replace_linear(copy.deepcopy(model), Int8Static(clip_weights=True), ranges=ranges)
    with torch.no_grad():
        assert torch.equal(carried(x), beside(x))
        assert not torch.equal(beside(x), replace_linear(model)(x))
    layer = QLinear.from_linear(nn.Linear(4, 4), "int8-static", ranges=RANGES)
    assert torch.equal(layer.input_scale, torch.tensor([8.0 / 255]))


def test_ranges_for_a_scheme_that_takes_none_are_a_mistake() -> None:
    for call in (
        lambda: QLinear.from_linear(nn.Linear(4, 4), ranges=RANGES),
        lambda: replace_linear(nn.Linear(4, 4), ranges=RANGES),
    ):
        with pytest.raises(ValueError, match="ranges must be None for int8"):
            call()
