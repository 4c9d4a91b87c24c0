"""Tiny models of transformers with random weights, for the tests of what is around them."""

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch import Tensor, nn

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


def output(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """The first of what the model returns."""
    with torch.no_grad():
        return model(ids)[0]


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder
