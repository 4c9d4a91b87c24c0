"""What people do with a quantized model of transformers that could lose something without a word."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from require import require
from tiny import BERT, IDS, bert, output, saved
from torch import nn
from transformers import AutoModelForSequenceClassification

import pyqkern
from pyqkern import QEmbedding, QLinear, checkpoint_config, replace_embedding, replace_linear
from pyqkern.checkpoints.convert import inspect
from pyqkern.schemes import NF4

FORMATS = [("pyqkern", "int8"), ("pyqkern", "nf4"), ("bitsandbytes", NF4(double_quant=True)), ("bitsandbytes", "int8")]
FORMATS += [("compressed-tensors", "int8")]


def classifier(format: str, scheme: Any) -> Any:
    model = replace_linear(bert("BertForSequenceClassification"), scheme)
    model.hf_quantizer.quantization_config.format = format
    return model


def llama(tie: bool = False) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    config = transformers.LlamaConfig(**sizes, vocab_size=100, tie_word_embeddings=tie, pad_token_id=0)
    return transformers.LlamaForCausalLM(config).eval()


# ---- loading


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("format", "scheme"), FORMATS, ids=str)
def test_scales_stay_fp32_in_every_dtype(format: str, scheme: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = classifier(format, scheme).to(dtype)
    folder = saved(model, tmp_path)
    config = checkpoint_config(folder, scheme="int8" if scheme == "int8" else None)
    again = AutoModelForSequenceClassification.from_pretrained(folder, config=config, dtype=dtype)
    for key, value in model.state_dict().items():
        assert again.state_dict()[key].dtype is value.dtype and torch.equal(again.state_dict()[key], value), key
    assert output(again).dtype is dtype and torch.equal(output(again), output(model))


@pytest.mark.parametrize(("format", "scheme"), FORMATS, ids=str)
def test_another_number_of_labels(format: str, scheme: Any, tmp_path: Path) -> None:
    model = classifier(format, scheme)
    folder = saved(model, tmp_path)
    kind = transformers.BertForSequenceClassification
    with pytest.raises((RuntimeError, ValueError)):
        kind.from_pretrained(folder, config=checkpoint_config(folder, num_labels=7))
    again = kind.from_pretrained(folder, config=checkpoint_config(folder, num_labels=7), ignore_mismatched_sizes=True)
    assert type(again.classifier) is nn.Linear and again.classifier.weight.shape == (7, 64)
    assert 0.01 < again.classifier.weight.std() < 0.04 and not again.classifier.bias.any()  # std=0.02, as Bert's
    assert torch.equal(output(again.bert), output(model.bert))


@pytest.mark.parametrize(("format", "scheme"), FORMATS, ids=str)
def test_what_the_model_keeps_in_fp32(format: str, scheme: Any, tmp_path: Path) -> None:
    """T5's wo, quantized or not, in a model of fp16."""
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4, "vocab_size": 100}
    source = saved(transformers.T5EncoderModel(transformers.T5Config(**sizes)), tmp_path / "float")
    for exclude in ([], ["*.wo"]):
        config = pyqkern.PyqkernConfig(scheme, exclude=exclude, format=format)
        model = transformers.T5EncoderModel.from_pretrained(source, quantization_config=config, dtype=torch.float16)
        folder = saved(model, tmp_path / f"q{len(exclude)}")
        config = checkpoint_config(folder, scheme="int8" if scheme == "int8" else None)
        again = transformers.T5EncoderModel.from_pretrained(folder, config=config, dtype=torch.float16)
        for one in (model, again):
            dense = one.encoder.block[0].layer[1].DenseReluDense
            assert dense.wo.weight.dtype is torch.float32 and dense.wi.weight.dtype is torch.float16
        assert torch.equal(output(again), output(model))


@pytest.mark.parametrize(("format", "scheme"), FORMATS, ids=str)
def test_load_state_dict_reads_what_was_saved(format: str, scheme: Any, tmp_path: Path) -> None:
    """So does the Trainer, with strict=False: what it does not find it leaves out."""
    from safetensors.torch import load_file

    model = classifier(format, scheme)
    stored = load_file(saved(model, tmp_path) / "model.safetensors")
    torch.manual_seed(1)
    other = replace_linear(bert("BertForSequenceClassification", hidden_act="relu").apply(_shift), scheme)
    other.hf_quantizer.quantization_config.format = format
    found = other.load_state_dict(stored, strict=False)
    assert not found.missing_keys and not found.unexpected_keys
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


