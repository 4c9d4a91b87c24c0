"""Checkpoints of other libraries, read and written: against the real bitsandbytes and compressed-tensors on CPU."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from require import require
from safetensors.torch import load_file, save_file
from tiny import bert, output, saved
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from pyqkern import PyqkernConfig, checkpoint_config
from pyqkern.backends.reference.four_bit import CODEBOOKS, Codebook
from pyqkern.checkpoints.files import Files
from pyqkern.checkpoints.formats.compressed_tensors import w8a8_scheme
from pyqkern.functional import four_bit as functional_four_bit
from pyqkern.schemes import FP4, NF4, Int8, Int8Outlier

# On CPU bitsandbytes computes with no head of two classes, and wants rows of whole blocks.
EXCLUDE = ["classifier"]
BNB = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4 nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4 nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "nf4 as bf16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 5.0},
}
OURS = {
    "nf4": NF4(),
    "fp4": FP4(),
    "nf4 nested": NF4(blocksize=64, double_quant=True),
    "fp4 nested": FP4(blocksize=32, double_quant=True),
    "int8": Int8(),
    "int8-outlier": Int8Outlier(threshold=5.0),
}


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(bert("BertForSequenceClassification"), tmp_path_factory.mktemp("float"))


def written_by_pyqkern(source: Path, folder: Path, scheme: Any, format: str) -> Any:
    model = load(source, quantization_config=PyqkernConfig(scheme, format=format, exclude=EXCLUDE))
    model.save_pretrained(folder)
    return model


def bnb_weights(model: nn.Module) -> dict[str, Tensor]:
    """What bitsandbytes says that its weights are."""
    require("bitsandbytes", "the peer whose format this is")
    import bitsandbytes

    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            data = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            weights[name] = data.view(module.out_features, module.in_features).float()
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            weights[name] = bitsandbytes.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    assert len(weights) >= 13
    return weights


def equal_weights(model: Any, weights: dict[str, Tensor]) -> None:
    """4-bit exactly; LLM.int8's own product rounds twice, absmax * q * (1/127): within three roundings of 2**-24."""
    for name, weight in weights.items():
        module = model.get_submodule(name)
        if module.scheme.name in ("nf4", "fp4"):
            assert torch.equal(module.weight, weight), name
        else:
            assert torch.allclose(module.weight, weight, rtol=4 * 2**-24, atol=0), name


@pytest.mark.parametrize("kind", list(BNB))
def test_what_bitsandbytes_writes_pyqkern_reads(source: Path, tmp_path: Path, kind: str) -> None:
    theirs = load(source, quantization_config=BitsAndBytesConfig(**BNB[kind], llm_int8_skip_modules=EXCLUDE))
    weights = bnb_weights(theirs)
    folder = saved(theirs, tmp_path / "theirs")
    ours = load(folder, config=checkpoint_config(folder))
    equal_weights(ours, weights)
    scheme = ours.bert.pooler.dense.scheme
    assert scheme.name == {"int8": "int8-outlier"}.get(kind, kind[:3])
    assert getattr(scheme, "double_quant", False) == ("nested" in kind)
    # bitsandbytes multiplies in bf16 or fp16, pyqkern with 8-bit activations.
    assert (output(ours) - output(theirs)).norm() <= 0.05 * output(theirs).norm()
    # Saved again, it is their format still, and pyqkern's too.
    again = saved(ours, tmp_path / "again")
    assert json.loads((again / "config.json").read_text())["quantization_config"]["quant_method"] == "bitsandbytes"
    equal_weights(ours, bnb_weights(load(again)))
    assert torch.equal(output(load(again, config=checkpoint_config(again))), output(ours))


@pytest.mark.parametrize("kind", list(OURS))
def test_what_pyqkern_writes_bitsandbytes_reads(source: Path, tmp_path: Path, kind: str) -> None:
    ours = written_by_pyqkern(source, tmp_path, OURS[kind], "bitsandbytes")
    theirs = load(tmp_path)
    equal_weights(ours, bnb_weights(theirs))
    assert (output(ours) - output(theirs)).norm() <= 0.05 * output(theirs).norm()
    back = load(tmp_path, config=checkpoint_config(tmp_path, scheme=OURS[kind] if "int8" in kind else None))
    assert back.bert.pooler.dense.scheme == OURS[kind] and torch.equal(output(back), output(ours))


