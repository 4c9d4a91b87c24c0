"""Every family that transformers writes under other names than its own, and the common ones: all schemes and formats.

A folder is either read back with the same bits, inspected and converted, or nothing is written.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import saved
from torch import Tensor, nn

from pyqkern import QLinear, QMultiheadAttention, checkpoint_config, replace_embedding, replace_linear
from pyqkern.checkpoints.convert import inspect
from pyqkern.checkpoints.formats import FORMATS
from pyqkern.schemes import FP4, NF4, Int4, Int8, Int8Outlier, Int8WeightOnly

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
TEXT = SIZES | {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = TEXT | {"num_key_value_heads": 2}
IMAGE = SIZES | {"image_size": 32, "patch_size": 8}
SEQ2SEQ = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 100,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 100, "pad_token_id": 0}
SPEECH = SIZES | {"conv_dim": [32] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
TWO = {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 32}

# Class -> options of its config.
FAMILIES: dict[str, dict[str, Any]] = {
    "BertForSequenceClassification": TEXT,
    "BertForMaskedLM": TEXT,
    "RobertaForMaskedLM": TEXT,
    "XLMRobertaModel": TEXT,
    "DistilBertModel": {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 100},
    "AlbertForMaskedLM": TEXT | {"embedding_size": 32},
    "ElectraForSequenceClassification": TEXT | {"embedding_size": 32},
    "MPNetModel": TEXT,
    "DebertaV2Model": TEXT,
    "ModernBertForMaskedLM": TEXT,
    "NomicBertModel": TEXT,
    "GteModel": TEXT,
    "JinaEmbeddingsV3Model": TEXT,
    "EuroBertModel": DECODER,
    "GPT2LMHeadModel": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64},
    "GPTNeoXForCausalLM": TEXT,
    "OPTForCausalLM": TEXT | {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "LlamaForCausalLM": DECODER,
    "MistralForCausalLM": DECODER,
    "Qwen2ForCausalLM": DECODER,
    "Qwen3ForCausalLM": DECODER | {"head_dim": 16},
    "GemmaForCausalLM": DECODER | {"head_dim": 16},
    "Gemma2ForCausalLM": DECODER | {"head_dim": 16},
    "PhiForCausalLM": TEXT,
    "OlmoForCausalLM": DECODER,
    "FalconForCausalLM": TEXT,
    "T5ForConditionalGeneration": T5,
    "MT5EncoderModel": T5,
    "BartForConditionalGeneration": SEQ2SEQ,
    "MarianMTModel": SEQ2SEQ,
    "WhisperForConditionalGeneration": SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 16},
    "ViTForImageClassification": IMAGE,
    "DeiTModel": IMAGE,
    "BeitModel": IMAGE,
    "Dinov2Model": IMAGE,
    "CLIPModel": TWO,
    "CLIPTextModel": TEXT | {"projection_dim": 32},
    "CLIPVisionModelWithProjection": IMAGE | {"projection_dim": 32},
    "SiglipModel": TWO,
    "Wav2Vec2Model": SPEECH,
    "WavLMModel": SPEECH,
    "HubertModel": SPEECH,
}
NF4_NESTED = NF4(double_quant=True)
SCHEMES = [Int8(), Int8(symmetric=True), Int8WeightOnly(), Int8Outlier(), NF4(), NF4_NESTED, FP4(), Int4(group_size=32)]


def make(name: str) -> Any:
    torch.manual_seed(0)
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return kind(kind.config_class(**FAMILIES[name])).eval()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


def quantized(name: str, scheme: Any, embeddings: bool, exclude: bool) -> Any:
    model = make(name)
    if embeddings:
        replace_embedding(model, scheme if scheme.embeds else "int8", include=lambda _, m: fits(scheme, m))
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    # One of query, key and value in float, where a file may have them in one tensor.
    kept = [name for name in linears if name.endswith(("query", "q_proj", "qkv"))][:1] if exclude else []
    return replace_linear(model, scheme, exclude=lambda name, m: name in kept or not fits(scheme, m))


def fits(scheme: Any, module: Any) -> bool:
    """int4 has whole groups in a row; position biases are narrower."""
    width = getattr(module, "in_features", getattr(module, "embedding_dim", 0))
    return not isinstance(scheme, Int4) or width % scheme.group_size == 0


def same(model: Any, again: Any) -> None:
    before, after = tensors(model), tensors(again)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype is after[key].dtype and torch.equal(value, after[key]), key
    schemes = {name: module.scheme for name, module in model.named_modules() if isinstance(module, QLinear)}
    for name, scheme in schemes.items():
        assert again.get_submodule(name).scheme.to_dict() == scheme.to_dict(), name


@pytest.mark.long
@pytest.mark.parametrize("exclude", [False, True], ids=["all", "but one"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_folder_is_read_back_or_not_written(name: str, scheme: Any, exclude: bool, tmp_path: Path) -> None:
    for format in FORMATS:
        embeddings = format == "pyqkern" and scheme.embeds and not exclude
        model = quantized(name, scheme, embeddings, exclude)
        if not any(isinstance(module, QLinear) for module in model.modules()):  # Falcon's are of a class of its own
            assert not hasattr(model, "hf_quantizer")
            return
        model.hf_quantizer.quantization_config.format = format
        folder = tmp_path / format
        try:
            saved(model, folder)
        except ValueError:
            attentions = any(isinstance(module, QMultiheadAttention) for module in model.modules())  # Siglip's head
            assert format != "pyqkern" and (attentions or scheme.name not in FORMATS[format].schemes)
            assert not list(folder.iterdir())
            continue
        config = checkpoint_config(folder, scheme=scheme if scheme.name.startswith("int8") else None)
        same(model, type(model).from_pretrained(folder, config=config))
        assert f"{sum(isinstance(m, QLinear) for m in model.modules())} quantized" in inspect(folder) or embeddings
