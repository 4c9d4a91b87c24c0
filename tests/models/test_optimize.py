"""optimize and QEncoderLayer on models of transformers."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CamembertConfig,
    CamembertModel,
    Data2VecTextConfig,
    Data2VecTextModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    ErnieConfig,
    ErnieModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

import pyqkern
from pyqkern import QEncoderLayer, QLinear, optimize, replace_linear, summary
from pyqkern.schemes import NF4, Int8

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 120,
    "vocab_size": 99,
}
MODELS = {
    "bert": (BertModel, BertConfig(**SIZES)),
    "roberta": (RobertaModel, RobertaConfig(**SIZES)),
    "xlm-roberta": (XLMRobertaModel, XLMRobertaConfig(**SIZES)),
    "camembert": (CamembertModel, CamembertConfig(**SIZES)),
    "electra": (ElectraModel, ElectraConfig(**SIZES, embedding_size=32)),
    "ernie": (ErnieModel, ErnieConfig(**SIZES)),
    "data2vec": (Data2VecTextModel, Data2VecTextConfig(**SIZES)),
    "mpnet": (MPNetModel, MPNetConfig(**SIZES)),
    "albert": (AlbertModel, AlbertConfig(**SIZES, embedding_size=32, num_hidden_groups=2)),
    "distilbert": (
        DistilBertModel,
        DistilBertConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=120, vocab_size=99),
    ),
}


def model(name: str = "bert", **changes: Any) -> nn.Module:
    """A random model whose attention is far from uniform, so that a wrong mask or head shows."""
    torch.manual_seed(0)
    make, config = MODELS[name]
    config = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(config, key, value)
    made = make(config).eval()
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if parameter.dim() == 2 and "embedding" not in key:
                parameter.mul_(6)
    return made


def inputs(batch: int = 3, length: int = 20) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, length, dtype=torch.long)
    for i in range(1, batch):
        mask[i, length - 5 * i :] = 0
    return torch.randint(5, 99, (batch, length), generator=g) * mask + (1 - mask), mask


def state(of: nn.Module, *arguments: Tensor, **options: Any) -> Tensor:
    ids, mask = arguments or inputs()
    with torch.no_grad():
        return of(ids, attention_mask=mask, **options).last_hidden_state


def relative(y: Tensor, expected: Tensor, mask: Tensor) -> float:
    kept = mask.bool()
    return float((y[kept] - expected[kept]).norm() / expected[kept].norm())


def run(layer: nn.Module, *arguments: Tensor) -> Tensor:
    """Layers return tuples up to transformers 4."""
    y = layer(*arguments)
    return y[0] if isinstance(y, tuple) else y


def layers(of: nn.Module) -> list[QEncoderLayer]:
    return [module for module in of.modules() if isinstance(module, QEncoderLayer)]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_every_family(name: str, implementation: str) -> None:
    """Against fp32 no further off than 1.5 times replace_linear (few codes: 1.1 times holds for a whole BERT)."""
    fp32 = model(name)
    fp32.set_attn_implementation(implementation)
    quantized, optimized = replace_linear(copy.deepcopy(fp32)), optimize(copy.deepcopy(fp32))
    assert len(layers(optimized)) == 2 and type(optimized) is type(fp32)
    assert list(optimized.state_dict()) == list(quantized.state_dict())
    _, mask = inputs()
    expected = state(fp32)
    assert relative(state(optimized), expected, mask) < 1.5 * relative(state(quantized), expected, mask) < 0.2
    assert (state(optimized)[mask == 0] == 0).all()
    whole = inputs()[0], torch.ones(3, 20, dtype=torch.long)
    assert relative(state(optimized, *whole), state(quantized, *whole), whole[1]) < 0.1


@pytest.mark.parametrize("scheme", ["nf4", NF4(blocksize=32, double_quant=True, compute="int8"), "fp4", "int4"])
def test_four_bits(scheme: Any) -> None:
    fp32 = model(intermediate_size=128)
    quantized, optimized = replace_linear(copy.deepcopy(fp32), scheme), optimize(copy.deepcopy(fp32), scheme)
    assert len(layers(optimized)) == 2 and all(record.reason is None for record in summary(optimized).encoders)
    _, mask = inputs()
    expected, before = state(fp32), state(optimized)
    # The same codes, so the same error, but for what attention in integers adds to it.
    assert relative(before, expected, mask) < 1.1 * relative(state(quantized), expected, mask)
    assert 0 < relative(before, state(quantized), mask) < 0.1
    other = optimize(model(intermediate_size=128, hidden_act="relu"), scheme)
    assert not torch.equal(state(other), before)
    other = optimize(model(intermediate_size=128), scheme)
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(quantized.state_dict())
    assert torch.equal(state(other), before)
    assert torch.equal(state(pickle.loads(pickle.dumps(optimized))), before)
    assert torch.equal(state(optimize(quantized)), before)  # of a model that is quantized already
    torch._dynamo.reset()
    compiled = torch.compile(optimized.encoder.layer[0], fullgraph=True)
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(run(compiled, x), run(optimized.encoder.layer[0], x))


def test_the_position_bias_of_mpnet_counts() -> None:
    fp32 = model("mpnet")
    fp32.encoder.relative_attention_bias.weight.data.mul_(30)
    quantized, optimized = replace_linear(copy.deepcopy(fp32)), optimize(copy.deepcopy(fp32))
    _, mask = inputs()
    assert relative(state(optimized), state(quantized), mask) < 0.1
    optimized.encoder.relative_attention_bias.weight.data.zero_()
    assert relative(state(optimized), state(quantized), mask) > 0.3


def test_a_gradient_reaches_the_position_bias() -> None:
    """Also where nothing else asks for one: the operator has no gradient, so the layers go their old way."""
    optimized = optimize(model("mpnet")).requires_grad_(False)
    bias = optimized.encoder.relative_attention_bias.weight.requires_grad_(True)
    ids, mask = inputs()
    optimized(ids, attention_mask=mask).last_hidden_state.square().sum().backward()
    assert bias.grad is not None and bias.grad.norm() > 0


def test_the_output_of_a_layer_is_that_of_the_operator() -> None:
    """And not the old way's: that they differ shows that it was the operator which ran."""
    optimized = optimize(model())
    quantized = replace_linear(model())
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        new, old = (run(m.encoder.layer[0], x) for m in (optimized, quantized))
    assert not torch.equal(new, old) and relative(new, old, torch.ones(2, 7)) < 0.05


