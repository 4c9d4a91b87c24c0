"""QEmbedding and replace_embedding: against the dequantized table, on every ISA."""

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import FLOATS, generator, seeds
from torch import nn

from pyqkern import QEmbedding, QEmbeddingBag, QLinear, replace_embedding, replace_linear, summary
from pyqkern.backends import cpu, reference
from pyqkern.nn.four_bit import Linear4bit
from pyqkern.ops import four_bit as ops_four_bit
from pyqkern.ops import registry
from pyqkern.schemes import FP4, NF4, Int4

NESTED = NF4(blocksize=32, double_quant=True)  # in the examples, of more than one block of 256 scales
SCHEMES = ["int8", "nf4", "fp4", NESTED, FP4(blocksize=128, double_quant=True)]


def embedding(n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float32, **options: object) -> nn.Embedding:
    layer = nn.Embedding(n, k, dtype=dtype, **options)  # type: ignore[arg-type]
    layer.weight.data = torch.randn(n, k, generator=generator(seed)).to(dtype)
    return layer


@given(
    n=st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 80, 100, 130])),
    k=st.one_of(st.integers(1, 40), st.sampled_from([32, 64, 96, 128, 192])),
    shape=st.sampled_from([(), (1,), (5,), (3, 4), (0,), (700,)]),
    scheme=st.sampled_from(SCHEMES),
    dtype=st.sampled_from(FLOATS),
    ids_dtype=st.sampled_from([torch.int64, torch.int32]),
    seed=seeds,
)
@example(n=130, k=192, shape=(700,), scheme=NESTED, dtype=torch.float32, ids_dtype=torch.int64, seed=0)
@example(n=130, k=100, shape=(700,), scheme=NESTED, dtype=torch.float32, ids_dtype=torch.int64, seed=0)
def test_rows_are_those_of_the_dequantized_table(
    isa: str,
    n: int,
    k: int,
    shape: tuple[int, ...],
    scheme: object,
    dtype: torch.dtype,
    ids_dtype: torch.dtype,
    seed: int,
) -> None:
    layer = QEmbedding.from_embedding(embedding(n, k, seed, dtype), scheme)  # type: ignore[arg-type]
    ids = torch.randint(n, shape, generator=generator(seed)).to(ids_dtype)
    y = layer(ids)
    assert y.dtype is dtype and y.shape == (*shape, k)
    assert torch.equal(y, dequantized(layer.table)[ids.long()])


def dequantized(table: QLinear) -> torch.Tensor:
    """All rows, from the flat codes and scales that are saved, by other kernels."""
    n, k = table.out_features, table.in_features
    if isinstance(table, Linear4bit):
        flat = table._weight4bit()._replace(packed=table._plain("weight"), absmax=table._plain("absmax"))
        return torch.ops.pyqkern.dequantize_4bit(*flat, table.dtype)
    codes = torch.ops.pyqkern.int8_unpack(table.packed, n, k)
    return (codes * table.weight_scale.unsqueeze(1)).to(table.dtype)


@given(n=st.sampled_from([5, 16, 70]), k=st.sampled_from([64, 96, 40]), scheme=st.sampled_from(SCHEMES), seed=seeds)
def test_a_device_without_kernels_has_the_same_rows(n: int, k: int, scheme: object, seed: int) -> None:
    """The plain-torch way, of the table in the reference's form: what CUDA and others run."""
    layer = QEmbedding.from_embedding(embedding(n, k, seed), scheme)  # type: ignore[arg-type]
    table, ids = layer.table, torch.randint(n, (9,), generator=generator(seed))
    if scheme == "int8":
        codes = torch.ops.pyqkern.int8_unpack(table.packed, n, k)
    else:
        weight = table._weight4bit()._replace(packed=table._plain("weight").view(-1), absmax=table._plain("absmax"))
    registry.BACKENDS["cpu"] = reference
    try:
        if scheme == "int8":
            y = torch.ops.pyqkern.int8_embedding(ids, codes, table.weight_scale, k, torch.float32)
        else:
            y = ops_four_bit.embedding_4bit(ids, weight, torch.float32)
    finally:
        registry.BACKENDS["cpu"] = cpu
    assert torch.equal(y, layer(ids))


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_the_error_is_that_of_the_linears_weight(scheme: str) -> None:
    """Half a step of 1/127 of the row's absmax in int8; in nf4, half of the widest gap of the codebook."""
    layer = embedding(300, 128)
    widest = {"int8": 0.5 / 127, "nf4": 0.1520}[scheme]
    error = (QEmbedding.from_embedding(layer, scheme).weight - layer.weight).abs()
    assert (error <= layer.weight.abs().amax(1, keepdim=True) * widest * 1.0001).all()


