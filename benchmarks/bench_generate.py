"""Text generation, batch 1: milliseconds a token of decoding and of reading the prompt; decoders with random weights.

python benchmarks/bench_generate.py --peers --threads 1,2 --json generate.json
python benchmarks/bench_generate.py --models qwen2-0.5b --schemes nf4,int8 --peers bnb-nf4,llama-q4
python benchmarks/bench_generate.py --layers 12 --agreement      fewer layers; fused and unfused tokens and logits too

pyqkern: optimize(model, scheme), and embeddings and output head quantized by replace_embedding.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import common
import llama_cpp
import peers
import torch
from common import Job, Result
from limits import Limits
from shapes import DRY, MIB
from torch import Tensor, nn

TOKENS = 2 if DRY else 8  # of a sample of decoding
PROMPT = 4 if DRY else 32  # tokens in the cache before the first
LONGEST = PROMPT + (8 if DRY else 256)  # tokens in the cache when decoding starts again
READ = "limit: read"
FUSED = "pyqkern.optimize"
LARGEST_ERROR = {True: 0.15, False: 0.9}  # of int8 and of 4 bits, relative to fp32's logits; more is a fault

#: What is passed to the config; the heads' size is hidden_size / num_attention_heads.
MODELS: dict[str, dict[str, Any]] = {
    "qwen2-0.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864,
    },
    "llama-1b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192,
    },
}  # fmt: skip
TINY = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """`prompt` tokens are read at once; 0: tokens are decoded one by one."""

    model: str
    prompt: int
    layers: int | None = None

    @property
    def label(self) -> str:
        return f"{self.model} {f'prompt of {self.prompt}' if self.prompt else 'decoding'}"


@functools.lru_cache(maxsize=1)
def random_model(name: str, layers: int | None) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = MODELS[name] | (TINY if DRY else {}) | ({"num_hidden_layers": layers} if layers else {})
    config = AutoConfig.for_model(**settings, tie_word_embeddings=True, max_position_embeddings=4096)
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model.requires_grad_(False)


@functools.lru_cache(maxsize=1)
def prompt(vocabulary: int, length: int) -> Tensor:
    return torch.randint(10, vocabulary, (1, length), generator=torch.Generator().manual_seed(1))


# ---- contenders: what each makes of the fp32 model ------------------------------------------------------------------


def _torchao(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    model.compile(dynamic=True)
    return model


#: name: title, packages, what is done to a copy of the model
PEERS: dict[str, tuple[str, tuple[str, ...], Callable[[nn.Module], nn.Module]]] = {
    "fp32": ("transformers fp32", (), lambda model: model),
    "bf16": ("transformers bf16", (), lambda model: model.bfloat16()),
    "fbgemm": ("torch quantize_dynamic", (), functools.partial(peers._quantize_dynamic, "fbgemm")),
    "bnb-nf4": ("bitsandbytes NF4", ("bitsandbytes",), functools.partial(peers._bitsandbytes, "nf4")),
    "torchao": ("torchao int8 weight-only, compiled", ("torchao",), _torchao),
}
LLAMA = {"llama-q4": ("llama.cpp Q4_0", "Q4_0"), "llama-q8": ("llama.cpp Q8_0", "Q8_0")}
ALL = (*PEERS, *LLAMA)


def quantized(model: nn.Module, scheme: str, fused: bool = True) -> nn.Module:
    """The model with linears, embeddings and output head quantized; of "nf4-fp32" activations stay in float."""
    import pyqkern
    from pyqkern import schemes

    name, _, compute = scheme.partition("-")
    kinds = {"nf4": schemes.NF4, "fp4": schemes.FP4, "int4": schemes.Int4}
    chosen: Any = kinds[name](compute=compute) if name in kinds and compute else scheme
    own: nn.Module = (pyqkern.optimize if fused else pyqkern.replace_linear)(copy.deepcopy(model), chosen)
    embeddings = chosen if name in kinds or scheme == "int8-weight-only" else "int8"
    return pyqkern.replace_embedding(own, embeddings)


def made(contender: str, case: Case) -> nn.Module:
    model = random_model(case.model, case.layers)
    own = common.own(contender)
    return quantized(model, own.scheme) if own else PEERS[contender][2](copy.deepcopy(model))


# ---- what is timed --------------------------------------------------------------------------------------------------


def build(contender: str, case: Case, threads: int) -> Job:
    if contender == READ:
        work = Limits.load().read((4 if DRY else 256) * MIB, threads)
        return Job([work], {"amount": work.amount})
    if contender in LLAMA:
        return _llama_job(contender, case, threads)
    switch = common.use_isa(contender)
    if switch:
        switch()
    model = made(contender, case)
    facts: dict[str, Any] = {}
    own = common.own(contender)
    if own:
        facts["bytes"] = weight_bytes(model)
        _check(model, case, own.scheme)
        import pyqkern

        reasons = {record.reason for record in pyqkern.summary(model).decoders}
        if reasons != {None}:
            raise ValueError(f"layers must be fused, got {reasons}")
    job = _prompt_job(model, case) if case.prompt else _decode_job(model, case)
    return Job(job.calls, facts | job.facts, _both(switch, job.before))


def _both(*calls: Callable[[], object] | None) -> Callable[[], object]:
    return lambda: [call() for call in calls if call is not None]


@torch.inference_mode()
def _check(model: nn.Module, case: Case, scheme: str) -> None:
    exact = random_model(case.model, case.layers)
    ids = prompt(exact.config.vocab_size, PROMPT)
    expected = exact(ids).logits
    error = float((model(ids).logits - expected).norm() / expected.norm())
    if not error <= LARGEST_ERROR[scheme.startswith("int8")]:
        raise ValueError(
            f"relative error of the logits must be at most {LARGEST_ERROR[scheme.startswith('int8')]}, got {error:.3f}"
        )


def weight_bytes(model: nn.Module) -> int:
    """What a token reads of pyqkern's weights: all linears, the head among them; of the embedding only a row."""
    import pyqkern

    linears = [module for module in model.modules() if isinstance(module, pyqkern.QLinear)]
    return sum(tensor.nbytes for linear in linears for tensor in linear.state_dict().values())


