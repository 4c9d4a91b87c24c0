"""Tiny models of transformers with random weights, for the tests of what is around them."""

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch import Tensor, nn

from pyqkern.schemes import FP4, NF4, Int4, Int8, Int8Outlier, Int8WeightOnly

IDS = torch.arange(2, 26).view(2, 12)
BERT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64, "bos_token_id": 0}


def bert(kind: str = "BertModel", **options: Any) -> Any:
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, kind)(transformers.BertConfig(**(BERT | options)))
    for name, parameter in model.named_parameters():  # biases are zero at first, and would hide an error
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, eos_token_id=0)).eval()


MOE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
# The families of experts that are tried, and what their configs call the number of these.
MOE_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6},
    "qwen2_moe": {"num_experts": 6, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128},
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 64, "head_dim": 16},
}


def moe(family: str = "mixtral", **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **(MOE | MOE_FAMILIES.get(family, {}) | options))
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def output(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """The first of what the model returns."""
    with torch.no_grad():
        return model(ids)[0]


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


SENTENCES = """
I lost my card and need to block it right away.
How long does an international transfer take to arrive?
Why was I charged a fee for withdrawing cash abroad?
My new card has not arrived yet, can you tell me where it is?
The app keeps asking me to verify my identity.
Can I change the currency of my account?
I do not recognise a payment on my statement.
What is the exchange rate that you use at the weekend?
Please help me to reset my passcode.
My top-up failed, but the money left my bank account.
Is there a limit on how much I can spend in a day?
How do I close my account and withdraw what is left?
The machine kept my card and gave me no money.
I was charged twice for the same purchase in a shop.
Can my daughter have a card of her own?
Which countries do you support for card delivery?
I would like to dispute a transaction from last week.
My refund is not showing up although the shop confirmed it.
How can I add the card to my phone for contactless payments?
Why does my transfer still say pending after two days?
""".strip().splitlines()

SCHEMES = [
    "int8",
    "int8-a7",
    "nf4",
    Int8(symmetric=True),
    NF4(blocksize=128, double_quant=True),
    FP4(),
    Int8Outlier(3.0),
]
SCHEMES += [Int8WeightOnly(clip_weights=True), Int4(group_size=32, compute="fp32")]

# Of experts; doubly quantized ones are too large for a tiny model.
MOE_SCHEMES = ["int8", "int8-a7", "nf4", Int8(symmetric=True), FP4(blocksize=32), Int4(compute="fp32")]
