"""from_pretrained and save_pretrained of transformers, with pyqkern's quantizer in them."""

import copy
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import IDS, SCHEMES, bert, gpt2, output, saved
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

import pyqkern
from pyqkern import PyqkernConfig, QEmbedding, QLinear, replace_embedding, replace_linear, summary
from pyqkern.hf import quantizer
from pyqkern.hf.register import register
from pyqkern.schemes import NF4, Int8, Int8Static


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float model."""
    return saved(bert("BertForSequenceClassification"), tmp_path_factory.mktemp("classifier"))


def load(folder: Path, scheme: Any = "int8", **options: Any) -> Any:
    dtype = options.pop("dtype", torch.float32)
    config = PyqkernConfig(scheme, **options)
    return AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=config, dtype=dtype)


# ---- quantized as they are read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_quantizing_on_load_is_replace_linear_after_it_and_round_trips(
    classifier: Path, tmp_path: Path, scheme: Any, dtype: torch.dtype
) -> None:
    model = load(classifier, scheme, dtype=dtype)
    expected = replace_linear(AutoModelForSequenceClassification.from_pretrained(classifier, dtype=dtype), scheme)
    assert torch.equal(output(model), output(expected)) and output(model).dtype is dtype
    again = AutoModelForSequenceClassification.from_pretrained(saved(model, tmp_path), dtype=dtype)
    assert torch.equal(output(again), output(model))
    for one in (model, again):
        assert summary(one).bytes_after == one.get_memory_footprint() == summary(expected).bytes_after
        assert all(record.scheme == model.classifier.scheme.name for record in summary(one).records)
    assert again.classifier.scheme == expected.classifier.scheme
    assert again.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(again.state_dict()[key], value) for key, value in expected.state_dict().items())


@pytest.mark.parametrize(("scheme", "embeddings"), [("int8", True), ("nf4", True), ("int8", NF4(double_quant=True))])
@pytest.mark.parametrize("kind", ["BertForMaskedLM", "gpt2"])
def test_embeddings_and_the_head_tied_to_them(tmp_path: Path, kind: str, scheme: Any, embeddings: Any) -> None:
    auto = AutoModelForCausalLM if kind == "gpt2" else AutoModelForMaskedLM
    source = gpt2() if kind == "gpt2" else bert(kind)
    folder = saved(source, tmp_path / "float")
    model = auto.from_pretrained(folder, quantization_config=PyqkernConfig(scheme, embeddings=embeddings))
    expected = replace_linear(replace_embedding(source, scheme if embeddings is True else embeddings), scheme)
    again = auto.from_pretrained(saved(model, tmp_path / "quantized"))
    from_memory = auto.from_pretrained(saved(expected, tmp_path / "from_memory"))
    for one in (model, again, from_memory):
        assert torch.equal(output(one), output(expected))
        assert one.get_output_embeddings() is one.get_input_embeddings().table
        assert one.get_memory_footprint() == expected.get_memory_footprint() == summary(one).bytes_after
        assert not any(type(module) in (nn.Embedding, nn.Linear) for module in one.modules())
    keys = load_file(tmp_path / "quantized" / "model.safetensors")
    assert not any(key.startswith(("cls.predictions.decoder.weight", "lm_head.")) for key in keys)
    # The base model finds its embeddings in the file of the whole.
    base = AutoModel.from_pretrained(tmp_path / "quantized")
    assert torch.equal(output(base), output(expected.base_model))


def test_a_tied_head_stays_in_float_and_tied(tmp_path: Path) -> None:
    folder = saved(bert("BertForMaskedLM"), tmp_path / "float")
    model = AutoModelForMaskedLM.from_pretrained(folder, quantization_config=PyqkernConfig("nf4"))
    again = AutoModelForMaskedLM.from_pretrained(saved(model, tmp_path / "quantized"))
    for one in (model, again):
        head = one.cls.predictions.decoder
        assert type(head) is nn.Linear and head.weight is one.bert.embeddings.word_embeddings.weight
        assert isinstance(one.cls.predictions.transform.dense, QLinear)
    assert torch.equal(output(again), output(model))


def test_excludes_add_to_what_is_kept_anyway(tmp_path: Path) -> None:
    folder = saved(bert("BertForMaskedLM"), tmp_path / "float")
    config = PyqkernConfig("int8", exclude=["*.layer.0.*"])
    model = AutoModelForMaskedLM.from_pretrained(folder, quantization_config=config)
    kept = {record.name: record.reason for record in summary(model).records if record.scheme is None}
    assert kept.pop("cls.predictions.decoder").startswith("tied to")
    assert len(kept) == 6 and set(kept.values()) == {"excluded"} and all(".layer.0." in name for name in kept)
    again = AutoModelForMaskedLM.from_pretrained(saved(model, tmp_path / "quantized"))
    assert torch.equal(output(again), output(model)) and again.config.quantization_config.exclude == ["*.layer.0.*"]


def test_weights_are_quantized_as_they_are_read(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each weight, what is in memory is at most the quantized model and one shard."""
    folder = saved(bert("BertForSequenceClassification", num_hidden_layers=6), tmp_path, max_shard_size="100KB")
    shards = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert len(shards) > 3
    seen = []
    quantize_weight = quantizer.PyqkernHfQuantizer.quantize_weight

    def spy(self: Any, model: nn.Module, name: str, value: torch.Tensor) -> bool:
        done = quantize_weight(self, model, name, value)
        real = [t for t in (*model.parameters(), *model.buffers()) if not t.is_meta]
        real += [t for layer in self._quantized.values() for t in layer.buffers()]
        seen.append(sum(t.numel() * t.element_size() for t in real))
        return done

    monkeypatch.setattr(quantizer.PyqkernHfQuantizer, "quantize_weight", spy)
    model = load(folder, "nf4")
    assert len(seen) == 38 and max(seen) <= model.get_memory_footprint() + max(shards)