def _decode_job(model: nn.Module, case: Case) -> Job:
    """Greedy: each call is a token behind the last; from LONGEST on, the cache starts again with the prompt."""
    ids = prompt(model.config.vocab_size, PROMPT)
    state: dict[str, Any] = {}

    def step() -> None:
        output = model(state["token"], past_key_values=state["cache"], use_cache=True)
        state["token"] = output.logits[:, -1:].argmax(-1)

    def restart() -> None:
        if not state or state["cache"].get_seq_length() + TOKENS > LONGEST:
            output = model(ids, use_cache=True, logits_to_keep=1)
            state.update(cache=output.past_key_values, token=output.logits[:, -1:].argmax(-1))

    config = model.config
    head_size = config.hidden_size // config.num_attention_heads
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * 4
    return Job([step] * TOKENS, {"cache": a_token * (PROMPT + LONGEST) // 2}, torch.inference_mode()(restart))


def _prompt_job(model: nn.Module, case: Case) -> Job:
    ids = prompt(model.config.vocab_size, case.prompt)
    return Job([lambda: model(ids, use_cache=True, logits_to_keep=1)])


def _llama_job(contender: str, case: Case, threads: int) -> Job:
    """One call of its server: a token it has read before is read again, then tokens are generated."""
    model = random_model(case.model, case.layers)
    server = _llama_server(contender, case.model, case.layers, threads)
    ids: list[int] = prompt(model.config.vocab_size, case.prompt or PROMPT)[0].tolist()
    if case.prompt:
        return Job([lambda: server.complete(ids, 1, False)])
    tokens = LONGEST - PROMPT
    call = functools.partial(server.complete, ids, tokens, True)
    return Job([call, *([_nothing] * (tokens - 1))])


def _nothing() -> None:
    """Stands for one more token of the call before it."""


@functools.lru_cache(maxsize=2)
def _llama_server(contender: str, model: str, layers: int | None, threads: int) -> llama_cpp.Server:
    return llama_cpp.serve(random_model(model, layers), LLAMA[contender][1], threads, 4096)


# ---- what is shown --------------------------------------------------------------------------------------------------


def title(contender: str) -> str:
    return PEERS[contender][0] if contender in PEERS else LLAMA[contender][0] if contender in LLAMA else contender


def show(results: Sequence[Result], cases: Sequence[Case], shown: Sequence[str], threads: int) -> list[dict[str, Any]]:
    """Milliseconds a token, the share of the bandwidth, and how many times pyqkern's time each peer takes."""
    records = []
    for case in cases:
        found = {name: common.find(results, case.label, name, threads) for name in (*shown, READ)}
        limit, per_call = found[READ], case.prompt or 1
        bandwidth = limit.facts["amount"] / limit.seconds if limit and limit.seconds else None
        ours = [result for name, result in found.items() if result and name.startswith("pyqkern")]
        rows = []
        for name in shown:
            result = found[name]
            if result is None or result.seconds is None:
                rows.append([title(name), "failed", *[""] * (len(ours) + 3)])
                continue
            milliseconds = result.seconds / per_call * 1e3
            share = ""
            if bandwidth and {"bytes", "cache"} <= result.facts.keys():
                share = f"{(result.facts['bytes'] + result.facts['cache']) / result.seconds / bandwidth:.0%}"
            ratios = ["" if own is result else f"{own.ratio(result):.2f}x" for own in ours]
            megabytes = f"{result.facts['bytes'] / 1e6:.0f}" if "bytes" in result.facts else ""
            rows.append([title(name), f"{milliseconds:.2f}", f"{result.spread:.0%}", megabytes, share, *ratios])
            record = {"case": case.label, "threads": threads, "contender": name, "ms a token": milliseconds}
            records.append(record | {"share of the bandwidth": share, "ratios": ratios})
        columns = ["ms a token", "quartiles", "MB", "of the bandwidth", *(f"to {r.contender.split()[2]}" for r in ours)]
        at = f", {bandwidth / 1e9:.1f} GB/s" if bandwidth else ""
        print(f"{common.table([f'{case.label}, {common.threads_title(threads)}{at}', *columns], rows)}\n")
    return records


@torch.inference_mode()
def agreement(case: Case, scheme: str, tokens: int) -> list[str]:
    """How far fused and unfused model agree, and how both err: a row of a table."""
    exact = random_model(case.model, case.layers)
    ids = prompt(exact.config.vocab_size, PROMPT)
    fused, plain = quantized(exact, scheme), quantized(exact, scheme, fused=False)
    expected = exact(ids).logits
    errors = [float((model(ids).logits - expected).norm() / expected.norm()) for model in (fused, plain)]
    greedy = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens}
    texts = [model.generate(ids, **greedy) for model in (fused, plain)]
    same = (texts[0] == texts[1])[0, PROMPT:].long().cumprod(0)
    parted = int(same.sum())
    gap = ""
    if parted < tokens:
        best = plain(texts[1][:, : PROMPT + parted]).logits[0, -1].float()
        top = best.topk(2).values
        gap = f"{float((top[0] - top[1]) / best.std()):.4f}"
    return [f"{case.model} {scheme}", f"{errors[0]:.4f}", f"{errors[1]:.4f}", f"{parted} of {tokens}", gap]


# ---- the command ----------------------------------------------------------------------------------------------------


def main() -> int:
    parser = common.options(__doc__.splitlines()[0] if __doc__ else "", rounds=9)
    parser.add_argument("--models", type=common.names, default=list(MODELS), help=f"default: {','.join(MODELS)}")
    parser.add_argument("--layers", type=int, help="layers of the models (default: all)")
    parser.add_argument(
        "--schemes", type=common.names, default=["int8"] if DRY else ["int8", "nf4", "int4"],
        help='default: int8,nf4,int4; "nf4-fp32" is nf4 with compute="fp32"',
    )  # fmt: skip
    lengths = [3] if DRY else [128, 512]
    parser.add_argument("--prompts", type=common.numbers, default=lengths, help="their lengths (default: 128,512)")
    parser.add_argument("--agreement", action="store_true", help="compare fused and unfused models, measure no time")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.models) - set(MODELS)):
        parser.error(f"--models must be among {', '.join(MODELS)}; got {', '.join(unknown)}")
    if arguments.agreement:
        tokens = 8 if DRY else 256
        columns = ["fused and unfused", "error", "error unfused", "the same tokens", "gap where they part"]
        cases = [Case(model, 0, arguments.layers) for model in arguments.models]
        rows = [agreement(case, scheme, tokens) for case in cases for scheme in arguments.schemes]
        print(common.table(columns, rows))
        return 0
    wanted = {"torch": ("fp32", "bf16", "fbgemm"), "all": ALL}.get(",".join(arguments.peers), arguments.peers)
    if unknown := sorted(set(wanted) - set(ALL)):
        parser.error(f"--peers must be among {', '.join(ALL)}; got {', '.join(unknown)}")
    isas = common.contenders(argparse.Namespace(peers=["torch"], isa=arguments.isa), "model")[0]
    own = [f"{isa} {scheme}" for isa in isas if isa.startswith(FUSED) for scheme in arguments.schemes]
    packages = {name: PEERS[name][1] if name in PEERS else llama_cpp.PACKAGES for name in wanted}
    missing = {title(name): why for name in wanted if (why := peers.not_installed(packages[name]))}
    shown = [*own, *(name for name in wanted if title(name) not in missing)]
    found = common.header(missing, arguments.threads)
    cases = [Case(model, n, arguments.layers) for model in arguments.models for n in (0, *arguments.prompts)]
    results, records = common.measure_all(
        arguments, build, [*shown, READ], cases, lambda measured, threads: show(measured, cases, shown, threads)
    )
    failed = common.failures(results)
    common.write_json(arguments.json, found=found, missing=missing, results=results, summary=records)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