def test_hidden_states() -> None:
    optimized = optimize(model())
    ids, mask = inputs()
    with torch.no_grad():
        out = optimized(ids, attention_mask=mask, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert torch.equal(out.last_hidden_state, state(optimized))


def test_attentions_are_those_of_the_quantized_linears() -> None:
    optimized, quantized = optimize(model()), replace_linear(model())
    for m in (optimized, quantized):
        m.set_attn_implementation("eager")
    ids, mask = inputs()
    with torch.no_grad():
        asked, old = (m(ids, attention_mask=mask, output_attentions=True) for m in (optimized, quantized))
    assert len(asked.attentions) == 2 and all(map(torch.equal, asked.attentions, old.attentions))
    assert torch.equal(asked.last_hidden_state, old.last_hidden_state)
    optimized.config._attn_implementation = "eager"
    optimized.config.output_attentions = True
    assert torch.equal(state(optimized), old.last_hidden_state)


def test_old_ways() -> None:
    """Where the operator cannot give all that is asked for, the values are those of replace_linear."""
    optimized, quantized = optimize(model()), replace_linear(model())
    ids, mask = inputs()
    old = state(quantized)
    with torch.enable_grad():  # the LayerNorms want gradients
        y = optimized(ids, attention_mask=mask).last_hidden_state
    assert torch.equal(y, old) and y.requires_grad
    y.sum().backward()
    assert optimized.encoder.layer[0].output.LayerNorm.weight.grad is not None
    seen = []
    handle = optimized.encoder.layer[1].output.dense.register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        first = run(optimized.encoder.layer[0], quantized.embeddings(ids))
        assert torch.equal(run(optimized.encoder.layer[1], first), run(quantized.encoder.layer[1], first))
        assert len(seen) == 1
    handle.remove()
    assert not torch.equal(state(optimized), old)
    optimized.train()
    assert state(optimized).isfinite().all()
    optimized.eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        autocast = optimized(ids, attention_mask=mask).last_hidden_state
        assert torch.equal(autocast, quantized(ids, attention_mask=mask).last_hidden_state)


def test_a_part_that_is_exchanged_is_used() -> None:
    optimized = optimize(model())
    state(optimized)
    layer = optimized.encoder.layer[0]
    layer.attention.self.query = nn.Linear(64, 64)
    quantized = replace_linear(model())
    quantized.encoder.layer[0].attention.self.query = layer.attention.self.query
    x = torch.randn(1, 4, 64)
    with torch.no_grad():
        assert torch.equal(run(layer, x), run(quantized.encoder.layer[0], x))
        layer.attention.self.query = QLinear.from_linear(layer.attention.self.query)
        before = run(layer, x)
        layer.attention.self.query.bias.add_(1)  # in place: no new address
        assert not torch.equal(run(layer, x), before)
        layer.output.LayerNorm.weight = nn.Parameter(torch.zeros(64))
        assert torch.equal(run(layer, x), layer.output.LayerNorm.bias.expand(1, 4, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    optimized, fp32 = optimize(model()).to(dtype), model()
    _, mask = inputs()
    y = state(optimized)
    assert y.dtype == dtype and relative(y.float(), state(fp32), mask) < 0.1


def test_copies() -> None:
    optimized = optimize(model())
    expected = state(optimized)
    for copied in (copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
        assert len(layers(copied)) == 2 and torch.equal(state(copied), expected)
        with torch.no_grad():
            copied.encoder.layer[0].output.dense.weight_scale.mul_(2)
        assert not torch.equal(state(copied), expected) and torch.equal(state(optimized), expected)


def test_checkpoints_interchange() -> None:
    optimized, quantized = optimize(model()), replace_linear(model())
    other = optimize(model("bert", initializer_range=0.5))
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(state(other), state(optimized))
    quantized.load_state_dict(other.state_dict())


def test_quantized_before() -> None:
    assert torch.equal(state(optimize(replace_linear(model()))), state(optimize(model())))
    twice = optimize(model())
    assert optimize(twice) is twice and len(layers(twice)) == 2


@pytest.mark.parametrize("scheme", [Int8(symmetric=True), Int8(activation_bits=7)])
def test_other_activations(scheme: Int8) -> None:
    optimized, quantized = optimize(model(), scheme), replace_linear(model(), scheme)
    _, mask = inputs()
    assert len(layers(optimized)) == 2 and relative(state(optimized), state(quantized), mask) < 0.1


def test_pruned_heads() -> None:
    """Two of four heads of one layer, taken out by hand: transformers 5 no longer does it."""
    pruned = model()
    attention = pruned.encoder.layer[0].attention
    for name in ("query", "key", "value"):
        linear = getattr(attention.self, name)
        kept = nn.Linear(64, 32)
        kept.weight.data, kept.bias.data = linear.weight.data[16:48], linear.bias.data[16:48]
        setattr(attention.self, name, kept)
    dense = nn.Linear(32, 64)
    dense.weight.data, dense.bias.data = attention.output.dense.weight.data[:, 16:48], attention.output.dense.bias.data
    attention.output.dense = dense
    attention.self.num_attention_heads, attention.self.all_head_size = 2, 32
    expected = state(pruned)
    quantized, optimized = replace_linear(copy.deepcopy(pruned)), optimize(pruned)
    _, mask = inputs()
    assert len(layers(optimized)) == 2
    assert relative(state(optimized), expected, mask) < 1.5 * relative(state(quantized), expected, mask)


def test_every_head_counts() -> None:
    """A class of 2 and a pooler: what is no encoder layer is replaced as by replace_linear."""
    torch.manual_seed(0)
    classifier = BertForSequenceClassification(BertConfig(**SIZES)).eval()
    optimize(classifier)
    assert isinstance(classifier.classifier, QLinear) and isinstance(classifier.bert.pooler.dense, QLinear)
    ids, mask = inputs()
    with torch.no_grad():
        assert classifier(ids, attention_mask=mask).logits.shape == (3, 2)


def test_why_not() -> None:
    def reasons(made: nn.Module, *arguments: Any, **options: Any) -> list[str | None]:
        return [record.reason for record in summary(optimize(made, *arguments, **options)).encoders]

    assert reasons(model()) == [None, None]
    mixed = reasons(model(), exclude="encoder.layer.1.output.dense")
    assert mixed[0] is None and mixed[1] is not None and "output.dense is no linear with" in mixed[1]
    assert all("intermediate" not in str(r) and "rows of 120, no whole" in str(r) for r in reasons(model(), "nf4"))
    assert all("computes in bf16" in str(reason) for reason in reasons(model(), NF4(compute="bf16")))
    assert all("int8-weight-only" in str(reason) for reason in reasons(model(), "int8-weight-only"))
    two = replace_linear(model(), Int8(symmetric=True), include="*query")
    assert all("in different ways" in str(reason) for reason in reasons(two))
    assert all("SiLU" in str(reason) for reason in reasons(model("bert", hidden_act="silu")))
    assert all("decoder" in str(reason) for reason in reasons(model("bert", is_decoder=True)))
    norms = model()
    norms.encoder.layer[0].output.LayerNorm = nn.LayerNorm(64, elementwise_affine=False)
    assert "LayerNorms with weight and bias" in str(reasons(norms)[0])
    patched = model()
    patched.encoder.layer[1].forward = patched.encoder.layer[1].forward
    assert "patched" in str(reasons(patched)[1])
    linear = nn.Sequential(nn.Linear(4, 4))
    assert reasons(linear) == [] and isinstance(linear[0], QLinear)


def test_summary_prints_both() -> None:
    text = str(summary(optimize(model(), exclude="encoder.layer.1.output.dense")))
    assert "1 of 2 encoder layers are one operator each" in text
    assert "encoder.layer.1 not fused: output.dense is no linear with activations quantized per token" in text
    assert "encoder layers" not in str(summary(replace_linear(model())))


def test_a_bad_mask_says_what_it_should_be() -> None:
    optimized = optimize(model())
    with torch.no_grad(), pytest.raises(ValueError, match="attention_mask must be"):
        optimized.encoder.layer[0](torch.randn(2, 5, 64), torch.ones(2, 5, dtype=torch.bool))


def test_compile() -> None:
    """One graph for every size. Compiled embeddings round differently, and a code may move by one."""
    optimized = optimize(model())
    torch._dynamo.reset()
    compiled = torch.compile(optimized, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for batch, length in ((3, 20), (2, 16), (5, 33)):
            ids, mask = inputs(batch, length)
            assert relative(state(compiled, ids, mask), state(optimized, ids, mask), mask) < 0.02


def test_what_transformers_is_used() -> None:
    optimized = optimize(model())
    with torch.no_grad():
        y = optimized.encoder.layer[0](torch.randn(1, 3, 64))
    assert isinstance(y, tuple) == (int(transformers.__version__.split(".")[0]) < 5)
    assert pyqkern.optimize is optimize
