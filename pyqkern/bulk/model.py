"""Embedder and Classifier: a model's folder, its tokenizer, and texts to rows."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pyqkern.bulk.settings import BATCH_TOKENS, FLOAT, Settings, checked
from pyqkern.bulk.values import normalized, pool, probabilities, stored
from pyqkern.checkpoints.files import read_json
from pyqkern.models.optimize import optimize
from pyqkern.models.summary import summary
from pyqkern.nn.embedding import QEmbedding
from pyqkern.nn.fused import QFusedLayer
from pyqkern.nn.linear import QLinear
from pyqkern.schemes import Scheme

if TYPE_CHECKING:
    from typing_extensions import Self

# Modules of which each row of the output is computed alone: beside quantized and fused layers nothing else may stand in
# a model whose rows are promised to be equal in any batch.
_BY_ROW = (QLinear, QFusedLayer, QEmbedding, nn.Embedding, nn.LayerNorm, nn.Dropout, nn.Identity, nn.Tanh, nn.ReLU)


class Stopped(Exception):
    """Raised where a thread was asked to stop."""


@dataclass(frozen=True)
class Rows:
    """What became of texts: columns with a row for each text that is in none of `bad`, in their order.

    bad: place of a text -> why it has no row. truncated: how many texts had more tokens than the model takes.
    """

    columns: dict[str, np.ndarray]
    bad: dict[int, str]
    truncated: int


class _TextModel:
    """What Embedder and Classifier have in common."""

    settings: Settings

    @classmethod
    def of(cls, settings: Settings) -> "Self":
        made = cls.__new__(cls)
        made._open(settings)
        return made

    def _open(self, settings: Settings) -> None:
        self.settings = checked(settings)
        self._local = threading.local()
        self.tokenizer()  # fails before the weights are read
        self.model = _read_model(self.settings)
        self.max_length = self._max_length()
        self.differs = _why_rows_differ(self.model)

    def tokenizer(self) -> Any:
        """One for each thread: that of transformers sets its own truncation in each call."""
        found = getattr(self._local, "tokenizer", None)
        if found is None:
            found = self._local.tokenizer = _read_tokenizer(Path(self.settings.model))
        return found

    def _max_length(self) -> int:
        """The least of what the tokenizer, the model, sentence-transformers' files and the settings say."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        offset = self.model.config.pad_token_id + 1 if _counts_from_padding(self.model) else 0
        found = [self.tokenizer().model_max_length, positions - offset if positions else None, self.settings.max_length]
        file = Path(self.settings.model, "sentence_bert_config.json")
        if file.exists() and self.settings.max_length is None:
            found.append(read_json(file).get("max_seq_length"))
        return int(min(number for number in found if number is not None))

    def run(self, texts: Sequence[str], stopped: Callable[[], bool] = bool) -> Rows:
        """Rows of the texts, each a str that UTF-8 can encode. stopped: True before a batch raises Stopped."""
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)  # of this thread; a nanny of Dask sets OMP_NUM_THREADS=1
        tokens, truncated = self._tokens(list(texts))
        order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
        columns: dict[str, np.ndarray] = {}
        with torch.inference_mode():
            for batch in _batches(order, tokens, self.settings.batch_tokens):
                if stopped():
                    raise Stopped
                values = self._values([tokens[i] for i in batch])
                for name, value in values.items():
                    if name not in columns:
                        columns[name] = np.empty((len(tokens), *value.shape[1:]), value.dtype)
                    columns[name][batch] = value
        columns = columns or self._nothing()
        good = columns.pop("finite")
        bad = {int(i): "the model's output is not finite" for i in np.flatnonzero(~good)}
        return Rows({name: column[good] for name, column in columns.items()}, bad, truncated)

    def _tokens(self, texts: list[str]) -> tuple[list[list[int]], int]:
        """Token ids of each text, cut to max_length, and how many texts were cut."""
        if not texts:
            return [], 0
        tokenizer = self.tokenizer()
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        ids = tokenizer(texts, truncation=True, max_length=self.max_length, **options)["input_ids"]
        full = [text for text, one in zip(texts, ids, strict=True) if len(one) >= self.max_length]
        whole = tokenizer(full, **options)["input_ids"] if full else []
        return ids, sum(len(one) > self.max_length for one in whole)

    def _padded(self, batch: list[list[int]]) -> dict[str, Tensor]:
        ids = torch.full((len(batch), max(1, len(batch[0]))), self.tokenizer().pad_token_id)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(batch):
            ids[row, : len(one)] = torch.tensor(one, dtype=torch.int64)
            mask[row, : len(one)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def _values(self, batch: list[list[int]]) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def empty(self) -> dict[str, np.ndarray]:
        """The columns of no text, with the types and widths that they have."""
        return self.run([]).columns

    def _nothing(self) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            return {name: value[:0] for name, value in self._values(self._tokens(["a"])[0]).items()}


class Embedder(_TextModel):
    """Texts to embeddings, in one process: what `embed` runs in each worker.

    model: a folder as save_pretrained writes it, with a tokenizer. scheme: what its linears are quantized with, by
    default "int8"; "float32": not at all; left out for a folder that is quantized already. pooling: "mean" or "cls", by
    default what sentence-transformers' files in the folder say, else "mean". dtype: "fp32", "int8" or "binary"; see
    `stored`. max_length: tokens that are read of a text; by default as many as the model takes. batch_tokens: of a
    batch, padding included. threads: torch is set to, in the thread that calls; None leaves it as it is. Raises
    TypeError and ValueError; OSError for files that cannot be read.

    `differs` is None where a row has the same bits in any batch, else it says why that is not promised.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        scheme: str | Scheme | None = None,
        pooling: str | None = None,
        normalize: bool = True,
        dtype: str = "fp32",
        max_length: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
        threads: int | None = None,
    ) -> None:
        options = (scheme, pooling, normalize, dtype, max_length, batch_tokens, threads)
        self._open(Settings(str(model), "embed", *options))

    def __call__(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """The columns of `stored`, with a row for each text. ValueError where the model gives NaN or infinity."""
        return _all_rows(self.run(texts))

    def _values(self, batch: list[list[int]]) -> dict[str, np.ndarray]:
        hidden = self.model(**self._padded(batch)).last_hidden_state
        x = pool(hidden, [max(1, len(one)) for one in batch], str(self.settings.pooling))
        finite = x.isfinite().all(1)
        x = normalized(x) if self.settings.normalize else x
        return {**stored(torch.where(finite[:, None], x, 0), self.settings.dtype), "finite": finite.numpy()}


class Classifier(_TextModel):
    """Texts to labels, in one process: what `classify` runs in each worker. The arguments are those of `Embedder`.

    The model is one for sequence classification with two labels or more. `labels` has their names.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        scheme: str | Scheme | None = None,
        max_length: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
        threads: int | None = None,
    ) -> None:
        options: dict[str, Any] = {"max_length": max_length, "batch_tokens": batch_tokens, "threads": threads}
        self._open(Settings(str(model), "classify", scheme, **options))

    def _open(self, settings: Settings) -> None:
        super()._open(settings)
        config = self.model.config
        if config.num_labels < 2:
            raise ValueError(f"model must be a classifier with 2 labels or more, got {config.num_labels}")
        self.labels = [str(config.id2label.get(i, i)) for i in range(config.num_labels)]
        self._multi_label = config.problem_type == "multi_label_classification"

    def __call__(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Columns, with a row for each text: label, the name of the most probable; probability, float32, its own;
        probabilities, float32 [labels]. ValueError where the model gives NaN or infinity.
        """
        return _all_rows(self.run(texts))

    def _values(self, batch: list[list[int]]) -> dict[str, np.ndarray]:
        logits = self.model(**self._padded(batch)).logits
        finite = logits.isfinite().all(1)
        values = probabilities(torch.where(finite[:, None], logits, 0), self._multi_label)
        best = values.argmax(1)
        return {
            "label": np.array(self.labels, dtype=object)[best.numpy()],
            "probability": values.gather(1, best[:, None])[:, 0].numpy(),
            "probabilities": values.numpy(),
            "finite": finite.numpy(),
        }


def _all_rows(rows: Rows) -> dict[str, np.ndarray]:
    if rows.bad:
        raise ValueError(f"texts must give finite outputs, but number {next(iter(rows.bad))} does not")
    return rows.columns


_reading = threading.Lock()


def text_model(settings: Settings) -> _TextModel:
    """The Embedder or Classifier of these settings, read once in a process."""
    with _reading:
        return _text_model(settings)


@lru_cache(maxsize=2)
def _text_model(settings: Settings) -> _TextModel:
    return (Embedder if settings.task == "embed" else Classifier).of(settings)


# ---- reading


def _read_model(settings: Settings) -> Any:
    transformers = _transformers()
    auto = transformers.AutoModel if settings.task == "embed" else transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(settings.model, trust_remote_code=False).eval()
    if settings.scheme == FLOAT:
        return model.float()
    if settings.scheme is None:
        return optimize(model, include=lambda name, module: False)  # what its folder has in float stays so
    return optimize(model.float(), settings.scheme)


def _read_tokenizer(folder: Path) -> Any:
    """Raises ValueError for a folder without one, or whose tokenizer cannot pad."""
    try:
        tokenizer = _transformers().AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # it has a dozen ways to say so
        raise ValueError(f"{folder} must have a tokenizer beside the model: {error}") from error
    files = [*type(tokenizer).vocab_files_names.values()]
    if files and not any((folder / name).exists() for name in ("tokenizer.json", *files)):
        raise ValueError(f"{folder} must have a tokenizer beside the model: none of {', '.join(files)} is there")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer of {folder} must have a token for padding")
    return tokenizer


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise RuntimeError('pyqkern.bulk needs transformers: pip install "pyqkern[hf,bulk]"') from error
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return transformers


def _counts_from_padding(model: nn.Module) -> bool:
    """Whether positions begin behind the padding's index, as RoBERTa's do."""
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    return any(getattr(table, "padding_idx", None) is not None for table in tables)


def _batches(order: Sequence[int], tokens: list[list[int]], budget: int) -> Iterator[list[int]]:
    """Places of texts, the longest first, as many as have `budget` tokens with their padding; one at least."""
    start = 0
    while start < len(order):
        count = max(1, budget // max(1, len(tokens[order[start]])))
        yield list(order[start : start + count])
        start += count


def _why_rows_differ(model: nn.Module) -> str | None:
    """Why a row's bits may depend on its batch; None where they do not."""
    report = summary(model)
    if not any(isinstance(module, QFusedLayer) for module in model.modules()):
        return "no layer of the model is one of pyqkern's operators"
    for record in (*report.encoders, *report.decoders):
        if record.reason is not None:
            return f"{record.name}: {record.reason}"
    return next(_torch_modules(model, ""), None)


def _torch_modules(module: nn.Module, name: str) -> Iterator[str]:
    """What of a model is computed by torch in a way that may depend on the batch."""
    if isinstance(module, _BY_ROW):
        return
    children = list(module.named_children())
    is_activation = type(module).__module__.startswith(("transformers.activations", "torch.nn.modules.activation"))
    if not children and not is_activation and list(module.parameters(recurse=False)):
        yield f"{name} is a {type(module).__name__} of torch"
    for child_name, child in children:
        yield from _torch_modules(child, f"{name}.{child_name}".lstrip("."))