def test_a_head_of_two_classes_and_an_embedding(source: Path, tmp_path: Path) -> None:
    """All linears, one of them called as the end of another's name; embeddings have no place in the format."""
    model = load(source, quantization_config=PyqkernConfig("nf4", format="bitsandbytes"))
    theirs = load(saved(model, tmp_path))
    assert "classifier" in bnb_weights(theirs)
    equal_weights(model, bnb_weights(theirs))
    embedded = load(source, quantization_config=PyqkernConfig("nf4", format="bitsandbytes", embeddings=True))
    with pytest.raises(
        ValueError, match=r"bitsandbytes has quantized linears alone, but bert\.embeddings\.word_embeddings is a QEmb"
    ):
        embedded.save_pretrained(tmp_path)
    for scheme, format in (("int4", "bitsandbytes"), ("nf4", "compressed-tensors")):
        with pytest.raises(ValueError, match=f"{format} has .*, not '{scheme}'; save with format='pyqkern'"):
            written_by_pyqkern(source, tmp_path, scheme, format)


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors(source: Path, tmp_path: Path, symmetric: bool) -> None:
    """The format that vLLM serves: the real package reads what pyqkern wrote, and pyqkern what it writes."""
    require("compressed_tensors", "the peer whose format this is")
    ours = written_by_pyqkern(source, tmp_path / "ours", Int8(symmetric=symmetric), "compressed-tensors")
    theirs = load(tmp_path / "ours")
    dense = theirs.bert.encoder.layer[1].output.dense
    assert dense.weight.dtype is torch.int8 and dense.quantization_scheme.input_activations.symmetric is symmetric
    expected = ours.bert.encoder.layer[1].output.dense
    assert torch.equal(dense.weight * dense.weight_scale, expected.weight)
    assert (output(ours) - output(theirs)).norm() <= 0.02 * output(theirs).norm()
    for folder in (tmp_path / "ours", saved(load(tmp_path / "ours"), tmp_path / "theirs")):
        back = load(folder, config=checkpoint_config(folder))
        assert back.bert.pooler.dense.scheme == Int8(symmetric=symmetric)
        assert torch.equal(output(back), output(ours))


# ---- what is wrong is said, with the key


KEY = "bert.encoder.layer.1.output.dense"
QUANT_STATE = f"{KEY}.weight.quant_state.bitsandbytes__nf4"


def said(**changes: Any) -> Tensor:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 128]} | changes
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.fixture(scope="module")
def nf4_folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nf4")
    written_by_pyqkern(source, folder, "nf4", "bitsandbytes")
    return folder


