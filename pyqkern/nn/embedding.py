"""QEmbedding and QEmbeddingBag, with a quantized table. `pyqkern.replace_embedding` puts them into a model.

The table is a QLinear without its product: the same codes, scales, packing and state_dict, `[num_embeddings,
embedding_dim]` in place of `[out_features, in_features]`. So an output head tied to the embedding is that very module.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyqkern.nn.linear import QLinear, as_linear
from pyqkern.schemes import SCHEMES, Scheme, check_type, get_scheme


class QEmbedding(nn.Module):
    """ids, int64 or int32 of any shape -> [*ids.shape, embedding_dim] in `dtype`, the dequantized rows of the table.

    Made by `QEmbedding.from_embedding(embedding, scheme)` or by `replace_embedding`. `table` is the QLinear that holds
    the weight; where an output head is tied to the embedding, the head is that module. No gradient reaches it.

    Raises IndexError for ids outside of [0, num_embeddings), on CUDA as torch does; TypeError for their dtype.
    """

    def __init__(self, table: QLinear, padding_idx: int | None = None) -> None:
        super().__init__()
        self.table = table
        self.padding_idx = padding_idx

    @classmethod
    def from_embedding(cls, embedding: nn.Module, scheme: str | Scheme = "int8") -> "QEmbedding":
        """A quantized copy of `embedding`, on its device. scheme: "int8", "int8-weight-only", "nf4", "fp4" or "int4".

        Raises as QLinear.from_linear, and ValueError for an embedding with max_norm, which changes its weight.
        """
        scheme = check_embedding_scheme(scheme)
        kind = next(kind for kind, quantized in EMBEDDINGS.items() if quantized is cls)
        if not isinstance(embedding, kind):
            raise TypeError(f"embedding must be an nn.{kind.__name__}, got {type(embedding).__name__}")
        if embedding.max_norm is not None:
            raise ValueError(
                f"max_norm must be None, got {embedding.max_norm}; the layer renormalizes its float weight"
            )
        return cls.of_table(quantized_table(embedding, scheme), embedding)

    @classmethod
    def of_table(cls, table: QLinear, embedding: Any) -> "QEmbedding":
        """The quantized form of `embedding` with that table, which may be the output head tied to it."""
        return cls(table, embedding.padding_idx).train(embedding.training)

    def in_float(self, weight: nn.Parameter) -> nn.Module:
        """The float embedding with that weight."""
        embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        embedding.weight = weight
        return embedding.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        check_type("input", input, Tensor, "a tensor of ids")
        return self.table.rows(input)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            setattr(self.table, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def num_embeddings(self) -> int:
        return self.table.out_features

    @property
    def embedding_dim(self) -> int:
        return self.table.in_features

    @property
    def scheme(self) -> Scheme:
        return self.table.scheme

    @property
    def dtype(self) -> torch.dtype:
        return self.table.dtype

    @property
    def weight(self) -> Tensor:
        """The dequantized table, [num_embeddings, embedding_dim] in `dtype`: see `QLinear.weight`."""
        return self.table.weight

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme.name}"


class QEmbeddingBag(QEmbedding):
    """An nn.EmbeddingBag with a quantized table: input, offsets and per_sample_weights as there, modes sum, mean, max.

    Made by `QEmbeddingBag.from_embedding(bag, scheme)` or by `replace_embedding`. The rows are dequantized to `dtype`,
    then reduced by torch's own embedding_bag; per_sample_weights, of that dtype, get a gradient.

    Raises as QEmbedding, and ValueError as torch does.

    >>> import torch, pyqkern
    >>> bag = pyqkern.QEmbeddingBag.from_embedding(torch.nn.EmbeddingBag(1000, 64, mode="sum"))
    >>> bag(torch.tensor([3, 1, 4, 1, 5]), torch.tensor([0, 2])).shape
    torch.Size([2, 64])
    """

    def __init__(
        self,
        table: QLinear,
        padding_idx: int | None = None,
        mode: str = "mean",
        include_last_offset: bool = False,
    ) -> None:
        super().__init__(table, padding_idx)
        if mode not in ("sum", "mean", "max"):
            raise ValueError(f'mode must be "sum", "mean" or "max", got {mode!r}')
        self.mode, self.include_last_offset = mode, include_last_offset

    @classmethod
    def of_table(cls, table: QLinear, embedding: Any) -> "QEmbeddingBag":
        how = (embedding.padding_idx, embedding.mode, embedding.include_last_offset)
        return cls(table, *how).train(embedding.training)

    def in_float(self, weight: nn.Parameter) -> nn.Module:
        bag = nn.EmbeddingBag(
            self.num_embeddings, self.embedding_dim, mode=self.mode, include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx, device="meta",
        )  # fmt: skip
        bag.weight = weight
        return bag.train(self.training)

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        check_type("input", input, Tensor, "a tensor of ids")
        return bag_of(self, self.table.rows(input.reshape(-1)), input, offsets, per_sample_weights)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, mode={self.mode}, scheme={self.scheme.name}"


def bag_of(bag: Any, rows: Tensor, input: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None) -> Tensor:
    """What an nn.EmbeddingBag with the attributes of `bag` gives for `input`, given its rows [numel, embedding_dim]."""
    numbers, padding = torch.arange(rows.shape[0], device=input.device).view(input.shape), None
    if bag.padding_idx is not None:  # a row of its own, which torch passes over
        padding = rows.shape[0]
        numbers = numbers.masked_fill(input == bag.padding_idx, padding)
    rows = functional.pad(rows, (0, 0, 0, 1))  # without any row torch's would refuse even empty bags
    return functional.embedding_bag(
        numbers, rows, None if offsets is None else offsets.long(), mode=bag.mode,
        per_sample_weights=per_sample_weights, include_last_offset=bag.include_last_offset, padding_idx=padding,
    )  # fmt: skip


# The embeddings of torch, and what each becomes.
EMBEDDINGS: dict[type[nn.Module], type[QEmbedding]] = {nn.Embedding: QEmbedding, nn.EmbeddingBag: QEmbeddingBag}


def quantized_table(embedding: Any, scheme: str | Scheme) -> QLinear:
    """The weight of an embedding as a QLinear."""
    return QLinear.from_linear(as_linear(embedding.weight), scheme)


def check_embedding_scheme(scheme: str | Scheme) -> Scheme:
    scheme = get_scheme(scheme)
    if not scheme.embeds:
        names = ", ".join(repr(name) for name, one in SCHEMES.items() if one.embeds)
        raise ValueError(f"scheme of an embedding must be one of {names}, got {scheme.name!r}")
    return scheme