def test_what_the_files_lack_is_initialized_and_quantized(tmp_path: Path) -> None:
    folder = saved(bert(), tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, quantization_config=PyqkernConfig("int8"), num_labels=3
    )
    assert isinstance(model.classifier, QLinear) and model.classifier.weight.std() > 0
    assert output(model).shape == (2, 3) and output(model).isfinite().all()
    other = AutoModelForSequenceClassification.from_pretrained(
        saved(bert("BertForSequenceClassification"), tmp_path / "other"),
        quantization_config=PyqkernConfig("nf4"),
        num_labels=7,
        ignore_mismatched_sizes=True,
    )
    assert other.classifier.out_features == 7 and 0 < other.classifier.weight.std() < 0.1
    expected = replace_linear(bert("BertForSequenceClassification"), "nf4").bert
    assert torch.equal(output(other.bert), output(expected))


def test_a_quantized_base_model_under_a_head_and_without_it(classifier: Path, tmp_path: Path) -> None:
    whole = saved(load(classifier, "nf4"), tmp_path / "whole")
    base = saved(AutoModel.from_pretrained(whole), tmp_path / "base")
    headed = AutoModelForSequenceClassification.from_pretrained(base)
    assert torch.equal(output(headed.bert), output(AutoModelForSequenceClassification.from_pretrained(whole).bert))
    assert isinstance(headed.bert.pooler.dense, QLinear) and type(headed.classifier) is nn.Linear


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto"])
def test_device_map(classifier: Path, tmp_path: Path, device_map: Any) -> None:
    config = PyqkernConfig("int8")
    kind = AutoModelForSequenceClassification
    model = kind.from_pretrained(classifier, quantization_config=config, device_map=device_map)
    again = kind.from_pretrained(saved(model, tmp_path), device_map=device_map)
    assert torch.equal(output(model), output(again)) and torch.equal(output(model), output(load(classifier)))


def test_offloading_is_refused(classifier: Path) -> None:
    device_map = {"bert": "cpu", "classifier": "disk", "dropout": "cpu"}
    with pytest.raises(ValueError, match=r"device_map must keep .* on one CPU or on GPUs, got \['cpu', 'disk'\]"):
        AutoModelForSequenceClassification.from_pretrained(
            classifier, quantization_config=PyqkernConfig(), device_map=device_map
        )


# ---- saving


def layers(model: nn.Module) -> list[Any]:
    return [*summary(model).records, *summary(model).embeddings]