@pytest.mark.parametrize("scheme", ["int8", "nf4", Int4(group_size=32)], ids=repr)
def test_state_dict_deepcopy_and_dtype(scheme: object) -> None:
    ids = torch.arange(20)
    layer = QEmbedding.from_embedding(embedding(20, 64, padding_idx=3), scheme)  # type: ignore[arg-type]
    other = QEmbedding.from_embedding(embedding(20, 64, seed=1), scheme)  # type: ignore[arg-type]
    assert layer.padding_idx == 3 and (layer.num_embeddings, layer.embedding_dim) == (20, 64)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(ids), layer(ids)) and torch.equal(copy.deepcopy(layer)(ids), layer(ids))
    half = copy.deepcopy(layer).half()
    assert half(ids).dtype is torch.float16 and torch.equal(half(ids), layer(ids).half())


def test_ids_that_do_not_exist() -> None:
    for scheme in ("int8", "nf4"):
        layer = QEmbedding.from_embedding(embedding(20, 64), scheme)
        for ids, wrong in (([3, 20], 20), ([-1, 3], -1)):
            with pytest.raises(IndexError, match=rf"ids must be within \[0, 20\), got {wrong}"):
                layer(torch.tensor(ids))
        with pytest.raises(TypeError, match=r"ids must be int64 or int32, got torch\.float32"):
            layer(torch.tensor([1.0]))


def test_what_cannot_be_made() -> None:
    with pytest.raises(ValueError, match=r"max_norm must be None, got 1\.0"):
        QEmbedding.from_embedding(embedding(4, 4, max_norm=1.0))
    with pytest.raises(ValueError, match="scheme of an embedding must be one of"):
        QEmbedding.from_embedding(embedding(4, 4), "int8-static")
    with pytest.raises(TypeError, match=r"embedding must be an nn\.Embedding, got Linear"):
        QEmbedding.from_embedding(nn.Linear(4, 4))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        replace_embedding(3)  # type: ignore[arg-type]


def test_operators_pass_opcheck() -> None:
    ids = torch.tensor([[1, 2, 19], [0, 0, 4]])
    table = QEmbedding.from_embedding(embedding(20, 64), "int8").table
    arguments = (ids, table.packed, table.weight_scale, 64, torch.float32)
    torch.library.opcheck(torch.ops.pyqkern.int8_embedding.default, arguments)
    for scheme in ("nf4", NF4(double_quant=True)):
        table = QEmbedding.from_embedding(embedding(20, 64), scheme).table
        rest = (*table._weight4bit()[:5], "nf4", 64, 20, 64, torch.bfloat16)
        torch.library.opcheck(torch.ops.pyqkern.embedding_4bit.default, (ids, *rest))


# ---- in a model


