"""Tiny decoders of transformers with random weights, and how a fused one is compared with the unfused one."""

import copy
import os
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch import Tensor, nn

from pyqkern import QDecoderLayer, optimize, replace_linear

VOCABULARY = 99
_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED | {"sliding_window": 16}),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        _GROUPED | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _GROUPED | {"head_dim": 32}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _GROUPED | {"sliding_window": None}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _SIZES | {"num_key_value_heads": 1, "head_dim": 32}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 256, "pad_token_id": 0},
    ),
    "opt": ("OPTForCausalLM", "OPTConfig", _SIZES | {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "pad_token_id": 0},
    ),
}
# Without codes of activations, which a rounding can flip, fused and unfused differ by the rounding of fp32 alone:
# at most eps / 2 for each of the 2 * 128 terms of a sum, through 2 layers of 2 sums one behind the other.
EXACT, ROUNDING = "int8-weight-only", 4 * 256 * torch.finfo(torch.float32).eps / 2


def decoder(family: str = "llama", implementation: str = "sdpa", **changes: Any) -> Any:
    """A random model in eval mode; attention is far from uniform, so that a wrong mask, position or head shows."""
    torch.manual_seed(0)
    kind, config, options = FAMILIES[family]
    end = {"bos_token_id": 1, "eos_token_id": None}
    settings = getattr(transformers, config)(**(options | end | changes))
    settings._attn_implementation = implementation if family != "bloom" else "eager"
    model: Any = getattr(transformers, kind)(settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
                parameter.mul_(20 if family == "bloom" else 5)  # BLOOM normalizes its embeddings to be as large
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = None
    return model


def pair(family: str = "llama", scheme: Any = EXACT, implementation: str = "sdpa", **changes: Any) -> tuple[Any, Any]:
    """The unfused and the fused model of the same weights."""
    model = decoder(family, implementation, **changes)
    return replace_linear(copy.deepcopy(model), scheme), optimize(model, scheme)


def layers(model: nn.Module) -> list[QDecoderLayer]:
    return [module for module in model.modules() if isinstance(module, QDecoderLayer)]


def calls(model: nn.Module) -> list[str | None]:
    return [layer.last_call for layer in layers(model)]


def tokens(batch: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(5, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def distance(y: Tensor, expected: Tensor) -> float:
    return float((y.float() - expected.float()).norm() / expected.float().norm())


def alike(models: tuple[Any, Any], run: Callable[[Any], Tensor], tolerance: float = ROUNDING) -> Tensor:
    """What `run` makes of the fused model, which went through the operator and is close to the unfused one's."""
    unfused, fused = models
    with torch.inference_mode():
        expected, y = run(unfused), run(fused)
    assert calls(fused) == [""] * len(layers(fused)) != []
    assert y.shape == expected.shape and distance(y, expected) < tolerance
    return y


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    found: Tensor = model(ids, **options).logits
    return found


def same_tokens(models: tuple[Any, Any], ids: Tensor, count: int = 64, **options: Any) -> Tensor:
    """Greedy tokens of both: where they part, the two best logits lie within what the logits differ by."""
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "output_logits": True}
    settings |= {"return_dict_in_generate": True, "pad_token_id": 0, **options}
    with torch.inference_mode():
        expected, found = (model.generate(ids, **settings) for model in models)
    assert calls(models[1]) == [""] * len(layers(models[1])) != []
    assert found.sequences.shape == expected.sequences.shape == (len(ids), ids.shape[1] + count)
    for row in range(len(ids)):
        differ = (found.sequences[row] != expected.sequences[row]).nonzero()
        if len(differ):
            step = int(differ[0]) - ids.shape[1]
            one, other = expected.logits[step][row], found.logits[step][row]
            best = one.topk(2).values
            assert float(best[0] - best[1]) <= 2 * float((one - other).abs().max())
    return found.sequences
