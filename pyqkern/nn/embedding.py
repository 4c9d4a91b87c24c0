"""QEmbedding, an embedding with a quantized table. `pyqkern.replace_embedding` puts it into a model.

The table is a QLinear without its product: the same codes, scales, packing and state_dict, `[num_embeddings,
embedding_dim]` in place of `[out_features, in_features]`. So an output head tied to the embedding is that very module.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pyqkern.nn.linear import QLinear
from pyqkern.schemes import SCHEMES, Scheme, get_scheme


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
    def from_embedding(cls, embedding: nn.Embedding, scheme: str | Scheme = "int8") -> "QEmbedding":
        """A quantized copy of `embedding`, on its device. scheme: "int8", "int8-weight-only", "nf4", "fp4" or "int4".

        Raises as QLinear.from_linear, and ValueError for an embedding with max_norm, which changes its weight.
        """
        scheme = check_embedding_scheme(scheme)
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"embedding must be an nn.Embedding, got {type(embedding).__name__}")
        if embedding.max_norm is not None:
            raise ValueError(
                f"max_norm must be None, got {embedding.max_norm}; the layer renormalizes its float weight"
            )
        linear = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
        linear.weight = embedding.weight
        return cls(QLinear.from_linear(linear, scheme), embedding.padding_idx).train(embedding.training)

    def forward(self, input: Tensor) -> Tensor:
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


def check_embedding_scheme(scheme: str | Scheme) -> Scheme:
    scheme = get_scheme(scheme)
    if not scheme.embeds:
        names = ", ".join(repr(name) for name, one in SCHEMES.items() if one.embeds)
        raise ValueError(f"scheme of an embedding must be one of {names}, got {scheme.name!r}")
    return scheme
