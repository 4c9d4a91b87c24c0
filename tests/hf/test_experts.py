"""from_pretrained and save_pretrained of mixture-of-experts models with quantized experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from pyqkern.convert import inspect
from safetensors.torch import load_file, save_file
from tiny import MOE_FAMILIES, MOE_SCHEMES, moe, output, saved
from transformers import AutoModelForCausalLM

import pyqkern
from pyqkern import PyqkernConfig, QExperts, replace_linear, summary

pytestmark = pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="experts are linears before 5")

FAMILIES = [*MOE_FAMILIES, "granitemoe"]
FILE = "model.safetensors"


def read(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def made(family: str) -> Any:
    return moe(family, **({"num_local_experts": 6} if family == "granitemoe" else {}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_quantizing_on_load_is_replace_linear_after_it_and_round_trips(
    family: str, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(made(family), tmp_path / "float")
    expected = replace_linear(read(folder), scheme)
    with monkeypatch.context() as context:  # each weight as it is read, and not all of them afterwards
        context.setattr(QExperts, "from_experts", lambda *_: pytest.fail("quantized after the weights were read"))
        model = read(folder, quantization_config=PyqkernConfig(scheme))
    assert torch.equal(output(model), output(expected))
    again, info = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path / "quantized"), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    twice = read(saved(again, tmp_path / "twice"))
    for one in (again, twice):
        assert torch.equal(output(one), output(expected))
        assert summary(one).bytes_after == summary(expected).bytes_after == one.get_memory_footprint()
        assert all(torch.equal(one.state_dict()[key], value) for key, value in expected.state_dict().items())
        assert [record.scheme for record in summary(one).experts] == [scheme] * 2
    rows = [
        line.split()
        for line in inspect(tmp_path / "quantized").splitlines()
        if "experts." in line or "_linear.weight" in line
    ]
    assert len(rows) == 4 and all(row[1] == scheme for row in rows)
    values = sum(p.numel() for layer in made(family).modules() if hasattr(layer, "gate_up_proj")
                 for p in layer.parameters(recurse=False))  # fmt: skip
    assert sum(int(row[2].replace(",", "")) for row in rows) == values


@pytest.mark.parametrize("scheme", MOE_SCHEMES, ids=repr)
def test_schemes_in_bf16(scheme: Any, tmp_path: Path) -> None:
    folder = saved(moe().bfloat16(), tmp_path / "float")
    model = read(folder, quantization_config=PyqkernConfig(scheme), dtype="auto")
    again = read(saved(model, tmp_path / "quantized"), dtype="auto")
    assert torch.equal(output(again), output(model)) and output(again).dtype is torch.bfloat16
    assert again.model.layers[1].mlp.experts.scheme == model.model.layers[1].mlp.experts.scheme


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_one_layer_in_float(family: str, tmp_path: Path) -> None:
    folder = saved(made(family), tmp_path / "float")
    model = read(folder, quantization_config=PyqkernConfig("int8", exclude="*.0.*experts"))
    assert [record.reason for record in summary(model).experts] == ["excluded", None]
    again = read(saved(model, tmp_path / "quantized"))
    assert torch.equal(output(again), output(model))
    assert [record.scheme for record in summary(again).experts] == [None, "int8"]
    more = replace_linear(again, "nf4", include="*experts")
    assert torch.equal(output(read(saved(more, tmp_path / "more"))), output(more))


def test_dequantized_it_is_transformers_own(tmp_path: Path) -> None:
    model = read(saved(moe(), tmp_path / "float"), quantization_config=PyqkernConfig("nf4"))
    quantized = output(model)
    model.set_experts_implementation("grouped_mm")
    floats = model.dequantize()
    experts = floats.model.layers[0].mlp.experts
    assert type(experts).__name__ == "MixtralExperts" and experts.gate_up_proj.shape == (6, 256, 64)
    assert experts.config._experts_implementation == "grouped_mm"
    assert (output(floats) - quantized).norm() <= 0.05 * quantized.norm()
    assert torch.equal(output(read(saved(floats, tmp_path / "back"))), output(floats))


def test_resumes_by_load_state_dict_and_converts(tmp_path: Path) -> None:
    model = replace_linear(moe())
    saved(model, tmp_path / "quantized")
    other = moe()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    replace_linear(other)
    other.load_state_dict(load_file(tmp_path / "quantized" / FILE))  # as the Trainer does, with the names of files
    assert torch.equal(output(other), output(model))
    pyqkern.convert.quantize(saved(moe(), tmp_path / "float"), tmp_path / "converted", "int8")
    assert torch.equal(output(read(tmp_path / "converted")), output(model))


@pytest.mark.parametrize("format", ["bitsandbytes", "compressed-tensors"])
def test_other_formats_have_none(format: str, tmp_path: Path) -> None:
    model = replace_linear(moe())
    model.hf_quantizer.quantization_config.format = format
    with pytest.raises(
        ValueError, match=f"{format} has quantized linears alone, but model.layers.0.mlp.experts is a QExperts"
    ):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("damage", ["missing weight", "missing scale", "shape", "dtype", "values", "float"])
def test_damaged_folders_are_refused_by_name(damage: str, tmp_path: Path) -> None:
    folder = saved(replace_linear(moe("qwen3_moe")), tmp_path)
    tensors = load_file(folder / FILE)
    key = "model.layers.1.mlp.experts.down_proj.weight"
    assert tensors[key].shape == (6 * 64, 64)
    if damage == "missing weight":
        del tensors[key]
    elif damage == "missing scale":
        key += "_scale"
        del tensors[key]
    elif damage == "shape":
        tensors[key] = tensors[key][:64].clone()
    elif damage == "dtype":
        tensors[key] = tensors[key].to(torch.uint8)
    elif damage == "values":
        key += "_scale"
        tensors[key][3] = torch.nan
    else:
        tensors[key] = tensors[key].float()
    save_file(tensors, folder / FILE, {"format": "pt"})
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        read(folder)


def test_adapters_on_all_linears_leave_experts_alone() -> None:
    model = replace_linear(moe())
    expected = output(model)
    adapted = get_peft_model(model, pyqkern.lora(LoraConfig(r=4, target_modules="all-linear")))
    names = {name for name, module in adapted.named_modules() if type(module).__name__ == "LoraQLinear"}
    assert names and not any("experts" in name for name in names)
    assert (output(adapted) - expected).norm() <= 0.01 * expected.norm()  # beside float attention, which may round anew
    adapted.train()
    adapted(torch.arange(2, 26).view(2, 12)).logits.sum().backward()
    grads = [
        p.grad for name, p in adapted.named_parameters() if "layers.0.self_attn.q_proj" in name and "lora_B" in name
    ]
    assert grads and all(grad is not None and grad.abs().max() > 0 for grad in grads)


def test_a_missing_weight_of_a_float_folder_is_quantized_too(tmp_path: Path) -> None:
    """transformers initializes it, and says so; what was read is quantized as it was read."""
    folder = saved(moe("qwen3_moe"), tmp_path)
    tensors = load_file(folder / FILE)
    left = {key: value for key, value in tensors.items() if not (".0.mlp.experts." in key and "down_proj" in key)}
    assert len(left) == len(tensors) - 6
    save_file(left, folder / FILE, {"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=PyqkernConfig("int8"), output_loading_info=True
    )
    assert info["missing_keys"] == {"model.layers.0.mlp.experts.down_proj"}
    assert all(isinstance(layer.mlp.experts, QExperts) for layer in model.model.layers)
    assert output(model).isfinite().all()
