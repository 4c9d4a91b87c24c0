"""Small checkpoints with one thing changed: the same bits, an error that names it, or a value like a good one."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import bert, saved
from torch import Tensor

from pyqkern import checkpoint_config, replace_embedding, replace_linear
from pyqkern.schemes import FP4, NF4, Int4, Int8, Int8Outlier, Int8Static, Int8WeightOnly, Range

Config = dict[str, Any]
KINDS = {
    "int8": ("pyqkern", Int8()),
    "nested": ("pyqkern", NF4(double_quant=True)),
    "static": ("pyqkern", Int8Static()),
    "int4": ("pyqkern", Int4(group_size=32)),
    "outlier": ("pyqkern", Int8Outlier()),
    "weight-only": ("pyqkern", Int8WeightOnly()),
    "bnb nf4": ("bitsandbytes", NF4(double_quant=True)),
    "bnb fp4": ("bitsandbytes", FP4()),
    "bnb int8": ("bitsandbytes", Int8()),
    "w8a8": ("compressed-tensors", Int8()),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    """A folder of each kind, and the state_dict that it is read into."""
    made = {}
    for name, (format, scheme) in KINDS.items():
        model = bert("BertForSequenceClassification", num_hidden_layers=1, hidden_size=32, num_attention_heads=2,
                     intermediate_size=64, vocab_size=40, max_position_embeddings=16)  # fmt: skip
        if name in ("nested", "int4", "weight-only"):
            replace_embedding(model, scheme)
        ranges = None
        if scheme.needs_ranges:
            one = Range(torch.tensor(-1.0), torch.tensor(2.0))
            ranges = {name: one for name, module in model.named_modules() if type(module) is torch.nn.Linear}
        replace_linear(model, scheme, ranges=ranges)
        model.hf_quantizer.quantization_config.format = format
        folder = saved(model, tmp_path_factory.mktemp("kind"))
        made[name] = folder, state(folder)
    return made


def state(folder: Path, plain: bool = False) -> dict[str, Tensor]:
    """What the folder is read into, its default scheme included. plain: by transformers without checkpoint_config."""
    import transformers

    options = {} if plain else {"config": checkpoint_config(folder)}
    model = transformers.BertForSequenceClassification.from_pretrained(folder, **options)
    return dict(model.state_dict())


# ---- what is changed; each returns what it was, for the message


def cut(folder: Path, draw: random.Random) -> str:
    path = folder / draw.choice(["model.safetensors", "config.json"])
    content = path.read_bytes()
    at = draw.randrange(len(content))
    path.write_bytes(content[:at])
    return f"{path.name} cut at {at}"


def header(folder: Path, draw: random.Random) -> str:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    at, value = draw.randrange(8 + int.from_bytes(content[:8], "little")), draw.randrange(256)
    content[at] = value
    path.write_bytes(content)
    return f"header byte {at} = {value}"


def config_bytes(folder: Path, draw: random.Random) -> str:
    path = folder / "config.json"
    content = bytearray(path.read_bytes())
    start = content.index(b'"quantization_config"')
    at, value = draw.randrange(start, len(content)), draw.choice([0xFF, 0xC3, *b'"{}[],:0a'])
    content[at] = value
    path.write_bytes(content)
    return f"config byte {at} = {value}"


def deep(folder: Path, draw: random.Random) -> str:
    depth = draw.choice([1_000, 100_000])
    text = (folder / "config.json").read_text().replace('"quantization_config": {', '"quantization_config": {"x": %s,')
    (folder / "config.json").write_text(text % ("[" * depth + "]" * depth))
    return f"depth {depth}"


VALUES: list[Any] = [None, True, -1, 0, 3.5, 10**30, "", "nf4", [], ["a"], {}, {"a": 1}]


def config_value(folder: Path, draw: random.Random) -> str:
    """One value in the quantization_config, at any depth, becomes another, or its key goes or gets another name."""
    config = json.loads((folder / "config.json").read_text())
    at: Any = config["quantization_config"]
    while True:
        key = draw.choice(sorted(at) if isinstance(at, dict) else range(len(at)))
        if not isinstance(at[key], dict | list) or not at[key] or draw.random() < 0.3:
            break
        at = at[key]
    before, how = at[key], draw.choice(["value", "value", "left out", "key"])
    if how == "value" or isinstance(at, list):
        at[key] = draw.choice(VALUES)
    else:
        value = at.pop(key)
        if how == "key":
            at[draw.choice(["", "colour", key + "s"])] = value
    (folder / "config.json").write_text(json.dumps(config))
    return f"{how} of {key}: {before!r:.80} -> {at!r:.200}"


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.bool]


def tensor(folder: Path, draw: random.Random) -> str:
    """One tensor is left out, called otherwise, or has another shape, dtype or value."""
    tensors = load_file(folder / "model.safetensors")
    key = draw.choice(sorted(tensors))
    how = draw.choice(["left out", "name", "rows", "flat", "dtype", "value", "value"])
    value = tensors.pop(key)
    if how == "name":
        tensors[draw.choice([key + "s", "x." + key, key.rpartition(".")[0] + ".weight_scale"])] = value
    elif how == "rows":
        tensors[key] = value[:-1].clone() if value.dim() else value.repeat(2)
    elif how == "flat":
        tensors[key] = value.reshape(-1)
    elif how == "dtype":
        tensors[key] = value.to(draw.choice(DTYPES))
    elif how == "value" and value.numel():
        value = value.contiguous()
        wrong = [float("nan"), float("inf"), -1.0, 0.0, 1e30] if value.is_floating_point() else [-1, 0, 1, 127]
        if value.dtype is torch.uint8:
            wrong[0] = 255
        value.view(-1)[draw.randrange(value.numel())] = draw.choice(wrong)
        tensors[key] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return f"{key}: {how}"


CHANGES = [cut, header, config_bytes, deep, config_value, config_value, tensor, tensor, tensor, tensor]


OF_TENSORS = (": left out", ": name", ": rows", ": flat", ": dtype", ": value")


def check(folder: Path, expected: dict[str, Tensor], changed: str, plain: bool) -> None:
    """Equal bits, but for the layer of which one value was changed; there what no layer has must have been refused."""
    layer = changed.partition(".weight.")[0] if ".weight." in changed else changed.rpartition(".")[0]
    try:
        found = state(folder, plain)
    except (OSError, ValueError) as error:
        assert str(folder) in str(error), (changed, error)
        assert layer in str(error) or not changed.endswith(OF_TENSORS), (changed, error)
        return
    assert found.keys() == expected.keys(), changed
    a_value = changed.endswith((": value", ": dtype"))  # a float of another dtype is cast, as transformers does
    for key, value in expected.items():
        other = found[key]
        if a_value and key.startswith(layer):
            assert other.shape == value.shape and other.dtype == value.dtype, (changed, key)
            if other.is_floating_point() and key.endswith(("scale", "absmax", "offset")):
                assert other.isfinite().all() and other.min() >= 0, (changed, key)
        else:
            assert torch.equal(other, value), (changed, key)


def run(folders: dict[str, tuple[Path, dict[str, Tensor]]], tmp_path: Path, count: int, seed: int) -> None:
    draw = random.Random(seed)
    for i in range(count):
        kind = draw.choice(sorted(folders))
        folder, expected = folders[kind]
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        changed = draw.choice(CHANGES)(copy, draw)
        try:
            check(copy, expected, changed, KINDS[kind][0] == "pyqkern" and draw.random() < 0.5)
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{i}, {kind}, {changed}: {type(error).__name__}: {error}") from error


@pytest.mark.filterwarnings("ignore")
def test_a_few_hundred(folders: Any, tmp_path: Path) -> None:
    run(folders, tmp_path, 200, seed=1)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_five_thousand(folders: Any, tmp_path: Path) -> None:
    run(folders, tmp_path, 5000, seed=2)
