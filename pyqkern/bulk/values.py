"""From hidden states and logits to what is stored, each row by operations whose order its batch does not change.

torch's own sums, means and sigmoids may go another way through a longer tensor, and differ in the last bit. Here sums
are chains or trees of elementwise additions, which IEEE 754 rounds correctly, and what torch rounds otherwise is called
for each row alone.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

DTYPES = ("fp32", "int8", "binary")
POOLINGS = ("mean", "cls")


def pool(hidden: Tensor, lengths: Sequence[int], pooling: str) -> Tensor:
    """Hidden states [batch, length, width] to embeddings [batch, width], float32.

    lengths: of the texts, which start at position 0; in falling order. "mean": the sum from the first token to the
    last, divided by their number; "cls": the first token.
    """
    if pooling == "cls":
        return hidden[:, 0].float()
    total = torch.zeros(hidden.shape[0], hidden.shape[2])
    rows = len(lengths)
    for position in range(lengths[0]):
        while lengths[rows - 1] <= position:
            rows -= 1
        total[:rows] += hidden[:rows, position]
    return total / torch.tensor(lengths)[:, None]


def row_sums(x: Tensor) -> Tensor:
    """Sums of the rows of [batch, width], as [batch, 1]: halves are added to each other until one column is left."""
    while x.shape[1] > 1:
        rest = x.shape[1] // 2
        half = x.shape[1] - rest
        x = torch.cat([x[:, :rest] + x[:, half:], x[:, rest:half]], 1)
    return x


def normalized(x: Tensor) -> Tensor:
    """Rows divided by their Euclidean norm; a row of zeros stays one."""
    norm = row_sums(x * x).sqrt()
    return x / torch.where(norm == 0, 1, norm)


def stored(x: Tensor, dtype: str) -> dict[str, np.ndarray]:
    """Embeddings [batch, width], float32, as columns.

    "fp32": embedding, float32 [width]. "int8": embedding, int8 [width], and scale, float32: the largest absolute value
    divided by 127, 1 for a row of zeros; x is about scale * embedding. "binary": embedding, uint8 [ceil(width / 8)],
    the signs, the highest bit first, 1 for values above 0, as numpy.packbits and sentence-transformers' "ubinary" have
    them, and scale, float32: the mean absolute value; x is about scale * (2 * bit - 1).
    """
    if dtype == "fp32":
        return {"embedding": x.numpy()}
    if dtype == "int8":
        absmax = x.abs().amax(1, keepdim=True)  # exact in any order
        scale = torch.where(absmax == 0, 1, absmax / 127)
        scale = torch.where(scale == 0, 1, scale)  # of a row so small that a 127th of it is zero
        codes = (x / scale).round().clamp(-127, 127).to(torch.int8)
        return {"embedding": codes.numpy(), "scale": scale[:, 0].numpy()}
    scale = row_sums(x.abs()) / x.shape[1]
    return {"embedding": np.packbits((x > 0).numpy(), axis=1), "scale": scale[:, 0].numpy()}


def probabilities(logits: Tensor, multi_label: bool) -> Tensor:
    """Logits [batch, labels] to probabilities, float32: softmax, or sigmoid where a text may have many labels."""
    rows = [torch.sigmoid(row.clone()) if multi_label else row.clone().softmax(0) for row in logits.float()]
    return torch.stack(rows)
