"""The shapes that every benchmark measures: BERT-base's linears and inputs; with --dry, tiny ones."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

MIB = 1 << 20

#: Everything once and as small as it gets, to see that a benchmark still runs; its figures mean nothing. The shapes
#: below are defaults of options, so that this is asked before options are parsed; processes started later ask again.
DRY = "--dry" in sys.argv

#: (in_features K, out_features N) of BERT-base: query/key/value/output, intermediate, output of the feed-forward.
LINEARS = ((64, 96),) if DRY else ((768, 768), (768, 3072), (3072, 768))

#: Rows: one token, a short query, one sentence of 128 tokens, a batch of eight.
ROWS = (2,) if DRY else (1, 16, 128, 1024)

#: The same for 4 bits, where up to four rows go another way.
ROWS_4BIT = (1, 5) if DRY else (1, 4, 16, 128, 1024)

#: Weights that a cold run goes through before it meets the same one again, so that each comes from DRAM.
COLD_BYTES = 16 << 10 if DRY else 96 * MIB

#: Elements of the float tensor that is quantized or dequantized: 1 to 256 MiB of fp32.
AFFINE_SIZES = (1 << 18,) if DRY else (1, *(1 << power for power in (6, *range(10, 27, 2))))

#: Columns of the matrix that is quantized per channel (fewer elements make one row).
AFFINE_COLUMNS = 1024

#: Elements of the tensor that is quantized to or dequantized from 4 bits.
FOUR_BIT_SIZES = (1 << 12,) if DRY else (1 << 20, 1 << 24, 1 << 26)

#: What the real model reads: random tokens take it where it was never trained, and an error there says little.
TEXT = (
    "The harbour was quiet when the first boats came back in the morning. A woman in a red coat stood on the pier "
    "and counted the crates as they were lifted ashore, forty of mackerel and eleven of crab, and wrote the numbers "
    "in a small book. My card has not arrived yet, although your letter of the third of May said that it would take "
    "no more than five working days; could you tell me where it is, and whether I can use the account until then? "
    "The theorem states that every bounded sequence of real numbers has a convergent subsequence. Its proof halves "
    "the interval again and again, and keeps a half that holds infinitely many members. To replace the battery, "
    "switch off the instrument, loosen the two screws at the back, and slide the cover to the left. Do not touch "
    "the contacts. Critics praised the acting but found the second half too long; on the opening weekend the film "
    "earned twelve million dollars. In a large pan, melt the butter over a low heat, add the onions and a pinch of "
    "salt, and cook until soft."
)

#: Model inputs, BATCHxLENGTH. "8x16-128" is a batch of 8, lengths from 16 to 128, padded to 128 under a mask.
MODEL_SIZES = ("1x16", "2x8-16") if DRY else ("1x128", "1x384", "8x128")

#: What is passed to BertConfig, whose defaults are BERT-base.
BERT: dict[str, Any] = (
    {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128} if DRY else {}
)

#: What is passed to from_pretrained for the packaged MiniLM.
MINILM: dict[str, Any] = {"num_hidden_layers": 1} if DRY else {}


def model_inputs(size: str, text_tokens: list[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both int64 [batch, length], the same for the same `size`.

    Each sentence is a stretch of `text_tokens`, taken in a circle, or random.
    """
    generator = torch.Generator().manual_seed(0)
    batch, lengths = size.split("x")
    shortest, _, longest = lengths.partition("-")
    low, high = int(shortest), int(longest or shortest)
    if text_tokens is None:
        ids = torch.randint(1000, 20000, (int(batch), high), generator=generator)
    else:
        start = torch.randint(0, len(text_tokens), (int(batch), 1), generator=generator)
        ids = torch.tensor(text_tokens)[(start + torch.arange(high)) % len(text_tokens)]
        ids[:, 0] = 101  # [CLS]
    length = torch.randint(low, high + 1, (int(batch), 1), generator=generator)
    length[0] = high
    mask = (torch.arange(high) < length).long()
    return ids * mask, mask


def _pairs(text: str) -> list[tuple[int, int]]:
    try:
        return [(int(k), int(n)) for k, n in (pair.split("x") for pair in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be KxN,KxN,... like 768x768,768x3072; got {text!r}") from None


def add_linears(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kn", type=_pairs, default=list(LINEARS),
        help="in_features x out_features (default: 768x768,768x3072,3072x768)",
    )  # fmt: skip
