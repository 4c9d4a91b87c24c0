"""Folders of models with an nn.MultiheadAttention in them: Siglip's head is one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import saved
from torch import Tensor, nn

import pyqkern
from pyqkern import PyqkernConfig, QLinear, QMultiheadAttention, replace_linear, summary

PIXELS = torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32)
PROJECTIONS = [f"head.attention.{name}_proj" for name in ("q", "k", "v", "out")]


def siglip() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes, image_size=32, patch_size=8))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def pooled(model: Any) -> Tensor:
    with torch.no_grad():
        return model(pixel_values=PIXELS).pooler_output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(siglip(), tmp_path_factory.mktemp("siglip"))


def read(folder: Path, **options: Any) -> Any:
    return transformers.SiglipVisionModel.from_pretrained(folder, **options)


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_round_trip(folder: Path, tmp_path: Path, scheme: str) -> None:
    model = replace_linear(siglip(), scheme)
    assert all(isinstance(model.get_submodule(name), QLinear) for name in PROJECTIONS)
    assert 0 < (pooled(model) - pooled(siglip())).norm() < (0.03 if scheme == "int8" else 0.3) * pooled(model).norm()
    again = read(saved(model, tmp_path))
    on_load = read(folder, quantization_config=PyqkernConfig(scheme))
    for one in (again, on_load):
        assert type(one.head.attention) is QMultiheadAttention and torch.equal(pooled(one), pooled(model))
        assert one.state_dict().keys() == model.state_dict().keys()
        assert summary(one).bytes_after == summary(model).bytes_after
    table = pyqkern.convert.inspect(tmp_path)
    assert all(name in table for name in PROJECTIONS)


def test_projections_in_float_and_the_command(folder: Path, tmp_path: Path) -> None:
    pyqkern.convert.quantize(folder, tmp_path / "some", "int8", exclude=["*.k_proj"])
    model = read(tmp_path / "some")
    expected = replace_linear(siglip(), exclude="*.k_proj")
    assert type(model.head.attention.k_proj) is nn.Linear and torch.equal(pooled(model), pooled(expected))
    pyqkern.convert.quantize(folder, tmp_path / "none", "int8", exclude=["head.*"])
    model = read(tmp_path / "none")
    assert type(model.head.attention) is nn.MultiheadAttention
    assert torch.equal(pooled(model), pooled(replace_linear(siglip(), exclude="head.*")))


def test_back_in_float_it_is_torchs(folder: Path, tmp_path: Path) -> None:
    model = read(folder, quantization_config=PyqkernConfig()).dequantize()
    assert type(model.head.attention) is nn.MultiheadAttention
    assert model.state_dict().keys() == siglip().state_dict().keys()
    again = read(saved(model, tmp_path))
    assert torch.equal(pooled(again), pooled(model))
    assert (pooled(model) - pooled(siglip())).norm() < 0.03 * pooled(model).norm()


def test_a_missing_projection_is_named(tmp_path: Path) -> None:
    file = saved(replace_linear(siglip()), tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["head.attention.q_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"head\.attention\.q_proj\.weight is missing"):
        read(tmp_path)


@pytest.mark.parametrize("format", ["bitsandbytes", "compressed-tensors"])
def test_other_formats_refuse_projections(tmp_path: Path, format: str) -> None:
    """Their readers would find no in_proj_weight, and make one up."""
    model = replace_linear(siglip())
    model.hf_quantizer.quantization_config.format = format
    with pytest.raises(ValueError, match=r"linears alone, but head\.attention is a QMultiheadAttention"):
        model.save_pretrained(tmp_path)