@pytest.mark.parametrize(("format", "scheme"), FORMATS, ids=str)
def test_load_state_dict_reads_a_state_dict(format: str, scheme: Any) -> None:
    """Whatever the format of the model's files is."""
    model = classifier(format, scheme)
    other = replace_linear(bert("BertForSequenceClassification").apply(_shift), scheme)
    other.hf_quantizer.quantization_config.format = format
    other.load_state_dict(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def _shift(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data.add_(0.01)


@pytest.mark.parametrize(("format", "scheme"), FORMATS, ids=str)
def test_trainer_resumes_and_reloads_its_best_model(format: str, scheme: Any, tmp_path: Path) -> None:
    data = [{"input_ids": IDS[i], "labels": torch.tensor(i)} for i in range(2)]
    options: dict[str, Any] = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    arguments = transformers.TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, num_train_epochs=2, learning_rate=0.1, **options
    )
    trainer = transformers.Trainer(classifier(format, scheme), arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    config = checkpoint_config(best, scheme="int8" if scheme == "int8" else None)
    expected = AutoModelForSequenceClassification.from_pretrained(best, config=config)
    for key, value in expected.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[key], value), key
    again = transformers.Trainer(classifier(format, scheme), arguments, train_dataset=data, eval_dataset=data)
    again.train(resume_from_checkpoint=str(max(tmp_path.glob("checkpoint-*"))))
    assert again.state.epoch == 2


def test_accelerate_sets_tensors_by_name(tmp_path: Path) -> None:
    from accelerate import load_checkpoint_in_model

    for scheme in ("int8", "nf4"):
        model = replace_linear(bert(), scheme)
        other = replace_linear(bert().apply(_shift), scheme)
        load_checkpoint_in_model(other, saved(model, tmp_path / scheme), device_map={"": "cpu"})
        assert torch.equal(output(other), output(model))
        wrong = replace_linear(bert(hidden_size=32), scheme)
        with pytest.raises(ValueError, match=r"must be|looks incorrect"):
            load_checkpoint_in_model(wrong, tmp_path / scheme, device_map={"": "cpu"})


# ---- the model itself


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_resize_token_embeddings(tie: bool, embeddings: bool) -> None:
    model = llama(tie)
    if embeddings:
        replace_embedding(model)
    replace_linear(model)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before, logits = one.get_input_embeddings().weight.detach().clone(), output(one)
        one.resize_token_embeddings(104, mean_resizing=False)
        assert output(one).shape[-1] == 104 and torch.equal(one.get_input_embeddings().weight[:100], before)
        assert (one.get_output_embeddings().weight is one.get_input_embeddings().weight) is tie
        assert isinstance(one.model.layers[0].mlp.up_proj, QLinear)
        # Beside the head, whose activations are now float, all is as it was: an error of 8-bit activations is left.
        assert (output(one)[..., :100] - logits).norm() <= 0.02 * logits.norm()


def test_resizing_that_fails_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace_linear(replace_embedding(llama(tie=True)))
    expected = output(model)
    monkeypatch.setattr(type(model), "_resize_token_embeddings", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.resize_token_embeddings(104)
    assert isinstance(model.get_input_embeddings(), QEmbedding) and torch.equal(output(model), expected)
    assert model.lm_head is model.get_input_embeddings().table


def test_no_parameter_left(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    kind = transformers.OlmoForCausalLM
    model = kind(transformers.OlmoConfig(**sizes, vocab_size=100, pad_token_id=0, eos_token_id=1)).eval()
    keys = replace_linear(replace_embedding(copy.deepcopy(model))).state_dict().keys()
    assert not any("placeholder" in key for key in keys)
    model = replace_linear(replace_embedding(model))
    assert model.device.type == "cpu" and model.dtype is torch.float32
    assert copy.deepcopy(model).bfloat16().dtype is torch.bfloat16
    model.load_state_dict(model.state_dict())
    again = kind.from_pretrained(saved(model, tmp_path))
    assert torch.equal(again.generate(IDS, max_new_tokens=3), model.generate(IDS, max_new_tokens=3))


def test_a_model_of_which_nothing_is_quantized_is_a_float_one(tmp_path: Path) -> None:
    source = saved(bert(), tmp_path / "float")
    config = pyqkern.PyqkernConfig("int8", exclude="*")
    model = transformers.AutoModel.from_pretrained(source, quantization_config=config)
    folder = saved(model, tmp_path / "again")
    assert "quantization_config" not in (folder / "config.json").read_text()
    assert torch.equal(output(transformers.AutoModel.from_pretrained(folder)), output(bert()))


def test_a_config_that_models_share(tmp_path: Path) -> None:
    config = transformers.BertConfig(**BERT)
    quantized, plain = replace_linear(transformers.BertModel(config)), transformers.BertModel(config).eval()
    saved(quantized, tmp_path / "quantized")
    folder = saved(plain, tmp_path / "float")
    assert "quantization_config" not in (folder / "config.json").read_text()
    assert torch.equal(output(transformers.AutoModel.from_pretrained(folder)), output(plain))
    assert isinstance(transformers.AutoModel.from_pretrained(tmp_path / "quantized").pooler.dense, QLinear)


@pytest.mark.parametrize(("format", "scheme"), FORMATS, ids=str)
def test_files_with_the_names_of_the_model(format: str, scheme: Any, tmp_path: Path) -> None:
    """As save_original_format=False asks; ViT's are others than those of its files."""
    sizes = {name: BERT[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    config = transformers.ViTConfig(**sizes, intermediate_size=128, image_size=32, patch_size=8)
    torch.manual_seed(0)
    model = replace_linear(transformers.ViTForImageClassification(config).eval(), scheme)
    model.hf_quantizer.quantization_config.format = format
    for options in ({"save_original_format": False}, {}):
        folder = saved(model, tmp_path / str(len(options)), **options)
        assert "13 quantized layers" in inspect(folder)
        config = checkpoint_config(folder, scheme="int8" if scheme == "int8" else None)
        again = type(model).from_pretrained(folder, config=config)
        for key, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key


DERIVED = {
    "shared": lambda model, folder: model.config,
    "copied": lambda model, folder: copy.deepcopy(model.config),
    "as a dict": lambda model, folder: transformers.BertConfig.from_dict(model.config.to_dict()),
    "from the folder": lambda model, folder: transformers.AutoConfig.from_pretrained(folder),
}


@pytest.mark.parametrize("derive", DERIVED.values(), ids=list(DERIVED))
@pytest.mark.parametrize(("format", "scheme"), [FORMATS[0], FORMATS[2], FORMATS[4]], ids=str)
def test_a_config_made_of_a_quantized_models(format: str, scheme: Any, derive: Any, tmp_path: Path) -> None:
    quantized = classifier(format, scheme)
    config = derive(quantized, saved(quantized, tmp_path / "quantized"))
    plain = transformers.BertModel(config).eval()
    folder = saved(plain, tmp_path / "float")
    assert "quantization_config" not in (folder / "config.json").read_text()
    assert torch.equal(output(transformers.AutoModel.from_pretrained(folder)), output(plain))
    again = type(quantized).from_pretrained(
        saved(quantized, tmp_path / "again"),
        config=checkpoint_config(tmp_path / "again", scheme="int8" if scheme == "int8" else None),
    )
    assert torch.equal(output(again), output(quantized))


def test_two_quantized_models_that_share_a_config(tmp_path: Path) -> None:
    one = replace_linear(bert())
    saved(one, tmp_path / "one")
    other = replace_linear(transformers.BertModel(one.config).eval(), "nf4")
    again = transformers.AutoModel.from_pretrained(saved(other, tmp_path / "other"))
    assert torch.equal(output(again), output(other))
    assert one.config.quantization_config.layers[0]["scheme"]["name"] == "int8"


def test_what_another_library_has_quantized_keeps_its_config(tmp_path: Path) -> None:
    said = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    model = transformers.BertModel(transformers.BertConfig(**BERT, quantization_config=said))
    model.pooler.register_buffer("codes", torch.zeros(4, dtype=torch.int8))
    assert json.loads((saved(model, tmp_path) / "config.json").read_text())["quantization_config"] == said


# ---- peft


def test_all_linear_are_the_quantized_ones_too() -> None:
    require("peft", "LoRA on top of a quantized model")
    from peft import LoraConfig, get_peft_model

    model = replace_linear(bert("BertForSequenceClassification"), exclude=["classifier", "*.query"])
    model = get_peft_model(model, pyqkern.lora(LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")))
    adapters = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert len(adapters) == 13 and not any("classifier" in name for name in adapters)


def test_a_quantized_classifier_is_trained_as_a_whole() -> None:
    require("peft", "LoRA on top of a quantized model")
    from peft import LoraConfig, get_peft_model

    model = replace_linear(bert("BertForSequenceClassification"))
    config = pyqkern.lora(LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.warns(UserWarning, match="classifier is to be trained as a whole and was put back into float"):
        model = get_peft_model(model, config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(name.endswith("classifier.modules_to_save.default.weight") for name in trained)