def test_a_model_quantized_in_memory_is_saved_as_it_is(tmp_path: Path) -> None:
    """Two schemes and a linear in float, which no single option says."""
    model = bert("BertForSequenceClassification")
    replace_linear(model, "nf4", include="*.layer.0.*", exclude="*.query")
    replace_linear(model, Int8(clip_weights=True), include="*.layer.1.*")
    replace_embedding(model, "int8", include="*word*")
    copied = copy.deepcopy(model)
    for one in (model, copied):
        again = AutoModelForSequenceClassification.from_pretrained(saved(one, tmp_path, max_shard_size="50KB"))
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        assert torch.equal(output(again), output(model))
        for a, b in zip(layers(model), layers(again), strict=True):
            assert (a.name, a.scheme, a.bytes_after) == (b.name, b.scheme, b.bytes_after)
        assert again.bert.encoder.layer[1].output.dense.scheme == Int8(clip_weights=True)
        assert isinstance(again.bert.embeddings.word_embeddings, QEmbedding)


def test_calibrated_ranges_are_saved(tmp_path: Path) -> None:
    model = bert("BertForSequenceClassification")
    ranges = pyqkern.calibrate(model, [{"input_ids": IDS}])
    folder = saved(model, tmp_path / "float")
    config = PyqkernConfig(Int8Static(ranges))
    loaded = AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=config)
    assert torch.equal(output(loaded), output(replace_linear(model, Int8Static(ranges))))
    again = AutoModelForSequenceClassification.from_pretrained(saved(loaded, tmp_path / "quantized"))
    assert torch.equal(output(again), output(loaded)) and again.classifier.scheme.name == "int8-static"


def test_dequantize(classifier: Path) -> None:
    model = load(classifier, "nf4", embeddings=True)
    expected = {name: module.weight for name, module in model.named_modules() if isinstance(module, QLinear)}
    model = model.dequantize()
    assert not any(isinstance(module, QLinear | QEmbedding) for module in model.modules())
    assert torch.equal(model.classifier.weight, expected["classifier"]) and output(model).isfinite().all()


PROCESS = """
import sys
if sys.argv[1] == "pyqkern first":
    import pyqkern
    assert "transformers" not in sys.modules, "import pyqkern must not import transformers"
    from transformers import AutoModelForSequenceClassification
else:
    from transformers import AutoModelForSequenceClassification, BertModel
    import pyqkern
import torch
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[2])
with torch.no_grad():
    torch.save(model(torch.arange(2, 26).view(2, 12)).logits, sys.argv[3])
type(model)(model.config).save_pretrained(sys.argv[4])
"""


@pytest.mark.parametrize("order", ["pyqkern first", "transformers first"])
def test_loading_needs_no_argument_in_a_process_that_imports_pyqkern(
    classifier: Path, tmp_path: Path, order: str
) -> None:
    model = load(classifier, "nf4")
    folder = saved(model, tmp_path / "model")
    command = [sys.executable, "-c", PROCESS, order, str(folder), str(tmp_path / "y.pt"), str(tmp_path / "float")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "y.pt"), output(model))
    assert "quantization_config" not in (tmp_path / "float" / "config.json").read_text()


def test_a_transformers_that_does_not_fit_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyqkern.hf.quantizer", None)  # importing it raises ImportError
    with pytest.warns(UserWarning, match="save_pretrained cannot write what pyqkern quantized"):
        assert isinstance(replace_linear(bert()).pooler.dense, QLinear)
    tables = types.ModuleType("transformers.quantizers.auto")
    tables.AUTO_QUANTIZER_MAPPING = {}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, tables.__name__, tables)
    with pytest.warns(UserWarning, match="pyqkern cannot be used by transformers' from_pretrained"):
        register()


IMPORTS = """
import sys
for name in sys.argv[2:]:
    __import__(name)
from transformers import AutoModelForSequenceClassification
import pyqkern
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], quantization_config=pyqkern.PyqkernConfig())
assert isinstance(model.bert.pooler.dense, pyqkern.QLinear) and len(pyqkern.models.replace.replaced) == 1
"""
FIRST = ["config", "quantizer", "slots lora names", "transformers.quantizers register transformers4"]


