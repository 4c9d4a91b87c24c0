"""Rows of an Embedder and a Classifier: against plain torch, and the same bits in every batch."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from bulk_folders import TEXTS, classifier, embedding_model
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import pyqkern
from pyqkern.bulk import Classifier, Embedder
from pyqkern.bulk.values import normalized, pool, row_sums, stored


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedding_model(tmp_path_factory.mktemp("embed"))


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("classify"))


@pytest.mark.parametrize("scheme", ["int8", "int8-a7", "nf4"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(folder: Path, scheme: str, pooling: str) -> None:
    embedder = Embedder(folder, scheme=scheme, pooling=pooling)
    assert embedder.differs is None
    together = embedder(TEXTS)["embedding"]
    small = Embedder(folder, scheme=scheme, pooling=pooling, batch_tokens=40)(TEXTS[::-1])["embedding"][::-1]
    alone = np.concatenate([embedder([text])["embedding"] for text in TEXTS])
    assert (together == alone).all() and (together == small).all()


@pytest.mark.usefixtures("two_threads")
def test_a_row_has_the_same_bits_on_any_number_of_threads(folder: Path) -> None:
    embedder = Embedder(folder)
    two = embedder(TEXTS)["embedding"]
    torch.set_num_threads(1)
    assert (embedder(TEXTS)["embedding"] == two).all()


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_a_label_has_the_same_bits_alone_and_in_any_batch(tmp_path: Path, problem: str) -> None:
    model = Classifier(classifier(tmp_path, problem_type=problem, num_labels=37))
    together = model(TEXTS)
    alone = [model([text]) for text in TEXTS]
    assert model.differs is None
    for name in ("label", "probability", "probabilities"):
        assert (together[name] == np.concatenate([one[name] for one in alone])).all()


def test_embeddings_are_those_of_transformers(folder: Path) -> None:
    """Without quantization, within the rounding of sums of as many terms as there are tokens and channels."""
    got = Embedder(folder, scheme="float32")(TEXTS)["embedding"]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    for text, row in zip(TEXTS, got, strict=True):
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=64)
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state[0].double()
        wanted = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        # 64 tokens and 64 channels: 128 roundings of 2^-24 each, of values below 1; and what two orders of the model's
        # own sums, of at most 128 products in each of two layers, make of LayerNorm's outputs.
        assert np.abs(row - wanted.numpy()).max() < 1024 * 2**-24


def test_labels_are_those_of_the_model(labels: Path) -> None:
    got = Classifier(labels)(TEXTS)
    model = pyqkern.optimize(AutoModelForSequenceClassification.from_pretrained(labels).eval())
    tokenizer = AutoTokenizer.from_pretrained(labels)
    for i, text in enumerate(TEXTS):
        with torch.inference_mode():
            logits = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=64)).logits[0]
        wanted = logits.softmax(0)
        assert (got["probabilities"][i] == wanted.numpy()).all() and got["probability"][i] == wanted.max()
        assert got["label"][i] == model.config.id2label[int(wanted.argmax())]


def test_int8_and_binary_are_codes_of_fp32(folder: Path) -> None:
    whole = Embedder(folder)(TEXTS)["embedding"]
    int8, binary = (Embedder(folder, dtype=dtype)(TEXTS) for dtype in ("int8", "binary"))
    assert int8["embedding"].dtype == np.int8 and np.abs(int8["embedding"]).max(1).tolist() == [127] * len(TEXTS)
    # Half a step of rounding, and the roundings of x / scale and of the product, 127 * 2^-24 of a step each.
    error = np.abs(int8["scale"][:, None].astype(np.float64) * int8["embedding"] - whole)
    assert (error <= int8["scale"][:, None] * (0.5 + 256 * 2**-24)).all()
    assert (binary["embedding"] == np.packbits(whole > 0, axis=1)).all()
    assert np.allclose(binary["scale"], np.abs(whole).mean(1), rtol=64 * 2**-24, atol=0)


def test_values_of_rows_of_zeros_and_of_tiny_ones() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [1e-45, 0.0, -1e-45]])
    assert normalized(x[:1]).tolist() == [[0, 0, 0]]
    found = stored(x, "int8")
    assert found["embedding"].tolist() == [[0, 0, 0], [0, 0, 0]] and found["scale"].tolist() == [1, 1]
    assert row_sums(torch.arange(7.0)[None]).item() == 21 and row_sums(torch.ones(2, 1)).shape == (2, 1)


def test_pooling_leaves_padding_out() -> None:
    hidden = torch.arange(24.0).view(2, 3, 4)
    hidden[1, 1:] = float("nan")
    assert (pool(hidden, [3, 1], "mean") == torch.stack([hidden[0].mean(0), hidden[1, 0]])).all()
    assert (pool(hidden, [3, 1], "cls") == hidden[:, 0]).all()


def test_texts_longer_than_the_model_takes_are_cut_and_counted(folder: Path) -> None:
    long = "card " * 500
    rows = Embedder(folder).run(["card", long, "card " * 61, "card " * 62, "card " * 63])
    assert rows.truncated == 2  # 64 tokens with [CLS] and [SEP]
    assert (rows.columns["embedding"][1] == rows.columns["embedding"][3]).all()
    assert Embedder(folder, max_length=5).run(["a b c", "a b c d"]).truncated == 1


def test_a_row_that_is_not_finite_is_named(tmp_path: Path) -> None:
    folder = embedding_model(tmp_path)
    embedder = Embedder(folder)
    word = embedder.tokenizer()("passcode")["input_ids"][1]
    with torch.no_grad():
        embedder.model.embeddings.word_embeddings.weight[word] = float("nan")
    texts = ["card", "passcode", "money"]
    rows = embedder.run(texts)
    assert rows.bad == {1: "the model's output is not finite"}
    assert (rows.columns["embedding"] == Embedder(folder)(["card", "money"])["embedding"]).all()
    with pytest.raises(ValueError, match="number 1"):
        embedder(texts)


def test_what_is_not_promised_is_said(folder: Path, tmp_path: Path) -> None:
    assert "no layer" in str(Embedder(folder, scheme="float32").differs)
    assert "layer" in str(Embedder(folder, scheme="int8-weight-only").differs)
    pyqkern.convert.quantize(classifier(tmp_path / "float"), tmp_path / "kept", "int8", exclude=["classifier"])
    kept = Classifier(tmp_path / "kept")
    assert kept.differs == "classifier is a Linear of torch" and type(kept.model.classifier) is torch.nn.Linear


def test_a_folder_that_is_quantized_gives_the_same_rows(folder: Path, tmp_path: Path) -> None:
    pyqkern.convert.quantize(folder, tmp_path / "quantized", "int8")
    embedder = Embedder(tmp_path / "quantized")
    assert embedder.differs is None and (embedder(TEXTS)["embedding"] == Embedder(folder)(TEXTS)["embedding"]).all()
    with pytest.raises(ValueError, match="scheme must be left out"):
        Embedder(tmp_path / "quantized", scheme="int8")


def test_no_texts_and_empty_ones(folder: Path, labels: Path) -> None:
    assert Embedder(folder)([])["embedding"].shape == (0, 64)
    assert {name: len(column) for name, column in Classifier(labels)([]).items()} == {
        "label": 0, "probability": 0, "probabilities": 0,
    }  # fmt: skip
    assert np.isfinite(Embedder(folder)([""])["embedding"]).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scheme": "int9"}, ValueError, "scheme must be one of"),
        ({"scheme": "int8-static"}, ValueError, "no calibration"),
        ({"pooling": "max"}, ValueError, "pooling must be one of mean, cls"),
        ({"dtype": "int4"}, ValueError, "dtype must be one of"),
        ({"normalize": 1}, TypeError, "normalize must be a bool"),
        ({"max_length": 2}, ValueError, "max_length must be at least 3"),
        ({"max_length": 8.0}, TypeError, "max_length must be an int"),
        ({"batch_tokens": 0}, ValueError, "batch_tokens must be at least 1"),
        ({"threads": True}, TypeError, "threads must be an int"),
    ],
)
def test_wrong_settings(folder: Path, options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Embedder(folder, **options)  # type: ignore[arg-type]


def test_wrong_models(folder: Path, labels: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model must be a folder"):
        Embedder(tmp_path / "nowhere")
    tiny.saved(tiny.bert(), tmp_path / "bare")
    with pytest.raises(ValueError, match="must have a tokenizer"):
        Embedder(tmp_path / "bare")
    with pytest.raises(ValueError, match="2 labels or more, got 1"):
        Classifier(classifier(tmp_path / "one", num_labels=1))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert Embedder(folder).settings.pooling == "cls"
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(ValueError, match="mean or CLS pooling, got max_tokens; give pooling"):
        Embedder(folder)
    assert Embedder(folder, pooling="mean").settings.pooling == "mean"
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    with pytest.raises(ValueError, match="got Dense"):
        Embedder(folder, pooling=None)
