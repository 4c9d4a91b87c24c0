"""from_pretrained, with nothing but the folder, of one whose config.json is broken: an error that names the file."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny import bert, saved

from pyqkern import replace_linear


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