class Tagger(nn.Module):
    """An embedding under two names, one with a tied head, and what is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.words = embedding(50, 64)
        self.words_again = self.words
        self.kinds = embedding(3, 64, seed=1)
        self.scaled = _Scaled(10, 64)
        self.bounded = embedding(10, 64, max_norm=2.0)
        self.head = nn.Linear(64, 50)
        self.head.weight = self.words.weight
        self.other = nn.Linear(64, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.words(ids) + self.words_again(ids) + self.kinds(ids % 3) + self.scaled(ids % 10)
        return self.head(hidden + self.bounded(ids % 10)) + self.other(hidden).sum(-1, keepdim=True)


class _Scaled(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 8


def test_a_model_with_a_tied_head() -> None:
    model, ids = Tagger().eval(), torch.arange(12)
    before = model(ids)
    assert replace_embedding(model, "int8") is model
    assert model.words is model.words_again and model.words.table is model.head and isinstance(model.head, QLinear)
    assert type(model.other) is nn.Linear
    # The float embeddings and head have the rows that were quantized: what is left is the head's activations.
    table = QEmbedding.from_embedding(Tagger().words).weight
    assert torch.equal(model.words.weight, table) and torch.equal(model.head.weight, table)
    assert (model(ids) - before).norm() < 0.03 * before.norm()
    kept = {record.name: record.reason for record in summary(model).embeddings if record.scheme is None}
    assert kept.keys() == {"scaled", "bounded"}
    assert kept["scaled"] == "subclass of nn.Embedding: _Scaled, whose forward may be its own"
    assert kept["bounded"].startswith("max_norm")  # type: ignore[union-attr]


def test_two_embeddings_of_one_weight_share_one_table() -> None:
    model = nn.ModuleList([embedding(20, 64), embedding(20, 64)])
    model[1].weight = model[0].weight
    replace_embedding(model, "nf4")
    assert model[0] is not model[1] and model[0].table is model[1].table


def test_summary_counts_shared_bytes_once() -> None:
    model = Tagger()
    before = summary(model)
    parameters = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert before.bytes_before == before.bytes_after == parameters
    replace_linear(replace_embedding(model, "nf4"), "int8")
    after = summary(model)
    tensors = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in _tensors(model)}
    assert after.bytes_after == sum(tensors.values()) and after.bytes_before == parameters
    assert [r.scheme for r in after.embeddings] == ["nf4", "nf4", None, None]
    assert [r.scheme for r in after.records] == ["nf4", "int8"] and after.embeddings[0].bytes_after == 0
    text = str(after)
    assert "2 of 2 linears quantized" in text and "2 of 4 embeddings quantized" in text
    assert after.to_dict()["embeddings"][1]["name"] == "kinds"


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def test_include_and_exclude() -> None:
    model = replace_embedding(Tagger(), include=["w*", "kinds"], exclude="kinds")
    assert isinstance(model.words, QEmbedding) and type(model.kinds) is nn.Embedding
    assert [r.reason for r in summary(model).embeddings][1] == "excluded"
    with pytest.raises(ValueError, match="exclude must match the name of an embedding, got 'head'; the embeddings are"):
        replace_embedding(Tagger(), exclude="head")


def test_a_weight_that_something_else_shares_is_kept() -> None:
    model = Tagger()
    model.mixer = nn.Module()  # type: ignore[assignment]
    model.mixer.table = model.words.weight
    replace_embedding(model)
    assert type(model.words) is nn.Embedding and type(model.head) is nn.Linear
    assert summary(model).embeddings[0].reason == "its weight is shared with mixer.table"


def test_nan_leaves_the_model_as_it_was() -> None:
    model = Tagger()
    model.kinds.weight.data[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"kinds: weight must be finite"):
        replace_embedding(model)
    assert type(model.words) is nn.Embedding and type(model.head) is nn.Linear


def test_a_bare_embedding_and_hooks() -> None:
    layer, seen = embedding(20, 64), []
    handle = layer.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    quantized = replace_embedding(layer)
    assert isinstance(quantized, QEmbedding)
    quantized(torch.arange(3))
    handle.remove()
    quantized(torch.arange(3))
    assert seen == [(3, 64)] and replace_embedding(quantized) is quantized


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_compile_and_export(scheme: str) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(QEmbedding.from_embedding(embedding(50, 64), scheme), nn.ReLU()).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for ids in (torch.arange(12), torch.arange(30)):
        assert torch.equal(compiled(ids), model(ids))
    exported = torch.export.export(model, (torch.arange(12),))
    assert torch.equal(exported.module()(torch.arange(12)), model(torch.arange(12)))


def test_threads_do_not_matter(two_threads: None) -> None:
    layer, ids = QEmbedding.from_embedding(embedding(500, 192), "nf4"), torch.arange(500).repeat(3)
    two = layer(ids)
    torch.set_num_threads(1)
    assert torch.equal(layer(ids), two)


@pytest.mark.parametrize(("scheme", "limit"), [("int8", 112e6), ("nf4", 62e6)])
def test_bytes_of_bert_base(scheme: str, limit: float) -> None:
    """Its shapes, counted on the meta device: 436 MB in fp32 without the pooling layer."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig(), add_pooling_layer=False)
    total, codes = 0, {"int8": 1, "nf4": 0.5 + 4 / 64}[scheme]
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            rows = module.weight.shape[0] + -module.weight.shape[0] % 16
            total += rows * module.weight.shape[1] * codes + (rows * 16 if scheme == "int8" else 0)
    rest = sum(p.numel() * 4 for p in model.parameters() if p.dim() == 1) + sum(b.nbytes for b in model.buffers())
    assert total + rest <= limit
    small = embedding(3052, 768)
    measured = summary(QEmbedding.from_embedding(small, scheme)).bytes_after
    assert measured == pytest.approx(3056 * 768 * codes + (3056 * 16 if scheme == "int8" else 0), rel=0.001)


