"""llama.cpp as a peer: a GGUF file with the weights of a transformers model, and its server in this process."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

PACKAGES = ("xllamacpp", "gguf")
LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write(model: nn.Module, quant_type: str, path: Path) -> None:
    """The model's weights as quant_type (Q4_0 or Q8_0), embeddings too; norms and biases in fp32.

    llama.cpp wants the rows of query and key in another order and a tokenizer; neither matters to its speed, so rows
    stay as they are and the words are made up.
    """
    import gguf

    config: Any = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"w{i}" for i in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["w 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in _tensors(model):
        array = tensor.detach().float().numpy()
        if array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            kind = gguf.GGMLQuantizationType[quant_type]
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        if name == "model.embed_tokens.weight":
            yield "token_embd.weight", tensor
        elif name == "model.norm.weight":
            yield "output_norm.weight", tensor
        elif name.startswith("model.layers."):
            number, _, rest = name.removeprefix("model.layers.").partition(".")
            part, _, kind = rest.rpartition(".")
            yield f"blk.{number}.{LAYER[part]}.{kind}", tensor
        elif name != "lm_head.weight":  # the embeddings once more
            raise ValueError(f"no name in GGUF for {name}")


class Server:
    """llama.cpp's server with one slot, without its HTTP."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = context
        parameters.n_parallel = 1
        parameters.n_gpu_layers = 0
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        parameters.warmup = False
        parameters.verbosity = -1
        with _quiet():
            self.server = xllamacpp.Server(parameters)

    def complete(self, prompt: list[int], tokens: int, cached: bool) -> dict[str, Any]:
        """Reads the prompt, all but what is `cached` of it, and generates so many tokens."""
        request = {
            "prompt": prompt, "n_predict": tokens, "cache_prompt": cached, "temperature": 0.0, "ignore_eos": True,
        }  # fmt: skip
        answer: dict[str, Any] = self.server.handle_completions(request)
        if "timings" not in answer:
            raise RuntimeError(f"llama.cpp: {str(answer)[:200]}")
        return answer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """llama.cpp writes its log to the process's own stderr."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def serve(model: nn.Module, quant_type: str, threads: int, context: int) -> Server:
    """A server with the model; its file is gone again once it has been read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        write(model, quant_type, path)
        return Server(path, threads, context)
