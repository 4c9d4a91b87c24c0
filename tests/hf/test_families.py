"""Every encoder: random weights, built from its config, quantized, run, saved, loaded and compiled."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import BERT, GPT2, IDS, saved
from torch import nn
from transformers import AutoModel

from pyqkern import PyqkernConfig, QEmbedding, QLinear, replace_embedding, replace_linear, summary
from pyqkern.models.find import conv1d

MASK = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])
TEXT = {"input_ids": IDS, "attention_mask": MASK}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32)}
SIZES = {key: BERT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}

# Name of the model -> its config's options and an input.
ENCODERS: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
    "Bert": (BERT, TEXT),
    "Roberta": (BERT, TEXT),
    "DistilBert": ({"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 100}, TEXT),
    "Albert": (BERT | {"embedding_size": 32}, TEXT),
    "Electra": (BERT | {"embedding_size": 32}, TEXT),
    "MPNet": (BERT, TEXT),
    "DebertaV2": (BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, TEXT),
    "ModernBert": (SIZES | {"vocab_size": 100, "pad_token_id": 0, "global_attn_every_n_layers": 2}, TEXT),
    "T5": (
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 100},
        TEXT | {"decoder_input_ids": IDS[:, :5]},
    ),
    "GPT2": (GPT2 | {"eos_token_id": 0, "pad_token_id": 0}, TEXT),
    "ViT": (SIZES | {"image_size": 32, "patch_size": 8}, PIXELS),
    "CLIPText": (SIZES | {"vocab_size": 100, "bos_token_id": 0, "eos_token_id": 99, "projection_dim": 32}, TEXT),
}

# Rounding to 254 steps of a row's range errs by about 0.8 % of normal values (the range is 3 to 4 sigma each way:
# 3.5 / 127 / sqrt(12)), nf4 in blocks of 64 by 9 %, and its integers, steps of absmax / 32 with an absmax of 2.4 sigma,
# by another 2.4 / 32 / sqrt(12); twelve such errors in a row add up to sqrt(12) as much.
ERROR = {"int8": 12**0.5 * 0.008, "nf4": 12**0.5 * (0.09**2 + (2.4 / 32) ** 2 / 12) ** 0.5}


def make(name: str) -> Any:
    torch.manual_seed(0)
    options = ENCODERS[name][0]
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options))
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def output(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).last_hidden_state


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("name", list(ENCODERS))
def test_an_encoder(name: str, scheme: str, tmp_path: Path) -> None:
    inputs = ENCODERS[name][1]
    model = make(name)
    folder = saved(model, tmp_path / "float")
    before = output(model, inputs)
    replace_linear(replace_embedding(model, scheme), scheme)
    after = output(model, inputs)
    assert (after - before).norm() <= ERROR[scheme] * before.norm()

    kept = [record for record in (*summary(model).records, *summary(model).embeddings) if record.scheme is None]
    assert not kept, kept
    assert not any(type(module) in (nn.Linear, nn.Embedding, conv1d()) for module in model.modules())
    assert summary(model).bytes_after == model.get_memory_footprint()

    assert torch.equal(output(copy.deepcopy(model), inputs), after)
    again = type(model).from_pretrained(saved(model, tmp_path / "quantized"))
    assert torch.equal(output(again, inputs), after)
    config = PyqkernConfig(scheme, embeddings=True)
    on_load = type(model).from_pretrained(folder, quantization_config=config)
    assert torch.equal(output(on_load, inputs), after)


@pytest.mark.parametrize("name", list(ENCODERS))
def test_an_encoder_is_one_graph(name: str) -> None:
    torch._dynamo.reset()
    model, inputs = replace_linear(replace_embedding(make(name)), "nf4"), ENCODERS[name][1]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    a, b = output(compiled, inputs), output(model, inputs)
    assert (a - b).norm() <= 0.01 * b.norm()


def test_albert_has_one_layer_for_all() -> None:
    model = replace_linear(make("Albert"))
    names = [record.name for record in summary(model).records]
    assert sum("albert_layer_groups.0.albert_layers.0" in name for name in names) == 6 and len(names) == 8


def test_t5_reads_the_dtype_of_its_last_weight() -> None:
    """In bf16 as well, where T5 casts its activations to the dtype of wo."""
    model = replace_linear(make("T5").bfloat16())
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype is torch.bfloat16
    assert output(model, ENCODERS["T5"][1]).dtype is torch.bfloat16


def test_conv1d_is_a_linear_with_a_transposed_weight() -> None:
    model = make("GPT2")
    conv = model.h[0].attn.c_attn
    linear = nn.Linear(64, 192)
    linear.weight.data, linear.bias.data = conv.weight.data.t(), conv.bias.data
    replace_linear(model, "int8")
    quantized = model.h[0].attn.c_attn
    assert isinstance(quantized, QLinear) and quantized.bias is conv.bias
    x = torch.randn(3, 64)
    assert torch.equal(quantized(x), QLinear.from_linear(linear)(x))
    assert summary(model).records[0].shape == (192, 64)
    excluded = replace_linear(make("GPT2"), exclude="*.c_attn")
    assert type(excluded.h[0].attn.c_attn) is conv1d()


# ---- a user's own model


class Student(transformers.BertPreTrainedModel):
    """A small encoder whose heads were pruned, pooled by the mean under the mask, with a head of two layers."""

    def __init__(self, config: transformers.BertConfig) -> None:
        super().__init__(config)
        self.encoder = transformers.BertModel(config, add_pooling_layer=False)
        for layer, heads in enumerate(config.kept_heads):
            _prune(self.encoder.encoder.layer[layer].attention, heads, config)
        self.head = nn.Sequential(
            nn.Linear(config.hidden_size, 48), nn.GELU(), nn.Dropout(0.1), nn.Linear(48, config.num_labels)
        )
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> Any:
        hidden = self.encoder(input_ids, attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.head((hidden * mask).sum(1) / mask.sum(1).clamp(min=1))
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=logits)


def _prune(attention: Any, heads: int, config: transformers.BertConfig) -> None:
    """Narrower query, key, value and output: `heads` of the config's heads are left."""
    size = config.hidden_size // config.num_attention_heads * heads
    own = attention.self
    own.num_attention_heads, own.all_head_size = heads, size
    own.query, own.key, own.value = (nn.Linear(config.hidden_size, size) for _ in range(3))
    attention.output.dense = nn.Linear(size, config.hidden_size)


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_users_own_model(scheme: str, embeddings: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**(BERT | {"hidden_size": 96, "num_attention_heads": 6}), num_labels=77)
    config.kept_heads = [5, 2]
    model = Student(config).eval()
    with torch.no_grad():
        before = model(**TEXT).logits
        loaded = Student.from_pretrained(
            saved(model, tmp_path / "float"), quantization_config=PyqkernConfig(scheme, embeddings=embeddings)
        )
        after = loaded(**TEXT).logits
        again = Student.from_pretrained(saved(loaded, tmp_path / "quantized"))
        assert torch.equal(again(**TEXT).logits, after)
        alone = again(input_ids=IDS[1:, :7], attention_mask=MASK[1:, :7]).logits
    assert (after - before).norm() <= ERROR[scheme] * before.norm()
    # Without its padding the sentence is the same, but for the order of sums in the attention and the mean.
    assert (alone - after[1:]).norm() <= 0.02 * after[1:].norm()
    assert isinstance(again.head[3], QLinear) and again.encoder.encoder.layer[1].attention.self.query.out_features == 32
    assert isinstance(again.encoder.embeddings.word_embeddings, QEmbedding) is embeddings
    assert again.get_memory_footprint() == summary(again).bytes_after < model.get_memory_footprint() / 2


def test_auto_model_finds_the_quantized_folder(tmp_path: Path) -> None:
    model = replace_linear(make("DistilBert"), "nf4")
    again = AutoModel.from_pretrained(saved(model, tmp_path))
    assert torch.equal(output(again, TEXT), output(model, TEXT))