# ---- nn.EmbeddingBag


def bags(scheme: str = "int8", **options: Any) -> tuple[nn.EmbeddingBag, QEmbeddingBag]:
    """A quantized bag, and one of torch with its dequantized table."""
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(50, 64, **options)
    quantized = QEmbeddingBag.from_embedding(bag, scheme)
    bag.weight.data = quantized.weight.clone()
    return bag, quantized


@pytest.mark.parametrize("scheme", ["int8", "nf4", "int4"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bag_is_that_of_the_dequantized_table(mode: str, scheme: str) -> None:
    """Within the roundings of a sum of five: torch may take another of its kernels for another index."""
    for padding_idx in (None, 3):
        for last in (False, True):
            bag, quantized = bags(scheme, mode=mode, padding_idx=padding_idx, include_last_offset=last)
            ids = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 3, 3, 49])
            offsets = torch.tensor([0, 4, 4, 8, 10, 11])
            calls: list[Any] = [(ids[:10].view(2, 5),), (ids, offsets), (ids.int(), offsets.int())]
            calls += [(ids[:0], torch.tensor([0, 0])), (ids[:0].view(0, 3),)] if mode != "max" else []
            for arguments in calls:
                torch.testing.assert_close(quantized(*arguments), bag(*arguments), rtol=2**-22, atol=2**-22)


def test_weights_of_the_samples_and_their_gradient() -> None:
    bag, quantized = bags(mode="sum")
    ids, offsets = torch.tensor([3, 1, 4, 1]), torch.tensor([0, 3])
    of_samples = [torch.randn(4, generator=generator(0)).requires_grad_() for _ in range(2)]
    for module, weights in zip((bag, quantized), of_samples, strict=True):
        y = module(ids, offsets, per_sample_weights=weights)
        y.square().sum().backward()
    torch.testing.assert_close(of_samples[0].grad, of_samples[1].grad)
    with pytest.raises(IndexError, match="ids must be within"):
        quantized(torch.tensor([50]), torch.tensor([0]))
    with pytest.raises(TypeError, match=r"embedding must be an nn\.EmbeddingBag"):
        QEmbeddingBag.from_embedding(nn.Embedding(4, 4))


def test_bags_are_replaced_saved_and_compiled() -> None:
    bag, _ = bags(mode="mean", padding_idx=1)
    model = replace_embedding(nn.Sequential(bag))
    found = summary(model).embeddings
    assert [(one.name, one.scheme, one.shape) for one in found] == [("0", "int8", (50, 64))]
    ids = torch.arange(12).view(3, 4)
    with torch.no_grad():
        expected = model(ids)
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(ids), expected)
        other = replace_embedding(nn.Sequential(nn.EmbeddingBag(50, 64, padding_idx=1)))
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(ids), expected) and torch.equal(copy.deepcopy(model)(ids), expected)
    assert not model[0].in_float(nn.Parameter(model[0].weight.clone())).weight.is_meta
    renormed = replace_embedding(nn.Sequential(nn.EmbeddingBag(5, 4, max_norm=1.0)))
    assert type(renormed[0]) is nn.EmbeddingBag and "max_norm" in str(summary(renormed))