@pytest.mark.parametrize("first", FIRST)
def test_modules_of_hf_can_be_imported_in_any_order(classifier: Path, first: str) -> None:
    names = [name if "." in name else f"pyqkern.hf.{name}" for name in first.split()]
    command = [sys.executable, "-W", "error::UserWarning:pyqkern", "-c", IMPORTS, str(classifier), *names]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


# ---- what is wrong is said


def test_wrong_options() -> None:
    for options, message in (
        ({"scheme": "int7"}, "scheme must be one of"),
        ({"scheme": {"name": "nf4", "block": 64}}, "options of the scheme 'nf4' must be among"),
        ({"format": "gguf"}, "format must be one of"),
        ({"version": 2}, "version of the quantization_config must be 1, got 2; update pyqkern"),
        ({"embeddings": "int8-static"}, "scheme of an embedding must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            PyqkernConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="exclude must be name patterns"):
        PyqkernConfig(exclude=[len])  # type: ignore[list-item]


def test_a_pattern_that_matches_nothing(classifier: Path) -> None:
    with pytest.raises(ValueError, match=r"exclude must match the name of a linear, got 'clasifier'"):
        load(classifier, exclude="clasifier")


def broken(folder: Path, change: Any) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_files_that_are_not_what_the_config_says(classifier: Path, tmp_path: Path, scheme: str) -> None:
    folder = saved(load(classifier, scheme), tmp_path / "model")
    key = "bert.encoder.layer.1.attention.self.query"
    scales = f"{key}.{'weight_scale' if scheme == 'int8' else 'absmax'}"

    def check(change: Any, message: str) -> None:
        copied = tmp_path / "copy"
        copied.mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            (copied / name).write_bytes((folder / name).read_bytes())
        with pytest.raises(ValueError, match=message):
            AutoModelForSequenceClassification.from_pretrained(broken(copied, change))

    check(lambda t: t.pop(scales), f"{scales} is missing")
    check(lambda t: t.update({scales + "s": t.pop(scales)}), f"{scales} is missing")
    check(lambda t: t.update({scales: t[scales][:-1]}), f"{scales} must be float32")
    check(lambda t: t.update({f"{key}.weight": t[f"{key}.weight"][1:]}), rf"{key}.weight must be u?int8 \[")
    check(lambda t: t.update({f"{key}.weight": t[f"{key}.weight"].float()}), f"{key}.weight must be")
    check(lambda t: t.update({f"{key}.bias": t[f"{key}.bias"][:-1]}), f"{key}.bias must be")
    check(lambda t: t[scales].view(-1)[3].fill_(float("nan")), f"{scales} must be finite")


def test_a_config_that_is_not_what_the_model_is(classifier: Path, tmp_path: Path) -> None:
    folder = saved(load(classifier), tmp_path)
    said = json.loads((folder / "config.json").read_text())

    def check(change: Any, message: str) -> None:
        wrong = copy.deepcopy(said)
        change(wrong["quantization_config"])
        (folder / "config.json").write_text(json.dumps(wrong))
        with pytest.raises((ValueError, TypeError), match=message):
            AutoModelForSequenceClassification.from_pretrained(folder)

    check(lambda c: c.update(layers=None), "config.json.*: layers must be a list of objects")
    check(lambda c: c.update(layers=[]), "is of a quantized layer, but config.json")
    check(lambda c: c["layers"][0].update(linears=["a", "b"]), "a.weight is missing from the files")
    check(lambda c: c["layers"][0].update(scheme={"name": "nf4"}), "weight must be uint8")
    check(lambda c: c.update(colour="blue"), "colour")


def test_a_cut_file(classifier: Path, tmp_path: Path) -> None:
    folder = saved(load(classifier), tmp_path)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(Exception, match=r"(?i)incomplete|header|buffer"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_nan_in_a_weight_is_said_with_its_name(tmp_path: Path) -> None:
    model = bert()
    model.encoder.layer[1].output.dense.weight.data[3, 4] = float("nan")
    folder = saved(model, tmp_path)
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.output\.dense: weight must be finite"):
        AutoModel.from_pretrained(folder, quantization_config=PyqkernConfig("int8"))