def changed(folder: Path, to: Path, changes: dict[str, Any]) -> Path:
    """A copy with keys replaced, or left out where the value is None."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    tensors = {
        key: value for key, value in (load_file(folder / "model.safetensors") | changes).items() if value is not None
    }
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({QUANT_STATE: said(shape=[128, 64])}, "must say shape \\[64, 128\\], which fits the layer, got \\[128, 64\\]"),
        ({QUANT_STATE: said(blocksize=65)}, "blocksize must be one of"),
        ({QUANT_STATE: said(blocksize="64")}, "blocksize of nf4 must be int"),
        ({QUANT_STATE: said(quant_type="fp4")}, "must say quant_type nf4"),
        ({QUANT_STATE: said(nested_offset=0.1)}, "(nested_absmax|absmax).* (is missing|must be)"),
        ({QUANT_STATE: torch.zeros(7, dtype=torch.uint8)}, "must be JSON"),
        ({QUANT_STATE: torch.tensor([91, 93], dtype=torch.uint8)}, "must be a JSON object, got list"),
        ({f"{KEY}.weight": torch.zeros(99, 1, dtype=torch.uint8)}, "weight must be uint8 \\[4096, 1\\]"),
        ({f"{KEY}.weight.absmax": torch.ones(5)}, "absmax must be float32 \\[128\\], got float32 \\[5\\]"),
        (
            {f"{KEY}.weight.absmax": torch.full((128,), -1.0)},
            "absmax must be finite and not negative, got values from -1.0",
        ),
        ({f"{KEY}.weight.absmax": None}, "absmax is missing"),
        ({f"{KEY}.weight.quant_map": torch.linspace(-1, 1, 16)}, "quant_map must be the values of nf4"),
    ],
)
def test_a_lying_checkpoint(nf4_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = changed(nf4_folder, tmp_path / "copy", changes)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder, config=checkpoint_config(folder))
    assert KEY in str(caught.value)


def test_formats_that_are_not_read(nf4_folder: Path, tmp_path: Path) -> None:
    config = json.loads((nf4_folder / "config.json").read_text())
    tensors = {"a.weight": torch.zeros(2, 2)}
    for quantization, message in (
        ({"quant_method": "gptq"}, "quant_method must be one of pyqkern, bitsandbytes, compressed-tensors, got 'gptq'"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "compressed-tensors must be 'int-quantized'",
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "hold no layer in bitsandbytes's format"),
    ):
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
        with pytest.raises(ValueError, match=message):
            checkpoint_config(tmp_path)
    for weights, inputs in (({"num_bits": 4}, {}), ({}, {"dynamic": False}), ({"strategy": "group"}, {})):
        group = {
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True} | weights,
            "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True} | inputs,
        }
        with pytest.raises(ValueError, match="must be 8-bit int"):
            w8a8_scheme({"config_groups": {"group_0": group}})


def test_no_pickle_is_loaded(source: Path, tmp_path: Path) -> None:
    for format in ("pyqkern", "bitsandbytes"):
        folder = tmp_path / format
        written_by_pyqkern(source, folder, "nf4", format)
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(OSError, match=r"safetensors"):
            load(folder, config=checkpoint_config(folder))


def test_what_is_made_once_is_made_on_the_cpu_in_fp32() -> None:
    """transformers builds models on the meta device, in the model's dtype."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            made = functional_four_bit.dynamic_map.__wrapped__()
            record = Codebook(CODEBOOKS["nf4"].values, CODEBOOKS["nf4"].levels).record
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(made, functional_four_bit.dynamic_map()) and torch.equal(record, CODEBOOKS["nf4"].record)


def test_an_index_that_lies(nf4_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(nf4_folder, tmp_path, dirs_exist_ok=True)
    index = tmp_path / "model.safetensors.index.json"
    for content, message in (
        ({"weight_map": {"a.weight": "model.safetensors"}}, r"a\.weight is in .*, but not in its file"),
        ({"weight_map": {"a.weight": "other.safetensors"}}, r"names 'other\.safetensors', which is no file"),
        ({"weight_map": {"a.weight": "../model.safetensors"}}, "which is no file in the folder"),
        ({"weights": {}}, "must hold a weight_map"),
        ([], "must hold a JSON object"),
        ({"weight_map": {KEY + ".weight": "model.safetensors"}}, "but not in model.safetensors.index.json"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message), Files(tmp_path):
            pass


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_errors(nf4_folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Cut anywhere, or with bytes changed in the header or a quant_state: an error, or the weights as they were."""
    folder = tmp_path / "copy"
    shutil.copytree(nf4_folder, folder, dirs_exist_ok=True)
    path = folder / "model.safetensors"
    content = bytearray((nf4_folder / "model.safetensors").read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans(), label="cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1), label="at")]
    else:
        where = st.integers(0, end - 1)
        state = content.find(b'{"quant_type', end)
        where = st.one_of(where, st.integers(state, state + 80))
        for at in data.draw(st.lists(where, min_size=1, max_size=3), label="changed"):
            content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        config = checkpoint_config(folder)
        with Files(folder) as files:
            for key in files:
                files[key]
        assert config.quantization_config["layers"]
    except (ValueError, OSError) as error:
        assert len(str(error)) > 20
