"""from_pretrained, with nothing but the folder, of one whose config.json is broken: an error that names the file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import bert, saved
from torch import nn

from pyqkern import convert, replace_linear


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(replace_linear(bert(num_hidden_layers=1)), tmp_path)


def refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    for load in (transformers.AutoModel, transformers.BertModel, transformers.AutoConfig):
        with pytest.raises((OSError, ValueError)) as caught:
            load.from_pretrained(folder)
        assert str(folder) in str(caught.value), caught.value


def test_cut(folder: Path) -> None:
    content = (folder / "config.json").read_bytes()
    for at in range(0, len(content) - 2, 97):
        refused(folder, content[:at])


@pytest.mark.parametrize("content", [b"[1]", b"3", b"null", b'"a"', b'{"model_type": "bert", "a": "\xff"}'])
def test_no_json_object(folder: Path, content: bytes) -> None:
    refused(folder, content)


@pytest.mark.parametrize("depth", [101, 600, 950, 100_000])
@pytest.mark.parametrize("inside", ["{", '"quantization_config": {', '"layers": ['])
def test_deep(folder: Path, depth: int, inside: str) -> None:
    content = (folder / "config.json").read_text()
    deep = "[" * depth + "]" * depth + ","
    refused(folder, content.replace(inside, inside + (deep if inside.endswith("[") else f'"x": {deep}'), 1).encode())


NAMES = ("scheme", "layers", "format", "quant_method")
BLOCKS: list[Any] = ["nf4", 3, True, [], ["nf4"], {}, {"quant_method": 3}, {"quant_method": []}, {"quant_method": None}]
MISNAMED = ["quantization_confi", "quantization_config ", "Quantization_config", ""]
CHANGES: list[Any] = [
    *({key: value} for key in NAMES for value in (3, [3], {"a": 1}, "pyqkerm")),
    *({key: value} for key in ("include", "exclude") for value in (3, "a", [3])),
    *({"embeddings": value} for value in (3, [], {"name": 3}, "nf5")),
    *({"version": value} for value in (2, "1", True)),
    {"layers": None}, {"layers": []}, {"scheme": None}, {"colour": 3}, {"scheme": {"name": "int8", "symmetric": 1}},
]  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS, ids=repr)
def test_no_quantization_config(folder: Path, block: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    refused(folder, json.dumps(config | {"quantization_config": block}).encode())


@pytest.mark.parametrize("name", MISNAMED)
def test_another_name(folder: Path, name: str) -> None:
    content = (folder / "config.json").read_text()
    refused(folder, content.replace("quantization_config", name).encode())


@pytest.mark.parametrize("change", CHANGES, ids=repr)
def test_wrong_options(folder: Path, change: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as caught:
        transformers.AutoModel.from_pretrained(folder)
    assert str(folder) in str(caught.value), caught.value


# ---- a config that does not say that the model is quantized


def without(folder: Path, how: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config | ({"quantization_config": None} if how == "null" else {})))


@pytest.mark.parametrize("how", ["removed", "null"])
@pytest.mark.parametrize(
    "scheme, format",
    [("int8", "pyqkern"), ("nf4", "pyqkern"), ("int8", "bitsandbytes"), ("nf4", "bitsandbytes"),
     ("int8", "compressed-tensors")],
)  # fmt: skip
def test_quantized_layers_are_not_read_as_floats(tmp_path: Path, how: str, scheme: str, format: str) -> None:
    convert.quantize(saved(bert(num_hidden_layers=1), tmp_path / "float"), tmp_path / "out", scheme, format=format)
    folder = tmp_path / "out"
    config = transformers.AutoConfig.from_pretrained(tmp_path / "float")
    said = r"config.json of .*out.* must have the quantization_config .*: .*\.weight in model.safetensors is of a quant"
    if format == "pyqkern":  # its own config stands in the folder still
        with pytest.raises(ValueError, match=said):
            transformers.BertModel.from_pretrained(folder, config=config)
    without(folder, how)
    for call in (
        transformers.AutoModel.from_pretrained,
        transformers.BertModel.from_pretrained,
        lambda folder: transformers.BertForMaskedLM.from_pretrained(folder, ignore_mismatched_sizes=True),
        lambda folder: transformers.BertModel.from_pretrained(folder, output_loading_info=True),
        lambda folder: transformers.BertModel.from_pretrained(folder.parent, subfolder="out"),
        convert.inspect,
        lambda folder: convert.quantize(folder, tmp_path / "again", "nf4"),
    ):
        with pytest.raises(ValueError, match=said):
            call(folder)
    assert not (tmp_path / "again").exists()


class OwnCodes(transformers.BertModel):  # type: ignore[misc]
    """A model of the user's with codes of its own, which look like ours in a file."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.own = nn.Module()
        self.own.register_buffer("weight", torch.ones(3, 3, dtype=torch.int8))
        self.own.register_buffer("weight_scale", torch.ones(3))
        self.post_init()


def test_float_folders_and_codes_of_others_load(tmp_path: Path) -> None:
    config = bert(num_hidden_layers=1).config
    model = OwnCodes.from_pretrained(saved(OwnCodes(config), tmp_path))
    assert model.own.weight.dtype is torch.int8
    model, told = transformers.BertModel.from_pretrained(
        saved(bert(num_hidden_layers=1), tmp_path / "float"), output_loading_info=True
    )
    assert not told["missing_keys"] and model.config.num_hidden_layers == 1
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        transformers.BertModel.from_pretrained(tmp_path / "float", hidden_size=32)
